"""train_outdoor.py: mixed scans, voxels, the network, loss, metric, the loop, what it writes."""
import csv
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
import common
import pretrained
import run
import train_outdoor as outdoor
from data import kitti, synthetic_street
from data.files import BrokenFile
from data.kitti import IGNORE, Scan
from kernels.sparse_conv import SparseTensor
from run import ABLATIONS, InputError, Setup
from test_kitti import MAP, write_scan

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = outdoor.RECIPES["synthetic"]._replace(
    voxel=1.0, width=0.125, tokens=16, neighbours=4, epochs=2, batch_size=2, lr=0.05, every=1)


def scan_of(seed=0, points=400, name="scan", classes=12):
    """Points all around the sensor. Remission tells which is which."""
    rng = np.random.default_rng(seed)
    xyz = rng.uniform((-30, -30, -9), (30, 30, 2), (points, 3)).astype(np.float32)
    tag = ((seed + np.arange(points) / points) / 10).astype(np.float32)
    return Scan(name, xyz, tag, rng.integers(-1, classes, points))


def rows_in(mixed, scan):
    """Of every point of `mixed` the row of `scan` that it was, -1 if it is not from there."""
    row = {tag: i for i, tag in enumerate(scan.remission)}
    return np.array([row.get(tag, -1) for tag in mixed.remission])


# --- two scans -> one -----------------------------------------------------------------------------

def test_polar_mix_swaps_a_half_plane_and_pastes_things_three_times():
    one, other, things = scan_of(1), scan_of(2), [0, 3]
    thing = np.flatnonzero(np.isin(other.label, things))
    swapped = 0
    for seed in range(30):
        mixed = outdoor.polar_mix(one, other, things, np.random.default_rng(seed))
        mine, others = rows_in(mixed, one), rows_in(mixed, other)
        assert ((mine >= 0) != (others >= 0)).all()
        pasted = 3 * len(thing)
        body, tail = others[:-pasted], others[-pasted:]
        assert tail.tolist() == [*thing] * 3
        for i, part in enumerate(np.split(mixed.xyz[-pasted:], 3)):
            was = other.xyz[thing]
            turn = np.arctan2(*part[:, 1::-1].T) - np.arctan2(*was[:, 1::-1].T)
            assert np.ptp(np.cos(turn)) < 1e-4 and np.ptp(np.sin(turn)) < 1e-4
            low, high = [(0, 0), (0, 2 / 3), (2 / 3, 4 / 3)][i]
            assert low * np.pi - 1e-3 <= np.median(turn % (2 * np.pi)) <= high * np.pi + 1e-3 or (
                i == 0 and np.allclose(part, was))
            np.testing.assert_allclose(part[:, 2], was[:, 2])
            assert (mixed.label[-pasted:][i * len(thing):][:len(thing)] == other.label[thing]).all()
        kept = mine[:len(body)]
        if (body < 0).all():                                # no swap: all of its own
            assert kept.tolist() == list(range(len(one.xyz)))
            continue
        swapped += 1
        angle = [np.arctan2(s.xyz[rows, 1], s.xyz[rows, 0])
                 for s, rows in ((other, body[body >= 0]), (one, kept[kept >= 0]))]
        # on a circle the two halves do not overlap: between neighbours there are two changes
        order = np.argsort(np.concatenate(angle))
        source = np.repeat([0, 1], [len(a) for a in angle])[order]
        assert (source != np.roll(source, 1)).sum() == 2
        assert len(body) == pytest.approx(len(one.xyz), abs=80)
    assert 5 < swapped < 25


def test_laser_mix_takes_bands_of_inclination_in_turns():
    one, other = scan_of(1), scan_of(2)
    for bands, edges in ((3, (-20 / 3, -40 / 3)), (4, (-5, -10, -15)), (5, (-4, -8, -12, -16))):
        mixed = outdoor.laser_mix(one, other, bands)
        expected = []
        for which, scan in enumerate((one, other)):
            for x, y, z in scan.xyz:
                tilt = np.degrees(np.arctan2(z, np.hypot(x, y)))
                expected.append(sum(tilt < edge for edge in edges) % 2 == which)
        expected = np.split(np.array(expected), 2)
        for kept, scan in zip(expected, (one, other)):
            rows = rows_in(mixed, scan)
            assert rows[rows >= 0].tolist() == np.flatnonzero(kept).tolist()
            assert 0.2 < kept.mean() < 0.8                  # it does something
            assert (mixed.xyz[rows >= 0] == scan.xyz[kept]).all()
            assert (mixed.label[rows >= 0] == scan.label[kept]).all()
        assert len(mixed.xyz) == sum(kept.sum() for kept in expected)


