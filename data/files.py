"""Files -> arrays, one reader for each format; points, meshes and boxes -> PLY.

    cloud = read_cloud("room.ply", classes=13)      a room: points, colours, labels
    names, boxes = read_boxes("room.json")

Whatever is wrong with a file is a BrokenFile of one line: `reading` or `guarding` is around every
reader. What makes arrays looks first: at kinds of numbers, and at sizes before it asks for memory.
"""
import io
import json
import math
import pickle
import re
import struct
import sys
import warnings
import zipfile
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from run import InputError, rank

ROOMS = (".ply", ".npy", ".npz")            # of a room, or a scene
PLY_TYPES = {"char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1", "short": "i2", "int16": "i2",
             "ushort": "u2", "uint16": "u2", "int": "i4", "int32": "i4", "uint": "u4",
             "uint32": "u4", "float": "f4", "float32": "f4", "double": "f8", "float64": "f8"}
PLY_ORDERS = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}
A_SCENE = ('a scene is a cloud and a list of {"class": "chair", "center": [x, y, z], '
           '"size": [dx, dy, dz]}')


class BrokenFile(InputError):
    """A file's content cannot be used. One line: the file, what is wrong, what to do."""


def broken(where, error, cure="repair the file or move it out of the data"):
    """The BrokenFile for an exception, or a sentence, about the file `where`."""
    text = getattr(error, "strerror", None) or " ".join(str(error).split())[:150]
    text = {KeyError: f"has no {text}", RecursionError: "is nested too deep",
            UnicodeDecodeError: "is not UTF-8"}.get(type(error), text or type(error).__name__)
    return BrokenFile(f"{where}: {text}; {cure}")


@contextmanager
def guarding(where, cure="repair it"):
    """Whatever a reader makes of the file `where`, in here, is a BrokenFile. For threads, too."""
    try:
        yield
    except InputError:                                  # it knows better what is wrong
        raise
    except Exception as error:
        raise broken(where, error, cure) from None


@contextmanager
def reading(where, cure="repair it"):
    """The same, without numpy's remarks on empty text and overflows. Not for threads: the filters
    of warnings are the process's, and two that put them back may leave all warnings silenced."""
    with guarding(where, cure), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def text_of(blob, errors="strict"):
    """Bytes -> text. Windows puts a mark before UTF-8, and before UTF-16, which it also writes."""
    wide = blob.startswith((b"\xff\xfe", b"\xfe\xff"))
    return blob.decode("utf-16" if wide else "utf-8-sig", errors)


def read_lines(path):
    """The lines of a text file, in UTF-8, or UTF-16 with its mark."""
    with reading(path, "save it as UTF-8"):
        return text_of(Path(path).read_bytes()).splitlines()


def read_json(path):
    return json.loads(text_of(Path(path).read_bytes()))


# ---- PLY, PCD ------------------------------------------------------------------------------------

def read_ply(blob, faces=True):
    """A PLY, text or binary -> (vertices, structured (N,), polygons (F, n) or a list, or None).

    A vertex has a field for each of its numbers. Other elements are passed over; faces=False passes
    over the faces, too. Our own reader: trimesh's stops at binary faces of different lengths and at
    remarks that are not UTF-8, and gives no labels; plyfile's licence (GPL) does not go with ours.
    """
    head = re.match(rb"(?:\xef\xbb\xbf)?ply[ \t\r]*\n(.*?)\r?\nend_header[ \t]*\r?\n", blob,
                    re.DOTALL)
    if head is None:
        raise ValueError("not a PLY file, or cut short in its header")
    order, elements = ply_header(head[1].decode("ascii", "replace"))
    body = blob[head.end():]
    body = np.frombuffer(body, np.uint8) if order else np.array(body.split(), "S")
    found, start = {"vertex": {}, "face": {}}, 0
    for name, count, properties in elements:
        found[name], start = ply_rows(body, start, count, properties, order)
        if name == "face" or name == "vertex" and not faces:
            break
    numbers = {name: x for name, x in found["vertex"].items() if getattr(x, "ndim", 0) == 1}
    if not {"x", "y", "z"} <= set(numbers):
        raise ValueError("has no vertices with x, y and z")
    vertices = np.empty(len(numbers["x"]), [(name, x.dtype) for name, x in numbers.items()])
    for name, column in numbers.items():
        vertices[name] = column
    if len(vertices) == 0:
        raise ValueError("has no points")
    if not faces:
        return vertices, None
    names = {name for name, count, _ in elements if count}
    polygons = found["face"].get("vertex_indices", found["face"].get("vertex_index"))
    if "tristrips" in names or "face" in names and polygons is None:
        raise ValueError("its faces are not lists of vertex_indices; save it again as triangles")
    return vertices, None if polygons is None or len(polygons) == 0 else polygons


