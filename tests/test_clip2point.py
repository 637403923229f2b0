"""clip2point.py, its two scripts: depth maps as a slow rasteriser's, losses, runs, messages."""
import contextlib
import copy
import hashlib
import io
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import clip2point
import nanoclip
import pretrained
import train_clip
import train_clip2point as c2p
import train_det
import zero_shot
from data.meshes import sample_surface
from data.objects import unit_sphere
from data.synthetic_objects import make_object
from run import InputError, Setup

CPU = ["--device", "cpu", "--workers", "1", "--precision", "fp32"]


# --- depth maps -----------------------------------------------------------------------------------

def slow_map(points, distance, elevation, azimuth, size, radius, average=False):
    """The release's rules, pixel by pixel, in float64. y up, elevation not 90 or -90."""
    e, a = math.radians(elevation), math.radians(azimuth)
    eye = np.array([math.cos(e) * math.sin(a), math.sin(e), math.cos(e) * math.cos(a)])
    right = np.cross([0, 1, 0], eye)
    right /= np.linalg.norm(right)
    up = np.cross(eye, right)
    place = []
    for p in points.astype(np.float64) / distance:
        place.append((p @ right, p @ up, distance - p @ eye))
    image, low, high = np.ones((size, size)), 1.0, 0.0
    z_of = np.full((size, size), np.nan)
    for i in range(size):
        for j in range(size):
            x, y = (2 * j + 1) / size - 1, 1 - (2 * i + 1) / size
            hit = [z for px, py, z in place if (px - x) ** 2 + (py - y) ** 2 <= radius ** 2
                   and z >= 0]
            if hit and (np.mean(hit) if average else min(hit)) > 0:
                z_of[i, j] = np.mean(hit) if average else min(hit)
                low, high = min(low, z_of[i, j]), max(high, z_of[i, j])
    drawn = ~np.isnan(z_of)
    image[drawn] = (z_of[drawn] - low) / high * 200 / 255
    return image


@pytest.mark.parametrize("average", [False, True])
def test_depth_maps_are_those_of_a_slow_rasteriser(average):
    rng = np.random.default_rng(0)
    clouds = rng.normal(size=(2, 60, 3))
    clouds[1] = np.round(clouds[1] * 2) / 2             # a lattice: many points at one depth
    clouds = unit_sphere(torch.from_numpy(clouds).float())
    views = torch.tensor([(1, 0, 0), (.93, 25, 60), (1.1, -20, 200), (1, 225, -45), (1, 180, 0)])
    maps = clip2point.depth_maps(clouds, views, 24, .11, average)
    assert maps.shape == (2, 5, 24, 24) and maps.dtype == torch.float32
    wrong = 0
    for b in range(2):
        for v, view in enumerate(views.tolist()):
            slow = slow_map(clouds[b].numpy(), *view, 24, .11, average)
            assert .05 < (slow < 1).mean() < .95        # there is something, and not everywhere
            wrong += (np.abs(maps[b, v].numpy() - slow) > 1e-5).sum()
    assert wrong == 0


def test_one_point_and_two_worked_by_hand():
    # view 0: the eye at +z, so depth is 1 - z; x to the right, y up
    points = torch.tensor([[[.5, .5, .5], [-.5, -.5, -.5]]])
    view = torch.tensor([[1.0, 0, 0]])
    image = clip2point.depth_maps(points, view, 8, .2)[0, 0]
    # centres lie at -.875, -.625, ..: those within .2 of .5 are .375 and .625, in x and in y
    near, far = image[1:3, 5:7], image[5:7, 1:3]
    assert (near == 0).all()                            # (.5 - min) / 1.5
    torch.testing.assert_close(far, torch.full((2, 2), (1.5 - .5) / 1.5 * 200 / 255))
    assert (image == 1).sum() == 64 - 8
    # farther away: smaller, and deeper. z = 1.25 -+ .4
    image = clip2point.depth_maps(points, torch.tensor([[1.25, 0, 0]]), 8, .2)[0, 0]
    z = torch.tensor([1.25 - .4, 1.25 + .4])
    values = (z - .85) / 1.65 * 200 / 255
    torch.testing.assert_close(image[image < 1].unique(), values)
    # every depth beyond 1: the minimum is that of the empty pixels
    image = clip2point.depth_maps(torch.tensor([[[.1, 0, -.5]]]), view, 8, .2)[0, 0]
    torch.testing.assert_close(image.min(), torch.tensor(.5 / 1.5 * 200 / 255))


def test_the_nearest_point_wins_and_what_is_behind_the_camera_is_not_drawn():
    points = torch.tensor([[[0., 0, -.5], [0, 0, .5], [0, 0, .5], [.5, 0, 0]]])
    view = torch.tensor([[1.0, 0, 0]])
    image = clip2point.depth_maps(points, view, 16, .1)[0, 0]
    assert image[8, 8] == 0                             # z = .5, not 1.5
    mean = clip2point.depth_maps(points, view, 16, .1, average=True)[0, 0]
    z = torch.tensor([(1.5 + .5 + .5) / 3, 1.0])
    assert mean[8, 8] == 0 and mean[8, 12] == pytest.approx(
        ((z[1] - z[0]) / z[1] * 200 / 255).item(), rel=1e-5)
    # at distance .8 the point (0, 0, .9) becomes z = .8 - 1.125 < 0
    image = clip2point.depth_maps(torch.tensor([[[0, 0, .9]]]), torch.tensor([[.8, 0, 0]]), 16, .1)
    assert (image == 1).all()
    # z = 0 counts as empty, and hides what is behind it: as released
    both = torch.tensor([[[0, 0, 1.], [0, 0, -1]]])
    assert (clip2point.depth_maps(both, view, 16, .1) == 1).all()


