"""data/s3dis.py: rooms as published and prepared, junk bytes, areas, broken files."""
import os

import numpy as np
import pytest

from data import prepared, s3dis, synthetic_rooms
from data.files import BrokenFile, read_cloud
from data.s3dis import ROOM_CLASSES, has_own_rooms, own_rooms, rooms
from run import InputError


@pytest.fixture(scope="module")
def sources():
    return synthetic_rooms.room_scenes(3, 1500, 9)


def raw_room(root, room):
    """A room as Stanford publishes one: a text file of `x y z r g b` for each object."""
    root = root / "Annotations"
    root.mkdir(parents=True)
    for k in np.unique(room["semantic"]):
        mine = room["semantic"] == k
        lines = []
        for xyz, rgb in zip(room["xyz"][mine] + (7, -3, 1), room["rgb"][mine]):
            lines.append(" ".join([*(f"{c:.3f}" for c in xyz), *map(str, rgb)]) + "\n")
        half = len(lines) // 2
        for i, part in enumerate((lines[:half], lines[half:])):         # the first may be empty
            (root / f"{ROOM_CLASSES[k]}_{i + 1}.txt").write_text("".join(part), encoding="utf-8")


@pytest.fixture
def raw(tmp_path, sources):
    for folder, room in zip(("Area_1/office_1", "Area_1/hallway_2", "Area_5/office_19"), sources):
        raw_room(tmp_path / folder, room)
    return tmp_path


def stems(paths):
    return [path.stem for path in paths]


def test_a_raw_tree_gives_every_point_its_label(raw, sources):
    train, test, form = rooms(raw)
    assert stems(train) == ["Area_1_hallway_2", "Area_1_office_1"]
    assert stems(test) == ["Area_5_office_19"]
    assert form == f"{raw}, 2 rooms; area 5: 1 test rooms"
    for path, source in zip([*train, *test], (sources[1], sources[0], sources[2])):
        cloud = read_cloud(path, classes=13)
        assert len(cloud.xyz) == 1500 and (cloud.xyz.min(0) == 0).all()
        counts = np.bincount(source["semantic"], minlength=13)
        assert (np.bincount(cloud.label, minlength=13) == counts).all()
        i = int(np.lexsort(source["xyz"].T)[0])                         # one point, found again
        place = source["xyz"][i] - source["xyz"].min(0)
        j = np.linalg.norm(cloud.xyz - place, axis=1).argmin()
        assert np.abs(cloud.xyz[j] - place).max() < .002
        assert cloud.label[j] == source["semantic"][i]
        assert cloud.rgb[j].tolist() == source["rgb"][i].tolist()


def test_points_of_other_classes_become_clutter_and_are_named(raw, capsys):
    where = raw / "Area_1/office_1/Annotations"
    lines = "1 2 1 4 5 6\n"
    before = np.bincount(read_cloud(rooms(raw)[0][1], classes=13).label, minlength=13)
    for name, count in (("tree_1", 60), ("potted_plant_2", 7), ("stairs_1", 5), ("staris_1", 3),
                        ("Chair_1", 2)):
        (where / f"{name}.txt").write_text(lines * count, encoding="utf-8")
    (raw / "Area_5/office_19/Annotations/tree_1.txt").write_text(lines, encoding="utf-8")
    capsys.readouterr()
    train, _, form = rooms(raw)
    said = capsys.readouterr().err
    assert f"{where}: 60 points of tree, none of the 13 classes, become clutter\n" in said
    assert "7 points of potted_plant," in said and "sta" not in said.replace(str(raw), "")
    assert form.endswith("; none of the 13 classes, so clutter: Chair (2 points), potted_plant "
                         "(7 points), tree (61 points)")
    assert rooms(raw)[2] == form and capsys.readouterr().err == ""
    after = np.bincount(read_cloud(train[1], classes=13).label, minlength=13) - before
    assert after[12] == after.sum() == 77


