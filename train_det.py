"""Detect objects in indoor scans with EPCL (paper 4.2, Tables 1 and 6; supplement, Figure 12).

    python train_det.py                                  built-in rooms, no download
    python train_det.py --data scannet --root DIR        the paper's recipe (paper: 43.0 AP50)
    python train_det.py --data folder --root DIR         yours: DIR/{train,val}/NAME.ply + NAME.json
    python train_det.py --eval RUN                       AP of a saved run, class by class
    python train_det.py --eval RUN --predict scan.ply    boxes for your own scans, in metres, z up

To change the data, edit `load_scenes` and RECIPES; the head, `Detector`; the backbone, pass another
--clip or edit `EPCLEncoder` in common.py. A box is six numbers, centre and full side lengths in
metres, and parallel to the axes.
"""
import json
import zlib
from pathlib import Path
from typing import NamedTuple

import run                                  # before torch: Ctrl-C during the imports
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.profiler import record_function
from tqdm import tqdm

import common
import pretrained
import render
from checkpoint import check_frozen, checkpoint_form, saved_settings
from common import BatchNorm, EPCLEncoder, any_rows, encoder_options, gather, random_rows
from data import scannet
from data.files import (BrokenFile, beside, check_export, check_outputs, check_span, own_clouds,
                        read_boxes, read_cloud, usable_boxes, write_boxes)
from kernels import ball_query, farthest_point_sample
from run import (InputError, Run, Setup, all_reduce, best_of, main_guard, my_rows, rank,
                 recipe_parser, seed_of, shared_flags, shared_settings, whole, with_flags,
                 world_size)

# ---- Recipe --------------------------------------------------------------------------------------
class Recipe(NamedTuple):
    points: int             # of a scene, as the model sees it
    tokens: int             # patches of a scene, G
    radius: float           # of a patch, metres
    neighbours: int         # points of a patch, K
    queries: int            # boxes that the decoder proposes
    content: str            # of a query at first: "zeros", or the "token" it stands on
    layers: int             # of the decoder
    epochs: int
    warmup: float           # epochs
    batch_size: int         # scenes
    lr: float               # highest; AdamW
    decay: float            # weight decay
    clip_norm: float        # of the gradient
    dropout: float          # before CLIP
    decoder_dropout: float  # in the decoder's layers
    head_dropout: float     # in the heads
    cuboid: bool            # train on random parts of a scene
    every: int              # epochs from one evaluation to the next
    fine: int               # patches of a first level, where tokens are fewer


SCANNET = Recipe(
    points=40_000, tokens=2048, radius=0.2, neighbours=64,              # 3DETR, whose decoder the
    queries=256, content="zeros", layers=8,                             # paper takes:
    epochs=1080, warmup=9, batch_size=8, clip_norm=0.1, every=10,       # scripts/scannet_ep1080.sh
    decoder_dropout=0.1, head_dropout=0.3, cuboid=True,                 # the same
    lr=3e-4, decay=0.04, dropout=0.3,                                   # paper 4.1 and supplement
    fine=2048)                                                          # its detector in LAMM
RECIPES = {
    "scannet": SCANNET,
    "folder": SCANNET,
    # ours, sized for two CPU cores
    "synthetic": SCANNET._replace(
        points=4096, tokens=192, fine=192, radius=0.5, neighbours=32, queries=96, layers=3,
        content="token", epochs=16, warmup=1, batch_size=4, lr=1e-3, clip_norm=0.5, dropout=0.0,
        decoder_dropout=0.0, head_dropout=0.0, cuboid=False, every=4),
}
FINAL_LR = 5e-7             # supplement C
SYNTHETIC = (200, 40)       # rooms to train and to test
MAX_BOXES = 64              # of a scene, as VoteNet; more is an error
NO_OBJECT = 0.25            # weight of the class "no object", 3DETR's script
COST = {"class": 1, "giou": 2}                                  # of the matching
WEIGHT = {"class": 1, "center": 5, "size": 1, "giou": 1, "angle": 0.5}
LEAST_SCORE = 0.3           # of an exported detection
GREEN, RED = (40, 200, 60), (230, 40, 40)
CPU_TRIES = 4               # random cuboids at a time

GET_FOLDER = ("pass --root FOLDER with FOLDER/{train,val}/NAME.ply (or .npy, .npz) and NAME.json "
              "beside each")


# ---- Data: files -> scenes in memory -------------------------------------------------------------
class Scene(NamedTuple):
    name: str
    xyz: torch.Tensor                       # (n, 3) float32, metres, z up
    boxes: torch.Tensor                     # (k, 6) centre and size
    label: torch.Tensor                     # (k,) int64
    offset: np.ndarray = np.zeros(3)        # what was read = xyz + offset


def load_scenes(cfg, training=True):
    """-> train scenes, test scenes, class names, what was read. A saved run has its own classes.

    training=False: own test scenes will do.
    """
    if cfg["data"] == "synthetic":
        return load_synthetic(cfg["recipe"]["points"])
    root, own = Path(cfg["root"] or f"data/{cfg['data']}"), cfg["data"] == "folder"
    if own:
        *paths, names = own_clouds(root, ("train", "val"), GET_FOLDER, training=training)
        names, form = dict(enumerate(names)), f"scenes under {root}"
    else:
        *paths, form = scannet.scans(root, cfg["workers"], cfg["skip_broken"], needs="bbox")
        names = {nyu40: name for name, nyu40 in scannet.SCANNET_BOXES.items()}
    parts, notes = [[], []], []             # of (path, scene, class name of each box)
    for part, found in zip(parts, paths):
        for path in tqdm(found, desc="reading", unit="scene", disable=None, leave=False):
            try:
                part.append((path, *read_scene(path, names, own, notes)))
            except BrokenFile as error:
                if not cfg["skip_broken"]:
                    raise
                notes.append(f"LEFT OUT {error}")
    classes = list(names.values())
    if own:
        classes = sorted({kind for _, _, kinds in parts[0] for kind in kinds})
    classes = cfg.get("classes", classes)
    if not classes:
        raise InputError(f"{root / 'train'}: no scene has a box; there is nothing to learn")
    for part in parts:
        part[:] = [labelled(*found, classes) for found in part]
    return *parts, tuple(classes), "; ".join([form, *notes])


