"""Classify point clouds with EPCL (paper section 4.4, Table 4; supplement, Figure 10).

    python train_cls.py                                  built-in objects, no download
    python train_cls.py --data modelnet40 --root DIR     the paper's recipe (paper: 92.9 %)
    python train_cls.py --data folder --root DIR         yours: DIR/{train,test}/CLASS/*
    python train_cls.py --eval RUN --predict chair.obj   classify your own file

To change the data, edit `load_data` and RECIPES; the head, `Classifier` in common.py; the backbone,
pass another --clip or edit `EPCLEncoder` in common.py.
"""
from pathlib import Path
from typing import NamedTuple

import run                                  # before torch: Ctrl-C during the imports
import torch
from torch import nn
from torch.profiler import record_function

import common
import pretrained
import render
from checkpoint import amount, check_frozen, checkpoint_form, load_weights, saved_settings
from common import Classifier, FrozenCLIP, farthest, gather, loss_terms, prompt_features
from data import objects
from kernels import farthest_point_sample
from run import (InputError, Run, Setup, all_reduce, best_of, main_guard, my_rows,
                 parameter_groups, recipe_parser, seed_of, shared_flags, shared_settings, whole,
                 with_flags, world_size)

# ---- Recipe --------------------------------------------------------------------------------------
class Recipe(NamedTuple):
    points: int             # of a cloud, as the model sees it
    groups: int             # patches of a cloud, G
    neighbours: int         # points of a patch, K
    stored: int             # points of a cloud kept in memory
    pool: int               # farthest point sampling draws from pool * points of them
    epochs: int
    warmup: float           # epochs
    batch_size: int         # clouds
    lr: float               # highest; AdamW
    decay: float            # weight decay of the matrices
    clip_norm: float        # of the gradient
    dropout: float          # before CLIP
    unit: bool              # centre every cloud and scale it into the unit sphere
    every: int              # epochs from one evaluation to the next


MODELNET40 = Recipe(
    points=1024, groups=64, neighbours=32, stored=8192, pool=8,     # release, cfgs/modelnet.yaml
    epochs=300, warmup=10, batch_size=32, clip_norm=0.8,            # the same
    lr=3e-4, decay=0.04,                                            # the same; paper 4.1, too
    dropout=0.0,                                    # release; the paper's supplement says 0.3
    unit=True, every=1)
RECIPES = {
    "modelnet40": MODELNET40,
    "modelnet10": MODELNET40,
    # not in the paper; points, groups and no scaling as Point-MAE
    "scanobjectnn": MODELNET40._replace(points=2048, groups=128, stored=2048, pool=1, unit=False),
    "folder": MODELNET40._replace(pool=2),          # less sampling on a CPU
    # ours, sized for two CPU cores
    "synthetic": MODELNET40._replace(points=256, groups=16, neighbours=8, stored=1024, pool=4,
                                     epochs=18, warmup=1, batch_size=16, lr=1e-3),
}
SYNTHETIC = (64, 20)        # objects of each class, to train and to test


# ---- Data: files -> clouds in memory -> the points of a step, on the device ----------------------
class Objects(NamedTuple):
    xyz: torch.Tensor                       # (S, stored, 3) float32
    label: torch.Tensor                     # (S,) int64
    text: torch.Tensor = None               # (C, 512) CLIP's features of the class names


