"""CLIP2Point: teach a copy of CLIP's image tower to read depth maps (Huang et al., ICCV 2023).

    python train_clip2point.py                                built in: pre-train, then the table
    python train_clip2point.py --predict chair.obj --classes "chair, table, lamp"
    python train_clip2point.py --zero-shot modelnet40 --root DIR --shots 16
    python train_clip2point.py --data shapenet --root DIR     the paper's pre-training
    python train_clip2point.py --data folder --root DIR       on your meshes

A cloud is drawn as depth maps from several sides. Pre-training takes no label: the depth tower, a
copy of CLIP's image tower, learns to give a depth map the feature that the frozen image tower gives
a picture of the same side. Then a prompt names a cloud, without examples or with a few of them.

To change the data, edit `load_pairs` and RECIPES; the head, `DualPathAdapter`; the backbone, pass
another --clip.
"""
import copy
import difflib
import hashlib
import json
import math
from argparse import Namespace
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.profiler import record_function
from tqdm import tqdm

import common
import nanoclip
import render
from data import objects
from data.meshes import sample_surface
from data.prepared import in_parallel, is_fresh, prepared_folder, save_npz, sources_of
from kernels import farthest_point_sample, splat
from run import (InputError, Run, Setup, check_frozen, load_weights, main_guard, parameter_groups,
                 recipe_parser, saved_settings, seed_of, shared_flags, shared_settings, whole,
                 with_flags, world_size)

# ---- Recipe --------------------------------------------------------------------------------------
class Recipe(NamedTuple):
    points: int             # of a cloud
    objects: int            # of each class to pre-train on; 0: all there are
    pictures: int           # of an object
    scanned: float          # share of a step's clouds that are partial scans
    epochs: int
    warmup: float           # epochs
    batch_size: int         # objects
    lr: float               # highest
    restart: int            # epochs of a cosine, after which the rate is at its top again; 0: never
    optimizer: str
    decay: float            # weight decay
    temperature: float      # of the contrast


SHAPENET = Recipe(
    points=1024, objects=0, pictures=10, scanned=0.0,               # release, datasets/shapenet.py
    epochs=100, warmup=0, batch_size=256, lr=6e-3, restart=2,       # release, pretraining.py
    optimizer="lamb", decay=1e-4,                                   # the same
    temperature=0.07)       # release; the paper's supplement says 0.7: --temperature 0.7
RECIPES = {
    "shapenet": SHAPENET,
    "folder": SHAPENET,
    # ours, sized for two CPU cores and nano-CLIP
    "synthetic": SHAPENET._replace(objects=40, pictures=4, scanned=0.5, epochs=12, warmup=0.5,
                                   batch_size=64, lr=1e-3, restart=0, optimizer="adamw",
                                   decay=1e-2),
}
LOWEST = 1e-5               # learning rate at the end of a cosine
PROMPT = "image of a {}"    # release
HELD_OUT = (10, 303)        # built-in objects of a class to test on, complete; their seed
SCANS = (16, 1), (10, 2)    # scanned ones: shots, to test on; the seeds of train_cls.py
LEFT_OUT = "chair", "monitor", "table", "vase"          # of the control that never saw their depth
ADAPTER = dict(epochs=100, batch=32, lr=1e-3, decay=1e-4)       # release, fewshot.py

#     elevation, azimuth in degrees: the release's views
AXIS10 = [(0, 0), (90, 0), (180, 0), (270, 0), (225, -45), (225, 45), (315, -45), (315, 45),
          (0, -90), (0, 90)]
AXIS6 = [(0, 0), (0, 90), (0, 180), (0, 270), (90, 0), (-90, 180)]
VIEWS = {"axis10": AXIS10, "axis6": AXIS6, "axis3": [AXIS6[i] for i in (0, 1, 4)],
         "axis1": AXIS6[:1],
         **{f"oblique{n}": [(25, 360 * k / n) for k in range(n)] for n in (10, 6, 3, 1)}}


# ---- Depth maps ----------------------------------------------------------------------------------
def cameras(views):
    """The axes (..., 3, 3), right, up and away, of cameras that look at the origin.

    views (..., 3): distance, elevation and azimuth in degrees. y is up; at azimuth 0 the camera
    stands on the +z axis, at 90 on +x. As in PyTorch3D's look_at_view_transform, y is up in the
    picture beyond elevation 90, too. At +-90 exactly that leaves the picture's turn open, and the
    rounding of 90 degrees to fp32 decides it, as there: the angle is a bit beyond 90.
    """
    e, a = torch.deg2rad(views[..., 1:].float()).double().unbind(-1)
    upright = torch.where(e.cos() < 0, -1.0, 1.0)
    zero = torch.zeros_like(e)
    right = torch.stack([upright * a.cos(), zero, -upright * a.sin()], -1)
    away = -torch.stack([e.cos() * a.sin(), e.sin(), e.cos() * a.cos()], -1)
    return torch.stack([right, torch.linalg.cross(right, away), away], -2).float()


@record_function("depth maps")
@torch.no_grad()
def depth_maps(points, views, size=224, radius=0.02, average=False):
    """Depth maps of clouds from several sides: (B, V, size, size) float32 in 0 .. 1, 1 where empty.

    points  (B, N, 3) in the unit sphere, y up; a cloud whose z is up: points[..., [1, 2, 0]], and
            what faced +x is seen from the front in view (1, 0, 0)
    views   (V, 3) or (B, V, 3): distance, elevation and azimuth in degrees; see `cameras`
    radius  of a point; the picture reaches from -1 to 1
    average: PointCLIP's mean of the points that cover a pixel, a control, for the nearest of them

    Orthographic. The cloud is divided by the distance, at which the camera stands: a pixel's z is
    the depth of the nearest point that covers its centre, of those not behind the camera. A pixel
    becomes (z - min(z, 1)) / max(z) * 200 / 255: divided by the maximum and not by the span, as
    released (render/render.py).
    """
    axes = cameras(views)[..., None, :, :]                              # (V, 1, 3, 3)
    axes = axes.expand(len(points), *axes.shape[-4:])                   # (B, V, 1, 3, 3)
    distance = views[..., 0].expand(axes.shape[:2]).float()[..., None]  # (B, V, 1)
    x, y, z = (points.float()[:, None] / distance[..., None]).unbind(-1)        # (B, V, N)
    x, y, z = (axes[..., i, 0] * x + axes[..., i, 1] * y + axes[..., i, 2] * z for i in range(3))
    z = z + distance
    x = torch.where(z >= 0, (x + 1) * (size / 2), -2.0 * size)          # -2 size: out of the picture
    place = torch.stack([x, (1 - y) * (size / 2), z], -1).flatten(0, 1)         # (B V, N, 3)
    if average:
        depth = mean_depth(place, size, radius * size / 2)
    else:
        _, depth = splat(place, size, size, radius * size / 2)          # (B V, size, size)
    seen = (depth > 0) & (depth < math.inf)
    low = depth.where(seen, 1).amin((1, 2), keepdim=True)
    high = depth.where(seen, 0).amax((1, 2), keepdim=True)
    image = ((depth - low) / high * (200 / 255)).where(seen, 1)
    return image.view(*axes.shape[:2], size, size)


