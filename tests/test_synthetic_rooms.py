"""data/synthetic_rooms.py: seeds, arrays, boxes around points, nothing inside anything else."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data import synthetic_rooms
from data.meshes import read_object

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def rooms():
    return synthetic_rooms.room_scenes(24, 4096, 5)


def test_a_room_depends_on_its_seed_and_number_alone(rooms):
    again = synthetic_rooms.make_room(np.random.default_rng([5, 3]), 4096)
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
    assert set(semantic) == set(range(len(synthetic_rooms.ROOM_CLASSES)))
    kinds = len(synthetic_rooms.FURNITURE)
    assert set(label) == set(range(kinds)) and kinds >= 8
    chair = synthetic_rooms.FURNITURE.index("chair")
    assert set(semantic[furniture == chair]) == {synthetic_rooms.ROOM_CLASSES.index("chair")}
    clutter = synthetic_rooms.ROOM_CLASSES.index("clutter")
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
        shell = room["xyz"][room["semantic"] <= synthetic_rooms.WALL]
        low, high = room["center"] - room["size"] / 2, room["center"] + room["size"] / 2
        assert (low > shell.min(0) - .05).all() and (high < shell.max(0) + .05).all()


@pytest.mark.parametrize("points, objects", [(64, (4, 12)), (1000, (0, 0)), (60_000, (40, 40))])
def test_any_number_of_points_and_objects_makes_a_room(points, objects):
    room = synthetic_rooms.make_room(np.random.default_rng(3), points, objects)
    assert len(np.unique(room["xyz"], axis=0)) == points
    assert room["center"].shape == room["size"].shape == (len(room["label"]), 3)
    assert len(room["label"]) <= objects[1] and room["label"].dtype == np.int64
    assert room["center"].dtype == room["size"].dtype == np.float32
    assert room["instance"].max() == len(room["label"]) - 1


def test_doors_windows_boards_and_columns_do_not_overlap():
    for i in range(60):
        rng = np.random.default_rng(i)
        shell = synthetic_rooms.shell(rng, *rng.uniform((3, 3, 2.4), (6, 7, 3.2)))
        bounds = [(v.min(0), v.max(0)) for (v, _), s, _ in shell if s > synthetic_rooms.BEAM]
        for j, (low, high) in enumerate(bounds):
            assert all((low > h).any() or (high < n).any() for n, h in bounds[:j])


def test_the_command_line_prints_shares_and_writes_rooms_that_can_be_read(tmp_path):
    command = [sys.executable, "-m", "data.synthetic_rooms", "--export", tmp_path / "ply"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0 and "share of a room's points: ceiling" in done.stdout, done.stderr
    files = sorted((tmp_path / "ply").glob("*.ply"))
    assert len(files) == 2
    assert read_object(files[1].read_bytes(), ".ply")[0].shape == (40_000, 3)
