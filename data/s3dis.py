"""S3DIS, as published or prepared -> one prepared file for each room.

    train, test, form = rooms("S3DIS", test_area=5)         # paths of Area_A_ROOM.npz
    cloud = read_cloud(train[0], classes=13)                # of data/files.py

The published form is a text file for each object; others pass around one .npy for each room, as
PointNet prepared it: x y z r g b label.
"""
import io
from pathlib import Path

import numpy as np

from data.files import as_bytes, broken, checked, read_npy
from data.prepared import prepare_rooms, sources_of
from run import InputError

ROOM_CLASSES = ("ceiling", "floor", "wall", "beam", "column", "window", "door", "table", "chair",
                "sofa", "bookcase", "board", "clutter")
GET_S3DIS = ("ask for Stanford3dDataset_v1.2_Aligned_Version at "
             "buildingparser.stanford.edu/dataset.html and pass --root FOLDER with "
             "FOLDER/Area_1/ROOM/Annotations/*.txt, or a folder of prepared Area_1_ROOM.npy")
PLAIN = b"0123456789.+-eE \t\r\n"           # what a line of numbers is made of


def rooms(root, test_area=5, workers=1, skip_broken=False):
    """-> paths of the prepared training rooms, of the rooms of `test_area`, what was found.

    A prepared room has xyz from 0 on, rgb, and label, a number in ROOM_CLASSES. With skip_broken,
    rooms that cannot be read are left out.
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"--root {root}: no such folder; {GET_S3DIS}")
    found = {}
    for name in (".", "Stanford3dDataset_v1.2_Aligned_Version", "trainval_fullarea",
                 "stanford_indoor3d"):
        place = root / name
        for path in place.glob("Area_[1-6]_*.npy"):
            found[path.stem] = (sources_of([path], "prepared"), read_prepared, path)
        if not found:
            for path in place.glob("Area_[1-6]/*/Annotations"):
                files = sorted(path.glob("*.txt"))
                found[f"{path.parts[-3]}_{path.parts[-2]}"] = (
                    sources_of(files, "published"), read_raw, path, files)
        if found:
            break
    else:
        raise InputError(f"--root {root}: found neither Area_1/ROOM/Annotations/*.txt nor "
                         f"Area_1_ROOM.npy; {GET_S3DIS}")
    found = {name: found[name] for name in sorted(found, key=lambda name: f"{name}.npz")}
    paths, left_out = prepare_rooms(root, "s3dis", found, workers, skip_broken, "room")
    train = [path for path in paths if path.name[5] != str(test_area)]
    test = [path for path in paths if path.name[5] == str(test_area)]
    form = f"{place}, {len(train)} rooms; area {test_area}: {len(test)} test rooms"
    return train, test, "; ".join([form, *left_out])


def read_prepared(path):
    """Area_A_ROOM.npy, columns x y z r g b label -> {xyz, rgb, label}, notes."""
    table = read_npy(path, 7)
    found = {"xyz": table[:, :3], "rgb": table[:, 3:6], "label": table[:, 6]}
    try:
        cloud = checked(found, len(ROOM_CLASSES))
    except ValueError as error:
        raise broken(path, error, "repair the file") from None
    label = cloud.label.astype(np.int8)
    return {"xyz": cloud.xyz - cloud.xyz.min(0), "rgb": cloud.rgb, "label": label}, []


def read_raw(folder, files):
    """Annotations/CLASS_N.txt -> {xyz, rgb, label}, notes. The room's lowest corner is at 0."""
    parts, labels, notes = [], [], []
    for path in files:
        name = path.stem.split("_")[0]                  # stairs, spelt in two ways, are clutter
        points, repaired = read_annotation(path)
        parts.append(points)
        labels.append(ROOM_CLASSES.index(name if name in ROOM_CLASSES else "clutter"))
        notes += repaired
    if not sum(map(len, parts)):
        raise broken(folder, "no CLASS_N.txt with points", "unpack the room again")
    room = np.concatenate(parts)
    room[:, :3] -= room[:, :3].min(0)
    room = room.astype(np.float32)
    try:
        rgb = as_bytes(room[:, 3:])
    except ValueError as error:
        raise broken(folder, error, "repair the files") from None
    label = np.repeat(np.array(labels, np.int8), [len(points) for points in parts])
    return {"xyz": room[:, :3], "rgb": rgb, "label": label}, notes


def read_annotation(path):
    """One object's `x y z r g b` lines -> (n, 6) float64, notes on repaired lines.

    The published files hold a few junk bytes. One stands for a blank (`185\\x00187`), or for a
    digit of a fraction (`103.0\\x100000`), which becomes 0. A line that neither makes six numbers
    of is an error.
    """
    notes = []
    try:
        blob = path.read_bytes()
        if blob.translate(None, PLAIN):
            lines = blob.split(b"\n")
            for i, line in enumerate(lines):
                if line.translate(None, PLAIN):
                    lines[i] = repaired(line)
                    if lines[i] is None:
                        raise ValueError(f"line {i + 1} is {line[:60]!r}")
                    notes.append(f"repaired {path} line {i + 1}: {line[:60]!r}")
            blob = b"\n".join(lines)
        rows = np.loadtxt(io.BytesIO(blob), ndmin=2) if blob.strip() else np.zeros((0, 6))
        if rows.shape[1] != 6 or not np.isfinite(rows).all():
            raise ValueError(f"{rows.shape[1]} numbers in a line, or NaN")
    except (OSError, ValueError) as error:
        cure = "expected `x y z r g b` in every line; repair it"
        raise broken(path, error, cure) from None
    return rows, notes


def repaired(line):
    """A line with its junk bytes as blanks, or as zeros, whichever gives x y z r g b; or None."""
    for new in b" 0":
        fixed = line.translate(bytes(c if c in PLAIN else new for c in range(256)))
        try:
            row = [float(word) for word in fixed.split()]
        except ValueError:
            continue
        if len(row) == 6 and all(0 <= c <= 255 for c in row[3:]):
            return fixed
    return None