@pytest.mark.parametrize("elevation, azimuth, right, up, eye", [
    (0, 0, (1, 0, 0), (0, 1, 0), (0, 0, 1)),
    (0, 90, (0, 0, -1), (0, 1, 0), (1, 0, 0)),
    (0, -90, (0, 0, 1), (0, 1, 0), (-1, 0, 0)),
    (180, 0, (-1, 0, 0), (0, 1, 0), (0, 0, -1)),        # over the top, and upright again
    (90, 0, (-1, 0, 0), (0, 0, 1), (0, 1, 0)),          # fp32's 90 degrees are a bit more
    (270, 0, (1, 0, 0), (0, 0, 1), (0, -1, 0)),
    (-90, 180, (1, 0, 0), (0, 0, 1), (0, -1, 0)),
    (225, -45, (-.5 ** .5, 0, -.5 ** .5), (.5, .5 ** .5, -.5), (.5, -.5 ** .5, -.5)),
])
def test_cameras_of_the_released_views_worked_by_hand(elevation, azimuth, right, up, eye):
    axes = clip2point.cameras(torch.tensor([1.0, elevation, azimuth]))
    wanted = torch.tensor([right, up, tuple(-x for x in eye)], dtype=torch.float32)
    torch.testing.assert_close(axes, wanted, atol=1e-6, rtol=0)
    assert torch.linalg.det(axes).item() == pytest.approx(-1, abs=1e-5)     # right, up, away


def test_a_chair_shows_its_front_in_view_0_and_its_back_in_the_third():
    rng = np.random.default_rng(3)
    xyz = sample_surface(*make_object("chair", rng), 2048, rng)     # its front faces +x, z is up
    points = unit_sphere(clip2point.y_up(torch.from_numpy(xyz)))[None]
    views = torch.tensor([(1., 0, 0), (1, 0, 180), (1, 0, 90)])
    front, back, side = clip2point.depth_maps(points, views, 64, .06)[0]
    upper = slice(0, 28), slice(20, 44)                 # the backrest: far from the front
    inside = (front < 1) & (back < 1)
    assert front[upper][inside[upper]].mean() > back[upper][inside[upper]].mean() + .1
    # from the side at azimuth 90 the camera is at its left hand side: the backrest is on the right
    rows, columns = torch.nonzero(side[:20] < 1, as_tuple=True)
    assert len(rows) and columns.float().mean() > 35


def test_each_cloud_may_have_views_of_its_own():
    points = unit_sphere(torch.randn(3, 50, 3, generator=torch.Generator()))
    views = torch.tensor([[(1., 0, 10), (1.1, 30, 20)], [(.9, 5, 5), (1, 0, 0)],
                          [(1., 90, 0), (1, 1, 1)]])
    maps = clip2point.depth_maps(points, views, 20, .1)
    for b in range(3):
        assert torch.equal(maps[b:b + 1], clip2point.depth_maps(points[b:b + 1], views[b], 20, .1))


def test_depth_maps_follow_the_cloud_not_the_order_of_its_points():
    points = unit_sphere(torch.randn(1, 80, 3))
    views = torch.tensor([[1.0, 25, 60]])
    assert torch.equal(clip2point.depth_maps(points, views, 32, .1),
                       clip2point.depth_maps(points[:, torch.randperm(80)], views, 32, .1))


# --- losses and adapter ---------------------------------------------------------------------------

@pytest.mark.parametrize("temperature", [.07, .7])
def test_nt_xent_is_a_double_loop(temperature):
    torch.manual_seed(0)
    a, b = torch.randn(2, 5, 7, dtype=torch.float64)
    z = [x / x.norm() for x in (*a, *b)]
    total = 0
    for i in range(10):
        e = [math.exp(float(z[i] @ z[k]) / temperature) for k in range(10)]
        total -= math.log(e[(i + 5) % 10] / (sum(e) - e[i]))
    assert c2p.nt_xent(a, b, temperature).item() == pytest.approx(total / 10, rel=1e-9)
    assert c2p.nt_xent(a, 3 * b, temperature).item() == pytest.approx(total / 10, rel=1e-9)


def test_the_loss_joins_cross_and_intra_by_a_learned_balance():
    torch.manual_seed(1)
    depth, image = torch.randn(4, 2, 6), torch.randn(4, 6)
    recipe, w = c2p.RECIPES["shapenet"], torch.tensor(1.5, requires_grad=True)
    loss, cross, intra = c2p.pair_loss(depth, image, w, recipe, "both")
    assert cross.item() == c2p.nt_xent((depth[:, 0] + depth[:, 1]) / 2, image, .07).item()
    assert intra.item() == c2p.nt_xent(depth[:, 0], depth[:, 1], .07).item()
    assert loss.item() == pytest.approx((cross + intra / 2.25 + math.log(2.5)).item(), rel=1e-6)
    loss.backward()
    assert w.grad.item() == pytest.approx((-2 * intra / 1.5 ** 3 + 1 / 2.5).item(), rel=1e-5)
    for kind, wanted in (("cross", cross), ("intra", intra)):
        assert c2p.pair_loss(depth, image, w, recipe, kind)[0].item() == wanted.item()


