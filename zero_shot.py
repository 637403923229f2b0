"""Name point clouds by words, with no example or a few: CLIP2Point (Huang et al., ICCV 2023).

    python zero_shot.py --predict chair.obj scan.ply --classes "chair, table, lamp"
    python zero_shot.py --data modelnet40 --root DIR                    its test clouds
    python zero_shot.py --data modelnet40 --root DIR --shots 16         and with 16 examples of each
    python zero_shot.py --detections look --classes "chair, table"      boxes of train_det.py

A cloud is drawn as depth maps from several sides; the depth tower, which train_clip2point.py
pre-trained, makes a feature of each; the word whose prompt has the largest sum of cosines with them
names the cloud. Right after a clone the towers are nano-CLIP's, which know forty classes. --eval
RUN takes the depth tower of a run, --init-official FILE the authors'; any other --clip alone has
none, and its image tower names: the baseline.

To change the prompt, edit PROMPT in clip2point.py; the views, VIEWS there.
"""
import json
import os
from pathlib import Path

import run                                  # before torch: Ctrl-C during the imports
import numpy as np
import torch

import common
import pretrained
import render
from checkpoint import (COUNT, WHOLE, amount, check_frozen, checkpoint_form, load_checkpoint,
                        misfit)
from clip2point import (AFTER, BEFORE, SHOTS, VIEWS, Test, adapt, cosines, evaluate, farthest,
                        features_of, knows, load_both_towers, load_test, percent, pictures_of,
                        table, text_features, tower_of, views_for, y_up)
from data import objects
from data.files import columns, read_boxes, read_json, read_ply, reading
from run import InputError, Parser, Setup, check_files, check_place, main_guard, path, whole

POINTS = 1024               # of a cloud
EPOCHS = 100                # of the dual-path adapter: release, fewshot.py
NANO_EPOCHS = 30            # ours, for two CPU cores
# A mean cosine so much higher is clearly higher. Of 300 real clouds of ModelNet40, named among five
# words, this points out 66 % that are given with the wrong axis up, and 8 % with the right one.
CLEARLY = 0.08


# ---- Files ---------------------------------------------------------------------------------------
def name_files(args, clip, tower, cfg, setup):
    """--predict: name anybody's meshes or clouds among anybody's words; draw what was looked at."""
    names, points, cells = words_of(args.classes), cfg["recipe"]["points"], []
    text, (up, other) = text_features(clip, names), "yz" if cfg["up"] == "y" else "zy"
    for file in args.predict:
        xyz = torch.from_numpy(objects.read_one(file, 2 * points, points))
        xyz = objects.unit_sphere(farthest(xyz[None], points))          # (1, N, 3)
        seen = (features_of([tower], clip, y_up(xyz, axis), cfg, setup)[0] for axis in (up, other))
        mean, turned = (cosines(f, text)[0] / f.shape[1] for f in seen)         # (C,)
        share = (clip.scale * mean).softmax(0).tolist()
        words = [f"{names[i]} {100 * share[i]:.0f} % ({mean[i]:.2f})"
                 for i in mean.topk(min(5, len(names))).indices.tolist()]
        print(f"{file}:", *(f"  {word}" for word in words))
        if turned.max() > mean.max() + CLEARLY:
            print(f"{file}: with --up {other} it fits better, {names[turned.argmax()]} "
                  f"({turned.max():.2f}); does {other} point up in it?")
        maps, = pictures_of(clip, y_up(xyz, up), cfg)                   # (V, H, W, 3)
        lines, V = [Path(file).name, *(f"{i}. {w}" for i, w in enumerate(words, 1))], len(maps)
        cells += [render.Cell(x, "\n".join(lines[i::V])) for i, x in enumerate(maps)]
    what = BEFORE if tower is clip.visual else AFTER
    title = (f"what {clip.name}, {what}, looked at, {up} up; below, the names of the whole row: "
             "share (mean cosine)")
    render.save(args.out / "look.png", render.sheet(cells[:40 * V], V, title))  # of 40 files
    print(f"look: {args.out / 'look.png'}")


