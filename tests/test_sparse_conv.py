"""Sparse convolution: against dense conv3d with zeros where there is no voxel, both ways."""
import importlib
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import SparseTensor, devoxelise, strided_conv, submanifold_conv, transposed_conv

sparse = importlib.import_module("kernels.sparse_conv")
ROOT = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.usefixtures("poison_empty", "one_thread"),
              pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")]
# of the largest value: fp32 sums in another order; a result rounded once to bf16 or fp16
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 5e-3, torch.float16: 6e-4}
LOW = -4  # the lowest coordinate of `voxels`: below zero, and even, where dense strides begin


def voxels(clouds, side, share, device="cpu", seed=0):
    """Coordinates of a random share of side³ voxels in each cloud, in no order."""
    g = torch.Generator().manual_seed(seed)
    full = torch.rand(clouds, side, side, side, generator=g) < share
    coords = full.nonzero() + torch.tensor([0, LOW, LOW, LOW])
    return coords[torch.randperm(len(coords), generator=g)].int().to(device)


def random(*shape, device="cpu", dtype=torch.float32, seed=1):
    """Random numbers that bf16 can hold, so that all dtypes start from the same."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x.bfloat16().to(device, dtype).requires_grad_()


def place(coords, stride, side):
    """Indices of voxels in a dense grid (clouds, side / stride, ...)."""
    cloud, xyz = coords[:, 0].long().cpu(), (coords[:, 1:].long().cpu() - LOW)
    assert (xyz % stride == 0).all()
    return (cloud, *(xyz // stride).T)


def dense(feats, coords, stride, clouds, side):  # (V, C) -> (clouds, C, side / stride, ...)
    n = side // stride
    grid = torch.zeros(clouds, n, n, n, feats.shape[1], dtype=torch.float64)
    return grid.index_put(place(coords, stride, side), feats.cpu().double()).movedim(4, 1)


def assert_near(found, expected, dtype, what):
    assert found.dtype == dtype and found.shape == expected.shape, what
    if expected.numel():
        error = (found.detach().cpu().double() - expected.detach()).abs().max()
        error = float(error / expected.detach().abs().max().clamp(min=1e-9))
        assert error <= TOLERANCE[dtype], f"{what}: error {error:.1e} of the largest"  # NaN fails


def check_all(device, dtype, clouds, side, share, C, D):
    """Each form at stride 1 and at stride 2, with its gradients, against conv3d in float64."""
    coords = voxels(clouds, side, share, device)
    x = SparseTensor(coords, random(len(coords), C, device=device, dtype=dtype))
    fine = strided_conv(x, random(8, C, C, device=device, dtype=dtype)).coords  # stride 2
    for stride, at in ((1, coords), (2, fine)):
        feats = random(len(at), C, device=device, dtype=dtype)
        y = x.at(feats, stride)
        check_one(y, submanifold_conv, random(27, C, D, device=device, dtype=dtype), clouds, side)
        below = check_one(y, strided_conv, random(8, C, D, device=device, dtype=dtype), clouds,
                          side)
        feats = random(len(below.coords), D, device=device, dtype=dtype)
        check_one(below.at(feats), transposed_conv, random(8, D, C, device=device, dtype=dtype),
                  clouds, side)


def check_one(x, form, weight, clouds, side):
    out = form(x, weight)
    grad = random(*out.feats.shape, device=x.feats.device, dtype=x.feats.dtype, seed=2).detach()
    found = torch.autograd.grad(out.feats, (x.feats, weight), grad)
    grid, (K, C, D) = dense(x.feats, x.coords, x.stride, clouds, side), weight.shape
    size = round(K ** (1 / 3))
    kernel = weight.detach().cpu().double().requires_grad_()
    w = kernel.view(size, size, size, C, D)
    if form is submanifold_conv:
        grid = F.conv3d(grid, w.permute(4, 3, 0, 1, 2), padding=1)
    elif form is strided_conv:
        grid = F.conv3d(grid, w.permute(4, 3, 0, 1, 2), stride=2)
    else:
        grid = F.conv_transpose3d(grid, w.permute(3, 4, 0, 1, 2), stride=2)
    expected = grid.movedim(1, 4)[place(out.coords, out.stride, side)]
    of_feats, of_kernel = torch.autograd.grad(expected, (x.feats, kernel), grad.cpu().double())
    what = f"{form.__name__} at stride {x.stride}, {C} to {D} channels"
    dtype = x.feats.dtype
    assert_near(out.feats, expected, dtype, what)
    # the gradient came back through the cast of `dense`: its dtype is right, it is rounded there
    assert_near(found[0], of_feats.cpu().double(), dtype, f"{what}, gradient of feats")
    assert_near(found[1], of_kernel, dtype, f"{what}, gradient of weight")
    return out


# ---- Products ------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("clouds, side, share, C, D", [
    (3, 8, 0.15, 5, 7), (1, 8, 0.5, 16, 32), (2, 4, 0.01, 1, 1), (1, 4, 1.0, 3, 40)])
def test_torch_equals_dense_convolution_both_ways(dtype, clouds, side, share, C, D):
    check_all(torch.device("cpu"), dtype, clouds, side, share, C, D)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("clouds, side, share, C, D", [(2, 4, 0.3, 3, 17), (1, 4, 0.9, 35, 2)])
def test_triton_equals_dense_convolution_both_ways(triton_device, dtype, clouds, side, share, C, D):
    if dtype == torch.bfloat16 and triton_device.type == "cpu":
        pytest.skip("needs a CUDA card: Triton's interpreter multiplies the bits of bf16 numbers")
    check_all(triton_device, dtype, clouds, side, share, C, D)


@pytest.mark.skipif(not torch.cuda.is_available(),
                    reason="needs a CUDA card: the interpreter is too slow for this many voxels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("C, D", [(51, 102), (64, 64), (256, 256)])
def test_triton_equals_torch_on_many_voxels(dtype, C, D):
    coords = voxels(2, 32, 0.2, "cuda")
    x = SparseTensor(coords, random(len(coords), C, device="cuda", dtype=dtype))
    pairs, weight = x.map(3, 1), random(27, C, D, device="cuda", dtype=dtype)
    grad = random(len(coords), D, device="cuda", dtype=dtype)
    for kernel, reference, a, b in (
            (sparse.conv_triton, sparse.conv_torch, x.feats, weight),
            (sparse.weights_triton, sparse.weights_torch, x.feats, grad)):
        found = [kernel(a.detach(), b.detach(), *pairs[:2]) for _ in range(2)]
        assert torch.equal(*found), "other bits in another run"
        expected = reference(a.detach().double(), b.detach().double(), *pairs[:2])
        assert_near(found[0], expected.cpu(), dtype, kernel.__name__)


def test_weights_are_summed_in_parts_of_many_blocks(triton_device, monkeypatch):
    """Blocks of 16 rows and three parts, the last block not full."""
    monkeypatch.setattr(sparse, "blocks", lambda C, D, size: 2 * (
        dict(BLOCK_T=16, BLOCK_C=16, BLOCK_D=16, num_warps=4),))
    T = 16 * 16 * 3 + 5
    g = torch.Generator().manual_seed(0)
    table = torch.randint(-1, T, (2, T), generator=g).int().to(triton_device)
    rows = torch.randperm(T, generator=g).int().to(triton_device)
    feats, grad = (random(T, 2, device=triton_device, seed=s).detach() for s in (1, 2))
    found = sparse.weights_triton(feats, grad, table, rows)
    expected = sparse.weights_torch(feats.double(), grad.double(), table, rows)
    assert_near(found, expected.cpu(), torch.float32, "weights_triton")


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter: inf · 0
def test_an_infinite_gradient_stays_in_the_taps_of_its_row(triton_device):
    table = torch.tensor([[0, 1, 2], [-1, 0, -1]], dtype=torch.int32, device=triton_device)
    rows = torch.arange(3, dtype=torch.int32, device=triton_device)
    feats, grad = torch.ones(3, 2, device=triton_device), torch.ones(3, 2, device=triton_device)
    grad[0] = torch.inf
    found = torch.ops.nanoepcl.sparse_conv_weights(feats, grad, table, rows)
    assert (found[0] == torch.inf).all() and (found[1] == 1).all()


def test_the_same_bits_again_and_for_rows_in_another_order(triton_device):
    """Also where voxels come in another order: each sum is over taps in their order."""
    coords = voxels(2, 4, 0.4, triton_device)
    feats, weight = random(len(coords), 4, device=triton_device), random(27, 4, 5,
                                                                         device=triton_device)
    out = submanifold_conv(SparseTensor(coords, feats), weight).feats
    assert torch.equal(out, submanifold_conv(SparseTensor(coords, feats), weight).feats)
    order = torch.randperm(len(coords), device=coords.device)
    other = submanifold_conv(SparseTensor(coords[order], feats[order]), weight).feats
    assert torch.equal(other, out[order])


@pytest.mark.parametrize("dtype, large, nearest", [
    (torch.bfloat16, 256, 308), (torch.float16, 2048, 2100)])  # 309 and 2101: ties go to even
def test_half_precision_sums_in_fp32(triton_device, dtype, large, nearest):
    """large + 53 · 1: there is no number between large and large + 2, where a narrow sum stays."""
    coords = torch.tensor([[0, *xyz] for xyz in itertools.product(range(3), repeat=3)],
                          dtype=torch.int32, device=triton_device)
    feats = torch.ones(27, 2, dtype=dtype, device=triton_device)
    feats[0, 1] = large
    weight = torch.ones(27, 2, 1, dtype=dtype, device=triton_device)
    out = submanifold_conv(SparseTensor(coords, feats), weight).feats
    assert out[13].item() == nearest  # the middle one has all


def test_autocast_and_the_weight_follow_the_features():
    coords = voxels(1, 4, 0.5)
    feats, weight = random(len(coords), 4), random(27, 4, 5)
    x = SparseTensor(coords, feats)
    with torch.autocast("cpu", torch.bfloat16):
        out = submanifold_conv(x, weight).feats
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert feats.grad.dtype == weight.grad.dtype == torch.float32
    assert torch.equal(out, submanifold_conv(x.at(feats.bfloat16()), weight).feats)


def test_what_needs_no_gradient_is_not_computed(monkeypatch):
    coords = voxels(1, 4, 0.5)
    feats, weight = random(len(coords), 4), random(27, 4, 5)
    calls, run = [], sparse.run
    names = {sparse.conv_torch: "product", sparse.weights_torch: "weights"}
    monkeypatch.setattr(sparse, "run", lambda in_triton, in_torch, *args: (
        calls.append(names[in_torch]), run(in_triton, in_torch, *args))[1])
    submanifold_conv(SparseTensor(coords, feats.detach()), weight).feats.sum().backward()
    assert calls == ["product", "weights"]
    submanifold_conv(SparseTensor(coords, feats), weight.detach()).feats.sum().backward()
    assert calls[2:] == ["product", "product"]


# ---- Voxels and maps -----------------------------------------------------------------------------
@pytest.mark.parametrize("inputs, outputs, size, stride", [
    ("random", "random", 3, 1), ("random", "others", 3, 2), ("random", "others", 5, 1)])
def test_kernel_maps_hold_the_pairs_that_a_dictionary_finds(inputs, outputs, size, stride):
    """Any two sets of voxels and any taps: what sparse detection needs next."""
    grids = {"random": sparse.grid_of(voxels(2, 6, 0.3)),
             "others": sparse.grid_of(voxels(3, 7, 0.2, seed=5))}
    a, b, reach = grids[inputs], grids[outputs], size // 2
    taps = list(itertools.product(range(-reach, reach + 1), repeat=3))
    table, rows, back_table, back_rows = sparse.kernel_map(a, b, taps, stride)
    row = {tuple(voxel): i for i, voxel in enumerate(a.coords.tolist())}
    expected = set()
    for v, (cloud, *xyz) in enumerate(b.coords.tolist()):
        for k, tap in enumerate(taps):
            u = row.get((cloud, *(c + stride * o for c, o in zip(xyz, tap))))
            expected |= {(k, v, u)} if u is not None else set()
    assert len(expected) > 50
    k, t = (table >= 0).nonzero().T
    assert set(zip(k.tolist(), rows[t].tolist(), table[k, t].tolist())) == expected
    k, s = (back_table >= 0).nonzero().T
    assert set(zip(k.tolist(), back_table[k, s].tolist(), back_rows[s].tolist())) == expected
    assert sorted(rows.tolist()) == list(range(len(b.coords)))
    assert sorted(back_rows.tolist()) == list(range(len(a.coords)))


def test_rows_with_the_same_taps_stand_together():
    coords = voxels(1, 8, 0.04)
    table = SparseTensor(coords, random(len(coords), 1)).map(3, 1)[0]
    columns = [tuple(c) for c in (table >= 0).T.tolist()]
    assert len(list(itertools.groupby(columns))) == len(set(columns)) < len(columns)


def test_maps_are_made_once_for_all_tensors_of_a_network(monkeypatch):
    made, kernel_map = [], sparse.kernel_map
    monkeypatch.setattr(sparse, "kernel_map", lambda *a: made.append(a[2:]) or kernel_map(*a))
    coords = voxels(1, 8, 0.3)
    x = SparseTensor(coords, random(len(coords), 2))
    for _ in range(2):
        y = submanifold_conv(submanifold_conv(x, random(27, 2, 2)), random(27, 2, 2))
        z = strided_conv(strided_conv(y, random(8, 2, 2)), random(8, 2, 2))
        z = submanifold_conv(z, random(27, 2, 2))
        z = transposed_conv(transposed_conv(z, random(8, 2, 2)), random(8, 2, 2))
    assert [(len(taps), stride) for taps, stride in made] == [(27, 1), (8, 1), (8, 2), (27, 4)]
    assert z.stride == 1 and z.coords is coords and torch.equal(x.coords, coords)


def test_coarse_voxels_round_down_below_zero_and_stand_in_order():
    coords = torch.tensor([[1, 5, 0, -1], [0, -1, -2, -3], [0, -2, -1, -4], [1, 4, 1, -2]])
    x = SparseTensor(coords.int(), random(4, 1))
    y = strided_conv(x, torch.ones(8, 1, 1))
    assert y.coords.tolist() == [[0, -2, -2, -4], [1, 4, 0, -2]] and y.stride == 2
    assert torch.allclose(y.feats, torch.stack([x.feats[1:3].sum(0), x.feats[[0, 3]].sum(0)]))
    z = strided_conv(y, torch.ones(8, 1, 1))
    assert z.coords.tolist() == [[0, -4, -4, -4], [1, 4, 0, -4]] and z.stride == 4


def test_clouds_and_distant_voxels_do_not_touch(triton_device):
    """Neighbours in key order: the last voxel of a row and the first of the next, two clouds."""
    far = sparse.FARTHEST
    coords = torch.tensor([[0, 0, 0, far], [0, 0, 1, -far], [0, far, far, far],
                           [1, -far, -far, -far], [2047, far, far, far],
                           [2047, far, far, far - 1]], dtype=torch.int32)
    feats, weight = random(6, 1, device=triton_device), torch.ones(27, 1, 1, device=triton_device)
    out = submanifold_conv(SparseTensor(coords.to(triton_device), feats), weight).feats
    assert torch.allclose(out[:4], feats[:4]) and torch.allclose(out[4:], feats[4:].sum(0))


@pytest.mark.parametrize("V, C, D", [(0, 3, 4), (5, 0, 4), (5, 3, 0)])
def test_no_voxels_or_no_channels(triton_device, V, C, D):
    coords = torch.arange(4 * V, device=triton_device).view(V, 4).int()
    feats = random(V, C, device=triton_device)
    weights = [random(k, c, d, device=triton_device) for k, c, d in
               ((27, C, D), (8, D, D), (8, D, C))]
    out = transposed_conv(strided_conv(submanifold_conv(
        SparseTensor(coords, feats), weights[0]), weights[1]), weights[2])
    assert out.feats.shape == (V, C) and (D > 0 or (out.feats == 0).all())
    gradients = torch.autograd.grad(out.feats.sum(), (feats, *weights))
    assert all(g.isfinite().all() for g in gradients)
    if V == 0:
        assert all((g == 0).all() for g in gradients)
        points = torch.zeros(2, 3, device=triton_device)
        cloud = torch.zeros(2, dtype=torch.int64, device=triton_device)
        assert (devoxelise(SparseTensor(coords, feats), cloud, points) == 0).all()


def test_bad_input_is_refused_in_a_sentence():
    coords = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 4], [1, -1, 2, 3]], dtype=torch.int32)
    feats = torch.zeros(3, 2)
    x = SparseTensor(coords, feats)
    for bad, message in (
            (lambda: SparseTensor(coords[[0, 1, 2, 0, 1]], torch.zeros(5, 2)),
             r"2 of 5 voxels occur before, as \[0, 1, 2, 3\]; keep one of each"),
            (lambda: SparseTensor(coords.long(), feats), r"\(V, 4\) int32.* not \(3, 4\)"),
            (lambda: SparseTensor(coords[:, :3], feats), r"\(V, 4\) int32.* not \(3, 3\)"),
            (lambda: SparseTensor((coords * 40_000).abs() // torch.tensor([40_000, 1, 1, 1]).int(),
                                  feats), "0 .. 160000 is not in -64000 .. 64000; shift"),
            (lambda: SparseTensor(coords - 1, feats), "-1 .. 0 is not in 0 .. 2047"),
            (lambda: SparseTensor(coords + 2047, feats), "2047 .. 2048 is not in 0 .. 2047"),
            (lambda: SparseTensor(coords, feats[:2]), r"\(3, C\).* not \(2, 2\)"),
            (lambda: SparseTensor(coords, feats.long()), "floating-point.* torch.int64"),
            (lambda: x.at(feats[0]), r"\(3, C\).* not \(2,\)"),
            (lambda: submanifold_conv(x, torch.zeros(8, 2, 4)), r"be \(27, 2, D\) .*\(8, 2, 4\)"),
            (lambda: strided_conv(x, torch.zeros(8, 3, 4)), r"must be \(8, 2, D\) .*\(8, 3, 4"),
            (lambda: transposed_conv(x, torch.zeros(8, 2, 4)), "stride 1 and does not come from a"),
            (lambda: devoxelise(x, torch.zeros(2), torch.zeros(3, 3)),
             r"cloud \[2\], xyz \[3, 3\]")):
        with pytest.raises(ValueError, match=message):
            bad()


# ---- Devoxelisation ------------------------------------------------------------------------------
def test_missing_corners_do_not_meet_in_one_row():
    """One program sums the gradient of a row: a million edges there took an H100 0.2 s."""
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.nanoepcl.interpolate.default:
                most.append(int(torch.bincount(args[1].flatten()).max()))
            return function(*args, **(kwargs or {}))

    most, coords = [], torch.zeros(400, 4, dtype=torch.int32)
    coords[:, 1] = 2 * torch.arange(400)                    # no two are neighbours
    points = coords[:, 1:] + 0.25
    with Watch():
        devoxelise(SparseTensor(coords, random(400, 3)), coords[:, 0], points)
    assert most == [8]


def test_devoxelised_features_are_trilinear(triton_device):
    """On a full grid a linear function of the coordinates is met exactly, at any stride."""
    coords = torch.tensor([[c, *xyz] for c in range(2)
                           for xyz in itertools.product(range(-4, 4), repeat=3)],
                          dtype=torch.int32, device=triton_device)
    x = SparseTensor(coords, torch.zeros(len(coords), 1, device=triton_device))
    y = strided_conv(x, torch.zeros(8, 1, 1, device=triton_device))
    slope = torch.tensor([[1.0, -2, 0.5], [0.25, 3, 1]], device=triton_device).T
    cloud = torch.arange(40, device=triton_device) % 2
    xyz = torch.rand(40, 3, generator=torch.Generator().manual_seed(0)).to(triton_device)
    xyz = (6 * xyz - 4).clamp(max=2)  # within the corners of both strides: -4 .. 2
    for t, stride in ((x, 1), (y, 2)):
        t = t.at(t.coords[:, 1:].float() @ slope + 10.0 * t.coords[:, :1])
        expected = xyz @ slope + 10.0 * cloud[:, None]
        assert torch.allclose(devoxelise(t, cloud, xyz), expected, atol=1e-4), stride


def test_missing_corners_are_left_out():
    coords = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0], [0, -3, 0, 0]], dtype=torch.int32)
    x = SparseTensor(coords, feats := torch.tensor([[1.0], [5.0], [7.0]], requires_grad=True))
    points = torch.tensor([[0.25, 0.5, 0.5], [0.25, 0, 0], [-3, 0, 0], [-2.5, 0, 0.9], [9, 9, 9],
                           [-2, 0, 0], [1e9, 0, 0]])
    out = devoxelise(x, torch.zeros(7, dtype=torch.int32), points)
    assert torch.allclose(out[:, 0], torch.tensor([2.0, 2, 7, 7, 0, 0, 0]))
    out.sum().backward()
    assert torch.allclose(feats.grad[:, 0], torch.tensor([1.5, 0.5, 2.0]))
    assert (devoxelise(x, torch.ones(7, dtype=torch.int32), points) == 0).all()  # of another cloud


# ---- torch.library, torch.compile, the file itself -----------------------------------------------
def op_arguments(device, form=2):
    coords = voxels(1, 4, 0.3, device)
    x = SparseTensor(coords, random(len(coords), 3, device=device))
    pairs = x.map(form, 1)
    grad = random(len(pairs[1]), 4, device=device).detach()
    return {"sparse_conv": (x.feats, random(len(pairs[0]), 3, 4, device=device), *pairs),
            "sparse_conv_weights": (x.feats.detach(), grad, *pairs[:2])}


@pytest.mark.parametrize("name", ["sparse_conv", "sparse_conv_weights"])
def test_every_operator_passes_opcheck_in_torch(name):
    operator = getattr(torch.ops.nanoepcl, name).default
    torch.library.opcheck(operator, op_arguments(torch.device("cpu"))[name])


@pytest.mark.parametrize("name", ["sparse_conv", "sparse_conv_weights"])
def test_every_operator_passes_opcheck_in_triton(triton_device, name):
    operator = getattr(torch.ops.nanoepcl, name).default
    torch.library.opcheck(operator, op_arguments(triton_device)[name])


def test_torch_compile_passes_through_once_the_maps_are_made():
    coords = voxels(2, 6, 0.3)
    x = SparseTensor(coords, random(len(coords), 3))
    a, b, c = random(27, 3, 4), random(8, 4, 5), random(8, 5, 3)

    def network(feats):
        y = strided_conv(submanifold_conv(x.at(feats), a), b)
        return transposed_conv(y, c).feats.relu()

    plain = network(x.feats)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    assert torch.equal(plain, compiled(x.feats))
    gradients = [torch.autograd.grad(f(x.feats).sum(), (x.feats, a, b, c))
                 for f in (network, compiled)]
    assert all(torch.equal(p, q) for p, q in zip(*gradients))


def test_the_file_checks_itself_when_run():
    done = subprocess.run([sys.executable, ROOT / "kernels/sparse_conv.py"], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ok: sparse_conv and its gradients agree with conv3d on ")
