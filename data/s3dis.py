"""S3DIS, as published or prepared -> one prepared file for each room.

    train, test, form = rooms("S3DIS", test_area=5)         # paths of Area_A_ROOM.npz
    cloud = read_cloud(train[0], classes=13)                # of data/files.py
    train, test, classes, form = own_rooms("forest")        # the same layout, other classes

The published form is a text file for each object; others pass around one .npy for each room, as
PointNet prepared it: x y z r g b label.
"""
import io
import re
from collections import Counter
from pathlib import Path

import numpy as np

from data.files import (as_bytes, broken, checked, files_in, passed_over, read_npy, reading,
                        refuse_copies, say)
from data.prepared import kept_in, prepare_rooms, sources_of
from run import InputError

ROOM_CLASSES = ("ceiling", "floor", "wall", "beam", "column", "window", "door", "table", "chair",
                "sofa", "bookcase", "board", "clutter")
GET_S3DIS = ("ask for Stanford3dDataset_v1.2_Aligned_Version at "
             "buildingparser.stanford.edu/dataset.html and pass --root FOLDER with "
             "FOLDER/Area_1/ROOM/Annotations/*.txt, or a folder of prepared Area_1_ROOM.npy")
STAIRS = ("stairs", "staris")               # S3DIS's own, spelt in two ways; PointNet: clutter
PLAIN = b"0123456789.+-eE \t\r\n"           # what a line of numbers is made of


def rooms(root, test_area=5, workers=1, skip_broken=False):
    """-> paths of the prepared training rooms, of the rooms of `test_area`, what was found.

    A prepared room has xyz from 0 on, its offset, rgb, and label, a number in ROOM_CLASSES. Points
    of other classes become clutter; which, and how many, is said. With skip_broken, rooms that
    cannot be read are left out.
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"--root {root}: no such folder; {GET_S3DIS}")
    for name in (".", "Stanford3dDataset_v1.2_Aligned_Version", "trainval_fullarea",
                 "stanford_indoor3d"):
        place = root / name
        tables = sorted(p for p in place.glob("Area_[1-6]_*") if p.suffix.lower() == ".npy")
        refuse_copies(tables)
        found, notes = {path.stem: (sources_of([path], "prepared"), read_prepared, path)
                        for path in tables}, []
        if not found:
            found, notes, _ = raw_rooms(place, "Area_[1-6]", ROOM_CLASSES)
            more = {path.parts[-3] for path in place.glob("Area_*/*/Annotations")}
            more = sorted(area for area in more if not re.fullmatch("Area_[1-6]", area))
            if found and more:
                notes.append(f"{place}: passed over {', '.join(more)}, which S3DIS does not have")
        if found:
            break
    else:
        raise InputError(f"--root {root}: found neither Area_1/ROOM/Annotations/*.txt nor "
                         f"Area_1_ROOM.npy; {GET_S3DIS}")
    return prepared_rooms(root, "s3dis", found, test_area, workers, skip_broken, place, notes)


def has_own_rooms(root):
    """Whether ROOT has S3DIS's layout, Area_N/ROOM/Annotations/, and no classes.txt."""
    root = Path(root)
    return not (root / "classes.txt").is_file() and any(root.glob("Area_*/*/Annotations"))


def own_rooms(root, test_area=5, workers=1, skip_broken=False):
    """Rooms of other classes in S3DIS's layout, ROOT/Area_N/ROOM/Annotations/CLASS_N.txt.

    -> paths of the prepared training rooms, of the rooms of `test_area`, the classes (the CLASS of
    all files, sorted), what was found. N may be any name. As `rooms` otherwise.
    """
    root = Path(root)
    areas = {path.parts[-3][5:] for path in root.glob("Area_*/*/Annotations")}
    bad = next((area for area in sorted(areas) if "_" in area), None)
    if bad:                                 # a prepared room is called AREA_ROOM
        raise InputError(f"{root}/Area_{bad}: the name of an area has no _; rename it")
    if str(test_area) not in areas:
        raise InputError(f"{root}: has no Area_{test_area} to test on; choose one of "
                         f"{', '.join(sorted(areas)) or 'none'} with --test-area")
    _, _, files = raw_rooms(root, "Area_*", ())
    classes = tuple(sorted({class_of(path) for path in files}))
    found, notes, _ = raw_rooms(root, "Area_*", classes)
    train, test, form = prepared_rooms(root, "own", found, test_area, workers, skip_broken, root,
                                       notes)
    return train, test, classes, form


