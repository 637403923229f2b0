"""Look inside a classification run: what the frozen transformer makes of clouds, and of pictures.

    python analyse.py runs/cls-synthetic-1          pictures and analysis.json in RUN/analysis
    python analyse.py RUN --out DIR --root DATA     --root, --clip: where data or weights are now

It asks what figures of EPCL's paper (arXiv 2212.04098v1) ask, with controls:

    correlation.png   are a cloud and the picture of the same object alike?        Figures 4, 6
    tokens.png        norm, change and effective rank of rows, block by block
    saliency.png      which patches matter, in 2D and in 3D                        Figures 2, 5
    deletion.png      accuracy without them
    words.png         captions near a cloud: retrieval, not generation             for Figure 8
    tsne.png          clouds, and clouds with pictures                             Figures 7, 9, 11

Clouds go through the run's tokenizer, pictures through the patch embedding of its --clip, and both
through the run's blocks: a run with --clip nano=shuffled is the control. Curves need matplotlib,
t-SNE scikit-learn; without them the rest is made.
"""
import importlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import clip2point
import common
import nanoclip
import pretrained
import render
from attention import (BATCH, alignments, check_open, cloud_relevance, deletion, layers_of_clouds,
                       layers_of_pictures, load_stem, picture_relevance, projected, settle)
from checkpoint import (COUNT, WHOLE, check_frozen, checkpoint_form, load_checkpoint, load_weights,
                        misfit)
from common import Classifier
from data import objects
from data.synthetic_objects import ALL_CLASSES, STRETCH, make_object, scan_as_it_stands, yaw
from kernels import interpolate
from run import ABLATIONS, InputError, Parser, Setup, main_guard, seed_of, writing

TEST = 20, 2                # built-in test objects of each class, and their seed: train_cls.py's
LEAST, MOST = 10, 400       # test objects that are looked at, evenly spaced
VIEW = 25, 35               # elevation, azimuth in degrees: a picture of each object
SHOWN = 6                   # objects on saliency.png and words.png
PERPLEXITY, SEED = 30, 0    # of t-SNE
COLD, MILD, HOT = (60, 100, 180), (240, 225, 150), (205, 35, 35)    # least to most relevant


# ---- The run -------------------------------------------------------------------------------------
FORM = {"config": {         # what is read of train_cls.py's settings
    "data": ("synthetic", *objects.HOW_TO_GET), "root": (None, str), "clip": str, "seed": WHOLE,
    "recipe": {**dict.fromkeys(("points", "groups", "neighbours", "stored"), COUNT),
               "dropout": float, "unit": bool}, "classes": [str], "up": (..., "y", "z"),
    "workers": COUNT, "test_fraction": float, "split": (..., None, [[str], [str]]),
    "text_loss": ("raw", "cosine", "off"), "official": (None, str),
    **dict.fromkeys(ABLATIONS, bool)}, **checkpoint_form(sums=4)}


def load_run(args):
    """-> settings, checkpoint, FrozenCLIP with its text tower."""
    saved = load_checkpoint(args.run, "cls")
    wrong = misfit(saved, FORM)
    if wrong:
        raise InputError(f"{args.run}: {wrong} is not as this train_cls.py saves it; take the "
                         "run's other .pt file, or train anew")
    cfg = saved["config"]
    if cfg["no_transformer"]:
        raise InputError(f"{args.run}: was trained with --no-transformer; there is none to look "
                         "into, take another run")
    if cfg["official"]:
        raise InputError(f"{args.run}: began with --init-official, whose transformer has no patch "
                         "embedding for pictures; take a run that names it by --clip")
    cfg.update(clip=args.clip or cfg["clip"], root=args.root or cfg["root"])
    clip = pretrained.load_clip(cfg["clip"], cfg["seed"], trainable=cfg["unfreeze"])
    check_frozen(cfg, saved, clip)
    return cfg, saved, clip


# ---- The same objects as clouds and as pictures --------------------------------------------------
class Objects(NamedTuple):
    points: torch.Tensor    # (S, N, 3) as the model sees them
    pictures: torch.Tensor  # (S, 3, size, size) 0 .. 1
    drawn: torch.Tensor     # the same shape: the cloud as a depth map, from another side
    label: torch.Tensor     # (S,)
    up: str                 # the axis
    what: str


