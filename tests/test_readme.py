"""README.md keeps its promises: every command in it is collected and run here, made small."""
import contextlib
import pickle
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import bench
import common
import objects
import synthetic
import test_bench
import test_det
import test_fewshot
import test_seg
import train_cls
import train_det
import train_fewshot
import train_seg
from test_cls import CUBE, FACES, ply, shapes

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PLAIN = re.sub(r"^```.*?^```$", "", README, flags=re.M | re.S)      # without what programs printed
COMMANDS = [line.strip() for line in PLAIN.splitlines() if line.startswith("    ")]


def test_readme_begins_with_two_commands_and_has_no_blank_left_to_fill():
    section = PLAIN.split("\n## ")[1]
    assert section.startswith("Two commands")
    assert [line.split(" && ")[1] for line in section.splitlines() if line.startswith("    ")] == [
        "python train_cls.py", "python -m pytest -q tests"]
    assert not re.search(r"@\w+@", README)


@pytest.mark.parametrize("command", [c for c in COMMANDS if "train_cls.py" in c])
def test_each_training_command_runs(command, tmp_path, monkeypatch, tiny_clip, capsys):
    """As written, with small clouds for the data set, a small transformer, and two epochs."""
    words = shlex.split(command.split(" && ")[-1])
    words = words[words.index("train_cls.py") + 1:]

    def small(name, *args, **kwargs):
        splits = []
        for seed, n in ((1, 4), (2, 2)):
            clouds = shapes(n, 2048 if name == "scanobjectnn" else 1024, seed)
            xyz = torch.from_numpy(np.concatenate(list(clouds.values())).astype(np.float32))
            splits.append(objects.Objects(xyz, torch.arange(3).repeat_interleave(n)))
        return objects.Splits(*splits, ("ball", "cube", "stick"), f"small clouds instead of {name}")

    load = common.load_clip
    monkeypatch.setattr(common, "load_clip", lambda name, *a, **k: load(tiny_clip, *a, **k))
    monkeypatch.setattr(train_cls, "load_objects", small)
    for name, recipe in train_cls.RECIPES.items():
        monkeypatch.setitem(train_cls.RECIPES, name, recipe._replace(
            points=64, groups=8, neighbours=8, stored=1024, epochs=2, batch_size=6))
    for flag in ("--epochs", "--points", "--groups", "--neighbours", "--batch-size"):
        if flag in words:
            words[words.index(flag) + 1] = {"--epochs": "2", "--points": "64"}.get(flag, "8")
    monkeypatch.chdir(tmp_path)
    run = next((w for w in words if w.startswith("runs/")), None)
    if run:                                              # it speaks of a run that a command above it made
        data = run.split("-")[1]
        now = common.Stopper.now
        monkeypatch.setattr(common.Stopper, "now", lambda self, step: "--resume" in words)
        if "--resume" in words:
            with pytest.raises(SystemExit):
                train_cls.main(["--data", data])
        else:
            train_cls.main(["--data", data])
        monkeypatch.setattr(common.Stopper, "now", now)
    Path("chair.obj").write_text("".join("v {} {} {}\n".format(*v) for v in CUBE) + "".join(
        "f {} {} {} {}\n".format(*(i + 1 for i in f)) for f in FACES))
    Path("scan.ply").write_bytes(ply(shapes(1, 128)["ball"][0]))
    capsys.readouterr()
    train_cls.main(words)
    printed = capsys.readouterr().out
    assert "result   accuracy" in printed or printed.count("ball") == 2
    if not run:
        assert list(Path("runs").glob("*/results.json"))


@pytest.mark.parametrize("command", [c for c in COMMANDS if "train_fewshot.py" in c])
def test_each_few_shot_command_runs(command, tmp_path, monkeypatch, tiny_clip, capsys):
    """As written, with few small clouds for the data set, a small transformer, one epoch, two episodes."""
    words = shlex.split(command)[2:]
    load = common.load_clip

    def small_clip(name, seed=0, trainable=False):
        return load("timm:test_vit=random" if name.endswith("random") else tiny_clip, seed + 1, trainable)

    monkeypatch.setattr(common, "load_clip", small_clip)
    monkeypatch.setattr(train_fewshot, "load_objects", test_fewshot.small_data)
    monkeypatch.setattr(train_fewshot, "MODELNET40", test_fewshot.CLASSES)
    monkeypatch.setattr(train_fewshot, "TABLE3", [(2, 3), (2, 4), (3, 3), (3, 4), (9, 3)])
    for name, recipe in train_fewshot.RECIPES.items():
        monkeypatch.setitem(train_fewshot.RECIPES, name, recipe._replace(
            points=64, groups=8, neighbours=8, stored=96, epochs=1, batch_size=6))
    for flag, value in (("--way", "3"), ("--shot", "4"), ("--shots-all", "3"),
                        ("--points", "64"), ("--groups", "8"), ("--neighbours", "8"), ("--epochs", "1")):
        if flag in words:
            words[words.index(flag) + 1] = value
    small = ["--episodes", "2"] + ["--way", "3", "--shot", "4"] * (
        "--shots-all" not in words and "--table" not in words)
    monkeypatch.chdir(tmp_path)
    for i in range(2):
        Path("data/ModelNetFewshot/3way_4shot").mkdir(parents=True, exist_ok=True)
        Path(f"data/ModelNetFewshot/3way_4shot/{i}.pkl").write_bytes(
            pickle.dumps(test_fewshot.fold(3, 4, 20, (5, 2, 0))))
    run = next((w for w in words if w.startswith("runs/")), None)
    if run:                                              # it speaks of a run that a command above it made
        now = common.Stopper.now
        monkeypatch.setattr(common.Stopper, "now", lambda self, step: "--resume" in words)
        with pytest.raises(SystemExit) if "--resume" in words else contextlib.nullcontext():
            train_fewshot.main(["--data", run.split("-")[1], *small])
        monkeypatch.setattr(common.Stopper, "now", now)
    capsys.readouterr()
    train_fewshot.main(words if run else [*small, *words])
    assert "mean ± population standard deviation" in capsys.readouterr().out
    assert list(Path("runs").glob("fewshot-*/results.json"))