def load_synthetic(points):
    from data.synthetic_rooms import FURNITURE, room_scenes
    parts = [[], []]
    for part, seed, count in zip(parts, (1, 2), SYNTHETIC):
        for i, room in enumerate(room_scenes(count, 2 * points, seed)):
            boxes = np.concatenate([room["center"], room["size"]], 1)
            arrays = map(torch.from_numpy, (room["xyz"], boxes, room["label"]))
            part.append(Scene(f"room{i:03d}", *arrays))
    return *parts, FURNITURE, "procedural rooms of data/synthetic_rooms.py"


def read_scene(path, names, own, notes):
    """A prepared NAME.npz, or a cloud and its NAME.json -> Scene, the class name of each box.

    names: {class number of a prepared box: name}. ScanNet's other boxes are left out, own ones not.
    notes takes a line for each box that is flat, and so left out, or holds no point.
    """
    cloud, where = read_cloud(path, colours=False), path
    if cloud.boxes is not None:
        number = cloud.boxes[:, 6].astype(int)
        known = np.isin(number, list(names))
        if own and not known.all():
            raise BrokenFile(f"{path}: has a box of class {number[~known][0]}, which is no line of "
                             "classes.txt; repair the file")
        kinds, boxes = [names[k] for k in number[known]], cloud.boxes[known, :6]
    else:
        where = beside(path, ".json")
        kinds, boxes = read_boxes(where, cloud.offset)
    check_span(path, cloud.xyz, "scale points and boxes,")
    kept, lines = usable_boxes(boxes, cloud.xyz, where)
    notes += lines
    boxes, kinds = boxes[kept], [kind for kind, keep in zip(kinds, kept) if keep]
    if len(boxes) > MAX_BOXES:
        raise BrokenFile(f"{where}: has {len(boxes)} boxes, at most {MAX_BOXES} are handled; raise "
                         "MAX_BOXES")
    scene = Scene(path.stem, *map(torch.from_numpy, (cloud.xyz, boxes)), None, cloud.offset)
    return scene, kinds


def read_scan(path):
    """A cloud without boxes -> Scene."""
    cloud = read_cloud(path, colours=False)
    check_span(path, cloud.xyz, "scale the points,")
    none = torch.zeros(0, 6), torch.zeros(0, dtype=torch.int64)
    return Scene(path.stem, torch.from_numpy(cloud.xyz), *none, cloud.offset)


def labelled(path, scene, kinds, classes):
    """The scene with the number of each box's class."""
    for kind in kinds:
        if kind not in classes:
            where = beside(path, ".json")
            raise InputError(f"{where}: the class {kind!r} is none of those to learn"
                             f" ({', '.join(classes)[:100]}); correct the name, or train "
                             "on scenes that have it")
    label = torch.tensor([classes.index(kind) for kind in kinds], dtype=torch.int64)
    return scene._replace(label=label)


# ---- A scene -> the points of a step, on the device ----------------------------------------------
class Batch(NamedTuple):
    xyz: torch.Tensor                       # (B, N, 3)
    low: torch.Tensor                       # (B, 3) bounds of the points
    high: torch.Tensor
    boxes: torch.Tensor                     # (B, MAX_BOXES, 6), padded with unit boxes at 0
    label: torch.Tensor                     # (B, MAX_BOXES)
    real: torch.Tensor                      # (B, MAX_BOXES) bool: is it a box


@record_function("data")
def make_batch(scenes, points, device, seeds=None, cuboid=True):
    """Scenes -> Batch. seeds: augment, as 3DETR: random cuboid, flips, rotation. No jitter."""
    rows = []
    unit = torch.cat([torch.zeros(3, device=device), torch.ones(3, device=device)])
    for i, scene in enumerate(scenes):
        xyz, boxes, label = (x.to(device) for x in scene[1:4])
        # each scene has its own random stream: the same in any number of processes
        seed = zlib.crc32(scene.name.encode()) if seeds is None else seeds[i]
        draw = torch.Generator(device).manual_seed(seed)
        real = torch.ones(len(boxes), dtype=torch.bool, device=device)
        if seeds is not None and cuboid:
            inside, real = random_cuboid(xyz, boxes, points, draw)
            order = random_rows(inside, points, draw)
        else:
            order = any_rows(len(xyz), points, draw)
        xyz = xyz[order]
        if seeds is not None:
            xyz, boxes = flip_and_rotate(xyz, boxes, torch.rand(3, device=device, generator=draw))
        padding = MAX_BOXES - len(boxes)
        boxes = torch.cat([torch.where(real[:, None], boxes, unit), unit.expand(padding, 6)])
        label = F.pad(label.masked_fill(~real, 0), (0, padding))
        rows.append((xyz, xyz.amin(0), xyz.amax(0), boxes, label, F.pad(real, (0, padding))))
    return Batch(*(torch.stack(column) for column in zip(*rows)))