def words_of(classes):
    names = [name.strip() for name in classes.split(",")]
    if "" in names:
        raise InputError(f'--classes "{classes}": has an empty word; write "chair, table"')
    if len(set(names)) < len(names):
        raise InputError(f'--classes "{classes}": has a word twice; leave one out')
    return names


# ---- Test clouds of a data set -------------------------------------------------------------------
def name_clouds(args, clip, tower, cfg, setup):
    """--data and --shots: name the test clouds of a data set."""
    test, shots, classes, form, up = load_test(args.data, cfg, cfg["recipe"]["points"])
    known, names = known_classes(clip, args.data, classes)
    test, shots = (of_classes(*clouds, known) for clouds in (test[1:], shots))
    if not len(test[1]):
        raise InputError(f"{form}: has no test cloud of a class that {clip.name} knows; there is "
                         f"{', '.join(classes)[:200]}; --clip openai knows all words")
    test = Test(f"{args.data}'s test clouds", *test)
    unknown = [word for i, word in enumerate(classes) if i not in known]
    classes = [classes[i] for i in known]
    print(f"device   {setup.describe}; torch {torch.__version__}; seed {cfg['seed']}")
    print(f"data     {len(test.label):,} {test.name}, {len(known)} classes, {test.xyz.shape[1]} "
          f"points; {up} is up; {form}")
    if unknown:
        print(f"left out {clip.name} does not know {', '.join(unknown)}; --clip openai knows all "
              "words")
    if args.data.startswith("modelnet"):
        print("note     published zero-shot numbers are of the manually aligned ModelNet40")
    used = clip, text_features(clip, names), cfg, setup
    if turned_fits(up, tower, test.xyz, *used):
        other = "z" if up == "y" else "y"
        print(f"note     with --up {other} the words would fit better; does {other} point up?")
    print(f"views    {views_for(clip, cfg)}"
          + f", with shots {views_for(clip, cfg, True)}" * (args.shots is not None))

    found = {BEFORE: evaluate(clip.visual, [test], *used)}
    if tower is not clip.visual:
        found[AFTER] = evaluate(tower, [test], *used)
    scores, = found.get(AFTER, found[BEFORE])
    if args.shots is not None:
        shots = draw_shots(*shots, args.shots, cfg["seed"])
        counts = torch.bincount(shots[1], minlength=len(known)).tolist()
        few = [word for word, count in zip(classes, counts) if count < args.shots]
        print(f"shots    {len(shots[1]):,} clouds"
              + f"; there are fewer than {args.shots} of {', '.join(few)}" * bool(few))
        found[SHOTS.format(args.shots or "all")], best = adapt(tower, shots, [test], *used)
    print("\n".join(table(classes, [test], found)))
    if args.shots is not None:
        print(f"adapter  last epoch (best on test: {percent(best[0])} in epoch {best[1]})")
    print("worst    zero-shot: " + ", ".join(worst_classes(classes, scores, test.label)))


def known_classes(clip, data, classes):
    """-> numbers of the classes whose names the text tower knows, and these names as words."""
    # the release's prompt for ModelNet10 has an underscore: image of a night_stand
    names = [name if data == "modelnet10" else name.replace("_", " ") for name in classes]
    known = [i for i, name in enumerate(names) if knows(clip, name)]
    return known, [names[i] for i in known]


def of_classes(xyz, label, known):
    """The clouds of some classes, which are numbered anew in their order."""
    known = torch.tensor(known, dtype=torch.int64)
    kept = torch.isin(label, known)
    return xyz[kept], torch.searchsorted(known, label[kept])


def turned_fits(up, tower, xyz, clip, text, cfg, setup, most=100):
    """Whether the words fit better with the other axis up: the cosine of each cloud's best word
    grows by more than two standard errors. (100 clouds of ModelNet40 with the wrong axis: by six.)
    """
    some = xyz[torch.linspace(0, len(xyz) - 1, min(most, len(xyz))).long()]
    # `y_up` with the other axis: where it had turned z up, back to what was read
    other = y_up(some) if up == "y" else some[..., [2, 0, 1]]
    best, turned = (cosines(features_of([tower], clip, x, cfg, setup)[0], text).amax(1)
                    for x in (some, other))                             # (100,)
    gain = turned - best
    return len(gain) > 1 and (gain.mean() > 2 * gain.std() / len(gain) ** 0.5).item()


