"""One run of a training script, whatever it trains.

The loop stands in the script, inside this frame:

    with run.stopper:                                   # Ctrl-C, SIGTERM: it ends after a step
        for epoch in run.epochs(model, optimizer):      # resumes, seeds, saves
            for step in run.steps(count):               # progress bar, learning rate
                run.sums += train_step(...)             # forward, loss, backward, step
            loss, n = run.totals("loss")                # over all processes, finite
            run.row(score, cells, loss=loss / n)        # table, metrics.jsonl, last.pt, best.pt
"""
import argparse
import contextlib
import csv
import io
import itertools
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from kernels import engine, triton


class InputError(Exception):
    """What the user gave cannot be used. One line: what, where, what to do. Exit code 2."""


# ---- 1. Flags and settings -----------------------------------------------------------------------
ABLATIONS = ("no_task_token", "unfreeze", "deep_prompt", "no_transformer")


class Parser(argparse.ArgumentParser):
    def error(self, message):               # one line, without the list of all flags
        self.exit(2, f"error: {message}; --help lists the flags\n")


def recipe_parser(doc, recipes):
    """A parser with --data, whose --help ends with the recipes as columns."""
    fields = "data", *recipes["synthetic"]._fields
    rows = zip(fields, *((name, *recipe) for name, recipe in recipes.items()))
    table = "\n".join(f"  {name:16s}" + "".join(f"{x!s:>14}" for x in row) for name, *row in rows)
    parser = Parser(
        description=doc.split("\n")[0], epilog="recipes, the defaults of each --data:\n" + table,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=recipes, help="data set (default: synthetic, built in)")
    return parser


def shared_flags(parser, clip_names=None):
    """The flags that mean the same in every script. What is not given comes from the recipe.

    clip_names: what --clip may name; None: a script that trains no EPCL has none of EPCL's flags.
    """
    flag = parser.add_argument
    flag("--root", metavar="DIR", help="the data as its owners publish it (default: data/<name>)")
    flag("--out", metavar="DIR", help="run folder (default: runs/<task>-<data>-<n>)")
    flag("--resume", metavar="RUN", help="go on with an interrupted run, to the same numbers")
    flag("--eval", metavar="RUN", help="evaluate a saved run, a folder or a .pt file, and stop")
    flag("--epochs", type=whole(1), metavar="N", help="passes over the training data")
    flag("--batch-size", type=whole(1), metavar="B", help="samples of a step, over all processes")
    flag("--lr", type=float, help="highest learning rate")
    flag("--seed", type=whole(0), metavar="N", help="decides every random number (default 0)")
    flag("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    flag("--precision", choices=["auto", "fp32", "bf16"], help="of the products (default auto)")
    flag("--compile", action="store_true", help="torch.compile: a slow first step, then faster")
    flag("--workers", type=whole(1), metavar="N", help="to prepare data (default: cores)")
    if clip_names is None:
        parser.set_defaults(clip=None, accumulate=None, **dict.fromkeys(ABLATIONS, False))
        return
    flag("--clip", metavar="NAME", help=f"frozen weights: {clip_names} (default: openai; for "
                                        "synthetic data: random)")
    flag("--accumulate", type=whole(1), metavar="N", help="cut a batch into N parts: less memory")
    flag("--dropout", type=float, metavar="P", help="before CLIP; 0 is off")
    flag("--no-task-token", action="store_true", help="Table 6: without task tokens")
    flag("--unfreeze", action="store_true", help="Table 4: train CLIP's weights, too")
    flag("--deep-prompt", action="store_true", help="Table 8: fresh tokens in every block")
    flag("--no-transformer", action="store_true", help="control: tokenizer and head alone")


def whole(low):
    """argparse type: a whole number of at least `low`."""
    def integer(text):
        if int(text) < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}, not {text}")
        return int(text)
    return integer