def ply_header(text):
    """-> byte order ("" for text), [(element, count, [(name, type, type of a list's length)])]."""
    order, elements = None, []
    for line in text.splitlines():
        words = line.split()
        try:
            if words[0] == "format":
                order = PLY_ORDERS[words[1]]
            elif words[0] == "element":
                elements.append((words[1], int(words[2]), []))
            elif words[:2] == ["property", "list"]:
                elements[-1][2].append((words[4], PLY_TYPES[words[3]], PLY_TYPES[words[2]]))
            elif words[0] == "property":
                elements[-1][2].append((words[2], PLY_TYPES[words[1]], None))
        except (KeyError, IndexError, ValueError):
            what = f"the line {line.strip()[:60]!r}" if words else "a blank line"
            raise ValueError(f"has {what} in its header") from None
    if order is None:
        raise ValueError("has no format in its header")
    return order, elements


def ply_rows(body, start, count, properties, order):
    """`count` rows -> {property: column}, where the rows end.

    A column is (count,), for a list property (count, n), or a list of arrays if lengths differ.
    body: the bytes (uint8) of a binary file, or the words of a text; positions count either.
    """
    def size(kind):
        return np.dtype(kind).itemsize if order else 1

    def numbers(positions, n, kind):                            # (r,) -> (r, n)
        found = body[np.asarray(positions)[:, None] + np.arange(n * size(kind))]
        if order:
            return found.view(order + kind)
        # a text keeps the digits that `property float` would lose
        return found.astype("f8").astype("f8" if kind == "f4" else kind)

    def row(start):             # -> where the numbers of each property begin, how many, the end
        begins, amounts = [], []
        for _, kind, length in properties:
            n = 1
            if length:
                end = start + size(length)
                n = int.from_bytes(raw[start:end], byteorder) if order else int(body[start])
                start = end
            begins.append(start)
            amounts.append(n)
            start += n * size(kind)
        return begins, amounts, start

    if count == 0 or not properties:
        return {name: np.empty(0, kind) for name, kind, _ in properties}, start
    if count > len(body) - start:           # before memory is asked for
        raise ValueError(f"cut short: the header promises {count:,} vertices or faces")
    raw, byteorder = body.tobytes(), {"<": "little", ">": "big"}.get(order)
    try:
        begins, amounts, end = row(start)
        steps = (end - start) * np.arange(count)[:, None]       # if all rows are like the first
        alike = start + steps[-1, 0] + (end - start) <= len(body)
        for begin, n, (_, _, length) in zip(begins, amounts, properties):
            if alike and length:
                alike = (numbers(begin - size(length) + steps[:, 0], 1, length) == n).all()
        if alike:
            begins, amounts = begins + steps, np.tile(amounts, (count, 1))
            start += (end - start) * count
        else:
            begins, amounts = np.empty((2, count, len(properties)), np.int64)
            for i in range(count):
                begins[i], amounts[i], start = row(start)
        if start > len(body):
            raise IndexError
    except IndexError:
        raise ValueError(f"cut short: the header promises {count:,} vertices or faces") from None
    columns = {}
    for (name, kind, length), begin, each in zip(properties, begins.T, amounts.T):
        columns[name] = [None] * count
        for n in np.unique(each):                               # lists of one length together
            mine = np.flatnonzero(each == n)
            values = numbers(begin[mine], n, kind)
            if len(mine) == count:
                columns[name] = values if length else values[:, 0]
                break
            for i, polygon in zip(mine, values):
                columns[name][i] = polygon
    return columns, start


