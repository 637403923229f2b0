"""Files -> scenes: ScanNet V2 and S3DIS as published or prepared, PLY, NumPy.

train_det.py and train_seg.py read with these. ScanNet's scans are prepared once, as VoteNet does it
(github.com/facebookresearch/votenet, scannet/): four .npy files for each scan, which both tasks
read. S3DIS's rooms become one .npy each, as PointNet did it: x y z r g b label. To add a data set,
write a function like `scannet_scenes` beside it.
"""
import csv
import io
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
from synthetic import ROOM_CLASSES

SCANNET_BOXES = {
    "cabinet": 3, "bed": 4, "chair": 5, "sofa": 6, "table": 7, "door": 8, "window": 9, "bookshelf": 10,
    "picture": 11, "counter": 12, "desk": 14, "curtain": 16, "refrigerator": 24, "shower curtain": 28,
    "toilet": 33, "sink": 34, "bathtub": 36, "garbage bin": 39}         # the 18 classes -> nyu40
SCANNET_POINTS = {name: nyu for name, nyu in {"wall": 1, "floor": 2, **SCANNET_BOXES}.items() if nyu < 39}
SCANNET_POINTS["other furniture"] = 39                                 # the 20 classes of the benchmark
PLAIN = b"0123456789.+-eE \t\r\n"                                      # what a line of numbers is made of
GET_S3DIS = ("ask for Stanford3dDataset_v1.2_Aligned_Version at buildingparser.stanford.edu/dataset.html and pass "
             "--root FOLDER with FOLDER/Area_1/ROOM/Annotations/*.txt, or a folder of prepared Area_1_ROOM.npy")
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
    return read_all([[(prepared, name) for name in part] for part in names], read, cfg, form)


def read_all(parts, read, cfg, form):
    """[[arguments of read, ...], ...] -> [[scene, ...], ...], form and what --skip-broken left out."""
    scenes, broken = [[] for _ in parts], []
    for part, calls in zip(scenes, parts):
        for call in tqdm(calls, desc="reading", unit="scene", disable=None, leave=False):
            try:
                part.append(read(*call))
            except InputError as error:
                if not cfg["skip_broken"]:
                    raise
                broken.append(f"LEFT OUT {error}")
    return scenes, "; ".join([form, *broken])


def in_parallel(work, jobs, cfg):
    """work(*job) -> lines to be printed, for every job, in processes; the first of ours does it."""
    if common.rank() == 0 and jobs:
        workers = min(cfg["workers"], len(jobs))
        with ProcessPoolExecutor(workers, get_context("spawn")) if workers > 1 else nullcontext() as pool:
            for lines in tqdm((pool.map if pool else map)(work, *zip(*jobs)), total=len(jobs),
                              desc="preparing", unit="scene", disable=None, leave=False):
                for line in lines:
                    print(line, file=sys.stderr)
    if common.world_size() > 1:
        torch.distributed.barrier()


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
    in_parallel(prepare_scan, [(root / "scans" / n, out, nyu40, cfg["skip_broken"]) for n in todo], cfg)
    return out


def prepare_scan(folder, out, nyu40, skip):
    """One raw scan -> four .npy files. -> why it was left out, if it was."""
    try:
        content = read_raw(folder, nyu40)
    except InputError as error:
        if skip:
            return [f"LEFT OUT {error}"]
        raise
    for name, array in content.items():
        with open(out / f"{folder.name}_{name}.tmp", "wb") as file:
            np.save(file, array)
    for name in content:                                        # vert comes last
        (out / f"{folder.name}_{name}.tmp").replace(out / f"{folder.name}_{name}.npy")
    return []


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
        vert = columns(read_ply(path.read_bytes()), "x", "y", "z", "red", "green", "blue")      # (N, 6)
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


# --- S3DIS

def s3dis_rooms(root, cfg, read):
    """-> [train rooms, test rooms] as read(path) gives them, what was found. cfg["test_area"] tests."""
    places = [root, *(root / name for name in ("Stanford3dDataset_v1.2_Aligned_Version", "trainval_fullarea",
                                               "stanford_indoor3d"))]
    place = next((p for p in places if any(p.glob("Area_[1-6]*"))), None)
    if place is None:
        raise InputError(f"--root {root}: found neither Area_1/ROOM/Annotations/*.txt nor Area_1_ROOM.npy; "
                         f"{GET_S3DIS}")
    if not any(place.glob("Area_*.npy")):
        place = prepare_s3dis(place, cfg)
    paths = sorted(place.glob("Area_[1-6]_*.npy"))
    parts = [[(p,) for p in paths if (p.name[5] == str(cfg["test_area"])) == test] for test in (False, True)]
    return read_all(parts, read, cfg, f"{place}, {len(parts[0])} rooms; area {cfg['test_area']}: {len(parts[1])} "
                                      "test rooms")


