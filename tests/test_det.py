"""train_det.py: its scenes, boxes, matching, average precision, the model, the loop."""
import itertools
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
import common
import pretrained
import render
import run
import train_det as det
from data import synthetic_rooms
from data.files import read_ply, write_ply
from data.scannet import SCANNET_BOXES
from run import ABLATIONS, InputError
from test_scannet import TSV, raw_scan
from train_det import Detections, Scene

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def rooms():
    return synthetic_rooms.room_scenes(3, 3000, 9)


def config(root, data="scannet", **more):
    return {"data": data, "root": str(root), "workers": 1, "skip_broken": False,
            "recipe": {"points": 512}, **more}


# --- scenes ---------------------------------------------------------------------------------------

def test_scans_become_scenes_with_the_boxes_of_eighteen_classes(tmp_path, rooms):
    (tmp_path / "scannetv2-labels.combined.tsv").write_text(TSV)
    for name, room in zip(("scene0191_00", "scene0191_01", "scene0568_00"), rooms):
        raw_scan(tmp_path, name, room)
    train, val, classes, form = det.load_scenes(config(tmp_path))
    assert [s.name for s in train] == ["scene0191_00", "scene0191_01"]
    assert [s.name for s in val] == ["scene0568_00"] and classes == tuple(SCANNET_BOXES)
    assert "2 of 1,201 train and 1 of 312 val" in form
    for scene, room in zip(train + val, rooms):
        names = [synthetic_rooms.FURNITURE[k] for k in room["label"]]
        assert [classes[k] for k in scene.label] == names
        np.testing.assert_allclose(scene.boxes[:, :3], room["center"], atol=1e-4)
        np.testing.assert_allclose(scene.boxes[:, 3:], room["size"], atol=1e-4)


def test_a_scan_without_boxes_is_named_and_boxes_of_other_classes_are_left_out(tmp_path):
    vert = np.random.default_rng(0).uniform(0, 3, (40, 6)).astype(np.float32)
    for name in ("scene0191_00", "scene0568_00"):
        np.save(tmp_path / f"{name}_vert.npy", vert)
        np.save(tmp_path / f"{name}_bbox.npy", [[1, 1, 1, 1, 1, 1, 5], [1, 1, 1, 0, 0, 0, 40.]])
    train, _, classes, _ = det.load_scenes(config(tmp_path))
    assert [classes[k] for k in train[0].label] == ["chair"]
    (tmp_path / "scene0191_00_bbox.npy").unlink()
    with pytest.raises(InputError, match="scene0191_00_bbox.npy: is missing"):
        det.load_scenes(config(tmp_path))
    train, _, _, form = det.load_scenes(config(tmp_path, skip_broken=True))
    assert train == [] and "LEFT OUT" in form and "scene0191_00_bbox.npy" in form


@pytest.fixture
def own(tmp_path, rooms):
    for part, i in (("train", 0), ("train", 1), ("val", 0)):
        folder = tmp_path / part
        folder.mkdir(exist_ok=True)
        room = rooms[i]
        if i:
            np.save(folder / f"room{i}.npy", room["xyz"])
        else:
            write_ply(folder / f"room{i}.ply", room["xyz"], room["rgb"])
        (folder / f"room{i}.json").write_text(json.dumps([
            {"class": synthetic_rooms.FURNITURE[k], "center": c.tolist(), "size": s.tolist()}
            for k, c, s in zip(room["label"], room["center"], room["size"])]))
    return tmp_path


def test_own_scenes_are_read(own, rooms):
    train, val, classes, _ = det.load_scenes(config(own, "folder"))
    assert len(train) == 2 and len(val) == 1
    assert [classes[k] for k in train[1].label] == [
        synthetic_rooms.FURNITURE[k] for k in rooms[1]["label"]]
    np.testing.assert_allclose(val[0].xyz, rooms[0]["xyz"])


def test_own_scenes_in_the_prepared_form_are_read(tmp_path, rooms):
    (tmp_path / "classes.txt").write_text("bed\nlamp\n", encoding="utf-8")
    for part, kinds in (("train", [1, 0]), ("val", [1, 1])):
        (tmp_path / part).mkdir()
        boxes = [[*rooms[0]["center"][i], 1, 2, 3, k] for i, k in enumerate(kinds)]
        np.savez(tmp_path / part / "r.npz", xyz=rooms[0]["xyz"], boxes=np.array(boxes))
    train, val, classes, _ = det.load_scenes(config(tmp_path, "folder"))
    assert classes == ("bed", "lamp") and train[0].label.tolist() == [1, 0]
    assert val[0].label.tolist() == [1, 1] and val[0].boxes[1, 3:].tolist() == [1, 2, 3]
    np.savez(tmp_path / "val" / "r.npz", xyz=rooms[0]["xyz"], boxes=np.ones((1, 7)) * 2)
    with pytest.raises(InputError, match="a box of class 2, which is no line of classes.txt"):
        det.load_scenes(config(tmp_path, "folder"))


@pytest.mark.parametrize("boxes, words", [
    ('[{"class": "bed", "center": [0, 0, 0], "size": [1, -2, 1]}]', "box 0 has a size below zero"),
    ('[{"class": "bed", "center": [0, NaN, 0], "size": [1, 1, 1]}]', "NaN"),
    ('[{"class": "bed", "center": [0, 0, 0]}]', "box 0 lacks class, center or size; a scene is"),
    # three numbers and three make six: not one box
    ('[{"class": "bed", "center": [0, 0], "size": [1]}, '
     '{"class": "bed", "center": [0, 0], "size": [1]}]', "center of box 0 is not three numbers"),
    ('[{"class": "bed", "center": [0, 0, 0], "size": "111"}]', "size of box 0 is not three"),
    ('{"class": "bed", "center": [0, 0, 0], "size": [1, 1, 1]}', "is not a list; a scene is"),
    ('[{"class": "bed",\n "center"]', "delimiter: line 2 .*; a scene is a cloud"),
    (json.dumps([{"class": "bed", "center": [0, 0, 0], "size": [1, 1, 1]}] * 65),
     "65 boxes, at most 64"),
    ('[{"class": "teapot", "center": [0, 0, 0], "size": [1, 1, 1]}]',
     "'teapot' is none of those to learn"),
])
def test_bad_boxes_are_named(own, boxes, words):
    (own / "val/room0.json").write_text(boxes)
    with pytest.raises(InputError, match=words) as error:
        det.load_scenes(config(own, "folder"))
    assert "room0.json" in str(error.value)


