"""train_seg.py: rooms of every form, blocks, whole rooms, metrics, the model, the loop."""
import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
import pretrained
import render
import run
import train_seg as seg
from data import synthetic_rooms
from data.files import BrokenFile, read_cloud, read_ply, write_ply
from data.s3dis import ROOM_CLASSES
from data.scannet import SCANNET_BOXES, SCANNET_POINTS
from kernels import interpolate
from run import ABLATIONS, InputError, Setup
from test_files import room_ply
from test_s3dis import raw_room
from test_scannet import TSV, raw_scan

SMALL = seg.RECIPES["synthetic"]._replace(
    points=128, tokens=32, neighbours=8, epochs=2, batch_size=4, every=1)
GO_ON = ", or pass --skip-broken to go on without it"


@pytest.fixture(scope="module")
def rooms():
    return synthetic_rooms.room_scenes(3, 1500, 9)


def room_of(room, name="room"):
    return seg.room_of(name, room["xyz"], room["rgb"], room["semantic"])


def config(root, data="s3dis", **more):
    return {"data": data, "root": str(root), "workers": 1, "skip_broken": False, "test_area": 5,
            "scale": 1.0, **more}


def same_room(room, xyz, rgb, label, atol):
    """A Room holds these points, in this order, moved to 0."""
    assert [x.dtype for x in room[1:4]] == [torch.float32, torch.uint8, torch.int16]
    np.testing.assert_allclose(room.xyz, xyz - xyz.min(0), atol=atol)
    assert (room.xyz.amin(0) == 0).all()
    assert room.rgb.tolist() == rgb.tolist() and room.label.tolist() == label.tolist()


# --- files -> rooms -------------------------------------------------------------------------------

@pytest.fixture
def raw(tmp_path, rooms):
    for name, room in zip(("Area_1/office_1", "Area_1/hallway_2", "Area_5/office_19"), rooms):
        raw_room(tmp_path / name, room)
    return tmp_path


def test_rooms_of_s3dis_keep_their_points_colours_and_labels(raw, rooms):
    train, test, classes, form = seg.load_rooms(config(raw))
    assert classes == ROOM_CLASSES and form == f"{raw}, 2 rooms; area 5: 1 test rooms"
    assert [r.name for r in train] == ["Area_1_hallway_2", "Area_1_office_1"]
    assert [r.name for r in test] == ["Area_5_office_19"]
    for room, source in zip([*train, *test], (rooms[1], rooms[0], rooms[2])):
        names = [ROOM_CLASSES[k] for k in source["semantic"]]
        order = np.argsort(names, kind="stable")            # in the files, class after class
        same_room(room, *(source[field][order] for field in ("xyz", "rgb", "semantic")), .0011)
    train, test, _, _ = seg.load_rooms(config(raw, test_area=1, workers=2))
    assert len(train) == 1 and len(test) == 2


def test_a_broken_room_of_s3dis_is_named_or_left_out_if_asked(small, raw, capsys):
    path = raw / "Area_1/office_1/Annotations/clutter_2.txt"
    path.write_bytes(b"1 2 3 4 5 6\nhallo\n")
    with pytest.raises(BrokenFile, match="clutter_2.txt: line 2 is b'hallo'.*repair it$"):
        seg.load_rooms(config(raw))
    with pytest.raises(InputError, match=f"clutter_2.txt: line 2 is b'hallo'.*repair it{GO_ON}$"):
        seg.main([*small, "--data", "s3dis", "--root", str(raw)])
    train, test, _, _ = seg.load_rooms(config(raw, skip_broken=True))
    assert [r.name for r in train] == ["Area_1_hallway_2"] and len(test) == 1
    assert "LEFT OUT" in capsys.readouterr().err


def test_scans_of_scannet_become_rooms(tmp_path, rooms):
    (tmp_path / "scannetv2-labels.combined.tsv").write_text(TSV, encoding="utf-8")
    for name, room in zip(("scene0191_00", "scene0191_01", "scene0568_00"), rooms):
        raw_scan(tmp_path, name, room)
    train, val, classes, form = seg.load_rooms(config(tmp_path, "scannet"))
    assert [r.name for r in train] == ["scene0191_00", "scene0191_01"]
    assert [r.name for r in val] == ["scene0568_00"] and classes == tuple(SCANNET_POINTS)
    assert form == f"{tmp_path / 'scans'}, 2 of 1,201 train and 1 of 312 val scenes"
    names = {nyu40: name for name, nyu40 in SCANNET_POINTS.items()}
    for room, source in zip([*train, *val], rooms):
        xyz = torch.from_numpy(source["xyz"] - source["xyz"].min(0))
        place = torch.cdist(room.xyz.double(), xyz.double()).argmin(1).numpy()  # they are shuffled
        assert len(np.unique(place)) == 1500
        boxes = [SCANNET_BOXES[synthetic_rooms.FURNITURE[k]] for k in source["label"]]
        kinds = ["wall" if i < 0 else names[boxes[i]] for i in source["instance"][place]]
        label = np.array([classes.index(kind) for kind in kinds])
        same_room(room, source["xyz"][place], source["rgb"][place], label, 1e-4)


