"""train_clip2point.py: depth maps against a slow rasteriser, losses, adapter, runs, messages."""
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import nanoclip
import train_clip
import train_clip2point as c2p
from data.meshes import sample_surface
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
    clouds = c2p.objects.unit_sphere(torch.from_numpy(clouds).float())
    views = torch.tensor([(1, 0, 0), (.93, 25, 60), (1.1, -20, 200), (1, 225, -45), (1, 180, 0)])
    maps = c2p.depth_maps(clouds, views, 24, .11, average)
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
    image = c2p.depth_maps(points, view, 8, .2)[0, 0]
    # centres lie at -.875, -.625, ..: those within .2 of .5 are .375 and .625, in x and in y
    near, far = image[1:3, 5:7], image[5:7, 1:3]
    assert (near == 0).all()                            # (.5 - min) / 1.5
    torch.testing.assert_close(far, torch.full((2, 2), (1.5 - .5) / 1.5 * 200 / 255))
    assert (image == 1).sum() == 64 - 8
    # farther away: smaller, and deeper. z = 1.25 -+ .4
    image = c2p.depth_maps(points, torch.tensor([[1.25, 0, 0]]), 8, .2)[0, 0]
    z = torch.tensor([1.25 - .4, 1.25 + .4])
    values = (z - .85) / 1.65 * 200 / 255
    torch.testing.assert_close(image[image < 1].unique(), values)
    # every depth beyond 1: the minimum is that of the empty pixels
    image = c2p.depth_maps(torch.tensor([[[.1, 0, -.5]]]), view, 8, .2)[0, 0]
    torch.testing.assert_close(image.min(), torch.tensor(.5 / 1.5 * 200 / 255))


def test_the_nearest_point_wins_and_what_is_behind_the_camera_is_not_drawn():
    points = torch.tensor([[[0., 0, -.5], [0, 0, .5], [0, 0, .5], [.5, 0, 0]]])
    view = torch.tensor([[1.0, 0, 0]])
    image = c2p.depth_maps(points, view, 16, .1)[0, 0]
    assert image[8, 8] == 0                             # z = .5, not 1.5
    mean = c2p.depth_maps(points, view, 16, .1, average=True)[0, 0]
    z = torch.tensor([(1.5 + .5 + .5) / 3, 1.0])
    assert mean[8, 8] == 0 and mean[8, 12] == pytest.approx(
        ((z[1] - z[0]) / z[1] * 200 / 255).item(), rel=1e-5)
    # at distance .8 the point (0, 0, .9) becomes z = .8 - 1.125 < 0
    image = c2p.depth_maps(torch.tensor([[[0, 0, .9]]]), torch.tensor([[.8, 0, 0]]), 16, .1)
    assert (image == 1).all()
    # z = 0 counts as empty, and hides what is behind it: as released
    both = torch.tensor([[[0, 0, 1.], [0, 0, -1]]])
    assert (c2p.depth_maps(both, view, 16, .1) == 1).all()


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
    axes = c2p.cameras(torch.tensor([1.0, elevation, azimuth]))
    wanted = torch.tensor([right, up, tuple(-x for x in eye)], dtype=torch.float32)
    torch.testing.assert_close(axes, wanted, atol=1e-6, rtol=0)
    assert torch.linalg.det(axes).item() == pytest.approx(-1, abs=1e-5)     # right, up, away


def test_a_chair_shows_its_front_in_view_0_and_its_back_in_the_third():
    rng = np.random.default_rng(3)
    xyz = sample_surface(*make_object("chair", rng), 2048, rng)     # its front faces +x, z is up
    points = c2p.objects.unit_sphere(c2p.y_up(torch.from_numpy(xyz)))[None]
    views = torch.tensor([(1., 0, 0), (1, 0, 180), (1, 0, 90)])
    front, back, side = c2p.depth_maps(points, views, 64, .06)[0]
    upper = slice(0, 28), slice(20, 44)                 # the backrest: far from the front
    inside = (front < 1) & (back < 1)
    assert front[upper][inside[upper]].mean() > back[upper][inside[upper]].mean() + .1
    # from the side at azimuth 90 the camera is at its left hand side: the backrest is on the right
    rows, columns = torch.nonzero(side[:20] < 1, as_tuple=True)
    assert len(rows) and columns.float().mean() != pytest.approx(32, abs=3)


def test_each_cloud_may_have_views_of_its_own():
    points = c2p.objects.unit_sphere(torch.randn(3, 50, 3, generator=torch.Generator()))
    views = torch.tensor([[(1., 0, 10), (1.1, 30, 20)], [(.9, 5, 5), (1, 0, 0)],
                          [(1., 90, 0), (1, 1, 1)]])
    maps = c2p.depth_maps(points, views, 20, .1)
    for b in range(3):
        assert torch.equal(maps[b:b + 1], c2p.depth_maps(points[b:b + 1], views[b], 20, .1))


def test_depth_maps_follow_the_cloud_not_the_order_of_its_points():
    points = c2p.objects.unit_sphere(torch.randn(1, 80, 3))
    views = torch.tensor([[1.0, 25, 60]])
    assert torch.equal(c2p.depth_maps(points, views, 32, .1),
                       c2p.depth_maps(points[:, torch.randperm(80)], views, 32, .1))


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
    model = c2p.DualPathAdapter(10, 512)
    one = 10 + 2 * 512 + (5120 * 512 + 512) + 2 * 512 + (512 * 512 + 512)
    assert sum(p.numel() for p in model.parameters()) == 2 * one == 5_773_332
    model = c2p.DualPathAdapter(3, 4).eval()
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
    torch.testing.assert_close(c2p.zero_shot(f, text), torch.tensor([[.6, 1.8, 0]]))
    scores, label = torch.tensor([[3., 2, 1], [1, 2, 3], [3, 2, 1]]), torch.tensor([0, 1, 1])
    assert c2p.accuracy(scores, label) == pytest.approx(1 / 3)
    assert c2p.accuracy(scores, label, [1, 2]) == pytest.approx(1 / 2)      # of two clouds