def draw_shots(xyz, label, shots, seed):
    """`shots` random clouds of each class; 0: all."""
    rng, rows = np.random.default_rng(seed), []
    for k in label.unique().tolist():
        mine = np.flatnonzero(label.numpy() == k)
        rows.append(np.sort(rng.permutation(mine)[:shots or None]))
    rows = torch.from_numpy(np.concatenate(rows))
    return xyz[rows], label[rows]


def worst_classes(classes, scores, label, most=8):
    """The classes that are named worst, and what their clouds are mostly taken for."""
    named, found = scores.argmax(1), []
    for k in label.unique().tolist():
        mine = named[label == k]
        wrong = mine[mine != k]
        taken = f" ({classes[wrong.mode().values]})" if len(wrong) else ""
        share = 1 - len(wrong) / len(mine)
        found.append((share, f"{classes[k]} {100 * share:.0f} %{taken}"))
    return [words for _, words in sorted(found)[:most]]


# ---- Boxes of train_det.py -----------------------------------------------------------------------
def name_boxes(args, clip, tower, cfg, setup):
    """--detections: give the boxes that train_det.py exported, with their clouds, anybody's words.

    Each box of 16 points or more is cut out, drawn and named. Writes them to NAME.json, scores
    multiplied by the share of the name. With --root, where NAME.json is of the true boxes, prints
    mAP@0.25.
    """
    names, folder = words_of(args.classes), Path(args.detections)
    folder = folder / "predicted" if (folder / "predicted").is_dir() else folder
    files = sorted(file for file in folder.glob("*.json") if file.with_suffix(".ply").is_file())
    if not files:
        raise InputError(f"--detections {folder}: no NAME.json with NAME.ply, as train_det.py "
                         "--export or --predict writes them")
    if args.out.resolve() == folder.resolve():
        raise InputError(f"--out {args.out}: the boxes lie there and would be written over; give "
                         "another folder")
    true = {file.stem: true_boxes(args.root, file.name) for file in files if args.root}
    text, found = text_features(clip, names), []
    args.out.mkdir(parents=True, exist_ok=True)
    for file in files:
        listed, boxes, xyz = read_detections(file)
        named = []
        for entry, box in zip(listed, boxes):
            inside = xyz[(np.abs(xyz - box[:3]) <= box[3:] / 2).all(1)].astype(np.float32)
            if len(inside) < 16:
                continue
            cloud = farthest(torch.from_numpy(inside)[None],
                             min(cfg["recipe"]["points"], len(inside)))
            cloud = y_up(objects.unit_sphere(cloud), cfg["up"] or "z")  # (1, N, 3)
            f, = features_of([tower], clip, cloud, cfg, setup)
            share = (clip.scale * cosines(f, text)[0] / f.shape[1]).softmax(0)
            entry["class"] = names[share.argmax()]
            entry["score"] = float(share.max()) * entry.get("score", 1.0)
            named.append(entry)
            found.append((file.stem, box, entry["score"], entry["class"]))
        (args.out / file.name).write_text(json.dumps(named, indent=1), encoding="utf-8")
        kinds = [entry["class"] for entry in named]
        counts = ", ".join(f"{kinds.count(name)} {name}" for name in names if name in kinds)
        empty = len(listed) - len(named)
        print(f"{file.stem}: {counts or 'no box'}"
              + f"; {empty} of fewer than 16 points left out" * bool(empty))
    if args.root:
        print_precision(found, true, names, args.root, clip.name)
    print(f"boxes: {args.out}")


def read_detections(file):
    """NAME.json and NAME.ply -> its list, boxes (k, 6), points (n, 3) without corners of boxes."""
    _, boxes = read_boxes(file)
    listed = read_json(file)
    for number, entry in enumerate(listed):
        if not amount(entry.get("score", 1.0)):
            raise InputError(f"{file}: the score of box {number} is not a number; export it again")
    with reading(file.with_suffix(".ply"), "export it again"):
        vertices, polygons = read_ply(file.with_suffix(".ply").read_bytes())
        xyz = columns(vertices, "x", "y", "z", kind=np.float64)
    corners = [] if polygons is None else np.unique(polygons)
    return listed, boxes, np.delete(xyz, corners, 0)


