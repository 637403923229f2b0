"""Classify point clouds with EPCL (paper section 4.4, Table 4; supplement, Figure 10).

    python train_cls.py                                  built-in objects, no download
    python train_cls.py --data modelnet40 --root DIR     the paper's recipe, 300 epochs (paper: 92.9 %)
    python train_cls.py --data folder --root DIR         your meshes or clouds: DIR/{train,test}/CLASS/*
    python train_cls.py --eval RUN --predict chair.obj   what a saved run takes your file for

To change the data, edit objects.py and RECIPES; the head, `Classifier` in objects.py; the backbone,
pass another --clip or edit `EPCLEncoder` in common.py.
"""
import argparse
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import common
from common import FrozenCLIP, InputError, gather
from kernels import farthest_point_sample
from objects import (SUFFIXES, Classifier, Objects, Source, load_objects, loss_terms, prepare,
                     prompt_features, unit_sphere)

# --------------------------------------------------------------------------------------------------
# Recipe
# --------------------------------------------------------------------------------------------------


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


# modelnet40: the released configuration (classification/cfgs/modelnet.yaml); lr and decay are the
# paper's, 4.1, too. Dropout 0 is the release's, the paper's supplement says 0.3. modelnet10 and
# folder follow it. scanobjectnn: the paper has no such run; points, groups and no scaling as
# Point-MAE, the rest as above. synthetic: ours, sized for two CPU cores.
RECIPES = {
    #                     points groups neigh stored pool epochs warm batch  lr  decay clip drop unit
    "modelnet40":   Recipe( 1024,   64,   32,  8192,   8,  300,   10,   32, 3e-4, .04, .8, 0.0, True),
    "modelnet10":   Recipe( 1024,   64,   32,  8192,   8,  300,   10,   32, 3e-4, .04, .8, 0.0, True),
    "scanobjectnn": Recipe( 2048,  128,   32,  2048,   1,  300,   10,   32, 3e-4, .04, .8, 0.0, False),
    "folder":       Recipe( 1024,   64,   32,  8192,   2,  300,   10,   32, 3e-4, .04, .8, 0.0, True),
    "synthetic":    Recipe(  512,   16,   32,  1024,   2,    6,    1,   16, 1e-3, .04, .8, 0.0, True),
}
SYNTHETIC = (16, 6)         # objects of each class, to train and to test


# --------------------------------------------------------------------------------------------------
# Data: clouds in memory -> the points of a step, on the device
# --------------------------------------------------------------------------------------------------

def load_data(cfg):
    """-> objects.Splits, scaled as the recipe says."""
    recipe = Recipe(**cfg["recipe"])
    splits = load_objects(cfg["data"], cfg["root"], recipe.stored, recipe.points,
                          cfg["test_fraction"], cfg["workers"], SYNTHETIC)
    if recipe.unit:                                             # over all stored points, as the release
        splits = splits._replace(train=Objects(unit_sphere(splits.train.xyz), splits.train.label),
                                 test=Objects(unit_sphere(splits.test.xyz), splits.test.label))
    return splits


