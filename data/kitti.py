"""Lidar scans: SemanticKITTI as published, and anybody's in the same form, read one at a time.

    test = pairs("dataset", VAL)                            # [(NAME.bin, NAME.label), ...]
    scan = read_scan(*test[0], published_classes())         # points, remission, labels

A scan is float32 rows x, y, z, remission, in metres, the sensor at 0; its labels are uint32, the
class in the low 16 bits, the number of the object in the high ones. All 23,201 labelled scans are
far larger than a memory, so only the sizes of files are looked at beforehand.
"""
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.files import (BrokenFile, beside, broken, files_in, guarding, own_clouds, passed_over,
                        say)
from run import InputError, writing

# name, the number that stands for it in a file of labels, others that count as the same; the rest
# of the published map (outlier, other structure, other object: 1, 52, 99) counts as unlabelled, 0
SEMANTIC_KITTI = (
    ("car", 10, 252), ("bicycle", 11), ("motorcycle", 15), ("truck", 18, 258),
    ("other-vehicle", 20, 13, 16, 256, 257, 259), ("person", 30, 254), ("bicyclist", 31, 253),
    ("motorcyclist", 32, 255), ("road", 40, 60), ("parking", 44), ("sidewalk", 48),
    ("other-ground", 49), ("building", 50), ("fence", 51), ("vegetation", 70), ("trunk", 71),
    ("terrain", 72), ("pole", 80), ("traffic-sign", 81))
UNLABELLED = (0, 1, 52, 99)
CLASSES = tuple(name for name, *_ in SEMANTIC_KITTI)
THINGS = CLASSES[:8]                        # what moves; the rest is where it stands
TRAIN, VAL, TEST = (0, 1, 2, 3, 4, 5, 6, 7, 9, 10), (8,), tuple(range(11, 22))
IGNORE, UNKNOWN = -1, -2                    # no class; not a label at all
REACH = 1000.0                              # metres: no lidar sees so far
GET_KITTI = ("fetch the velodyne scans and labels linked from semantic-kitti.org and pass --root "
             "FOLDER with FOLDER/sequences/00/{velodyne/000000.bin,labels/000000.label}, ...")
GET_OWN = ("pass --root FOLDER with FOLDER/classes.txt, a name in each line, and FOLDER/"
           "{train,test}/NAME.bin, float32 x y z remission, and NAME.label, uint32: the line's "
           "number from 1, or 0")


class Scan(NamedTuple):
    name: str                               # its file
    xyz: np.ndarray                         # (n, 3) float32, metres, z up, the sensor at 0
    remission: np.ndarray                   # (n,) float32, 0..1
    label: np.ndarray                       # (n,) int64, IGNORE: no class


# ---- Labels --------------------------------------------------------------------------------------
def published_classes():
    """SemanticKITTI's numbers -> number in CLASSES, for all 16 bits: (65536,), IGNORE, UNKNOWN."""
    table = np.full(2 ** 16, UNKNOWN)
    table[list(UNLABELLED)] = IGNORE
    for k, (_, *numbers) in enumerate(SEMANTIC_KITTI):
        table[numbers] = k
    return table


def own_classes(names):
    """The same for anybody's scans: line of classes.txt from 1, 0 for none."""
    table = np.full(2 ** 16, UNKNOWN)
    table[:len(names) + 1] = np.arange(-1, len(names))
    return table


def numbers_of(names):
    """The way back, SemanticKITTI's inverse map: (len(names),) uint32."""
    number = {name: number for name, number, *_ in SEMANTIC_KITTI}
    return np.array([number[name] for name in names], np.uint32)


# ---- Which files ---------------------------------------------------------------------------------
def pairs(root, sequences, labels=True):
    """[(NAME.bin, NAME.label or None), ...] of these sequences, in order. Sizes are checked."""
    found = []
    for number in sequences:
        folder = sequence_folder(root, number)
        files, others = files_in(folder / "velodyne", (".bin",))
        if not files:
            raise InputError(f"{folder}/velodyne: no scans; {GET_KITTI}")
        if labels:                          # without its scan a label would be left out in silence
            names = {path.stem for path in files}
            others += [path for path in files_in(folder / "labels", (".label",))[0]
                       if path.stem not in names]
        say([passed_over(folder, others)])
        for path in files:
            label = folder / "labels" / f"{path.stem}.label" if labels else None
            check_bytes(path, label)
            found.append((path, label))
    return found