def test_the_adapter_has_the_release_s_weights_and_computes_what_it_says():
    model = clip2point.DualPathAdapter(10, 512)
    one = 10 + 2 * 512 + (5120 * 512 + 512) + 2 * 512 + (512 * 512 + 512)
    assert sum(p.numel() for p in model.parameters()) == 2 * one == 5_773_332
    model = clip2point.DualPathAdapter(3, 4).eval()
    depth, image = torch.randn(2, 5, 3, 4)
    out = model(depth, image)
    total = 0
    for part, x in ((model.depth, depth), (model.image, image)):
        x = (x * .5) / math.sqrt(1 + 1e-5)              # batch norm as it begins
        first, norm, last = part.joint[2], part.joint[3], part.joint[6]
        x = x.reshape(5, 12) @ first.weight.T + first.bias
        total = total + (x / math.sqrt(1 + norm.eps)).relu() @ last.weight.T + last.bias
    torch.testing.assert_close(out, total / total.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-5)


def test_the_rate_starts_again_every_two_epochs_as_released():
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1)
    wanted = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(
        torch.optim.SGD([weight], lr=6e-3), 2, eta_min=1e-5)
    for epoch in np.arange(0, 5, .125):
        wanted.step(epoch)
        c2p.set_rate(optimizer, c2p.RECIPES["shapenet"], epoch)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(wanted.get_last_lr()[0], rel=1e-9)


def test_lamb_is_the_optimiser_of_the_published_recipe():
    model = c2p.DepthTowers(torch.nn.Linear(3, 2), ["depth"])
    recipe = c2p.RECIPES["shapenet"]
    optimizer = c2p.optimizer_of(model, recipe)
    assert type(optimizer).__name__ == "Lamb" and (recipe.lr, recipe.decay) == (6e-3, 1e-4)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())


def test_cosines_are_summed_over_the_views_and_classes_may_be_left_out():
    text = torch.eye(3)
    f = torch.tensor([[[3., 4, 0], [0, 5, 0]]])
    torch.testing.assert_close(clip2point.cosines(f, text), torch.tensor([[.6, 1.8, 0]]))
    scores, label = torch.tensor([[3., 2, 1], [1, 2, 3], [3, 2, 1]]), torch.tensor([0, 1, 1])
    assert clip2point.accuracy(scores, label) == pytest.approx(1 / 3)
    assert clip2point.accuracy(scores, label, [1, 2]) == pytest.approx(1 / 2)      # of two clouds


# --- CLIP and towers ------------------------------------------------------------------------------

SMALL = train_clip.RECIPES["synthetic"]._replace(size=32, width=32, layers=1, text_width=32,
                                                 text_layers=1, stem=8, embed=64)


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    """--clip nano=FILE, small, with random weights."""
    torch.manual_seed(9)
    config = train_clip.config_of(SMALL)
    model, _ = nanoclip.build(config, train_clip.WORDS)
    path = tmp_path_factory.mktemp("nano") / "nano.safetensors"
    nanoclip.save(path, model, config, train_clip.WORDS)
    return f"nano={path}"


def test_clip_is_loaded_whole_and_prepares_pictures_as_it_wants_them(nano):
    clip = clip2point.load_both_towers(nano, 0, "cpu")
    assert (clip.size, clip.radius, clip.model) == (32, .06, "nano")
    x = torch.rand(2, 32, 32)
    torch.testing.assert_close(clip.prepared(x), (2 * x - 1)[:, None].expand(-1, 3, -1, -1))
    assert not any(p.requires_grad for p in clip.visual.parameters()) and not clip.visual.training
    other = clip2point.load_both_towers("random", 0, "cpu")
    assert (other.size, other.radius, other.model) == (224, .02, "ViT-B-32-quickgelu")
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])    # OpenAI's, as in the release
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    torch.testing.assert_close(other.prepared(torch.ones(1, 1, 1))[0, :, 0, 0], (1 - mean) / std)
    assert other.encode([clip2point.PROMPT.format("zebra")]).shape == (1, 512)
    with pytest.raises(InputError, match="has no text tower, and CLIP2Point names by prompts"):
        clip2point.load_both_towers("timm:test_vit=random", 0, "cpu")


def test_a_clip_of_a_file_has_the_file_s_patch_embedding(nano, tmp_path):
    model, _ = pretrained.open_clip_model("ViT-B-32-quickgelu", seed=5)
    torch.save(model.state_dict(), tmp_path / "weights.bin")
    clip = clip2point.load_both_towers(f"ViT-B-32-quickgelu={tmp_path / 'weights.bin'}", 0, "cpu")
    for name, weight in model.visual.state_dict().items():
        assert torch.equal(clip.visual.state_dict()[name], weight), name


def test_shuffled_and_random_towers_are_others(nano):
    names = nano, f"{nano}=shuffled", nano
    found = [clip2point.load_both_towers(name, 0, "cpu").sha256 for name in names]
    assert found[0] == found[2] != found[1]


def test_an_untrained_tower_has_the_sizes_and_not_the_weights(nano):
    clip = clip2point.load_both_towers(nano, 0, "cpu")
    own, other = clip.visual.state_dict(), clip2point.untrained(clip, 3).state_dict()
    assert {k: w.shape for k, w in own.items()} == {k: w.shape for k, w in other.items()}
    assert not torch.equal(own["proj"], other["proj"])
    assert torch.equal(other["proj"], clip2point.untrained(clip, 3).state_dict()["proj"])
    assert not torch.equal(other["proj"], clip2point.untrained(clip, 4).state_dict()["proj"])