def test_flat_boxes_are_left_out_and_boxes_without_points_named(own):
    room = json.loads((own / "train/room0.json").read_text())
    flat = {**room[0], "size": [1, 0, 1]}
    empty = {**room[0], "center": [50, 50, 50]}
    (own / "train/room0.json").write_text(json.dumps([flat, *room, empty]))
    train, _, _, form = det.load_scenes(config(own, "folder"))
    assert len(train[0].boxes) == len(room) + 1 and (train[0].boxes[:, 3:] > 0).all()
    assert "room0.json: box 0 is flat and left out" in form
    assert f"room0.json: box {len(room) + 1} holds no point" in form
    assert form.count(".json: box") == 2


def test_a_scene_in_millimetres_is_refused(own, rooms):
    np.save(own / "train/room1.npy", rooms[1]["xyz"] * 1000)
    with pytest.raises(InputError, match=r"room1.npy: spans [\d,]+ x [\d,]+ x [\d,]+ m; metres"):
        det.load_scenes(config(own, "folder"))


# --- points of a step -----------------------------------------------------------------------------

def scene_of(room, name="room"):
    boxes = np.concatenate([room["center"], room["size"]], 1)
    return Scene(name, *map(torch.from_numpy, (room["xyz"], boxes, room["label"])))


EMPTY = Scene("empty", torch.rand(300, 3), torch.zeros(0, 6), torch.zeros(0, dtype=torch.int64))


def test_a_batch_is_the_same_whatever_is_drawn_before_and_pads_boxes(rooms):
    scenes = [scene_of(rooms[0]), EMPTY]
    one = det.make_batch(scenes, 512, CPU, [3, 4])
    torch.rand(7)
    two = det.make_batch(scenes[::-1], 512, CPU, [4, 3])
    assert all(torch.equal(a, b.flip(0)) for a, b in zip(one, two))
    assert one.xyz.shape == (2, 512, 3) and one.real[1].sum() == 0
    assert torch.equal(one.low[0], one.xyz[0].amin(0))


def test_points_stay_in_their_boxes_when_a_scene_is_flipped_and_turned(rooms):
    room, scene = rooms[1], scene_of(rooms[1])
    for draw in ((.2, .7, .0), (.9, .1, .99), (.3, .3, .5)):
        xyz, boxes = det.flip_and_rotate(scene.xyz, scene.boxes, torch.tensor(draw))
        for i, box in enumerate(boxes):
            mine = xyz[torch.from_numpy(room["instance"] == i)]
            assert ((mine - box[:3]).abs() <= box[3:] / 2 + 1e-4).all()
        assert torch.allclose(xyz.norm(dim=1), scene.xyz.norm(dim=1), atol=1e-4)
        if draw[2] == .5:
            assert torch.allclose(boxes[:, 3:], scene.boxes[:, 3:])


def test_a_random_cuboid_keeps_enough_points_and_boxes_whose_centre_is_in_it(rooms):
    scene = scene_of(rooms[0])
    parts = set()
    for seed in range(10):
        draw = torch.Generator().manual_seed(seed)
        inside, kept = det.random_cuboid(scene.xyz, scene.boxes, 1000, draw)
        xyz, boxes = scene.xyz[inside], scene.boxes[kept]
        assert len(xyz) >= 750 and len(boxes) >= 1
        within = ((scene.boxes[:, :3] >= xyz.amin(0)) & (scene.boxes[:, :3] <= xyz.amax(0))).all(1)
        assert torch.equal(kept, within)
        size = scene.xyz.amax(0) - scene.xyz.amin(0)
        assert ((xyz.amax(0) - xyz.amin(0)) <= size * (1 + 1e-5)).all()
        parts.add(len(xyz))
    assert len(parts) > 5


def test_a_cuboid_is_the_same_however_many_are_tried_at_a_time(rooms, monkeypatch):
    scene = scene_of(rooms[0])
    for seed in range(20):
        found = []
        for several in (1, 4, 33, 100):
            monkeypatch.setattr(det, "CPU_TRIES", several)
            draw = torch.Generator().manual_seed(seed)
            found.append(det.random_cuboid(scene.xyz, scene.boxes, 1500, draw))
        for inside, kept in found[1:]:
            assert torch.equal(inside, found[0][0]) and torch.equal(kept, found[0][1])


@pytest.mark.parametrize("what", ["no box", "too few points"])
def test_where_no_cuboid_fits_the_whole_scene_is_taken(rooms, what):
    scene = scene_of(rooms[0])
    boxes = scene.boxes[:0] if what == "no box" else scene.boxes
    points = 1000 if what == "no box" else 10 * len(scene.xyz)
    inside, kept = det.random_cuboid(scene.xyz, boxes, points, torch.Generator().manual_seed(0))
    assert inside.all() and kept.all() and len(kept) == len(boxes)