def test_other_classes_in_this_layout_are_read_as_their_owner_names_them(tmp_path, capsys):
    for area, names in (("1", ("tree_1", "tree_2", "ground_1")), ("north", ("potted_plant_1",))):
        folder = tmp_path / f"Area_{area}" / "plot_1" / "Annotations"
        folder.mkdir(parents=True)
        for i, name in enumerate(names):
            (folder / f"{name}.txt").write_text(f"{431_000 + i}.25 5 6 7 8 {i}\n" * 9,
                                                encoding="utf-8")
    assert has_own_rooms(tmp_path)
    train, test, classes, form = own_rooms(tmp_path, "north")
    assert stems(train) == ["Area_1_plot_1"] and stems(test) == ["Area_north_plot_1"]
    assert classes == ("ground", "potted_plant", "tree")
    assert form == f"{tmp_path}, 1 rooms; area north: 1 test rooms" and not capsys.readouterr().err
    cloud = read_cloud(train[0], classes=3)
    assert cloud.label.tolist() == [0] * 9 + [2] * 18 and cloud.rgb[0].tolist() == [7, 8, 2]
    assert cloud.xyz[:, 0].tolist() == [2] * 9 + [0] * 9 + [1] * 9
    assert (cloud.xyz[0] + cloud.offset).tolist() == [431_002.25, 5, 6]
    with pytest.raises(InputError, match="has no Area_5 to test on; choose one of 1, north"):
        own_rooms(tmp_path)
    (tmp_path / "Area_north").rename(tmp_path / "Area_no_rth")
    with pytest.raises(InputError, match="Area_no_rth: the name of an area has no _"):
        own_rooms(tmp_path, "1")
    (tmp_path / "classes.txt").write_text("tree\n", encoding="utf-8")
    assert not has_own_rooms(tmp_path) and not has_own_rooms(tmp_path / "nowhere")


def test_a_room_has_the_offset_that_it_was_moved_by(raw, sources):
    cloud = read_cloud(rooms(raw)[1][0])
    low = sources[2]["xyz"].min(0) + (7, -3, 1)
    np.testing.assert_allclose(cloud.offset, low, atol=.001)


def test_litter_is_passed_over_and_copies_are_refused(raw, tmp_path_factory, capsys):
    before = rooms(raw)
    where = raw / "Area_5/office_19/Annotations"
    for name in ("._chair_1.txt", ".DS_Store", "Thumbs.db"):
        (where / name).write_bytes(b"\0\5\x16\7")
    assert rooms(raw) == before and capsys.readouterr().err == ""
    (where / "chair_1.las").touch()
    assert "passed over 1 file: chair_1.las" in rooms(raw)[2] and "las" in capsys.readouterr().err
    copy = next(where.glob("wall_*.txt"))
    for name in (f"{copy.stem} (1).txt", f"{copy.stem} - Copy.txt", f"{copy.stem} copy.txt"):
        (where / name).write_bytes(copy.read_bytes())
        with pytest.raises(InputError, match=f"by its name a copy of {copy.name}"):
            rooms(raw)
        (where / name).unlink()
    (raw / "Area_7/plot_1/Annotations").mkdir(parents=True)
    assert f"{raw}: passed over Area_7, which S3DIS does not have" in rooms(raw)[2]
    root = tmp_path_factory.mktemp("data")
    for name in ("Area_1_a.npy", "Area_5_b.NPY", "._Area_1_a.npy", "Area_1_a (1).npy"):
        with open(root / name, "wb") as file:
            np.save(file, np.tile([1, 2, 3, 4, 5, 6, 7.], (9, 1)))
    with pytest.raises(InputError, match="a copy of Area_1_a.npy"):
        rooms(root)
    (root / "Area_1_a (1).npy").unlink()
    assert [stems(paths) for paths in rooms(root)[:2]] == [["Area_1_a"], ["Area_5_b"]]


