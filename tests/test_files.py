"""data/files.py and data/prepared.py: every format, broken input, how prepared data is kept."""
import io
import json
import os
import pickle
import struct
import threading
from pathlib import Path

import numpy as np
import pytest

from data import files, meshes, objects, prepared
from data.files import BrokenFile, absent, read_boxes, read_cloud, read_ply
from data.meshes import read_object
from run import InputError

CUBE = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)], np.float32)
FACES = [[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]]
MIXED = [[0, 1, 3], [0, 3, 2], *FACES[1:]]          # the same cube: one side is two triangles


def off(vertices=CUBE, faces=FACES, header="OFF\n{} {} 0\n"):
    lines = [header.format(len(vertices), len(faces))]
    lines += ["{} {} {}\n".format(*v) for v in vertices]
    lines += [" ".join(map(str, [len(f), *f])) + "\n" for f in faces]
    return "".join(lines).encode()


def array(content, save=np.save, **more):
    file = io.BytesIO()
    save(file, content, **more)
    return file.getvalue()


def pcd(points, kind, block=b""):
    header = ("# .PCD v0.7\nVERSION 0.7\nFIELDS rgb x y z\nSIZE 4 4 4 4\nTYPE U F F F\n"
              f"COUNT 1 1 1 1\nWIDTH {len(points)}\nHEIGHT 1\nVIEWPOINT 0 0 0 1 0 0 0\n"
              f"POINTS {len(points)}\nDATA {kind}\n")
    return header.encode() + block


def pcd_rows(points):
    rows = np.zeros(len(points), [("rgb", "u4"), ("xyz", "f4", 3)])
    rows["xyz"] = points
    return rows


def pcd_columns(points):
    """One LZF block whose bytes are all written out: runs of at most 32."""
    data = bytes(4 * len(points)) + np.ascontiguousarray(points.T).tobytes()
    runs = [data[i:i + 32] for i in range(0, len(data), 32)]
    packed = b"".join(bytes([len(run) - 1]) + run for run in runs)
    return struct.pack("<II", len(packed), len(data)) + packed


def ply(points):
    head = (f"ply\nformat binary_little_endian 1.0\nelement vertex {len(points)}\n"
            "property float x\nproperty float y\nproperty float z\nend_header\n")
    return head.encode() + points.astype("<f4").tobytes()


def ply_mesh(vertices, faces, kind="text", name="vertex_indices", newline="\n"):
    """A mesh as `text`, `little` or `big` PLY, with remarks and elements that nobody asks for."""
    order = {"text": "<", "little": "<", "big": ">"}[kind]
    form = {"text": "ascii", "little": "binary_little_endian", "big": "binary_big_endian"}[kind]
    head = ["ply", f"format {form} 1.0", "comment fait à la main",
            f"element vertex {len(vertices)}", "property float x", "property double y",
            "property float z", "obj_info none",
            "property list uchar int seen_by", f"element face {len(faces)}",
            f"property list uchar int {name}", "element camera 1", "property float view_px",
            "end_header"]
    body = b""
    for x, y, z in vertices:
        row = [np.array(x, order + "f4"), np.array(y, order + "f8"), np.array(z, order + "f4"),
               np.array(2, "u1"), np.array([7, 9], order + "i4")]
        text = f"{float(x)!r} {float(y)!r} {float(z)!r} 2 7 9{newline}".encode()
        body += text if kind == "text" else b"".join(part.tobytes() for part in row)
    for face in faces:
        row = np.array(len(face), "u1").tobytes() + np.array(face, order + "i4").tobytes()
        text = " ".join(map(str, [len(face), *face])) + newline
        body += text.encode() if kind == "text" else row
    camera = b"1.5" + newline.encode() if kind == "text" else np.array(1.5, order + "f4").tobytes()
    return (newline.join(head) + newline).encode() + body + camera


def area(xyz, faces):
    corners = xyz[faces]
    return np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]),
                          axis=1).sum() / 2


CLOUD = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
TEXT = "\n".join(" ".join(map(repr, map(float, p))) for p in CLOUD)


def shapes(n, points=128, seed=0):
    """Clouds that anything can tell apart: balls, cubes, sticks. -> {class: (n, points, 3)}."""
    rng = np.random.default_rng(seed)
    ball = rng.normal(size=(n, points, 3))
    stick = rng.uniform(-1, 1, (n, points, 3)) * [0.1, 0.1, 1]
    return {"ball": ball / np.linalg.norm(ball, axis=2, keepdims=True),
            "cube": rng.uniform(-1, 1, (n, points, 3)), "stick": stick}


# --- one object

@pytest.mark.parametrize("suffix, blob", [
    (".npy", array(CLOUD)),
    (".npy", array(np.c_[CLOUD, np.zeros((50, 3))].astype(np.float64))),
    (".npz", array(np.zeros(2), np.savez, points=CLOUD)),
    (".xyz", TEXT.encode()),
    (".txt", ("# a remark\n" + TEXT.replace(" ", ",")).encode()),
    (".csv", ("x;y;z\n" + TEXT.replace(" ", ";")).encode()),
    (".ply", ply(CLOUD)),
    (".ply", ply_mesh(CLOUD, [], "big")),
    (".pcd", pcd(CLOUD, "ascii", ("0 " + TEXT.replace("\n", "\n0 ")).encode())),
    (".pcd", pcd(CLOUD, "binary", pcd_rows(CLOUD).tobytes())),
    (".pcd", pcd(CLOUD, "binary_compressed", pcd_columns(CLOUD))),
])
def test_a_cloud_is_read_as_it_is_from_every_format(suffix, blob):
    xyz, faces = read_object(blob, suffix)
    assert faces is None and xyz.dtype == np.float32
    np.testing.assert_allclose(xyz, CLOUD, rtol=1e-6)


def test_lzf_copies_what_it_wrote_even_where_the_copy_overlaps_itself():
    # 'ab', then 7 bytes from 2 back: abababab + a; then a long copy, 7 + 3 + 2 = 12 from 9 back
    packed = bytes([1]) + b"ab" + bytes([5 << 5, 1]) + bytes([7 << 5, 3, 8])
    assert files.lzf(packed, 21) == b"ababababa" + b"ababababaaba"


