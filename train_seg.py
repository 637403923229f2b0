"""Label every point of a room with EPCL (paper sections 3.2.2 and 4.3, Table 2; supplement, Figure 13).

    python train_seg.py                                  built-in rooms, no download
    python train_seg.py --data s3dis --root DIR          area 5 tests (paper: 72.6 mIoU)
    python train_seg.py --data scannet --root DIR        ScanNet's 20 classes, the scans of train_det.py
    python train_seg.py --data folder --root DIR         your clouds: DIR/{train,test}/NAME.ply, DIR/classes.txt
    python train_seg.py --eval RUN --predict scan.ply    labels for your cloud, as .ply and .npy

To change the data, edit `load_rooms` and RECIPES; the head, `Segmenter`; the backbone, pass another
--clip or edit `EPCLEncoder` in common.py. Lengths are metres, z is up.
"""
import argparse
import os
import sys
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import common
from common import BatchNorm, Dropout, EPCLEncoder, InputError, gather
from kernels import farthest_point_sample, interpolate, knn
from scenes import GET_S3DIS, GET_SCANNET, SCANNET_POINTS, columns, read_all, read_npy, read_ply, s3dis_rooms, scannet_scenes
from synthetic import OFFICES, ROOM_CLASSES, room_scenes, write_ply

# --------------------------------------------------------------------------------------------------
# Recipe
# --------------------------------------------------------------------------------------------------


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
    turn: float             # training blocks are turned about z by up to so many degrees
    every: int              # epochs from one evaluation to the next


# s3dis: lr, decay, dropout and 4096 points are the paper's (4.1, 4.3, supplement C); blocks of 1 m, batch,
# epochs and the classifier's dropout are those of the process it calls standard
# (github.com/yanx27/Pointnet_Pointnet2_pytorch); K is Point Transformer's. The paper is silent on the rest.
# scannet and folder follow it. synthetic: ours, sized for two CPU cores.
RECIPES = {
    #                points block tokens neigh epochs warm batch lr decay clip drop head turn every
    "s3dis":     Recipe(4096, 1.0, 1024, 16, 32, 1, 16, 3e-4, 0.04, 10.0, 0.3, 0.5, 360, 4),
    "scannet":   Recipe(4096, 1.0, 1024, 16, 32, 1, 16, 3e-4, 0.04, 10.0, 0.3, 0.5, 360, 4),
    "folder":    Recipe(4096, 1.0, 1024, 16, 32, 1, 16, 3e-4, 0.04, 10.0, 0.3, 0.5, 360, 4),
    "synthetic": Recipe(1024, 2.0,  256,  8, 10, 1,  4, 2e-3, 0.04, 10.0, 0.0, 0.0, 0, 5),
}
SYNTHETIC = (60, 10, 12_000)        # rooms to train, to test, points of a room
LEAST = 1024                # points of a training block, of 4096 [Pointnet_Pointnet2_pytorch]
IGNORE = -1                 # label of points that belong to no class
HOW_TO_GET = {
    "s3dis": GET_S3DIS, "scannet": GET_SCANNET,
    "folder": "pass --root FOLDER with FOLDER/classes.txt, one name in a line, and FOLDER/{train,test}/NAME.npy (or "
              ".npz, .ply) whose points carry a label, the number of the line from 0, or -1",
}


# --------------------------------------------------------------------------------------------------
# Data: files -> rooms in memory
# --------------------------------------------------------------------------------------------------

class Room(NamedTuple):
    name: str
    xyz: torch.Tensor                       # (n, 3) float32, metres, z up, its lowest corner at 0
    rgb: torch.Tensor                       # (n, 3) uint8
    label: torch.Tensor                     # (n,) int16, IGNORE: no class


def load_rooms(cfg):
    """-> train rooms, test rooms, class names, what was read."""
    if cfg["data"] == "synthetic":
        *counts, points = SYNTHETIC
        parts = [[room_of(f"room{i:03d}", f"room{i:03d}", r["xyz"], r["rgb"], r["semantic"], len(ROOM_CLASSES))
                  for i, r in enumerate(room_scenes(count, points, seed, kinds=OFFICES))] for seed, count in zip((1, 2), counts)]
        return *parts, ROOM_CLASSES, "procedural rooms of synthetic.py"
    root = Path(cfg["root"] or f"data/{cfg['data']}")
    if not root.is_dir():
        raise InputError(f"--root {root}: no such folder; {HOW_TO_GET[cfg['data']]}")
    if cfg["data"] == "s3dis":
        (train, test), form = s3dis_rooms(root, cfg, read_s3dis)
        return train, test, ROOM_CLASSES, form
    if cfg["data"] == "scannet":
        (train, test), form = scannet_scenes(root, cfg, read_scan)
        return train, test, tuple(SCANNET_POINTS), form
    return load_folder(root, cfg)


