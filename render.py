"""Pictures of points and meshes, and sheets of them: the look.png that every run ends with.

    axes = look(elevation=25, azimuth=35)               where from: rows right, up, away
    camera = fit(xyz, axes)                             all of it in the picture
    picture = draw_points(xyz, camera, 160, 160, rgb)   (H, W, 3) uint8
    save("look.png", sheet([Cell(picture, "a chair")], columns=1))

A camera is orthographic, or stands at a distance. Points are drawn by kernels/splat.py, each as a
disc, meshes by a z-buffer of triangles: in numba, or where it is not installed in NumPy, the same
picture in ten times the time. Both are drawn at twice the size and averaged. Pillow writes PNG.
"""
import io
import math
import os
import unicodedata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from kernels import numba, splat
from run import InputError

FINE = 2                    # drawn so many times larger, then averaged
NEAR, FAR = (38, 70, 110), (178, 200, 216)              # of points without colours, by depth
GREEN, RED = (40, 160, 60), (220, 50, 40)               # what is true or right, what is not
TEXT, GAP = 13, 6           # pixels


# ---- Cameras -------------------------------------------------------------------------------------
def look(elevation, azimuth, up="z"):
    """The axes (3, 3) of a camera that looks at the origin: its right, its up, away from it.

    elevation -90 .. 90 and azimuth in degrees. At azimuth 0 the camera stands on the +x axis, at 90
    on +y, and z is up; with up="y" these are +z and +x, so that y is up.
    """
    e, a = math.radians(elevation), math.radians(azimuth)
    away = -np.array([math.cos(e) * math.cos(a), math.cos(e) * math.sin(a), math.sin(e)])
    right = np.array([-math.sin(a), math.cos(a), 0.0])
    axes = np.stack([right, np.cross(right, away), away])
    return axes if up == "z" else axes[:, [1, 2, 0]]    # the axes change places in a circle


class Camera(NamedTuple):
    axes: np.ndarray                        # (3, 3) of `look`
    center: np.ndarray                      # (3,) what is in the middle of the picture
    half: float                             # of the picture's shorter side, in units of the scene
    distance: float = math.inf              # from the eye to center; inf: orthographic


def project(xyz, camera, H, W):
    """Points (N, 3) -> column, row and depth in a picture: (N, 3), as `splat` takes them.

    depth is measured along the view, from the eye or, without one, from center. A point that an eye
    has not in front of it becomes NaN. In perspective depth is not linear in column and row, but
    -1 / depth is.
    """
    axes, center = (torch.as_tensor(x).to(xyz) for x in camera[:2])
    right, up, depth = ((xyz - center) @ axes.T).unbind(-1)
    scale = min(H, W) / 2 / camera.half
    if camera.distance < math.inf:
        depth = depth + camera.distance
        depth = torch.where(depth > camera.distance / 1000, depth, torch.nan)
        scale = scale * camera.distance / depth
    return torch.stack([W / 2 + scale * right, H / 2 - scale * up, depth], -1)


def fit(xyz, axes, distance=math.inf, margin=1.05):
    """The camera that sees all of xyz (N, 3). distance: in radii of the cloud."""
    low, high = xyz.amin(0), xyz.amax(0)
    center, radius = (low + high) / 2, float((high - low).norm()) / 2 or 1.0
    camera = Camera(axes, center.cpu().numpy(), 1.0, distance * radius)
    for _ in range(3):                      # perspective moves what is shifted
        place = project(xyz, camera, 2, 2)[:, :2]
        place = place[place.isfinite().all(1)]
        low, high = place.amin(0), place.amax(0)
        x, y = ((low + high) / 2 - 1).tolist()
        center = camera.center + camera.half * (x * axes[0] - y * axes[1])
        half = camera.half * float((high - low).amax()) / 2 * margin
        camera = camera._replace(center=center, half=half or 1.0)
    return camera


