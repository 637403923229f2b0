"""Procedural objects and rooms: every training script runs with no download.

    python synthetic.py                 the classes, their sizes, and the seconds it takes
    python synthetic.py --export DIR    two objects of each class and two rooms as .ply, for MeshLab or CloudCompare

Objects carry ModelNet40's class names. They are made of boxes, prisms and surfaces of revolution
with random proportions and optional parts, then "scanned": cameras, holes, noise. Everything
follows from seeds. Metres, z up, an object's front looks towards +x. Rooms are furnished with these
objects; they carry S3DIS's classes for each point and boxes of furniture named as in ScanNet.
Numbers reached on this data say that a script works and nothing more; never set them beside
published ones.
"""
import argparse
import time
from pathlib import Path

import numpy as np

# How hard the object clouds are. Lengths are shares of the object's radius.
NOISE = 0.012       # sigma of the sensor noise
STRETCH = 0.20      # every axis is scaled by a factor from 1 - STRETCH to 1 + STRETCH
VIEWS = 2           # cameras around the object; what none of them sees is missing
CUT = 0.30          # up to this share of the seen points is cut off by a random plane


# ---- primitives: each returns a mesh (vertices (V, 3), faces (F, 3)), faces counter-clockwise from outside ----

def box(size, at):
    """Cuboid of `size` (x, y, z); `at` is the centre of its bottom face."""
    corners = np.array([(x, y, z) for x in (-.5, .5) for y in (-.5, .5) for z in (0, 1)])
    quads = np.array([(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)])
    return corners * size + at, split(quads)


def split(quads):
    """Two triangles per quad: (Q, 4) -> (2 Q, 3)."""
    return np.concatenate([quads[:, (0, 1, 2)], quads[:, (0, 2, 3)]])


def lathe(profile, at=(0, 0, 0), axis="z", sides=20, squash=1.0):
    """Surface of revolution. `profile` lists (radius, height) from the bottom up the outside (and,
    for open vessels, down the inside); `squash` scales x."""
    r, h = np.array(profile, float).T
    turn = np.arange(sides) * 2 * np.pi / sides
    ring = np.stack([squash * np.cos(turn), np.sin(turn), np.zeros(sides)], 1)
    vertices = ring * r[:, None, None] + h[:, None, None] * np.array([0, 0, 1])      # (P, sides, 3)
    i, j = (k.ravel() for k in np.mgrid[:len(r) - 1, :sides])
    a, b = i * sides + j, i * sides + (j + 1) % sides
    vertices = np.roll(vertices.reshape(-1, 3), "zxy".index(axis), axis=1)
    return vertices + at, split(np.stack([a, b, b + sides, a + sides], 1))


def ellipsoid(radii, centre):
    turn = np.linspace(-np.pi / 2, np.pi / 2, 9)
    vertices, faces = lathe(np.stack([np.cos(turn), np.sin(turn)], 1))
    return vertices * radii + centre, faces


def tube(start, end, r0, r1=None, sides=10):
    """Straight rod from `start` to `end`, radius r0 there and r1 here (4 sides: a square bar)."""
    start, along = np.array(start, float), np.subtract(end, start)
    length = np.linalg.norm(along)
    z = along / length
    x = np.cross((0, 1, 0) if abs(z[1]) < 0.9 else (1, 0, 0), z)
    x /= np.linalg.norm(x)
    vertices, faces = lathe([(0, 0), (r0, 0), (r0 if r1 is None else r1, length), (0, length)], sides=sides)
    return vertices @ np.stack([x, np.cross(z, x), z]) + start, faces


def prism(outline, thickness, axis, at=(0, 0, 0)):
    """`outline` (P, 2), star-shaped seen from its mean, drawn in the plane of the two other axes
    and extruded to both sides along `axis`."""
    outline = np.array(outline, float)
    p, k = len(outline), "xyz".index(axis)
    flat = np.concatenate([outline, outline.mean(0, keepdims=True)])                 # (P + 1, 2)
    vertices = np.concatenate([np.insert(flat, k, side * thickness / 2, 1) for side in (-1, 1)])
    a, b = np.arange(p), (np.arange(p) + 1) % p
    low, high = np.stack([b, a, a * 0 + p], 1), np.stack([a, b, a * 0 + p], 1) + p + 1
    faces = np.concatenate([low, high, split(np.stack([a, b, b + p + 1, a + p + 1], 1))])
    x, y = outline.T
    clockwise = (x * np.roll(y, -1) - y * np.roll(x, -1)).sum() < 0
    return vertices + at, faces[:, ::-1] if clockwise != (axis == "y") else faces


def join(parts):
    """One mesh out of many."""
    starts = np.cumsum([0] + [len(v) for v, _ in parts[:-1]])
    return (np.concatenate([v for v, _ in parts]),
            np.concatenate([f + start for (_, f), start in zip(parts, starts)]))


# ---- parts that several classes share; w is along y, d along x, h along z ----

def legs(rng, d, w, h):
    """Four legs under a plate, sometimes splayed, sometimes joined by stretchers."""
    r, splay, sides = rng.uniform(.015, .035), rng.choice([1, 1.15]), rng.choice([4, 10])
    feet = np.array([(x * (d / 2 - r), y * (w / 2 - r)) for x, y in ((-1, -1), (-1, 1), (1, 1), (1, -1))])
    parts = [tube((x, y, h), (x * splay, y * splay, 0), r, r * .7, sides) for x, y in feet]
    if rng.random() < .4:
        z, k = h * rng.uniform(.2, .5), 1 + (splay - 1) * .65
        parts += [tube((*feet[i] * k, z), (*feet[i - 1] * k, z), r * .6) for i in range(4)]
    return parts


def pedestal(rng, d, w, h):
    """One column on a disc or on a star of feet."""
    r, reach = rng.uniform(.02, .05), min(d, w) * rng.uniform(.35, .5)
    parts = [tube((0, 0, .02), (0, 0, h), r)]
    if rng.random() < .5:
        return parts + [lathe([(0, 0), (reach, 0), (reach, .02), (r, .05), (0, .05)])]
    n, turn = rng.integers(3, 6), rng.uniform(0, 6)
    return parts + [tube((0, 0, .06), (reach * np.cos(a), reach * np.sin(a), .02), .02)
                    for a in turn + np.arange(n) * 2 * np.pi / n]