def with_flags(recipe, args):
    """The recipe with the values given as flags. A short run warms up for a tenth of it."""
    given = {name: getattr(args, name, None) for name in recipe._fields}
    recipe = recipe._replace(**{name: v for name, v in given.items() if v is not None})
    return recipe._replace(warmup=min(recipe.warmup, recipe.epochs / 10))


def shared_settings(args, recipe):
    """The config of a new run, as far as all scripts share it, checked."""
    data = args.data or "synthetic"
    if not 0 < recipe.lr < math.inf:
        raise InputError(f"--lr {recipe.lr} must be above 0, and a number")
    if not 0 <= getattr(recipe, "dropout", 0) < 1:
        raise InputError(f"--dropout {recipe.dropout} must be in 0..1")
    if data == "synthetic" and args.root:
        raise InputError(f"--root {args.root}: the built-in data has no files; add --data")
    if args.out and (Path(args.out) / "last.pt").exists():
        raise InputError(f"--out {args.out}: holds a run; --resume {args.out} goes on with it, or "
                         "give another folder")
    if args.deep_prompt and args.no_task_token:
        raise InputError("--deep-prompt and --no-task-token exclude each other; give one of them")
    if args.no_transformer and (args.no_task_token or args.unfreeze or args.deep_prompt):
        raise InputError("--no-transformer leaves nothing for --no-task-token, --unfreeze or "
                         "--deep-prompt to change; give one of them")
    return {"data": data, "root": args.root, "recipe": recipe._asdict(), "seed": args.seed or 0,
            "clip": args.clip or ("nano" if data == "synthetic" else "openai"),
            "precision": args.precision or "auto", "compile": args.compile,
            "accumulate": args.accumulate or 1, "workers": args.workers or os.cpu_count(),
            **{name: getattr(args, name) for name in ABLATIONS}}


def saved_settings(args, task, other_data=False):
    """--resume or --eval: config, checkpoint, folder. Flags that contradict them are refused.

    other_data: --eval may name other --data; what the run was trained on is then `trained_on`.
    """
    if args.resume and args.eval:
        raise InputError("--resume goes on with a run, --eval only looks at it; give one of them")
    path = Path(args.resume or args.eval)
    saved = load_checkpoint(path, task)
    cfg, other = saved["config"], []
    if other_data and args.eval and args.data not in (None, cfg["data"]):
        cfg.update(trained_on=cfg["data"], data=args.data, root=None)
        other = ["test_area"]
    if cfg["data"] == "synthetic" and args.root:
        raise InputError(f"--root {args.root}: the built-in data has no files; add --data")
    free = ["root", "resume", "eval", "device", "workers", "predict", "vote", "export", "clip",
            "official", "skip_broken", *other]          # weights have a hash: `check_frozen`
    free += ["precision", "batch_size", "scale"] if args.eval else ["compile"]
    for name, value in vars(args).items():
        was = cfg["recipe"].get(name, cfg.get(name))
        if value is not None and value is not False and value != was and name not in free:
            flag = name.replace("_", "-")
            raise InputError(f"{path}: was trained with {flag} {was}, not {value}; leave --{flag} "
                             "out, or start a new run")
    for name in ("root", "workers", "precision", "compile", "clip"):
        cfg[name] = getattr(args, name) or cfg[name]
    if args.resume and "optimizer" not in saved:
        raise InputError(f"--resume {path}: holds no optimiser; resume the run's folder or last.pt")
    if args.resume and saved["at"]["epoch"] >= cfg["recipe"]["epochs"]:
        raise InputError(f"--resume {path}: the run is finished, {saved['at']['epoch']} epochs; "
                         f"--eval {path} evaluates it")
    return cfg, saved, path if path.is_dir() else path.parent