def test_a_batch_of_cuboids_holds_points_and_boxes_of_its_scenes(rooms):
    scenes = [scene_of(room) for room in rooms[:2]] + [EMPTY]
    batch = det.make_batch(scenes, 700, CPU, [1, 2, 3], cuboid=True)
    assert batch.xyz.shape == (3, 700, 3)
    assert batch.real[:2].any(1).all() and not batch.real[2].any()
    unit = torch.tensor([0., 0, 0, 1, 1, 1])
    assert (batch.boxes[~batch.real] == unit).all() and (batch.label[~batch.real] == 0).all()
    for i, scene in enumerate(scenes[:2]):
        kept = batch.real[i, :len(scene.boxes)]
        assert torch.equal(batch.label[i, :len(kept)][kept], scene.label[kept])
        turned = batch.boxes[i, :len(kept)][kept]           # heights stay
        assert torch.allclose(turned[:, 5], scene.boxes[kept][:, 5], atol=1e-5)
        assert torch.allclose(turned[:, 2], scene.boxes[kept][:, 2], atol=1e-5)
        assert torch.equal(batch.low[i], batch.xyz[i].amin(0))


# --- boxes and matching ---------------------------------------------------------------------------

def test_iou_and_giou_against_counting_points():
    rng = np.random.default_rng(0)
    boxes = np.concatenate([rng.uniform(0, 1, (8, 3)), rng.uniform(.3, 1.5, (8, 3))], 1)
    boxes = torch.from_numpy(boxes)
    iou, giou = det.iou_terms(boxes[:, None], boxes[None])
    for a, b in itertools.combinations(range(8), 2):
        low = np.minimum(*(boxes[i, :3].numpy() - boxes[i, 3:].numpy() / 2 for i in (a, b)))
        high = np.maximum(*(boxes[i, :3].numpy() + boxes[i, 3:].numpy() / 2 for i in (a, b)))
        x = rng.uniform(low, high, (100_000, 3))            # the hull, filled
        ins = [(abs(x - boxes[i, :3].numpy()) <= boxes[i, 3:].numpy() / 2).all(1) for i in (a, b)]
        both, either = (ins[0] & ins[1]).mean(), (ins[0] | ins[1]).mean()
        assert iou[a, b] == pytest.approx(both / either, abs=.01)
        assert giou[a, b] == pytest.approx(both / either - (1 - either), abs=.01)
    assert torch.allclose(iou.diag(), torch.ones(8, dtype=iou.dtype))
    assert torch.allclose(giou, giou.T)


def output(center, size, logits, low, high):
    """An Output of one layer from (B, Q, ...) tensors."""
    extent = (high - low)[:, None]
    zero = torch.zeros(*logits.shape[:2], 1)
    shares = (center - low[:, None]) / extent, size / extent
    return det.Output(*(x[None] for x in (logits, center, size, *shares, zero, zero)))


def test_the_matching_is_the_best_of_all_matchings(rooms):
    torch.manual_seed(0)
    scene = scene_of(rooms[0])
    scene = scene._replace(boxes=scene.boxes[:3], label=scene.label[:3])
    batch = det.make_batch([scene, EMPTY], 512, CPU)
    out = output(torch.rand(2, 5, 3) * 4, torch.rand(2, 5, 3) + .3, torch.randn(2, 5, 9), batch.low,
                 batch.high)
    chosen = det.match(out, batch)[0, 0, :3]
    boxes = torch.cat([out.center, out.size], -1)[0, 0]
    _, giou = det.iou_terms(boxes[:, None], batch.boxes[0, None, :3])
    cost = -out.logits[0, 0].softmax(-1)[:, batch.label[0, :3]] - 2 * giou              # (Q, 3)
    every = {p: sum(cost[q, k].item() for k, q in enumerate(p))
             for p in itertools.permutations(range(5), 3)}
    assert tuple(chosen.tolist()) == min(every, key=every.get)


def test_the_matching_passes_over_boxes_that_are_not_there_and_over_nan(rooms):
    torch.manual_seed(0)
    scene = scene_of(rooms[0])
    batch = det.make_batch([scene, scene], 512, CPU)
    n = len(scene.boxes)
    out = output(torch.rand(2, n + 3, 3) * 4, torch.rand(2, n + 3, 3) + .3,
                 torch.randn(2, n + 3, 9), batch.low, batch.high)
    holes = batch._replace(real=batch.real.clone())
    holes.real[:, 1] = False
    others = [0, *range(2, n)]
    short = batch._replace(boxes=batch.boxes[:, [*others, 1]], label=batch.label[:, [*others, 1]],
                           real=batch.real[:, 1:n + 1])
    chosen = det.match(out, holes)[0, 0, :n]
    assert torch.equal(chosen[others], det.match(out, short)[0, 0, :n - 1]) and chosen[1] == 0
    out.logits[:, 1] = float("nan")
    assert not torch.isfinite(sum(det.losses(out, batch).values()))      # and no traceback


def test_losses_vanish_for_perfect_boxes_and_know_the_no_object_weight(rooms):
    scene = scene_of(rooms[0])
    batch = det.make_batch([scene], 2048, CPU)
    n = len(scene.label)
    logits = torch.zeros(1, n + 2, 9)
    logits[0, :n].scatter_(1, scene.label[:, None], 50.)
    logits[0, n:, 8] = 50.
    boxes = torch.cat([scene.boxes, torch.rand(2, 6) + .1])[None]
    out = output(boxes[..., :3], boxes[..., 3:], logits, batch.low, batch.high)
    terms = det.losses(out, batch)
    assert all(abs(x) < 1e-4 for x in terms.values()), terms
    wrong = logits.clone()
    wrong[0, n, :] = 0
    wrong[0, n, 0] = 3.                                     # "bed" where there is nothing
    ce = torch.nn.functional.cross_entropy(wrong[0, n:n + 1], torch.tensor([8])).item()
    terms = det.losses(out._replace(logits=wrong[None]), batch)
    assert terms["class"].item() == pytest.approx(.25 * ce / (n + .25 * 2), rel=1e-3)


