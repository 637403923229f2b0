"""Sampling, neighbours, balls, interpolation and splat: Triton against torch, both against NumPy.

Triton and torch must agree bit for bit on any cloud. NumPy works in float64, which can order
distances that differ by less than fp32 rounding: so the distances are compared and not the indices.
On lattices distances are exact in fp32, and the indices must be the same, ties included.
"""
import importlib
import inspect
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import common
from kernels import ball_query, farthest_point_sample, group, interpolate, knn, splat

fps_file, knn_file, ball_file, interpolate_file, splat_file = (
    importlib.import_module(f"kernels.{name}")
    for name in ("fps", "knn", "ball_query", "interpolate", "splat"))
ROOT = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.usefixtures("poison_empty"),  # the warning: triton 3.6's interpreter
              pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")]


def make_cloud(kind, B, N, seed=0):
    g = torch.Generator().manual_seed(seed)
    xyz = torch.rand(B, N, 3, generator=g)
    if kind == "clustered":  # clusters 1e5 times smaller than their distance
        xyz = xyz * 1e-5 + torch.randint(0, 4, (B, N, 1), generator=g)
    elif kind == "duplicated":
        xyz = xyz[:, torch.randint(0, max(1, N // 4), (N,), generator=g)]
    elif kind == "collinear":
        xyz = xyz[..., :1] * torch.tensor([1.0, -2.0, 0.5])
    elif kind == "lattice":
        xyz = (xyz * 4).floor()
    elif kind == "sphere":  # around the first point: only the last bits of the distances differ
        xyz = torch.nn.functional.normalize(xyz - 0.5, dim=-1)
        xyz[:, 0] = 0
    elif kind == "identical":
        xyz = torch.ones(B, N, 3)
    return xyz


KINDS = ["random", "clustered", "duplicated", "collinear", "lattice", "sphere", "identical"]


def table64(query, points):  # float64 squared distances, by NumPy
    q, p = query.cpu().double().numpy(), points.cpu().double().numpy()
    return ((q[:, :, None] - p[:, None]) ** 2).sum(-1)


def assert_farthest(xyz, index, start, exact):
    """Each sample is the farthest, in float64, from those before it; exact: tie-breaking, too."""
    assert index[:, 0].tolist() == list(start)
    for table, chosen in zip(table64(xyz, xyz), index.cpu().numpy()):
        nearest = np.full(len(table), np.inf)
        for previous, sample in zip(chosen[:-1], chosen[1:]):
            nearest = np.minimum(nearest, table[previous])
            if exact:
                assert sample == nearest.argmax()  # NumPy's argmax is the first maximum
            else:  # 1e-6: a few roundings of fp32
                assert nearest[sample] >= nearest.max() * (1 - 1e-6)


def assert_nearest(query, points, dist2, index, exact):
    """dist2 are the smallest float64 distances in ascending order, and belong to index."""
    table = table64(query, points)
    order = np.argsort(table, -1, kind="stable")[..., :index.shape[-1]]
    found = np.take_along_axis(table, index.cpu().numpy(), -1)
    np.testing.assert_allclose(found, np.take_along_axis(table, order, -1), rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(dist2.cpu().numpy(), found, rtol=1e-6, atol=1e-12)
    assert (dist2[..., 1:] >= dist2[..., :-1]).all()
    assert all(len(set(row)) == len(row) for row in index.flatten(0, 1).tolist()), "a point twice"
    if exact:
        np.testing.assert_array_equal(index.cpu().numpy(), order)


def fps_reference(xyz, m, start=0, lengths=None):  # the torch path, called directly
    B, N, _ = xyz.shape
    start = start if torch.is_tensor(start) else torch.full((B,), start)
    lengths = torch.full((B,), N) if lengths is None else lengths
    return fps_file.fps_torch(xyz.float(), m, start, lengths)


def knn_reference(query, points, k, lengths=None):
    B, N, _ = points.shape
    return knn_file.knn_torch(query.float(), points.float(), k,
                              torch.full((B,), N) if lengths is None else lengths)


# -------------------------------------------------------------------------- farthest point sampling

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("B, N, m", [(1, 1, 1), (1, 7, 7), (2, 300, 40), (5, 33, 12)])
def test_fps_in_triton_equals_torch_and_brute_force(triton_device, kind, B, N, m):
    xyz = make_cloud(kind, B, N)
    index = farthest_point_sample(xyz.to(triton_device), m)
    assert index.dtype == torch.int64 and index.shape == (B, m)
    assert torch.equal(index.cpu(), fps_reference(xyz, m))
    assert_farthest(xyz, index, [0] * B, exact=kind in ("lattice", "identical"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("N, m, programs, best, rounds", [
    (150, 20, 2, 8, 20), (300, 12, 4, 4, 1), (40, 16, 8, 2, 4),  # enough, only one, too few
    (9, 7, 2, 2, 7), (1, 1, 1, 2, 1)])
def test_fps_in_rounds_equals_torch(triton_device, kind, N, m, programs, best, rounds):
    xyz = make_cloud(kind, 3, N)
    start = torch.tensor([0, N // 2, N - 1])
    lengths = torch.tensor([N, max(m, N // 2 + 1), max(m, N - 3)])
    moved = [t.to(triton_device) for t in (xyz, start, lengths)]
    share = dict(PROGRAMS=programs, BLOCK=256, BEST=best, num_warps=8)
    expected = fps_reference(xyz, m, start.minimum(lengths - 1), lengths)
    index = fps_file.fps_rounds(moved[0], m, *moved[1:], share, rounds, streamed=(64, 4))
    assert torch.equal(index.cpu(), expected)


def test_fps_in_rounds_shares_clouds_of_any_size():
    pytest.importorskip("triton", reason="needs triton: its launch configuration")
    for N in [8193, 40_000, 65_536, 65_537, 120_000, 10 ** 6, 2 ** 21]:
        share = fps_file.shares(N)
        assert share["PROGRAMS"] * share["BLOCK"] >= N and share["BLOCK"] <= 4096
        assert share["PROGRAMS"] * share["BEST"] <= 2048


def test_fps_of_a_cloud_with_nan_ends_with_valid_indices(triton_device):
    # unchecked on a card: the operator's inner function, called directly
    xyz = make_cloud("random", 2, 60)
    xyz[0, 7] = xyz[1, 0] = float("nan")
    zero, full = torch.zeros(2).long(), torch.full((2,), 60)
    share = dict(PROGRAMS=2, BLOCK=256, BEST=4, num_warps=8)
    moved = [t.to(triton_device) for t in (xyz, zero, full)]
    for index in (fps_file.fps_rounds(moved[0], 9, *moved[1:], share, 4, streamed=(64, 4)),
                  fps_file.fps_triton(moved[0], 9, *moved[1:])):
        assert ((index >= 0) & (index < 60)).all()


def test_fps_chooses_the_points_computed_by_hand(triton_device):
    line = torch.tensor([[0.0, 0, 0], [1, 0, 0], [2, 0, 0], [5, 0, 0], [9, 0, 0]])
    xyz = torch.stack([line, line.flip(0)]).to(triton_device)
    # from 0: 9, then 5 (4 away from 9), then 2, then 1
    assert farthest_point_sample(xyz, 5).tolist() == [[0, 4, 3, 2, 1], [0, 4, 1, 2, 3]]


def test_fps_ties_go_to_the_lowest_index(triton_device):
    xyz = torch.zeros(1, 200, 3)
    xyz[0, [17, 60, 190], 0] = 1.0  # three farthest points coincide
    xyz[0, [30, 31], 0] = -1.0  # equally far from the start, but later than 17
    index = farthest_point_sample(xyz.to(triton_device), 4)
    assert index.tolist() == [[0, 17, 30, 0]]  # only duplicates are left


def test_fps_never_picks_a_point_twice_while_others_remain(triton_device):
    index = farthest_point_sample(make_cloud("random", 2, 48).to(triton_device), 48)
    assert torch.equal(index.sort(1).values.cpu(), torch.arange(48).expand(2, -1))


def test_fps_starts_where_it_is_told_and_stays_within_lengths(triton_device):
    xyz = make_cloud("random", 3, 50)
    start, lengths = torch.tensor([3, 0, 19]), torch.tensor([50, 12, 20])
    moved = [t.to(triton_device) for t in (xyz, start, lengths)]
    index = farthest_point_sample(moved[0], 12, start=moved[1], lengths=moved[2]).cpu()
    assert torch.equal(index, fps_reference(xyz, 12, start, lengths))
    assert (index < lengths[:, None]).all()
    for b, n in enumerate(lengths):  # the rest of the cloud has no influence
        assert torch.equal(index[b], fps_reference(xyz[b:b + 1, :n], 12, start[b:b + 1])[0])
    int32 = farthest_point_sample(moved[0], 12, start=moved[1].int(), lengths=moved[2].int())
    assert torch.equal(int32.cpu(), index)
    assert farthest_point_sample(moved[0], 2, start=7)[:, 0].tolist() == [7, 7, 7]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_fps_takes_other_dtypes_and_strides(triton_device, dtype):
    wide = make_cloud("random", 2, 90, seed=3).repeat(1, 1, 2).to(dtype)
    xyz = wide[:, ::3, 1:4]  # neither contiguous nor float32
    index = farthest_point_sample(xyz.to(triton_device), 20)
    assert torch.equal(index.cpu(), fps_reference(xyz.float().contiguous(), 20))


@pytest.mark.parametrize("kind", ["random", "clustered", "lattice", "identical"])
@pytest.mark.parametrize("B, N, m", [(40, 9000, 64),  # more programs than multiprocessors
                                     (2, 40000, 300), (1, 150000, 50), (1, 10 ** 6, 9)])
def test_fps_of_large_clouds_equals_torch_on_a_gpu(kind, B, N, m):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA card: clouds of this size take minutes in the interpreter")
    xyz = make_cloud(kind, B, N)
    lengths = torch.full((B,), N) - torch.arange(B)
    index = farthest_point_sample(xyz.cuda(), m, lengths=lengths.cuda())
    assert torch.equal(index.cpu(), fps_reference(xyz, m, lengths=lengths))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("B, N, m, few", [(2, 300, 60, 0), (3, 65, 65, 0), (1, 1, 1, 0),
                                          (2, 300, 60, 300), (1, 2500, 300, 256)])
def test_fps_in_boxes_equals_torch(monkeypatch, kind, B, N, m, few):
    pytest.importorskip("numba", reason="needs numba: compares its loop with torch")
    monkeypatch.setattr(fps_file, "FEW", few)  # more samples go through the tree
    xyz = make_cloud(kind, B, N)
    assert torch.equal(fps_file.fps_boxes(xyz, m, torch.zeros(B).long(), torch.full((B,), N)),
                       fps_reference(xyz, m))
    start = torch.arange(B) * 7 % N
    lengths = torch.tensor([N, max(m, N // 2 + 1), m])[:B]
    assert torch.equal(farthest_point_sample(xyz, m, start, lengths),
                       fps_reference(xyz, m, start, lengths))


def test_fps_in_boxes_far_from_the_origin_equals_torch(monkeypatch):
    # coordinates of 1e5 have a spacing of 1/128: the bound of a box must hold after rounding
    pytest.importorskip("numba", reason="needs numba: compares its loop with torch")
    monkeypatch.setattr(fps_file, "FEW", 0)
    xyz = make_cloud("random", 2, 1500) + torch.tensor([1e5, -1e5, 3e4])
    assert torch.equal(farthest_point_sample(xyz, 400), fps_reference(xyz, 400))


def test_without_numba_fps_chooses_the_same_points(monkeypatch):
    xyz = make_cloud("lattice", 2, 3000)
    index = farthest_point_sample(xyz, 20)
    monkeypatch.setattr(fps_file, "numba", None)
    assert torch.equal(farthest_point_sample(xyz, 20), index)


def test_torch_argmax_returns_the_first_maximum():
    for n in [*range(1, 40), 63, 64, 65, 1023, 1024, 1025, 4097, 40000]:
        for rows in (1, 3, 32):
            x = torch.randint(0, 3, (rows, n)).float()
            assert torch.equal(x.argmax(1), torch.from_numpy(x.numpy().argmax(1)))


def test_fps_leaves_the_number_of_threads_as_it_was():
    before = torch.get_num_threads()
    farthest_point_sample(make_cloud("random", 2, 20), 5)
    assert torch.get_num_threads() == before


# ------------------------------------------------------------------------------- nearest neighbours

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("B, M, N, k", [(1, 1, 1, 1), (1, 3, 7, 7), (2, 5, 300, 5), (5, 2, 33, 16)])
def test_knn_in_triton_equals_torch_and_brute_force(triton_device, kind, B, M, N, k):
    points = make_cloud(kind, B, N)
    query = make_cloud(kind, B, M, seed=1)
    dist2, index = knn(query.to(triton_device), points.to(triton_device), k)
    assert dist2.dtype == torch.float32 and index.dtype == torch.int64 and index.shape == (B, M, k)
    expected = knn_reference(query, points, k)
    assert torch.equal(dist2.cpu(), expected[0]) and torch.equal(index.cpu(), expected[1])
    assert_nearest(query, points, dist2, index, exact=kind in ("lattice", "identical"))


@pytest.mark.parametrize("kind, M, N, k", [("random", 5, 300, 16), ("lattice", 9, 300, 16),
                                           ("lattice", 3, 150, 64), ("identical", 5, 130, 33)])
def test_knn_tiles_of_a_large_cloud_equal_torch(triton_device, kind, M, N, k):
    points, query = make_cloud(kind, 2, N), make_cloud(kind, 2, M, seed=1)
    lengths = torch.tensor([N, k + 1])
    assert knn_file.blocks(k)["BLOCK_M"] > 1 and knn_file.blocks(k)["BLOCK_N"] < N
    moved = [t.to(triton_device) for t in (query, points, lengths)]
    dist2, index = knn_file.knn_triton(moved[0], moved[1], k, moved[2])
    expected = knn_reference(query, points, k, lengths)
    assert torch.equal(dist2.cpu(), expected[0]) and torch.equal(index.cpu(), expected[1])


def test_knn_finds_64_neighbours(triton_device):
    points, query = make_cloud("lattice", 1, 100), make_cloud("lattice", 1, 2, seed=1)
    dist2, index = knn(query.to(triton_device), points.to(triton_device), 64)
    assert_nearest(query, points, dist2, index, exact=True)


def test_knn_orders_equal_distances_by_index(triton_device):
    points = torch.zeros(1, 150, 3)
    points[0, ::2, 0] = 1.0
    dist2, index = knn(torch.zeros(1, 1, 3).to(triton_device), points.to(triton_device), 6)
    assert index.tolist() == [[[1, 3, 5, 7, 9, 11]]] and not dist2.any()
    dist2, index = knn(torch.full((1, 1, 3), 0.5).to(triton_device), points.to(triton_device), 6)
    assert index.tolist() == [[[0, 1, 2, 3, 4, 5]]]


@pytest.mark.parametrize("k", [1, 2, 5])
def test_knn_in_torch_finds_ties_at_the_border_of_the_k_nearest(k):
    points = torch.zeros(1, 300, 3)
    points[0, :, 0] = torch.randperm(300, generator=torch.Generator().manual_seed(0)) // 2 + 1.0
    points[0, :k - 1, 0] = torch.linspace(0.1, 0.9, k)[:-1]  # k - 1 nearer ones, then ties at 1
    points[0, 100:, 0] = points[0, 100:, 0].clamp(max=1)
    dist2, index = knn(torch.zeros(1, 1, 3), points, k)
    assert_nearest(torch.zeros(1, 1, 3), points, dist2, index, exact=False)
    assert index[0, 0, -1] == (points[0, :, 0] == 1).nonzero()[0]


def test_knn_tells_points_apart_far_from_the_origin(triton_device):
    # |q|² - 2qp + |p|² would return 0 here for all of them: 1e7 has a spacing of 1 in float32
    points = torch.tensor([[[4000.0, 0, 0], [4000.5, 0, 0], [4000.25, 0, 0]]]).to(triton_device)
    dist2, index = knn(points[:, :1], points, 3)
    assert index.tolist() == [[[0, 2, 1]]] and dist2.tolist() == [[[0, 0.0625, 0.25]]]


def test_knn_sees_only_the_first_lengths_points(triton_device):
    points, query = make_cloud("random", 3, 60), make_cloud("random", 3, 4, seed=1)
    lengths = torch.tensor([60, 5, 9])
    moved = [t.to(triton_device) for t in (query, points, lengths)]
    dist2, index = knn(moved[0], moved[1], 5, lengths=moved[2])
    for b, n in enumerate(lengths):
        alone = knn_reference(query[b:b + 1], points[b:b + 1, :n], 5)
        assert torch.equal(dist2[b].cpu(), alone[0][0]) and torch.equal(index[b].cpu(), alone[1][0])


def test_knn_unchecked_pads_missing_neighbours(triton_device):
    points, query = make_cloud("random", 3, 9), make_cloud("random", 3, 2, seed=1)
    lengths = torch.tensor([9, 2, 0])
    query, points, lengths = (t.to(triton_device) for t in (query, points, lengths))
    for path in (knn_file.knn_triton, knn_file.knn_torch):
        dist2, index = (t.cpu() for t in path(query, points, 4, lengths))
        assert (index[1, :, 2:] == -1).all() and (dist2[1, :, 2:] == torch.inf).all()
        assert (index[2] == -1).all() and (dist2[2] == torch.inf).all()
        assert (index[0] >= 0).all() and (index[1, :, :2] >= 0).all()


def test_fps_unchecked_clamps_lengths_and_start(triton_device):
    xyz = make_cloud("random", 4, 9)
    start, lengths = torch.tensor([-5, 99, 0, 3]), torch.tensor([9, 9, 0, 10 ** 6])
    xyz, start, lengths = (t.to(triton_device) for t in (xyz, start, lengths))
    for path in (fps_file.fps_triton, fps_file.fps_torch):
        index = path(xyz, 5, start, lengths).cpu()
        assert index[:, 0].tolist() == [0, 8, 0, 3] and ((index >= 0) & (index < 9)).all()
        assert not index[2].any()  # one point, chosen again and again


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_knn_takes_other_dtypes_and_strides(triton_device, dtype):
    points = make_cloud("random", 2, 90, seed=3).repeat(1, 1, 2).to(dtype)[:, ::3, 1:4]
    query = points[:, ::7].flip(1)
    dist2, index = knn(query.to(triton_device), points.to(triton_device), 4)
    expected = knn_reference(query.float().contiguous(), points.float().contiguous(), 4)
    assert torch.equal(dist2.cpu(), expected[0]) and torch.equal(index.cpu(), expected[1])
    assert torch.equal(query.cpu(), points.cpu()[torch.arange(2)[:, None], index[..., 0].cpu()])


def test_knn_of_no_queries_is_empty(triton_device):
    points = torch.rand(2, 9, 3, device=triton_device)
    dist2, index = knn(points[:, :0], points, 4)
    assert dist2.shape == index.shape == (2, 0, 4)
    assert farthest_point_sample(points[:0], 4).shape == (0, 4)


@pytest.mark.parametrize("kind", ["random", "lattice"])
@pytest.mark.parametrize("B, M, N, k", [(40, 64, 300, 8), (2, 700, 2000, 20), (1, 3, 524293, 4)])
def test_knn_in_torch_is_the_same_in_one_piece_or_many(kind, B, M, N, k):
    points, query = make_cloud(kind, B, N), make_cloud(kind, B, M, seed=1)
    dist2, index = knn_reference(query, points, k)  # 2 clouds, 262 queries and 1 query at a time
    for b, m in ((0, 0), (B - 1, M - 1), (B // 2, M // 2)):
        assert_nearest(query[b:b + 1, m:m + 1], points[b:b + 1], dist2[b:b + 1, m:m + 1],
                       index[b:b + 1, m:m + 1], exact=kind == "lattice")


TREE_KINDS = ["random", "lattice", "same", "twice", "tiny", "far away", "lengths"]


@pytest.mark.parametrize("kind", TREE_KINDS)
@pytest.mark.parametrize("B, M, N, k", [(2, 40, 700, 16), (1, 9, 12, 8), (3, 1, 30, 30),
                                        (1, 700, 700, 64)])
def test_candidates_of_a_tree_give_the_bits_of_the_whole_table(kind, B, M, N, k):
    pytest.importorskip("scipy")
    g = torch.Generator().manual_seed(0)
    points, query = torch.rand(B, N, 3, generator=g), torch.rand(B, M, 3, generator=g)
    lengths = torch.full((B,), N)
    if kind == "lattice":  # many ties, also at the k-th distance
        points, query = (points * 8).round(), (query * 8).round()
    elif kind == "same":
        points = points[:, :1].expand(B, N, 3).contiguous()
    elif kind == "twice":
        points, query = points[:, torch.arange(N) // 2], points[:, torch.arange(M) % N]
    elif kind == "tiny":  # squares underflow in fp32, not in the tree
        points, query = points * 1e-20, query * 1e-20
    elif kind == "far away":  # fp32 coordinates are coarse there
        points, query = points + 1e5, query + 1e5
    elif kind == "lengths":
        lengths = torch.randint(k, N + 1, (B,), generator=g)
    dist2, index = knn_file.knn_tree(query, points, k, lengths)
    expected = knn_file.knn_torch(query, points, k, lengths)
    assert torch.equal(dist2, expected[0]) and torch.equal(index, expected[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("B, M, N, k", [(1, 1, 1, 1), (2, 40, 300, 16), (3, 5, 64, 64),
                                        (5, 2, 33, 1)])
def test_lists_of_numba_equal_torch(kind, B, M, N, k):
    pytest.importorskip("numba", reason="needs numba: compares its loop with torch")
    points, query = make_cloud(kind, B, N), make_cloud(kind, B, M, seed=1)
    lengths = torch.tensor([N, k, max(k, N // 2), N, k])[:B]
    expected = knn_reference(query, points, k, lengths)
    for function in (knn, knn_file.knn_lists):
        dist2, index = function(query, points, k, lengths)
        assert torch.equal(dist2, expected[0]) and torch.equal(index, expected[1])


def test_without_scipy_the_answers_are_the_same(monkeypatch):
    points = make_cloud("random", 1, 1500)
    ours = knn(points, points, 5)
    monkeypatch.setattr(knn_file, "cKDTree", None)
    monkeypatch.setattr(knn_file, "knn_tree", None)
    assert all(torch.equal(a, b) for a, b in zip(ours, knn(points, points, 5)))


def in_a_fresh_process(code, **environment):
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    clean.update(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="2", **environment)
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=clean,
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


@pytest.mark.parametrize("without", ["", "sys.modules['kernels.knn'].cKDTree = None"])
def test_neighbours_among_80_000_points_stay_within_bounded_memory(without):
    pytest.importorskip("resource", reason="needs Unix: reads the peak memory of a process")
    peak = in_a_fresh_process(f"""
        import resource, sys, torch
        from kernels import ball_query, knn
        {without}
        points = torch.rand(1, 80_000, 3)
        knn(points[:, :10], points, 16)  # torch loads libraries lazily
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        knn(points[:, :1500], points, 16)  # the table alone would take 480 MB
        ball_query(points[:, :1500], points, 0.4, 16)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
    """)
    assert float(peak) < 100, f"{float(peak):.0f} MB above the inputs"


# --------------------------------------------------------------------------------------- ball query

def ball_by_definition(query, points, radius, k, lengths=None):
    """The definition in NumPy's fp32, whose operations are rounded one by one."""
    index = np.full((*query.shape[:2], k), -1)
    radius = np.float32(radius)
    for b, m in np.ndindex(*query.shape[:2]):
        cloud = points[b].numpy()[:None if lengths is None else int(lengths[b])]
        dx, dy, dz = (query[b, m].numpy() - cloud).T
        found = np.flatnonzero((dx * dx + dy * dy) + dz * dz < radius * radius)[:k]
        index[b, m, :len(found)] = found
        index[b, m, len(found):] = found[0] if len(found) else -1
    return torch.from_numpy(index)


def ball_reference(query, points, radius, k, lengths=None):
    lengths = torch.full((len(points),), points.shape[1]) if lengths is None else lengths
    return ball_file.ball_torch(query.float(), points.float(), radius, k, lengths)


# of each kind, balls that hold few points, many points, or none
RADII = dict(random=0.35, clustered=8e-6, duplicated=0.35, collinear=0.4, lattice=2.0, sphere=1.0,
             identical=0.5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("B, M, N, k", [(1, 2, 1, 1), (2, 5, 300, 7), (5, 3, 33, 40),
                                        (1, 6, 300, 150)])
def test_ball_query_in_triton_equals_torch_and_the_definition(triton_device, kind, B, M, N, k):
    points = make_cloud(kind, B, N)
    query = torch.cat([points[:, N // 2:N // 2 + 1], make_cloud(kind, B, M - 1, seed=1)], 1)
    index = ball_query(query.to(triton_device), points.to(triton_device), RADII[kind], k)
    assert index.dtype == torch.int64 and index.shape == (B, M, k)
    expected = ball_by_definition(query, points, RADII[kind], k)
    assert torch.equal(index.cpu(), expected)
    assert torch.equal(ball_reference(query, points, RADII[kind], k), expected)
    assert (index[:, 0] >= 0).all()  # a point is in the ball around it


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("B, M, N, k", [(3, 40, 700, 1), (2, 9, 300, 16), (4, 5, 64, 600)])
def test_ball_query_in_numba_equals_torch(kind, B, M, N, k):
    pytest.importorskip("numba", reason="needs numba: compares its loop with torch")
    points, query = make_cloud(kind, B, N), make_cloud(kind, B, M, seed=1)
    lengths = torch.tensor([N, N // 2, 0, 1])[:B]
    expected = ball_reference(query, points, RADII[kind], k, lengths)
    assert torch.equal(expected, ball_by_definition(query, points, RADII[kind], k, lengths))
    for function in (ball_query, ball_file.ball_blocks):
        assert torch.equal(function(query, points, RADII[kind], k, lengths), expected)


def test_ball_query_takes_the_lowest_indices_repeats_the_first_and_marks_empty_balls(triton_device):
    points = torch.zeros(1, 9, 3)
    points[0, :, 0] = torch.tensor([5.0, 0.9, 0.1, 7.0, 0.2, 0.0, 0.3, 8.0, 0.4])
    query = torch.tensor([[[0.0, 0, 0], [5, 0, 0], [-3, 0, 0]]])
    index = ball_query(query.to(triton_device), points.to(triton_device), 0.5, 3)
    assert index.tolist() == [[[2, 4, 5], [0, 0, 0], [-1, -1, -1]]]  # the nearest is 5: not first
    index = ball_query(query.to(triton_device), points.to(triton_device), 0.5, 6)
    assert index.tolist() == [[[2, 4, 5, 6, 8, 2], [0] * 6, [-1] * 6]]


def test_a_point_at_the_radius_is_outside_and_the_radius_is_rounded_before_its_square(
        triton_device):
    points = torch.tensor([[[1.0, 0, 0], [0, 1, 0], [0, 0, 1 - 2 ** -24]]]).to(triton_device)
    query = torch.zeros(1, 1, 3, device=triton_device)
    assert ball_query(query, points, 1.0, 3).tolist() == [[[2, 2, 2]]]
    radius, rounded_after = np.float32(0.2), np.float32(0.2 * 0.2)
    assert rounded_after < radius * radius  # so a point may lie between the two
    x = np.nextafter(radius, np.float32(0))
    y = np.sqrt(rounded_after - x * x)
    assert x * x + y * y == rounded_after
    points = torch.tensor([[[float(radius), 0, 0], [float(x), float(y), 0]]]).to(triton_device)
    assert ball_query(query, points, 0.2, 1).tolist() == [[[1]]]


def test_ball_query_sees_only_the_first_lengths_points(triton_device):
    points, query = make_cloud("random", 4, 200), make_cloud("random", 4, 3, seed=1)
    lengths = torch.tensor([200, 129, 1, 0])
    moved = [t.to(triton_device) for t in (query, points, lengths)]
    index = ball_query(*moved[:2], 0.5, 20, lengths=moved[2]).cpu()
    assert torch.equal(index, ball_by_definition(query, points, 0.5, 20, lengths))
    assert (index < lengths[:, None, None]).all() and (index[3] == -1).all()
    assert torch.equal(ball_query(*moved[:2], 0.5, 20, lengths=moved[2].int()).cpu(), index)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter: inf - inf
def test_ball_query_unchecked_passes_over_nan_and_inf(triton_device):
    points, query = make_cloud("random", 2, 150), make_cloud("random", 2, 5, seed=1)
    points[0, :90] = torch.nan
    points[1, ::2, 1] = torch.inf
    query[0, 1] = torch.nan
    query[1, 2] = torch.inf
    moved = [t.to(triton_device) for t in (query, points, torch.tensor([150, 10 ** 6]))]
    for path in (ball_file.ball_triton, ball_file.ball_torch):
        index = path(*moved[:2], 0.6, 30, moved[2]).cpu()
        assert torch.equal(index, ball_by_definition(query, points, 0.6, 30))
        assert (index[0, 1] == -1).all() and (index[1, 2] == -1).all() and index.max() > 90


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_ball_query_takes_other_dtypes_and_strides(triton_device, dtype):
    points = make_cloud("random", 2, 90, seed=3).repeat(1, 1, 2).to(dtype)[:, ::3, 1:4]
    query = points[:, ::7].flip(1)
    index = ball_query(query.to(triton_device), points.to(triton_device), 0.4, 4)
    expected = ball_by_definition(query.float(), points.float(), 0.4, 4)
    assert torch.equal(index.cpu(), expected)


def test_ball_query_of_no_queries_or_no_points(triton_device):
    points = torch.rand(2, 9, 3, device=triton_device)
    assert ball_query(points[:, :0], points, 1.0, 4).shape == (2, 0, 4)
    assert ball_query(points[:0], points[:0], 1.0, 4).shape == (0, 9, 4)
    assert (ball_query(points, points[:, :0], 1.0, 4) == -1).all()


@pytest.mark.parametrize("kind", ["random", "lattice"])
@pytest.mark.parametrize("B, M, N, k", [(2, 700, 2000, 20), (1, 3, 524293, 4)])
def test_ball_query_in_torch_is_the_same_in_one_piece_or_many(kind, B, M, N, k):
    points, query = make_cloud(kind, B, N), make_cloud(kind, B, M, seed=1)
    index = ball_reference(query, points, 0.1, k)  # 262 queries, or one, at a time
    some = [0, M // 2, M - 1]
    assert torch.equal(index[:, some], ball_by_definition(query[:, some], points, 0.1, k))


@pytest.mark.parametrize("kind", ["random", "clustered", "lattice", "identical"])
@pytest.mark.parametrize("B, M, N, k", [(8, 300, 40000, 64), (2, 256, 2048, 512),
                                        (1, 9, 10 ** 6, 3)])
def test_ball_query_of_large_clouds_equals_torch_on_a_gpu(kind, B, M, N, k):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA card: too slow in the interpreter")
    points = make_cloud(kind, B, N)
    query = torch.cat([points[:, :M // 2], make_cloud(kind, B, M - M // 2, seed=1)], 1)
    lengths = torch.full((B,), N) - torch.arange(B)
    index = ball_query(query.cuda(), points.cuda(), RADII[kind] / 4, k, lengths.cuda())
    assert torch.equal(index.cpu(), ball_reference(query, points, RADII[kind] / 4, k, lengths))


# ------------------------------------------------------------------------------------ interpolation

def interpolate_case(B=2, N=17, S=30, C=20, dtype=torch.float32, seed=0):
    query, points = make_cloud("random", B, N, seed), make_cloud("random", B, S, seed + 1)
    g = torch.Generator().manual_seed(seed)
    feats, grad = torch.randn(B, S, C, generator=g), torch.randn(B, N, C, generator=g)
    return query, points, feats.to(dtype), grad.to(dtype)


def brute_interpolate(query, points, feats, k):  # float64, the docstring's formula
    table = table64(query, points)
    order = np.argsort(table, -1, kind="stable")[..., :k]
    weight = 1 / (np.take_along_axis(table, order, -1) + 1e-8)
    weight /= weight.sum(-1, keepdims=True)
    f = feats.double().numpy()
    return np.stack([(weight[b][..., None] * f[b][order[b]]).sum(1) for b in range(len(f))])


# fp32 sums of k <= 8 terms; half and bf16 round once, at the end: half a unit in the last place
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("B, N, S, C, k", [(2, 17, 30, 20, 3), (1, 1, 1, 1, 1), (1, 20, 9, 65, 8)])
def test_interpolation_and_its_gradient_in_triton_equal_torch(triton_device, monkeypatch, dtype,
                                                              B, N, S, C, k):
    query, points, feats, grad = interpolate_case(B, N, S, C, dtype)
    results = {}
    for path, device in (("triton", triton_device), ("torch", torch.device("cpu"))):
        if path == "torch":
            monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        leaf = feats.to(device, copy=True).requires_grad_()
        out = interpolate(query.to(device), points.to(device), leaf, k)
        out.backward(grad.to(device))
        assert out.dtype == leaf.grad.dtype == dtype
        results[path] = out.detach().cpu(), leaf.grad.cpu()
    close = dict(rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(*(results[path][0] for path in results), **close)
    torch.testing.assert_close(*(results[path][1] for path in results), **close)
    truth = brute_interpolate(query, points, feats, k)
    np.testing.assert_allclose(results["triton"][0].double().numpy(), truth, **close)


def test_interpolation_has_the_gradient_of_its_formula():
    query, points, feats, _ = interpolate_case(B=2, N=5, S=6, C=3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda f: interpolate(query, points, f), feats.requires_grad_())


def test_source_points_that_nobody_uses_get_zero_gradient(triton_device):
    _, points, feats, _ = interpolate_case(B=1, N=2, S=30, C=8)
    points, feats = points.to(triton_device), feats.to(triton_device).requires_grad_()
    interpolate(points[:, :2], points, feats, k=1).sum().backward()
    assert (feats.grad[:, :2] == 1).all() and (feats.grad[:, 2:] == 0).all()


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_a_query_on_a_source_point_gets_its_feature_exactly(triton_device, scale):
    _, points, feats, _ = interpolate_case(B=2, S=12)
    points, feats = (points * scale).to(triton_device), feats.to(triton_device)
    assert torch.equal(interpolate(points, points, feats), feats)


def test_coincident_source_points_share_equally(triton_device):
    _, points, feats, _ = interpolate_case(B=1, S=12)
    points[:, 5] = points[:, 2]
    points = points.to(triton_device)
    out = interpolate(points[:, 2:3], points, feats.to(triton_device))
    torch.testing.assert_close(out.cpu(), (feats[:, 2:3] + feats[:, 5:6]) / 2)


def test_interpolation_uses_only_the_first_lengths_points(triton_device):
    query, points, feats, _ = interpolate_case(B=2, S=12)
    lengths = torch.tensor([12, 4])
    feats[1, 4:] = torch.nan
    moved = [t.to(triton_device) for t in (query, points, feats, lengths)]
    out = interpolate(*moved[:3], lengths=moved[3]).cpu()
    torch.testing.assert_close(out[1:], interpolate(query[1:], points[1:, :4], feats[1:, :4]))


def test_interpolation_of_no_queries_or_no_channels_is_empty(triton_device):
    query, points, feats, _ = interpolate_case()
    for q, f in ((query[:, :0], feats), (query, feats[..., :0])):
        f = f.to(triton_device).requires_grad_()
        out = interpolate(q.to(triton_device), points.to(triton_device), f)
        assert out.shape == (2, q.shape[1], f.shape[2])
        out.sum().backward()
        assert not f.grad.any()


# -------------------------------------------------------------------------------------------- splat

def picture_of(kind, B, N, H, W, seed=0):
    """Points in and around a picture; depths on both sides of 0."""
    xyz = make_cloud("random", B, N, seed) * torch.tensor([W + 6.0, H + 6.0, 2.0])
    xyz = xyz - torch.tensor([3.0, 3.0, 1.0])
    if kind == "lattice":  # equal depths, 0 among them with both signs, and borders met exactly
        xyz = (xyz * 4).round() / 4
    elif kind == "flat":
        xyz[..., 2] = -0.75
    elif kind == "identical":
        xyz = xyz[:, :1].expand(-1, N, -1).clone()
    elif kind == "far away":  # most are outside, and some by so much that no integer holds them
        xyz[..., :2] *= 10.0 ** torch.arange(N)[:, None].remainder(17)
    return xyz


def splat_by_numpy(xyz, H, W, radius):
    """The definition in fp32, without keys: the nearest points draw last, in descending order."""
    xyz = xyz.numpy()
    index = np.full((len(xyz), H, W), -1)
    depth = np.full((len(xyz), H, W), np.inf, np.float32)
    half = np.float32(0.5)
    column, row = np.arange(W, dtype=np.float32) + half, np.arange(H, dtype=np.float32) + half
    for b, cloud in enumerate(xyz):
        for n in sorted(range(len(cloud)), key=lambda n: (cloud[n, 2], n), reverse=True):
            dx, dy = column - cloud[n, 0], (row - cloud[n, 1])[:, None]
            covers = dx * dx + dy * dy <= np.float32(radius) * np.float32(radius)
            index[b][covers], depth[b][covers] = n, cloud[n, 2]
    return index, depth


def assert_same_picture(found, expected):
    for name, a, b in zip(("index", "depth"), found, expected):
        np.testing.assert_array_equal(a.cpu().numpy(), np.asarray(b), err_msg=name)


PICTURES = [("random", 2, 70, 9, 14, 1.5), ("random", 1, 40, 14, 9, 0.3),
            ("random", 1, 9, 1, 1, 2.0), ("random", 3, 5, 1, 17, 0.5),
            ("lattice", 2, 90, 8, 8, 1.25), ("flat", 1, 60, 7, 11, 2.24),
            ("identical", 2, 9, 6, 6, 1.0), ("far away", 1, 72, 12, 10, 4.0)]


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # 1e18 squared
@pytest.mark.parametrize("kind, B, N, H, W, radius", PICTURES)
def test_splat_in_triton_equals_torch_and_the_definition(triton_device, kind, B, N, H, W, radius):
    xyz = picture_of(kind, B, N, H, W)
    index, depth = splat(xyz.to(triton_device), H, W, radius)
    assert index.dtype == torch.int64 and depth.dtype == torch.float32
    assert index.shape == depth.shape == (B, H, W)
    expected = splat_by_numpy(xyz, H, W, radius)
    assert (expected[0] >= 0).any()
    assert_same_picture((index, depth), expected)
    assert_same_picture(splat_file.splat_torch(xyz, H, W, radius), expected)


def test_splat_of_discs_wider_than_a_block_of_columns_and_than_the_picture(triton_device):
    for H, W, radius in ((5, 40, 17.5), (3, 6, 1000.0)):
        xyz = picture_of("random", 1, 3, H, W)
        found = splat(xyz.to(triton_device), H, W, radius)
        assert_same_picture(found, splat_by_numpy(xyz, H, W, radius))


@pytest.mark.parametrize("kind, B, N, H, W, radius", PICTURES)
def test_splat_in_one_loop_of_numba_equals_torch(kind, B, N, H, W, radius):
    pytest.importorskip("numba", reason="needs numba: compares its loop with torch")
    xyz = picture_of(kind, B, N, H, W)
    expected = splat_file.splat_torch(xyz, H, W, radius)
    assert_same_picture(splat_file.splat_loop(xyz, H, W, radius), expected)
    assert_same_picture(splat(xyz, H, W, radius), expected)


def test_without_numba_splat_draws_the_same_picture(monkeypatch):
    xyz = picture_of("lattice", 2, 90, 8, 8)
    ours = splat(xyz, 8, 8, 1.25)
    monkeypatch.setattr(splat_file, "numba", None)
    monkeypatch.setattr(splat_file, "splat_loop", None)
    assert_same_picture(splat(xyz, 8, 8, 1.25), ours)


@pytest.mark.parametrize("function", ["splat_torch", "splat_loop"])
@pytest.mark.parametrize("radius", [0.3, 0.5, 0.75, 2.24, 3.0])
def test_splat_misses_no_pixel_in_the_last_columns_of_the_widest_picture(function, radius):
    if function == "splat_loop":
        pytest.importorskip("numba", reason="needs numba: compares its loop with the definition")
    W = splat_file.LARGEST  # a float has only eight bits left below the point here
    for xyz in (picture_of("random", 1, 300, 1, 9), picture_of("lattice", 1, 300, 1, 9)):
        xyz[..., 0] += W - 9
        found = getattr(splat_file, function)(xyz, 1, W, radius)
        expected = splat_by_numpy(xyz, 1, W, radius)
        assert (expected[0][0, 0, -9:] >= 0).all() or radius < 1
        assert_same_picture(found, expected)


def test_splat_draws_the_picture_drawn_by_hand(triton_device):
    xyz = torch.tensor([[[2.5, 1.5, 5.0],  # in the centre of column 2, row 1: a cross of radius 1
                         [4.0, 2.0, 5.0],  # on the corner of four pixels, √½ away from each
                         [2.5, 0.5, 4.0],  # nearer than the first
                         [0.1, 2.9, 1.0]]])  # √.32 away from its pixel's centre alone
    index, depth = splat(xyz.to(triton_device), 3, 5, 1.0)
    assert index.tolist() == [[[-1, 2, 2, 2, -1],
                               [-1, 0, 2, 0, 1],
                               [3, -1, 0, 1, 1]]]
    assert depth[0, 1].tolist() == [float("inf"), 5, 4, 5, 5]


def test_splat_includes_the_circle_itself_and_nothing_beyond(triton_device):
    xyz = torch.tensor([[[0.5 + 1.5, 0.5, 0.0]]]).to(triton_device)  # 1.5 from the first centre
    assert splat(xyz, 1, 1, 1.5)[0].item() == 0
    assert splat(xyz, 1, 1, float(np.nextafter(np.float32(1.5), 0)))[0].item() == -1


def test_splat_orders_negative_depths_and_takes_both_zeros_for_equal(triton_device):
    depths = torch.tensor([0.0, -0.0, -1e-30, -2.0, -1.0])
    xyz = torch.full((5, 5, 3), 0.5)
    for b in range(5):  # cloud b holds the points b, b + 1, ...; the others are far away
        xyz[b, :, 2] = depths
        xyz[b, :b, 0] = 100.0
    index, depth = splat(xyz.to(triton_device), 1, 1, 0.25)
    assert index.flatten().tolist() == [3, 3, 3, 3, 4]
    index, depth = splat(xyz[:2, :2].to(triton_device), 1, 1, 0.25)
    assert index.flatten().tolist() == [0, 1]
    assert not torch.signbit(depth).any()  # -0 is returned as 0, on every device


def test_splat_of_no_points_or_no_clouds_is_an_empty_picture(triton_device):
    for B, N in ((2, 0), (0, 5), (0, 0)):
        index, depth = splat(torch.zeros(B, N, 3, device=triton_device), 3, 4, 1.0)
        assert index.shape == depth.shape == (B, 3, 4)
        assert (index == -1).all() and (depth == float("inf")).all()


def test_splat_unchecked_leaves_points_with_nan_or_without_a_depth_out(triton_device):
    xyz = torch.full((1, 5, 3), 0.5)
    xyz[0, 0, 0], xyz[0, 1, 1], xyz[0, 2, 2], xyz[0, 3, 2] = (torch.nan,) * 3 + (torch.inf,)
    arguments = xyz.to(triton_device), 2, 2, 0.75, False
    index, depth = torch.ops.nanoepcl.splat(*arguments)
    assert index.tolist() == [[[4, -1], [-1, -1]]]
    assert_same_picture(splat_file.splat_torch(xyz, 2, 2, 0.75), (index.cpu(), depth.cpu()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_splat_takes_other_dtypes_and_strides(triton_device, dtype):
    xyz = picture_of("random", 2, 30, 6, 7).to(dtype).transpose(0, 1).contiguous().transpose(0, 1)
    index, _ = splat(xyz.to(triton_device), 6, 7, 1.5)
    assert torch.equal(index.cpu(), splat_file.splat_torch(xyz.float(), 6, 7, 1.5)[0])


@pytest.mark.skipif(not torch.cuda.is_available(),
                    reason="needs a CUDA card: compares large pictures with torch")
@pytest.mark.parametrize("B, N, H, W, radius", [
    (320, 1024, 224, 224, 2.24), (1, 200_000, 1024, 1024, 2.0), (3, 5000, 300, 7, 60.0)])
def test_splat_of_large_pictures_equals_torch_on_a_gpu(B, N, H, W, radius):
    for kind in ("random", "lattice"):
        xyz = picture_of(kind, B, N, H, W).cuda()
        assert_same_picture(splat(xyz, H, W, radius),
                            [x.cpu() for x in splat_file.splat_torch(xyz, H, W, radius)])


# -------------------------------------------------------------------------------------- all of them

def test_every_function_returns_the_same_bits_again(triton_device):
    query, points, feats, grad = (t.to(triton_device) for t in interpolate_case(N=40, S=12))
    runs = []
    for _ in range(2):
        leaf = feats.clone().requires_grad_()
        out = interpolate(query, points, leaf)
        out.backward(grad)
        runs.append([farthest_point_sample(points, 9), *knn(query[:, :5], points, 4),
                     ball_query(query[:, :5], points, 0.5, 4), out.detach(), leaf.grad,
                     *splat(query, 1, 2, 0.5)])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


BAD_FPS = [
    (dict(xyz=torch.rand(5, 3)), "xyz must be (B, N, 3), not (5, 3)"),
    (dict(xyz=torch.rand(2, 5, 4)), "must be (B, N, 3), not (2, 5, 4)"),
    (dict(xyz=torch.ones(2, 5, 3).long()), "pass floating-point coordinates"),
    (dict(xyz=torch.rand(2, 0, 3)), "clouds of 0 points"),
    (dict(m=0), "m = 0 samples"),
    (dict(m=21), "m = 21 samples from clouds of 20 points; pass m in 1 .. N"),
    (dict(start=20), "start = 20 is outside clouds of 20 points"),
    (dict(start=-1), "start = -1"),
    (dict(start=torch.tensor([0, 20])), "start = [0, 20] must lie in 0 .. lengths - 1"),
    (dict(start=torch.tensor([0, 9]), lengths=torch.tensor([20, 9])), "lengths = [20, 9]"),
    (dict(start=torch.tensor([0])), "start must be (2,) integers"),
    (dict(start=torch.tensor([0.0, 1.0])), "start must be (2,) integers"),
    (dict(lengths=torch.tensor([20, 3])), "lengths go from 3 to 20, must lie in m = 5 .. N = 20"),
    (dict(lengths=torch.tensor([21, 20])), "lengths go from 20 to 21"),
    (dict(lengths=torch.tensor([20, 20], device="meta")), "on cpu, not (2,) torch.int64 on meta"),
    (dict(xyz=torch.full((2, 20, 3), torch.nan)), "xyz holds 40 points with NaN"),
]
BAD_KNN = [
    (dict(query=torch.rand(5, 3)), "query must be (B, N, 3), not (5, 3)"),
    (dict(points=torch.rand(2, 20, 2)), "points must be (B, N, 3), not (2, 20, 2)"),
    (dict(points=torch.ones(2, 20, 3).int()), "points is torch.int32"),
    (dict(points=torch.rand(3, 20, 3)), "points has 3 clouds on cpu, but query has 2"),
    (dict(points=torch.rand(2, 20, 3, device="meta")), "pass one batch on one device"),
    (dict(points=torch.rand(2, 0, 3)), "clouds of 0 points"),
    (dict(k=0), "k = 0; pass k in 1 .. 64"),
    (dict(k=32), "knn: k = 32 neighbours from clouds of 20 points; pass k <= 20 or larger clouds"),
    (dict(points=torch.rand(2, 90, 3), k=65), "k = 65; pass k in 1 .. 64"),
    (dict(lengths=torch.tensor([20, 3])), "lengths go from 3 to 20, must lie in k = 5 .. N = 20"),
    (dict(lengths=torch.tensor([20])), "lengths must be (2,) integers"),
    (dict(query=torch.tensor([[[0, 0, torch.inf]], [[0, 0, 0]]])), "query holds 1 points with NaN"),
    (dict(points=torch.full((2, 20, 3), 1e30)), "40 points with NaN, Inf or values beyond 1e18"),
]
BAD_BALL = [
    (dict(query=torch.rand(5, 3)), "ball_query: query must be (B, N, 3), not (5, 3)"),
    (dict(points=torch.rand(2, 20, 2)), "points must be (B, N, 3), not (2, 20, 2)"),
    (dict(points=torch.rand(3, 20, 3)), "points has 3 clouds on cpu, but query has 2"),
    (dict(k=0), "ball_query: k = 0; pass at least 1"),
    (dict(radius=0.0), "radius = 0.0; pass one from 1e-18 to 1e18"),
    (dict(radius=-1), "radius = -1; pass one from"),
    (dict(radius=float("nan")), "radius = nan; pass one from"),
    (dict(lengths=torch.tensor([20, -1])), "lengths go from -1 to 20, must lie in 0 .. N = 20"),
    (dict(lengths=torch.tensor([21, 3])), "lengths go from 3 to 21"),
    (dict(lengths=torch.tensor([20])), "ball_query: lengths must be (2,) integers"),
    (dict(query=torch.full((2, 5, 3), torch.inf)), "ball_query: query holds 10 points with NaN"),
]
BAD_INTERPOLATE = [
    (dict(query=torch.rand(2, 5, 2)), "interpolate: query must be (B, N, 3)"),
    (dict(feats=torch.rand(2, 19, 4)), "one row for each point, not (2, 19, 4)"),
    (dict(feats=torch.rand(2, 20)), "feats must be (2, 20, C)"),
    (dict(feats=torch.ones(2, 20, 4).long()), "feats is torch.int64"),
    (dict(k=0), "k = 0 neighbours from clouds of 20 points; pass k in 1 .. 8"),
    (dict(k=9), "k = 9 neighbours from clouds of 20 points"),
    (dict(points=torch.rand(2, 2, 3), feats=torch.rand(2, 2, 4)), "k = 3 neighbours from clouds"),
    (dict(query=torch.full((2, 5, 3), torch.nan)), "query holds 10 points with NaN"),
]
BAD_SPLAT = [
    (dict(xyz=torch.rand(5, 3)), "xyz must be (B, N, 3), not (5, 3)"),
    (dict(xyz=torch.rand(2, 5, 4)), "must be (B, N, 3), not (2, 5, 4)"),
    (dict(xyz=torch.ones(2, 5, 3).long()), "pass floating-point coordinates"),
    (dict(H=0), "a picture of 0 x 4 pixels; pass 1 .. 32768 of each"),
    (dict(W=32769), "a picture of 3 x 32769 pixels"),
    (dict(radius=0), "radius = 0 pixels; pass one above 0, up to 32768"),
    (dict(radius=-1.0), "radius = -1.0 pixels"),
    (dict(radius=1e5), "radius = 100000.0 pixels"),
    (dict(radius=torch.nan), "radius = nan pixels"),
    (dict(xyz=torch.full((2, 20, 3), torch.nan)), "xyz holds 40 points with NaN"),
    (dict(xyz=torch.tensor([[[0, 0, torch.inf], [0, 0, 0]]])), "xyz holds 1 points with NaN, Inf"),
]
GOOD = {farthest_point_sample: dict(xyz=torch.rand(2, 20, 3), m=5),
        knn: dict(query=torch.rand(2, 5, 3), points=torch.rand(2, 20, 3), k=5),
        ball_query: dict(query=torch.rand(2, 5, 3), points=torch.rand(2, 20, 3), radius=0.5, k=5),
        interpolate: dict(query=torch.rand(2, 5, 3), points=torch.rand(2, 20, 3),
                          feats=torch.rand(2, 20, 4)),
        splat: dict(xyz=torch.rand(2, 20, 3), H=3, W=4, radius=0.5)}


def refuses(function, change, message):
    with pytest.raises(ValueError) as caught:
        function(**{**GOOD[function], **change})
    assert message in str(caught.value)


@pytest.mark.parametrize("change, message", BAD_FPS, ids=[m for _, m in BAD_FPS])
def test_fps_refuses_bad_input_and_says_what_to_do(change, message):
    refuses(farthest_point_sample, change, message)


@pytest.mark.parametrize("change, message", BAD_KNN, ids=[m for _, m in BAD_KNN])
def test_knn_refuses_bad_input_and_says_what_to_do(change, message):
    refuses(knn, change, message)


@pytest.mark.parametrize("change, message", BAD_BALL, ids=[m for _, m in BAD_BALL])
def test_ball_query_refuses_bad_input_and_says_what_to_do(change, message):
    refuses(ball_query, change, message)


@pytest.mark.parametrize("change, message", BAD_INTERPOLATE, ids=[m for _, m in BAD_INTERPOLATE])
def test_interpolation_refuses_bad_input_and_says_what_to_do(change, message):
    refuses(interpolate, change, message)


@pytest.mark.parametrize("change, message", BAD_SPLAT, ids=[m for _, m in BAD_SPLAT])
def test_splat_refuses_bad_input_and_says_what_to_do(change, message):
    refuses(splat, change, message)


def test_cuda_checks_values_only_on_request(triton_device):
    if triton_device.type != "cuda":
        pytest.skip("needs a CUDA card: there the check would synchronise host and device")
    for function, good in GOOD.items():
        bad = {k: v.cuda() if torch.is_tensor(v) else v for k, v in good.items()}
        name = "xyz" if "xyz" in bad else "points"
        bad[name] = bad[name].index_fill(1, torch.tensor([3], device="cuda"), torch.nan)
        function(**bad)
        with pytest.raises(ValueError, match="holds 2 points with NaN"):
            function(**bad, check=True)


def test_public_functions_have_the_agreed_signatures():
    names = {f.__name__: list(inspect.signature(f).parameters) for f in GOOD}
    assert names == dict(farthest_point_sample=["xyz", "m", "start", "lengths", "check"],
                         knn=["query", "points", "k", "lengths", "check"],
                         ball_query=["query", "points", "radius", "k", "lengths", "check"],
                         interpolate=["query", "points", "feats", "k", "lengths", "check"],
                         splat=["xyz", "H", "W", "radius", "check"])


def op_arguments(device):
    query, points, feats, grad = (t.to(device) for t in interpolate_case(N=5, S=6, C=3))
    lengths = torch.full((2,), 6, device=device)
    source = torch.randint(0, 12, (2, 5, 3)).to(device)
    weight = torch.rand(2, 5, 3).to(device)
    return {"farthest_point_sample": (points, 3, torch.zeros_like(lengths), lengths, True),
            "knn": (query, points, 2, lengths, True),
            "ball_query": (query, points, 0.5, 9, lengths, True),
            "interpolate": (feats.requires_grad_(), source, weight),
            "interpolate_backward": (grad, source, weight, 6),
            "splat": (points, 3, 2, 0.5, True)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("B, S, shape, C", [(2, 30, (7, 4), 20), (1, 5, (40,), 3),
                                            (3, 9, (1, 1), 70)])
def test_group_gathers_rows_and_sums_their_gradients_in_a_fixed_order(triton_device, B, S, shape, C,
                                                                      dtype):
    g = torch.Generator().manual_seed(0)
    feats = torch.randn(B, S, C, generator=g).to(triton_device, dtype).requires_grad_()
    idx = torch.randint(max(1, S - 2), (B, *shape), generator=g).to(triton_device)
    grad = torch.randn(B, *shape, C, generator=g).to(triton_device, dtype)
    out = group(feats, idx)
    expected = torch.stack([cloud[i] for cloud, i in zip(feats.double(), idx)])
    assert out.dtype == dtype and torch.equal(out.double(), expected)
    gradient, = torch.autograd.grad(out, feats, grad)
    truth, = torch.autograd.grad(expected, feats, grad.double())
    torch.testing.assert_close(gradient.double(), truth.double(), rtol=0.01, atol=1e-5)
    again, = torch.autograd.grad(group(feats, idx), feats, grad)
    assert torch.equal(again, gradient)
    assert not gradient[:, S - 1].any(), "nobody asked for the last row"


def test_rows_that_need_a_gradient_are_gathered_by_group_on_a_gpu(triton_device):
    values = torch.randn(2, 9, 4, device=triton_device)
    idx = torch.randint(9, (2, 5, 3), device=triton_device)
    plain = common.gather(values, idx)
    wanted = common.gather(values.requires_grad_(), idx)
    assert torch.equal(plain, wanted)
    assert "GatherBackward0" not in str([wanted.grad_fn, *wanted.grad_fn.next_functions])


def test_a_gpu_on_which_triton_cannot_run_takes_the_torch_path(monkeypatch, capsys):
    launch_file = importlib.import_module("kernels.launch")
    monkeypatch.setattr(launch_file, "failed", set())
    gpu, cpu = SimpleNamespace(is_cuda=True), torch.zeros(1)
    tried = []

    def no_compiler():
        tried.append(1)
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    for _ in range(3):
        assert launch_file.launch("knn", gpu, no_compiler, lambda: "torch") == "torch"
    assert len(tried) == 1, "it is not tried again"
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and printed.startswith("knn: Triton cannot run it here (Runtim")
    assert "Failed to find C compiler. Please" in printed and "gcc or clang" in printed
    assert launch_file.launch("splat", gpu, lambda: "triton", lambda: "torch") == "triton"
    with pytest.raises(RuntimeError, match="C compiler"):  # the interpreter: a mistake in a kernel
        launch_file.launch("splat", cpu, no_compiler, lambda: "torch")

    # a file that checks itself must not call torch's result its own
    with pytest.raises(SystemExit):
        launch_file.fastest(lambda: "torch", torch.device("cpu"))

    def no_memory():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):  # torch needs more memory, not less
        launch_file.launch("splat", gpu, no_memory, lambda: "torch")


OPERATORS = ["farthest_point_sample", "knn", "ball_query", "interpolate", "interpolate_backward",
             "splat"]


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_passes_opcheck_in_torch(name):
    operator = getattr(torch.ops.nanoepcl, name).default
    torch.library.opcheck(operator, op_arguments(torch.device("cpu"))[name])


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_passes_opcheck_in_triton(triton_device, name):
    operator = getattr(torch.ops.nanoepcl, name).default
    torch.library.opcheck(operator, op_arguments(triton_device)[name])


def grouped_features(xyz, feats):  # all functions in a row, as a model would use them
    centres = xyz.gather(1, farthest_point_sample(xyz, 4)[..., None].expand(-1, -1, 3))
    dist2, index = knn(centres, xyz, 5)
    return (interpolate(xyz, centres, feats) * 2, dist2, index, ball_query(centres, xyz, 0.5, 6),
            *splat(8 * xyz, 8, 9, 1.5))


def test_torch_compile_passes_through_without_a_graph_break():
    xyz, feats = make_cloud("random", 2, 30), torch.randn(2, 4, 8, requires_grad=True)
    plain = grouped_features(xyz, feats)
    compiled = torch.compile(grouped_features, fullgraph=True, backend="aot_eager")
    for a, b in zip(plain, compiled(xyz, feats)):
        assert torch.equal(a, b)
    gradients = [torch.autograd.grad(f(xyz, feats)[0].sum(), feats)[0]
                 for f in (grouped_features, compiled)]
    assert torch.equal(*gradients)
    with pytest.raises(ValueError, match="holds 60 points with NaN"):  # compiled, too
        compiled(xyz * torch.nan, feats)


def test_coordinates_get_no_gradient():
    xyz = torch.rand(1, 9, 3, requires_grad=True)
    assert not knn(xyz, xyz, 2)[0].requires_grad
    feats = torch.rand(1, 9, 4, requires_grad=True)
    interpolate(xyz[:, :3], xyz, feats).sum().backward()
    assert xyz.grad is None and feats.grad is not None


def test_everything_runs_where_triton_is_absent():
    assert in_a_fresh_process("""
        import sys
        sys.modules["triton"] = None  # import triton raises ImportError
        import torch
        from kernels import ball_query, farthest_point_sample, interpolate, knn, splat
        xyz, feats = torch.rand(2, 50, 3), torch.rand(2, 50, 4, requires_grad=True)
        farthest_point_sample(xyz, 9)
        knn(xyz, xyz, 4)
        ball_query(xyz, xyz, 0.3, 4)
        interpolate(xyz, xyz, feats).sum().backward()
        splat(xyz, 8, 9, 0.5)
        print("fine")
    """, TRITON_INTERPRET="1") == "fine\n"
