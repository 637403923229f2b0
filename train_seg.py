"""Label every point of a room with EPCL (paper 3.2.2 and 4.3, Table 2; supplement, Figure 13).

    python train_seg.py                                  built-in rooms, no download
    python train_seg.py --data s3dis --root DIR          area 5 tests (paper: 72.6 mIoU)
    python train_seg.py --data scannet --root DIR        ScanNet's 20 classes, scans of train_det.py
    python train_seg.py --data folder --root DIR         yours: DIR/{train,test}/*, DIR/classes.txt
    python train_seg.py --eval RUN --predict scan.ply    labels for your cloud, as .ply and .npy

To change the data, edit `load_rooms` and RECIPES; the head, `Segmenter`; the backbone, pass another
--clip or edit `EPCLEncoder` in common.py. Lengths are metres, z is up.
"""
import itertools
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import run                                  # before torch: Ctrl-C during the imports
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import record_function
from tqdm import tqdm

import common
import pretrained
import render
from checkpoint import check_frozen, checkpoint_form, saved_settings
from common import BatchNorm, EPCLEncoder, any_rows, encoder_options, gather, random_rows
from data import s3dis
from data.files import (BrokenFile, absent, check_export, check_outputs, check_span, own_clouds,
                        read_cloud, write_ply)
from kernels import farthest_point_sample, interpolate, knn
from run import (InputError, Run, Setup, all_reduce, best_of, main_guard, my_rows,
                 parameter_groups, rank, recipe_parser, seed_of, shared_flags, shared_settings,
                 whole, with_flags, world_size)

# ---- Recipe --------------------------------------------------------------------------------------
class Recipe(NamedTuple):
    points: int             # of a block, as the model sees it
    block: float            # side of a block, metres
    tokens: int             # points / 4: the tokenizer halves twice
    neighbours: int         # K
    epochs: int             # one epoch shows as many points as the training rooms have
    warmup: float           # epochs
    batch_size: int         # blocks
    lr: float               # highest; AdamW
    decay: float            # weight decay of the matrices
    clip_norm: float        # of the gradient
    dropout: float          # before CLIP
    head_dropout: float     # before the classifier
    turn: float             # training blocks are rotated about z by up to so many degrees
    every: int              # epochs from one evaluation to the next


S3DIS = Recipe(
    points=4096, lr=3e-4, decay=0.04, dropout=0.3,          # paper 4.1, 4.3, supplement C
    block=1.0, batch_size=16, epochs=32, head_dropout=0.5,  # the process that it calls standard,
    tokens=1024, neighbours=16,                             # Pointnet_Pointnet2_pytorch; K is Point
    warmup=1, clip_norm=10.0, turn=360, every=4)            # Transformer's; the rest is ours
RECIPES = {
    "s3dis": S3DIS,
    "scannet": S3DIS,
    "folder": S3DIS,
    # ours, sized for two CPU cores
    "synthetic": S3DIS._replace(points=1024, block=2.0, tokens=256, neighbours=8, epochs=7,
                                batch_size=4, lr=2e-3, dropout=0.0, head_dropout=0.0, turn=0,
                                every=5),
}
SYNTHETIC = (60, 10, 12_000)        # rooms to train, to test, points of a room
LEAST = 1024                # points of a training block, of 4096 [Pointnet_Pointnet2_pytorch]
IGNORE = -1                 # label of points that belong to no class
SHOWN = 2                   # rooms in look.png
GET_FOLDER = ("pass --root FOLDER with FOLDER/classes.txt, a name in each line, and FOLDER/"
              "{train,test}/NAME.npy, .npz or .ply with labels: the line's number from 0, or -1; "
              "or with FOLDER/Area_N/ROOM/Annotations/CLASS_N.txt, as S3DIS")


# ---- Data: files -> rooms in memory --------------------------------------------------------------
class Room(NamedTuple):
    name: str
    xyz: torch.Tensor                       # (n, 3) float32, metres, z up, its lowest corner at 0
    rgb: torch.Tensor                       # (n, 3) uint8
    label: torch.Tensor                     # (n,) int16, IGNORE: no class
    scale: float = 1.0                      # what was read = xyz / scale + offset
    offset: np.ndarray = np.zeros(3)


