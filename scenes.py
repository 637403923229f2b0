"""Files -> scenes: ScanNet V2 in its two forms, PLY, NumPy. train_det.py and train_seg.py read with these.

ScanNet's scans are prepared once, as VoteNet does it (github.com/facebookresearch/votenet, scannet/):
four .npy files for each scan, which both tasks read. To add a data set, write a function like
`scannet_scenes` beside it.
"""
import csv
import json
import sys
import zlib
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import common
from common import InputError

SCANNET_BOXES = {
    "cabinet": 3, "bed": 4, "chair": 5, "sofa": 6, "table": 7, "door": 8, "window": 9, "bookshelf": 10,
    "picture": 11, "counter": 12, "desk": 14, "curtain": 16, "refrigerator": 24, "shower curtain": 28,
    "toilet": 33, "sink": 34, "bathtub": 36, "garbage bin": 39}         # the 18 classes -> nyu40
GET_SCANNET = ("ask for ScanNet V2 at github.com/ScanNet/ScanNet and pass --root FOLDER with FOLDER/scans/ and "
               "FOLDER/scannetv2-labels.combined.tsv, or a folder prepared for VoteNet (*_vert.npy, *_bbox.npy, ...)")


def scannet_scenes(root, cfg, read):
    """-> [train scenes, test scenes] as read(folder, name) gives them, what was found.

    root holds scans/ as published, or VoteNet's files. Where no scan of the official validation list
    is at hand, every fifth room of the others is set aside; scene0000_00 and scene0000_01 are two
    scans of one room and stay together.
    """
    prepared = next((p for p in (root, root / "scannet_train_detection_data") if any(p.glob("*_vert.npy"))), None)
    split = [(Path(__file__).parent / f"splits/scannetv2_{part}.txt").read_text().split() for part in ("train", "val")]
    if prepared is None:
        if not (root / "scans").is_dir():
            raise InputError(f"--root {root}: found neither scans/ nor *_vert.npy; {GET_SCANNET}")
        prepared = prepare_scannet(root, split[0] + split[1], cfg)
    found = {p.name.removesuffix("_vert.npy") for p in prepared.glob("*_vert.npy")}
    names = [[name for name in part if name in found] for part in split]
    form = f"{prepared}, {len(names[0])} of 1,201 train and {len(names[1])} of 312 val scenes"
    rooms = sorted({name[:9] for name in names[0]})
    if not names[1] and len(rooms) > 1:
        names = [[n for n in names[0] if (n[:9] in rooms[::5]) == test] for test in (False, True)]
        form += f"; NOT the official split: every fifth room ({len(names[1])} scenes) is the test set"
    scenes, broken = [[], []], []
    for part, part_names in zip(scenes, names):
        for name in tqdm(part_names, desc="reading", unit="scene", disable=None, leave=False):
            try:
                part.append(read(prepared, name))
            except InputError as error:
                if not cfg["skip_broken"]:
                    raise
                broken.append(f"{error}")
    return scenes, "; ".join([form, *(f"LEFT OUT {b}" for b in broken)])


def prepare_scannet(root, names, cfg):
    """Raw scans -> ROOT/.nanoepcl-votenet/: VoteNet's four files for each scene, in parallel.

    Each scene is written under temporary names and its _vert.npy comes last, so that an interrupted
    run goes on where it stopped.
    """
    out, table = root / ".nanoepcl-votenet", root / "scannetv2-labels.combined.tsv"
    if not table.is_file():
        raise InputError(f"{table}: missing; it comes with ScanNet's task data")
    try:
        with open(table, newline="") as file:
            nyu40 = {row["raw_category"]: int(row["nyu40id"]) for row in csv.DictReader(file, delimiter="\t")}
    except (KeyError, ValueError) as error:
        raise InputError(f"{table}: not ScanNet's label table ({error}); fetch it again") from None
    out.mkdir(exist_ok=True)
    todo = [n for n in names if (root / "scans" / n).is_dir() and not (out / f"{n}_vert.npy").is_file()]
    if common.rank() == 0 and todo:
        jobs = [(root / "scans" / n, out, nyu40, cfg["skip_broken"]) for n in todo]
        workers = min(cfg["workers"], len(jobs))
        with ProcessPoolExecutor(workers, get_context("spawn")) if workers > 1 else nullcontext() as pool:
            for line in tqdm((pool.map if pool else map)(prepare_scan, *zip(*jobs)), total=len(jobs),
                             desc="preparing", unit="scene", disable=None, leave=False):
                if line:
                    print(f"LEFT OUT {line}", file=sys.stderr)
    if common.world_size() > 1:
        torch.distributed.barrier()
    return out


def prepare_scan(folder, out, nyu40, skip):
    """One raw scan -> four .npy files. -> None, or why it was left out."""
    try:
        content = read_raw(folder, nyu40)
    except InputError as error:
        if skip:
            return str(error)
        raise
    for name, array in content.items():
        with open(out / f"{folder.name}_{name}.tmp", "wb") as file:
            np.save(file, array)
    for name in content:                                        # vert comes last
        (out / f"{folder.name}_{name}.tmp").replace(out / f"{folder.name}_{name}.npy")


