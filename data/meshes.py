"""One object: its file -> a mesh or a cloud; polygons -> triangles; meshes -> points.

    xyz, faces = read_object(blob, ".off")
    xyz = sample_surface(xyz, faces, 1024, rng)

Raises ValueError with what is wrong; the caller knows the file's name.
"""
import csv
import io
import re
import zipfile

import numpy as np

from data.files import columns, load_npy, load_npz, near_origin, read_pcd, read_ply, text_of

MESHES = (".off", ".obj", ".stl")
CLOUDS = (".npy", ".npz", ".xyz", ".txt", ".csv", ".pcd")
SUFFIXES = (*MESHES, ".ply", *CLOUDS)       # a .ply may be either


def read_object(blob, suffix):
    """The content of a file -> (points or vertices (N, 3) float32, faces (F, 3) int64 or None).

    Raises ValueError with what is wrong; the caller knows the file's name.
    """
    faces = None
    if suffix == ".ply":
        vertices, polygons = read_ply(blob)
        xyz = columns(vertices, "x", "y", "z", kind=np.float64)
        faces = None if polygons is None else triangles_of(polygons, xyz)
    elif suffix in MESHES:
        xyz, faces = read_mesh(blob, suffix)
    elif suffix == ".npy":
        xyz = load_npy(blob)
    elif suffix == ".npz":
        names = zipfile.ZipFile(io.BytesIO(blob)).namelist()
        names = [name.removesuffix(".npy") for name in names]
        usual = [n for n in ("xyz", "points", "pos", "data") if n in names]
        if not usual and len(names) != 1:
            raise ValueError(f"has the arrays {', '.join(names)[:100]}; call the points xyz")
        xyz, = load_npz(io.BytesIO(blob), (usual or names)[:1]).values()
    elif suffix == ".pcd":
        xyz = read_pcd(blob)
    else:
        xyz = read_text(blob)
    xyz = np.asarray(xyz)
    if xyz.ndim != 2 or xyz.shape[1] < 3 or len(xyz) == 0 or xyz.dtype.kind not in "fiu":
        raise ValueError(f"expected rows of x y z, found {xyz.dtype} of shape {xyz.shape}")
    bad = np.count_nonzero(~np.isfinite(xyz[:, :3]).all(1))
    if bad:
        raise ValueError(f"{bad:,} of {len(xyz):,} points are NaN or infinite")
    xyz, _ = near_origin(xyz[:, :3])        # where it stands does not matter: it is centred later
    return xyz, faces


# ---- Text ----------------------------------------------------------------------------------------

ROW = re.compile(r'["\s]*[+-]?(\.?\d|(nan|inf|infinity)\b)', re.IGNORECASE)       # how one begins
DECIMAL_COMMA = re.compile(r"[+-]?(\d+(,\d+)?(e[+-]?\d+)?|nan|inf)", re.IGNORECASE)