def test_prepared_rooms_give_the_same(raw, tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    folder = root / "stanford_indoor3d"
    folder.mkdir()
    first = rooms(raw)
    for path in first[0] + first[1]:
        cloud = read_cloud(path, classes=13)
        table = np.concatenate([cloud.xyz, cloud.rgb, cloud.label[:, None]], 1)
        np.save(folder / f"{path.stem}.npy", table.astype(np.float32))
    for place in (root, folder):
        second = rooms(place)
        assert second[2] == f"{folder}, 2 rooms; area 5: 1 test rooms"
        for a, b in zip(first[0] + first[1], second[0] + second[1], strict=True):
            a, b = (read_cloud(path, classes=13) for path in (a, b))
            assert all(x.tobytes() == y.tobytes() for x, y in zip(a[:3], b[:3]))


def test_any_area_can_test_and_preparing_goes_on_where_it_stopped(raw):
    train, test, form = rooms(raw, test_area=1)
    assert len(train) == 1 and len(test) == 2 and form.endswith("area 1: 2 test rooms")
    kept, gone = test
    stamp = gone.stat().st_mtime_ns
    kept.unlink()
    rooms(raw)
    assert gone.stat().st_mtime_ns == stamp and kept.exists()
    assert not list((raw / ".nanoepcl").rglob("*.tmp"))


def test_a_room_that_changes_is_prepared_again_and_one_that_goes_is_not_returned(raw):
    path = rooms(raw)[1][0]
    chairs, tables = (ROOM_CLASSES.index(name) for name in ("chair", "table"))
    where = raw / "Area_5/office_19/Annotations"
    (where / "chair_9.txt").write_text("1 2 1 4 5 6\n" * 60, encoding="utf-8")
    count = np.bincount(read_cloud(rooms(raw)[1][0], classes=13).label, minlength=13)
    (where / "chair_9.txt").rename(where / "table_9.txt")
    now = np.bincount(read_cloud(rooms(raw)[1][0], classes=13).label, minlength=13)
    assert now[chairs] == count[chairs] - 60 and now[tables] == count[tables] + 60
    path.write_bytes(path.read_bytes()[:-100])                          # cut short
    assert len(read_cloud(rooms(raw)[1][0]).xyz) == 1560
    for file in where.iterdir():
        file.unlink()
    where.rmdir()
    assert rooms(raw)[1] == [] and path.is_file(), "it may come back"


def test_a_prepared_room_that_changes_is_noticed(tmp_path):
    table = np.tile([1, 2, 3, 4, 5, 6, 7.], (9, 1))
    np.save(tmp_path / "Area_1_a.npy", table)
    np.save(tmp_path / "Area_5_b.npy", np.c_[table, table])             # more columns do no harm
    train, test, _ = rooms(tmp_path)
    assert set(read_cloud(train[0], classes=13).label) == {7} and len(test) == 1
    table[:, 6] = -1
    np.save(tmp_path / "Area_1_a.npy", table)
    os.utime(tmp_path / "Area_1_a.npy", (1e9, 1e9))
    assert set(read_cloud(rooms(tmp_path)[0][0], classes=13).label) == {-1}


def test_a_root_that_cannot_be_written_is_prepared_elsewhere(raw, monkeypatch, capsys):
    can, cache = prepared.writable, raw.parent / f"{raw.name}-cache"
    monkeypatch.setattr(prepared, "writable", lambda p: raw not in p.parents and can(p))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    train, test, _ = rooms(raw)
    assert len(train) == 2 and len(test) == 1
    assert all(cache in path.parents for path in train + test)
    assert not (raw / ".nanoepcl").exists() and "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("line, row", [
    (b"1.5 2.5 0.3 185\x00187 12", [1.5, 2.5, .3, 185, 187, 12]),       # a blank: KPConv issue 82
    (b"1.5 2.5 0.3 103.0\x100000 1 2", [1.5, 2.5, .3, 103, 1, 2]),      # a digit: Pointcept 16
    (b"1.5 2.5 0.3 167.\x1000000 1 2", [1.5, 2.5, .3, 167, 1, 2]),
    (b"-9.1\x160 2.5 0.3 1 2 3", [-9.1, 2.5, .3, 1, 2, 3]),
])
def test_known_junk_in_s3dis_is_repaired_and_reported(raw, line, row, capsys):
    path = raw / "Area_5/office_19/Annotations/clutter_2.txt"
    path.write_bytes(b"1 2 3 4 5 6\n" + line + b"\n")
    points, notes = s3dis.read_annotation(path)
    np.testing.assert_allclose(points, [[1, 2, 3, 4, 5, 6], row])
    assert len(notes) == 1 and "clutter_2.txt line 2" in notes[0]
    rooms(raw)
    assert "clutter_2.txt line 2" in capsys.readouterr().err