def read_s3dis(path):
    table = read_npy(path, 7)
    return room_of(path, path.stem, table[:, :3], table[:, 3:6], table[:, 6], len(ROOM_CLASSES))


def read_scan(folder, name):
    """VoteNet's _vert.npy and _sem_label.npy -> Room. Labels are nyu40 ids."""
    vert, nyu = read_npy(folder / f"{name}_vert.npy", 6), read_npy(folder / f"{name}_sem_label.npy", 0)
    index = np.full(256, IGNORE)
    index[list(SCANNET_POINTS.values())] = range(len(SCANNET_POINTS))
    return room_of(folder / f"{name}_vert.npy", name, vert[:, :3], vert[:, 3:6], index[np.clip(nyu, 0, 255).astype(int)],
                   len(SCANNET_POINTS))


def load_folder(root, cfg):
    """ROOT/{train,test}/NAME.npy|npz|ply and ROOT/classes.txt."""
    if not (root / "classes.txt").is_file():
        raise InputError(f"{root}/classes.txt: missing; {HOW_TO_GET['folder']}")
    classes = tuple(line.strip() for line in (root / "classes.txt").read_text().splitlines() if line.strip())
    parts = []
    for part in ("train", "test"):
        paths = sorted(p for p in (root / part).glob("*") if p.suffix in (".ply", ".npy", ".npz"))
        if not paths:
            raise InputError(f"{root / part}: no clouds; {HOW_TO_GET['folder']}")
        parts.append([(path, len(classes)) for path in paths])
    (train, test), form = read_all(parts, read_own, cfg, f"clouds under {root}")
    return train, test, classes, form


def read_own(path, classes=None):
    """A cloud -> Room. classes: how many there are; None: its points need no label.

    .npy: columns x y z label, or x y z r g b label. .npz: xyz, label, and rgb if there are colours.
    .ply: properties x y z, label, and red green blue. Without classes, .npy may end before the label.
    """
    path, rgb, label = Path(path), None, None
    try:
        if path.suffix == ".ply":
            table = read_ply(path.read_bytes())
            names = table.dtype.names
            xyz = columns(table, "x", "y", "z")
            rgb = columns(table, "red", "green", "blue") if "red" in names else None
            label = table["label"] if "label" in names else None
        elif path.suffix == ".npz":
            table = np.load(path, allow_pickle=False)
            xyz, rgb, label = (table[name] if name in table else None for name in ("xyz", "rgb", "label"))
        else:
            table = np.load(path, allow_pickle=False)
            if table.ndim != 2 or table.shape[1] not in ((4, 7) if classes else (3, 4, 6, 7)):
                raise ValueError(f"shape {table.shape}; expected columns x y z label, or x y z r g b label")
            xyz, rgb = table[:, :3], table[:, 3:6] if table.shape[1] > 5 else None
            label = table[:, -1] if table.shape[1] in (4, 7) else None
        if xyz is None or classes and label is None:
            raise ValueError("has no xyz" if xyz is None else "its points have no label")
    except (OSError, KeyError, ValueError, TypeError, EOFError, IndexError) as error:
        text = getattr(error, "strerror", None) or " ".join(str(error).split())[:160]
        raise InputError(f"{path}: {text}; repair it" + (", or pass --skip-broken to go on without it" if classes else
                                                         "")) from None
    return room_of(path, path.stem, xyz, rgb, label if classes else np.full(len(xyz), IGNORE), classes)