def true_boxes(root, name):
    """-> names of classes, boxes (k, 6), from where --data folder of train_det.py has them."""
    places = [Path(root) / part / name for part in ("", "val", "test")]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise InputError(f"--root {root}: has no {name}, val/{name} or test/{name} with the true "
                         "boxes; leave --root out")
    return read_boxes(file)


def average_precision(found, true, least=0.25):
    """Of one class, as VoteNet's and train_det.py's: the area under the monotone precision.

    found: (scene, box (6,), score) of each detection; true: {scene: boxes (k, 6)}. A detection is
    right if the true box it overlaps most has an IoU above `least` and was not found before.
    """
    right, taken = [], set()
    for scene, box, _ in sorted(found, key=lambda one: -one[2]):
        low = np.maximum(box[:3] - box[3:] / 2, true[scene][:, :3] - true[scene][:, 3:] / 2)
        high = np.minimum(box[:3] + box[3:] / 2, true[scene][:, :3] + true[scene][:, 3:] / 2)
        both = (high - low).clip(0).prod(1)                             # (k,)
        iou = both / (box[3:].prod() + true[scene][:, 3:].prod(1) - both).clip(1e-8)
        mine = (scene, int(iou.argmax())) if len(iou) else None
        right.append(mine is not None and iou.max() > least and mine not in taken)
        if right[-1]:
            taken.add(mine)
    hits, count = np.cumsum(right), sum(map(len, true.values()))
    precision = np.maximum.accumulate((hits / np.arange(1, len(hits) + 1))[::-1])[::-1]
    return float(np.sum(np.diff(hits / count, prepend=0) * precision))


def print_precision(found, true, names, root, clip):
    """found: (scene, box, score, name) of each detection; true: {scene: (names, boxes)}."""
    aps, plain = [], lambda name: name.replace("_", " ").lower()       # night_stand, Night stand
    for name in names:
        mine = {scene: boxes[[plain(kind) == plain(name) for kind in kinds]]
                for scene, (kinds, boxes) in true.items()}
        count = sum(map(len, mine.values()))
        if count:
            aps.append(average_precision([f[:3] for f in found if f[3] == name], mine))
            print(f"{name:16s}{count:6d} boxes, AP@0.25 {100 * aps[-1]:5.1f}")
        else:
            print(f"{name:16s}     no true box; not in the mean")
    if not aps:
        raise InputError(f"--root {root}: has no true box of any of --classes {', '.join(names)}")
    print(f"result   mAP@0.25 {percent(sum(aps) / len(aps))} over {len(aps)} classes that occur; "
          f"{clip}")


# ---- Main ----------------------------------------------------------------------------------------
def main(argv=None):
    args = flags(argv)
    cfg, saved = settings(args)
    setup = Setup(args.device, cfg["precision"])
    # random and shuffled weights of a run followed its own seed
    clip = load_both_towers(cfg["clip"], (saved["config"] if saved else cfg)["seed"], setup.device)
    check_frozen(cfg, saved, clip)
    common.print_warning(print, clip.name)
    work = name_files if args.predict else name_boxes if args.detections else name_clouds
    work(args, clip, tower_of(clip, saved, args.official), cfg, setup)