def read_text(blob):
    """Rows of numbers, divided by blanks, commas or semicolons -> x y z, (n, 3) float64.

    A heading that names x, y and z chooses the columns; without one they are the first three.
    Passed over: remarks (# or //), a title before the rows, and a first line that counts the rows.
    """
    rows, heading, title, count = [], None, None, None          # rows: number and text of a line
    for i, whole in enumerate(text_of(blob, "replace").splitlines(), 1):
        line = "" if whole.lstrip().startswith("//") else whole.partition("#")[0].strip()
        names = [] if rows else names_in(whole.lstrip("#/ \t"))
        if not rows and all(names.count(axis) == 1 for axis in "xyz"):
            heading = (names, line)                             # CloudCompare's is a remark
        elif not line.strip(",; \t"):
            continue
        elif rows or ROW.match(line) or heading and heading[1]:
            if not rows and count is None and line.isdigit():
                count = (i, int(line))
            else:
                rows.append((i, line))
        else:
            title = (i, names)
    if count and count[1] != len(rows):
        raise ValueError(f"line {count[0]} promises {count[1]:,} rows, found {len(rows):,}")
    if not rows:
        raise ValueError("has no rows of numbers")
    lines, divider = divided([line for _, line in rows])
    widths = [len(line.split(divider)) for line in lines]
    for (i, _), width in zip(rows, widths):
        if width != widths[0]:
            raise ValueError(f"line {i} has {width} columns, line {rows[0][0]} has {widths[0]}")
    if widths[0] < 3:
        raise ValueError(f"expected rows of x y z, found {widths[0]} columns")
    use = (0, 1, 2)
    if heading and len(heading[0]) == widths[0]:
        use = [heading[0].index(axis) for axis in "xyz"]
    elif heading and heading[1]:
        raise ValueError(f"its heading names {len(heading[0])} columns, line {rows[0][0]} has "
                         f"{widths[0]}")
    elif title and (len(title[1]) == widths[0] or {"x", "y", "z"} <= set(title[1])):
        raise ValueError(f"its heading, line {title[0]}, does not name x, y and z once each")

    def numbers(lines):
        return np.loadtxt(lines, delimiter=divider, usecols=use, quotechar='"', comments=None,
                          ndmin=2)
    try:
        return numbers(lines)
    except ValueError:
        for (i, line), decimal in zip(rows, lines):
            try:
                numbers([decimal])
            except ValueError:
                raise ValueError(f"line {i} is {line[:60]!r}, expected numbers") from None
        raise


def names_in(line):
    """The names of a heading, small, without quotes and units: `"X [m]"` -> x."""
    line = re.sub(r"[\[(][^\])]*[\])]", "", line)
    divider = next((sign for sign in ";\t," if sign in line), " ")
    words = next(csv.reader([line], delimiter=divider, skipinitialspace=True), [])
    return [word.strip(" \t'\"").lower() for word in words if divider != " " or word]


def divided(lines):
    """Rows -> the same with decimal points, what divides their columns (None: blanks)."""
    text = "\n".join(lines)
    if "," not in text:
        return lines, ";" if ";" in text else None
    by_blanks = all(map(DECIMAL_COMMA.fullmatch, text.split())) and len(lines[0].split()) > 2
    if ";" in text or by_blanks:
        return [line.replace(",", ".") for line in lines], None if by_blanks else ";"
    # `0,024,1,5,-0,7`: whole numbers have no leading zero, nor zero a sign
    if "." not in text and lines[0].count(",") > 4:
        words = [[word.strip() for word in line.split(",")[:6]] for line in lines]
        if any(re.match(r"0\d", word) for row in words for word in row[1::2]) or any(
                word == "-0" for row in words for word in row[::2]):
            raise ValueError("decimal commas; save with points")
    return lines, ","


# ---- Meshes --------------------------------------------------------------------------------------

def read_mesh(blob, suffix):
    """OFF, OBJ, STL, text or binary -> vertices (V, 3) float64, triangles (F, 3) int64."""
    if suffix == ".off":
        vertices, faces = read_off(text_of(blob, "replace"))
    else:
        import trimesh                      # here, so that --help stays quick
        blob = plain_obj(text_of(blob, "replace")) if suffix == ".obj" else whole_stl(blob)
        mesh = trimesh.load(io.BytesIO(blob), file_type=suffix[1:], process=False,
                            skip_materials=True)
        if isinstance(mesh, trimesh.Scene):
            mesh = trimesh.util.concatenate(list(mesh.geometry.values()))
        vertices = np.asarray(mesh.vertices)
        faces = np.asarray(getattr(mesh, "faces", ()), np.int64).reshape(-1, 3)
        loops = len(re.findall(rb"outer\s+loop", blob)) if suffix == ".stl" else 0
        if loops > len(faces):              # trimesh passes over a solid without its end
            raise ValueError(f"cut short: {loops - len(faces):,} of its {loops:,} triangles")
    if len(faces) == 0:
        raise ValueError("no faces; save a cloud as .ply, .npy or .xyz instead")
    return vertices, faces


