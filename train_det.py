"""Detect objects in indoor scans with EPCL (paper section 4.2, Tables 1 and 6; supplement, Figure 12).

    python train_det.py                                  built-in rooms, no download
    python train_det.py --data scannet --root DIR        the paper's recipe, 1080 epochs (paper: 43.0 AP50)
    python train_det.py --data folder --root DIR         your clouds: DIR/{train,val}/NAME.ply + NAME.json
    python train_det.py --eval RUN                       AP of a saved run, class by class

To change the data, edit `load_scenes` and RECIPES; the head, `Detector`; the backbone, pass another
--clip or edit `EPCLEncoder` in common.py. A box is six numbers, centre and full side lengths in
metres, and parallel to the axes.
"""
import argparse
import json
import os
import sys
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import nn
from tqdm import tqdm

import common
from common import BatchNorm, Dropout, EPCLEncoder, InputError, gather
from kernels import farthest_point_sample, knn
from scenes import GET_SCANNET, SCANNET_BOXES, columns, read_npy, read_ply, scannet_scenes
from synthetic import FURNITURE, box, join, room_scenes, write_ply

# --------------------------------------------------------------------------------------------------
# Recipe
# --------------------------------------------------------------------------------------------------


class Recipe(NamedTuple):
    points: int             # of a scene, as the model sees it
    tokens: int             # patches of a scene, G
    radius: float           # of a patch, metres
    neighbours: int         # points of a patch, K
    queries: int            # boxes that the decoder proposes
    content: str            # of a query before the first layer: "zeros", or the "token" it stands on
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


# scannet: lr, decay and dropout are the paper's, 4.1 and supplement; everything else is 3DETR's, whose
# decoder the paper takes (scripts/scannet_ep1080.sh). folder follows it. synthetic: ours, sized for
# two CPU cores.
RECIPES = {
    #                points tokens radius neigh queries content layers epochs warm batch lr decay clip drop dec head cuboid every
    "scannet":   Recipe(40000, 2048, 0.2, 64, 256, "zeros", 8, 1080, 9, 8, 3e-4, 0.04, 0.1, 0.3, 0.1, 0.3, True, 10),
    "folder":    Recipe(40000, 2048, 0.2, 64, 256, "zeros", 8, 1080, 9, 8, 3e-4, 0.04, 0.1, 0.3, 0.1, 0.3, True, 10),
    "synthetic": Recipe( 4096,  192, 0.5, 32,  96, "token", 3,   16, 1, 4, 1e-3, 0.04, 0.5, 0.0, 0.0, 0.0, False, 4),
}
FINAL_LR = 5e-7             # supplement C
SYNTHETIC = (200, 40)       # rooms to train and to test
MAX_BOXES = 64              # of a scene, as VoteNet; more is an error
NO_OBJECT = 0.25            # weight of the class "no object", 3DETR's script
COST = {"class": 1, "giou": 2}                                  # of the matching
WEIGHT = {"class": 1, "center": 5, "size": 1, "giou": 1, "angle": 0.5}

HOW_TO_GET = {
    "scannet": GET_SCANNET,
    "folder": "pass --root FOLDER with FOLDER/{train,val}/NAME.ply (or .npy, .npz) and NAME.json beside each",
}


# --------------------------------------------------------------------------------------------------
# Data: files -> scenes in memory
# --------------------------------------------------------------------------------------------------

class Scene(NamedTuple):
    name: str
    xyz: torch.Tensor                       # (n, 3) float32, metres, z up
    boxes: torch.Tensor                     # (k, 6) centre and size
    label: torch.Tensor                     # (k,) int64


def load_scenes(cfg):
    """-> train scenes, test scenes, class names, what was read."""
    if cfg["data"] == "synthetic":
        stored = 2 * cfg["recipe"]["points"]
        parts = [[Scene(f"room{i:03d}", *map(torch.from_numpy, (
            room["xyz"], np.concatenate([room["center"], room["size"]], 1), room["label"])))
            for i, room in enumerate(room_scenes(count, stored, seed))]
            for seed, count in zip((1, 2), SYNTHETIC)]
        return *parts, FURNITURE, "procedural rooms of synthetic.py"
    root = Path(cfg["root"] or f"data/{cfg['data']}")
    if not root.is_dir():
        raise InputError(f"--root {root}: no such folder; {HOW_TO_GET[cfg['data']]}")
    return (load_scannet if cfg["data"] == "scannet" else load_folder)(root, cfg)


def load_scannet(root, cfg):
    scenes, form = scannet_scenes(root, cfg, read_boxes)
    return *scenes, tuple(SCANNET_BOXES), form


def read_boxes(folder, name):
    """VoteNet's _vert.npy and _bbox.npy -> Scene. The last column of a box is its nyu40 id."""
    index = {nyu: k for k, nyu in enumerate(SCANNET_BOXES.values())}
    vert, bbox = (read_npy(folder / f"{name}_{part}.npy", columns) for part, columns in (("vert", 3), ("bbox", 7)))
    kept = np.isin(bbox[:, 6], list(index))
    label = np.array([index[int(n)] for n in bbox[kept, 6]], np.int64)
    return checked_scene(folder / f"{name}_bbox.npy", name, vert[:, :3], bbox[kept, :6], label)