def test_a_batch_without_objects_has_a_finite_loss_and_a_gradient():
    batch = det.make_batch([EMPTY], 256, CPU)
    logits = torch.randn(1, 4, 9, requires_grad=True)
    out = output(torch.rand(1, 4, 3), torch.rand(1, 4, 3), logits, batch.low, batch.high)
    total = sum(det.losses(out, batch).values())
    total.backward()
    assert torch.isfinite(total) and logits.grad.abs().sum() > 0


# --- average precision ----------------------------------------------------------------------------

BOX = np.array([[0, 0, 0, 1, 1, 1], [5, 0, 0, 1, 1, 1], [0, 5, 0, 2, 2, 2]], float)


def ap(boxes, scores, truth=BOX, label=(0, 0, 1), classes=2):
    scores = np.array(scores, float).reshape(len(boxes), classes)
    return det.evaluate_boxes([Detections(np.array(boxes, float).reshape(-1, 6), scores)],
                              [(np.array(truth).reshape(-1, 6), np.array(label, int))])


def test_ap_of_perfect_detections_is_one_and_of_none_is_zero():
    result = ap(BOX, [(1, 0), (.9, 0), (0, 1)])
    assert result[0.25][0].tolist() == result[0.5][0].tolist() == [1, 1]
    assert result[0.5][1].tolist() == [1, 1]
    result = ap(np.zeros((0, 6)), np.zeros((0, 2)))
    assert result[0.25][0].tolist() == [0, 0] and result[0.25][1].tolist() == [0, 0]


def test_ap_by_hand():
    # class 0, by score: right, double of the same box, wrong place, right; hence precision
    # 1, 1/2, 1/3, 2/4, and its envelope: 1 up to recall 1/2, then 1/2
    boxes = [BOX[0], BOX[0] + [.05, 0, 0, 0, 0, 0], [9, 9, 9, 1, 1, 1], BOX[1]]
    result = ap(boxes, [(.9, 0), (.8, 0), (.7, 0), (.6, 0)])
    assert result[0.25][0][0] == pytest.approx(.5 * 1 + .5 * .5)
    assert result[0.25][1][0] == 1 and result[0.25][0][1] == 0
    # a shift of 0.4 leaves IoU 0.6 / 1.4 = 0.43: right at 0.25, wrong at 0.50
    result = ap([BOX[0] + [.4, 0, 0, 0, 0, 0]], [(1, 0)], BOX[:1], [0])
    assert result[0.25][0][0] == 1 and result[0.5][0][0] == 0


def test_iou_must_exceed_the_threshold_and_a_taken_box_is_not_replaced_by_the_second_best():
    moved = BOX[0] + [1 / 3, 0, 0, 0, 0, 0]                 # IoU exactly 1/2, up to rounding
    half = ap([moved], [(1, 0)], BOX[:1], [0])
    assert half[0.25][0][0] == 1
    truth = [[0, 0, 0, 1, 1, 1], [.3, 0, 0, 1, 1, 1]]
    result = ap([truth[0], [.1, 0, 0, 1, 1, 1]], [(.9, 0), (.8, 0)], truth, [0, 0])
    assert result[0.25][1][0] == .5                         # both overlap box 0 most


def test_ties_keep_their_order_and_a_class_without_boxes_is_left_out():
    wrong = [9, 9, 9, 1, 1, 1]
    assert ap([BOX[0], wrong], [(.5, 0), (.5, 0)], BOX[:1], [0])[0.25][0][0] == 1
    assert ap([wrong, BOX[0]], [(.5, 0), (.5, 0)], BOX[:1], [0])[0.25][0][0] == .5
    result = ap([BOX[0]], [(.5, .5)], BOX[:1], [0])
    assert np.isnan(result[0.25][0][1]) and det.mean_ap(result) == {0.25: .5, 0.5: .5}
    scenes = [Scene("s", torch.zeros(1, 3), torch.from_numpy(BOX[:1]), torch.tensor([0]))]
    mean, occurring = det.table(result, ("bed", "lamp"), scenes)[-2:]
    assert mean.split() == ["mean", "1", *["50.0"] * 4]         # as 3DETR: a lamp counts 0
    assert occurring.split() == ["of", "1", "that", "occur", *["100.0"] * 4]


def test_detections_drop_empty_boxes_doubles_and_unlikely_ones():
    points = torch.rand(400, 3)
    center = torch.tensor([[.5, .5, .5], [.52, .5, .5], [.5, .5, .5], [9, 9, 9], [.2, .2, .2]])
    size = torch.tensor([[1., 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 1], [.4, .4, .4]])
    probability = torch.tensor([[.8, .1], [.7, .1], [.1, .7], [.9, .05], [.02, .01]])
    objectness = probability.sum(1)
    found = det.detections_of(center, size, probability, objectness, points)
    # 1 repeats 0; 2 is of the other class; 3 is empty; 4 is below 0.05
    np.testing.assert_allclose(found.boxes[:, :3], center[[0, 2]].numpy())
    np.testing.assert_allclose(found.scores, (probability * objectness[:, None])[[0, 2]].numpy())
    alone = det.detections_of(center[3:4], size[3:4], probability[3:4], objectness[3:4], points)
    assert len(alone.boxes) == 1                # the likeliest stays if all are empty


