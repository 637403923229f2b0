"""data/scannet.py: scans as published and as VoteNet prepared them, splits, broken scans."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data import prepared, scannet, synthetic_rooms
from data.files import BrokenFile, read_cloud
from data.scannet import SCANNET_BOXES, SCANNET_POINTS, scans
from run import InputError

NYU40 = {**SCANNET_BOXES, "wall": 1, "office chair": 5}
TSV = "id\traw_category\tcategory\tcount\tnyu40id\n" + "".join(
    f"{i}\t{name}\t{name}\t1\t{nyu}\n" for i, (name, nyu) in enumerate(NYU40.items()))


def raw_scan(root, name, room, angle=0.3):
    """A room as ScanNet publishes one: mesh, segments, objects, alignment. -> its folder."""
    folder = root / "scans" / name
    folder.mkdir(parents=True)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    turn[:3, 3] = 1, -2, .5
    xyz1 = np.concatenate([room["xyz"], np.ones((len(room["xyz"]), 1))], 1)
    xyz = (xyz1 @ np.linalg.inv(turn).T)[:, :3]
    matrix = " ".join(repr(float(x)) for x in turn.ravel())
    (folder / f"{name}.txt").write_text(
        f"numDepthFrames = 5\naxisAlignment = {matrix}\nsceneType = Office\n", encoding="utf-8")
    row = np.zeros(len(xyz), [("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("rgba", "u1", 4)])
    row["x"], row["y"], row["z"] = xyz.T
    row["rgba"][:, :3] = room["rgb"]
    head = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(xyz)}\n" + "".join(
        f"property float {a}\n" for a in "xyz") + "".join(
        f"property uchar {c}\n" for c in ("red", "green", "blue", "alpha")
    ) + "element face 1\nproperty list uchar int vertex_indices\nend_header\n"
    mesh = head.encode() + row.tobytes() + b"\3" + bytes(12)
    (folder / f"{name}_vh_clean_2.ply").write_bytes(mesh)
    # two segments for each object, odd and even points; -1 (walls) becomes segments 0 and 1
    segment = 2 * (room["instance"] + 1) + np.arange(len(xyz)) % 2
    (folder / f"{name}_vh_clean_2.0.010000.segs.json").write_text(
        json.dumps({"segIndices": segment.tolist()}), encoding="utf-8")
    groups = []
    for i, k in enumerate(room["label"]):
        kind = synthetic_rooms.FURNITURE[k]
        groups.append({"objectId": i, "label": "office chair" if kind == "chair" else kind,
                       "segments": [2 * i + 2, 2 * i + 3]})
    groups.append({"objectId": len(groups), "label": "wall", "segments": [0, 1]})
    (folder / f"{name}.aggregation.json").write_text(json.dumps({"segGroups": groups}),
                                                     encoding="utf-8")
    return folder


def votenet_files(folder, path):
    """A prepared scan as VoteNet's four files."""
    cloud = read_cloud(path, classes=41)
    vert = np.concatenate([cloud.xyz, cloud.rgb], 1).astype(np.float32)
    for part, content in (("vert", vert), ("sem_label", cloud.label), ("bbox", cloud.boxes),
                          ("ins_label", cloud.instance)):
        np.save(folder / f"{path.stem}_{part}.npy", content)


@pytest.fixture(scope="module")
def rooms():
    return synthetic_rooms.room_scenes(3, 3000, 9)


@pytest.fixture
def raw(tmp_path, rooms):
    (tmp_path / "scannetv2-labels.combined.tsv").write_text(TSV, encoding="utf-8")
    for name, room in zip(("scene0191_00", "scene0191_01", "scene0568_00"), rooms):
        raw_scan(tmp_path, name, room)
    return tmp_path


def stems(paths):
    return [path.stem for path in paths]


def contents(paths):
    """What prepared files hold, without what they were made from."""
    found = []
    for path in paths:
        with np.load(path, allow_pickle=False) as table:
            found.append({n: table[n].tolist() for n in table.files if n != "sources"})
    return found


