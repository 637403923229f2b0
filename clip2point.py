"""What both scripts of CLIP2Point need: depth maps, whole CLIPs, test clouds and their accuracy,
the dual-path adapter.

    maps = depth_maps(points (B, N, 3), views (V, 3))   (B, V, 224, 224)
    clip = load_both_towers("openai", seed=0, device="cpu")    both towers, with the patch embedding
    features, = features_of([clip.visual], clip, points, cfg, setup)    (B, V, E)
    scores = cosines(features, text_features(clip, ["chair", "table"]))

Huang et al., "CLIP2Point", ICCV 2023, and its release. train_clip2point.py pre-trains the depth
tower, zero_shot.py names clouds with it. y is up here, as in the release: `y_up` turns clouds whose
z is.
"""
import contextlib
import copy
import difflib
import math
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import record_function
from tqdm import tqdm

import common
import nanoclip
import pretrained
from checkpoint import load_weights
from data import objects
from kernels import splat
from run import InputError, seed_of

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
    x = torch.where(z >= 0, (x + 1) * (size / 2), -2.0 * size)          # else out of the picture
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


def y_up(xyz, up="z"):
    """x, y, z change places in a circle, so that what was up is y and what faced +x faces +z."""
    return xyz[..., [1, 2, 0]] if up == "z" else xyz


def farthest(xyz, points):
    """The farthest points of clouds (S, P, 3), as the release takes them of ScanObjectNN's."""
    return xyz if xyz.shape[1] == points else common.farthest(xyz, points)


# ---- CLIP, whole ---------------------------------------------------------------------------------
PROMPT = "image of a {}"    # release


def radius_of(size):
    """Of a point in a depth map: as released, but at nano's 64 pixels that leaves holes."""
    return 0.02 if size >= 224 else 0.06


class Clip(NamedTuple):
    """CLIP, whole: what --clip names, with its patch embedding."""
    name: str
    model: str                              # its architecture, wherever the file of weights lies
    sha256: str                             # of the image tower
    visual: nn.Module                       # pictures (B, 3, size, size) -> (B, E), frozen
    encode: Callable                        # texts -> (n, E), of length 1
    scale: float                            # of the cosines
    mean: torch.Tensor                      # (3, 1, 1), of a picture in 0 .. 1
    std: torch.Tensor

    @property
    def size(self):
        return self.visual.image_size[0]

    @property
    def radius(self):
        return radius_of(self.size)

    @property
    def is_nano(self):
        return self.model == "nano"

    def prepared(self, pictures):
        """Depth maps (B, size, size) or pictures (B, 3, size, size) in 0 .. 1, for a tower."""
        pictures = pictures if pictures.ndim == 4 else pictures[:, None]
        return (pictures - self.mean) / self.std                        # (B, 3, size, size)


def load_both_towers(name, seed, device):
    base = pretrained.base_of(name)
    if base.startswith("timm:"):
        raise InputError(f"--clip {name}: has no text tower, and CLIP2Point names by prompts")
    used = (*pretrained.OPEN_CLIP_USED, "visual.conv1.")
    model_name, model, tokenize = pretrained.whole_clip(base, seed, used)
    model = model.eval().requires_grad_(False)
    if name != base:
        pretrained.shuffle({"visual": model.visual}, seed)
    sha256 = common.fingerprint((k, w) for k, w in model.visual.state_dict().items())
    model = model.to(device)
    norm = getattr(model.visual, "preprocess_cfg", {"mean": [0.5] * 3, "std": [0.5] * 3})
    mean, std = (torch.tensor(norm[key], device=device)[:, None, None] for key in ("mean", "std"))

    @torch.no_grad()
    def encode(texts):
        return model.encode_text(tokenize(texts).to(device), normalize=True).float()

    return Clip(name, model_name, sha256, model.visual, encode, model.logit_scale.exp().item(),
                mean, std)


def untrained(clip, seed):
    """An image tower of the same sizes, with random weights."""
    if not clip.is_nano:
        return pretrained.open_clip_model(clip.model, seed=seed)[0].visual
    name = pretrained.base_of(clip.name).removesuffix("=random")
    return pretrained.nano(f"{name}=random", seed)[1].visual


