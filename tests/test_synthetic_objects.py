"""data/synthetic_objects.py: seeds, meshes, areas, classes too hard for a trivial classifier."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.meshes import read_object, sample_surface
from data.objects import MODELNET40
from data.synthetic_objects import ALL_CLASSES, OBJECT_CLASSES, make_object, object_clouds

ROOT = Path(__file__).resolve().parent.parent


def test_seeds_decide_everything_and_an_object_does_not_depend_on_how_many_are_made():
    xyz, label = object_clouds(2, 256, 5)
    assert xyz.shape == (2 * len(OBJECT_CLASSES), 256, 3) and xyz.dtype == np.float32
    assert label.tolist() == [k for k in range(len(OBJECT_CLASSES)) for _ in range(2)]
    np.testing.assert_array_equal(object_clouds(2, 256, 5)[0], xyz)
    np.testing.assert_array_equal(object_clouds(1, 256, 5)[0], xyz[::2])
    assert (np.abs(object_clouds(2, 256, 6)[0] - xyz).max((1, 2)) > 1e-3).all()
    assert np.isfinite(xyz).all()


def test_the_classes_are_modelnet40_s_and_the_first_twenty_are_asked_for_by_default():
    assert ALL_CLASSES == MODELNET40
    assert len(OBJECT_CLASSES) == 20 and set(OBJECT_CLASSES) < set(ALL_CLASSES)
    assert list(OBJECT_CLASSES) == sorted(OBJECT_CLASSES)
    two = ("vase", "tent")
    xyz, label = object_clouds(2, 64, 3, two)
    assert label.tolist() == [0, 0, 1, 1] and xyz.shape == (4, 64, 3)
    assert len(np.unique(object_clouds(1, 64, 3, ALL_CLASSES)[1])) == 40


# Vertices, and the mean of their distances from the axis and of their heights, in mm: results on
# the built-in data were measured with these objects.
FIRST = {
    "airplane": (238, 1401.09, 378.95), "bed": (220, 888.25, 659.61),
    "bench": (336, 765.33, 458.97), "bookshelf": (96, 618.05, 977.94),
    "bottle": (220, 26.27, 201.60), "car": (344, 1584.03, 380.04),
    "chair": (336, 319.74, 489.20), "cup": (500, 43.65, 61.42),
    "desk": (864, 714.72, 398.78), "door": (112, 402.70, 1103.70),
    "guitar": (198, 97.26, 811.83), "lamp": (340, 63.89, 292.20),
    "monitor": (26, 203.46, 159.06), "night_stand": (96, 358.83, 178.41),
    "sofa": (216, 1080.25, 158.53), "stool": (272, 199.40, 525.59),
    "table": (32, 682.69, 554.75), "toilet": (176, 162.87, 256.70),
    "vase": (480, 73.52, 190.81), "wardrobe": (128, 665.37, 562.70)}


@pytest.mark.parametrize("name", FIRST)
def test_the_first_twenty_classes_are_as_they_were(name):
    xyz = make_object(name, np.random.default_rng(7))[0].astype(float)
    count, distance, height = FIRST[name]
    assert len(xyz) == count
    assert 1e3 * np.linalg.norm(xyz[:, :2], axis=1).mean() == pytest.approx(distance, abs=.01)
    assert 1e3 * xyz[:, 2].mean() == pytest.approx(height, abs=.01)


@pytest.mark.parametrize("name", ALL_CLASSES)
def test_objects_are_meshes_of_sensible_size_that_stand_on_the_floor(name):
    for seed in range(10):
        vertices, faces = make_object(name, np.random.default_rng(seed))
        low, high = vertices.min(0), vertices.max(0)
        assert vertices.dtype == np.float32 and faces.dtype == np.int64
        assert np.isfinite(vertices).all() and 0 <= faces.min() and faces.max() < len(vertices)
        assert low[2] == pytest.approx(0, abs=1e-5) and np.allclose(low[:2], -high[:2], atol=1e-5)
        assert 0.05 < (high - low).max() < 16 and (high - low).min() > 0.01
        a, b, c = vertices[faces].transpose(1, 0, 2).astype(float)
        assert (a * np.cross(b, c)).sum() > 0  # closed, and counter-clockwise from outside
        again = make_object(name, np.random.default_rng(seed))
        np.testing.assert_array_equal(again[0], vertices)
        np.testing.assert_array_equal(again[1], faces)


@pytest.mark.parametrize("name", ALL_CLASSES)
def test_no_two_objects_of_a_class_are_alike(name):
    sizes = []
    for seed in range(12):
        vertices, _ = make_object(name, np.random.default_rng(seed))
        size = np.sort(np.ptp(vertices, axis=0))
        sizes.append(size / size[2])
    apart = np.abs(np.array(sizes)[:, None] - sizes).max(2) + np.eye(12)
    assert np.median(apart.min(1)) > .01  # of the length, to the most similar one
    assert np.median(apart) > .045


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
    command = [sys.executable, "-m", "data.synthetic_objects", "--export", tmp_path / "ply"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0 and f"{len(ALL_CLASSES)} classes" in done.stdout, done.stderr
    files = sorted((tmp_path / "ply").glob("*.ply"))
    assert len(files) == 2 * len(ALL_CLASSES)
    assert read_object(files[0].read_bytes(), ".ply")[0].shape == (2048, 3)
