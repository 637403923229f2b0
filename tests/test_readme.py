"""README.md and docs/ keep their promises: every command in them is run here, made small, and
every script works in a folder that holds what the table of README says and nothing else."""
import contextlib
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import analyse
import bench
import controls
import look
import pretrained
import run as run_module
import test_analyse
import test_bench
import test_clip
import test_clip2point
import test_controls
import test_look
import train_clip
import train_clip2point
import train_cls
import train_det
import train_fewshot
import train_outdoor
import train_seg
import zero_shot
from data import kitti, objects, synthetic_street
from data.files import write_ply
from test_files import CUBE, FACES, ply, shapes

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [README, *(path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("docs/*.md")))]
FENCES = re.compile(r"^```.*?^```$", re.M | re.S)       # what programs printed, layouts of folders
COMMANDS = list(dict.fromkeys(
    line.strip() for page in PAGES for line in FENCES.sub("", page).splitlines()
    if line.startswith("    ")))
pytestmark = pytest.mark.usefixtures("one_thread")


def commands_of(word):
    return pytest.mark.parametrize("command", [c for c in COMMANDS if word in c])


def test_readme_begins_with_two_commands_and_no_page_has_a_blank_left_to_fill():
    section = FENCES.sub("", README).split("\n## ")[1]
    assert section.startswith("Two commands")
    found = [line.split(" && ") for line in section.splitlines() if line.startswith("    ")]
    assert [words[1] for words in found] == [
        "python train_cls.py", "python -m pytest -q -n 2 --dist loadfile tests"]
    assert len(PAGES) >= 5 and not any(re.search(r"@\w+@", page) for page in PAGES)


# --- every command --------------------------------------------------------------------------------

def words_of(command, script, **values):
    """The arguments of a script's command, with smaller values for the flags it gives."""
    words = shlex.split(command.split(" && ")[-1])
    words = words[words.index(script) + 1:]
    for flag, value in values.items():
        flag = "--" + flag.replace("_", "-")
        if flag in words:
            words[words.index(flag) + 1] = value
    return words


def run_above(words, main, monkeypatch, *more):
    """Make the run that a command speaks of, stopped after a step where it is to be resumed."""
    name = next((w for w in words if w.startswith("runs/")), None)
    if name is None:
        return None
    resumed = "--resume" in words
    with monkeypatch.context() as patch:
        patch.setattr(run_module.Stopper, "now", lambda self, step: resumed)
        with pytest.raises(SystemExit) if resumed else contextlib.nullcontext():
            main(["--data", name.split("-")[1], *more])
    assert Path(name, "last.pt").exists() and Path(name, "results.json").exists() != resumed
    return name


@pytest.fixture(autouse=True)
def weights_that_are_not_here(monkeypatch):
    """Commands name files of weights; small ones are loaded instead."""
    monkeypatch.setattr("run.check_files", lambda args: None)


def small_clip(monkeypatch, tiny_clip):
    load = pretrained.load_clip
    monkeypatch.setattr(pretrained, "load_clip", lambda name, *a, **k: load(tiny_clip, *a, **k))


def small_recipes(monkeypatch, script, recipe):
    for name in script.RECIPES:
        monkeypatch.setitem(script.RECIPES, name, recipe)


def small_objects(script, *counts):
    """Few clouds of three classes, to train and to test, as the script's Objects."""
    for seed, n in enumerate(counts):
        xyz = np.concatenate(list(shapes(n, seed=seed).values())).astype(np.float32)
        yield script.Objects(torch.from_numpy(xyz), torch.arange(3).repeat_interleave(n))


