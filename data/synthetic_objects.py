"""Procedural objects: classification and few-shot can be tried without a download.

    python -m data.synthetic_objects                 the classes, their sizes, the time it takes
    python -m data.synthetic_objects --export DIR    two objects of each class as .ply, for MeshLab
                                                     or CloudCompare

The classes are ModelNet40's; the built-in classification takes twenty of them. Objects consist of
boxes, prisms and surfaces of revolution with random proportions and optional parts: `make_object`
gives the mesh, `object_clouds` points of a simulated scan, with occlusion, cropping and noise.
Units are metres, z is up, an object's front faces +x. Seeds determine everything. Results on this
data show that a script works and nothing more; never compare them with published ones.
"""
import argparse
import time
from pathlib import Path

import numpy as np

from data.files import write_ply
from data.meshes import sample_faces

# Difficulty of the object clouds. Lengths are relative to the object's radius.
NOISE = 0.012       # sigma of the sensor noise
STRETCH = 0.20      # every axis is scaled by a factor from 1 - STRETCH to 1 + STRETCH
VIEWS = 2           # cameras around the object; what none of them sees is missing
CUT = 0.30          # up to this share of the visible points is cut off by a random plane

GOLDEN = 2.4        # radians between a plant's leaves


def yaw(angle):
    """Rotation about z: vertices (V, 3) @ yaw(angle) turns them counter-clockwise."""
    sin, cos = np.sin(angle), np.cos(angle)
    return np.array([(cos, sin, 0), (-sin, cos, 0), (0, 0, 1)])


# --- primitives: meshes (vertices (V, 3), faces (F, 3)), faces counter-clockwise from outside -----

def box(size, position):
    """Cuboid of `size` (x, y, z); `position` is the centre of its bottom face."""
    corners = np.array([(x, y, z) for x in (-.5, .5) for y in (-.5, .5) for z in (0, 1)])
    quads = np.array([(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1),
                      (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)])
    return corners * size + position, split(quads)


def split(quads):
    """Two triangles per quad: (Q, 4) -> (2 Q, 3)."""
    return np.concatenate([quads[:, (0, 1, 2)], quads[:, (0, 2, 3)]])


def lathe(profile, offset=(0, 0, 0), axis="z", sides=20, squash=1.0):
    """Surface of revolution. `profile` lists (radius, height) from the bottom up the outside (and,
    for open vessels, down the inside); `squash` scales x."""
    r, h = np.array(profile, float).T
    angle = np.arange(sides) * 2 * np.pi / sides
    ring = np.stack([squash * np.cos(angle), np.sin(angle), np.zeros(sides)], 1)
    vertices = ring * r[:, None, None] + h[:, None, None] * (0, 0, 1)  # (P, sides, 3)
    vertices, faces = loft(np.roll(vertices, "zxy".index(axis), axis=2))
    return vertices + offset, faces


def loft(rings):
    """The surface through rings (P, S, 3), each counter-clockwise as seen from the last one."""
    p, s, _ = np.shape(rings)
    i, j = (k.ravel() for k in np.mgrid[:p - 1, :s])
    a = i * s + j
    b = i * s + (j + 1) % s
    return np.reshape(rings, (-1, 3)), split(np.stack([a, b, b + s, a + s], 1))


def vessel(d, w, levels, offset=(0, 0, 0), sides=32):
    """Superellipses one over the other. `levels` lists (inset, height, power): that ring is `inset`
    smaller than d x w on each side; power 2 makes it an ellipse, 20 nearly a rectangle."""
    angle = np.arange(sides) * 2 * np.pi / sides
    ring = np.stack([np.cos(angle), np.sin(angle)], 1)
    rings = []
    for inset, height, power in levels:
        unit = ring / (np.abs(ring) ** power).sum(1, keepdims=True) ** (1 / power)
        half = np.maximum((d / 2 - inset, w / 2 - inset), 0)
        rings.append(np.insert(unit * half, 2, height, 1) + offset)
    return loft(rings)


def rounded(size, position, power):
    """A box whose outline from above is a superellipse."""
    d, w, h = size
    inset = max(d, w) / 2
    levels = [(inset, 0, power), (0, 0, power), (0, h, power), (inset, h, power)]
    return vessel(d, w, levels, position)


def ellipsoid(radii, centre):
    angle = np.linspace(-np.pi / 2, np.pi / 2, 9)
    vertices, faces = lathe(np.stack([np.cos(angle), np.sin(angle)], 1))
    return vertices * radii + centre, faces


def tube(start, end, r0, r1=None, sides=10):
    """Straight rod with radius r0 at `start` and r1 at `end` (4 sides: a square bar)."""
    start = np.array(start, float)
    along = np.subtract(end, start)
    length = np.linalg.norm(along)
    z = along / length
    x = np.cross((0, 1, 0) if abs(z[1]) < 0.9 else (1, 0, 0), z)
    x /= np.linalg.norm(x)
    y = np.cross(z, x)
    r1 = r0 if r1 is None else r1
    vertices, faces = lathe([(0, 0), (r0, 0), (r1, length), (0, length)], sides=sides)
    return vertices @ np.stack([x, y, z]) + start, faces


def knob(r, depth, position):
    """A disc that faces +x."""
    return lathe([(r, 0), (r, depth), (0, depth)], position, "x")


def pipe(points, r, sides=6):
    """A bent rod."""
    return [tube(a, b, r, sides=sides) for a, b in zip(points, points[1:])]


def prism(outline, thickness, axis, offset=(0, 0, 0)):
    """`outline` (P, 2), star-shaped seen from its mean, lies in the plane of the two other axes and
    is extruded to both sides along `axis`."""
    outline = np.array(outline, float)
    p = len(outline)
    column = "xyz".index(axis)
    flat = np.concatenate([outline, outline.mean(0, keepdims=True)])  # (P + 1, 2)
    half = thickness / 2
    vertices = np.concatenate([np.insert(flat, column, side, 1) for side in (-half, half)])
    a = np.arange(p)
    b = (a + 1) % p
    hub = np.full(p, p)
    low = np.stack([b, a, hub], 1)
    high = np.stack([a, b, hub], 1) + p + 1
    rim = split(np.stack([a, b, b + p + 1, a + p + 1], 1))
    faces = np.concatenate([low, high, rim])
    x, y = outline.T
    clockwise = (x * np.roll(y, -1) - y * np.roll(x, -1)).sum() < 0
    if clockwise != (axis == "y"):
        faces = faces[:, ::-1]
    return vertices + offset, faces


def moved(parts, offset):
    return [(vertices + offset, faces) for vertices, faces in parts]


def turned(parts, axis, angle, point=(0, 0, 0)):
    """Turn meshes counter-clockwise about an axis through `point`."""
    k = "zxy".index(axis)
    rotation = np.roll(yaw(angle), (k, k), (0, 1))
    return [((vertices - point) @ rotation + point, faces) for vertices, faces in parts]


def join(parts):
    """One mesh out of many."""
    starts = np.cumsum([0] + [len(vertices) for vertices, _ in parts[:-1]])
    vertices = np.concatenate([vertices for vertices, _ in parts])
    faces = np.concatenate([faces + start for (_, faces), start in zip(parts, starts)])
    return vertices, faces


# --- parts that several classes share; w is along y, d along x, h along z -------------------------

def legs(rng, d, w, h):
    """Four legs under a plate, sometimes splayed, sometimes joined by stretchers."""
    r = rng.uniform(.015, .035)
    splay = rng.choice([1, 1.15])
    sides = rng.choice([4, 10])
    feet = np.array([(-1, -1), (-1, 1), (1, 1), (1, -1)]) * (d / 2 - r, w / 2 - r)
    parts = [tube((x, y, h), (x * splay, y * splay, 0), r, r * .7, sides) for x, y in feet]
    if rng.random() < .4:
        z = h * rng.uniform(.2, .5)
        spread = 1 + (splay - 1) * .65
        for i in range(4):
            parts.append(tube((*feet[i] * spread, z), (*feet[i - 1] * spread, z), r * .6))
    return parts


def pedestal(rng, d, w, h):
    """One column on a disc or on a star of feet."""
    r = rng.uniform(.02, .05)
    reach = min(d, w) * rng.uniform(.35, .5)
    column = tube((0, 0, .02), (0, 0, h), r)
    if rng.random() < .5:
        disc = lathe([(0, 0), (reach, 0), (reach, .02), (r, .05), (0, .05)])
        return [column, disc]
    n = rng.integers(3, 6)
    angles = rng.uniform(0, 6) + np.arange(n) * 2 * np.pi / n
    feet = []
    for angle in angles:
        toe = (reach * np.cos(angle), reach * np.sin(angle), .02)
        feet.append(tube((0, 0, .06), toe, .02))
    return [column, *feet]


def slabs(rng, d, w, h):
    """Two boards as end walls."""
    t = rng.uniform(.02, .06)
    return [box((d * rng.uniform(.7, 1), t, h), (0, y, 0)) for y in (t - w / 2, w / 2 - t)]


def plate(rng, d, w, h, thickness, round_share):
    """A seat or table top whose lower side is at h: a box or an ellipse."""
    if rng.random() < round_share:
        profile = [(0, h), (w / 2, h), (w / 2, h + thickness), (0, h + thickness)]
        return [lathe(profile, squash=d / w, sides=28)]
    return [box((d, w, thickness), (0, 0, h))]