@pytest.mark.parametrize("content, words", [
    (b"1 2 3 4 5 6\n1 2 3 4 5 6 7\n", "clutter_2.txt"),
    (b"1 2 3 4 5 6\n1 2 3 4\n", "clutter_2.txt"),                      # cut short
    (b"1 2 3 4 5 6\nhallo\n", "line 2 is b'hallo'"),
    (b"1 2 3 4 5 6\n1 2\x01 3 4 5 6 7 8\n", "line 2"),
    (b"1 2 3 4 5 999\n", "office_1/Annotations: has colours outside"),
])
def test_a_broken_annotation_is_named_or_its_room_left_out_if_asked(raw, content, words, capsys):
    train, _, _ = rooms(raw)                                # an older preparation is there
    path = raw / "Area_1/office_1/Annotations/clutter_2.txt"
    blob = path.read_bytes()
    path.write_bytes(content)
    with pytest.raises(BrokenFile, match=words) as error:
        rooms(raw)
    assert "\n" not in str(error.value) and "skip" not in str(error.value)
    for _ in range(2):
        assert stems(rooms(raw, skip_broken=True)[0]) == ["Area_1_hallway_2"]
        assert "LEFT OUT" in capsys.readouterr().err and not train[1].exists()
    path.write_bytes(blob)
    assert rooms(raw)[0] == train


def test_a_room_without_points_is_named(raw):
    for path in (raw / "Area_1/office_1/Annotations").iterdir():
        path.write_bytes(b"")
    with pytest.raises(BrokenFile, match="office_1/Annotations: no CLASS_N.txt"):
        rooms(raw)


@pytest.mark.parametrize("change, words", [
    (lambda t: t[:, :6], r"at least 7 columns, found shape \(9, 6\)"),
    (lambda t: t[:0], "no points"),
    (lambda t: t + [0, 0, 0, 0, 0, 0, 13], "the label 13; labels are whole numbers from 0 to 12"),
    (lambda t: t + [0, 0, 0, 300, 0, 0, 0], "colours outside 0..255"),
])
def test_a_broken_prepared_room_is_named(tmp_path, change, words):
    np.save(tmp_path / "Area_1_a.npy", change(np.zeros((9, 7))))
    with pytest.raises(BrokenFile, match=words) as error:
        rooms(tmp_path)
    assert str(error.value).startswith(str(tmp_path / "Area_1_a.npy"))


def test_a_root_without_rooms_names_the_forms_and_where_to_get_them(tmp_path):
    with pytest.raises(InputError, match="no such folder; ask for Stanford3dDataset"):
        rooms(tmp_path / "nowhere")
    (tmp_path / "Area_1/office_1").mkdir(parents=True)                  # another project's form
    np.save(tmp_path / "Area_1/office_1/coord.npy", np.zeros((9, 3)))
    for _ in range(2):
        with pytest.raises(InputError, match="found neither Area_1/ROOM/Annotations.*Area_1_ROOM"):
            rooms(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["Area_1"], "nothing is left behind"
