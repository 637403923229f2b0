"""Few-shot classification with EPCL: K ways, N shots (paper section 4.4, Tables 3 and 5).

    python train_fewshot.py                                    built-in objects, no download
    python train_fewshot.py --data modelnet40 --root DIR       5-way 10-shot (paper: 95.1 ± 2.7 %)
    python train_fewshot.py --data modelnet40 --root DIR --table               Table 3
    python train_fewshot.py --data modelnet40 --root DIR --shots-all 16        Table 5
    ... --compare frozen,random,no-transformer                 is it CLIP that helps?

An episode draws K classes, N training and 20 test clouds of each. Every episode trains a fresh
tokenizer, task token and head on the frozen transformer, which is loaded once. To change the data,
edit `load_data` and RECIPES; the protocol, `draw_episode`; the head, `Classifier` in common.py.
"""
import argparse
import copy
import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import run                                  # before torch: Ctrl-C during the imports
import numpy as np
import torch
from scipy.special import stdtrit
from torch import nn
from torch.profiler import record_function
from tqdm import tqdm

import common
import pretrained
import render
from checkpoint import COUNT, WHOLE, check_frozen, checkpoint_form, saved_settings
from common import Classifier, farthest, gather, loss_terms, prompt_features
from data import objects
from data.files import read_json, reading
from data.objects import MODELNET40, read_fold
from run import (ABLATIONS, InputError, Run, Setup, learning_rate, main_guard, parameter_groups,
                 recipe_parser, seed_of, shared_flags, shared_settings, whole, with_flags)

# ---- Recipe --------------------------------------------------------------------------------------
class Recipe(NamedTuple):
    points: int             # of a cloud, as the model sees it
    groups: int             # patches of a cloud, G
    neighbours: int         # points of a patch, K
    stored: int             # points of a cloud that samples are drawn from
    epochs: int
    warmup: float           # epochs
    batch_size: int         # clouds; a smaller last batch is kept: 50 clouds are two steps
    lr: float               # highest; AdamW
    decay: float            # weight decay of the matrices
    clip_norm: float        # of the gradient
    dropout: float          # before CLIP
    unit: bool              # centre every cloud and scale it into the unit sphere
    every: int              # epochs from one test to the next


# EPCL released no few-shot code
POINT_BERT = Recipe(
    points=1024, groups=64, neighbours=32, stored=8192,         # cfgs/fewshot.yaml, the same in
    epochs=150, warmup=10, batch_size=32, clip_norm=10.0,       # Point-BERT, MaskPoint, Point-MAE
    lr=3e-4, decay=0.04,                # paper 4.1, "for the whole experiment"; theirs: 5e-4, 0.05
    dropout=0.0, unit=True, every=1)    # as train_cls.py
RECIPES = {
    "modelnet40": POINT_BERT,
    # points and scaling as train_cls.py
    "scanobjectnn": POINT_BERT._replace(points=2048, groups=128, stored=2048, unit=False),
    "folder": POINT_BERT,
    # ours, sized for two CPU cores
    "synthetic": POINT_BERT._replace(points=256, groups=16, neighbours=16, stored=1024, epochs=20,
                                     warmup=1, batch_size=10, lr=5e-4),
}
QUERIES = 20                                # test clouds of each class in an episode
SYNTHETIC = (20, 20)                        # objects of each class, to train and to test
SAMPLES = 4                                 # of each training cloud, drawn before the first epoch
VARIANTS = ("frozen", "shuffled", "random", "unfreeze", "no-task-token", "deep-prompt",
            "no-transformer")

TABLE3 = [(5, 10), (5, 20), (10, 10), (10, 20), (30, 10)]
PUBLISHED = {                               # best epoch on the test clouds
    "PointBERT, paper's Table 3": "94.6 ± 3.1,96.3 ± 2.7,91.0 ± 5.4,92.7 ± 5.1,81.4 ± 2.4",
    "MaskPoint, paper's Table 3": "95.0 ± 3.7,97.2 ± 1.7,91.4 ± 4.0,93.4 ± 3.5,80.7 ± 4.9",
    "EPCL, paper's Table 3": "95.1 ± 2.7,97.3 ± 1.6,91.1 ± 4.2,93.5 ± 3.8,81.7 ± 0.7"}
PUBLISHED_16 = {"PointCLIP, paper's Table 5": "83.8", "Simple3D-Former, paper's Table 5": "76.2",
                "EPCL, paper's Table 5": "85.2"}


# ---- Episodes ------------------------------------------------------------------------------------
class Objects(NamedTuple):
    xyz: torch.Tensor                       # (S, stored, 3) float32
    label: torch.Tensor                     # (S,) int64
    text: torch.Tensor = None               # (way, 512) CLIP's features of the class names