def backrest(rng, w, z, height, x):
    """A panel, upright bars or cross bars at depth x, from z upwards."""
    kind = rng.integers(3)
    lean = height * rng.uniform(0, .25)
    n = rng.integers(3, 7)

    def rod(y0, y1, t0, t1, r):
        start = (x - lean * t0, y0, z + height * t0)
        end = (x - lean * t1, y1, z + height * t1)
        return tube(start, end, r, sides=6)

    if kind == 0:
        top = z + height
        outline = [(x, z), (x - lean, top), (x - lean - .04, top), (x - .04, z)]
        return [prism(outline, w, "y")]
    posts = [rod(y, y, 0, 1, .02) for y in (-w / 2 + .02, w / 2 - .02)]
    if kind == 1:
        bars = [rod(y, y, 0, .95, .012) for y in np.linspace(-w / 2, w / 2, n + 2)[1:-1]]
        rail = rod(-w / 2, w / 2, .95, .95, .025)
        return [*posts, *bars, rail]
    return posts + [rod(-w / 2, w / 2, t, t, .03) for t in np.linspace(.25, .95, n - 1)]


def arms(rng, d, w, z, height):
    """Arm rests on posts, left and right."""
    parts = []
    for y in (-w / 2, w / 2):
        parts.append(box((d * .85, .05, .03), (0, y, z + height)))
        parts += [tube((x, y, z), (x, y, z + height), .015) for x in (-d * .35, d * .35)]
    return parts


def fronts(rng, d, w, z, h, rows, columns=1, y=0):
    """Drawer or door panels with knobs or bars on the +x side of a case."""
    bars = rng.random() < .5
    panel_size = (.02, w / columns - .02, h / rows - .02)
    x = d / 2 + .01
    parts = []
    for i in range(rows):
        for j in range(columns):
            middle = y + w * ((j + .5) / columns - .5)
            bottom = z + h * i / rows + .01
            parts.append(box(panel_size, (x, middle, bottom)))
            knob = (x + .02, middle, bottom + h / rows / 2)
            if bars:
                parts.append(box((.02, .12, .02), knob))
            else:
                parts.append(ellipsoid((.02, .02, .02), knob))
    return parts


def feet_or_plinth(rng, d, w, h):
    if rng.random() < .5:
        return legs(rng, d, w, h)
    return [box((d * .94, w * .94, h), (0, 0, 0))]


def ring_handle(r, z, height, thickness):
    """A half ring of rods on the +y side of a vessel of radius r."""
    angle = np.linspace(-np.pi / 2, np.pi / 2, 6)
    y = r * .95 + height * .45 * np.cos(angle)
    joints = np.stack([np.zeros(6), y, z + height / 2 * np.sin(angle)], 1)
    return pipe(joints, thickness)


def leaf(base, azimuth, length, rise, bend, width):
    """A pointed blade that leaves `base` at the slope `rise` (radians) and bends down by `bend`."""
    t = np.linspace(0, 1, 5)[:, None]
    out, side = yaw(azimuth)[:2]
    slope = rise - bend * t
    along = np.cos(slope) * out + np.sin(slope) * (0, 0, 1)  # (5, 3)
    spine = base + length / 4 * (along.cumsum(0) - along[:1])
    half = width / 2 * np.sin(np.pi * (.06 + .94 * t) ** .7) * side
    thick = .02 * width * np.cross(along, side)
    return loft(np.stack([spine + half, spine + thick, spine - half, spine - thick], 1))


def foliage(rng, z, h, r):
    """What grows at (0, 0, z), h high and r in radius: a rosette of leaves, a crown on a trunk, or
    stems with leaves and blossoms."""
    kind = rng.integers(3)
    if kind == 0:
        n, width, bend = rng.uniform((7, .06, .2), (22, .2, 1.6))
        rise = rng.uniform(.5, 1.5, int(n))
        length = np.minimum(h / np.sin(rise), 1.2 * np.hypot(r, h)) * rng.uniform(.6, 1, int(n))
        return [leaf((0, 0, z), i * GOLDEN, length[i], rise[i], bend * rng.random(), width * h)
                for i in range(int(n))]
    if kind == 1:
        trunk, size, n = rng.uniform((.1, .25, 35), (.5, .5, 70))
        crown = h * (1 - trunk) / 2
        size *= r + crown
        pointed = rng.random() < .3  # a conifer
        parts = [tube((0, 0, z), (0, 0, z + h * .8), .04 * r, .02 * r, 6)]
        for i in range(int(n)):
            level = rng.uniform(-1, 1)
            wide = (1 - level) / 2 if pointed else np.sqrt(1 - level ** 2)
            start = yaw(i * GOLDEN)[0] * r * wide * rng.uniform(.1, .6)
            start = start + (0, 0, z + h * trunk + crown * (1 + level))
            length = size * rng.uniform(.6, 1)
            parts.append(leaf(start, i * GOLDEN, length, level * .9, .8, size * .4))
        return parts
    parts = []
    for _ in range(rng.integers(3, 10)):
        top = np.array([*rng.uniform(-.7 * r, .7 * r, 2), h * rng.uniform(.6, 1)])
        middle, top = top * (.3, .3, .5) + (0, 0, z), top + (0, 0, z)
        parts += pipe([(0, 0, z), middle, top], .01 * h, 5)
        for start in (middle, top):
            parts.append(leaf(start, rng.uniform(0, 6), .3 * h, rng.uniform(-.2, 1), .9, .08 * h))
        if rng.random() < .7:  # a blossom
            petal, rise, n = rng.uniform((.12, -.1, 5), (.25, .9, 9))
            petal = petal * r + .08 * h
            parts.append(ellipsoid((petal * .3, petal * .3, petal * .25), top))
            parts += [leaf(top, angle, petal, rise, .5, petal * 3 / n)
                      for angle in np.arange(int(n)) * 2 * np.pi / int(n)]
    return parts


def pot(rng, r, h):
    """A tapered, bulging or square pot, filled with earth."""
    foot, bulge = rng.uniform((.55, -.05), (.95, .2))
    z = np.linspace(0, 1, 7)
    wall = r * (foot + (1 - foot) * z + bulge * np.sin(np.pi * z))
    band = r * rng.choice([1, 1.1])  # the thick rim of a clay pot
    rim = [(band, h * .85), (band, h), (r * .88, h), (r * .86, h * .9), (0, h * .9)]
    profile = [(0, 0), *zip(wall, h * .85 * z), *rim]
    return turned([lathe(profile, sides=rng.choice([4, 8, 24, 24]))], "z", np.pi / 4)


def keys(position, d, w, rows, columns):
    """A field of keys d x w, `position` its middle."""
    size = (d / rows * .8, w / columns * .8, .006)
    places = [(d * ((i + .5) / rows - .5), w * ((j + .5) / columns - .5), 0)
              for i in range(rows) for j in range(columns)]
    return moved([box(size, place) for place in places], position)


def faucet(rng, position):
    """A spout that reaches towards +x, and one or two handles."""
    h, reach = rng.uniform((.08, .1), (.25, .2))
    angle = np.linspace(np.pi, rng.choice([0, .6]), 7)
    arc = np.stack([1 + np.cos(angle), 0 * angle, np.sin(angle)], 1) * reach / 2 + (0, 0, h)
    parts = pipe([(0, 0, 0), *arc], .013)
    for y in (-.08, .08)[:rng.integers(1, 3)]:
        parts.append(tube((0, y, 0), (0, y, .06), .016))
    return moved(parts, position)


def limb(joints, radii):
    """Two or more segments with balls at their ends."""
    parts = [tube(a, b, r, s) for a, b, r, s in zip(joints, joints[1:], radii, radii[1:])]
    return parts + [ellipsoid((r, r, r), joint) for joint, r in zip(joints, radii)]


def swung(forward, out=0):
    """The direction of a limb that hangs down and is swung, in radians."""
    return np.array([np.sin(forward) * np.cos(out), np.sin(out), -np.cos(forward) * np.cos(out)])


# --- one recipe per class: random sizes first, then the parts -------------------------------------

def airplane(rng):
    length, span, r, sweep = rng.uniform((3, 3.5, .22, 0), (5, 5.8, .4, .9))
    z = r * rng.uniform(-.7, .9)
    x = length * rng.uniform(-.05, .12)
    chord = length * rng.uniform(.12, .2)
    tail = -length * .38
    fin = length * rng.uniform(.12, .2)
    tail_z = fin if rng.random() < .3 else r * .3
    stations = length * np.linspace(-.5, .5, 9)
    radii = r * np.array([.12, .3, .55, .8, 1, 1, .95, .7, 0])
    hull = [(0, stations[0]), *zip(radii, stations)]
    wings = wing_outline(x + chord, span / 2, chord * 1.3, sweep)
    tailplane = wing_outline(tail, span * .2, chord * .8, sweep * .4)
    back = tail - fin * .7
    fin_outline = [(tail, 0), (back, fin + .05), (tail - fin, fin + .05), (back, 0)]
    parts = [lathe(hull, axis="x"),
             prism(wings, .06, "z", (0, 0, z)),
             prism(tailplane, .04, "z", (0, 0, tail_z)),
             prism(fin_outline, .04, "y")]
    engines = rng.integers(0, 3)  # on each side
    for y in span * np.array([.17, .32][:engines]):
        for side in (-1, 1):
            front = (x + chord, side * y, z - .12)
            back = (x + .1, side * y, z - .12)
            parts.append(tube(front, back, .1))
    return parts


def wing_outline(x, y, chord, sweep):
    """Both wings: leading edge at x in the middle, tips at -y and y."""
    trailing = x - sweep - chord * .5
    return [(x, 0), (x - sweep, y), (trailing, y),
            (x - chord, 0), (trailing, -y), (x - sweep, -y)]