# ---- 2. Device and processes ---------------------------------------------------------------------
class Setup:
    """Device, precision and processes, decided once; `describe` says what and why."""

    def __init__(self, device=None, precision="auto"):
        if device == "cuda" and not torch.cuda.is_available():
            raise InputError("--device cuda: torch sees no CUDA device; leave it out for the CPU")
        kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.device = torch.device(kind)
        if kind == "cuda":
            self.device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():      # torchrun
            dist.init_process_group("nccl" if kind == "cuda" else "gloo")
        if precision != "auto":
            self.bf16, why = precision == "bf16", "asked for"
        elif kind == "cuda":
            self.bf16 = torch.cuda.get_device_capability() >= (8, 0)
            why = "native" if self.bf16 else "this GPU has no bf16"
        else:                               # with AVX512_BF16 but without AMX, bf16 was 6x slower
            self.bf16 = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
            why = "AMX" if self.bf16 else "this CPU has no AMX"
        name = f"CPU, {torch.get_num_threads()} threads"
        if kind == "cuda":
            name = torch.cuda.get_device_name()
        dtype = "bf16" if self.bf16 else "fp32"
        self.describe = f"{name}, {dtype} ({why}), kernels in {engine(kind)}"
        if world_size() > 1:
            self.describe += f", {world_size()} processes"

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def wrap(self, model, compile):
        """The model as the training loop calls it: compiled and with shared gradients, if asked."""
        model = torch.compile(model) if compile else model
        if world_size() == 1:
            return model
        ids = [self.device] if self.device.type == "cuda" else None
        with warnings.catch_warnings():     # torch 2.15 has a new name for broadcast_buffers
            warnings.simplefilter("ignore", FutureWarning)
            return nn.parallel.DistributedDataParallel(model, device_ids=ids,
                                                       broadcast_buffers=False)

    def fits(self, nbytes, share=3):
        """Whether so much data may stay on the GPU: at most 1/share of its free memory."""
        gpu = self.device.type == "cuda"
        return gpu and nbytes <= torch.cuda.mem_get_info(self.device)[0] // share


def world_size():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    return dist.get_rank() if world_size() > 1 else 0


def barrier():
    """Wait for the other processes, if there are any."""
    if world_size() > 1:
        dist.barrier()


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):                # every process used the sum, so every gradient counts
        return _AllReduce.forward(ctx, grad)


def all_reduce(x):
    """Sum over the processes, differentiable; x itself when there is one."""
    return _AllReduce.apply(x) if world_size() > 1 else x


def my_rows(total, part=0, parts=1):
    """(first, last) of this process's share of `total` rows; part of parts when accumulating."""
    first, last = rank() * total // world_size(), (rank() + 1) * total // world_size()
    n = last - first
    return first + part * n // parts, first + (part + 1) * n // parts


# ---- 3. Random numbers and schedule --------------------------------------------------------------
def seed_of(*numbers):
    """One seed from several, (seed, epoch) or (seed, epoch, sample)."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def learning_rate(epoch, top, epochs, warmup, low=1e-6):
    """Cosine with linear warm-up, `epoch` epochs (a fraction counts) after the start.

    As in timm's scheduler, the release's, the cosine counts from 0: `top` is never quite reached.
    """
    if epoch < warmup:
        return low + (top - low) * epoch / warmup
    return low + (top - low) * (1 + math.cos(math.pi * min(epoch / epochs, 1))) / 2


def parameter_groups(model, decay):
    """AdamW's groups as in the release: biases, norms and other vectors are not decayed."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [{"params": [p for p in trained if p.ndim > 1], "weight_decay": decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}]


# ---- 4. Run folder, checkpoints, and the frame of the loop ---------------------------------------
class Stopper:
    """Ctrl-C or SIGTERM asks the loop to stop after the step; a second one ends it at once."""

    def __init__(self):
        self.asked, self.handlers = False, {}

    def __enter__(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):       # not in the main thread
                self.handlers[number] = signal.signal(number, self.ask)

    def __exit__(self, *_):                 # in a notebook the next Ctrl-C is not ours
        while self.handlers:
            signal.signal(*self.handlers.popitem())

    def ask(self, number, frame):
        self.asked = True
        signal.signal(number, self.handlers[number])

    def now(self, step):
        if world_size() == 1:
            return self.asked
        if step % 10:                       # processes must agree, which costs time: ask seldom
            return False
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        return all_reduce(torch.tensor(float(self.asked), device=device)).item() > 0