def raw_rooms(place, areas, classes):
    """-> {AREA_ROOM: what prepare_rooms asks for}, lines on what is passed over, all files."""
    found, notes, all_files = {}, [], []
    for path in sorted(place.glob(f"{areas}/*/Annotations")):
        files, others = files_in(path, (".txt",))
        notes.append(passed_over(path, others))
        found[f"{path.parts[-3]}_{path.parts[-2]}"] = (
            sources_of(files, "published", classes), read_raw, path, files, classes)
        all_files += files
    return found, [note for note in notes if note], all_files


def prepared_rooms(root, kept, found, test_area, workers, skip_broken, place, notes):
    """Prepare what is found -> paths of the training rooms, of the test rooms, what was found."""
    say(notes)
    found = {name: found[name] for name in sorted(found, key=lambda name: f"{name}.npz")}
    paths, left_out = prepare_rooms(root, kept, found, workers, skip_broken, "room")
    area = f"Area_{test_area}_"
    test = [path for path in paths if path.name.startswith(area)]
    train = [path for path in paths if not path.name.startswith(area)]
    form = f"{place}, {len(train)} rooms; area {test_area}: {len(test)} test rooms"
    others = Counter()
    for names, counts in zip(kept_in(paths, "others"), kept_in(paths, "others_points")):
        others.update(dict(zip(names.tolist(), counts.tolist())))
    if others:
        others = ", ".join(f"{name} ({others[name]:,} points)" for name in sorted(others))
        notes = [*notes, f"none of the {len(ROOM_CLASSES)} classes, so clutter: {others}"]
    return train, test, "; ".join([form, *notes, *left_out])


def read_prepared(path):
    """Area_A_ROOM.npy, columns x y z r g b label -> {xyz, rgb, label}, notes."""
    table = read_npy(path, 7)
    found = {"xyz": table[:, :3], "rgb": table[:, 3:6], "label": table[:, 6]}
    with reading(path):
        cloud = checked(found, len(ROOM_CLASSES))
    low = cloud.xyz.min(0)
    return {"xyz": cloud.xyz - low, "rgb": cloud.rgb, "label": cloud.label.astype(np.int8),
            "offset": cloud.offset + low}, []


def class_of(path):
    """CLASS_N.txt -> CLASS."""
    return re.sub(r"_\d+$", "", path.stem)


def read_raw(folder, files, classes=ROOM_CLASSES):
    """Annotations/CLASS_N.txt -> {xyz, rgb, label, offset}, notes. The lowest corner is at 0.

    Files of a class that is not in `classes` become clutter: their names are in `others`, how many
    points each has in `others_points`.
    """
    parts, labels, notes, others = [], [], [], Counter()
    for path in files:
        name = class_of(path)
        points, repaired = read_annotation(path)
        if name not in classes:
            if name not in STAIRS:
                others[name] += len(points)
            name = "clutter"
        parts.append(points)
        labels.append(classes.index(name))
        notes += repaired
    if not sum(map(len, parts)):
        raise broken(folder, "no CLASS_N.txt with points", "unpack the room again")
    room = np.concatenate(parts)
    low = room[:, :3].min(0)
    room[:, :3] -= low
    room = room.astype(np.float32)
    try:
        rgb = as_bytes(room[:, 3:])
    except ValueError as error:
        raise broken(folder, error, "repair the files") from None
    label = np.repeat(np.array(labels, np.int16), [len(points) for points in parts])
    found = {"xyz": room[:, :3], "rgb": rgb, "label": label, "offset": low}
    if others:
        found.update(others=np.array(list(others), str), others_points=np.array([*others.values()]))
        notes += [f"{folder}: {count:,} points of {name}, none of the {len(classes)} classes, "
                  "become clutter" for name, count in others.items()]
    return found, notes


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