def into_room(xyz, boxes=None):
    """How to look into a room (N, 3), z up, from above: which points to draw (N,), the camera.

    What is near the ceiling is left out. The eye is so near that walls are seen from inside. The
    boxes (k, 6) fit into the picture, too.
    """
    low, high = xyz[:, 2].amin(), xyz[:, 2].amax()
    shown = xyz[:, 2] <= low + 0.87 * (high - low)
    seen = xyz[shown]
    if boxes is not None:
        seen = torch.cat([seen, corners(boxes).reshape(-1, 3).to(seen)])
    return shown, fit(seen, look(elevation=65, azimuth=-60), distance=1.8)


def corners(boxes):
    """Boxes (k, 6), centre and size -> (k, 8, 3)."""
    corner = torch.tensor([(x, y, z) for x in (-.5, .5) for y in (-.5, .5) for z in (-.5, .5)])
    return boxes[:, None, :3] + corner.to(boxes) * boxes[:, None, 3:]


# ---- Points --------------------------------------------------------------------------------------
def draw_points(xyz, camera, H, W, rgb=None, radius=None):
    """A picture (H, W, 3) uint8 of points (N, 3), white where there are none.

    rgb     (N, 3) 0..255; None: dark where near, light where far
    radius  of a point, in pixels; None: so that together they cover the picture once or twice
    A point behind the edge of a nearer one is darker: that shows the shape without a normal.
    """
    if radius is None:
        radius = max(0.6, min(math.sqrt(H * W / len(xyz)), min(H, W) / 48))
    place = project(xyz.float(), camera, FINE * H, FINE * W).nan_to_num(-1e9)       # not seen
    index, depth = splat(place[None], FINE * H, FINE * W, FINE * radius)
    index, depth = index[0], depth[0]                                               # (2 H, 2 W)
    if rgb is None:
        seen = place[:, 2][place[:, 2] > -1e9]
        share = (place[:, 2:] - seen.min()) / (seen.max() - seen.min()).clamp_min(1e-9)
        near, far = (torch.tensor(x, device=xyz.device) for x in (NEAR, FAR))
        rgb = near + (far - near) * share
    colour = torch.as_tensor(rgb).to(xyz)[index.clamp(min=0)]                       # (2 H, 2 W, 3)
    colour = colour * shade(depth / camera.half)[..., None]
    colour[index < 0] = 255
    return smooth(colour.cpu().numpy())


def shade(depth, reach=3, strength=6.0):
    """Brightness (H, W) by how far nearer pixels around each stand out: eye-dome lighting
    (Boucheny 2009), without its lights."""
    H, W = depth.shape
    around = F.pad(depth, (reach,) * 4, value=math.inf)
    total = torch.zeros_like(depth)
    for i, j in ((0, 1), (1, 0), (1, 1), (1, 2), (2, 1), (0, 0), (0, 2), (2, 0), (2, 2)):
        ahead = depth - around[i * reach:i * reach + H, j * reach:j * reach + W]
        total += ahead.nan_to_num(0.0).clamp(0.0, 0.2)
    return torch.exp(-strength / 8 * total)


def smooth(fine):
    """The mean of FINE x FINE pixels each: (2 H, 2 W, 3) -> (H, W, 3) uint8."""
    parts = [fine[i::FINE, j::FINE] for i in range(FINE) for j in range(FINE)]
    return (sum(parts) / FINE ** 2 + 0.5).clip(0, 255).astype(np.uint8)


def draw_object(xyz, size=140, up="z"):
    """One object's points (N, 3), seen from the front at an angle: (size, size, 3) uint8."""
    return draw_points(xyz, fit(xyz, look(elevation=25, azimuth=35, up=up)), size, size)


