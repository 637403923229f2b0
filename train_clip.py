"""Train nano-CLIP: pictures of procedural objects and captions (CLIP: Radford et al. 2021).

    python train_clip.py                                 RUN/nanoclip.safetensors, and its accuracy
    python train_clip.py --eval RUN                      evaluate it again
    python train_clip.py --eval RUN --real modelnet40 --root DIR    name real objects
    python train_cls.py --clip nano=RUN/nanoclip.safetensors        EPCL with it, frozen

What comes out is a small CLIP that was really pretrained, for whoever runs, tests or learns the
method without a download. It knows forty classes and a few words beside them, from pictures that a
z-buffer drew. Its accuracy is that of naming held-out renders by a prompt. That is not zero-shot:
captions name the same classes. The first command wrote data/nanoclip.safetensors, which --clip nano
takes.
"""
import os
from pathlib import Path
from typing import NamedTuple

import run                                  # before torch: Ctrl-C during the imports
import numpy as np
import torch
import torch.nn.functional as F
from torch.profiler import record_function
from tqdm import tqdm

import nanoclip
import render
from checkpoint import checkpoint_form, load_weights, misfit, saved_settings
from data import objects
from data.prepared import (in_parallel, is_fresh, load_prepared, prepared_folder, save_npz,
                           sources_of)
from data.synthetic_objects import ALL_CLASSES, STRETCH, make_object
from kernels import splat
from run import (InputError, Run, Setup, main_guard, recipe_parser, seed_of, shared_flags,
                 shared_settings, with_flags)

# ---- Recipe --------------------------------------------------------------------------------------
class Recipe(NamedTuple):
    objects: int            # of each class, to train
    views: int              # pictures of an object
    size: int               # pixels of a picture's side
    patch: int              # pixels of a patch's side
    width: int              # of the image transformer
    layers: int
    embed: int              # width of the space that pictures and texts share, E
    text_width: int
    text_layers: int
    stem: int               # channels of the first convolution
    patch_dropout: float    # share of a picture's patches that a step leaves out
    layer_scale: float      # what blocks add starts multiplied by this; 0: is not scaled
    epochs: int
    warmup: float           # epochs
    batch_size: int         # pictures
    lr: float               # highest; AdamW
    muon: float             # times lr: for the matrices of the blocks
    decay: float            # weight decay of all matrices


RECIPES = {
    "synthetic": Recipe(
        objects=500, views=4, size=64, patch=16, width=128, layers=6, embed=512, text_width=64,
        text_layers=2, stem=24, patch_dropout=0.0, layer_scale=0.0, epochs=12, warmup=0.5,
        batch_size=128, lr=2e-3, muon=3.0, decay=0.1),
}
TEST = (25, 4)              # held-out objects of a class, and pictures of each
SEEDS = (101, 202)          # of the objects: others than those that train_cls.py tests on
CONTEXT = 16                # tokens of a caption

# what a caption may say besides the class
COLOURS = {"red": (200, 50, 45), "green": (60, 150, 70), "blue": (55, 85, 185),
           "yellow": (225, 200, 60), "brown": (135, 90, 55), "grey": (140, 140, 145),
           "black": (45, 45, 48), "white": (225, 225, 222), "orange": (230, 130, 40),
           "purple": (130, 65, 150)}
SHAPES = "tall", "flat", "compact"
VIEWS = "seen from the front", "seen from the side", "seen from behind", "seen from above"
SAID = (1.0, .4, .2, .25)   # how often: class, colour, shape, view
TEMPLATES = ("a photo of a", "a picture of a", "an image of a", "a render of a", "a", "this is a",
             "point cloud of a big", "depth map of a")
PROMPT = "a photo of a {}"
NAMES = [name.replace("_", " ") for name in ALL_CLASSES]
WORDS = sorted(set(" ".join([*NAMES, *COLOURS, *SHAPES, *VIEWS, *TEMPLATES]).split()))
FULL = 240                  # brightness of a white face that the light meets head on


# ---- Data: seeds -> pictures in memory -> the pictures and captions of a step --------------------
class Pictures(NamedTuple):
    """Of each picture how bright every pixel is, which part of it is background, and what is true
    of it. Colours are given to both in every step anew."""
    light: torch.Tensor                     # (P, 2, size, size) uint8
    about: torch.Tensor                     # (P, 3) int64: class, shape, view