def test_labels_of_scannet_become_the_twenty_classes_of_the_benchmark(tmp_path):
    nyu = np.array([0, 1, 2, 39, 40, 36, 13, 99])
    for name in ("scene0191_00", "scene0568_00"):
        vert = np.random.default_rng(0).uniform(0, 200, (8, 6)).astype(np.float32)
        np.save(tmp_path / f"{name}_vert.npy", vert)
        np.save(tmp_path / f"{name}_sem_label.npy", nyu.astype(np.uint32))
    train, val, classes, _ = seg.load_rooms(config(tmp_path, "scannet"))
    assert [r.name for r in (*train, *val)] == ["scene0191_00", "scene0568_00"]
    assert len(classes) == 20 and train[0].rgb.tolist() == vert[:, 3:].round().tolist()
    assert [classes[k] if k != seg.IGNORE else None for k in train[0].label] == [
        None, "wall", "floor", "other furniture", None, "bathtub", None, None]


def test_a_scan_without_labels_is_named_or_left_out_if_asked(small, tmp_path):
    for name in ("scene0191_00", "scene0191_01", "scene0568_00"):
        np.save(tmp_path / f"{name}_vert.npy", np.eye(8, 6, dtype=np.float32))
        np.save(tmp_path / f"{name}_sem_label.npy", np.arange(8))
    (tmp_path / "scene0191_01_sem_label.npy").unlink()
    with pytest.raises(InputError, match=f"scene0191_01.*{GO_ON}$"):
        seg.main([*small, "--data", "scannet", "--root", str(tmp_path)])
    train, val, _, form = seg.load_rooms(config(tmp_path, "scannet", skip_broken=True))
    assert [r.name for r in (*train, *val)] == ["scene0191_00", "scene0568_00"]
    assert "; LEFT OUT " in form and "scene0191_01" in form


@pytest.fixture
def own(tmp_path, rooms):
    """Somebody's own clouds, in each of the three formats."""
    (tmp_path / "classes.txt").write_text("\n".join(ROOM_CLASSES) + "\n", encoding="utf-8")
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
    tables = [np.c_[room["xyz"], room["rgb"], room["semantic"]] for room in rooms]
    np.save(tmp_path / "train/room0.npy", tables[0])
    np.savez(tmp_path / "train/room1.npz", xyz=rooms[1]["xyz"], rgb=rooms[1]["rgb"] / 255,
             label=rooms[1]["semantic"])
    (tmp_path / "test/room2.ply").write_bytes(room_ply(tables[2]))
    return tmp_path


def test_own_clouds_are_read_with_colours_in_either_scale(own, rooms):
    train, test, classes, form = seg.load_rooms(config(own, "folder"))
    assert classes == ROOM_CLASSES and form == f"clouds under {own}"
    assert [r.name for r in train] == ["room0", "room1"] and [r.name for r in test] == ["room2"]
    for room, source in zip([*train, *test], rooms):
        same_room(room, source["xyz"], source["rgb"], source["semantic"], 1e-5)


@pytest.mark.parametrize("missing, words", [
    ("classes.txt", "classes.txt: missing; pass --root FOLDER"),
    ("test/room2.ply", "test: no clouds; pass --root FOLDER"),
])
def test_own_clouds_come_with_classes_in_two_parts(own, missing, words):
    (own / missing).unlink()
    with pytest.raises(InputError, match=words) as error:
        seg.load_rooms(config(own, "folder"))
    assert str(error.value).startswith(str(own)) and "\n" not in str(error.value)


def test_rooms_without_any_label_are_no_result(own, rooms):
    np.savez(own / "test/room2.npz", xyz=rooms[2]["xyz"], label=np.full(len(rooms[2]["xyz"]), -1))
    (own / "test/room2.ply").unlink()
    with pytest.raises(InputError, match="test: no point has a label of a class; give rooms"):
        seg.load_rooms(config(own, "folder"))


def test_an_empty_list_of_classes_is_called_empty(own):
    (own / "classes.txt").write_text("")
    with pytest.raises(InputError, match="classes.txt: is empty; write the name of a class in"):
        seg.load_rooms(config(own, "folder"))


def test_own_clouds_may_lack_colours_and_labels(own, rooms):
    label = np.where(np.arange(1500) < 700, -1, rooms[0]["semantic"])
    np.save(own / "train/room0.npy", np.c_[rooms[0]["xyz"], label])
    train, _, _, _ = seg.load_rooms(config(own, "folder"))
    same_room(train[0], rooms[0]["xyz"], np.zeros((1500, 3), int), label, 1e-5)
    assert (train[0].label[:700] == seg.IGNORE).all()
    np.save(own / "bare.npy", rooms[0]["xyz"])
    same_room(seg.read_room(own / "bare.npy"), rooms[0]["xyz"], np.zeros((1500, 3), int),
              np.full(1500, seg.IGNORE), 1e-5)


