"""Label every point of a lidar scan: EPCL at the bottom of a MinkUNet (the paper's later version).

    python train_outdoor.py                                     built-in streets, no download
    python train_outdoor.py --data semantickitti --root DIR     sequence 08 tests (claim: 72.4 mIoU)
    python train_outdoor.py --data folder --root DIR            yours: DIR/{train,test}/NAME.bin
    python train_outdoor.py --eval RUN --predict scan.bin       NAME.label for your scan, a picture
    python train_outdoor.py --eval RUN --export-test DIR        the benchmark's submission

To change the data, edit `load_scans` and RECIPES; the network, `Segmenter`; what stands at its
bottom, `Bottleneck`. --no-transformer leaves that out: the MinkUNet alone, the control. Lengths are
metres, z is up, the sensor is at 0.
"""
import re
import time
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Callable, NamedTuple

import run                                  # before torch: Ctrl-C during the imports
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.profiler import record_function
from tqdm import tqdm

import common
import pretrained
import render
from checkpoint import amount, check_frozen, checkpoint_form, saved_settings
from common import BatchNorm, EPCLEncoder, PointTokenizer, encoder_options
from data import kitti
from data.files import BrokenFile, absent, check_outputs
from data.kitti import IGNORE, THINGS, Scan
from kernels import interpolate
from kernels.sparse_conv import (FARTHEST, SparseTensor, devoxelise, strided_conv, submanifold_conv,
                                 transposed_conv)
from run import (InputError, Run, Setup, all_reduce, best_of, main_guard, my_rows, rank,
                 recipe_parser, seed_of, shared_flags, shared_settings, with_flags, world_size)

# ---- Recipe --------------------------------------------------------------------------------------
class Recipe(NamedTuple):
    voxel: float            # its side, metres
    width: float            # of the MinkUNet: times PLANES
    blocks: str             # residual blocks of its four stages down and its four stages up
    tokens: int             # of a scan: farthest points of the voxels at the bottom
    neighbours: int         # K
    epochs: int
    warmup: float           # epochs
    batch_size: int         # scans
    lr: float               # highest; SGD
    momentum: float
    decay: float            # weight decay of all weights
    clip_norm: float        # of the gradient
    dropout: float          # before CLIP
    every: int              # epochs from one evaluation to the next


KITTI = Recipe(             # the release, outdoor_segmentation/tools/cfgs/voxel/semantic_kitti
    voxel=0.05, width=1.6, blocks="23462222", tokens=512, neighbours=16, epochs=48, warmup=1,
    batch_size=8, lr=0.16, momentum=0.9, decay=1e-4, clip_norm=10.0, dropout=0.0, every=4)
RECIPES = {
    "semantickitti": KITTI,
    "folder": KITTI,
    # ours, sized for two CPU cores
    "synthetic": KITTI._replace(voxel=0.2, width=0.5, blocks="11111111", tokens=128, neighbours=8,
                                epochs=10, batch_size=4, lr=0.1, every=5),
}
PLANES = 32, 32, 64, 128, 256, 256, 128, 96, 96     # stem, four stages down, four up [MinkUNet]
SYNTHETIC = (120, 24)       # streets to train, to test
MOST = 1_000_000            # voxels of a scan [the release]
SHOWN, NEAR = 2, 30.0       # scans in look.png; what is drawn around the sensor, metres
VIEWS = 0, 1, -1, 2, -2, 6, -6, 7, -7, 8            # of --tta: turns by so many times 22.5 degrees


# ---- Data: files -> scans, one at a time ---------------------------------------------------------
class Data(NamedTuple):
    train: list
    test: list
    classes: tuple
    read: Callable          # one of `train` or `test` -> Scan
    form: str


def load_scans(cfg, training=True):
    """What there is to read: of files, nothing is held. training=False: the test scans will do."""
    if cfg["data"] == "synthetic":
        return load_synthetic()
    root = Path(cfg["root"] or f"data/{cfg['data']}")
    if cfg["data"] == "semantickitti":
        train = kitti.pairs(root, kitti.TRAIN) if training else []
        test = kitti.pairs(root, kitti.VAL)
        classes, table = kitti.CLASSES, kitti.published_classes()
        form = f"{root}, sequences 00 to 10; 08: {len(test):,} test scans"
    else:
        train, test, classes = kitti.own_scans(root, training)
        table, form = kitti.own_classes(classes), f"scans under {root}"
    read = lambda entry: kitti.read_scan(*entry, table, cfg["remission"])       # noqa: E731
    return Data(train, test, classes, read, form)