def draw_object(seed, k, i, views, size):
    """Object i of class k from `views` sides -> light (V, 2, size, size) uint8, about (V, 3)."""
    rng = np.random.default_rng([seed, k, i])
    vertices, faces = make_object(ALL_CLASSES[k], rng)
    vertices = vertices * rng.uniform(1 - STRETCH, 1 + STRETCH, 3)
    low, high = vertices.min(0), vertices.max(0)
    radius = np.linalg.norm(vertices - (low + high) / 2, axis=1).max()
    flat, tall = max(high[:2] - low[:2]), high[2] - low[2]
    shape = int(np.argmax([tall / flat, flat / tall / 2, .9]))      # into SHAPES
    light, about = [], []
    for _ in range(views):
        azimuth, elevation, fill, near = rng.uniform((0, -10, .75, .05), (360, 60, 1.05, .35))
        camera = render.Camera(render.look(elevation, azimuth), (low + high) / 2, radius / fill,
                               radius / near)
        white = render.draw_mesh(vertices, faces, camera, size, size, (FULL, FULL, 0),
                                 rng.normal(size=3), (0, 0, 255))
        light.append(white[..., [0, 2]].transpose(2, 0, 1))
        view = 3 if elevation > 40 else (0, 1, 2, 1)[int((azimuth + 45) // 90) % 4]
        about.append((k, shape, view))
    return np.stack(light), np.array(about)


def load_data(cfg):
    """-> training and test Pictures, what was drawn. They are drawn once and kept."""
    recipe = Recipe(**cfg["recipe"])
    here = Path(__file__).parent
    code = [here / "train_clip.py", here / "render.py", here / "data/synthetic_objects.py"]
    folder, parts = prepared_folder(here / "data", "pictures"), []
    for seed, (n, views) in zip(SEEDS, ((recipe.objects, recipe.views), TEST)):
        path = folder / f"{seed}-{n}-{views}-{recipe.size}.npz"
        sources = sources_of(code, seed, n, views, recipe.size)
        if not is_fresh(path, sources):
            jobs = [(seed, k, i, views, recipe.size) for k in range(len(NAMES)) for i in range(n)]
            drawn = in_parallel(draw_object, jobs, cfg["workers"], "object", least=500, chunk=16)
            light, about = map(np.concatenate, zip(*drawn))
            save_npz(path, sources, light=light, about=about)
        kept = load_prepared(path)
        parts.append(Pictures(*(torch.from_numpy(kept[name]) for name in Pictures._fields)))
    return *parts, (f"renders of the procedural objects of data/synthetic_objects.py, {len(NAMES)} "
                    "classes")


@record_function("data")
def paint(light, colour, draw):
    """Brightness and background (B, 2, H, W) uint8, colour (B,) into COLOURS -> (B, 3, H, W) in -1
    .. 1. Shade of the colour and grey of the background are random, half of them are mirrored."""
    B = len(light)
    jitter, ground, tint = torch.rand(3, B, 3, device=light.device, generator=draw)
    rgb = torch.tensor(list(COLOURS.values()), device=light.device)[colour]
    rgb = rgb * (.85 + .3 * jitter)                                     # (B, 3)
    grey = torch.where(ground[:, :1] < .3, 255, 90 + 165 * ground[:, 1:2])
    behind = grey * (.9 + .1 * tint)                                    # (B, 3)
    light = torch.where((ground[:, 2] < .5)[:, None, None, None], light.flip(3), light).float()
    x = light[:, :1] / FULL * rgb[..., None, None] + light[:, 1:] / 255 * behind[..., None, None]
    return x.clamp(max=255) / 127.5 - 1


def captions(about, rng):
    """What is true of pictures, (B, 4) int: class, colour, shape, view -> a text for each of them;
    which of the four it says (B, 4) bool."""
    says = rng.random(about.shape) < SAID
    colours, texts = list(COLOURS), []
    for (k, c, s, v), (_, colour, shape, view) in zip(about.tolist(), says.tolist()):
        words = [TEMPLATES[rng.integers(len(TEMPLATES))], SHAPES[s] * shape, colours[c] * colour,
                 NAMES[k], VIEWS[v] * view]
        texts.append(" ".join(filter(None, words)))
    return texts, says


# ---- Model and its optimiser ---------------------------------------------------------------------
def config_of(recipe):
    """The recipe as open_clip writes it; see `nanoclip.build`."""
    vision = {"layers": recipe.layers, "width": recipe.width, "head_width": 32,
              "patch_size": recipe.patch, "image_size": recipe.size,
              "patch_dropout": recipe.patch_dropout, "ls_init_value": recipe.layer_scale or None}
    text = {"context_length": CONTEXT, "width": recipe.text_width,
            "heads": recipe.text_width // 32, "layers": recipe.text_layers}
    return {"embed_dim": recipe.embed, "vision_cfg": vision, "text_cfg": text, "stem": recipe.stem}


class Muon(torch.optim.AdamW):
    """AdamW, except that groups with `muon` follow the orthogonalised momentum (Jordan 2024).

    All singular values of a step become about 1: directions that gradients seldom show are learned
    as fast as the others. Rates are as AdamW's, after "Muon is scalable for LLM training", 2025.
    """
    momentum = 0.95

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            if not group["muon"]:
                continue
            params = group["params"]                    # matrices of one shape
            grads = [p.grad for p in params]
            for p in params:
                if not self.state[p]:                   # AdamW expects a step when it is loaded
                    self.state[p].update(step=torch.zeros(()), momentum=torch.zeros_like(p))
            means = [self.state[p]["momentum"] for p in params]
            torch._foreach_lerp_(means, grads, 1 - self.momentum)
            ahead = torch.stack(torch._foreach_lerp(grads, means, self.momentum))   # Nesterov's
            rate = group["lr"] * group["muon"]
            size = 0.2 * max(ahead.shape[1:]) ** 0.5    # AdamW's steps are as long
            torch._foreach_mul_(params, 1 - rate * group["weight_decay"])
            torch._foreach_add_(params, list(orthogonal(ahead)), alpha=-rate * size)
            for p in params:
                p.grad = None                           # AdamW passes over it
        super().step()


def orthogonal(x, steps=5):
    """Matrices (M, R, C) -> the same with singular values near 1: Newton-Schulz iterations."""
    wide = x.shape[1] <= x.shape[2]
    x = x.bfloat16() if x.is_cuda else x
    x = x if wide else x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return (x if wide else x.mT).float()


def optimizer_of(model, recipe):
    matrices, rest = {}, {True: [], False: []}
    for name, p in model.named_parameters():
        if p.ndim == 2 and "resblocks" in name and recipe.muon:
            matrices.setdefault(tuple(p.shape), []).append(p)
        else:
            rest[p.ndim > 1].append(p)
    groups = [{"params": same, "muon": recipe.muon} for same in matrices.values()]
    groups += [{"params": rest[True], "muon": 0}, {"params": rest[False], "muon": 0,
                                                   "weight_decay": 0.0}]
    return Muon(groups, recipe.lr, (0.9, 0.98), weight_decay=recipe.decay)


# ---- Loss ----------------------------------------------------------------------------------------
def contrastive(image, text, scale, true):
    """CLIP's loss, for captions that are true of several pictures. image, text (B, E) of length 1;
    true (B, B) float: is caption j true of picture i. -> sums over the pictures: loss, how many
    have their best caption right."""
    logits = scale.clamp(max=100) * image.float() @ text.float().T      # (B, B)
    loss = (F.cross_entropy(logits, true / true.sum(1, keepdim=True), reduction="sum")
            + F.cross_entropy(logits.T, (true / true.sum(0)).T, reduction="sum")) / 2
    right = true.gather(1, logits.argmax(1, keepdim=True)).sum()
    return loss, right


# ---- Metric --------------------------------------------------------------------------------------
@torch.no_grad()
def evaluate(model, tokenize, test, setup, batch=500):
    """Held-out pictures, (objects * views): named by prompt, and found by caption. -> metrics, the
    class that each is named (P,)."""
    model.eval()
    draw = torch.Generator(setup.device).manual_seed(0)
    rng = np.random.default_rng(0)
    colour = rng.integers(len(COLOURS), size=len(test.light))
    parts = []
    for rows in torch.arange(len(test.light)).split(batch):
        x = paint(test.light[rows].to(setup.device), torch.from_numpy(colour[rows]), draw)
        with setup.autocast():
            parts.append(model.encode_image(x, normalize=True).float())
    image = torch.cat(parts)                                            # (P, E)

    def features(texts):
        with setup.autocast():
            return model.encode_text(tokenize(texts).to(setup.device), normalize=True).float()

    label = test.about[:, 0].to(setup.device)
    prompts = features([PROMPT.format(name) for name in NAMES])         # (C, E)
    named = (image @ prompts.T).argmax(1)
    objects = F.normalize(image.view(-1, TEST[1], image.shape[1]).mean(1), dim=1)
    of_object = (objects @ prompts.T).argmax(1)
    # a caption for every fourth picture: is it true of the picture that suits it best
    about = np.insert(test.about.numpy(), 1, colour, 1)                 # (P, 4)
    rows = np.arange(0, len(about), 4)
    texts, says = captions(about[rows], rng)
    best = (features(texts) @ image.T).topk(5).indices.cpu().numpy()    # (P / 4, 5)
    true = ((about[best] == about[rows][:, None]) | ~says[:, None]).all(2)
    by_class = [(named == k)[label == k].float().mean().item() for k in range(len(NAMES))]
    return {"accuracy": (named == label).float().mean().item(),
            "accuracy_4_views": (of_object == label[::TEST[1]]).float().mean().item(),
            "retrieval_1": true[:, 0].mean().item(), "retrieval_5": true.any(1).mean().item(),
            "by_class": by_class}, named.cpu()


def depth_pictures(xyz, size, up, radius=0.09):
    """A cloud (P, 3) from four sides -> (4, 3, size, size), -1 .. 1: the nearer, the darker, white
    where nothing is. radius: of a point, in half pictures; smaller ones leave holes."""
    pictures = []
    for azimuth in (30, 120, 210, 300):
        camera = render.fit(xyz, render.look(25, azimuth, up))
        place = render.project(xyz, camera, size, size)
        index, depth = splat(place[None], size, size, radius * size / 2)
        depth, low, high = depth[0], *place[:, 2].aminmax()
        shade = 0.15 + 0.7 * (depth - low) / (high - low).clamp(min=1e-9)
        pictures.append(torch.where(index[0] >= 0, shade, 1) * 2 - 1)
    return torch.stack(pictures)[:, None].expand(-1, 3, -1, -1)


@torch.no_grad()
def name_clouds(model, tokenize, cfg, setup, points=1024):
    """Name the test objects of a data set by prompt, from pictures of depth. -> the line."""
    path = objects.prepare(cfg["real"], cfg["root"], points, cfg["workers"])
    _, (xyz, label), classes, form = objects.load(path, points, fraction=0.2, flag=False)
    number = np.array([ALL_CLASSES.index(name.lower()) if name.lower() in ALL_CLASSES else -1
                       for name in classes])
    rows = np.flatnonzero(number[label] >= 0)
    if not len(rows):
        raise InputError(f"{form}: none of its classes is one of {', '.join(ALL_CLASSES)}")
    up, features = cfg["up"] or objects.up_of(form), []
    for cloud in tqdm(torch.from_numpy(xyz[rows]), unit="object", leave=False, disable=None):
        x = depth_pictures(cloud.to(setup.device), cfg["recipe"]["size"], up)
        with setup.autocast():
            features.append(model.encode_image(x, normalize=True).float())
    features = torch.stack(features)                                    # (S, 4, E)
    tokens = tokenize([PROMPT.format(name) for name in NAMES])
    prompts = model.encode_text(tokens.to(setup.device), normalize=True)
    label = torch.from_numpy(number[label[rows]]).to(setup.device)
    one = (features @ prompts.T).argmax(2) == label[:, None]
    four = (features.mean(1) @ prompts.T).argmax(1) == label
    return (f"real     {len(rows):,} clouds of {len(label.unique())} classes, depth of {points:,} "
            f"points, {up} up, by prompt among {len(NAMES)}: one view "
            f"{100 * one.float().mean():.2f} %, mean of four {100 * four.float().mean():.2f} %; "
            f"{form}")


# ---- Train ---------------------------------------------------------------------------------------
def train(model, tokenize, data, test, run):
    cfg, setup = run.cfg, run.setup
    recipe = Recipe(**cfg["recipe"])
    wrapped = setup.wrap(model, cfg["compile"])
    optimizer = optimizer_of(model, recipe)
    about = data.about.numpy()
    light = data.light.to(setup.device) if setup.fits(data.light.nbytes, share=2) else data.light
    steps = len(about) // recipe.batch_size
    if not steps:
        raise InputError(f"--batch-size {recipe.batch_size}: there are {len(about)} pictures")
    columns = "epoch     loss  train %  held-out %  4 views %"

    for epoch in run.epochs(model, optimizer, columns):
        order = np.random.default_rng([cfg["seed"], epoch]).permutation(len(about))
        for step in run.steps(steps):
            rows = np.sort(order[step * recipe.batch_size:][:recipe.batch_size])
            rng = np.random.default_rng([cfg["seed"], epoch, step])
            run.sums += train_step(wrapped, tokenize, optimizer, light, about, rows, rng, run)
        loss, right, n = run.totals("loss")
        metrics, _ = evaluate(model, tokenize, test, setup)
        run.row(metrics["accuracy"], f"{loss / n:8.4f} {100 * right / n:8.2f} "
                f"{100 * metrics['accuracy']:11.2f} {100 * metrics['accuracy_4_views']:10.2f}",
                loss=loss / n, train_accuracy=right / n, **metrics)


def train_step(model, tokenize, optimizer, light, about, rows, rng, run):
    """One step on the pictures `rows` (B,) -> sums, (3,): loss, right, pictures."""
    colour = rng.integers(len(COLOURS), size=len(rows))
    texts, says = captions(np.insert(about[rows], 1, colour, 1), rng)
    tokens = tokenize(texts)                                            # (B, 16)
    is_, says = (torch.from_numpy(x).to(run.setup.device, non_blocking=True)
                 for x in (np.insert(about[rows], 1, colour, 1), says))
    true = ((is_[:, None] == is_[None]) | ~says[None]).all(2).float()   # (B, B)
    x = light[torch.from_numpy(rows).to(light.device)].to(run.setup.device)
    x = paint(x, is_[:, 1], run.draw)                                   # (B, 3, H, W)
    optimizer.zero_grad(set_to_none=True)
    with run.setup.autocast():
        image, text, scale = model(x, tokens.to(run.setup.device, non_blocking=True))[:3]
    loss, right = contrastive(image, text, scale, true)
    (loss / len(rows)).backward()
    optimizer.step()
    return torch.stack([loss, right, torch.full_like(loss, len(rows))]).detach().double()


# ---- Main ----------------------------------------------------------------------------------------
def main(argv=None):
    args = flags(argv)
    cfg, saved, folder = settings(args)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("train_clip.py: a batch is contrasted as a whole; run it without torchrun")
    setup = Setup(args.device, cfg["precision"])
    recipe = Recipe(**cfg["recipe"])
    run = Run("clip", cfg, setup, saved)
    if not args.eval:
        run.open(__file__, folder or args.out)
    run.print(f"device   {setup.describe}; torch {torch.__version__}; seed {cfg['seed']}")
    data, test, form = load_data(cfg)
    counts = [n * len(NAMES) for n in (recipe.objects, TEST[0])]
    run.print(f"data     {len(data.light):,} pictures of {counts[0]:,} objects to train, "
              f"{len(test.light):,} of {counts[1]:,} others to test, {recipe.size} x "
              f"{recipe.size}; {form}")
    torch.manual_seed(seed_of(cfg["seed"]))
    config = config_of(recipe)
    model, tokenize = nanoclip.build(config, WORDS)
    if saved:
        load_weights(model, saved["model"], where=f"{saved['file']}: its weights")
    model = model.to(setup.device)
    image, whole = (sum(p.numel() for p in part.parameters()) for part in (model.visual, model))
    run.print(f"model    {whole:,} weights, {image:,} of them for pictures, {2e-6 * whole:.2f} MB "
              f"in fp16; {len(WORDS)} words")
    if not args.eval:
        with run.stopper:
            train(model, tokenize, data, test, run)
        mild_texts(model, tokenize, setup)
        nanoclip.save(run.folder / "nanoclip.safetensors", model, config, WORDS)
        model, tokenize = nanoclip.load(run.folder / "nanoclip.safetensors")
        model = model.to(setup.device)

    metrics, named = evaluate(model, tokenize, test, setup)
    by_class, at = metrics.pop("by_class"), run.at
    worst = sorted(zip(by_class, ALL_CLASSES))[:8]
    run.print("worst    " + ", ".join(f"{name} {100 * share:.0f} %" for share, name in worst))
    run.print(f"captions the best picture is right {100 * metrics['retrieval_1']:.1f} %, one of "
              f"the best five {100 * metrics['retrieval_5']:.1f} %")
    run.print(f"result   held-out renders, by prompt: one view {100 * metrics['accuracy']:.2f} %, "
              f"mean of {TEST[1]} {100 * metrics['accuracy_4_views']:.2f} %, epoch {at['epoch']} "
              f"(best: {100 * at['best']:.2f} % in epoch {at['best_epoch']}); "
              f"{at['seconds']:.0f} s")
    if args.real:
        run.print(name_clouds(model, tokenize, {**cfg, "real": args.real, "up": args.up}, setup))
    if not args.eval:
        show(run.folder / "look.png", test, named)
        run.results(metrics, "accuracy", (whole, 0), form,
                    by_class=dict(zip(ALL_CLASSES, by_class)))


@torch.no_grad()
def mild_texts(model, tokenize, setup):
    """Give the texts' features a distance of 4.5 from their mean: the text loss of train_cls.py
    multiplies them as they are, and would drown the head's. CLIP's are about 10 long, at cosines
    near 0.8. Cosines, and so nano-CLIP itself, stay as they were."""
    model.eval()
    text = model.encode_text(tokenize([PROMPT.format(name) for name in NAMES]).to(setup.device))
    model.text_projection *= 4.5 / (text - text.mean(0)).norm(dim=1).mean()


def show(path, test, named, rows=5, columns=8, times=2):
    """A sheet of held-out pictures, the wrongly named ones framed in red."""
    draw = torch.Generator().manual_seed(0)
    chosen = torch.linspace(0, len(named) - 1, rows * columns).long()
    x = paint(test.light[chosen], torch.arange(len(chosen)) % len(COLOURS), draw)
    x = ((x + 1) * 127.5).byte().permute(0, 2, 3, 1).repeat_interleave(times, 1)
    x, cells = x.repeat_interleave(times, 2).numpy(), []
    for picture, k, n in zip(x, test.about[chosen, 0], named[chosen]):
        right = k == n
        caption = NAMES[k] if right else f"{NAMES[k]}: {NAMES[n]}?"
        cells.append(render.Cell(picture, caption, None if right else render.RED))
    render.save(path, render.sheet(cells, columns))


def flags(argv):
    parser = recipe_parser(__doc__, RECIPES)
    shared_flags(parser)
    parser.add_argument("--real", choices=["modelnet40", "folder"],
                        help="with --eval and --root: name real objects, too")
    parser.add_argument("--up", choices=["z", "y"], help="axis that points up in --real's data "
                        "(default: what its form usually has, docs/data.md)")
    return parser.parse_args(argv)


SAVED = {"data": "synthetic", "clip": None}             # forms of what is this script's own
KEPT = {**checkpoint_form(sums=3), "frozen": None}


def check_sizes(folder, r):                 # no flag changes them
    if misfit(config_of(r), nanoclip.ABOUT["config"]) or (
            r.width % 32 or r.text_width % 32 or r.size % r.patch or r.patch & (r.patch - 1)):
        raise InputError(f"{folder}: its recipe has sizes that make no nano-CLIP; train it anew")


def settings(args):
    """Flags over the recipe or a saved run -> config, checkpoint or None, run folder or None."""
    real, up, args.real, args.up = args.real, args.up, None, None   # no settings of the run, nor
    if real and not args.eval:                                      # is its --root
        raise InputError("--real needs a run: add --eval runs/clip-...")
    if up and not real:
        raise InputError("--up belongs to --real; leave it out")
    if args.resume or args.eval:
        root, args.root = args.root, None if real else args.root
        cfg, saved, folder = saved_settings(args, "clip", Recipe, SAVED, KEPT)
        args.real, args.up = real, up
        check_sizes(folder, Recipe(**cfg["recipe"]))
        return {**cfg, "root": root}, saved, folder
    recipe = with_flags(RECIPES[args.data or "synthetic"], args)
    return {**shared_settings(args, recipe), "clip": None, "frozen": None}, None, None


if __name__ == "__main__":
    main_guard(main)
