"""Procedural streets, scanned by a simulated spinning lidar that stands in for SemanticKITTI's.

    python -m data.synthetic_street                 shares of the classes, seconds
    python -m data.synthetic_street --export DIR    writes two scans as .ply

A street is a list of simple bodies: boxes, upright cylinders, ellipsoids. Every ray of the sensor
takes the nearest one that it meets, so there is one return a ray, shadows, and fewer points far
away. Numbers reached on this data say that a script works and nothing more.
"""
import argparse
import time
from pathlib import Path

import numpy as np

from data.files import write_ply

STREET_CLASSES = ("car", "person", "bicyclist", "road", "sidewalk", "building", "fence",
                  "vegetation", "trunk", "terrain", "pole", "traffic-sign")       # as SemanticKITTI
(CAR, PERSON, RIDER, ROAD, SIDEWALK, BUILDING, FENCE, VEGETATION, TRUNK, TERRAIN, POLE,
 SIGN) = range(12)
REMISSION = (.4, .35, .35, .25, .4, .35, .3, .3, .25, .35, .5, .9)                # of each class
HEIGHT = 1.73                               # of the sensor above the road, metres
BEAMS, COLUMNS = 40, 600                    # rays of a turn
UP, DOWN = 3.0, -25.0                       # degrees, the highest beam and the lowest
REACH = 60.0                                # metres: beyond, nothing comes back
NOISE, LOST = .02, .05                      # of a range, metres; share of rays without a return
BOX, CYLINDER, ELLIPSOID = range(3)


class Street:
    """Bodies in the street's frame: x along it, y across it, z up from the road.

    Each is (kind, class, center (3,), half sizes (3,), yaw, remission): a body keeps its remission.
    """

    def __init__(self, rng):
        self.rng, self.bodies = rng, []

    def add(self, kind, label, center, half, yaw=0.0):
        bright = np.clip(REMISSION[label] * self.rng.uniform(.6, 1.4), 0, 1)
        self.bodies.append((kind, label, center, half, yaw, bright))

    def standing(self, kind, label, x, y, low, half, yaw=0.0):
        """A body whose lowest point is at height `low`."""
        self.add(kind, label, (x, y, low + half[2]), half, yaw)

    # --- what stands in a street

    def car(self, x, y, yaw):
        length, width = self.rng.uniform((1.9, .8), (2.3, .95))
        height = self.rng.uniform(.42, .6)
        self.standing(BOX, CAR, x, y, .25, (length, width, height), yaw)
        back = -.2 * length
        cabin = x + back * np.cos(yaw), y + back * np.sin(yaw)
        self.standing(BOX, CAR, *cabin, .25 + 2 * height, (.55 * length, .88 * width, .3), yaw)

    def human(self, label, x, y, low, height, yaw=0.0):
        """Legs, torso and head of a person, or of a rider with the hips at `low`."""
        if label == PERSON:
            step = self.rng.uniform(.05, .25) * np.array([np.cos(yaw), np.sin(yaw)])
            for side in (-1, 1):
                foot = x + side * step[0], y + side * step[1]
                self.standing(CYLINDER, label, *foot, low, (.09, .09, height / 4))
            low = low + .45 * height
        torso = .21 * height
        self.standing(ELLIPSOID, label, x, y, low, (.19, .27, torso), yaw)
        self.standing(ELLIPSOID, label, x, y, low + 2 * torso - .05, (.11, .11, .13))

    def rider(self, x, y, yaw):
        ahead = np.array([np.cos(yaw), np.sin(yaw)])
        for along in (-.52, .52):                                       # wheels, seen as discs
            wheel = x + along * ahead[0], y + along * ahead[1]
            self.standing(BOX, RIDER, *wheel, 0, (.33, .03, .33), yaw)
        self.standing(BOX, RIDER, x, y, .45, (.5, .03, .1), yaw)
        self.standing(BOX, RIDER, x + .05, y, .35, (.12, .15, .3), yaw)     # legs
        self.human(RIDER, x, y, .85, 1.75, yaw)

    def tree(self, x, y, low):
        trunk, crown = self.rng.uniform((.12, 1.5), (.3, 3)), self.rng.uniform(1.3, 2.8, 3)
        self.standing(CYLINDER, TRUNK, x, y, low, (trunk[0], trunk[0], trunk[1] / 2 + .3))
        self.standing(ELLIPSOID, VEGETATION, x, y, low + trunk[1], crown)

    def pole(self, x, y, low, sign):
        radius, height = self.rng.uniform((.05, 2.2), (.12, 3))
        if sign:
            size = self.rng.uniform(.3, .45)
            self.standing(BOX, SIGN, x - .1, y, low + height - .3, (.03, size, size))
        else:                                                           # a lamp
            height = self.rng.uniform(5, 8)
        self.standing(CYLINDER, POLE, x, y, low, (radius, radius, height / 2))

    def side(self, sign, edge, walk):
        """One side of the street, from its edge on: pavement, then houses or gardens."""
        rng, low, line = self.rng, .14, edge + walk
        self.standing(BOX, SIDEWALK, 0, sign * (edge + walk / 2), 0, (90, walk / 2, low / 2))
        for x in np.arange(-50, 50, 9) + rng.uniform(0, 9):
            self.pole(x, sign * (edge + .35), low, rng.random() < .6)
        for x in rng.uniform(-40, 40, rng.integers(5, 12)):
            self.human(PERSON, x, sign * (edge + rng.uniform(.6, walk - .3)), low,
                       rng.uniform(1.55, 1.9), rng.uniform(0, 2 * np.pi))
        x = -60.0
        while x < 60:
            length, depth = rng.uniform((9, 4), (18, 8))
            garden = rng.uniform(4, 9)
            middle, kind = x + length / 2, rng.random()
            x += length
            house = line if kind < .25 else line + garden
            half = length / 2 - rng.uniform(0, 2), depth / 2, rng.uniform(2.5, 6)
            if kind < .8:
                self.standing(BOX, BUILDING, middle, sign * (house + depth / 2), 0, half)
            if kind < .25:
                continue
            if rng.random() < .5:
                half = length / 2, .05, rng.uniform(.4, .9)
                self.standing(BOX, FENCE, middle, sign * (line + .2), 0, half)
            for _ in range(rng.integers(2, 6)):
                place = middle + rng.uniform(-.5, .5) * length, rng.uniform(1.5, garden)
                if rng.random() < .6:
                    self.tree(place[0], sign * (line + place[1]), 0)
                else:
                    half = rng.uniform((.5, .5, .4), (1.5, 1.2, .9))
                    self.standing(ELLIPSOID, VEGETATION, place[0], sign * (line + place[1]), -.2,
                                  half)