@commands_of("train_cls.py")
def test_each_training_command_runs(command, tmp_path, monkeypatch, tiny_clip, capsys):
    """As written, with small clouds for the data set, a small transformer, and two epochs."""
    words = words_of(command, "train_cls.py", epochs="2", points="64", groups="8", neighbours="8",
                     batch_size="6")
    small_clip(monkeypatch, tiny_clip)
    classes = tuple(shapes(1))
    monkeypatch.setattr(train_cls, "load_data", lambda cfg, training: (
        *small_objects(train_cls, 4, 2), classes, f"small clouds instead of {cfg['data']}"))
    for name, recipe in train_cls.RECIPES.items():
        monkeypatch.setitem(train_cls.RECIPES, name, recipe._replace(
            points=64, groups=8, neighbours=8, stored=128, epochs=2, batch_size=6))
    monkeypatch.chdir(tmp_path)
    run = run_above(words, train_cls.main, monkeypatch)
    vertices = "".join("v {} {} {}\n".format(*v) for v in CUBE)
    faces = "".join("f {} {} {} {}\n".format(*(i + 1 for i in face)) for face in FACES)
    Path("chair.obj").write_text(vertices + faces, encoding="utf-8")
    Path("scan.ply").write_bytes(ply(shapes(1)["ball"][0]))
    capsys.readouterr()
    train_cls.main(words)
    printed = capsys.readouterr().out
    if "--predict" in words:
        assert printed.count("ball") == 2 and printed.startswith("chair.obj:")
    else:
        assert "result   accuracy" in printed
        assert ("resumed after" in printed) == ("--resume" in words)
        assert ("voting   accuracy" in printed) == ("--vote" in words)
    assert list(Path(run or "runs").glob("**/results.json"))


def fold():
    """What Point-BERT published: a 3-way 4-shot episode, with fewer points."""
    return {part: [(np.concatenate([xyz, 0 * xyz], 1).astype(np.float32), k, np.int64(2 - k))
                   for k, clouds in enumerate(shapes(n).values()) for xyz in clouds]
            for part, n in (("train", 4), ("test", 20))}


@commands_of("train_fewshot.py")
def test_each_few_shot_command_runs(command, tmp_path, monkeypatch, tiny_clip, capsys):
    """As written, with few small clouds for the data set, a small transformer, one epoch, two
    episodes."""
    words = words_of(command, "train_fewshot.py", way="3", shot="4", shots_all="3", points="64",
                     groups="8", neighbours="8", epochs="1", batch_size="6")
    load = pretrained.load_clip

    def clip(name, seed=0, trainable=False):            # random is to differ from tiny_clip
        name = "timm:test_vit=random" if name.endswith("random") else tiny_clip
        return load(name, seed + 1, trainable)

    monkeypatch.setattr(pretrained, "load_clip", clip)
    classes = tuple(shapes(1))

    def load_data(cfg):
        if cfg["data"] == "folder":
            cfg["split"] = [["a"], ["b"]]               # it has no test set of its own
        return train_fewshot.Data(*small_objects(train_fewshot, 5, 21), classes,
                                  f"small clouds instead of {cfg['data']}")

    monkeypatch.setattr(train_fewshot, "load_data", load_data)
    monkeypatch.setattr(train_fewshot, "MODELNET40", classes)
    monkeypatch.setattr(train_fewshot, "TABLE3", [(2, 3), (2, 4), (3, 3), (3, 4), (9, 3)])
    for name, recipe in train_fewshot.RECIPES.items():
        monkeypatch.setitem(train_fewshot.RECIPES, name, recipe._replace(
            points=64, groups=8, neighbours=8, stored=96, epochs=1, batch_size=6))
    small = ["--episodes", "2"]
    if "--shots-all" not in words and "--table" not in words:
        small += ["--way", "3", "--shot", "4"]
    monkeypatch.chdir(tmp_path)
    folder = Path("data/ModelNetFewshot/3way_4shot")
    folder.mkdir(parents=True)
    for i in range(2):
        (folder / f"{i}.pkl").write_bytes(pickle.dumps(fold()))
    run = run_above(words, train_fewshot.main, monkeypatch, *small)
    capsys.readouterr()
    train_fewshot.main(words if run else [*small, *words])
    printed = capsys.readouterr().out
    assert "mean ± population standard deviation over" in printed
    assert ("resumed after" in printed) == ("--resume" in words)
    assert ("folds of data/ModelNetFewshot" in printed) == ("--folds" in words)
    if "--compare" in words:
        others = words[words.index("--compare") + 1].split(",")[1:]
        assert all(re.search(rf"^    {name} .*\[", printed, re.M) for name in others)
    assert list(Path("runs").glob("fewshot-*/results.json"))