def load_synthetic():
    from data.synthetic_street import STREET_CLASSES, street_scans
    parts = [], []
    for part, seed, count in zip(parts, (1, 2), SYNTHETIC):
        scans = tqdm(street_scans(count, seed), total=count, desc="scanning", unit="scan",
                     disable=None, leave=False)
        part += [Scan(f"street{i:03d}", *arrays) for i, arrays in enumerate(scans)]
    return Data(*parts, STREET_CLASSES, lambda scan: scan, "streets of data/synthetic_street.py")


def ahead(work, jobs, workers):
    """Yield work(*job) for every job, in order; threads begin up to 2 · workers of them ahead. The
    processes divide the workers among them."""
    jobs, workers = iter(jobs), max(1, workers // world_size())
    with ThreadPoolExecutor(workers) as pool:
        waiting = deque(pool.submit(work, *job) for job in islice(jobs, 2 * workers))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(work, *job) for job in islice(jobs, 1))


# ---- Two scans -> one, moved ---------------------------------------------------------------------
def part_of(scan, rows):
    return Scan(scan.name, scan.xyz[rows], scan.remission[rows], scan.label[rows])


def joined(scans):
    name = " mixed with ".join(dict.fromkeys(scan.name for scan in scans))
    return Scan(name, *map(np.concatenate, list(zip(*scans))[1:]))


def turned(scan, angle):
    """Rotated about z."""
    c, s = np.cos(angle), np.sin(angle)
    turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]], np.float32)
    return scan._replace(xyz=scan.xyz @ turn.T)


def laser_mix(one, other, bands):
    """LaserMix (arXiv 2207.00026): bands of inclination, in turns from one scan and the other.

    Band 0 is what lies highest; the edges are 20 / bands degrees apart, downwards from there.
    """
    edges = np.radians(-20 / bands * np.arange(1, bands))               # descending
    parts = []
    for which, scan in enumerate((one, other)):
        tilt = np.arctan2(scan.xyz[:, 2], np.hypot(scan.xyz[:, 0], scan.xyz[:, 1]))
        band = (tilt[:, None] < edges).sum(1)
        parts.append(part_of(scan, band % 2 == which))
    return joined(parts)


def polar_mix(one, other, things, rng):
    """PolarMix (arXiv 2208.00223): the half plane on one side of a line from the other scan, or
    not; and all its `things`, class numbers, where they are and turned by two angles."""
    parts, angle = [one], rng.uniform(0, 2 * np.pi)
    if rng.random() < 0.5:
        left = [s.xyz[:, 1] * np.cos(angle) > s.xyz[:, 0] * np.sin(angle) for s in (one, other)]
        parts = [part_of(one, ~left[0]), part_of(other, left[1])]
    pasted = part_of(other, np.isin(other.label, things))
    turns = rng.uniform((0, 2 * np.pi / 3), (2 * np.pi / 3, 4 * np.pi / 3))
    return joined([*parts, *(turned(pasted, turn) for turn in (0, *turns))])


def moved(scan, rng):
    """Turned, scaled by 0.9 .. 1.1, mirrored in x, y, both or neither, shifted by about 0.1 m."""
    scan = turned(scan, rng.uniform(0, 2 * np.pi))
    scale = rng.uniform(0.9, 1.1) * np.array([*rng.choice((-1, 1), 2), 1])
    return scan._replace(xyz=(scan.xyz * scale + rng.normal(0, 0.1, 3)).astype(np.float32))


# ---- A scan -> the voxels of a step --------------------------------------------------------------
class Voxels(NamedTuple):
    coords: np.ndarray                      # (v, 3) int32, from 0
    feats: np.ndarray                       # (v, 4) float32: x y z of a point, remission
    label: np.ndarray                       # (v,) int64
    inverse: np.ndarray                     # (n,): the voxel of each point


def voxels_of(scan, side):
    """Each voxel that holds a point stands for it by the first of its points, as in the release."""
    place = np.round(scan.xyz / np.float32(side)).astype(np.int64)
    place -= place.min(0)
    size = place.max(0) + 1
    keys = (place[:, 0] * size[1] + place[:, 1]) * size[2] + place[:, 2]
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    if len(first) > MOST or size.max() > FARTHEST:
        raise BrokenFile(f"{scan.name}: {len(first):,} voxels of {side:g} m, {size.max():,} from "
                         f"end to end, at most {MOST:,} and {FARTHEST:,} are meant; train with a "
                         "larger --voxel, or take the scan out of the data")
    feats = np.c_[scan.xyz, scan.remission][first]
    return Voxels(place[first].astype(np.int32), feats, scan.label[first], inverse.reshape(-1))


