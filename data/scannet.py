"""ScanNet V2, as published or as VoteNet prepared it -> one prepared file for each scan.

    train, test, form = scans("ScanNet", workers=8)         # paths of NAME.npz
    cloud = read_cloud(train[0], classes=41)                # of data/files.py; labels are nyu40 ids

A published scan is prepared as VoteNet does it (github.com/facebookresearch/votenet, scannet/):
turned upright, boxes around its instances, 50,000 points. What VoteNet prepared stays as it stands.
"""
import csv
import zlib
from pathlib import Path

import numpy as np

from data.files import (as_bytes, broken, columns, read_json, read_lines, read_npy, read_ply,
                        reading, say)
from data.prepared import kept_in, prepare_rooms, sources_of
from run import InputError

SCANNET_BOXES = {                           # the 18 classes of detection -> nyu40
    "cabinet": 3, "bed": 4, "chair": 5, "sofa": 6, "table": 7, "door": 8, "window": 9,
    "bookshelf": 10, "picture": 11, "counter": 12, "desk": 14, "curtain": 16, "refrigerator": 24,
    "shower curtain": 28, "toilet": 33, "sink": 34, "bathtub": 36, "garbage bin": 39}
SCANNET_POINTS = {                          # the 20 classes of segmentation
    "wall": 1, "floor": 2, **SCANNET_BOXES, "other furniture": 39}
del SCANNET_POINTS["garbage bin"]           # it is among the other furniture there
GET_SCANNET = ("ask for ScanNet V2 at github.com/ScanNet/ScanNet and pass --root FOLDER with "
               "FOLDER/scans/ and FOLDER/scannetv2-labels.combined.tsv, or a folder prepared for "
               "VoteNet (*_vert.npy, *_bbox.npy, ...)")
MOST = 50_000                               # points of a prepared scan


def scans(root, workers=1, skip_broken=False, needs="vert"):
    """-> paths of the prepared training scans, of the test scans, what was found.

    ROOT holds scans/ as published, or VoteNet's files. A prepared scan has xyz, rgb, label (nyu40
    ids, 0: none, -1: no such id), instance, and boxes with their nyu40 id last. Of VoteNet's form,
    what has no file is absent; `needs` (one of VOTENET) must be there. With skip_broken, scans that
    cannot be read are left out.
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"--root {root}: no such folder; {GET_SCANNET}")
    lists = Path(__file__).parent / "splits"
    try:
        split = [(lists / f"scannetv2_{part}.txt").read_text(encoding="utf-8-sig").split()
                 for part in ("train", "val")]
    except OSError:
        raise InputError(f"{lists}: ScanNet's official split is missing; copy data/splits/ from "
                         "nanoEPCL") from None
    places = (root, root / "scannet_train_detection_data")
    place = next((p for p in places if any(p.glob("*_vert.npy"))), root / "scans")
    if not place.is_dir():
        raise InputError(f"--root {root}: found neither scans/ nor *_vert.npy; {GET_SCANNET}")
    found = {}
    if place == root / "scans":
        table = root / "scannetv2-labels.combined.tsv"
        nyu40 = label_table(table)
        for name in split[0] + split[1]:
            if (place / name).is_dir():
                sources = sources_of([*files_of(place / name).values(), table], "published", MOST)
                found[name] = (sources, read_raw, place / name, nyu40)
    else:
        for name in split[0] + split[1]:
            files = [place / f"{name}_{part}.npy" for part in VOTENET]
            needed = files[VOTENET.index(needs)]
            if files[0].is_file() and needed.is_file():
                found[name] = (sources_of(files, "VoteNet"), read_votenet, *files)
            elif files[0].is_file():
                found[name] = (sources_of(files, "VoteNet", needs), refuse, needed)
    ending = "" if place == root / "scans" else "_vert.npy"
    names = sorted(path.name.removesuffix(ending) for path in place.glob(f"scene*{ending}"))
    others = [name for name in names if name not in split[0] + split[1]]
    paths, left_out = prepare_rooms(root, "scannet", found, workers, skip_broken, "scan")
    paths = {path.stem: path for path in paths}
    names = [[name for name in part if name in paths] for part in split]
    form = f"{place}, {len(names[0])} of 1,201 train and {len(names[1])} of 312 val scenes"
    spaces = sorted({name[:9] for name in names[0]})    # scene0000_00 and _01 are scans of one room
    if not names[1] and len(spaces) > 1:
        aside = set(spaces[::5])
        names = [[name for name in names[0] if (name[:9] in aside) == test]
                 for test in (False, True)]
        form += (f"; NOT the official split: every fifth room ({len(names[1])} scenes) is the test "
                 "set")
    train, test = ([paths[name] for name in part] for part in names)
    if others:
        left_out.append(f"passed over {len(others):,} scans of neither list: "
                        f"{', '.join(others[:3])}{', ...' * (len(others) > 3)}")
        say(left_out[-1:])
    unaligned = len(kept_in(train + test, "unaligned"))
    if unaligned:
        left_out.append(f"{unaligned:,} of {len(train + test):,} scans have no axisAlignment and "
                        "stay as they stand")
        say(left_out[-1:])
    return train, test, "; ".join([form, *left_out])


def refuse(path):
    raise broken(path, "is missing", "fetch it again")


# ---- As published --------------------------------------------------------------------------------

def label_table(path):
    """scannetv2-labels.combined.tsv -> {ScanNet's category: nyu40 id}."""
    if not path.is_file():
        raise InputError(f"{path}: missing; it comes with ScanNet's task data")
    with reading(path, "not ScanNet's label table: fetch it again"):
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file, delimiter="\t")
            table = {row["raw_category"]: int(row["nyu40id"]) for row in rows}
        if not table or not 0 <= min(table.values()) <= max(table.values()) <= 40:
            raise ValueError("its nyu40id are not numbers from 0 to 40")
        return table


