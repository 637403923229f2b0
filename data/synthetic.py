"""Procedural objects and rooms: every task can be tried without a download.

    python -m data.synthetic                 the classes, their sizes, and the time it takes
    python -m data.synthetic --export DIR    two objects of each class and two rooms as .ply, for
                                             MeshLab or CloudCompare

Objects have ModelNet40's class names. They consist of boxes, prisms and surfaces of revolution with
random proportions and optional parts; a simulated scan adds occlusion, cropping and noise. Rooms
are furnished with these objects: their points have S3DIS's classes, and their furniture has boxes
with ScanNet's class names. Units are metres, z is up, an object's front faces +x. Seeds determine
everything. Results on this data show that a script works and nothing more; never compare them with
published ones.
"""
import argparse
import time
from pathlib import Path

import numpy as np

from data.files import write_ply
from data.meshes import sample_faces, sample_surface
from data.s3dis import ROOM_CLASSES

# Difficulty of the object clouds. Lengths are relative to the object's radius.
NOISE = 0.012       # sigma of the sensor noise
STRETCH = 0.20      # every axis is scaled by a factor from 1 - STRETCH to 1 + STRETCH
VIEWS = 2           # cameras around the object; what none of them sees is missing
CUT = 0.30          # up to this share of the visible points is cut off by a random plane


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
    vertices = np.roll(vertices.reshape(-1, 3), "zxy".index(axis), axis=1)
    i, j = (k.ravel() for k in np.mgrid[:len(r) - 1, :sides])
    a = i * sides + j
    b = i * sides + (j + 1) % sides
    quads = np.stack([a, b, b + sides, a + sides], 1)
    return vertices + offset, split(quads)


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
    return [tube(a, b, thickness, sides=6) for a, b in zip(joints, joints[1:])]


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


RECIPES = {recipe.__name__: recipe for recipe in (
    airplane, bed, bench, bookshelf, bottle, car, chair, cup, desk, door,
    guitar, lamp, monitor, night_stand, sofa, stool, table, toilet, vase, wardrobe)}
OBJECT_CLASSES = tuple(sorted(RECIPES))