# ---- Meshes --------------------------------------------------------------------------------------
def triangles_numpy(p, faces, index, depth):
    """A z-buffer: p (V, 3) column, row and depth; index and depth (H, W), -1 and inf, are filled.

    A triangle covers the pixels whose centre is in it or on its border. Depth is linear between its
    corners; the nearest wins, at a tie the first. Those with a corner that is NaN are left out.
    """
    H, W = index.shape
    for f, (a, b, c) in enumerate(p[faces]):
        area = (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])
        if not abs(area) > 1e-12:
            continue
        low, high = np.minimum(np.minimum(a, b), c), np.maximum(np.maximum(a, b), c)
        left, top = (max(int(np.floor(min(x, 1e6))), 0) for x in low[:2])
        right, bottom = (min(int(np.ceil(max(x, 0))), n) for x, n in zip(high[:2], (W, H)))
        x, y = np.arange(left, right) + 0.5, np.arange(top, bottom)[:, None] + 0.5
        u = ((x - a[0]) * (c[1] - a[1]) - (y - a[1]) * (c[0] - a[0])) / area
        v = ((b[0] - a[0]) * (y - a[1]) - (b[1] - a[1]) * (x - a[0])) / area
        z = a[2] + u * (b[2] - a[2]) + v * (c[2] - a[2])
        here = slice(top, bottom), slice(left, right)
        wins = (u >= 0) & (v >= 0) & (u + v <= 1) & (z < depth[here])
        index[here][wins], depth[here][wins] = f, z[wins]


if numba:
    @numba.njit(nogil=True)
    def triangles_loop(p, faces, index, depth):         # as triangles_numpy, pixel by pixel
        H, W = index.shape
        for f in range(len(faces)):
            a, b, c = p[faces[f, 0]], p[faces[f, 1]], p[faces[f, 2]]
            area = (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])
            if not abs(area) > 1e-12:
                continue
            left = max(int(np.floor(min(min(a[0], b[0]), c[0], 1e6))), 0)
            top = max(int(np.floor(min(min(a[1], b[1]), c[1], 1e6))), 0)
            right = min(int(np.ceil(max(max(a[0], b[0]), c[0], 0.0))), W)
            bottom = min(int(np.ceil(max(max(a[1], b[1]), c[1], 0.0))), H)
            for i in range(top, bottom):
                y = i + 0.5
                for j in range(left, right):
                    x = j + 0.5
                    u = ((x - a[0]) * (c[1] - a[1]) - (y - a[1]) * (c[0] - a[0])) / area
                    v = ((b[0] - a[0]) * (y - a[1]) - (b[1] - a[1]) * (x - a[0])) / area
                    z = a[2] + u * (b[2] - a[2]) + v * (c[2] - a[2])
                    if u >= 0 and v >= 0 and u + v <= 1 and z < depth[i, j]:
                        index[i, j] = f
                        depth[i, j] = z


def draw_mesh(vertices, faces, camera, H, W, rgb=(170, 185, 200), light=None, background=255):
    """A picture (H, W, 3) uint8 of a mesh, vertices (V, 3) and faces (F, 3), by Lambert's law.

    rgb     of all faces, or (F, 3); 0..255, as the background
    light   the direction it comes from; None: over the camera's left shoulder
    Both sides of a face are lit, since the field's meshes are not oriented. A face that reaches
    behind the eye is left out.
    """
    vertices, faces = np.asarray(vertices, np.float64), np.asarray(faces)
    p = project(torch.from_numpy(vertices), camera, FINE * H, FINE * W).numpy()
    if camera.distance < math.inf:
        p[:, 2] = -1 / p[:, 2]
    index, depth = np.full((FINE * H, FINE * W), -1), np.full((FINE * H, FINE * W), np.inf)
    (triangles_loop if numba else triangles_numpy)(p, faces, index, depth)
    a, b, c = vertices[faces].transpose(1, 0, 2)
    light = np.array([-0.4, 0.6, -0.8]) @ camera.axes if light is None else np.asarray(light)
    light = light / np.linalg.norm(light)
    normal = np.cross(b - a, c - a)                                                 # (F, 3)
    normal = normal / np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-12)
    colour = np.asarray(rgb) * (0.3 + 0.75 * np.abs(normal @ light))[:, None]       # (F, 3)
    colour = np.concatenate([colour, np.broadcast_to(background, (1, 3))])          # of index -1
    return smooth(colour.clip(0, 255).astype(np.float32)[index])