@commands_of("train_det.py")
def test_each_detection_command_runs(command, tmp_path, monkeypatch, tiny_clip, capsys):
    """As written, with small rooms for the scans, a small transformer and one epoch."""
    words = words_of(command, "train_det.py", points="512", tokens="64", queries="64", epochs="1")
    small_clip(monkeypatch, tiny_clip)
    monkeypatch.setattr(train_det, "SYNTHETIC", (2, 1))
    monkeypatch.setattr(train_det, "load_scenes",
                        lambda cfg, training: train_det.load_synthetic(750))
    small_recipes(monkeypatch, train_det, train_det.RECIPES["synthetic"]._replace(
        points=512, tokens=64, radius=.8, neighbours=16, queries=64, layers=2, epochs=1,
        batch_size=2, every=1))
    monkeypatch.chdir(tmp_path)
    write_ply(Path("scan.ply"), train_det.load_synthetic(750)[0][0].xyz.numpy())
    run = run_above(words, train_det.main, monkeypatch, "--epochs", "2")
    capsys.readouterr()
    train_det.main(words)
    printed = capsys.readouterr().out
    if "--predict" in words:
        assert "scan.ply: 1,500 points" in printed
        assert Path(run, "predicted", "scan.json").is_file()
    else:
        assert "result   mAP@0.25" in printed
        assert ("resumed after" in printed) == ("--resume" in words)
    if "--export" in words:
        exported = Path(words[words.index("--export") + 1])
        assert {path.name for path in exported.iterdir()} == {
            "room000.ply", "room000.json", "look.png"}
    assert list(Path("runs").glob("det-*/results.json"))


@commands_of("train_seg.py")
def test_each_segmentation_command_runs(command, tmp_path, monkeypatch, tiny_clip, capsys):
    """As written, with small rooms for the data, a small transformer and one epoch."""
    words = words_of(command, "train_seg.py", points="128", epochs="1")
    small_clip(monkeypatch, tiny_clip)
    monkeypatch.setattr(train_seg, "SYNTHETIC", (2, 1, 1200))
    rooms = train_seg.load_synthetic()
    monkeypatch.setattr(train_seg, "load_rooms", lambda cfg, training: rooms)
    small_recipes(monkeypatch, train_seg, train_seg.RECIPES["synthetic"]._replace(
        points=128, tokens=32, neighbours=8, epochs=1, batch_size=4, every=1))
    monkeypatch.chdir(tmp_path)
    write_ply(Path("scan.ply"), rooms[0][0].xyz.numpy(), rooms[0][0].rgb.numpy())
    run = run_above(words, train_seg.main, monkeypatch, "--epochs", "2")
    capsys.readouterr()
    train_seg.main(words)
    printed = capsys.readouterr().out
    if "--predict" in words:
        assert "scan.ply: 1,200 points" in printed
        assert len(np.load(Path(run, "predicted", "scan.npy"))) == 1200
    else:
        assert "result   mIoU" in printed
        assert ("resumed after" in printed) == ("--resume" in words)
        assert (" votes" in printed) == ("--vote" in words)
    if "--export" in words:
        exported = Path(words[words.index("--export") + 1])
        assert {path.name for path in exported.iterdir()} == {
            "room000.ply", "room000.npy", "look.png"}
    assert list(Path("runs").glob("seg-*/results.json"))