def files_of(folder):
    """The files of a published scan that are read."""
    name = folder.name
    # NAME_vh_clean.aggregation.json counts the segments of another mesh, NAME_vh_clean.ply
    return {"pose": folder / f"{name}.txt", "mesh": folder / f"{name}_vh_clean_2.ply",
            "segments": folder / f"{name}_vh_clean_2.0.010000.segs.json",
            "objects": folder / f"{name}.aggregation.json"}


def read_raw(folder, nyu40, most=MOST):
    """scans/sceneXXXX_XX -> {xyz, rgb, label, instance, boxes}, notes: VoteNet's preparation.

    Boxes come from all vertices of the mesh, before `most` points are drawn. Later objects
    overwrite earlier ones where they share segments, in the order of the file. A scan without
    axisAlignment (of the test set, or of v1) stays as it stands, and has `unaligned`.
    """
    files, cure = files_of(folder), "fetch it again"
    with reading(files["pose"], cure):
        lines = read_lines(files["pose"])
        lines = dict(line.split("=", 1) for line in lines if "=" in line)
        lines = {key.strip(): value for key, value in lines.items()}
        align = np.eye(4)
        if "axisAlignment" in lines:
            align = np.array(lines["axisAlignment"].split(), np.float64).reshape(4, 4)
        if not np.isfinite(align).all():
            raise ValueError("its axisAlignment has NaN")
    with reading(files["mesh"], cure):
        table, _ = read_ply(files["mesh"].read_bytes(), faces=False)
        vertices = columns(table, "x", "y", "z")
        xyz1 = np.concatenate([vertices, np.ones((len(vertices), 1))], 1)
        xyz = (xyz1 @ align.T)[:, :3].astype(np.float32)
        if not np.isfinite(xyz).all():
            raise ValueError("has NaN coordinates")
        keep = np.random.default_rng(zlib.crc32(folder.name.encode())).permutation(len(xyz))[:most]
        rgb = as_bytes(columns(table, "red", "green", "blue", kind=None)[keep])
    with reading(files["segments"], cure):
        segment = np.array(read_json(files["segments"])["segIndices"], np.int64)
        if len(segment) != len(vertices):
            raise ValueError(f"{len(segment)} segment ids for {len(vertices)} vertices")
    with reading(files["objects"], cure):
        groups = read_json(files["objects"])["segGroups"]
        semantic, instance = np.zeros((2, len(vertices)), np.int64)
        label = {}
        for group in groups:
            if group["label"] not in nyu40:
                raise ValueError(f"its label {group['label']!r} is not in "
                                 "scannetv2-labels.combined.tsv")
            mine = np.isin(segment, group["segments"])
            label[group["objectId"]] = semantic[mine] = nyu40[group["label"]]
            instance[mine] = group["objectId"] + 1
    boxes = []
    for i in sorted(label):
        mine = xyz[instance == i + 1]
        if label[i] in SCANNET_BOXES.values() and len(mine):
            low = mine.min(0)
            high = mine.max(0)
            boxes.append([*(low + high) / 2, *(high - low), label[i]])
    scan = {"xyz": xyz[keep], "rgb": rgb, "label": nyu40_ids(semantic[keep]),
            "instance": instance[keep].astype(np.int32),
            "boxes": np.array(boxes, np.float32).reshape(-1, 7)}
    if "axisAlignment" not in lines:
        scan["unaligned"] = np.array(True)
    return scan, []


def nyu40_ids(label):
    """Labels -> int16, ids that nyu40 does not have become -1."""
    label = np.asarray(label).astype(np.int64)          # of unsigned ones, -1 is no value
    return np.where((label >= 0) & (label <= 40), label, -1).astype(np.int16)


# ---- As VoteNet prepared it ----------------------------------------------------------------------

VOTENET = ("vert", "sem_label", "ins_label", "bbox")


def read_votenet(vert, sem_label, ins_label, bbox):
    """VoteNet's files -> {xyz, rgb, label, instance, boxes}, notes. The first must be there."""
    points = read_npy(vert, 3)
    with reading(vert):
        scan = {"xyz": points[:, :3].astype(np.float32)}
        if len(points) == 0 or not np.isfinite(scan["xyz"]).all():
            raise ValueError("has no points, or NaN coordinates")
        if points.shape[1] >= 6:
            scan["rgb"] = as_bytes(points[:, 3:6])
    for field, path in (("label", sem_label), ("instance", ins_label)):
        if path.is_file():
            scan[field] = read_npy(path, 0)
            if len(scan[field]) != len(points):
                raise broken(path, f"has {len(points)} points, {len(scan[field])} labels",
                             "repair the file")
    if "label" in scan:
        scan["label"] = nyu40_ids(scan["label"])
    if "instance" in scan:
        scan["instance"] = scan["instance"].astype(np.int32)
    if bbox.is_file():
        with reading(bbox):
            scan["boxes"] = read_npy(bbox, 7)[:, :7].astype(np.float32)
            if not np.isfinite(scan["boxes"]).all():
                raise ValueError("has NaN in its boxes")
    return scan, []