def make_street(rng):
    """-> Street, half the width of its road, where the sensor stands: its y and its yaw."""
    street, edge = Street(rng), rng.uniform(4.5, 6.5)
    for sign in (-1, 1):
        street.side(sign, edge, rng.uniform(2, 4))
        parked = rng.uniform(-45, 45, rng.integers(3, 9))
        for x in parked[np.abs(parked) > 4]:
            if all(abs(x - other) > 5.5 for other in parked if other < x):
                street.car(x, sign * (edge - 1.1), rng.normal(0, .03) + np.pi * (sign > 0))
        for x in rng.uniform(5, 40, 2) * rng.choice((-1, 1), 2):
            if rng.random() < .5:
                street.car(x, sign * 1.6, rng.normal(0, .04) + np.pi * (sign > 0))
        for x in rng.uniform(3.5, 20, 2) * rng.choice((-1, 1), 2):
            street.rider(x, sign * rng.uniform(2.7, 3), rng.normal(0, .1) + np.pi * (sign > 0))
    return street, edge, rng.uniform(-2, -1), rng.normal(0, .1)


# ---- The sensor ----------------------------------------------------------------------------------
def rays(rng, beams, columns):
    """Directions (R, 3) of one turn, float32."""
    tilt = np.radians(np.linspace(UP, DOWN, beams))[:, None]
    turn = 2 * np.pi * (np.arange(columns) + rng.random()) / columns - np.pi
    flat = np.cos(tilt)
    x, y, z = np.broadcast_arrays(flat * np.cos(turn), flat * np.sin(turn), np.sin(tilt))
    return np.stack([x, y, z], -1).reshape(-1, 3).astype(np.float32)