def test_an_exported_scene_shows_points_and_boxes_and_its_detections_can_be_read_back(
        tmp_path, rooms):
    trimesh = pytest.importorskip("trimesh")
    scene, classes = scene_of(rooms[0]), synthetic_rooms.FURNITURE
    scores = np.eye(8)[scene.label.numpy()] * .9
    scores[0] *= .1                                         # not sure enough to be shown
    found = [Detections(scene.boxes.numpy(), scores),
             Detections(np.zeros((0, 6)), np.zeros((0, 8)))]
    det.export(tmp_path, [scene, EMPTY], found, classes)
    mesh = trimesh.load(tmp_path / "room.ply", process=False)
    k = len(scene.boxes)
    assert len(mesh.faces) == 144 * (2 * k - 1)
    assert len(mesh.vertices) == len(scene.xyz) + 96 * (2 * k - 1)
    first = mesh.vertices[len(scene.xyz):len(scene.xyz) + 96]       # beams of the first true box
    b = scene.boxes[0].numpy()
    np.testing.assert_allclose(first.min(0), b[:3] - b[3:] / 2 - .0075, atol=1e-4)
    np.testing.assert_allclose(first.max(0), b[:3] + b[3:] / 2 + .0075, atol=1e-4)
    np.save(tmp_path / "room.npy", scene.xyz.numpy())
    again, names = det.read_scene(tmp_path / "room.npy", {}, True, [])
    assert names == [classes[n] for n in scene.label[1:]]
    assert torch.allclose(again.boxes, scene.boxes[1:], atol=1e-5)
    assert json.loads((tmp_path / "empty.json").read_text()) == []


def test_the_picture_shows_true_boxes_green_and_sure_detections_red(rooms, monkeypatch):
    drawn = []
    monkeypatch.setattr(render, "sheet", lambda cells, **_: drawn.append(cells))
    scene = scene_of(rooms[0])
    k = len(scene.boxes)
    scores = np.full((k, 8), .1)
    scores[0, 3] = det.LEAST_SCORE                          # the only one to be shown
    sure = Detections(scene.boxes.numpy() + np.float32([0, 0, 0, .3, .3, .3]), scores)
    none = Detections(np.zeros((0, 6)), np.zeros((0, 8)))
    det.picture([scene, scene, scene], [sure, none, none])
    (one, other), = drawn                                   # two at most
    assert one.caption == (f"room: {k} true boxes in green, in red 1 detected\n"
                           "with a score of at least 0.3")
    det.picture([EMPTY], [none])
    assert drawn[1][0].caption.startswith("empty: in red 0 detected\n")
    for cell, red in ((one, True), (other, False)):
        rgb = cell.picture.astype(int)
        assert ((rgb - det.RED).__abs__().sum(2) < 60).any() == red
        assert ((rgb - det.GREEN).__abs__().sum(2) < 60).sum() > 200
    shown, camera = render.into_room(scene.xyz, torch.cat([scene.boxes,
                                                           torch.from_numpy(sure.boxes[:1])]))
    bare = render.draw_points(scene.xyz[shown], camera, 420, 420)
    same = (one.picture == bare).all(2)
    corner = render.project(torch.from_numpy(sure.boxes[:1, :3] + sure.boxes[:1, 3:] / 2), camera,
                            420, 420)[0]
    column, row, _ = corner.long().tolist()
    assert .5 < same.mean() < 1 and not same[row, column]


# --- model ----------------------------------------------------------------------------------------

SMALL = det.RECIPES["synthetic"]._replace(
    points=512, tokens=64, fine=64, radius=.8, neighbours=16, queries=64, layers=2,
    epochs=2, batch_size=2, every=1)


def settings_of(recipe, **more):
    return {"recipe": recipe._asdict(), **{k: False for k in ABLATIONS}, **more}


def test_the_reference_configuration_trains_8_858_971_weights():
    clip = pretrained.load_clip("random")
    model = det.Detector(clip, 18, settings_of(det.RECIPES["scannet"]))
    parts = {model.tokenizer: 108_608, model.encoder.position: 99_584,
             model.encoder.task: 1_195_776}
    for part, count in parts.items():
        assert sum(p.numel() for p in part.parameters()) == count
    assert common.sizes(model)[0] == 8_858_971
    assert "fourier" in model.state_dict()
    assert not any("clip" in name for name in model.state_dict())


def test_initial_weights_are_those_of_3detr():
    """Standard deviations: its tokenizer is kaiming_normal, sqrt(2 / inputs); Xavier-uniform,
    sqrt(2 / (inputs + outputs)), in the decoder alone; torch's default, sqrt(1 / (3 inputs)).
    """
    torch.manual_seed(0)
    clip = pretrained.load_clip("timm:test_vit=random")
    model = det.Detector(clip, 18, settings_of(det.RECIPES["scannet"]))
    layer = model.decoder[3]
    expected = {model.tokenizer.mlp[0]: (2 / 3) ** 0.5, model.tokenizer.mlp[3]: (2 / 64) ** 0.5,
                model.tokenizer.mlp[6]: (2 / 128) ** 0.5, layer.ffn[0]: (2 / 512) ** 0.5,
                layer.own.out_proj: (2 / 512) ** 0.5, layer.cross.out_proj: (2 / 512) ** 0.5,
                model.query_mlp[0]: (1 / 768) ** 0.5, model.query_mlp[2]: (1 / 768) ** 0.5,
                model.project[3]: (1 / (3 * clip.width)) ** 0.5}
    for head in model.heads.values():
        expected |= {head[i]: (1 / 768) ** 0.5 for i in (0, 4, 8)}      # 0.036 in the last layer
    for part, std in expected.items():
        assert part.weight.std().item() == pytest.approx(std, rel=0.15), part
    for attention in (layer.own, layer.cross):              # q, k and v in one matrix
        assert attention.in_proj_weight.std().item() == pytest.approx((2 / 1024) ** 0.5, rel=0.02)
    rows = torch.randn(500, 256)
    model.heads["center"].train()[7].p = model.heads["center"][3].p = 0.    # no dropout
    with torch.no_grad():
        logits = model.heads["center"](rows)
    assert logits.std(0).mean().item() == pytest.approx(0.35, abs=0.04)     # 0.85 with Xavier


@pytest.fixture
def model(tiny_clip):
    torch.manual_seed(0)
    return det.Detector(pretrained.load_clip(tiny_clip), 8, settings_of(SMALL))