class Data(NamedTuple):
    train: Objects
    test: Objects
    classes: tuple                          # names; label = index
    form: str                               # what was read


class Episode(NamedTuple):
    """Which clouds: rows of the data set's training and test part, class after class."""
    classes: list                           # (way,) labels of the data set, by episode label
    train: list                             # way lists of `shot` rows
    test: list                              # way lists of rows


def draw_episode(train_label, test_label, classes, way, shot, queries, seed):
    """K classes, N training and `queries` test clouds of each, without replacement.

    queries 0 takes every test cloud of the classes: PointCLIP's protocol, Table 5. The classes of
    one episode, and the clouds of one class, depend on the seed and on nothing drawn before.
    """
    if way > len(classes):
        raise InputError(f"{way} ways, but there are {len(classes)} classes; pass --way "
                         f"{len(classes)} or less")
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(classes))[:way]                # (way,)
    rows = {"train": [], "test": []}
    for part, label, want in (("train", train_label, shot), ("test", test_label, queries)):
        for c in chosen:
            found = rng.permutation(np.flatnonzero(label == c))
            if len(found) < max(want, 1):
                cure = "pass a smaller --shot" if part == "train" else "add clouds"
                raise InputError(f"class {classes[c]} has {len(found)} {part} clouds, an episode "
                                 f"needs {max(want, 1)}; {cure}, or leave the class out of the "
                                 "data")
            rows[part].append(found[:want or None].tolist())
    return Episode(chosen.tolist(), rows["train"], rows["test"])


def write_episode(path, episode, data):
    """JSON that `--folds` reads: class names, rows of clouds, how many clouds there were."""
    path.parent.mkdir(parents=True, exist_ok=True)
    classes = [data.classes[c] for c in episode.classes]
    counts = {"train": len(data.train.label), "test": len(data.test.label)}
    content = {"classes": classes, "train": episode.train, "test": episode.test, "of": counts}
    path.write_text(json.dumps(content), encoding="utf-8")


def find_fold(folder, way, shot, i, must=True):
    """The file of episode i: our .json, or the published .pkl, under either name of its folder."""
    for name in (f"{way}way_{shot}shot", f"{way}way{shot}shot"):
        for suffix in (".json", ".pkl"):
            path = Path(folder) / name / f"{i}{suffix}"
            if path.is_file():
                return path
    if not must:
        return None
    fewer = f"pass --episodes {i}, or " if i else ""
    raise InputError(f"--folds {folder}: found no {way}way_{shot}shot/{i}.pkl or {i}.json; {fewer}"
                     "leave --folds out to draw episodes")


def read_episode(path, data, way, shot):
    """An episode of `write_episode`, checked against the data at hand."""
    with reading(path, "not an episode file; take the run's own again"):
        saved = read_json(path)
        names, parts, of = saved["classes"], [saved["train"], saved["test"]], saved["of"]
        counts = [len(part) for part in parts]
        numbers = [row for part in parts for r in part for row in r] + [of["train"], of["test"]]
        if not all(type(number) is int for number in numbers) or type(names) is not list:
            raise ValueError("its rows are not whole numbers, or its classes not a list")
        rows = [np.concatenate([np.array(r, np.int64) for r in part]) for part in parts]
    if counts != [way, way] or len(names) != way or any(len(r) != shot for r in parts[0]):
        raise InputError(f"{path}: is not a {way}-way {shot}-shot episode")
    for name in names:
        if name not in data.classes:
            raise InputError(f"{path}: names the class {name}, which is not in the data; pass the "
                             "--data and --root it was drawn from")
    classes = [data.classes.index(name) for name in names]
    for part, have, found, lists in zip(("train", "test"), data[:2], rows, parts):
        truth = np.repeat(classes, [len(r) for r in lists])
        if of[part] != len(have.label) or not ((0 <= found) & (found < len(have.label))).all() \
                or (have.label.numpy()[found] != truth).any():
            raise InputError(f"{path}: names {part} clouds that are not in the data ({of[part]:,} "
                             f"clouds then, {len(have.label):,} now); pass the --data and --root "
                             "it was drawn from")
    return Episode(classes, *parts)


def clouds_of(episode, data):
    """-> train, test: Objects with labels 0..way-1; the classes as labels of the data set."""
    parts = []
    for have, rows in zip(data[:2], (episode.train, episode.test)):
        label = torch.arange(len(rows)).repeat_interleave(torch.tensor([len(r) for r in rows]))
        parts.append(Objects(have.xyz[torch.tensor(sum(rows, []))], label))
    return *parts, episode.classes