def test_own_classes_in_the_layout_of_s3dis(small, tmp_path, rooms):
    for name, seed in (("Area_1/wood_1", 0), ("Area_2/wood_1", 1), ("Area_north/wood_2", 2)):
        folder = tmp_path / "forest" / name / "Annotations"
        folder.mkdir(parents=True)
        for k, kind in enumerate(("tree", "ground")):
            xyz = np.random.default_rng(seed).uniform(k, k + 2, (200, 3))
            np.savetxt(folder / f"{kind}_1.txt", np.c_[xyz, np.ones((200, 3))])
    root = tmp_path / "forest"
    train, test, classes, _ = seg.load_rooms(config(root, "folder", test_area="north"))
    assert classes == ("ground", "tree") and [r.name for r in test] == ["Area_north_wood_2"]
    assert [r.name for r in train] == ["Area_1_wood_1", "Area_2_wood_1"]
    assert sorted(test[0].label.tolist()) == [0] * 200 + [1] * 200
    low = test[0].xyz[test[0].label == 1].mean(0)
    assert (low < test[0].xyz[test[0].label == 0].mean(0)).all()
    words = ["--data", "folder", "--root", str(root), "--like", "synthetic", "--epochs", "1"]
    with pytest.raises(InputError, match="has no Area_5 to test on; choose one of 1, 2, north"):
        seg.main([*small, *words])
    seg.main([*small, *words, "--test-area", "2"])
    seg.main(["--eval", "runs/seg-folder-1", "--test-area", "2", "--export", "out"])
    assert [p.name for p in Path("out").glob("*.ply")] == ["Area_2_wood_1.ply"]


@pytest.mark.parametrize("change, words", [
    (lambda t: t[:, :6], r"shape \(1500, 6\)"),
    (lambda t: np.where(np.arange(7) == 6, 13, t),
     "the label 13; labels are whole numbers from 0 to 12"),
    (lambda t: np.where(np.arange(7) == 6, -2, t), "the label -2"),
    (lambda t: np.where(np.arange(7) == 6, .5, t), "the label 0.5"),
    (lambda t: np.where(np.arange(7) == 0, np.nan, t), "NaN coordinates"),
    (lambda t: np.where(np.arange(7) == 3, 300, t), "colours outside 0..255"),
    (lambda t: t[:0], "no points"),
    (None, "repair it"),                                                # the file is cut short
])
def test_bad_clouds_are_named_or_left_out_if_asked(small, own, change, words):
    path = own / "train/room0.npy"
    if change:
        np.save(path, change(np.load(path)))
    else:
        path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(BrokenFile, match=words) as error:
        seg.load_rooms(config(own, "folder"))
    text = str(error.value)
    assert text.startswith(f"{path}: ") and text.endswith("; repair it") and "\n" not in text
    with pytest.raises(InputError) as error:
        seg.main([*small, "--data", "folder", "--root", str(own)])
    assert str(error.value) == text + GO_ON and not Path("runs").exists()
    train, _, _, form = seg.load_rooms(config(own, "folder", skip_broken=True))
    assert [r.name for r in train] == ["room1"] and form == f"clouds under {own}; LEFT OUT {text}"


def test_a_run_goes_on_without_what_is_broken_and_says_so(small, own, capsys):
    (own / "train/room0.npy").write_bytes(b"")
    words = ["--data", "folder", "--root", str(own), "--like", "synthetic"]
    seg.main([*small, *words, "--skip-broken"])
    where = "runs/seg-folder-1"
    results = json.loads(Path(where, "results.json").read_text(encoding="utf-8"))
    printed = capsys.readouterr().out
    assert "LEFT OUT" in results["form"] and "room0.npy" in results["form"]
    assert results["form"] in printed and "1 train rooms of 1,500 points" in printed
    with pytest.raises(InputError, match=f"room0.npy.*{GO_ON}$"):       # asked anew each time
        seg.main(["--eval", where])
    seg.main(["--eval", where, "--skip-broken"])
    assert results["form"] in capsys.readouterr().out


# --- blocks and whole rooms -----------------------------------------------------------------------

def test_a_training_block_is_one_column_of_its_room_and_repeats_by_its_seed(rooms):
    room = room_of(rooms[0])
    points, label = seg.training_block(room, SMALL, 5)
    again, _ = seg.training_block(room, SMALL, 5)
    other, _ = seg.training_block(room, SMALL, 6)
    assert points.shape == (128, 9) and label.shape == (128,)
    assert torch.equal(points, again) and not torch.equal(points, other)
    # turned, so within the circle
    assert points[:, :2].norm(dim=1).max() <= SMALL.block / 2 * 2 ** .5 + 1e-4
    assert ((points[:, 3:] >= 0) & (points[:, 3:] <= 1)).all()
    place = points[:, 6:] * room.xyz.amax(0)                # back from shares to metres
    row = torch.cdist(place.double(), room.xyz.double()).argmin(1)
    assert torch.equal(label, room.label[row].long())