def random_cuboid(xyz, boxes, points, draw, tries=100):
    """A random part of the scene with at least 3/4 of `points` and one box, or all of it [3DETR].

    -> which points (n,) and which boxes (k,) are in it. A GPU makes all tries without host-device
    synchronisation, a CPU a few at a time until one is good: the same cuboid.
    """
    def rand(*shape):
        return torch.rand(*shape, device=xyz.device, generator=draw)

    share = 0.5 + 0.5 * rand(tries, 3)
    middle = xyz[(rand(tries) * len(xyz)).long()]               # (tries, 3)
    half = (xyz.amax(0) - xyz.amin(0)) * share / 2
    pairs = share[:, [0, 0, 1]] / share[:, [1, 2, 2]]
    shapely = (torch.minimum(pairs, 1 / pairs) >= 0.8).any(1)

    def cut(middle, half):                                      # (t, 3), (t, 3) -> (t, n)
        x, y, z = [(axis - m[:, None]).abs() <= h[:, None]
                   for axis, m, h in zip(xyz.T, middle.T, half.T)]
        return x & y & z

    def bounds(inside, empty):                                  # (t, n) -> three of (t, n)
        return [axis.expand_as(inside).masked_fill(~inside, empty) for axis in xyz.T]

    cpu = xyz.device.type == "cpu"
    several = CPU_TRIES if cpu else max(1, 2 ** 24 // len(xyz))             # 64 MB for an axis
    good, kept = [], []
    for start in range(0, tries, several):
        part = slice(start, start + several)
        inside = cut(middle[part], half[part])                              # (t, n)
        low = torch.stack([axis.amin(1) for axis in bounds(inside, torch.inf)], 1)[:, None]
        high = torch.stack([axis.amax(1) for axis in bounds(inside, -torch.inf)], 1)[:, None]
        kept.append(((boxes[:, :3] >= low) & (boxes[:, :3] <= high)).all(2))        # (t, k)
        good.append(shapely[part] & (inside.sum(1) >= 0.75 * points) & kept[-1].any(1))
        if cpu and start + several < tries and good[-1].any():
            break
    good, kept = torch.cat(good), torch.cat(kept)
    first, none = good.int().argmax(0, keepdim=True), ~good.any()           # the first good try
    return cut(middle[first], half[first])[0] | none, kept[first][0] | none


def flip_and_rotate(xyz, boxes, draw):
    """Flip x, flip y, rotate by up to 5 degrees about z; boxes become bounds of rotated boxes."""
    flip = torch.cat([1 - 2 * (draw[:2] < 0.5).float(), draw.new_ones(1)])
    angle = (draw[2] * 10 - 5) * torch.pi / 180
    cos, sin, zero, one = angle.cos(), angle.sin(), angle * 0, angle * 0 + 1
    rotate = torch.stack([cos, -sin, zero, sin, cos, zero, zero, zero, one]).view(3, 3)
    center, size = (boxes[:, :3] * flip) @ rotate.T, boxes[:, 3:] @ rotate.abs().T
    return (xyz * flip) @ rotate.T, torch.cat([center, size], 1)


# ---- Model ---------------------------------------------------------------------------------------
class SetAbstraction(nn.Module):
    """3DETR's tokenizer: points (B, N, 3) -> tokens (B, G, D), centers (B, G, 3).

    The paper says "the same as for classification", but its detector in LAMM has this one. A patch
    is the first K points within `radius`, whose order is random; where there are fewer, the first
    is repeated. before: a tokenizer whose centres and tokens (B, F, C) take the place of points.
    """

    def __init__(self, tokens, radius, neighbours, widths, before=None):
        super().__init__()
        self.tokens, self.radius, self.neighbours = tokens, radius, neighbours
        self.before, self.mlp = before, layers(*widths)
        for weight in self.mlp.parameters():
            if weight.ndim > 1:
                nn.init.kaiming_normal_(weight)                         # as 3DETR

    def forward(self, points):
        xyz, values = points[..., :3].contiguous(), None                # (B, N, 3)
        if self.before is not None:
            values, xyz = self.before(points)                           # (B, F, C), (B, F, 3)
        centers = gather(xyz, farthest_point_sample(xyz, self.tokens))  # (B, G, 3)
        idx = ball_query(centers, xyz, self.radius, self.neighbours)    # (B, G, K)
        x = (gather(xyz, idx) - centers[:, :, None]) / self.radius      # (B, G, K, 3)
        if values is not None:
            x = torch.cat([x, gather(values, idx)], -1)                 # (B, G, K, 3 + C)
        return self.mlp(x).amax(2), centers                             # (B, G, D), (B, G, 3)


def tokenizer_of(recipe, width):
    """One level of patches or, as in LAMM, two: fewer tokens, of patches wider and fuller by as
    much, from the tokens of a first level."""
    r, wider = recipe, recipe.fine // recipe.tokens
    if wider > 1:
        fine = SetAbstraction(r.fine, r.radius, r.neighbours, (3, 64, 256))
        return SetAbstraction(r.tokens, r.radius * wider, r.neighbours * wider, (259, 512, width),
                              before=fine)
    return SetAbstraction(r.tokens, r.radius, r.neighbours, (3, 64, 128, width))


def layers(*widths, dropout=None):
    """Linear layers without bias, each with batch norm and ReLU, and dropout if given."""
    parts = []
    for a, b in zip(widths, widths[1:]):
        parts += [nn.Linear(a, b, bias=False), BatchNorm(b), nn.ReLU()]
        parts += [] if dropout is None else [nn.Dropout(dropout)]
    return nn.Sequential(*parts)


class DecoderLayer(nn.Module):
    """Queries attend to each other, then to the tokens; norm first, positions added to q and k."""

    def __init__(self, width, dropout, heads=4):
        super().__init__()
        self.own = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
        self.cross = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.ffn = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout),
                                 nn.Linear(width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, position, memory, memory_position):            # (B, Q, 256), (B, G, 256)
        y = self.norms[0](x)
        y = self.own(y + position, y + position, y, need_weights=False)[0]
        x = x + self.dropout(y)
        y = self.norms[1](x)
        y = self.cross(y + position, memory + memory_position, memory, need_weights=False)[0]
        x = x + self.dropout(y)
        return x + self.dropout(self.ffn(self.norms[2](x)))


