"""One run of a training script, whatever it trains.

The loop stands in the script, inside this frame:

    with run.stopper:                           # Ctrl-C, SIGTERM: it ends after a step
        for epoch in run.epochs(model, optimizer, columns):     # resumes, seeds, saves
            for step in run.steps(count):                       # progress bar, learning rate
                run.sums += train_step(...)                     # forward, loss, backward, step
            loss, n = run.totals("loss")                        # over all processes, finite
            run.row(score, cells, loss=loss / n)                # table, metrics.jsonl, *.pt
"""
import argparse
import contextlib
import csv
import ctypes
import errno
import io
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

# Ctrl-C while torch is imported ends a script without a traceback, until `main_guard`
importing = Path(sys.argv[0]).name.startswith(("train_", "zero_shot")) and (
    signal.getsignal(signal.SIGINT) is signal.default_int_handler)
if importing:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
# torchrun ends its processes when one of them fails; when it is killed itself, Linux does
if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)          # 1: PR_SET_PDEATHSIG

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from kernels import engine, triton

try:
    import fcntl
except ImportError:                         # Windows: a run's folder is not locked
    fcntl = None


class InputError(Exception):
    """What the user gave cannot be used. One line: what, where, what to do. Exit code 2."""


# ---- 1. Flags and settings -----------------------------------------------------------------------
WEIGHTS = (".pt", ".pth", ".bin", ".safetensors")       # of a --clip that is a file and no name
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
    if "every" in fields:
        parser.add_argument("--every", type=whole(1), metavar="N",
                            help="epochs from one evaluation to the next")
    return parser


def shared_flags(parser, clip_names=None):
    """The flags that mean the same in every script. What is not given comes from the recipe.

    clip_names: what --clip may name; None: a script that trains no EPCL has none of EPCL's flags.
    """
    flag = parser.add_argument
    flag("--root", type=path, metavar="DIR",
         help="the data as its owners publish it (default: data/<name>)")
    flag("--out", type=path, metavar="DIR", help="run folder (default: runs/<task>-<data>-<n>)")
    flag("--resume", type=path, metavar="RUN",
         help="go on with an interrupted run, to the same numbers")
    flag("--eval", type=path, metavar="RUN",
         help="evaluate a saved run, a folder or a .pt file, and stop")
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
                                        "synthetic data: nano, in train_det.py a random ViT-Tiny)")
    flag("--accumulate", type=whole(1), metavar="N", help="cut a batch into N parts: less memory")
    flag("--dropout", type=float, metavar="P", help="before CLIP; 0 is off")
    flag("--no-task-token", action="store_true", help="Table 6: without task tokens")
    flag("--unfreeze", action="store_true", help="Table 4: train CLIP's weights, too")
    flag("--deep-prompt", action="store_true", help="Table 8: fresh tokens in every block")
    flag("--no-transformer", action="store_true", help="control: tokenizer and head alone")


