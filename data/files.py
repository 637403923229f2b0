"""Files -> arrays, one reader for each format; meshes -> points; points -> PLY.

    xyz, faces = read_object(blob, ".off")          one object, from the bytes of its file
    cloud = read_cloud("room.ply", classes=13)      a room: points, colours, labels
    names, boxes = read_boxes("room.json")

Whatever is wrong with a file is a BrokenFile of one line, or a ValueError where the caller knows
the file's name.
"""
import io
import json
import pickle
import re
import struct
import zipfile
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from run import InputError

MESHES = (".off", ".obj", ".stl")
CLOUDS = (".npy", ".npz", ".xyz", ".txt", ".csv", ".pcd")
SUFFIXES = (*MESHES, ".ply", *CLOUDS)       # a .ply may be either
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
    return BrokenFile(f"{where}: {text or type(error).__name__}; {cure}")


# ---- One object: the bytes of a file -> points, or a mesh ----------------------------------------

def read_object(blob, suffix):
    """The content of a file -> (points or vertices (N, 3) float32, faces (F, 3) int64 or None).

    Raises ValueError with what is wrong; the caller knows the file's name.
    """
    faces = None
    if suffix == ".ply":
        vertices, faces = read_ply(blob)
        xyz = columns(vertices, "x", "y", "z")
    elif suffix in MESHES:
        xyz, faces = read_mesh(blob, suffix)
    elif suffix == ".npy":
        xyz = np.load(io.BytesIO(blob), allow_pickle=False)
    elif suffix == ".npz":
        arrays = np.load(io.BytesIO(blob), allow_pickle=False)
        usual = [n for n in ("xyz", "points", "pos", "data") if n in arrays.files]
        xyz = arrays[(usual or arrays.files)[0]]
    elif suffix == ".pcd":
        xyz = read_pcd(blob)
    else:                       # text: blanks, commas or semicolons; a heading is skipped
        text = blob.decode("utf-8", "replace").replace(",", " ").replace(";", " ")
        numbers = tuple("+-.0123456789nN")
        lines = [line for line in text.splitlines() if line.lstrip().startswith(numbers)]
        xyz = np.loadtxt(lines, ndmin=2)
    xyz = np.asarray(xyz)
    if xyz.ndim != 2 or xyz.shape[1] < 3 or len(xyz) == 0 or xyz.dtype.kind not in "fiu":
        raise ValueError(f"expected rows of x y z, found {xyz.dtype} of shape {xyz.shape}")
    xyz = xyz[:, :3].astype(np.float32)
    bad = np.count_nonzero(~np.isfinite(xyz).all(1))
    if bad:
        raise ValueError(f"{bad:,} of {len(xyz):,} points are NaN or infinite")
    if faces is not None and not 0 <= faces.min() <= faces.max() < len(xyz):
        raise ValueError(f"a face names vertex {faces.max()}, but there are {len(xyz):,}")
    return xyz, faces


def read_mesh(blob, suffix):
    """OFF, OBJ, STL through trimesh: text or binary, polygons, ModelNet's `OFF490 518 0`."""
    import trimesh                          # here, so that --help stays quick
    mesh = trimesh.load(io.BytesIO(blob), file_type=suffix[1:], process=False, skip_materials=True)
    if isinstance(mesh, trimesh.Scene):
        mesh = trimesh.util.concatenate(list(mesh.geometry.values()))
    faces = np.asarray(getattr(mesh, "faces", ()), np.int64).reshape(-1, 3)
    if suffix == ".off":                    # trimesh does not mind missing lines
        lines = blob.replace(b"OFF", b" ", 1).split(b"\n")
        lines = [line.partition(b"#")[0].split() for line in lines]
        (vertices, polygons, *_), *lines = [line for line in lines if line]
        missing = int(vertices) + int(polygons) - len(lines)
        if missing > 0 or int(polygons) and len(lines[-1]) <= int(lines[-1][0]):
            raise ValueError(f"cut short: the header promises {int(vertices):,} vertices and "
                             f"{int(polygons):,} faces, the last {max(missing, 1):,} are not there")
    if len(faces) == 0:
        raise ValueError("no faces; save a cloud as .ply, .npy or .xyz instead")
    return np.asarray(mesh.vertices), faces


def read_ply(blob, faces=True):
    """A PLY, text or binary -> (vertices, structured (N,), triangles (F, 3) int64 or None).

    A vertex has a field for each of its numbers. Other elements are passed over; faces=False passes
    over the faces, too. Our own reader: trimesh's stops at binary faces of different lengths and at
    remarks that are not UTF-8, and gives no labels; plyfile's licence (GPL) does not go with ours.
    """
    head = re.match(rb"ply[ \t\r]*\n(.*?)\r?\nend_header[ \t]*\r?\n", blob, re.DOTALL)
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
    polygons = found["face"].get("vertex_indices", found["face"].get("vertex_index", []))
    if len(polygons) == 0:
        return vertices, None
    from trimesh.geometry import triangulate_quads
    return vertices, np.asarray(triangulate_quads(polygons), np.int64).reshape(-1, 3)


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
        return found.view(order + kind) if order else found.astype("f8").astype(kind)

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

    if count == 0:
        return {name: np.empty(0, kind) for name, kind, _ in properties}, start
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


