"""Kill trainings at random moments and resume them: they must end as if nothing had happened.

    python tests/crash.py                           10 runs of each script, killed up to 3 times
    python tests/crash.py train_det.py --runs 50 --seed 1
    python tests/crash.py train_cls.py --torchrun   2 processes, of which one is killed

For developers, not for pytest: it takes minutes. What a run must share with one that nobody killed:
the weights, every line of metrics.jsonl but its seconds, results.json but its seconds. A traceback
of a script is a failure, and so is a process that still runs a minute after another was killed.
"""
import argparse
import contextlib
import itertools
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
# the built-in run of each script, smaller: some steps in each of some epochs
OBJECTS = "points=64, groups=8, neighbours=8, stored=128, epochs=4, batch_size=8"
SMALL = {
    "train_cls.py": f"t.SYNTHETIC, small = (2, 1), dict({OBJECTS})",
    "train_fewshot.py": f"t.SYNTHETIC, small = (10, 20), dict({OBJECTS})",
    "train_det.py": "t.SYNTHETIC, small = (6, 2), dict(points=512, tokens=64, fine=64, radius=.8, "
                    "neighbours=16, queries=64, layers=2, epochs=4, batch_size=2, every=2)",
    "train_seg.py": "t.SYNTHETIC, small = (4, 2, 2000), dict(points=128, tokens=32, epochs=4, "
                    "batch_size=4, every=2)",
    "train_outdoor.py": "t.SYNTHETIC, small = (8, 2), dict(voxel=1.0, width=.125, tokens=16, "
                        "neighbours=4, epochs=4, batch_size=2, every=2)",
    "train_clip.py": "t.TEST, small = (1, 2), dict(objects=2, views=2, size=32, width=32, layers=2,"
                     " epochs=4, batch_size=40)",
    "train_clip2point.py": "t.HELD_OUT, t.SCANS, small = (1, 303), ((2, 1), (1, 2)), dict(objects="
                           "1, pictures=2, batch_size=20, epochs=2, points=256, adapter=2)",
}
MORE = {"train_fewshot.py": ["--way", "5", "--shot", "2", "--episodes", "2"]}
TINY = {name: ["--clip", "timm:test_vit=random"] for name in SMALL if "clip" not in name}
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d",
            "--rdzv-endpoint=localhost:0"]


class Script:
    def __init__(self, name, folder, torchrun):
        self.name, self.folder, self.torchrun = name, folder, torchrun
        self.code = folder / name           # run.py looks at the name
        task = name.removesuffix(".py")
        self.code.write_text(
            f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport run, {task} as t\n"
            f"{SMALL[name]}\nfor key, recipe in t.RECIPES.items():\n"
            "    t.RECIPES[key] = recipe._replace(**small)\nrun.main_guard(t.main)\n",
            encoding="utf-8")

    def start(self, *words):
        words = [*(TORCHRUN if self.torchrun else []), str(self.code), *map(str, words),
                 "--workers", "1", "--device", "cpu"]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
        return subprocess.Popen([sys.executable, *words], cwd=self.folder, env=env, text=True,
                                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def first(self, out):
        return self.start(*TINY.get(self.name, []), *MORE.get(self.name, []), "--out", out)


def processes(script):
    """Numbers of the processes that run it, also of those that lost their parent."""
    found = subprocess.run(["ps", "-eo", "pid=,stat=,args="], capture_output=True, text=True).stdout
    lines = [line.split(None, 2) for line in found.splitlines() if str(script.code) in line]
    return [int(number) for number, state, _ in lines if "Z" not in state]


def crash(script, out, rng, whole):
    """Train into `out`, killed up to three times. -> what happened, in words; an error or None"""
    story, process = [], script.first(out)
    for _ in range(rng.randint(1, 3)):
        number = rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        wait, left = rng.uniform(0.1, 1) * whole, 600
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            victim = process.pid
            if script.torchrun:             # the launcher, or one of those that train
                victim = rng.choice(processes(script) or [victim])
                number = signal.SIGKILL
            with contextlib.suppress(ProcessLookupError):           # it has just ended
                os.kill(victim, number)
            story.append(f"{signal.Signals(number).name} after {wait:.1f} s")
        while processes(script) and left:
            time.sleep(0.1)
            left -= 1
        if not left:
            for number in processes(script):
                os.kill(number, signal.SIGKILL)
            return story, "a process still runs after a minute"
        err = process.stderr.read()
        if "[rank" in err if script.torchrun else "Traceback" in err:   # torchrun has its own
            return story, err
        if (Path(out) / "results.json").exists():
            break
        process = script.start("--resume", out)
    err = process.communicate(timeout=20 * whole + 60)[1]
    if process.returncode and re.search("nothing was saved yet; repeat|no such checkpoint", err):
        story.append("nothing saved, repeated")
        process = script.first(out)
        err = process.communicate(timeout=20 * whole + 60)[1]
    return story, err if process.returncode else None


def ending(out):
    """What a run must share with an undisturbed one."""
    def timeless(x):
        if isinstance(x, dict):
            return {key: timeless(part) for key, part in x.items() if "seconds" not in key}
        return [timeless(part) for part in x] if isinstance(x, list) else x

    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    results = (out / "results.json").read_text(encoding="utf-8")
    plain = timeless([json.loads(text) for text in (results, *lines)])
    weights = {path.name: torch.load(path, weights_only=True).get("model", {})
               for path in sorted(out.glob("*.pt"))}
    return plain, weights


def differs(a, b):
    (plain, weights), (other, others) = a, b
    if plain != other:
        row = next(i for i, pair in enumerate(itertools.zip_longest(plain, other))
                   if pair[0] != pair[1])
        return f"line {row} of results.json and metrics.jsonl"
    if weights.keys() != others.keys():
        return f"{sorted(weights)} for {sorted(others)}"
    for name in weights:
        if weights[name].keys() != others[name].keys() or any(
                not torch.equal(w, others[name][key]) for key, w in weights[name].items()):
            return f"the weights of {name}"
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("scripts", nargs="*", metavar="SCRIPT", help=", ".join(SMALL))
    parser.add_argument("--runs", type=int, default=10, metavar="N", help="of each script (10)")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--torchrun", action="store_true", help="two processes")
    args = parser.parse_args()
    failures = 0
    for name in args.scripts or SMALL:
        with tempfile.TemporaryDirectory() as folder:
            script, rng = Script(name, Path(folder), args.torchrun), random.Random(args.seed)
            script.first("warm").wait()                 # pictures are drawn once and kept
            started = time.time()
            process = script.first("whole")
            err = process.communicate()[1]
            whole = time.time() - started
            if process.returncode:
                sys.exit(f"{name}: cannot be run at all: {err}")
            print(f"{name}: {whole:.1f} s undisturbed", flush=True)
            right = ending(script.folder / "whole")
            for i in range(args.runs):
                out = script.folder / f"run{i}"
                story, error = crash(script, out, rng, whole)
                error = error or differs(ending(out), right)
                failures += error is not None
                print(f"  {i:3d} {'FAILED' if error else 'same'}: {', '.join(story) or 'too late'}"
                      + (f"\n{error}" if error else ""), flush=True)
    print(f"{failures} failures; {shlex.join(sys.argv)}")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