def columns(table, *names, kind=np.float32):
    """Fields of a structured array as columns (n, len(names)). kind None: the type they have."""
    if not set(names) <= set(table.dtype.names):
        raise ValueError(f"its points need {' '.join(names)}, and have "
                         f"{' '.join(table.dtype.names)}")
    return np.stack([table[name].astype(kind or table[name].dtype) for name in names], 1)


def near_origin(xyz):
    """Coordinates (n, 3) -> (less offset, float32; offset (3,) float64, whole numbers).

    Beyond 10 km from the origin float32 steps by more than 1 mm, at UTM's 5,000 km by half a metre.
    Such a cloud is moved to its lowest corner before it becomes float32; others stay as they are.
    """
    offset = np.zeros(3)
    if len(xyz) and np.abs(xyz).max() > 1e4:
        offset = np.floor(xyz.min(0).astype(np.float64))
        xyz = xyz.astype(np.float64) - offset
        if xyz.max() > 1e15:                # float32 holds no squares of them
            raise ValueError("has coordinates too large to be meant")
    return np.ascontiguousarray(xyz, np.float32), offset


def read_pcd(blob):
    """Point Cloud Library's PCD 0.7, ascii, binary or compressed -> (N, 3), without NaN rows."""
    header = {}
    where = 0
    while "DATA" not in header:
        end = blob.index(b"\n", where)      # ValueError where the header is cut short
        word, _, rest = blob[where:end].decode("ascii", "replace").partition(" ")
        header[word] = rest.split()
        where = end + 1
    names = header["FIELDS"]
    count = int(header["POINTS"][0])
    repeats = [int(n) for n in header.get("COUNT", ["1"] * len(names))]
    types = [np.dtype(kind.lower() + size) for kind, size in zip(header["TYPE"], header["SIZE"])]
    column = [names.index(axis) for axis in "xyz"]
    if header["DATA"] == ["ascii"]:
        first = np.cumsum([0, *repeats])
        xyz = np.loadtxt(blob[where:].decode().splitlines(), ndmin=2)[:, first[column]]
    elif header["DATA"] == ["binary"]:      # row after row
        row = np.dtype([(f"f{i}", t, (n,)) for i, (t, n) in enumerate(zip(types, repeats))])
        table = np.frombuffer(blob, row, count, where)
        xyz = np.stack([table[f"f{i}"].reshape(count) for i in column], 1)
    else:                                   # one LZF block, column after column
        packed, size = struct.unpack_from("<II", blob, where)
        data = lzf(blob[where + 8:where + 8 + packed], size)
        first = np.cumsum([0, *(t.itemsize * n * count for t, n in zip(types, repeats))])
        xyz = np.stack([np.frombuffer(data, types[i], count, first[i]) for i in column], 1)
    if len(xyz) != count:
        raise ValueError(f"cut short: the header promises {count:,} points, found {len(xyz):,}")
    return xyz[np.isfinite(xyz).all(1)]     # in a PCD, NaN means that the sensor saw nothing


def lzf(packed, size):
    """Unpack LZF, which PCD uses: runs of bytes, and copies of what was written before."""
    out = bytearray()
    unread = iter(packed)
    for control in unread:
        if control < 32:                    # control + 1 bytes as they are
            out += bytes(islice(unread, control + 1))
            continue
        length = control >> 5
        if length == 7:
            length += next(unread, 0)
        start = len(out) - ((control & 31) << 8) - next(unread, 0) - 1
        for k in range(length + 2):         # may overlap itself
            out.append(out[start + k])
    if len(out) != size:
        raise ValueError("the compressed block is cut short")
    return bytes(out)


# ---- Arrays in files: pickles, NumPy's own; archives ---------------------------------------------

class PickledType:
    """Stands for numpy.dtype while a pickle is read: numbers of a known size, in either order."""

    def __init__(self, code, *_):
        if not re.fullmatch("b1|[iu][1248]|f[248]", code):
            raise pickle.UnpicklingError(f"it holds {code[:20]!r}, not numbers")
        self.dtype = np.dtype(code)

    def __setstate__(self, state):          # of numbers, only the byte order is not in the code
        self.dtype = self.dtype.newbyteorder(state[1])