def bed(rng):
    d, w, h, back = rng.uniform((1.75, .8, .28, .25), (2.15, 1.9, .6, .8))
    low = h * rng.uniform(.2, .5)
    thick = h * .4
    parts = [box((d, w, h - thick), (0, 0, low)),
             box((d * .97, w * .96, thick), (0, 0, low + h - thick))]
    parts += feet_or_plinth(rng, d, w, low)
    parts.append(box((.06, w, low + h + back), (-d / 2 - .03, 0, 0)))  # headboard
    if rng.random() < .4:  # footboard
        parts.append(box((.06, w, low + h + back * .4), (d / 2 + .03, 0, 0)))
    n = rng.integers(1, 3)
    for i in range(n):
        pillow = (-d * .36, w * ((i + .5) / n - .5), low + h + .04)
        parts.append(ellipsoid((.2, w * .4 / n, .09), pillow))
    return parts


def bench(rng):
    d, w, h = rng.uniform((.28, .8, .36), (.55, 1.9, .52))
    parts = plate(rng, d, w, h, rng.uniform(.03, .1), 0)
    support = slabs if rng.random() < .4 else legs
    parts += support(rng, d, w, h)
    if rng.random() < .55:
        parts += backrest(rng, w, h, rng.uniform(.25, .5), -d / 2 + .03)
    if rng.random() < .4:
        parts += arms(rng, d, w, h, rng.uniform(.15, .25))
    return parts


def bookshelf(rng):
    d, w, h = rng.uniform((.22, .5, .7), (.5, 1.5, 2.1))
    n = rng.integers(2, 6)
    t = rng.uniform(.015, .04)
    boards = np.linspace(.04, h - t, n + 1)
    parts = [box((d, t, h), (0, y, 0)) for y in (-w / 2, w / 2)]
    parts += [box((d, w, t), (0, 0, z)) for z in boards]
    if rng.random() < .6:
        parts.append(box((.015, w, h), (-d / 2, 0, 0)))
    if rng.random() < .3:
        parts.append(box((d, t, h), (0, 0, 0)))
    gap = boards[1] - boards[0]
    for z in boards[:-1][rng.random(n) < .5]:  # a row of books fills part of a shelf
        fill = rng.uniform(.2, .45)
        tall = gap * rng.uniform(.5, .85)
        y = w * rng.choice([-1, 1]) * (.48 - fill / 2)
        parts.append(box((d * .7, w * fill, tall), (0, y, z)))
    return parts


def bottle(rng):
    r, h, neck, shoulder = rng.uniform((.03, .16, .25, .45), (.055, .34, .5, .75))
    bend = np.linspace(0, 1, 5)
    radii = r * (1 - (1 - neck) * bend ** rng.uniform(.8, 2))
    slope = zip(radii, h * (shoulder + .18 * bend))
    lip = r * neck * rng.uniform(1.05, 1.4)
    profile = [(0, 0), (r, 0), *slope, (r * neck, h * .93), (lip, h * .93), (lip, h), (0, h)]
    parts = [lathe(profile, sides=rng.choice([4, 20, 20]))]
    if rng.random() < .2:  # a jug
        parts += ring_handle(r, h * .45, h * .3, .25 * r)
    return parts


def car(rng):
    length, w, h, clearance, cabin = rng.uniform((3.2, 1.5, .5, .15, .35), (5, 1.95, .85, .3, .65))
    roof = h + rng.uniform(.4, .8)
    front = length * rng.uniform(.1, .3)
    back = length * (rng.uniform(.1, .3) - cabin)
    back = max(back, -length * .48)
    wheel = rng.uniform(.26, .36)
    end = length / 2
    slant = rng.uniform(.1, .5, 2)
    trunk = h * rng.uniform(.75, 1)
    body = [(-end, 0), (end, 0), (end, h * .6), (front, h), (back, h), (-end, trunk)]
    glass = [(front, h), (front - slant[0], roof), (back + slant[1] * .6, roof), (back, h)]
    parts = [prism(body, w, "y", (0, 0, clearance)),
             prism(glass, w * .88, "y", (0, 0, clearance))]
    tyre = [(0, -.1), (wheel, -.1), (wheel, .1), (0, .1)]
    for x in (-.31, .31):
        for side in (-1, 1):
            hub = (x * length, side * (w / 2 - .1), wheel)
            parts.append(lathe(tyre, hub, "y"))
    return parts


def chair(rng):
    d, w, h, thickness = rng.uniform((.36, .36, .36, .03), (.58, .6, .55, .1))
    parts = plate(rng, d, w, h, thickness, .25)
    support = pedestal if rng.random() < .25 else legs
    parts += support(rng, d, w, h)
    parts += backrest(rng, w * rng.uniform(.7, 1), h, rng.uniform(.25, .65), -d / 2 + .03)
    if rng.random() < .35:
        parts += arms(rng, d, w, h, rng.uniform(.15, .28))
    return parts


def cup(rng):
    r, h, foot = rng.uniform((.032, .06, .55), (.055, .15, 1))
    wall = r * .1
    z = np.linspace(0, 1, 6)
    outside = r * (foot + (1 - foot) * z ** rng.uniform(.3, 1.5))
    inside = (outside - wall)[::-1]
    inside_z = (h * (.06 + .94 * z))[::-1]
    parts = [lathe([(0, 0), *zip(outside, h * z), *zip(inside, inside_z), (0, h * .06)])]
    if rng.random() < .8:
        parts += ring_handle(r, h * .5, h * rng.uniform(.45, .7), r * .11)
    if rng.random() < .2:  # a saucer
        parts.append(lathe([(0, -.01), (r, -.01), (r * 1.7, .005), (r, 0), (0, 0)]))
    return parts


def desk(rng):
    d, w, h = rng.uniform((.45, .9, .62), (.85, 1.7, .82))
    case = w * rng.uniform(.22, .34)
    side = rng.choice([-1, 1])
    parts = plate(rng, d, w, h, .04, 0)
    for s in (-1, 1):
        y = s * (w - case) / 2
        if s == side or rng.random() < .3:  # a case of drawers, at least on one side
            low = h * rng.choice([0, .1, .5])
            rows = rng.integers(1, 5)
            parts.append(box((d * .92, case, h - low), (0, y, low)))
            parts += fronts(rng, d * .92, case, low, h - low, rows, y=y)
        if s != side:
            parts.append(box((d * .9, .04, h), (0, s * (w / 2 - .03), 0)))
        else:
            y = s * w * .48
            parts += [tube((x, y, 0), (x, y, h), .02) for x in (-d * .42, d * .42)]
    if rng.random() < .5:
        parts.append(box((.02, w, h * rng.uniform(.4, .9)), (-d * .4, 0, h * .1)))
    if rng.random() < .25:  # a low shelf at the back of the top
        parts.append(box((.22, w, .03), (-d / 2 + .11, 0, h + .3)))
        parts.append(box((.02, w, .3), (-d / 2 + .01, 0, h)))
    return parts


def door(rng):
    w, h, t, frame = rng.uniform((.6, 1.7, .03, .04), (1.1, 2.2, .07, .1))
    swing = yaw(rng.choice([0, rng.uniform(.1, .9)]))
    hinge = (0, w / 2, 0)
    vertices, faces = box((t, w, h), hinge)
    parts = [(vertices @ swing - hinge, faces)]
    parts += [box((t * 2, frame, h + frame), (0, s * (w + frame) / 2, 0)) for s in (-1, 1)]
    parts.append(box((t * 2, w, frame), (0, 0, h)))
    handle = swing[1] * w * .9 - (0, w / 2, -1)
    return parts + [tube(handle, handle + (x, 0, 0), .025) for x in (.12, -.12)]


def guitar(rng):
    w, h, t, waist, neck = rng.uniform((.28, .4, .05, .15, .4), (.42, .55, .12, .4, .65))
    z = np.linspace(0, 1, 14)
    width = w * np.sqrt(z * (1 - z)) * (1.2 - .4 * z)
    half = width * (1 - waist * np.exp(-((z - .58) / .16) ** 2))
    right = np.stack([half, z * h], 1)
    left = np.stack([-half, z * h], 1)
    outline = np.concatenate([right, left[-2:0:-1]])
    head = rng.uniform(.07, .11)
    parts = [prism(outline, t, "x"),
             box((.03, .06, neck + .1), (t / 2, 0, h - .1)),
             box((.02, head, .16), (t / 2, 0, h + neck)),
             box((.03, w * .4, .03), (t / 2, 0, h * .22))]
    pegs = h + neck + np.array([.03, .08, .13])
    return parts + [tube((t / 2, -.07, z), (t / 2, .07, z), .008) for z in pegs]


def lamp(rng):
    h, base, r0, r1, tall = rng.uniform((.3, .07, .05, .1, .14), (.75, .14, .14, .24, .3))
    parts = [lathe([(0, 0), (base, 0), (base, .02), (.015, .04), (0, .04)])]
    if rng.random() < .3:  # an arm with a joint and a cone at its end
        joint = (-h * .25, 0, h * .6)
        tip = np.array([h * .15, 0, h])
        cone = tube(tip, tip + (.12, 0, -.12), .04, r1 * .6, 16)
        return parts + [tube((0, 0, 0), joint, .015), tube(joint, tip, .015), cone]
    if rng.random() < .5:  # a bulging foot like a vase
        belly = rng.uniform(.06, .12)
        parts.append(lathe([(0, 0), (.04, 0), (belly, h * .3), (.02, h * .6), (0, h * .6)]))
    if rng.random() < .35:
        h *= 2.2  # a floor lamp
    top = h + tall
    shade = [(r1, h), (r0, top), (r0 - .006, top), (r1 - .006, h), (r1, h)]
    return parts + [tube((0, 0, 0), (0, 0, h + tall * .7), .014), lathe(shade)]