def columns(table, *names):
    """Fields of a structured array as the columns (n, len(names)) of a float32 array."""
    return np.stack([table[name].astype(np.float32) for name in names], 1)


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


# ---- Many objects in one file: HDF5, pickles, archives -------------------------------------------

def read_h5(files):
    """`data` and `label` of HDF5 files, in order -> xyz (n, P, 3) float32, label (n,) int64."""
    try:
        import h5py
    except ImportError:
        raise InputError(f"{files[0]}: HDF5 files need h5py; pip install h5py") from None
    xyz, label = [], []
    for path in files:
        try:
            with h5py.File(path) as file:
                xyz.append(file["data"][..., :3].astype(np.float32))
                label.append(file["label"][:].reshape(-1).astype(np.int64))
        except (OSError, KeyError) as error:
            raise broken(path, error, "not a readable HDF5 file with `data` and `label`: "
                                      "fetch it again") from None
    return np.concatenate(xyz), np.concatenate(label)


class NumpyOnly(pickle.Unpickler):
    """Loads numpy arrays and plain containers; a pickle that asks for anything else is refused."""
    ALLOWED = {"multiarray._reconstruct", "multiarray.scalar", "numeric._frombuffer",
               "numpy.ndarray", "numpy.dtype"}

    def find_class(self, module, name):
        short = f"{module.rpartition('.')[2]}.{name}"
        numpy_module = module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray",
                                  "numpy.core.numeric", "numpy._core.numeric")
        if numpy_module and short in self.ALLOWED:
            core = "numpy._core" if np.lib.NumpyVersion(np.__version__) >= "2.0.0" else "numpy.core"
            module = module.replace("numpy._core", "numpy.core").replace("numpy.core", core)
            return super().find_class(module, name)
        if (module, name) == ("_codecs", "encode"):   # how pickle's protocol 2 writes bytes
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not a numpy array")


def read_pickle(path):
    """The content of a pickle of numpy arrays and plain containers. Raises whatever is wrong."""
    with open(path, "rb") as file:
        return NumpyOnly(file).load()