class PickledArray(np.ndarray):
    """An array of a pickle. NumPy believes what is said of it: a type that lied about its size
    ended the process. `reshape` raises where there are not as many bytes as it says."""

    def __new__(cls, *_):
        return super().__new__(cls, 0, np.int8)

    def __setstate__(self, state):
        _, shape, kind, fortran, raw = state
        np.frombuffer(raw, kind.dtype).reshape(shape)
        super().__setstate__((1, shape, kind.dtype, bool(fortran), bytes(raw)))


class NumpyOnly(pickle._Unpickler):
    """Loads numpy arrays and plain containers; a pickle that asks for anything else is refused.

    pickle's version in Python: the one in C makes a table as long as a file says it should be.
    """
    ALLOWED = {                             # nothing of NumPy is called by the file itself
        "_reconstruct": PickledArray, "ndarray": PickledArray, "dtype": PickledType,
        "scalar": lambda kind, raw: np.frombuffer(raw, kind.dtype)[0],
        "_frombuffer": lambda raw, kind, shape, order, axes=None: (
            np.frombuffer(raw, kind.dtype).reshape(shape, order="C" if axes else order)
            .transpose(axes or range(len(shape)))),
        "encode": lambda text, code: text.encode("latin1")}     # how protocol 2 writes bytes

    def find_class(self, module, name):
        if module.split(".")[0] in ("numpy", "_codecs") and name in self.ALLOWED:
            return self.ALLOWED[name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not a numpy array")


def read_pickle(path):
    """The content of a pickle of numpy arrays and plain containers. Raises whatever is wrong."""
    with open(path, "rb") as file:
        return NumpyOnly(file).load()


NUMBERS = "biuf"                            # kinds of dtype


def load_npy(blob, kinds=NUMBERS):
    """A .npy -> array. A header that promises too much gets no memory. Raises ValueError."""
    if not blob:
        raise ValueError("is empty")
    file = io.BytesIO(blob)
    version = "_".join(map(str, np.lib.format.read_magic(file)))
    shape, fortran, dtype = getattr(np.lib.format, f"read_array_header_{version}")(file)
    if dtype.kind not in kinds:
        raise ValueError(f"holds {str(dtype)[:60]}, expected numbers")
    if math.prod(shape) * dtype.itemsize > len(blob) - file.tell():
        raise ValueError(f"cut short: its header promises shape {shape}")
    array = np.frombuffer(blob, dtype, math.prod(shape), file.tell())
    return array.reshape(shape, order="F" if fortran else "C").copy("K")


def load_npz(file, names=None, kinds=NUMBERS):
    """A .npz, its path or an open file -> {name: array} of those `names` (None: all) it has."""
    with zipfile.ZipFile(file) as archive:
        found = {name.removesuffix(".npy"): name for name in archive.namelist()}
        return {name: load_npy(archive.read(member), kinds) for name, member in found.items()
                if member.endswith(".npy") and (names is None or name in names)}


def zip_members(path, suffix):
    """The names of an archive's members that end with `suffix`, in any case."""
    with reading(path, "fetch it again"), zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    names = [name for name in names if name.lower().endswith(suffix)]
    names = [name for name in names if not any(map(is_litter, name.split("/")))]
    refuse_copies(Path(f"{path}::{name}") for name in names)
    return names


# ---- Which files of a folder count ---------------------------------------------------------------

COPY = re.compile(r"(.+?)( ?\(\d+\)| (- )?(copy|kopie|copie|copia)( \(?\d+\)?)?)", re.IGNORECASE)


def is_litter(name):
    """Whether an operating system left a file behind, or it is hidden: ._NAME, Thumbs.db, ..."""
    return name.startswith(".") or name.lower() in ("__macosx", "thumbs.db", "desktop.ini")


def files_in(folder, suffixes):
    """-> a folder's files with these suffixes, in any case, sorted; all others in and below it.

    Litter is neither. Copies are refused.
    """
    found, others = [], []
    for path in sorted(Path(folder).rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_dir() or any(map(is_litter, parts)):
            continue
        mine = len(parts) == 1 and path.suffix.lower() in suffixes
        (found if mine else others).append(path)
    refuse_copies(found)
    return found, others


def loose_in(folder, suffixes):
    """The files with these suffixes in the folder itself, where subfolders are expected."""
    return sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in suffixes
                  and path.is_file() and not is_litter(path.name))


def refuse_copies(paths):
    """An InputError where one object or room would count twice: a.ply, a.npy; a.ply, a (1).ply."""
    paths = list(paths)
    first = {(path.parent, path.stem): path for path in reversed(paths)}
    for path in paths:
        copy = COPY.fullmatch(path.stem)
        other = first.get((path.parent, copy[1] if copy else path.stem), path)
        if other != path:
            raise InputError(f"{path}: by its name a copy of {other.name}, which would count "
                             "twice; remove one of them, or rename it")


def check_outputs(files, folder):
    """An InputError where FOLDER/NAME.* of --predict would meet each other or what is read."""
    names = [Path(file).stem for file in files]
    for file, name in zip(files, names):
        if names.count(name) > 1:
            raise InputError(f"--predict: several files are called {name}, and {folder} can "
                             "hold one; give them one at a time, each with its own --export")
        if Path(file).resolve().parent == Path(folder).resolve():
            raise InputError(f"--export {folder}: {file} lies there and would be written over; "
                             "give another folder")


def check_export(folder, cfg):
    """An InputError where --export would write FOLDER/NAME.* over the scenes of a run's data."""
    root = Path(cfg["root"] or f"data/{cfg['data']}")
    if Path(folder).resolve() in {(root / part).resolve() for part in ("", "train", "val", "test")}:
        raise InputError(f"--export {folder}: the run's data lies there and would be written over; "
                         "give another folder")


def passed_over(folder, others):
    """One line on what is in a folder and not read; "" where that is nothing."""
    if not others:
        return ""
    names = [path.relative_to(folder).as_posix() for path in others[:3]] + ["..."] * (
        len(others) > 3)
    return (f"{folder}: passed over {len(others):,} file{'s' * (len(others) > 1)}: "
            f"{', '.join(names)}")


def say(lines):
    """Print each line on stderr, once for all processes."""
    for line in lines:
        if line and rank() == 0:
            print(line, file=sys.stderr)


def beside(path, suffix):
    """NAME of `path` with another suffix, .json or .JSON."""
    capitals = Path(path).with_suffix(suffix.upper())
    return capitals if capitals.is_file() else Path(path).with_suffix(suffix)


def part_folder(root, part):
    """ROOT/PART. Where `test` is expected `val` will do, and the other way round, but not both."""
    other = {"test": "val", "val": "test"}.get(part)
    if not other or not (root / other).is_dir():
        return root / part
    if (root / part).is_dir():
        raise InputError(f"{root}: has both {part}/ and {other}/, and a run tests on one; move the "
                         "other out")
    return root / other


# ---- One room: prepared, or anybody's own --------------------------------------------------------

class Cloud(NamedTuple):
    xyz: np.ndarray                         # (n, 3) float32, the file's coordinates less `offset`
    rgb: np.ndarray = None                  # (n, 3) uint8
    label: np.ndarray = None                # (n,) int64, -1: no class
    instance: np.ndarray = None             # (n,) int64
    boxes: np.ndarray = None                # (k, 7) float32: centre less offset, sizes, class
    offset: np.ndarray = np.zeros(3)        # (3,) float64


def read_npy(path, columns):
    """A .npy of at least `columns` columns; 0: of one dimension, whole numbers."""
    with reading(path):
        array = load_npy(Path(path).read_bytes())
        if array.ndim != 1 + (columns > 0) or columns and array.shape[1] < columns:
            wanted = f"at least {columns} columns" if columns else "one number a point"
            raise ValueError(f"expected {wanted}, found shape {array.shape}")
        if not columns:
            whole_numbers(array)
        return array


def whole_numbers(array):
    """-> int64, or a ValueError: a fraction, a NaN, or too large to be a number of anything."""
    bad = ~((np.abs(array) < 2**53) & (array == np.floor(array)))
    if bad.any():
        raise ValueError(f"has {array[bad][0]:g}, expected whole numbers")
    return array.astype(np.int64)


def own_clouds(root, parts, how_to, suffixes=ROOMS, more=".json", training=True):
    """ROOT/PART/NAME.* -> the clouds of each part; the names in ROOT/classes.txt, () without it.

    Names on stderr what is passed over. NAME.json (`more`) beside NAME.* holds its boxes. Without
    `training` the first part's folder may be missing: no clouds.
    """
    found = []
    if root.is_dir():
        say([passed_over(root, loose_in(root, suffixes))])
    for part in parts:
        folder = part_folder(root, part)
        if not training and part == parts[0] and not folder.is_dir():
            found.append([])
            continue
        paths, others = files_in(folder, suffixes)
        if not paths:
            raise InputError(f"{folder}: no clouds; {how_to}")
        boxes = {beside(path, more) for path in paths}
        say([passed_over(folder, [path for path in others if path not in boxes])])
        found.append(paths)
    path = root / "classes.txt"
    try:
        lines = read_lines(path) if path.is_file() else []
    except BrokenFile as error:             # nothing that --skip-broken could leave out
        raise InputError(str(error)) from None
    names = [line.strip() for line in "\n".join(lines).rstrip().split("\n")] if lines else []
    if path.is_file() and not names:
        raise InputError(f"{path}: is empty; write the name of a class in each line")
    if "" in names:                         # left out, it would move all labels behind it
        raise InputError(f"{path}: line {names.index('') + 1} is blank; a label is the number of "
                         "its line, so give every line a name")
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{path}: has {name!r} twice; a label is the number of its line, so "
                             "give every class a name of its own")
    return *found, tuple(names)


