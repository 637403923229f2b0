"""Few-shot classification with EPCL: K ways, N shots (paper section 4.4, Tables 3 and 5).

    python train_fewshot.py                                    built-in objects, no download
    python train_fewshot.py --data modelnet40 --root DIR       5-way 10-shot (paper: 95.1 ± 2.7 %)
    python train_fewshot.py --data modelnet40 --root DIR --table               Table 3
    python train_fewshot.py --data modelnet40 --root DIR --shots-all 16        Table 5
    ... --compare frozen,random,no-transformer                 is it CLIP that helps?

An episode draws K classes, N training and 20 test clouds of each. Every episode trains a fresh
tokenizer, task token and head on the frozen transformer, which is loaded once. To change the data,
edit objects.py and RECIPES; the protocol, `draw_episode`; the head, `Classifier` in objects.py.
"""
import argparse
import copy
import json
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import stdtrit
from torch import nn
from tqdm import tqdm

import common
from common import InputError, gather
from kernels import farthest_point_sample
from objects import (MODELNET40, Classifier, NumpyOnly, Objects, broken, load_objects, loss_terms,
                     prompt_features, unit_sphere)

# --------------------------------------------------------------------------------------------------
# Recipe
# --------------------------------------------------------------------------------------------------


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


# EPCL released no few-shot code. modelnet40: epochs, warm-up, batch, clip_norm and patches are those
# that Point-BERT, MaskPoint and Point-MAE share (cfgs/fewshot.yaml); lr and decay are the paper's
# "for the whole experiment", 4.1; theirs are 5e-4 and 0.05. scanobjectnn, folder: the same over
# train_cls.py's points and scaling. synthetic: ours, sized for two CPU cores.
RECIPES = {
    #                     points groups neigh stored epochs warm batch  lr  decay clip drop unit
    "modelnet40":   Recipe( 1024,   64,   32,  8192,  150,   10,   32, 3e-4, .04, 10., 0.0, True),
    "scanobjectnn": Recipe( 2048,  128,   32,  2048,  150,   10,   32, 3e-4, .04, 10., 0.0, False),
    "folder":       Recipe( 1024,   64,   32,  8192,  150,   10,   32, 3e-4, .04, 10., 0.0, True),
    "synthetic":    Recipe(  256,   16,   16,  1024,   20,    1,   10, 5e-4, .04, 10., 0.0, True),
}
QUERIES = 20                                # test clouds of each class in an episode
SYNTHETIC = (20, 20)                        # objects of each class, to train and to test
SAMPLES = 4                                 # of each training cloud, drawn before the first epoch
VARIANTS = ("frozen", "random", "unfreeze", "no-task-token", "deep-prompt", "no-transformer")

TABLE3 = [(5, 10), (5, 20), (10, 10), (10, 20), (30, 10)]
PUBLISHED = {                               # ModelNet40, CLIP ViT-B/32, best epoch on the test clouds
    "PointBERT, paper's Table 3": ["94.6 ± 3.1", "96.3 ± 2.7", "91.0 ± 5.4", "92.7 ± 5.1", "81.4 ± 2.4"],
    "MaskPoint, paper's Table 3": ["95.0 ± 3.7", "97.2 ± 1.7", "91.4 ± 4.0", "93.4 ± 3.5", "80.7 ± 4.9"],
    "EPCL, paper's Table 3": ["95.1 ± 2.7", "97.3 ± 1.6", "91.1 ± 4.2", "93.5 ± 3.8", "81.7 ± 0.7"],
}
PUBLISHED_16 = {"PointCLIP, paper's Table 5": "83.8", "Simple3D-Former, paper's Table 5": "76.2",
                "EPCL, paper's Table 5": "85.2"}


# --------------------------------------------------------------------------------------------------
# Episodes
# --------------------------------------------------------------------------------------------------

