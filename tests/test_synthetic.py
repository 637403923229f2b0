"""data/synthetic.py: seeds, shapes, areas, and classes too hard for a trivial classifier."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data import synthetic
from data.meshes import read_object, sample_surface
from data.objects import MODELNET40
from data.synthetic import OBJECT_CLASSES, make_object, object_clouds

ROOT = Path(__file__).resolve().parent.parent


def test_seeds_decide_everything_and_an_object_does_not_depend_on_how_many_are_made():
    xyz, label = object_clouds(2, 256, 5)
    assert xyz.shape == (2 * len(OBJECT_CLASSES), 256, 3) and xyz.dtype == np.float32
    assert label.tolist() == [k for k in range(len(OBJECT_CLASSES)) for _ in range(2)]
    np.testing.assert_array_equal(object_clouds(2, 256, 5)[0], xyz)
    np.testing.assert_array_equal(object_clouds(1, 256, 5)[0], xyz[::2])
    assert (np.abs(object_clouds(2, 256, 6)[0] - xyz).max((1, 2)) > 1e-3).all()
    assert np.isfinite(xyz).all()


def test_there_are_at_least_15_classes_with_modelnet40_s_names():
    usual = set("""chair table sofa bed desk bookshelf lamp bottle cup vase stool monitor airplane
                   car guitar""".split())
    assert usual <= set(OBJECT_CLASSES) <= set(MODELNET40)
    assert list(OBJECT_CLASSES) == sorted(OBJECT_CLASSES)


@pytest.mark.parametrize("name", OBJECT_CLASSES)
def test_objects_are_meshes_of_sensible_size_that_stand_on_the_floor(name):
    for seed in range(10):
        vertices, faces = make_object(name, np.random.default_rng(seed))
        low, high = vertices.min(0), vertices.max(0)
        assert np.isfinite(vertices).all() and 0 <= faces.min() and faces.max() < len(vertices)
        assert low[2] == pytest.approx(0, abs=1e-5) and np.allclose(low[:2], -high[:2], atol=1e-5)
        assert 0.05 < (high - low).max() < 16 and (high - low).min() > 0.01


def test_points_are_uniform_by_area_and_a_mesh_without_area_is_refused():
    vertices = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0],
                         [1, 3, 1], [0, 3, 1], [0, 0, 1], [1, 0, 1]], float)
    faces = np.array([[0, 1, 2], [0, 2, 3],  # area 1
                      [6, 7, 4], [6, 4, 5],  # area 3
                      [0, 0, 1], [2, 2, 2]])  # none
    xyz = sample_surface(vertices, faces, 20_000, np.random.default_rng(0))
    share = (xyz[:, 2] > 0.5).mean()
    assert abs(share - 0.75) < 5 * np.sqrt(0.75 * 0.25 / 20_000)
    y = np.sort(xyz[xyz[:, 2] > 0.5, 1]) / 3  # uniform along the larger rectangle
    assert np.abs(y - np.linspace(0, 1, len(y))).max() < 0.02
    with pytest.raises(ValueError, match="no area"):
        sample_surface(vertices, faces[4:], 10, np.random.default_rng(0))


def test_the_extents_of_the_bounding_box_do_not_give_the_class_away():
    train, test = object_clouds(30, 512, 1), object_clouds(15, 512, 2)
    orders = (lambda e: e,
              lambda e: np.sort(e, 1),
              lambda e: np.c_[np.sort(e[:, :2], 1), e[:, 2]])
    best = 0
    for unit in (False, True):
        for order in orders:
            features = []
            for xyz, _ in (train, test):
                if unit:
                    xyz = xyz - xyz.mean(1, keepdims=True)
                    xyz = xyz / np.linalg.norm(xyz, axis=2).max(1)[:, None, None]
                features.append(order(np.ptp(xyz, axis=1)))
            mean, std = features[0].mean(0), features[0].std(0)
            a, b = ((f - mean) / std for f in features)
            centroids = np.stack([a[train[1] == k].mean(0) for k in range(len(OBJECT_CLASSES))])
            guess = np.linalg.norm(b[:, None] - centroids, axis=2).argmin(1)
            best = max(best, (guess == test[1]).mean())
    assert 0.1 < best < 0.6


def test_the_command_line_prints_the_classes_and_writes_files_that_can_be_read(tmp_path):
    command = [sys.executable, "-m", "data.synthetic", "--export", tmp_path / "ply"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0 and f"{len(OBJECT_CLASSES)} classes" in done.stdout, done.stderr
    files = sorted((tmp_path / "ply").glob("*.ply"))
    assert len(files) == 2 * len(OBJECT_CLASSES) + 2
    room = tmp_path / "ply/room_1.ply"
    assert read_object(room.read_bytes(), ".ply")[0].shape == (40_000, 3)
    assert read_object(files[0].read_bytes(), ".ply")[0].shape == (2048, 3)


# --- rooms ----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def rooms():
    return synthetic.room_scenes(24, 4096, 5)


def test_a_room_depends_on_its_seed_and_number_alone(rooms):
    again = synthetic.make_room(np.random.default_rng([5, 3]), 4096)
    assert all(np.array_equal(again[key], rooms[3][key]) for key in again)
    assert not np.array_equal(rooms[2]["xyz"], rooms[3]["xyz"])


def test_a_room_has_the_promised_arrays(rooms):
    for room in rooms:
        assert room["xyz"].shape == room["rgb"].shape == (4096, 3)
        assert room["xyz"].dtype == np.float32 and room["rgb"].dtype == np.uint8
        for key in ("semantic", "furniture", "instance", "label"):
            assert room[key].dtype == np.int64
        assert np.isfinite(room["xyz"]).all()
        assert 0 <= room["semantic"].min() <= room["semantic"].max() < 13
        boxes = room["instance"].max() + 1
        assert len(room["label"]) == len(room["center"]) == len(room["size"]) == boxes <= 12
        extent = np.ptp(room["xyz"], axis=0)
        assert (extent > (2, 2, 2)).all() and (extent < (6.2, 7.2, 3.4)).all()


def test_a_box_bounds_the_points_of_its_instance_and_knows_their_class(rooms):
    for room in rooms:
        assert ((room["instance"] >= 0) == (room["furniture"] >= 0)).all()
        for i, (label, center, size) in enumerate(zip(room["label"], room["center"], room["size"])):
            mine = room["xyz"][room["instance"] == i]
            assert len(mine) >= 10 and (size > 0).all()
            np.testing.assert_allclose([center - size / 2, center + size / 2],
                                       [mine.min(0), mine.max(0)], atol=1e-5)
            assert (room["furniture"][room["instance"] == i] == label).all()


def test_every_class_occurs_and_furniture_has_its_semantic_class(rooms):
    semantic, furniture, label = (np.concatenate([room[key] for room in rooms])
                                  for key in ("semantic", "furniture", "label"))
    assert set(semantic) == set(range(len(synthetic.ROOM_CLASSES)))
    assert set(label) == set(range(len(synthetic.FURNITURE))) and len(synthetic.FURNITURE) >= 8
    chair = synthetic.FURNITURE.index("chair")
    assert set(semantic[furniture == chair]) == {synthetic.ROOM_CLASSES.index("chair")}
    clutter = synthetic.ROOM_CLASSES.index("clutter")
    assert (furniture[semantic == clutter] == -1).any()  # not all clutter has a box


def test_furniture_does_not_overlap(rooms):
    for room in rooms:
        low, high = room["center"] - room["size"] / 2, room["center"] + room["size"] / 2
        for i in range(len(low)):
            for j in range(i):
                assert not ((low[i] + .03 < high[j]) & (low[j] + .03 < high[i]))[:2].all()


def test_rooms_have_a_flat_floor_and_ceiling_and_no_box_below_the_floor(rooms):
    for room in rooms:
        z, s = room["xyz"][:, 2], room["semantic"]
        floor, ceiling = z[s == 1], z[s == 0]
        assert abs(floor).max() < .05 and np.ptp(ceiling) < .06 and ceiling.min() > 2.3
        for label, center, size in zip(room["label"], room["center"], room["size"]):
            assert (center - size / 2)[2] > -.05


def test_boxes_lie_within_the_room(rooms):
    for room in rooms:
        shell = room["xyz"][room["semantic"] <= synthetic.WALL]
        low, high = room["center"] - room["size"] / 2, room["center"] + room["size"] / 2
        assert (low > shell.min(0) - .05).all() and (high < shell.max(0) + .05).all()


@pytest.mark.parametrize("points, objects", [(64, (4, 12)), (1000, (0, 0)), (60_000, (40, 40))])
def test_any_number_of_points_and_objects_makes_a_room(points, objects):
    room = synthetic.make_room(np.random.default_rng(3), points, objects)
    assert len(np.unique(room["xyz"], axis=0)) == points
    assert room["center"].shape == room["size"].shape == (len(room["label"]), 3)
    assert len(room["label"]) <= objects[1] and room["label"].dtype == np.int64
    assert room["center"].dtype == room["size"].dtype == np.float32
    assert room["instance"].max() == len(room["label"]) - 1


def test_doors_windows_boards_and_columns_do_not_overlap():
    for i in range(60):
        rng = np.random.default_rng(i)
        shell = synthetic.shell(rng, *rng.uniform((3, 3, 2.4), (6, 7, 3.2)))
        bounds = [(v.min(0), v.max(0)) for (v, _), s, _ in shell if s > synthetic.BEAM]
        for j, (low, high) in enumerate(bounds):
            assert all((low > h).any() or (high < n).any() for n, h in bounds[:j])
