"""CLIP2Point: teach a copy of CLIP's image tower to read depth maps (Huang et al., ICCV 2023).

    python train_clip2point.py                                built in: pre-train, then the table
    python train_clip2point.py --data shapenet --root DIR     the paper's pre-training
    python train_clip2point.py --data folder --root DIR       on your meshes
    python train_clip2point.py --eval RUN                     the table again

A cloud is drawn as depth maps from several sides. Pre-training takes no label: the depth tower, a
copy of CLIP's image tower, learns to give a depth map the feature that the frozen image tower gives
a picture of the same side. Then a prompt names a cloud, without examples or with a few of them:
zero_shot.py does that with any data.

To change the data, edit `load_pairs` and RECIPES; the head, `DualPathAdapter` in clip2point.py,
where depth maps are drawn and clouds are named, too; the backbone, pass another --clip.
"""
import copy
import inspect
import math
import os
from pathlib import Path
from typing import NamedTuple

import run                                  # before torch: Ctrl-C during the imports
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import record_function

import common
import nanoclip
import pretrained
import render
from checkpoint import (WHOLE, check_frozen, checkpoint_form, config_form, load_weights,
                        saved_settings)
from clip2point import (AFTER, AXIS10, BEFORE, SHOTS, VIEWS, Test, accuracy, adapt, cameras,
                        depth_maps, evaluate, knows, load_both_towers, load_test, percent,
                        pictures_of, table, text_features, untrained, y_up)
from data import objects
from data.files import reading
from data.meshes import sample_surface
from data.prepared import (in_parallel, is_fresh, load_prepared, prepared_folder, save_npz,
                           sources_of)
from run import (InputError, Run, Setup, best_of, main_guard, parameter_groups, recipe_parser,
                 seed_of, shared_flags, shared_settings, whole, with_flags)

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
    adapter: int            # epochs of the dual-path adapter


SHAPENET = Recipe(
    points=1024, objects=0, pictures=10, scanned=0.0,               # release, datasets/shapenet.py
    epochs=100, warmup=0, batch_size=256, lr=6e-3, restart=2,       # release, pretraining.py
    optimizer="lamb", decay=1e-4,                                   # the same
    temperature=0.07,       # release; the paper's supplement says 0.7: --temperature 0.7
    adapter=100)                                                    # release, fewshot.py
RECIPES = {
    "shapenet": SHAPENET,
    "folder": SHAPENET,
    # ours, sized for two CPU cores and nano-CLIP
    "synthetic": SHAPENET._replace(objects=40, pictures=4, scanned=0.5, epochs=8, warmup=0.5,
                                   batch_size=64, lr=1e-3, restart=0, optimizer="adamw",
                                   decay=1e-2, adapter=30),
}
LOWEST = 1e-5               # learning rate at the end of a cosine
HELD_OUT = (10, 303)        # built-in objects of a class to test on, complete; their seed
SCANS = (16, 1), (10, 2)    # scanned ones: shots, to test on; the seeds of train_cls.py
LEFT_OUT = "chair", "monitor", "table", "vase"          # of the control that never saw their depth


# ---- Data: objects -> clouds, views and the features of their pictures, in memory ----------------
class Pairs(NamedTuple):
    """What a step draws from. y is up."""
    xyz: torch.Tensor                       # (S, P, 3) float32, P twice the points of a cloud
    scan: torch.Tensor                      # (S, P, 3) partial scans of them, or (S, 0, 3)
    views: torch.Tensor                     # (S, V, 2) elevation, azimuth of the pictures
    image: torch.Tensor                     # (S, V, E) the frozen tower's features of the pictures
    label: torch.Tensor                     # (S,); the controls alone read it


def draw_views(vertices, faces, views, size, rng):
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
    drawn = draw_views(vertices, faces, views, size, rng) if pictures else None
    return y_up(xyz), y_up(scan), views, drawn


def own_object(source, up, pictures, points, size):
    """As `built_in_object`, of a mesh of --data folder; no scan."""
    vertices, faces = source.read()
    if faces is None:
        raise InputError(f"{source.where()}: is a cloud, and pictures are drawn of meshes; give "
                         "meshes to pre-train on")
    rng = np.random.default_rng(seed_of(*source.name.encode()))
    with reading(source.where(), "repair the file or move it out of the data"):
        xyz = sample_surface(vertices, faces, points, rng)
    views = views_of_pictures(pictures, rng)
    drawn = draw_views(y_up(vertices, up), faces, views, size, rng)
    return y_up(xyz, up), xyz[:0], views, drawn