@pytest.mark.parametrize("command", [c for c in COMMANDS if "train_det.py" in c])
def test_each_detection_command_runs(command, tmp_path, monkeypatch, tiny_clip, capsys):
    """As written, with small rooms for the scans, a small transformer and one epoch."""
    words = shlex.split(command)
    words = words[words.index("train_det.py") + 1:]
    load = common.load_clip
    monkeypatch.setattr(common, "load_clip", lambda name, *a, **k: load(tiny_clip, *a, **k))
    scenes = [test_det.scene_of(room, f"room{i}") for i, room in enumerate(synthetic.room_scenes(3, 1500, 9))]
    monkeypatch.setattr(train_det, "load_scenes", lambda cfg: (scenes[:2], scenes[2:], synthetic.FURNITURE, "rooms"))
    for name in train_det.RECIPES:
        monkeypatch.setitem(train_det.RECIPES, name, test_det.SMALL._replace(epochs=1))
    for flag, value in (("--points", "512"), ("--tokens", "64"), ("--queries", "64"), ("--epochs", "1")):
        if flag in words:
            words[words.index(flag) + 1] = value
    monkeypatch.chdir(tmp_path)
    run = next((w for w in words if w.startswith("runs/")), None)
    if run:
        now = common.Stopper.now
        monkeypatch.setattr(common.Stopper, "now", lambda self, step: "--resume" in words)
        with pytest.raises(SystemExit) if "--resume" in words else contextlib.nullcontext():
            train_det.main(["--data", run.split("-")[1], "--epochs", "2"])
        monkeypatch.setattr(common.Stopper, "now", now)
    capsys.readouterr()
    train_det.main(words)
    assert "result   mAP@0.25" in capsys.readouterr().out
    assert list(Path("runs").glob("det-*/results.json"))


@pytest.mark.parametrize("command", [c for c in COMMANDS if "train_seg.py" in c])
def test_each_segmentation_command_runs(command, tmp_path, monkeypatch, tiny_clip, capsys):
    """As written, with small rooms for the data, a small transformer and one epoch."""
    words = shlex.split(command)
    words = words[words.index("train_seg.py") + 1:]
    load = common.load_clip
    monkeypatch.setattr(common, "load_clip", lambda name, *a, **k: load(tiny_clip, *a, **k))
    source = synthetic.room_scenes(3, 1200, 9)
    rooms = [test_seg.room_of(room, f"room{i}") for i, room in enumerate(source)]
    monkeypatch.setattr(train_seg, "load_rooms", lambda cfg: (rooms[:2], rooms[2:], synthetic.ROOM_CLASSES, "rooms"))
    for name in train_seg.RECIPES:
        monkeypatch.setitem(train_seg.RECIPES, name, test_seg.SMALL._replace(epochs=1))
    monkeypatch.chdir(tmp_path)
    synthetic.write_ply(Path("scan.ply"), source[0]["xyz"], source[0]["rgb"])
    run = next((w for w in words if w.startswith("runs/")), None)
    if run:
        now = common.Stopper.now
        monkeypatch.setattr(common.Stopper, "now", lambda self, step: "--resume" in words)
        with pytest.raises(SystemExit) if "--resume" in words else contextlib.nullcontext():
            train_seg.main(["--data", run.split("-")[1], "--epochs", "2"])
        monkeypatch.setattr(common.Stopper, "now", now)
    capsys.readouterr()
    train_seg.main(words)
    printed = capsys.readouterr().out
    assert "result   mIoU" in printed or "scan.ply: 1,200 points" in printed
    assert list(Path("runs").glob("seg-*/results.json"))


@pytest.mark.parametrize("command", [c for c in COMMANDS if "bench.py" in c])
def test_each_benchmark_command_runs(command, tmp_path, monkeypatch, capsys):
    test_bench.small(monkeypatch, tmp_path)
    bench.main(["kernels", "--quick"])
    capsys.readouterr()
    bench.main(shlex.split(command)[2:])
    printed = capsys.readouterr().out
    assert "ours" in printed or "parts    " in printed


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python kernels/")])
def test_each_kernel_checks_itself(command):
    done = subprocess.run([sys.executable, *shlex.split(command)[1:]], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0 and done.stdout.startswith("ok: "), done.stderr


def test_every_command_of_readme_is_covered_by_a_test_above():
    for command in COMMANDS:
        assert any(word in command for word in ("train_cls.py", "train_fewshot.py", "train_det.py", "train_seg.py",
                                                "bench.py", "python kernels/", "pytest")), command


def test_every_file_named_in_the_map_exists_and_has_about_that_many_lines():
    rows = re.findall(r"^\| `([\w./]+)` \| (\d+) \|", README, re.M)
    assert len(rows) >= 8
    for name, count in rows:
        assert abs(len((ROOT / name).read_text().splitlines()) - int(count)) <= 25, f"{name}: {count}"