def load_folder(root, cfg):
    """ROOT/{train,val}/NAME.ply|npy|npz with NAME.json: [{"class", "center", "size"}, ...]."""
    raw = {part: [] for part in ("train", "val")}
    broken = []
    for part, scenes in raw.items():
        for path in sorted(p for p in (root / part).glob("*") if p.suffix in (".ply", ".npy", ".npz")):
            try:
                scenes.append((path.with_suffix(".json"), *read_own(path)))
            except InputError as error:
                if not cfg["skip_broken"]:
                    raise
                broken.append(f"LEFT OUT {error}")
        if not scenes:
            raise InputError(f"{root / part}: no scenes; {HOW_TO_GET['folder']}")
    classes = tuple(sorted({c for _, _, names in raw["train"] for c in names}))
    if not classes:
        raise InputError(f"{root / 'train'}: no scene has a box; there is nothing to learn")
    parts = []
    for scenes in raw.values():
        parts.append([])
        for path, scene, names in scenes:
            unknown = sorted(set(names) - set(classes))
            if unknown:
                raise InputError(f"{path}: the class {unknown[0]!r} does not occur in {root / 'train'}; correct "
                                 "the name or add training scenes")
            label = torch.tensor([classes.index(c) for c in names], dtype=torch.int64)
            parts[-1].append(scene._replace(label=label))
    return *parts, classes, "; ".join([f"scenes under {root}", *broken])


def read_own(path):
    """A cloud and its .json -> Scene without labels, names of the boxes' classes."""
    json_path = path.with_suffix(".json")
    try:
        where = path
        if path.suffix == ".ply":
            xyz = columns(read_ply(path.read_bytes()), "x", "y", "z")
        else:
            xyz = np.load(path, allow_pickle=False)
            xyz = (xyz["xyz"] if path.suffix == ".npz" else xyz)[:, :3]
        where = json_path
        boxes = json.loads(json_path.read_text())
        names = [str(b["class"]) for b in boxes]
        boxes = np.array([[*b["center"], *b["size"]] for b in boxes], np.float64).reshape(-1, 6)
    except (OSError, KeyError, ValueError, TypeError, EOFError, IndexError) as error:
        text = getattr(error, "strerror", None) or " ".join(str(error).split())[:120]
        raise InputError(f"{where}: {text}; a scene is a cloud and a list of "
                         '{"class": "chair", "center": [x, y, z], "size": [dx, dy, dz]}; repair it, or pass '
                         "--skip-broken") from None
    return checked_scene(json_path, path.stem, xyz, boxes, np.zeros(len(boxes), np.int64)), names


def checked_scene(path, name, xyz, boxes, label):
    xyz = np.ascontiguousarray(xyz, np.float32)
    boxes = np.ascontiguousarray(boxes, np.float32)
    why = None
    if len(xyz) == 0 or not np.isfinite(xyz).all() or not np.isfinite(boxes).all():
        why = "has no points, or NaN coordinates"
    elif (boxes[:, 3:] <= 0).any():
        why = f"box {int(np.flatnonzero((boxes[:, 3:] <= 0).any(1))[0])} has a size of zero or less"
    elif len(boxes) > MAX_BOXES:
        why = f"has {len(boxes)} boxes, at most {MAX_BOXES} are handled; raise MAX_BOXES"
    if why:
        raise InputError(f"{path}: {why}; repair the file, or pass --skip-broken to go on without it")
    return Scene(name, torch.from_numpy(xyz), torch.from_numpy(boxes), torch.from_numpy(label))


# --------------------------------------------------------------------------------------------------
# A scene -> the points of a step, on the device
# --------------------------------------------------------------------------------------------------

class Batch(NamedTuple):
    xyz: torch.Tensor                       # (B, N, 3)
    low: torch.Tensor                       # (B, 3) bounds of the points
    high: torch.Tensor
    boxes: torch.Tensor                     # (B, MAX_BOXES, 6), padded with unit boxes at 0
    label: torch.Tensor                     # (B, MAX_BOXES)
    real: torch.Tensor                      # (B, MAX_BOXES) bool: is it a box


def make_batch(scenes, points, device, seeds=None, cuboid=True):
    """Scenes -> Batch. seeds: augment, as 3DETR: random cuboid, flips, rotation. No jitter."""
    rows = []
    unit = torch.cat([torch.zeros(3, device=device), torch.ones(3, device=device)])
    for i, scene in enumerate(scenes):
        xyz, boxes, label = (x.to(device) for x in scene[1:])
        # each scene draws from its own stream: the same in one process or in eight, and after --resume
        seed = zlib.crc32(scene.name.encode()) if seeds is None else seeds[i]
        draw = torch.Generator(device).manual_seed(seed)
        pad, real = MAX_BOXES - len(boxes), torch.ones(len(boxes), dtype=torch.bool, device=device)
        if seeds is not None and cuboid:
            inside, real = random_cuboid(xyz, boxes, points, draw)
            order = common.random_rows(inside, points, draw)
        else:
            order = common.shuffled(len(xyz), points, draw)
        xyz = xyz[order]
        if seeds is not None:
            xyz, boxes = turn(xyz, boxes, torch.rand(3, device=device, generator=draw))
        boxes = torch.cat([torch.where(real[:, None], boxes, unit), unit.expand(pad, 6)])
        rows.append((xyz, xyz.amin(0), xyz.amax(0), boxes, F.pad(label.masked_fill(~real, 0), (0, pad)),
                     F.pad(real, (0, pad))))
    return Batch(*(torch.stack(column) for column in zip(*rows)))