def monitor(rng):
    w, h, t, neck, tilt = rng.uniform((.38, .26, .02, .06, 0), (.8, .46, .1, .16, .12))
    screen = [(t, 0), (t - tilt, h), (-tilt, h), (0, 0)]
    parts = [prism(screen, w, "y", (0, 0, neck)),
             box((.04, .08, neck + h * .4), (-.04, 0, 0))]
    if rng.random() < .4:  # the deep back of a tube screen
        back = [(0, .02), (-.3, h * .2), (-.3, h * .8), (-tilt, h - .02)]
        parts.append(prism(back, w * .7, "y", (0, 0, neck)))
    d, base = rng.uniform((.14, .18), (.24, .4))
    return parts + plate(rng, d, base, 0, .02, .5)


def night_stand(rng):
    d, w, h, low = rng.uniform((.3, .32, .3, .04), (.55, .65, .6, .25))
    parts = feet_or_plinth(rng, d, w, low)
    parts.append(box((d, w, .03), (0, 0, low + h - .03)))
    if rng.random() < .4:  # an open shelf below one drawer
        parts += [box((d, .03, h), (0, s * (w / 2 - .015), low)) for s in (-1, 1)]
        parts.append(box((d, w, .03), (0, 0, low)))
        parts.append(box((d, w, h * .4), (0, 0, low + h * .6)))
        return parts + fronts(rng, d, w, low + h * .6, h * .4, 1)
    parts.append(box((d, w, h), (0, 0, low)))
    return parts + fronts(rng, d, w, low, h, rng.integers(1, 4))


def sofa(rng):
    d, w, seat, back, arm = rng.uniform((.7, .9, .3, .25, .08), (1.05, 2.3, .48, .55, .26))
    low, t = rng.uniform((.03, .15), (.14, .28))
    n = max(1, int(w / .7))
    inner = w - 2 * arm
    parts = [box((d, w, seat * .6), (0, 0, low)),
             box((t, w, seat + back), (-d / 2 + t / 2, 0, low))]
    parts += legs(rng, d, w, low)
    cushion = (d - t, inner / n - .02, seat * .4)
    for i in range(n):
        y = inner * ((i + .5) / n - .5)
        parts.append(box(cushion, (t / 2, y, low + seat * .6)))
    tall = seat + rng.uniform(.08, .25)
    parts += [box((d, arm, tall), (0, s * (w - arm) / 2, low)) for s in (-1, 1)]
    if n > 1 and rng.random() < .25:  # a chaise
        y = rng.choice([-1, 1]) * (w - w / n) / 2
        parts.append(box((.6, w / n, seat), (d / 2 + .3, y, low)))
    return parts


def stool(rng):
    d, h = rng.uniform((.28, .28), (.5, .78))
    w = d * rng.uniform(1, 1.4)
    parts = plate(rng, d, w, h, rng.uniform(.03, .14), .55)
    support = pedestal if rng.random() < .35 else legs
    return parts + support(rng, d * .8, w * .8, h)


def table(rng):
    d, h = rng.uniform((.45, .35), (1.1, 1))
    w = d * rng.uniform(1, 2)
    support = rng.choice([legs, legs, pedestal, slabs])
    parts = plate(rng, d, w, h, rng.uniform(.02, .06), .35)
    if rng.random() < .2:  # a lower shelf
        parts.append(box((d * .6, w * .6, .02), (0, 0, h * .35)))
    return parts + support(rng, d * .8, w * .85, h)


def toilet(rng):
    r, h, tank, tall = rng.uniform((.16, .34, .12, .25), (.22, .46, .22, .45))
    long, foot = rng.uniform((1.1, .5), (1.4, .85))
    bowl = [(0, 0), (r * foot, 0), (r * foot * .9, h * .4), (r, h * .85),
            (r, h), (r * .72, h), (r * .5, h * .6), (0, h * .5)]
    x = -r * long - tank / 2 + .05
    tank_width = r * rng.uniform(1.8, 2.5)
    parts = [lathe(bowl, squash=long),
             box((tank, tank_width, tall), (x, 0, h - .04)),
             box((tank * .8, r, h), (x, 0, 0))]
    if rng.random() < .5:  # the lid leans on the tank
        lid = [(0, 0), (r, 0), (r, .02), (0, .02)]
        parts.append(lathe(lid, (x + tank / 2 + .03, 0, h + r), "x"))
    return parts


def vase(rng):
    h, r, foot, bulge, flare = rng.uniform((.16, .035, .4, .1, 0), (.45, .09, .9, .9, .6))
    z = np.linspace(0, 1, 12)
    belly = bulge * np.sin(np.pi * z ** rng.uniform(.6, 1.6))
    outside = r * (foot + belly + flare * z ** 4)
    inside = (outside - .1 * r)[:5:-1]  # as far down as a camera can see
    profile = [(0, 0), *zip(outside, h * z), *zip(inside, h * z[:5:-1]), (0, h * z[6])]
    parts = [lathe(profile, sides=rng.choice([4, 6, 24, 24]))]
    if rng.random() < .25:
        parts += ring_handle(outside[6], h * .5, h * .3, .1 * r)
    return parts


def wardrobe(rng):
    d, w, h, low = rng.uniform((.35, .5, .9, .04), (.7, 1.5, 2, .15))
    parts = feet_or_plinth(rng, d, w, low)
    parts.append(box((d, w, h), (0, 0, low)))
    drawers = h * rng.choice([0, .25])
    parts += fronts(rng, d, w, low + drawers, h - drawers, 1, rng.integers(1, 4))
    if drawers:
        parts += fronts(rng, d, w, low, drawers, 1, rng.integers(1, 3))
    if rng.random() < .5:  # a cornice
        parts.append(box((d + .1, w + .1, .05), (0, 0, low + h)))
    return parts


# --- the other half of ModelNet40 -----------------------------------------------------------------

def bathtub(rng):
    d, w, h, rim, slope = rng.uniform((.65, 1.4, .38, .03, .05), (.95, 1.9, .62, .12, .2))
    if rng.random() < .15:  # a whirlpool
        d = w
    power = rng.choice([2, 2.6, 4, 8])
    built_in = rng.random() < .5
    low = h * rng.uniform(.15, .35)
    foot = 0 if built_in else rng.choice([0, .12])
    outside = [(d / 2, 0, 20), (0, 0, 20), (0, h, 20)]
    if not built_in:
        lip = rng.choice([0, rim - .015])
        taper = lip + slope * rng.uniform(.2, .7)
        outside = [(d / 2, foot, power), (taper + .06, foot, power), (taper, low, power),
                   (lip, h - .03, power), (0, h - .03, power), (0, h, power)]
    inside = [(rim, h, power), (rim + slope * .3, h * .6, power), (rim + slope, low, power),
              (d / 2, low, power)]
    parts = [vessel(d, w, outside + inside)]
    if foot:
        parts += [lathe([(0, 0), (.04, 0), (.025, .08), (.05, .22)], (x * d * .3, y * w * .32, 0))
                  for x in (-1, 1) for y in (-1, 1)]
    wall = h + rng.uniform(.1, .5)
    if built_in and rng.random() < .4:
        parts.append(box((d, .04, wall), (0, -w / 2, 0)))
    if built_in and rng.random() < .4:
        parts.append(box((.04, w, wall), (-d / 2, 0, 0)))
    if rng.random() < .5:  # on the long side or at the end
        tap = faucet(rng, (rim * .4, 0, h))
        at_end = rng.random() < .5
        parts += moved(turned(tap, "z", np.pi / 2), (0, -w / 2, 0)) if at_end else moved(
            tap, (-d / 2, 0, 0))
    return parts


def bowl(rng):
    r, h, foot, power = rng.uniform((.07, .35, .25, .3), (.16, 1.05, .8, .8))
    h *= r
    wall = r * rng.uniform(.02, .1)
    base, lip = rng.choice([0, .03, .1, .35]) * h, rng.choice([0, 0, .08, .2]) * r
    z = np.linspace(0, 1, 9)
    outside = r * (foot + (1 - foot) * z ** power)
    level = base + h * z
    stand = [(0, 0), (r * foot * rng.uniform(.75, 1.05), 0), (r * foot * .7, base)]
    edge = [(r + lip, base + h), (r + lip, base + h + wall)]
    inside = zip((outside - wall)[::-1], (level + wall)[::-1])
    profile = [*stand, *zip(outside, level), *edge, *inside, (0, base + wall)]
    return [lathe(profile, sides=rng.choice([6, 10, 28, 28, 28]), squash=rng.choice([1, 1, 1.25]))]


def cone(rng):
    r, h = rng.uniform((.12, .3), (.3, .85))
    tip = r * rng.choice([0, .08, .15, .35])
    bottom = 0
    parts = []
    kind = rng.integers(4)
    if kind < 2:  # a traffic cone on a square or round plate
        bottom = rng.uniform(.01, .06)
        wide = r * rng.uniform(2.4, 3.6)
        parts.append(rounded((wide, wide, bottom), (0, 0, 0), rng.choice([2, 6, 20])))
        for z in rng.choice([0, .3, .45, .6], 2, replace=False):
            if z:  # a band stands out
                band = [(r + (tip - r) * t + .012, bottom + h * t) for t in (z, z + .12)]
                parts.append(lathe([(0, band[0][1]), *band, (0, band[1][1])]))
    elif rng.random() < .25:  # on a post
        bottom = h * rng.uniform(.15, .4)
        parts.append(tube((0, 0, 0), (0, 0, bottom), r * rng.uniform(.1, .35)))
    profile = [(0, bottom), (r, bottom), (tip, bottom + h), (0, bottom + h)]
    return [*parts, lathe(profile, sides=rng.choice([4, 8, 28, 28, 28]))]