def prepare_s3dis(root, cfg):
    """Area_A/ROOM/Annotations/CLASS_N.txt -> ROOT/.nanoepcl-rooms/Area_A_ROOM.npy, in parallel."""
    out = root / ".nanoepcl-rooms"
    out.mkdir(exist_ok=True)
    rooms = [(p.parent, out / f"{p.parts[-3]}_{p.parts[-2]}.npy") for p in sorted(root.glob("Area_[1-6]/*/Annotations"))]
    in_parallel(prepare_room, [(room, path, cfg["skip_broken"]) for room, path in rooms if not path.is_file()], cfg)
    return out


def prepare_room(folder, path, skip):
    """One room's annotations -> (n, 7) float32 x y z r g b label, shifted to 0. -> what was repaired."""
    parts, notes = [], []
    try:
        for file in sorted((folder / "Annotations").glob("*.txt")):
            name = file.stem.split("_")[0]                              # stairs, spelt in two ways, are clutter
            label = ROOM_CLASSES.index(name if name in ROOM_CLASSES else "clutter")
            points, repaired = read_annotation(file)
            parts.append(np.insert(points, 6, label, 1))
            notes += repaired
        if not parts:
            raise InputError(f"{folder}/Annotations: no CLASS_N.txt; unpack the room again, or pass --skip-broken")
    except InputError as error:
        if skip:
            return [f"LEFT OUT {error}"]
        raise
    room = np.concatenate(parts)
    room[:, :3] -= room[:, :3].min(0)
    with open(path.with_suffix(".tmp"), "wb") as file:
        np.save(file, room.astype(np.float32))
    path.with_suffix(".tmp").replace(path)
    return notes


def read_annotation(path):
    """One object's `x y z r g b` lines -> (n, 6) float64, notes on repaired lines.

    The published files hold a few junk bytes. One stands for a blank (`185\\x00187`), or for a digit
    of a fraction (`103.0\\x100000`), which becomes 0. A line that neither makes six numbers of is an error.
    """
    def numbers(line):
        try:
            row = [float(word) for word in line.split()]
        except ValueError:
            return False
        return len(row) == 6 and all(0 <= c <= 255 for c in row[3:])

    try:
        blob, notes = path.read_bytes(), []
        if blob.translate(None, PLAIN):
            lines = blob.split(b"\n")
            for i, line in enumerate(lines):
                junk = line.translate(None, PLAIN)
                if junk:
                    fixed = [line.translate(bytes(c if c in PLAIN else ord(new) for c in range(256))) for new in " 0"]
                    lines[i] = next((f for f in fixed if numbers(f)), None)
                    if lines[i] is None:
                        raise ValueError(f"line {i + 1} is {line[:60]!r}")
                    notes.append(f"repaired {path} line {i + 1}: {line[:60]!r}")
            blob = b"\n".join(lines)
        rows = np.loadtxt(io.BytesIO(blob), ndmin=2) if blob.strip() else np.zeros((0, 6))
        if rows.shape[1] != 6 or not np.isfinite(rows).all():
            raise ValueError(f"{rows.shape[1]} numbers in a line, or NaN")
    except (OSError, ValueError) as error:
        text = getattr(error, "strerror", None) or " ".join(str(error).split())[:120]
        raise InputError(f"{path}: {text}; expected `x y z r g b` in every line; repair it, or pass "
                         "--skip-broken to go on without this room") from None
    return rows, notes


# --- files

def read_ply(blob):
    """Vertices of a binary little-endian PLY -> structured array with one field for each property."""
    end = blob.find(b"end_header\n") + len(b"end_header\n")
    if not blob.startswith(b"ply") or end < len(b"end_header\n"):
        raise ValueError("not a PLY file, or cut short in its header")
    kinds = {"float": "<f4", "float32": "<f4", "double": "<f8", "float64": "<f8", "uchar": "u1", "uint8": "u1",
             "char": "i1", "int8": "i1", "short": "<i2", "int16": "<i2", "ushort": "<u2", "uint16": "<u2",
             "int": "<i4", "int32": "<i4", "uint": "<u4", "uint32": "<u4"}
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
    return np.frombuffer(blob, row, count, end)


def columns(table, *names):
    """Fields of a structured array as the columns (n, len(names)) of a float32 array."""
    return np.stack([table[name].astype(np.float32) for name in names], 1)


def read_npy(path, columns):
    """A .npy of at least `columns` columns; 0: of one dimension."""
    try:
        array = np.load(path, allow_pickle=False)
        if array.ndim != 1 + (columns > 0) or columns and array.shape[1] < columns:
            raise ValueError(f"expected {f'at least {columns} columns' if columns else 'one number a point'}, found "
                             f"shape {array.shape}")
        return array
    except (OSError, ValueError, EOFError) as error:
        text = getattr(error, "strerror", None) or " ".join(str(error).split())[:120]
        raise InputError(f"{path}: {text}; repair it, or pass --skip-broken to go on without this "
                         "scene") from None