def absent(seen, classes, first, where="training point"):
    """A warning that names the classes that are not in `seen`; "" where all are."""
    names = [name for k, name in enumerate(classes) if k not in seen]
    if not names:
        return ""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (f"warning  no {where} is labelled {', '.join(names[:5])}{more}; a label is a line of "
            f"classes.txt, counted from {first}")


def read_cloud(path, classes=None, colours=True):
    """A prepared room, or somebody's own cloud -> Cloud; what the file does not hold is None.

    classes: how many there are, and every point needs a label; None: labels are not read. colours:
    whether colours are. .npz: arrays named as in Cloud. .ply: properties x y z, red green blue,
    label. .npy: columns x y z label, or x y z r g b label; without classes any number of columns
    from 3, of which 6 or 7 hold colours.
    """
    path = Path(path)
    left_out = {"rgb": not colours, "label": not classes}
    wanted = [name for name in Cloud._fields if not left_out.get(name)]
    with reading(path):
        suffix = path.suffix.lower()
        if suffix == ".ply":
            table, _ = read_ply(path.read_bytes(), faces=False)
            names = table.dtype.names
            found = {"xyz": columns(table, "x", "y", "z", kind=np.float64)}
            if "rgb" in wanted and "red" in names:
                found["rgb"] = columns(table, "red", "green", "blue", kind=None)
            if "label" in wanted:               # CloudCompare calls it scalar_label
                labels = [name for name in names if name.lower() in ("label", "scalar_label")]
                if len(labels) != 1:
                    raise ValueError(f"its points need one property `label`, and have "
                                     f"{' '.join(names)}")
                found["label"] = table[labels[0]]
        elif suffix == ".npz":
            found = load_npz(path, wanted)
        elif suffix != ".npy":
            raise InputError(f"{path}: not a format that is read here ({' '.join(ROOMS)})")
        else:
            table = load_npy(path.read_bytes())
            if table.ndim != 2 or table.shape[1] < 3 or classes and table.shape[1] not in (4, 7):
                columns_are = "x y z label, or x y z r g b label" if classes else "x y z ..."
                raise ValueError(f"shape {table.shape}; expected columns {columns_are}")
            if table.shape[1] > 100 * len(table) > 0:
                raise ValueError(f"shape {table.shape}; expected a row a point: transpose it")
            found = {"xyz": table}
            if "rgb" in wanted and table.shape[1] in (6, 7):
                found["rgb"] = table[:, 3:6]
            if "label" in wanted:
                found["label"] = table[:, -1]
        return checked(found, classes)