def test_a_training_block_is_the_first_one_with_enough_points_or_the_fullest():
    # a dense square metre and far from it lone points: every other centre is a lone one, the block
    # never is
    dense = torch.rand(1500, 3, generator=torch.Generator().manual_seed(0))
    lone = 50 + torch.arange(1500)[:, None] * torch.tensor([3., 3, 0])
    xyz = torch.cat([dense, lone])
    room = seg.Room("r", xyz, torch.zeros(3000, 3).byte(), (torch.arange(3000) >= 1500).short())
    labels = [seg.training_block(room, SMALL, seed)[1] for seed in range(8)]
    assert all((label == 0).all() for label in labels)
    room = seg.Room("r", lone, room.rgb[1500:], torch.arange(1500).short())
    points, label = seg.training_block(room, SMALL, 0)      # nothing is full: one point
    assert len(points) == SMALL.points and len(label.unique()) == 1


@pytest.mark.parametrize("size, points, block", [
    ((5, 3.3, 2), 4000, 1.), ((.4, .3, 2), 50, 1.), ((1.5, 7, 1), 700, 2.), ((2, 2, 2), 3, 1.),
    ((1, 1, 1), 1, 1.)])
def test_windows_cover_every_point_and_leave_no_room(size, points, block):
    xyz = torch.rand(points, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor(size)
    xyz -= xyz.amin(0)
    seen = torch.zeros(points, dtype=torch.int64)
    for middle, rows in seg.windows(xyz, block):
        assert ((xyz[rows, :2] - middle).abs() <= block / 2 + .0011).all() and len(rows)
        seen[rows] += 1
    assert seen.min() >= 1


def test_windows_are_those_of_a_walk_over_all_columns():
    """The same windows in the same order, also where most columns hold no point."""
    for seed, (size, points, block) in enumerate([
            ((5, 3.3, 2), 400, 1.), ((60, 45, 3), 90, 1.), ((.4, 9, 2), 50, 1.),
            ((30, 7, 1), 30, 2.), ((900, 1, 1), 40, 2.)]):
        xyz = torch.rand(points, 3, generator=torch.Generator().manual_seed(seed))
        xyz = xyz * torch.tensor(size)
        xyz -= xyz.amin(0)
        found = [(middle.tolist(), rows.tolist()) for middle, rows in seg.windows(xyz, block)]
        walk, half = [], block / 2
        ends = xyz.amax(0)[:2].tolist()
        counts = [max(1, int(np.ceil((end - block) / half)) + 1) for end in ends]
        for i in range(counts[0]):
            for j in range(counts[1]):
                low = torch.tensor([min(k * half, max(end - block, 0))
                                    for k, end in zip((i, j), ends)])
                inside = ((xyz[:, :2] >= low - .001) & (xyz[:, :2] <= low + block + .001)).all(1)
                if inside.any():
                    walk.append(((low + half).tolist(), inside.nonzero()[:, 0].tolist()))
        assert [(m, sorted(rows)) for m, rows in found] == walk


class Parrot(torch.nn.Module):
    """Knows the answer: class 1 above half a metre, class 0 below."""

    def forward(self, points):
        up = (points[..., 2] > .5).float()
        return torch.stack([1 - up, up], -1)


@pytest.mark.parametrize("points, votes", [(1, 1), (77, 1), (3000, 1), (500, 3)])
def test_every_point_of_a_room_gets_exactly_one_label(points, votes):
    xyz = torch.rand(points, 3, generator=torch.Generator().manual_seed(1)) * 3
    xyz -= xyz.amin(0)
    room = seg.Room("r", xyz, torch.zeros(points, 3).byte(), (xyz[:, 2] > .5).short())
    logits, blocks = seg.label_room(Parrot(), room, Setup("cpu", "fp32"), SMALL, 2, votes)
    assert logits.shape == (points, 2) and (logits.sum(1) >= votes).all()
    assert torch.equal(logits.argmax(1), room.label.long())
    assert blocks.sum() == logits.sum() and blocks[0, 1] == blocks[1, 0] == 0


def test_scores_by_hand_and_a_class_that_never_occurs():
    counts = torch.tensor([[8, 2, 0, 0], [1, 4, 0, 5], [0, 0, 0, 0], [0, 0, 0, 0]])
    result = seg.scores(counts)
    np.testing.assert_allclose(result["iou"], [8 / 11, 4 / 12, np.nan, np.nan])
    np.testing.assert_allclose(result["accuracy"], [.8, .4, np.nan, np.nan])
    assert result["miou"] == pytest.approx((8 / 11 + 1 / 3) / 2)
    assert result["macc"] == pytest.approx(.6) and result["oa"] == pytest.approx(.6)
    lines = seg.table(counts, ("a", "b", "c", "d"))
    assert "never occurs" in lines[3] and "72.7" in lines[1]
    assert lines[-1].split()[-2:] == ["53.0", "60.0"]
    nothing = seg.scores(torch.zeros(2, 2))
    assert nothing["miou"] == 0 and nothing["oa"] == 0


def test_confusion_leaves_out_points_without_a_class():
    label, predicted = torch.tensor([0, 1, 1, -1, 2]), torch.tensor([0, 1, 2, 2, 2])
    assert seg.confusion(label, predicted, 3).tolist() == [[1, 0, 0], [0, 1, 1], [0, 0, 1]]


def test_the_picture_shows_a_room_as_it_is_labelled_as_predicted_and_what_is_wrong(
        rooms, monkeypatch):
    drawn = []
    monkeypatch.setattr(render, "sheet", lambda cells, **k: drawn.append((cells, k)))
    room = room_of(rooms[0])
    label = room.label.long()
    label[::5] = seg.IGNORE
    predicted = label.where(torch.arange(len(label)) % 2 == 0, torch.tensor(1)).clamp(min=0)
    black = room._replace(rgb=0 * room.rgb)
    seg.picture([(room._replace(label=label), predicted), (black, predicted)], ROOM_CLASSES)
    (cells, more), = drawn
    wrong = ((label >= 0) & (label != predicted)).sum() / (label >= 0).sum()
    assert more["columns"] == 4 and [name for name, _ in more["legend"]] == list(ROOM_CLASSES)
    assert [cell.caption for cell in cells[:4]] == [
        "room, in its colours", "room, truth", "room, predicted",
        f"room, {100 * wrong:.0f} % of points wrong"]
    shown, camera = render.into_room(room.xyz)

    def drawing(rgb):
        return render.draw_points(room.xyz[shown], camera, 280, 280, rgb)

    colours, grey = seg.colour(label), [205] * 3
    colours[label < 0] = grey
    errors = np.full((len(label), 3), 205, np.uint8)
    errors[(label >= 0) & (label != predicted)] = render.RED
    for cell, rgb in zip(cells, (room.rgb, colours, seg.colour(predicted), errors)):
        assert (cell.picture == drawing(rgb[shown])).all()
    assert (cells[4].picture == drawing(None)).all()                # by depth, not black
    seg.picture([(room._replace(label=0 * label - 1), predicted)], ROOM_CLASSES)
    cells, more = drawn[1]
    assert [cell.caption for cell in cells] == ["room, in its colours", "room, predicted"]
    assert more["columns"] == 2


def test_the_decoders_interpolation_is_exact_on_a_linear_field():
    """Where three sources are equally far, their mean: exact for any linear field."""
    corner = torch.rand(40, 3, generator=torch.Generator().manual_seed(0)) * 100
    triangle = torch.tensor([[1., 0, 0], [-.5, 3 ** .5 / 2, 0], [-.5, -3 ** .5 / 2, 0]])
    source = (corner[:, None] + triangle).view(1, -1, 3)
    field = torch.tensor([[.3, -1.2, .7], [2., 0, -.1]])
    values = source @ field.T + torch.tensor([5., -1])
    out = interpolate(corner[None], source, values)
    expected = corner[None] @ field.T + torch.tensor([5., -1])
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-3)