def path(text):
    """argparse type: a path. Empty is what a shell makes of a variable that is not set."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; give a path, or leave the flag out")
    return text


def whole(low, high=2**31 - 1):
    """argparse type: a whole number from `low` to `high`."""
    def integer(text):
        if not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"must be from {low} to {high}, not {text}")
        return int(text)
    return integer


def with_flags(recipe, args):
    """The recipe with the values given as flags. A short run warms up for a tenth of it."""
    given = {name: getattr(args, name, None) for name in recipe._fields}
    recipe = recipe._replace(**{name: v for name, v in given.items() if v is not None})
    return recipe._replace(warmup=min(recipe.warmup, recipe.epochs / 10))


def shared_settings(args, recipe, synthetic_clip="nano"):
    """The config of a new run, as far as all scripts share it, checked."""
    data = args.data or "synthetic"
    if not 0 < recipe.lr < 1000:
        raise InputError(f"--lr {recipe.lr} must be above 0 and below 1000")
    if not 0 <= getattr(recipe, "dropout", 0) < 1:
        raise InputError(f"--dropout {recipe.dropout} must be at least 0 and below 1")
    if data == "synthetic" and args.root:
        raise InputError(f"--root {args.root}: the built-in data has no files; leave it out, or "
                         "add --data")
    if args.out and (Path(args.out) / "last.pt").exists():
        raise InputError(f"--out {args.out}: holds a run; --resume {args.out} goes on with it, or "
                         "give another folder")
    check_files(args)
    check_place(args.out or "runs")
    if args.deep_prompt and args.no_task_token:
        raise InputError("--deep-prompt and --no-task-token exclude each other; give one of them")
    if args.no_transformer and (args.no_task_token or args.unfreeze or args.deep_prompt):
        raise InputError("--no-transformer leaves nothing for --no-task-token, --unfreeze or "
                         "--deep-prompt to change; give one of them")
    return {"data": data, "root": args.root, "recipe": recipe._asdict(), "seed": args.seed or 0,
            "clip": args.clip or (synthetic_clip if data == "synthetic" else "openai"),
            "precision": args.precision or "auto", "compile": args.compile,
            "accumulate": args.accumulate or 1, "workers": args.workers or os.cpu_count(),
            **{name: getattr(args, name) for name in ABLATIONS}}


def check_files(args):
    """Check the files of weights before the data are read, which may take minutes."""
    if args.clip and (file := weights_of(args.clip)):
        check_weights(file, "--clip")
    if getattr(args, "official", None):
        check_weights(args.official, "--init-official")


def check_place(folder):
    """The same of a folder that is to be written."""
    place = Path(folder).absolute()
    above = next(path for path in (place, *place.parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(f"{above}: nothing can be written in it; give another folder with --out")


def weights_of(clip):
    """The file that a --clip name names, or None."""
    name, _, file = clip.removesuffix("=shuffled").partition("=")
    file = file.removesuffix("=random")     # nano=FILE=random has the sizes of FILE
    if file:
        return None if file == "random" else file
    return name if Path(name).suffix in WEIGHTS else None


def check_weights(path, flag):
    if not Path(path).is_file():
        raise InputError(f"{flag}: no such file: {path}; if it was moved, {flag} names its new "
                         "place, with --eval and --resume, too")


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
            if self.bf16 and kind == "cpu" and not has_bf16():
                why += "; SLOW: this CPU has no products in bf16, fp32 is faster"
        elif kind == "cuda":
            self.bf16 = torch.cuda.get_device_capability() >= (8, 0)
            why = "native" if self.bf16 else "this GPU has no bf16"
        else:                               # with AVX512_BF16 but without AMX, bf16 was 6x slower
            self.bf16 = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
            why = "AMX" if self.bf16 else "this CPU has no AMX"
        threads = torch.get_num_threads()
        name = f"CPU, {threads} thread{'s' * (threads > 1)}"
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


def has_bf16():
    """Whether oneDNN multiplies bf16 on this CPU. Without, a step took ten times as long as in fp32
    (an AMD EPYC whose AVX-512 is off)."""
    return getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)()


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
    """This process's share of `total` rows, first .. last - 1; part of parts when accumulating."""
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
        self.folder, self.log, self.first = None, None, rank() == 0
        self.at = dict(saved["at"]) if saved else {
            "epoch": 0, "step": 0, "sums": [], "seconds": 0.0, "best": -1.0, "best_epoch": 0}
        self.stopper, self.rows = Stopper(), 0

    # --- the frame of the loop

    def epochs(self, model, optimizer, columns):
        """The epochs that are left. columns: the head of the table, up to the learning rate.

        Random numbers follow from --seed, epoch and step: for data from `draw`, the same in all
        processes, for dropout from torch's global generators, seeded anew in every step.
        """
        self.model, self.optimizer, self.columns, resumed = model, optimizer, columns, ""
        if self.saved:
            self.restore()
            resumed = f", resumed after {self.at['epoch']} epochs and {self.at['step']} steps"
        self.print(f"run      {self.folder}{resumed}")
        for epoch in range(self.at["epoch"], self.cfg["recipe"]["epochs"]):
            self.begin(epoch)
            model.train()
            yield epoch
            if epoch + 1 < self.cfg["recipe"]["epochs"] and self.stopper.now(0):
                self.stop()

    def restore(self):
        """The optimiser's moments, as saved; its settings follow from the recipe."""
        saved, optimizer = self.saved, self.optimizer
        try:
            state = saved["optimizer"]["state"]
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
            if any(x.shape not in ((), p.shape) for p, moments in optimizer.state.items()
                   for x in moments.values()):
                raise ValueError
            if self.at["step"]:             # refused here, not after the data of an epoch
                torch.Generator(self.setup.device).set_state(saved["draw"])
        except Exception:                   # whatever torch makes of it
            raise InputError(f"{self.folder}: its optimizer or draw does not fit this model and "
                             "device; take the other .pt file of the run, or start anew") from None

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
            kept = f"{self.folder}/last.pt is from the epoch before; " if self.epoch else ""
            raise InputError(f"the loss is not finite in epoch {self.epoch + 1} "
                             f"({', '.join(losses)}); {kept}try a lower --lr"
                             + " or --precision fp32" * self.setup.bf16)
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
            self.print(f"{self.columns}        lr      s  left")
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
        with writing(f"--out {self.folder}", "give another folder"):
            self.folder.mkdir(parents=True, exist_ok=True)
            self.log = open(self.folder / "log.txt", "ab", buffering=0)
        try:                                # a lock until this process ends, however it does
            fcntl and fcntl.lockf(self.log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise InputError(f"{self.folder}: another process is writing this run; wait for its "
                             "end, or stop it") from None
        except OSError:                     # a network disk that knows no locks
            pass
        if self.saved:
            for path in self.folder.glob("*.tmp"):      # of a process that was killed
                path.unlink()
            path = self.folder / "metrics.jsonl"
            text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
            lines = text.splitlines(True)
            self.write(path.name, "".join(lines[:self.at["epoch"] if kept is None else kept]))
        else:
            self.write("config.json", {**self.cfg, "command": sys.argv, "versions": versions()})
            shutil.copy(script, self.folder / Path(script).name)

    def print(self, text):
        if self.first:
            print(text, flush=True)
        if self.log:
            with writing(self.folder / "log.txt"):
                self.log.write(f"{text}\n".encode(errors="backslashreplace"))

    def append(self, name, text):
        if self.first and self.folder:
            # a file's name may hold bytes that are no text
            path = self.folder / name
            with writing(path), open(path, "ab") as file:
                file.write(text.encode(errors="backslashreplace"))

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
        with writing(path):
            with open(f"{path}.tmp", "wb") as file:
                if path.suffix == ".pt":
                    torch.save(content, file)
                else:
                    file.write(content.encode(errors="backslashreplace"))
                file.flush()
                os.fsync(file.fileno())
            os.replace(f"{path}.tmp", path)


@contextlib.contextmanager
def writing(path, cure="make room; what was there before is intact"):
    """A file that cannot be written is one line. On a full disk torch.save has its own error."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or "disk full?"
        raise InputError(f"{path}: cannot be written ({reason}); {cure}") from None


def best_of(at):
    """What a result line says of the best epoch, which the test set chose."""
    if not at["best_epoch"]:
        return "no epoch was tested before"
    return f"best on test: {100 * at['best']:.2f} % in epoch {at['best_epoch']}"


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
    if importing:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
        barrier()                           # all have done their work
    except InputError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(3)                   # if rank 0 says it, torchrun ends this one meanwhile
        print("error:", str(error).replace("\n", "\\n"), file=sys.stderr)      # in a file's name
        sys.exit(2)
    except OSError as error:                # no permission, a file where a folder should be
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: {error.filename or 'the disk'}: {error.strerror}; give a path that can be "
              "read or written", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:    # in a fork that took less along
        if not str(error.name).startswith(("data.", "lamm", "nanoclip")):
            raise
        file = f"{error.name.replace('.', '/')}.py"
        print(f"error: {file} is missing; copy it from nanoEPCL, too", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:           # gloo's and NCCL's words when a process was killed
        if world_size() == 1 or not re.search("onnection|remote process", str(error)):
            raise
        if rank() == 0:
            print("error: another process of this run was ended; --resume goes on from the last "
                  "checkpoint", file=sys.stderr, flush=True)
        os._exit(1)
    except KeyboardInterrupt:               # before the loop, or a second time in it
        print("stopped; what was saved stays, and --resume goes on with a run", file=sys.stderr)
        sys.exit(130)
    if world_size() > 1:                    # at once: gloo's threads now and then abort a process
        sys.stdout.flush()
        os._exit(0)