def checked(found, classes=None):
    """{field: array} -> Cloud. Raises ValueError with what is wrong."""
    if "xyz" not in found or classes and "label" not in found:
        raise ValueError("its points have no label" if "xyz" in found else "has no xyz")
    xyz = found["xyz"]
    if xyz.ndim != 2 or xyz.shape[1] < 3:
        raise ValueError(f"shape {xyz.shape}; expected x y z of every point")
    if len(xyz) == 0 or not np.isfinite(xyz[:, :3]).all():
        raise ValueError("has no points, or NaN coordinates")
    found["xyz"], offset = near_origin(xyz[:, :3])
    counts = {"labels": "label", "colours": "rgb", "instances": "instance"}
    counts = {what: len(found[name]) for what, name in counts.items() if name in found}
    if any(count != len(xyz) for count in counts.values()):
        counts = ", ".join(f"{count} {what}" for what, count in counts.items())
        raise ValueError(f"has {len(xyz)} points, {counts}")
    if "label" in found:
        label = found["label"].reshape(len(xyz))
        good = (label >= -1) & (label < classes) & (label == np.floor(label))
        if not good.all():
            raise ValueError(f"has the label {label[~good][0]:g}; labels are whole numbers from 0 "
                             f"to {classes - 1}, or -1 for none")
        found["label"] = label.astype(np.int64)
    if "rgb" in found:
        found["rgb"] = as_bytes(found["rgb"])
    if "instance" in found:
        found["instance"] = whole_numbers(found["instance"])
    if "boxes" in found:
        found_boxes = found["boxes"]
        found["boxes"] = boxes = found_boxes.astype(np.float32)
        if boxes.shape[1:] != (7,) or not np.isfinite(boxes).all():
            raise ValueError(f"has NaN in its boxes, or not seven numbers each: {boxes.shape}")
        boxes[:, :3] = found_boxes[:, :3] - offset
    found["offset"] = offset + found.get("offset", offset * 0).reshape(3)   # a prepared file's own
    return Cloud(**found)