def room_of(path, name, xyz, rgb, label, classes):
    """Arrays -> Room, checked. Colours are 0..255, or 0..1 where no value is above 1; None: black."""
    xyz, label = np.asarray(xyz, np.float32), np.asarray(label)
    why = None
    if xyz.ndim != 2 or len(xyz) == 0 or not np.isfinite(xyz).all():
        why = "has no points, or NaN coordinates"
    elif len(label) != len(xyz) or rgb is not None and len(rgb) != len(xyz):
        why = f"has {len(xyz)} points, {len(label)} labels" + (f", {len(rgb)} colours" if rgb is not None else "")
    elif classes and not ((label >= IGNORE) & (label < classes) & (label == np.floor(label))).all():
        wrong = label[~((label >= IGNORE) & (label < classes) & (label == np.floor(label)))]
        why = f"has the label {wrong[0]:g}; labels are whole numbers from 0 to {classes - 1}, or {IGNORE} for none"
    elif rgb is not None and not ((np.asarray(rgb) >= 0) & (np.asarray(rgb) <= 255)).all():
        why = "has colours outside 0..255"
    if why:
        raise InputError(f"{path}: {why}; repair the file" + (", or pass --skip-broken to go on without it" if classes
                                                              else ""))
    if rgb is None:
        rgb = np.zeros((len(xyz), 3))
    elif np.asarray(rgb).dtype.kind == "f" and len(rgb) and np.max(rgb) <= 1:
        rgb = np.asarray(rgb) * 255                             # a room this dark does not exist
    return Room(name, torch.from_numpy(xyz - xyz.min(0)), torch.from_numpy(np.asarray(rgb).round().astype(np.uint8)),
                torch.from_numpy(label.astype(np.int16)))


# --------------------------------------------------------------------------------------------------
# A room -> the blocks of a step
# --------------------------------------------------------------------------------------------------

def features(room, rows, center, size):
    """(n, 9): x y z from the block's middle and the floor, r g b in 0..1, x y z as shares of its `size`."""
    xyz = room.xyz[rows]
    local = xyz - torch.cat([center, center.new_zeros(1)])
    return torch.cat([local, room.rgb[rows].float() / 255, xyz / size], 1)


def training_block(room, recipe, seed, tries=10):
    """A random column of the room -> points (N, 9) turned about z, labels (N,). The host waits for nothing."""
    draw = torch.Generator(room.xyz.device).manual_seed(seed)
    centers = room.xyz[torch.randint(len(room.xyz), (tries,), device=draw.device, generator=draw), :2]
    x, y = room.xyz[:, 0].contiguous(), room.xyz[:, 1].contiguous()
    inside = torch.stack([((x - cx).abs() <= recipe.block / 2) & ((y - cy).abs() <= recipe.block / 2)
                          for cx, cy in centers])                                       # (tries, n)
    count = inside.sum(1)
    # blocks at the rim may be nearly empty: the first with enough points, or else the fullest
    turn = torch.arange(tries, device=draw.device)
    enough = count > LEAST * recipe.points / 4096
    best = torch.where(enough, len(room.xyz) + tries - turn, count).argmax(0, keepdim=True)     # (1,)
    rows = common.random_rows(inside[best][0], recipe.points, draw)
    points = features(room, rows, centers[best][0], room.xyz.amax(0).clamp_min(1e-3))
    angle = torch.rand(1, device=draw.device, generator=draw) * recipe.turn * torch.pi / 180
    x, y = points[:, 0].clone(), points[:, 1].clone()
    points[:, 0], points[:, 1] = x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()
    return points, room.label[rows].long()


# --------------------------------------------------------------------------------------------------
# Model
# --------------------------------------------------------------------------------------------------

def layer(a, b):
    return nn.Sequential(nn.Linear(a, b, bias=False), BatchNorm(b), nn.ReLU())