def test_unknown_words_are_refused_with_the_nearest_known_ones(nano, monkeypatch):
    clip = clip2point.load_both_towers(nano, 0, "cpu")
    assert clip2point.text_features(clip, ["chair", "night stand"]).shape == (2, 64)
    with pytest.raises(InputError, match=r"not 'chairs' \(near it: chair, .*'lorry' \(near it"):
        clip2point.text_features(clip, ["chairs", "table", "lorry"])
    monkeypatch.setitem(sys.modules, "data.synthetic_objects", None)        # a fork has no list
    with pytest.raises(InputError, match="forty classes, not 'chairs', 'lorry'; --clip openai"):
        clip2point.text_features(clip, ["chairs", "table", "lorry"])


def test_the_authors_tower_is_taken_by_its_names_or_refused_in_one_line(nano, tmp_path):
    clip = clip2point.load_both_towers(nano, 0, "cpu")
    released = {f"module.point_model.{name}": w + 1 if w.is_floating_point() else w
                for name, w in clip.visual.state_dict().items()}
    released.update({"module.weights": torch.ones(()), "module.image_model.proj": torch.ones(2)})
    torch.save(released, tmp_path / "best_test.pth")
    tower = clip2point.tower_of(clip, None, tmp_path / "best_test.pth")
    for name, weight in clip.visual.state_dict().items():
        if weight.is_floating_point():
            assert torch.equal(tower.state_dict()[name], weight + 1)
    del released["module.point_model.proj"]
    torch.save(released, tmp_path / "cut.pth")
    with pytest.raises(InputError, match=r"cut.pth: its weights point_model.* do not fit the image "
                                         "tower of nano: 1 tensors differ, proj missing"):
        clip2point.tower_of(clip, None, tmp_path / "cut.pth")


def test_the_shipped_tower_is_checked_and_belongs_to_its_nano(nano, tmp_path, monkeypatch):
    clip = clip2point.load_both_towers(nano, 0, "cpu")._replace(name="nano")
    path = tmp_path / "depth.safetensors"
    monkeypatch.setattr(nanoclip, "DEPTH_FILE", path)
    with pytest.raises(InputError, match="is missing; restore it, or make one"):
        clip2point.tower_of(clip, None, None)
    tower = copy.deepcopy(clip.visual)
    with torch.no_grad():
        tower.proj += .5
    nanoclip.save_depth(path, tower, clip.sha256)
    with pytest.raises(InputError, match="is not the file of this repository"):
        clip2point.tower_of(clip, None, None)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(nanoclip, "DEPTH_SHA256", sha256)
    loaded = clip2point.tower_of(clip, None, None)
    torch.testing.assert_close(loaded.proj, tower.proj, atol=2e-3, rtol=2e-3)      # fp16
    with pytest.raises(InputError, match="was taught by another nano-CLIP"):
        clip2point.tower_of(clip._replace(sha256="0" * 64), None, None)


# --- the scripts ----------------------------------------------------------------------------------

def shrink(monkeypatch, folder, nano):
    """The built-in run in seconds, in an empty folder. -> the words for it"""
    recipe = c2p.RECIPES["synthetic"]._replace(objects=1, pictures=2, batch_size=20, epochs=2,
                                               points=256, adapter=2)
    for name in c2p.RECIPES:
        monkeypatch.setitem(c2p.RECIPES, name, recipe)
    monkeypatch.setattr(zero_shot, "POINTS", 256)
    monkeypatch.setattr(zero_shot, "NANO_EPOCHS", 2)
    monkeypatch.setattr(c2p, "HELD_OUT", (1, 303))
    monkeypatch.setattr(c2p, "SCANS", ((2, 1), (1, 2)))
    prepared = c2p.prepared_folder
    monkeypatch.setattr(c2p, "prepared_folder", lambda place, name: prepared(folder, name))
    monkeypatch.chdir(folder)
    return ["--clip", nano, *CPU]


@pytest.fixture
def small(monkeypatch, tmp_path, nano):
    return shrink(monkeypatch, tmp_path, nano)