def as_bytes(rgb):
    """Colours (n, 3) -> uint8. Integers are 0..255; floats are 0..1 if none is above 1.01."""
    if rgb.shape[1:] != (3,):
        raise ValueError(f"has colours of shape {rgb.shape}; expected r g b of every point")
    if not ((rgb >= 0) & (rgb <= 255)).all():
        raise ValueError("has colours outside 0..255")
    if rgb.dtype.kind == "f" and rgb.max() <= 1.01:     # rounding and HDR reach a bit above 1;
        rgb = np.minimum(rgb, 1) * 255                  # a room this dark does not exist
    return rgb.round().astype(np.uint8)


def read_boxes(path, offset=0):
    """A NAME.json [{"class", "center", "size"}, ...] -> names of classes, boxes (k, 6) float32.

    offset: that of the Cloud the boxes belong to; their centres are moved as its points are.
    """
    names, boxes = [], []
    with reading(path, f"{A_SCENE}; repair it"):
        content = read_json(path)
        if not isinstance(content, list):
            raise ValueError("is not a list")
        for number, box in enumerate(content):
            if not isinstance(box, dict) or not {"class", "center", "size"} <= box.keys():
                raise ValueError(f"box {number} lacks class, center or size")
            for key in "center", "size":
                if not (isinstance(box[key], list) and len(box[key]) == 3
                        and all(isinstance(value, (int, float)) for value in box[key])):
                    raise ValueError(f"the {key} of box {number} is not three numbers")
            names.append(str(box["class"]))
            boxes.append(box["center"] + box["size"])
        boxes = np.array(boxes, np.float64).reshape(-1, 6)
        boxes[:, :3] -= offset
        boxes = boxes.astype(np.float32)
        if not np.isfinite(boxes).all():
            raise ValueError("has NaN coordinates")
    return names, boxes


