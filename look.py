"""Draw the learning curves of runs, side by side, and their confusion matrices.

    python look.py runs/cls-synthetic-1
    python look.py runs/cls-synthetic-1 runs/cls-synthetic-2 --out curves.png

A panel for each metric of metrics.jsonl, in it a line for each run; of a few-shot run, a line for
each setting and variant, the mean over its episodes. curves.png is written into the first run's
folder, confusion.png into that of each run that has a confusion.csv. Needs matplotlib.
"""
import csv
import json
import math
from pathlib import Path

import numpy as np

import render
from checkpoint import misfit
from data.files import read_lines, reading
from run import InputError, Parser, main_guard

NO_CURVE = ("epoch", "seconds")
SCORES = ("accuracy", "miou", "macc", "oa", "map")      # drawn even where they are always 0
FEWSHOT = {"variant": str, "setting": [int, int], "curve": [float]}     # form of a line


def curves_of(run):
    """-> {name of a line: {metric: [(epoch, value), ...]}} of a run folder."""
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a run folder, runs/cls-...")
    lines = []
    for i, text in enumerate(read_lines(path), 1):
        try:
            lines.append(json.loads(text))
            form = {**dict.fromkeys(lines[-1], (None, float)), "epoch": int}
            if "curve" in lines[0]:
                form = {**FEWSHOT, "curve": [(None, float)] * len(lines[0]["curve"])}
            if misfit(lines[-1], form):
                raise ValueError
        except Exception:                   # whatever json makes of it
            raise InputError(f"{path}: line {i} is broken; remove it") from None
    if not lines:
        raise InputError(f"{path}: is empty; wait for the run's first epoch")
    name, found = Path(run).resolve().name, {}
    if "curve" in lines[0]:                 # few-shot: a line for each training
        episodes = {}
        for line in lines:
            what = "{} {}w{}s {}".format(name, *line["setting"], line["variant"])
            episodes.setdefault(what, []).append(line["curve"])
        for what, several in episodes.items():
            mean = np.mean(np.array(several, float), 0).tolist()        # NaN: not tested
            found[what] = {"accuracy": [(i, x) for i, x in enumerate(mean, 1) if x == x]}
        return found
    for line in lines:
        for metric, value in line.items():
            if metric not in NO_CURVE and value is not None:
                found.setdefault(metric, []).append((line["epoch"], value))
    return {name: found}


def draw_curves(runs, out):
    """Every metric of every run -> a .png."""
    from matplotlib.figure import Figure
    lines = {}
    for run in runs:
        for name, curves in curves_of(run).items():
            while name in lines:            # runs of one name in several folders
                name += "'"
            lines[name] = curves
    metrics = list(dict.fromkeys(           # without losses that are off, always 0
        metric for curves in lines.values() for metric, curve in curves.items()
        if any(score in metric for score in SCORES) or any(value for _, value in curve)))
    columns = min(3, len(metrics))
    rows = -(-len(metrics) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.9 * rows + 0.3 * len(lines)), layout="constrained")
    for i, metric in enumerate(metrics):
        axes = figure.add_subplot(rows, columns, i + 1, title=metric, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.grid(alpha=0.3)
        for color, (name, curves) in enumerate(lines.items()):
            if metric in curves:
                axes.plot(*zip(*curves[metric]), color=f"C{color % 10}", label=name, marker=".")
    first = {label: handle for axes in figure.axes
             for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(first.values(), first.keys(), loc="outside lower center")
    save(out, figure)


def draw_confusion(path, out):
    """confusion.csv -> a .png: rows are true classes, and add up to 100 %."""
    from matplotlib.figure import Figure
    with reading(path, "not a confusion.csv; evaluate the run again"):
        head, *rows = csv.reader(read_lines(path))
        names, counts = head[1:], np.array([row[1:] for row in rows], float)
        if counts.shape != (len(names), len(names)) or not (counts < math.inf).all():
            raise ValueError(f"expected a row and a column for each of {len(names)} classes")
    share = 100 * counts / counts.sum(1, keepdims=True).clip(1)
    side = 2.5 + 0.3 * len(names)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot(xlabel="predicted", ylabel="true", title="% of each true class")
    axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    for (i, j), percent in np.ndenumerate(share):
        if percent >= 0.5:
            axes.text(j, i, f"{percent:.0f}", ha="center", va="center", fontsize=7,
                      color="white" if percent > 55 else "black")
    save(out, figure)


def save(path, figure):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    render.save(path, np.asarray(canvas.buffer_rgba())[..., :3])
    print(path)


def main(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder")
    parser.add_argument("--out", metavar="FILE", help="where the curves go, a .png (default: "
                                                      "RUN/curves.png of the first)")
    args = parser.parse_args(argv)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError("look.py draws with matplotlib, which is not installed; pip install "
                         "matplotlib") from None
    if args.out and not args.out.lower().endswith(".png"):
        raise InputError(f"--out {args.out}: is written as a .png; end its name so")
    draw_curves(args.runs, args.out or Path(args.runs[0]) / "curves.png")
    for run in args.runs:
        if (Path(run) / "confusion.csv").is_file():
            draw_confusion(Path(run) / "confusion.csv", Path(run) / "confusion.png")


if __name__ == "__main__":
    main_guard(main)