class Run:
    """A run: how far it is (`at`), the frame of its loop, its folder.

    The folder holds config.json, metrics.jsonl, log.txt, the script's source, last.pt, best.pt,
    results.json, and what the script adds: look.png, confusion.csv. Only the first process writes;
    until `open` gives it a folder, `print` prints.
    """

    def __init__(self, task, cfg, setup, saved=None):
        self.task, self.cfg, self.setup, self.saved = task, cfg, setup, saved
        self.folder, self.first = None, rank() == 0
        self.at = dict(saved["at"]) if saved else {
            "epoch": 0, "step": 0, "sums": [], "seconds": 0.0, "best": -1.0, "best_epoch": 0}
        self.stopper, self.rows = Stopper(), 0

    # --- the frame of the loop

    def epochs(self, model, optimizer, head):
        """The epochs that are left. `head`: the columns of the table, up to the learning rate.

        Random numbers follow from --seed, epoch and step: for data from `draw`, the same in all
        processes, for dropout from torch's global generators, seeded anew in every step.
        """
        self.model, self.optimizer, self.head, resumed = model, optimizer, head, ""
        if self.saved:
            optimizer.load_state_dict(self.saved["optimizer"])
            resumed = f", resumed after {self.at['epoch']} epochs and {self.at['step']} steps"
        self.print(f"run      {self.folder}{resumed}")
        for epoch in range(self.at["epoch"], self.cfg["recipe"]["epochs"]):
            self.begin(epoch)
            model.train()
            yield epoch
            if epoch + 1 < self.cfg["recipe"]["epochs"] and self.stopper.now(0):
                self.stop()

    def begin(self, epoch):
        self.epoch, self.started, self.sums = epoch, time.time(), 0
        seed = seed_of(self.cfg["seed"], epoch)
        self.draw = torch.Generator(self.setup.device).manual_seed(seed)
        if self.at["sums"]:                 # of a stopped epoch, over all processes
            sums = torch.tensor(self.at["sums"], dtype=torch.float64, device=self.setup.device)
            self.sums = sums / world_size()

    def steps(self, count, low=1e-6):
        """The steps of this epoch that are left; a stopped one goes on with what it had drawn."""
        at, recipe, first = self.at, self.cfg["recipe"], self.at["step"]
        if first:
            self.draw.set_state(self.saved["draw"])
        bar = tqdm(range(first, count), initial=first, total=count, unit="step", leave=False,
                   desc=f"epoch {self.epoch + 1}/{recipe['epochs']}", disable=rank() > 0 or None)
        for step in bar:
            rate = learning_rate(self.epoch + step / count, recipe["lr"], recipe["epochs"],
                                 recipe["warmup"], low)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            torch.manual_seed(seed_of(self.cfg["seed"], self.epoch, step, rank()))
            yield step
            if step + 1 < count and self.stopper.now(step):
                bar.close()
                at.update(epoch=self.epoch, step=step + 1, sums=all_reduce(self.sums).tolist(),
                          seconds=at["seconds"] + time.time() - self.started)
                self.save("last.pt", optimizer=self.optimizer.state_dict(),
                          draw=self.draw.get_state())
                self.stop()

    def due(self, every):                   # is this epoch evaluated: every so many, and the last
        return (self.epoch + 1) % every == 0 or self.epoch + 1 == self.cfg["recipe"]["epochs"]

    def totals(self, *names):
        """`sums` over all processes: first the losses of these names, last a count."""
        totals = all_reduce(self.sums).tolist()
        if not all(map(math.isfinite, totals)):
            losses = [f"{name} {x / (totals[-1] or 1):.3g}" for name, x in zip(names, totals)]
            raise InputError(f"the loss is not finite in epoch {self.epoch + 1} "
                             f"({', '.join(losses)}); {self.folder}/last.pt is from the epoch "
                             "before; try a lower --lr or --precision fp32")
        return totals

    def row(self, score, cells, **metrics):
        """End an epoch. score: the test metric, or None; at a tie the later epoch is the best."""
        at, epoch, seconds = self.at, self.epoch, time.time() - self.started
        rate = self.optimizer.param_groups[0]["lr"]
        better = score is not None and score >= at["best"]
        if better:
            at.update(best=score, best_epoch=epoch + 1)
        at.update(epoch=epoch + 1, step=0, sums=[], seconds=at["seconds"] + seconds)
        if self.rows % 20 == 0:
            self.print(f"{self.head}        lr      s  left")
        self.rows += 1
        left = seconds * (self.cfg["recipe"]["epochs"] - epoch - 1) / 60
        self.print(f"{epoch + 1:5d} {cells}  {rate:8.2e} {seconds:6.1f} {left:4.0f} m"
                   + " *" * better)
        line = {"epoch": epoch + 1, **metrics, "lr": rate, "seconds": seconds}
        self.append("metrics.jsonl", json.dumps(line) + "\n")
        if better:
            self.save("best.pt")
        self.save("last.pt", optimizer=self.optimizer.state_dict())

    def stop(self):
        self.print(f"stopped after {self.at['epoch']} epochs and {self.at['step']} steps; go on "
                   f"with: python train_{self.task}.py --resume {self.folder}")
        sys.exit(130)

    # --- the folder

    def open(self, script, folder=None, kept=None):
        """Write into `folder` (default: the first free runs/<task>-<data>-<n>) from now on.

        A run that goes on keeps the first `kept` lines of metrics.jsonl (default: epochs done).
        """
        free = (f"runs/{self.task}-{self.cfg['data']}-{n}" for n in itertools.count(1))
        folder = [folder or next(name for name in free if not Path(name).exists())]
        if world_size() > 1:
            dist.broadcast_object_list(folder)
        self.folder = Path(folder[0])
        if not self.first:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.append("log.txt")
        except OSError as error:
            raise InputError(f"--out {self.folder}: cannot be written ({error.strerror}); give "
                             "another folder") from None
        if self.saved:
            path = self.folder / "metrics.jsonl"
            lines = path.read_text(encoding="utf-8").splitlines(True) if path.exists() else []
            self.write(path.name, "".join(lines[:self.at["epoch"] if kept is None else kept]))
        else:
            self.write("config.json", {**self.cfg, "command": sys.argv, "versions": versions()})
            shutil.copy(script, self.folder / Path(script).name)

    def print(self, text):
        if self.first:
            print(text, flush=True)
        self.append("log.txt", f"{text}\n")

    def append(self, name, text=""):
        if self.first and self.folder:
            # a file's name may hold bytes that are no text
            with open(self.folder / name, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)

    def results(self, metrics, best, parameters, form, **more):
        """results.json. best: the metric that chose best.pt; form: what was read."""
        at, cfg = self.at, self.cfg
        self.write("results.json", {
            "task": self.task, "data": cfg["data"], "clip": cfg["frozen"], "seed": cfg["seed"],
            "metrics": metrics, "seconds": at["seconds"], "epoch": at["epoch"],
            "parameters": dict(zip(("trainable", "frozen"), parameters)),
            "best_on_test": {best: at["best"], "epoch": at["best_epoch"]},
            "device": self.setup.describe, "form": form, **more})

    def confusion(self, counts, classes):
        """confusion.csv: counts (C, C), a row for each true class, a column for each predicted."""
        rows = [[name, *row] for name, row in zip(classes, counts.tolist())]
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([["true", *classes], *rows])
        self.write("confusion.csv", text.getvalue())

    def save(self, name, **more):
        """A checkpoint: the trained weights, how far the run is, and `more`."""
        self.write(name, {"task": self.task, "config": self.cfg, "frozen": self.cfg["frozen"],
                          "at": self.at, "model": self.model.state_dict(), **more})

    def write(self, name, content):
        """Write under a temporary name, then rename: killed at any moment, the old one survives."""
        if not self.first:
            return
        path = self.folder / name
        if path.suffix == ".json":
            content = json.dumps(content, indent=1) + "\n"
        try:
            with open(f"{path}.tmp", "wb") as file:
                if path.suffix == ".pt":
                    torch.save(content, file)
                else:
                    file.write(content.encode(errors="backslashreplace"))
                file.flush()
                os.fsync(file.fileno())
            os.replace(f"{path}.tmp", path)
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror}); what was there before "
                             "is intact") from None