def load_rooms(cfg, training=True):
    """-> train rooms, test rooms, class names, what was read. training=False: own test rooms will
    do."""
    if cfg["data"] == "synthetic":
        return load_synthetic()
    root = Path(cfg["root"] or f"data/{cfg['data']}")
    if cfg["data"] == "s3dis":
        *parts, form = s3dis.rooms(root, cfg["test_area"], cfg["workers"], cfg["skip_broken"])
        classes = {name: k for k, name in enumerate(s3dis.ROOM_CLASSES)}
    elif cfg["data"] == "scannet":
        from data.scannet import SCANNET_POINTS, scans
        *parts, form = scans(root, cfg["workers"], cfg["skip_broken"], needs="sem_label")
        classes = SCANNET_POINTS
    else:
        *parts, names, form = own_rooms(root, cfg, training)
        classes = {name: k for k, name in enumerate(names)}
    if set(cfg.get("classes", ())) == set(classes):             # of a saved run, in its order
        classes = {name: classes[name] for name in cfg["classes"]}
    known = 41 if cfg["data"] == "scannet" else len(classes)    # nyu40's labels, or ours
    rooms, notes = [[], []], [form]
    if cfg["scale"] != 1:
        notes.append(f"coordinates times {cfg['scale']:g}")
    for found, paths in zip(rooms, parts):
        for path in tqdm(paths, desc="reading", unit="room", disable=None, leave=False):
            try:
                found.append(read_room(path, list(classes.values()), known, cfg["scale"]))
            except BrokenFile as error:
                if not cfg["skip_broken"]:
                    raise
                notes.append(f"LEFT OUT {error}")
        if found and not any((room.label != IGNORE).any() for room in found):
            raise InputError(f"{Path(paths[0]).parent}: no point has a label of a class; give "
                             "rooms whose points have labels")
    return *rooms, tuple(classes), "; ".join(notes)


def own_rooms(root, cfg, training):
    """Anybody's own rooms, in either layout -> paths to train, to test, classes, what was found."""
    if s3dis.has_own_rooms(root):
        return s3dis.own_rooms(root, cfg["test_area"], cfg["workers"], cfg["skip_broken"])
    *parts, names = own_clouds(root, ("train", "test"), GET_FOLDER, training=training)
    if not names:
        raise InputError(f"{root}/classes.txt: missing; {GET_FOLDER}")
    return *parts, names, f"clouds under {root}"


def load_synthetic():
    from data.synthetic_rooms import OFFICES, ROOM_CLASSES, room_scenes
    *counts, points = SYNTHETIC
    parts = [[], []]
    for part, seed, count in zip(parts, (1, 2), counts):
        for i, room in enumerate(room_scenes(count, points, seed, kinds=OFFICES)):
            part.append(room_of(f"room{i:03d}", room["xyz"], room["rgb"], room["semantic"]))
    return *parts, ROOM_CLASSES, "procedural rooms of data/synthetic_rooms.py"


def read_room(path, numbers=(), known=None, scale=1.0):
    """A prepared NAME.npz or anybody's cloud -> Room.

    known: how many labels there are (None: do not read them); those of `numbers` become class 0, 1,
    ..., others IGNORE. scale: metres of a unit of the file.
    """
    cloud, label = read_cloud(path, known), np.full(1, IGNORE)
    if known is not None:
        label_of = np.full(known + 1, IGNORE)                   # the last entry is that of -1
        label_of[numbers] = range(len(numbers))
        label = label_of[cloud.label]
    room = room_of(Path(path).stem, cloud.xyz, cloud.rgb, label, scale)
    check_span(path, room.xyz.numpy(), "pass --scale S, 0.001 if these are millimetres,")
    return room._replace(offset=room.offset + cloud.offset)


def room_of(name, xyz, rgb, label, scale=1.0):
    """Arrays -> Room. rgb None: black. label: of each point, or of all."""
    rgb = np.zeros((len(xyz), 3), np.uint8) if rgb is None else rgb
    low = xyz.min(0)
    label = np.broadcast_to(label, len(xyz)).astype(np.int16)
    return Room(name, torch.from_numpy((xyz - low) * scale), torch.from_numpy(rgb),
                torch.from_numpy(label), scale, low.astype(np.float64))