def test_a_moved_scan_is_turned_scaled_and_mirrored_and_stays_upright():
    scan, mirrored, angles = scan_of(), set(), []
    for seed in range(40):
        moved = outdoor.moved(scan, np.random.default_rng(seed))
        assert moved.xyz.dtype == np.float32 and (moved.label == scan.label).all()
        a, b = scan.xyz - scan.xyz[0], moved.xyz - moved.xyz[0]
        scale = np.linalg.norm(b[1:], axis=1) / np.linalg.norm(a[1:], axis=1)
        assert 0.899 < scale.min() and scale.max() < 1.101 and np.ptp(scale) < 1e-3
        np.testing.assert_allclose(b[:, 2], a[:, 2] * scale[0], atol=1e-3)      # up stays up
        turn = np.linalg.lstsq(a[:, :2], b[:, :2], rcond=None)[0]
        mirrored.add(round(np.linalg.det(turn / scale[0])))
        angles.append(np.arctan2(turn[0, 1], turn[0, 0]))
        shift = moved.xyz[0] - scan.xyz[0] @ np.linalg.lstsq(a, b, rcond=None)[0]
        assert np.abs(shift).max() < 0.5
    assert mirrored == {-1, 1} and np.ptp(angles) > 5


def test_training_scans_are_mixed_with_another_and_follow_from_their_seed():
    data = outdoor.Data([scan_of(k, name=str(k)) for k in range(3)], [], (), lambda s: s, "")
    cfg = {"recipe": {"voxel": 0.01}, "as_released": False}
    work = partial(outdoor.training_voxels, data, 1, things=[0], cfg=cfg)
    again = [work(seed=5), work(seed=5), work(seed=6)]
    assert all((a == b).all() for a, b in zip(*again[:2]))
    assert again[0].coords.shape != again[2].coords.shape or (
        again[0].coords != again[2].coords).any()
    sources = [set(np.floor(work(seed=seed).feats[:, 3] * 10 + 1e-4)) for seed in range(20)]
    assert {0., 1.} in sources and {1., 2.} in sources      # either of the others, both ways to mix
    lone = data._replace(train=data.train[:1])              # with itself
    assert len(outdoor.training_voxels(lone, 0, 3, [0], cfg).coords) > 0


def test_as_released_laser_mix_changes_nothing(monkeypatch):
    data = outdoor.Data([scan_of(1), scan_of(2)], [], (), lambda s: s, "")
    calls = []
    monkeypatch.setattr(outdoor, "polar_mix", lambda one, *_: calls.append("polar") or one)
    for seed in range(12):
        calls.clear()
        both = [outdoor.training_voxels(data, 0, seed, [], {
            "recipe": {"voxel": 0.01}, "as_released": released}) for released in (True, False)]
        mine = [sorted(v.feats[:, 3]) == sorted(data.train[0].remission) for v in both]
        assert mine == ([True, True] if calls else [True, False])


# --- voxels ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("side, points", [(2.0, 900), (0.05, 300), (100., 50), (1., 1)])
def test_the_first_point_of_a_voxel_stands_for_it(side, points):
    scan = scan_of(3, points)
    voxels = outdoor.voxels_of(scan, side)
    cells = np.round(scan.xyz / np.float32(side)).astype(int)
    cells -= cells.min(0)
    first = {}
    for i, cell in enumerate(map(tuple, cells)):
        first.setdefault(cell, i)
    assert len(voxels.coords) == len(first) and voxels.coords.dtype == np.int32
    for i, cell in enumerate(map(tuple, cells)):
        v = voxels.inverse[i]
        assert tuple(voxels.coords[v]) == cell
        assert (voxels.feats[v, :3] == scan.xyz[first[cell]]).all()
        assert voxels.feats[v, 3] == scan.remission[first[cell]]
        assert voxels.label[v] == scan.label[first[cell]]


def test_a_scan_of_too_many_voxels_is_named(monkeypatch):
    with pytest.raises(BrokenFile, match="a.bin: 400 voxels of 1e-06 m, .* at most 1,000,000 and"):
        outdoor.voxels_of(scan_of(name="a.bin"), 1e-6)
    monkeypatch.setattr(outdoor, "MOST", 200)
    with pytest.raises(BrokenFile, match="scan: 400 voxels of 0.05 m, .* at most 200 and 64,000 a"):
        outdoor.voxels_of(scan_of(), 0.05)