def sample_train(xyz, recipe, total, first=0):
    """Random clouds: (b, P, 3), rows first .. first + b of a batch of `total` -> (b, points, 3).

    As the release: shuffle, take the 1200 farthest points for 1024, a random 1024 of those, then
    scale each axis by 2/3 .. 3/2 and shift it by -0.2 .. 0.2. No rotation. Numbers are drawn for
    the whole batch, so that a cloud meets the same ones in one process or in eight.
    """
    b, stored, n = len(xyz), xyz.shape[1], recipe.points
    pool = min(stored, recipe.pool * n)
    more = min(pool, n * 75 // 64)                              # 1024 -> 1200, 2048 -> 2400
    shuffled = torch.rand(total, stored, device=xyz.device)[first:first + b].argsort(1)
    xyz = gather(xyz, shuffled[:, :pool])                       # (b, pool, 3)
    idx = farthest_point_sample(xyz, more)                      # (b, more)
    chosen = torch.randperm(more, device=xyz.device)[:n]        # one draw for the batch, as theirs
    xyz = gather(xyz, idx[:, chosen])                           # (b, points, 3)
    draw = torch.rand(2, total, 1, 3, device=xyz.device)[:, first:first + b]
    return xyz * (2 / 3 + draw[0] * 5 / 6) + (draw[1] * 0.4 - 0.2)


def sample_test(xyz, points, batch=64):
    """The farthest points from index 0, without a random number: (S, P, 3) -> (S, points, 3)."""
    return torch.cat([gather(part, farthest_point_sample(part, points)) for part in xyz.split(batch)])


# --------------------------------------------------------------------------------------------------
# The authors' checkpoint
# --------------------------------------------------------------------------------------------------

OFFICIAL = {                # names in the authors' released checkpoint -> ours; `clip_vit.` is CLIP
    "encoder.first_conv.": "encoder.tokenizer.first.",
    "encoder.second_conv.": "encoder.tokenizer.second.",
    "pos_embed.": "encoder.position.",
    "te_encoder.embedding.": "encoder.task.embedding.",
    "te_encoder.trans.": "encoder.task.mlp.",
    "norm.": "norm.",
    "proj2emb.": "embed.",
    "cls_head_finetune.": "head.",
}


def load_official(path):
    """The authors' classification checkpoint -> (FrozenCLIP with its weights, our state dict)."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state["base_model"] if "base_model" in state else state["model"]
        state = {name.removeprefix("module."): value for name, value in state.items()}
        visual = {name.removeprefix("clip_vit."): value.float() for name, value in state.items()
                  if name.startswith("clip_vit.")}
        ours = {}
        for theirs, mine in OFFICIAL.items():
            for name, value in state.items():
                if name.startswith(theirs):                     # a 1x1 convolution is a linear layer
                    value = value.squeeze(-1) if value.ndim == 3 else value
                    ours[mine + name.removeprefix(theirs)] = value
        model, _ = common.open_clip_model("ViT-B-32-quickgelu")
        model.visual.load_state_dict(visual)
        return FrozenCLIP(f"official:{path}", common.open_clip_parts(model.visual)), ours
    except Exception as error:
        raise InputError(f"--init-official {path}: not a checkpoint of the authors' classification "
                         f"release ({' '.join(str(error).split())[:150]})") from None


# --------------------------------------------------------------------------------------------------
# Metric
# --------------------------------------------------------------------------------------------------

def accuracies(confusion):
    """confusion (C, C), true by predicted -> overall accuracy, mean over classes that occur."""
    correct, count = confusion.diag().double(), confusion.sum(1).double()
    seen = count > 0
    return (correct.sum() / count.sum()).item(), (correct[seen] / count[seen]).mean().item()


def worst_pairs(confusion, classes, most=5):
    wrong = confusion.clone().fill_diagonal_(0).flatten()
    lines = []
    for pair in wrong.argsort(descending=True, stable=True)[:most].tolist():
        true, taken = divmod(pair, len(classes))
        if wrong[pair]:
            lines.append(f"         {classes[true]} taken for {classes[taken]}: {wrong[pair]} of "
                         f"{confusion[true].sum()}")
    return "\n".join(["worst pairs", *lines] if lines else ["no test object was mistaken"])


@torch.no_grad()
def evaluate(model, xyz, label, setup, recipe, votes=1, batch=64):
    """Confusion matrix (C, C) of clouds (S, points, 3), shared between the processes.

    votes > 1: xyz are the stored clouds (S, P, 3), and logits are averaged over so many random
    augmented samples of each. The release reports the best of 299 such repeats, we report one.
    """
    model.eval()
    classes = model.head[-1].out_features
    confusion = torch.zeros(classes, classes, dtype=torch.int64, device=setup.device)
    first, last = common.my_rows(len(label))
    for at in range(first, last, batch):
        points = xyz[at:min(at + batch, last)].to(setup.device)                   # (b, N, 3)
        truth = label[at:min(at + batch, last)].to(setup.device)                  # (b,)
        with setup.autocast():
            logits = sum(model(sample_train(points, recipe, len(points)) if votes > 1 else points)
                         [0].float() for _ in range(votes))                       # (b, C)
        pairs = truth * classes + logits.argmax(1)
        confusion += torch.bincount(pairs, minlength=classes ** 2).view(classes, classes)
    return common.all_reduce(confusion).cpu()


# --------------------------------------------------------------------------------------------------
# Train
# --------------------------------------------------------------------------------------------------

def train(model, data, test, text, cfg, run, setup, saved):
    """The loop. -> where it stopped (epochs, steps, seconds, best), was that the end."""
    recipe, device = Recipe(**cfg["recipe"]), setup.device
    wrapped = setup.wrap(model, cfg["compile"])
    optimizer = torch.optim.AdamW(common.parameter_groups(model, recipe.decay), lr=recipe.lr)
    at = {"epoch": 0, "step": 0, "sums": [0.0] * 4, "seconds": 0.0, "best": -1.0, "best_epoch": 0}
    if saved:
        optimizer.load_state_dict(saved["optimizer"])
        at = saved["at"]
    xyz, label = resident(data.xyz, device), data.label.to(device)
    steps = max(1, -(-len(label) // recipe.batch_size))
    rest = len(label) % recipe.batch_size
    if steps > 1 and 0 < rest < 2 * common.world_size() * cfg["accumulate"]:
        steps -= 1                          # too few for batch norm: they join the last full batch

    def save(name, **more):
        run.save(name, {"task": "cls", "config": cfg, "frozen": cfg["frozen"], "at": at,
                        "model": model.state_dict(), **more})

    stopper = common.Stopper()
    for epoch in range(at["epoch"], recipe.epochs):
        started, first = time.time(), at["step"]
        model.train()
        common.seed_all(cfg["seed"], epoch)
        order = torch.randperm(len(label), device=device)       # an epoch depends on the seed alone ...
        if first:                                               # ... and on what it has drawn so far
            common.set_random_state(saved["random"])
        sums = torch.tensor(at["sums"], dtype=torch.float64, device=device) / common.world_size()
        bar = tqdm(range(first, steps), initial=first, total=steps, unit="step", leave=False,
                   desc=f"epoch {epoch + 1}/{recipe.epochs}", disable=common.rank() > 0 or None)
        for step in bar:
            rows = order[step * recipe.batch_size:]
            rows = rows[:recipe.batch_size] if step + 1 < steps else rows
            for group in optimizer.param_groups:
                group["lr"] = common.learning_rate(epoch + step / steps, recipe.lr, recipe.epochs,
                                                   recipe.warmup)
            sums += train_step(wrapped, optimizer, xyz, label, rows, text, recipe, cfg, setup)
            if step + 1 < steps and stopper.now(step):
                bar.close()
                at.update(epoch=epoch, step=step + 1, sums=common.all_reduce(sums).tolist(),
                          seconds=at["seconds"] + time.time() - started)
                save("last.pt", optimizer=optimizer.state_dict(), random=common.random_state())
                return at, False

        head, similarity, correct, n = common.all_reduce(sums).tolist()
        if not np.isfinite(head + similarity):
            raise InputError(f"the loss is not finite in epoch {epoch + 1} (head {head / n:.3g}, text "
                             f"{similarity / n:.3g}); {run.folder}/last.pt is from the epoch before; "
                             "try a lower --lr or --precision fp32")
        overall, mean = accuracies(evaluate(model, test.xyz, test.label, setup, recipe))
        better = overall >= at["best"]                          # a tie goes to the later epoch: theirs
        if better:
            at.update(best=overall, best_epoch=epoch + 1)
        seconds, lr = time.time() - started, optimizer.param_groups[0]["lr"]
        at.update(epoch=epoch + 1, step=0, sums=[0.0] * 4, seconds=at["seconds"] + seconds)
        if (epoch - (saved["at"]["epoch"] if saved else 0)) % 20 == 0:
            run.print("epoch     loss    head    text  train %   test %   mean %        lr      s  left")
        run.print(f"{epoch + 1:5d} {(head + similarity) / n:8.4f} {head / n:7.4f} {similarity / n:7.4f} "
                  f"{100 * correct / n:8.2f} {100 * overall:8.2f} {100 * mean:8.2f}  {lr:8.2e} "
                  f"{seconds:6.1f} {seconds * (recipe.epochs - epoch - 1) / 60:4.0f} m"
                  + (" *" if better else ""))
        run.metrics({"epoch": epoch + 1, "loss": (head + similarity) / n, "loss_head": head / n,
                     "loss_text": similarity / n, "train_accuracy": correct / n, "accuracy": overall,
                     "mean_class_accuracy": mean, "lr": lr, "seconds": seconds})
        if better:
            save("best.pt")
        save("last.pt", optimizer=optimizer.state_dict())
        if epoch + 1 < recipe.epochs and stopper.now(0):
            return at, False
    return at, True


def train_step(model, optimizer, xyz, label, rows, text, recipe, cfg, setup):
    """One step on the clouds `rows`, of which this process takes its share.

    -> sums over its clouds, (4,): loss of the head, of the text, correct, clouds. No value is read
    back from the device.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=setup.device)
    optimizer.zero_grad(set_to_none=True)
    for part in range(cfg["accumulate"]):
        first, last = common.my_rows(len(rows), part, cfg["accumulate"])
        mine = rows[first:last]
        points = sample_train(xyz[mine.to(xyz.device)].to(setup.device), recipe, len(rows), first)
        with setup.autocast():
            logits, embedding = model(points)
        head, similarity = loss_terms(logits, embedding, label[mine], text, cfg["text_loss"])
        # the mean over the batch; between processes gradients are averaged, hence the factor
        ((head + similarity) * common.world_size() / len(rows)).backward()
        correct = (logits.argmax(1) == label[mine]).sum()
        sums += torch.stack([head, similarity, correct, torch.full_like(head, len(mine))]).detach()
    nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
    optimizer.step()
    return sums