class Output(NamedTuple):
    """What the heads say of each query, for all L layers of the decoder at once."""
    logits: torch.Tensor                    # (L, B, Q, C + 1), the last is "no object"
    center: torch.Tensor                    # (L, B, Q, 3) metres
    size: torch.Tensor                      # (L, B, Q, 3) metres
    center_norm: torch.Tensor               # the same as shares of the scene, 0..1
    size_norm: torch.Tensor
    angle_class: torch.Tensor               # (L, B, Q, 1): ScanNet's boxes are not rotated, so
    angle: torch.Tensor                     # these two learn nothing; kept for parity with 3DETR


class Detector(nn.Module):
    """EPCL as the encoder of 3DETR: points (B, N, 3), bounds of the scene (B, 3) -> Output."""

    def __init__(self, clip, classes, cfg, width=256):
        super().__init__()
        r = Recipe(**cfg["recipe"])
        self.queries, self.content = r.queries, r.content
        self.tokenizer = tokenizer_of(r, clip.width)
        self.encoder = EPCLEncoder(clip, task_tokens=classes + 1, with_class_token=False,
                                   **encoder_options(cfg))
        self.project = layers(clip.width, clip.width, clip.width, width)
        self.register_buffer("fourier", torch.randn(3, width // 2))     # fixed, and must be saved
        self.query_mlp = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width),
                                       nn.ReLU())
        decoder = [DecoderLayer(width, r.decoder_dropout) for _ in range(r.layers)]
        self.decoder = nn.ModuleList(decoder)
        self.norm = nn.LayerNorm(width)
        outputs = {"logits": classes + 1, "center": 3, "size": 3, "angle_class": 1, "angle": 1}
        self.heads = nn.ModuleDict({
            name: nn.Sequential(*layers(width, width, width, dropout=r.head_dropout),
                                nn.Linear(width, n)) for name, n in outputs.items()})
        for weight in self.decoder.parameters():    # as 3DETR; other parts keep torch's defaults
            if weight.ndim > 1:
                nn.init.xavier_uniform_(weight)

    def fourier_features(self, xyz, low, high):
        """Of the place within the scene: (B, Q, 3) -> (B, Q, 256). Never in bf16: too coarse."""
        share = (xyz - low[:, None]) / (high - low).clamp_min(1e-3)[:, None]
        with torch.autocast(xyz.device.type, enabled=False):
            phase = 2 * torch.pi * share.float() @ self.fourier
            return torch.cat([phase.sin(), phase.cos()], -1)

    def forward(self, points, low, high):
        tokens, centers = self.tokenizer(points)                        # (B, G, D), (B, G, 3)
        memory = self.project(self.encoder(tokens, centers).patches)    # (B, G, 256)
        chosen = farthest_point_sample(centers, self.queries)           # (B, Q)
        place = gather(centers, chosen)                                 # (B, Q, 3)
        position = self.query_mlp(self.fourier_features(place, low, high))      # (B, Q, 256)
        memory_position = self.fourier_features(centers, low, high)     # (B, G, 256)
        x = gather(memory, chosen) if self.content == "token" else torch.zeros_like(position)
        levels = []
        for layer in self.decoder:
            x = layer(x, position, memory, memory_position)
            levels.append(self.norm(x))
        x = torch.cat(levels)                                           # (L B, Q, 256): BN sees all
        shape = (len(levels), *position.shape[:2], -1)
        out = {name: head(x).float().view(shape) for name, head in self.heads.items()}
        extent = (high - low).clamp_min(0.1)[:, None]                   # (B, 1, 3)
        center = place + out["center"].sigmoid() - 0.5                  # at most half a metre away
        size_norm = out["size"].sigmoid()
        return Output(out["logits"], center, size_norm * extent, (center - low[:, None]) / extent,
                      size_norm, out["angle_class"], out["angle"])


# ---- Loss ----------------------------------------------------------------------------------------
def iou_terms(a, b):
    """Boxes (..., 6), broadcast against each other -> IoU, generalised IoU (arXiv 1902.09630)."""
    a_low, a_high = a[..., :3] - a[..., 3:] / 2, a[..., :3] + a[..., 3:] / 2
    b_low, b_high = b[..., :3] - b[..., 3:] / 2, b[..., :3] + b[..., 3:] / 2
    inter = (torch.minimum(a_high, b_high) - torch.maximum(a_low, b_low)).clamp_min(0).prod(-1)
    union = (a[..., 3:].prod(-1) + b[..., 3:].prod(-1) - inter).clamp_min(1e-8)
    hull = (torch.maximum(a_high, b_high) - torch.minimum(a_low, b_low)).prod(-1).clamp_min(1e-8)
    return inter / union, inter / union - (1 - union / hull)


@record_function("matching")
@torch.no_grad()
def match(out, batch):
    """Hungarian matching of each layer and scene -> query of each box (L, B, MAX_BOXES), 0: none.

    One copy of the costs goes to the CPU, one table of indices comes back: the only host-device
    synchronisation of a step.
    """
    boxes = torch.cat([out.center, out.size], -1)                       # (L, B, Q, 6)
    _, giou = iou_terms(boxes[:, :, :, None], batch.boxes[:, None])     # (L, B, Q, K)
    label = batch.label[None, :, None].expand(*giou.shape)
    cost = -COST["class"] * out.logits.softmax(-1).gather(-1, label) - COST["giou"] * giou
    # NaN: the loop reports a loss that is not finite. inf: not a box
    cost = torch.where(batch.real[:, None], cost.nan_to_num(1e9), float("inf")).cpu().numpy()
    chosen = np.zeros((*cost.shape[:2], MAX_BOXES), np.int64)
    for layer in range(cost.shape[0]):
        for i in range(cost.shape[1]):
            boxes = np.flatnonzero(cost[layer, i, 0] < np.inf)
            rows, columns = linear_sum_assignment(cost[layer, i][:, boxes])
            chosen[layer, i, boxes[columns]] = rows
    chosen = torch.from_numpy(chosen)
    if out.logits.is_cuda:
        chosen = chosen.pin_memory()                            # or the copy back would wait, too
    return chosen.to(out.logits.device, non_blocking=True)


