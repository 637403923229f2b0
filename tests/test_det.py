"""train_det.py: ScanNet's formats, boxes, matching, average precision, the model, the loop."""
import itertools
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
import train_det as det
from common import InputError
from train_det import Detections, Scene

NYU40 = scenes.SCANNET_BOXES
TSV = "id\traw_category\tcategory\tcount\tnyu40id\n" + "".join(
    f"{i}\t{name}\t{name}\t1\t{nyu}\n" for i, (name, nyu) in enumerate([*NYU40.items(), ("wall", 1), ("office chair", 5)]))


# --- ScanNet, raw and prepared --------------------------------------------------------------------

def raw_scan(root, name, room, angle=0.3):
    """A room as ScanNet publishes one: mesh, segments, objects, alignment. -> aligned points."""
    folder = root / "scans" / name
    folder.mkdir(parents=True)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    turn[:3, 3] = 1, -2, .5
    xyz = (np.concatenate([room["xyz"], np.ones((len(room["xyz"]), 1))], 1) @ np.linalg.inv(turn).T)[:, :3]
    (folder / f"{name}.txt").write_text(
        "numDepthFrames = 5\naxisAlignment = " + " ".join(repr(float(x)) for x in turn.ravel()) + "\nsceneType = Office\n")
    row = np.zeros(len(xyz), [("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("rgba", "u1", 4)])
    row["x"], row["y"], row["z"] = xyz.T
    row["rgba"][:, :3] = room["rgb"]
    head = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(xyz)}\n" + "".join(
        f"property float {a}\n" for a in "xyz") + "".join(
        f"property uchar {c}\n" for c in ("red", "green", "blue", "alpha")
    ) + "element face 1\nproperty list uchar int vertex_indices\nend_header\n"
    (folder / f"{name}_vh_clean_2.ply").write_bytes(head.encode() + row.tobytes() + b"\3" + bytes(12))
    # two segments for each object, odd and even points; -1 (walls) becomes segments 0 and 1
    segment = 2 * (room["instance"] + 1) + np.arange(len(xyz)) % 2
    (folder / f"{name}_vh_clean_2.0.010000.segs.json").write_text(json.dumps({"segIndices": segment.tolist()}))
    groups = [{"objectId": i, "label": "office chair" if synthetic.FURNITURE[k] == "chair" else synthetic.FURNITURE[k],
               "segments": [2 * i + 2, 2 * i + 3]} for i, k in enumerate(room["label"])]
    groups.append({"objectId": len(groups), "label": "wall", "segments": [0, 1]})
    (folder / f"{name}.aggregation.json").write_text(json.dumps({"segGroups": groups}))
    return folder


@pytest.fixture(scope="module")
def rooms():
    return synthetic.room_scenes(3, 3000, 9)


@pytest.fixture
def raw(tmp_path, rooms):
    (tmp_path / "scannetv2-labels.combined.tsv").write_text(TSV)
    for name, room in zip(("scene0191_00", "scene0191_01", "scene0568_00"), rooms):
        raw_scan(tmp_path, name, room)
    return tmp_path


def config(root, data="scannet", **more):
    return {"data": data, "root": str(root), "workers": 1, "skip_broken": False, "recipe": {"points": 512}, **more}


def test_the_shipped_split_is_the_official_one():
    train, val = ((Path(det.__file__).parent / f"splits/scannetv2_{p}.txt").read_text().split() for p in ("train", "val"))
    assert (len(train), len(val)) == (1201, 312) and not set(train) & set(val)


def test_a_raw_scan_gives_the_boxes_of_its_instances_after_alignment(raw, rooms):
    train, val, classes, form = det.load_scenes(config(raw))
    assert [s.name for s in train] == ["scene0191_00", "scene0191_01"] and [s.name for s in val] == ["scene0568_00"]
    assert classes == tuple(NYU40) and "2 of 1,201 train and 1 of 312 val" in form
    for scene, room in zip(train + val, rooms):
        assert [classes[k] for k in scene.label] == [synthetic.FURNITURE[k] for k in room["label"]]
        np.testing.assert_allclose(scene.boxes[:, :3], room["center"], atol=1e-4)
        np.testing.assert_allclose(scene.boxes[:, 3:], room["size"], atol=1e-4)
        assert len(scene.xyz) == 3000
        np.testing.assert_allclose(np.sort(scene.xyz[:, 0]), np.sort(room["xyz"][:, 0]), atol=1e-4)


def test_the_prepared_form_gives_the_same_scenes(raw):
    first = det.load_scenes(config(raw))
    again = det.load_scenes(config(raw / ".nanoepcl-votenet"))          # VoteNet's four files
    for a, b in zip(first[0] + first[1], again[0] + again[1]):
        assert a.name == b.name and all(torch.equal(x, y) for x, y in zip(a[1:], b[1:]))


def test_points_are_thinned_but_boxes_come_from_all_of_them(raw, rooms):
    content = scenes.read_raw(raw / "scans/scene0191_00", {**NYU40, "wall": 1, "office chair": 5}, most=500)
    assert len(content["vert"]) == len(content["ins_label"]) == len(content["sem_label"]) == 500
    np.testing.assert_allclose(content["bbox"][:, 3:6], rooms[0]["size"], atol=1e-4)
    for i, row in enumerate(content["bbox"]):
        assert set(content["sem_label"][content["ins_label"] == i + 1]) <= {int(row[6])}


def test_preparing_goes_on_where_it_stopped(raw, monkeypatch):
    det.load_scenes(config(raw))
    kept = raw / ".nanoepcl-votenet/scene0191_00_vert.npy"
    stamp = kept.stat().st_mtime_ns
    (raw / ".nanoepcl-votenet/scene0191_01_vert.npy").unlink()
    det.load_scenes(config(raw))
    assert kept.stat().st_mtime_ns == stamp and (raw / ".nanoepcl-votenet/scene0191_01_vert.npy").exists()


def test_without_val_scenes_some_rooms_are_set_aside_whole_and_it_says_so(raw):
    det.load_scenes(config(raw))
    prepared = raw / ".nanoepcl-votenet"
    for path in prepared.glob("scene0568*"):
        path.rename(prepared / path.name.replace("scene0568", "scene0000"))
    train, test, _, form = det.load_scenes(config(prepared))
    assert [s.name for s in train] == ["scene0191_00", "scene0191_01"] and [s.name for s in test] == ["scene0000_00"]
    assert "NOT the official split" in form


def test_scans_are_prepared_in_parallel(raw):
    one, two = (det.load_scenes(config(raw, workers=2)) for _ in range(2))
    assert len(one[0]) == 2 and all(torch.equal(x, y) for a, b in zip(one[0], two[0]) for x, y in zip(a[1:], b[1:]))
    assert not list((raw / ".nanoepcl-votenet").glob("*.tmp"))


@pytest.mark.parametrize("file, change, words", [
    ("_vh_clean_2.ply", lambda b: b[:2000], "cut short"),
    ("_vh_clean_2.ply", lambda b: b.replace(b"binary_little_endian", b"ascii"), "ascii PLY"),
    ("_vh_clean_2.0.010000.segs.json", lambda b: b[:100], "segs.json"),
    ("_vh_clean_2.0.010000.segs.json", lambda b: b'{"segIndices": [1, 2]}', "2 segment ids for 3000 vertices"),
    (".aggregation.json", lambda b: b.replace(b'"label": "', b'"label": "teapot '), "its label 'teapot"),
    (".aggregation.json", None, "No such file"),
    (".txt", lambda b: b.replace(b"axisAlignment", b"nothing"), "axisAlignment"),
])
def test_a_broken_scan_is_named_or_left_out_if_asked(raw, file, change, words):
    path = raw / f"scans/scene0191_01/scene0191_01{file}"
    blob = path.read_bytes()
    path.unlink()
    if change:
        path.write_bytes(change(blob))
    with pytest.raises(InputError, match=words) as error:
        det.load_scenes(config(raw))
    assert "scene0191_01" in str(error.value) and "\n" not in str(error.value)
    train, _, _, _ = det.load_scenes(config(raw, skip_broken=True))
    assert [s.name for s in train] == ["scene0191_00"]


# --- anybody's own scenes -------------------------------------------------------------------------

@pytest.fixture
def own(tmp_path, rooms):
    for part, i in (("train", 0), ("train", 1), ("val", 0)):
        folder = tmp_path / part
        folder.mkdir(exist_ok=True)
        room = rooms[i]
        if i:
            np.save(folder / f"room{i}.npy", room["xyz"])
        else:
            synthetic.write_ply(folder / f"room{i}.ply", room["xyz"], room["rgb"])
        (folder / f"room{i}.json").write_text(json.dumps([
            {"class": synthetic.FURNITURE[k], "center": c.tolist(), "size": s.tolist()}
            for k, c, s in zip(room["label"], room["center"], room["size"])]))
    return tmp_path


def test_own_scenes_are_read(own, rooms):
    train, val, classes, _ = det.load_scenes(config(own, "folder"))
    assert len(train) == 2 and len(val) == 1
    assert [classes[k] for k in train[1].label] == [synthetic.FURNITURE[k] for k in rooms[1]["label"]]
    np.testing.assert_allclose(val[0].xyz, rooms[0]["xyz"])


@pytest.mark.parametrize("boxes, words", [
    ('[{"class": "bed", "center": [0, 0, 0], "size": [1, 0, 1]}]', "box 0 has a size of zero or less"),
    ('[{"class": "bed", "center": [0, 0, 0], "size": [1, -2, 1]}]', "box 0 has a size of zero or less"),
    ('[{"class": "bed", "center": [0, NaN, 0], "size": [1, 1, 1]}]', "NaN"),
    ('[{"class": "bed", "center": [0, 0, 0]}]', "size.*repair it"),
    ('[{"class": "bed", "center": [0, 0], "size": [1, 1, 1]}]', "repair it"),
    ("[", "repair it"),
    (json.dumps([{"class": "bed", "center": [0, 0, 0], "size": [1, 1, 1]}] * 65), "65 boxes, at most 64"),
    ('[{"class": "teapot", "center": [0, 0, 0], "size": [1, 1, 1]}]', "'teapot' does not occur"),
])
def test_bad_boxes_are_named(own, boxes, words):
    (own / "val/room0.json").write_text(boxes)
    with pytest.raises(InputError, match=words) as error:
        det.load_scenes(config(own, "folder"))
    assert "room0.json" in str(error.value)


# --- points of a step -----------------------------------------------------------------------------

def scene_of(room, name="room"):
    return Scene(name, torch.from_numpy(room["xyz"]),
                 torch.from_numpy(np.concatenate([room["center"], room["size"]], 1)), torch.from_numpy(room["label"]))


EMPTY = Scene("empty", torch.rand(300, 3), torch.zeros(0, 6), torch.zeros(0, dtype=torch.int64))


def test_a_batch_is_the_same_whatever_is_drawn_before_and_pads_boxes(rooms):
    scenes = [scene_of(rooms[0]), EMPTY]
    one = det.make_batch(scenes, 512, torch.device("cpu"), [3, 4])
    torch.rand(7)
    two = det.make_batch(scenes[::-1], 512, torch.device("cpu"), [4, 3])
    assert all(torch.equal(a, b.flip(0)) for a, b in zip(one, two))
    assert one.xyz.shape == (2, 512, 3) and one.real[1].sum() == 0
    assert torch.equal(one.low[0], one.xyz[0].amin(0))


def test_points_stay_in_their_boxes_when_a_scene_is_flipped_and_turned(rooms):
    room, scene = rooms[1], scene_of(rooms[1])
    for draw in ((.2, .7, .0), (.9, .1, .99), (.3, .3, .5)):
        xyz, boxes = det.turn(scene.xyz, scene.boxes, torch.tensor(draw))
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


@pytest.mark.parametrize("what", ["no box", "too few points"])
def test_where_no_cuboid_fits_the_whole_scene_is_taken(rooms, what):
    scene = scene_of(rooms[0])
    boxes = scene.boxes[:0] if what == "no box" else scene.boxes
    points = 1000 if what == "no box" else 10 * len(scene.xyz)
    inside, kept = det.random_cuboid(scene.xyz, boxes, points, torch.Generator().manual_seed(0))
    assert inside.all() and kept.all() and len(kept) == len(boxes)


def test_a_batch_of_cuboids_holds_points_and_boxes_of_its_scenes(rooms):
    scenes = [scene_of(room) for room in rooms[:2]] + [EMPTY]
    batch = det.make_batch(scenes, 700, torch.device("cpu"), [1, 2, 3], cuboid=True)
    assert batch.xyz.shape == (3, 700, 3) and batch.real[:2].any(1).all() and not batch.real[2].any()
    unit = torch.tensor([0., 0, 0, 1, 1, 1])
    assert (batch.boxes[~batch.real] == unit).all() and (batch.label[~batch.real] == 0).all()
    for i, scene in enumerate(scenes[:2]):
        kept = batch.real[i, :len(scene.boxes)]
        assert torch.equal(batch.label[i, :len(kept)][kept], scene.label[kept])
        turned = batch.boxes[i, :len(kept)][kept]                        # by up to 5 degrees: nearly the same height
        assert torch.allclose(turned[:, 5], scene.boxes[kept][:, 5], atol=1e-5)
        assert torch.allclose(turned[:, 2], scene.boxes[kept][:, 2], atol=1e-5)
        assert torch.equal(batch.low[i], batch.xyz[i].amin(0))


# --- boxes and matching ---------------------------------------------------------------------------

def test_iou_and_giou_against_counting_points():
    rng = np.random.default_rng(0)
    boxes = torch.from_numpy(np.concatenate([rng.uniform(0, 1, (8, 3)), rng.uniform(.3, 1.5, (8, 3))], 1))
    iou, giou = det.iou_terms(boxes[:, None], boxes[None])
    for a, b in itertools.combinations(range(8), 2):
        low = np.minimum(*(boxes[i, :3].numpy() - boxes[i, 3:].numpy() / 2 for i in (a, b)))
        high = np.maximum(*(boxes[i, :3].numpy() + boxes[i, 3:].numpy() / 2 for i in (a, b)))
        x = rng.uniform(low, high, (100_000, 3))                         # the hull, filled
        ins = [(abs(x - boxes[i, :3].numpy()) <= boxes[i, 3:].numpy() / 2).all(1) for i in (a, b)]
        both, either = (ins[0] & ins[1]).mean(), (ins[0] | ins[1]).mean()
        assert iou[a, b] == pytest.approx(both / either, abs=.01)
        assert giou[a, b] == pytest.approx(both / either - (1 - either), abs=.01)
    assert torch.allclose(iou.diag(), torch.ones(8, dtype=iou.dtype)) and torch.allclose(giou, giou.T)


def output(center, size, logits, low, high):
    """An Output of one layer from (B, Q, ...) tensors."""
    extent = (high - low)[:, None]
    zero = torch.zeros(*logits.shape[:2], 1)
    return det.Output(*(x[None] for x in (logits, center, size, (center - low[:, None]) / extent, size / extent, zero, zero)))


def test_the_matching_is_the_best_of_all_matchings(rooms):
    torch.manual_seed(0)
    scene = scene_of(rooms[0])
    batch = det.make_batch([scene._replace(boxes=scene.boxes[:3], label=scene.label[:3]), EMPTY], 512, torch.device("cpu"))
    out = output(torch.rand(2, 5, 3) * 4, torch.rand(2, 5, 3) + .3, torch.randn(2, 5, 9), batch.low, batch.high)
    chosen = det.match(out, batch)[0, 0, :3]
    _, giou = det.iou_terms(torch.cat([out.center, out.size], -1)[0, 0][:, None], batch.boxes[0, None, :3])
    cost = -out.logits[0, 0].softmax(-1)[:, batch.label[0, :3]] - 2 * giou              # (Q, 3)
    every = {p: sum(cost[q, k].item() for k, q in enumerate(p)) for p in itertools.permutations(range(5), 3)}
    assert tuple(chosen.tolist()) == min(every, key=every.get)


def test_the_matching_passes_over_boxes_that_are_not_there_and_over_nan(rooms):
    torch.manual_seed(0)
    scene = scene_of(rooms[0])
    batch = det.make_batch([scene, scene], 512, torch.device("cpu"))
    n = len(scene.boxes)
    out = output(torch.rand(2, n + 3, 3) * 4, torch.rand(2, n + 3, 3) + .3, torch.randn(2, n + 3, 9), batch.low, batch.high)
    holes = batch._replace(real=batch.real.clone())
    holes.real[:, 1] = False
    short = batch._replace(boxes=batch.boxes[:, [0, *range(2, n), 1]], label=batch.label[:, [0, *range(2, n), 1]],
                           real=batch.real[:, 1:n + 1])
    chosen = det.match(out, holes)[0, 0, :n]
    assert torch.equal(chosen[[0, *range(2, n)]], det.match(out, short)[0, 0, :n - 1]) and chosen[1] == 0
    out.logits[:, 1] = float("nan")
    assert not torch.isfinite(sum(det.losses(out, batch).values()))      # and no traceback


def test_losses_vanish_for_perfect_boxes_and_know_the_no_object_weight(rooms):
    scene = scene_of(rooms[0])
    batch = det.make_batch([scene], 2048, torch.device("cpu"))
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
    wrong[0, n, 0] = 3.                                                  # one query says "bed" where there is nothing
    ce = torch.nn.functional.cross_entropy(wrong[0, n:n + 1], torch.tensor([8])).item()
    terms = det.losses(out._replace(logits=wrong[None]), batch)
    assert terms["class"].item() == pytest.approx(.25 * ce / (n + .25 * 2), rel=1e-3)


def test_a_batch_without_objects_has_a_finite_loss_and_a_gradient():
    batch = det.make_batch([EMPTY], 256, torch.device("cpu"))
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
    assert result[0.25][0].tolist() == result[0.5][0].tolist() == [1, 1] and result[0.5][1].tolist() == [1, 1]
    result = ap(np.zeros((0, 6)), np.zeros((0, 2)))
    assert result[0.25][0].tolist() == [0, 0] and result[0.25][1].tolist() == [0, 0]


def test_ap_by_hand():
    # class 0, by score: right, double of the same box, wrong place, right: precision 1, 1/2, 1/3, 2/4
    boxes = [BOX[0], BOX[0] + [.05, 0, 0, 0, 0, 0], [9, 9, 9, 1, 1, 1], BOX[1]]
    result = ap(boxes, [(.9, 0), (.8, 0), (.7, 0), (.6, 0)])
    assert result[0.25][0][0] == pytest.approx(.5 * 1 + .5 * .5)         # envelope: 1 up to recall 1/2, then 1/2
    assert result[0.25][1][0] == 1 and result[0.25][0][1] == 0
    # a shift of 0.4 leaves IoU 0.6 / 1.4 = 0.43: right at 0.25, wrong at 0.50
    result = ap([BOX[0] + [.4, 0, 0, 0, 0, 0]], [(1, 0)], BOX[:1], [0])
    assert result[0.25][0][0] == 1 and result[0.5][0][0] == 0


def test_iou_must_exceed_the_threshold_and_a_taken_box_is_not_replaced_by_the_second_best():
    half = ap([BOX[0] + [1 / 3, 0, 0, 0, 0, 0]], [(1, 0)], BOX[:1], [0])       # IoU exactly 1/2, up to rounding
    assert half[0.25][0][0] == 1
    truth = [[0, 0, 0, 1, 1, 1], [.3, 0, 0, 1, 1, 1]]
    result = ap([truth[0], [.1, 0, 0, 1, 1, 1]], [(.9, 0), (.8, 0)], truth, [0, 0])
    assert result[0.25][1][0] == .5                                      # both overlap box 0 most


def test_ties_keep_their_order_and_a_class_without_boxes_is_left_out():
    wrong = [9, 9, 9, 1, 1, 1]
    assert ap([BOX[0], wrong], [(.5, 0), (.5, 0)], BOX[:1], [0])[0.25][0][0] == 1
    assert ap([wrong, BOX[0]], [(.5, 0), (.5, 0)], BOX[:1], [0])[0.25][0][0] == .5
    result = ap([BOX[0]], [(.5, .5)], BOX[:1], [0])
    assert np.isnan(result[0.25][0][1]) and det.mean_ap(result) == {0.25: 1.0, 0.5: 1.0}


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
    assert len(alone.boxes) == 1                                         # the likeliest stays if all are empty


def test_an_exported_scene_shows_points_and_boxes_and_its_detections_can_be_read_back(tmp_path, rooms):
    trimesh = pytest.importorskip("trimesh")
    scene, classes = scene_of(rooms[0]), synthetic.FURNITURE
    scores = np.eye(8)[scene.label.numpy()] * .9
    scores[0] *= .1                                                     # not sure enough to be shown
    det.export(tmp_path, [scene, EMPTY], [Detections(scene.boxes.numpy(), scores),
                                          Detections(np.zeros((0, 6)), np.zeros((0, 8)))], classes)
    mesh = trimesh.load(tmp_path / "room.ply", process=False)
    k = len(scene.boxes)
    assert len(mesh.faces) == 144 * (2 * k - 1) and len(mesh.vertices) == len(scene.xyz) + 96 * (2 * k - 1)
    first = mesh.vertices[len(scene.xyz):len(scene.xyz) + 96]           # beams of the first true box
    b = scene.boxes[0].numpy()
    np.testing.assert_allclose(first.min(0), b[:3] - b[3:] / 2 - .0075, atol=1e-4)
    np.testing.assert_allclose(first.max(0), b[:3] + b[3:] / 2 + .0075, atol=1e-4)
    np.save(tmp_path / "room.npy", scene.xyz.numpy())
    again, names = det.read_own(tmp_path / "room.npy")
    assert names == [classes[n] for n in scene.label[1:]] and torch.allclose(again.boxes, scene.boxes[1:], atol=1e-5)
    assert json.loads((tmp_path / "empty.json").read_text()) == []


# --- model ----------------------------------------------------------------------------------------

SMALL = det.RECIPES["synthetic"]._replace(points=512, tokens=64, radius=.8, neighbours=16, queries=64, layers=2, epochs=2,
                                          batch_size=2, every=1)


def settings_of(recipe, **more):
    return {"recipe": recipe._asdict(), **{k: False for k in common.ABLATIONS}, **more}


def test_the_reference_configuration_trains_8_858_971_weights():
    clip = common.load_clip("random")
    model = det.Detector(clip, 18, settings_of(det.RECIPES["scannet"]))
    parts = {"tokenizer": 108_608, "position": 99_584, "task": 1_195_776}
    count = {name: sum(p.numel() for p in getattr(model.encoder, name).parameters()) for name in parts}
    assert count == parts and common.sizes(model)[0] == 8_858_971
    assert "fourier" in model.state_dict() and not any("clip" in name for name in model.state_dict())


@pytest.fixture
def model(tiny_clip):
    torch.manual_seed(0)
    return det.Detector(common.load_clip(tiny_clip), 8, settings_of(SMALL))


def test_every_token_of_a_scene_reaches_every_query_of_it_and_none_of_another(model, rooms):
    model.eval()
    batch = det.make_batch([scene_of(r) for r in rooms[:2]], 512, torch.device("cpu"))
    tokens, centers = model.encoder.tokenizer(batch.xyz)
    moved = tokens.clone()
    moved[0, 5] += 1
    outs = []
    for t in (tokens, moved):
        model.encoder.tokenizer.forward = lambda points, t=t: (t, centers)
        outs.append(model.encoder(batch.xyz)[0])
    change = (outs[0] - outs[1]).abs().amax(2)
    assert (change[0] > 0).all() and (change[1] == 0).all()


def test_task_tokens_learn_and_the_transformer_does_not(model, rooms):
    batch = det.make_batch([scene_of(r) for r in rooms[:2]], 512, torch.device("cpu"))
    sum(det.losses(model.train()(batch.xyz, batch.low, batch.high), batch).values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.encoder.task.embedding.weight.grad.abs().sum() > 0
    assert list(model.encoder.clip.parameters()) == []


def test_fewer_tokens_take_their_patches_from_fewer_points_and_bad_neighbours_are_replaced():
    tokenizer = det.SetAbstraction(64, .25, 16, 32).eval()               # of 312 of the points
    points = torch.rand(2, 4096, 3) * 4
    tokens, centers = tokenizer(points)
    assert tokens.shape == (2, 64, 32) and centers.shape == (2, 64, 3)
    alone = torch.cat([points, torch.full((2, 1, 3), 50.)], 1)           # a point without neighbours
    tokens, centers = tokenizer(alone)
    lonely = (centers[0] > 40).all(1).nonzero()[0, 0]
    assert torch.allclose(tokens[0, lonely], tokenizer.mlp(torch.zeros(1, 3))[0], atol=1e-5)


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
    det.main(["--eval", "runs/det-synthetic-1", "--export", "look"])
    assert sorted(p.name for p in Path("look").iterdir()) == ["room000.json", "room000.ply", "room001.json", "room001.ply"]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("result", "mean"))]
    assert lines == [line for line in printed.splitlines() if line.startswith(("result", "mean"))]
    count, now = iter(range(99)), common.Stopper.now
    monkeypatch.setattr(common.Stopper, "now", lambda self, step: next(count) == 2)      # in the second epoch
    with pytest.raises(SystemExit) as left:
        det.main([*small, "--out", "parts"])
    assert left.value.code == 130
    monkeypatch.setattr(common.Stopper, "now", now)
    det.main(["--resume", "parts"])
    a, b = (torch.load(f"{run}/last.pt", weights_only=True)["model"] for run in ("runs/det-synthetic-1", "parts"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_two_scenes_are_learned_by_heart(small, monkeypatch, rooms):
    """mAP@0.25 above 0.9 on the scenes it was trained on: nothing between data and metric is broken."""
    scenes = [scene_of(r, f"room{i}") for i, r in enumerate(rooms[:2])]
    monkeypatch.setattr(det, "load_scenes", lambda cfg: (scenes, scenes, synthetic.FURNITURE, "two rooms"))
    make = det.make_batch                                               # without chance, 100 steps will do
    monkeypatch.setattr(det, "make_batch", lambda scenes, points, device, *augment: make(scenes, points, device))
    monkeypatch.setitem(det.RECIPES, "synthetic", SMALL._replace(epochs=100, every=100, dropout=0., lr=1e-3, clip_norm=10.))
    det.main(small)
    assert json.loads(Path("runs/det-synthetic-1/results.json").read_text())["metrics"]["map25"] > .9


@pytest.mark.parametrize("words, message", [
    (["--queries", "65"], "--queries 65 must be at most --tokens 64"),
    (["--tokens", "1024"], "at most --points 512"),
    (["--tokens", "32"], "may have 64 boxes"),
    (["--data", "scannet", "--root", "nowhere"], "no such folder; ask for ScanNet"),
    (["--data", "scannet", "--root", "."], "found neither scans/ nor"),
    (["--data", "folder", "--root", "."], "no scenes; pass --root"),
])
def test_wrong_arguments_are_one_line(small, words, message):
    with pytest.raises(InputError, match=message) as error:
        det.main([*small, *words])
    assert "\n" not in str(error.value) and not Path("runs").exists()


def test_a_compiled_model_has_no_graph_break_and_learns_the_same(small, monkeypatch):
    compiler = torch.compile                            # without code generation: no C compiler needed
    monkeypatch.setattr(torch, "compile", lambda m: compiler(m, backend="aot_eager", fullgraph=True))
    for run, more in (("plain", []), ("compiled", ["--compile"])):
        det.main([*small, "--lr", "1e-5", "--epochs", "1", "--out", run, *more])
    plain, ours = (json.loads(Path(run, "metrics.jsonl").read_text()) for run in ("plain", "compiled"))
    assert all(ours[key] == pytest.approx(plain[key], rel=1e-4, abs=1e-6) for key in plain if key.startswith("loss"))


@pytest.mark.parametrize("more", [
    ["--accumulate", "2"], ["--unfreeze"], ["--deep-prompt"], ["--no-transformer"], 
    ["--no-task-token", "--dropout", "0.3"]])
def test_accumulation_and_every_ablation_train(small, more):
    det.main([*small, "--epochs", "3", *more])
    losses = [sum(line[f"loss_{name}"] for name in det.WEIGHT) for line in map(json.loads, open("runs/det-synthetic-1/metrics.jsonl"))]
    assert losses[-1] < losses[0]


def test_two_processes_follow_the_loss_curve_of_one(own, tiny_clip, tmp_path):
    """Batches of 3 scenes, so that the processes hold 1 and 2; without dropout, whose masks differ."""
    recipe = SMALL._replace(batch_size=3, lr=1e-5, cuboid=True)
    code = (f"import common, train_det as det; det.RECIPES['folder'] = det.Recipe(**{recipe._asdict()})\n"
            "common.main_guard(det.main)\n")
    (tmp_path / "small.py").write_text(code)
    room = own / "train/room1"
    for end in (".npy", ".json"):
        Path(f"{own}/train/room2{end}").write_bytes(Path(f"{room}{end}").read_bytes())
    env = {**{k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK")},
           "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(det.__file__).parent)}
    for run, launch in (("one", []), ("two", ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29519"])):
        done = subprocess.run([sys.executable, *launch, str(tmp_path / "small.py"), "--data", "folder", "--root", str(own),
                               "--clip", tiny_clip, "--device", "cpu", "--out", str(tmp_path / run)],
                              env=env, text=True, capture_output=True, timeout=300)
        assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stdout and done.stdout.count("result ") == 1
    one, two = ([json.loads(line) for line in open(tmp_path / run / "metrics.jsonl")] for run in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        for name in det.WEIGHT:
            assert a[f"loss_{name}"] == pytest.approx(b[f"loss_{name}"], rel=2e-4, abs=1e-6)
        assert a["map25"] == pytest.approx(b["map25"], abs=1e-3)