def clouds_of_fold(path, classes, way, shot, recipe):
    """A published fold of Point-BERT -> the same as `clouds_of`."""
    parts, labels = read_fold(path, classes, way, shot, recipe.points)
    scale = objects.unit_sphere if recipe.unit else torch.as_tensor
    train, test = (Objects(scale(torch.from_numpy(xyz)), torch.from_numpy(label))
                   for xyz, label in parts)
    return train, test, labels


# ---- Data: stored clouds -> the points of a step -------------------------------------------------
def load_data(cfg):
    """-> Data, scaled as the recipe says."""
    recipe = Recipe(**cfg["recipe"])
    if cfg["data"] == "synthetic":
        from data.synthetic_objects import OBJECT_CLASSES, object_clouds
        parts = [object_clouds(n, recipe.stored, seed) for seed, n in zip((1, 2), SYNTHETIC)]
        classes, form = OBJECT_CLASSES, "procedural objects of data/synthetic_objects.py"
    else:
        path = objects.prepare(cfg["data"], cfg["root"], recipe.stored, cfg["workers"])
        if "split" not in cfg:
            cfg["split"] = objects.split_of(path, cfg["test_fraction"])
        *parts, classes, form = objects.load(path, recipe.points, cfg["test_fraction"],
                                             cfg["split"])
    train, test = (Objects(*map(torch.from_numpy, part)) for part in parts)
    if recipe.unit:
        train = train._replace(xyz=objects.unit_sphere(train.xyz))
        test = test._replace(xyz=objects.unit_sphere(test.xyz))
    return Data(train, test, classes, form)