@pytest.fixture(scope="module")
def finished(nano, tmp_path_factory):
    """A run of two epochs, and what it printed."""
    folder, printed = tmp_path_factory.mktemp("runs"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        c2p.main([*shrink(patch, folder, nano), "--out", str(folder / "whole")])
    return folder / "whole", printed.getvalue()


def test_a_run_prints_its_table_and_a_stopped_and_resumed_one_ends_the_same(
        small, finished, capsys):
    run, printed = finished
    assert "40 objects with 2 pictures each; 40 held-out objects, 40 scanned clouds" in printed
    for words in ("chance  ", "CLIP's image tower  ", "depth tower  ", "control: pictures of other",
                  "with 2 shots, dual-path adapter", "left out chair, monitor, table, vase",
                  "result   scanned clouds, zero-shot: "):
        assert words in printed
    assert len(json.loads((run / "config.json").read_text())["classes"]) == 40
    results = json.loads((run / "results.json").read_text())
    assert {"accuracy", "before", "adapter", "mispaired"} <= results["metrics"].keys()
    assert all(0 <= x <= 1 for x in results["metrics"].values())
    assert Image.open(run / "look.png").width > 400

    step, calls = c2p.train_step, []

    def stopping(*args):
        calls.append(0)
        args[5].stopper.asked = len(calls) == 3         # in the first step of epoch 2
        return step(*args)
    c2p.train_step = stopping
    try:
        with pytest.raises(SystemExit) as ended:
            c2p.main([*small, "--out", "parts"])
    finally:
        c2p.train_step = step
    assert ended.value.code == 130
    c2p.main(["--resume", "parts", *CPU])
    whole, parts = (torch.load(f"{x}/last.pt", weights_only=True) for x in (run, "parts"))
    assert whole["model"].keys() == parts["model"].keys()
    for name, weight in whole["model"].items():
        assert torch.equal(weight, parts["model"][name]), name
    assert whole["at"]["best"] == parts["at"]["best"]
    capsys.readouterr()
    c2p.main(["--eval", str(run), *CPU])
    again = capsys.readouterr().out
    table = printed[printed.index("accuracy in"):printed.index("result")]
    assert table in again                               # the same numbers, from what was saved

    # the three towers learned from one start, by other pictures or without four classes
    towers = {name: {k: w for k, w in whole["model"].items() if k.startswith(f"towers.{name}.")}
              for name in ("depth", "mispaired", "left out")}
    projections = [next(w for k, w in tower.items() if k.endswith(".proj"))
                   for tower in towers.values()]
    assert not any(torch.equal(a, b) for a, b in zip(projections, projections[1:]))


def test_a_run_s_tower_names_files_and_says_which_axis_points_up(small, finished, capsys):
    rng = np.random.default_rng(0)
    np.save("own.npy", sample_surface(*make_object("chair", rng), 700, rng))
    words = ["--eval", str(finished[0]), "--out", "seen", "--predict", "own.npy", "--classes",
             "chair, table", *CPU]
    zero_shot.main(words)
    printed = capsys.readouterr().out
    assert "\nown.npy:   " in printed and "chair" in printed and "table" in printed
    assert Path("seen/look.png").is_file()
    with pytest.MonkeyPatch.context() as patch:         # whatever the other axis gives is better
        patch.setattr(zero_shot, "CLEARLY", -2)
        zero_shot.main(words)
        assert "own.npy: with --up y it fits better, " in capsys.readouterr().out
        zero_shot.main([*words, "--up", "y"])
        assert "own.npy: with --up z it fits better, " in capsys.readouterr().out


def test_the_test_clouds_of_a_data_set_are_named_with_and_without_shots(small, finished, tmp_path,
                                                                        capsys):
    for name in ("Cone", "Tv_stand", "Unheard"):
        for part in ("train", "test"):
            (tmp_path / "own" / part / name).mkdir(parents=True)
            for i in range(3):
                rng = np.random.default_rng(i)
                kind = name.lower() if name != "Unheard" else "sink"
                np.save(tmp_path / "own" / part / name / f"{i}.npy",
                        sample_surface(*make_object(kind, rng), 600, rng))
    capsys.readouterr()
    words = ["--data", "folder", "--root", "own", *CPU]
    zero_shot.main([*words, "--eval", str(finished[0]), "--shots", "2"])
    printed = capsys.readouterr().out
    assert "6 folder's test clouds, 2 classes, 256 points; z is up; files under own" in printed
    assert "does not know Unheard" in printed and "with 2 shots, dual-path adapter" in printed
    zero_shot.main([*words, *small[:2]])                      # the baseline: no depth tower
    printed = capsys.readouterr().out
    assert "CLIP's image tower" in printed and "depth tower" not in printed
    assert "dual-path" not in printed and "warning" in printed and "note " not in printed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zero_shot, "turned_fits", lambda up, *_: up == "y")
        zero_shot.main([*words, *small[:2], "--up", "y"])
        assert "with --up z the words would fit better; does z point up" in capsys.readouterr().out
    for name in ("Cone", "Tv_stand"):
        shutil.rmtree(tmp_path / "own/test" / name)
    with pytest.raises(InputError, match="has no test cloud of a class that nano=.* knows; there"):
        zero_shot.main([*words, *small[:2]])


def test_a_data_set_that_lies_on_its_side_is_pointed_out():
    names = ["chair", "airplane", "cup", "stairs", "table", "lamp"]
    clip = clip2point.load_both_towers("nano", 0, "cpu")
    tower, text = clip2point.tower_of(clip, None, None), clip2point.text_features(clip, names)
    rng = np.random.default_rng(1)
    xyz = np.stack([sample_surface(*make_object(name, rng), 1024, rng) for name in 3 * names])
    xyz = unit_sphere(torch.from_numpy(xyz))            # z is up
    used = tower, clip, text, {"views": None, "average": False}, Setup("cpu", "fp32")
    assert not zero_shot.turned_fits("z", tower, xyz[:1], *used[1:])    # one cloud shows nothing
    fits = lambda up, points: zero_shot.turned_fits(                                # noqa: E731
        up, used[0], clip2point.y_up(points, up), *used[1:])
    assert not fits("z", xyz) and fits("y", xyz)
    assert not fits("y", clip2point.y_up(xyz)) and fits("z", clip2point.y_up(xyz))


def test_the_shots_are_drawn_of_each_class_and_0_is_all():
    xyz, label = torch.arange(10.).view(10, 1, 1), torch.tensor([0, 1] * 5)
    some = zero_shot.draw_shots(xyz, label, 2, 0)
    assert some[1].tolist() == [0, 0, 1, 1] and (some[0].flatten() % 2 == some[1]).all()
    assert len(zero_shot.draw_shots(xyz, label, 0, 0)[1]) == 10
    assert not torch.equal(zero_shot.draw_shots(xyz, label, 2, 1)[0], some[0])