def load_checkpoint(path, task):
    """A checkpoint of this task: `path` is a .pt file, or a run folder with last.pt."""
    path = Path(path) / "last.pt" if Path(path).is_dir() else Path(path)
    if (path.parent / "config.json").is_file() and not path.is_file():
        raise InputError(f"{path}: nothing was saved yet; repeat the command of the run")
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint; give a run folder or a .pt file")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        found = saved["task"]
    except Exception:
        raise InputError(f"{path}: not a checkpoint of these scripts, or cut short; take the other "
                         ".pt file of the run, or start anew") from None
    if found != task:
        raise InputError(f"{path}: a checkpoint of train_{found}.py, not of train_{task}.py")
    return saved


def load_weights(model, weights, used="", where="the saved weights", what="the model"):
    """Load the weights whose names begin with (one of) `used`. None may be missing and none left
    over: a block without its layer scale computes something else."""
    own, found = ({name: w for name, w in some.items() if name.startswith(used)}
                  for some in (model.state_dict(), weights))
    if not used and any(name.startswith("encoder.tokenizer.") for name in found):
        raise InputError("the checkpoint is from before 26 November 2026, when weights were "
                         "renamed; use the code of that time, or train anew")
    need, have = ({name: tuple(w.shape) for name, w in some.items()} for some in (own, found))
    wrong = [f"{name} {have.get(name, 'missing')} for {need.get(name, 'nothing')}"
             for name in {**need, **have} if have.get(name) != need.get(name)]
    if wrong:
        raise InputError(f"{where} do not fit {what}: {len(wrong)} tensors differ, "
                         f"{', '.join(wrong[:3])}; pass those of this model")
    model.load_state_dict(found, strict=False)