def published_model(model, points, size):
    """As `built_in_object`, of ShapeNet55; no scan."""
    from data import shapenet
    xyz = shapenet.read_cloud(model.path, points)
    return xyz, xyz[:0], np.array(AXIS10, float), shapenet.read_pictures(model.pictures, size)


def load_pairs(cfg, clip, setup):
    """-> Pairs, [Test], names of the classes, what was read. Kept, with the pictures' features."""
    recipe, name, here = Recipe(**cfg["recipe"]), cfg["data"], Path(__file__).parent
    points, size, seed = recipe.points, clip.size, 0
    if name == "synthetic":
        from data.synthetic_objects import ALL_CLASSES as classes
        files, place = [here / "render.py", here / "data/synthetic_objects.py"], here / "data"
        label = [k for k in range(len(classes)) for _ in range(recipe.objects)]
        seed, work = cfg["seed"], built_in_object
        jobs = [(seed_of(seed, 101), k, i, recipe.pictures, 2 * points, size)
                for k in range(len(classes)) for i in range(recipe.objects)]
        tests = built_in_tests(points, classes)
        form = "procedural objects of data/synthetic_objects.py"
    elif name == "shapenet":
        from data import shapenet
        models, to_test, form = shapenet.find(cfg["root"])
        files = [path for model in models for path in (model.path, *model.pictures)]
        place, classes = Path(cfg["root"] or "data/ShapeNet55"), shapenet.CLASSES
        label, work = [model.label for model in models], published_model
        jobs = [(model, points, size) for model in models]
        xyz = np.stack([shapenet.read_cloud(m.path, points)[:points] for m in to_test])
        tests = [Test("ShapeNet55 test clouds", objects.unit_sphere(torch.from_numpy(xyz)),
                      torch.tensor([model.label for model in to_test]))]
    else:
        found = objects.find_folder(Path(cfg["root"] or "data/folder"), 2 * points)
        place, classes, form = found.place, found.classes, found.form
        sources = [source for source in found.objects if source.part != 1]
        files, work = [source.path for source in sources], own_object
        label = [source.label for source in sources]
        jobs = [(source, cfg["up"], recipe.pictures, 2 * points, size) for source in sources]
        tests = [load_test("folder", cfg, points)[0]] if len(jobs) < len(found.objects) else []
    code = work, draw_views, views_of_pictures, prepare_pairs, cameras, y_up
    # two models may share weights and hash: QuickGELU and GELU
    what = clip.model, "bf16" if setup.bf16 else "fp32"
    stamp = sources_of(files, *map(inspect.getsource, code), AXIS10, points, size, recipe.pictures,
                       len(jobs), cfg["up"], seed, *what)
    path = prepared_folder(place, "pairs") / f"{name}-{len(jobs)}-{seed}-{clip.sha256[:12]}.npz"
    if not is_fresh(path, stamp):
        made = in_parallel(work, jobs, cfg["workers"], "object", least=100, chunk=8)
        save_npz(path, stamp, **prepare_pairs(made, clip, setup))
    arrays = map(torch.from_numpy, load_prepared(path).values())        # in the order of Pairs
    return Pairs(*arrays, torch.tensor(label)), tests, classes, form


@torch.no_grad()
def prepare_pairs(made, clip, setup):
    """The objects one by one -> arrays of Pairs. A picture passes the frozen tower once, here: it
    does not change, so the release's pass in every step finds the same."""
    rows = []
    for xyz, scan, views, pictures in made:
        x = torch.from_numpy(pictures).to(setup.device).permute(0, 3, 1, 2).float() / 255
        with setup.autocast():
            image = clip.visual(clip.prepared(x)).float().cpu().numpy()
        rows.append((xyz, scan, views.astype(np.float32), image))
    return dict(zip(Pairs._fields, map(np.stack, zip(*rows))))          # all but the label


def built_in_tests(points, classes):
    """Complete objects that no step saw, and scanned ones as in train_cls.py."""
    n, seed = HELD_OUT
    xyz = [built_in_object(seed, k, i, 0, points, 0)[0]
           for k in range(len(classes)) for i in range(n)]
    return [Test("held-out objects", objects.unit_sphere(torch.from_numpy(np.stack(xyz))),
                 torch.arange(len(classes)).repeat_interleave(n)),
            Test("scanned clouds", *scanned(*SCANS[1], points, classes))]