def resident(xyz, device):
    """The training clouds, on the device if they take at most half of its free memory."""
    if device.type == "cuda" and xyz.nbytes > torch.cuda.mem_get_info(device)[0] // 2:
        return xyz
    return xyz.to(device)


# --------------------------------------------------------------------------------------------------
# Main
# --------------------------------------------------------------------------------------------------

def main(argv=None):
    args = flags(argv)
    cfg, saved, folder = settings(args)
    setup = common.Setup(args.device, cfg["precision"])
    if args.predict:
        return predict(args.predict, cfg, saved, setup)
    data, test, classes, form = load_data(cfg)
    if saved and list(classes) != cfg["classes"]:
        raise InputError(f"{form}: has other classes than the run: {' '.join(classes)[:200]}")
    cfg["classes"] = list(classes)
    clip, model, text = build(cfg, saved, setup)
    recipe = Recipe(**cfg["recipe"])
    stored = test.xyz
    test = Objects(sample_test(test.xyz.to(setup.device), recipe.points), test.label)

    if args.eval:
        run = common.Run(None)
    else:
        run = common.Run(folder or common.new_folder(args.out, "cls", cfg["data"]))
        run.start(cfg, __file__, saved and saved["at"]["epoch"])
    trained, frozen = common.sizes(model)
    run.print(f"device   {setup.describe}; torch {torch.__version__}; seed {cfg['seed']}")
    run.print(f"data     {cfg['data']}: {len(data.label):,} train, {len(test.label):,} test, "
              f"{len(classes)} classes, {recipe.points} points; {form}")
    encoder = f"{clip.name}, {'trained, too' if clip.trainable else 'frozen'}"
    run.print(f"model    {trained:,} weights trained, {frozen:,} frozen; transformer "
              + ("left out" if cfg["no_transformer"] else encoder))
    if text is not None:
        run.print(f"text     {len(text)} prompts, {cfg['text_loss']} products")
    elif cfg["text_loss"] != "off":
        run.print(f"text     no text loss: {clip.name} has no text tower")
    if clip.name.endswith("random") and not cfg["no_transformer"]:
        run.print("warning  the transformer has RANDOM weights: these numbers say nothing about CLIP")

    if args.eval:
        at = saved["at"]
    else:
        run.print(f"run      {run.folder}" + (f", resumed after {saved['at']['epoch']} epochs and "
                                              f"{saved['at']['step']} steps" if saved else ""))
        at, complete = train(model, data, test, text, cfg, run, setup, saved)
        if not complete:
            run.print(f"stopped after {at['epoch']} epochs and {at['step']} steps; go on with: "
                      f"python train_cls.py --resume {run.folder}")
            sys.exit(130)
    confusion = evaluate(model, test.xyz, test.label, setup, recipe)
    overall, mean = accuracies(confusion)
    results = {"task": "cls", "data": cfg["data"], "clip": cfg["frozen"], "seed": cfg["seed"],
               "metrics": {"accuracy": overall, "mean_class_accuracy": mean}, "seconds": at["seconds"],
               "parameters": {"trainable": trained, "frozen": frozen}, "epoch": at["epoch"],
               "best_on_test": {"accuracy": at["best"], "epoch": at["best_epoch"]},
               "device": setup.describe, "form": form}
    run.print(worst_pairs(confusion, classes))
    run.print(f"result   accuracy {100 * overall:.2f} %, mean class accuracy {100 * mean:.2f} %, epoch "
              f"{at['epoch']} (best on test: {100 * at['best']:.2f} % in epoch {at['best_epoch']}); "
              f"{cfg['data']}, {clip.name}, {at['seconds']:.0f} s")
    if args.vote:
        common.seed_all(cfg["seed"])
        voted, _ = accuracies(evaluate(model, stored, test.label, setup, recipe, args.vote))
        results["metrics"][f"accuracy_{args.vote}_votes"] = voted
        run.print(f"voting   accuracy {100 * voted:.2f} %, {args.vote} votes, one repeat")
    if not args.eval:
        run.write_json("results.json", results)