def load_objects(cfg, size, device):
    """The test objects of train_cls.py. Built-in ones are drawn as meshes; of other data there are
    clouds alone, whose picture is a depth map."""
    recipe, meshes, up = cfg["recipe"], [], "z"
    if cfg["data"] == "synthetic":
        xyz, label, meshes = built_in(cfg["classes"], recipe["stored"])
        what = "procedural objects, rendered"
    else:
        path = objects.prepare(cfg["data"], cfg["root"], recipe["stored"], cfg["workers"],
                               cfg["classes"])
        _, (xyz, label), classes, form = objects.load(
            path, recipe["points"], cfg["test_fraction"], cfg.get("split"))
        if list(classes) != cfg["classes"]:
            raise InputError(f"{form}: has other classes than the run: {' '.join(classes)[:200]}")
        what, up = f"{form}; pictures are depth maps", cfg.get("up", objects.up_of(form))
    if len(label) < LEAST:
        raise InputError(f"{what}: {len(label)} test objects are too few to compare, give at least "
                         f"{LEAST}")
    rows = np.linspace(0, len(label) - 1, min(MOST, len(label))).round().astype(int)
    points = torch.from_numpy(xyz[rows]).to(device)
    turned = clip2point.y_up(objects.unit_sphere(points), up)
    views = torch.tensor([(1, *VIEW), (1, VIEW[0], VIEW[1] + 90)], device=device)
    maps = [clip2point.depth_maps(part, views, size, clip2point.radius_of(size))
            for part in turned.split(BATCH)]
    pictures, drawn = torch.cat(maps)[:, :, None].expand(-1, -1, 3, -1, -1).unbind(1)
    if meshes:
        pictures = np.stack([picture_of(*meshes[i], size) for i in rows])       # (S, size, size, 3)
        pictures = torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2) / 255
    points = objects.unit_sphere(points) if recipe["unit"] else points
    points = clip2point.farthest(points, recipe["points"])
    label = torch.from_numpy(label[rows]).to(device)
    return Objects(points, pictures, drawn, label, up, what)


def built_in(classes, stored):
    """train_cls.py's test clouds, as `object_clouds` scans them, and the meshes as they stand."""
    (each, seed), xyz, meshes = TEST, [], []
    for k, name in enumerate(classes):
        for i in range(each):
            rng = np.random.default_rng([seed, k, i])
            vertices, faces = make_object(name, rng)
            turn = yaw(rng.uniform(0, 2 * np.pi))
            stretch = rng.uniform(1 - STRETCH, 1 + STRETCH, 3)
            vertices = (vertices * stretch @ turn).astype(np.float32)
            xyz.append(scan_as_it_stands(vertices, faces, stored, rng))
            meshes.append((vertices, faces))
    return np.stack(xyz), np.repeat(np.arange(len(classes)), each), meshes


def picture_of(vertices, faces, size):
    middle = (vertices.min(0) + vertices.max(0)) / 2
    radius = np.linalg.norm(vertices - middle, axis=1).max()
    camera = render.Camera(render.look(*VIEW), middle, radius / 0.9, radius / 0.2)
    return render.draw_mesh(vertices, faces, camera, size, size)


# ---- Saliency ------------------------------------------------------------------------------------
def heat(scores):
    """Numbers (n,) -> colours (n, 3) from COLD to HOT, the least to the most of them."""
    share = (scores - scores.min()) / (scores.max() - scores.min()).clamp(min=1e-12) * 2
    cold, mild, hot = (torch.tensor(x, device=scores.device).float() for x in (COLD, MILD, HOT))
    share = share[:, None]
    return torch.where(share < 1, cold + (mild - cold) * share, mild + (hot - mild) * (share - 1))