def tower_of(clip, saved, official):
    """The depth tower: of a run, of the authors' release, of this repository for --clip nano; else
    the image tower as it is, the baseline."""
    tower = copy.deepcopy(clip.visual)
    if saved:
        load_weights(tower, below("towers.depth.", saved["model"]))
    elif official:                          # OpenAI's names, as open_clip's
        state, _ = pretrained.read_weights(official, "--init-official")
        load_weights(tower, below("point_model.", state),
                     where=f"--init-official {official}: its weights point_model.*",
                     what=f"the image tower of {clip.model}")
    elif clip.name == "nano":
        nanoclip.load_depth(tower, clip.sha256)
    else:
        return clip.visual
    return tower


def below(prefix, weights):
    return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}


def text_features(clip, names):
    """CLIP's features of the prompts of class names (C, E), of length 1."""
    try:
        return clip.encode([PROMPT.format(name) for name in names])
    except nanoclip.UnknownWords:
        unknown = [name for name in names if not knows(clip, name)]
        said = list(map(repr, unknown))
        with contextlib.suppress(ModuleNotFoundError):      # a fork need not have them
            from data.synthetic_objects import ALL_CLASSES
            forty = [name.replace("_", " ") for name in ALL_CLASSES]
            said = [f"{name!r} (near it: {', '.join(difflib.get_close_matches(name, forty, 3, 0))})"
                    for name in unknown]
        raise InputError("--classes: nano-CLIP knows its forty classes, not "
                         f"{', '.join(said[:3])}; --clip openai knows all words") from None


def knows(clip, name):
    try:
        return clip.encode([PROMPT.format(name)]) is not None
    except nanoclip.UnknownWords:
        return False


# ---- Features and names --------------------------------------------------------------------------
def views_for(clip, cfg, few=False):
    """--views, or those of the release: ten with examples, six without; for nano-CLIP, which never
    saw an object from above or below, six from all around."""
    return cfg["views"] or ("oblique6" if clip.is_nano else "axis10" if few else "axis6")


def sides(clip, cfg, few=False, device=None):
    """The same, as `depth_maps` takes them: (V, 3), distance 1."""
    views = torch.tensor(VIEWS[views_for(clip, cfg, few)], device=device)
    return F.pad(views.float(), (1, 0), value=1)