def read_off(text):
    """OFF and its relatives COFF, NOFF, CNOFF, STOFF, whose vertices have more numbers than x y z.

    trimesh minds neither missing lines nor `OFF` in a remark, and makes fans of all polygons.
    """
    lines = [words for line in text.splitlines() if (words := line.partition("#")[0].split())]
    head = re.fullmatch(r"(?:ST|C|N)*OFF(\d*)", lines[0][0]) if lines else None
    if not head or "BINARY" in lines[0]:
        raise ValueError(f"begins with {' '.join(lines[0])[:40]!r}, expected OFF as text" if lines
                         else "is empty")
    lines[0] = [word for word in (head[1], *lines[0][1:]) if word]      # ModelNet: OFF490 518 0
    counts, *lines = lines if lines[0] else lines[1:] or [[]]
    if len(counts) < 2:
        raise ValueError("does not say how many vertices and faces it has")
    count, polygons = int(counts[0]), int(counts[1])
    rows, faces = lines[:count], lines[count:count + polygons]
    missing = count + polygons - len(lines)
    if missing > 0 or any(len(words) <= int(words[0]) for words in faces):
        raise ValueError(f"cut short: the header promises {count:,} vertices and {polygons:,} "
                         f"faces, the last {max(missing, 1):,} are not there")
    vertices = vertices_of([words[:3] for words in rows])
    return vertices, triangles_of([words[1:int(words[0]) + 1] for words in faces], vertices)


def plain_obj(text):
    """OBJ -> what of it makes the surface, written as trimesh reads it rightly.

    trimesh finds `v` and `f` only at the start of a line and before a blank, counts -1 from the
    file's last vertex instead of the last so far, stops at words that are no numbers without a
    word, and makes fans of all polygons.
    """
    vertices, polygons, lines = [], {}, []                      # polygons: {line written: corners}
    for line in re.sub(r"\\\r?\n", " ", text).splitlines():
        key, *words = line.partition("#")[0].split() or [""]
        if key == "v":
            vertices.append(words[:3])
            lines.append("v " + " ".join(words[:3]))
        elif key == "f" and len(words) > 2:
            corners = [int(word.partition("/")[0]) for word in words]
            relative = min(corners) < 0
            corners = [i + len(vertices) if i < 0 else i - 1 for i in corners]
            polygons[len(lines)] = corners
            words = [str(i + 1) for i in corners] if relative else words
            lines.append(" ".join(["f", *words]))
        elif key in ("usemtl", "o", "g"):                       # trimesh sorts faces by these
            lines.append(" ".join([key, *words]))
    vertices = vertices_of(vertices)
    fans = covered_by_fans(list(polygons.values()), vertices, first=1)
    for (i, corners), fan in zip(polygons.items(), fans):
        if not fan:
            triangles = np.array(corners)[ears(vertices[corners])] + 1
            lines[i] = "\n".join("f {} {} {}".format(*triangle) for triangle in triangles)
    return "\n".join(lines).encode("ascii", "xmlcharrefreplace")


def whole_stl(blob):
    """STL, small if it is text, without the bytes that some programs write behind a binary one.

    trimesh takes a binary file of another length than its header says for text.
    """
    text = blob.lower()
    if len(blob) < 84 or b"facet" in text and b"vertex" in text:
        return text
    end = 84 + 50 * int.from_bytes(blob[80:84], "little")
    if end > len(blob):
        raise ValueError(f"cut short: the header promises {(end - 84) // 50:,} triangles, found "
                         f"{(len(blob) - 84) // 50:,}")
    return blob[:end]


def vertices_of(rows):
    """Words of x y z -> (V, 3) float64."""
    short = next((i for i, row in enumerate(rows) if len(row) < 3), None)
    if short is not None:
        raise ValueError(f"vertex {short} has no x y z")
    return np.array(rows, np.float64).reshape(-1, 3)


def triangles_of(polygons, vertices):
    """Polygons, each the numbers of its corners -> triangles (F, 3) int64.

    trimesh makes fans from the first corner, which may cover places outside a polygon that is not
    convex, and others twice. Where they do, ours come from `ears`, last.
    """
    from trimesh.geometry import triangulate_quads
    try:
        polygons = np.array(polygons, np.int64)                 # all of one length
    except ValueError:
        polygons = [np.array(corners, np.int64) for corners in polygons]
    fans = covered_by_fans(polygons, vertices)
    cut = [polygons[i][ears(vertices[polygons[i]])] for i in np.flatnonzero(~fans)]
    if cut:
        polygons = [polygons[i] for i in np.flatnonzero(fans)]
    fans = np.asarray(triangulate_quads(polygons), np.int64).reshape(-1, 3)
    return np.concatenate([fans, *cut])