@pytest.mark.parametrize("suffix, blob", [
    (".off", off()),
    (".off", off(header="OFF{} {} 0\n")),                            # ModelNet's glued header
    (".off", b"# made by hand\n" + off().replace(b"OFF\n", b"OFF\n\n# counts\n")),
    (".obj", ("".join("v {} {} {}\n".format(*v) for v in CUBE) + "".join(
        "f " + " ".join(f"{i + 1}//1" for i in f) + "\n" for f in FACES) + "vn 0 0 1\n").encode()),
    (".ply", ply_mesh(CUBE, FACES, "little")),
    (".ply", ply_mesh(CUBE, MIXED, "big")),
])
def test_a_mesh_keeps_its_surface_and_is_sampled_on_it(suffix, blob, tmp_path):
    xyz, faces = read_object(blob, suffix)                           # polygons became triangles
    assert len(faces) == 12 and area(xyz, faces) == pytest.approx(6)
    (tmp_path / f"cube{suffix}").write_bytes(blob)
    source = objects.Source("c/cube", 0, str(tmp_path / f"cube{suffix}"))
    points, count = objects.sample(source, 600)
    assert points.shape == (600, 3) and count == 600
    assert np.isclose(np.abs(points - 0.5).max(1), 0.5, atol=1e-6).all()


@pytest.mark.parametrize("name, blob, words", [
    ("cut.off", off()[:-25], "cut short"),
    ("lines.off", b"\n".join(off().split(b"\n")[:-4]), "cut short"),
    ("noface.off", off(faces=[]), "no faces"),
    ("flat.off", off(faces=[[0, 0, 1], [2, 2, 2]]), "area"),
    ("nan.off", off(np.where(CUBE == 1, np.nan, CUBE)), "NaN"),
    ("far.off", off(faces=[[0, 1, 99]]), "outside the range|names vertex 99"),
    ("words.off", b"OFF\nnot a mesh\n", "words.off"),
    ("head.off", b"OFF\n# and that is all\n", "does not say how many vertices"),
    ("short.off", off().replace(b"0.0 1.0 0.0", b"0.0 1.0"), "vertex 2 has no x y z"),
    ("minus.off", off(faces=[[0, 1, -2]]), "a face names vertex -2, but there are 8"),
    ("cut.ply", ply(CLOUD)[:-100], "cut.ply: cut short"),
    ("far.ply", ply_mesh(CUBE, [[0, 1, 99]]), "names vertex 99"),
    ("cut.npy", array(CLOUD)[:-100], "cut.npy"),
    ("object.npy", array(np.array([{}], dtype=object), allow_pickle=True), "holds object, expect"),
    ("flat.npy", array(CLOUD[:, :2]), r"rows of x y z, found float32 of shape \(50, 2\)"),
    ("two.npz", array(CLOUD, np.savez, a=CLOUD), "has the arrays a, arr_0; call the points xyz"),
    ("nan.npy", array(np.where(CLOUD > 1, np.nan, CLOUD)), "of 50 points are NaN"),
    ("same.npy", array(np.zeros((50, 3))), "coincide"),
    ("huge.npy", array(CLOUD * 1e30), "has coordinates too large to be meant"),
    ("one.npy", array(np.where(CLOUD == CLOUD.max(), 1e30, CLOUD)), "too large to be meant"),
    ("empty.xyz", b"", "empty.xyz"),
    ("cut.pcd", pcd(CLOUD, "binary", pcd_rows(CLOUD).tobytes()[:-9]), "cut.pcd"),
    ("cut2.pcd", pcd(CLOUD, "binary_compressed", pcd_columns(CLOUD)[:-9]), "cut2.pcd"),
    ("head.pcd", b"VERSION 0.7\nFIELDS x y", "head.pcd"),
])
def test_a_broken_file_is_named_in_one_line(tmp_path, name, blob, words):
    (tmp_path / name).write_bytes(blob)
    with pytest.raises(BrokenFile, match=words) as error:
        objects.read_one(tmp_path / name, 32, 1)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)
    assert isinstance(error.value, InputError)


def test_a_pickle_holds_arrays_or_is_refused(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)
    (tmp_path / "good").write_bytes(pickle.dumps({"a": [CLOUD]}))
    np.testing.assert_array_equal(files.read_pickle(tmp_path / "good")["a"][0], CLOUD)
    for blob in (pickle.dumps(Hostile()), b"cnumpy.testing._private.utils\nruncode\n."):
        (tmp_path / "bad").write_bytes(blob)
        with pytest.raises(pickle.UnpicklingError, match="which is not a numpy array"):
            files.read_pickle(tmp_path / "bad")
    assert not (tmp_path / "ran").exists()


# --- text

POINTS = [[0.024, 1.5, 2], [-0.5, 7, -1.25], [3, 0.001, 40]]
ROWS = ["0.024 1.5 2", "-0.5 7 -1.25", "3 1e-3 40"]


def rows(divider=" ", more="", first="", last=""):
    return first + "\n".join(row.replace(" ", divider) + more for row in ROWS) + last


@pytest.mark.parametrize("text", [
    rows(), rows(", "), rows(";"), rows("\t"), rows(" ; "), rows(",", more=","),
    rows(last="\r\n\r\n"), rows(first="\ufeff"), rows(",", first="\ufeffx,y,z\n"),
    rows(more=" # why"), rows(first="# a remark\n\n// another, 1 2 3\n"), rows(last="\n# the end"),
    rows().replace(".", ","), rows(";").replace(".", ","), rows("\t").replace(".", ","),
    rows("; ", more="; 7,5").replace(".", ","), rows(",", last="\n,,\n , ,"),
    rows(first="a scan\n"), rows(first="the first scan of today\n"),
    rows(first="3\n"), rows(" ", more=" 9 8 7 6", first="3\n"), rows(first="3\nx y z\n"),
    rows(",", more=",house", first="x,y,z,what\n"), rows(more=" 0 1 0", first="x y z nx ny nz\n"),
    rows(",", more=",1,2,3", first="//X,Y,Z,R,G,B\n"),
    rows(";", first='"X [m]"; "Y [m]"; "Z (m)"\n'), rows("\t", first="X [m]\tY [m]\tZ [m]\n"),
])
def test_a_text_is_read_whatever_divides_its_columns(text):
    xyz, faces = read_object(text.encode(), ".xyz")
    assert faces is None and xyz.tolist() == np.float32(POINTS).tolist()
    wide = text.lstrip("\ufeff").encode("utf-16")           # which has a mark of its own
    assert read_object(wide, ".csv")[0].tolist() == xyz.tolist()