def check_span(path, xyz, cure):
    """Recipes are in metres: a cloud as large as a city or as small as a cup is in another unit."""
    span = np.ptp(xyz, 0)
    if not 0.3 <= span.max() <= 1000:
        size = " x ".join(f"{x:,.0f}" if x >= 10 else f"{x:.2g}" for x in span)
        raise BrokenFile(f"{path}: spans {size} m; metres are expected: {cure} or remove points "
                         "that lie far away")


def usable_boxes(boxes, xyz, where):
    """-> mask (k,) of the boxes (k, 6) that are not flat; a line for each flat or empty one."""
    kept, notes = (boxes[:, 3:] > 0).all(1), []
    for k, box in enumerate(boxes):
        if (box[3:] < 0).any():
            raise BrokenFile(f"{where}: box {k} has a size below zero; repair the file")
        if not kept[k]:
            notes.append(f"{where}: box {k} is flat and left out")
        elif not (np.abs(xyz - box[:3]) <= box[3:] / 2 + 1e-3).all(1).any():
            notes.append(f"{where}: box {k} holds no point")
    return kept, notes


# ---- Points, meshes and boxes -> PLY -------------------------------------------------------------

def write_ply(path, xyz, rgb=None, faces=None):
    """Points (N, 3), and colours (N, 3) uint8 and triangles (F, 3) if given, as binary PLY.

    Coordinates are double where float would lose more than 1 mm.
    """
    real = "<f8" if len(xyz) and np.abs(xyz).max() > 1e4 else "<f4"
    vertex = np.empty(len(xyz), [(axis, real) for axis in "xyz"]
                      + [(c, "u1") for c in ("red", "green", "blue") if rgb is not None])
    for name, column in zip(vertex.dtype.names, [*xyz.T, *(() if rgb is None else rgb.T)]):
        vertex[name] = column
    kind = {"<f4": "float", "<f8": "double", "|u1": "uchar"}
    head = ["ply", "format binary_little_endian 1.0", f"element vertex {len(xyz)}",
            *(f"property {kind[k]} {name}" for name, k in vertex.dtype.descr)]
    face = np.empty(0 if faces is None else len(faces), [("n", "u1"), ("v", "<i4", 3)])
    if faces is not None:
        face["n"] = 3
        face["v"] = faces
        head += [f"element face {len(faces)}", "property list uchar int vertex_indices"]
    head = "\n".join([*head, "end_header\n"]).encode()
    path.write_bytes(head + vertex.tobytes() + face.tobytes())


def write_boxes(path, xyz, rgb, boxes):
    """A cloud, and boxes {colour: (k, 6)} as thin bars that MeshLab, CloudCompare, Blender show."""
    xyz, rgb, faces = [xyz], [rgb], [np.zeros((0, 3), np.int64)]
    for colour, several in boxes.items():
        for box in several:
            vertices, triangles = box_edges(box)
            faces.append(triangles + sum(map(len, xyz)))
            xyz.append(vertices)
            rgb.append(np.tile(colour, (len(vertices), 1)))
    write_ply(path, np.concatenate(xyz), np.concatenate(rgb), np.concatenate(faces))


def box_edges(box, thick=0.015):
    """The edges of a box (6,), centre and sizes, as bars -> vertices (96, 3), faces (144, 3)."""
    corner = np.array([(x, y, z) for x in (-.5, .5) for y in (-.5, .5) for z in (0, 1)])
    quad = np.array([(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4),
                     (1, 5, 7, 3)])
    face = np.concatenate([quad[:, (0, 1, 2)], quad[:, (0, 2, 3)]])
    vertices = []
    for axis in range(3):
        across = [a for a in range(3) if a != axis]
        size = np.full(3, thick)
        size[axis] = box[3 + axis] + thick
        for side in ((-1, -1), (-1, 1), (1, -1), (1, 1)):
            at = np.array(box[:3], float)
            at[across] += np.array(side) * np.array(box[3:])[across] / 2
            vertices.append(corner * size + (at - (0, 0, size[2] / 2)))
    faces = [face + 8 * i for i in range(12)]
    return np.concatenate(vertices), np.concatenate(faces)