def random_cuboid(xyz, boxes, points, draw, tries=100):
    """A random part of the scene with at least 3/4 of `points` and one box, or all of it [3DETR].

    -> which points (n,) and which boxes (k,) are in it. All tries are made at once, so that the host
    need not wait for the outcome of one before the next.
    """
    def rand(*shape):
        return torch.rand(*shape, device=xyz.device, generator=draw)

    share = 0.5 + 0.5 * rand(tries, 3)
    middle = xyz[(rand(tries) * len(xyz)).long()]               # (tries, 3)
    half = (xyz.amax(0) - xyz.amin(0)) * share / 2
    pairs = share[:, [0, 0, 1]] / share[:, [1, 2, 2]]
    shapely = (torch.minimum(pairs, 1 / pairs) >= 0.8).any(1)

    def cut(middle, half):                                      # (t, 3), (t, 3) -> (t, n)
        near = [(x - m[:, None]).abs() <= h[:, None] for x, m, h in zip(xyz.T, middle.T, half.T)]
        return near[0] & near[1] & near[2]

    enough, low, high = [], [], []
    several = max(1, 2 ** 24 // len(xyz))                       # tries at a time: 64 MB for an axis
    for inside in map(cut, middle.split(several), half.split(several)):
        enough.append(inside.sum(1) >= 0.75 * points)
        low.append(torch.stack([x.expand_as(inside).masked_fill(~inside, torch.inf).amin(1) for x in xyz.T], 1))
        high.append(torch.stack([x.expand_as(inside).masked_fill(~inside, -torch.inf).amax(1) for x in xyz.T], 1))
    low, high = torch.cat(low)[:, None], torch.cat(high)[:, None]
    kept = ((boxes[:, :3] >= low) & (boxes[:, :3] <= high)).all(2)                      # (tries, k)
    good = shapely & torch.cat(enough) & kept.any(1)
    first, none = good.int().argmax(0, keepdim=True), ~good.any()                       # the first good one
    return cut(middle[first], half[first])[0] | none, kept[first][0] | none


def turn(xyz, boxes, draw):
    """Flip x, flip y, turn by up to 5 degrees about z; boxes become the bounds of the turned ones."""
    flip = torch.cat([1 - 2 * (draw[:2] < 0.5).float(), draw.new_ones(1)])
    angle = (draw[2] * 10 - 5) * torch.pi / 180
    cos, sin, zero, one = angle.cos(), angle.sin(), angle * 0, angle * 0 + 1
    rotate = torch.stack([cos, -sin, zero, sin, cos, zero, zero, zero, one]).view(3, 3)
    return (xyz * flip) @ rotate.T, torch.cat([
        (boxes[:, :3] * flip) @ rotate.T, boxes[:, 3:] @ rotate.abs().T], 1)


# --------------------------------------------------------------------------------------------------
# Model
# --------------------------------------------------------------------------------------------------

class SetAbstraction(nn.Module):
    """3DETR's tokenizer: points (B, N, 3) -> tokens (B, G, D), centers (B, G, 3).

    The paper says "the same as for classification", but its detector in LAMM has this one. A patch
    is the K nearest points within `radius`, the nearest one repeated where there are fewer; theirs
    takes the first K in file order. Theirs hold 2048 * 64 of 40,000 points, the cloud 3.3 times over;
    with fewer tokens or neighbours, patches are drawn from as much fewer points (their order is
    random), so that they overlap as much and still cover the room.
    """

    def __init__(self, tokens, radius, neighbours, width):
        super().__init__()
        self.tokens, self.radius, self.neighbours = tokens, radius, neighbours
        layers = []
        for a, b in ((3, 64), (64, 128), (128, width)):
            layers += [nn.Linear(a, b, bias=False), BatchNorm(b), nn.ReLU()]
        self.mlp = nn.Sequential(*layers)

    def forward(self, points):
        xyz = points[..., :3].contiguous()                              # (B, N, 3)
        centers = gather(xyz, farthest_point_sample(xyz, self.tokens))  # (B, G, 3)
        fewer = max(self.neighbours, self.tokens * self.neighbours * 40_000 // (2048 * 64))
        source = torch.cat([centers, xyz[:, :fewer]], 1) if fewer < xyz.shape[1] else xyz
        dist2, idx = knn(centers, source, self.neighbours)              # (B, G, K)
        idx = torch.where(dist2 <= self.radius ** 2, idx, idx[..., :1])
        offset = (gather(source, idx) - centers[:, :, None]) / self.radius      # (B, G, K, 3)
        return self.mlp(offset).amax(2), centers                        # (B, G, D), (B, G, 3)


def mlp(width, out, dropout):
    """3DETR's head: two hidden layers with batch norm, one output."""
    layers = []
    for _ in range(2):
        layers += [nn.Linear(width, width, bias=False), BatchNorm(width), nn.ReLU(), Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(width, out))


class DecoderLayer(nn.Module):
    """Queries attend to each other, then to the tokens; norm first, positions added to q and k."""

    def __init__(self, width, dropout, heads=4):
        super().__init__()
        self.own = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
        self.cross = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.ffn = nn.Sequential(nn.Linear(width, width), nn.ReLU(), Dropout(dropout), nn.Linear(width, width))
        self.dropout = Dropout(dropout)

    def forward(self, x, query, memory, position):                      # (B, Q, 256), (B, G, 256)
        y = self.norms[0](x)
        x = x + self.dropout(self.own(y + query, y + query, y, need_weights=False)[0])
        y = self.norms[1](x)
        x = x + self.dropout(self.cross(y + query, memory + position, memory, need_weights=False)[0])
        return x + self.dropout(self.ffn(self.norms[2](x)))


class Output(NamedTuple):
    """What the heads say of each query, for all L layers of the decoder at once."""
    logits: torch.Tensor                    # (L, B, Q, C + 1), the last is "no object"
    center: torch.Tensor                    # (L, B, Q, 3) metres
    size: torch.Tensor                      # (L, B, Q, 3) metres
    center_norm: torch.Tensor               # the same as shares of the scene, 0..1
    size_norm: torch.Tensor
    angle_class: torch.Tensor               # (L, B, Q, 1): ScanNet's boxes do not turn, so these two
    angle: torch.Tensor                     # heads of 3DETR have nothing to say; they are kept for parity


class Detector(nn.Module):
    """EPCL as the encoder of 3DETR: points (B, N, 3), bounds of the scene (B, 3) -> Output."""

    def __init__(self, clip, classes, cfg, width=256):
        super().__init__()
        r = Recipe(**cfg["recipe"])
        self.queries, self.content = r.queries, r.content
        self.encoder = EPCLEncoder(
            clip, SetAbstraction(r.tokens, r.radius, r.neighbours, clip.width), task_tokens=classes + 1,
            dropout=r.dropout, class_token=False, task_token=not cfg["no_task_token"],
            deep_prompt=cfg["deep_prompt"], transformer=not cfg["no_transformer"])
        layers = []
        for a, b in ((clip.width, clip.width), (clip.width, clip.width), (clip.width, width)):
            layers += [nn.Linear(a, b, bias=False), BatchNorm(b), nn.ReLU()]
        self.project = nn.Sequential(*layers)
        self.register_buffer("fourier", torch.randn(3, width // 2))     # fixed, and so must be saved
        self.query = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.decoder = nn.ModuleList(DecoderLayer(width, r.decoder_dropout) for _ in range(r.layers))
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleDict({name: mlp(width, n, r.head_dropout) for name, n in (
            ("logits", classes + 1), ("center", 3), ("size", 3), ("angle_class", 1), ("angle", 1))})
        for part in (self.decoder, self.heads, self.query):             # as 3DETR
            for weight in part.parameters():
                if weight.ndim > 1:
                    nn.init.xavier_uniform_(weight)

    def position(self, xyz, low, high):
        """Fourier features of the place within the scene: (B, Q, 3) -> (B, Q, 256)."""
        share = (xyz - low[:, None]) / (high - low).clamp_min(1e-3)[:, None]
        phase = 2 * torch.pi * share.float() @ self.fourier
        return torch.cat([phase.sin(), phase.cos()], -1)

    def forward(self, points, low, high):
        x, centers = self.encoder(points)                               # (B, G [+ T], 768), (B, G, 3)
        memory = self.project(x[:, :centers.shape[1]])                  # (B, G, 256): task rows dropped
        chosen = farthest_point_sample(centers, self.queries)           # (B, Q)
        place = gather(centers, chosen)                                 # (B, Q, 3)
        query = self.query(self.position(place, low, high))             # (B, Q, 256)
        position = self.position(centers, low, high)                    # (B, G, 256)
        x, layers = gather(memory, chosen) if self.content == "token" else torch.zeros_like(query), []
        for layer in self.decoder:
            x = layer(x, query, memory, position)
            layers.append(self.norm(x))
        x = torch.cat(layers)                                           # (L B, Q, 256): BN sees all layers
        out = {name: head(x).float().view(len(layers), *query.shape[:2], -1) for name, head in self.heads.items()}
        extent = (high - low).clamp_min(0.1)[:, None]                   # (B, 1, 3)
        center = place + out["center"].sigmoid() - 0.5                  # at most half a metre away
        size_norm = out["size"].sigmoid()
        return Output(out["logits"], center, size_norm * extent, (center - low[:, None]) / extent, size_norm,
                      out["angle_class"], out["angle"])


# --------------------------------------------------------------------------------------------------
# Loss
# --------------------------------------------------------------------------------------------------

def iou_terms(a, b):
    """Boxes (..., 6), broadcast against each other -> IoU, generalised IoU (arXiv 1902.09630)."""
    a_low, a_high = a[..., :3] - a[..., 3:] / 2, a[..., :3] + a[..., 3:] / 2
    b_low, b_high = b[..., :3] - b[..., 3:] / 2, b[..., :3] + b[..., 3:] / 2
    inter = (torch.minimum(a_high, b_high) - torch.maximum(a_low, b_low)).clamp_min(0).prod(-1)
    union = (a[..., 3:].prod(-1) + b[..., 3:].prod(-1) - inter).clamp_min(1e-8)
    hull = (torch.maximum(a_high, b_high) - torch.minimum(a_low, b_low)).prod(-1).clamp_min(1e-8)
    return inter / union, inter / union - (1 - union / hull)


@torch.no_grad()
def match(out, batch):
    """Hungarian matching of every layer and scene: -> (L, B, MAX_BOXES) query of each box, 0 for padding.

    One copy of the costs goes to the CPU, one table of indices comes back: the only place of a step where
    the host waits for the device.
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
    chosen, world = match(out, batch), common.world_size()
    L, B, Q, C = out.logits.shape
    real = batch.real.expand(L, B, MAX_BOXES)
    target = torch.full((L, B, Q + 1), C - 1, device=chosen.device)     # no object; the last column is a bin
    target.scatter_(2, chosen.masked_fill(~real, Q), batch.label.expand(L, B, MAX_BOXES))
    target = target[..., :Q]                                            # (L, B, Q)
    weight = torch.ones(C, device=chosen.device)
    weight[-1] = NO_OBJECT
    ce = F.cross_entropy(out.logits.flatten(0, 2), target.flatten(), weight, reduction="none").view(L, -1)
    total = weight[target].view(L, -1).sum(1)

    def of_boxes(x):                                                    # (L, B, Q, c) -> (L, B, K, c)
        return x.gather(2, chosen[..., None].expand(-1, -1, -1, x.shape[-1]))

    count = common.all_reduce(batch.real.sum().float()).clamp_min(1)
    extent = (batch.high - batch.low).clamp_min(0.1)[:, None]
    center = (batch.boxes[..., :3] - batch.low[:, None]) / extent       # (B, K, 3)
    boxes = of_boxes(torch.cat([out.center, out.size], -1))
    terms = {"center": (of_boxes(out.center_norm) - center).abs().sum(-1),
             "size": (of_boxes(out.size_norm) - batch.boxes[..., 3:] / extent).abs().sum(-1),
             "giou": 1 - iou_terms(boxes, batch.boxes)[1],
             "angle": F.huber_loss(of_boxes(out.angle)[..., 0], torch.zeros_like(chosen, dtype=torch.float32),
                                   reduction="none")}
    terms = {name: (x * real).sum() / count for name, x in terms.items()}
    terms["class"] = (ce.sum(1) / common.all_reduce(total)).sum() + 0 * out.angle_class.sum()
    return {name: WEIGHT[name] * x * world for name, x in terms.items()}


# --------------------------------------------------------------------------------------------------
# Metric
# --------------------------------------------------------------------------------------------------

class Detections(NamedTuple):
    boxes: np.ndarray                       # (n, 6)
    scores: np.ndarray                      # (n, C): every box is proposed for every class


def detections_of(center, size, probability, objectness, points, least=5, overlap=0.25, confidence=0.05):
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
    boxes, probability, objectness = (x[keep] for x in (torch.cat([center, size], 1), probability, objectness))
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
    the box it overlaps most, of its class, has IoU above the threshold and was not taken by a better
    scored one. AP is the area under the precision made monotone from the right (VOC, all points).
    """
    classes = max((d.scores.shape[1] for d in detections), default=0)
    result = {t: (np.full(classes, np.nan), np.full(classes, np.nan)) for t in iou_thresholds}
    overlaps = [iou_terms(torch.from_numpy(np.asarray(d.boxes, np.float64))[:, None],
                          torch.from_numpy(np.asarray(boxes, np.float64))[None])[0].numpy()
                for d, (boxes, _) in zip(detections, ground_truth)]             # (n, k) of each scene
    for c in range(classes):
        score, best, taken, first = [], [], [], 0
        for d, (boxes, label), iou in zip(detections, ground_truth, overlaps):
            mine = np.flatnonzero(np.asarray(label) == c)
            score.append(d.scores[:, c])
            best.append(iou[:, mine].max(1) if len(mine) else np.zeros(len(d.boxes)))
            taken.append(first + (iou[:, mine].argmax(1) if len(mine) else np.zeros(len(d.boxes), int)))
            first += len(mine)
        if first == 0:
            continue
        order = np.argsort(-np.concatenate(score), kind="stable")
        best, taken = np.concatenate(best)[order], np.concatenate(taken)[order]
        for t in iou_thresholds:
            hit, right = np.flatnonzero(best > t), np.zeros(len(order), bool)
            right[hit[np.unique(taken[hit], return_index=True)[1]]] = True      # the first to take a box
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
    """-> {threshold: (AP (C,), recall (C,))}, Detections of each scene; processes share the scenes."""
    first, last = common.my_rows(len(scenes))
    found = detect(model, scenes[first:last], setup, recipe)
    if common.world_size() > 1:
        parts = [None] * common.world_size()
        torch.distributed.all_gather_object(parts, found)
        found = sum(parts, [])
    return evaluate_boxes(found, [(s.boxes.numpy(), s.label.numpy()) for s in scenes]), found


def mean_ap(result):
    return {t: float(np.nanmean(ap)) if np.isfinite(ap).any() else 0.0 for t, (ap, _) in result.items()}


def table(result, classes, scenes):
    count = np.bincount(torch.cat([s.label for s in scenes]).numpy(), minlength=len(classes))
    lines = [f"{'class':16s}{'boxes':>6}{'AP@0.25':>9}{'AP@0.50':>9}{'AR@0.25':>9}{'AR@0.50':>9}"]
    (ap, ar), (ap50, ar50) = result[0.25], result[0.5]
    for k, name in enumerate(classes):
        if count[k]:
            lines.append(f"{name:16s}{count[k]:6d}" + "".join(f"{100 * x[k]:9.1f}" for x in (ap, ap50, ar, ar50)))
    return lines + [f"{'mean':16s}{count.sum():6d}" + "".join(
        f"{100 * np.nanmean(x):9.1f}" for x in (ap, ap50, ar, ar50))] if count.sum() else ["no boxes"]


def export(folder, scenes, found, classes, least=0.3):
    """NAME.ply: points in grey, true boxes green, detections with a score of `least` red, as thin beams
    that MeshLab, CloudCompare and Blender show. NAME.json: these detections, as --data folder reads them.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for scene, d in zip(scenes, found):
        best = d.scores.max(1, initial=0)
        shown = np.flatnonzero(best >= least)
        height = scene.xyz[:, 2].numpy()
        grey = 90 + 150 * (height - height.min()) / max(float(np.ptp(height)), 1e-6)
        xyz, rgb, faces = [scene.xyz.numpy()], [np.repeat(grey[:, None], 3, 1)], []
        for boxes, colour in ((scene.boxes.numpy(), (40, 200, 60)), (d.boxes[shown], (230, 40, 40))):
            for b in boxes:
                vertices, triangles = beams(b)
                faces.append(triangles + sum(map(len, xyz)))
                xyz.append(vertices)
                rgb.append(np.tile(colour, (len(vertices), 1)))
        write_ply(folder / f"{scene.name}.ply", np.concatenate(xyz), np.concatenate(rgb),
                   np.concatenate(faces) if faces else np.zeros((0, 3), np.int64))
        (folder / f"{scene.name}.json").write_text(json.dumps([
            {"class": classes[d.scores[i].argmax()], "center": d.boxes[i, :3].tolist(), "size": d.boxes[i, 3:].tolist(),
             "score": float(best[i])} for i in shown], indent=1))


def beams(b, thick=0.015):
    """The twelve edges of a box (6,) as cuboids -> vertices (96, 3), triangles (144, 3)."""
    meshes = []
    for axis in range(3):
        size = np.full(3, thick)
        size[axis] = b[3 + axis] + thick
        for s in ((-1, -1), (-1, 1), (1, -1), (1, 1)):
            at = np.array(b[:3], float)
            at[[a for a in range(3) if a != axis]] += np.array(s) * np.delete(b[3:], axis) / 2
            meshes.append(box(size, at - (0, 0, size[2] / 2)))
    return join(meshes)


# --------------------------------------------------------------------------------------------------
# Train
# --------------------------------------------------------------------------------------------------

def train(model, scenes, test, cfg, run, setup, saved):
    """The loop. -> where it stopped (epochs, steps, seconds, best), was that the end."""
    recipe, device = Recipe(**cfg["recipe"]), setup.device
    wrapped = setup.wrap(model, cfg["compile"])
    # 3DETR decays biases and norms, too
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=recipe.lr,
                                  weight_decay=recipe.decay)
    at = {"epoch": 0, "step": 0, "sums": [0.0] * (len(WEIGHT) + 1), "seconds": 0.0, "best": -1.0, "best_epoch": 0}
    if saved:
        optimizer.load_state_dict(saved["optimizer"])
        at = saved["at"]
    if device.type == "cuda" and sum(s.xyz.nbytes for s in scenes) < torch.cuda.mem_get_info(device)[0] // 3:
        scenes = [Scene(s.name, *(x.to(device) for x in s[1:])) for s in scenes]
    steps = max(1, -(-len(scenes) // recipe.batch_size))

    def save(name, **more):
        run.save(name, {"task": "det", "config": cfg, "frozen": cfg["frozen"], "at": at,
                        "model": model.state_dict(), **more})

    stopper = common.Stopper()
    for epoch in range(at["epoch"], recipe.epochs):
        started, first = time.time(), at["step"]
        model.train()
        common.seed_all(cfg["seed"], epoch)
        order = torch.randperm(len(scenes)).tolist()
        if first:
            common.set_random_state(saved["random"])
        sums = torch.tensor(at["sums"], dtype=torch.float64, device=device) / common.world_size()
        bar = tqdm(range(first, steps), initial=first, total=steps, unit="step", leave=False,
                   desc=f"epoch {epoch + 1}/{recipe.epochs}", disable=common.rank() > 0 or None)
        for step in bar:
            rows = order[step * recipe.batch_size:(step + 1) * recipe.batch_size]
            for group in optimizer.param_groups:
                group["lr"] = common.learning_rate(epoch + step / steps, recipe.lr, recipe.epochs,
                                                   recipe.warmup, FINAL_LR)
            sums += train_step(wrapped, optimizer, scenes, rows, epoch, recipe, cfg, setup)
            if step + 1 < steps and stopper.now(step):
                bar.close()
                at.update(epoch=epoch, step=step + 1, sums=common.all_reduce(sums).tolist(),
                          seconds=at["seconds"] + time.time() - started)
                save("last.pt", optimizer=optimizer.state_dict(), random=common.random_state())
                return at, False

        *terms, n = common.all_reduce(sums).tolist()
        if not np.isfinite(sum(terms)):
            raise InputError(f"the loss is not finite in epoch {epoch + 1} (" + ", ".join(
                f"{name} {x / n:.3g}" for name, x in zip(WEIGHT, terms)) + f"); {run.folder}/last.pt is from the "
                "epoch before; try a lower --lr or --precision fp32")
        now = (epoch + 1) % recipe.every == 0 or epoch + 1 == recipe.epochs
        ap = mean_ap(evaluate(model, test, setup, recipe)[0]) if now else None
        better = now and ap[0.25] >= at["best"]
        if better:
            at.update(best=ap[0.25], best_epoch=epoch + 1)
        seconds, lr = time.time() - started, optimizer.param_groups[0]["lr"]
        at.update(epoch=epoch + 1, step=0, sums=[0.0] * len(sums), seconds=at["seconds"] + seconds)
        if (epoch - (saved["at"]["epoch"] if saved else 0)) % 20 == 0:
            run.print("epoch     loss" + "".join(f"{name:>8}" for name in WEIGHT)
                      + "  mAP@.25  mAP@.50        lr      s  left")
        run.print(f"{epoch + 1:5d} {sum(terms) / n:8.3f}" + "".join(f"{x / n:8.3f}" for x in terms)
                  + ("".join(f"{100 * ap[t]:9.2f}" for t in ap) if now else " " * 18)
                  + f"  {lr:8.2e} {seconds:6.1f} {seconds * (recipe.epochs - epoch - 1) / 60:4.0f} m"
                  + (" *" if better else ""))
        run.metrics({"epoch": epoch + 1, **{f"loss_{name}": x / n for name, x in zip(WEIGHT, terms)},
                     **({"map25": ap[0.25], "map50": ap[0.5]} if now else {}), "lr": lr, "seconds": seconds})
        if better:
            save("best.pt")
        save("last.pt", optimizer=optimizer.state_dict())
        if epoch + 1 < recipe.epochs and stopper.now(0):
            return at, False
    return at, True


def train_step(model, optimizer, scenes, rows, epoch, recipe, cfg, setup):
    """One step on the scenes `rows`. -> the weighted loss terms and 1, summed over accumulation."""
    sums = torch.zeros(len(WEIGHT) + 1, dtype=torch.float64, device=setup.device)
    optimizer.zero_grad(set_to_none=True)
    for part in range(cfg["accumulate"]):
        first, last = common.my_rows(len(rows), part, cfg["accumulate"])
        if first == last and common.world_size() == 1:
            continue
        mine = rows[first:last] or rows[:1]     # every process takes part: gradients are shared
        seeds = [int(np.random.SeedSequence([cfg["seed"], epoch, i]).generate_state(1)[0]) for i in mine]
        batch = make_batch([scenes[i] for i in mine], recipe.points, setup.device, seeds, recipe.cuboid)
        with setup.autocast():
            out = model(batch.xyz, batch.low, batch.high)
        terms = losses(out, batch)
        share = len(mine) * common.world_size() / len(rows) if cfg["accumulate"] > 1 else 1
        (sum(terms.values()) * share).backward()
        sums[:-1] += torch.stack([terms[name] for name in WEIGHT]).detach() * share / common.world_size()
    sums[-1] = 1 / common.world_size()
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
    scenes, test, classes, form = load_scenes(cfg)
    if not scenes or not test:
        raise InputError(f"{form}: {len(scenes)} scenes to train and {len(test)} to test; both are needed")
    if saved and list(classes) != cfg["classes"]:
        raise InputError(f"{form}: has other classes than the run: {' '.join(classes)[:200]}")
    cfg["classes"] = list(classes)
    clip, model = build(cfg, saved, setup)
    recipe = Recipe(**cfg["recipe"])
    run = common.Run(None if args.eval else folder or common.new_folder(args.out, "det", cfg["data"]))
    if not args.eval:
        run.start(cfg, __file__, saved and saved["at"]["epoch"])
    trained, frozen = common.sizes(model)
    short = sum(len(s.xyz) < recipe.points for s in scenes + test)
    run.print(f"device   {setup.describe}; torch {torch.__version__}; seed {cfg['seed']}")
    run.print(f"data     {cfg['data']}: {len(scenes):,} train, {len(test):,} test scenes, {len(classes)} classes, "
              f"{recipe.points:,} points; {form}" + (f"; {short} scenes have fewer points and repeat some" if short else ""))
    run.print(f"model    {trained:,} weights trained, {frozen:,} frozen; {recipe.tokens} tokens, {recipe.queries} "
              f"queries, {recipe.layers} layers; transformer " + ("left out" if cfg["no_transformer"] else
              f"{clip.name}, {'trained, too' if clip.trainable else 'frozen'}"))
    if clip.name.endswith("random") and not cfg["no_transformer"]:
        run.print("warning  the transformer has RANDOM weights: these numbers say nothing about CLIP")
    at = saved["at"] if saved else None
    if not args.eval:
        run.print(f"run      {run.folder}" + (f", resumed after {at['epoch']} epochs and {at['step']} steps" if saved else ""))
        at, complete = train(model, scenes, test, cfg, run, setup, saved)
        if not complete:
            run.print(f"stopped after {at['epoch']} epochs and {at['step']} steps; go on with: "
                      f"python train_det.py --resume {run.folder}")
            sys.exit(130)
    result, found = evaluate(model, test, setup, recipe)
    for line in table(result, classes, test):
        run.print(line)
    ap = mean_ap(result)
    seen = mean_ap(evaluate(model, scenes[:len(test)], setup, recipe)[0])
    run.print(f"result   mAP@0.25 {100 * ap[0.25]:.2f} %, mAP@0.50 {100 * ap[0.5]:.2f} %, epoch {at['epoch']} (best on test: "
              f"{100 * at['best']:.2f} in epoch {at['best_epoch']}; on {len(scenes[:len(test)])} training scenes "
              f"{100 * seen[0.25]:.2f} and {100 * seen[0.5]:.2f}); {cfg['data']}, {clip.name}, {at['seconds']:.0f} s")
    if args.export and common.rank() == 0:
        export(args.export, test, found, classes)
        run.print(f"export   {len(test)} scenes in {args.export}: true boxes green, detections red")
    if not args.eval:
        run.write_json("results.json", {
            "task": "det", "data": cfg["data"], "clip": cfg["frozen"], "seed": cfg["seed"],
            "metrics": {"map25": ap[0.25], "map50": ap[0.5]}, "train_metrics": {"map25": seen[0.25], "map50": seen[0.5]},
            "seconds": at["seconds"], "parameters": {"trainable": trained, "frozen": frozen}, "epoch": at["epoch"],
            "best_on_test": {"map25": at["best"], "epoch": at["best_epoch"]}, "device": setup.describe, "form": form})


def build(cfg, saved, setup):
    """-> FrozenCLIP, model on the device."""
    clip = common.load_clip(cfg["clip"], cfg["seed"], trainable=cfg["unfreeze"])
    clip.text = None
    cfg["frozen"] = {"name": clip.name, "sha256": clip.sha256}
    if saved:
        common.check_frozen(saved, clip)
    common.seed_all(cfg["seed"])
    model = Detector(clip, len(cfg["classes"]), cfg)
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
    flag("--points", type=common.whole(1), metavar="N", help="points of a scene")
    flag("--tokens", type=common.whole(1), metavar="G", help="patches of a scene (256, 512, 1024, 2048)")
    flag("--queries", type=common.whole(1), metavar="Q", help="boxes proposed, at most --tokens")
    flag("--like", choices=RECIPES, help="take another row of the table: `synthetic` suits few scenes and no GPU")
    flag("--export", metavar="DIR", help="write each test scene with its boxes as .ply, detections as .json")
    flag("--skip-broken", action="store_true", help="leave out scenes that cannot be read, and say so")
    return parser.parse_args(argv)


def settings(args):
    """Flags over a recipe or a saved run -> config, checkpoint or None, run folder or None."""
    if args.resume or args.eval:
        cfg, saved, folder = common.saved_settings(args, "det")
        if args.resume:
            common.check_resume(args.resume, saved)
        return {**cfg, "skip_broken": args.skip_broken}, saved, folder
    given = {k: v for k, v in vars(args).items() if v is not None}
    data = given.get("data", "synthetic")
    recipe = RECIPES[args.like or data]
    if args.tokens:                         # fewer tokens, wider patches: the same share of the room
        recipe = recipe._replace(radius=round(recipe.radius * (recipe.tokens / args.tokens) ** 0.5, 4),
                                 queries=min(recipe.queries, args.tokens))
    recipe = recipe._replace(**{k: given[k] for k in Recipe._fields if k in given})
    recipe = recipe._replace(warmup=min(recipe.warmup, recipe.epochs / 10))
    if not recipe.queries <= recipe.tokens <= recipe.points:
        raise InputError(f"--queries {recipe.queries} must be at most --tokens {recipe.tokens}, and that at most "
                         f"--points {recipe.points}")
    if recipe.queries < MAX_BOXES:
        raise InputError(f"--queries {recipe.queries}: a scene may have {MAX_BOXES} boxes; give at least that many")
    cfg = {
        "data": data, "root": args.root, "like": args.like, "recipe": recipe._asdict(), "seed": args.seed or 0,
        "clip": args.clip or ("timm:vit_tiny_patch16_224=random" if data == "synthetic" else "openai"),
        "skip_broken": args.skip_broken, "precision": args.precision or "auto", "compile": args.compile,
        "accumulate": args.accumulate or 1, "workers": args.workers or os.cpu_count(),
        **{k: getattr(args, k) for k in common.ABLATIONS}}
    common.check_settings(cfg)
    return cfg, None, None


if __name__ == "__main__":
    common.main_guard(main)