def slabs(rng, d, w, h):
    """Two boards as end walls."""
    t = rng.uniform(.02, .06)
    return [box((d * rng.uniform(.7, 1), t, h), (0, side * (w / 2 - t), 0)) for side in (-1, 1)]


def plate(rng, d, w, h, thickness, round_share):
    """A seat or table top whose lower side is at h: a box or an ellipse."""
    if rng.random() < round_share:
        return [lathe([(0, h), (w / 2, h), (w / 2, h + thickness), (0, h + thickness)], squash=d / w, sides=28)]
    return [box((d, w, thickness), (0, 0, h))]


def backrest(rng, w, z, height, x):
    """A panel, upright bars or cross bars at depth x, from z upwards."""
    kind, lean, n = rng.integers(3), height * rng.uniform(0, .25), rng.integers(3, 7)
    rod = lambda y0, y1, t0, t1, r: tube((x - lean * t0, y0, z + height * t0),
                                         (x - lean * t1, y1, z + height * t1), r, sides=6)
    posts = [rod(y, y, 0, 1, .02) for y in (-w / 2 + .02, w / 2 - .02)]
    if kind == 0:
        return [prism([(x, z), (x - lean, z + height), (x - lean - .04, z + height), (x - .04, z)], w, "y")]
    if kind == 1:
        return posts + [rod(y, y, 0, .95, .012) for y in np.linspace(-w / 2, w / 2, n + 2)[1:-1]] + [
            rod(-w / 2, w / 2, .95, .95, .025)]
    return posts + [rod(-w / 2, w / 2, t, t, .03) for t in np.linspace(.25, .95, n - 1)]


def arms(rng, d, w, z, height):
    """Arm rests on posts, left and right."""
    return [part for y in (-w / 2, w / 2) for part in (
        box((d * .85, .05, .03), (0, y, z + height)),
        *(tube((x, y, z), (x, y, z + height), .015) for x in (-d * .35, d * .35)))]


def fronts(rng, d, w, z, h, rows, columns=1, y=0):
    """Drawer or door panels with knobs or bars on the +x side of a case."""
    bar, parts = rng.random() < .5, []
    for i in range(rows):
        for j in range(columns):
            at = (d / 2 + .01, y + w * ((j + .5) / columns - .5), z + h * i / rows + .01)
            parts.append(box((.02, w / columns - .02, h / rows - .02), at))
            knob = (at[0] + .02, at[1], at[2] + h / rows / 2)
            parts.append(box((.02, .12, .02), knob) if bar else ellipsoid((.02, .02, .02), knob))
    return parts


def feet_or_plinth(rng, d, w, h):
    return legs(rng, d, w, h) if rng.random() < .5 else [box((d * .94, w * .94, h), (0, 0, 0))]


# ---- one recipe per class: random sizes first, then the parts ----

def airplane(rng):
    length, span, r, sweep = rng.uniform((3, 3.5, .22, 0), (5, 5.8, .4, .9))
    z, x = r * rng.uniform(-.7, .9), length * rng.uniform(-.05, .12)
    chord, t = length * rng.uniform(.12, .2), length * np.linspace(-.5, .5, 9)
    hull = r * np.array([.12, .3, .55, .8, 1, 1, .95, .7, 0])
    wing = lambda x, y, c, s: [(x, 0), (x - s, y), (x - s - c * .5, y), (x - c, 0),
                               (x - s - c * .5, -y), (x - s, -y)]
    tail, fin = -length * .38, length * rng.uniform(.12, .2)
    parts = [lathe([(0, t[0]), *zip(hull, t)], axis="x"),
             prism(wing(x + chord, span / 2, chord * 1.3, sweep), .06, "z", (0, 0, z)),
             prism(wing(tail, span * .2, chord * .8, sweep * .4), .04, "z",
                   (0, 0, fin if rng.random() < .3 else r * .3)),
             prism([(tail, 0), (tail - fin * .7, fin + .05), (tail - fin, fin + .05), (tail - fin * .7, 0)],
                   .04, "y")]
    for y in span * np.array([.17, .32][:rng.integers(0, 3)]):
        parts += [tube((x + chord, side * y, z - .12), (x + .1, side * y, z - .12), .1) for side in (-1, 1)]
    return parts


def bed(rng):
    d, w, h, back = rng.uniform((1.75, .8, .28, .25), (2.15, 1.9, .6, .8))
    low, thick = h * rng.uniform(.2, .5), h * .4
    parts = [box((d, w, h - thick), (0, 0, low)), box((d * .97, w * .96, thick), (0, 0, low + h - thick))]
    parts += feet_or_plinth(rng, d, w, low)
    parts.append(box((.06, w, low + h + back), (-d / 2 - .03, 0, 0)))
    if rng.random() < .4:
        parts.append(box((.06, w, low + h + back * .4), (d / 2 + .03, 0, 0)))
    n = rng.integers(1, 3)
    return parts + [ellipsoid((.2, w * .4 / n, .09), (-d * .36, w * ((i + .5) / n - .5), low + h + .04))
                    for i in range(n)]


def bench(rng):
    d, w, h = rng.uniform((.28, .8, .36), (.55, 1.9, .52))
    parts = plate(rng, d, w, h, rng.uniform(.03, .1), 0)
    parts += (slabs if rng.random() < .4 else legs)(rng, d, w, h)
    if rng.random() < .55:
        parts += backrest(rng, w, h, rng.uniform(.25, .5), -d / 2 + .03)
    if rng.random() < .4:
        parts += arms(rng, d, w, h, rng.uniform(.15, .25))
    return parts