@commands_of("train_outdoor.py")
def test_each_outdoor_command_runs(command, tmp_path, monkeypatch, tiny_clip, capsys):
    """As written, with few streets for the data, a small transformer and one epoch."""
    words = words_of(command, "train_outdoor.py", epochs="1", seed="0", remission="1")
    small_clip(monkeypatch, tiny_clip)
    monkeypatch.setattr(synthetic_street, "BEAMS", 16)
    monkeypatch.setattr(synthetic_street, "COLUMNS", 90)
    scan = kitti.Scan("a", *synthetic_street.scan_street(0))
    data = train_outdoor.Data([scan] * 4, [scan], kitti.CLASSES, lambda scan: scan, "streets")
    monkeypatch.setattr(train_outdoor, "load_scans", lambda cfg, training=True: data)
    monkeypatch.setattr(kitti, "pairs", lambda *_, **__: [(tmp_path / "11/velodyne/0.bin", None)])
    small_recipes(monkeypatch, train_outdoor, train_outdoor.RECIPES["synthetic"]._replace(
        voxel=1.0, width=0.125, tokens=16, neighbours=4, epochs=1, batch_size=2, every=1))
    monkeypatch.chdir(tmp_path)
    for path in (Path("scan.bin"), Path("11/velodyne/0.bin")):
        path.parent.mkdir(parents=True, exist_ok=True)
        np.c_[scan.xyz, scan.remission].tofile(path)
    run = run_above(words, train_outdoor.main, monkeypatch, "--epochs", "2")
    capsys.readouterr()
    train_outdoor.main(words)
    printed = capsys.readouterr().out
    if "--predict" in words:
        assert Path(run, "predicted/scan.label").stat().st_size == 4 * len(scan.xyz)
    elif "--export-test" in words:
        place = Path(words[words.index("--export-test") + 1]) / "sequences/11/predictions/0.label"
        assert place.stat().st_size == 4 * len(scan.xyz)
    else:
        assert "result   mIoU" in printed
        assert ("resumed after" in printed) == ("--resume" in words)


def small_clip2point(monkeypatch, folder):
    """A small nano-CLIP, and few clouds of three classes for a data set's."""
    nano = f"nano={test_bench.nano_file(folder)}"
    test_clip2point.shrink(monkeypatch, folder, nano)
    xyz = torch.from_numpy(np.stack([c for k in shapes(3).values() for c in k])).float()
    label, load = torch.arange(3).repeat_interleave(3), train_clip2point.load_both_towers
    classes = "cup", "night_stand", "bed"
    for script in (train_clip2point, zero_shot):
        monkeypatch.setattr(script, "load_both_towers", lambda name, *a: load(nano, *a))
        monkeypatch.setattr(script, "load_test", lambda name, *_: (
            script.Test(name, xyz, label), (xyz, label), classes, "small", "z"))
    pairs = train_clip2point.load_pairs
    monkeypatch.setattr(train_clip2point, "load_pairs", lambda cfg, *a: pairs(
        {**cfg, "data": "synthetic", "workers": 1}, *a))


@commands_of("train_clip2point.py")
def test_each_clip2point_command_runs(command, tmp_path, monkeypatch, capsys):
    """As written, with a small nano-CLIP, few clouds for the data set, and two epochs."""
    words = words_of(command, "train_clip2point.py", objects="1")
    small_clip2point(monkeypatch, tmp_path)
    train_clip2point.main(words)
    printed = capsys.readouterr().out
    assert ("dual-path adapter" in printed) == ("--data" not in words)
    assert "CLIP's image tower" in printed