@pytest.mark.parametrize("heading, columns", [
    ("nx ny nz x y z", "0 0 1 {} {} {}"), ("name,x,y,z", "nan-1,{},{},{}"),
    ("z;Y;x", "{2};{1};{0}"), ('"","X","intensity","Z","Y"', '"1",{0},9,{2},{1}'),
    ("# z y x", "{2} {1} {0}"), ("Index\tX [m]\tY [m]\tZ [m]", "7\t{}\t{}\t{}"),
])
def test_a_heading_chooses_the_columns(heading, columns):
    text = "\n".join([heading, *(columns.format(*point) for point in POINTS)])
    xyz, _ = read_object(text.encode(), ".txt")
    assert xyz.tolist() == np.float32(POINTS).tolist()


@pytest.mark.parametrize("text, words", [
    (rows(",").replace(".", ","), "decimal commas; save with points|line 2 has|line 3 has"),
    ("0,024,1,5,0,2\n1,5,2,75,-0,5", "decimal commas; save with points"),
    ("1,024,1,5,0,2,255,0,0\n1,5,2,75,3,5,0,9,0", "decimal commas; save with points"),
    ("1.234,5;1,5;2", "line 1 is '1.234,5;1,5;2'"),
    (rows(last="\n1 2"), "line 4 has 2 columns, line 1 has 3"),
    (rows(last="\n\n1 2 3 4"), "line 5 has 4 columns"),
    (rows(last="\nhallo"), "line 4 has 1 columns"),
    (rows(last="\n1 two 3"), "line 4 is '1 two 3'"),
    (rows(first="1,5x 2 3\n"), "line 1 is|line 2"),
    (rows(",", last="\n1,,3"), "line 4 is '1,,3'"),
    (rows(first="4\n"), "line 1 promises 4 rows, found 3"),
    (rows(first="east north up\n"), "its heading, line 1, does not name x, y and z once each"),
    (rows(first="x y z x\n"), "does not name|heading names"),
    (rows(more=" 1", first="x y z\n"), "its heading names 3 columns, line 2 has 4"),
    ("1\n2\n3", "promises 1 rows"), ("1 2\n3 4", "found 2 columns"), ("x y z\n", "no rows"),
    (rows(last="\nnan nan nan"), "1 of 4 points are NaN or infinite"),
    (rows(last="\n1 -inf 2\ninf 1 2\nInfinity 1 2\nNaN 1 2"), "4 of 7 points are NaN or infinite"),
    (rows(first="inf 0 0\n-inf 0 0\nnan 0 0\n"), "3 of 6 points are NaN or infinite"),
    (rows(first="P1 1 2 3\n", more=" 4"), "its heading, line 1, does not name"),
])
def test_a_text_that_cannot_be_read_rightly_is_explained(text, words):
    with pytest.raises(ValueError, match=words) as error:
        read_object(text.encode(), ".csv")
    assert "\n" not in str(error.value)