# --- model ----------------------------------------------------------------------------------------

def settings_of(recipe, **more):
    return {"recipe": recipe._asdict(), **{k: False for k in ABLATIONS}, **more}


@pytest.fixture
def model(tiny_clip):
    torch.manual_seed(0)
    return seg.Segmenter(pretrained.load_clip(tiny_clip), 13, settings_of(SMALL))


def test_the_reference_configuration_has_the_sizes_of_its_parts():
    model = seg.Segmenter(pretrained.load_clip("random"), 13, settings_of(seg.RECIPES["s3dis"]))
    expected = {"lift": 9 * 64 + 128,
                "downs": 67 * 256 + 512 + 259 * 768 + 1536,
                "encoder": 99_584 + 13 * 768 + 2 * (768 * 768 + 768),
                "ups": (768 + 256) * 256 + 512 + (256 + 64) * 128 + 256,
                "head": 137 * 128 + 256 + 128 * 13 + 13}
    assert expected == {name: sum(p.numel() for p in part.parameters())
                        for name, part in model.named_children()}
    assert not any("clip" in name for name in model.state_dict())


def test_every_token_of_a_block_reaches_every_other_and_none_of_another(model):
    model.eval()
    x, xyz = torch.randn(2, 32, 64), torch.rand(2, 32, 3)
    moved = x.clone()
    moved[0, 5] += 1
    before, after = model.encoder(x, xyz), model.encoder(moved, xyz)
    assert before.patches.shape == (2, 32, 64) and before.tasks.shape == (2, 13, 64)
    for rows, others in ((before.patches, after.patches), (before.tasks, after.tasks),
                         (before.cls[:, None], after.cls[:, None])):
        change = (rows - others).abs().amax(2)
        assert (change[0] > 0).all() and (change[1] == 0).all()