def scanned(n, seed, points, classes):
    """`n` scanned objects of each class -> (S, N, 3) in the unit sphere, y up; label (S,)."""
    from data.synthetic_objects import object_clouds
    xyz, label = object_clouds(n, points, seed, classes)
    return objects.unit_sphere(y_up(torch.from_numpy(xyz))), torch.from_numpy(label)


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


@record_function("loss")
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


# ---- Train ---------------------------------------------------------------------------------------
def train(model, data, tests, clip, text, run):
    cfg, setup = run.cfg, run.setup
    recipe = Recipe(**cfg["recipe"])
    wrapped, optimizer = setup.wrap(model, cfg["compile"]), optimizer_of(model, recipe)
    if setup.fits(data.xyz.nbytes + data.scan.nbytes, share=2):
        data = Pairs(*(x.to(setup.device) for x in data))
    steps = len(data.label) // recipe.batch_size        # the last, partial batch is dropped
    if not steps:
        raise InputError(f"--batch-size {recipe.batch_size}: there are {len(data.label)} objects")
    titles = "epoch    cross   intra       w" + "".join(f"  {test.name} %" for test in tests)

    for epoch in run.epochs(model, optimizer, titles):
        order = torch.randperm(len(data.label), generator=run.draw, device=setup.device)
        order = order.to(data.xyz.device)
        for step in run.steps(steps, LOWEST):
            if recipe.restart:
                set_rate(optimizer, recipe, epoch + step / steps)
            rows = order[step * recipe.batch_size:][:recipe.batch_size]
            run.sums += train_step(wrapped, optimizer, data, rows, clip, run)
        cross, intra, n = run.totals("cross", "intra")
        found = evaluate(model.towers["depth"], tests, clip, text, cfg, setup)
        shares = [accuracy(scores, test.label) for scores, test in zip(found, tests)]
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
    """Clouds of objects `rows` (B,), some scanned, random points of each: (B, points, 3)."""
    device = draw.device
    xyz = data.xyz[rows].to(device)                                     # (B, P, 3)
    if recipe.scanned and data.scan.numel():
        scanned = torch.rand(len(rows), 1, 1, device=device, generator=draw) < recipe.scanned
        xyz = torch.where(scanned, data.scan[rows].to(device), xyz)
    order = torch.rand(xyz.shape[:2], device=device, generator=draw).argsort(1)
    return objects.unit_sphere(common.gather(xyz, order[:, :recipe.points]))