def zip_members(path, suffix):
    """The names of an archive's members that end with `suffix`."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        raise BrokenFile(f"{path}: not a readable .zip (cut short?); fetch it again") from None
    return [n for n in names if n.endswith(suffix) and not n.startswith("__MACOSX")]


# ---- One room: prepared, or anybody's own --------------------------------------------------------

class Cloud(NamedTuple):
    xyz: np.ndarray                         # (n, 3) float32
    rgb: np.ndarray = None                  # (n, 3) uint8
    label: np.ndarray = None                # (n,) int64, -1: no class
    instance: np.ndarray = None             # (n,) int64
    boxes: np.ndarray = None                # (k, 7) float32: centre, full side lengths, class


def read_npy(path, columns):
    """A .npy of at least `columns` columns; 0: of one dimension."""
    try:
        array = np.load(path, allow_pickle=False)
        if array.ndim != 1 + (columns > 0) or columns and array.shape[1] < columns:
            wanted = f"at least {columns} columns" if columns else "one number a point"
            raise ValueError(f"expected {wanted}, found shape {array.shape}")
        return array
    except Exception as error:              # whatever numpy makes of a broken file
        raise broken(path, error, "repair it") from None


def clouds_in(folder):
    """The clouds of a folder, sorted."""
    return sorted(p for p in Path(folder).glob("*") if p.suffix in (".ply", ".npy", ".npz"))


def own_clouds(root, parts, how_to):
    """ROOT/PART/NAME.* -> the clouds of each part; the names in ROOT/classes.txt, () without it."""
    found = [clouds_in(root / part) for part in parts]
    for part, paths in zip(parts, found):
        if not paths:
            raise InputError(f"{root / part}: no clouds; {how_to}")
    path = root / "classes.txt"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = [line.strip() for line in lines if line.strip()]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{path}: has {name!r} twice; a label is the number of its line, so "
                             "give every class a name of its own")
    return *found, tuple(names)


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
    try:
        if path.suffix == ".ply":
            table, _ = read_ply(path.read_bytes(), faces=False)
            found = {"xyz": columns(table, "x", "y", "z")}
            if "rgb" in wanted and "red" in table.dtype.names:
                found["rgb"] = columns(table, "red", "green", "blue")
            if "label" in wanted and "label" in table.dtype.names:
                found["label"] = table["label"]
        elif path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as table:
                found = {name: table[name] for name in wanted if name in table}
        else:
            table = np.load(path, allow_pickle=False)
            if table.ndim != 2 or table.shape[1] < 3 or classes and table.shape[1] not in (4, 7):
                columns_are = "x y z label, or x y z r g b label" if classes else "x y z ..."
                raise ValueError(f"shape {table.shape}; expected columns {columns_are}")
            found = {"xyz": table}
            if "rgb" in wanted and table.shape[1] in (6, 7):
                found["rgb"] = table[:, 3:6]
            if "label" in wanted:
                found["label"] = table[:, -1]
        return checked(found, classes)
    except Exception as error:              # whatever numpy makes of a broken file
        raise broken(path, error, "repair it") from None


def checked(found, classes=None):
    """{field: array} -> Cloud. Raises ValueError with what is wrong."""
    if "xyz" not in found or classes and "label" not in found:
        raise ValueError("its points have no label" if "xyz" in found else "has no xyz")
    xyz = found["xyz"]
    if xyz.ndim != 2 or xyz.shape[1] < 3:
        raise ValueError(f"shape {xyz.shape}; expected x y z of every point")
    found["xyz"] = xyz = np.ascontiguousarray(xyz[:, :3], np.float32)
    if len(xyz) == 0 or not np.isfinite(xyz).all():
        raise ValueError("has no points, or NaN coordinates")
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
        found["instance"] = found["instance"].astype(np.int64)
    if "boxes" in found:
        found["boxes"] = boxes = found["boxes"].astype(np.float32)
        if boxes.shape[1:] != (7,) or not np.isfinite(boxes).all():
            raise ValueError(f"has NaN in its boxes, or not seven numbers each: {boxes.shape}")
    return Cloud(**found)


def as_bytes(rgb):
    """Colours (n, 3), 0..255, or 0..1 where they are floats and none is above 1 -> uint8."""
    if rgb.shape[1:] != (3,):
        raise ValueError(f"has colours of shape {rgb.shape}; expected r g b of every point")
    if not ((rgb >= 0) & (rgb <= 255)).all():
        raise ValueError("has colours outside 0..255")
    if rgb.dtype.kind == "f" and rgb.max() <= 1:
        rgb = rgb * 255                     # a room this dark does not exist
    return rgb.round().astype(np.uint8)


def read_boxes(path):
    """A NAME.json [{"class", "center", "size"}, ...] -> names of classes, boxes (k, 6) float32."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        names = [str(box["class"]) for box in content]
        boxes = [[*box["center"], *box["size"]] for box in content]
        boxes = np.array(boxes, np.float64).reshape(-1, 6).astype(np.float32)
    except (OSError, KeyError, ValueError, TypeError, IndexError) as error:
        raise broken(path, error, f"{A_SCENE}; repair it") from None
    if not np.isfinite(boxes).all():
        raise broken(path, "has NaN coordinates", "repair the file")
    return names, boxes


# ---- Meshes -> points; points, meshes and boxes -> PLY -------------------------------------------

def sample_faces(vertices, faces, n, rng):
    """n points uniform by area -> xyz (n, 3), index of each point's face (n,), normals (F, 3)."""
    a, b, c = vertices[faces].transpose(1, 0, 2)
    normal = np.cross(b - a, c - a)
    area = np.linalg.norm(normal, axis=1)
    ends = np.cumsum(area, dtype=np.float64)
    if not ends[-1] > 0:
        raise ValueError("its faces have no area")
    # side="right" steps over faces of zero area; the minimum guards the product's last rounding
    face = np.searchsorted(ends, np.minimum(rng.random(n), 1 - 1e-12) * ends[-1], side="right")
    u, v = rng.random((2, n, 1), dtype=np.float32)
    outside = u + v > 1
    u = np.where(outside, 1 - u, u)
    v = np.where(outside, 1 - v, v)
    xyz = a[face] + u * (b - a)[face] + v * (c - a)[face]
    return xyz, face, normal / np.maximum(area, 1e-12)[:, None]


def sample_surface(vertices, faces, n, rng):
    """n points uniform by area on a triangle mesh: (V, 3), (F, 3) -> (n, 3) float32."""
    return sample_faces(vertices, faces, n, rng)[0].astype(np.float32)


def write_ply(path, xyz, rgb=None, faces=None):
    """Points (N, 3), and colours (N, 3) uint8 and triangles (F, 3) if given, as binary PLY."""
    vertex = np.empty(len(xyz), [(axis, "<f4") for axis in "xyz"]
                      + [(c, "u1") for c in ("red", "green", "blue") if rgb is not None])
    for name, column in zip(vertex.dtype.names, [*xyz.T, *(() if rgb is None else rgb.T)]):
        vertex[name] = column
    kind = {"<f4": "float", "|u1": "uchar"}
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