def covered_by_fans(polygons, vertices, first=0):
    """Mask (F,) of the polygons that a fan from the first corner covers once; convex ones, always.

    first: the number of the first vertex in the file.
    """
    length = np.fromiter(map(len, polygons), np.int64, len(polygons))
    fans = np.ones(len(polygons), bool)
    for n in np.unique(length):
        rows = np.flatnonzero(length == n)
        corners = np.array([polygons[i] for i in rows]) if len(rows) < len(polygons) else polygons
        corners = np.asarray(corners)
        bad = corners[(corners < 0) | (corners >= len(vertices))]
        if len(bad):
            raise ValueError(f"a face names vertex {bad[0] + first}, but there are "
                             f"{len(vertices):,}")
        if n > 3:
            xyz = vertices[corners] - vertices[corners[:, :1]]
            parts = np.cross(xyz[:, 1:-1], xyz[:, 2:])          # (f, n - 2, 3) area and direction
            whole = parts.sum(1, keepdims=True)
            backward = (parts * whole).sum(2) < -1e-6 * (whole ** 2).sum(2)     # less: rounding
            fans[rows] = ~backward.any(1)
    return fans


def ears(xyz):
    """A polygon (n, 3) -> triangles (n - 2, 3) of its corners that cover it once.

    An ear is a corner that points outward and whose triangle holds no other corner: it is cut off,
    until a triangle is left.
    """
    across = np.cross(xyz - xyz[0], np.roll(xyz, -1, 0) - xyz[0]).sum(0)
    axis = np.abs(across).argmax()          # seen along this axis, the polygon is widest
    flat = np.delete(xyz, axis, 1) - np.delete(xyz[0], axis)
    flat[:, 1] *= np.sign(across[axis]) * (-1 if axis == 1 else 1)          # corners turn left
    left, found, tiny = list(range(len(xyz))), [], 1e-9 * np.ptp(flat, 0).max() ** 2
    edge, to = np.roll(flat, -1, 0) - flat, flat - flat[:, None]
    side = edge[:, None, 0] * to[..., 1] - edge[:, None, 1] * to[..., 0]    # of edge i is corner j
    side[np.abs(side) <= tiny] = 0
    astride = side * np.roll(side, -1, 1) < 0                   # edge j has an end on each side
    crosses = ValueError(f"a face of {len(xyz)} corners crosses itself")
    if (astride & astride.T).any():
        raise crosses

    def turn(a, b, c):                      # twice the area, positive to the left
        (x1, y1), (x2, y2) = flat[b] - flat[a], flat[c] - flat[a]
        return x1 * y2 - x2 * y1

    def is_ear(a, b, c):
        if abs(turn(a, b, c)) <= tiny:      # on a straight edge, no area
            return True
        return turn(a, b, c) > 0 and not any(
            min(turn(a, b, p), turn(b, c, p), turn(c, a, p)) >= -tiny for p in left
            if not (flat[p] == flat[[a, b, c]]).all(1).any())

    while len(left) > 3:
        i = next((i for i in range(len(left)) if is_ear(*np.take(left, (i - 1, i, i + 1),
                                                                  mode="wrap"))), None)
        if i is None:
            raise crosses
        found.append([left[i - 1], left[i], left[(i + 1) % len(left)]])
        del left[i]
    return np.array([*found, left])


# ---- Mesh -> points ------------------------------------------------------------------------------

def sample_faces(vertices, faces, n, rng):
    """n points uniform by area -> xyz (n, 3), index of each point's face (n,), normals (F, 3)."""
    a, b, c = vertices[faces].transpose(1, 0, 2)
    normal = np.cross(b - a, c - a)
    area = np.linalg.norm(normal, axis=1)
    ends = np.cumsum(area, dtype=np.float64)
    if not area.any():
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