@commands_of("zero_shot.py")
def test_each_zero_shot_command_runs(command, tmp_path, monkeypatch, capsys):
    """As written, with a small nano-CLIP and few clouds for the data set."""
    words = words_of(command, "zero_shot.py")
    small_clip2point(monkeypatch, tmp_path)
    run_above(words, train_clip2point.main, monkeypatch)
    write_off = test_clip2point.write_off
    write_off(Path("chair.off"), "chair", 0)
    vertices, faces = objects.Source("chair", 0, "chair.off").read()
    Path("chair.obj").write_text("".join("v {} {} {}\n".format(*v) for v in vertices) + "".join(
        "f {} {} {}\n".format(*face) for face in faces + 1), encoding="utf-8")
    write_ply(Path("scan.ply"), vertices[np.arange(300) % len(vertices)])
    Path("look").mkdir()
    write_ply(Path("look/room.ply"), vertices[np.arange(300) % len(vertices)])
    Path("look/room.json").write_text(json.dumps([{"class": "bed", "size": [4, 4, 4],
                                                   "center": [0, 0, 0]}]), encoding="utf-8")
    capsys.readouterr()
    zero_shot.main(words)
    printed = capsys.readouterr().out
    if "--predict" in words:
        assert printed.count("chair ") == 2 and Path("predicted/look.png").is_file()
    elif "--detections" in words:
        assert "\nroom: 1 " in printed and Path("predicted/room.json").is_file()
    else:
        assert ("dual-path adapter" in printed) == ("--shots" in words)
        assert "CLIP's image tower" in printed


@commands_of("train_clip.py")
def test_each_nano_clip_command_runs(command, tmp_path, monkeypatch, capsys):
    """As written, with few pictures and few clouds for the data set."""
    words = words_of(command, "train_clip.py")
    monkeypatch.setitem(train_clip.RECIPES, "synthetic", test_clip.SMALL)
    monkeypatch.setattr(train_clip, "TEST", (1, 2))
    monkeypatch.setattr(train_clip, "prepared_folder", lambda root, name: tmp_path)
    monkeypatch.setattr(train_clip.objects, "prepare", lambda *args: args[1])
    xyz = np.concatenate(list(shapes(2).values())).astype(np.float32)
    monkeypatch.setattr(train_clip.objects, "load", lambda *args, fraction, flag: (
        None, (xyz, np.arange(3).repeat(2)), ("cup", "night_stand", "thing"), "small clouds"))
    monkeypatch.chdir(tmp_path)
    run_above(words, train_clip.main, monkeypatch)
    capsys.readouterr()
    train_clip.main(words)
    printed = capsys.readouterr().out
    assert "result   held-out renders, by prompt" in printed
    assert ("real     4 clouds of 2 classes" in printed) == ("--real" in words)