def test_the_shipped_split_is_the_official_one():
    folder = Path(scannet.__file__).parent / "splits"
    train, val = ((folder / f"scannetv2_{part}.txt").read_text(encoding="utf-8").split()
                  for part in ("train", "val"))
    assert (len(train), len(val)) == (1201, 312) and not set(train) & set(val)


# --- as published

def test_a_raw_scan_gives_the_boxes_of_its_instances_after_alignment(raw, rooms):
    train, val, form = scans(raw)
    assert stems(train) == ["scene0191_00", "scene0191_01"] and stems(val) == ["scene0568_00"]
    assert form == f"{raw / 'scans'}, 2 of 1,201 train and 1 of 312 val scenes"
    names = {nyu40: name for name, nyu40 in SCANNET_BOXES.items()}
    for path, room in zip(train + val, rooms):
        cloud = read_cloud(path, classes=41)
        assert [names[int(k)] for k in cloud.boxes[:, 6]] == [
            synthetic_rooms.FURNITURE[k] for k in room["label"]]
        np.testing.assert_allclose(cloud.boxes[:, :3], room["center"], atol=1e-4)
        np.testing.assert_allclose(cloud.boxes[:, 3:6], room["size"], atol=1e-4)
        assert len(cloud.xyz) == 3000 and cloud.rgb.dtype == np.uint8
        np.testing.assert_allclose(np.sort(cloud.xyz[:, 0]), np.sort(room["xyz"][:, 0]), atol=1e-4)
        for i, box in enumerate(cloud.boxes):
            mine = cloud.instance == i + 1
            assert set(cloud.label[mine]) == {int(box[6])}
            np.testing.assert_allclose(cloud.xyz[mine].min(0), box[:3] - box[3:6] / 2, atol=1e-4)


def test_points_are_thinned_but_boxes_come_from_all_of_them(raw, rooms):
    scan, _ = scannet.read_raw(raw / "scans/scene0191_00", NYU40, most=500)
    assert {len(scan[name]) for name in ("xyz", "rgb", "label", "instance")} == {500}
    np.testing.assert_allclose(scan["boxes"][:, 3:6], rooms[0]["size"], atol=1e-4)


def test_a_scan_without_alignment_stays_as_it_stands_and_that_is_said(raw, rooms, capsys):
    for name in ("scene0191_00", "scene0568_00"):
        path = raw / f"scans/{name}/{name}.txt"
        path.write_text("sceneType = Office\n", encoding="utf-8-sig")
    for _ in range(2):                                      # prepared, and found prepared
        train, _, form = scans(raw)
        said = "2 of 3 scans have no axisAlignment and stay as they stand"
        assert form.endswith(f"; {said}") and capsys.readouterr().err == f"{said}\n"
    mesh = (raw / "scans/scene0191_00/scene0191_00_vh_clean_2.ply").read_bytes()
    table, _ = scannet.read_ply(mesh, faces=False)
    np.testing.assert_array_equal(np.sort(read_cloud(train[0]).xyz[:, 0]), np.sort(table["x"]))


def test_scans_of_neither_list_are_named(raw, votenet, capsys):
    for name in ("scene0707_00", "scene0708_00", "scene9999_00", "scene9999_01"):
        (raw / "scans" / name).mkdir()
        np.save(votenet / f"{name}_vert.npy", np.zeros((9, 6)))
    said = "passed over 4 scans of neither list: scene0707_00, scene0708_00, scene9999_00, ..."
    capsys.readouterr()
    for root in (raw, votenet):
        assert scans(root)[2].endswith(f"; {said}") and capsys.readouterr().err == f"{said}\n"