def curtain(rng):
    w, h, depth, tie = rng.uniform((.35, 1, .015, .3), (1.2, 2.5, .08, .75))
    tie *= rng.random() < .45  # held together at the side
    t = np.linspace(0, 1, 49)[:, None]
    folds = depth * np.sin(2 * np.pi * t * rng.integers(3, 9) + rng.uniform(0, 6))
    folds += depth * .3 * np.sin(2 * np.pi * t * rng.uniform(9, 14))
    rings = []
    for z in np.linspace(0, 1, 13):
        share = 1 - tie * np.exp(-((z - .4) / (.2 if z < .4 else .35)) ** 2)
        path = np.concatenate([folds / share ** .25, w * t * share, t * 0 + h * z], 1)
        rings.append(np.concatenate([path + (.008, 0, 0), path[::-1] - (.008, 0, 0)]))
    parts = moved([loft(rings)], (0, -w, 0))
    low, high = -w, 0
    if rng.random() < .6:  # another one, its mirror image
        gap = w * rng.choice([0, .1, rng.uniform(.2, 1.5)]) * (tie == 0)
        vertices, faces = parts[0]
        parts.append((vertices * (1, -1, 1) + (0, gap, 0), faces[:, ::-1]))
        high = w + gap
    if rng.random() < .3:  # a valance
        y = np.linspace(low, high, 33)
        hem = h * (.88 - .05 * np.abs(np.sin(np.arange(33) * np.pi / 8)))
        edge = [*np.stack([y, hem], 1), (high, h), (low, h)]
        parts.append(prism(edge, .02, "x", (depth * 1.6, 0, 0)))
    if high > 0 or rng.random() < .5:  # a rod
        r, more = rng.uniform((.012, .03), (.03, .2))
        rod = [(0, low - more, h), (0, high + more, h)]
        parts += [tube(*rod, r), *(ellipsoid((r * 1.8,) * 3, end) for end in rod)]
    return parts


def dresser(rng):
    d, w, h, low, over = rng.uniform((.38, .75, .65, .04, 0), (.6, 1.7, 1.35, .2, .05))
    h *= 1 if w < 1.3 else .75
    rows = rng.integers(3, 7)
    columns = 1 if w < .9 else rng.integers(1, 4)
    parts = feet_or_plinth(rng, d, w, low)
    parts += [box((d, w, h), (0, 0, low)), box((d + over, w + over, .03), (0, 0, low + h))]
    top = h / rows if rng.random() < .4 else 0  # smaller drawers at the top
    parts += fronts(rng, d, w, low, h - top, rows - (top > 0), columns)
    if top:
        parts += fronts(rng, d, w, low + h - top, top, 1, columns + 1)
    if rng.random() < .15:  # a mirror
        tall, wide = rng.uniform((.4, .5), (.8, .8))
        parts.append(box((.03, w * wide, tall), (-d / 2 + .05, 0, low + h)))
    return parts


def flower_pot(rng):
    r, h = rng.uniform((.1, .14), (.18, .36))
    if rng.random() < .25:  # a long planter
        w = rng.uniform(.35, .9)
        levels = [(r, 0, 20), (rng.uniform(0, .04), 0, 20), (0, h, 20), (.02, h, 20),
                  (.02, h * .85, 20), (r, h * .85, 20)]
        parts = [vessel(2 * r, w, levels)]
        for y in np.arange(-w / 2 + r, w / 2 - r * .5, 1.3 * r):
            parts += moved(foliage(rng, h * .85, h * rng.uniform(.6, 1.2), r), (0, y, 0))
        return parts
    parts = pot(rng, r, h)
    if rng.random() < .3:  # a saucer
        parts.append(lathe([(0, -.01), (r, -.01), (r * 1.15, .02), (r, .01), (0, .01)]))
    if rng.random() < .8:  # else it is empty
        parts += foliage(rng, h * .85, h * rng.uniform(.5, 1.5), r * rng.uniform(.9, 1.8))
    return parts


def glass_box(rng):
    d, w, h, bar = rng.uniform((.25, .3, .2, .008), (.6, 1.1, .7, .035))
    low = rng.choice([0, .05, .15])
    parts = [box((d, w, bar), (0, 0, low)), box((d * .95, w * .95, low + .01), (0, 0, 0))]
    posts = np.linspace(-w / 2, w / 2, rng.integers(2, 6))
    for s in (-1, 1):
        parts += [box((bar, bar, h), (s * d / 2, y, low)) for y in posts]
        for z in (low, low + h):
            parts.append(box((bar, w + bar, bar), (s * d / 2, 0, z)))
            parts.append(box((d + bar, bar, bar), (0, s * w / 2, z)))
    panes = [box((.004, w, h), (s * d / 2, 0, low)) for s in (-1, 1)]
    panes += [box((d, .004, h), (0, s * w / 2, low)) for s in (-1, 1)]
    panes.append(box((d, w, .004), (0, 0, low + h)))
    share = rng.choice([.1, .5, .9])
    parts += [pane for pane in panes if rng.random() < share]
    if rng.random() < .3:  # a shelf
        parts.append(box((d, w, .008), (0, 0, low + h * rng.uniform(.4, .6))))
    if rng.random() < .25:  # a lid
        parts.append(box((d + .04, w + .04, bar * 1.5), (0, 0, low + h)))
    return parts


def keyboard(rng):
    d, w, back, front = rng.uniform((.13, .36, .018, .008), (.19, .48, .045, .018))
    rows, columns = rng.integers(3, 6), rng.integers(11, 16)
    pad = w * rng.choice([0, .2])  # the number pad
    main = w * .94 - pad
    field = d * rng.uniform(.75, .92)
    row = field / (rows + 1)  # the last one is the space bar
    top = np.array([0, w * .47 - main / 2, (front + back) / 2])
    caps = keys(top - (row / 2, 0, 0), field - row, main, rows, columns)
    caps.append(box((row * .8, main * .45, .006), top + (field / 2 - row / 2, 0, 0)))
    if pad:
        caps += keys((0, pad / 2 - w * .48, top[2]), field, pad * .9, rows + 1, 4)
    caps = turned(caps, "y", np.arctan2(back - front, d), (0, 0, top[2]))
    outline = [(d / 2, 0), (d / 2, front), (-d / 2, back), (-d / 2, 0)]
    parts = [prism(outline, w, "y"), *caps]
    if rng.random() < .35:  # a rest for the hands
        rest = rng.uniform(.03, .08)
        parts.append(box((rest, w * rng.uniform(.8, 1), front * .8), (d / 2 + rest / 2, 0, 0)))
    if rng.random() < .4:  # it stands on two feet
        parts = turned(parts, "y", .12, (d / 2, 0, 0))
        parts += [box((.01, .02, .02), (-d * .42, s * w * .4, 0)) for s in (-1, 1)]
    return parts


def laptop(rng):
    w, d, t, screen, rim = rng.uniform((.27, .7, .008, .004, .008), (.42, .85, .035, .015, .02))
    d *= w
    tall = d * rng.uniform(.9, 1.02)
    rows, columns = rng.integers(4, 6), rng.integers(10, 15)
    lid = [box((screen, w, tall), (0, 0, 0)), tube((0, -w * .4, 0), (0, w * .4, 0), screen)]
    lid += [box((screen + .01, rim, tall), (0, s * (w - rim) / 2, 0)) for s in (-1, 1)]
    lid += [box((screen + .01, w, rim), (0, 0, z)) for z in (0, tall - rim)]
    lid = turned(lid, "y", -rng.uniform(-.15, .75))
    return [box((d, w, t), (0, 0, 0)), *moved(lid, (-d / 2, 0, t)),
            *keys((-d * .14, 0, t - .002), d * .5, w * .88, rows, columns),
            box((d * .22, w * .25, .004), (d * .3, 0, t - .002))]


def mantel(rng):
    w, h, d, leg, frieze = rng.uniform((1.2, .95, .15, .14, .15), (2, 1.35, .4, .32, .35))
    shelf, over = rng.uniform((.03, .06), (.09, .25))
    inner = w - 2 * leg
    parts = [box((d, inner, frieze), (0, 0, h - frieze))]
    panels = rng.random() < .6
    for y in (leg / 2 - w / 2, w / 2 - leg / 2):
        parts.append(box((d, leg, h), (0, y, 0)))
        if panels:  # with a plinth and a capital
            parts += [box((.03, leg * .5, h * .55), (d / 2, y, h * .2)),
                      box((d + .04, leg + .04, h * .12), (.02, y, 0)),
                      box((d + .04, leg + .04, .05), (.02, y, h - frieze))]
    steps = rng.integers(1, 4)  # a moulding, the uppermost step is the shelf
    for i in range(steps):
        out = over * (i + 1) / steps
        thick = shelf if i + 1 == steps else .03
        parts.append(box((d + out, w + out, thick), (out / 2, 0, h + .03 * i)))
    if rng.random() < .6:  # the firebox behind it
        deep, high = rng.uniform(.2, .6), h - frieze
        x = -(d + deep) / 2
        parts += [box((deep, .04, high), (x, s * inner / 2, 0)) for s in (-1, 1)]
        parts += [box((.04, inner, high), (x - deep / 2, 0, 0)),
                  box((deep, inner, .04), (x, 0, high))]
    if rng.random() < .5:
        hearth = rng.uniform(.2, .5)
        parts.append(box((d + hearth, w * 1.1, .05), (hearth / 2, 0, -.05)))
    if rng.random() < .25:  # what is above it, up to the ceiling
        size = (d * .6, w * rng.uniform(.7, 1), h * rng.uniform(.5, .9))
        parts.append(box(size, (-d * .2, 0, h + .03 * steps)))
    return parts