def load_data(cfg, training=True):
    """-> training and test Objects, scaled as the recipe says; class names; what was read.

    training=False: of an own folder the test objects will do.
    """
    recipe = Recipe(**cfg["recipe"])
    if cfg["data"] == "synthetic":
        from data.synthetic_objects import OBJECT_CLASSES, object_clouds
        parts = [object_clouds(n, recipe.stored, seed) for seed, n in zip((1, 2), SYNTHETIC)]
        classes, form = OBJECT_CLASSES, "procedural objects of data/synthetic_objects.py"
    else:
        known = () if training else cfg["classes"]
        path = objects.prepare(cfg["data"], cfg["root"], recipe.stored, cfg["workers"], known)
        if "split" not in cfg:
            cfg["split"] = objects.split_of(path, cfg["test_fraction"])
        *parts, classes, form = objects.load(path, recipe.points, cfg["test_fraction"],
                                             cfg["split"])
    train, test = (Objects(*map(torch.from_numpy, part)) for part in parts)
    if cfg.get("train_fraction", 1) < 1 and len(train.label):
        rows = few_of(train.label, cfg["train_fraction"], cfg["seed"])
        form += f"; {len(rows):,} of {len(train.label):,} training objects, drawn from the seed"
        train = Objects(train.xyz[rows], train.label[rows])
    if recipe.unit:                         # over all stored points, as released
        train = train._replace(xyz=objects.unit_sphere(train.xyz))
        test = test._replace(xyz=objects.unit_sphere(test.xyz))
    return train, test, classes, form


def few_of(label, fraction, seed):
    """Rows of a random `fraction` of each class, at least one of it, in their order."""
    draw, rows = torch.Generator().manual_seed(seed_of(seed)), []
    for k in label.unique():
        mine = (label == k).nonzero()[:, 0]
        count = max(1, round(fraction * len(mine)))
        rows.append(mine[torch.randperm(len(mine), generator=draw)[:count]])
    return torch.cat(rows).sort().values