def test_the_objects_are_those_of_the_mesh_that_is_read(raw):
    before = contents(scans(raw)[0])
    path = raw / "scans/scene0191_00/scene0191_00_vh_clean.aggregation.json"    # of another mesh
    path.write_text('{"segGroups": []}', encoding="utf-8")
    shutil.rmtree(raw / ".nanoepcl")
    assert contents(scans(raw)[0]) == before
    (path.parent / "scene0191_00.aggregation.json").unlink()
    with pytest.raises(BrokenFile, match="/scene0191_00.aggregation.json: No such file"):
        scans(raw)


def test_marks_before_a_text_are_no_part_of_it(raw):
    before = contents(scans(raw)[0])
    for path in (raw / "scannetv2-labels.combined.tsv", *raw.glob("scans/*/*.json"),
                 *raw.glob("scans/*/*.txt")):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert contents(scans(raw)[0]) == before


def test_dark_colours_of_a_scan_are_not_taken_for_shares(raw, rooms):
    shutil.rmtree(raw / "scans")
    raw_scan(raw, "scene0191_00", {**rooms[0], "rgb": np.ones((3000, 3), np.uint8)})
    raw_scan(raw, "scene0568_00", rooms[2])
    assert read_cloud(scans(raw)[0][0]).rgb.max() == 1


def test_ids_that_nyu40_does_not_have_are_minus_one_and_none_is_zero():
    ids = scannet.nyu40_ids(np.array([0, 1, 40, 41, 255, 70_000]))
    assert ids.tolist() == [0, 1, 40, -1, -1, -1]
    assert scannet.nyu40_ids(np.array([-1, 3.])).dtype == np.int16


def test_preparing_goes_on_where_it_stopped_and_makes_a_cut_file_again(raw):
    train, val, _ = scans(raw)
    before = contents(train)
    stamp = train[0].stat().st_mtime_ns
    train[1].unlink()
    val[0].write_bytes(val[0].read_bytes()[:-100])
    assert scans(raw)[:2] == (train, val) and train[0].stat().st_mtime_ns == stamp
    assert contents(train) == before and len(read_cloud(val[0]).boxes)


def test_a_scan_that_changes_is_prepared_again_and_one_that_goes_is_not_returned(raw):
    train, val, _ = scans(raw)
    path = raw / "scans/scene0191_01/scene0191_01.aggregation.json"
    groups = json.loads(path.read_text(encoding="utf-8"))
    groups["segGroups"][0]["label"] = "sink"
    path.write_text(json.dumps(groups), encoding="utf-8")
    assert read_cloud(scans(raw)[0][1]).boxes[0, 6] == SCANNET_BOXES["sink"]
    table = raw / "scannetv2-labels.combined.tsv"
    table.write_text(TSV.replace("sink\t1\t34", "sink\t1\t36"), encoding="utf-8")
    assert read_cloud(scans(raw)[0][1]).boxes[0, 6] == SCANNET_BOXES["bathtub"]
    shutil.rmtree(raw / "scans/scene0191_01")
    assert stems(scans(raw)[0]) == ["scene0191_00"]
    assert train[1].is_file(), "it may come back"


def test_without_val_scenes_some_rooms_are_set_aside_whole_and_it_says_so(raw):
    for name in ("scene0000_00", "scene0000_01"):
        shutil.copytree(raw / "scans/scene0191_00", raw / "scans" / name)
        for path in (raw / "scans" / name).iterdir():
            path.rename(path.parent / path.name.replace("scene0191_00", name))
    shutil.rmtree(raw / "scans/scene0568_00")
    train, test, form = scans(raw)
    assert stems(train) == ["scene0191_00", "scene0191_01"]
    assert stems(test) == ["scene0000_00", "scene0000_01"]
    assert form.endswith("; NOT the official split: every fifth room (2 scenes) is the test set")


def test_scans_are_prepared_in_parallel_with_the_same_result(raw):
    train, val, _ = scans(raw, workers=2)
    two = contents(train + val)
    for path in train + val:
        path.unlink()
    scans(raw, workers=1)
    assert contents(train + val) == two
    assert not list((raw / ".nanoepcl").rglob("*.tmp"))