def losses(out, batch):
    """-> {term: loss summed over layers}, each normalised over all processes' scenes."""
    chosen, world = match(out, batch), world_size()
    L, B, Q, C = out.logits.shape
    real = batch.real.expand(L, B, MAX_BOXES)
    target = torch.full((L, B, Q + 1), C - 1, device=chosen.device)     # no object; the last column
    target.scatter_(2, chosen.masked_fill(~real, Q), batch.label.expand(L, B, MAX_BOXES))
    target = target[..., :Q]                                            # takes what is no box
    weight = torch.ones(C, device=chosen.device)
    weight[-1] = NO_OBJECT
    ce = F.cross_entropy(out.logits.flatten(0, 2), target.flatten(), weight, reduction="none")
    total = weight[target].view(L, -1).sum(1)

    def of_boxes(x):                                            # (L, B, Q, c) -> (L, B, K, c)
        return x.gather(2, chosen[..., None].expand(-1, -1, -1, x.shape[-1]))

    count = all_reduce(batch.real.sum().float()).clamp_min(1)
    extent = (batch.high - batch.low).clamp_min(0.1)[:, None]
    center = (batch.boxes[..., :3] - batch.low[:, None]) / extent       # (B, K, 3)
    boxes = of_boxes(torch.cat([out.center, out.size], -1))
    angle = of_boxes(out.angle)[..., 0]
    terms = {"center": (of_boxes(out.center_norm) - center).abs().sum(-1),
             "size": (of_boxes(out.size_norm) - batch.boxes[..., 3:] / extent).abs().sum(-1),
             "giou": 1 - iou_terms(boxes, batch.boxes)[1],
             "angle": F.huber_loss(angle, torch.zeros_like(angle), reduction="none")}
    terms = {name: (x * real).sum() / count for name, x in terms.items()}
    # the last term is 0: DDP wants a gradient for every weight, those of angle_class included
    terms["class"] = (ce.view(L, -1).sum(1) / all_reduce(total)).sum() + 0 * out.angle_class.sum()
    return {name: WEIGHT[name] * x * world for name, x in terms.items()}


# ---- Metric --------------------------------------------------------------------------------------
class Detections(NamedTuple):
    boxes: np.ndarray                       # (n, 6)
    scores: np.ndarray                      # (n, C): every box is proposed for every class


def detections_of(center, size, probability, objectness, points, least=5, overlap=0.25,
                  confidence=0.05):
    """Raw outputs of one scene -> Detections, as VoteNet and 3DETR.

    center, size (Q, 3) metres; probability (Q, C) of the classes; objectness (Q,); points (N, 3).
    Boxes with fewer than `least` points are dropped (if that leaves none, the likeliest stays); of
    two boxes of one class whose IoU exceeds `overlap` the less likely is; so are those whose
    objectness is at most `confidence`. Scores are probability * objectness.
    """
    low, high = center - size / 2, center + size / 2
    inside = torch.ones(len(center), len(points), dtype=torch.bool, device=points.device)
    for x, a, b in zip(points.T.contiguous(), low.T, high.T):           # axis by axis: (Q, N)
        inside &= (x >= a[:, None]) & (x <= b[:, None])
    keep = inside.sum(1) >= least                                       # (Q,)
    if not keep.any():
        keep[objectness.argmax()] = True
    boxes = torch.cat([center, size], 1)
    boxes, probability, objectness = (x[keep] for x in (boxes, probability, objectness))
    order = objectness.argsort(descending=True, stable=True)
    boxes, probability, objectness = boxes[order], probability[order], objectness[order]
    label = probability.argmax(1)
    clash = (iou_terms(boxes[:, None], boxes[None])[0] > overlap) & (label[:, None] == label)
    clash, alive = clash.cpu().numpy(), np.ones(len(boxes), bool)
    for i in range(len(boxes)):
        if alive[i]:
            alive[i + 1:] &= ~clash[i, i + 1:]
    alive &= (objectness > confidence).cpu().numpy()
    scores = (probability * objectness[:, None]).cpu().numpy()
    return Detections(boxes.cpu().numpy()[alive], scores[alive])


def evaluate_boxes(detections, ground_truth, iou_thresholds=(0.25, 0.5)):
    """Average precision as VoteNet and 3DETR compute it.

    detections: Detections of each scene. ground_truth: (boxes (k, 6), label (k,)) of each scene.
    -> {threshold: (AP (C,), recall (C,))}; NaN for a class that has no box. A detection is right if
    the box it overlaps most, of its class, has IoU above the threshold and was not taken by a
    better scored one. AP is the area under the monotone precision (VOC, all points).
    """
    classes = max((d.scores.shape[1] for d in detections), default=0)
    result = {t: (np.full(classes, np.nan), np.full(classes, np.nan)) for t in iou_thresholds}
    overlaps = []                                                       # (n, k) of each scene
    for d, (boxes, _) in zip(detections, ground_truth):
        found, true = (torch.from_numpy(np.asarray(b, np.float64)) for b in (d.boxes, boxes))
        overlaps.append(iou_terms(found[:, None], true[None])[0].numpy())
    for c in range(classes):
        score, best, taken, first = [], [], [], 0
        for d, (_, label), iou in zip(detections, ground_truth, overlaps):
            mine = np.flatnonzero(np.asarray(label) == c)
            none = np.zeros(len(d.boxes))
            score.append(d.scores[:, c])
            best.append(iou[:, mine].max(1) if len(mine) else none)
            taken.append(first + (iou[:, mine].argmax(1) if len(mine) else none.astype(int)))
            first += len(mine)
        if first == 0:
            continue
        order = np.argsort(-np.concatenate(score), kind="stable")
        best, taken = np.concatenate(best)[order], np.concatenate(taken)[order]
        for t in iou_thresholds:
            hit, right = np.flatnonzero(best > t), np.zeros(len(order), bool)
            _, earliest = np.unique(taken[hit], return_index=True)      # the first to take a box
            right[hit[earliest]] = True
            found = np.cumsum(right)
            recall, precision = found / first, found / np.arange(1, len(order) + 1)
            envelope = np.maximum.accumulate(precision[::-1])[::-1]
            result[t][0][c] = np.sum(np.diff(recall, prepend=0) * envelope)
            result[t][1][c] = recall[-1] if len(recall) else 0
    return result


