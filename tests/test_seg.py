"""train_seg.py: S3DIS's and other formats, blocks, whole rooms, metrics, the model, the loop."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import scenes
import synthetic
import train_seg as seg
from common import InputError
from kernels import interpolate
from synthetic import ROOM_CLASSES

SMALL = seg.RECIPES["synthetic"]._replace(points=128, tokens=32, neighbours=8, epochs=2, batch_size=4, every=1)


@pytest.fixture(scope="module")
def rooms():
    return synthetic.room_scenes(3, 1500, 9)


def room_of(room, name="room"):
    return seg.room_of(name, name, room["xyz"], room["rgb"], room["semantic"], 13)


def config(root, data="s3dis", **more):
    return {"data": data, "root": str(root), "workers": 1, "skip_broken": False, "test_area": 5, **more}


# --- S3DIS, raw and prepared ----------------------------------------------------------------------

@pytest.fixture
def raw(tmp_path, rooms):
    """Three rooms as Stanford publishes them: a text file for each object."""
    for folder, room in zip(("Area_1/office_1", "Area_1/hallway_2", "Area_5/office_19"), rooms):
        where = tmp_path / folder / "Annotations"
        where.mkdir(parents=True)
        for k in np.unique(room["semantic"]):
            mine = room["semantic"] == k
            lines = [" ".join([*(f"{c:.3f}" for c in xyz + (7, -3, 1)), *map(str, rgb)])
                     for xyz, rgb in zip(room["xyz"][mine], room["rgb"][mine])]
            half = len(lines) // 2
            for i, part in enumerate((lines[:half], lines[half:])):     # two objects; the first may be empty
                (where / f"{ROOM_CLASSES[k]}_{i + 1}.txt").write_text("".join(line + "\n" for line in part))
    return tmp_path


def test_a_raw_tree_gives_every_point_its_label_and_the_prepared_form_the_same(raw, rooms):
    train, test, classes, form = seg.load_rooms(config(raw))
    assert [r.name for r in train] == ["Area_1_hallway_2", "Area_1_office_1"] and classes == ROOM_CLASSES
    assert [r.name for r in test] == ["Area_5_office_19"] and "area 5: 1 test rooms" in form
    for room, source in zip([*train, *test], (rooms[1], rooms[0], rooms[2])):
        assert len(room.xyz) == 1500 and room.xyz.min() == 0
        assert (np.bincount(room.label, minlength=13) == np.bincount(source["semantic"], minlength=13)).all()
        i = int(np.lexsort(source["xyz"].T)[0])                         # one point, found again by its place
        place = source["xyz"][i] - source["xyz"].min(0)
        j = (room.xyz - torch.from_numpy(place)).norm(dim=1).argmin()
        assert (room.xyz[j].numpy() - place).max() < .002 and room.label[j] == source["semantic"][i]
        assert room.rgb[j].tolist() == source["rgb"][i].tolist()
    again = seg.load_rooms(config(raw / ".nanoepcl-rooms"))
    for a, b in zip([*train, *test], [*again[0], *again[1]]):
        assert a.name == b.name and all(torch.equal(x, y) for x, y in zip(a[1:], b[1:]))


def test_any_area_can_test_and_preparing_goes_on_where_it_stopped(raw):
    train, test, _, _ = seg.load_rooms(config(raw, test_area=1, workers=2))
    assert len(train) == 1 and len(test) == 2
    kept, gone = (raw / f".nanoepcl-rooms/Area_1_{name}.npy" for name in ("office_1", "hallway_2"))
    stamp = kept.stat().st_mtime_ns
    gone.unlink()
    seg.load_rooms(config(raw))
    assert kept.stat().st_mtime_ns == stamp and gone.exists()


@pytest.mark.parametrize("line, row", [
    (b"1.5 2.5 0.3 185\x00187 12", [1.5, 2.5, .3, 185, 187, 12]),       # junk for a blank: KPConv issue 82
    (b"1.5 2.5 0.3 103.0\x100000 1 2", [1.5, 2.5, .3, 103, 1, 2]),      # for a digit: Pointcept issue 16
    (b"1.5 2.5 0.3 167.\x1000000 1 2", [1.5, 2.5, .3, 167, 1, 2]),
    (b"-9.1\x160 2.5 0.3 1 2 3", [-9.1, 2.5, .3, 1, 2, 3]),
])
def test_known_junk_in_s3dis_is_repaired_and_reported(raw, line, row, capsys):
    path = raw / "Area_5/office_19/Annotations/clutter_2.txt"
    path.write_bytes(b"1 2 3 4 5 6\n" + line + b"\n")
    points, notes = scenes.read_annotation(path)
    np.testing.assert_allclose(points, [[1, 2, 3, 4, 5, 6], row])
    assert len(notes) == 1 and "clutter_2.txt line 2" in notes[0]
    seg.load_rooms(config(raw))
    assert "clutter_2.txt line 2" in capsys.readouterr().err


@pytest.mark.parametrize("content, words", [
    (b"1 2 3 4 5 6\n1 2 3 4 5 6 7\n", "office_19/Annotations/clutter_2.txt"),
    (b"1 2 3 4 5 6\n1 2 3 4\n", "clutter_2.txt"),                      # cut short
    (b"1 2 3 4 5 6\nhallo\n", "line 2 is b'hallo'"),
    (b"1 2 3 4 5 6\n1 2\x01 3 4 5 6 7 8\n", "line 2"),
])
def test_a_broken_annotation_is_named_or_its_room_left_out_if_asked(raw, content, words, capsys):
    path = raw / "Area_1/office_1/Annotations/clutter_2.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match="clutter_2.txt") as error:
        seg.load_rooms(config(raw))
    assert words.split("/")[-1] in str(error.value) and "\n" not in str(error.value)
    train, _, _, _ = seg.load_rooms(config(raw, skip_broken=True))
    assert [r.name for r in train] == ["Area_1_hallway_2"] and "LEFT OUT" in capsys.readouterr().err


# --- ScanNet, own clouds --------------------------------------------------------------------------

def test_scannet_labels_become_the_twenty_classes_of_the_benchmark(tmp_path):
    nyu = np.array([0, 1, 2, 39, 40, 36, 13])
    for name in ("scene0191_00", "scene0568_00"):
        np.save(tmp_path / f"{name}_vert.npy", np.random.default_rng(0).uniform(0, 200, (7, 6)).astype(np.float32))
        np.save(tmp_path / f"{name}_sem_label.npy", nyu.astype(np.uint32))
    train, val, classes, _ = seg.load_rooms(config(tmp_path, "scannet"))
    assert len(classes) == 20 and [r.name for r in (*train, *val)] == ["scene0191_00", "scene0568_00"]
    assert [classes[k] if k >= 0 else None for k in train[0].label] == [
        None, "wall", "floor", "other furniture", None, "bathtub", None]


@pytest.fixture
def own(tmp_path, rooms):
    (tmp_path / "classes.txt").write_text("\n".join(ROOM_CLASSES) + "\n")
    for part, i in (("train", 0), ("train", 1), ("test", 2)):
        (tmp_path / part).mkdir(exist_ok=True)
        room, path = rooms[i], tmp_path / part / f"room{i}"
        if i == 0:
            np.save(f"{path}.npy", np.concatenate([room["xyz"], room["rgb"], room["semantic"][:, None]], 1))
        elif i == 1:
            np.savez(f"{path}.npz", xyz=room["xyz"], rgb=room["rgb"] / 255, label=room["semantic"])
        else:
            table = np.empty(1500, [("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("red", "u1"), ("green", "u1"),
                                    ("blue", "u1"), ("label", "<i4")])
            for name, column in zip(table.dtype.names, [*room["xyz"].T, *room["rgb"].T, room["semantic"]]):
                table[name] = column
            head = "ply\nformat binary_little_endian 1.0\nelement vertex 1500\n" + "".join(
                f"property {kind} {name}\n" for name, kind in zip(table.dtype.names, ["float"] * 3 + ["uchar"] * 3 + ["int"]))
            Path(f"{path}.ply").write_bytes(head.encode() + b"end_header\n" + table.tobytes())
    return tmp_path


def test_own_clouds_are_read_with_colours_in_either_scale(own, rooms):
    train, test, classes, _ = seg.load_rooms(config(own, "folder"))
    assert classes == ROOM_CLASSES
    for room, source in zip([*train, *test], rooms):
        assert torch.equal(room.rgb, torch.from_numpy(source["rgb"]))
        assert torch.equal(room.label.long(), torch.from_numpy(source["semantic"]))
        np.testing.assert_allclose(room.xyz, source["xyz"] - source["xyz"].min(0), atol=1e-5)


@pytest.mark.parametrize("change, words", [
    (lambda t: t[:, :6], r"shape \(1500, 6\)"),
    (lambda t: np.where(np.arange(7) == 6, 13, t), "the label 13; labels are whole numbers from 0 to 12"),
    (lambda t: np.where(np.arange(7) == 6, -2, t), "the label -2"),
    (lambda t: np.where(np.arange(7) == 6, .5, t), "the label 0.5"),
    (lambda t: np.where(np.arange(7) == 0, np.nan, t), "NaN coordinates"),
    (lambda t: np.where(np.arange(7) == 3, 300, t), "colours outside 0..255"),
    (lambda t: t[:0], "no points"),
    (None, "repair it"),                                                # the file is cut short
])
def test_bad_clouds_are_named_or_left_out_if_asked(own, change, words):
    path = own / "train/room0.npy"
    if change:
        np.save(path, change(np.load(path)))
    else:
        path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(InputError, match=words) as error:
        seg.load_rooms(config(own, "folder"))
    assert "room0.npy" in str(error.value) and "\n" not in str(error.value)
    train, _, _, form = seg.load_rooms(config(own, "folder", skip_broken=True))
    assert [r.name for r in train] == ["room1"] and "LEFT OUT" in form


# --- blocks and whole rooms -----------------------------------------------------------------------

def test_a_training_block_is_one_column_of_its_room_and_repeats_by_its_seed(rooms):
    room = room_of(rooms[0])
    points, label = seg.training_block(room, SMALL, 5)
    again, _ = seg.training_block(room, SMALL, 5)
    other, _ = seg.training_block(room, SMALL, 6)
    assert points.shape == (128, 9) and label.shape == (128,) and torch.equal(points, again) and not torch.equal(points, other)
    assert points[:, :2].norm(dim=1).max() <= SMALL.block / 2 * 2 ** .5 + 1e-4          # turned, so within the circle
    assert ((points[:, 3:] >= 0) & (points[:, 3:] <= 1)).all()
    place = points[:, 6:] * room.xyz.amax(0)                                            # back from shares to metres
    row = torch.cdist(place.double(), room.xyz.double()).argmin(1)
    assert torch.equal(label, room.label[row].long())


def test_a_training_block_is_the_first_one_with_enough_points_or_the_fullest():
    # a dense square metre and far from it lone points: every other centre is a lone one, the block never is
    g = torch.Generator().manual_seed(0)
    xyz = torch.cat([torch.rand(1500, 3, generator=g), 50 + torch.arange(1500)[:, None] * torch.tensor([3., 3, 0])])
    room = seg.Room("r", xyz, torch.zeros(3000, 3).byte(), (torch.arange(3000) >= 1500).short())
    labels = [seg.training_block(room, SMALL, seed)[1] for seed in range(8)]
    assert all((label == 0).all() for label in labels)
    lone = seg.Room("r", xyz[1500:], room.rgb[1500:], torch.arange(1500).short())
    points, label = seg.training_block(lone, SMALL, 0)                                  # nothing is full: one point
    assert len(points) == SMALL.points and len(label.unique()) == 1


@pytest.mark.parametrize("size, points, block", [((5, 3.3, 2), 4000, 1.), ((.4, .3, 2), 50, 1.), ((1.5, 7, 1), 700, 2.),
                                                 ((2, 2, 2), 3, 1.), ((1, 1, 1), 1, 1.)])
def test_windows_cover_every_point_and_leave_no_room(size, points, block):
    xyz = torch.rand(points, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor(size, dtype=torch.float32)
    xyz -= xyz.amin(0)
    seen = torch.zeros(points, dtype=torch.int64)
    for middle, rows in seg.windows(xyz, block):
        assert ((xyz[rows, :2] - middle).abs() <= block / 2 + .0011).all() and len(rows)
        seen[rows] += 1
    assert seen.min() >= 1


class Parrot(torch.nn.Module):
    """Knows the answer: class 1 above half a metre, class 0 below, and counts how often it is asked."""
    def forward(self, points):
        up = (points[..., 2] > .5).float()
        return torch.stack([1 - up, up], -1)


@pytest.mark.parametrize("points, votes", [(1, 1), (77, 1), (3000, 1), (500, 3)])
def test_every_point_of_a_room_gets_exactly_one_label(points, votes):
    xyz = torch.rand(points, 3, generator=torch.Generator().manual_seed(1)) * 3
    xyz -= xyz.amin(0)
    room = seg.Room("r", xyz, torch.zeros(points, 3, dtype=torch.uint8), (xyz[:, 2] > .5).to(torch.int16))
    logits, blocks = seg.label_room(Parrot(), room, common.Setup("cpu", "fp32"), SMALL, 2, votes)
    assert logits.shape == (points, 2) and (logits.sum(1) >= votes).all()
    assert torch.equal(logits.argmax(1), room.label.long())
    assert blocks.sum() == logits.sum() and blocks[0, 1] == blocks[1, 0] == 0


def test_scores_by_hand_and_a_class_that_never_occurs():
    counts = torch.tensor([[8, 2, 0, 0], [1, 4, 0, 5], [0, 0, 0, 0], [0, 0, 0, 0]])
    result = seg.scores(counts)
    np.testing.assert_allclose(result["iou"], [8 / 11, 4 / 12, np.nan, np.nan])
    np.testing.assert_allclose(result["accuracy"], [.8, .4, np.nan, np.nan])
    assert result["miou"] == pytest.approx((8 / 11 + 1 / 3) / 2) and result["macc"] == pytest.approx(.6)
    assert result["oa"] == pytest.approx(.6)
    lines = seg.table(counts, ("a", "b", "c", "d"))
    assert "never occurs" in lines[3] and "72.7" in lines[1] and lines[-1].split()[-2:] == ["53.0", "60.0"]
    nothing = seg.scores(torch.zeros(2, 2))
    assert nothing["miou"] == 0 and nothing["oa"] == 0


def test_confusion_leaves_out_points_without_a_class():
    label, predicted = torch.tensor([0, 1, 1, -1, 2]), torch.tensor([0, 1, 2, 2, 2])
    assert seg.confusion(label, predicted, 3).tolist() == [[1, 0, 0], [0, 1, 1], [0, 0, 1]]


def test_the_decoders_interpolation_is_exact_on_a_linear_field():
    """Where three sources are equally far, their mean: exact for any linear field."""
    corner = torch.rand(40, 3, generator=torch.Generator().manual_seed(0)) * 100
    triangle = torch.tensor([[1., 0, 0], [-.5, 3 ** .5 / 2, 0], [-.5, -3 ** .5 / 2, 0]])
    source = (corner[:, None] + triangle).view(1, -1, 3)
    field = torch.tensor([[.3, -1.2, .7], [2., 0, -.1]])
    values = source @ field.T + torch.tensor([5., -1])
    out = interpolate(corner[None], source, values)
    torch.testing.assert_close(out, corner[None] @ field.T + torch.tensor([5., -1]), rtol=1e-4, atol=1e-3)


# --- model ----------------------------------------------------------------------------------------

def settings_of(recipe, **more):
    return {"recipe": recipe._asdict(), **{k: False for k in common.ABLATIONS}, **more}


@pytest.fixture
def model(tiny_clip):
    torch.manual_seed(0)
    return seg.Segmenter(common.load_clip(tiny_clip), 13, settings_of(SMALL))


def test_the_reference_configuration_has_the_sizes_of_its_parts():
    model = seg.Segmenter(common.load_clip("random"), 13, settings_of(seg.RECIPES["s3dis"]))
    count = {name: sum(p.numel() for p in getattr(model, name).parameters()) for name in ("lift", "downs", "encoder", "ups", "head")}
    assert count == {"lift": 9 * 64 + 128, "downs": 67 * 256 + 512 + 259 * 768 + 1536,
                     "encoder": 99_584 + 13 * 768 + 2 * (768 * 768 + 768),
                     "ups": (768 + 256) * 256 + 512 + (256 + 64) * 128 + 256, "head": 137 * 128 + 256 + 128 * 13 + 13}
    assert not any("clip" in name for name in model.state_dict())


def test_every_token_of_a_block_reaches_every_other_and_none_of_another(model):
    model.eval()
    x, xyz = torch.randn(2, 32, 64), torch.rand(2, 32, 3)
    moved = x.clone()
    moved[0, 5] += 1
    change = (model.encoder((x, xyz))[0] - model.encoder((moved, xyz))[0]).abs().amax(2)
    assert (change[0, 1:] > 0).all() and (change[1] == 0).all()


def test_task_tokens_learn_and_the_transformer_does_not(model):
    model.train()(torch.rand(2, 128, 9)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.encoder.task.embedding.weight.grad.abs().sum() > 0 and list(model.encoder.clip.parameters()) == []


# --- the run --------------------------------------------------------------------------------------

@pytest.fixture
def small(monkeypatch, tmp_path, tiny_clip):
    monkeypatch.setattr(seg, "SYNTHETIC", (3, 2, 1200))
    monkeypatch.setitem(seg.RECIPES, "synthetic", SMALL)
    monkeypatch.chdir(tmp_path)
    return ["--clip", tiny_clip]


def lines(run):
    return [json.loads(line) for line in open(Path(run) / "metrics.jsonl")]


def test_a_run_evaluates_resumes_repeats_and_predicts(small, monkeypatch, capsys, rooms):
    seg.main(small)
    first = json.loads(Path("runs/seg-synthetic-1/results.json").read_text())
    assert first["task"] == "seg" and 0 <= first["metrics"]["miou"] <= 1 and set(first["iou"]) == set(ROOM_CLASSES)
    printed = capsys.readouterr().out
    assert "points a second: FPS, KNN, tokenizer" in printed and "blocks   mIoU" in printed
    seg.main(["--eval", "runs/seg-synthetic-1", "--export", "look"])
    assert sorted(p.name for p in Path("look").iterdir()) == ["room000.npy", "room000.ply", "room001.npy", "room001.ply"]
    result = [[line for line in text.splitlines() if line.startswith("result")] for text in (printed, capsys.readouterr().out)]
    assert result[0] == result[1]
    np.save("scan.npy", rooms[0]["xyz"])                                # no colours, no labels
    synthetic.write_ply(Path("scan2.ply"), rooms[1]["xyz"] + 40, rooms[1]["rgb"])
    seg.main(["--eval", "runs/seg-synthetic-1", "--predict", "scan.npy", "scan2.ply"])
    said = capsys.readouterr().out
    assert "scan.npy: 1,500 points" in said and said.count("it has no colours") == 1
    with pytest.raises(InputError, match="several files are called scan2"):
        seg.main(["--eval", "runs/seg-synthetic-1", "--predict", "scan2.ply", "./scan2.ply"])
    labels = np.load("runs/seg-synthetic-1/predicted/scan2.npy")
    assert labels.shape == (1500,) and labels.min() >= 0 and labels.max() < 13
    table = scenes.read_ply(Path("runs/seg-synthetic-1/predicted/scan2.ply").read_bytes())
    assert len(table) == 1500 and table["red"][0] == seg.colour(labels)[0, 0]

    count, now = iter(range(99)), common.Stopper.now
    monkeypatch.setattr(common.Stopper, "now", lambda self, step: next(count) == 9)
    with pytest.raises(SystemExit) as left:
        seg.main([*small, "--out", "parts"])
    assert left.value.code == 130
    monkeypatch.setattr(common.Stopper, "now", now)
    seg.main(["--resume", "parts"])
    a, b = (torch.load(f"{run}/last.pt", weights_only=True)["model"] for run in ("runs/seg-synthetic-1", "parts"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert [x["loss"] for x in lines("runs/seg-synthetic-1")] == pytest.approx([x["loss"] for x in lines("parts")])


def test_one_room_is_learned_by_heart(small, monkeypatch, rooms):
    room = room_of(rooms[0])
    monkeypatch.setattr(seg, "load_rooms", lambda cfg: ([room], [room], ROOM_CLASSES, "one room"))
    monkeypatch.setitem(seg.RECIPES, "synthetic", SMALL._replace(points=512, tokens=128, epochs=120, every=120, lr=3e-3))
    seg.main(small)
    assert json.loads(Path("runs/seg-synthetic-1/results.json").read_text())["metrics"]["oa"] > .85


def test_a_compiled_model_has_no_graph_break_and_learns_the_same(small, monkeypatch):
    compiler = torch.compile                            # without code generation: no C compiler needed
    monkeypatch.setattr(torch, "compile", lambda m: compiler(m, backend="aot_eager", fullgraph=True))
    for run, more in (("plain", []), ("compiled", ["--compile"])):
        seg.main([*small, "--lr", "1e-5", "--epochs", "1", "--out", run, *more])
    assert lines("compiled")[0]["loss"] == pytest.approx(lines("plain")[0]["loss"], rel=1e-4)


@pytest.mark.parametrize("more", [
    ["--accumulate", "2"], ["--unfreeze"], ["--deep-prompt"], ["--no-transformer"], ["--no-task-token", "--dropout", "0.3"]])
def test_accumulation_and_every_ablation_train(small, more):
    seg.main([*small, "--epochs", "3", *more])
    losses = [line["loss"] for line in lines("runs/seg-synthetic-1")]
    assert losses[-1] < losses[0]


def test_two_processes_follow_the_loss_curve_of_one(own, tiny_clip, tmp_path):
    """Batches of 5 blocks, so that the processes hold 2 and 3."""
    (tmp_path / "small.py").write_text(
        f"import common, train_seg as seg\nseg.RECIPES['folder'] = seg.Recipe(**{SMALL._replace(batch_size=5, lr=1e-5)._asdict()})\n"
        "common.main_guard(seg.main)\n")
    env = {**{k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK")},
           "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(seg.__file__).parent)}
    for run, launch in (("one", []), ("two", ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29521"])):
        done = subprocess.run([sys.executable, *launch, str(tmp_path / "small.py"), "--data", "folder", "--root", str(own),
                               "--clip", tiny_clip, "--device", "cpu", "--out", str(tmp_path / run)],
                              env=env, text=True, capture_output=True, timeout=300)
        assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stdout and done.stdout.count("result ") == 1
    for one, two in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5) and one["miou"] == pytest.approx(two["miou"], abs=2e-3)


@pytest.mark.parametrize("words, message", [
    (["--points", "16"], "--points 16: a quarter of them become tokens"),
    (["--predict", "x.ply"], "need a run"),
    (["--vote", "3"], "need a run"),
    (["--test-area", "3"], "belongs to --data s3dis"),
    (["--data", "s3dis", "--root", "nowhere"], "no such folder; ask for Stanford3dDataset"),
    (["--data", "s3dis", "--root", "."], "found neither Area_1/ROOM/Annotations"),
    (["--data", "scannet", "--root", "."], "found neither scans/ nor"),
    (["--data", "folder", "--root", "."], "classes.txt: missing"),
])
def test_wrong_arguments_are_one_line(small, words, message):
    with pytest.raises(InputError, match=message) as error:
        seg.main([*small, *words])
    assert "\n" not in str(error.value) and not Path("runs").exists()