def reaches(kind, center, half, yaw, origin, d):
    """Distance at which rays (R, 3) from `origin` enter a body, inf where they miss it: (R,)."""
    c, s = np.cos(yaw), np.sin(yaw)
    turn = np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]], np.float32)
    o = (turn @ (origin - center) / half).astype(np.float32)            # the body becomes a unit
    d = d @ turn.T / np.float32(half)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if kind == BOX:
            one, two = (-1 - o) / d, (1 - o) / d
            first, last = np.fmin(one, two).max(1), np.fmax(one, two).min(1)
        else:                                   # |o + t d|² = 1 in the axes that are round
            round_ = slice(0, 2 if kind == CYLINDER else 3)
            a = np.square(d[:, round_]).sum(1)
            b, rest = d[:, round_] @ o[round_], np.square(o[round_]).sum() - 1
            root = np.sqrt(b * b - a * rest)                            # NaN: it misses
            first, last = (-b - root) / a, (-b + root) / a
            if kind == CYLINDER:
                one, two = (-1 - o[2]) / d[:, 2], (1 - o[2]) / d[:, 2]
                first = np.maximum(first, np.minimum(one, two))
                last = np.minimum(last, np.maximum(one, two))
        return np.where((first <= last) & (first > 0), first, np.inf)


def scan_street(seed, beams=None, columns=None):
    """One turn of the sensor in a street of its own. beams, columns: its rays, instead of ours.

    returns xyz (n, 3) float32, metres, the sensor at 0 looking along +x; remission (n,) float32 in
    0..1; label (n,) int64 into STREET_CLASSES.
    """
    rng = np.random.default_rng(seed)
    street, edge, y, yaw = make_street(rng)
    d = rays(rng, beams or BEAMS, columns or COLUMNS)
    turn = np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
    ahead = d @ turn.T.astype(np.float32)                               # in the street's frame
    origin = np.array([0, y, HEIGHT], np.float32)
    with np.errstate(divide="ignore"):
        reach = np.where(ahead[:, 2] < 0, -HEIGHT / ahead[:, 2], np.inf)    # the ground
    across = np.abs(y + np.where(np.isfinite(reach), reach, 0) * ahead[:, 1])
    label = np.where(across < edge, ROAD, TERRAIN)
    bright = np.array(REMISSION)[label]
    for kind, of_body, center, half, angle, remission in street.bodies:
        distance = np.hypot(center[0], center[1] - y)
        if distance > REACH + max(half):
            continue
        mine = toward(ahead, center[0], center[1] - y, distance, np.hypot(half[0], half[1]))
        at = reaches(kind, np.float32(center), np.float32(half), angle, origin, ahead[mine])
        if of_body == VEGETATION:               # leaves: some rays get through, some go deeper
            at = np.where(rng.random(len(at)) < .3, np.inf, at + rng.exponential(.15, len(at)))
        nearer = at < reach[mine]
        rows = mine[nearer]
        reach[rows], label[rows], bright[rows] = at[nearer], of_body, remission
    kept = (reach < REACH) & (rng.random(len(reach)) > LOST)
    reach = reach + rng.normal(0, NOISE, len(reach))
    bright = (bright * (1 - reach.clip(0, REACH) / (2 * REACH))
              + rng.normal(0, .04, len(reach))).clip(0, 1)
    xyz = d[kept] * reach[kept, None]
    return xyz.astype(np.float32), bright[kept].astype(np.float32), label[kept]


def toward(d, x, y, distance, radius):
    """Rows of the rays (R, 3) that can meet what lies within `radius` of (x, y): most cannot."""
    if distance <= 1.01 * radius:
        return np.arange(len(d))
    along = (d[:, 0] * x + d[:, 1] * y) / distance
    least = np.sqrt(1 - (radius / distance) ** 2) * .999
    return np.flatnonzero(along > least * np.hypot(d[:, 0], d[:, 1]))


def street_scans(count, seed):
    """`count` scans (see `scan_street`); scan i does not depend on how many others are made."""
    return (scan_street([seed, i]) for i in range(count))


def main():
    parser = argparse.ArgumentParser(prog="python -m data.synthetic_street",
                                     description=__doc__.split("\n")[0])
    parser.add_argument("--export", metavar="DIR", type=Path, help="write .ply files there")
    folder = parser.parse_args().export
    started = time.time()
    found = list(street_scans(10, 0))
    seconds = (time.time() - started) / len(found)
    label = np.concatenate([label for *_, label in found])
    shares = [f"{name} {100 * np.mean(label == k):.1f} %" for k, name in enumerate(STREET_CLASSES)]
    print("share of a scan's points:", *shares)
    print(f"{len(label) / len(found):,.0f} points, {1e3 * seconds:.0f} ms for a scan")
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        for i, (xyz, remission, _) in enumerate(found[:2]):
            grey = np.repeat((255 * remission[:, None]).astype(np.uint8), 3, 1)
            write_ply(folder / f"street_{i}.ply", xyz, grey)
        print(f"2 files in {folder}")


if __name__ == "__main__":
    from run import main_guard
    main_guard(main)