@torch.no_grad()
def detect(model, scenes, setup, recipe):
    """-> Detections of each scene, whose points are drawn by its name: always the same."""
    model.eval()
    found = []
    for i in range(0, len(scenes), recipe.batch_size):
        batch = make_batch(scenes[i:i + recipe.batch_size], recipe.points, setup.device)
        with setup.autocast():
            out = model(batch.xyz, batch.low, batch.high)
        probability = out.logits[-1].softmax(-1)                        # (B, Q, C + 1)
        for b in range(len(batch.xyz)):
            found.append(detections_of(out.center[-1, b], out.size[-1, b], probability[b, :, :-1],
                                       1 - probability[b, :, -1], batch.xyz[b]))
    return found


def evaluate(model, scenes, setup, recipe):
    """-> {threshold: (AP (C,), recall (C,))}, Detections of each scene, shared by processes."""
    first, last = my_rows(len(scenes))
    found = detect(model, scenes[first:last], setup, recipe)
    if world_size() > 1:
        parts = [None] * world_size()
        dist.all_gather_object(parts, found)
        found = sum(parts, [])
    return evaluate_boxes(found, [(s.boxes.numpy(), s.label.numpy()) for s in scenes]), found


def mean_ap(result):
    """Over all classes, as 3DETR: one without a true box in these scenes counts 0."""
    return {t: float(np.nan_to_num(ap).sum() / max(len(ap), 1)) for t, (ap, _) in result.items()}


def table(result, classes, scenes):
    count = np.bincount(torch.cat([s.label for s in scenes]).numpy(), minlength=len(classes))
    if not count.sum():
        return ["no boxes"]
    columns = [result[t][i] for i in (0, 1) for t in (0.25, 0.5)]       # AP, AP, recall, recall
    lines = [f"{'class':16s}{'boxes':>6}{'AP@0.25':>9}{'AP@0.50':>9}{'AR@0.25':>9}{'AR@0.50':>9}"]
    for k, name in enumerate(classes):
        if count[k]:
            cells = "".join(f"{100 * column[k]:9.1f}" for column in columns)
            lines.append(f"{name:16s}{count[k]:6d}{cells}")
    cells = "".join(f"{100 * np.nan_to_num(column).mean():9.1f}" for column in columns)
    lines.append(f"{'mean':16s}{count.sum():6d}{cells}")
    if not count.all():
        cells = "".join(f"{100 * np.nanmean(column):9.1f}" for column in columns)
        lines.append(f"{f'of {np.count_nonzero(count)} that occur':22s}{cells}")
    return lines


def export(folder, scenes, detections, classes):
    """NAME.ply: points in grey, edges of true boxes green, of detections of LEAST_SCORE red.
    NAME.json: these detections, as --data folder reads them. -> what each .json holds.
    """
    written = []
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for scene, d in zip(scenes, detections):
        best = d.scores.max(1, initial=0)
        shown = np.flatnonzero(best >= LEAST_SCORE)
        height = scene.xyz[:, 2].numpy()
        grey = 90 + 150 * (height - height.min()) / max(float(np.ptp(height)), 1e-6)
        back = np.append(scene.offset, np.zeros(3))                     # to the frame that was read
        true, found = scene.boxes.numpy() + back, d.boxes + back
        write_boxes(folder / f"{scene.name}.ply", scene.xyz.numpy() + scene.offset,
                    np.repeat(grey[:, None], 3, 1), {GREEN: true, RED: found[shown]})
        listed = [{"class": classes[d.scores[i].argmax()], "center": found[i, :3].tolist(),
                   "size": found[i, 3:].tolist(), "score": float(best[i])} for i in shown]
        with open(folder / f"{scene.name}.json", "w", encoding="utf-8") as file:
            json.dump(listed, file, indent=1)
        written.append(listed)
    return written


def picture(scenes, detections, most=2):
    """look.png: the first two scenes from above, with true boxes and detections of LEAST_SCORE."""
    cells = []
    for scene, d in list(zip(scenes, detections))[:most]:
        found = d.boxes[d.scores.max(1, initial=0) >= LEAST_SCORE]
        both = torch.cat([torch.as_tensor(boxes).cpu() for boxes in (scene.boxes, found)])
        shown, camera = render.into_room(scene.xyz, both)
        drawn = render.draw_points(scene.xyz[shown], camera, 420, 420)
        for boxes, colour in ((scene.boxes, GREEN), (found, RED)):
            drawn = render.draw_boxes(drawn, boxes, camera, colour)
        true = f"{len(scene.boxes)} true boxes in green, " if len(scene.boxes) else ""
        cells.append(render.Cell(drawn, f"{scene.name}: {true}in red {len(found)} detected\nwith a "
                                 f"score of at least {LEAST_SCORE}"))
    return render.sheet(cells, columns=len(cells), title="from above, without the ceiling")