# ---- A room -> the blocks of a step --------------------------------------------------------------
def features(room, rows, center, size):
    """(n, 9): x y z from block middle and floor, r g b in 0..1, x y z as shares of `size`."""
    xyz = room.xyz[rows]
    local = xyz - torch.cat([center, center.new_zeros(1)])
    return torch.cat([local, room.rgb[rows].float() / 255, xyz / size], 1)


@record_function("data")
def training_block(room, recipe, seed, tries=10):
    """A random column of the room -> points (N, 9) rotated about z, labels (N,). No host sync."""
    draw = torch.Generator(room.xyz.device).manual_seed(seed)
    chosen = torch.randint(len(room.xyz), (tries,), device=draw.device, generator=draw)
    centers = room.xyz[chosen, :2]
    (x, y), half = room.xyz[:, :2].T.contiguous(), recipe.block / 2
    inside = [((x - cx).abs() <= half) & ((y - cy).abs() <= half) for cx, cy in centers]
    inside = torch.stack(inside)                                                    # (tries, n)
    count = inside.sum(1)
    # blocks at the rim may be nearly empty: the first with enough points, or else the fullest
    order = len(room.xyz) + tries - torch.arange(tries, device=draw.device)
    enough = count > LEAST * recipe.points / 4096
    best = torch.where(enough, order, count).argmax(0, keepdim=True)                # (1,)
    rows = random_rows(inside[best][0], recipe.points, draw)
    points = features(room, rows, centers[best][0], room.xyz.amax(0).clamp_min(1e-3))
    angle = torch.rand(1, device=draw.device, generator=draw) * recipe.turn * torch.pi / 180
    x, y = points[:, 0].clone(), points[:, 1].clone()
    points[:, 0] = x * angle.cos() - y * angle.sin()
    points[:, 1] = x * angle.sin() + y * angle.cos()
    return points, room.label[rows].long()


# ---- Model ---------------------------------------------------------------------------------------
def layer(a, b):
    return nn.Sequential(nn.Linear(a, b, bias=False), BatchNorm(b), nn.ReLU())


class TransitionDown(nn.Module):
    """xyz (B, N, 3), features (B, N, C) -> those of M points: farthest points, K nearest, MLP, max.

    Point Transformer's (arXiv 2012.09164, section 3.4), which the paper's Figure 13 draws as TD.
    """

    def __init__(self, width_in, width, points, neighbours):
        super().__init__()
        self.points, self.neighbours, self.mlp = points, neighbours, layer(3 + width_in, width)

    def forward(self, xyz, x):
        centers = gather(xyz, farthest_point_sample(xyz, self.points))          # (B, M, 3)
        _, idx = knn(centers, xyz, self.neighbours)                             # (B, M, K)
        offset = gather(xyz, idx) - centers[:, :, None]                         # (B, M, K, 3)
        return centers, self.mlp(torch.cat([offset, gather(x, idx)], -1)).amax(2)


class TransitionUp(nn.Module):
    """Features (B, M, D) of M points -> of N points, joined with skip (B, N, C): 3-NN, MLP."""

    def __init__(self, width_in, width_skip, width):
        super().__init__()
        self.mlp = layer(width_in + width_skip, width)

    def forward(self, xyz, skip, coarse_xyz, x):
        return self.mlp(torch.cat([skip, interpolate(xyz, coarse_xyz, x)], -1))


class Segmenter(nn.Module):
    """Points (B, N, 9) -> logits (B, N, C). Widths are ours: the paper gives none."""

    def __init__(self, clip, classes, cfg):
        super().__init__()
        r = Recipe(**cfg["recipe"])
        self.lift = layer(9, 64)
        self.downs = nn.ModuleList([TransitionDown(64, 256, 2 * r.tokens, r.neighbours),
                                    TransitionDown(256, clip.width, r.tokens, r.neighbours)])
        self.encoder = EPCLEncoder(clip, task_tokens=classes, **encoder_options(cfg))
        self.ups = nn.ModuleList([TransitionUp(clip.width, 256, 256), TransitionUp(256, 64, 128)])
        self.head = nn.Sequential(layer(128 + 9, 128), nn.Dropout(r.head_dropout),
                                  nn.Linear(128, classes))

    def forward(self, points):
        xyz = points[..., :3].contiguous()                      # (B, N, 3)
        x = self.lift(points)                                   # (B, N, 64)
        xyz2, x2 = self.downs[0](xyz, x)                        # (B, N / 2, 3), (B, N / 2, 256)
        xyz3, x3 = self.downs[1](xyz2, x2)                      # (B, G, 3), (B, G, D), G = N / 4
        deep = self.encoder(x3, xyz3).patches                   # (B, G, D)
        x2 = self.ups[0](xyz2, x2, xyz3, deep)                  # (B, N / 2, 256)
        x = self.ups[1](xyz, x, xyz2, x2)                       # (B, N, 128)
        return self.head(torch.cat([x, points.to(x.dtype)], -1)).float()        # (B, N, C)