def test_marks_before_a_text_are_no_part_of_it(tmp_path):
    mark = b"\xef\xbb\xbf"
    for suffix, blob in ((".off", off()), (".ply", ply_mesh(CUBE, FACES)),
                         (".obj", b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")):
        one, two = read_object(blob, suffix), read_object(mark + blob, suffix)
        assert all((a == b).all() for a, b in zip(one, two))
    (tmp_path / "a.json").write_bytes(
        mark + b'[{"class": "bed", "center": [0, 0, 0], "size": [1, 1, 1]}]')
    assert read_boxes(tmp_path / "a.json")[0] == ["bed"]
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "a.npy").touch()
    (tmp_path / "classes.txt").write_bytes(mark + "floor\r\nстол\r\n".encode())
    assert files.own_clouds(tmp_path, ("train", "test"), "")[2] == ("floor", "стол")
    assert absent({0}, ("floor", "стол"), 0) == (
        "warning  no training point is labelled стол; a label is a line of classes.txt, counted "
        "from 0")
    assert absent({0, 1, -1}, ("floor", "стол"), 0) == ""
    (tmp_path / "classes.txt").write_bytes(b"floor\n\nwall\n\n")
    with pytest.raises(InputError, match="classes.txt: line 2 is blank; a label is the number"):
        files.own_clouds(tmp_path, ("train", "test"), "")
    (tmp_path / "classes.txt").write_bytes("Stühle".encode("latin-1"))
    with pytest.raises(InputError, match="classes.txt: is not UTF-8"):
        files.own_clouds(tmp_path, ("train", "test"), "")


# --- meshes that trimesh does not read rightly

CORNERS = [[0, 0], [2, 0], [2, 1], [1, 1], [1, 2], [0, 2]]                      # an L of area 3
COMB = [[0, 0], [5, 0], [5, 3], [4, 3], [4, 1], [3, 1], [3, 3], [2, 3], [2, 1], [1, 1], [1, 3],
        [0, 3]]                                                                 # area 11


def plate(corners, shift=0, order=1, scale=1):
    """A polygon that stands askew in space, its corners counted from `shift`, in either order."""
    flat = scale * np.roll(np.array(corners, float), shift, 0)[::order]
    u, v = np.array([2, 1, 2]) / 3, np.array([-2, 2, 1]) / 3
    return flat @ [u, v] + (5, -3, 1)


def mesh_file(vertices, faces, suffix):
    if suffix == ".obj":
        lines = ["v {!r} {!r} {!r}".format(*map(float, v)) for v in vertices]
        return "\n".join(lines + ["f " + " ".join(str(i + 1) for i in f) for f in faces]).encode()
    return off(vertices, faces) if suffix == ".off" else ply_mesh(vertices, faces, "little")


@pytest.mark.parametrize("suffix", [".obj", ".off", ".ply"])
@pytest.mark.parametrize("corners, covered", [
    (CORNERS, 3), (COMB, 11), ([[0, 0], [4, 0], [1, 1], [0, 4]], 4),
    ([[0, 0], [1, 0], [2, 0], [2, 1], [1, 1], [1, 2], [0, 2], [0, 1]], 3),      # flat corners
])
def test_a_polygon_that_is_not_convex_is_covered_once(corners, covered, suffix):
    for shift in range(len(corners)):
        for order in (1, -1):
            vertices = plate(corners, shift, order)
            blob = mesh_file(vertices, [list(range(len(corners)))], suffix)
            xyz, faces = read_object(blob, suffix)
            assert area(xyz, faces) == pytest.approx(covered, rel=1e-5)
            a, b, c = xyz[faces].transpose(1, 0, 2)
            normals = np.cross(b - a, c - a)
            assert (normals @ normals.sum(0) >= -1e-3).all(), "no triangle is turned over"


def test_polygons_of_any_size_and_with_a_hole_are_covered_once():
    hole = [[0, 0], [4, 0], [4, 4], [0, 4], [0, 0], [1, 1], [1, 3], [3, 3], [3, 1], [1, 1]]
    teeth = [[x, y] for x in range(30) for y in ([.01, 3] if x % 2 else [3, .01])]
    for corners, covered in ((hole, 12), ([[0, 0], [29, 0], *teeth[::-1]], None)):
        whole = plate(corners)
        covered = covered or np.linalg.norm(np.cross(whole, np.roll(whole, -1, 0)).sum(0)) / 2
        for scale in (1e-3, 1, 1e3):
            for shift in range(0, len(corners), 3):
                vertices = plate(corners, shift, 1, scale)
                faces = meshes.triangles_of([list(range(len(corners)))], vertices)
                assert area(vertices, faces) == pytest.approx(covered * scale ** 2, rel=1e-6)


def test_other_polygons_keep_trimeshs_triangles_and_their_order():
    from trimesh.geometry import triangulate_quads
    vertices = np.concatenate([plate(CORNERS), CUBE + 9])
    cube = [[i + 6 for i in face] for face in MIXED]
    faces = [list(range(6))[2:] + [0, 1], *cube]            # from this corner, a fan is wrong
    got = meshes.triangles_of(faces, vertices)
    np.testing.assert_array_equal(got[:-4], triangulate_quads(cube))
    assert area(vertices, got) == pytest.approx(9)
    with pytest.raises(ValueError, match="a face of 5 corners crosses itself"):
        meshes.triangles_of([[0, 1, 2, 3, 4]], plate([[0, 0], [4, 0], [1, 3], [2, -2], [4, 3]]))


@pytest.mark.parametrize("header", ["OFF", "COFF", "NOFF", "CNOFF", "STOFF", "STCNOFF",
                                    "# not OFF yet\n\nOFF # it is now"])
def test_off_and_its_relatives_are_read(header):
    more = {"C": " .1 .2 .3 1", "N": " 0 0 1", "ST": " .5 .5"}
    kind = header.partition("#")[0].partition("OFF")[0]
    more = "".join(numbers for key, numbers in more.items() if key in kind)
    lines = [header, "8 6 0", *("{} {} {}".format(*v) + more for v in CUBE),
             *("4 {} {} {} {} 255 0 0".format(*f) for f in FACES)]
    xyz, faces = read_object("\n".join(lines).encode(), ".off")
    np.testing.assert_array_equal(xyz, CUBE)
    np.testing.assert_array_equal(faces, read_object(off(), ".off")[1])


@pytest.mark.parametrize("header", ["4OFF", "nOFF", "OFF BINARY", "8 6 0", "PLY"])
def test_what_is_called_off_and_is_not_is_named(header):
    with pytest.raises(ValueError, match=f"begins with '{header}"):
        read_object(off().replace(b"OFF", header.encode()), ".off")


def test_an_obj_is_read_with_tabs_indents_remarks_and_relative_numbers():
    square = read_object(b"v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nf 1 2 3 4\n", ".obj")
    for text in ("\tv 0 0 0\n v\t1 0 0\nv  1 1 0 1.0\nv 0 1\t0\nf\t1 2 3\t4\n",
                 "v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nf -4 -3 -2 -1\nv 9 9 9\n",
                 "# h\xe4user\no d\xe4cher\nv 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nf 1 2 3 \\\n 4\n",
                 "v 0 0 0 1 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nvt 0 0\nf 1/1 2/1 3/1 4/-1 # a\n"):
        xyz, faces = read_object(text.encode("latin-1"), ".obj")
        np.testing.assert_array_equal(xyz[faces], square[0][square[1]])
    for text, words in (("f 1 2 9", "vertex 9, but there are 4"), ("f 0 1 2", "vertex 0,"),
                        ("f -9 1 2", "vertex -4,"), ("v 1 2", "vertex 4 has no x y z"),
                        ("v 1 2 drei", "could not convert string to float: 'drei'")):
        with pytest.raises(ValueError, match=words):
            read_object(("v 0 0 0\n" * 4 + text + "\nf 1 2 3").encode(), ".obj")


def test_an_obj_of_several_materials_is_sampled_as_before():
    trimesh = pytest.importorskip("trimesh")
    lines = ["mtllib a.mtl", *("v {} {} {}".format(*v) for v in CUBE), "vt 0 0", "vn 0 0 1"]
    for i, face in enumerate(MIXED):
        lines += [f"usemtl {'ab'[i % 2]}", "f " + " ".join(f"{k + 1}/1/1" for k in face)]
    blob = "\n".join(lines).encode()
    mesh = trimesh.load(io.BytesIO(blob), file_type="obj", process=False, skip_materials=True)
    if isinstance(mesh, trimesh.Scene):
        mesh = trimesh.util.concatenate(list(mesh.geometry.values()))
    xyz, faces = read_object(blob, ".obj")
    np.testing.assert_array_equal(xyz[faces], mesh.vertices[mesh.faces])


def stl(faces=FACES):
    table = np.zeros(2 * len(faces), [("n", "<f4", 3), ("xyz", "<f4", (3, 3)), ("more", "<u2")])
    table["xyz"] = CUBE[[f[:3] for f in faces] + [[f[0], f[2], f[3]] for f in faces]]
    text = "solid a b\n" + "".join(
        "facet normal 0 0 0\nouter loop\n" + "".join("vertex {} {} {}\n".format(*v) for v in t)
        + "endloop\nendfacet\n" for t in table["xyz"]) + "endsolid a b\n"
    return b"solid by a program".ljust(80) + struct.pack("<I", len(table)) + table.tobytes(), text


def test_an_stl_may_have_bytes_behind_it_but_none_too_few():
    binary, text = stl()
    for blob in (binary, binary + b"\0" * 7, binary + b"made by hand", text.encode(),
                 text.upper().encode(), ("\ufeff" + text).encode()):
        xyz, faces = read_object(blob, ".stl")
        assert len(faces) == 12 and area(xyz, faces) == pytest.approx(6)
    for blob in (binary[:-1], binary[:300], text.encode()[:-30], text.encode() * 2 + b"x" +
                 text.encode()[:200]):
        with pytest.raises(ValueError, match="cut short"):
            read_object(blob, ".stl")


# --- PLY

@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("name", ["vertex_indices", "vertex_index"])
@pytest.mark.parametrize("faces", [FACES, MIXED, [f[:3] for f in FACES], MIXED + [[0, 1, 3, 7, 5]]])
@pytest.mark.parametrize("kind", ["text", "little", "big"])
def test_a_ply_says_the_same_as_text_and_in_both_byte_orders(kind, faces, name, newline):
    from trimesh.geometry import triangulate_quads
    vertices, _ = read_ply(ply_mesh(CUBE * 1.1, faces, kind, name, newline))
    _, triangles = read_object(ply_mesh(CUBE * 1.1, faces, kind, name, newline), ".ply")
    xyz = files.columns(vertices, "x", "y", "z")
    np.testing.assert_array_equal(xyz, (CUBE * 1.1).astype(np.float32))
    np.testing.assert_array_equal(triangles, triangulate_quads(faces))
    assert triangles.dtype == np.int64
    again, none = read_ply(ply_mesh(CUBE * 1.1, faces, kind, name, newline), faces=False)
    assert none is None and again["y"].tobytes() == vertices["y"].tobytes()


def test_a_ply_is_sampled_as_trimesh_had_read_it():
    trimesh = pytest.importorskip("trimesh")
    for blob in (ply_mesh(CUBE, MIXED), ply_mesh(CUBE, FACES),
                 trimesh.creation.icosphere(2).export(file_type="ply"),
                 trimesh.creation.icosphere(2).export(file_type="ply", encoding="ascii")):
        mesh = trimesh.load(io.BytesIO(blob), file_type="ply", process=False)
        xyz, faces = read_object(blob, ".ply")
        np.testing.assert_array_equal(xyz, mesh.vertices.astype(np.float32))
        np.testing.assert_array_equal(faces, mesh.faces)


def test_a_ply_keeps_every_property_and_does_not_need_its_faces():
    table = np.zeros(50, [("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("red", "u1"),
                          ("label", "<i2")])
    table["x"] = CLOUD[:, 0]
    table["label"] = -3
    head = ("ply\nformat binary_little_endian 1.0\nelement vertex 50\nproperty float x\n"
            "property float y\nproperty float z\nproperty uint8 red\nproperty short label\n"
            "element face 1\nproperty list uchar int vertex_indices\nend_header\n")
    vertices, faces = read_ply(head.encode() + table.tobytes() + b"\3", faces=False)    # cut there
    assert vertices.tobytes() == table.tobytes() and faces is None
    with pytest.raises(ValueError, match="cut short"):
        read_ply(head.encode() + table.tobytes() + b"\3")


@pytest.mark.parametrize("change, words", [
    (lambda b: b.replace(b"property float x\n", b"\nproperty float x\n"), "blank line"),
    (lambda b: b.replace(b"property float x", b"property float u"), "no vertices with x, y and z"),
    (lambda b: b.replace(b"property float x", b"property floating x"), "floating"),
    (lambda b: b.replace(b"vertex 50", b"vertex 0"), "no points"),
    (lambda b: b.replace(b"vertex 50", b"vertex many"), "the line 'element vertex many'"),
    (lambda b: b.replace(b"vertex 50", b"corner 50"), "no vertices"),
    (lambda b: b.replace(b"ply\n", b"solid\n"), "not a PLY file"),
    (lambda b: b[:60], "cut short in its header"),
    (lambda b: b[:-1], "cut short"),
    (lambda b: b.replace(b"binary_little_endian", b"ascii"), "."),
    (lambda b: b.replace(b"binary_little_endian", b"sideways"), "the line 'format sideways 1.0'"),
])
def test_what_is_wrong_with_a_ply_is_one_sentence(change, words):
    with pytest.raises(ValueError, match=words) as error:
        read_ply(change(ply(CLOUD)))
    assert str(error.value)


def test_a_mesh_in_ply_is_never_taken_for_a_cloud():
    for name in ("vertex_indexes", "edges"):
        with pytest.raises(ValueError, match="its faces are not lists of vertex_indices"):
            read_ply(ply_mesh(CUBE, FACES, "little", name))
    strips = ply(CLOUD).replace(b"end_header", b"element tristrips 1\nproperty list int int "
                                b"vertex_indices\nend_header") + struct.pack("<4i", 3, 0, 1, 2)
    with pytest.raises(ValueError, match="its faces are not lists"):
        read_object(strips, ".ply")


def test_what_is_written_as_ply_is_read_again(tmp_path):
    rgb = np.arange(150).reshape(50, 3).astype(np.uint8)
    files.write_ply(tmp_path / "a.ply", CLOUD, rgb, np.array([[0, 1, 2], [3, 4, 49]]))
    vertices, faces = read_ply((tmp_path / "a.ply").read_bytes())
    np.testing.assert_array_equal(files.columns(vertices, "x", "y", "z"), CLOUD)
    np.testing.assert_array_equal(files.columns(vertices, "red", "green", "blue"), rgb)
    assert faces.tolist() == [[0, 1, 2], [3, 4, 49]]
    files.write_ply(tmp_path / "b.ply", CLOUD, None, np.zeros((0, 3), np.int64))
    assert read_ply((tmp_path / "b.ply").read_bytes())[1] is None


def test_the_edges_of_a_box_bound_it():
    box = np.array([1, 2, 3, .5, 1, 2])
    vertices, faces = files.box_edges(box)
    assert vertices.shape == (96, 3) and faces.shape == (144, 3) and faces.max() == 95
    np.testing.assert_allclose(vertices.min(0), box[:3] - box[3:] / 2 - .0075)
    np.testing.assert_allclose(vertices.max(0), box[:3] + box[3:] / 2 + .0075)


# --- rooms

TABLE = np.c_[CLOUD, np.arange(150).reshape(50, 3), np.arange(50) % 14 - 1]     # x y z r g b label


def room_ply(table=TABLE):
    kinds = {"x": "float", "y": "float", "z": "float", "red": "uchar", "green": "uchar",
             "blue": "uchar", "label": "int"}
    head = "".join(f"property {kind} {name}\n" for name, kind in kinds.items())
    rows = np.empty(len(table), [(n, {"float": "<f4", "uchar": "u1", "int": "<i4"}[k])
                                 for n, k in kinds.items()])
    for name, column in zip(rows.dtype.names, table.T):
        rows[name] = column
    head = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(table)}\n{head}end_header\n"
    return head.encode() + rows.tobytes()


@pytest.mark.parametrize("name, blob", [
    ("a.npy", array(TABLE)),
    ("a.npz", array(np.zeros(2), np.savez, xyz=CLOUD, rgb=TABLE[:, 3:6] / 255, label=TABLE[:, 6])),
    ("a.ply", room_ply()),
    ("crlf.ply", room_ply().replace(b"\n", b"\r\n", 11)),
])
def test_own_clouds_are_read_with_colours_in_either_scale(tmp_path, name, blob):
    (tmp_path / name).write_bytes(blob)
    cloud = read_cloud(tmp_path / name, classes=13)
    assert [x.dtype for x in cloud[:3]] == [np.float32, np.uint8, np.int64]
    np.testing.assert_array_equal(cloud.xyz, CLOUD)
    np.testing.assert_array_equal(cloud.rgb, TABLE[:, 3:6])
    np.testing.assert_array_equal(cloud.label, TABLE[:, 6])
    assert cloud.instance is cloud.boxes is None
    bare = read_cloud(tmp_path / name, colours=False)
    assert bare.label is bare.rgb is None and bare.xyz.tobytes() == cloud.xyz.tobytes()


def test_without_classes_any_columns_will_do_and_labels_are_not_read(tmp_path):
    for columns in (3, 4, 5, 6, 7, 8, 12):
        np.save(tmp_path / "a.npy", np.tile(TABLE, 2)[:, :columns] + 1)
        cloud = read_cloud(tmp_path / "a.npy")
        assert cloud.label is None and (cloud.rgb is not None) == (columns in (6, 7))
        np.testing.assert_array_equal(cloud.xyz, CLOUD + 1)
    np.save(tmp_path / "a.npy", np.c_[CLOUD, -CLOUD])                   # normals, not colours
    assert len(read_cloud(tmp_path / "a.npy", colours=False).xyz) == 50
    with pytest.raises(BrokenFile, match="colours outside 0..255"):
        read_cloud(tmp_path / "a.npy")


def test_the_prepared_form_holds_all_that_a_cloud_has(tmp_path):
    boxes = np.array([[1, 2, 3, 1, 1, 1, 5]])
    np.savez(tmp_path / "a.npz", xyz=CLOUD, rgb=TABLE[:, 3:6].astype(np.uint8), boxes=boxes,
             label=np.full(50, 40, np.int16), instance=np.arange(50, dtype=np.int32))
    cloud = read_cloud(tmp_path / "a.npz", classes=41)
    assert [x.dtype for x in cloud] == [np.float32, np.uint8, np.int64, np.int64, np.float32,
                                        np.float64]
    assert cloud.boxes.tolist() == boxes.tolist() and set(cloud.label) == {40}
    for bad in (boxes[:, :6], np.full((1, 7), np.nan)):
        np.savez(tmp_path / "a.npz", xyz=CLOUD, boxes=bad)
        with pytest.raises(BrokenFile, match="in its boxes"):
            read_cloud(tmp_path / "a.npz")


@pytest.mark.parametrize("rgb, expected", [
    (np.float32([[0, .5, 1.0000001]]), [[0, 128, 255]]),
    (np.float64([[1.003, .2, 0]]), [[255, 51, 0]]),
    (np.float32([[1.2, 0, 0]]), [[1, 0, 0]]),
    (np.uint8([[1, 0, 1]]), [[1, 0, 1]]),                   # whole numbers are never 0..1
    (np.int64([[1, 0, 0]]), [[1, 0, 0]]),
    (np.uint16([[255, 1, 0]]), [[255, 1, 0]]),
])
def test_colours_are_in_either_scale(rgb, expected, tmp_path):
    assert files.as_bytes(rgb).tolist() == expected
    names = {"f4": "float", "f8": "double", "u1": "uchar", "u2": "ushort"}
    if rgb.dtype.str[1:] in names:                          # a PLY, too
        table = np.zeros(1, [(n, "<f4") for n in "xyz"] + [
            (n, rgb.dtype) for n in ("red", "green", "blue")])
        table["red"], table["green"], table["blue"] = rgb.T
        head = "".join(f"property {names[table.dtype[n].str[1:]]} {n}\n" for n in table.dtype.names)
        head = f"ply\nformat binary_little_endian 1.0\nelement vertex 1\n{head}end_header\n"
        (tmp_path / "a.ply").write_bytes(head.encode() + table.tobytes())
        assert read_cloud(tmp_path / "a.ply").rgb.tolist() == expected
    with pytest.raises(ValueError, match="outside 0..255"):
        files.as_bytes(np.uint16([[256, 0, 0]]))


# --- far from the origin

UTM = np.array([[431_234.567, 5_411_111.222, 312.5], [431_236.125, 5_411_113.001, 310.25]])


def test_a_cloud_far_from_the_origin_keeps_its_digits(tmp_path):
    text = "\n".join("{!r} {!r} {!r}".format(*map(float, p)) for p in UTM)
    head = ("ply\nformat {} 1.0\nelement vertex 2\nproperty {kind} x\nproperty {kind} y\n"
            "property {kind} z\nend_header\n")
    binary = head.format("binary_little_endian", kind="double").encode() + UTM.tobytes()
    written = {"a.npy": array(UTM), "a.npz": array(np.zeros(2), np.savez, xyz=UTM), "a.PLY": binary,
               "b.ply": (head.format("ascii", kind="float") + text).encode()}
    for name, blob in written.items():
        (tmp_path / name).write_bytes(blob)
        cloud = read_cloud(tmp_path / name)
        assert cloud.xyz.dtype == np.float32 and cloud.offset.dtype == np.float64
        assert cloud.offset.tolist() == [431_234, 5_411_111, 310]
        np.testing.assert_allclose(cloud.xyz + cloud.offset, UTM, rtol=0, atol=1e-6)
    for suffix, blob in ((".ply", binary), (".xyz", text.encode()), (".npy", array(UTM))):
        xyz, _ = read_object(blob, suffix)
        np.testing.assert_allclose(xyz[1] - xyz[0], UTM[1] - UTM[0], atol=1e-6)
    for near in (CLOUD, CLOUD * 1000 + 5000):
        np.save(tmp_path / "a.npy", near)
        cloud = read_cloud(tmp_path / "a.npy")
        assert cloud.offset.tolist() == [0, 0, 0] and cloud.xyz.tobytes() == near.tobytes()
    np.save(tmp_path / "a.npy", UTM * 1e200)
    with pytest.raises(BrokenFile, match="too large"):
        read_cloud(tmp_path / "a.npy")


def test_boxes_move_with_their_cloud_and_a_prepared_offset_is_kept(tmp_path):
    box = [[*UTM[0], 1, 2, 3, 5]]
    np.savez(tmp_path / "a.npz", xyz=UTM, boxes=box)
    cloud = read_cloud(tmp_path / "a.npz")
    np.testing.assert_allclose(cloud.boxes, [[.567, .222, 2.5, 1, 2, 3, 5]], atol=1e-6)
    np.savez(tmp_path / "b.npz", xyz=cloud.xyz, boxes=cloud.boxes, offset=cloud.offset)
    again = read_cloud(tmp_path / "b.npz")
    assert all(a is b is None or (a == b).all() for a, b in zip(cloud, again))
    content = [{"class": "bed", "center": UTM[0].tolist(), "size": [1, 2, 3]}]
    (tmp_path / "a.json").write_text(json.dumps(content), encoding="utf-8")
    _, boxes = read_boxes(tmp_path / "a.json", cloud.offset)
    np.testing.assert_array_equal(boxes, cloud.boxes[:, :6])


@pytest.mark.parametrize("change, words", [
    (lambda t: t[:, :6], r"shape \(50, 6\)"),
    (lambda t: t[:, 0], r"shape \(50,\)"),
    (lambda t: np.where(np.arange(7) == 6, 13, t),
     "the label 13; labels are whole numbers from 0 to 12"),
    (lambda t: np.where(np.arange(7) == 6, -2, t), "the label -2"),
    (lambda t: np.where(np.arange(7) == 6, .5, t), "the label 0.5"),
    (lambda t: np.where(np.arange(7) == 6, np.nan, t), "the label nan"),
    (lambda t: np.where(np.arange(7) == 0, np.nan, t), "NaN coordinates"),
    (lambda t: np.where(np.arange(7) == 3, 300, t), "colours outside 0..255"),
    (lambda t: t[:0], "no points"),
    (None, "repair it"),                                                # the file is cut short
])
def test_bad_clouds_are_named(tmp_path, change, words):
    np.save(tmp_path / "room0.npy", TABLE)
    if change:
        np.save(tmp_path / "room0.npy", change(TABLE))
    else:
        (tmp_path / "room0.npy").write_bytes((tmp_path / "room0.npy").read_bytes()[:500])
    with pytest.raises(BrokenFile, match=words) as error:
        read_cloud(tmp_path / "room0.npy", classes=13)
    assert "room0.npy" in str(error.value) and "\n" not in str(error.value)
    assert "skip" not in str(error.value) and str(error.value).endswith("repair it")


def test_arrays_of_a_room_are_equally_long_and_there(tmp_path):
    for arrays, words in (({"xyz": CLOUD}, "no label"), ({"label": CLOUD}, "no xyz"),
                          ({"xyz": CLOUD, "label": np.zeros(9)}, "has 50 points, 9 labels"),
                          ({"xyz": CLOUD[:, :2], "label": np.zeros(50)}, r"shape \(50, 2\)")):
        np.savez(tmp_path / "a.npz", **arrays)
        with pytest.raises(BrokenFile, match=words):
            read_cloud(tmp_path / "a.npz", classes=3)


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


LITTER = ("._b.npz", ".DS_Store", ".hidden.npy", "Thumbs.db", "__MACOSX/b.npz", "__MACOSX/._b.npz")


def test_the_clouds_of_a_folder_are_sorted(tmp_path):
    touch(tmp_path, "b.npz", "a.PLY", "c.Npy", "a.json", "notes.txt", *LITTER)
    found, _ = files.files_in(tmp_path, files.ROOMS)
    assert [path.name for path in found] == ["a.PLY", "b.npz", "c.Npy"]


def test_what_is_passed_over_in_a_folder_of_clouds_is_named(tmp_path, capsys):
    touch(tmp_path, "train/a.PLY", "train/a.json", "train/b.json", "train/more/c.ply",
          "train/d.xyz", "train/e.las", "val/a.npy", *(f"train/{name}" for name in LITTER))
    for other in ("test", "val"):
        train, test, names = files.own_clouds(tmp_path, ("train", other), "")
        assert [p.name for p in train] == ["a.PLY"] and test == [tmp_path / "val" / "a.npy"]
        assert capsys.readouterr().err == (f"{tmp_path / 'train'}: passed over 4 files: b.json, "
                                           "d.xyz, e.las, ...\n") and names == ()
    touch(tmp_path, "test/a.npy", "b.ply", "b.json")
    with pytest.raises(InputError, match="has both (val/ and test/|test/ and val/)"):
        files.own_clouds(tmp_path, ("train", other), "")
    assert f"{tmp_path}: passed over 1 file: b.ply\n" in capsys.readouterr().err


@pytest.mark.parametrize("one, two, refused", [
    ("r0.ply", "r0.npy", True), ("r0.ply", "r0.PLY", True), ("r0.ply", "r0 (1).ply", True),
    ("r0.ply", "r0(2).npy", True), ("r0.ply", "r0 - Copy.ply", True),
    ("r0.ply", "r0 copy.ply", True),
    ("r0.ply", "r0 - Copy (2).ply", True), ("r0.ply", "r0 - Kopie.ply", True),
    ("r0.ply", "r0.json", False), ("r1.ply", "r0 (1).ply", False), ("r0.ply", "r01.ply", False),
])
def test_copies_are_refused_by_name(tmp_path, one, two, refused):
    touch(tmp_path, one, two)
    if not refused:
        assert len(files.files_in(tmp_path, files.ROOMS)[0]) == 1 + two.endswith(".ply")
        return
    with pytest.raises(InputError, match="by its name a copy of r0") as error:
        files.files_in(tmp_path, files.ROOMS)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("boxes, words", [
    ('[{"class": "bed", "center": [0, NaN, 0], "size": [1, 1, 1]}]', "NaN"),
    ('[{"class": "bed", "center": [0, 0, 0]}]', "size.*a scene is a cloud and a list.*repair it"),
    ('[{"class": "bed", "center": [0, 0], "size": [1, 1, 1]}]', "repair it"),
    ("[", "repair it"),
    (None, "No such file"),
])
def test_bad_boxes_are_named(tmp_path, boxes, words):
    if boxes is not None:
        (tmp_path / "room0.json").write_text(boxes, encoding="utf-8")
    with pytest.raises(BrokenFile, match=words) as error:
        read_boxes(tmp_path / "room0.json")
    assert "room0.json" in str(error.value) and "\n" not in str(error.value)


def test_boxes_are_read_with_names_in_any_script(tmp_path):
    content = [{"class": "стол", "center": [1, 2, 3], "size": [.5, 1, 2]},
               {"class": "bed", "center": [0, 0, 0], "size": [1, 1, 1], "score": .9}]
    text = json.dumps(content, ensure_ascii=False)
    (tmp_path / "room0.json").write_text(text, encoding="utf-8")
    names, boxes = read_boxes(tmp_path / "room0.json")
    assert names == ["стол", "bed"] and boxes.dtype == np.float32
    assert boxes.tolist() == [[1, 2, 3, .5, 1, 2], [0, 0, 0, 1, 1, 1]]
    (tmp_path / "none.json").write_text("[]", encoding="utf-8")
    assert read_boxes(tmp_path / "none.json")[1].shape == (0, 6)


# --- prepared data

def test_a_prepared_file_knows_what_it_was_made_from(tmp_path):
    source, path = tmp_path / "a.txt", tmp_path / "a.npz"
    source.write_text("one", encoding="utf-8")
    made_from = prepared.sources_of([source], 50)
    assert not prepared.is_fresh(path, made_from)
    prepared.save_npz(path, made_from, xyz=CLOUD)
    assert prepared.is_fresh(path, made_from)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "a.txt"]
    assert not prepared.is_fresh(path, prepared.sources_of([source], 60))
    os.utime(source, (1e9, 1e9))
    assert not prepared.is_fresh(path, prepared.sources_of([source], 50))
    prepared.save_npz(path, prepared.sources_of([source], 50), xyz=CLOUD)
    assert prepared.is_fresh(path, prepared.sources_of([source], 50))
    source.unlink()
    assert not prepared.is_fresh(path, prepared.sources_of([source], 50))
    path.write_bytes(path.read_bytes()[:-30])                           # cut short
    assert not prepared.is_fresh(path, made_from)