def bookshelf(rng):
    d, w, h = rng.uniform((.22, .5, .7), (.5, 1.5, 2.1))
    n, t = rng.integers(2, 6), rng.uniform(.015, .04)
    boards = np.linspace(.04, h - t, n + 1)
    parts = [box((d, t, h), (0, y, 0)) for y in (-w / 2, w / 2)]
    parts += [box((d, w, t), (0, 0, z)) for z in boards]
    if rng.random() < .6:
        parts.append(box((.015, w, h), (-d / 2, 0, 0)))
    if rng.random() < .3:
        parts.append(box((d, t, h), (0, 0, 0)))
    for z in boards[:-1][rng.random(n) < .5]:                               # a row of books fills part of a shelf
        fill, tall = rng.uniform(.2, .45), (boards[1] - boards[0]) * rng.uniform(.5, .85)
        parts.append(box((d * .7, w * fill, tall), (0, w * rng.choice([-1, 1]) * (.48 - fill / 2), z)))
    return parts


def bottle(rng):
    r, h, neck, shoulder = rng.uniform((.03, .16, .25, .45), (.055, .34, .5, .75))
    bend = np.linspace(0, 1, 5)
    slope = zip(r * (1 - (1 - neck) * bend ** rng.uniform(.8, 2)), h * (shoulder + .18 * bend))
    lip = r * neck * rng.uniform(1.05, 1.4)
    profile = [(0, 0), (r, 0), *slope, (r * neck, h * .93), (lip, h * .93), (lip, h), (0, h)]
    parts = [lathe(profile, sides=rng.choice([4, 20, 20]))]
    if rng.random() < .2:                                                   # a jug's handle
        parts += ring_handle(r, h * .45, h * .3, .25 * r)
    return parts


def ring_handle(r, z, height, thickness):
    """A half ring of rods on the +y side of a vessel of radius r."""
    turn = np.linspace(-np.pi / 2, np.pi / 2, 6)
    dots = np.stack([turn * 0, r * .95 + height * .45 * np.cos(turn), z + height / 2 * np.sin(turn)], 1)
    return [tube(a, b, thickness, sides=6) for a, b in zip(dots, dots[1:])]


def car(rng):
    length, w, h, clear = rng.uniform((3.2, 1.5, .5, .15), (5, 1.95, .85, .3))
    cabin, roof = rng.uniform(.35, .65), h + rng.uniform(.4, .8)
    front, back = length * rng.uniform(.1, .3), length * (rng.uniform(.1, .3) - cabin)
    back, wheel, x = max(back, -length * .48), rng.uniform(.26, .36), length / 2
    slant = rng.uniform(.1, .5, 2)
    body = [(-x, 0), (x, 0), (x, h * .6), (front, h), (back, h), (-x, h * rng.uniform(.75, 1))]
    glass = [(front, h), (front - slant[0], roof), (back + slant[1] * .6, roof), (back, h)]
    parts = [prism(body, w, "y", (0, 0, clear)), prism(glass, w * .88, "y", (0, 0, clear))]
    for x, y in ((-.31, -1), (-.31, 1), (.31, -1), (.31, 1)):
        hub = (x * length, y * (w / 2 - .1), wheel)
        parts.append(lathe([(0, -.1), (wheel, -.1), (wheel, .1), (0, .1)], hub, "y"))
    return parts


def chair(rng):
    d, w, h, thickness = rng.uniform((.36, .36, .36, .03), (.58, .6, .55, .1))
    parts = plate(rng, d, w, h, thickness, .25) + (pedestal if rng.random() < .25 else legs)(rng, d, w, h)
    parts += backrest(rng, w * rng.uniform(.7, 1), h, rng.uniform(.25, .65), -d / 2 + .03)
    if rng.random() < .35:
        parts += arms(rng, d, w, h, rng.uniform(.15, .28))
    return parts


def cup(rng):
    r, h, foot = rng.uniform((.032, .06, .55), (.055, .15, 1))
    wall, z = r * .1, np.linspace(0, 1, 6)
    outside = r * (foot + (1 - foot) * z ** rng.uniform(.3, 1.5))
    parts = [lathe([(0, 0), *zip(outside, h * z), *zip((outside - wall)[::-1], (h * (.06 + .94 * z))[::-1]),
                    (0, h * .06)])]
    if rng.random() < .8:
        parts += ring_handle(r, h * .5, h * rng.uniform(.45, .7), r * .11)
    if rng.random() < .2:
        parts.append(lathe([(0, -.01), (r, -.01), (r * 1.7, .005), (r, 0), (0, 0)]))
    return parts


def desk(rng):
    d, w, h = rng.uniform((.45, .9, .62), (.85, 1.7, .82))
    case, side = w * rng.uniform(.22, .34), rng.choice([-1, 1])
    parts = plate(rng, d, w, h, .04, 0)
    for s in (-1, 1):
        y = s * (w - case) / 2
        if s == side or rng.random() < .3:                                  # a case of drawers, at least on one side
            low = h * rng.choice([0, .1, .5])
            parts.append(box((d * .92, case, h - low), (0, y, low)))
            parts += fronts(rng, d * .92, case, low, h - low, rng.integers(1, 5), y=y)
        if s != side:
            parts += [box((d * .9, .04, h), (0, s * (w / 2 - .03), 0))]
        else:
            parts += [tube((x, s * w * .48, 0), (x, s * w * .48, h), .02) for x in (-d * .42, d * .42)]
    if rng.random() < .5:
        parts.append(box((.02, w, h * rng.uniform(.4, .9)), (-d * .4, 0, h * .1)))
    if rng.random() < .25:                                                  # a low shelf at the back of the top
        parts += [box((.22, w, .03), (-d / 2 + .11, 0, h + .3)), box((.02, w, .3), (-d / 2 + .01, 0, h))]
    return parts


def door(rng):
    w, h, t = rng.uniform((.6, 1.7, .03), (1.1, 2.2, .07))
    frame, swing = rng.uniform(.04, .1), rng.choice([0, rng.uniform(.1, .9)])
    v, f = box((t, w, h), (0, w / 2, 0))                                    # hinge at y = 0
    parts = [(v @ np.array([(np.cos(swing), np.sin(swing), 0), (-np.sin(swing), np.cos(swing), 0),
                            (0, 0, 1)]) - (0, w / 2, 0), f)]
    parts += [box((t * 2, frame, h + frame), (0, s * (w + frame) / 2, 0)) for s in (-1, 1)]
    parts.append(box((t * 2, w, frame), (0, 0, h)))
    at = np.array((-np.sin(swing), np.cos(swing), 0)) * w * .9 - (0, w / 2, -1)
    return parts + [tube(at, at + (.12, 0, 0), .025), tube(at, at - (.12, 0, 0), .025)]