@commands_of("python controls.py")
def test_each_command_of_the_controls_runs(command, tmp_path, monkeypatch, capsys):
    """As written, with a train_cls.py that is done at once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(controls, "SCRIPT", tmp_path / "script.py")
    Path("script.py").write_text(test_controls.SCRIPT, encoding="utf-8")
    controls.main([*words_of(command, "controls.py"), "--seeds", "1"])
    row = "shuffled, frozen" + ", text loss" * ("--text-loss off" not in command)
    row = "deep prompts" if "--ablations" in command else row
    assert f"| {row} | 1,234 |" in capsys.readouterr().out


@commands_of("bench.py")
def test_each_benchmark_command_runs(command, tmp_path, monkeypatch, capsys):
    test_bench.small(monkeypatch, tmp_path)
    words = words_of(command, "bench.py")
    if words[0] == "table":                             # of what a command above it measured
        bench.main(["kernels", "--quick"])
    capsys.readouterr()
    bench.main(words)
    printed = capsys.readouterr().out
    expected = {"kernels": "ours   ", "train": "parts    ", "table": "| workload | ours, ms |"}
    assert expected[words[0]] in printed


@commands_of("python look.py")
def test_each_command_that_draws_curves_runs(command, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="needs matplotlib: draws with it")
    monkeypatch.chdir(tmp_path)
    words = words_of(command, "look.py")
    runs = [word for word in words if word.startswith("runs/")]
    for run in runs:
        test_look.run_of(Path(run), test_look.LINES)
    look.main(words)
    assert capsys.readouterr().out.split() == [f"{runs[0]}/curves.png"]


@commands_of("python analyse.py")
def test_each_command_that_looks_into_a_run_runs(command, tmp_path, monkeypatch, tiny_clip, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_cls, "SYNTHETIC", (2, 1))
    monkeypatch.setattr(analyse, "TEST", (1, 2))
    monkeypatch.setattr(analyse, "installed", lambda package: False)    # test_analyse.py draws
    run = test_analyse.run_of(words_of(command, "analyse.py")[0], "--clip", tiny_clip)
    capsys.readouterr()
    analyse.main(words_of(command, "analyse.py"))
    assert f"numbers  {run}/analysis/analysis.json\n" in capsys.readouterr().out
    assert Path(run, "analysis/saliency.png").is_file()


def python(folder, *words):
    """Run python in a folder where only what lies there, and what is installed, can be imported."""
    left_out = ("WORLD_SIZE", "RANK", "TRITON_INTERPRET")
    env = {name: value for name, value in os.environ.items() if name not in left_out}
    env.update(PYTHONPATH="", OMP_NUM_THREADS="1", PYTHONIOENCODING="utf-8")
    return subprocess.run([sys.executable, *words], cwd=folder, env=env, text=True,
                          encoding="utf-8", capture_output=True)


@commands_of("python kernels/")
def test_each_kernel_checks_itself(command):
    done = python(ROOT, *shlex.split(command)[1:])
    assert done.returncode == 0 and done.stdout.startswith("ok: "), done.stderr


@commands_of("python -m data.")
def test_each_command_of_the_built_in_data_runs(command, tmp_path):
    words = shlex.split(command)[1:]
    if "--export" in words:
        words[words.index("--export") + 1] = str(tmp_path / "ply")
    done = python(ROOT, *words)
    assert done.returncode == 0, done.stderr
    assert "40 classes" in done.stdout or "share of a " in done.stdout
    assert bool(list(tmp_path.glob("ply/*.ply"))) == ("--export" in words)


def test_every_command_of_readme_and_docs_is_covered_by_a_test_above():
    for command in COMMANDS:
        assert any(word in command for word in (
            "train_cls.py", "train_fewshot.py", "train_det.py", "train_seg.py",
            "train_outdoor.py", "train_clip2point.py", "train_clip.py", "zero_shot.py",
            "controls.py", "bench.py", "python look.py", "python analyse.py", "python kernels/",
            "python -m data.", "pytest")), command


# --- files ----------------------------------------------------------------------------------------

def test_every_file_named_in_the_map_exists_and_has_about_that_many_lines():
    rows = re.findall(r"^\| `([\w./]+)` \| (\d+) \|", "\n".join(PAGES), re.M)
    assert len(rows) >= 8
    for name, count in rows:
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        assert abs(len(lines) - int(count)) <= 25, f"{name}: {len(lines)}, not {count}"


def test_every_picture_of_the_pages_is_there_and_small():
    found = [ROOT / ("docs" if i else "") / name for i, page in enumerate(PAGES)
             for name in re.findall(r"!\[[^]]+\]\((\S+)\)", page)]
    assert len(found) >= 4
    for path in found:
        assert Image.open(path).width > 600 and path.stat().st_size < 150_000, path


FORK = README.split("\n## Fork it\n")[1].split("\n## ")[0]
ROWS = {script: re.findall(r"`([^`]+)`", files)
        for script, files in re.findall(r"^\| `(train_\w+\.py|zero_shot\.py)` \| (.*) \|$", FORK,
                                        re.M)}
EVERY = re.findall(r"`([^`]+)`", FORK.split("Every script needs ")[1].split(" Its row adds")[0])


def named_after(words):
    """The files that the sentence with these words names behind them."""
    text = " ".join(FORK.split())
    assert words in text
    sentence = re.split(r"\.(?: |$)", text.split(words, 1)[1])[0]
    return re.findall(r"`((?:data/|nanoclip)[^`]+)`", sentence)


def fork(folder, script, *more):
    """Copy a script, what every script needs, the files of its row, and nothing else."""
    for name in dict.fromkeys([script, *EVERY, *ROWS[script], *more]):
        source, copy = ROOT / name, folder / name
        assert source.is_dir() == name.endswith("/") and source.exists(), name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy)


OBJECTS = ["--points", "64", "--groups", "8", "--neighbours", "8"]
SCENES = ["--like", "synthetic", "--points", "256", "--tokens", "64", "--queries", "64"]
SIZES = {"train_cls.py": [*OBJECTS, "--batch-size", "6"],
         "train_fewshot.py": [*OBJECTS, "--way", "3", "--shot", "2", "--episodes", "1"],
         "train_det.py": SCENES, "train_seg.py": ["--like", "synthetic", "--points", "64"],
         "train_outdoor.py": ["--like", "synthetic", "--voxel", "2"]}
ENDS = {"train_fewshot.py": "mean ± population standard deviation over 1 episodes"}
FAST = ["--clip", "timm:test_vit=random", "--epochs", "1", "--device", "cpu", "--workers", "1"]


def tiny_room(seed):
    """Points (600, 3) of a room of two metres, colours, labels, a box of each of two classes."""
    rng = np.random.default_rng(seed)
    xyz = rng.uniform(0, 2, (600, 3)).astype(np.float32)
    boxes = np.array([[.5, .5, .5, 1, 1, 1], [1.5, 1.5, .5, .6, .6, 1]])
    return xyz, rng.integers(0, 255, (600, 3)), (xyz[:, 2] > 1).astype(int), boxes


def tiny_data(root, script, data):
    """What `--data` of a script reads, as its owners publish it, but tiny."""
    root.mkdir()
    if script in ("train_cls.py", "train_fewshot.py"):
        for part, n in (("train", 2), ("test", 2 if script == "train_cls.py" else 20)):
            for name, clouds in shapes(n).items():
                (root / part / name).mkdir(parents=True)
                for i, xyz in enumerate(clouds):
                    np.save(root / part / name / f"{i}.npy", xyz)
    elif data == "scannet":
        for part, n in (("train", 2), ("val", 1)):
            lists = (ROOT / f"data/splits/scannetv2_{part}.txt").read_text(encoding="utf-8")
            for name in lists.split()[:n]:
                xyz, rgb, label, boxes = tiny_room(n)
                nyu40 = np.array([5, 7])                # chair, table
                np.save(root / f"{name}_vert.npy", np.concatenate([xyz, rgb], 1))
                np.save(root / f"{name}_bbox.npy", np.concatenate([boxes, nyu40[:, None]], 1))
                np.save(root / f"{name}_sem_label.npy", nyu40[label])
    elif script == "train_outdoor.py":
        (root / "classes.txt").write_text("low\nhigh\n", encoding="utf-8")
        for i, name in enumerate(("train/a", "train/b", "train/c", "train/d", "test/e")):
            xyz, _, label, _ = tiny_room(i)
            (root / name).parent.mkdir(exist_ok=True)
            np.c_[9 * xyz, xyz[:, 0] / 2].astype("<f4").tofile(root / f"{name}.bin")
            (label + 1).astype("<u4").tofile(root / f"{name}.label")
    else:
        det = script == "train_det.py"
        (root / "train").mkdir()
        (root / ("val" if det else "test")).mkdir()
        for i, name in enumerate(("train/a", "train/b", "val/c" if det else "test/c")):
            xyz, rgb, label, boxes = tiny_room(i)
            columns = [xyz] if det else [xyz, rgb, label[:, None]]
            np.save(root / f"{name}.npy", np.concatenate(columns, 1))
            listed = [{"class": kind, "center": box[:3].tolist(), "size": box[3:].tolist()}
                      for kind, box in zip(("chair", "table"), boxes)]
            if det:
                (root / f"{name}.json").write_text(json.dumps(listed), encoding="utf-8")
        if not det:
            (root / "classes.txt").write_text("low\nhigh\n", encoding="utf-8")


def test_every_script_has_a_row_in_the_table_of_forks():
    assert set(ROWS) == {path.name for path in ROOT.glob("train_*.py")} | {"zero_shot.py"}


@pytest.mark.parametrize("script, data", [
    ("train_cls.py", "folder"), ("train_fewshot.py", "folder"), ("train_det.py", "folder"),
    ("train_det.py", "scannet"), ("train_seg.py", "folder"), ("train_seg.py", "scannet"),
    ("train_outdoor.py", "folder")])
def test_a_script_runs_with_the_files_of_its_row_and_no_others(tmp_path, script, data):
    more = []
    if (script, data) == ("train_seg.py", "scannet"):
        more = named_after("`train_seg.py --data scannet` needs")
        assert more
    fork(tmp_path / "fork", script, *more)
    tiny_data(tmp_path / "tiny", script, data)
    done = python(tmp_path / "fork", script, "--data", data, "--root", str(tmp_path / "tiny"),
                  *FAST, *SIZES[script])
    assert done.returncode == 0, done.stderr
    assert ENDS.get(script, "result   ") in done.stdout
    assert list((tmp_path / "fork/runs").glob("*/results.json"))


FEW = {"train_cls": (2, 1), "train_fewshot": (2, 20), "train_det": (2, 1), "train_seg": (2, 1, 600),
       "train_outdoor": (4, 1)}
BUILT_IN = "import sys, {0}; {0}.SYNTHETIC = {1}; {0}.main(sys.argv[1:])"
FEW_PICTURES = """import sys, train_clip as t; t.TEST = (1, 2); t.RECIPES["synthetic"] = t.RECIPES[
    "synthetic"]._replace(objects=1, views=2, size=32, width=32, layers=1, batch_size=40)