def test_an_interruption_leaves_nothing_half_written(tmp_path, monkeypatch):
    def stop(file, **arrays):
        file.write(b"half")
        raise KeyboardInterrupt
    monkeypatch.setattr(np, "savez", stop)
    with pytest.raises(KeyboardInterrupt):
        prepared.save_npz(tmp_path / "a.npz", "", xyz=CLOUD)
    assert not list(tmp_path.iterdir())


def test_two_may_write_the_same_file_at_once(tmp_path):
    both, errors = threading.Barrier(2), []

    def write():
        both.wait()
        try:
            for _ in range(30):
                prepared.save_npz(tmp_path / "a.npz", "same", xyz=CLOUD)
                assert prepared.is_fresh(tmp_path / "a.npz", "same")
        except BaseException as error:
            errors.append(error)
    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert not errors and [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(file, **arrays):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(InputError, match="a.npz: cannot be written .No space left on device"):
        prepared.save_npz(tmp_path / "a.npz", "", xyz=CLOUD)


@pytest.fixture
def read_only(tmp_path, monkeypatch):
    """A root that cannot be written, also where we are root, and a cache that can."""
    can = prepared.writable
    monkeypatch.setattr(prepared, "writable", lambda folder: tmp_path / "data" not in
                        folder.resolve().parents and can(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def test_a_root_that_cannot_be_written_is_prepared_in_the_cache(read_only, capsys, monkeypatch):
    one = prepared.prepared_folder(read_only, "s3dis")
    assert one.is_dir() and read_only.parent / "cache" / "nanoepcl" in one.parents
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.chdir(read_only.parent)
    assert prepared.prepared_folder("data", "s3dis") == one             # however it is spelt
    assert prepared.prepared_folder(read_only.parent / "data2", "s3dis").parts[-2:] == (
        ".nanoepcl", "s3dis")
    monkeypatch.setattr(prepared, "writable", lambda folder: False)
    with pytest.raises(InputError, match="set XDG_CACHE_HOME"):
        prepared.prepared_folder(read_only, "s3dis")


def test_what_is_prepared_in_a_root_that_cannot_be_written_is_used(read_only, capsys):
    folder = read_only / ".nanoepcl" / "s3dis"
    folder.mkdir(parents=True)
    prepared.save_npz(folder / "a.npz", "then", xyz=CLOUD)
    assert prepared.prepared_folder(read_only, "s3dis", {"a.npz": "then"}) == folder
    assert capsys.readouterr().err == ""
    assert prepared.prepared_folder(read_only, "s3dis", {"a.npz": "now"}) != folder


def double(x, y):
    return 2 * x + y


def test_work_is_shared_and_comes_back_in_order():
    jobs = [(i, 1) for i in range(5)]
    for least in (2, 9):                                                # in processes, and not
        work = prepared.in_parallel(double, jobs, 2, "number", least)
        assert list(work) == [1, 3, 5, 7, 9]
    assert list(prepared.in_parallel(double, [], 2, "number")) == []


SHARED = Path(__file__).parent.parent.parent / "shared" / "data"


def test_a_cloud_in_pcd_from_a_real_sensor_is_read():
    path = SHARED / "scans" / "fragment.pcd"
    if not path.is_file():
        pytest.skip("needs the real scan, which is not part of the project")
    xyz, _ = read_object(path.read_bytes(), ".pcd")
    assert xyz.shape == (113_662, 3) and np.ptp(xyz, 0).max() < 10


def test_labels_of_a_ply_have_one_name(tmp_path):
    def ply(*names):
        head = "".join(f"property float {name}\n" for name in names)
        text = f"ply\nformat ascii 1.0\nelement vertex 1\n{head}end_header\n" + "1 " * len(names)
        (tmp_path / "a.ply").write_text(text + "\n")
        return tmp_path / "a.ply"

    for name in ("label", "scalar_label", "scalar_Label"):
        assert read_cloud(ply("x", "y", "z", name), classes=2).label.tolist() == [1]
    for names in (("x", "y", "z", "scalar_class"), ("x", "y", "z", "label", "scalar_label")):
        with pytest.raises(BrokenFile, match=f"one property `label`, and have {' '.join(names)}"):
            read_cloud(ply(*names), classes=2)
    with pytest.raises(BrokenFile, match="its points need red green blue, and have x y z red"):
        read_cloud(ply("x", "y", "z", "red"))