def saliency_cells(model, stem, objs, classes, prompts, rows, side=128):
    """Of each object: picture, its patches by relevance, cloud, its points by relevance."""
    clip, cells = model.encoder.clip, []
    for i in rows:
        true = classes[objs.label[i]]
        picture = objs.pictures[i:i + 1]
        large = F.interpolate(picture, size=(side, side))[0].permute(1, 2, 0) * 255
        cells.append(render.Cell(to_uint8(large), true))
        if prompts:
            best, R = picture_relevance(clip, stem, picture, torch.stack([*prompts.values()]))
            named, grid = [*prompts][best], round((R.shape[1] - 1) ** 0.5)
            colour = heat(R[0, 1:]).T.view(1, 3, grid, grid)
            colour = F.interpolate(colour, size=(side, side))[0].permute(1, 2, 0)
            cells.append(render.Cell(to_uint8(0.45 * large + 0.55 * colour), f"CLIP: {named}",
                                     None if named == true else render.RED))
        points = objs.points[i:i + 1]
        _, centers, logits, R = cloud_relevance(model, points)
        scores = R[:, 1:1 + centers.shape[1], None].contiguous()        # (1, G, 1)
        scores = interpolate(points.contiguous(), centers, scores)[0, :, 0]     # (N,)
        named = classes[logits.argmax()]
        camera = render.fit(points[0], render.look(*VIEW, up=objs.up))
        cells.append(render.Cell(render.draw_points(points[0], camera, side, side), true))
        cells.append(render.Cell(
            render.draw_points(points[0], camera, side, side, heat(scores)), f"EPCL: {named}",
            None if named == true else render.RED))
    return cells


def to_uint8(picture):
    return (picture + 0.5).clamp(0, 255).byte().cpu().numpy()


# ---- Words near a cloud, and t-SNE ---------------------------------------------------------------
# what captions of nano-CLIP say beside the class, without colours, which clouds have not
SHAPES = "", "tall", "flat", "compact"
SIDES = "", "seen from the front", "seen from the side", "seen from behind", "seen from above"


def prompts_of(clip, classes):
    """-> {class: CLIP's feature of its prompt, of length 1}, and the classes it has no word for."""
    known, unknown = {}, []
    for name in classes:
        try:
            feature = clip.text_features([common.PROMPT.format(name.replace("_", " "))])
            known[name] = F.normalize(feature[0], dim=0)
        except nanoclip.UnknownWords:
            unknown.append(name)
    return known, unknown


def words_for(clip, embedding, label, classes):
    """Retrieval, not generation: of each cloud the five captions whose products with its embedding
    (S, E) are the largest, as the text loss takes them. -> [[caption, ...], ...], numbers."""
    own = [name.replace("_", " ").lower() for name in classes]          # text towers read no case
    names = sorted({*own, *(name.replace("_", " ") for name in ALL_CLASSES)})
    captions = [(name, " ".join(filter(None, (shape, name, side))))
                for name in names for shape in SHAPES for side in SIDES]
    text = clip.text_features([common.PROMPT.format(words) for _, words in captions])
    best = (embedding @ text.to(embedding).T).topk(5).indices.tolist()  # (S, 5)
    right = np.array([[captions[j][0] == own[k] for j in row]
                      for row, k in zip(best, label.tolist())])
    return [[captions[j][1] for j in row] for row in best], {
        "captions": len(captions), "chance": 1 / len(names),
        "chance_of_five": 1 - (1 - 1 / len(names)) ** 5, "first_names_the_class":
        right[:, 0].mean(), "one_of_five_does": right.any(1).mean()}


def words_cells(words, objs, classes, rows, width=250, side=128):
    cells = []
    for i in rows:
        wide = np.full((side, width, 3), 255, np.uint8)
        left = (width - side) // 2
        wide[:, left:left + side] = render.draw_object(objs.points[i], side, objs.up)
        cells.append(render.Cell(wide, "\n".join([f"{classes[objs.label[i]]}:", *words[i]])))
    return cells


def named_by_prompts(prompts, classes, label, **features):
    """Shares of features (S, E) whose most similar prompt names the object's class; None where no
    object has a class with a prompt."""
    text, names = torch.stack([*prompts.values()]), np.array([*prompts])
    true = np.array(classes)[label.cpu()]
    known = np.isin(true, names)
    if not known.any():
        return None
    return {"chance": 1 / len(names), **{
        kind: (names[(F.normalize(x, dim=1) @ text.to(x).T).argmax(1).cpu()] == true)[known].mean()
        for kind, x in features.items()}}


@torch.no_grad()
def embeddings(model, points):
    return torch.cat([model(part)[1] for part in points.split(BATCH)])