def test_two_runs_may_prepare_at_once(raw):
    code = f"from data.scannet import scans; print(scans({str(raw)!r}))"
    env = {**os.environ, "PYTHONPATH": str(Path(scannet.__file__).parent.parent)}
    runs = [subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [run.communicate(timeout=600) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    assert said[0][0] == said[1][0] and len(list((raw / ".nanoepcl/scannet").iterdir())) == 3


def test_a_root_that_cannot_be_written_is_prepared_elsewhere(raw, monkeypatch, capsys):
    can, cache = prepared.writable, raw.parent / f"{raw.name}-cache"
    monkeypatch.setattr(prepared, "writable", lambda p: raw not in p.parents and can(p))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    train, val, _ = scans(raw)
    assert len(train) == 2 and len(val) == 1 and all(cache in path.parents for path in train + val)
    assert not (raw / ".nanoepcl").exists() and "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("file, change, words", [
    ("_vh_clean_2.ply", lambda b: b[:2000], "cut short"),
    ("_vh_clean_2.ply", lambda b: b.replace(b"property uchar red", b"property uchar rot"), "red"),
    ("_vh_clean_2.0.010000.segs.json", lambda b: b[:100], "segs.json"),
    ("_vh_clean_2.0.010000.segs.json", lambda b: b"[1, 2]", "segs.json"),
    ("_vh_clean_2.0.010000.segs.json", lambda b: b'{"segIndices": [1, 2]}',
     "segs.json: 2 segment ids for 3000 vertices"),
    (".aggregation.json", lambda b: b.replace(b'"label": "', b'"label": "teapot '),
     "its label 'teapot"),
    (".aggregation.json", None, "No such file"),
    (".txt", lambda b: b.replace(b"axisAlignment = ", b"axisAlignment = 1.0 "), "reshape"),
    ("_vh_clean_2.0.010000.segs.json", lambda b: b'{"segIndices": []}',
     "segs.json: 0 segment ids for 3000 vertices"),
])
def test_a_broken_scan_is_named_or_left_out_if_asked(raw, file, change, words, capsys):
    train, _, _ = scans(raw)                                # an older preparation is there
    path = raw / f"scans/scene0191_01/scene0191_01{file}"
    blob = path.read_bytes()
    path.unlink()
    if change:
        path.write_bytes(change(blob))
    with pytest.raises(BrokenFile, match=words) as error:
        scans(raw)
    text = str(error.value)
    assert "scene0191_01" in text and text.endswith("; fetch it again") and "\n" not in text
    for _ in range(2):
        assert stems(scans(raw, skip_broken=True)[0]) == ["scene0191_00"]
        assert capsys.readouterr().err.startswith("LEFT OUT ") and not train[1].exists()
    path.write_bytes(blob)
    assert scans(raw)[0] == train


@pytest.mark.parametrize("table, words", [(None, "missing; it comes with"),
                                          ("a\tb\n1\t2\n", "not ScanNet's label table")])
def test_the_label_table_must_be_there(raw, table, words):
    (raw / "scannetv2-labels.combined.tsv").unlink()
    if table:
        (raw / "scannetv2-labels.combined.tsv").write_text(table, encoding="utf-8")
    with pytest.raises(InputError, match=words):
        scans(raw)


# --- as VoteNet prepared it

@pytest.fixture
def votenet(raw, tmp_path_factory):
    """The same scans in VoteNet's form."""
    folder = tmp_path_factory.mktemp("votenet")
    train, val, _ = scans(raw)
    for path in train + val:
        votenet_files(folder, path)
    return folder