def test_task_tokens_learn_and_the_transformer_does_not(model):
    model.train()(torch.rand(2, 128, 9)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.encoder.task.embedding.weight.grad.abs().sum() > 0
    assert list(model.encoder.clip.parameters()) == []


# --- the run --------------------------------------------------------------------------------------

@pytest.fixture
def small(monkeypatch, tmp_path, tiny_clip):
    monkeypatch.setattr(seg, "SYNTHETIC", (3, 2, 1200))
    monkeypatch.setitem(seg.RECIPES, "synthetic", SMALL)
    monkeypatch.chdir(tmp_path)
    return ["--clip", tiny_clip]


def lines(folder):
    text = Path(folder, "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def last_lines(text):
    return [line for line in text.splitlines() if line.startswith("result")]


def test_a_run_evaluates_resumes_repeats_and_predicts(small, monkeypatch, capsys, rooms):
    seg.main(small)
    whole = Path("runs/seg-synthetic-1")
    first = json.loads((whole / "results.json").read_text(encoding="utf-8"))
    assert first["task"] == "seg" and 0 <= first["metrics"]["miou"] <= 1
    assert set(first["iou"]) == set(ROOM_CLASSES)
    printed = capsys.readouterr().out
    assert "points a second: FPS, KNN, tokenizer" in printed and "blocks   mIoU" in printed
    seg.main(["--eval", str(whole), "--export", "look"])
    assert sorted(p.name for p in Path("look").iterdir()) == [
        "look.png", "room000.npy", "room000.ply", "room001.npy", "room001.ply"]
    looks = [Image.open(folder / "look.png") for folder in (Path("look"), whole)]
    assert looks[0].tobytes() == looks[1].tobytes() and looks[0].width == 4 * (280 + 12)
    with open(whole / "confusion.csv", encoding="utf-8") as file:
        counts = np.array([row[1:] for row in csv.reader(file)][1:], int)
    assert seg.scores(counts)["miou"] == first["metrics"]["miou"]
    assert last_lines(capsys.readouterr().out) == last_lines(printed) != []

    np.save("scan.npy", rooms[0]["xyz"])                    # no colours, no labels
    write_ply(Path("scan2.ply"), rooms[1]["xyz"] + 40, rooms[1]["rgb"])
    seg.main(["--eval", str(whole), "--predict", "scan.npy", "scan2.ply"])
    said = capsys.readouterr().out
    assert "scan.npy: 1,500 points" in said and said.count("it has no colours") == 1
    with pytest.raises(InputError, match="several files are called scan2"):
        seg.main(["--eval", str(whole), "--predict", "scan2.ply", "./scan2.ply"])
    with pytest.raises(InputError, match="scan2.ply lies there and would be written over"):
        seg.main(["--eval", str(whole), "--predict", "scan2.ply", "--export", "."])
    Path("cut.ply").write_bytes(Path("scan2.ply").read_bytes()[:-9])
    with pytest.raises(InputError, match="cut.ply: cut short.*; repair it$"):   # nothing to skip
        seg.main(["--eval", str(whole), "--predict", "cut.ply"])
    assert Image.open(whole / "predicted/look.png").width == 2 * (280 + 12)
    labels = np.load(whole / "predicted/scan2.npy")
    assert labels.shape == (1500,) and labels.min() >= 0 and labels.max() < 13
    table, _ = read_ply((whole / "predicted/scan2.ply").read_bytes())
    assert len(table) == 1500
    for name, column in zip(("red", "green", "blue"), seg.colour(labels).T):
        assert (table[name] == column).all()

    count, now = iter(range(99)), run.Stopper.now
    monkeypatch.setattr(run.Stopper, "now", lambda self, step: next(count) == 9)
    with pytest.raises(SystemExit) as left:
        seg.main([*small, "--out", "parts"])
    assert left.value.code == 130
    at = checkpoint.load_checkpoint("parts", "seg")["at"]
    assert (at["epoch"], at["step"]) == (1, 3)              # 7 steps an epoch, asked after each
    monkeypatch.setattr(run.Stopper, "now", now)
    with open("parts/metrics.jsonl", "a", encoding="utf-8") as file:
        file.write("{}\n")                                  # a line whose checkpoint was not saved
    capsys.readouterr()
    seg.main(["--resume", "parts"])
    said = capsys.readouterr().out.splitlines()
    resumed = next(i for i, line in enumerate(said) if line.startswith("run      parts, resumed"))
    assert said[resumed + 1].split() == "epoch loss train OA mIoU mAcc OA lr s left".split()
    assert said[resumed + 2].startswith("    2 ")
    a, b = (torch.load(f"{folder}/last.pt", weights_only=True)["model"]
            for folder in (whole, "parts"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    for one, two in zip(lines(whole), lines("parts"), strict=True):
        assert {**one, "seconds": 0} == {**two, "seconds": 0}


def test_one_room_is_learned_by_heart(small, monkeypatch, rooms):
    room = room_of(rooms[0])
    monkeypatch.setattr(seg, "load_rooms",
                        lambda cfg, training: ([room], [room], ROOM_CLASSES, "one room"))
    monkeypatch.setitem(seg.RECIPES, "synthetic", SMALL._replace(
        points=512, tokens=128, epochs=120, every=120, lr=3e-3))
    seg.main(small)
    results = json.loads(Path("runs/seg-synthetic-1/results.json").read_text(encoding="utf-8"))
    assert results["metrics"]["oa"] > .85


def test_a_compiled_model_has_no_graph_break_and_learns_the_same(small, monkeypatch):
    compiler = torch.compile                    # without code generation: no C compiler needed
    monkeypatch.setattr(torch, "compile",
                        lambda m: compiler(m, backend="aot_eager", fullgraph=True))
    for folder, more in (("plain", []), ("compiled", ["--compile"])):
        seg.main([*small, "--lr", "1e-5", "--epochs", "1", "--out", folder, *more])
    assert lines("compiled")[0]["loss"] == pytest.approx(lines("plain")[0]["loss"], rel=1e-4)


@pytest.mark.parametrize("more", [
    ["--accumulate", "2"], ["--unfreeze"], ["--deep-prompt"], ["--no-transformer"],
    ["--no-task-token", "--dropout", "0.3"]])
def test_accumulation_and_every_ablation_train(small, more):
    seg.main([*small, "--epochs", "3", *more])
    losses = [line["loss"] for line in lines("runs/seg-synthetic-1")]
    assert losses[-1] < losses[0]


def test_two_processes_follow_the_loss_curve_of_one(own, tiny_clip, tmp_path):
    """Batches of 5 blocks: the processes hold 2 and 3. No dropout, whose masks would differ."""
    recipe = SMALL._replace(batch_size=5, lr=1e-5, dropout=0., head_dropout=0.)
    (tmp_path / "small.py").write_text(
        f"import run, train_seg as seg\nseg.RECIPES['folder'] = seg.Recipe(**{recipe._asdict()})\n"
        "run.main_guard(seg.main)\n", encoding="utf-8")
    env = {**{k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK")},
           "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(seg.__file__).parent)}
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29521"]
    for folder, launcher in (("one", []), ("two", torchrun)):
        command = [sys.executable, *launcher, str(tmp_path / "small.py"), "--data", "folder",
                   "--root", str(own), "--clip", tiny_clip, "--device", "cpu",
                   "--out", str(tmp_path / folder)]
        done = subprocess.run(command, env=env, text=True, capture_output=True, timeout=600)
        assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stdout and done.stdout.count("result ") == 1
    for one, two in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
        assert one["miou"] == pytest.approx(two["miou"], abs=2e-3)


@pytest.mark.parametrize("words, message", [
    (["--points", "16"], "--points 16: a quarter of them become tokens"),
    (["--predict", "x.ply"], "need a run"),
    (["--vote", "3"], "need a run"),
    (["--test-area", "3"], "belongs to --data s3dis"),
    (["--test-area", "7", "--data", "s3dis"], "S3DIS has the areas 1 to 6"),
    (["--scale", "0.001"], "--scale belongs to clouds from files"),
    (["--scale", "0"], "--scale 0 must be above 0"),
    (["--data", "s3dis", "--root", "nowhere"], "no such folder; ask for Stanford3dDataset"),
    (["--data", "s3dis", "--root", "."], "found neither Area_1/ROOM/Annotations"),
    (["--data", "scannet", "--root", "."], "found neither scans/ nor"),
    (["--data", "folder", "--root", "."], "train: no clouds; pass --root FOLDER"),
])
def test_wrong_arguments_are_one_line(small, words, message):
    with pytest.raises(InputError, match=message) as error:
        seg.main([*small, *words])
    assert "\n" not in str(error.value) and not Path("runs").exists()


def test_what_is_written_lies_where_what_was_read_lies(small, rooms):
    """--predict and --export keep the file's own frame, unit and order, in double far away."""
    seg.main([*small, "--epochs", "1"])
    rng = np.random.default_rng(0)
    for scale, corner in ((1, (12, -30, 1.5)), (1, (500_000, 5_600_000, 80)), (1000, (-7, 9, 0))):
        xyz = np.array(corner) + rng.uniform(0, 3, (300, 3)) * scale
        np.save("scan.npy", xyz)
        more = ["--scale", str(1 / scale)] if scale > 1 else []
        seg.main(["--eval", "runs/seg-synthetic-1", "--predict", "scan.npy", "--export", "out",
                  *more])
        table, _ = read_ply(Path("out/scan.ply").read_bytes())
        written = np.stack([table[axis] for axis in "xyz"], 1)
        assert written.dtype == (np.float64 if corner[0] > 1e4 else np.float32)
        np.testing.assert_allclose(written, xyz, rtol=3e-7, atol=1e-6 * scale)
        assert len(np.load("out/scan.npy")) == 300


def test_rooms_in_millimetres_are_refused_or_scaled(small, own, rooms, capsys):
    near = seg.load_rooms(config(own, "folder"))[0][0]
    table = np.c_[rooms[0]["xyz"] * 1000, rooms[0]["rgb"], rooms[0]["semantic"]]
    np.save(own / "train/room0.npy", table)
    words = ["--data", "folder", "--root", str(own), "--like", "synthetic"]
    with pytest.raises(InputError, match=r"room0.npy: spans [\d,]+ x [\d,]+ x [\d,]+ m; metres are "
                                         r"expected: pass --scale S, 0.001 if"):
        seg.main([*small, *words])
    with pytest.raises(InputError, match=r"room1.npz: spans 0.0\d+ x .*; metres are expected"):
        seg.main([*small, *words, "--scale", "0.001"])      # not all of them are in millimetres
    room = seg.read_room(own / "train/room0.npy", range(13), 13, 0.001)
    np.testing.assert_allclose(room.xyz, near.xyz, atol=1e-5)
    stray = np.r_[rooms[1]["xyz"], [[3000, 0, 0]]]
    np.save("stray.npy", stray)
    with pytest.raises(BrokenFile, match="spans 3,000 x .*far away"):
        seg.read_room("stray.npy")


def test_scale_belongs_to_the_run(small, own):
    for part, name in (("train", "room0.npy"), ("train", "room1.npz"), ("test", "room2.ply")):
        path = own / part / name
        cloud = read_cloud(path, 13)
        path.unlink()
        np.save(path.with_suffix(".npy"), np.c_[cloud.xyz * 1000, cloud.rgb, cloud.label])
    words = ["--data", "folder", "--root", str(own), "--like", "synthetic", "--scale", "0.001"]
    seg.main([*small, *words, "--export", "out"])
    assert checkpoint.load_checkpoint("runs/seg-folder-1", "seg")["config"]["scale"] == 0.001
    table, _ = read_ply(Path("out/room2.ply").read_bytes())
    np.testing.assert_allclose(table["x"], read_cloud(own / "test/room2.npy").xyz[:, 0], rtol=1e-6,
                               atol=1e-3)
    seg.main(["--eval", "runs/seg-folder-1"])               # without --scale: the run's
    with pytest.raises(InputError, match="spans"):
        seg.main(["--eval", "runs/seg-folder-1", "--scale", "1"])


def test_a_saved_run_is_evaluated_on_other_data(small, own, rooms, tmp_path, capsys):
    """--root names other rooms, --data other rooms in another form, whose classes are the same."""
    seg.main(small)
    capsys.readouterr()

    def evaluated(*words):
        seg.main(["--eval", "runs/seg-synthetic-1", *words])
        printed = capsys.readouterr().out.splitlines()
        return [line for line in printed if not line.startswith(("device", "speed", "data"))]

    first = evaluated("--data", "folder", "--root", str(own))
    assert "of a run on synthetic; folder" in first[-1] and "best on test" not in first[-1]
    other = tmp_path / "other"                              # labels in another order of classes
    order = np.random.default_rng(0).permutation(13)
    for part in ("train", "test"):
        (other / part).mkdir(parents=True)
        room = rooms[2]                                     # that of own/test
        np.savez(other / part / "room2.npz", xyz=room["xyz"], rgb=room["rgb"],
                 label=np.argsort(order)[room["semantic"]])
    (other / "classes.txt").write_text("\n".join(ROOM_CLASSES[k] for k in order), encoding="utf-8")
    assert evaluated("--data", "folder", "--root", str(other)) == first
    (other / "classes.txt").write_text("\n".join((*ROOM_CLASSES[:12], "junk")), encoding="utf-8")
    with pytest.raises(InputError, match="has other classes than the run: ceiling, floor, .*junk"):
        evaluated("--data", "folder", "--root", str(other))
    with pytest.raises(InputError, match="--root .*other: the run's data is built in.*add --data"):
        evaluated("--root", str(other))

    seg.main([*small, "--data", "folder", "--root", str(own), "--like", "synthetic"])
    printed = capsys.readouterr().out.splitlines()
    (other / "classes.txt").write_text("\n".join(ROOM_CLASSES), encoding="utf-8")
    room = rooms[2]
    np.savez(other / "test/room2.npz", xyz=room["xyz"], rgb=room["rgb"], label=room["semantic"])
    seg.main(["--eval", "runs/seg-folder-1", "--root", str(other)])
    again = capsys.readouterr().out.splitlines()
    assert f"clouds under {other}" in "".join(again)
    assert again[-1].split(";")[0] == printed[-2].split(";")[0] and "best on test" in again[-1]
    assert last_lines("\n".join(again)) != []
    shutil.rmtree(other / "train")                          # test rooms alone will do
    seg.main(["--eval", "runs/seg-folder-1", "--root", str(other)])
    alone = capsys.readouterr().out.splitlines()
    assert alone[-1].split(";")[0] == again[-1].split(";")[0]
    assert any(line.startswith("data     folder: 1 test rooms, 13 classes") for line in alone)
    with pytest.raises(InputError, match="other.train: no clouds; pass --root FOLDER"):
        seg.main([*small, "--data", "folder", "--root", str(other), "--like", "synthetic"])


def test_one_block_in_a_step_is_enough(small, monkeypatch):
    monkeypatch.setattr(seg, "SYNTHETIC", (1, 1, 600))
    seg.main([*small, "--batch-size", "1", "--epochs", "1"])


@pytest.mark.parametrize("part", ["", "train", "val", "test"])
def test_an_export_over_the_data_is_refused_before_anything_is_read(tmp_path, part):
    with pytest.raises(InputError, match="the run's data lies there and would be written over"):
        seg.main(["--data", "folder", "--root", str(tmp_path), "--clip", "random",
                  "--export", str(tmp_path / part)])