def guitar(rng):
    w, h, t, waist = rng.uniform((.28, .4, .05, .15), (.42, .55, .12, .4))
    neck, z = rng.uniform(.4, .65), np.linspace(0, 1, 14)
    half = w * np.sqrt(z * (1 - z)) * (1.2 - .4 * z) * (1 - waist * np.exp(-((z - .58) / .16) ** 2))
    outline = np.concatenate([np.stack([half, z * h], 1), np.stack([-half, z * h], 1)[-2:0:-1]])
    parts = [prism(outline, t, "x"), box((.03, .06, neck + .1), (t / 2, 0, h - .1)),
             box((.02, rng.uniform(.07, .11), .16), (t / 2, 0, h + neck)),
             box((.03, w * .4, .03), (t / 2, 0, h * .22))]
    return parts + [tube((t / 2, -.07, z), (t / 2, .07, z), .008) for z in h + neck + np.array([.03, .08, .13])]


def lamp(rng):
    h, base, r0, r1, tall = rng.uniform((.3, .07, .05, .1, .14), (.75, .14, .14, .24, .3))
    parts = [lathe([(0, 0), (base, 0), (base, .02), (.015, .04), (0, .04)])]
    if rng.random() < .3:                                                   # an arm with a joint and a cone at its end
        joint, tip = (-h * .25, 0, h * .6), (h * .15, 0, h)
        return parts + [tube((0, 0, 0), joint, .015), tube(joint, tip, .015),
                        tube(tip, tip + np.array([.12, 0, -.12]), .04, r1 * .6, 16)]
    if rng.random() < .5:                                                   # a bellied foot like a vase
        parts.append(lathe([(0, 0), (.04, 0), (rng.uniform(.06, .12), h * .3), (.02, h * .6), (0, h * .6)]))
    if rng.random() < .35:
        h *= 2.2                                                            # a floor lamp
    shade = [(r1, h), (r0, h + tall), (r0 - .006, h + tall), (r1 - .006, h), (r1, h)]
    return parts + [tube((0, 0, 0), (0, 0, h + tall * .7), .014), lathe(shade)]


def monitor(rng):
    w, h, t, neck = rng.uniform((.38, .26, .02, .06), (.8, .46, .1, .16))
    tilt = rng.uniform(0, .12)
    screen = [(t, 0), (t - tilt, h), (-tilt, h), (0, 0)]
    parts = [prism(screen, w, "y", (0, 0, neck)), box((.04, .08, neck + h * .4), (-.04, 0, 0))]
    if rng.random() < .4:                                                   # the deep back of a tube screen
        parts.append(prism([(0, .02), (-.3, h * .2), (-.3, h * .8), (-tilt, h - .02)], w * .7, "y", (0, 0, neck)))
    d, base = rng.uniform((.14, .18), (.24, .4))
    return parts + plate(rng, d, base, 0, .02, .5)


def night_stand(rng):
    d, w, h, low = rng.uniform((.3, .32, .3, .04), (.55, .65, .6, .25))
    parts = feet_or_plinth(rng, d, w, low) + [box((d, w, .03), (0, 0, low + h - .03))]
    if rng.random() < .4:                                                   # an open shelf below one drawer
        parts += [box((d, .03, h), (0, s * (w / 2 - .015), low)) for s in (-1, 1)] + [
            box((d, w, .03), (0, 0, low)), box((d, w, h * .4), (0, 0, low + h * .6))]
        return parts + fronts(rng, d, w, low + h * .6, h * .4, 1)
    return parts + [box((d, w, h), (0, 0, low))] + fronts(rng, d, w, low, h, rng.integers(1, 4))


def sofa(rng):
    d, w, seat, back, arm = rng.uniform((.7, .9, .3, .25, .08), (1.05, 2.3, .48, .55, .26))
    low, n = rng.uniform(.03, .14), max(1, int(w / .7))
    t, inner = rng.uniform(.15, .28), w - 2 * arm
    parts = [box((d, w, seat * .6), (0, 0, low)), box((t, w, seat + back), (-d / 2 + t / 2, 0, low))]
    parts += legs(rng, d, w, low)
    parts += [box((d - t, inner / n - .02, seat * .4), (t / 2, inner * ((i + .5) / n - .5), low + seat * .6))
              for i in range(n)]
    tall = seat + rng.uniform(.08, .25)
    parts += [box((d, arm, tall), (0, s * (w - arm) / 2, low)) for s in (-1, 1)]
    if n > 1 and rng.random() < .25:                                        # a chaise
        parts.append(box((.6, w / n, seat), (d / 2 + .3, rng.choice([-1, 1]) * (w - w / n) / 2, low)))
    return parts


def stool(rng):
    d, h = rng.uniform((.28, .28), (.5, .78))
    w = d * rng.uniform(1, 1.4)
    thickness = rng.uniform(.03, .14)
    return plate(rng, d, w, h, thickness, .55) + (pedestal if rng.random() < .35 else legs)(rng, d * .8, w * .8, h)


def table(rng):
    d, h = rng.uniform((.45, .35), (1.1, 1))
    w = d * rng.uniform(1, 2)
    foot = rng.choice([legs, legs, pedestal, slabs])
    parts = plate(rng, d, w, h, rng.uniform(.02, .06), .35)
    if rng.random() < .2:
        parts.append(box((d * .6, w * .6, .02), (0, 0, h * .35)))           # a lower shelf
    return parts + foot(rng, d * .8, w * .85, h)