def test_votenets_form_gives_the_same_scans(raw, votenet):
    first, second = scans(raw), scans(votenet)
    assert contents(first[0] + first[1]) == contents(second[0] + second[1])
    assert second[2] == f"{votenet}, 2 of 1,201 train and 1 of 312 val scenes"
    below = votenet.parent / f"{votenet.name}-root" / "scannet_train_detection_data"
    shutil.copytree(votenet, below, ignore=shutil.ignore_patterns(".nanoepcl"))
    third = scans(below.parent)
    assert contents(third[0]) == contents(first[0]) and third[2].startswith(f"{below}, 2 of")


def test_what_has_no_file_is_absent_and_comes_when_the_file_does(votenet):
    saved = {part: np.load(votenet / f"scene0191_00_{part}.npy") for part in scannet.VOTENET}
    for part in ("bbox", "ins_label", "sem_label"):
        (votenet / f"scene0191_00_{part}.npy").unlink()
    cloud = read_cloud(scans(votenet)[0][0])
    assert cloud.boxes is None and cloud.instance is None and len(cloud.rgb) == 3000
    with pytest.raises(BrokenFile, match="its points have no label"):
        read_cloud(scans(votenet)[0][0], classes=41)
    for part in ("bbox", "sem_label"):
        np.save(votenet / f"scene0191_00_{part}.npy", saved[part])
    cloud = read_cloud(scans(votenet)[0][0], classes=41)
    assert len(cloud.boxes) == len(saved["bbox"]) and (cloud.label == saved["sem_label"]).all()
    np.save(votenet / "scene0191_00_vert.npy", saved["vert"][:, :3])
    assert read_cloud(scans(votenet)[0][0]).rgb is None


def test_labels_reach_the_twenty_classes_of_the_benchmark(tmp_path):
    nyu = np.array([0, 1, 2, 39, 40, 36, 13, 99])
    for name in ("scene0191_00", "scene0568_00"):
        vert = np.random.default_rng(0).uniform(0, 200, (8, 6)).astype(np.float32)
        np.save(tmp_path / f"{name}_vert.npy", vert)
        np.save(tmp_path / f"{name}_sem_label.npy", nyu.astype(np.uint32))
    train, val, _ = scans(tmp_path)
    names = {nyu40: name for name, nyu40 in SCANNET_POINTS.items()}
    assert len(names) == 20 and stems(train + val) == ["scene0191_00", "scene0568_00"]
    label = read_cloud(train[0], classes=41).label
    assert label.tolist() == [0, 1, 2, 39, 40, 36, 13, -1]
    assert [names.get(k) for k in label] == [
        None, "wall", "floor", "other furniture", None, "bathtub", None, None]


@pytest.mark.parametrize("part, change, words", [
    ("vert", lambda a: a[:, :2], r"at least 3 columns, found shape \(3000, 2\)"),
    ("vert", lambda a: a * np.nan, "NaN coordinates"),
    ("vert", lambda a: a[:0], "no points"),
    ("vert", lambda a: a + [0, 0, 0, 300, 0, 0], "colours outside 0..255"),
    ("sem_label", lambda a: a[:-1], "has 3000 points, 2999 labels"),
    ("ins_label", lambda a: a[:, None], "expected one number a point"),
    ("bbox", lambda a: a[:, :6], "at least 7 columns"),
    ("bbox", None, "repair it"),                            # cut short
])
def test_a_broken_file_of_votenet_is_named(votenet, part, change, words, capsys):
    path = votenet / f"scene0191_01_{part}.npy"
    if change:
        np.save(path, change(np.load(path)))
    else:
        path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(BrokenFile, match=words) as error:
        scans(votenet)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    assert stems(scans(votenet, skip_broken=True)[0]) == ["scene0191_00"]
    assert f"LEFT OUT {path}" in capsys.readouterr().err


def test_a_root_without_scans_names_the_forms_and_where_to_get_them(tmp_path):
    with pytest.raises(InputError, match="found neither scans/ nor .*; ask for ScanNet V2"):
        scans(tmp_path)
    with pytest.raises(InputError, match="no such folder; ask for ScanNet V2"):
        scans(tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())