def mean_depth(place, size, radius):
    """`splat`'s depth as the mean of all points that cover a pixel. place (B, N, 3) in pixels."""
    x, y, z = place.unbind(-1)
    side = int(2 * radius + 0.5) + 2
    left, top = ((p - radius - 0.5).floor() for p in (x, y))
    total = place.new_zeros(2, len(place), size * size)                 # depths, points
    for k in range(side * side):
        i, j = left + k % side, top + k // side
        covers = (i + 0.5 - x).square() + (j + 0.5 - y).square() <= radius ** 2
        covers &= (i >= 0) & (i < size) & (j >= 0) & (j < size)
        pixel = (j * size + i).where(covers, 0).long()
        total[0].scatter_add_(1, pixel, z * covers)
        total[1].scatter_add_(1, pixel, covers.float())
    depth = torch.where(total[1] > 0, total[0] / total[1], math.inf)
    return depth.view(-1, size, size)


# ---- CLIP: two towers ----------------------------------------------------------------------------
class Clip(NamedTuple):
    """CLIP, whole: what --clip names, with its patch embedding."""
    name: str
    model: str                              # what is computed, wherever the weights are
    sha256: str                             # of the image tower
    visual: nn.Module                       # pictures (B, 3, size, size) -> (B, E), frozen
    encode: Callable                        # texts -> (n, E)
    scale: float                            # of the cosines
    mean: torch.Tensor                      # (3, 1, 1), of a picture in 0 .. 1
    std: torch.Tensor

    @property
    def size(self):
        return self.visual.image_size[0]

    @property
    def radius(self):
        """Of a point in a depth map: as released, but at nano's 64 pixels that leaves holes."""
        return 0.02 if self.size >= 224 else 0.06

    @property
    def is_nano(self):
        return self.model == "nano"

    def prepared(self, pictures):
        """Depth maps (B, size, size) or pictures (B, 3, size, size) in 0 .. 1, for a tower."""
        pictures = pictures if pictures.ndim == 4 else pictures[:, None]
        return (pictures - self.mean) / self.std                        # (B, 3, size, size)


def load_clip(name, seed, device):
    base = name.removesuffix("=shuffled")
    if base.startswith("timm:"):
        raise InputError(f"--clip {name}: has no text tower, and CLIP2Point names by prompts")
    if base == "nano" or base.startswith("nano="):
        model_name, model, tokenize = common.nano(base, seed)
    else:
        used = (*common.OPEN_CLIP_USED, "visual.conv1.")
        model_name, model, tokenize = common.from_open_clip(base, seed, used)
    model = model.eval().requires_grad_(False)
    if name != base:
        common.shuffle({"visual": model.visual}, seed)
    sha256 = common.fingerprint((k, w) for k, w in model.visual.state_dict().items())
    model = model.to(device)
    norm = getattr(model.visual, "preprocess_cfg", {"mean": [0.5] * 3, "std": [0.5] * 3})
    mean, std = (torch.tensor(norm[key], device=device)[:, None, None] for key in ("mean", "std"))

    @torch.no_grad()
    def encode(texts):
        return model.encode_text(tokenize(texts).to(device), normalize=True).float()

    return Clip(name, model_name, sha256, model.visual, encode, model.logit_scale.exp().item(),
                mean, std)


def text_features(clip, names, flag="--classes"):
    """CLIP's features of the prompts of class names (C, E), of length 1."""
    unknown = [name for name in names if not knows(clip, name)]
    if unknown:
        from data.synthetic_objects import ALL_CLASSES
        known = [name.replace("_", " ") for name in ALL_CLASSES]
        near = [f"{name!r} (near it: {', '.join(difflib.get_close_matches(name, known, 3, 0))})"
                for name in unknown[:3]]
        raise InputError(f"{flag}: nano-CLIP does not know {', '.join(near)}; it knows its forty "
                         "classes; --clip openai knows all words")
    return clip.encode([PROMPT.format(name) for name in names])


def knows(clip, name):
    try:
        clip.encode([PROMPT.format(name)])
        return True
    except nanoclip.UnknownWords:
        return False


DEPTH = Path(__file__).parent / "data" / "nanodepth.safetensors"        # what this script made
DEPTH_SHA256 = ""                           # of that file


def save_depth(path, tower, clip):
    """The depth tower in fp16, and the hash of the image tower that it was taught by."""
    from safetensors.torch import save_file
    state = {name: w.detach().cpu().half() if w.is_floating_point() else w.detach().cpu()
             for name, w in tower.state_dict().items()}
    save_file({name: w.contiguous() for name, w in state.items()}, path, {"clip": clip.sha256})


def load_depth(clip, path=DEPTH):
    """The depth tower that lies beside nano-CLIP in this repository."""
    from safetensors import safe_open
    if not path.is_file():
        raise InputError(f"{path} is missing, this version does not have it yet; make one with "
                         "python train_clip2point.py, then pass --eval RUN")
    if hashlib.sha256(path.read_bytes()).hexdigest() != DEPTH_SHA256:
        raise InputError(f"{path}: is not the file of this repository; restore it, or pass --eval "
                         "RUN if you trained it")
    with safe_open(path, "pt") as file:
        if file.metadata()["clip"] != clip.sha256:
            raise InputError(f"{path}: was taught by another nano-CLIP than --clip {clip.name}; "
                             "pass --clip nano, or --eval RUN")
        state = {name: file.get_tensor(name) for name in file.keys()}
    tower = copy.deepcopy(clip.visual)
    load_weights(tower, state, where=path, what="nano-CLIP's image tower")
    return tower.eval()


def load_official(clip, path):
    """The authors' released depth tower: `point_model.*` of their checkpoint, OpenAI's names."""
    state, _ = common.read_weights(path, "--init-official")
    state = {name.removeprefix("point_model."): w for name, w in state.items()
             if name.startswith("point_model.")}
    tower = copy.deepcopy(clip.visual)
    load_weights(tower, state, where=f"--init-official {path}: its weights point_model.*",
                 what=f"the image tower of {clip.model}")
    return tower.eval()