class TransitionDown(nn.Module):
    """xyz (B, N, 3), features (B, N, C) -> (B, M, 3), (B, M, D): farthest points, K nearest, MLP, max.

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
    """Coarse features to finer points, beside what the tokenizer knew there: 3-NN, concatenation, MLP."""

    def __init__(self, width_in, width_skip, width):
        super().__init__()
        self.mlp = layer(width_in + width_skip, width)

    def forward(self, xyz, skip, coarse_xyz, x):                # (B, N, 3), (B, N, C), (B, M, 3), (B, M, D)
        return self.mlp(torch.cat([skip, interpolate(xyz, coarse_xyz, x)], -1))


class Segmenter(nn.Module):
    """Points (B, N, 9) -> logits (B, N, C). Widths are ours: the paper gives none."""

    def __init__(self, clip, classes, cfg):
        super().__init__()
        r = Recipe(**cfg["recipe"])
        self.first = 0 if cfg["no_transformer"] else 1          # row of the first token: after CLIP's class token
        self.lift = layer(9, 64)
        self.downs = nn.ModuleList([TransitionDown(64, 256, 2 * r.tokens, r.neighbours),
                                    TransitionDown(256, clip.width, r.tokens, r.neighbours)])
        self.encoder = EPCLEncoder(
            clip, nn.Identity(), task_tokens=classes, dropout=r.dropout, task_token=not cfg["no_task_token"],
            deep_prompt=cfg["deep_prompt"], transformer=not cfg["no_transformer"])
        self.ups = nn.ModuleList([TransitionUp(clip.width, 256, 256), TransitionUp(256, 64, 128)])
        self.head = nn.Sequential(layer(128 + 9, 128), Dropout(r.head_dropout), nn.Linear(128, classes))

    def forward(self, points):
        xyz = points[..., :3].contiguous()                      # (B, N, 3)
        x = self.lift(points)                                   # (B, N, 64)
        xyz2, x2 = self.downs[0](xyz, x)                        # (B, N / 2, 3), (B, N / 2, 256)
        xyz3, x3 = self.downs[1](xyz2, x2)                      # (B, G, 3), (B, G, D), G = N / 4
        rows, _ = self.encoder((x3, xyz3))                      # (B, 1 + G + T, D)
        deep = rows[:, self.first:self.first + xyz3.shape[1]]   # (B, G, D): class and task rows dropped
        x2 = self.ups[0](xyz2, x2, xyz3, deep)                  # (B, N / 2, 256)
        x = self.ups[1](xyz, x, xyz2, x2)                       # (B, N, 128)
        return self.head(torch.cat([x, points.to(x.dtype)], -1)).float()        # (B, N, C)


# --------------------------------------------------------------------------------------------------
# Metric
# --------------------------------------------------------------------------------------------------

def confusion(label, predicted, classes):
    """(n,), (n,) -> (C, C) counts, true by predicted; points labelled IGNORE do not count."""
    kept = label != IGNORE
    return torch.bincount(label[kept].long() * classes + predicted[kept].long(), minlength=classes ** 2).view(classes, classes)


def scores(counts):
    """Confusion (C, C) -> {iou (C,), accuracy (C,), miou, macc, oa}; NaN for a class that never occurs.

    IoU = TP / (TP + FP + FN). The means leave out classes without a point: there is nothing to find.
    """
    counts = np.asarray(counts, float)
    right, true, said = counts.diagonal(), counts.sum(1), counts.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        iou = np.where(true > 0, right / (true + said - right), np.nan)
        accuracy = np.where(true > 0, right / true, np.nan)
    some = (true > 0).any()
    return {"iou": iou, "accuracy": accuracy, "miou": np.nanmean(iou) if some else 0.0,
            "macc": np.nanmean(accuracy) if some else 0.0, "oa": right.sum() / max(counts.sum(), 1)}


def windows(xyz, block):
    """Columns of side `block` that cover the room, half a side apart -> (middle (2,), rows) of each
    that holds a point. The last one in a row is moved back to the room's end."""
    xy = xyz[:, :2].numpy()
    order = np.argsort(xy[:, 0], kind="stable")
    x = xy[order, 0]
    starts = [np.minimum(np.arange(max(1, np.ceil((end - block) / (block / 2)) + 1)) * block / 2, max(end - block, 0))
              for end in xy.max(0)]
    for left in starts[0]:
        strip = order[np.searchsorted(x, left - .001):np.searchsorted(x, left + block + .001, "right")]
        y = xy[strip, 1]
        for low in starts[1]:
            rows = strip[(y >= low - .001) & (y <= low + block + .001)]
            if len(rows):
                yield torch.tensor([left, low], dtype=torch.float32) + block / 2, torch.from_numpy(rows)


def watch(model, device):
    """-> Clock that takes the seconds of each stage of whole-room inference."""
    clock = common.Clock(device)
    for part, name in [*((down, "FPS, KNN, tokenizer") for down in model.downs), (model.encoder, "transformer"),
                       *((up, "interpolation, decoder") for up in model.ups), (model, "input and classifier")]:
        clock.module(part, name)
    return clock