def sequence_folder(root, number):
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"--root {root}: no such folder; {GET_KITTI}")
    places = [root / place / f"{number:02d}" for place in ("sequences", "dataset/sequences")]
    for folder in places:
        if folder.is_dir():
            return folder
    raise InputError(f"{places[0]}: no such folder, and the run needs sequence {number:02d}; "
                     f"{GET_KITTI}")


def own_scans(root, training=True):
    """Anybody's scans -> pairs to train (training=False: may be none), to test, class names."""
    *parts, names = own_clouds(Path(root), ("train", "test"), GET_OWN, (".bin",), ".label",
                               training)
    if not names:
        raise InputError(f"{root}/classes.txt: missing; {GET_OWN}")
    found = [[(path, beside(path, ".label")) for path in part] for part in parts]
    for path, label in (pair for part in found for pair in part):
        check_bytes(path, label)
    return *found, names


def check_bytes(path, label=None):
    """BrokenFile where the sizes of a scan and of its labels cannot be right."""
    size = os.stat(path).st_size
    if size == 0 or size % 16:
        raise BrokenFile(f"{path}: {size:,} bytes; a scan has 16 for each point, and at least one "
                         "point; fetch it again or take it out of the data")
    if label is None:
        return
    if not label.is_file():
        raise BrokenFile(f"{label}: missing; every scan to train or test on needs its labels")
    found = os.stat(label).st_size
    if found != size // 4:
        raise BrokenFile(f"{label}: {found:,} bytes for {size // 16:,} points, which take 4 each; "
                         "fetch both again, one of them is cut short or of another scan")


# ---- One scan ------------------------------------------------------------------------------------
def read_scan(path, label=None, table=None, full=1.0):
    """NAME.bin, NAME.label or None -> Scan. table: classes of its numbers; full: the highest
    remission."""
    path = Path(path)
    check_bytes(path, label)
    with guarding(path):
        rows = np.fromfile(path, "<f4").reshape(-1, 4)
        bad = ~np.isfinite(rows).all(1)
        if bad.any():
            raise ValueError(f"NaN or infinite numbers in {bad.sum():,} of {len(rows):,} points")
        far = np.abs(rows[:, :3]).max()
        if far > REACH:
            raise broken(path, f"has a point {far:,.0f} m from the sensor",
                         "coordinates are metres; repair it")
        low, high = rows[:, 3].min() / full, rows[:, 3].max() / full
        if low < 0 or high > 1:
            raise broken(path, f"remission from {low * full:.4g} to {high * full:.4g}, expected 0 "
                         f"to {full:g}", "pass --remission R, the highest of your sensor, e.g. 255")
    classes = np.full(len(rows), IGNORE)
    if label is not None:
        with guarding(label):
            number = np.fromfile(label, "<u4") & 0xFFFF             # the object's is above
            classes = table[number]
            if (classes == UNKNOWN).any():
                raise ValueError(f"has the label {number[classes == UNKNOWN][0]}, which is not in "
                                 f"the map: {known(table)}")
    return Scan(str(path), rows[:, :3].copy(), rows[:, 3] / np.float32(full), classes)


def known(table):
    """The labels of a table in words: 0..5, or a list."""
    numbers = np.flatnonzero(table != UNKNOWN)
    if len(numbers) == numbers[-1] + 1:
        return f"0 to {numbers[-1]}"
    return ", ".join(map(str, numbers))


def write_labels(path, predicted, numbers):
    """Class of each point (n,) -> NAME.label in the benchmark's form. numbers: of each class."""
    path = Path(path)
    with writing(path, "make room or give another folder"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(np.asarray(numbers, "<u4")[predicted].tobytes())   # tofile hides errors