# ---- Metric --------------------------------------------------------------------------------------
def confusion(label, predicted, classes):
    """(n,), (n,) -> (C, C) counts, true by predicted; points labelled IGNORE do not count."""
    kept = label != IGNORE
    pairs = label[kept].long() * classes + predicted[kept].long()
    return torch.bincount(pairs, minlength=classes ** 2).view(classes, classes)


def scores(counts):
    """Confusion (C, C) -> {iou (C,), accuracy (C,), miou, macc, oa}.

    IoU = TP / (TP + FP + FN). A class without a point is NaN and left out of the means.
    """
    counts = np.asarray(counts, float)
    right, true, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        iou = np.where(true > 0, right / (true + predicted - right), np.nan)
        accuracy = np.where(true > 0, right / true, np.nan)
    some = (true > 0).any()
    return {"iou": iou, "accuracy": accuracy, "miou": float(np.nanmean(iou)) if some else 0.0,
            "macc": float(np.nanmean(accuracy)) if some else 0.0,
            "oa": float(right.sum() / max(counts.sum(), 1))}


def windows(xyz, block):
    """Columns of side `block` that cover the room, half a side apart -> (middle (2,), rows) of each
    that holds a point. The last one in a row is moved back to the room's end."""
    xy = xyz[:, :2].numpy()
    order = np.argsort(xy[:, 0], kind="stable")
    x = xy[order, 0]
    starts = []
    for end in xy.max(0):
        count = max(1, np.ceil((end - block) / (block / 2)) + 1)
        starts.append(np.minimum(np.arange(count) * block / 2, max(end - block, 0)))
    for left in starts[0]:
        ends = np.searchsorted(x, left - .001), np.searchsorted(x, left + block + .001, "right")
        strip = order[slice(*ends)]
        y = xy[strip, 1]
        # near a point: of a sparse cloud most columns are empty
        cells = np.unique((y / (block / 2)).astype(np.int64))[:, None] + np.arange(-3, 4)
        for low in starts[1][np.unique(cells.clip(0, len(starts[1]) - 1))]:
            rows = strip[(y >= low - .001) & (y <= low + block + .001)]
            if len(rows):
                middle = torch.tensor([left, low], dtype=torch.float32) + block / 2
                yield middle, torch.from_numpy(rows)


def stage_seconds(model, device):
    """-> {stage: seconds}, which grow while the model runs."""
    stages = {"FPS, KNN, tokenizer": model.downs, "transformer": [model.encoder],
              "interpolation, decoder": model.ups, "input and classifier": [model]}
    seconds = dict.fromkeys(stages, 0.0)

    def clock(name, sign):
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds[name] += sign * time.perf_counter()

    for name, modules in stages.items():
        for module in modules:
            module.register_forward_pre_hook(lambda *_, name=name: clock(name, -1))
            module.register_forward_hook(lambda *_, name=name: clock(name, 1))
    return seconds