def training_voxels(data, i, seed, things, cfg):
    """Training scan i, mixed with another and moved -> Voxels. All is drawn by `seed`."""
    rng, n = np.random.default_rng(seed), len(data.train)
    scan = data.read(data.train[i])
    other = data.read(data.train[(i + rng.integers(1, max(n, 2))) % n])
    if rng.random() < 0.5:
        mixed = polar_mix(scan, other, things, rng)
    elif not cfg["as_released"]:            # the release mixes up degrees and radians: one band
        mixed = laser_mix(scan, other, rng.integers(3, 7))
    else:
        mixed = scan
    return voxels_of(moved(mixed if len(mixed.xyz) else scan, rng), cfg["recipe"]["voxel"])


@record_function("data")
def batch_of(voxels, device):
    """Voxels of b scans -> coords (V, 4): scan, x, y, z; feats (V, 4); label (V,)."""
    coords = [np.c_[np.full(len(v.coords), b, np.int32), v.coords] for b, v in enumerate(voxels)]
    arrays = coords, [v.feats for v in voxels], [v.label for v in voxels]
    return [torch.from_numpy(np.concatenate(x)).to(device) for x in arrays]


# ---- Model ---------------------------------------------------------------------------------------
class Layer(nn.Module):
    """Sparse convolution and batch norm, and ReLU if asked."""

    def __init__(self, conv, taps, width_in, width, relu=True):
        super().__init__()
        self.conv, self.norm, self.relu = conv, BatchNorm(width), relu
        fan = taps * (width if conv is transposed_conv else width_in)           # as torchsparse
        bound = fan ** -0.5
        self.weight = nn.Parameter(torch.empty(taps, width_in, width).uniform_(-bound, bound))

    def forward(self, x):
        x = self.conv(x, self.weight)
        feats = self.norm(x.feats)
        return x.at(F.relu(feats) if self.relu else feats)


class Residual(nn.Module):
    """Two convolutions at the same voxels, and what came in added before the last ReLU."""

    def __init__(self, width_in, width):
        super().__init__()
        self.body = nn.Sequential(Layer(submanifold_conv, 27, width_in, width),
                                  Layer(submanifold_conv, 27, width, width, relu=False))
        self.skip = nn.Sequential()
        if width_in != width:
            self.skip = nn.Sequential(nn.Linear(width_in, width, bias=False), BatchNorm(width))

    def forward(self, x):
        out = self.body(x)
        return out.at(F.relu(out.feats + self.skip(x.feats)))


def residuals(width_in, width, count):
    return nn.Sequential(*(Residual(width if i else width_in, width) for i in range(count)))