def test_readers_are_ahead_but_not_far_and_their_errors_are_what_they_were():
    begun, taken = [], 0

    def work(i):
        begun.append(i)
        if i == 30:
            raise BrokenFile("a.bin: broken; repair it")
        return i

    with pytest.raises(BrokenFile, match="^a.bin: broken; repair it$"):
        for taken, i in enumerate(outdoor.ahead(work, ((i,) for i in range(100)), 2)):
            assert i == taken and len(begun) <= i + 5
    assert taken == 29
    assert list(outdoor.ahead(work, (), 2)) == []


# --- model ----------------------------------------------------------------------------------------

def settings_of(recipe=SMALL, **more):
    return {"recipe": recipe._asdict(), **{k: False for k in ABLATIONS}, "as_released": False,
            "workers": 1, **more}


@pytest.fixture
def model(tiny_clip):
    torch.manual_seed(0)
    return outdoor.Segmenter(pretrained.load_clip(tiny_clip), 12, settings_of())


def batch(*scans, side=SMALL.voxel):
    return outdoor.batch_of([outdoor.voxels_of(scan, side) for scan in scans], "cpu")


def test_the_published_host_has_the_sizes_of_its_layers():
    model = outdoor.Segmenter(pretrained.load_clip("random"), 19,
                              settings_of(outdoor.RECIPES["semantickitti"]))

    def conv(taps, a, b):
        return taps * a * b + 2 * b

    def residual(a, b):
        return conv(27, a, b) + conv(27, b, b) + (conv(1, a, b) if a != b else 0)

    w = [51, 51, 102, 204, 409, 409, 204, 153, 153]
    host = conv(27, 4, 51) + conv(27, 51, 51) + 766 * 19 + 19
    for i, n in enumerate((2, 3, 4, 6)):
        host += conv(8, w[i], w[i]) + residual(w[i], w[i + 1]) + (n - 1) * residual(w[i + 1],
                                                                                   w[i + 1])
    for i, skip in zip(range(4, 8), (204, 102, 51, 51)):
        host += conv(8, w[i], w[i + 1]) + residual(w[i + 1] + skip, w[i + 1])
        host += residual(w[i + 1], w[i + 1])
    inside = (412 * 128 + 3 * 128 + 128 * 256 + 256 + 512 * 512 + 3 * 512 + 512 * 768 + 768
              + 99_584 + 19 * 768 + 2 * (768 * 768 + 768) + 768 * 409 + 3 * 409)
    assert common.sizes(model.encoder)[0] == inside
    assert common.sizes(model)[0] == host + inside
    assert not any("clip" in name for name in model.state_dict())
    alone = outdoor.Segmenter(pretrained.load_clip("random"), 19, settings_of(
        outdoor.RECIPES["semantickitti"], no_transformer=True))
    assert common.sizes(alone) == (host, 0)


def test_a_scan_does_not_change_the_logits_of_another_and_each_voxel_reaches_all_of_its_own(model):
    """In evaluation: while training, batch norm shares statistics, as everywhere."""
    model.eval()
    scans = scan_of(1, 300), scan_of(2, 500)
    coords, feats, _ = batch(*scans)
    first = int((coords[:, 0] == 0).sum())
    before = model(coords, feats)
    moved = feats.clone()
    moved[0] += 5                                           # of scan 0
    after = model(coords, moved)
    change = (after - before).abs().amax(1)
    assert (change[:first] > 0).all() and (change[first:] == 0).all()
    for i, scan in enumerate(scans):                        # nor does it matter that it is there
        torch.testing.assert_close(model(*batch(scan)[:2]), before[coords[:, 0] == i], atol=2e-5,
                                   rtol=1e-4)


def test_without_transformer_a_voxel_reaches_its_surroundings_alone(tiny_clip):
    """So the test above sees attention, and --no-transformer leaves it out."""
    torch.manual_seed(0)
    clip = pretrained.load_clip(tiny_clip)
    model = outdoor.Segmenter(clip, 12, settings_of(no_transformer=True)).eval()
    xyz = np.float32([[i, j, 0] for i in range(600) for j in range(2)])
    scan = Scan("long", xyz, xyz[:, 0] / 600, np.zeros(1200, int))
    coords, feats, _ = batch(scan)
    moved = feats.clone()
    moved[0] += 5
    change = (model(coords, moved) - model(coords, feats)).abs().amax(1)
    assert change[0] > 0 and (change[-100:] == 0).all()