@torch.no_grad()
def label_room(model, room, setup, recipe, classes, votes=1):
    """Every point's logits, summed over the blocks that hold it -> (n, C) on the CPU, per-block counts.

    All points of a window are shuffled and cut into blocks of `recipe.points`, the last one filled up
    with points of the window drawn again, so that each point is in at least one block. votes: how
    often, with other shuffles. Blocks are drawn by the room's name: always the same.
    """
    model.eval()
    draw = torch.Generator().manual_seed(zlib.crc32(room.name.encode()))
    size = room.xyz.amax(0).clamp_min(1e-3)
    total, counts = torch.zeros(len(room.xyz), classes), torch.zeros(classes, classes, dtype=torch.int64)

    def blocks():
        for _ in range(votes):
            for middle, rows in windows(room.xyz, recipe.block):
                rows = rows[common.shuffled(len(rows), -(-len(rows) // recipe.points) * recipe.points, draw)]
                for part in rows.split(recipe.points):
                    yield part, features(room, part, middle, size)

    def run(batch):
        with setup.autocast():
            logits = model(torch.stack([points for _, points in batch]).to(setup.device)).cpu()
        for (rows, _), out in zip(batch, logits):
            total.index_add_(0, rows, out)
            counts.add_(confusion(room.label[rows], out.argmax(1), classes))

    batch = []
    for block in blocks():
        batch.append(block)
        if len(batch) == recipe.batch_size:
            run(batch)
            batch = []
    if batch:
        run(batch)
    return total, counts


def evaluate(model, rooms, setup, recipe, classes, votes=1, each=None):
    """-> confusion over all points, confusion over all blocks; rooms are shared between processes.
    each(room, predicted (n,)) is called for every room."""
    both = torch.zeros(2, classes, classes, dtype=torch.int64)
    for room in tqdm(rooms[common.rank()::common.world_size()], desc="rooms", unit="room", leave=False,
                     disable=common.rank() > 0 or None):
        logits, in_blocks = label_room(model, room, setup, recipe, classes, votes)
        predicted = logits.argmax(1)
        both += torch.stack([confusion(room.label, predicted, classes), in_blocks])
        if each:
            each(room, predicted)
    return common.all_reduce(both.to(setup.device)).cpu()


def table(counts, classes):
    result, points = scores(counts), counts.sum(1)
    lines = [f"{'class':18s}{'points':>12}{'IoU':>8}{'accuracy':>10}"]
    for k, name in enumerate(classes):
        never = "" if points[k] else "   never occurs; not in the means"
        lines.append(f"{name:18s}{points[k]:12,d}" + (f"{100 * result['iou'][k]:8.1f}{100 * result['accuracy'][k]:10.1f}"
                                                       if points[k] else never))
    return lines + [f"{'mean':18s}{points.sum():12,d}{100 * result['miou']:8.1f}{100 * result['macc']:10.1f}"]


def colour(k):
    """A colour of its own for each class."""
    hue = np.asarray(k)[..., None] * 0.618034 + np.array([0, 1 / 3, 2 / 3])
    rgb = (np.abs((hue % 1) * 6 - 3) - 1).clip(0, 1)
    return (255 * (0.25 + 0.75 * rgb) * np.where(np.asarray(k)[..., None] % 2, 0.65, 1)).astype(np.uint8)


def write_labels(folder, room, predicted):
    """NAME.ply, points coloured by label, and NAME.npy, the labels (n,)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_ply(folder / f"{room.name}.ply", room.xyz.numpy(), colour(predicted.numpy()))
    np.save(folder / f"{room.name}.npy", predicted.numpy().astype(np.int16))


# --------------------------------------------------------------------------------------------------
# Train
# --------------------------------------------------------------------------------------------------

def train(model, rooms, test, cfg, run, setup, saved):
    """The loop. -> where it stopped (epochs, steps, seconds, best), was that the end."""
    recipe, device, classes = Recipe(**cfg["recipe"]), setup.device, len(cfg["classes"])
    wrapped = setup.wrap(model, cfg["compile"])
    optimizer = torch.optim.AdamW(common.parameter_groups(model, recipe.decay), lr=recipe.lr)
    at = {"epoch": 0, "step": 0, "sums": [0.0] * 3, "seconds": 0.0, "best": -1.0, "best_epoch": 0}
    if saved:
        optimizer.load_state_dict(saved["optimizer"])
        at = saved["at"]
    if device.type == "cuda" and sum(r.xyz.nbytes * 2 for r in rooms) < torch.cuda.mem_get_info(device)[0] // 3:
        rooms = [Room(r.name, *(x.to(device) for x in r[1:])) for r in rooms]
    size = np.array([len(r.xyz) for r in rooms])
    steps = max(1, round(size.sum() / recipe.points / recipe.batch_size))

    def save(name, **more):
        run.save(name, {"task": "seg", "config": cfg, "frozen": cfg["frozen"], "at": at,
                        "model": model.state_dict(), **more})

    stopper = common.Stopper()
    for epoch in range(at["epoch"], recipe.epochs):
        started, first = time.time(), at["step"]
        model.train()
        common.seed_all(cfg["seed"], epoch)
        order = np.random.default_rng([cfg["seed"], epoch]).choice(
            len(rooms), steps * recipe.batch_size, p=size / size.sum()).tolist()        # larger rooms more often
        if first:
            common.set_random_state(saved["random"])
        sums = torch.tensor(at["sums"], dtype=torch.float64, device=device) / common.world_size()
        bar = tqdm(range(first, steps), initial=first, total=steps, unit="step", leave=False,
                   desc=f"epoch {epoch + 1}/{recipe.epochs}", disable=common.rank() > 0 or None)
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = common.learning_rate(epoch + step / steps, recipe.lr, recipe.epochs, recipe.warmup)
            sums += train_step(wrapped, optimizer, rooms, order, step, epoch, recipe, cfg, setup)
            if step + 1 < steps and stopper.now(step):
                bar.close()
                at.update(epoch=epoch, step=step + 1, sums=common.all_reduce(sums).tolist(),
                          seconds=at["seconds"] + time.time() - started)
                save("last.pt", optimizer=optimizer.state_dict(), random=common.random_state())
                return at, False

        loss, right, n = common.all_reduce(sums).tolist()
        loss, right = loss / max(n, 1), right / max(n, 1)
        if not np.isfinite(loss):
            raise InputError(f"the loss is not finite in epoch {epoch + 1}; {run.folder}/last.pt is from the epoch "
                             "before; try a lower --lr or --precision fp32")
        now = (epoch + 1) % recipe.every == 0 or epoch + 1 == recipe.epochs
        result = scores(evaluate(model, test, setup, recipe, classes)[0]) if now else None
        better = now and result["miou"] >= at["best"]
        if better:
            at.update(best=float(result["miou"]), best_epoch=epoch + 1)
        seconds, lr = time.time() - started, optimizer.param_groups[0]["lr"]
        at.update(epoch=epoch + 1, step=0, sums=[0.0] * 3, seconds=at["seconds"] + seconds)
        if (epoch - (saved["at"]["epoch"] if saved else 0)) % 20 == 0:
            run.print("epoch     loss  train OA     mIoU     mAcc       OA        lr      s  left")
        run.print(f"{epoch + 1:5d} {loss:8.4f} {100 * right:9.2f}"
                  + ("".join(f"{100 * result[name]:9.2f}" for name in ("miou", "macc", "oa")) if now else " " * 27)
                  + f"  {lr:8.2e} {seconds:6.1f} {seconds * (recipe.epochs - epoch - 1) / 60:4.0f} m"
                  + (" *" if better else ""))
        run.metrics({"epoch": epoch + 1, "loss": loss, "train_oa": right, "lr": lr, "seconds": seconds,
                     **({name: float(result[name]) for name in ("miou", "macc", "oa")} if now else {})})
        if better:
            save("best.pt")
        save("last.pt", optimizer=optimizer.state_dict())
        if epoch + 1 < recipe.epochs and stopper.now(0):
            return at, False
    return at, True


def train_step(model, optimizer, rooms, order, step, epoch, recipe, cfg, setup):
    """One step. -> sums over labelled points: loss, right answers, points (this process's share)."""
    sums = torch.zeros(3, dtype=torch.float64, device=setup.device)
    optimizer.zero_grad(set_to_none=True)
    B = recipe.batch_size
    for part in range(cfg["accumulate"]):
        first, last = common.my_rows(B, part, cfg["accumulate"])
        if first == last and common.world_size() == 1:
            continue
        mine = range(step * B + first, step * B + last) if last > first else [step * B]      # all take part
        seeds = [int(np.random.SeedSequence([cfg["seed"], epoch, i]).generate_state(1)[0]) for i in mine]
        blocks = [training_block(rooms[order[i]], recipe, seed) for i, seed in zip(mine, seeds)]
        points, label = (torch.stack(column).to(setup.device) for column in zip(*blocks))     # (b, N, 9), (b, N)
        with setup.autocast():
            logits = model(points)                                                            # (b, N, C)
        counted = label != IGNORE
        loss = F.cross_entropy(logits.flatten(0, 1), label.flatten(), ignore_index=IGNORE, reduction="sum")
        loss = loss * (last > first)
        # over all points, labelled or not, so that parts and processes add up; gradients are averaged
        (loss * common.world_size() / (B * recipe.points)).backward()
        sums += torch.stack([loss.detach(), ((logits.argmax(2) == label) & counted).sum() * (last > first),
                             counted.sum() * (last > first)])
    nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
    optimizer.step()
    return sums


# --------------------------------------------------------------------------------------------------
# Main
# --------------------------------------------------------------------------------------------------

def main(argv=None):
    args = flags(argv)
    cfg, saved, folder = settings(args)
    setup = common.Setup(args.device, cfg["precision"])
    if args.predict:
        return predict(args.predict, args.export or folder / "predicted", cfg, saved, setup, args.vote)
    rooms, test, classes, form = load_rooms(cfg)
    if not rooms or not test:
        raise InputError(f"{form}: {len(rooms)} rooms to train and {len(test)} to test; both are needed")
    if saved and list(classes) != cfg["classes"]:
        raise InputError(f"{form}: has other classes than the run: {' '.join(classes)[:200]}")
    cfg["classes"] = list(classes)
    clip, model = build(cfg, saved, setup)
    recipe = Recipe(**cfg["recipe"])
    run = common.Run(None if args.eval else folder or common.new_folder(args.out, "seg", cfg["data"]))
    if not args.eval:
        run.start(cfg, __file__, saved and saved["at"]["epoch"])
    trained, frozen = common.sizes(model)
    size, black = sum(len(r.xyz) for r in rooms), sum(not r.rgb.any() for r in rooms + test)
    run.print(f"device   {setup.describe}; torch {torch.__version__}; seed {cfg['seed']}")
    run.print(f"data     {cfg['data']}: {len(rooms):,} train rooms of {size:,} points, {len(test):,} test rooms, "
              f"{len(classes)} classes; blocks of {recipe.block:g} m and {recipe.points:,} points; {form}"
              + (f"; {black} rooms have no colours" if black else ""))
    run.print(f"model    {trained:,} weights trained, {frozen:,} frozen; {recipe.tokens} tokens; transformer "
              + ("left out" if cfg["no_transformer"] else
                 f"{clip.name}, {'trained, too' if clip.trainable else 'frozen'}"))
    if clip.name.endswith("random") and not cfg["no_transformer"]:
        run.print("warning  the transformer has RANDOM weights: these numbers say nothing about CLIP")
    at = saved["at"] if saved else None
    if not args.eval:
        run.print(f"run      {run.folder}" + (f", resumed after {at['epoch']} epochs and {at['step']} steps" if saved else ""))
        at, complete = train(model, rooms, test, cfg, run, setup, saved)
        if not complete:
            run.print(f"stopped after {at['epoch']} epochs and {at['step']} steps; go on with: "
                      f"python train_seg.py --resume {run.folder}")
            sys.exit(130)
    clock, started = watch(model, setup.device), time.time()
    votes, each = args.vote or 1, (lambda room, predicted: write_labels(args.export, room, predicted)) if args.export else None
    counts, in_blocks = evaluate(model, test, setup, recipe, len(classes), votes, each)
    seconds, result, blocks = time.time() - started, scores(counts), scores(in_blocks)
    for line in table(counts, classes):
        run.print(line)
    run.print(f"speed    {sum(len(r.xyz) for r in test) / seconds:,.0f} points a second: " + ", ".join(
        f"{name} {100 * s / seconds:.0f} %" for name, s in clock.seconds.items()) +
        f", blocks and sums {100 * (1 - sum(clock.seconds.values()) / seconds):.0f} %")
    run.print(f"blocks   mIoU {100 * blocks['miou']:.2f} % over the points of all blocks, before they are summed: the "
              "metric of papers that do not evaluate whole rooms")
    run.print(f"result   mIoU {100 * result['miou']:.2f} %, mAcc {100 * result['macc']:.2f} %, OA {100 * result['oa']:.2f} %, "
              f"every point of {len(test)} rooms" + (f", {votes} votes" if votes > 1 else "") + f", epoch {at['epoch']} "
              f"(best on test: {100 * at['best']:.2f} in epoch {at['best_epoch']}); {cfg['data']}, {clip.name}, "
              f"{at['seconds']:.0f} s")
    if args.export:
        run.print(f"export   {len(test)} rooms in {args.export}")
    if not args.eval:
        run.write_json("results.json", {
            "task": "seg", "data": cfg["data"], "clip": cfg["frozen"], "seed": cfg["seed"],
            "metrics": {name: float(result[name]) for name in ("miou", "macc", "oa")},
            "iou": {name: None if np.isnan(x) else float(x) for name, x in zip(classes, result["iou"])},
            "block_metrics": {"miou": float(blocks["miou"])}, "votes": votes,
            "seconds": at["seconds"], "parameters": {"trainable": trained, "frozen": frozen}, "epoch": at["epoch"],
            "best_on_test": {"miou": at["best"], "epoch": at["best_epoch"]}, "device": setup.describe, "form": form})


def predict(files, folder, cfg, saved, setup, votes):
    """Labels for anybody's clouds, with a saved run."""
    rooms = [read_own(file) for file in files]                  # all are readable, or none is labelled
    names = [room.name for room in rooms]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"--predict: several files are called {name}, and {folder}/{name}.ply can hold one; label "
                             "them one at a time, each with its own --export")
    clip, model = build(cfg, saved, setup)
    recipe = Recipe(**cfg["recipe"])
    for file, room in zip(files, rooms):
        predicted = label_room(model, room, setup, recipe, len(cfg["classes"]), votes or 1)[0].argmax(1)
        write_labels(folder, room, predicted)
        share = torch.bincount(predicted, minlength=len(cfg["classes"])).float() / len(predicted)
        most = share.argsort(descending=True)[:5].tolist()
        print(f"{file}: {len(predicted):,} points, " + ", ".join(
            f"{cfg['classes'][k]} {100 * share[k]:.0f} %" for k in most if share[k] > 0)
            + ("" if room.rgb.any() else "; it has no colours") + f" -> {folder}/{room.name}.ply, .npy")


def build(cfg, saved, setup):
    """-> FrozenCLIP, model on the device."""
    clip = common.load_clip(cfg["clip"], cfg["seed"], trainable=cfg["unfreeze"])
    clip.text = None
    cfg["frozen"] = {"name": clip.name, "sha256": clip.sha256}
    if saved:
        common.check_frozen(saved, clip)
    common.seed_all(cfg["seed"])
    model = Segmenter(clip, len(cfg["classes"]), cfg)
    if saved:
        model.load_state_dict(saved["model"])
    if setup.bf16 and not cfg["unfreeze"]:
        clip.half_weights()
    return clip, model.to(setup.device)


def flags(argv):
    lines = [("data", *RECIPES), *((name, *column) for name, column in zip(Recipe._fields, zip(*RECIPES.values())))]
    text = "\n".join(f"  {name:16s}" + "".join(f"{value!s:>12}" for value in row) for name, *row in lines)
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog="recipes, the defaults of each --data:\n" + text,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--data", choices=RECIPES, help="data set (default: synthetic, built in)")
    common.shared_flags(parser)
    flag("--points", type=common.whole(1), metavar="N", help="points of a block; a quarter of them become tokens")
    flag("--like", choices=RECIPES, help="take another row of the table: `synthetic` suits few rooms and no GPU")
    flag("--test-area", type=int, choices=range(1, 7), metavar="A", help="S3DIS: the area that tests (default 5)")
    flag("--vote", type=common.whole(1), metavar="N", help="with --eval: sum the logits of N shuffles")
    flag("--predict", nargs="+", metavar="FILE", help="with --eval: label these clouds (.ply, .npy, .npz)")
    flag("--export", metavar="DIR", help="write test rooms, or what --predict labels, as coloured .ply and .npy")
    flag("--skip-broken", action="store_true", help="leave out rooms that cannot be read, and say so")
    return parser.parse_args(argv)


def settings(args):
    """Flags over a recipe or a saved run -> config, checkpoint or None, run folder or None."""
    if (args.predict or args.vote) and not args.eval:
        raise InputError("--predict and --vote need a run: add --eval runs/seg-...")
    if args.resume or args.eval:
        cfg, saved, folder = common.saved_settings(args, "seg")
        if args.resume:
            common.check_resume(args.resume, saved)
        return {**cfg, "skip_broken": args.skip_broken}, saved, folder
    given = {k: v for k, v in vars(args).items() if v is not None}
    data = given.get("data", "synthetic")
    recipe = RECIPES[args.like or data]
    recipe = recipe._replace(**{k: given[k] for k in Recipe._fields if k in given})
    recipe = recipe._replace(tokens=recipe.points // 4, warmup=min(recipe.warmup, recipe.epochs / 10))
    if recipe.tokens < recipe.neighbours:
        raise InputError(f"--points {recipe.points}: a quarter of them become tokens, and each needs "
                         f"{recipe.neighbours} neighbours; give at least {4 * recipe.neighbours}")
    if args.test_area and data != "s3dis":
        raise InputError(f"--test-area belongs to --data s3dis, not {data}; leave it out")
    cfg = {
        "data": data, "root": args.root, "like": args.like, "recipe": recipe._asdict(), "seed": args.seed or 0,
        "clip": args.clip or ("timm:test_vit=random" if data == "synthetic" else "openai"),
        "test_area": args.test_area or 5, "skip_broken": args.skip_broken, "precision": args.precision or "auto",
        "compile": args.compile, "accumulate": args.accumulate or 1, "workers": args.workers or os.cpu_count(),
        **{k: getattr(args, k) for k in common.ABLATIONS}}
    common.check_settings(cfg)
    return cfg, None, None


if __name__ == "__main__":
    common.main_guard(main)