@torch.no_grad()
def features_of(towers, clip, xyz, cfg, setup, few=False, most=256):
    """Depth maps of clouds (S, N, 3) through each of the towers -> features (S, V, E) of each."""
    views = sides(clip, cfg, few, setup.device)
    parts = [[] for _ in towers]
    for points in xyz.split(max(1, most // len(views))):
        maps = depth_maps(points.to(setup.device), views, clip.size, clip.radius, cfg["average"])
        x = clip.prepared(maps.flatten(0, 1))                           # (b V, 3, size, size)
        for part, tower in zip(parts, towers):
            with setup.autocast():
                part.append(tower.eval()(x).float().view(len(points), len(views), -1))
    return [torch.cat(part) for part in parts]


def pictures_of(clip, xyz, cfg):
    """What a tower looks at, for a sheet: clouds (S, N, 3) -> (S, V, H, W, 3) uint8."""
    maps = depth_maps(xyz, sides(clip, cfg), clip.size, clip.radius, cfg["average"])
    times = max(1, 128 // clip.size)
    maps = (255 * maps).byte().repeat_interleave(times, 2).repeat_interleave(times, 3)
    return maps[..., None].expand(*maps.shape, 3).numpy()


def cosines(features, text):
    """Cosines summed over the views: (S, V, E), (C, E) -> (S, C)."""
    return (F.normalize(features, dim=2) @ text.T).sum(1)


# ---- Test clouds and their accuracy --------------------------------------------------------------
# titles of the rows of a table
BEFORE, AFTER, SHOTS = "CLIP's image tower", "depth tower", "with {} shots, dual-path adapter"


class Test(NamedTuple):
    name: str
    xyz: torch.Tensor                       # (S, N, 3) in the unit sphere, y up
    label: torch.Tensor                     # (S,)


def load_test(name, cfg, points):
    """-> the Test of a data set, (xyz, label) of its training clouds, classes, what was read, the
    axis that was up in it."""
    path = objects.prepare(name, cfg["root"], 2 * points, cfg["workers"])
    *parts, classes, form = objects.load(path, points, 0.2, flag=False)
    up = cfg["up"] or objects.up_of(form)
    train, test = ((y_up(farthest(objects.unit_sphere(torch.from_numpy(xyz)), points), up),
                    torch.from_numpy(label)) for xyz, label in parts)
    return Test(f"{name}'s test clouds", *test), train, classes, form, up


def evaluate(tower, tests, clip, text, cfg, setup):
    """Cosines with the classes, summed over the views: (S, C) of each test."""
    found = (features_of([tower], clip, test.xyz, cfg, setup)[0] for test in tests)
    return [cosines(features, text).cpu() for features in found]


def accuracy(scores, label, among=None):
    """Share of clouds whose best class is right; among: of these classes alone."""
    among = torch.as_tensor(range(scores.shape[1]) if among is None else among)
    kept = torch.isin(label, among)
    named = among[scores[kept][:, among].argmax(1)]
    return (named == label[kept]).float().mean().item()


def table(classes, tests, found):
    """Lines of a table. found: {title: scores of each test}. Where the classes are nano's forty,
    the twenty of the built-in classification stand beside them: their clouds, named among them."""
    among = []
    with contextlib.suppress(ModuleNotFoundError):      # a fork for its own data has none
        from data.synthetic_objects import ALL_CLASSES, OBJECT_CLASSES
        if set(classes) == set(ALL_CLASSES):
            among = [[classes.index(name) for name in OBJECT_CLASSES]]
    among.append(range(len(classes)))
    columns = [(i, some) for i in range(len(tests)) for some in among]
    yield f"{'accuracy in %':37}" + "".join(f"{tests[i].name:>26}" for i, _ in columns)
    yield f"{'':37}" + "".join(f"{f'{len(some)} classes':>26}" for _, some in columns)
    yield f"{'chance':37}" + "".join(f"{100 / len(some):26.2f}" for _, some in columns)
    for title, scores in found.items():
        shares = [accuracy(scores[i], tests[i].label, some) for i, some in columns]
        yield f"{title:37}" + "".join(f"{100 * share:26.2f}" for share in shares)


def percent(share):
    return f"{100 * share:.2f} %"


# ---- Few-shot ------------------------------------------------------------------------------------
class Adapter(nn.Module):
    """Features of V views (B, V, E) -> one (B, E). Release, models/adapter.py.

    The paper's gate is the ratio of each view. No residual connection leads around it.
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

    def __init__(self, views, width):
        super().__init__()
        self.depth, self.image = Adapter(views, width), Adapter(views, width)

    def forward(self, depth, image):
        return F.normalize((self.depth(depth) + self.image(image)) / 2, dim=1)


ADAPTER = {"batch": 32, "lr": 1e-3, "weight_decay": 1e-4}      # release, fewshot.py


def adapt(tower, shots, tests, clip, text, cfg, setup):
    """Train the dual-path adapter on clouds with labels, both towers frozen. Release, fewshot.py.

    shots: (xyz, label). -> scores (S, C) of each test in the last epoch; the best accuracy on the
    last test, its epoch. Towers and clouds stay as they are, so features are computed once.
    """
    towers, device = (tower, clip.visual), setup.device
    pair = features_of(towers, clip, shots[0], cfg, setup, few=True)    # (S, V, E) of both
    to_test = [features_of(towers, clip, test.xyz, cfg, setup, few=True) for test in tests]
    label = shots[1].to(device)
    draw = torch.Generator().manual_seed(seed_of(cfg["seed"], 1))
    torch.manual_seed(seed_of(cfg["seed"]))
    model = DualPathAdapter(*pair[0].shape[1:]).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=ADAPTER["lr"],
                                  weight_decay=ADAPTER["weight_decay"])
    best, epochs = (-1.0, 0), range(cfg["recipe"]["adapter"])
    for epoch in tqdm(epochs, "adapter", unit="epoch", leave=False, disable=None):
        model.train()
        for rows in torch.randperm(len(label), generator=draw).to(device).split(ADAPTER["batch"]):
            if len(rows) > 1:               # batch norm needs two
                loss = F.cross_entropy(model(*(f[rows] for f in pair)) @ text.T, label[rows])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
        model.eval()
        with torch.no_grad():
            scores = [(model(*features) @ text.T).cpu() for features in to_test]
        best = max(best, (accuracy(scores[-1], tests[-1].label), epoch + 1))
    return scores, best