def toilet(rng):
    r, h, tank, tall = rng.uniform((.16, .34, .12, .25), (.22, .46, .22, .45))
    long, foot = rng.uniform(1.1, 1.4), rng.uniform(.5, .85)
    bowl = [(0, 0), (r * foot, 0), (r * foot * .9, h * .4), (r, h * .85), (r, h), (r * .72, h), (r * .5, h * .6),
            (0, h * .5)]
    x = -r * long - tank / 2 + .05
    parts = [lathe(bowl, squash=long), box((tank, r * rng.uniform(1.8, 2.5), tall), (x, 0, h - .04)),
             box((tank * .8, r, h), (x, 0, 0))]
    if rng.random() < .5:                                                   # the lid leans on the tank
        parts.append(lathe([(0, 0), (r, 0), (r, .02), (0, .02)], (x + tank / 2 + .03, 0, h + r), "x"))
    return parts


def vase(rng):
    h, r, foot, bulge, flare = rng.uniform((.16, .035, .4, .1, 0), (.45, .09, .9, .9, .6))
    z = np.linspace(0, 1, 12)
    outside = r * (foot + bulge * np.sin(np.pi * z ** rng.uniform(.6, 1.6)) + flare * z ** 4)
    inside = (outside - .1 * r)[:5:-1]                                      # as far down as a camera would look
    parts = [lathe([(0, 0), *zip(outside, h * z), *zip(inside, h * z[:5:-1]), (0, h * z[6])],
                   sides=rng.choice([4, 6, 24, 24]))]
    if rng.random() < .25:
        parts += ring_handle(outside[6], h * .5, h * .3, .1 * r)
    return parts


def wardrobe(rng):
    d, w, h, low = rng.uniform((.35, .5, .9, .04), (.7, 1.5, 2, .15))
    parts = feet_or_plinth(rng, d, w, low) + [box((d, w, h), (0, 0, low))]
    drawers = h * rng.choice([0, .25])
    parts += fronts(rng, d, w, low + drawers, h - drawers, 1, rng.integers(1, 4))
    if drawers:
        parts += fronts(rng, d, w, low, drawers, 1, rng.integers(1, 3))
    if rng.random() < .5:
        parts.append(box((d + .1, w + .1, .05), (0, 0, low + h)))           # a cornice
    return parts


RECIPES = {f.__name__: f for f in (
    airplane, bed, bench, bookshelf, bottle, car, chair, cup, desk, door,
    guitar, lamp, monitor, night_stand, sofa, stool, table, toilet, vase, wardrobe)}
OBJECT_CLASSES = tuple(sorted(RECIPES))


def make_object(name, rng):
    """A random object of class `name` (one of OBJECT_CLASSES).

    returns vertices (V, 3) float32 in metres and faces (F, 3) int64. It stands on z = 0, its
    bounding box is centred in x and y, and its front looks towards +x.
    """
    vertices, faces = join(RECIPES[name](rng))
    low, high = vertices.min(0), vertices.max(0)
    middle = (low + high) / 2
    return (vertices - (middle[0], middle[1], low[2])).astype(np.float32), faces


# ---- from a mesh to what a depth sensor would have seen of it ----

def sample_faces(vertices, faces, n, rng):
    """n points uniform by area -> xyz (n, 3), index of each point's face (n,), face normals (F, 3)."""
    a, b, c = vertices[faces].transpose(1, 0, 2)
    normal = np.cross(b - a, c - a)
    area = np.linalg.norm(normal, axis=1)
    ends = np.cumsum(area, dtype=np.float64)
    if not ends[-1] > 0:
        raise ValueError("its faces have no area")
    # side="right" steps over faces of zero area; the minimum guards the product's last rounding
    face = np.searchsorted(ends, np.minimum(rng.random(n), 1 - 1e-12) * ends[-1], side="right")
    u, v = rng.random((2, n, 1), dtype=np.float32)
    u, v = np.where(u + v > 1, 1 - u, u), np.where(u + v > 1, 1 - v, v)
    xyz = a[face] + u * (b - a)[face] + v * (c - a)[face]
    return xyz, face, normal / np.maximum(area, 1e-12)[:, None]


def sample_surface(vertices, faces, n, rng):
    """n points uniform by area on a triangle mesh: (V, 3), (F, 3) -> (n, 3) float32."""
    return sample_faces(vertices, faces, n, rng)[0].astype(np.float32)


def seen_from(camera, xyz, normal, pixel):
    """Mask of the surface samples (N, 3) that a camera sees: those that face it and are nearest
    within their pixel of a spherical depth image (`pixel` in radians)."""
    ray = xyz - camera
    depth = np.linalg.norm(ray, axis=1)
    facing = -(ray * normal).sum(1) / depth                                 # cosine of the angle of incidence
    across = ((np.arctan2(ray[:, 1], ray[:, 0]) + np.pi) / pixel).astype(np.int64)
    down = (np.arccos(np.clip(ray[:, 2] / depth, -1, 1)) / pixel).astype(np.int64)
    index = down * (across.max() + 1) + across
    nearest = np.full(index.max() + 1, np.inf)
    np.minimum.at(nearest, index, depth)
    # a slanted surface is deeper at one edge of a pixel than at the other: allow for that
    return (facing > .05) & (depth < nearest[index] + 1.5 * pixel * depth / np.maximum(facing, .2))


def scan_object(vertices, faces, points, rng):
    """Random yaw and proportions, a partial view, noise: mesh in metres -> (points, 3) float32 in metres."""
    turn = rng.uniform(0, 2 * np.pi)
    yaw = np.array([(np.cos(turn), np.sin(turn), 0), (-np.sin(turn), np.cos(turn), 0), (0, 0, 1)])
    vertices = (vertices * rng.uniform(1 - STRETCH, 1 + STRETCH, 3) @ yaw).astype(np.float32)
    middle = (vertices.min(0) + vertices.max(0)) / 2
    radius = np.linalg.norm(vertices - middle, axis=1).max()

    candidates = max(4 * points, 4096)
    xyz, face, normal = sample_faces(vertices, faces, candidates, rng)
    pixel = 1.8 / np.sqrt(candidates)                                       # about three front samples in each
    seen = np.zeros(candidates, bool)
    for _ in range(VIEWS):
        side, up = rng.uniform(0, 2 * np.pi), rng.uniform(-.1, .9)
        at = np.array([np.cos(side) * np.cos(up), np.sin(side) * np.cos(up), np.sin(up)])
        seen |= seen_from((middle + 2.5 * radius * at).astype(np.float32), xyz, normal[face], pixel)
    xyz = xyz[seen]
    along = xyz @ rng.normal(size=3)
    xyz = xyz[along <= np.quantile(along, 1 - rng.uniform(0, CUT))]
    xyz = np.resize(rng.permutation(xyz), (points, 3))                      # repeats when too few were seen
    return (xyz + rng.normal(0, NOISE * radius, xyz.shape)).astype(np.float32)