def presample(xyz, recipe, device):
    """SAMPLES samples of every training cloud, from random starts: (S, P, 3) -> (S, SAMPLES, m, 3).

    The field's loaders repeat this in every step: the 1200 farthest points, for 1024 of them. Drawn
    once, an epoch of an episode is free of farthest point sampling.
    """
    m = min(xyz.shape[1], recipe.points * 75 // 64)             # 1024 -> 1200, 2048 -> 2400
    orders = torch.rand(SAMPLES, *xyz.shape[:2]).argsort(2)     # on the CPU, for every device
    samples = [farthest(gather(xyz, order).to(device), m) for order in orders]
    return torch.stack(samples, 1)


@record_function("data")
def augment(samples, n, draw):
    """One of the samples, n of its points, each axis scaled by 2/3 .. 3/2 and shifted by
    -0.2 .. 0.2: (B, SAMPLES, m, 3) -> (B, n, 3). No rotation. draw: a torch.Generator."""
    b, s, m, _ = samples.shape
    by = {"device": samples.device, "generator": draw}
    points = samples[torch.arange(b, device=samples.device), torch.randint(s, (b,), **by)]
    points = points[:, torch.randperm(m, **by)[:n]]
    share = torch.rand(2, b, 1, 3, **by)
    return points * (2 / 3 + share[0] * 5 / 6) + (share[1] * 0.4 - 0.2)


# ---- One episode ---------------------------------------------------------------------------------
@torch.no_grad()
def accuracy(model, points, label, setup, batch=64):
    """The share of clouds (S, N, 3) that get their own label."""
    model.eval()
    correct = torch.zeros((), dtype=torch.int64, device=setup.device)
    for x, truth in zip(points.split(batch), label.split(batch)):
        with setup.autocast():
            logits, _ = model(x)                                # (b, way)
        correct += (logits.argmax(1) == truth).sum()
    return correct.item() / len(label)


@torch.no_grad()
def picture(model, shots, test, names, setup, up):
    """look.png: three shots and five queries of an episode's first ten classes, as classified."""
    model.eval()
    lists = [[part.xyz[part.label == k][:most] for k in range(len(names))][:10]
             for part, most in ((shots, 3), (test, 5))]
    few = [min(map(len, clouds)) for clouds in lists]
    cells = []
    for k, (learned, asked) in enumerate(zip(*lists)):
        cells += [render.Cell(render.draw_object(x.cpu(), 120, up), f"{names[k]}\nshot")
                  for x in learned[:few[0]]]
        with setup.autocast():
            found = model(asked[:few[1]])[0].argmax(1).tolist()
        for x, i in zip(asked, found):
            drawn = render.draw_object(x.cpu(), 120, up)
            cells.append(render.Cell(drawn, f"{names[k]}\nnamed {names[i]}",
                                     render.GREEN if i == k else render.RED))
    return render.sheet(cells, columns=sum(few), title="shots and queries of the first episode; "
                        f"right ones green, wrong ones red; {up} points up")


def train_episode(model, data, test, run, seed, bar):
    """Train on samples (S, SAMPLES, m, 3), test on clouds (Q, N, 3).

    -> test accuracy of each epoch, None where it was not tested; or None after Ctrl-C.
    """
    cfg, setup, recipe = run.cfg, run.setup, Recipe(**run.cfg["recipe"])
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe.decay), lr=recipe.lr)
    count = len(data.label)
    steps = max(1, -(-count // recipe.batch_size))
    if steps > 1 and 0 < count % recipe.batch_size < 2 * cfg["accumulate"]:
        steps -= 1                          # too few for batch norm: they join the last full batch
    curve = []
    for epoch in range(recipe.epochs):
        torch.manual_seed(seed_of(*seed, epoch))        # dropout
        # another model may draw other numbers for dropout; clouds and samples stay the same
        run.draw = torch.Generator(setup.device).manual_seed(seed_of(*seed, epoch))
        model.train()
        order, loss = torch.randperm(count, device=setup.device, generator=run.draw), 0
        for step in range(steps):
            rows = order[step * recipe.batch_size:]
            rows = rows[:recipe.batch_size] if step + 1 < steps else rows
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(epoch + step / steps, recipe.lr, recipe.epochs,
                                            recipe.warmup)
            loss = loss + train_step(model, optimizer, data, rows, run)
        if not torch.isfinite(loss):
            raise InputError(f"the loss is not finite in epoch {epoch + 1} of an episode; finished "
                             "episodes are saved; try a lower --lr or --precision fp32")
        tested = (epoch + 1) % recipe.every == 0 or epoch + 1 == recipe.epochs
        curve.append(accuracy(model, test.xyz, test.label, setup) if tested else None)
        bar.update()
        if run.stopper.now(0):
            return None
    return curve


def train_step(model, optimizer, data, rows, run):
    """One step on the clouds `rows`. -> the loss; no value is read back from the device."""
    cfg, setup = run.cfg, run.setup
    optimizer.zero_grad(set_to_none=True)
    loss = 0
    for mine in rows.tensor_split(cfg["accumulate"]):
        with setup.autocast():
            points = augment(data.xyz[mine], cfg["recipe"]["points"], run.draw)
            logits, embedding = model(points)
        terms = loss_terms(logits, embedding, data.label[mine], data.text, cfg["text_loss"])
        part = sum(terms) / len(rows)
        part.backward()
        loss = loss + part.detach()
    nn.utils.clip_grad_norm_(model.parameters(), cfg["recipe"]["clip_norm"])
    optimizer.step()
    return loss


class Encoders:
    """The transformers of the variants, each loaded once, and the text features of all classes.

    All variants learn from the text features of --clip, so that a pair differs in one thing alone.
    """

    def __init__(self, cfg, classes, setup):
        self.cfg, self.setup = cfg, setup
        clip = pretrained.load_clip(cfg["clip"], cfg["seed"])
        self.name, self.model, self.sha256 = clip.name, clip.model, clip.sha256
        text = prompt_features(clip, classes) if cfg["text_loss"] != "off" else None
        self.no_text = "" if cfg["text_loss"] == "off" else f": {clip.name} {clip.no_text}"
        self.text = None if text is None else text.to(setup.device)         # (C, 512)
        self.frozen, self.shuffled, self.random, self.unfrozen = self.hold(clip), None, None, None
        if "shuffled" in cfg["compare"]:
            self.shuffled = self.hold(pretrained.load_clip(f"{clip.name}=shuffled", cfg["seed"]))
        if "random" in cfg["compare"]:
            # nano=FILE has sizes of its own
            twin = clip.model
            if twin == "nano":
                twin = pretrained.base_of(cfg["clip"]).removesuffix("=random")
            self.random = self.hold(pretrained.load_clip(f"{twin}=random", cfg["seed"]))
        if "unfreeze" in cfg["compare"]:
            self.unfrozen = pretrained.load_clip(cfg["clip"], cfg["seed"], trainable=True)
            self.unfrozen.text = None

    def hold(self, clip):
        clip.text = None                                        # the text tower is not needed again
        if self.setup.bf16:
            clip.half_weights()
        return clip.to(self.setup.device)

    def classifier(self, variant, way, seed):
        """A fresh model; frozen, shuffled, random and unfreeze start from the same numbers."""
        clip = {"shuffled": self.shuffled, "random": self.random}.get(variant, self.frozen)
        if variant == "unfreeze":
            clip = copy.deepcopy(self.unfrozen)                 # as CLIP was at first
        torch.manual_seed(seed_of(*seed))
        flags = {name: variant == name.replace("_", "-") for name in ABLATIONS}
        cfg = {"recipe": self.cfg["recipe"], **flags}
        return Classifier(clip, way, cfg).to(self.setup.device)


# ---- Statistics and tables -----------------------------------------------------------------------
def mean_std(scores):
    """Mean and population standard deviation, as numpy's default and so, likely, the field's."""
    return float(np.mean(scores)), float(np.std(scores))


def paired(scores, reference):
    """Mean difference over the same episodes, and its 95 % interval by Student's t.

    -> mean, low, high; the interval is infinite for one episode.
    """
    difference = np.asarray(scores) - np.asarray(reference)
    n, mean = len(difference), float(difference.mean())
    if n < 2:
        return mean, -np.inf, np.inf
    half = float(stdtrit(n - 1, 0.975) * difference.std(ddof=1) / np.sqrt(n))
    return mean, mean - half, mean + half


def name_of(setting):
    return "{}w{}s".format(*setting)


def percent(scores):
    return "{:.1f} ± {:.1f}".format(*(100 * x for x in mean_std(scores)))


def report(done, cfg, clip):
    """Lines of the final tables. done: one dict for each finished training."""
    def scores(setting, variant, key):      # in the order of the episodes: this is what pairs them
        rows = [r for r in done if (tuple(r["setting"]), r["variant"]) == (setting, variant)]
        return [r[key] for r in sorted(rows, key=lambda r: r["episode"])]

    settings, where = [tuple(s) for s in cfg["settings"]], f"{cfg['data']}, {clip}"
    count = len(scores(settings[0], cfg["compare"][0], "last"))
    lines = [f"accuracy in %, mean ± population standard deviation over {count} episodes; {where}"]
    if cfg["table"]:
        rows = {"": map(name_of, TABLE3)}
        for variant in cfg["compare"]:
            for label, key in (("last epoch", "last"), ("best epoch on test", "best")):
                rows[f"{variant}, {label}"] = [
                    percent(scores(s, variant, key)) if s in settings else "-" for s in TABLE3]
        rows.update({name: cells.split(",") for name, cells in PUBLISHED.items()})
        for name, cells in rows.items():
            lines.append(f"{name:40s}" + "".join(f"{cell:>13}" for cell in cells))
        lines.append("the last three rows: ModelNet40, CLIP ViT-B/32 or a model pretrained on "
                     "point clouds, presumably the best epoch on test")
    else:
        lines.append(f"{'':24s}{'last epoch':>13}{'best epoch on test':>20}{'seconds':>9}")
        for s in settings:
            for v in cfg["compare"]:
                last, best = (percent(scores(s, v, key)) for key in ("last", "best"))
                seconds = sum(scores(s, v, "seconds"))
                lines.append(f"{name_of(s) + ' ' + v:24s}{last:>13}{best:>20}{seconds:9.0f}")
        if cfg["shots_all"]:
            lines += [f"{name:40s}{score:>6}" for name, score in PUBLISHED_16.items()]
    first = cfg["compare"][0]
    for s in settings if len(cfg["compare"]) > 1 else ():
        lines.append(f"{name_of(s)}: difference to {first} on the same episodes, last epoch, in "
                     "points, and its 95 % interval")
        reference = scores(s, first, "last")
        for v in cfg["compare"][1:]:
            mean, low, high = (100 * x for x in paired(scores(s, v, "last"), reference))
            interval = f"   [{low:+.1f}, {high:+.1f}]" * (low > -np.inf)    # none of one episode
            lines.append(f"    {v:20s}{mean:+6.1f}{interval}")
    return lines


# ---- Main ----------------------------------------------------------------------------------------
def list_episodes(cfg, data, classes, own=None):
    """-> {(way, shot, i): Episode, or the path of a published fold}; settles cfg["settings"].

    own: the folder where a run that goes on wrote its episodes down.
    """
    folds = cfg["folds"] or own
    if cfg["shots_all"]:
        cfg["settings"] = [[len(classes), cfg["shots_all"]]]
    if cfg["table"]:
        cfg["settings"] = [
            list(s) for s in TABLE3 if s[0] <= len(classes)     # the field has no 30-way folds
            and (not folds or find_fold(folds, *s, 0, must=False))]
        if not cfg["settings"]:
            raise InputError(f"--table: nothing of Table 3 is in {folds or data.form}; pass --way "
                             "and --shot")
    episodes = {}
    for key in [(*s, i) for s in cfg["settings"] for i in range(cfg["episodes"])]:
        if not folds:
            episodes[key] = draw_episode(
                data.train.label.numpy(), data.test.label.numpy(), classes, *key[:2],
                0 if cfg["shots_all"] else QUERIES, [cfg["seed"], *key])
            continue
        path = find_fold(folds, *key)
        if (path.suffix == ".pkl") != cfg["published"]:
            raise InputError(f"--folds {folds}: .pkl and .json files are mixed; keep one kind")
        episodes[key] = path if cfg["published"] else read_episode(path, data, *key[:2])
    return episodes


def main(argv=None):
    args = flags(argv)
    cfg, saved, folder = settings(args)
    if args.eval:
        print("\n".join(report(saved["done"], cfg, saved["frozen"]["name"])))
        return
    setup = Setup(args.device, cfg["precision"])
    if not saved:
        cfg["published"] = bool(cfg["folds"]) and find_fold(
            cfg["folds"], *cfg["settings"][0], 0).suffix == ".pkl"
    if cfg["published"] and cfg["data"] != "modelnet40":
        raise InputError(f"--folds {cfg['folds']}: holds folds of ModelNet40; pass --data "
                         "modelnet40")
    data = None if cfg["published"] else load_data(cfg)         # published folds hold their clouds
    classes, form = MODELNET40, f"folds of {cfg['folds']}"
    if data:
        classes, form = data.classes, data.form
    if args.test_fraction and not cfg.get("split"):
        raise InputError("--test-fraction: the data have a test set of their own; leave it out")
    cfg["up"] = objects.up_of(form)
    episodes = list_episodes(cfg, data, classes, folder / "episodes" if saved else None)
    for way, shot in cfg["settings"]:
        common.check_batch(way * shot, cfg)
    encoders = Encoders(cfg, classes, setup)
    if encoders.text is None and args.text_loss in ("raw", "cosine"):
        raise InputError(f"--text-loss {args.text_loss}{encoders.no_text}; pass --text-loss off")
    random = encoders.random
    if random and len(cfg["compare"]) > 1 and encoders.sha256 == random.sha256:
        raise InputError(f"--compare random: {encoders.name} is random already; pass a --clip with "
                         "pretrained weights, or leave random out")
    check_frozen(cfg, saved, encoders)
    done, total = saved["done"] if saved else [], len(episodes) * len(cfg["compare"])
    run = Run("fewshot", cfg, setup, saved)
    run.open(__file__, folder or args.out, kept=len(done))
    for (way, shot, i), episode in episodes.items():
        if data:
            write_episode(run.folder / f"episodes/{way}way_{shot}shot/{i}.json", episode, data)
    save(run, done, total)
    after = f", resumed after {len(done)} trainings" if saved else ""
    describe(run, encoders, classes, form, after)
    with run.stopper:
        train(episodes, data, classes, encoders, done, total, run)
    for line in report(done, cfg, encoders.name):
        run.print(line)
    main_one = [list(cfg["settings"][0]), cfg["compare"][0]]
    first = [r for r in done if [r["setting"], r["variant"]] == main_one]
    (mean, std), (best, best_std) = (mean_std([r[k] for r in first]) for k in ("last", "best"))
    run.write("results.json", {
        "task": "fewshot", "data": cfg["data"], "clip": cfg["frozen"], "seed": cfg["seed"],
        "metrics": {"accuracy": mean, "population_std": std, "setting": name_of(cfg["settings"][0]),
                    "variant": cfg["compare"][0]},
        "best_on_test": {"accuracy": best, "population_std": best_std},
        "epoch": cfg["recipe"]["epochs"], "seconds": sum(r["seconds"] for r in done),
        "parameters": {"trainable": first[0]["trained"], "frozen": first[0]["frozen"]},
        "device": setup.describe, "form": form, "trainings": done})
    run.print(f"look     {run.folder}/look.png")


def describe(run, encoders, classes, form, after):
    """The first lines of a run: what was decided."""
    cfg = run.cfg
    names = ", ".join(f"{way}-way {shot}-shot" for way, shot in cfg["settings"])
    tested = "the whole test set" if cfg["shots_all"] else f"{QUERIES} test clouds of each class"
    source = f"; from {cfg['folds']}" if cfg["folds"] else ""
    run.print(f"device   {run.setup.describe}; torch {torch.__version__}; seed {cfg['seed']}")
    run.print(f"data     {cfg['data']}: {len(classes)} class{'es' * (len(classes) > 1)}, "
              f"{cfg['recipe']['points']} points; {form}")
    run.print(f"episodes {cfg['episodes']} of each of {names}, {tested}{source}")
    for way, shot in TABLE3 if cfg["table"] else ():
        why = f"there are {len(classes)} classes" if way > len(classes) else "there is no such fold"
        if [way, shot] not in cfg["settings"]:
            run.print(f"         {way}-way {shot}-shot is left out: {why}")
    text = f"text loss with {len(classes)} prompts, {cfg['text_loss']} products"
    if encoders.text is None:
        text = f"no text loss{encoders.no_text}"
    run.print(f"encoder  {encoders.name}; {text}")
    for variant in cfg["compare"]:
        sizes = common.sizes(encoders.classifier(variant, cfg["settings"][0][0], [0]))
        run.print("model    {}: {:,} weights trained, {:,} frozen".format(variant, *sizes))
    common.print_warning(run.print, encoders.name)
    run.print(f"run      {run.folder}{after}")


def save(run, done, total):
    """last.pt holds no weights: an episode that was not finished is trained anew."""
    epochs = run.cfg["recipe"]["epochs"] if len(done) == total else 0
    run.write("last.pt", {"task": "fewshot", "config": run.cfg, "frozen": run.cfg["frozen"],
                          "done": done, "at": {"epoch": epochs}, "optimizer": None})


def train(episodes, data, classes, encoders, done, total, run):
    """Train what is left to do, append to `done`, save after each training."""
    cfg, setup = run.cfg, run.setup
    recipe, prepared = Recipe(**cfg["recipe"]), None
    todo = [(key, variant) for key in episodes for variant in cfg["compare"]][len(done):]
    bar = tqdm(total=len(todo) * recipe.epochs, unit="epoch", leave=False, disable=None)
    for key, variant in todo:
        (way, shot, i), started = key, time.time()
        seed = [cfg["seed"], *key]
        if key != prepared:                 # once for all variants: the same samples for each
            if isinstance(episodes[key], Episode):
                shots, queries, labels = clouds_of(episodes[key], data)
            else:
                shots, queries, labels = clouds_of_fold(episodes[key], classes, way, shot, recipe)
            torch.manual_seed(seed_of(*seed))
            # row j of the text features is the prompt of the class whose episode label is j
            samples = Objects(presample(shots.xyz, recipe, setup.device),
                              shots.label.to(setup.device),
                              None if encoders.text is None else encoders.text[labels])
            test = Objects(farthest(queries.xyz.to(setup.device), recipe.points),
                           queries.label.to(setup.device))
            prepared = key
        model = encoders.classifier(variant, way, seed)
        curve = train_episode(model, samples, test, run, seed, bar)
        if curve is None:
            bar.close()
            run.print(f"stopped after {len(done)} of {total} trainings; go on with: "
                      f"python train_fewshot.py --resume {run.folder}")
            sys.exit(130)
        best, best_epoch = max((found, epoch) for epoch, found in enumerate(curve, 1)
                               if found is not None)            # a tie goes to the later epoch
        trained, frozen = common.sizes(model)
        line = {"setting": [way, shot], "episode": i, "variant": variant, "last": curve[-1],
                "best": best, "best_epoch": best_epoch, "seconds": time.time() - started,
                "trained": trained, "frozen": frozen, "classes": [classes[c] for c in labels]}
        done.append(line)
        bar.clear()
        if len(done) == 1:
            points = shots._replace(xyz=shots.xyz[:, :recipe.points])
            render.save(run.folder / "look.png", picture(model, points, test, line["classes"],
                                                         setup, cfg["up"]))
        names = "  " + " ".join(line["classes"]) if way <= 10 else ""
        run.print(f"{way}w{shot}s episode {i + 1}/{cfg['episodes']} {variant:15s}"
                  f"{100 * curve[-1]:6.1f} %  (best on test {100 * best:.1f} in epoch "
                  f"{best_epoch})  {line['seconds']:6.1f} s{names}")
        run.append("metrics.jsonl", json.dumps({**line, "curve": curve}) + "\n")
        save(run, done, total)
    bar.close()


def variants(text):
    """argparse type of --compare: names, the first is what the others are compared with."""
    names = text.split(",")
    for name in names:
        if name not in VARIANTS:
            raise argparse.ArgumentTypeError(f"{name} is none of {','.join(VARIANTS)}")
    if len(set(names)) < len(names):
        raise argparse.ArgumentTypeError("a name occurs twice")
    return names


def flags(argv):
    parser = recipe_parser(__doc__, RECIPES)
    flag = parser.add_argument
    flag("--way", type=whole(2), metavar="K", help="classes of an episode (default 5)")
    flag("--shot", type=whole(1), metavar="N", help="training clouds of each (default 10)")
    flag("--episodes", type=whole(1), metavar="E", help="default 10; with --shots-all 5")
    flag("--table", action="store_true", help="Table 3: 5w10s, 5w20s, 10w10s, 10w20s, 30w10s")
    flag("--shots-all", type=whole(1), metavar="N",
         help="Table 5: N clouds of every class, tested on the whole test set (paper: 16)")
    flag("--compare", type=variants, metavar="A,B,...",
         help=f"variants on the same episodes, paired with the first: {','.join(VARIANTS)}")
    flag("--folds", metavar="DIR", help="episodes from files: Point-BERT's 5way_10shot/0.pkl, or a "
                                        "run's own episodes/ (default: drawn from --seed)")
    shared_flags(parser, pretrained.CLIP_NAMES)
    flag("--points", type=whole(1, 10**6), metavar="N", help="points of a cloud")
    flag("--groups", type=whole(1), metavar="G", help="patches of a cloud")
    flag("--neighbours", type=whole(1), metavar="K", help="points of a patch, at most 64")
    flag("--text-loss", choices=["raw", "cosine", "off"],
         help="similarities with CLIP's text features (default: raw, as released for "
              "classification)")
    flag("--test-fraction", type=float, metavar="F",
         help="--data folder without train/ and test/: share set aside to test (default 0.2)")
    return parser.parse_args(argv)


def check_sizes(recipe):
    if recipe.groups > recipe.points or recipe.neighbours > min(64, recipe.points):
        raise InputError(f"--groups {recipe.groups} must be at most --points {recipe.points}, "
                         f"--neighbours {recipe.neighbours} at most {min(64, recipe.points)}")


SAVED = {                                   # forms of the settings that are this script's own
    "data": (*RECIPES,), "way": COUNT, "shot": COUNT, "table": bool, "shots_all": (None, COUNT),
    "episodes": range(1, 10**5), "settings": [[COUNT, COUNT]], "folds": (None, str),
    "compare": [VARIANTS], "text_loss": ("raw", "cosine", "off"), "test_fraction": float,
    "published": bool, "split": (..., None, [[str], [str]])}
DONE = {"setting": [COUNT, COUNT], "episode": WHOLE, "variant": VARIANTS, "last": float,
        "best": float, "best_epoch": COUNT, "seconds": float, "trained": WHOLE, "frozen": WHOLE,
        "classes": [str]}
KEPT = {"frozen": checkpoint_form(0)["frozen"], "at": {"epoch": WHOLE}, "optimizer": None,
        "done": [DONE]}


def settings(args):
    """Flags over a recipe or a saved run -> config, saved state or None, run folder or None."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("train_fewshot.py runs in one process; start one for each --way and "
                         "--shot")
    if args.compile:
        raise InputError("--compile: every episode would be compiled anew; leave it out")
    if args.resume or args.eval:
        cfg, saved, folder = saved_settings(args, "fewshot", Recipe, SAVED, KEPT)
        check_sizes(Recipe(**cfg["recipe"]))
        given = [name for name in ("clip", "root", "workers", "precision", "device")
                 if args.eval and getattr(args, name)]
        if given:
            raise InputError("--eval prints what is saved and reads no weights and no data; leave "
                             f"--{' and --'.join(given)} out")
        order = [*itertools.product(cfg["settings"], range(cfg["episodes"]), cfg["compare"])]
        done = [(r["setting"], r["episode"], r["variant"]) for r in saved["done"]]
        if not order or done != order[:len(done)]:
            raise InputError(f"{folder}: checkpoint.done does not follow from its config; start "
                             "anew")
        if args.eval and len(done) < len(order):
            raise InputError(f"--eval {args.eval}: the run is not finished; --resume {args.eval} "
                             "goes on")
        return cfg, saved, folder
    recipe = with_flags(RECIPES[args.data or "synthetic"], args)
    recipe = recipe._replace(stored=max(recipe.stored, recipe.points))
    check_sizes(recipe)
    if bool(args.table) + bool(args.shots_all) + bool(args.way or args.shot) > 1:
        raise InputError("--table, --shots-all and --way with --shot name three protocols; give "
                         "one")
    if args.shots_all and args.folds:
        raise InputError("--shots-all draws its own clouds; leave --folds out")
    named = [name.replace("_", "-") for name in ABLATIONS if getattr(args, name)]
    if len(named) > 1 or named and args.compare:
        raise InputError(f"--{' and --'.join(named)}: one variant at a time; --compare trains "
                         "several")
    fraction = 0.2 if args.test_fraction is None else args.test_fraction
    if not 0 < fraction < 1:
        raise InputError("--test-fraction must lie between 0 and 1")
    way, shot = args.way or 5, args.shot or 10
    cfg = shared_settings(args, recipe)
    return {**cfg, "way": way, "shot": shot, "table": args.table, "shots_all": args.shots_all,
            "settings": [list(s) for s in TABLE3] if args.table else [[way, shot]],
            "episodes": args.episodes or (5 if args.shots_all else 10), "folds": args.folds,
            "compare": args.compare or named or ["frozen"], "text_loss": args.text_loss or "raw",
            "test_fraction": fraction}, None, None


if __name__ == "__main__":
    main_guard(main)