class Episode(NamedTuple):
    """Which clouds: rows of the data set's training and test part, class after class."""
    classes: list                           # (way,) labels of the data set; position = episode label
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
                raise InputError(f"class {classes[c]} has {len(found)} {part} clouds, an episode needs "
                                 f"{max(want, 1)}; "
                                 + ("pass a smaller --shot" if part == "train" else "add clouds")
                                 + ", or leave the class out of the data")
            rows[part].append(found[:want or None].tolist())
    return Episode(chosen.tolist(), rows["train"], rows["test"])


def write_episode(path, episode, data):
    """JSON that `--folds` reads: names of classes, rows of clouds, and how many clouds there were."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({
        "classes": [data.classes[c] for c in episode.classes], "train": episode.train,
        "test": episode.test, "of": {"train": len(data.train.label), "test": len(data.test.label)}}))


def find_fold(folder, way, shot, i, must=True):
    """The file of episode i: our .json, or the published .pkl, under either name of its folder."""
    for name in (f"{way}way_{shot}shot", f"{way}way{shot}shot"):
        for suffix in (".json", ".pkl"):
            path = Path(folder) / name / f"{i}{suffix}"
            if path.is_file():
                return path
    if not must:
        return None
    raise InputError(f"--folds {folder}: found no {way}way_{shot}shot/{i}.pkl or {i}.json; "
                     + (f"pass --episodes {i}, or " if i else "") + "leave --folds out to draw episodes")


def read_episode(path, data, way, shot):
    """An episode of `write_episode`, checked against the data at hand."""
    try:
        saved = json.loads(path.read_text())
        names, parts, of = saved["classes"], [saved["train"], saved["test"]], saved["of"]
        rows = [np.concatenate([np.asarray(r, np.int64) for r in part]) for part in parts]
        counts = [len(part) for part in parts]
    except Exception as error:
        raise broken(path, error, "not an episode file; take the run's own again") from None
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
            raise InputError(f"{path}: names {part} clouds that are not in the data ({of[part]:,} clouds "
                             f"then, {len(have.label):,} now); pass the --data and --root it was drawn "
                             "from")
    return Episode(classes, *parts)


def clouds_of(episode, data):
    """-> train, test: Objects with labels 0..way-1; the classes as labels of the data set."""
    parts = []
    for have, rows in zip(data[:2], (episode.train, episode.test)):
        label = torch.arange(len(rows)).repeat_interleave(torch.tensor([len(r) for r in rows]))
        parts.append(Objects(have.xyz[torch.tensor(sum(rows, []))], label))
    return *parts, episode.classes


def read_pickle(path, classes, way, shot, recipe):
    """A published fold of Point-BERT -> the same as `clouds_of`.

    {"train": [(points (8192, 6), episode label, ModelNet40 label), ...], "test": [...]}. Read by an
    unpickler that admits numpy arrays and nothing else.
    """
    try:
        with open(path, "rb") as file:
            fold = NumpyOnly(file).load()
        table = [[(np.asarray(xyz, np.float32)[:, :3], int(np.asarray(k).item()),
                   int(np.asarray(c).item())) for xyz, k, c in fold[part]] for part in ("train", "test")]
        clouds = [np.stack([row[0] for row in part]) for part in table]
    except Exception as error:
        raise broken(path, error, "not a few-shot fold of Point-BERT: fetch it again") from None
    pairs = dict(sorted((k, c) for part in table for _, k, c in part))
    if any(pairs[k] != c for part in table for _, k, c in part) or list(pairs) != list(range(way)):
        raise InputError(f"{path}: its labels are not those of {way} ways; fetch it again")
    if max(pairs.values()) >= len(classes) or min(pairs.values()) < 0:
        raise InputError(f"{path}: names class {max(pairs.values())}, but the data have {len(classes)} "
                         "classes; pass the --data it was made for")
    if len(table[0]) != way * shot:
        raise InputError(f"{path}: holds {len(table[0])} training clouds, {way} ways of {shot} shots are "
                         f"{way * shot}")
    if not all(np.isfinite(xyz).all() for xyz in clouds) or clouds[0].shape[1] < recipe.points:
        raise InputError(f"{path}: has NaN coordinates, or clouds of fewer than {recipe.points} points")
    scale = unit_sphere if recipe.unit else torch.as_tensor
    train, test = (Objects(scale(torch.from_numpy(xyz)), torch.tensor([row[1] for row in part]))
                   for xyz, part in zip(clouds, table))
    return train, test, list(pairs.values())


# --------------------------------------------------------------------------------------------------
# Data: stored clouds -> the points of a step
# --------------------------------------------------------------------------------------------------

def load_data(cfg):
    """-> objects.Splits, scaled as the recipe says."""
    recipe = Recipe(**cfg["recipe"])
    splits = load_objects(cfg["data"], cfg["root"], recipe.stored, recipe.points,
                          cfg["test_fraction"], cfg["workers"], SYNTHETIC)
    if recipe.unit:
        splits = splits._replace(train=Objects(unit_sphere(splits.train.xyz), splits.train.label),
                                 test=Objects(unit_sphere(splits.test.xyz), splits.test.label))
    return splits


def farthest(xyz, m, batch=64):
    """The m farthest points of every cloud, from index 0: (S, P, 3) -> (S, m, 3)."""
    return torch.cat([gather(part, farthest_point_sample(part, m)) for part in xyz.split(batch)])


def presample(xyz, recipe, device):
    """SAMPLES samples of every training cloud, from random starts: (S, P, 3) -> (S, SAMPLES, m, 3).

    The field's loaders repeat this in every step: the 1200 farthest points, for 1024 of them. Drawn
    once, an epoch of an episode is free of farthest point sampling.
    """
    m = min(xyz.shape[1], recipe.points * 75 // 64)             # 1024 -> 1200, 2048 -> 2400
    order = torch.rand(SAMPLES, *xyz.shape[:2]).argsort(2)      # on the CPU: on every device the same
    samples = [farthest(gather(xyz, shuffled).to(device), m) for shuffled in order]
    return torch.stack(samples, 1)


def augment(samples, n):
    """One of the samples, n of its points, each axis scaled by 2/3 .. 3/2 and shifted by -0.2 .. 0.2:
    (B, SAMPLES, m, 3) -> (B, n, 3). No rotation."""
    b, s, m, _ = samples.shape
    points = samples[torch.arange(b, device=samples.device), torch.randint(s, (b,), device=samples.device)]
    points = points[:, torch.randperm(m, device=samples.device)[:n]]
    draw = torch.rand(2, b, 1, 3, device=samples.device)
    return points * (2 / 3 + draw[0] * 5 / 6) + (draw[1] * 0.4 - 0.2)


# --------------------------------------------------------------------------------------------------
# One episode
# --------------------------------------------------------------------------------------------------

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


def train_episode(model, samples, label, points, truth, text, cfg, setup, seed, tick):
    """Train on samples (S, SAMPLES, m, 3), test on points (Q, N, 3) after every epoch.

    -> test accuracy of each epoch. `tick` is called after each epoch; it may raise to stop.
    """
    recipe = Recipe(**cfg["recipe"])
    optimizer = torch.optim.AdamW(common.parameter_groups(model, recipe.decay), lr=recipe.lr)
    steps = max(1, -(-len(label) // recipe.batch_size))
    if steps > 1 and 0 < len(label) % recipe.batch_size < 2 * cfg["accumulate"]:
        steps -= 1                          # too few for batch norm: they join the last full batch
    curve = []
    for epoch in range(recipe.epochs):
        common.seed_all(*seed, epoch)
        model.train()
        order, loss = torch.randperm(len(label), device=setup.device), 0
        for step in range(steps):
            rows = order[step * recipe.batch_size:]
            rows = rows[:recipe.batch_size] if step + 1 < steps else rows
            for group in optimizer.param_groups:
                group["lr"] = common.learning_rate(epoch + step / steps, recipe.lr, recipe.epochs,
                                                   recipe.warmup)
            loss = loss + train_step(model, optimizer, samples, label, rows, text, recipe, cfg, setup)
        if not torch.isfinite(loss):
            raise InputError(f"the loss is not finite in epoch {epoch + 1} of an episode; finished "
                             "episodes are saved; try a lower --lr or --precision fp32")
        curve.append(accuracy(model, points, truth, setup))
        tick()
    return curve


def train_step(model, optimizer, samples, label, rows, text, recipe, cfg, setup):
    """One step on the clouds `rows`. -> the loss; no value is read back from the device."""
    optimizer.zero_grad(set_to_none=True)
    loss = 0
    for mine in rows.tensor_split(cfg["accumulate"]):
        with setup.autocast():
            logits, embedding = model(augment(samples[mine], recipe.points))
        part = sum(loss_terms(logits, embedding, label[mine], text, cfg["text_loss"])) / len(rows)
        part.backward()
        loss = loss + part.detach()
    nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
    optimizer.step()
    return loss


class Encoders:
    """The transformers of the variants, each loaded once, and the text features of all classes.

    All variants learn from the text features of --clip, so that a pair differs in one thing alone.
    """

    def __init__(self, cfg, classes, setup):
        self.cfg, self.setup = cfg, setup
        clip = common.load_clip(cfg["clip"], cfg["seed"])
        self.name, self.sha256, self.untrained = clip.name, clip.sha256, clip.untrained
        text = prompt_features(clip, classes) if cfg["text_loss"] != "off" else None
        self.text = None if text is None else text.to(setup.device)         # (C, 512)
        self.frozen, self.random, self.unfrozen = self.hold(clip), None, None
        if "random" in cfg["compare"]:
            self.random = self.hold(common.load_clip(self.untrained, cfg["seed"]))
        if "unfreeze" in cfg["compare"]:
            self.unfrozen = common.load_clip(cfg["clip"], cfg["seed"], trainable=True)
            self.unfrozen.text = None

    def hold(self, clip):
        clip.text = None                                        # the text tower has done its work
        if self.setup.bf16:
            clip.half_weights()
        return clip.to(self.setup.device)

    def classifier(self, variant, way, seed):
        """A fresh model; frozen, random and unfreeze start from the same numbers."""
        clip = self.random if variant == "random" else self.frozen
        if variant == "unfreeze":
            clip = copy.deepcopy(self.unfrozen)                 # every episode starts from CLIP again
        common.seed_all(*seed)
        flags = {name: variant == name.replace("_", "-") for name in common.ABLATIONS}
        return Classifier(clip, way, {"recipe": self.cfg["recipe"], **flags}).to(self.setup.device)


# --------------------------------------------------------------------------------------------------
# Statistics and tables
# --------------------------------------------------------------------------------------------------

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
        lines.append(" " * 40 + "".join(f"{name_of(s):>13}" for s in TABLE3))
        for variant in cfg["compare"]:
            for label, key in (("last epoch", "last"), ("best epoch on test", "best")):
                cells = [percent(scores(s, variant, key)) if s in settings else "-" for s in TABLE3]
                lines.append(f"{variant + ', ' + label:40s}" + "".join(f"{c:>13}" for c in cells))
        lines += [f"{name:40s}" + "".join(f"{c:>13}" for c in cells) for name, cells in PUBLISHED.items()]
        lines.append("the last three rows: ModelNet40, CLIP ViT-B/32 or a model pretrained on point clouds, "
                     "presumably the best epoch on test")
    else:
        lines.append(f"{'':24s}{'last epoch':>13}{'best epoch on test':>20}{'seconds':>9}")
        for s in settings:
            for v in cfg["compare"]:
                lines.append(f"{name_of(s) + ' ' + v:24s}{percent(scores(s, v, 'last')):>13}"
                             f"{percent(scores(s, v, 'best')):>20}{sum(scores(s, v, 'seconds')):9.0f}")
        if cfg["shots_all"]:
            lines += [f"{name:40s}{score:>6}" for name, score in PUBLISHED_16.items()]
    first = cfg["compare"][0]
    for s in settings if len(cfg["compare"]) > 1 else ():
        lines.append(f"{name_of(s)}: difference to {first} on the same episodes, last epoch, in points, "
                     "and its 95 % interval")
        for v in cfg["compare"][1:]:
            mean, low, high = (100 * x for x in paired(scores(s, v, "last"), scores(s, first, "last")))
            lines.append(f"    {v:20s}{mean:+6.1f}   [{low:+.1f}, {high:+.1f}]")
    return lines


# --------------------------------------------------------------------------------------------------
# Main
# --------------------------------------------------------------------------------------------------

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


class Stopped(Exception):
    """Ctrl-C in the middle of an episode."""


def main(argv=None):
    args = flags(argv)
    cfg, saved, folder = settings(args)
    if args.eval:
        print("\n".join(report(saved["done"], cfg, saved["frozen"]["name"])))
        return
    setup = common.Setup(args.device, cfg["precision"])
    recipe = Recipe(**cfg["recipe"])
    if not saved:
        cfg["published"] = bool(cfg["folds"]) and find_fold(
            cfg["folds"], *cfg["settings"][0], 0).suffix == ".pkl"
    if cfg["published"] and cfg["data"] != "modelnet40":
        raise InputError(f"--folds {cfg['folds']}: holds folds of ModelNet40; pass --data modelnet40")
    data = None if cfg["published"] else load_data(cfg)         # published folds hold their clouds
    classes, form = (data.classes, data.form) if data else (MODELNET40, f"folds of {cfg['folds']}")
    episodes = list_episodes(cfg, data, classes, folder / "episodes" if saved else None)
    encoders = Encoders(cfg, classes, setup)
    if "random" in cfg["compare"] and len(cfg["compare"]) > 1 and encoders.sha256 == encoders.random.sha256:
        raise InputError(f"--compare random: {encoders.name} is random already; pass a --clip with "
                         "pretrained weights, or leave random out")
    cfg["frozen"] = {"name": encoders.name, "sha256": encoders.sha256}
    done = saved["done"] if saved else []
    if saved:
        common.check_frozen(saved, encoders)
    run = common.Run(folder or common.new_folder(args.out, "fewshot", cfg["data"]))
    run.start(cfg, __file__, len(done) if saved else None)
    for (way, shot, i), episode in episodes.items():
        if data:
            write_episode(run.folder / f"episodes/{way}way_{shot}shot/{i}.json", episode, data)
    total = len(episodes) * len(cfg["compare"])

    def save():
        epochs = recipe.epochs if len(done) == total else 0
        run.save("last.pt", {"task": "fewshot", "config": cfg, "frozen": cfg["frozen"], "done": done,
                             "at": {"epoch": epochs}})

    save()
    todo = [(key, variant) for key in episodes for variant in cfg["compare"]][len(done):]

    run.print(f"device   {setup.describe}; torch {torch.__version__}; seed {cfg['seed']}")
    run.print(f"data     {cfg['data']}: {len(classes)} classes, {recipe.points} points; {form}")
    run.print(f"episodes {cfg['episodes']} of each of " + ", ".join(
        f"{way}-way {shot}-shot" for way, shot in cfg["settings"])
        + (", the whole test set" if cfg["shots_all"] else f", {QUERIES} test clouds of each class")
        + (f"; from {cfg['folds']}" if cfg["folds"] else ""))
    for way, shot in TABLE3 if cfg["table"] else ():
        if [way, shot] not in cfg["settings"]:
            why = "there is no such fold" if way <= len(classes) else f"there are {len(classes)} classes"
            run.print(f"         {way}-way {shot}-shot is left out: {why}")
    run.print(f"encoder  {encoders.name}; " + (f"text loss with {len(classes)} prompts, {cfg['text_loss']} "
              "products" if encoders.text is not None else "no text loss"))
    for variant in cfg["compare"]:
        trained, frozen = common.sizes(encoders.classifier(variant, cfg["settings"][0][0], [0]))
        run.print(f"model    {variant}: {trained:,} weights trained, {frozen:,} frozen")
    if encoders.name.endswith("random"):
        run.print("warning  the transformer has RANDOM weights: these numbers say nothing about CLIP")
    run.print(f"run      {run.folder}" + (f", resumed after {len(done)} trainings" if saved else ""))

    if not train(todo, episodes, data, classes, encoders, done, cfg, setup, run, save):
        run.print(f"stopped after {len(done)} of {total} trainings; go on with: "
                  f"python train_fewshot.py --resume {run.folder}")
        sys.exit(130)
    for line in report(done, cfg, encoders.name):
        run.print(line)
    first = [r for r in done if r["setting"] == list(cfg["settings"][0])
             and r["variant"] == cfg["compare"][0]]
    (mean, std), (best, best_std) = (mean_std([r[k] for r in first]) for k in ("last", "best"))
    run.write_json("results.json", {
        "task": "fewshot", "data": cfg["data"], "clip": cfg["frozen"], "seed": cfg["seed"],
        "metrics": {"accuracy": mean, "population_std": std, "setting": name_of(cfg["settings"][0]),
                    "variant": cfg["compare"][0]},
        "best_on_test": {"accuracy": best, "population_std": best_std}, "epoch": recipe.epochs,
        "seconds": sum(r["seconds"] for r in done),
        "parameters": {"trainable": first[0]["trained"], "frozen": first[0]["frozen"]},
        "device": setup.describe, "form": form, "trainings": done})


def train(todo, episodes, data, classes, encoders, done, cfg, setup, run, save):
    """Train what is left to do, append to `done`. -> was that the end."""
    recipe, stopper, now = Recipe(**cfg["recipe"]), common.Stopper(), None
    bar = tqdm(total=len(todo) * recipe.epochs, unit="epoch", leave=False, disable=None)

    def tick():
        bar.update()
        if stopper.now(0):
            raise Stopped

    for (way, shot, i), variant in todo:
        key, started = (way, shot, i), time.time()
        if key != now:                      # once for all variants: the same samples for each
            if isinstance(episodes[key], Episode):
                shots, queries, labels = clouds_of(episodes[key], data)
            else:
                shots, queries, labels = read_pickle(episodes[key], classes, way, shot, recipe)
            common.seed_all(cfg["seed"], *key)
            samples = presample(shots.xyz, recipe, setup.device)
            points = farthest(queries.xyz.to(setup.device), recipe.points)
            # labels of the text loss: row j is the prompt of the class whose episode label is j
            text = None if encoders.text is None else encoders.text[labels]
            label, truth, now = shots.label.to(setup.device), queries.label.to(setup.device), key
        model = encoders.classifier(variant, way, [cfg["seed"], *key])
        try:
            curve = train_episode(model, samples, label, points, truth, text, cfg, setup,
                                  [cfg["seed"], *key], tick)
        except Stopped:
            bar.close()
            return False
        best = max(range(len(curve)), key=lambda e: (curve[e], e))          # a tie goes to the later epoch
        trained, frozen = common.sizes(model)
        done.append({"setting": [way, shot], "episode": i, "variant": variant, "last": curve[-1],
                     "best": curve[best], "best_epoch": best + 1, "seconds": time.time() - started,
                     "trained": trained, "frozen": frozen, "classes": [classes[c] for c in labels]})
        bar.clear()
        run.print(f"{way}w{shot}s episode {i + 1}/{cfg['episodes']} {variant:15s}{100 * curve[-1]:6.1f} %  "
                  f"(best on test {100 * curve[best]:.1f} in epoch {best + 1})  {done[-1]['seconds']:6.1f} s"
                  + (f"  {' '.join(done[-1]['classes'])}" if way <= 10 else ""))
        run.metrics({**done[-1], "curve": curve})
        save()
    bar.close()
    return True


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
    rows = [("data", Recipe._fields), *RECIPES.items()]
    table = "\n".join(f"  {n:12s}" + "".join(f"{v!s:>11}" for v in row) for n, row in rows)
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog="recipes, the defaults of each --data:\n" + table,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--data", choices=RECIPES, help="data set (default: synthetic, built in)")
    flag("--way", type=common.whole(2), metavar="K", help="classes of an episode (default 5)")
    flag("--shot", type=common.whole(1), metavar="N", help="training clouds of each (default 10)")
    flag("--episodes", type=common.whole(1), metavar="E", help="default 10; with --shots-all 5")
    flag("--table", action="store_true", help="Table 3: 5w10s, 5w20s, 10w10s, 10w20s, 30w10s")
    flag("--shots-all", type=common.whole(1), metavar="N",
         help="Table 5: N clouds of every class, tested on the whole test set (paper: 16)")
    flag("--compare", type=variants, metavar="A,B,...",
         help=f"variants on the same episodes, paired with the first: {','.join(VARIANTS)}")
    flag("--folds", metavar="DIR", help="episodes from files: Point-BERT's 5way_10shot/0.pkl, or a run's "
                                        "own episodes/ (default: drawn from --seed)")
    common.shared_flags(parser)
    flag("--points", type=common.whole(1), metavar="N", help="points of a cloud")
    flag("--groups", type=common.whole(1), metavar="G", help="patches of a cloud")
    flag("--neighbours", type=common.whole(1), metavar="K", help="points of a patch, at most 64")
    flag("--text-loss", choices=["raw", "cosine", "off"],
         help="similarities with CLIP's text features (default: raw, as the classification release)")
    flag("--test-fraction", type=float, metavar="F",
         help="--data folder without train/ and test/: share set aside to test (default 0.2)")
    return parser.parse_args(argv)


def settings(args):
    """Flags over a recipe or a saved run -> config, saved state or None, run folder or None."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("train_fewshot.py runs in one process; start one for each --way and --shot")
    if args.compile:
        raise InputError("--compile: every episode would be compiled anew; leave it out")
    if args.resume or args.eval:
        cfg, saved, folder = common.saved_settings(args, "fewshot")
        if args.resume and saved["at"]["epoch"]:
            raise InputError(f"--resume {args.resume}: the run is finished; --eval {args.resume} prints "
                             "its table")
        if args.eval and not saved["at"]["epoch"]:
            raise InputError(f"--eval {args.eval}: the run is not finished; --resume {args.eval} goes on")
        return cfg, saved, folder
    given = {k: v for k, v in vars(args).items() if v is not None}
    data = given.get("data", "synthetic")
    recipe = RECIPES[data]._replace(**{k: given[k] for k in Recipe._fields if k in given})
    recipe = recipe._replace(warmup=min(recipe.warmup, recipe.epochs / 10),
                             stored=max(recipe.stored, recipe.points))
    if recipe.groups > recipe.points or recipe.neighbours > min(64, recipe.points):
        raise InputError(f"--groups {recipe.groups} must be at most --points {recipe.points}, "
                         f"--neighbours {recipe.neighbours} at most {min(64, recipe.points)}")
    if bool(args.table) + bool(args.shots_all) + bool(args.way or args.shot) > 1:
        raise InputError("--table, --shots-all and --way with --shot name three protocols; give one")
    if args.shots_all and args.folds:
        raise InputError("--shots-all draws its own clouds; leave --folds out")
    named = [k.replace("_", "-") for k in common.ABLATIONS if getattr(args, k)]
    if len(named) > 1 or named and args.compare:
        raise InputError(f"--{' and --'.join(named)}: one variant at a time; --compare trains several")
    cfg = {
        "data": data, "root": args.root, "recipe": recipe._asdict(), "seed": args.seed or 0,
        "way": args.way or 5, "shot": args.shot or 10, "table": args.table, "shots_all": args.shots_all,
        "settings": [list(s) for s in TABLE3] if args.table else [[args.way or 5, args.shot or 10]],
        "episodes": args.episodes or (5 if args.shots_all else 10), "folds": args.folds,
        "compare": args.compare or named or ["frozen"],
        "clip": args.clip or ("timm:vit_tiny_patch16_224=random" if data == "synthetic" else "openai"),
        "text_loss": args.text_loss or "raw",
        "test_fraction": 0.2 if args.test_fraction is None else args.test_fraction,
        "precision": args.precision or "auto", "compile": False,
        "accumulate": args.accumulate or 1, "workers": args.workers or os.cpu_count(),
        **{k: getattr(args, k) for k in common.ABLATIONS}}
    if not 0 < cfg["test_fraction"] < 1:
        raise InputError("--test-fraction must lie between 0 and 1")
    common.check_settings(cfg)
    return cfg, None, None


if __name__ == "__main__":
    common.main_guard(main)