def object_clouds(per_class, points, seed):
    """`per_class` scanned objects of every class, class after class.

    returns xyz (per_class * C, points, 3) float32 in metres, not normalised, and label (per_class *
    C,) int64. Object i of a class has its own random stream, so it is the same however many others
    are made.
    """
    xyz = np.empty((len(OBJECT_CLASSES) * per_class, points, 3), np.float32)
    for k, name in enumerate(OBJECT_CLASSES):
        for i in range(per_class):
            rng = np.random.default_rng([seed, k, i])
            xyz[k * per_class + i] = scan_object(*make_object(name, rng), points, rng)
    return xyz, np.repeat(np.arange(len(OBJECT_CLASSES)), per_class)


# ---- rooms ----

ROOM_CLASSES = ("ceiling", "floor", "wall", "beam", "column", "window", "door", "table", "chair",
                "sofa", "bookcase", "board", "clutter")                     # S3DIS, in its order
FURNITURE = ("bed", "bookshelf", "cabinet", "chair", "desk", "sofa", "table", "toilet")   # names of ScanNet
CEILING, FLOOR, WALL, BEAM, COLUMN, WINDOW, DOOR, TABLE, CHAIR, SOFA, BOOKCASE, BOARD, CLUTTER = range(13)
SHAPE = {"cabinet": "wardrobe"}                                             # make_object's name, where it differs
SEMANTIC = {"bookshelf": BOOKCASE, "chair": CHAIR, "desk": TABLE, "sofa": SOFA, "table": TABLE}   # others: clutter
AT_WALL = {"bed": .95, "bookshelf": 1, "cabinet": .95, "chair": .15, "desk": .8, "sofa": .75, "table": .1, "toilet": 1}
KINDS = (                                   # how often FURNITURE occurs in a kind of room
    (5, 1, 2, 1, 1, .3, .5, 0),             # bedroom
    (0, 2, 1, 5, 4, .3, 1, 0),              # office
    (0, 1, 1, 3, 0, 5, 3, 0),               # living room
    (0, .3, 2, 1, 0, 0, .5, 4),             # bathroom
    (1, 1, 1, 1, 1, 1, 1, 1))               # storage
OFFICES = (                                 # what S3DIS scanned
    (0, 2, .5, 5, 4, .3, 1, 0),             # office
    (0, 1, .3, 3, 0, 5, 3, 0),              # lounge
    (0, 2, .5, 5, 0, 1, 4, 0))              # conference room
ON_TOP, ON_FLOOR = ("cup", "lamp", "monitor", "vase", "bottle"), ("stool", "night_stand", "vase", "guitar", "lamp")
WHITE, GREY, WOOD, DARK = (225, 222, 214), (150, 150, 152), (166, 124, 84), (70, 62, 58)
BLUE, RED, GREEN = (84, 106, 148), (158, 74, 66), (92, 128, 92)
PALETTE = {CEILING: (WHITE, (236, 236, 236)), FLOOR: (WOOD, GREY, (178, 162, 140)), WALL: (WHITE, (214, 202, 176), GREY),
           BEAM: (WHITE, GREY), COLUMN: (WHITE, GREY), WINDOW: ((176, 204, 222), WHITE), DOOR: (WOOD, DARK, WHITE),
           TABLE: (WOOD, WHITE, DARK), CHAIR: (BLUE, DARK, RED, WOOD), SOFA: (GREY, RED, BLUE, GREEN),
           BOOKCASE: (WOOD, DARK, WHITE), BOARD: ((240, 240, 240), (58, 88, 70)),
           CLUTTER: (WHITE, WOOD, GREY, BLUE, RED, GREEN, DARK)}            # they overlap on purpose
SHARE = {CEILING: .15, FLOOR: .4, WALL: .25}                                # of the density of everything else


def make_room(rng, points=40_000, objects=(4, 12), kinds=KINDS):
    """A furnished room, as depth cameras in it would have seen it.

    returns arrays: xyz (N, 3) float32 in metres, z up, floor at 0; rgb (N, 3) uint8; semantic (N,)
    int64 into ROOM_CLASSES; furniture (N,) int64 into FURNITURE and instance (N,) int64, both -1
    where a point belongs to no box; label (O,) int64, center (O, 3), size (O, 3) float32: the boxes,
    which bound the instance's points exactly. objects: how many pieces of furniture are tried; kinds:
    how often each of FURNITURE occurs, a row for a kind of room.
    """
    width, depth, height = rng.uniform((3, 3, 2.4), (6, 7, 3.2))
    parts = shell(rng, width, depth, height)            # (mesh, semantic, furniture or -1) of each part
    solid = [np.stack([m[0].min(0), m[0].max(0)]) for m, s, _ in parts if s not in (CEILING, FLOOR, WALL)]
    taken, tables = [], []                              # bounds (2,), (2,) of what stands already
    for (vertices, _), s, _ in parts:
        if s in (COLUMN, WINDOW, DOOR, BOARD):
            low, high = vertices[:, :2].min(0), vertices[:, :2].max(0)
            ahead = .5 * (s == DOOR) * (high - low < .1)                    # one can walk through a door
            taken.append((low - ahead, high + ahead))
    chance = np.array(kinds[rng.integers(len(kinds))], float)
    wanted = rng.choice(len(FURNITURE), rng.integers(objects[0], objects[1] + 1), p=chance / chance.sum())
    for k in sorted(wanted, key=lambda k: FURNITURE[k] == "chair"):         # chairs last: they need a table
        name = FURNITURE[k]
        semantic = SEMANTIC.get(name, CLUTTER)
        beside = tables if name == "chair" and rng.random() < .7 else []
        mesh = place(rng, SHAPE.get(name, name), width, depth, rng.random() < AT_WALL[name], taken, beside)
        if mesh is None:
            continue                                                        # the room is full
        if name in ("table", "desk"):
            tables.append(taken[-1])
        parts.append((mesh, semantic, k))
        if name in ("table", "desk", "cabinet") and rng.random() < .6:
            small = on_top(rng, *mesh)
            if small[0][:, 2].max() < height:                               # not through the ceiling
                parts.append((small, CLUTTER, -1))
    for name in rng.choice(ON_FLOOR, rng.integers(1, 5)):
        mesh = place(rng, name, width, depth, rng.random() < .7, taken)
        parts += [(mesh, CLUTTER, -1)] if mesh else []
    return scan_room(rng, parts, solid, (width, depth, height), points)