def person(rng):
    h, broad, stout, stride = rng.uniform((1.5, .105, .85, -.2), (1.9, .13, 1.3, .55))
    stride = max(stride, 0)
    r, hip, shoulder = h * .045 * stout, h * .47, h * .8
    deep, wide = h * .125 * stout, h * broad * 2
    parts = []
    for s in (-1, 1):
        thigh, shin = s * stride, s * stride - stride * rng.uniform(.2, 1.5)
        top = np.array([0, s * h * .05, hip])
        knee = top + h * .23 * swung(thigh)
        foot = knee + h * .22 * swung(shin)
        parts += limb([top, knee, foot], [r * 1.2, r * .9, r * .6])
        parts.append(ellipsoid((h * .075, r * .8, h * .025), foot + (h * .035, 0, -h * .01)))
        out, forward = rng.choice([.12, .12, rng.uniform(.1, 2.2)]), rng.uniform(-.3, .9)
        top = np.array([0, s * h * broad * .95, shoulder])
        elbow = top + h * .165 * swung(forward, out) * (1, s, 1)
        bent = swung(forward + rng.choice([.15, rng.uniform(.2, 1.8)]), out) * (1, s, 1)
        parts += limb([top, elbow, elbow + h * .15 * bent], [r * .9, r * .7, r * .5])
        parts.append(ellipsoid((r * .7, r * .55, r * .8), elbow + h * .17 * bent))
    waist = wide * rng.uniform(.1, .16)
    torso = [(deep / 2, hip - h * .04, 2), (waist * .6, hip, 2), (waist, hip * 1.22, 2),
             (.01, shoulder - h * .05, 2.5), (waist * .5, shoulder + h * .02, 2),
             (deep / 2, shoulder + h * .04, 2)]
    head = shoulder + h * .14
    parts += [vessel(deep, wide, torso), tube((0, 0, shoulder), (0, 0, head), h * .03),
              ellipsoid((h * .054, h * .045, h * .068), (h * .01, 0, head))]
    if rng.random() < .25:  # a dress or a coat
        flare, hem = rng.uniform((.1, .05), (.22, .33)) * h
        parts.append(lathe([(0, hem), (flare, hem), (deep * .6, hip * 1.2), (0, hip * 1.2)]))
    if rng.random() < .3:  # a hat
        brim = h * rng.choice([.056, .1])
        hat = [(0, 0), (brim, 0), (brim, .01), (h * .055, .01), (h * .045, h * .055), (0, h * .06)]
        parts.append(lathe(hat, (h * .01, 0, head + h * .03)))
    elif rng.random() < .4:  # long hair
        parts.append(ellipsoid((h * .04, h * .055, h * .1), (-h * .03, 0, head - h * .03)))
    if rng.random() < .15:  # a rucksack
        size = (h * .1, wide * .8, h * .25)
        parts.append(box(size, (-deep / 2 - h * .05, 0, shoulder - h * .25)))
    return parts


def piano(rng):
    w, h, t = rng.uniform((1.35, .66, .2), (1.6, .76, .32))
    grand = rng.random() < .45
    front = .1 if grand else rng.uniform(.2, .32)  # the keys end here
    if grand:
        long, tail = rng.uniform((1.3, .2), (2.2, .45))
        s = np.linspace(0, 1, 9)
        bend = np.stack([-.35 - (long - .35) * s,
                         -w / 2 + w * (1 - tail) * (3 * s ** 2 - 2 * s ** 3)], 1)
        outline = [(0, w / 2), (0, -w / 2), *bend, (-long - .1, w / 2 - tail * .6),
                   (-long - .05, w / 2 - .05), (-long * .9, w / 2)]
        parts = [prism(outline, t, "z", (0, 0, h))]
        feet = [(-.12, -w * .42), (-.12, w * .42), (-long * .85, w / 2 - tail * .5)]
        parts += [tube((x, y, h - t / 2), (x, y, 0), .06, .04) for x, y in feet]
        parts += [tube((-.3, y, h), (-.3, y, .1), .02) for y in (-.1, .1)]  # the pedals' lyre
        parts.append(box((.2, .3, .04), (-.3, 0, .08)))
        if rng.random() < .7:  # the lid, open
            lid = prism(outline, .03, "z", (0, 0, h + t / 2))
            angle = -rng.uniform(.4, .75)
            parts += turned([lid], "x", angle, (0, w / 2, h + t / 2))
        desk = h + t / 2
    else:
        d, tall = rng.uniform((.32, 1), (.5, 1.35))
        parts = [box((d, w, tall), (-d / 2, 0, 0)),
                 box((d + .05, w + .03, .03), (-d / 2, 0, tall))]
        for y in (.05 - w / 2, w / 2 - .05):
            parts.append(box((front, .06, .2), (front / 2, y, h - .12)))
            if front > .24:
                parts.append(box((.07, .07, h), (front - .05, y, 0)))
        if rng.random() < .5:
            parts.append(box((front + .1, w, .08), (front / 2 - .05, 0, 0)))
        desk = h + .1
    parts.append(box((front, w, .1), (front / 2, 0, h - .12)))
    parts += keys((front / 2 + .01, 0, h - .02), front, w - .16, 1, 26)
    if rng.random() < .7:  # for the music
        parts += turned([box((.02, w * .45, .2), (.02, 0, desk))], "y", -.2, (0, 0, desk))
    if rng.random() < .35:
        seat = rng.uniform(.4, .5)
        stool = plate(rng, .32, .5, seat, .08, .1) + legs(rng, .32, .45, seat)
        parts += moved(stool, (front + .35, 0, 0))
    return parts


def plant(rng):
    h, r = rng.uniform((.5, .2), (1.5, .5))
    z, parts = 0, []
    if rng.random() < .75:  # a pot, small beside the plant
        wide, z = rng.uniform((.12, .2), (.2, .35)) * h
        parts = pot(rng, wide, z)
    if rng.random() < .3:  # two that grow into each other
        parts += foliage(rng, z * .85, h * rng.uniform(.4, .7), r)
    return parts + foliage(rng, z * .85, h, r)


def radio(rng):
    d, w, h = rng.uniform((.06, .2, .1), (.14, .42, .24))
    kind = rng.choice(["arched", "handy", "box", "box"])
    speakers = [(0, h * .65, w * .2)]  # y, z, radius
    if kind == "arched":
        angle = np.linspace(0, np.pi, 13)
        arch = np.stack([w / 2 * np.cos(angle), h * .6 + w / 2 * np.sin(angle)], 1)
        parts = [prism([(w / 2, 0), *arch, (-w / 2, 0)], d, "x"),
                 box((d * 1.2, w * 1.1, .012), (0, 0, 0))]
    elif kind == "handy":
        w = h * rng.uniform(.4, .6)
        speakers = [(0, h * .55, w * .35)]
        parts = [box((d * .7, w, h), (d * .15, 0, 0)),
                 tube((0, w * .35, h), (0, w * .35, h * 1.9), .007)]
    else:
        parts = [rounded((d, w, h), (0, 0, 0), rng.choice([3, 8, 20]))]
        r = min(h * .4, w * .2) * rng.uniform(.7, 1)
        y = w / 2 - r * 1.2
        speakers = [(y, h * .55, r), (-y, h * .55, r)][:rng.integers(1, 3)]
        if rng.random() < .5:  # an antenna
            y, lean = rng.uniform((-.45, -.4), (.45, .4)) * (w, h)
            end = (-d * .3, y + lean, h * rng.uniform(1.5, 2.6))
            parts.append(tube((-d * .3, y, h * .9), end, .004))
        if rng.random() < .5:
            y, z = w * rng.uniform(.3, .48), h * rng.uniform(1.2, 1.4)
            parts += pipe([(0, -y, h * .9), (0, -y, z), (0, y, z), (0, y, h * .9)], .008)
    for y, z, r in speakers:
        cone = [(r, -.01), (r, .008), (r * .85, .008), (r * .3, .001), (0, .005)]
        parts.append(lathe(cone, (d / 2, y, z), "x"))
    free = -.3 * w if len(speakers) == 1 and kind == "box" else 0  # beside the speaker
    parts.append(box((.012, w * .3, h * .12), (d / 2, free * .7, h * (.7 if free else .3))))
    for y in np.linspace(-.12, .12, rng.integers(2, 5)) * w:
        parts.append(knob(h * rng.uniform(.05, .08), .018, (d / 2, free * .7 + y, h * .15)))
    return parts


def range_hood(rng):
    w, d, skirt, rise, tall = rng.uniform((.55, .42, .04, .08, .2), (1.1, .6, .16, .35, .7))
    depth, width = rng.uniform((.22, .2), (.32, .4))  # of the duct
    kind = rng.choice(["plate", "straight", "curved", "curved"])
    if kind == "plate":  # of glass, flat or bent
        y = np.linspace(-w / 2, w / 2, 13)
        z = skirt - rng.choice([0, rng.uniform(.03, .12)]) * (2 * y / w) ** 2
        outline = [*np.stack([y, z], 1), *np.stack([y, z + .015], 1)[::-1]]
        parts = [prism(outline, d, "x", (d / 2, 0, 0)),
                 box((depth + .08, width + .15, .07), (d * .45, 0, skirt - .05))]
        levels, top = [(depth, width, skirt)], skirt
    else:
        t = np.linspace(0, 1, 8)
        share = (1 - t) ** (1 if kind == "straight" else rng.uniform(.4, 2.5))
        levels = [(d, w, 0), *zip(depth + (d - depth) * share, width + (w - width) * share,
                                  skirt + rise * t)]
        top = skirt + rise
        parts = [box((d * .8, w * .4, .02), (d / 2, s * w * .22, -.005)) for s in (-1, 1)]
        if rng.random() < .5:
            parts.append(box((d + .03, w + .03, .025), (d / 2 + .005, 0, skirt - .02)))
    levels = [(0, 0, levels[0][2]), *levels, (depth, width, top + tall), (0, 0, top + tall)]
    rings = [[(x, -y / 2, z), (x, y / 2, z), (0, y / 2, z), (0, -y / 2, z)] for x, y, z in levels]
    return [*parts, loft(rings)]