def test_epcl_is_what_the_bottleneck_says(model):
    """Against the same, scan by scan, with nothing padded: farthest points, tokens, three-NN."""
    model.eval()
    block = model.encoder
    coords, feats, _ = batch(scan_of(1, 300), scan_of(2, 700))
    bottom = model.stem(SparseTensor(coords, feats))
    for down in model.downs:
        bottom = down(bottom)
    out = block(bottom)
    for b in range(2):
        mine = bottom.coords[:, 0] == b
        xyz, x = bottom.coords[mine, 1:] * SMALL.voxel, bottom.feats[mine]
        tokens, centers = block.patches(torch.cat([xyz, x], 1)[None])
        place = centers[0] - centers[0].mean(0)
        deep = block.epcl(tokens, place[None] / place.norm(dim=1).max()).patches
        near, index = torch.cdist(xyz.double(), centers[0].double()).topk(3, largest=False)
        weight = 1 / (near.square() + 1e-8)
        weight = torch.where(near[:, :1] == 0, (near == 0).double(), weight)
        deep = (deep[0][index] * (weight / weight.sum(1, keepdim=True))[..., None].float()).sum(1)
        torch.testing.assert_close(out.feats[mine], x + block.back(deep), atol=1e-4, rtol=1e-3)


def test_batch_norm_behind_the_transformer_sees_each_voxel_once(model):
    rows = []
    model.encoder.back[1].register_forward_hook(lambda _, x, __: rows.append(len(x[0])))
    model.train()(*batch(scan_of(1, 300), scan_of(2, 700))[:2])
    coords = batch(scan_of(1, 300), scan_of(2, 700))[0]
    grid = SparseTensor(coords, torch.zeros(len(coords), 1))
    for stride in (1, 2, 4, 8):
        grid.map(2, stride)
    assert rows == [len(grid.grids[16].coords)]


def test_a_scan_with_fewer_voxels_than_tokens_repeats_them(model):
    coords, feats, _ = batch(scan_of(1, 2), scan_of(2, 500), scan_of(3, 1))
    logits = model.eval()(coords, feats)
    assert logits.shape == (len(coords), 12) and logits.isfinite().all()
    alone = model(*batch(scan_of(3, 1))[:2])
    torch.testing.assert_close(alone, logits[-1:], atol=2e-5, rtol=1e-4)


def test_everything_but_the_transformer_is_trained(model):
    coords, feats, _ = batch(scan_of(1), scan_of(2))
    model.train()(coords, feats).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert model.encoder.epcl.task.embedding.weight.grad.abs().sum() > 0
    assert list(model.encoder.clip.parameters()) == []


def test_as_released_the_classifier_reads_the_bottom_before_epcl(model):
    """With a decoder that hears nothing, what EPCL adds reaches the logits in our form alone."""
    model.eval()
    coords, feats, _ = batch(scan_of(1))
    with torch.no_grad():
        model.head.weight[:, 32:] = 0                       # the bottom alone is classified
    seen = []
    for model.as_released in (False, True):
        model.encoder.back[1].bias.data.fill_(0)
        before = model(coords, feats)
        model.encoder.back[1].bias.data.fill_(3)
        seen.append((model(coords, feats) - before).abs().max())
    assert seen[0] > 0.1 and seen[1] == 0


# --- loss and metric ------------------------------------------------------------------------------

def brute_lovasz(probability, label):
    """The integral over thresholds of the Jaccard loss of the voxels whose error is above it."""
    losses = []
    for k in np.unique(label):
        truth = label == k
        error = np.where(truth, 1 - probability[:, k], probability[:, k])
        edges = np.unique([0., 1., *error])
        total = 0.
        for low, high in zip(edges, edges[1:]):
            wrong = error > (low + high) / 2
            union = (truth | wrong).sum()
            total += (high - low) * wrong.sum() / union
        losses.append(total)
    return np.mean(losses)


@pytest.mark.parametrize("seed, rows, classes", [(0, 50, 4), (1, 7, 3), (2, 1, 2), (3, 200, 19)])
def test_lovasz_softmax_is_the_lovasz_extension_of_the_jaccard_loss(seed, rows, classes):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, max(classes - 1, 1), rows)      # the last class never occurs
    probability = rng.dirichlet(np.ones(classes) / 2, rows)
    found = outdoor.lovasz_softmax(torch.from_numpy(probability), torch.from_numpy(label))
    assert float(found) == pytest.approx(brute_lovasz(probability, label), abs=1e-9)