def read_raw(folder, nyu40, most=50_000):
    """scans/sceneXXXX_XX -> {bbox (k, 7), ins_label, sem_label, vert (n, 6)}: VoteNet's preparation.

    Boxes come from all vertices of the mesh, before 50,000 are drawn. Later objects overwrite earlier
    ones where they share segments, in the order of the file.
    """
    name = folder.name
    try:
        path = folder / f"{name}.txt"
        lines = dict(line.split("=", 1) for line in path.read_text().splitlines() if "=" in line)
        lines = {key.strip(): value for key, value in lines.items()}
        align = np.array(lines["axisAlignment"].split(), np.float64).reshape(4, 4)
        path = folder / f"{name}_vh_clean_2.ply"
        vert = read_ply(path.read_bytes())                      # (N, 6)
        path = folder / f"{name}_vh_clean_2.0.010000.segs.json"
        segment = np.array(json.loads(path.read_text())["segIndices"], np.int64)
        path = folder / f"{name}_vh_clean.aggregation.json"
        if not path.is_file():
            path = folder / f"{name}.aggregation.json"
        groups = json.loads(path.read_text())["segGroups"]
        if len(segment) != len(vert):
            raise ValueError(f"{len(segment)} segment ids for {len(vert)} vertices")
        xyz1 = np.concatenate([vert[:, :3], np.ones((len(vert), 1))], 1)
        vert = np.concatenate([(xyz1 @ align.T)[:, :3], vert[:, 3:]], 1).astype(np.float32)
        semantic, instance = np.zeros((2, len(vert)), np.int64)
        label = {}
        for group in groups:
            if group["label"] not in nyu40:
                raise ValueError(f"its label {group['label']!r} is not in scannetv2-labels.combined.tsv")
            mine = np.isin(segment, group["segments"])
            label[group["objectId"]] = semantic[mine] = nyu40[group["label"]]
            instance[mine] = group["objectId"] + 1
        boxes = []
        for i in sorted(label):
            mine = vert[instance == i + 1, :3]
            if label[i] in SCANNET_BOXES.values() and len(mine):
                low, high = mine.min(0), mine.max(0)
                boxes.append([*(low + high) / 2, *(high - low), label[i]])
    except (OSError, KeyError, ValueError, TypeError) as error:
        text = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())[:120]
        raise InputError(f"{path}: {text or 'not as ScanNet publishes it'}; fetch it again, or pass "
                         "--skip-broken to go on without this scene") from None
    keep = np.random.default_rng(zlib.crc32(name.encode())).permutation(len(vert))[:most]
    return {"bbox": np.array(boxes, np.float64).reshape(-1, 7), "ins_label": instance[keep],
            "sem_label": semantic[keep], "vert": vert[keep]}


def read_ply(blob):
    """Vertices of a binary little-endian PLY -> (N, 6) float32 x y z red green blue; no colour: zeros."""
    end = blob.find(b"end_header\n") + len(b"end_header\n")
    if not blob.startswith(b"ply") or end < len(b"end_header\n"):
        raise ValueError("not a PLY file, or cut short in its header")
    kinds = {"float": "<f4", "float32": "<f4", "double": "<f8", "uchar": "u1", "uint8": "u1", "char": "i1", "short": "<i2",
             "ushort": "<u2", "int": "<i4", "int32": "<i4", "uint": "<u4"}
    row, count, element = [], 0, None
    for line in blob[:end].decode("ascii", "replace").splitlines():
        words = line.split()
        if words[0] == "format" and words[1] != "binary_little_endian":
            raise ValueError(f"a {words[1]} PLY; save it as binary_little_endian")
        if words[0] == "element":
            if element is None and words[1] != "vertex":
                raise ValueError("its first element is not `vertex`")
            element = words[1]
            count = int(words[2]) if element == "vertex" else count
        elif words[0] == "property" and element == "vertex":
            row.append((words[2], kinds[words[1]]))
    if len(blob) < end + count * np.dtype(row).itemsize:
        raise ValueError(f"cut short: the header promises {count:,} vertices")
    table = np.frombuffer(blob, row, count, end)
    return np.stack([table[c].astype(np.float32) if c in table.dtype.names else np.zeros(count, np.float32)
                     for c in ("x", "y", "z", "red", "green", "blue")], 1)


def read_npy(path, columns):
    try:
        array = np.load(path, allow_pickle=False)
        if array.ndim != 2 or array.shape[1] < columns:
            raise ValueError(f"expected at least {columns} columns, found shape {array.shape}")
        return array
    except (OSError, ValueError, EOFError) as error:
        text = getattr(error, "strerror", None) or " ".join(str(error).split())[:120]
        raise InputError(f"{path}: {text}; repair it, or pass --skip-broken to go on without this "
                         "scene") from None