def shell(rng, width, depth, height):
    """Floor, ceiling, four walls, and what is built into them."""
    corners = np.array([(x, y, z) for x in (0, width) for y in (0, depth) for z in (0, height)])
    inward = {FLOOR: [(0, 4, 6, 2)], CEILING: [(1, 3, 7, 5)]}               # seen from inside the room
    parts = [((corners, split(np.array(q))), s, -1) for s, q in inward.items()]
    walls = np.array([(0, 2, 3, 1), (4, 5, 7, 6), (0, 1, 5, 4), (2, 6, 7, 3)])      # x = 0, x = w, y = 0, y = d
    parts += [((corners, split(q[None])), WALL, -1) for q in walls]
    side, doors, windows = rng.permutation(4), 1 + (rng.random() < .3), rng.integers(0, 3)
    for k in range(doors):
        w = rng.uniform(.75, 1)
        parts.append((panel(rng, side[k], width, depth, (.06, w, rng.uniform(1.95, 2.1)), 0), DOOR, -1))
    for k in range(2, 2 + windows):
        w, h = rng.uniform((.8, .9), (2, 1.4))
        pane, frame = (.02, w, h), (.07, .07, h)
        low = rng.uniform(.75, .95)
        mesh = panel(rng, side[k], width, depth, pane, low, frame)
        parts.append((mesh, WINDOW, -1))
    empty = [*side[doors:2], *side[2 + windows:]]                           # walls with nothing on them yet
    if empty and rng.random() < .55:
        w, h = rng.uniform((1, .7), (2, 1.1))
        parts.append((panel(rng, empty[0], width, depth, (.03, w, h), rng.uniform(.9, 1.1)), BOARD, -1))
    if rng.random() < .35:
        size = (*rng.uniform(.25, .5, 2), height)
        for _ in range(10):
            column = box(size, (rng.choice([.2, width - .2]), rng.uniform(.2, depth - .2), 0))
            low, high = column[0].min(0) - .02, column[0].max(0) + .02
            if all((v.max(0) < low).any() or (v.min(0) > high).any() for (v, _), s, _ in parts if s >= BEAM):
                parts.append((column, COLUMN, -1))                          # it hides nothing on the wall
                break
    if rng.random() < .35:
        drop = rng.uniform(.2, .4)
        size, at = (rng.uniform(.2, .4), depth, drop), (rng.uniform(.5, width - .5), depth / 2, height - drop)
        parts.append((box(size, at), BEAM, -1))
    return parts


def panel(rng, side, width, depth, size, low, frame=None):
    """A flat box (thickness, width, height) on wall `side`, its bottom at `low`; frame adds four bars."""
    run = depth if side < 2 else width
    w = min(size[1], run - .3)
    meshes = [box((size[0], w, size[2]), (0, 0, low))]
    if frame:
        t, b, h = frame
        meshes += [box((t, b, h), (0, s * w / 2, low)) for s in (-1, 1)]
        meshes += [box((t, w + b, b), (0, 0, z)) for z in (low - b / 2, low + h - b / 2)]
    vertices, faces = join(meshes)
    return on_wall(vertices, side, rng.uniform(.1 + w / 2, run - .1 - w / 2), width, depth), faces


def on_wall(vertices, side, along, width, depth):
    """Turn a front that looks towards +x away from wall `side`, and move x = 0 onto that wall."""
    x, y, z = vertices.T
    x, y = {0: (x, along + y), 1: (width - x, along - y), 2: (along - y, x), 3: (along + y, depth - x)}[int(side)]
    return np.stack([x, y, z], 1)


def place(rng, name, width, depth, at_wall, taken, beside=()):
    """An object that stands where nothing else does, or None after 20 tries. Given `beside`, bounds of
    tables, it faces one of them in the first ten."""
    vertices, faces = make_object(name, rng)
    vertices = vertices * rng.uniform(.9, 1.1, 3)
    vertices = vertices * min(1, 2.3 / vertices[:, 2].max())                # the lowest ceiling is at 2.4
    for i in range(20):
        turned = vertices @ yaw(rng.normal(0, .05))
        if beside and i < 10:
            low, high = beside[rng.integers(len(beside))]
            turn = yaw(rng.integers(4) * np.pi / 2).round()                 # its front looks along turn[0]
            turned, front = turned @ turn, turn[0, :2]
            apart = (high - low + np.ptp(turned[:, :2], axis=0)) / 2 + rng.uniform(.06, .3)
            at = (low + high) / 2 - front * apart + front[::-1] * (high - low) * rng.uniform(-.25, .25)
            turned = turned + (*at, 0)
        elif at_wall:
            side = rng.integers(4)
            turned = turned - (turned[:, 0].min() - rng.uniform(.02, .1), 0, 0)
            turned = on_wall(turned, side, rng.uniform(0, depth if side < 2 else width), width, depth)
        else:
            turned = turned @ yaw(rng.integers(4) * np.pi / 2) + (*rng.uniform(0, (width, depth)), 0)
        low, high = turned.min(0)[:2], turned.max(0)[:2]
        inside = (low > 0).all() and (high < (width, depth)).all()
        if inside and all((low > h + .05).any() or (high < n - .05).any() for n, h in taken):
            taken.append((low, high))
            return turned, faces
    return None