def build(cfg, saved, setup):
    """-> FrozenCLIP, model on the device, text features (C, 512) or None."""
    weights = None
    if cfg["official"]:
        clip, weights = load_official(cfg["official"])
    else:
        clip = common.load_clip(cfg["clip"], cfg["seed"], trainable=cfg["unfreeze"])
    cfg["frozen"] = {"name": clip.name, "sha256": clip.sha256}
    if saved:
        common.check_frozen(saved, clip)
        weights = saved["model"]
    text = None
    if cfg["text_loss"] != "off":
        text = prompt_features(clip, cfg["classes"])
    clip.text = None                                            # the text tower has done its work
    common.seed_all(cfg["seed"])
    model = Classifier(clip, len(cfg["classes"]), cfg)
    if weights is not None:
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise InputError("the saved weights do not fit the model: "
                             f"{' '.join(str(error).split())[:200]}") from None
    if setup.bf16 and not cfg["unfreeze"]:
        clip.half_weights()
    return clip, model.to(setup.device), None if text is None else text.to(setup.device)


@torch.no_grad()
def predict(files, cfg, saved, setup):
    """Print the five likeliest classes of anybody's meshes or clouds."""
    recipe, clouds = Recipe(**cfg["recipe"]), []
    for file in files:
        if Path(file).suffix.lower() not in SUFFIXES:
            raise InputError(f"{file}: not a format this script reads ({' '.join(SUFFIXES)})")
        xyz, count = prepare(Source(Path(file).name, 0, file), recipe.stored)
        if count < recipe.points:
            raise InputError(f"{file}: has {count:,} points, the run was trained with {recipe.points}")
        xyz = torch.from_numpy(xyz)[None].to(setup.device)      # (1, P, 3)
        clouds.append(sample_test(unit_sphere(xyz) if recipe.unit else xyz, recipe.points))
    _, model, _ = build(cfg, saved, setup)
    model.eval()
    for file, points in zip(files, clouds):
        with setup.autocast():
            logits, _ = model(points)
        share, label = logits[0].float().softmax(0).topk(min(5, len(cfg["classes"])))
        print(f"{file}:", *(f"  {cfg['classes'][i]} {100 * p:.1f} %"
                            for p, i in zip(share.tolist(), label.tolist())))