class Bottleneck(nn.Module):
    """EPCL between encoder and decoder: voxels (V, C) of all scans -> the same, updated.

    Of each scan on its own: farthest voxels, patches, tokens, frozen transformer; three-NN back to
    its voxels, added to them. A scan with fewer voxels than tokens repeats them. Without
    transformer nothing happens here.
    """

    def __init__(self, clip, width, classes, cfg):
        super().__init__()
        r = Recipe(**cfg["recipe"])
        self.voxel, self.epcl, self.transformer = r.voxel, None, not cfg["no_transformer"]
        if self.transformer:
            self.patches = PointTokenizer(r.tokens, r.neighbours, clip.width, channels=width)
            self.epcl = EPCLEncoder(clip, task_tokens=classes, **encoder_options(cfg))
            self.back = nn.Sequential(nn.Linear(clip.width, width), BatchNorm(width), nn.ReLU())

    @property
    def clip(self):
        return self.epcl.clip if self.transformer else None

    def forward(self, x):
        if not self.transformer:
            return x
        counts = torch.bincount(x.coords[:, 0]).tolist()        # voxels of each of B scans, in turn
        rows = torch.cat([x.coords[:, 1:] * self.voxel, x.feats], 1)                # (V, 3 + C)
        least = self.patches.groups
        clouds = [part.repeat(-(-least // len(part)), 1) for part in rows.split(counts)]
        lengths = torch.tensor([len(cloud) for cloud in clouds], device=rows.device)
        points = pad_sequence(clouds, batch_first=True)                             # (B, N, 3 + C)
        tokens, centers = self.patches(points, lengths)       # (B, G, D), (B, G, 3)
        place = centers - centers.mean(1, keepdim=True)                             # (B, G, 3)
        reach = place.norm(dim=2).amax(1)[:, None, None].clamp_min(1e-6)            # (B, 1, 1)
        deep = self.epcl(tokens, place / reach).patches                             # (B, G, D)
        deep = interpolate(points[..., :3].contiguous(), centers, deep)             # (B, N, D)
        deep = torch.cat([part[:n] for part, n in zip(deep, counts)])               # (V, D)
        return x.at(x.feats + self.back(deep))


class Segmenter(nn.Module):
    """Voxels coords (V, 4), feats (V, 4) of B scans -> logits (V, C): MinkUNet (arXiv 1904.08755).

    The classifier reads the bottom, trilinearly, stage 2 of the way up, trilinearly, and the last.
    """

    def __init__(self, clip, classes, cfg):
        super().__init__()
        r = Recipe(**cfg["recipe"])
        w, n = [int(r.width * plane) for plane in PLANES], [int(b) for b in r.blocks]
        self.stem = nn.Sequential(Layer(submanifold_conv, 27, 4, w[0]),
                                  Layer(submanifold_conv, 27, w[0], w[0]))
        self.downs = nn.ModuleList([
            nn.Sequential(Layer(strided_conv, 8, w[i], w[i]), residuals(w[i], w[i + 1], n[i]))
            for i in range(4)])
        # by this name common.py finds CLIP, as in every model
        self.encoder = Bottleneck(clip, w[4], classes, cfg)
        self.ups = nn.ModuleList([Layer(transposed_conv, 8, w[i], w[i + 1]) for i in range(4, 8)])
        self.joins = nn.ModuleList([residuals(w[i + 1] + w[7 - i], w[i + 1], n[i])
                                    for i in range(4, 8)])
        self.head = nn.Linear(w[4] + w[6] + w[8], classes)
        self.as_released = cfg["as_released"]

    def forward(self, coords, feats):
        levels = [self.stem(SparseTensor(coords, feats))]       # stride 1
        for down in self.downs:
            levels.append(down(levels[-1]))                     # 2, 4, 8, 16
        bottom = levels.pop()
        x = self.encoder(bottom)
        seen = [bottom if self.as_released else x]              # there EPCL is not classified
        for up, join in zip(self.ups, self.joins):
            x = up(x)                                           # 8, 4, 2, 1
            x = join(x.at(torch.cat([x.feats, levels.pop().feats], 1)))
            seen.append(x)
        scan, place = coords[:, 0], coords[:, 1:].float()
        rows = [devoxelise(seen[i], scan, place) for i in (0, 2)]
        return self.head(torch.cat([*rows, x.feats], 1)).float()                    # (V, C)


# ---- Loss ----------------------------------------------------------------------------------------
def lovasz_softmax(probability, label):
    """1 - IoU, extended to probabilities (V, C): mean over the classes that occur in label (V,).

    Berman et al. (arXiv 1705.08790), equations 8 and 9: errors in falling order, each times what
    its voxel adds to the Jaccard loss of those before it.
    """
    truth = F.one_hot(label, probability.shape[1]).to(probability)      # (V, C)
    occurs = truth.sum(0) > 0
    truth, probability = truth[:, occurs], probability[:, occurs]
    error, order = (truth - probability).abs().sort(dim=0, descending=True, stable=True)
    truth = truth.gather(0, order)
    hits, total = truth.T.contiguous().cumsum(1).T, truth.sum(0)        # GPUs scan rows in parallel
    wrong = torch.arange(1, len(truth) + 1, device=truth.device)[:, None] - hits
    jaccard = 1 - (total - hits) / (total + wrong)
    steps = torch.cat([jaccard[:1], jaccard[1:] - jaccard[:-1]])
    return (error * steps).sum(0).mean()


def loss_of(logits, label):
    """Cross-entropy + Lovasz-softmax over the labelled voxels; 0 where there are none."""
    known = label != IGNORE
    if not known.any():
        return logits.sum() * 0
    logits, label = logits[known], label[known]
    return F.cross_entropy(logits, label) + lovasz_softmax(logits.softmax(1), label)


# ---- Metric --------------------------------------------------------------------------------------
def confusion(label, predicted, classes):
    """(n,), (n,) -> (C, C) counts, true by predicted; points labelled IGNORE do not count."""
    kept = label != IGNORE
    pairs = label[kept] * classes + predicted[kept]
    return torch.bincount(pairs, minlength=classes ** 2).view(classes, classes)


def scores(counts):
    """Confusion (C, C) -> {iou (C,), miou, oa}. A class without a point is NaN, not in the mean."""
    counts = np.asarray(counts, float)
    right, true, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        iou = np.where(true > 0, right / (true + predicted - right), np.nan)
    return {"iou": iou, "miou": float(np.nanmean(iou)) if (true > 0).any() else 0.0,
            "oa": float(right.sum() / max(counts.sum(), 1))}


@torch.no_grad()
def label_scans(model, entries, read, cfg, setup, tta=False):
    """Yield (Scan, class of every point (n,), how many voxels that took), scan after scan.

    tta: ten views, turned and scaled at random, the same each time; their softmax is summed.
    """
    model.eval()

    def views(entry):
        scan = read(entry)
        if not tta:
            return scan, [voxels_of(scan, cfg["recipe"]["voxel"])]
        name = Path(scan.name).stem.encode()
        scale = np.random.default_rng(zlib.crc32(name)).uniform(0.9, 1.1, len(VIEWS))
        seen = (turned(scan, np.pi / 8 * k) for k in VIEWS)
        seen = (s._replace(xyz=s.xyz * np.float32(by)) for s, by in zip(seen, scale))
        return scan, [voxels_of(s, cfg["recipe"]["voxel"]) for s in seen]

    jobs = ((entry,) for entry in entries)
    workers = min(cfg["workers"], 2) if tta else cfg["workers"]     # ten views are 55 MB a scan
    for scan, seen in ahead(views, jobs, workers):
        total = 0
        for voxels in seen:
            coords, feats, _ = batch_of([voxels], setup.device)
            with setup.autocast():
                probability = model(coords, feats).softmax(1)           # (v, C)
            total = total + probability[torch.from_numpy(voxels.inverse).to(setup.device)]
        yield scan, total.argmax(1).cpu(), sum(len(voxels.coords) for voxels in seen)


def evaluate(model, data, cfg, setup, tta=False, shown=None):
    """-> confusion over all points of the test scans, how many voxels that took.

    Scans are shared between processes. shown: a list that takes some of them.
    """
    classes, mine = len(data.classes), data.test[rank()::world_size()]
    counts = torch.zeros(classes ** 2 + 1, dtype=torch.int64)
    for scan, predicted, voxels in tqdm(
            label_scans(model, mine, data.read, cfg, setup, tta), total=len(mine), unit="scan",
            desc="scans", leave=False, disable=rank() > 0 or None):
        found = confusion(torch.from_numpy(scan.label), predicted, classes).flatten()
        counts += torch.cat([found, torch.tensor([voxels])])
        if shown is not None and len(shown) < SHOWN:
            shown.append((scan, predicted.numpy()))
    counts = all_reduce(counts.to(setup.device)).cpu()
    if not counts[:-1].any():
        raise InputError(f"{data.form}: no point of the {len(data.test):,} test scans has a label; "
                         "check the numbers in the .label files")
    return counts[:-1].view(classes, classes), int(counts[-1])


def table(counts, classes):
    result, points = scores(counts), counts.sum(1)
    lines = [f"{'class':18s}{'points':>14}{'IoU':>8}"]
    for k, name in enumerate(classes):
        cell = f"{100 * result['iou'][k]:8.1f}"
        lines.append(f"{name:18s}{points[k]:14,d}"
                     + (cell if points[k] else "   never occurs; not in the mean"))
    return [*lines, f"{'mean':18s}{points.sum():14,d}{100 * result['miou']:8.1f}"]


def colour(label):
    """A colour of its own for each class: (n,) -> (n, 3) uint8; light grey for IGNORE."""
    label = np.asarray(label)[..., None]
    hue = label * 0.618034 + np.array([0, 1 / 3, 2 / 3])
    rgb = (np.abs((hue % 1) * 6 - 3) - 1).clip(0, 1)
    rgb = 255 * (0.25 + 0.75 * rgb) * np.array([1, 0.6, 0.8])[label % 3]
    return np.where(label == IGNORE, 205, rgb).astype(np.uint8)


def picture(labelled, classes):
    """look.png: scans from above, NEAR around the sensor: labelled, predicted, what is wrong."""
    cells = []
    some = any((scan.label != IGNORE).any() for scan, _ in labelled)
    for scan, predicted in labelled:
        near = np.hypot(*scan.xyz[:, :2].T) < NEAR
        near = near if near.any() else ~near
        xyz, label = torch.from_numpy(scan.xyz[near]), scan.label[near]
        camera = render.fit(xyz, render.look(elevation=90, azimuth=-90))        # x to the right
        wrong = (scan.label != IGNORE) & (scan.label != predicted)
        share = 100 * wrong.sum() / max((scan.label != IGNORE).sum(), 1)
        views = [("truth", colour(label)), ("predicted", colour(predicted[near])),
                 (f"{share:.0f} % of points wrong",
                  np.where(wrong[near, None], np.uint8(render.RED), np.uint8(205)))]
        for what, rgb in views if some else views[1:2]:
            cells.append(render.Cell(render.draw_points(xyz, camera, 380, 380, rgb),
                                     f"{Path(scan.name).stem}, {what}"))
    legend = [(name, colour(k)) for k, name in enumerate(classes)]
    return render.sheet(cells, columns=3 if some else min(2, len(cells)), legend=legend)


# ---- Train ---------------------------------------------------------------------------------------
def train(model, data, run):
    cfg, setup = run.cfg, run.setup
    recipe, things = Recipe(**cfg["recipe"]), things_of(data.classes)
    wrapped = setup.wrap(model, compile=False)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(weights, recipe.lr, recipe.momentum, weight_decay=recipe.decay)
    steps = max(1, len(data.train) // recipe.batch_size)
    parts = my_parts(recipe.batch_size, cfg["accumulate"])
    columns = "epoch     loss  train OA     mIoU       OA"
    for epoch in run.epochs(model, optimizer, columns):
        order = np.random.default_rng([cfg["seed"], epoch]).permutation(len(data.train))
        order = np.resize(order, steps * recipe.batch_size).tolist()
        # this process's scans, as `train_step` takes them
        rows = (step * recipe.batch_size + i for step in range(run.at["step"], steps)
                for part, _ in parts for i in part)
        jobs = ((order[i], seed_of(cfg["seed"], epoch, i)) for i in rows)
        read = partial(training_voxels, data, things=things, cfg=cfg)
        voxels = ahead(read, jobs, cfg["workers"])
        for _ in run.steps(steps, low=1e-5 * recipe.lr):
            run.sums += train_step(wrapped, optimizer, voxels, parts, run)
        loss, right, n = run.totals("loss")
        if not n:
            raise InputError(f"{data.form}: no point of the scans of epoch {epoch + 1} has a "
                             "label; check the numbers in the .label files")
        loss, right = loss / n, right / n
        cells, metrics = f"{loss:8.4f} {100 * right:9.2f}", {"loss": loss, "train_oa": right}
        if not run.due(recipe.every):
            run.row(None, cells + " " * 18, **metrics)
            continue
        result = scores(evaluate(model, data, cfg, setup)[0])
        for name in ("miou", "oa"):
            metrics[name] = result[name]
            cells += f"{100 * result[name]:9.2f}"
        run.row(result["miou"], cells, **metrics)


def things_of(classes):
    """Numbers of the classes that PolarMix pastes."""
    return [k for k, name in enumerate(classes) if name in THINGS]


def my_parts(batch, accumulate):
    """[(scans of this process in a part of a step, their share of the loss), ...]."""
    parts = []
    for part in range(accumulate):
        first, last = my_rows(batch, part, accumulate)
        if first < last or world_size() > 1:    # every process takes part: gradients are shared
            parts.append((range(first, last) or range(1), (last - first) * world_size() / batch))
    return parts


def train_step(model, optimizer, voxels, parts, run):
    """One step. voxels: an iterator of Voxels, those of each part in turn.

    -> sums over the labelled voxels of this process: loss, right answers, voxels. The loss of each
    part is by itself, as on each GPU of the release.
    """
    setup = run.setup
    sums = torch.zeros(3, dtype=torch.float64, device=setup.device)
    optimizer.zero_grad(set_to_none=True)
    for part, share in parts:
        drawn = [*islice(voxels, len(part))]
        # 16 is the stride of the bottom
        if world_size() == len(drawn) == 1 and drawn[0].coords.max() < 16:
            raise InputError("a part of a step is one scan that fills one voxel at the bottom, and "
                             "batch norm needs two; pass a smaller --voxel or --accumulate, or a "
                             "larger --batch-size")
        coords, feats, label = batch_of(drawn, setup.device)
        with setup.autocast():
            logits = model(coords, feats)                           # (V, C)
        loss = loss_of(logits, label)
        (loss * share).backward()
        n = (label != IGNORE).sum()
        right = (logits.argmax(1) == label).sum()
        sums += torch.stack([loss.detach() * n, right, n]) * (share > 0)
    nn.utils.clip_grad_norm_(model.parameters(), Recipe(**run.cfg["recipe"]).clip_norm)
    optimizer.step()
    return sums


# ---- Main ----------------------------------------------------------------------------------------
def main(argv=None):
    args = flags(argv)
    cfg, saved, folder = settings(args)
    if args.remission and cfg["data"] == "synthetic" and not args.predict:
        raise InputError("--remission belongs to scans from files; leave it out")
    setup = Setup(args.device, cfg["precision"])
    if args.predict or args.export_test:
        return predict(args, folder, cfg, saved, setup)
    data = load_scans(cfg, training=not args.eval)
    if saved and list(data.classes) != cfg["classes"]:
        raise InputError(f"{data.form}: has the classes {', '.join(data.classes)[:200]}; the run "
                         f"has {', '.join(cfg['classes'])[:200]}, in this order; make classes.txt "
                         "and labels agree")
    cfg["classes"] = list(data.classes)
    clip, model = build(cfg, saved, setup)
    recipe = Recipe(**cfg["recipe"])
    run = Run("outdoor", cfg, setup, saved)
    if not args.eval:
        run.open(__file__, folder or args.out)
    pasted = ", ".join(data.classes[k] for k in things_of(data.classes)) or "nothing"
    pasted = "" if args.eval else f"; PolarMix pastes {pasted}"
    whole, inside = (common.sizes(part)[0] for part in (model, model.encoder))
    run.print(f"device   {setup.describe}; torch {torch.__version__}; seed {cfg['seed']}")
    trained = f"{len(data.train):,} train scans, " * bool(data.train)
    run.print(f"data     {cfg['data']}: {trained}{len(data.test):,} test "
              f"scans, {len(data.classes)} classes; voxels of {recipe.voxel:g} m; "
              f"{data.form}{pasted}")
    common.print_model(run, model, clip, f"MinkUNet {whole - inside:,}, EPCL {inside:,}; "
                                         f"{recipe.tokens} tokens; ")
    if cfg["as_released"]:
        run.print("warning  as released: LaserMix does nothing, the classifier does not see EPCL")
    if cfg["data"] == "folder" and not args.eval:
        seen = {k for entry in data.train[:100] for k in np.unique(data.read(entry).label).tolist()}
        which = "training point" + " of the first 100 scans" * (len(data.train) > 100)
        if warning := absent(seen, data.classes, 1, which):
            run.print(warning)
    if not args.eval:
        with run.stopper:
            train(model, data, run)

    started, shown, at = time.time(), [], run.at
    counts, voxels = evaluate(model, data, cfg, setup, args.tta, shown)
    seconds, result = time.time() - started, scores(counts)
    for line in table(counts, data.classes):
        run.print(line)
    run.print(f"speed    {voxels / seconds:,.0f} voxels a second, "
              f"{len(data.test) / seconds:.2f} scans a second")
    run.print(f"result   mIoU {100 * result['miou']:.2f} %, OA {100 * result['oa']:.2f} %, every "
              f"labelled point of {len(data.test)} scans{views_of(args)}, epoch {at['epoch']} "
              f"({best_of(at)}); {cfg['data']}, "
              f"{'no transformer' if cfg['no_transformer'] else clip.name}, {at['seconds']:.0f} s")
    if not args.eval:
        iou = [None if np.isnan(x) else float(x) for x in result["iou"]]
        run.confusion(counts, data.classes)
        if run.first:
            render.save(run.folder / "look.png", picture(shown, data.classes))
        run.results({name: result[name] for name in ("miou", "oa")}, "miou", common.sizes(model),
                    data.form, iou=dict(zip(data.classes, iou)))
        run.print(f"look     {run.folder}/look.png")


def views_of(args):
    return f", sum of {len(VIEWS)} views" if args.tta else ""


def predict(args, folder, cfg, saved, setup):
    """.label of anybody's scans, or of the benchmark's test sequences, with a saved run. Files are
    shared between processes."""
    read = partial(kitti.read_scan, full=cfg["remission"])
    if args.predict:
        out, files = Path(args.export or folder / "predicted"), [Path(f) for f in args.predict]
        check_outputs(files, out)
        for file in files:
            if (file.resolve().parent.parent / "labels") == out.resolve():
                raise InputError(f"--export {out}: holds the labels of {file}, which would be "
                                 "written over; give another folder")
        for file in files:                  # all can be read, or none is labelled
            if file.suffix.lower() != ".bin":
                raise InputError(f"{file}: not a scan (.bin: float32 x y z remission of each "
                                 "point)")
            voxels_of(read(file), cfg["recipe"]["voxel"])
        where = [out / f"{file.stem}.label" for file in files]
    else:
        if cfg["data"] != "semantickitti":
            raise InputError("--export-test: is for SemanticKITTI; this run has "
                             f"{cfg['data']} data")
        out, root = Path(args.export_test), cfg["root"] or "data/semantickitti"
        files = [file for file, _ in kitti.pairs(root, kitti.TEST, labels=False)]
        where = [out / "sequences" / file.parts[-3] / "predictions" / f"{file.stem}.label"
                 for file in files]
    count, mine = len(files), slice(rank(), None, world_size())
    files, where = files[mine], where[mine]
    _, model = build(cfg, saved, setup)
    classes, shown = cfg["classes"], []
    numbers = np.arange(1, len(classes) + 1) if cfg["data"] == "folder" else (
        kitti.numbers_of(classes))
    found = tqdm(label_scans(model, files, read, cfg, setup, args.tta), total=len(files),
                 unit="scan", leave=False, disable=None)
    for file, path, (scan, predicted, _) in zip(files, where, found):
        kitti.write_labels(path, predicted.numpy(), numbers)
        if len(shown) < SHOWN:
            shown.append((scan, predicted.numpy()))
        if args.predict:
            share = torch.bincount(predicted, minlength=len(classes)) / len(predicted)
            most = share.argsort(descending=True)[:5].tolist()
            what = ", ".join(f"{classes[k]} {100 * share[k]:.0f} %" for k in most if share[k] > 0)
            print(f"{file}: {len(predicted):,} points, {what} -> {path}")
    if rank() == 0:
        render.save(out / "look.png", picture(shown, classes))
        print(f"{count:,} scan{'s' * (count > 1)} labelled{views_of(args)}; look at {out}/look.png")


def build(cfg, saved, setup):
    """-> FrozenCLIP, model on the device."""
    clip = pretrained.load_clip(cfg["clip"], cfg["seed"], trainable=cfg["unfreeze"])
    clip.text = None
    check_frozen(cfg, saved, clip)
    torch.manual_seed(seed_of(cfg["seed"]))
    model = Segmenter(clip, len(cfg["classes"]), cfg)
    return clip, common.to_device(model, saved, setup)


def flags(argv):
    parser = recipe_parser(__doc__, RECIPES)
    shared_flags(parser, pretrained.CLIP_NAMES)
    flag = parser.add_argument
    flag("--voxel", type=float, metavar="M", help="side of a voxel, metres")
    flag("--like", choices=RECIPES, help="take another row of the table: `synthetic` suits few "
                                         "scans and no GPU")
    flag("--remission", type=float, metavar="R", help="highest remission of the sensor (default 1, "
                                                      "SemanticKITTI's)")
    flag("--as-released", action="store_true",
         help="with the release's LaserMix, which changes nothing, and its classifier, which does "
              "not see EPCL")
    flag("--tta", action="store_true", help="with --eval: sum ten turned views")
    flag("--predict", nargs="+", metavar="FILE", help="with --eval: label these scans (.bin)")
    flag("--export", metavar="DIR", help="where --predict writes (default: RUN/predicted)")
    flag("--export-test", metavar="DIR",
         help="with --eval: write sequences 11 to 21 as the benchmark wants them")
    return parser.parse_args(argv)


def check_sizes(recipe):
    if not (re.fullmatch("[1-9]{8}", recipe.blocks) and int(recipe.width * min(PLANES)) > 0
            and recipe.voxel > 0 and recipe.neighbours <= recipe.tokens):
        raise InputError(f"{recipe}: takes eight digits of blocks, a width of {1 / min(PLANES):g} "
                         "or more, a voxel above 0 m, and no more neighbours than tokens")


SAVED = {                                   # forms of the settings that are this script's own
    "data": (*RECIPES,), "classes": [str], "remission": lambda x: amount(x) and x > 0,
    "as_released": bool}


def settings(args):
    """Flags over a recipe or a saved run -> config, checkpoint or None, run folder or None."""
    for name in ("voxel", "remission"):
        value = getattr(args, name)
        if value is not None and not 1e-3 <= value < 1e6:       # smaller: places overflow int64
            raise InputError(f"--{name} {value:g} must be at least 0.001 and below 1,000,000")
    if (args.predict or args.tta or args.export_test) and not args.eval:
        raise InputError("--predict, --tta and --export-test need a run: add --eval "
                         "runs/outdoor-...")
    if args.export and not args.predict:
        raise InputError("--export says where --predict writes; give both")
    if args.predict and args.export_test:
        raise InputError("--predict and --export-test exclude each other; give one of them")
    if args.compile:
        raise InputError("--compile: every scan has its own number of voxels; leave it out")
    if args.resume or args.eval:
        cfg, saved, folder = saved_settings(args, "outdoor", Recipe, SAVED, checkpoint_form(sums=3))
        check_sizes(Recipe(**cfg["recipe"]))
        cfg["remission"] = args.remission or cfg["remission"]
        return cfg, saved, folder
    recipe = with_flags(RECIPES[args.like or args.data or "synthetic"], args)
    check_sizes(recipe)
    cfg = shared_settings(args, recipe)
    return {**cfg, "like": args.like, "remission": args.remission or 1.0,
            "as_released": args.as_released}, None, None


if __name__ == "__main__":
    main_guard(main)