def yaw(angle):
    return np.array([(np.cos(angle), np.sin(angle), 0), (-np.sin(angle), np.cos(angle), 0), (0, 0, 1)])


def on_top(rng, support, support_faces):
    """A small object on the top of another."""
    vertices, faces = make_object(rng.choice(ON_TOP), rng)
    low, high = support.min(0)[:2], support.max(0)[:2]
    at = rng.uniform(low * .7 + high * .3, low * .3 + high * .7)
    xyz = sample_surface(support, support_faces, 3000, rng)                 # a desk's shelf is above its top
    z = xyz[np.linalg.norm(xyz[:, :2] - at, axis=1).argsort()[:30], 2].max()
    return vertices @ yaw(rng.uniform(0, 2 * np.pi)) + (*at, z), faces


def scan_room(rng, parts, solid, size, points):
    """Sample all surfaces, keep what three cameras see, add noise and colour. See `make_room`."""
    vertices, faces = join([mesh for mesh, _, _ in parts])
    part = np.repeat(np.arange(len(parts)), [len(mesh[1]) for mesh, _, _ in parts])         # (F,)
    semantic, furniture = (np.array(column) for column in zip(*((s, k) for _, s, k in parts)))
    thin = np.array([SHARE.get(s, 1) for s in semantic])
    xyz, face, normal = sample_faces(vertices.astype(np.float32), faces, 9 * points, rng)
    keep = rng.random(len(xyz)) < thin[part[face]]
    xyz, face = xyz[keep], face[keep]
    plain = np.isin(semantic[part[face]], (CEILING, FLOOR, WALL))
    for low, high in solid:                             # no wall behind a door, no ceiling inside a beam
        inside = plain & (xyz > low - .02).all(1) & (xyz < high + .02).all(1)
        xyz, face, plain = xyz[~inside], face[~inside], plain[~inside]
    pixel, seen = 7 / np.sqrt(len(xyz)), np.zeros(len(xyz), bool)           # about three samples in each
    cameras = rng.uniform((.2, .2, 1.2), (.8, .8, 2.1), (12, 3)) * (*size[:2], 1)
    low, high = np.array([(v.min(0), v.max(0)) for (v, _), s, _ in parts if s >= BEAM]).transpose(1, 0, 2)
    for camera in [c for c in cameras if not ((c > low) & (c < high)).all(1).any()][:3]:    # not in a wardrobe
        seen |= seen_from(camera.astype(np.float32), xyz, normal[face], pixel)
    order = np.resize(rng.permutation(np.flatnonzero(seen)), points)        # repeats when too few were seen
    xyz, face = xyz[order], face[order]
    xyz = (xyz + rng.normal(0, .005, xyz.shape)).astype(np.float32)         # (N, 3)

    base = np.array([rng.choice(PALETTE[s]) for s in semantic]) * rng.uniform(.85, 1.12, (len(parts), 1))
    light = rng.uniform(.85, 1.08, 3) * (.85 + .15 * normal[face, 2:])      # the room's tint; tops are brighter
    rgb = base[part[face]] * light + rng.normal(0, 9, xyz.shape)
    part = part[face]
    instance, chosen = np.full(len(xyz), -1), []
    for p in np.flatnonzero(furniture >= 0):
        mine = part == p
        if np.count_nonzero(mine) >= max(10, points // 800):                # less of it is no object to find
            instance[mine] = len(chosen)
            chosen.append((furniture[p], xyz[mine].min(0), xyz[mine].max(0)))
    label, low, high = (np.array([c[i] for c in chosen]) for i in range(3))
    low, high = (x.reshape(-1, 3).astype(np.float32) for x in (low, high))
    return {"xyz": xyz, "rgb": rgb.clip(0, 255).astype(np.uint8), "semantic": semantic[part],
            "furniture": np.where(instance >= 0, furniture[part], -1), "instance": instance,
            "label": label.astype(np.int64), "center": (low + high) / 2, "size": high - low}


def room_scenes(count, points, seed, objects=(4, 12), kinds=KINDS):
    """`count` rooms (see `make_room`); room i is the same however many others are made."""
    return [make_room(np.random.default_rng([seed, i]), points, objects, kinds) for i in range(count)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--export", metavar="DIR", type=Path, help="write .ply files there")
    folder = parser.parse_args().export
    started = time.time()
    xyz, label = object_clouds(2, 2048, 0)                                  # (2 C, 2048, 3)
    seconds = (time.time() - started) / len(xyz)
    print("class             x      y      z   metres, of one scanned object")
    for k, name in enumerate(OBJECT_CLASSES):
        print(f"{name:12s}", *(f"{size:6.2f}" for size in np.ptp(xyz[2 * k], axis=0)))
    print(f"{len(OBJECT_CLASSES)} classes, {1e3 * seconds:.1f} ms for an object of 2,048 points")
    started = time.time()
    rooms = room_scenes(10, 40_000, 0)
    seconds = (time.time() - started) / len(rooms)
    semantic, boxes = (np.concatenate([room[key] for room in rooms]) for key in ("semantic", "label"))
    print("share of a room's points:", *(f"{name} {100 * np.mean(semantic == k):.0f} %"
                                         for k, name in enumerate(ROOM_CLASSES)))
    print("boxes in 10 rooms:", *(f"{name} {np.sum(boxes == k)}" for k, name in enumerate(FURNITURE)))
    print(f"{1e3 * seconds:.0f} ms for a room of 40,000 points")
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        for i, cloud in enumerate(xyz):
            write_ply(folder / f"{OBJECT_CLASSES[label[i]]}_{i % 2}.ply", cloud)
        for i in range(2):
            write_ply(folder / f"room_{i}.ply", rooms[i]["xyz"], rooms[i]["rgb"])
        print(f"{len(xyz) + 2} files in {folder}")


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
        face["n"], face["v"] = 3, faces
        head += [f"element face {len(faces)}", "property list uchar int vertex_indices"]
    path.write_bytes("\n".join([*head, "end_header\n"]).encode() + vertex.tobytes() + face.tobytes())


if __name__ == "__main__":
    main()