def write_off(path, name, seed):
    vertices, faces = make_object(name, np.random.default_rng(seed))
    rows = [" ".join(map(str, row)) for row in vertices.tolist()]
    rows += [f"3 {a} {b} {c}" for a, b, c in faces.tolist()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["OFF", f"{len(vertices)} {len(faces)} 0", *rows]))


def test_anybodys_meshes_can_be_pre_trained_on(small, tmp_path, capsys):
    for name in ("cone", "stairs"):
        for part, n in (("train", 10), ("test", 2)):
            for i in range(n):
                write_off(tmp_path / f"meshes/{part}/{name}/{i}.off", name, i + n)
    words = ["--data", "folder", "--root", "meshes", *small, "--epochs", "1"]
    c2p.main(words)
    printed = capsys.readouterr().out
    assert "20 objects with 2 pictures each; 4 folder's test clouds to test; 2 classes" in printed
    assert "result   folder's test clouds, zero-shot: " in printed and "control" not in printed
    np.save("meshes/train/cone/x.npy", np.random.default_rng(0).normal(size=(300, 3)))
    with pytest.raises(InputError, match="x.npy: is a cloud, and pictures are drawn of meshes"):
        c2p.main(words)


def test_shapenet_is_pre_trained_on_with_the_authors_pictures(small, tmp_path, capsys):
    from test_shapenet import publish
    publish(tmp_path / "ShapeNet55")
    words = ["--data", "shapenet", "--root", "ShapeNet55", *small, "--epochs", "1"]
    c2p.main([*words, "--batch-size", "2"])
    printed = capsys.readouterr().out
    assert "shapenet: 2 objects with 10 pictures each; none to test; 55 classes" in printed
    assert "no test by name" in printed and "does not know ashcan" in printed
    assert json.loads(next(Path("runs").glob("*/results.json")).read_text())["metrics"] == {}
    with pytest.raises(InputError, match="--batch-size 20: there are 2 objects"):
        c2p.main(words)
    next(tmp_path.glob("ShapeNet55/rendering/*/3.png")).unlink()
    with pytest.raises(InputError, match="3.png: missing, and"):
        c2p.main(words)


def test_average_precision_is_train_det_s():
    rng = np.random.default_rng(0)
    found, true, flat = [], {}, []
    for scene in "abc":
        true[scene] = np.concatenate([rng.uniform(0, 3, (4, 3)), rng.uniform(1, 2, (4, 3))], 1)
        near = true[scene][rng.integers(4, size=9)] + rng.normal(0, .25, (9, 6))
        near[:, 3:] = np.abs(near[:, 3:]) + .1
        scores = rng.random(9)
        found += [(scene, box, score) for box, score in zip(near, scores)]
        flat.append(train_det.Detections(near, scores[:, None]))
    truth = [(boxes, np.zeros(4, int)) for boxes in true.values()]
    wanted = train_det.evaluate_boxes(flat, truth)[.25][0][0]
    assert .2 < wanted < .95
    assert zero_shot.average_precision(found, true) == pytest.approx(wanted, abs=1e-12)
    assert zero_shot.average_precision([], true) == 0
    assert zero_shot.average_precision(found, {**true, "b": true["b"][:0]}) < wanted


def test_boxes_that_train_det_exported_are_cut_out_and_named(small, finished, tmp_path, capsys):
    rng = np.random.default_rng(0)
    chair, table = (sample_surface(*make_object(name, rng), 400, rng) for name in ("chair",
                                                                                   "table"))
    xyz = torch.from_numpy(np.concatenate([chair, table + [4, 0, 0]]).astype(np.float32))
    boxes = np.array([[*((x.min(0) + x.max(0)) / 2 + [shift, 0, 0]), *(np.ptp(x, 0) + .02)]
                      for x, shift in ((chair, 0), (table, 4))] + [[9, 9, 9, 1, 1, 1]])
    scene = train_det.Scene("room", xyz, torch.from_numpy(boxes[:2]), torch.tensor([0, 1]))
    found = train_det.Detections(boxes, np.eye(3)[:, :2] * .8 + .1)
    train_det.export("out", [scene], [found._replace(scores=np.full((3, 2), .9))], ["a", "b"])
    (tmp_path / "truth/val").mkdir(parents=True)
    Path("truth/val/room.json").write_text(json.dumps(
        [{"class": name, "center": box[:3].tolist(), "size": box[3:].tolist()}
         for name, box in zip(("chair", "table"), boxes)]))
    seen = []

    def looked(towers, clip, cloud, cfg, setup):        # the chair is given the first word's text
        seen.append(cloud)
        k = 0 if len(seen) == 1 else 1
        return [clip2point.text_features(clip, ["chair", "table"])[None, k:k + 1]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zero_shot, "features_of", looked)
        zero_shot.main(["--eval", str(finished[0]), "--detections", "out", "--root", "truth",
                        "--classes", "chair, table", "--out", "named", *CPU])
    printed = capsys.readouterr().out
    assert "room: 1 chair, 1 table; 1 of fewer than 16 points left out" in printed
    assert "result   mAP@0.25 100.00 % over 2 classes" in printed
    assert [len(cloud[0]) for cloud in seen] == [256, 256]      # no corner of a drawn box in it
    wanted = clip2point.y_up(unit_sphere(clip2point.farthest(torch.from_numpy(chair)[None], 256)))
    torch.testing.assert_close(seen[0], wanted, atol=1e-4, rtol=0)
    listed = json.loads(Path("named/room.json").read_text())
    assert [entry["class"] for entry in listed] == ["chair", "table"]
    words = ["--eval", str(finished[0]), "--detections", "out", "--classes", "chair, table", *CPU]
    zero_shot.main([*words, "--out", "named"])                # and with the real tower
    assert "room: " in capsys.readouterr().out
    with pytest.raises(InputError, match="the boxes lie there and would be written over"):
        zero_shot.main([*words, "--out", "out"])
    for score in ("high", None, float("nan")):
        listed = json.loads(Path("out/room.json").read_text())
        Path("wrong").mkdir(exist_ok=True)
        Path("wrong/room.ply").write_bytes(Path("out/room.ply").read_bytes())
        Path("wrong/room.json").write_text(json.dumps([*listed[:1], {**listed[1], "score": score}]))
        with pytest.raises(InputError, match="room.json: the score of box 1 is not a number"):
            zero_shot.main(["--detections", "wrong", *words[4:], "--out", "named"])
    with pytest.raises(InputError, match="truth2: has no room.json, val/room.json or"):
        zero_shot.main([*words, "--root", "truth2", "--out", "named"])
    Path("out/room.ply").write_bytes(Path("out/room.ply").read_bytes()[:500])
    with pytest.raises(InputError, match="out/room.ply: cut short.*export it again"):
        zero_shot.main([*words, "--out", "named"])