# ---- Data: objects -> clouds, views and the features of their pictures, in memory ----------------
class Pairs(NamedTuple):
    """What a step draws from. y is up."""
    xyz: torch.Tensor                       # (S, P, 3) float32
    scan: torch.Tensor                      # (S, P, 3) partial scans of them, or (0,)
    views: torch.Tensor                     # (S, V, 2) elevation, azimuth of the pictures
    image: torch.Tensor                     # (S, V, E) the frozen tower's features of the pictures
    label: torch.Tensor                     # (S,); the controls alone read it


class Test(NamedTuple):
    name: str
    xyz: torch.Tensor                       # (S, N, 3) in the unit sphere, y up
    label: torch.Tensor                     # (S,)


def y_up(xyz, up="z"):
    """x, y, z change places in a circle, so that what was up is y and what faced +x faces +z."""
    return xyz[..., [1, 2, 0]] if up == "z" else xyz


def draw_object(vertices, faces, views, size, rng):
    """Pictures (V, size, size, 3) uint8 of a mesh, y up, from `views` (V, 2): what nano-CLIP saw,
    any colour, white or grey behind it, the light from anywhere."""
    low, high = vertices.min(0), vertices.max(0)
    radius = np.linalg.norm(vertices - (low + high) / 2, axis=1).max()
    colour, pictures = rng.uniform(40, 230, 3), []
    for axes in cameras(torch.tensor(np.insert(views, 0, 1, 1))).double().numpy():
        fill, near = rng.uniform((.75, .05), (1.05, .35))
        camera = render.Camera(axes, (low + high) / 2, radius / fill, radius / near)
        behind = np.full(3, 255 if rng.random() < .3 else rng.uniform(90, 255))
        pictures.append(render.draw_mesh(vertices, faces, camera, size, size, colour,
                                         rng.normal(size=3), behind * rng.uniform(.9, 1, 3)))
    return np.stack(pictures)