def test_every_token_of_a_scene_reaches_every_query_of_it_and_none_of_another(model, rooms):
    model.eval()
    batch = det.make_batch([scene_of(r) for r in rooms[:2]], 512, CPU)
    tokens, centers = model.tokenizer(batch.xyz)
    moved = tokens.clone()
    moved[0, 5] += 1
    before, after = model.encoder(tokens, centers), model.encoder(moved, centers)
    for rows, others in ((before.patches, after.patches), (before.tasks, after.tasks)):
        change = (rows - others).abs().amax(2)
        assert (change[0] > 0).all() and (change[1] == 0).all()
    assert before.cls is None and before.tasks.shape[1] == 9


def test_positions_are_never_in_bf16(model):
    xyz, low, high = torch.rand(1, 9, 3) * 5, torch.zeros(1, 3), torch.ones(1, 3) * 5
    exact = model.fourier_features(xyz, low, high)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.fourier_features(xyz, low, high), exact)


def test_task_tokens_learn_and_the_transformer_does_not(model, rooms):
    batch = det.make_batch([scene_of(r) for r in rooms[:2]], 512, CPU)
    sum(det.losses(model.train()(batch.xyz, batch.low, batch.high), batch).values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.encoder.task.embedding.weight.grad.abs().sum() > 0
    assert list(model.encoder.clip.parameters()) == []


def by_hand(tokenizer, xyz, centers, values=None):
    """The tokens of one cloud, patch by patch, from the first K points within the radius."""
    tokens = []
    for center in centers:
        near = ((xyz - center) ** 2).sum(1) < tokenizer.radius ** 2
        idx = near.nonzero()[:tokenizer.neighbours, 0]
        x = (xyz[idx] - center) / tokenizer.radius          # repeated points change no maximum
        x = x if values is None else torch.cat([x, values[idx]], 1)
        tokens.append(tokenizer.mlp(x).amax(0))
    return torch.stack(tokens)


def test_patches_are_the_first_points_within_the_radius():
    tokenizer = det.SetAbstraction(20, .5, 16, (3, 8, 32)).eval()
    points = torch.rand(2, 900, 3) * 3
    points[1, 700] = 50                                     # has no neighbours
    with torch.no_grad():
        tokens, centers = tokenizer(points)
        for b in range(2):
            expected = by_hand(tokenizer, points[b], centers[b])
            assert torch.allclose(tokens[b], expected, atol=1e-6)
        lonely = (centers[1] > 40).all(1).nonzero()[0, 0]
        assert torch.allclose(tokens[1, lonely], tokenizer.mlp(torch.zeros(1, 3))[0], atol=1e-6)


def test_fewer_tokens_are_a_second_level_as_in_lamm():
    tokenizer = det.tokenizer_of(det.RECIPES["scannet"]._replace(tokens=256), 1024)
    fine = tokenizer.before
    assert (fine.tokens, fine.radius, fine.neighbours) == (2048, .2, 64)
    assert (tokenizer.tokens, tokenizer.radius, tokenizer.neighbours) == (256, 1.6, 512)
    assert [m.weight.shape for m in (*fine.mlp[::3], *tokenizer.mlp[::3])] == [
        (64, 3), (256, 64), (512, 259), (1024, 512)]
    recipe = det.RECIPES["scannet"]._replace(fine=60, tokens=15, radius=.5, neighbours=8)
    tokenizer = det.tokenizer_of(recipe, 32).eval()
    points = torch.rand(1, 900, 3) * 3
    with torch.no_grad():
        values, centers = tokenizer.before(points)
        tokens, chosen = tokenizer(points)
        assert torch.equal(chosen[0], centers[0, :15])      # farthest points of farthest points
        expected = by_hand(tokenizer, centers[0], chosen[0], values[0])
    assert torch.allclose(tokens[0], expected, atol=1e-6)


# --- the run --------------------------------------------------------------------------------------

@pytest.fixture
def small(monkeypatch, tmp_path, tiny_clip):
    monkeypatch.setattr(det, "SYNTHETIC", (4, 2))
    monkeypatch.setitem(det.RECIPES, "synthetic", SMALL)
    monkeypatch.chdir(tmp_path)
    return ["--clip", tiny_clip]


def test_a_run_evaluates_resumes_and_repeats(small, monkeypatch, capsys):
    det.main(small)
    first = json.loads(Path("runs/det-synthetic-1/results.json").read_text())
    assert first["task"] == "det" and 0 <= first["metrics"]["map25"] <= 1
    printed = capsys.readouterr().out
    assert "result   mAP@0.25" in printed and "AR@0.50" in printed
    taken, make = [], det.make_batch
    with monkeypatch.context() as patch:                            # for less memory
        patch.setattr(det, "make_batch", lambda s, *a: taken.append(len(s)) or make(s, *a))
        det.main(["--eval", "runs/det-synthetic-1", "--batch-size", "1"])
    assert set(taken) == {1}
    capsys.readouterr()
    det.main(["--eval", "runs/det-synthetic-1", "--export", "look"])
    assert sorted(p.name for p in Path("look").iterdir()) == [
        "look.png", "room000.json", "room000.ply", "room001.json", "room001.ply"]
    looks = [Image.open(Path(folder, "look.png")) for folder in ("look", "runs/det-synthetic-1")]
    assert looks[0].tobytes() == looks[1].tobytes() and looks[0].width == 2 * (420 + 12)

    def last_lines(text):
        return [line for line in text.splitlines() if line.startswith(("result", "mean"))]
    assert last_lines(capsys.readouterr().out) == last_lines(printed)
    count, now = iter(range(99)), run.Stopper.now
    monkeypatch.setattr(run.Stopper, "now", lambda self, step: next(count) == 2)   # in epoch 2
    with pytest.raises(SystemExit) as left:
        det.main([*small, "--out", "parts"])
    assert left.value.code == 130
    monkeypatch.setattr(run.Stopper, "now", now)
    det.main(["--resume", "parts"])
    a, b = (torch.load(f"{folder}/last.pt", weights_only=True)["model"]
            for folder in ("runs/det-synthetic-1", "parts"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_with_the_patches_of_an_earlier_version_is_one_line(small):
    det.main([*small, "--epochs", "1"])
    path = Path("runs/det-synthetic-1/last.pt")
    saved = torch.load(path, weights_only=True)
    del saved["config"]["recipe"]["fine"]
    torch.save(saved, path)
    with pytest.raises(InputError, match="config.recipe.fine is not as .* commit that its config"):
        det.main(["--eval", "runs/det-synthetic-1"])


def test_a_saved_run_is_evaluated_on_other_data(small, own, capsys, tmp_path):
    """By the names of its classes, whatever the other data would have made of them."""
    det.main([*small, "--data", "folder", "--root", str(own), "--like", "synthetic"])
    classes = checkpoint.load_checkpoint("runs/det-folder-1", "det")["config"]["classes"]
    assert 1 < len(classes) < len(synthetic_rooms.FURNITURE)
    printed = capsys.readouterr().out.splitlines()
    other = tmp_path / "other"
    for part in ("train", "val"):                           # other scenes to train, one class
        (other / part).mkdir(parents=True)
        for path in (own / "val").iterdir():
            (other / part / path.name).write_bytes(path.read_bytes())
    boxes = json.loads((other / "train/room0.json").read_text())
    mine = [box for box in boxes if box["class"] == boxes[-1]["class"]]
    (other / "train/room0.json").write_text(json.dumps(mine))
    det.main(["--eval", "runs/det-folder-1", "--root", str(other)])
    again = capsys.readouterr().out.splitlines()
    assert f"under {other}" in "".join(again)
    first = next(i for i, line in enumerate(printed) if line.startswith("class"))
    rows = printed[first:-2]                                # the same AP of the same test scenes
    assert len(rows) > 3 and again[-len(rows) - 1:-1] == rows
    alone = tmp_path / "alone"                              # test scenes alone will do
    shutil.copytree(other / "val", alone / "val")
    det.main(["--eval", "runs/det-folder-1", "--root", str(alone)])
    said = capsys.readouterr().out.splitlines()
    assert said[-len(rows) - 1:-1] == rows and "training scenes" not in said[-1]
    assert any(line.startswith("data     folder: 1 test scenes, ") for line in said)
    with pytest.raises(InputError, match="alone.train: no clouds; pass --root FOLDER"):
        det.main([*small, "--data", "folder", "--root", str(alone)])

    (other / "val/room0.json").write_text(json.dumps([*boxes, {**boxes[0], "class": "teapot"}]))
    with pytest.raises(InputError, match="room0.json: the class 'teapot' is none of those to learn"
                                         f" .{', '.join(classes)[:40]}"):
        det.main(["--eval", "runs/det-folder-1", "--root", str(other)])
    with pytest.raises(InputError, match="has other classes than the run: bed, "):
        det.main(["--eval", "runs/det-folder-1", "--data", "synthetic"])
    with pytest.raises(InputError, match="--root .*other: the run's data is built in.*add --data"):
        det.main(["--eval", "runs/det-folder-1", "--data", "synthetic", "--root", str(other)])
    with pytest.raises(InputError, match="was trained with data folder, not synthetic"):
        det.main(["--resume", "runs/det-folder-1", "--data", "synthetic"])


def test_a_run_on_built_in_rooms_is_evaluated_on_files(small, own, capsys):
    det.main(small)
    capsys.readouterr()
    det.main(["--eval", "runs/det-synthetic-1", "--data", "folder", "--root", str(own)])
    *_, mean, occur, result = capsys.readouterr().out.splitlines()
    assert result.endswith(" s") and "of a run on synthetic; folder" in result
    assert "best on test" not in result                     # that was another test set
    assert mean.startswith("mean") and occur.startswith("of ")      # not all eight are in the room


def test_boxes_for_scans_without_truth(small, monkeypatch, capsys, rooms):
    """In the frame that was read, the same boxes as --eval finds in the same points."""
    det.main(small)
    monkeypatch.setattr(det, "LEAST_SCORE", 0.)             # three epochs do not make it sure
    det.main(["--eval", "runs/det-synthetic-1", "--export", "look"])
    test = det.load_scenes({"data": "synthetic", "recipe": {"points": SMALL.points}})[1]
    far = np.array([4e5, 5e6, 0])                           # as in a national grid
    np.save("room000.npy", test[0].xyz.numpy())
    np.save("room001.npy", test[1].xyz.numpy() + far)
    capsys.readouterr()
    det.main(["--eval", "runs/det-synthetic-1", "--predict", "room000.npy", "room001.npy"])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3 and printed[2].startswith("look: ")
    assert printed[0].endswith("predicted/room000.ply, .json")
    folder = Path("runs/det-synthetic-1/predicted")
    assert Image.open(folder / "look.png").width == 2 * (420 + 12)
    seen, found = (json.loads(Path(p, "room000.json").read_text()) for p in ("look", folder))
    assert found and [box["class"] for box in seen] == [box["class"] for box in found]
    for key in "center", "size", "score":                       # other batches round otherwise
        np.testing.assert_allclose(*([box[key] for box in boxes] for boxes in (seen, found)),
                                   atol=1e-4)
    moved = json.loads((folder / "room001.json").read_text())   # patches are others by rounding
    assert moved and np.abs([box["center"] for box in moved] - far).max() < 15
    table, _ = read_ply((folder / "room001.ply").read_bytes())
    xyz = np.stack([table[axis] for axis in "xyz"], 1)[:len(test[1].xyz)]
    np.testing.assert_allclose(xyz, test[1].xyz.numpy() + far, atol=1e-5, rtol=0)
    for words, message in (
            (["room000.npy", "./room000.npy"], "several files are called room000"),
            (["room000.npy", "cut.ply"], "cut.ply: ")):
        with pytest.raises(InputError, match=message):
            det.main(["--eval", "runs/det-synthetic-1", "--predict", *words, "--export", "other"])
    assert not Path("other").exists()
    for folder in ".", "../" + Path.cwd().name:             # its own input is never written over
        with pytest.raises(InputError, match="room000.npy lies there and would be written over"):
            det.main(["--eval", "runs/det-synthetic-1", "--predict", "room000.npy", "--export",
                      folder])


def test_two_scenes_are_learned_by_heart(small, monkeypatch, rooms):
    """mAP@0.25 above 0.9 on what it was trained on: nothing between data and metric is broken."""
    scenes = [scene_of(r, f"room{i}") for i, r in enumerate(rooms[:2])]
    monkeypatch.setattr(det, "load_scenes",
                        lambda cfg, training: (scenes, scenes, synthetic_rooms.FURNITURE, "two"))
    make = det.make_batch                                   # without chance, 100 steps do
    monkeypatch.setattr(det, "make_batch",
                        lambda scenes, points, device, *augment: make(scenes, points, device))
    monkeypatch.setitem(det.RECIPES, "synthetic", SMALL._replace(
        epochs=100, every=100, dropout=0., lr=1e-3, clip_norm=10.))
    det.main(small)
    results = json.loads(Path("runs/det-synthetic-1/results.json").read_text())
    occurring = len(torch.cat([scene.label for scene in scenes]).unique())
    assert results["metrics"]["map25"] * len(synthetic_rooms.FURNITURE) / occurring > .9


@pytest.mark.parametrize("words, message", [
    (["--queries", "65"], "--queries 65 must be at most --tokens 64"),
    (["--tokens", "1024"], "at most --points 512"),
    (["--tokens", "32"], "may have 64 boxes"),
    (["--data", "scannet", "--tokens", "256", "--points", "1000"], "the 2048 patches at most"),
    (["--predict", "x.ply"], "--predict needs a run"),
    (["--data", "scannet", "--root", "nowhere"], "no such folder; ask for ScanNet"),
    (["--data", "scannet", "--root", "."], "found neither scans/ nor"),
    (["--data", "folder", "--root", "."], "no clouds; pass --root"),
])
def test_wrong_arguments_are_one_line(small, words, message):
    with pytest.raises(InputError, match=message) as error:
        det.main([*small, *words])
    assert "\n" not in str(error.value) and not Path("runs").exists()


def test_a_compiled_model_has_no_graph_break_and_learns_the_same(small, monkeypatch):
    compiler = torch.compile                    # without code generation: no C compiler needed
    monkeypatch.setattr(torch, "compile",
                        lambda m: compiler(m, backend="aot_eager", fullgraph=True))
    for folder, more in (("plain", []), ("compiled", ["--compile"])):
        det.main([*small, "--lr", "1e-5", "--epochs", "1", "--out", folder, *more])
    plain, ours = (json.loads(Path(folder, "metrics.jsonl").read_text())
                   for folder in ("plain", "compiled"))
    for key in plain:
        if key.startswith("loss"):
            assert ours[key] == pytest.approx(plain[key], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("more", [
    ["--accumulate", "2"], ["--unfreeze"], ["--deep-prompt"], ["--no-transformer"],
    ["--no-task-token", "--dropout", "0.3"]])
def test_accumulation_and_every_ablation_train(small, more):
    det.main([*small, "--epochs", "3", *more])
    lines = map(json.loads, open("runs/det-synthetic-1/metrics.jsonl"))
    losses = [sum(line[f"loss_{name}"] for name in det.WEIGHT) for line in lines]
    assert losses[-1] < losses[0]


def test_two_processes_follow_the_loss_curve_of_one(own, tiny_clip, tmp_path):
    """Batches of 3 scenes: the processes hold 1 and 2. No dropout, whose masks would differ."""
    recipe = SMALL._replace(batch_size=3, lr=1e-5, cuboid=True)
    (tmp_path / "small.py").write_text(
        f"import run, train_det as det; det.RECIPES['folder'] = det.Recipe(**{recipe._asdict()})\n"
        "run.main_guard(det.main)\n")
    room = own / "train/room1"
    for end in (".npy", ".json"):
        Path(f"{own}/train/room2{end}").write_bytes(Path(f"{room}{end}").read_bytes())
    env = {**{k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK")},
           "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(det.__file__).parent)}
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29519"]
    for folder, launcher in (("one", []), ("two", torchrun)):
        command = [sys.executable, *launcher, str(tmp_path / "small.py"), "--data", "folder",
                   "--root", str(own), "--clip", tiny_clip, "--device", "cpu",
                   "--out", str(tmp_path / folder)]
        done = subprocess.run(command, env=env, text=True, capture_output=True, timeout=600)
        assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stdout and done.stdout.count("result ") == 1
    one, two = ([json.loads(line) for line in open(tmp_path / folder / "metrics.jsonl")]
                for folder in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        for name in det.WEIGHT:
            assert a[f"loss_{name}"] == pytest.approx(b[f"loss_{name}"], rel=2e-4, abs=1e-6)
        assert a["map25"] == pytest.approx(b["map25"], abs=1e-3)


@pytest.mark.parametrize("part", ["", "train", "val", "test"])
def test_an_export_over_the_data_is_refused_before_anything_is_read(tmp_path, part):
    with pytest.raises(InputError, match="the run's data lies there and would be written over"):
        det.main(["--data", "folder", "--root", str(tmp_path), "--clip", "random",
                  "--export", str(tmp_path / part)])