def sink(rng):
    d, w, h, rim = rng.uniform((.4, .45, .13, .02), (.58, .75, .22, .07))
    stand = rng.choice(["none", "none", "none", "cabinet", "pedestal", "legs"])
    bowls = 1 if stand == "pedestal" else rng.integers(1, 3)
    power = rng.choice([2, 4, 12])
    outer = 20 if bowls == 2 or rng.random() < .6 else power
    under = rim + .005
    outside = [(d / 2, 0, power), (under + .05, 0, power), (under, h * .4, power),
               (under, h - .02, power), (0, h - .02, outer)]
    if rng.random() < .25:  # a trough, its walls upright
        outside = [(d / 2, 0, outer), (0, 0, outer)]
    inside = [(0, h, outer), (rim, h, power), (rim + .01, h * .5, power), (rim + .06, .02, power),
              (d / 2, .02, power)]
    parts = []
    for j in range(bowls):
        parts.append(vessel(d, w, outside + inside, (0, w * (j - (bowls - 1) / 2), 0)))
    w *= bowls
    if stand != "pedestal" and rng.random() < .35:  # a board to drain on
        board = w / bowls * rng.uniform(.5, 1)
        parts = moved(parts, (0, -board / 2, 0))
        parts.append(box((d, board, .02), (0, w / 2, h - .02)))
        w += board
    back = rng.uniform(.06, .12)
    parts.append(box((back, w, .02), (-(d + back) / 2, 0, h - .02)))
    if rng.random() < .2:
        parts.append(box((.02, w, .2), (-d / 2 - back, 0, h - .02)))
    if rng.random() < .8:
        parts += faucet(rng, (-(d + back) / 2, 0, h))
    low, x = rng.uniform(.6, .75), -back / 2
    if stand == "cabinet":
        d += back
        case = [box((d, w, low), (0, 0, 0)), *fronts(rng, d, w, 0, low, 1, bowls + 1)]
        case += [box((d, .02, h), (0, s * w / 2, low)) for s in (-1, 1)]
        case.append(box((.02, w, h), (d / 2, 0, low)))
        parts += moved(case, (x, 0, -low))
    elif stand == "pedestal":
        column = [(0, -low), (d * .3, -low), (d * .17, -low * .7), (d * .2, .02), (0, .02)]
        parts.append(lathe(column))
    elif stand == "legs":
        parts += moved(legs(rng, d, w, low + h * .9), (0, 0, -low))
    return parts


def stairs(rng):
    n = rng.integers(6, 18)
    w, rise, run = rng.uniform((.7, .15, .22), (1.5, .2, .32))
    kind = rng.choice(["straight", "straight", "landing", "spiral"])
    solid = kind != "spiral" and rng.random() < .5
    side = rng.choice([-1, 1])  # to which it turns
    turn = side * rng.uniform(.3, .5) if kind == "spiral" else 0
    corner = n // 2 if kind == "landing" else -1
    near = far = run * .55  # half a step's length at its left and right end
    if turn:  # wedges around a column
        centre = w / 2 + .08
        run = abs(turn) * centre
        near, far = run * .12, run * 1.05
    place, heading, parts = np.zeros(3), 0, []
    edges = {-1: [], 1: []}  # where railings stand
    for i in range(n):
        ahead, across = yaw(heading)[:2]
        long = w if i == corner else run
        thick = rise * (i + 1) if solid else .045
        place = place + ahead * long / 2 + (0, 0, rise)
        a, b = (w / 2, w / 2) if i == corner else (near, far)
        y = side * w / 2
        tread = prism([(-a, y), (a, y), (b, -y), (-b, -y)], thick, "z", (0, 0, -thick / 2))
        parts += moved(turned([tread], "z", heading), place)
        for s in (-1, 1):
            if i != corner or s != side:
                edges[s].append(place + s * across * (w / 2 - .04))
        place = place + ahead * long / 2
        if i == corner:  # on to the side
            place = place - ahead * w / 2 + side * across * w / 2
            heading += side * np.pi / 2
        heading += turn
    if turn:
        parts.append(tube((0, side * centre, 0), (0, side * centre, rise * n + .9), .06))
    elif not solid and corner < 0:
        beam = [(0, 0), (run, 0), (run * n, rise * (n - 1)), (run * n, rise * n), (0, rise)]
        parts += [prism(beam, .04, "y", (0, s * w / 2, 0)) for s in (-1, 1)]
    high = (0, 0, rng.uniform(.75, .95))
    for s in (-1, 1):
        if rng.random() < .55 or turn and s != side:
            parts += [tube(foot, foot + high, .015, sides=4) for foot in edges[s]]
            parts += pipe([foot + high for foot in edges[s]], .025)
    return turned(parts, "z", np.pi)  # its foot is in front


def tent(rng):
    d, w, h = rng.uniform((1.8, 1.3, 1), (3.5, 2.6, 2))
    kind = rng.choice(["ridge", "dome", "tipi", "pavilion"])
    t = np.linspace(0, 1, 9)
    if kind == "ridge":  # perhaps with low walls; its ends may lean inwards
        low, lean = rng.choice([0, .25]) * h, rng.choice([0, rng.uniform(0, .4)])
        outline = [(w / 2, 0), (w / 2 - .05, low), (0, h), (.05 - w / 2, low), (-w / 2, 0)]
        ends = [[((d / 2 - lean * z) * s, y, z) for y, z in outline] for s in (-1, 1)]
        rings = [[(-d / 2, 0, 0)] * 5, *ends, [(d / 2, 0, 0)] * 5]
        flap = [(-w * .25, .02), (0, h * .75), (w * .25, .02)]
        parts = [loft(rings), prism(flap, .05 + lean * h * .8, "x", (d / 2 - lean * h * .4, 0, 0))]
        poles = [d / 2 * s - lean * h * s for s in (-1, 1)]
        parts += [tube((x, 0, h * .9), (x, 0, h * 1.05), .025) for x in poles]
    elif kind == "dome":
        power, steep, d = rng.uniform((2, .35, w), (5, .6, 1.5 * w))
        inset = (1 - (1 - t ** 2) ** steep) / 2
        parts = [vessel(d, w, zip(inset * min(d, w), h * .8 * t, [power] * 9))]
        size = w * rng.uniform(.35, .6)  # the porch
        porch = vessel(size, size, zip(inset * size, h * .6 * t, [2] * 9))
        parts += moved([porch], (d / 2, 0, 0))
    elif kind == "tipi":
        sides, r = rng.choice([4, 6, 8, 20]), w * rng.uniform(.35, .6)
        parts = [lathe([(0, 0), (r, 0), (r * .06, h * 1.2)], sides=sides)]
        for angle in np.arange(min(sides, 8)) * 2 * np.pi / min(sides, 8):
            foot = r * yaw(angle)[0]
            parts.append(tube(foot, foot * -.2 + (0, 0, h * 1.42), .02, sides=5))
        d = w = 2 * r
    else:  # a pavilion: a roof on posts, perhaps walls
        eave, out = rng.uniform((.5, 0), (.75, .2)) * h
        ridge = rng.choice([0, max(d - w, 0) / 2])
        x, y = (d / 2 + out - ridge) * (1 - t) + ridge, (w / 2 + out) * (1 - t)
        z = eave + (h * 1.25 - eave) * t ** rng.choice([1, 1.8])
        rings = [[(a, -b, c), (a, b, c), (-a, b, c), (-a, -b, c)] for a, b, c in zip(x, y, z)]
        parts = [loft([[(0, 0, eave)] * 4, *rings])]
        corners = [(i * d / 2, j * w / 2, 0) for i in (-1, 1) for j in (-1, 1)]
        parts += [tube(corner, corner + np.array([0, 0, eave]), .035) for corner in corners]
        if rng.random() < .5:
            gap = w * rng.uniform(.15, .35)
            parts += [box((d, .02, eave), (0, s * w / 2, 0)) for s in (-1, 1)]
            parts += [box((.02, gap, eave), (d / 2, s * (w - gap) / 2, 0)) for s in (-1, 1)]
            parts.append(box((.02, w, eave), (-d / 2, 0, 0)))
    if rng.random() < .35:  # guy ropes
        for x in (-d / 2, d / 2):
            parts += [tube((x * .8, y * .8, h * .5), (x * 1.35, y * 1.35, 0), .012, sides=4)
                      for y in (-w / 2, w / 2)]
    return parts


