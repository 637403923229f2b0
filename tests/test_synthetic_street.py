"""data/synthetic_street.py: rays and bodies, what a scan holds, repeats, shadows."""
import numpy as np
import pytest

from data import synthetic_street as street
from data.synthetic_street import BOX, CYLINDER, ELLIPSOID, HEIGHT, STREET_CLASSES


@pytest.fixture(scope="module")
def scans():
    return list(street.street_scans(3, 7))


@pytest.mark.parametrize("kind", [BOX, CYLINDER, ELLIPSOID])
def test_rays_enter_a_body_where_a_walk_along_them_does(kind):
    rng = np.random.default_rng(kind)
    center, half, yaw = np.float32([4, 1, .3]), np.float32([1.5, .8, .6]), .7
    if kind == CYLINDER:
        half[1] = half[0]
    d = rng.normal((4, 1, .3), 1.2, (400, 3)).astype(np.float32)
    d /= np.linalg.norm(d, axis=1, keepdims=True)
    at = street.reaches(kind, center, half, yaw, np.zeros(3, np.float32), d)
    walk = np.arange(0, 9, .002)
    place = walk[:, None, None] * d - center                            # (walk, ray, 3)
    c, s = np.cos(yaw), np.sin(yaw)
    x, y, z = (place @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) / half).transpose(2, 0, 1)
    inside = {BOX: np.maximum(abs(x), abs(y)) <= 1, CYLINDER: x * x + y * y <= 1,
              ELLIPSOID: x * x + y * y + z * z <= 1}[kind] & (abs(z) <= 1)
    first = np.where(inside.any(0), walk[inside.argmax(0)], np.inf)
    both = np.isfinite(at) & np.isfinite(first)
    assert both.sum() > 60 and np.isinf(at).sum() > 60
    np.testing.assert_allclose(at[both], first[both], atol=.003)
    assert (np.isfinite(at) != np.isfinite(first)).sum() <= 4           # it only grazes the body


def test_a_body_behind_the_sensor_is_not_seen_and_one_around_it_neither():
    d = np.float32([[1, 0, 0]])
    for center in ((-3, 0, 0), (.2, 0, 0)):
        at = street.reaches(BOX, np.float32(center), np.float32([1, 1, 1]), 0., np.zeros(3), d)
        assert np.isinf(at).all()


def test_no_ray_that_meets_a_body_is_left_out():
    rng = np.random.default_rng(0)
    d = street.rays(rng, street.BEAMS, street.COLUMNS)
    for _ in range(20):
        center = rng.uniform((-20, -20, -1), (20, 20, 1)).astype(np.float32)
        half = rng.uniform(.1, 4, 3).astype(np.float32)
        yaw = rng.uniform(0, 7)
        seen = street.reaches(BOX, center, half, yaw, np.zeros(3, np.float32), d) < np.inf
        mine = street.toward(d, *center[:2], np.hypot(*center[:2]), np.hypot(*half[:2]))
        assert np.isin(np.flatnonzero(seen), mine).all()


def test_a_scan_has_all_classes_and_repeats_by_its_seed(scans):
    assert set(np.concatenate([label for *_, label in scans])) == set(range(12))
    for xyz, remission, label in scans:
        assert xyz.dtype == remission.dtype == np.float32 and len(xyz) == len(remission)
        assert 10_000 < len(label) <= street.BEAMS * street.COLUMNS and len(xyz) == len(label)
        assert remission.min() >= 0 and remission.max() <= 1 and np.isfinite(xyz).all()
        assert np.linalg.norm(xyz, axis=1).max() < street.REACH + 1
    again = next(street.street_scans(1, 7))
    assert all((a == b).all() for a, b in zip(scans[0], again))
    assert len(scans[0][0]) != len(scans[1][0])


def test_every_ray_returns_at_most_once_from_within_the_sensors_view(scans):
    for xyz, _, _ in scans:
        tilt = np.degrees(np.arctan2(xyz[:, 2], np.hypot(*xyz[:, :2].T)))
        beam = (street.UP - tilt) / (street.UP - street.DOWN) * (street.BEAMS - 1)
        assert np.abs(beam - beam.round()).max() < .01
        turn = np.arctan2(xyz[:, 1], xyz[:, 0]) / (2 * np.pi) * street.COLUMNS
        turn = (turn - turn[0]).round().astype(int) % street.COLUMNS
        assert len(np.unique(beam.round().astype(int) * street.COLUMNS + turn)) == len(xyz)


def test_the_road_lies_below_the_pavement_and_people_stand_on_it(scans):
    xyz, label = (np.concatenate([scan[i] for scan in scans]) for i in (0, 2))
    near = np.hypot(*xyz[:, :2].T) < 12
    height = {name: xyz[near & (label == k), 2] + HEIGHT for k, name in enumerate(STREET_CLASSES)}
    assert np.abs(height["road"]).max() < .08
    assert abs(np.median(height["sidewalk"]) - .14) < .03
    assert .1 < height["person"].min() < .6 and 1.2 < height["person"].max() < 2.2


def test_what_stands_behind_a_wall_is_hidden(monkeypatch):
    def wall_and_car(rng):
        made = street.Street(rng)
        made.standing(BOX, street.BUILDING, 6, 0, 0, (.2, 20, 5))
        made.car(12, 0, 0)
        made.car(-12, 0, 0)
        return made, 8., 0., 0.

    monkeypatch.setattr(street, "make_street", wall_and_car)
    xyz, _, label = street.scan_street(0)
    assert (xyz[label == street.CAR, 0] < 0).all() and (label == street.CAR).sum() > 50
    assert (np.abs(xyz[label == street.BUILDING, 0] - 5.8) < .2).sum() > 1000