t.main(sys.argv[1:])"""


FEW_OBJECTS = """import sys, train_clip2point as t; t.HELD_OUT, t.SCANS = (1, 303), ((2, 1), (1, 2))
t.RECIPES["synthetic"] = t.RECIPES["synthetic"]._replace(objects=1, pictures=2, batch_size=20,
                                                         points=256, adapter=1)
t.main(sys.argv[1:])"""


def test_zero_shot_needs_the_files_that_readme_names(tmp_path):
    more = named_after("The built-in data, which a script takes without `--data`, needs")
    more = [name for name in more if name.endswith(".safetensors")]
    assert len(more) == 2
    fork(tmp_path, "zero_shot.py", *more)
    test_clip2point.write_off(tmp_path / "a.off", "chair", 0)
    done = python(tmp_path, "zero_shot.py", "--device", "cpu", "--predict", "a.off", "--classes",
                  "chair, table")
    assert done.returncode == 0, done.stderr
    assert "a.off:   chair " in done.stdout and (tmp_path / "predicted/look.png").is_file()


@pytest.mark.parametrize("script", sorted({*ROWS} - {"zero_shot.py"}))
def test_the_built_in_data_needs_the_files_that_readme_names(tmp_path, script):
    more = named_after("The built-in data, which a script takes without `--data`, needs")
    assert any("data/synthetic_" in file for file in more)
    if script != "train_clip.py":           # it has no other data
        assert "data/synthetic_" not in "".join([*EVERY, *ROWS[script]])
    fork(tmp_path, script, *more)
    name = script.removesuffix(".py")
    if script == "train_clip.py":
        done = python(tmp_path, "-c", FEW_PICTURES, *FAST[2:])
    elif script == "train_clip2point.py":
        nano = f"nano={test_bench.nano_file(tmp_path)}"
        done = python(tmp_path, "-c", FEW_OBJECTS, "--clip", nano, *FAST[2:])
    else:
        done = python(tmp_path, "-c", BUILT_IN.format(name, FEW[name]), *FAST[2:], *SIZES[script])
    assert done.returncode == 0, done.stderr
    assert ENDS.get(script, "result   ") in done.stdout and "procedural" in done.stdout