@record_function("data")
def sample_train(xyz, recipe, draw, total, first=0):
    """Random points of clouds: (b, P, 3) -> (b, points, 3). The clouds are rows first .. first + b
    of a batch of `total`.

    As released: shuffle, take the 1200 farthest points for 1024, a random 1024 of those, then scale
    each axis by 2/3 .. 3/2 and shift it by -0.2 .. 0.2. No rotation. Numbers are drawn for the
    whole batch, so that a cloud meets the same ones in one process or in eight.
    """
    b, stored, n = len(xyz), xyz.shape[1], recipe.points
    pool = min(stored, recipe.pool * n)
    more = min(pool, n * 75 // 64)                              # 1024 -> 1200, 2048 -> 2400
    order = torch.rand(total, stored, device=xyz.device, generator=draw)[first:first + b].argsort(1)
    xyz = gather(xyz, order[:, :pool])                          # (b, pool, 3)
    idx = farthest_point_sample(xyz, more)                      # (b, more)
    chosen = torch.randperm(more, device=xyz.device, generator=draw)[:n]    # for the whole batch
    xyz = gather(xyz, idx[:, chosen])                           # (b, points, 3)
    share = torch.rand(2, total, 1, 3, device=xyz.device, generator=draw)[:, first:first + b]
    return xyz * (2 / 3 + share[0] * 5 / 6) + (share[1] * 0.4 - 0.2)


# ---- The authors' checkpoint ---------------------------------------------------------------------
OFFICIAL = {                # names in the authors' released checkpoint -> ours; `clip_vit.` is CLIP
    "encoder.first_conv.": "tokenizer.first.",
    "encoder.second_conv.": "tokenizer.second.",
    "pos_embed.": "encoder.position.",
    "te_encoder.embedding.": "encoder.task.embedding.",
    "te_encoder.trans.": "encoder.task.mlp.",
    "norm.": "norm.",
    "proj2emb.": "embed.",
    "cls_head_finetune.": "head.",
}


def load_official(path):
    """The authors' classification checkpoint -> (FrozenCLIP with its weights, our state dict)."""
    state, _ = pretrained.read_weights(path, "--init-official")
    visual = {name.removeprefix("clip_vit."): value for name, value in state.items()
              if name.startswith("clip_vit.")}
    ours = {}
    for released, mine in OFFICIAL.items():
        for name, value in state.items():
            if name.startswith(released):           # a 1x1 convolution is a linear layer
                value = value.squeeze(-1) if value.ndim == 3 else value
                ours[mine + name.removeprefix(released)] = value
    name = "ViT-B-32-quickgelu"
    model, _ = pretrained.open_clip_model(name)
    load_weights(model.visual, visual, pretrained.VISUAL_USED, f"--init-official {path}: not a "
                 "checkpoint of the authors' classification release: its clip_vit.*", name)
    return FrozenCLIP(f"official:{path}", name, pretrained.open_clip_parts(model.visual)), ours


# ---- Metric --------------------------------------------------------------------------------------
def accuracies(confusion):
    """confusion (C, C), true by predicted -> overall accuracy, mean over classes that occur."""
    correct, count = confusion.diag().double(), confusion.sum(1).double()
    seen = count > 0
    return (correct.sum() / count.sum()).item(), (correct[seen] / count[seen]).mean().item()


def worst_pairs(confusion, classes, most=5):
    wrong = confusion.clone().fill_diagonal_(0).flatten()
    lines = []
    for pair in wrong.argsort(descending=True, stable=True)[:most].tolist():
        true, predicted = divmod(pair, len(classes))
        if wrong[pair]:
            lines.append(f"         {classes[true]} taken for {classes[predicted]}: "
                         f"{wrong[pair]} of {confusion[true].sum()}")
    return "\n".join(["worst pairs", *lines] if lines else ["no test object was mistaken"])


@torch.no_grad()
def evaluate(model, xyz, label, setup, recipe, votes=1, seed=0, batch=64):
    """Confusion matrix (C, C) of clouds (S, points, 3), shared between the processes.

    votes > 1: xyz are the stored clouds (S, P, 3), and logits are averaged over so many random
    augmented samples of each, which follow `seed` and the number of processes. The release
    reports the best of 299 such repeats, we report one.
    """
    model.eval()
    classes = model.head[-1].out_features
    confusion = torch.zeros(classes, classes, dtype=torch.int64, device=setup.device)
    draw = torch.Generator(setup.device).manual_seed(seed_of(seed))
    first, last = my_rows(len(label))
    for start in range(first, last, batch):
        rows = slice(start, min(start + batch, last))
        points = xyz[rows].to(setup.device)                     # (b, N, 3)
        logits = 0                                              # (b, C)
        for _ in range(votes):
            x = sample_train(points, recipe, draw, len(points)) if votes > 1 else points
            with setup.autocast():
                logits = logits + model(x)[0].float()
        pairs = label[rows].to(setup.device) * classes + logits.argmax(1)
        confusion += torch.bincount(pairs, minlength=classes ** 2).view(classes, classes)
    return all_reduce(confusion).cpu()


@torch.no_grad()
def picture(model, xyz, label, setup, cfg, title, most=24):
    """look.png: up to 24 clouds of (S, points, 3), evenly spaced, with true and predicted name."""
    model.eval()
    rows = torch.linspace(0, len(label) - 1, min(most, len(label))).round().long()
    with setup.autocast():
        found = model(xyz[rows].to(setup.device))[0].argmax(1).tolist()
    cells = []
    for cloud, true, predicted in zip(xyz[rows].cpu(), label[rows].tolist(), found):
        caption = f"{cfg['classes'][true]}\nnamed {cfg['classes'][predicted]}"
        cells.append(render.Cell(render.draw_object(cloud, up=cfg["up"]), caption,
                                 None if predicted == true else render.RED))
    return render.sheet(cells, columns=8, title=title)


# ---- Train ---------------------------------------------------------------------------------------
def train(model, data, test, run):
    cfg, setup = run.cfg, run.setup
    recipe = Recipe(**cfg["recipe"])
    wrapped = setup.wrap(model, cfg["compile"])
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe.decay), lr=recipe.lr)
    data = data._replace(label=data.label.to(setup.device))
    if setup.fits(data.xyz.nbytes, share=2):
        data = data._replace(xyz=data.xyz.to(setup.device))
    steps = max(1, -(-len(data.label) // recipe.batch_size))
    rest = len(data.label) % recipe.batch_size
    if steps > 1 and 0 < rest < 2 * world_size() * cfg["accumulate"]:
        steps -= 1                          # too few for batch norm: they join the last full batch
    columns = "epoch     loss    head    text  train %   test %   mean %"

    for _ in run.epochs(model, optimizer, columns):
        order = torch.randperm(len(data.label), device=setup.device, generator=run.draw)
        for step in run.steps(steps):
            rows = order[step * recipe.batch_size:]
            rows = rows[:recipe.batch_size] if step + 1 < steps else rows
            run.sums += train_step(wrapped, optimizer, data, rows, run)
        *sums, n = run.totals("head", "text")
        head, text, right = (x / n for x in sums)               # means over the epoch's clouds
        cells = f"{head + text:8.4f} {head:7.4f} {text:7.4f} {100 * right:8.2f}"
        metrics = {"loss": head + text, "loss_head": head, "loss_text": text,
                   "train_accuracy": right}
        if not run.due(recipe.every):
            run.row(None, cells + " " * 18, **metrics)
            continue
        overall, mean = accuracies(evaluate(model, test.xyz, test.label, setup, recipe))
        run.row(overall, f"{cells} {100 * overall:8.2f} {100 * mean:8.2f}", **metrics,
                accuracy=overall, mean_class_accuracy=mean)


def train_step(model, optimizer, data, rows, run):
    """One step on the clouds `rows`, of which this process takes its share.

    -> sums over its clouds, (4,): loss of the head, of the text, correct, clouds. No value is read
    back from the device.
    """
    cfg, setup = run.cfg, run.setup
    recipe = Recipe(**cfg["recipe"])
    sums = torch.zeros(4, dtype=torch.float64, device=setup.device)
    optimizer.zero_grad(set_to_none=True)
    for part in range(cfg["accumulate"]):
        first, last = my_rows(len(rows), part, cfg["accumulate"])
        mine = rows[first:last]
        label = data.label[mine]
        xyz = data.xyz[mine.to(data.xyz.device)].to(setup.device)
        points = sample_train(xyz, recipe, run.draw, len(rows), first)
        with setup.autocast():
            logits, embedding = model(points)
        head, similarity = loss_terms(logits, embedding, label, data.text, cfg["text_loss"])
        # the mean over the batch; between processes gradients are averaged, hence the factor
        ((head + similarity) * world_size() / len(rows)).backward()
        correct = (logits.argmax(1) == label).sum()
        sums += torch.stack([head, similarity, correct, torch.full_like(head, len(mine))]).detach()
    nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
    optimizer.step()
    return sums


# ---- Main ----------------------------------------------------------------------------------------
def main(argv=None):
    args = flags(argv)
    cfg, saved, folder = settings(args)
    setup = Setup(args.device, cfg["precision"])
    if args.predict and args.vote:
        raise InputError("--vote: votes are for test sets; leave it out with --predict")
    if args.predict:
        where = Path(args.export or folder / "predicted")
        return predict(args.predict, cfg, saved, setup, where / "look.png")
    data, stored, classes, form = load_data(cfg, training=not args.eval)
    if saved and list(classes) != cfg["classes"]:
        raise InputError(f"{form}: has other classes than the run: {' '.join(classes)[:200]}")
    cfg["classes"], cfg["up"] = list(classes), objects.up_of(form)
    if not args.eval:
        common.check_batch(len(data.label), cfg)
    clip, model, text = build(cfg, saved, setup)
    if text is None and args.text_loss in ("raw", "cosine"):
        raise InputError(f"--text-loss {args.text_loss}: {clip.name} {clip.no_text}; pass "
                         "--text-loss off")
    if args.test_fraction and not cfg.get("split"):
        raise InputError("--test-fraction: the data have a test set of their own; leave it out")
    recipe = Recipe(**cfg["recipe"])
    test = Objects(farthest(stored.xyz.to(setup.device), recipe.points), stored.label)
    run = Run("cls", cfg, setup, saved)
    if not args.eval:
        run.open(__file__, folder or args.out)
    run.print(f"device   {setup.describe}; torch {torch.__version__}; seed {cfg['seed']}")
    trained = f"{len(data.label):,} train, " * bool(len(data.label))
    run.print(f"data     {cfg['data']}: {trained}{len(test.label):,} test, "
              f"{len(classes)} class{'es' * (len(classes) > 1)}, {recipe.points} points; {form}")
    common.print_model(run, model, clip)
    if cfg["text_loss"] != "off":
        run.print(f"text     no text loss: {clip.name} {clip.no_text}" if text is None else
                  f"text     {len(text)} prompts, {cfg['text_loss']} products")
    if not args.eval:
        with run.stopper:
            train(model, data._replace(text=text), test, run)

    confusion = evaluate(model, test.xyz, test.label, setup, recipe)
    overall, mean = accuracies(confusion)
    metrics, at = {"accuracy": overall, "mean_class_accuracy": mean}, run.at
    run.print(worst_pairs(confusion, classes))
    run.print(f"result   accuracy {100 * overall:.2f} %, mean class accuracy {100 * mean:.2f} %, "
              f"epoch {at['epoch']} ({best_of(at)}); {cfg['data']}, {clip.name}, "
              f"{at['seconds']:.0f} s")
    if args.vote:
        votes = evaluate(model, stored.xyz, stored.label, setup, recipe, args.vote, cfg["seed"])
        voted = metrics[f"accuracy_{args.vote}_votes"] = accuracies(votes)[0]
        run.print(f"voting   accuracy {100 * voted:.2f} %, {args.vote} votes, one repeat")
    if not args.eval:
        run.confusion(confusion, classes)
        title = (f"{len(test.label):,} test clouds, accuracy {100 * overall:.1f} %; some of them, "
                 f"wrong ones in red; {cfg['up']} points up")
        if run.first:
            render.save(run.folder / "look.png", picture(model, test.xyz, test.label, setup, cfg,
                                                         title))
        run.results(metrics, "accuracy", common.sizes(model), form)
        run.print(f"look     {run.folder}/look.png")


def build(cfg, saved, setup):
    """-> FrozenCLIP, model on the device, text features (C, 512) or None."""
    weights = None
    if cfg["official"]:
        clip, weights = load_official(cfg["official"])
    else:
        clip = pretrained.load_clip(cfg["clip"], cfg["seed"], trainable=cfg["unfreeze"])
    check_frozen(cfg, saved, clip)
    text = prompt_features(clip, cfg["classes"]) if cfg["text_loss"] != "off" else None
    clip.text = None                                            # the text tower is not needed again
    released = {"model": weights, "file": cfg["official"]}
    torch.manual_seed(seed_of(cfg["seed"]))
    model = Classifier(clip, len(cfg["classes"]), cfg)
    model = common.to_device(model, saved or released, setup)
    return clip, model, None if text is None else text.to(setup.device)


@torch.no_grad()
def predict(files, cfg, saved, setup, look):
    """Print the five likeliest classes of anybody's meshes or clouds, and draw the first 40."""
    recipe, clouds, cells, up = Recipe(**cfg["recipe"]), [], [], cfg.get("up", "z")
    for file in files:
        xyz = objects.read_one(file, recipe.stored, recipe.points)
        xyz = torch.from_numpy(xyz)[None].to(setup.device)      # (1, P, 3)
        xyz = objects.unit_sphere(xyz) if recipe.unit else xyz
        clouds.append(farthest(xyz, recipe.points))
    _, model, _ = build(cfg, saved, setup)
    model.eval()
    for file, points in zip(files, clouds):
        with setup.autocast():
            logits, _ = model(points)
        share, label = logits[0].float().softmax(0).topk(min(5, len(cfg["classes"])))
        names = [f"{cfg['classes'][i]} {100 * p:.1f} %"
                 for p, i in zip(share.tolist(), label.tolist())]
        print(f"{file}:", *(f"  {name}" for name in names))
        if len(cells) < 40:
            drawn = render.draw_object(points[0].cpu(), up=up)
            cells.append(render.Cell(drawn, "\n".join([Path(file).name, *names[:2]])))
    render.save(look, render.sheet(cells, columns=min(8, len(cells)), title=f"{up} points up, as "
                                   "in the run's data"))
    print(f"look: {look}")


def flags(argv):
    parser = recipe_parser(__doc__, RECIPES)
    shared_flags(parser, pretrained.CLIP_NAMES)
    flag = parser.add_argument
    flag("--points", type=whole(1, 10**6), metavar="N", help="points of a cloud")
    flag("--groups", type=whole(1), metavar="G", help="patches of a cloud")
    flag("--neighbours", type=whole(1), metavar="K", help="points of a patch, at most 64")
    flag("--text-loss", choices=["raw", "cosine", "off"],
         help="similarities with CLIP's text features (default: raw, as the release)")
    flag("--test-fraction", type=float, metavar="F",
         help="--data folder without train/ and test/: share set aside to test (default 0.2)")
    flag("--train-fraction", type=float, metavar="F",
         help="train on this share of each class, drawn from --seed (default: all)")
    flag("--vote", type=whole(2), metavar="V", help="report the vote over V augmented samples, too")
    flag("--predict", nargs="+", metavar="FILE",
         help="with --eval RUN: print the five likeliest classes of meshes or clouds")
    flag("--export", metavar="DIR", help="where --predict draws look.png (default: RUN/predicted)")
    flag("--init-official", metavar="FILE", dest="official",
         help="start from the authors' released checkpoint")
    return parser.parse_args(argv)


def check_sizes(recipe):
    if recipe.groups > recipe.points or recipe.neighbours > min(64, recipe.points):
        raise InputError(f"--groups {recipe.groups} must be at most --points {recipe.points}, "
                         f"--neighbours {recipe.neighbours} at most {min(64, recipe.points)}")


SAVED = {                                   # forms of the settings that are this script's own
    "data": (*RECIPES,), "classes": [str], "official": (None, str),
    "text_loss": ("raw", "cosine", "off"), "test_fraction": float,
    "train_fraction": (..., lambda x: amount(x) and 0 < x <= 1),
    "split": (..., None, [[str], [str]]), "up": (..., "y", "z")}


def settings(args):
    """Flags over a recipe or a saved run -> config, checkpoint or None, run folder or None."""
    if args.predict and not args.eval:
        raise InputError("--predict needs a run: add --eval runs/cls-...")
    if args.export and not args.predict:
        raise InputError("--export says where --predict draws; give both")
    if args.resume or args.eval:
        cfg, saved, folder = saved_settings(args, "cls", Recipe, SAVED, checkpoint_form(sums=4))
        check_sizes(Recipe(**cfg["recipe"]))
        cfg["official"] = args.official or (None if args.clip else cfg["official"])
        return cfg, saved, folder
    if args.official and (args.clip or args.unfreeze):
        raise InputError("--init-official brings its own transformer, which stays frozen; leave "
                         "--clip and --unfreeze out")
    recipe = with_flags(RECIPES[args.data or "synthetic"], args)
    recipe = recipe._replace(stored=max(recipe.stored, recipe.points))
    check_sizes(recipe)
    fraction = 0.2 if args.test_fraction is None else args.test_fraction
    if not 0 < fraction < 1:
        raise InputError("--test-fraction must lie between 0 and 1")
    few = 1.0 if args.train_fraction is None else args.train_fraction
    if not 0 < few <= 1:
        raise InputError("--train-fraction must lie between 0 and 1")
    cfg = shared_settings(args, recipe)
    return {**cfg, "official": args.official, "text_loss": args.text_loss or "raw",
            "test_fraction": fraction, "train_fraction": few}, None, None


if __name__ == "__main__":
    main_guard(main)
