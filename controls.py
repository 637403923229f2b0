"""Beside every number its controls: train_cls.py with and without what the method claims to use.

    python controls.py                          the built-in objects, five seeds
    python controls.py --epochs 40              further flags go to train_cls.py
    python controls.py --seeds 3 --data modelnet40 --root DIR --clip openai
    python controls.py --ablations              the paper's own: Tables 4, 6 and 8

Everything else is equal: seeds, clouds, samples, epochs. Differences are paired by seed. Training
goes on where it was stopped; finished trainings are not repeated.
"""
import argparse
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

import pretrained
from data.files import read_json, reading
from run import ABLATIONS, InputError, Parser, main_guard, whole
from train_fewshot import paired, percent

SCRIPT = Path(__file__).parent / "train_cls.py"


def ablations_of(clip, text_loss):
    """As `variants_of`: what the paper itself leaves out or puts in another's place."""
    base = ["--clip", clip, "--text-loss", text_loss]
    return [{"task tokens": base, "no task tokens": [*base, "--no-task-token"],
             "deep prompts": [*base, "--deep-prompt"], "unfrozen": [*base, "--unfreeze"]}]


def variants_of(clip, text_loss):
    """-> {row of the table: flags of train_cls.py}, in groups that share the text loss. The first
    of a group is what its others are compared with."""
    if pretrained.is_random(clip) or clip.endswith("=shuffled"):
        raise InputError(f"--clip {clip}: is a control itself; pass weights that were pretrained")
    loaded = pretrained.load_clip(clip)
    twin = clip if loaded.model == "nano" else loaded.model     # nano=FILE has sizes of its own
    off = ["--text-loss", "off"]
    without = {
        "pretrained, frozen": ["--clip", clip, *off],
        "shuffled, frozen": ["--clip", f"{clip}=shuffled", *off],
        "random, frozen": ["--clip", f"{twin}=random", *off],
        "no transformer": ["--clip", clip, "--no-transformer", *off],
        "pretrained, unfrozen": ["--clip", clip, "--unfreeze", *off]}
    if loaded.text is None or text_loss == "off":
        return [without]
    on = ["--text-loss", text_loss]         # a random text tower knows no words
    return [without, {f"{row}, text loss": [*flags[:-2], *on] for row, flags in without.items()
                      if row != "random, frozen"}]


def start(flags, folder):
    """Train, or go on with what `folder` holds -> the process."""
    command = ["--resume", folder] if (folder / "last.pt").is_file() else [*flags, "--out", folder]
    if command[0] != "--resume" and folder.exists():
        shutil.rmtree(folder)               # killed before it saved anything
    return subprocess.Popen([sys.executable, SCRIPT, *command], stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True, encoding="utf-8")


def train_all(todo, jobs):
    """[(name, flags, folder)], so many at a time."""
    running, total, done = {}, len(todo), 0
    try:
        while todo or running:
            while todo and len(running) < jobs:
                name, flags, folder = todo.pop(0)
                running[start(flags, folder)] = name, folder
            for process in [p for p in running if p.poll() is not None]:
                name, folder = running.pop(process)
                if process.returncode:
                    reason = process.stderr.read().strip().removeprefix("error: ")
                    raise InputError(f"{name}: train_cls.py ended with exit code "
                                     f"{process.returncode}: {reason}")
                done, found = done + 1, result_of(folder)
                print(f"{done:4d} of {total}  {name:40s}{100 * found['metrics']['accuracy']:6.2f} "
                      f"%  {found['seconds']:6.0f} s", flush=True)
            time.sleep(0.1)
    finally:                                # they save
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


def result_of(folder):
    path = folder / "results.json"
    with reading(path, "remove it, and train_cls.py --resume writes it again"):
        return read_json(path)


def table(groups, seeds, out):
    """Lines of the table, in markdown."""
    lines = ["| transformer | weights trained | accuracy | minus the first, 95 % interval | best "
             "epoch on test | seconds |", "|---|---|---|---|---|---|"]
    for group in groups:
        reference = None
        for row in group:
            found = [result_of(out / folder_of(row, seed)) for seed in range(seeds)]
            last = [f["metrics"]["accuracy"] for f in found]
            best = [f["best_on_test"]["accuracy"] for f in found]
            apart = ""
            if reference:
                mean, low, high = (100 * x for x in paired(last, reference))
                apart = f"{mean:+.1f}" + f" [{low:+.1f}, {high:+.1f}]" * (seeds > 1)
            reference = reference or last
            seconds = sum(f["seconds"] for f in found) / seeds
            lines.append(f"| {row} | {found[0]['parameters']['trainable']:,} | {percent(last)} | "
                         f"{apart} | {percent(best)} | {seconds:.0f} |")
    return lines


def folder_of(row, seed):
    return f"{row.replace(', ', '-').replace(' ', '-')}-{seed}"


def main(argv=None):
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter,
                    epilog="all other flags go to train_cls.py")
    parser.add_argument("--clip", default="nano", help="pretrained weights (default: nano)")
    parser.add_argument("--text-loss", choices=["raw", "cosine", "off"], default="raw")
    parser.add_argument("--ablations", action="store_true",
                        help="the paper's ablations instead of the controls")
    parser.add_argument("--seeds", type=whole(1), default=5, metavar="N", help="0 .. N - 1 (5)")
    parser.add_argument("--jobs", type=whole(1), metavar="N", help="trainings at a time "
                        "(default: one on a GPU, else one for each core)")
    parser.add_argument("--out", type=Path, default=Path("runs/controls"), metavar="DIR")
    args, rest = parser.parse_known_args(argv)
    own = [f"--{name.replace('_', '-')}" for name in ("seed", "resume", "eval", *ABLATIONS)]
    for word in rest:                       # --seed=3 and --see 3, too: argparse reads them so
        given = word.split("=")[0]
        flag = next((f for f in own if len(given) > 2 and f.startswith(given)), None)
        if flag:
            raise InputError(f"{flag}: controls.py gives it to train_cls.py itself; leave it out")
    jobs = args.jobs or (1 if torch.cuda.is_available() else os.cpu_count())
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // jobs)))
    groups = (ablations_of if args.ablations else variants_of)(args.clip, args.text_loss)
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {"clip": args.clip, "text_loss": args.text_loss, "flags": rest,
                **({"ablations": True} if args.ablations else {})}
    kept = args.out / "controls.json"
    if kept.is_file() and any(args.out.glob("*/*.json")):           # not after a typo
        with reading(kept, "give another --out"):
            same = read_json(kept) == settings
        if not same:
            raise InputError(f"{kept}: the trainings there had other flags; give another --out")
    kept.write_text(json.dumps(settings) + "\n", encoding="utf-8")
    todo = []
    # with texts first: where the weights do not know a class, that is said before hours of others
    for group, seed in itertools.product(groups[::-1], range(args.seeds)):
        for row, flags in group.items():
            folder = args.out / folder_of(row, seed)
            if not (folder / "results.json").is_file():
                todo.append((f"{row}, seed {seed}", [*flags, "--seed", str(seed), *rest], folder))
    if todo:
        print(f"{len(todo)} trainings of train_cls.py, {min(jobs, len(todo))} at a time; a line "
              "for each that ends", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        train_all(todo, jobs)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)
    lines = table(groups, args.seeds, args.out)
    print(f"\naccuracy in % of the last epoch, mean ± population standard deviation over "
          f"{args.seeds} seed{'s' * (args.seeds > 1)}; {args.clip}\n", *lines, sep="\n")


if __name__ == "__main__":
    main_guard(main)