def test_lovasz_softmax_of_hard_predictions_is_one_minus_iou():
    rng = np.random.default_rng(0)
    label, predicted = torch.from_numpy(rng.integers(0, 5, (2, 300)))
    hard = torch.nn.functional.one_hot(predicted, 5).double()
    iou = outdoor.scores(outdoor.confusion(label, predicted, 5))["miou"]
    assert float(outdoor.lovasz_softmax(hard, label)) == pytest.approx(1 - iou, abs=1e-9)


def test_unlabelled_voxels_do_not_count_in_the_loss():
    logits, label = torch.randn(40, 5), torch.randint(5, (40,))
    label[::3] = IGNORE
    known = label != IGNORE
    other = torch.where(known[:, None], logits, 9 * torch.randn(40, 5)).requires_grad_()
    loss = outdoor.loss_of(other, label)
    assert loss == outdoor.loss_of(logits[known], label[known])
    loss.backward()
    assert (other.grad[~known] == 0).all() and (other.grad[known] != 0).any()
    nothing = outdoor.loss_of(other, torch.full((40,), IGNORE))
    nothing.backward()
    assert nothing == 0


def test_scores_by_hand_and_a_class_that_never_occurs():
    label = torch.tensor([0] * 10 + [1] * 10 + [-1] * 5)
    predicted = torch.tensor([0] * 8 + [1] * 2 + [0] + [1] * 4 + [3] * 5 + [2] * 5)
    counts = outdoor.confusion(label, predicted, 4)
    assert counts.tolist() == [[8, 2, 0, 0], [1, 4, 0, 5], [0] * 4, [0] * 4]
    result = outdoor.scores(counts)
    np.testing.assert_allclose(result["iou"], [8 / 11, 4 / 12, np.nan, np.nan])
    assert result["miou"] == pytest.approx((8 / 11 + 1 / 3) / 2) and result["oa"] == .6
    lines = outdoor.table(counts, "abcd")
    assert "never occurs" in lines[3] and "72.7" in lines[1] and lines[-1].split()[-1] == "53.0"
    assert outdoor.scores(torch.zeros(2, 2))["miou"] == 0


class Parrot(torch.nn.Module):
    """Class 1 above half a metre, 0 below, by the point that stands for the voxel."""

    def forward(self, coords, feats):
        up = (feats[:, 2] > .5).float()
        return 9 * torch.stack([1 - up, up], 1)


@pytest.mark.parametrize("tta, side", [(False, 4.), (False, .01), (True, .01)])
def test_every_raw_point_gets_the_class_of_its_voxel(tta, side):
    scans = [scan_of(1, 700, "a"), scan_of(2, 1, "b"), scan_of(3, 50, "c")]
    cfg = {"recipe": {"voxel": side}, "workers": 2}
    found = list(outdoor.label_scans(Parrot(), scans, lambda s: s, cfg, Setup("cpu", "fp32"), tta))
    assert [scan.name for scan, _, _ in found] == ["a", "b", "c"]
    for scan, (_, predicted, count) in zip(scans, found):
        assert len(predicted) == len(scan.xyz)
        if side < 1:                                        # a voxel for each point
            clear = np.abs(scan.xyz[:, 2] - .5) > .1        # scaled by 0.9 .. 1.1
            assert ((predicted.numpy() == (scan.xyz[:, 2] > .5)) | ~clear).all()
            continue
        voxels = outdoor.voxels_of(scan, side)
        assert count == len(voxels.coords) < max(len(scan.xyz), 2)
        expected = (voxels.feats[voxels.inverse, 2] > .5).astype(int)
        assert predicted.tolist() == expected.tolist()


# --- the run --------------------------------------------------------------------------------------

@pytest.fixture
def small(monkeypatch, tmp_path, tiny_clip):
    monkeypatch.setattr(outdoor, "SYNTHETIC", (6, 2))
    monkeypatch.setattr(synthetic_street, "BEAMS", 16)
    monkeypatch.setattr(synthetic_street, "COLUMNS", 120)
    monkeypatch.setitem(outdoor.RECIPES, "synthetic", SMALL)
    monkeypatch.chdir(tmp_path)
    return ["--clip", tiny_clip, "--workers", "2"]