def check_frozen(cfg, saved, clip):
    """Note the frozen weights in the config. Trained ones are worth nothing with any other.

    The place of their file may change. Their model may not: with another activation the same
    weights compute something else.
    """
    now = {"name": clip.name, "sha256": clip.sha256, "model": clip.model}
    was = saved["frozen"] if saved else now
    cfg["frozen"] = now
    if (was["sha256"], was.get("model", clip.model)) != (clip.sha256, clip.model):
        raise InputError(f"--clip {clip.name}: {clip.model} with the weights {clip.sha256[:12]} "
                         f"(sha256) is not what the run was trained with ({was['name']}, "
                         f"{was['sha256'][:12]}); --clip may only name a new place of those")


def versions():
    """What ran, for config.json."""
    git = [shutil.which("git") or "true", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    return {"python": platform.python_version(), "torch": torch.__version__,
            "triton": triton.__version__ if triton else None, "numpy": np.__version__,
            "commit": commit, "date": time.strftime("%Y-%m-%d %H:%M")}


def main_guard(main):
    """Run a script: what its user can put right becomes one line on stderr and exit code 2."""
    if hasattr(sys.stdout, "reconfigure"):  # a terminal may lack a letter of a file's name
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except InputError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:                # no permission, a file where a folder should be
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}; give a path that can be read or written",
              file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:    # in a fork that took less along
        if not str(error.name).startswith(("data.", "lamm", "nanoclip")):
            raise
        file = f"{error.name.replace('.', '/')}.py"
        print(f"error: {file} is missing; copy it from nanoEPCL, too", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:               # before the loop, or a second time in it
        print("stopped; nothing after the last checkpoint is saved", file=sys.stderr)
        sys.exit(130)
    if world_size() > 1:                    # at once: gloo's threads now and then abort a process
        barrier()                           # that has done its work
        sys.stdout.flush()
        os._exit(0)