def flags(argv):
    parser = Parser(description=__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("--predict", nargs="+", metavar="FILE", help="name these meshes or clouds")
    flag("--data", choices=["modelnet40", "modelnet10", "scanobjectnn", "folder"],
         help="name the test clouds of --root")
    flag("--detections", type=path, metavar="DIR", help="name the boxes that train_det.py exported "
         "there, or a run of it; with --root, the folder of the true boxes, print mAP@0.25")
    flag("--classes", metavar="WORDS", help='with --predict, --detections: "chair, table, lamp"; '
                                           "shares are among these words")
    flag("--root", type=path, metavar="DIR",
         help="the data as its owners publish it (default: data/<name>)")
    flag("--shots", type=whole(0), metavar="K", help="with --data: train the dual-path adapter on "
         "K clouds of each class, too; 0: on all")
    flag("--clip", type=path, metavar="NAME",
         help=f"{pretrained.CLIP_NAMES} (default: nano; openai with --init-official; with --eval "
              "that of the run)")
    flag("--eval", type=path, metavar="RUN", help="the depth tower of a run of train_clip2point.py")
    flag("--init-official", type=path, metavar="FILE", dest="official",
         help="the authors' depth tower")
    flag("--views", choices=VIEWS, help="sides that a cloud is looked at from (default: axis6, "
                                        "with shots axis10; nano: oblique6)")
    flag("--average", action="store_true",
         help="control: the mean of a pixel's points, as PointCLIP, not the nearest")
    flag("--up", choices=["z", "y"], help="the axis that points up in your data (default z; with "
                                          "--data that of its form)")
    flag("--out", type=path, metavar="DIR",
         help="where --predict and --detections write (default: predicted, or RUN/predicted)")
    flag("--seed", type=whole(0), metavar="N", help="draws the shots, and random weights "
                                                    "(default 0; with --eval that of the run)")
    flag("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    flag("--precision", choices=["auto", "fp32", "bf16"],
         help="of the products (default auto; with --eval that of the run)")
    flag("--workers", type=whole(1), metavar="N", help="to prepare --data (default: cores)")
    return parser.parse_args(argv)


FORM = {"config": {         # what is read of train_clip2point.py's settings
    "clip": str, "seed": WHOLE, "precision": ("auto", "fp32", "bf16"), "views": (None, *VIEWS),
    "average": bool, "recipe": {"points": COUNT, "adapter": COUNT}}, **checkpoint_form(sums=3)}


def settings(args):
    """Flags over the settings of --eval's run -> config, checkpoint or None. Sets args.out."""
    by_words = bool(args.predict or args.detections)
    for wrong, line in (
            (bool(args.predict) + bool(args.detections) + bool(args.data) != 1,
             "give --predict FILE, --data NAME or --detections DIR, one of them"),
            (by_words != bool(args.classes), "--predict and --detections need words to choose "
             'from, and words need one of them: --classes "chair, table"'),
            (args.shots is not None and not args.data, "--shots needs clouds with labels: --data "
             "modelnet40 --root DIR"),
            (args.data and args.out, "--data prints and writes nothing; leave --out out"),
            (args.predict and args.root, "--predict takes files; leave --root out"),
            (args.official and args.eval, "--init-official and --eval both give a depth tower; "
             "leave one out"),
            (int(os.environ.get("WORLD_SIZE", 1)) > 1, "zero_shot.py runs in one process; leave "
             "torchrun out")):
        if wrong:
            raise InputError(line)
    saved, folder = None, Path()
    clip = args.clip or ("openai" if args.official else "nano")
    own = {"clip": clip, "seed": 0, "precision": "auto", "views": None, "average": False, "recipe":
           {"points": POINTS, "adapter": NANO_EPOCHS if clip.startswith("nano") else EPOCHS}}
    if args.eval:
        saved, folder = load_checkpoint(args.eval, "clip2point"), Path(args.eval)
        if wrong := misfit(saved, FORM):
            raise InputError(f"{folder}: {wrong} is not as this train_clip2point.py saves it; take "
                             "the run's other .pt file, or train anew")
        own, folder = saved["config"], folder if folder.is_dir() else folder.parent
    args.out = Path(args.out or folder / "predicted")
    check_files(args)
    if by_words:
        check_place(args.out)
    cfg = {name: own[name] for name in FORM["config"]}
    for name in ("clip", "seed", "precision", "views", "average"):
        value = getattr(args, name)
        if value is not None and value is not False:        # --seed 0 is given, too
            cfg[name] = value
    return {**cfg, "root": args.root, "up": args.up,
            "workers": args.workers or os.cpu_count()}, saved


if __name__ == "__main__":
    main_guard(main)