def lines(folder):
    text = Path(folder, "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def last_lines(text):
    return [line for line in text.splitlines() if line.startswith("result")]


def write_bin(path, scan):
    np.c_[scan.xyz, scan.remission].astype("<f4").tofile(path)


def test_a_run_evaluates_resumes_repeats_and_predicts(small, monkeypatch, capsys):
    outdoor.main(small)
    whole = Path("runs/outdoor-synthetic-1")
    first = json.loads((whole / "results.json").read_text(encoding="utf-8"))
    assert first["task"] == "outdoor" and 0 <= first["metrics"]["miou"] <= 1
    assert set(first["iou"]) == set(synthetic_street.STREET_CLASSES)
    assert Image.open(whole / "look.png").width == 3 * (380 + 12)
    with open(whole / "confusion.csv", encoding="utf-8") as file:
        counts = np.array([row[1:] for row in csv.reader(file)][1:], int)
    assert outdoor.scores(counts)["miou"] == first["metrics"]["miou"]
    printed = capsys.readouterr().out
    assert "PolarMix pastes car, person, bicyclist" in printed and "voxels a second" in printed
    outdoor.main(["--eval", str(whole)])
    again = capsys.readouterr().out
    assert last_lines(again) == last_lines(printed) != [] and "PolarMix" not in again
    outdoor.main(["--eval", str(whole), "--tta"])
    assert "2 scans, sum of 10 views, epoch 2" in capsys.readouterr().out

    for name, scan in (("a.bin", scan_of(1)), ("b.bin", scan_of(2, 70))):
        write_bin(name, scan)
    outdoor.main(["--eval", str(whole), "--predict", "a.bin", "b.bin"])
    assert "a.bin: 400 points, " in capsys.readouterr().out
    number = np.fromfile(whole / "predicted/b.label", "<u4")
    assert len(number) == 70 and set(number) <= set(kitti.numbers_of(
        synthetic_street.STREET_CLASSES).tolist())
    assert Image.open(whole / "predicted/look.png").width == 2 * (380 + 12)
    with pytest.raises(InputError, match="a.bin lies there and would be written over"):
        outdoor.main(["--eval", str(whole), "--predict", "a.bin", "--export", "."])
    Path("cut.bin").write_bytes(Path("a.bin").read_bytes()[:-9])
    with pytest.raises(InputError, match="cut.bin: 6,391 bytes; a scan has 16 for each point"):
        outdoor.main(["--eval", str(whole), "--predict", "a.bin", "cut.bin", "--export", "none"])
    assert not Path("none").exists()

    count, now = iter(range(99)), run.Stopper.now
    monkeypatch.setattr(run.Stopper, "now", lambda self, step: next(count) == 4)
    with pytest.raises(SystemExit) as left:
        outdoor.main([*small, "--out", "parts"])
    assert left.value.code == 130
    at = checkpoint.load_checkpoint("parts", "outdoor")["at"]
    assert (at["epoch"], at["step"]) == (1, 2)              # 3 steps an epoch, asked after each
    monkeypatch.setattr(run.Stopper, "now", now)
    outdoor.main(["--resume", "parts", "--workers", "1"])
    a, b = (torch.load(f"{folder}/last.pt", weights_only=True)["model"]
            for folder in (whole, "parts"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    for one, two in zip(lines(whole), lines("parts"), strict=True):
        assert {**one, "seconds": 0} == {**two, "seconds": 0}


def test_one_street_is_learned_by_heart(small, monkeypatch):
    scan = Scan("street", *synthetic_street.scan_street(0))
    monkeypatch.setattr(outdoor, "load_scans", lambda cfg, training=True: outdoor.Data(
        [scan], [scan], synthetic_street.STREET_CLASSES, lambda s: s, "one street"))
    monkeypatch.setattr(outdoor, "training_voxels", lambda data, i, seed, things, cfg: (
        outdoor.voxels_of(scan, cfg["recipe"]["voxel"])))
    monkeypatch.setitem(outdoor.RECIPES, "synthetic", SMALL._replace(
        voxel=.3, epochs=60, every=60, batch_size=1, width=.25))
    outdoor.main(small)
    results = json.loads(Path("runs/outdoor-synthetic-1/results.json").read_text(encoding="utf-8"))
    assert results["metrics"]["oa"] > .9 and results["metrics"]["miou"] > .6


@pytest.mark.parametrize("more", [
    ["--accumulate", "2"], ["--unfreeze"], ["--deep-prompt"], ["--no-transformer"],
    ["--no-task-token", "--dropout", "0.3", "--as-released"]])
def test_accumulation_and_every_ablation_train(small, more):
    outdoor.main([*small, "--epochs", "3", *more])
    losses = [line["loss"] for line in lines("runs/outdoor-synthetic-1")]
    assert losses[-1] < losses[0]


def test_two_processes_see_the_scans_of_one(small, tmp_path, tiny_clip):
    """Batches of 3: the processes hold 1 and 2. Losses are those of each part: nearly the same."""
    own_data(tmp_path / "data")
    recipe = SMALL._replace(batch_size=3, lr=1e-5)
    (tmp_path / "small.py").write_text(
        "import run, train_outdoor as outdoor\n"
        f"outdoor.RECIPES['folder'] = outdoor.Recipe(**{recipe._asdict()})\n"
        "run.main_guard(outdoor.main)\n", encoding="utf-8")
    env = {**{k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK")},
           "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(outdoor.__file__).parent)}
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29527"]
    for folder, launcher in (("one", []), ("two", torchrun)):
        start = [sys.executable, *launcher, str(tmp_path / "small.py"), "--device", "cpu"]
        for command in (["--data", "folder", "--root", str(tmp_path / "data"), "--clip", tiny_clip,
                         "--remission", "255", "--out", str(tmp_path / folder)],
                        ["--eval", str(tmp_path / folder), "--predict",
                         *map(str, sorted((tmp_path / "data/train").glob("*.bin")))]):
            done = subprocess.run([*start, *command], env=env, text=True, capture_output=True,
                                  timeout=600)
            assert done.returncode == 0, done.stderr
        assert done.stdout.count(" points, ") == 3 and done.stdout.count("3 scans labelled") == 1
        assert len([*(tmp_path / folder / "predicted").glob("*.label")]) == 3
    for one, two in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=0.05)
        assert one["oa"] == pytest.approx(two["oa"], abs=0.02)
    tables = [(tmp_path / folder / "confusion.csv").read_text(encoding="utf-8").split("\n")
              for folder in ("one", "two")]
    points = [sum(int(n) for row in table[1:] for n in row.split(",")[1:]) for table in tables]
    assert points[0] == points[1] > 0


def own_data(root, classes=("ground", "car"), labels=1):
    root.mkdir()
    (root / "classes.txt").write_text("\n".join(classes), encoding="utf-8")
    for part, count in (("train", 3), ("test", 2)):
        (root / part).mkdir()
        for i in range(count):
            scan = scan_of(i, classes=len(classes))
            write_bin(root / part / f"{i}.bin", scan._replace(remission=scan.remission * 255))
            ((scan.label + 1) * labels).astype("<u4").tofile(root / part / f"{i}.label")


def test_data_without_a_label_is_not_a_result(small, tmp_path):
    words = ["--data", "folder", "--root", str(tmp_path / "data"), "--like", "synthetic",
             "--remission", "255"]
    own_data(tmp_path / "data", labels=0)
    with pytest.raises(InputError, match="no point of the scans of epoch 1 has a label; check"):
        outdoor.main([*small, *words])
    for i in range(3):
        np.ones(400, "<u4").tofile(tmp_path / f"data/train/{i}.label")
    with pytest.raises(InputError, match="no point of the 2 test scans has a label; check"):
        outdoor.main([*small, *words])
    with pytest.raises(InputError, match="one scan that fills one voxel at the bottom"):
        outdoor.main([*small, *words, "--batch-size", "1", "--voxel", "100"])


def test_semantickitti_is_trained_tested_predicted_and_handed_in(small, tmp_path, capsys):
    """As published, from files: training sequences, sequence 08, the submission's folder."""
    for number in range(22):
        write_scan(tmp_path / f"sequences/{number:02d}", points=200, seed=number,
                   labels=number < 11)
    words = ["--data", "semantickitti", "--root", str(tmp_path), "--like", "synthetic"]
    outdoor.main([*small, *words, "--epochs", "1"])
    printed = capsys.readouterr().out
    assert "10 train scans, 1 test scans, 19 classes" in printed
    _, number = write_scan(tmp_path / "again", points=200, seed=8)
    counted = sum(MAP[n] > 0 for n in number)
    assert f"{counted:,d}" in printed.split("\nmean ")[1].split("\n")[0]
    outdoor.main(["--eval", "runs/outdoor-semantickitti-1", "--export-test", "sent"])
    files = sorted(Path("sent").rglob("*.label"))
    assert [str(p) for p in files] == [
        f"sent/sequences/{n}/predictions/000000.label" for n in range(11, 22)]
    assert all(set(np.fromfile(p, "<u4")) <= set(MAP) for p in files)
    assert all(p.stat().st_size == 800 for p in files)

    bad = tmp_path / "sequences/03/labels/000000.label"     # in the middle of an epoch
    np.full(200, 41, "<u4").tofile(bad)
    with pytest.raises(InputError, match="03/labels/000000.label: has the label 41, which is not"):
        outdoor.main([*small, *words])
    bad.unlink()
    with pytest.raises(InputError, match="03/labels/000000.label: missing"):
        outdoor.main([*small, *words])


def test_own_scans_are_trained_on_and_get_the_numbers_of_their_own_classes(small, tmp_path, capsys):
    own_data(tmp_path / "data")
    words = ["--data", "folder", "--root", str(tmp_path / "data"), "--like", "synthetic",
             "--epochs", "1"]
    with pytest.raises(InputError, match="expected 0 to 1; pass --remission R"):
        outdoor.main([*small, *words])
    outdoor.main([*small, *words, "--remission", "255", "--out", "own"])
    said = capsys.readouterr().out
    assert "3 train scans, 2 test scans, 2 classes" in said and "PolarMix pastes car" in said
    assert "warning  no training" not in said
    (tmp_path / "x.txt").write_bytes(bytes(32))
    with pytest.raises(InputError, match="x.txt: not a scan .* of each point"):
        outdoor.main(["--eval", "own", "--predict", str(tmp_path / "x.txt")])
    outdoor.main(["--eval", "own", "--predict", str(tmp_path / "data/test/0.bin")])
    assert set(np.fromfile("own/predicted/0.label", "<u4")) <= {1, 2}
    write_scan(tmp_path / "sequences/08")
    folder = tmp_path / "sequences/08"
    with pytest.raises(InputError, match="08/labels: holds the labels of .*000000.bin, which"):
        outdoor.main(["--eval", "own", "--predict", str(folder / "velodyne/000000.bin"),
                      "--export", str(folder / "labels")])
    capsys.readouterr()
    outdoor.main(["--eval", "own"])
    mine = capsys.readouterr().out.splitlines()
    (tmp_path / "data/train").rename(tmp_path / "train")    # test scans alone will do
    outdoor.main(["--eval", "own"])
    alone = capsys.readouterr().out.splitlines()
    assert alone[-1].partition(" s")[0] == mine[-1].partition(" s")[0]
    assert any(line.startswith("data     folder: 2 test scans, 2 classes") for line in alone)
    (tmp_path / "data/classes.txt").write_text("car\nground\n", encoding="utf-8")
    with pytest.raises(InputError, match="has the classes car, ground; the run has ground, car"):
        outdoor.main(["--eval", "own"])
    with pytest.raises(InputError, match="--export-test: is for SemanticKITTI; this run has fold"):
        outdoor.main(["--eval", "own", "--export-test", "sent"])


@pytest.mark.parametrize("change", [
    {"blocks": "2346"}, {"blocks": "0" * 8}, {"width": 0.01}, {"voxel": 0.0}, {"neighbours": 999}])
def test_a_recipe_without_sense_is_one_line(small, monkeypatch, change):
    monkeypatch.setitem(outdoor.RECIPES, "synthetic", SMALL._replace(**change))
    with pytest.raises(InputError, match="takes eight digits of blocks") as error:
        outdoor.main(small)
    assert "\n" not in str(error.value) and not Path("runs").exists()


@pytest.mark.parametrize("words, message", [
    (["--predict", "x.bin"], "need a run"), (["--tta"], "need a run"),
    (["--export", "x"], "--export says where --predict writes"),
    (["--voxel", "0"], "--voxel 0 must be at least 0.001"),
    (["--remission", "-1"], "--remission -1 must be at least 0.001"),
    (["--compile"], "--compile: every scan has its own number of voxels"),
    (["--remission", "255"], "--remission belongs to scans from files; leave it out"),
    (["--data", "semantickitti", "--root", "nowhere"], "nowhere: no such folder; fetch the velo"),
    (["--data", "semantickitti", "--root", "."], "sequences/00: no such folder, and the run needs"),
    (["--data", "folder", "--root", "."], "train: no clouds; pass --root FOLDER"),
])
def test_wrong_arguments_are_one_line(small, words, message):
    with pytest.raises(InputError, match=message) as error:
        outdoor.main([*small, *words])
    assert "\n" not in str(error.value) and not Path("runs").exists()