@torch.no_grad()
def label_room(model, room, setup, recipe, classes, votes=1):
    """Every point's logits, summed over its blocks -> (n, C) on the CPU, confusion over the blocks.

    All points of a window are shuffled and cut into blocks of `recipe.points`, the last one filled
    up with points of the window drawn again, so that each point is in at least one block. votes:
    how often, with other shuffles. Blocks are drawn by the room's name: always the same.
    """
    model.eval()
    draw = torch.Generator().manual_seed(zlib.crc32(room.name.encode()))
    size = room.xyz.amax(0).clamp_min(1e-3)
    total = torch.zeros(len(room.xyz), classes)
    counts = torch.zeros(classes, classes, dtype=torch.int64)

    def blocks():
        for _ in range(votes):
            for middle, rows in windows(room.xyz, recipe.block):
                enough = -(-len(rows) // recipe.points) * recipe.points
                rows = rows[any_rows(len(rows), enough, draw)]
                for part in rows.split(recipe.points):
                    yield part, features(room, part, middle, size)

    left = blocks()
    while batch := list(itertools.islice(left, recipe.batch_size)):
        points = torch.stack([points for _, points in batch]).to(setup.device)
        with setup.autocast():
            logits = model(points).cpu()
        for (rows, _), out in zip(batch, logits):
            total.index_add_(0, rows, out)
            counts.add_(confusion(room.label[rows], out.argmax(1), classes))
    return total, counts


def evaluate(model, rooms, setup, recipe, classes, votes=1, folder=None, shown=None):
    """-> confusion over all points, confusion over all blocks; rooms are shared between processes.

    folder: write the predicted labels of each room there. shown: a list that takes some of them.
    """
    both = torch.zeros(2, classes, classes, dtype=torch.int64)
    for room in tqdm(rooms[rank()::world_size()], desc="rooms", unit="room", leave=False,
                     disable=rank() > 0 or None):
        logits, in_blocks = label_room(model, room, setup, recipe, classes, votes)
        predicted = logits.argmax(1)
        both += torch.stack([confusion(room.label, predicted, classes), in_blocks])
        if folder:
            write_labels(folder, room, predicted)
        if shown is not None and len(shown) < SHOWN:
            shown.append((room, predicted))
    return all_reduce(both.to(setup.device)).cpu()


def table(counts, classes):
    result, points = scores(counts), counts.sum(1)
    lines = [f"{'class':18s}{'points':>12}{'IoU':>8}{'accuracy':>10}"]
    for k, name in enumerate(classes):
        cells = f"{100 * result['iou'][k]:8.1f}{100 * result['accuracy'][k]:10.1f}"
        if not points[k]:
            cells = "   never occurs; not in the means"
        lines.append(f"{name:18s}{points[k]:12,d}{cells}")
    cells = f"{100 * result['miou']:8.1f}{100 * result['macc']:10.1f}"
    return [*lines, f"{'mean':18s}{points.sum():12,d}{cells}"]


def colour(label):
    """A colour of its own for each class: (n,) -> (n, 3) uint8."""
    label = np.asarray(label)[..., None]
    hue = label * 0.618034 + np.array([0, 1 / 3, 2 / 3])
    rgb = (np.abs((hue % 1) * 6 - 3) - 1).clip(0, 1)
    return (255 * (0.25 + 0.75 * rgb) * np.where(label % 2, 0.65, 1)).astype(np.uint8)


def write_labels(folder, room, predicted):
    """NAME.ply, the points that were read, coloured by label, and NAME.npy, the labels (n,)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    xyz = room.xyz.double().numpy() / room.scale + room.offset         # as they were read
    write_ply(folder / f"{room.name}.ply", xyz, colour(predicted.numpy()))
    np.save(folder / f"{room.name}.npy", predicted.numpy().astype(np.int16))


def picture(labelled, classes):
    """look.png: rooms from above in their colours, as predicted and, where there are labels, as
    labelled, and what is wrong."""
    cells, grey = [], np.array([205, 205, 205], np.uint8)
    some = any((room.label != IGNORE).any() for room, _ in labelled)
    for room, predicted in labelled:
        shown, camera = render.into_room(room.xyz)
        label, known = room.label.numpy()[:, None], (room.label != IGNORE).numpy()[:, None]
        wrong = known & (predicted.numpy()[:, None] != label)
        views = [("in its colours", room.rgb.numpy()) if room.rgb.any() else ("shaded", None),
                 ("truth", np.where(known, colour(label[:, 0]), grey)),
                 ("predicted", colour(predicted.numpy())),
                 (f"{100 * wrong.sum() / max(known.sum(), 1):.0f} % of points wrong",
                  np.where(wrong, np.uint8(render.RED), grey))]
        for what, rgb in views if some else views[::2]:
            rgb = None if rgb is None else rgb[shown.numpy()]
            cells.append(render.Cell(render.draw_points(room.xyz[shown], camera, 280, 280, rgb),
                                     f"{room.name}, {what}"))
    legend = [(name, colour(k)) for k, name in enumerate(classes)]
    return render.sheet(cells, columns=4 if some else 2, legend=legend)


# ---- Train ---------------------------------------------------------------------------------------
def train(model, rooms, test, run):
    cfg, setup = run.cfg, run.setup
    recipe, classes = Recipe(**cfg["recipe"]), len(cfg["classes"])
    wrapped = setup.wrap(model, cfg["compile"])
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe.decay), lr=recipe.lr)
    if setup.fits(sum(room.xyz.nbytes * 2 for room in rooms)):
        rooms = [Room(room.name, *(x.to(setup.device) for x in room[1:4])) for room in rooms]
    size = np.array([len(room.xyz) for room in rooms])
    steps = max(1, round(size.sum() / recipe.points / recipe.batch_size))
    columns = "epoch     loss  train OA     mIoU     mAcc       OA"
    for epoch in run.epochs(model, optimizer, columns):
        order = np.random.default_rng([cfg["seed"], epoch]).choice(     # larger rooms more often
            len(rooms), steps * recipe.batch_size, p=size / size.sum()).tolist()
        for step in run.steps(steps):
            rows = range(step * recipe.batch_size, (step + 1) * recipe.batch_size)
            rows = [(i, order[i]) for i in rows]
            run.sums += train_step(wrapped, optimizer, rooms, rows, run)
        loss, right, n = run.totals("loss")
        loss, right = loss / max(n, 1), right / max(n, 1)
        cells, metrics = f"{loss:8.4f} {100 * right:9.2f}", {"loss": loss, "train_oa": right}
        if not run.due(recipe.every):
            run.row(None, cells + " " * 27, **metrics)
            continue
        result = scores(evaluate(model, test, setup, recipe, classes)[0])
        for name in ("miou", "macc", "oa"):
            metrics[name] = result[name]
            cells += f"{100 * result[name]:9.2f}"
        run.row(result["miou"], cells, **metrics)


def train_step(model, optimizer, rooms, rows, run):
    """One step on a block of each of `rows`: (number of the block in this epoch, of its room).

    -> sums over the labelled points of this process: loss, right answers, points.
    """
    cfg, setup = run.cfg, run.setup
    recipe = Recipe(**cfg["recipe"])
    sums = torch.zeros(3, dtype=torch.float64, device=setup.device)
    optimizer.zero_grad(set_to_none=True)
    for part in range(cfg["accumulate"]):
        first, last = my_rows(len(rows), part, cfg["accumulate"])
        if first == last and world_size() == 1:
            continue
        mine = rows[first:last] or rows[:1]     # every process takes part: gradients are shared
        seeds = [seed_of(cfg["seed"], run.epoch, i) for i, _ in mine]
        drawn = [training_block(rooms[k], recipe, seed) for (_, k), seed in zip(mine, seeds)]
        points, label = (torch.stack(x).to(setup.device) for x in zip(*drawn))
        with setup.autocast():
            logits = model(points)                                  # (b, N, 9) -> (b, N, C)
        counted = label != IGNORE
        loss = F.cross_entropy(logits.flatten(0, 1), label.flatten(), ignore_index=IGNORE,
                               reduction="sum")
        loss = loss * (last > first)
        # over all points, labelled or not, so that parts and processes add up
        (loss * world_size() / (len(rows) * recipe.points)).backward()
        right = ((logits.argmax(2) == label) & counted).sum()
        sums += torch.stack([loss.detach(), right * (last > first), counted.sum() * (last > first)])
    nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
    optimizer.step()
    return sums


# ---- Main ----------------------------------------------------------------------------------------
def main(argv=None):
    args = flags(argv)
    cfg, saved, folder = settings(args)
    if args.scale and cfg["data"] == "synthetic" and not args.predict:
        raise InputError("--scale belongs to clouds from files; leave it out")
    setup = Setup(args.device, cfg["precision"])
    if args.predict:
        return predict(args, args.export or folder / "predicted", cfg, saved, setup)
    if args.export:
        check_export(args.export, cfg)
    try:
        rooms, test, classes, form = load_rooms(cfg, training=not args.eval)
    except BrokenFile as error:
        raise InputError(f"{error}, or pass --skip-broken to go on without it") from None
    if not test or not rooms and not args.eval:
        raise InputError(f"{form}: {len(rooms)} rooms to train, {len(test)} to test; it takes both")
    if saved and list(classes) != cfg["classes"]:
        raise InputError(f"{form}: has other classes than the run: {', '.join(classes)[:200]}")
    cfg["classes"] = list(classes)
    clip, model = build(cfg, saved, setup)
    recipe = Recipe(**cfg["recipe"])
    run = Run("seg", cfg, setup, saved)
    if not args.eval:
        run.open(__file__, folder or args.out)
    size = sum(len(room.xyz) for room in rooms)
    black = sum(not room.rgb.any() for room in rooms + test)
    no_colours = f"; {black} rooms have no colours" if black else ""
    run.print(f"device   {setup.describe}; torch {torch.__version__}; seed {cfg['seed']}")
    trained = f"{len(rooms):,} train rooms of {size:,} points, " * bool(rooms)
    run.print(f"data     {cfg['data']}: {trained}"
              f"{len(test):,} test rooms, {len(classes)} class{'es' * (len(classes) > 1)}; blocks "
              f"of {recipe.block:g} m and {recipe.points:,} points; {form}{no_colours}")
    common.print_model(run, model, clip, f"{recipe.tokens} tokens; ")
    if cfg["data"] == "folder" and not args.eval:
        seen = {k for room in rooms for k in room.label.unique().tolist()}
        if warning := absent(seen, classes, first=0):
            run.print(warning)
    if not args.eval:
        with run.stopper:
            train(model, rooms, test, run)

    stages, started, votes = stage_seconds(model, setup.device), time.time(), args.vote or 1
    shown = []
    counts, in_blocks = evaluate(model, test, setup, recipe, len(classes), votes, args.export,
                                 shown)
    seconds, at = time.time() - started, run.at
    result, blocks = scores(counts), scores(in_blocks)
    for line in table(counts, classes):
        run.print(line)
    *inner, whole_model = stages.values()
    stages["input and classifier"] = whole_model - sum(inner)
    stages["blocks and sums"] = seconds - whole_model
    parts = ", ".join(f"{name} {100 * s / seconds:.0f} %" for name, s in stages.items())
    speed = sum(len(room.xyz) for room in test) / seconds
    run.print(f"speed    {speed:,.0f} points a second: {parts}")
    run.print(f"blocks   mIoU {100 * blocks['miou']:.2f} % over the points of all blocks, before "
              "they are summed: the metric of papers that do not evaluate whole rooms")
    voted = f", {votes} votes" if votes > 1 else ""
    of_run = f" of a run on {cfg.get('trained_on')}"
    if "trained_on" not in cfg:
        of_run = f" ({best_of(at)})"
    run.print(f"result   mIoU {100 * result['miou']:.2f} %, mAcc {100 * result['macc']:.2f} %, OA "
              f"{100 * result['oa']:.2f} %, every point of {len(test)} rooms{voted}, epoch "
              f"{at['epoch']}{of_run}; {cfg['data']}, {clip.name}, {at['seconds']:.0f} s")
    if args.export and run.first:
        render.save(Path(args.export) / "look.png", picture(shown, classes))
        run.print(f"export   {len(test)} rooms in {args.export}")
    if not args.eval:
        iou = {name: None if np.isnan(x) else float(x) for name, x in zip(classes, result["iou"])}
        run.confusion(counts, classes)
        if run.first:
            render.save(run.folder / "look.png", picture(shown, classes))
        run.results({name: result[name] for name in ("miou", "macc", "oa")}, "miou",
                    common.sizes(model), form, iou=iou, votes=votes,
                    block_metrics={"miou": blocks["miou"]})
        run.print(f"look     {run.folder}/look.png")


def predict(args, folder, cfg, saved, setup):
    """Labels for anybody's clouds, with a saved run."""
    check_outputs(args.predict, folder)
    # all can be read, or none is labelled
    rooms = [read_room(file, scale=cfg["scale"]) for file in args.predict]
    _, model = build(cfg, saved, setup)
    recipe, classes = Recipe(**cfg["recipe"]), cfg["classes"]
    shown = []
    for file, room in zip(args.predict, rooms):
        logits, _ = label_room(model, room, setup, recipe, len(classes), args.vote or 1)
        predicted = logits.argmax(1)
        write_labels(folder, room, predicted)
        shown = [*shown, (room, predicted)][:SHOWN]
        share = torch.bincount(predicted, minlength=len(classes)).float() / len(predicted)
        most = share.argsort(descending=True)[:5].tolist()
        found = ", ".join(f"{classes[k]} {100 * share[k]:.0f} %" for k in most if share[k] > 0)
        notes = "" if room.rgb.any() else "; it has no colours"
        if room.scale != 1:
            notes += f"; coordinates times {room.scale:g}"
        print(f"{file}: {len(predicted):,} points, {found}{notes} -> {folder}/{room.name}.ply, "
              ".npy")
    render.save(Path(folder) / "look.png", picture(shown, classes))
    print(f"look: {folder}/look.png")


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
    flag("--points", type=whole(1, 10**6), metavar="N",
         help="points of a block; a quarter of them become tokens")
    flag("--like", choices=RECIPES, help="take another row of the table: `synthetic` suits few "
                                         "rooms and no GPU")
    flag("--test-area", type=lambda text: int(text) if text.isdecimal() else text, metavar="A",
         help="S3DIS, or your rooms in its layout: the area that tests (default 5)")
    flag("--scale", type=float, metavar="S", help="multiply the coordinates of --root or --predict "
                                                  "by S, e.g. 0.001 for millimetres")
    flag("--vote", type=whole(1), metavar="N", help="with --eval: sum the logits of N shuffles")
    flag("--predict", nargs="+", metavar="FILE",
         help="with --eval: label these clouds (.ply, .npy, .npz)")
    flag("--export", metavar="DIR",
         help="write test rooms, or what --predict labels, as coloured .ply and .npy")
    flag("--skip-broken", action="store_true",
         help="leave out rooms that cannot be read, and say so")
    return parser.parse_args(argv)


def check_sizes(recipe):
    if not recipe.neighbours <= recipe.tokens == recipe.points // 4:
        raise InputError(f"--points {recipe.points}: a quarter of them become tokens, and each "
                         f"needs {recipe.neighbours} neighbours; give at least "
                         f"{4 * recipe.neighbours}")


SAVED = {                                   # forms of the settings that are this script's own
    "data": (*RECIPES,), "classes": [str], "test_area": (int, str), "scale": (..., float)}


def settings(args):
    """Flags over a recipe or a saved run -> config, checkpoint or None, run folder or None."""
    if args.scale is not None and not 0 < args.scale < float("inf"):
        raise InputError(f"--scale {args.scale:g} must be above 0, e.g. 0.001 for millimetres")
    if (args.predict or args.vote) and not args.eval:
        raise InputError("--predict and --vote need a run: add --eval runs/seg-...")
    if args.resume or args.eval:
        cfg, saved, folder = saved_settings(args, "seg", Recipe, SAVED, checkpoint_form(sums=3),
                                            other_data=True)
        check_sizes(Recipe(**cfg["recipe"]))
        if "trained_on" in cfg:
            cfg.update(scale=1.0, test_area=args.test_area or 5)
        cfg["scale"] = args.scale or cfg.get("scale", 1.0)
        cfg["skip_broken"] = args.skip_broken
        return cfg, saved, folder
    data = args.data or "synthetic"
    recipe = with_flags(RECIPES[args.like or data], args)
    recipe = recipe._replace(tokens=recipe.points // 4)
    check_sizes(recipe)
    if args.test_area and data != "s3dis" and not (
            data == "folder" and s3dis.has_own_rooms(args.root or "data/folder")):
        raise InputError("--test-area belongs to --data s3dis and to folders in its layout, ROOT/"
                         "Area_N/ROOM/Annotations; leave it out")
    if data == "s3dis" and args.test_area not in (None, *range(1, 7)):
        raise InputError(f"--test-area {args.test_area}: S3DIS has the areas 1 to 6")
    cfg = shared_settings(args, recipe)
    return {**cfg, "like": args.like, "test_area": args.test_area or 5,
            "scale": args.scale or 1.0, "skip_broken": args.skip_broken}, None, None


if __name__ == "__main__":
    main_guard(main)