def views_of_pictures(count, rng):
    """Where pictures that are drawn here are taken from (count, 2): half of them anywhere that
    nano-CLIP was, half from the release's ten views."""
    low, high = (-10, 0), (60, 360)
    released = np.array(AXIS10)[rng.permutation(10)[:count // 2]]
    return np.concatenate([rng.uniform(low, high, (count - len(released), 2)), released])


def built_in_object(seed, k, i, pictures, points, size):
    """-> cloud and partial scan of it (P, 3), views (V, 2), pictures; y up."""
    from data.synthetic_objects import ALL_CLASSES, STRETCH, make_object, scan_as_it_stands
    rng = np.random.default_rng([seed, k, i])
    vertices, faces = make_object(ALL_CLASSES[k], rng)
    vertices = (vertices * rng.uniform(1 - STRETCH, 1 + STRETCH, 3)).astype(np.float32)
    xyz = sample_surface(vertices, faces, points, rng)
    scan = scan_as_it_stands(vertices, faces, points, rng) if pictures else xyz[:0]
    views = views_of_pictures(pictures, rng)
    vertices = y_up(vertices)
    drawn = draw_object(vertices, faces, views, size, rng) if pictures else None
    return y_up(xyz), y_up(scan), views, drawn


def own_object(source, up, pictures, points, size):
    """As `built_in_object`, of a mesh of --data folder; no scan."""
    vertices, faces = source.read()
    if faces is None:
        raise InputError(f"{source.where()}: is a cloud, and pictures are drawn of meshes; give "
                         "meshes to pre-train on")
    rng = np.random.default_rng(seed_of(*source.name.encode()))
    try:
        xyz = sample_surface(vertices, faces, points, rng)
    except ValueError as error:
        raise InputError(f"{source.where()}: {error}; repair the file or move it out of the "
                         "data") from None
    views = views_of_pictures(pictures, rng)
    drawn = draw_object(y_up(vertices, up), faces, views, size, rng)
    return y_up(xyz, up), xyz[:0], views, drawn


def load_pairs(cfg, clip, setup):
    """-> Pairs, [Test], names of the classes, what was read. Kept, with the pictures' features."""
    recipe, name, here = Recipe(**cfg["recipe"]), cfg["data"], Path(__file__).parent
    if name == "synthetic":
        from data.synthetic_objects import ALL_CLASSES as classes
        code = [here / "train_clip2point.py", here / "render.py", here / "data/synthetic_objects.py"]
        sources = sources_of(code, cfg["seed"], recipe.objects, recipe.pictures, clip.size)
        work, place = built_in_object, here / "data"
        label = np.arange(len(classes)).repeat(recipe.objects)
        jobs = [(seed_of(cfg["seed"], 101), k, i, recipe.pictures, 2 * recipe.points, clip.size)
                for k in range(len(classes)) for i in range(recipe.objects)]
        tests, form = built_in_tests(recipe, classes), "procedural objects, a seed for each"
    elif name == "shapenet":
        from data import shapenet
        work = shapenet.read_object
        place, jobs, label, test, classes, form = shapenet.find(cfg["root"])
        sources = sources_of([job[0] for job in jobs], [len(job[1]) for job in jobs])
        rows = [shapenet.read_cloud(path) for path, _ in test]
        xyz = objects.unit_sphere(torch.from_numpy(np.stack(rows)))
        tests = [Test("ShapeNet55's test clouds", xyz[:, :recipe.points],
                      torch.tensor([k for _, k in test]))]
    else:
        found = objects.find_folder(Path(cfg["root"] or "data/folder"), 2 * recipe.points)
        place, classes, form = found.place, found.classes, found.form
        kept = [source for source in found.objects if source.part != 1]
        label, up = np.array([source.label for source in kept]), cfg["up"]
        sources = sources_of([s.path for s in kept], up, recipe.pictures, clip.size)
        work = own_object
        jobs = [(s, up, recipe.pictures, 2 * recipe.points, clip.size) for s in kept]
        tests = []
        if len(kept) < len(found.objects):
            tests = [load_test("folder", cfg, recipe.points)[0]]
    path = prepared_folder(place, "pairs") / f"{name}-{clip.sha256[:12]}.npz"
    if not is_fresh(path, sources):
        made = in_parallel(work, jobs, cfg["workers"], "object", least=100, chunk=8)
        save_npz(path, sources, **prepare_pairs(made, clip, setup))
    with np.load(path, allow_pickle=False) as kept:
        arrays = [torch.from_numpy(kept[key]) for key in Pairs._fields[:-1]]
    return Pairs(*arrays, torch.from_numpy(label)), tests, classes, form


@torch.no_grad()
def prepare_pairs(made, clip, setup):
    """The objects one by one -> arrays of Pairs. A picture passes the frozen tower once, here: it
    does not change, so the release's pass in every step finds the same."""
    parts = {key: [] for key in Pairs._fields[:-1]}
    for xyz, scan, views, pictures in made:
        x = torch.from_numpy(pictures).to(setup.device).permute(0, 3, 1, 2).float() / 255
        with setup.autocast():
            image = clip.visual(clip.prepared(x)).float().cpu().numpy()
        for key, value in zip(parts, (xyz, scan, views.astype(np.float32), image)):
            parts[key].append(value)
    return {key: np.stack(values) for key, values in parts.items()}


def built_in_tests(recipe, classes):
    """Complete objects that no step saw, and scanned ones as in train_cls.py."""
    from data.synthetic_objects import object_clouds
    whole = [built_in_object(HELD_OUT[1], k, i, 0, recipe.points, 0)[0]
             for k in range(len(classes)) for i in range(HELD_OUT[0])]
    scans, label = object_clouds(SCANS[1][0], recipe.points, SCANS[1][1], classes)
    parts = [("held-out objects", np.stack(whole), np.arange(len(classes)).repeat(HELD_OUT[0])),
             ("scanned clouds", y_up(scans), label)]
    return [Test(name, objects.unit_sphere(torch.from_numpy(np.ascontiguousarray(xyz))),
                 torch.from_numpy(label)) for name, xyz, label in parts]


def load_test(name, cfg, points):
    """--zero-shot -> its Test, (xyz, label) of its training clouds, classes, what was read."""
    stored = max(points, 2048)
    path = objects.prepare(name, cfg["root"], stored, cfg["workers"])
    *parts, classes, form = objects.load(path, points, 0.2)
    up, clouds = cfg["up"] or objects.up_of(form), []
    for xyz, label in parts:
        xyz = objects.unit_sphere(torch.from_numpy(xyz))        # over all points, as released
        if xyz.shape[1] > points:
            xyz = torch.cat([common.gather(x, farthest_point_sample(x, points))
                             for x in xyz.split(64)])
        clouds.append((y_up(xyz, up), torch.from_numpy(label)))
    return Test(name, *clouds[1]), clouds[0], classes, f"{up} up; {form}"


# ---- Loss ----------------------------------------------------------------------------------------
def nt_xent(a, b, temperature):
    """SimCLR's loss of pairs: a, b (B, E) -> the mean over all 2 B of them.

    Row i of a and of b belong together; the others of both are the negatives, those of the own
    modality, too. Cosines are divided by the temperature.
    """
    both = F.normalize(torch.cat([a, b]), dim=1)                        # (2 B, E)
    logits = both @ both.T / temperature
    logits = logits.masked_fill(torch.eye(len(both), dtype=torch.bool, device=a.device), -math.inf)
    return F.cross_entropy(logits, torch.arange(len(both), device=a.device).roll(len(a)))


def pair_loss(depth, image, balance, recipe, kind):
    """depth (B, 2, E) of two distances, image (B, E) -> what is minimised, cross, intra.

    Cross + intra / w^2 + log(w + 1), w = `balance` is learned. kind: both, or cross or intra alone.
    """
    cross = nt_xent(depth.mean(1), image, recipe.temperature)
    intra = nt_xent(depth[:, 0], depth[:, 1], recipe.temperature)
    loss = cross + intra / balance ** 2 + torch.log(balance + 1)
    return {"both": loss, "cross": cross, "intra": intra}[kind], cross, intra


# ---- Model ---------------------------------------------------------------------------------------
class DepthTowers(nn.Module):
    """The depth tower, and beside it those of the controls, which learn from the same maps."""

    def __init__(self, visual, names):
        super().__init__()
        self.towers = nn.ModuleDict({name: copy.deepcopy(visual) for name in names})
        self.balance = nn.ParameterDict({name: torch.ones(()) for name in names})
        self.requires_grad_(True)

    def forward(self, name, x):
        return self.towers[name](x)


class Adapter(nn.Module):
    """Features of V views (B, V, E) -> one (B, E). Release, models/adapter.py.

    The paper's gate is the ratio of each view. There is no path around it to the features.
    """

    def __init__(self, views, width):
        super().__init__()
        self.ratio = nn.Parameter(torch.full((views, 1), 0.5))
        self.norm = nn.BatchNorm1d(width)
        self.joint = nn.Sequential(
            nn.Dropout(0.075), nn.Flatten(), nn.Linear(views * width, width), nn.BatchNorm1d(width),
            nn.ReLU(), nn.Dropout(0.075), nn.Linear(width, width))

    def forward(self, features):
        x = self.norm((features * self.ratio).flatten(0, 1))            # (B V, E)
        return self.joint(x.view(features.shape))


class DualPathAdapter(nn.Module):
    """The features of both frozen towers -> one of length 1, to be compared with texts.

    depth, image (B, V, E) -> (B, E). 5.77 million weights for ten views of 512 numbers.
    """

    def __init__(self, views=10, width=512):
        super().__init__()
        self.depth, self.image = Adapter(views, width), Adapter(views, width)

    def forward(self, depth, image):
        return F.normalize((self.depth(depth) + self.image(image)) / 2, dim=1)


# ---- Metric --------------------------------------------------------------------------------------
def views_for(clip, cfg, few=False):
    """--views, or those of the release: ten with examples, six without; for nano-CLIP, which never
    saw an object from above or below, six from all around."""
    return cfg["views"] or ("oblique6" if clip.is_nano else "axis10" if few else "axis6")


@torch.no_grad()
def features_of(towers, clip, xyz, cfg, setup, few=False, most=256):
    """Depth maps of clouds (S, N, 3) through each of the towers -> features (S, V, E) of each."""
    views = torch.tensor(VIEWS[views_for(clip, cfg, few)], device=setup.device)
    views = F.pad(views.float(), (1, 0), value=1)                       # (V, 3), distance 1
    parts = [[] for _ in towers]
    for points in xyz.split(max(1, most // len(views))):
        maps = depth_maps(points.to(setup.device), views, clip.size, clip.radius, cfg["average"])
        x = clip.prepared(maps.flatten(0, 1))                           # (b V, 3, size, size)
        for part, tower in zip(parts, towers):
            with setup.autocast():
                part.append(tower.eval()(x).float().view(len(points), len(views), -1))
    return [torch.cat(part) for part in parts]


def zero_shot(features, text):
    """Cosines summed over the views: (S, V, E), (C, E) -> (S, C)."""
    return (F.normalize(features, dim=2) @ text.T).sum(1)


def accuracy(scores, label, among=None):
    """Share of clouds whose best class is right; among: of these classes (n,) alone."""
    label = label.to(scores.device)
    if among is not None:
        among = torch.tensor(among, device=scores.device)
        scores = scores.masked_fill(~torch.isin(torch.arange(scores.shape[1],
                                                device=scores.device), among), -math.inf)
        kept = torch.isin(label, among)
        scores, label = scores[kept], label[kept]
    return (scores.argmax(1) == label).float().mean().item()


@torch.no_grad()
def evaluate(towers, tests, clip, text, cfg, setup):
    """-> {(test, tower): scores (S, C)}. towers: {name: module}."""
    found = {}
    for test in tests:
        for name, f in zip(towers, features_of(towers.values(), clip, test.xyz, cfg, setup)):
            found[test.name, name] = zero_shot(f, text)
    return found


# ---- Train ---------------------------------------------------------------------------------------
def train(model, data, tests, clip, text, run):
    cfg, setup = run.cfg, run.setup
    recipe = Recipe(**cfg["recipe"])
    optimizer = optimizer_of(model, recipe)
    data = Pairs(*(x.to(setup.device) if setup.fits(x.nbytes) else x for x in data))
    order_of_others = torch.arange(len(data.label)).roll(len(data.label) // 2)
    steps = len(data.label) // recipe.batch_size        # the last, partial batch is dropped
    if not steps:
        raise InputError(f"--batch-size {recipe.batch_size}: there are {len(data.label)} objects")
    head = "epoch    cross   intra       w" + "".join(f"  {test.name} %" for test in tests)

    for epoch in run.epochs(model, optimizer, head):
        order = torch.randperm(len(data.label), generator=run.draw, device=setup.device).cpu()
        for step in run.steps(steps, LOWEST):
            if recipe.restart:
                set_rate(optimizer, recipe, epoch + step / steps)
            rows = order[step * recipe.batch_size:][:recipe.batch_size]
            run.sums += train_step(model, optimizer, data, rows, clip, run, order_of_others)
        cross, intra, n = run.totals("cross", "intra")
        found = evaluate({"depth": model.towers["depth"]}, tests, clip, text, cfg, setup)
        shares = [accuracy(found[test.name, "depth"], test.label) for test in tests]
        run.row(shares[-1] if tests else None,
                f"{cross / n:8.4f} {intra / n:7.4f} {model.balance['depth'].item():7.4f}" + "".join(
                    f"{100 * share:{len(test.name) + 4}.2f}" for share, test in zip(shares, tests)),
                loss_cross=cross / n, loss_intra=intra / n,
                **{f"accuracy, {test.name}": share for share, test in zip(shares, tests)})


def optimizer_of(model, recipe):
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(parameter_groups(model, recipe.decay), recipe.lr, (0.9, 0.98))
    from timm.optim import Lamb             # as torch_optimizer's, which the release takes
    return Lamb(model.parameters(), recipe.lr, weight_decay=recipe.decay, bias_correction=False,
                max_grad_norm=None)


def set_rate(optimizer, recipe, epoch):
    """Cosines of `restart` epochs, one after another, set in every step: the release's schedule."""
    share = epoch % recipe.restart / recipe.restart
    for group in optimizer.param_groups:
        group["lr"] = LOWEST + (recipe.lr - LOWEST) * (1 + math.cos(math.pi * share)) / 2


@record_function("data")
def sample_clouds(data, rows, recipe, draw):
    """Clouds of objects `rows` (B,), some of them scanned, random points of each: (B, points, 3)."""
    device = draw.device
    xyz = data.xyz[rows.to(data.xyz.device)].to(device)                 # (B, P, 3)
    if recipe.scanned and data.scan.numel():
        scanned = torch.rand(len(rows), 1, 1, device=device, generator=draw) < recipe.scanned
        xyz = torch.where(scanned, data.scan[rows.to(data.scan.device)].to(device), xyz)
    order = torch.rand(xyz.shape[:2], device=device, generator=draw).argsort(1)
    return objects.unit_sphere(common.gather(xyz, order[:, :recipe.points]))


def train_step(model, optimizer, data, rows, clip, run, others):
    """One step on the objects `rows` (B,) -> sums (3,): cross, intra, objects.

    One picture of each, and two depth maps from its side, at two distances in 0.9 .. 1.1.
    """
    cfg, setup, draw = run.cfg, run.setup, run.draw
    recipe = Recipe(**cfg["recipe"])
    B, device = len(rows), setup.device
    points = sample_clouds(data, rows, recipe, draw)                    # (B, N, 3)
    side = torch.randint(data.views.shape[1], (B,), device=device, generator=draw)
    distance = 0.9 + 0.2 * torch.rand(B, 2, 1, device=device, generator=draw)
    views = data.views[rows.to(data.views.device), side.to(data.views.device)].to(device)
    views = torch.cat([distance, views[:, None].expand(-1, 2, -1)], 2)  # (B, 2, 3)
    maps = depth_maps(points, views, clip.size, clip.radius, cfg["average"])
    x = clip.prepared(maps.flatten(0, 1))                               # (2 B, 3, size, size)
    images = data.image.to(device) if data.image.device == device else data.image
    image, other = (images[i.to(images.device), side.to(images.device)].to(device)
                    for i in (rows, others[rows]))                      # (B, E)
    optimizer.zero_grad(set_to_none=True)
    for name in model.towers:
        kept = slice(None)
        if name == "left out":              # never sees a depth map of these classes
            unseen = torch.tensor([cfg["classes"].index(k) for k in LEFT_OUT])
            kept = ~torch.isin(data.label[rows.to(data.label.device)].cpu(), unseen).to(device)
        with setup.autocast():
            depth = model(name, x.view(B, 2, *x.shape[1:])[kept].flatten(0, 1))
        depth = depth.float().view(-1, 2, depth.shape[1])               # (B, 2, E)
        target = (other if name == "mispaired" else image)[kept]
        loss, cross, intra = pair_loss(depth, target, model.balance[name], recipe, cfg["loss"])
        loss.backward()
        if name == "depth":
            sums = torch.stack([cross * B, intra * B, torch.full_like(cross, B)]).detach().double()
    optimizer.step()
    return sums


def adapt(clip, tower, shots, tests, text, cfg, setup):
    """Train the dual-path adapter on clouds with labels, both towers frozen.

    shots: (xyz, label). -> {test: scores (S, C)} of the last epoch, best accuracy on the last test
    and its epoch. Features are computed once: towers are frozen and clouds stay as they are.
    """
    xyz, label = shots
    towers = tower, clip.visual
    depth, image = features_of(towers, clip, xyz, cfg, setup, few=True)
    pairs = {test.name: features_of(towers, clip, test.xyz, cfg, setup, few=True) for test in tests}
    label = label.to(setup.device)
    torch.manual_seed(seed_of(cfg["seed"]))
    model = DualPathAdapter(*depth.shape[1:]).to(setup.device)
    order = torch.Generator().manual_seed(seed_of(cfg["seed"], 1))
    optimizer = torch.optim.AdamW(model.parameters(), ADAPTER["lr"], weight_decay=ADAPTER["decay"])
    best, scores = (-1.0, 0), {}
    for epoch in tqdm(range(ADAPTER["epochs"]), "adapter", unit="epoch", leave=False, disable=None):
        model.train()
        for rows in torch.randperm(len(label), generator=order).to(setup.device).split(ADAPTER["batch"]):
            if len(rows) > 1:               # batch norm needs two
                loss = F.cross_entropy(model(depth[rows], image[rows]) @ text.T, label[rows])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
        model.eval()
        with torch.no_grad():
            scores = {name: torch.cat([model(*part) @ text.T for part in zip(
                *(f.split(256) for f in pair))]) for name, pair in pairs.items()}
        share = accuracy(scores[tests[-1].name], tests[-1].label)
        best = max(best, (share, epoch + 1))
    return scores, best


def draw_shots(xyz, label, shots, seed):
    """`shots` random clouds of each class; 0: all."""
    if not shots:
        return xyz, label
    rng, rows = np.random.default_rng(seed), []
    for k in label.unique().tolist():
        mine = np.flatnonzero(label.numpy() == k)
        rows.append(np.sort(rng.permutation(mine)[:shots]))
    rows = torch.from_numpy(np.concatenate(rows))
    return xyz[rows], label[rows]


# ---- Main ----------------------------------------------------------------------------------------
def main(argv=None):
    args = flags(argv)
    ask, cfg, saved, folder = settings(args)
    setup = Setup(args.device, cfg["precision"])
    if world_size() > 1:
        raise InputError("train_clip2point.py: a batch is contrasted as a whole; run it without "
                         "torchrun")
    clip = load_clip(cfg["clip"], cfg["seed"], setup.device)
    check_frozen(cfg, saved, clip)
    run = Run("clip2point", cfg, setup, saved)
    if ask.predict:
        return predict(ask, clip, tower_of(clip, cfg, saved, ask), cfg, setup)
    if not args.eval and not ask.zero_shot:
        run.open(__file__, folder or args.out)
    run.print(f"device   {setup.describe}; torch {torch.__version__}; seed {cfg['seed']}")
    if ask.zero_shot:
        return name_test(ask, clip, tower_of(clip, cfg, saved, ask), run)

    recipe = Recipe(**cfg["recipe"])
    data, tests, classes, form = load_pairs(cfg, clip, setup)
    cfg["classes"] = list(classes)
    run.print(f"data     {len(data.label):,} objects, {data.image.shape[1]} pictures each; to test "
              + (", ".join(f"{len(test.label):,} {test.name}" for test in tests) or "none")
              + f"; {len(classes)} classes, {recipe.points} points; {form}")
    names = [name.replace("_", " ") for name in classes]
    unknown = [name for name in names if not knows(clip, name)]
    if unknown:
        tests = []
        run.print(f"text     no test by name: {clip.name} does not know {', '.join(unknown[:5])}")
    text = text_features(clip, names) if tests else None
    controls = ["mispaired", "left out"] if cfg["data"] == "synthetic" else []
    visual = clip.visual if cfg["from_scratch"] is None else load_clip(
        f"{'nano' if clip.is_nano else clip.model}=random", cfg["seed"], setup.device).visual
    model = DepthTowers(visual, ["depth", *controls]).to(setup.device)
    if saved:
        load_weights(model, saved["model"])
    sizes = [sum(p.numel() for p in part.parameters()) for part in (visual, clip.visual)]
    run.print(f"model    {sizes[0]:,} weights of the depth tower trained"
              + f", and of {len(controls)} controls as many each" * bool(controls)
              + f"; {clip.name}; maps of {clip.size} x {clip.size}, radius {clip.radius}, "
              f"{views_for(clip, cfg)}")
    common.print_warning(run, clip.name)
    if not args.eval:
        with run.stopper:
            train(model, data, tests, clip, text, run)
        if clip.is_nano:
            save_depth(run.folder / "nanodepth.safetensors", model.towers["depth"], clip)
    metrics = report(model, tests, clip, text, ask, run) if tests else {}
    at = run.at
    if tests:
        run.print(f"result   zero-shot, {tests[-1].name}: {100 * metrics['accuracy']:.2f} % of "
                  f"{len(classes)} classes, before {100 * metrics['before']:.2f} %; epoch "
                  f"{at['epoch']} (best on test: {100 * at['best']:.2f} % in epoch "
                  f"{at['best_epoch']}); {cfg['data']}, {clip.name}, {at['seconds']:.0f} s")
    if not args.eval:
        run.results(metrics, "accuracy", sizes, form)
        maps_picture(run.folder / "look.png", model.towers["depth"], tests, clip, text, cfg, setup)
        run.print(f"look     {run.folder}/look.png")


def report(model, tests, clip, text, ask, run):
    """Print the table -> metrics."""
    cfg, setup = run.cfg, run.setup
    towers = {"before": clip.visual, **model.towers}
    found = evaluate(towers, tests, clip, text, cfg, setup)
    rows = {f"{clip.name} as it is": "before", "after pre-training": "depth",
            "control: pictures of other objects": "mispaired"}
    rows = {title: name for title, name in rows.items() if name in towers}
    shots = 16 if ask.shots is None else ask.shots
    best = None
    if cfg["data"] == "synthetic":
        from data.synthetic_objects import object_clouds
        xyz, label = object_clouds(SCANS[0][0], Recipe(**cfg["recipe"]).points, SCANS[0][1],
                                   cfg["classes"])
        xyz = objects.unit_sphere(torch.from_numpy(np.ascontiguousarray(y_up(xyz))))
        some = draw_shots(xyz, torch.from_numpy(label), min(shots, SCANS[0][0]), cfg["seed"])
        scores, best = adapt(clip, model.towers["depth"], some, tests, text, cfg, setup)
        found.update({(name, "adapter"): s for name, s in scores.items()})
        rows["16 shots, dual-path adapter"] = "adapter"
    print_table(run, tests, found, rows)
    metrics = {"accuracy": accuracy(found[tests[-1].name, "depth"], tests[-1].label),
               "before": accuracy(found[tests[-1].name, "before"], tests[-1].label)}
    for test in tests:
        for title, name in rows.items():
            metrics[f"{name}, {test.name}"] = accuracy(found[test.name, name], test.label)
    if best:
        run.print(f"adapter  last epoch; best on the {tests[-1].name}: {100 * best[0]:.2f} % in "
                  f"epoch {best[1]}")
    if "left out" in towers:
        unseen = [cfg["classes"].index(name) for name in LEFT_OUT]
        for test in tests:
            kept = torch.isin(test.label, torch.tensor(unseen))
            shares = [accuracy(found[test.name, name][kept], test.label[kept])
                      for name in ("before", "left out", "depth")]
            among = [accuracy(found[test.name, name], test.label, unseen)
                     for name in ("before", "left out", "depth")]
            run.print(f"left out {', '.join(LEFT_OUT)}: of the {test.name} {percent(shares[0])} "
                      f"before, {percent(shares[1])} after, {percent(shares[2])} had they been "
                      f"there; among the four {', '.join(map(percent, among))}")
            metrics.update({f"left out, {when}, {test.name}": share
                            for when, share in zip(("before", "after", "there"), shares)})
    return metrics


def percent(share):
    return f"{100 * share:.1f} %"


def print_table(run, tests, found, rows):
    """rows: {title: name of scores in `found`}. Where the classes are nano's forty, the twenty of
    the built-in classification stand beside them: their clouds, named among them."""
    from data.synthetic_objects import ALL_CLASSES, OBJECT_CLASSES
    classes, sets = run.cfg["classes"], {}
    if len(classes) == len(ALL_CLASSES) and set(classes) == set(ALL_CLASSES):
        sets[20] = [classes.index(name) for name in OBJECT_CLASSES]
    sets[len(classes)] = list(range(len(classes)))
    columns = [(test, n) for test in tests for n in sets]
    run.print("accuracy in %" + " " * 24 + "".join(f"{f'{t.name}, {n}':>24}" for t, n in columns))
    run.print(f"{'chance':37}" + "".join(f"{100 / n:24.2f}" for _, n in columns))
    for title, name in rows.items():
        shares = [accuracy(found[test.name, name], test.label, sets[n]) for test, n in columns]
        run.print(f"{title:37}" + "".join(f"{100 * share:24.2f}" for share in shares))


def tower_of(clip, cfg, saved, ask):
    """The depth tower: of a run, of the authors, of this repository; else the image tower as it is,
    the baseline."""
    if saved:
        model = DepthTowers(clip.visual, [name.split(".")[1] for name in saved["model"]
                                          if name.startswith("balance.")])
        load_weights(model, saved["model"])
        return model.towers["depth"].eval()
    if ask.official:
        return load_official(clip, ask.official)
    return load_depth(clip) if cfg["clip"] == "nano" else clip.visual


def name_test(ask, clip, tower, run):
    """--zero-shot and --shots: name the test clouds of a data set."""
    cfg, setup = {**run.cfg, "root": ask.root, "up": ask.up}, run.setup
    recipe = Recipe(**cfg["recipe"])
    test, shots, classes, form = load_test(ask.zero_shot, cfg, recipe.points)
    names = [name if ask.zero_shot == "modelnet10" else name.replace("_", " ") for name in classes]
    known = [i for i, name in enumerate(names) if knows(clip, name)]
    if not known:
        raise InputError(f"{form}: {clip.name} knows none of its classes, {', '.join(names)[:200]}; "
                         "--clip openai knows all words")
    kept, kept_shots = (torch.isin(x, torch.tensor(known)) for x in (test.label, shots[1]))
    number = torch.full((len(names),), -1)
    number[known] = torch.arange(len(known))
    test = Test(test.name, test.xyz[kept], number[test.label[kept]])
    shots = shots[0][kept_shots], number[shots[1][kept_shots]]
    run.cfg["classes"] = [classes[i] for i in known]
    text = text_features(clip, [names[i] for i in known])
    run.print(f"data     {len(test.label):,} test clouds of {len(known)} classes, {recipe.points} "
              f"points; {form}")
    if len(known) < len(names):
        unknown = [name for i, name in enumerate(names) if i not in known]
        run.print(f"left out {clip.name} does not know {', '.join(unknown)}")
    if ask.zero_shot.startswith("modelnet"):
        run.print("note     published zero-shot numbers are of the manually aligned ModelNet40; "
                  "where objects lie or turn otherwise, names suffer")
    common.print_warning(run, clip.name)
    towers = {"before": clip.visual, "depth": tower}
    rows = {f"{clip.name} as it is": "before", "depth tower": "depth"}
    if tower is clip.visual:
        del towers["depth"], rows["depth tower"]
    found = evaluate(towers, [test], clip, text, cfg, setup)
    last = list(rows.values())[-1]
    if ask.shots is not None:
        some = draw_shots(*shots, ask.shots, cfg["seed"])
        scores, best = adapt(clip, tower, some, [test], text, cfg, setup)
        found[test.name, "adapter"] = scores[test.name]
        rows[f"{ask.shots or 'all'} shots, dual-path adapter"] = "adapter"
    run.print(f"views    {views_for(clip, cfg)}" + (
        f", with examples {views_for(clip, cfg, few=True)}" if ask.shots is not None else ""))
    print_table(run, [test], found, rows)
    if ask.shots is not None:
        run.print(f"adapter  last epoch; best on test: {percent(best[0])} in epoch {best[1]}")
    worst(run, found[test.name, last], test.label)


def worst(run, scores, label, most=8):
    """The classes that are named worst, and what their clouds are taken for."""
    label, named = label.to(scores.device), scores.argmax(1)
    lines = []
    for k in label.unique().tolist():
        mine = named[label == k]
        wrong = mine[mine != k]
        share = 1 - len(wrong) / len(mine)
        taken = f" ({run.cfg['classes'][wrong.mode().values]})" if len(wrong) else ""
        lines.append((share, f"{run.cfg['classes'][k]} {100 * share:.0f} %{taken}"))
    run.print("by class " + ", ".join(line for _, line in sorted(lines)[:most]))


def map_cells(maps, clip, times=None):
    """Depth maps (V, size, size) -> pictures (V, H, W, 3) uint8, small ones twice as large."""
    times = times or max(1, 128 // clip.size)
    x = (maps.cpu() * 255).byte().repeat_interleave(times, 1).repeat_interleave(times, 2)
    return x[..., None].expand(-1, -1, -1, 3).numpy()


def maps_picture(path, tower, tests, clip, text, cfg, setup, most=12):
    """look.png: clouds of the last test set, three depth maps of each, and their names."""
    if not tests:
        return
    test = tests[-1]
    rows = torch.linspace(0, len(test.label) - 1, most).round().long()
    name = views_for(clip, cfg)
    features, = features_of([tower], clip, test.xyz[rows], cfg, setup)
    scores = zero_shot(features, text)
    views = F.pad(torch.tensor(VIEWS[name]).float(), (1, 0), value=1)[:3]
    maps, cells = depth_maps(test.xyz[rows], views, clip.size, clip.radius, cfg["average"]), []
    for part, k, named in zip(maps, test.label[rows].tolist(), scores.argmax(1).tolist()):
        for i, picture in enumerate(map_cells(part, clip)):
            caption = (cfg["classes"][k], f"named {cfg['classes'][named]}", "")[i]
            cells.append(render.Cell(picture, caption, None if k == named else render.RED))
    render.save(path, render.sheet(cells, 9, f"depth maps of {test.name}, views {name}; wrongly "
                                   "named ones in red"))


@torch.no_grad()
def predict(ask, clip, tower, cfg, setup):
    """Name anybody's meshes or clouds among anybody's words, without training."""
    names = [name.strip() for name in ask.classes.split(",")]
    if "" in names:
        raise InputError(f"--classes {ask.classes!r}: has an empty word; write \"chair, table\"")
    text = text_features(clip, names)
    recipe, up, cells = Recipe(**cfg["recipe"]), ask.up or "z", []
    for file in ask.predict:
        xyz = torch.from_numpy(objects.read_one(file, 2 * recipe.points, 1))[None]
        points = common.gather(xyz, farthest_point_sample(xyz, recipe.points))
        points = objects.unit_sphere(points)                            # (1, N, 3)
        means = {}
        for axis in "zy":
            f, = features_of([tower], clip, y_up(points, axis), cfg, setup)
            means[axis] = zero_shot(f, text)[0] / f.shape[1]            # mean cosines (C,)
        best, order = means[up].topk(min(5, len(names)))
        share = (clip.scale * means[up]).softmax(0)[order]
        words = [f"{names[i]} {100 * p:.0f} % ({c:.2f})" for i, p, c in zip(
            order.tolist(), share.tolist(), best.tolist())]
        print(f"{file}:", *(f"  {word}" for word in words))
        other = "y" if up == "z" else "z"
        if means[other].max() > best[0] + CLEARLY:
            print(f"{file}: with --up {other} the best is {names[means[other].argmax()]} at "
                  f"{means[other].max():.2f}: is {other} up in it?")
        if len(cells) < 40 * 6:
            name = views_for(clip, cfg)
            views = F.pad(torch.tensor(VIEWS[name]).float(), (1, 0), value=1)
            maps = depth_maps(y_up(points, up), views, clip.size, clip.radius, cfg["average"])[0]
            captions = [Path(file).name, *words]
            for i, picture in enumerate(map_cells(maps, clip)):
                cells.append(render.Cell(picture, captions[i] if i < len(captions) else ""))
    look = Path(ask.out or "predicted") / "look.png"
    render.save(look, render.sheet(cells, len(views), f"depth maps that {clip.name}'s depth tower "
                                   f"looked at, {up} up, and its names: share, cosine"))
    print(f"look: {look}")


def flags(argv):
    parser = recipe_parser(__doc__, RECIPES)
    shared_flags(parser)
    flag = parser.add_argument
    flag("--clip", metavar="NAME", help=f"{common.CLIP_NAMES} (default: openai; for built-in data, "
                                        "--zero-shot and --predict: nano)")
    flag("--temperature", type=float, metavar="T", help="of the contrast: 0.07 as released, 0.7 as "
                                                        "the paper's supplement prints")
    flag("--loss", choices=["both", "cross", "intra"], help="control: one of the two alone")
    flag("--from-scratch", action="store_const", const=True, help="control: a depth tower that is "
         "no copy of the image tower")
    flag("--average", action="store_const", const=True,
         help="control: PointCLIP's mean of a pixel's points instead of the nearest")
    flag("--views", choices=VIEWS, help="sides that a cloud is looked at from (default: axis6, "
                                        "with examples axis10; nano: oblique6)")
    flag("--up", choices=["z", "y"], help="the axis that points up in your data (default z)")
    flag("--zero-shot", choices=["modelnet40", "modelnet10", "scanobjectnn", "folder"],
         help="name the test clouds of --root, with --eval RUN's tower or the one that is here")
    flag("--shots", type=whole(0), metavar="K", help="with --zero-shot: train the dual-path "
         "adapter on K clouds of each class; 0: all")
    flag("--predict", nargs="+", metavar="FILE", help="name meshes or clouds")
    flag("--classes", metavar="WORDS", help='with --predict: "chair, table, lamp"')
    flag("--init-official", metavar="FILE", dest="official",
         help="the authors' released depth tower, with --clip openai")
    return parser.parse_args(argv)


CLEARLY = 0.05              # a mean cosine so much higher is clearly higher
ASKED = "zero_shot", "shots", "predict", "classes", "up", "official", "views", "average", "root"


def settings(args):
    """-> what is asked of a tower, config, checkpoint or None, run folder or None."""
    ask = Namespace(**{name: getattr(args, name) for name in ASKED}, out=args.out)
    if ask.predict and not ask.classes:
        raise InputError('--predict needs words to choose from: add --classes "chair, table"')
    if ask.zero_shot and ask.predict:
        raise InputError("--zero-shot names a data set, --predict files; give one of them")
    looks = bool(ask.zero_shot or ask.predict)
    if looks and args.resume or looks and args.data:
        raise InputError("--zero-shot and --predict train no tower; leave --data and --resume out")
    if ask.shots is not None and not ask.zero_shot:
        raise InputError("--shots takes clouds with labels: add --zero-shot modelnet40")
    own = {"views": args.views, "average": args.average}
    if args.resume or args.eval:
        if looks or args.eval:              # these do not change what was trained
            for name in ("views", "average", "up", *(["root"] if looks else [])):
                setattr(args, name, None)
        cfg, saved, folder = saved_settings(args, "clip2point")
        if args.eval:
            cfg.update({name: x for name, x in own.items() if x})
        return ask, cfg, saved, folder
    if looks:
        args.root = args.out = None
    recipe = with_flags(RECIPES[args.data or "synthetic"], args)
    if not 0 < recipe.temperature < math.inf:
        raise InputError(f"--temperature {recipe.temperature} must be above 0")
    cfg = shared_settings(args, recipe, synthetic_clip="nano")
    return ask, {**cfg, **own, "loss": args.loss or "both", "from_scratch": args.from_scratch,
                 "up": args.up or "z", "official": args.official}, None, None


if __name__ == "__main__":
    main_guard(main)