def tsne(features, name):
    """(n, D) -> (n, 2), by way of length 1 and 50 principal components; a title that says how."""
    from sklearn.manifold import TSNE
    x = F.normalize(features.double(), dim=1)
    x = x - x.mean(0)
    x = x @ torch.linalg.svd(x, full_matrices=False).Vh[:50].T
    perplexity = min(PERPLEXITY, (len(x) - 1) // 3)
    make = TSNE(perplexity=perplexity, init="pca", random_state=SEED)
    title = f"{name}; t-SNE, perplexity {perplexity}, seed {SEED}"
    return make.fit_transform(x.cpu().numpy()), title


def tsne_panels(embedding, clouds, pictures):
    """-> {title: {modality: (S, 2)}}. Distances between groups in such pictures mean nothing."""
    alone, title = tsne(embedding, "embeddings of clouds")
    centred = torch.cat([x - x.mean(0) for x in (clouds, pictures)])
    joint, joint_title = tsne(centred, "class rows, each modality centred")
    return {title: {"clouds": alone},
            joint_title: dict(zip(("clouds", "pictures"), np.split(joint, 2)))}


# ---- Figures -------------------------------------------------------------------------------------
def draw_deletion(figure, found):
    axes = figure.add_subplot(xlabel="% of the patches left out", ylabel="accuracy in %",
                              title="bands: 95 % of the difference to random")
    steps = found["removed"]
    at = [0, *(100 * step["patches"] / step["of"] for step in steps)]
    for kind, color in (("least_relevant", "C0"), ("random", "0.5"), ("most_relevant", "C3")):
        y = np.array([found["accuracy"], *(step[kind] for step in steps)])
        axes.plot(at, 100 * y, color=color, marker=".", label=kind.replace("_", " "))
        if kind != "random":                # the 95 % interval of the difference to random
            half = np.array([0, *(np.ptp(step[f"{kind}_minus_random"][1:]) / 2 for step in steps)])
            axes.fill_between(at, 100 * (y - half), 100 * (y + half), color=color, alpha=0.2,
                              linewidth=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()


def draw_tokens(figure, tokens):
    titles = {
        "norm_patches": "norm of a patch row", "change_patches": "norm of what a block adds to it",
        "rank_patches": "effective rank of all patch rows", "norm_class": "norm of the class row",
        "change_class": "norm of what a block adds to it",
        "rank_class": "effective rank of all class rows"}
    for i, (key, title) in enumerate(titles.items()):
        axes = figure.add_subplot(2, 3, i + 1, title=title, xlabel="block")
        for (name, numbers), look in zip(tokens.items(), (("0.3", "-"), ("C1", "--"), ("C0", "-"))):
            y = np.array(numbers[key], float)
            axes.plot(np.arange(len(y)) + ("change" in key), y, look[1], color=look[0], marker=".",
                      label=name)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)


def draw_correlation(figure, found):
    titles = {"mean_of_patches": "mean of the patch rows", "class_row": "class row"}
    for i, (rows, title) in enumerate(titles.items()):
        axes = figure.add_subplot(1, 2, i + 1, title=title, xlabel="block", ylim=(-0.25, 1),
                                  ylabel="correlation with pictures")
        for (name, layers), style in zip(found.items(), (":", "--", "-")):
            for kind, color in (("mismatched", "0.5"), ("same_class", "C1"), ("matched", "C3")):
                y = np.array([(layer or {}).get(kind) for layer in layers[rows]], float)
                axes.plot(y, style, color=color, marker=".",
                          label=f"{name}: {kind.replace('_', ' ')}")
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)


def draw_tsne(figure, panels, label, classes):
    """panels: {title: {modality: (S, 2)}}."""
    for i, (title, places) in enumerate(panels.items()):
        axes = figure.add_subplot(1, 2, i + 1, title=title, xticks=[], yticks=[])
        for (kind, xy), marker in zip(places.items(), "ox"):
            axes.scatter(*xy.T, s=14, c=label % 20, cmap="tab20", vmin=-0.5, vmax=19.5,
                         marker=marker, linewidths=0.8, alpha=0.7, label=kind)
        for k in np.unique(label):          # names stand at the last modality
            axes.text(*np.median(xy[label == k], 0), classes[k], fontsize=8, ha="center",
                      bbox={"color": "white", "alpha": 0.6, "pad": 0.5})
        axes.legend(loc="upper right", labelcolor="black")