@pytest.mark.parametrize("words, said", [
    ([], "give --predict FILE, --data NAME or --detections DIR, one of them"),
    (["--data", "folder", "--predict", "a.obj", "--classes", "chair"], "give --predict FILE"),
    (["--predict", "a.obj"], "--predict and --detections need words"),
    (["--data", "folder", "--classes", "chair"], "--predict and --detections need words"),
    (["--detections", "none", "--classes", "chair"], "none: no NAME.json with NAME.ply"),
    (["--predict", "a.obj", "--classes", "chair,"], "has an empty word; write"),
    (["--predict", "a.obj", "--classes", "chair, chair"], "has a word twice"),
    (["--predict", "a.obj", "--classes", "chair", "--root", "x"], "takes files; leave --root out"),
    (["--predict", "a.obj", "--classes", "chair", "--shots", "4"], "--shots needs clouds with"),
    (["--data", "folder", "--out", "x"], "prints and writes nothing; leave --out out"),
    (["--data", "folder", "--eval", "x", "--init-official", "y.pth"], "both give a depth tower"),
    (["--data", "folder", "--eval", "none"], "none: no such checkpoint"),
    (["--predict", "none.obj", "--classes", "chair"], "none.obj: no such file"),
    (["--predict", "none.xyzzy", "--classes", "chair"], "not a format this script reads"),
    (["--data", "modelnet40", "--root", "nowhere"], "nowhere"),
])
def test_what_cannot_be_named_is_one_line(small, words, said):
    with pytest.raises(InputError, match=said) as caught:
        zero_shot.main([*words, *small])
    assert "\n" not in str(caught.value)


def test_a_run_whose_settings_are_damaged_is_refused(small, finished, tmp_path):
    saved = torch.load(finished[0] / "last.pt", weights_only=True)
    saved["config"]["recipe"]["points"] = "many"
    torch.save(saved, tmp_path / "damaged.pt")
    with pytest.raises(InputError, match=r"damaged.pt: checkpoint.config.recipe.points is not as"):
        zero_shot.main(["--eval", str(tmp_path / "damaged.pt"), "--data", "folder", *CPU])


def test_a_run_gives_its_settings_and_flags_come_first(small, finished):
    words = ["--eval", str(finished[0] / "last.pt"), "--predict", "a.obj", "--classes", "chair"]
    args = zero_shot.flags(words)
    cfg, saved = zero_shot.settings(args)
    assert args.out == finished[0] / "predicted" and cfg["recipe"]["points"] == 256
    assert (cfg["clip"], cfg["precision"], cfg["seed"], cfg["views"], cfg["average"]) == (
        saved["config"]["clip"], "fp32", 0, None, False)
    cfg, _ = zero_shot.settings(zero_shot.flags([*words, "--precision", "bf16", "--seed", "3",
                                                 "--views", "axis3", "--average"]))
    assert (cfg["precision"], cfg["seed"], cfg["views"], cfg["average"]) == (
        "bf16", 3, "axis3", True)
    args = zero_shot.flags(["--data", "folder", "--init-official", str(finished[0] / "last.pt")])
    assert zero_shot.settings(args)[0]["clip"] == "openai"


def test_shuffled_weights_of_a_run_follow_its_seed_and_shots_may_follow_another(
        small, nano, finished, tmp_path, capsys):
    clip = clip2point.load_both_towers(f"{nano}=shuffled", 3, "cpu")
    saved = torch.load(finished[0] / "last.pt", weights_only=True)
    saved["config"].update(seed=3, clip=clip.name)      # of the run; 0 is a seed for the shots
    saved["frozen"].update(name=clip.name, sha256=clip.sha256)
    torch.save(saved, tmp_path / "shuffled.pt")
    write_off(tmp_path / "a.off", "chair", 0)
    for more, seed in (([], 3), (["--seed", "0"], 0)):
        words = ["--eval", str(tmp_path / "shuffled.pt"), "--predict", "a.off", "--classes",
                 "chair, table", "--device", "cpu", *more]
        assert zero_shot.settings(zero_shot.flags(words))[0]["seed"] == seed
        zero_shot.main(words)
        assert "a.off:   " in capsys.readouterr().out