def train_step(model, optimizer, data, rows, clip, run):
    """One step on the objects `rows` (B,), where the data is -> sums (3,): cross, intra, objects.

    One picture of each, and two depth maps from its side, at two distances in 0.9 .. 1.1.
    """
    cfg, setup, draw = run.cfg, run.setup, run.draw
    recipe = Recipe(**cfg["recipe"])
    B, device = len(rows), setup.device
    points = sample_clouds(data, rows, recipe, draw)                    # (B, N, 3)
    side = torch.randint(data.views.shape[1], (B,), device=device, generator=draw).to(rows.device)
    distance = 0.9 + 0.2 * torch.rand(B, 2, 1, device=device, generator=draw)
    views = data.views[rows, side].to(device)[:, None].expand(-1, 2, -1)
    views = torch.cat([distance, views], 2)                             # (B, 2, 3)
    maps = depth_maps(points, views, clip.size, clip.radius, cfg["average"])
    x = clip.prepared(maps.flatten(0, 1)).unflatten(0, (B, 2))          # (B, 2, 3, size, size)
    S = len(data.image)
    others = (rows - S // 2) % S            # whose pictures the control takes instead
    image, other = (data.image[i, side].to(device) for i in (rows, others))     # (B, E)
    optimizer.zero_grad(set_to_none=True)
    for name in model.towers:
        kept = slice(None)
        if name == "left out":              # never sees a depth map of these classes
            unseen = torch.tensor([cfg["classes"].index(k) for k in LEFT_OUT], device=rows.device)
            kept = ~torch.isin(data.label[rows], unseen).to(device)
            if not kept.any():
                continue
        with setup.autocast():
            depth = model(name, x[kept].flatten(0, 1))
        depth = depth.float().unflatten(0, (-1, 2))                     # (B, 2, E)
        target = (other if name == "mispaired" else image)[kept]
        loss, cross, intra = pair_loss(depth, target, model.balance[name], recipe, cfg["loss"])
        loss.backward()
        if name == "depth":
            sums = torch.stack([cross * B, intra * B, torch.full_like(cross, B)]).detach().double()
    optimizer.step()
    return sums


# ---- Main ----------------------------------------------------------------------------------------
def main(argv=None):
    args = flags(argv)
    cfg, saved, folder = settings(args)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("train_clip2point.py: a batch is contrasted as a whole; run it without "
                         "torchrun")
    setup = Setup(args.device, cfg["precision"])
    clip = load_both_towers(cfg["clip"], cfg["seed"], setup.device)
    check_frozen(cfg, saved, clip)
    data, tests, classes, form = load_pairs(cfg, clip, setup)
    cfg["classes"], names = list(classes), [name.replace("_", " ") for name in classes]
    run = Run("clip2point", cfg, setup, saved)
    if not args.eval:
        run.open(__file__, folder or args.out)
    run.print(f"device   {setup.describe}; torch {torch.__version__}; seed {cfg['seed']}")
    unknown = [name for name in names if not knows(clip, name)]
    tests = [] if unknown else tests
    run.print(f"data     {cfg['data']}: {len(data.label):,} objects with {data.image.shape[1]} "
              f"pictures each; {', '.join(f'{len(t.label):,} {t.name}' for t in tests) or 'none'} "
              f"to test; {len(classes)} classes, {cfg['recipe']['points']} points; {form}")
    if unknown:
        run.print(f"text     no test by name: {clip.name} does not know {', '.join(unknown[:5])}")
    text = text_features(clip, names) if tests else None
    controls = ["mispaired", "left out"] if cfg["data"] == "synthetic" else []
    visual = untrained(clip, cfg["seed"]) if cfg["from_scratch"] else clip.visual
    model = DepthTowers(visual, ["depth", *controls]).to(setup.device)
    if saved:
        load_weights(model, saved["model"])
    sizes = [sum(p.numel() for p in part.parameters()) for part in (visual, clip.visual)]
    run.print(f"model    depth tower of {sizes[0]:,} weights"
              + f", and {len(controls)} more for the controls" * bool(controls)
              + f"; {clip.name}; maps of {clip.size} x {clip.size}, points of radius {clip.radius}")
    common.print_warning(run.print, clip.name)
    if not args.eval:
        with run.stopper:
            train(model, data, tests, clip, text, run)
        if clip.is_nano:
            nanoclip.save_depth(run.folder / "nanodepth.safetensors", model.towers["depth"],
                                clip.sha256)
    metrics = {}
    if tests:
        metrics = report(model.towers, tests, clip, text, run)
        at = run.at
        run.print(f"result   {tests[-1].name}, zero-shot: {percent(metrics['accuracy'])} of "
                  f"{len(classes)} classes, before {percent(metrics['before'])}; epoch "
                  f"{at['epoch']} ({best_of(at)}); {cfg['data']}, {clip.name}, "
                  f"{at['seconds']:.0f} s")
        if not args.eval:
            render.save(run.folder / "look.png",
                        picture(model.towers["depth"], tests[-1], clip, text, cfg, setup))
            run.print(f"look     {run.folder}/look.png")
    if not args.eval:
        run.results(metrics, "accuracy", sizes, form)


MISPAIRED = "control: pictures of other objects"


def report(towers, tests, clip, text, run):
    """After pre-training: print the table, and what the controls say. -> metrics."""
    cfg, main, used = run.cfg, tests[-1], (clip, text, run.cfg, run.setup)
    found = {BEFORE: evaluate(clip.visual, tests, *used),
             AFTER: evaluate(towers["depth"], tests, *used)}
    if cfg["data"] == "synthetic":
        found[MISPAIRED] = evaluate(towers["mispaired"], tests, *used)
        n, seed = SCANS[0]
        shots = scanned(n, seed, cfg["recipe"]["points"], cfg["classes"])
        found[SHOTS.format(n)], best = adapt(towers["depth"], shots, tests, *used)
    for line in table(cfg["classes"], tests, found):
        run.print(line)
    share = {title: accuracy(scores[-1], main.label) for title, scores in found.items()}
    metrics = {"accuracy": share[AFTER], "before": share[BEFORE]}
    if cfg["data"] != "synthetic":
        return metrics
    metrics.update(adapter=share[SHOTS.format(n)], mispaired=share[MISPAIRED])
    run.print(f"adapter  last epoch (best on the {main.name}: {percent(best[0])} in epoch "
              f"{best[1]})")
    found = {"before": found[BEFORE], "after": evaluate(towers["left out"], tests, *used),
             "seen": found[AFTER]}
    unseen = torch.tensor([cfg["classes"].index(name) for name in LEFT_OUT])
    for i, test in enumerate(tests):
        mine = torch.isin(test.label, unseen)
        all_ = [accuracy(scores[i][mine], test.label[mine]) for scores in found.values()]
        four = [accuracy(scores[i], test.label, unseen) for scores in found.values()]
        run.print(f"left out {', '.join(LEFT_OUT)} of the {test.name}, among all: before "
                  f"{percent(all_[0])}, pre-trained without them {percent(all_[1])}, with them "
                  f"{percent(all_[2])}; among the four: {', '.join(map(percent, four))}")
        metrics.update({f"left_out_{when}, {test.name}": x for when, x in zip(found, all_)})
    return metrics


def picture(tower, test, clip, text, cfg, setup, most=12):
    """look.png: clouds of a test set, up to three depth maps of each, and how they are named."""
    rows = torch.linspace(0, len(test.label) - 1, min(most, len(test.label))).round().long()
    some = Test(test.name, test.xyz[rows], test.label[rows])
    scores, = evaluate(tower, [some], clip, text, cfg, setup)
    pictures, cells = pictures_of(clip, some.xyz, cfg)[:, :3], []
    for maps, k, found in zip(pictures, some.label.tolist(), scores.argmax(1).tolist()):
        captions = cfg["classes"][k], f"named {cfg['classes'][found]}", ""
        cells += [render.Cell(x, caption, None if k == found else render.RED)
                  for x, caption in zip(maps, captions)]
    return render.sheet(cells, 9, f"depth maps of {test.name}, zero-shot; wrong ones in red")


def flags(argv):
    parser = recipe_parser(__doc__, RECIPES)
    shared_flags(parser)
    flag = parser.add_argument
    flag("--clip", metavar="NAME", help=f"{pretrained.CLIP_NAMES} (default: openai; for synthetic "
                                        "data: nano)")
    flag("--objects", type=whole(1), metavar="N", help="built-in objects of each class")
    flag("--temperature", type=float, metavar="T", help="of the contrast: 0.07 as released (the "
                                                        "default), 0.7 as the supplement prints")
    flag("--loss", choices=["both", "cross", "intra"], help="control: one of the two alone")
    flag("--from-scratch", action="store_true", help="control: a depth tower that begins untrained")
    flag("--average", action="store_true",
         help="control: the mean of a pixel's points, as PointCLIP, not the nearest")
    flag("--views", choices=VIEWS, help="sides that a test looks at a cloud from (default: axis6, "
                                        "for the adapter axis10; nano: oblique6)")
    flag("--up", choices=["z", "y"], help="--data folder: the axis that points up (default z)")
    return parser.parse_args(argv)


SAVED = {                                   # forms of the settings that are this script's own
    "data": (*RECIPES,), "classes": [str], "up": ("y", "z"), "views": (None, *VIEWS),
    "average": bool, "loss": ("both", "cross", "intra"), "from_scratch": bool,
    # 0 is a number of objects, and of epochs until a restart
    "recipe": {**config_form(Recipe, {})["recipe"], "objects": WHOLE, "restart": WHOLE}}


def settings(args):
    """Flags over a recipe or a saved run -> config, checkpoint or None, run folder or None."""
    if args.up and args.data != "folder" and not args.resume and not args.eval:
        raise InputError("--up is the axis that points up in your own data; leave it out")
    if args.objects and args.data not in (None, "synthetic"):
        raise InputError(f"--objects is of the built-in data; leave it out with --data {args.data}")
    views = {"views": args.views, "average": args.average}
    if args.eval:                           # it may look from other sides than the training did
        args.views, args.average = None, False
    if args.resume or args.eval:
        cfg, saved, folder = saved_settings(args, "clip2point", Recipe, SAVED,
                                            checkpoint_form(sums=3))
        return {**cfg, **{name: value for name, value in views.items() if value}}, saved, folder
    recipe = with_flags(RECIPES[args.data or "synthetic"], args)
    if not 0 < recipe.temperature < math.inf:
        raise InputError(f"--temperature {recipe.temperature} must be above 0, and a number")
    cfg = shared_settings(args, recipe)
    return {**cfg, **views, "loss": args.loss or "both", "from_scratch": args.from_scratch,
            "up": args.up or "z"}, None, None


if __name__ == "__main__":
    main_guard(main)