def figure(size, draw, *what):
    """-> a picture (H, W, 3) by matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    canvas = FigureCanvasAgg(Figure(figsize=size, layout="constrained"))
    draw(canvas.figure, *what)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def percent(share):
    return f"{100 * share:.1f} %"


# ---- Main ----------------------------------------------------------------------------------------
class Report:
    """Pictures in a folder, numbers in its analysis.json, and lines that say what was left out."""

    def __init__(self, folder, **about):
        self.folder, self.numbers = folder, {**about, "left_out": []}
        with writing(folder, "give another --out"):
            folder.mkdir(parents=True, exist_ok=True)

    def leave_out(self, what, why):
        self.numbers["left_out"].append(f"{what}: {why}")
        print(f"left out {what}: {why}")

    def show(self, name, picture):
        render.save(self.folder / name, picture)
        print(f"look     {self.folder / name}")

    def draw(self, name, size, how, *what):
        """By matplotlib, if it is there."""
        if installed("matplotlib"):
            self.show(name, figure(size, how, *what))

    def end(self):
        path = self.folder / "analysis.json"
        with writing(path):
            path.write_text(json.dumps(self.numbers, indent=1) + "\n", encoding="utf-8")
        print(f"numbers  {path}")


def installed(package):
    try:
        return importlib.import_module(package) is not None
    except ImportError:
        return False


def main(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("run", metavar="RUN", help="a run of train_cls.py, its folder or a .pt file")
    flag("--out", metavar="DIR", help="where the pictures go (default: RUN/analysis)")
    flag("--root", metavar="DIR", help="where the run's data is now")
    flag("--clip", metavar="NAME", help="where the run's frozen weights are now")
    args = parser.parse_args(argv)
    cfg, saved, clip = load_run(args)
    device, classes = Setup(precision="fp32").device, cfg["classes"]
    stem = load_stem(cfg["clip"], cfg["seed"], device)
    objs = load_objects(cfg, stem.size, device)
    torch.manual_seed(seed_of(cfg["seed"]))                             # as train_cls.py began
    model = Classifier(clip, len(classes), cfg).to(device)
    settle(model, objs.points)
    check_open(model, objs.points[:BATCH])
    run = Path(args.run)
    report = Report(Path(args.out or (run if run.is_dir() else run.parent) / "analysis"),
                    run=args.run, data=cfg["data"], clip=cfg["frozen"], objects=len(objs.label),
                    text_loss=cfg["text_loss"], epoch=saved["at"]["epoch"])
    print(f"data     {len(objs.label)} test objects of {len(classes)} classes; {objs.what}")
    if not installed("matplotlib"):
        report.leave_out("tokens.png, correlation.png, deletion.png, tsne.png",
                         "matplotlib is not installed; pip install matplotlib")

    untrained = layers_of_clouds(model, objs.points), layers_of_pictures(clip, stem, objs.pictures)
    load_weights(model, saved["model"], where=f"{args.run}: its weights")
    model.eval()
    trained = layers_of_clouds(model, objs.points), layers_of_pictures(clip, stem, objs.pictures)
    drawn = layers_of_pictures(clip, stem, objs.drawn)
    report_layers(report, clip, objs.label, {"control: the cloud drawn": (drawn, trained[1]),
                                             "clouds, untrained": untrained,
                                             "clouds, trained": trained})
    clouds, pictures = (projected(clip, x) for x in trained)            # (S, E)
    prompts = report_prompts(report, clip, classes, objs.label, clouds, pictures)
    rows = np.linspace(0, len(objs.label) - 1, SHOWN + 2).round().astype(int)[1:-1].tolist()
    if cfg["deep_prompt"]:
        report.leave_out("saliency.png, deletion.png", "the rule follows rows from block to block, "
                         "and --deep-prompt replaces some in each")
    elif cfg["recipe"]["groups"] < 3:
        report.leave_out("saliency.png, deletion.png", "a cloud is too few patches to leave some "
                         "out; they take three or more")
    else:
        report_saliency(report, model, stem, objs, classes, prompts, rows)
    embedding = embeddings(model, objs.points)                          # (S, 512)
    if clip.text is not None and (cfg["text_loss"] == "off" or len(prompts) < len(classes)):
        report.leave_out("words.png", "the run had no text loss, so nothing ties its embedding to "
                         "words")
    elif clip.text is not None:
        report_words(report, clip, embedding, objs, classes, rows)
    if not installed("sklearn"):
        report.leave_out("tsne.png", "scikit-learn is not installed; pip install scikit-learn")
    else:
        panels = tsne_panels(embedding, clouds, pictures)
        report.draw("tsne.png", (13, 6.6), draw_tsne, panels, objs.label.cpu().numpy(), classes)
    report.end()


def report_layers(report, clip, label, pairs):
    """pairs: {what is compared with pictures: (its Layers, the pictures')}."""
    _, pictures = next(iter(pairs.values()))
    tokens = {"pictures": pictures.numbers,
              **{name: x.numbers for name, (x, _) in [*pairs.items()][1:]}}
    found = {name: alignments(clip, *pair, label) for name, pair in pairs.items()}
    report.numbers.update(tokens=tokens, correlation=found)
    for name, layers in found.items():
        last = layers["projected"]
        low, high = last["gap_permuted"]
        print(f"alike    {name}: correlation with its picture {last['matched']:.3f}, with others "
              f"{last['matched'] - last['gap']:.3f} (by chance within {low:+.3f}, {high:+.3f} of "
              f"that); the nearest is its own {percent(last['top1'])}"
              f" (chance {percent(last['top1_permuted'][0])}), of its class "
              f"{percent(last['top1_class'])} ({percent(last['top1_class_permuted'][0])})")
    report.draw("tokens.png", (11, 5.8), draw_tokens, tokens)
    report.draw("correlation.png", (11, 5), draw_correlation, found)


def report_prompts(report, clip, classes, label, clouds, pictures):
    """-> {class: feature of its prompt}, of the classes that CLIP has words for."""
    if clip.text is None:
        report.leave_out("relevance of pictures, words.png", f"{clip.name} {clip.no_text}")
        return {}
    prompts, unknown = prompts_of(clip, classes)
    if unknown:
        report.leave_out(f"prompts of {', '.join(unknown)}", f"{clip.name} has no word for them")
    right = prompts and named_by_prompts(prompts, classes, label, clouds=clouds, pictures=pictures)
    if right:
        report.numbers["zero_shot"] = right
        print(f"prompts  name {percent(right['pictures'])} of the pictures, and by their class row "
              f"{percent(right['clouds'])} of the clouds (chance {percent(right['chance'])})")
    return prompts


def report_saliency(report, model, stem, objs, classes, prompts, rows):
    report.numbers["saliency"] = found = deletion(model, objs.points, objs.label)
    for step in found["removed"]:
        mean, low, high = (100 * x for x in step["most_relevant_minus_random"])
        print(f"saliency accuracy without {step['patches']} of {step['of']} patches: the most "
              f"relevant {percent(step['most_relevant'])}, random {percent(step['random'])}, "
              f"difference {mean:+.1f} [{low:+.1f}, {high:+.1f}]; the least relevant "
              f"{percent(step['least_relevant'])}")
    print(f"saliency {percent(found['relevance_on_task_tokens'])} of the relevance is on task "
          f"tokens, which are {percent(found['task_tokens_among_rows'])} of the rows; the logit "
          "reads the maximum over rows, too, and that path the rule does not see")
    cells = saliency_cells(model, stem, objs, classes, prompts, rows)
    report.show("saliency.png", render.sheet(
        cells, len(cells) // SHOWN * 2, "relevance to the class that is named, Chefer's rule over "
        "all blocks; wrong names in red", [("least relevant", COLD), ("in between", MILD),
                                           ("most relevant", HOT)]))
    report.draw("deletion.png", (5, 3.8), draw_deletion, found)


def report_words(report, clip, embedding, objs, classes, rows):
    try:
        words, numbers = words_for(clip, embedding, objs.label, classes)
    except nanoclip.UnknownWords as error:
        report.leave_out("words.png", f"{clip.name} does not know {error}")
        return
    report.numbers["words"] = numbers
    print(f"words    of {numbers['captions']} captions the nearest to a cloud names its class: "
          f"{percent(numbers['first_names_the_class'])} (chance {percent(numbers['chance'])}), one "
          f"of the nearest five: {percent(numbers['one_of_five_does'])} "
          f"({percent(numbers['chance_of_five'])})")
    report.show("words.png", render.sheet(
        words_cells(words, objs, classes, rows), SHOWN // 2, "the five captions nearest to a "
        f"cloud's embedding, of {numbers['captions']}: retrieval, not generation"))


if __name__ == "__main__":
    main_guard(main)