# ---- Drawn over a picture ------------------------------------------------------------------------
def draw_boxes(picture, boxes, camera, colour):
    """The edges of boxes (k, 6), centre and size, drawn over a picture (H, W, 3)."""
    edges = [(i, j) for i in range(8) for j in range(i) if (i ^ j).bit_count() == 1]
    H, W, _ = picture.shape
    image = Image.fromarray(picture).resize((FINE * W, FINE * H))
    draw = ImageDraw.Draw(image)
    for xyz in corners(torch.as_tensor(boxes, dtype=torch.float64)):
        place = project(xyz, camera, FINE * H, FINE * W).numpy()[:, :2]
        for i, j in edges:
            if np.isfinite(place[[i, j]]).all():
                draw.line([*place[i], *place[j]], fill=colour, width=2 * FINE)
    return np.asarray(image.resize((W, H), Image.Resampling.BOX))


# ---- Sheets --------------------------------------------------------------------------------------
class Cell(NamedTuple):
    picture: np.ndarray                     # (H, W, 3) uint8
    caption: str = ""                       # lines below it
    frame: tuple = None                     # colour of a frame around it


def sheet(cells, columns, title="", legend=()):
    """Pictures of one size in rows of `columns`, with captions -> (H, W, 3) uint8.

    title: lines above them; legend: (name, colour) below. Pillow's font has Latin letters without
    accents, which are left away; others become boxes.
    """
    def plain(text):
        letters = unicodedata.normalize("NFKD", text.replace("ß", "ss"))   # a letter, its accents
        return "".join(c for c in letters if not unicodedata.combining(c))

    title, legend = plain(title), [(plain(name), colour) for name, colour in legend]
    cells = [cell._replace(caption=plain(cell.caption)) for cell in cells]
    font = ImageFont.load_default(TEXT)
    H, W, _ = cells[0].picture.shape
    lines = max(cell.caption.count("\n") + 1 if cell.caption else 0 for cell in cells)
    line = TEXT + 4
    step = H + lines * line + 2 * GAP, W + 2 * GAP                      # rows, columns
    width, rows = columns * step[1], -(-len(cells) // columns)
    titles = [part for text in title.splitlines() for part in wrapped(text, font, width - 2 * GAP)]
    at, places = [GAP, 0], []               # of the legend's entries
    for name, colour in legend:
        needs = TEXT + GAP + int(font.getlength(name)) + 3 * GAP
        if at[0] + needs > width and at[0] > GAP:
            at = [GAP, at[1] + line]
        places.append((*at, name, colour))
        at[0] += needs
    above = len(titles) * line + GAP * bool(titles)
    below = (at[1] + line + GAP) * bool(legend)
    image = Image.new("RGB", (width, above + rows * step[0] + below), "white")
    draw = ImageDraw.Draw(image)
    for i, text in enumerate(titles):
        draw.text((GAP, GAP + i * line), shortened(text, font, width - 2 * GAP), "black", font)
    for i, cell in enumerate(cells):
        x, y = i % columns * step[1] + GAP, above + i // columns * step[0] + GAP
        image.paste(Image.fromarray(cell.picture), (x, y))
        if cell.frame:
            draw.rectangle([x - 3, y - 3, x + W + 2, y + H + 2], outline=cell.frame, width=3)
        for j, text in enumerate(cell.caption.splitlines()):
            draw.text((x, y + H + 3 + j * line), shortened(text, font, W), "black", font)
    for x, y, name, colour in places:
        y += above + rows * step[0]
        draw.rectangle([x, y + 2, x + TEXT - 2, y + TEXT], fill=tuple(map(int, colour)))
        draw.text((x + TEXT + GAP, y), name, "black", font)
    return np.asarray(image)


def wrapped(text, font, width):
    """The text in lines that fit, broken between words."""
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def shortened(text, font, width):
    """The text, or as much of it as fits, and an ellipsis."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def save(path, picture):
    """Write a .png under a temporary name, then rename: killed at any moment, the old one stays."""
    path, file = Path(path), io.BytesIO()
    Image.fromarray(picture).save(file, "png", optimize=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Path(f"{path}.tmp").write_bytes(file.getvalue())
        os.replace(f"{path}.tmp", path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); give a folder that can "
                         "be") from None