def make_object(name, rng):
    """A random object of class `name` (one of OBJECT_CLASSES).

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
    vertices = (vertices * stretch @ rotation).astype(np.float32)
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


def object_clouds(per_class, points, seed):
    """`per_class` scanned objects of every class, class after class.

    returns xyz (per_class * C, points, 3) float32 in metres, not normalised, and label (per_class *
    C,) int64. Object i of a class has its own random stream, so it does not depend on how many
    others are made.
    """
    xyz = np.empty((len(OBJECT_CLASSES) * per_class, points, 3), np.float32)
    for k, name in enumerate(OBJECT_CLASSES):
        for i in range(per_class):
            rng = np.random.default_rng([seed, k, i])
            vertices, faces = make_object(name, rng)
            xyz[k * per_class + i] = scan_object(vertices, faces, points, rng)
    return xyz, np.repeat(np.arange(len(OBJECT_CLASSES)), per_class)


# --- rooms ----------------------------------------------------------------------------------------

(CEILING, FLOOR, WALL, BEAM, COLUMN, WINDOW, DOOR,
 TABLE, CHAIR, SOFA, BOOKCASE, BOARD, CLUTTER) = range(13)  # into ROOM_CLASSES
FURNITURE = ("bed", "bookshelf", "cabinet", "chair", "desk", "sofa", "table", "toilet")  # ScanNet
SHAPE = {"cabinet": "wardrobe"}  # make_object's name, where it differs
SEMANTIC = {"bookshelf": BOOKCASE, "chair": CHAIR, "desk": TABLE,
            "sofa": SOFA, "table": TABLE}  # others: clutter
AT_WALL = {"bed": .95, "bookshelf": 1, "cabinet": .95, "chair": .15,
           "desk": .8, "sofa": .75, "table": .1, "toilet": 1}  # probability
KINDS = (                           # relative frequency of each of FURNITURE in a kind of room
    (5, 1, 2, 1, 1, .3, .5, 0),     # bedroom
    (0, 2, 1, 5, 4, .3, 1, 0),      # office
    (0, 1, 1, 3, 0, 5, 3, 0),       # living room
    (0, .3, 2, 1, 0, 0, .5, 4),     # bathroom
    (1, 1, 1, 1, 1, 1, 1, 1))       # storage
OFFICES = (                         # the kinds of room in S3DIS
    (0, 2, .5, 5, 4, .3, 1, 0),     # office
    (0, 1, .3, 3, 0, 5, 3, 0),      # lounge
    (0, 2, .5, 5, 0, 1, 4, 0))      # conference room
ON_TOP = ("cup", "lamp", "monitor", "vase", "bottle")
ON_FLOOR = ("stool", "night_stand", "vase", "guitar", "lamp")
WHITE, GREY, WOOD, DARK = (225, 222, 214), (150, 150, 152), (166, 124, 84), (70, 62, 58)
BLUE, RED, GREEN = (84, 106, 148), (158, 74, 66), (92, 128, 92)
PALETTE = {  # classes share colours on purpose: colour must not give the class away
    CEILING: (WHITE, (236, 236, 236)), FLOOR: (WOOD, GREY, (178, 162, 140)),
    WALL: (WHITE, (214, 202, 176), GREY), BEAM: (WHITE, GREY), COLUMN: (WHITE, GREY),
    WINDOW: ((176, 204, 222), WHITE), DOOR: (WOOD, DARK, WHITE),
    TABLE: (WOOD, WHITE, DARK), CHAIR: (BLUE, DARK, RED, WOOD), SOFA: (GREY, RED, BLUE, GREEN),
    BOOKCASE: (WOOD, DARK, WHITE), BOARD: ((240, 240, 240), (58, 88, 70)),
    CLUTTER: (WHITE, WOOD, GREY, BLUE, RED, GREEN, DARK)}
SHARE = {CEILING: .15, FLOOR: .4, WALL: .25}  # point density relative to all other classes


def make_room(rng, points=40_000, objects=(4, 12), kinds=KINDS):
    """A furnished room, as depth cameras inside it would see it.

    returns arrays: xyz (N, 3) float32 in metres, z up, floor at 0; rgb (N, 3) uint8; semantic (N,)
    int64 into ROOM_CLASSES; furniture (N,) int64 into FURNITURE and instance (N,) int64, both -1
    where a point belongs to no box; label (O,) int64, center (O, 3), size (O, 3) float32: the
    boxes, which bound the instance's points exactly. objects: how many pieces of furniture are
    tried; kinds: frequencies of FURNITURE, one row for each kind of room.
    """
    width, depth, height = rng.uniform((3, 3, 2.4), (6, 7, 3.2))
    parts = shell(rng, width, depth, height)  # (mesh, semantic, furniture or -1) of each part
    solid = [np.stack([vertices.min(0), vertices.max(0)])
             for (vertices, _), semantic, _ in parts if semantic not in (CEILING, FLOOR, WALL)]
    taken, tables = [], []  # bounds (2,), (2,) in x and y of what stands already
    for (vertices, _), semantic, _ in parts:
        if semantic in (COLUMN, WINDOW, DOOR, BOARD):
            low, high = vertices[:, :2].min(0), vertices[:, :2].max(0)
            ahead = .5 * (semantic == DOOR) * (high - low < .1)  # space to walk through a door
            taken.append((low - ahead, high + ahead))
    chance = np.array(kinds[rng.integers(len(kinds))], float)
    tries = rng.integers(objects[0], objects[1] + 1)
    wanted = rng.choice(len(FURNITURE), tries, p=chance / chance.sum())
    chairs_last = sorted(wanted, key=lambda k: FURNITURE[k] == "chair")  # they need a table
    for k in chairs_last:
        name = FURNITURE[k]
        beside = tables if name == "chair" and rng.random() < .7 else []
        at_wall = rng.random() < AT_WALL[name]
        mesh = place(rng, SHAPE.get(name, name), width, depth, at_wall, taken, beside)
        if mesh is None:  # no free place was found
            continue
        if name in ("table", "desk"):
            tables.append(taken[-1])
        parts.append((mesh, SEMANTIC.get(name, CLUTTER), k))
        if name in ("table", "desk", "cabinet") and rng.random() < .6:
            vertices, faces = on_top(rng, *mesh)
            if vertices[:, 2].max() < height:  # not through the ceiling
                parts.append(((vertices, faces), CLUTTER, -1))
    for name in rng.choice(ON_FLOOR, rng.integers(1, 5)):
        mesh = place(rng, name, width, depth, rng.random() < .7, taken)
        if mesh:
            parts.append((mesh, CLUTTER, -1))
    return scan_room(rng, parts, solid, (width, depth, height), points)


def shell(rng, width, depth, height):
    """Floor, ceiling, four walls, and what is built into them."""
    corners = np.array([(x, y, z) for x in (0, width) for y in (0, depth) for z in (0, height)])
    surfaces = ((FLOOR, (0, 4, 6, 2)), (CEILING, (1, 3, 7, 5)),  # seen from inside the room
                (WALL, (0, 2, 3, 1)), (WALL, (4, 5, 7, 6)),  # x = 0, x = width
                (WALL, (0, 1, 5, 4)), (WALL, (2, 6, 7, 3)))  # y = 0, y = depth
    parts = [((corners, split(np.array([quad]))), semantic, -1) for semantic, quad in surfaces]
    side = rng.permutation(4)
    doors = 1 + (rng.random() < .3)
    windows = rng.integers(0, 3)
    for k in range(doors):
        w = rng.uniform(.75, 1)
        leaf = (.06, w, rng.uniform(1.95, 2.1))
        parts.append((panel(rng, side[k], width, depth, leaf, 0), DOOR, -1))
    for k in range(2, 2 + windows):
        w, h = rng.uniform((.8, .9), (2, 1.4))
        pane, frame = (.02, w, h), (.07, .07, h)
        low = rng.uniform(.75, .95)
        mesh = panel(rng, side[k], width, depth, pane, low, frame)
        parts.append((mesh, WINDOW, -1))
    empty = [*side[doors:2], *side[2 + windows:]]  # walls without a door or window
    if empty and rng.random() < .55:
        w, h = rng.uniform((1, .7), (2, 1.1))
        mesh = panel(rng, empty[0], width, depth, (.03, w, h), rng.uniform(.9, 1.1))
        parts.append((mesh, BOARD, -1))
    if rng.random() < .35:
        size = (*rng.uniform(.25, .5, 2), height)
        built_in = [vertices for (vertices, _), semantic, _ in parts if semantic >= BEAM]
        for _ in range(10):
            x = rng.choice([.2, width - .2])
            y = rng.uniform(.2, depth - .2)
            column = box(size, (x, y, 0))
            low, high = column[0].min(0) - .02, column[0].max(0) + .02
            if all((v.max(0) < low).any() or (v.min(0) > high).any() for v in built_in):
                parts.append((column, COLUMN, -1))  # it hides nothing on the wall
                break
    if rng.random() < .35:
        drop = rng.uniform(.2, .4)
        size = (rng.uniform(.2, .4), depth, drop)
        x = rng.uniform(.5, width - .5)
        parts.append((box(size, (x, depth / 2, height - drop)), BEAM, -1))
    return parts


def panel(rng, side, width, depth, size, low, frame=None):
    """A flat box (thickness, width, height) on wall `side`, its bottom at `low`; frame: (thickness,
    width, length) of four bars around it."""
    wall = depth if side < 2 else width
    w = min(size[1], wall - .3)
    meshes = [box((size[0], w, size[2]), (0, 0, low))]
    if frame:
        t, b, h = frame
        meshes += [box((t, b, h), (0, s * w / 2, low)) for s in (-1, 1)]
        meshes += [box((t, w + b, b), (0, 0, z)) for z in (low - b / 2, low + h - b / 2)]
    vertices, faces = join(meshes)
    along = rng.uniform(.1 + w / 2, wall - .1 - w / 2)
    return on_wall(vertices, side, along, width, depth), faces


def on_wall(vertices, side, along, width, depth):
    """Turn a front that faces +x away from wall `side`, and move x = 0 onto that wall."""
    x, y, z = vertices.T
    walls = (x, along + y), (width - x, along - y), (along - y, x), (along + y, depth - x)
    return np.stack([*walls[side], z], 1)


def place(rng, name, width, depth, at_wall, taken, beside=()):
    """An object in a free place, whose bounds are added to `taken`, or None after 20 tries. In the
    first ten it stands at one of the tables whose bounds are in `beside`, and faces it."""
    vertices, faces = make_object(name, rng)
    vertices = vertices * rng.uniform(.9, 1.1, 3)
    vertices = vertices * min(1, 2.3 / vertices[:, 2].max())  # the lowest ceiling is at 2.4
    for i in range(20):
        placed = vertices @ yaw(rng.normal(0, .05))
        if beside and i < 10:
            low, high = beside[rng.integers(len(beside))]
            rotation = yaw(rng.integers(4) * np.pi / 2).round()
            placed = placed @ rotation
            front = rotation[0, :2]  # the direction in which it faces
            apart = (high - low + np.ptp(placed[:, :2], axis=0)) / 2 + rng.uniform(.06, .3)
            sideways = front[::-1] * (high - low) * rng.uniform(-.25, .25)
            position = (low + high) / 2 - front * apart + sideways
            placed = placed + (*position, 0)
        elif at_wall:
            side = rng.integers(4)
            placed = placed - (placed[:, 0].min() - rng.uniform(.02, .1), 0, 0)
            along = rng.uniform(0, depth if side < 2 else width)
            placed = on_wall(placed, side, along, width, depth)
        else:
            placed = placed @ yaw(rng.integers(4) * np.pi / 2)
            placed = placed + (*rng.uniform(0, (width, depth)), 0)
        low, high = placed.min(0)[:2], placed.max(0)[:2]
        inside = (low > 0).all() and (high < (width, depth)).all()
        if inside and all((low > h + .05).any() or (high < n - .05).any() for n, h in taken):
            taken.append((low, high))
            return placed, faces
    return None


def on_top(rng, support, support_faces):
    """A small object on top of another."""
    vertices, faces = make_object(rng.choice(ON_TOP), rng)
    low, high = support.min(0)[:2], support.max(0)[:2]
    position = rng.uniform(low * .7 + high * .3, low * .3 + high * .7)
    xyz = sample_surface(support, support_faces, 3000, rng)
    near = np.linalg.norm(xyz[:, :2] - position, axis=1).argsort()[:30]
    z = xyz[near, 2].max()  # measured, since a desk may have a shelf above its top
    vertices = vertices @ yaw(rng.uniform(0, 2 * np.pi))
    return vertices + (*position, z), faces


def scan_room(rng, parts, solid, size, points):
    """Sample all surfaces, keep what three cameras see, add noise and colour. See `make_room`."""
    vertices, faces = join([mesh for mesh, _, _ in parts])
    part = np.repeat(np.arange(len(parts)), [len(mesh[1]) for mesh, _, _ in parts])  # (F,)
    semantic = np.array([semantic for _, semantic, _ in parts])
    furniture = np.array([furniture for _, _, furniture in parts])
    density = np.array([SHARE.get(s, 1) for s in semantic])
    xyz, face, normal = sample_faces(vertices.astype(np.float32), faces, 9 * points, rng)
    keep = rng.random(len(xyz)) < density[part[face]]
    xyz, face = xyz[keep], face[keep]
    plain = np.isin(semantic[part[face]], (CEILING, FLOOR, WALL))
    for low, high in solid:  # no wall behind a door, no ceiling inside a beam
        inside = plain & (xyz > low - .02).all(1) & (xyz < high + .02).all(1)
        xyz, face, plain = xyz[~inside], face[~inside], plain[~inside]

    pixel = 7 / np.sqrt(len(xyz))  # about three samples in each
    seen = np.zeros(len(xyz), bool)
    cameras = rng.uniform((.2, .2, 1.2), (.8, .8, 2.1), (12, 3)) * (*size[:2], 1)
    things = [vertices for (vertices, _), semantic, _ in parts if semantic >= BEAM]
    low = np.array([vertices.min(0) for vertices in things])
    high = np.array([vertices.max(0) for vertices in things])
    free = [c for c in cameras if not ((c > low) & (c < high)).all(1).any()]  # not in a wardrobe
    for camera in free[:3]:
        seen |= seen_from(camera.astype(np.float32), xyz, normal[face], pixel)
    order = np.resize(rng.permutation(np.flatnonzero(seen)), points)  # repeats if too few
    xyz, face = xyz[order], face[order]
    xyz = (xyz + rng.normal(0, .005, xyz.shape)).astype(np.float32)  # (N, 3)

    part = part[face]
    rgb = colours(rng, semantic, part, normal[face])
    return {"xyz": xyz, "rgb": rgb, "semantic": semantic[part],
            **furniture_boxes(xyz, part, furniture, max(10, points // 800))}


def colours(rng, semantic, part, normal):
    """One colour for each part, lit from above, and noise: (P,), (N,), (N, 3) -> (N, 3) uint8."""
    colour = np.array([rng.choice(PALETTE[s]) for s in semantic])
    colour = colour * rng.uniform(.85, 1.12, (len(semantic), 1))
    tint = rng.uniform(.85, 1.08, 3)
    light = tint * (.85 + .15 * normal[:, 2:])
    rgb = colour[part] * light + rng.normal(0, 9, normal.shape)
    return rgb.clip(0, 255).astype(np.uint8)


def furniture_boxes(xyz, part, furniture, least):
    """Instances with at least `least` points, and their boxes. See `make_room`."""
    instance = np.full(len(xyz), -1)
    label, low, high = [], [], []
    for p in np.flatnonzero(furniture >= 0):
        mine = part == p
        if np.count_nonzero(mine) >= least:
            instance[mine] = len(label)
            label.append(furniture[p])
            low.append(xyz[mine].min(0))
            high.append(xyz[mine].max(0))
    low = np.array(low, np.float32).reshape(-1, 3)
    high = np.array(high, np.float32).reshape(-1, 3)
    return {"furniture": np.where(instance >= 0, furniture[part], -1), "instance": instance,
            "label": np.array(label, np.int64), "center": (low + high) / 2, "size": high - low}


def room_scenes(count, points, seed, objects=(4, 12), kinds=KINDS):
    """`count` rooms (see `make_room`); room i does not depend on how many others are made."""
    return [make_room(np.random.default_rng([seed, i]), points, objects, kinds)
            for i in range(count)]


def main():
    parser = argparse.ArgumentParser(prog="python -m data.synthetic",
                                     description=__doc__.split("\n")[0])
    parser.add_argument("--export", metavar="DIR", type=Path, help="write .ply files there")
    folder = parser.parse_args().export
    started = time.time()
    xyz, label = object_clouds(2, 2048, 0)  # (2 C, 2048, 3)
    seconds = (time.time() - started) / len(xyz)
    print("class             x      y      z   metres, of one scanned object")
    for k, name in enumerate(OBJECT_CLASSES):
        print(f"{name:12s}", *(f"{size:6.2f}" for size in np.ptp(xyz[2 * k], axis=0)))
    print(f"{len(OBJECT_CLASSES)} classes, {1e3 * seconds:.1f} ms for an object of 2,048 points")
    started = time.time()
    rooms = room_scenes(10, 40_000, 0)
    seconds = (time.time() - started) / len(rooms)
    semantic = np.concatenate([room["semantic"] for room in rooms])
    boxes = np.concatenate([room["label"] for room in rooms])
    shares = [f"{name} {100 * np.mean(semantic == k):.0f} %" for k, name in enumerate(ROOM_CLASSES)]
    counts = [f"{name} {np.sum(boxes == k)}" for k, name in enumerate(FURNITURE)]
    print("share of a room's points:", *shares)
    print("boxes in 10 rooms:", *counts)
    print(f"{1e3 * seconds:.0f} ms for a room of 40,000 points")
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        for i, cloud in enumerate(xyz):
            write_ply(folder / f"{OBJECT_CLASSES[label[i]]}_{i % 2}.ply", cloud)
        for i in range(2):
            write_ply(folder / f"room_{i}.ply", rooms[i]["xyz"], rooms[i]["rgb"])
        print(f"{len(xyz) + 2} files in {folder}")


if __name__ == "__main__":
    main()