def tv_stand(rng):
    d, w, h, low, t = rng.uniform((.35, .9, .3, .03, .02), (.6, 1.9, .6, .14, .05))
    case = rng.random() < .65
    if case:
        edges = np.linspace(-w / 2, w / 2, rng.integers(2, 6))
        parts = feet_or_plinth(rng, d, w, low)
        parts += [box((d, w, t), (0, 0, z)) for z in (low, low + h)]
        parts += [box((d * .95, t, h), (0, y, low)) for y in edges * (1 - t / w)]
        if rng.random() < .6:
            parts.append(box((.01, w, h), (-d / 2 + .01, 0, low)))
        wide = edges[1] - edges[0]
        for y in edges[1:] - wide / 2:
            use = rng.integers(3)
            if use == 0:  # a door or drawers, else a shelf or nothing
                parts.append(box((d * .9, wide, h), (0, y, low)))
                parts += fronts(rng, d, wide - t, low + t, h - t, rng.integers(1, 3), y=y)
            elif use == 1:
                parts.append(box((d * .9, wide, .02), (0, y, low + h * rng.uniform(.35, .65))))
    else:  # boards on posts
        power, r = rng.choice([3, 20]), rng.uniform(.015, .04)
        sides = rng.choice([4, 10])
        levels = np.linspace(.04, h, rng.integers(2, 4))
        parts = [rounded((d, w, t), (0, 0, z), power) for z in levels]
        posts = [(x * d * .4, y * w * .4) for x in (-1, 1) for y in (-1, 1)]
        parts += [tube((*post, 0), (*post, h), r, sides=sides) for post in posts]
    if rng.random() < .2:  # the mount of the screen
        parts += [box((.04, w * .15, h * 1.3), (-d * .45, 0, h)),
                  box((.05, w * .5, .12), (-d * .4, 0, h * 2))]
    elif case and rng.random() < .2:  # towers at both sides
        tall, rows = h * rng.uniform(1.5, 2.6), rng.integers(2, 5)
        for y in (-w / 2 - .2, w / 2 + .2):
            parts.append(box((d * .9, .4, tall), (0, y, 0)))
            parts += fronts(rng, d * .9, .4, .05, tall - .05, rows, y=y)
    return parts


def xbox(rng):
    d, w, t = rng.uniform((.24, .26, .065), (.28, .33, .1))
    kind = rng.integers(3)
    front = d / 2
    if kind == 0:  # a waist, a power button, sometimes a hard disk on top
        y = np.linspace(-1, 1, 9)
        half = t / 2 - t * rng.uniform(.05, .16) * (1 - y ** 2)
        outline = [*np.stack([y * w / 2, -half], 1), *np.stack([y * w / 2, half], 1)[::-1]]
        parts = [prism(outline, d, "x", (0, 0, t / 2)), knob(.022, .008, (front, w * .4, t * .5)),
                 box((.012, .05, .02), (front, -w * .3, t * .25))]
        if rng.random() < .6:
            parts.append(box((d * .6, w * .13, t * .9), (-d * .1, -w * .53, t * .05)))
    elif kind == 1:  # the first one: a jewel in a broad cross
        parts = [box((d, w, t * .75), (0, 0, 0)), box((d, w * 1.04, t * .2), (0, 0, t * .75)),
                 lathe([(w * .15, t * .9), (w * .13, t * 1.05), (0, t * 1.1)])]
        for angle in (.7, -.7):
            bar = box((d * 1.15, w * .12, t * .08), (0, 0, t * .93))
            parts += turned([bar], "z", angle)
        parts += [knob(.012, .004, (front, w * y, t * .2)) for y in (-.38, -.25, .25, .38)]
    else:  # a slab with a grille
        parts = [box((d, w, t), (0, 0, 0)), knob(.012, .004, (front, w * .4, t * .7))]
        parts += [box((d * .9, .006, .006), (0, y, t)) for y in np.linspace(-.45, 0, 9) * w]
    parts.append(box((.01, w * .45, .014), (front, w * .05, t * .5)))  # for the disk
    if rng.random() < (.75 if kind == 0 else .3):  # upright
        parts = moved(turned(parts, "x", -np.pi / 2), (0, 0, w / 2))
    if rng.random() < .3:  # the controller in front of it
        pad = [ellipsoid((.035, .07, .022), (0, 0, .022))]
        pad += [ellipsoid((.05, .025, .02), (.035, s * .05, .02)) for s in (-1, 1)]
        pad += [tube((x, y, .03), (x, y, .055), .01) for x, y in ((-.01, .04), (.015, -.02))]
        parts += moved(pad, (front + .1, rng.uniform(-.12, .12), 0))
    return parts


RECIPES = {recipe.__name__: recipe for recipe in (
    airplane, bed, bench, bookshelf, bottle, car, chair, cup, desk, door,
    guitar, lamp, monitor, night_stand, sofa, stool, table, toilet, vase, wardrobe,
    bathtub, bowl, cone, curtain, dresser, flower_pot, glass_box, keyboard, laptop, mantel,
    person, piano, plant, radio, range_hood, sink, stairs, tent, tv_stand, xbox)}
OBJECT_CLASSES = tuple(RECIPES)[:20]        # of the built-in classification
ALL_CLASSES = tuple(sorted(RECIPES))        # ModelNet40's


def make_object(name, rng):
    """A random object of class `name` (one of ALL_CLASSES).

    returns vertices (V, 3) float32 in metres and faces (F, 3) int64. It stands on z = 0, its
    bounding box is centred in x and y, and its front faces +x.
    """
    vertices, faces = join(RECIPES[name](rng))
    low, high = vertices.min(0), vertices.max(0)
    middle = (low + high) / 2
    return (vertices - (middle[0], middle[1], low[2])).astype(np.float32), faces


# --- from a mesh to a simulated scan of it --------------------------------------------------------

def seen_from(camera, xyz, normal, pixel):
    """Mask of the surface samples (N, 3) that a camera sees: those that face it and are nearest
    within their pixel of a spherical depth image (`pixel` in radians)."""
    ray = xyz - camera
    depth = np.linalg.norm(ray, axis=1)
    facing = -(ray * normal).sum(1) / depth  # cosine of the angle of incidence
    azimuth = np.arctan2(ray[:, 1], ray[:, 0]) + np.pi
    polar = np.arccos(np.clip(ray[:, 2] / depth, -1, 1))
    column = (azimuth / pixel).astype(np.int64)
    row = (polar / pixel).astype(np.int64)
    index = row * (column.max() + 1) + column
    nearest = np.full(index.max() + 1, np.inf)
    np.minimum.at(nearest, index, depth)
    # a slanted surface is deeper at one edge of a pixel than at the other: allow for that
    margin = 1.5 * pixel * depth / np.maximum(facing, .2)
    return (facing > .05) & (depth < nearest[index] + margin)


def scan_object(vertices, faces, points, rng):
    """Random yaw and proportions, a partial view, noise: mesh -> (points, 3) float32, in metres."""
    rotation = yaw(rng.uniform(0, 2 * np.pi))
    stretch = rng.uniform(1 - STRETCH, 1 + STRETCH, 3)
    return scan_as_it_stands((vertices * stretch @ rotation).astype(np.float32), faces, points, rng)


def scan_as_it_stands(vertices, faces, points, rng):
    """A partial view of a mesh (V, 3) float32, with noise -> (points, 3) float32, in its frame."""
    middle = (vertices.min(0) + vertices.max(0)) / 2
    radius = np.linalg.norm(vertices - middle, axis=1).max()

    candidates = max(4 * points, 4096)
    xyz, face, normal = sample_faces(vertices, faces, candidates, rng)
    pixel = 1.8 / np.sqrt(candidates)  # about three front samples in each
    seen = np.zeros(candidates, bool)
    for _ in range(VIEWS):
        azimuth = rng.uniform(0, 2 * np.pi)
        elevation = rng.uniform(-.1, .9)
        flat = np.cos(elevation)
        direction = np.array([np.cos(azimuth) * flat, np.sin(azimuth) * flat, np.sin(elevation)])
        camera = middle + 2.5 * radius * direction
        seen |= seen_from(camera.astype(np.float32), xyz, normal[face], pixel)
    xyz = xyz[seen]
    along = xyz @ rng.normal(size=3)
    xyz = xyz[along <= np.quantile(along, 1 - rng.uniform(0, CUT))]
    xyz = np.resize(rng.permutation(xyz), (points, 3))  # repeats if too few are visible
    return (xyz + rng.normal(0, NOISE * radius, xyz.shape)).astype(np.float32)


def object_clouds(per_class, points, seed, classes=OBJECT_CLASSES):
    """`per_class` scanned objects of each of `classes`, class after class.

    returns xyz (per_class * C, points, 3) float32 in metres, not normalised, and label (per_class *
    C,) int64. Object i of a class has its own random stream, so it does not depend on how many
    others are made.
    """
    xyz = np.empty((len(classes) * per_class, points, 3), np.float32)
    for k, name in enumerate(classes):
        for i in range(per_class):
            rng = np.random.default_rng([seed, k, i])
            vertices, faces = make_object(name, rng)
            xyz[k * per_class + i] = scan_object(vertices, faces, points, rng)
    return xyz, np.repeat(np.arange(len(classes)), per_class)


def main():
    parser = argparse.ArgumentParser(prog="python -m data.synthetic_objects",
                                     description=__doc__.split("\n")[0])
    parser.add_argument("--export", metavar="DIR", type=Path, help="write .ply files there")
    folder = parser.parse_args().export
    started = time.time()
    xyz, label = object_clouds(2, 2048, 0, ALL_CLASSES)  # (2 C, 2048, 3)
    seconds = (time.time() - started) / len(xyz)
    print("class             x      y      z   metres, of one scanned object")
    for k, name in enumerate(ALL_CLASSES):
        print(f"{name:12s}", *(f"{size:6.2f}" for size in np.ptp(xyz[2 * k], axis=0)))
    print(f"{len(ALL_CLASSES)} classes, {1e3 * seconds:.1f} ms for an object of 2,048 points")
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        for i, cloud in enumerate(xyz):
            write_ply(folder / f"{ALL_CLASSES[label[i]]}_{i % 2}.ply", cloud)
        print(f"{len(xyz)} files in {folder}")


if __name__ == "__main__":
    from run import main_guard
    main_guard(main)
