"""Procedural rooms: detection and segmentation can be tried without a download.

    python -m data.synthetic_rooms                 shares of the classes, boxes, the time it takes
    python -m data.synthetic_rooms --export DIR    two rooms as .ply, for MeshLab or CloudCompare

Rooms are furnished with the objects of synthetic_objects.py: their points have S3DIS's classes, and
their furniture has boxes with ScanNet's class names. Units are metres, z is up. Seeds determine
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
from data.synthetic_objects import box, join, make_object, seen_from, split, yaw

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
    parser = argparse.ArgumentParser(prog="python -m data.synthetic_rooms",
                                     description=__doc__.split("\n")[0])
    parser.add_argument("--export", metavar="DIR", type=Path, help="write .ply files there")
    folder = parser.parse_args().export
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
        for i in range(2):
            write_ply(folder / f"room_{i}.ply", rooms[i]["xyz"], rooms[i]["rgb"])
        print(f"2 files in {folder}")


if __name__ == "__main__":
    from run import main_guard
    main_guard(main)