def test_torchrun_is_refused_and_the_adapter_trains_as_released_but_with_nano(monkeypatch):
    words = ["--data", "modelnet40", "--shots", "4"]
    epochs = [zero_shot.settings(zero_shot.flags([*words, *more]))[0]["recipe"]["adapter"]
              for more in ([], ["--clip", "openai"])]
    assert epochs == [c2p.RECIPES[name].adapter for name in ("synthetic", "shapenet")] == [30, 100]
    assert zero_shot.POINTS == c2p.RECIPES["shapenet"].points
    monkeypatch.setenv("WORLD_SIZE", "2")
    for script, words in ((zero_shot, words), (c2p, [])):
        with pytest.raises(InputError, match="torchrun"):
            script.main(words)


@pytest.mark.parametrize("words, said", [
    (["--temperature", "0"], "--temperature 0.0 must be above 0"),
    (["--up", "y"], "--up is the axis that points up in your own data; leave it out"),
    (["--objects", "3", "--data", "shapenet"], "--objects is of the built-in data"),
    (["--eval", "none"], "none: no such checkpoint"),
])
def test_what_cannot_be_pre_trained_is_one_line(small, words, said):
    with pytest.raises(InputError, match=said) as caught:
        c2p.main([*words, *small])
    assert "\n" not in str(caught.value)


def test_the_controls_change_what_they_say(nano):
    clip = clip2point.load_both_towers(nano, 0, "cpu")
    points = unit_sphere(torch.randn(4, 300, 3, generator=torch.Generator()))
    cfg = {"views": None, "average": False}
    setup = Setup("cpu", "fp32")
    f, = clip2point.features_of([clip.visual], clip, points, cfg, setup, most=12)
    assert f.shape == (4, 6, 64)                        # nano's six oblique views
    for change, views in (({"average": True}, 6), ({"views": "axis1"}, 1),
                          ({"views": "axis10"}, 10), ({"views": "oblique3"}, 3)):
        g, = clip2point.features_of([clip.visual], clip, points, {**cfg, **change}, setup)
        assert g.shape == (4, views, 64)
        same = torch.allclose(g[:, 0], f[:, 0], atol=1e-5)
        assert same == (views == 3)                     # both begin at elevation 25, azimuth 0
    assert clip2point.views_for(clip._replace(model="ViT-B-32"), cfg) == "axis6"
    assert clip2point.views_for(clip._replace(model="ViT-B-32"), cfg, few=True) == "axis10"


def test_features_of_pictures_are_kept_for_one_model_in_one_precision(small, nano, monkeypatch):
    cfg = {**c2p.settings(c2p.flags(["--clip", nano]))[0], "workers": 1}
    clip, made = clip2point.load_both_towers(nano, 0, "cpu"), []
    arrays = {name: np.zeros(1) for name in c2p.Pairs._fields[:-1]}
    monkeypatch.setattr(c2p, "prepare_pairs", lambda *a: made.append(0) or arrays)
    monkeypatch.setattr(c2p, "in_parallel", lambda *a, **k: [])
    monkeypatch.setattr(c2p, "built_in_tests", lambda *a: [])
    for model, precision, times in (("nano", "fp32", 1), ("nano", "fp32", 1), ("nano", "bf16", 2),
                                    ("other", "bf16", 3)):          # weights and hash the same
        c2p.load_pairs(cfg, clip._replace(model=model), Setup("cpu", precision))
        assert len(made) == times


def test_a_few_objects_and_their_pictures_are_learned(small, nano):
    cfg = c2p.settings(c2p.flags(["--clip", nano, "--seed", "1"]))[0]
    setup, clip = Setup("cpu", "fp32"), clip2point.load_both_towers(nano, 0, "cpu")
    data, _, classes, _ = c2p.load_pairs({**cfg, "workers": 1}, clip, setup)
    cfg["classes"] = list(classes)
    run = c2p.Run("clip2point", cfg, setup)
    run.begin(0)
    model = c2p.DepthTowers(clip.visual, ["depth"]).train()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    # an untrained tower finds all pictures alike: features that can be told apart, instead
    data = data._replace(image=torch.randn(data.image.shape, generator=run.draw))
    rows = torch.arange(16)
    sums = torch.stack([c2p.train_step(model, optimizer, data, rows, clip, run)
                        for _ in range(40)])
    cross = sums[:, 0] / sums[:, 2]
    assert cross[-10:].mean() < .6 * cross[:3].mean()


def test_right_after_a_clone_words_name_a_mesh(tmp_path, monkeypatch, capsys):
    """nano-CLIP and its depth tower are in the repository, small, and know what they see."""
    assert nanoclip.FILE.stat().st_size + nanoclip.DEPTH_FILE.stat().st_size < 10e6
    monkeypatch.chdir(tmp_path)
    names = ["chair", "airplane", "cup", "stairs"]
    for i, name in enumerate(names):
        write_off(tmp_path / f"{i}.off", name, 40 + i)
    files = [f"{i}.off" for i in range(4)]
    zero_shot.main(["--predict", *files, "--classes", ", ".join(names), *CPU])
    found = [line.split()[1] for line in capsys.readouterr().out.splitlines() if "%" in line]
    assert found == names
    picture = Image.open("predicted/look.png")
    assert picture.width == 6 * (128 + 12) and picture.height > 4 * 128