# ---- Train ---------------------------------------------------------------------------------------
def train(model, scenes, test, run):
    cfg, setup = run.cfg, run.setup
    recipe = Recipe(**cfg["recipe"])
    wrapped = setup.wrap(model, cfg["compile"])
    # 3DETR decays biases and norms, too
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=recipe.lr,
                                  weight_decay=recipe.decay)
    if setup.fits(sum(s.xyz.nbytes for s in scenes)):
        scenes = [Scene(s.name, *(x.to(setup.device) for x in s[1:4])) for s in scenes]
    steps = max(1, -(-len(scenes) // recipe.batch_size))
    columns = "epoch     loss" + "".join(f"{name:>8}" for name in WEIGHT) + "  mAP@.25  mAP@.50"

    for _ in run.epochs(model, optimizer, columns):
        order = torch.randperm(len(scenes), device=setup.device, generator=run.draw).tolist()
        for step in run.steps(steps, low=FINAL_LR):
            rows = order[step * recipe.batch_size:(step + 1) * recipe.batch_size]
            run.sums += train_step(wrapped, optimizer, scenes, rows, run)
        *terms, n = run.totals(*WEIGHT)
        losses_of = {f"loss_{name}": x / n for name, x in zip(WEIGHT, terms)}
        cells = f"{sum(terms) / n:8.3f}" + "".join(f"{x:8.3f}" for x in losses_of.values())
        if not run.due(recipe.every):
            run.row(None, cells + " " * 18, **losses_of)
            continue
        ap = mean_ap(evaluate(model, test, setup, recipe)[0])
        cells += f"{100 * ap[0.25]:9.2f}{100 * ap[0.5]:9.2f}"
        run.row(ap[0.25], cells, **losses_of, map25=ap[0.25], map50=ap[0.5])


def train_step(model, optimizer, scenes, rows, run):
    """One step on the scenes `rows`. -> the weighted loss terms and 1, summed over accumulation."""
    cfg, setup, world = run.cfg, run.setup, world_size()
    recipe = Recipe(**cfg["recipe"])
    sums = torch.zeros(len(WEIGHT) + 1, dtype=torch.float64, device=setup.device)
    optimizer.zero_grad(set_to_none=True)
    for part in range(cfg["accumulate"]):
        first, last = my_rows(len(rows), part, cfg["accumulate"])
        if first == last and world == 1:
            continue
        mine = rows[first:last] or rows[:1]     # every process takes part: gradients are shared
        seeds = [seed_of(cfg["seed"], run.epoch, i) for i in mine]
        batch = make_batch([scenes[i] for i in mine], recipe.points, setup.device, seeds,
                           recipe.cuboid)
        with setup.autocast():
            out = model(batch.xyz, batch.low, batch.high)
        terms = losses(out, batch)
        share = len(mine) * world / len(rows) if cfg["accumulate"] > 1 else 1
        (sum(terms.values()) * share).backward()
        sums[:-1] += torch.stack([terms[name] for name in WEIGHT]).detach() * share / world
    sums[-1] = 1 / world
    nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
    optimizer.step()
    return sums


# ---- Main ----------------------------------------------------------------------------------------
def main(argv=None):
    args = flags(argv)
    cfg, saved, folder = settings(args)
    setup = Setup(args.device, cfg["precision"])
    if args.predict:
        return predict(args, args.export or folder / "predicted", cfg, saved, setup)
    if args.export:
        check_export(args.export, cfg)
    try:
        scenes, test, classes, form = load_scenes(cfg, training=not args.eval)
    except BrokenFile as error:
        raise InputError(f"{error}, or pass --skip-broken to go on without it") from None
    if not test or not scenes and not args.eval:
        raise InputError(f"{form}: {len(scenes)} scenes to train, {len(test)} to test; it takes "
                         "both")
    if saved and list(classes) != cfg["classes"]:
        raise InputError(f"{form}: has other classes than the run: {', '.join(classes)[:200]}")
    cfg["classes"] = list(classes)
    clip, model = build(cfg, saved, setup)
    recipe = Recipe(**cfg["recipe"])
    run = Run("det", cfg, setup, saved)
    if not args.eval:
        run.open(__file__, folder or args.out)
    short = sum(len(s.xyz) < recipe.points for s in scenes + test)
    repeats = f"; {short} scenes have fewer points and repeat some" if short else ""
    run.print(f"device   {setup.describe}; torch {torch.__version__}; seed {cfg['seed']}")
    trained = f"{len(scenes):,} train, " * bool(scenes)
    run.print(f"data     {cfg['data']}: {trained}{len(test):,} test scenes, "
              f"{len(classes)} class{'es' * (len(classes) > 1)}, {recipe.points:,} points; "
              f"{form}{repeats}")
    common.print_model(run, model, clip, f"{recipe.tokens} tokens, {recipe.queries} queries, "
                                         f"{recipe.layers} layers; ")
    if cfg.get("official") and not saved:
        ap = mean_ap(evaluate(model, test, setup, recipe)[0])
        run.print(f"released mAP@0.25 {100 * ap[0.25]:.2f} %, mAP@0.50 {100 * ap[0.5]:.2f} %, "
                  "before any training here")
    if not args.eval:
        with run.stopper:
            train(model, scenes, test, run)

    result, found = evaluate(model, test, setup, recipe)
    for line in table(result, classes, test):
        run.print(line)
    at, ap, train_scenes = run.at, mean_ap(result), scenes[:len(test)]
    of_run = f" of a run on {cfg.get('trained_on')}"
    if "trained_on" not in cfg:
        of_run = f" ({best_of(at)})"
        if scenes:
            seen = mean_ap(evaluate(model, train_scenes, setup, recipe)[0])
            of_run = (f" ({best_of(at)}; on {len(train_scenes)} training scenes "
                      f"{100 * seen[0.25]:.2f} and {100 * seen[0.5]:.2f})")
    run.print(f"result   mAP@0.25 {100 * ap[0.25]:.2f} %, mAP@0.50 {100 * ap[0.5]:.2f} %, epoch "
              f"{at['epoch']}{of_run}; {cfg['data']}, {clip.name}, {at['seconds']:.0f} s")
    if args.export and rank() == 0:
        export(args.export, test, found, classes)
        render.save(Path(args.export) / "look.png", picture(test, found))
        run.print(f"export   {len(test)} scenes in {args.export}: true boxes green, detections red")
    if not args.eval:
        if run.first:
            render.save(run.folder / "look.png", picture(test, found))
        run.results({"map25": ap[0.25], "map50": ap[0.5]}, "map25", common.sizes(model), form,
                    train_metrics={"map25": seen[0.25], "map50": seen[0.5]})
        run.print(f"look     {run.folder}/look.png")


def predict(args, folder, cfg, saved, setup):
    """Boxes for anybody's scans, with a saved run."""
    check_outputs(args.predict, folder)
    # all can be read, or none is written
    scans = [read_scan(Path(file)) for file in args.predict]
    _, model = build(cfg, saved, setup)
    recipe, classes = Recipe(**cfg["recipe"]), cfg["classes"]
    detections = []
    for file, scan in zip(args.predict, scans):
        detections += detect(model, [scan], setup, recipe)
        kinds = [box["class"] for box in export(folder, [scan], detections[-1:], classes)[0]]
        counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in classes if kind in kinds)
        print(f"{file}: {len(scan.xyz):,} points, {len(kinds)} boxes of score {LEAST_SCORE} or "
              f"more{counts and ': '}{counts} -> {folder}/{scan.name}.ply, .json")
    render.save(Path(folder) / "look.png", picture(scans, detections))
    print(f"look: {folder}/look.png")


def build(cfg, saved, setup):
    """-> FrozenCLIP, model on the device."""
    weights = None
    if cfg.get("official"):
        from lamm import load_released
        clip, weights = load_released(cfg["official"])
    else:
        clip = pretrained.load_clip(cfg["clip"], cfg["seed"], trainable=cfg["unfreeze"])
    clip.text = None
    check_frozen(cfg, saved, clip)
    released = {"model": weights, "file": cfg.get("official")}
    torch.manual_seed(seed_of(cfg["seed"]))
    model = Detector(clip, len(cfg["classes"]), cfg)
    return clip, common.to_device(model, saved or released, setup)


def flags(argv):
    parser = recipe_parser(__doc__, RECIPES)
    shared_flags(parser, pretrained.CLIP_NAMES)
    flag = parser.add_argument
    flag("--points", type=whole(1, 10**6), metavar="N", help="points of a scene")
    flag("--tokens", type=whole(1), metavar="G", help="patches of a scene (256, 512, 1024, 2048); "
                                                      "fewer are cut from a finer level")
    flag("--queries", type=whole(1), metavar="Q", help="boxes proposed, at most --tokens")
    flag("--like", choices=RECIPES, help="take another row of the table: `synthetic` suits few "
                                         "scenes and no GPU")
    flag("--predict", nargs="+", metavar="FILE",
         help="with --eval: detect in these scans (.ply, .npy, .npz)")
    flag("--export", metavar="DIR", help="write each test scene, or what --predict reads, with its "
                                         "boxes as .ply, detections as .json")
    flag("--init-official", metavar="FILE", dest="official",
         help="start from the detector that LAMM released")
    flag("--skip-broken", action="store_true",
         help="leave out scenes that cannot be read, and say so")
    return parser.parse_args(argv)


def check_sizes(recipe):
    fine = max(recipe.tokens, recipe.fine if recipe.fine >= 2 * recipe.tokens else 0)
    if not recipe.queries <= recipe.tokens <= fine <= recipe.points:
        raise InputError(f"--queries {recipe.queries} must be at most --tokens {recipe.tokens}, "
                         f"and the {fine} patches at most --points {recipe.points}")
    if recipe.queries < MAX_BOXES:
        raise InputError(f"--queries {recipe.queries}: a scene may have {MAX_BOXES} boxes; give at "
                         "least that many")


SAVED = {                                   # forms of the settings that are this script's own
    "data": (*RECIPES,), "classes": [str], "official": (..., None, str)}


def settings(args):
    """Flags over a recipe or a saved run -> config, checkpoint or None, run folder or None."""
    if args.predict and not args.eval:
        raise InputError("--predict needs a run: add --eval runs/det-...")
    if args.resume or args.eval:
        cfg, saved, folder = saved_settings(args, "det", Recipe, SAVED,
                                            checkpoint_form(1 + len(WEIGHT)), other_data=True)
        check_sizes(Recipe(**cfg["recipe"]))
        official = args.official or (None if args.clip else cfg.get("official"))
        return {**cfg, "skip_broken": args.skip_broken, "official": official}, saved, folder
    recipe = RECIPES[args.like or args.data or "synthetic"]
    if args.official:
        from lamm import released_sizes
        recipe = recipe._replace(**released_sizes(args))
    recipe = with_flags(recipe, args)
    recipe = recipe._replace(queries=args.queries or min(recipe.queries, recipe.tokens))
    check_sizes(recipe)
    # nano-CLIP, too, runs, but learns more slowly: mAP@0.25 35.5 for 45.0 after 8 epochs
    cfg = shared_settings(args, recipe, synthetic_clip="timm:vit_tiny_patch16_224=random")
    return {**cfg, "like": args.like, "skip_broken": args.skip_broken,
            "official": args.official}, None, None


if __name__ == "__main__":
    main_guard(main)