def flags(argv):
    rows = [("data", Recipe._fields), *RECIPES.items()]
    table = "\n".join(f"  {n:12s}" + "".join(f"{v!s:>11}" for v in row) for n, row in rows)
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog="recipes, the defaults of each --data:\n" + table,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--data", choices=RECIPES, help="data set (default: synthetic, built in)")
    common.shared_flags(parser)
    flag("--points", type=common.whole(1), metavar="N", help="points of a cloud")
    flag("--groups", type=common.whole(1), metavar="G", help="patches of a cloud")
    flag("--neighbours", type=common.whole(1), metavar="K", help="points of a patch, at most 64")
    flag("--text-loss", choices=["raw", "cosine", "off"],
         help="similarities with CLIP's text features (default: raw, as the release)")
    flag("--test-fraction", type=float, metavar="F",
         help="--data folder without train/ and test/: share set aside to test (default 0.2)")
    flag("--vote", type=common.whole(2), metavar="V",
         help="report the vote over V augmented samples, too")
    flag("--predict", nargs="+", metavar="FILE",
         help="with --eval RUN: print the five likeliest classes of meshes or clouds")
    flag("--init-official", metavar="FILE", dest="official",
         help="start from the authors' released checkpoint")
    return parser.parse_args(argv)


def settings(args):
    """Flags over a recipe or a saved run -> config, checkpoint or None, run folder or None."""
    if args.predict and not args.eval:
        raise InputError("--predict needs a run: add --eval runs/cls-...")
    if args.resume or args.eval:
        cfg, saved, folder = common.saved_settings(args, "cls")
        if args.resume:
            common.check_resume(args.resume, saved)
        return cfg, saved, folder
    given = {k: v for k, v in vars(args).items() if v is not None}
    data = given.get("data", "synthetic")
    recipe = RECIPES[data]._replace(**{k: given[k] for k in Recipe._fields if k in given})
    recipe = recipe._replace(warmup=min(recipe.warmup, recipe.epochs / 10),
                             stored=max(recipe.stored, recipe.points))
    if recipe.groups > recipe.points or recipe.neighbours > min(64, recipe.points):
        raise InputError(f"--groups {recipe.groups} must be at most --points {recipe.points}, "
                         f"--neighbours {recipe.neighbours} at most {min(64, recipe.points)}")
    cfg = {
        "data": data, "root": args.root, "recipe": recipe._asdict(), "seed": args.seed or 0,
        "clip": args.clip or ("random" if data == "synthetic" else "openai"),
        "official": args.official, "text_loss": args.text_loss or "raw",
        "test_fraction": 0.2 if args.test_fraction is None else args.test_fraction,
        "precision": args.precision or "auto", "compile": args.compile,
        "accumulate": args.accumulate or 1, "workers": args.workers or os.cpu_count(),
        **{k: getattr(args, k) for k in common.ABLATIONS}}
    if not 0 < cfg["test_fraction"] < 1:
        raise InputError("--test-fraction must lie between 0 and 1")
    common.check_settings(cfg)
    return cfg, None, None


if __name__ == "__main__":
    common.main_guard(main)
