"""Nearest neighbours: for each query the k closest points of its cloud.

    dist2[b, m], index[b, m] = the k smallest pairs (|query[b, m] - points[b, n]|², n) over all n

query (B, M, 3), points (B, N, 3) -> dist2 (B, M, k) float32 ascending, index (B, M, k) int64;
equal distances are ordered by index. 9·B·M·N operations. The grouping of PointNet++ (arXiv
1706.02413), section 3.2, with a fixed number of neighbours. Distances are fp32, (dx·dx + dy·dy) +
dz·dz without fused multiply-add, so CPU, interpreter and GPU return the same bits;
|q|² - 2qp + |p|² would cancel the digits that decide between neighbours.

The full distance matrix takes 4·B·M·N bytes, 25.6 GB for 80,000 x 80,000. torch computes it in
pieces that fit in cache; the Triton kernel keeps k candidates per query in registers and writes
only the result, 12·B·M·k bytes. On a CPU, clouds of more than FEW points get candidates from a
k-d tree (scipy), ranked by the same fp32 distances and indices; smaller clouds take a loop in numba
where it is installed.

    python kernels/knn.py
"""
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

if __package__:
    from .launch import fastest, launch, machine, use_triton
else:  # run as a script
    from launch import fastest, launch, machine, use_triton

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows: every call takes the torch path
    triton = None

try:
    from scipy.spatial import cKDTree
except ImportError:  # same result without it, only slower
    cKDTree = None

try:
    import numba
except ImportError:  # optional: without it, small clouds take 3x as long on a CPU
    numba = None

MAX_K = 64
FEW = 1024  # up to this many points, a tree is no faster than all distances on a CPU
PIECE = 2 ** 19  # distances at a time in torch, at least one row of N: 2 MB, under 40 MB in all


def knn_torch(query, points, k, lengths):  # -> (B, M, k) float32, (B, M, k) int64
    (B, M, _), N = query.shape, points.shape[1]
    dist2 = torch.empty(B, M, k, device=query.device)
    index = torch.empty(B, M, k, dtype=torch.int64, device=query.device)
    clouds = max(1, PIECE // (M * N))  # per piece
    rows = max(1, PIECE // N)
    n = torch.arange(N, device=query.device)
    for b in range(0, B, clouds):
        x, y, z = points[b:b + clouds].permute(2, 0, 1)[:, :, None].contiguous()  # (b, 1, N)
        missing = n >= lengths[b:b + clouds, None, None]
        for i in range(0, M, rows):
            qx, qy, qz = query[b:b + clouds, i:i + rows].permute(2, 0, 1)[..., None]  # (b, rows, 1)
            d = (qx - x).square_().add_((qy - y).square_()).add_((qz - z).square_())
            d.masked_fill_(missing, float("inf"))
            values, indices = d.topk(min(k + 1, N), largest=False)  # k + 1: shows ties at the k-th
            tied = (values[..., 1:] == values[..., :-1]).any(-1)
            values, indices = values[..., :k], indices[..., :k]
            if tied.any():  # topk orders ties arbitrarily: redo those rows with unique keys
                key = d[tied].view(torch.int32).long() << 32 | n  # the bits sort like the floats
                indices[tied] = key.topk(k, largest=False).values & 0xFFFFFFFF
            dist2[b:b + clouds, i:i + rows] = values
            index[b:b + clouds, i:i + rows] = indices.masked_fill(values == float("inf"), -1)
    return dist2, index


def knn_tree(query, points, k, lengths):
    """`knn_torch` with candidates from a k-d tree, which computes distances in float64.

    The tree returns k + 2 candidates. A point beyond the last one, at distance r, has an fp32
    squared distance of at least (1 - 1e-6) r², six roundings of 6e-8 each. Where this does not
    exceed the k-th distance, as with many ties, `knn_torch` answers the query.
    """
    B, M, _ = query.shape
    dist2 = torch.empty(B, M, k)
    index = torch.empty(B, M, k, dtype=torch.int64)
    for b in range(B):
        cloud = points[b, :int(lengths[b])]
        tree = cKDTree(cloud.numpy())
        candidates = min(k + 2, len(cloud))
        ranks = range(1, candidates + 1)
        for rows in torch.arange(M).split(max(1, PIECE // (4 * candidates))):
            q = query[b, rows]  # (m, 3)
            r, n = tree.query(q.numpy(), ranks, workers=torch.get_num_threads())
            n = torch.from_numpy(n)  # (m, candidates)
            dx, dy, dz = (q[:, None] - cloud[n]).unbind(-1)
            d = (dx * dx + dy * dy) + dz * dz
            key = d.view(torch.int32).long() << 32 | n  # the bits sort like the floats
            key = key.sort(1).values[:, :k]
            dist2[b, rows] = (key >> 32).int().view(torch.float32)
            index[b, rows] = key & 0xFFFFFFFF
            bound = torch.from_numpy(r[:, -1] ** 2 * (1 - 1e-6))
            # below about 1e-37 squares underflow in fp32, and a relative bound says nothing
            unsure = bound <= dist2[b, rows, -1] + 1e-37
            if candidates < len(cloud) and unsure.any():
                rows = rows[unsure]
                redone = knn_torch(query[b:b + 1, rows], points[b:b + 1], k, lengths[b:b + 1])
                dist2[b, rows], index[b, rows] = redone[0][0], redone[1][0]
    return dist2, index


if numba:
    @numba.njit(nogil=True)  # without fastmath: nothing is fused or reordered
    def _knn_lists(query, planes, dist2, index):
        # query (M, 3), planes (3, N): x, y, z. An insertion sort into dist2, index (M, k). Points
        # come in the order of their index and never displace an equal distance: ties are ordered
        x, y, z = planes[0], planes[1], planes[2]
        d = np.empty(len(x), np.float32)
        last = dist2.shape[1] - 1
        for m in range(len(query)):
            qx, qy, qz = query[m, 0], query[m, 1], query[m, 2]
            for n in range(len(d)):
                dx, dy, dz = qx - x[n], qy - y[n], qz - z[n]
                d[n] = (dx * dx + dy * dy) + dz * dz
            nearest, ids = dist2[m], index[m]
            nearest[:] = np.inf
            worst = nearest[last]
            for n in range(len(d)):
                if d[n] < worst:
                    j = last
                    while j > 0 and nearest[j - 1] > d[n]:
                        nearest[j], ids[j] = nearest[j - 1], ids[j - 1]
                        j -= 1
                    nearest[j], ids[j] = d[n], n
                    worst = nearest[last]


def knn_lists(query, points, k, lengths):
    """`knn_torch` for small clouds on a CPU, in one loop. Clouds run in parallel threads."""
    B, M, _ = query.shape
    workers = min(torch.get_num_threads(), B)
    dist2 = torch.empty(B, M, k)
    index = torch.empty(B, M, k, dtype=torch.int64)

    def search_clouds(worker):
        for b in range(worker, B, workers):
            planes = np.ascontiguousarray(points[b, :int(lengths[b])].numpy().T)
            _knn_lists(query[b].numpy(), planes, dist2[b].numpy(), index[b].numpy())

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(search_clouds, range(workers)))
    return dist2, index


if triton:
    @triton.jit
    def _pack(dist2, n):  # one int64 that sorts by distance, ties by index
        return (dist2.to(tl.int32, bitcast=True).to(tl.int64) << 32) | n.to(tl.int64)

    @triton.jit
    def _distance(key):
        return (key >> 32).to(tl.int32).to(tl.float32, bitcast=True)

    @triton.jit(do_not_specialize=["M", "N", "k", "tiles"])  # no recompilation for new sizes
    def _knn(query, points, lengths, dist2, index, M, N, k, tiles,
             BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
        # one program: BLOCK_M queries of one cloud, whose points it reads BLOCK_N at a time. best
        # (BLOCK_M, BLOCK_K) holds the nearest so far, unsorted; a nearer point replaces the worst
        b = (tl.program_id(0) // tiles).to(tl.int64)  # int64: b * N * 3 may exceed 2^31
        m = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
        length = tl.minimum(tl.load(lengths + b).to(tl.int32), N)
        q = query + (b * M + m) * 3
        qx = tl.load(q, m < M, 0.0)[:, None]
        qy = tl.load(q + 1, m < M, 0.0)[:, None]
        qz = tl.load(q + 2, m < M, 0.0)[:, None]
        INF: tl.constexpr = 0x7F800000
        DONE: tl.constexpr = 0x7FFFFFFFFFFFFFFF
        # first pass: the minimum of each of BLOCK_N lanes. The k smallest belong to k points, so no
        # neighbour lies beyond the k-th. It leaves about 1.3 k insertions whatever the order of the
        # points; without it: k log(N / k) in random order, N in the worst case
        nearest = tl.full([BLOCK_M, BLOCK_N], float("inf"), tl.float32)
        for first in range(0, length, BLOCK_N):
            n = first + tl.arange(0, BLOCK_N)
            p = points + (b * N + n) * 3
            dx = qx - tl.load(p, n < length, float("inf"))[None, :]
            dy = qy - tl.load(p + 1, n < length, 0.0)[None, :]
            dz = qz - tl.load(p + 2, n < length, 0.0)[None, :]
            nearest = tl.minimum(nearest, (dx * dx + dy * dy) + dz * dz)
        kth = tl.min(nearest, 1)
        for i in range(1, k):
            nearest = tl.where(nearest == kth[:, None], float("inf"), nearest)
            kth = tl.min(nearest, 1)
        # points at or beyond `bound` are skipped; < bound means <= kth
        bound = tl.minimum(kth.to(tl.int32, bitcast=True) + 1, INF)
        empty = bound[:, None].to(tl.int64) << 32  # + slot: all keys are unique
        slot = tl.arange(0, BLOCK_K)[None, :].to(tl.int64) + tl.zeros([BLOCK_M, BLOCK_K], tl.int64)
        best = tl.where(slot < k, empty + slot, -1)  # -1: slots beyond k are never the worst
        worst = tl.max(best, 1)  # (BLOCK_M,)
        for first in range(0, length, BLOCK_N):
            n = first + tl.arange(0, BLOCK_N)
            p = points + (b * N + n) * 3
            dx = qx - tl.load(p, n < length, 0.0)[None, :]
            dy = qy - tl.load(p + 1, n < length, 0.0)[None, :]
            dz = qz - tl.load(p + 2, n < length, 0.0)[None, :]
            d = (dx * dx + dy * dy) + dz * dz  # (BLOCK_M, BLOCK_N)
            d = tl.where((n < length)[None, :], d, float("inf"))
            # most tiles end at this fp32 comparison. < is enough: points come in the order of their
            # index and never displace an equal distance
            while tl.max((d < _distance(worst)[:, None]).to(tl.int32)) > 0:
                key = _pack(d, n[None, :])
                new = tl.min(key, 1)  # each query's nearest in the tile; ties: lowest index
                take = _distance(new) < _distance(worst)
                best = tl.where(take[:, None] & (best == worst[:, None]), new[:, None], best)
                worst = tl.max(best, 1)
                d = tl.where(key == new[:, None], float("inf"), d)
        best = tl.where(slot < k, best, DONE)
        for i in range(k):  # write in ascending order
            new = tl.min(best, 1)
            best = tl.where(best == new[:, None], DONE, best)
            out = (b * M + m) * k + i
            tl.store(dist2 + out, _distance(new), m < M)
            tl.store(index + out, tl.where((new >> 32) < INF, new & 0xFFFFFFFF, -1), m < M)


def blocks(k):
    """Block sizes for k neighbours: within 8 % of the best for all N on an H100.

    One warp per program, so there are no barriers; BLOCK_N >= MAX_K lanes.
    """
    BLOCK_K = 32 if k <= 32 else 64  # 16 spills registers under triton 3.6, and is no faster
    return dict(BLOCK_M=4, BLOCK_N=128, BLOCK_K=BLOCK_K, num_warps=1)


def knn_triton(query, points, k, lengths):
    (B, M, _), N = query.shape, points.shape[1]
    config = blocks(k)
    dist2 = torch.empty(B, M, k, device=query.device)
    index = torch.empty(B, M, k, dtype=torch.int64, device=query.device)
    tiles = triton.cdiv(M, config["BLOCK_M"])
    with torch.cuda.device_of(query):  # Triton launches on the current device
        _knn[(B * tiles,)](query, points, lengths, dist2, index, M, N, k, tiles, **config,
                           enable_fp_fusion=False)
    return dist2, index


@torch.library.custom_op("nanoepcl::knn", mutates_args=())
def _operator(query: torch.Tensor, points: torch.Tensor, k: int, lengths: torch.Tensor,
              check: bool) -> tuple[torch.Tensor, torch.Tensor]:
    (B, M, _), N = query.shape, points.shape[1]
    if check and B:  # inside the operator, so that torch.compile keeps the checks
        check_values("knn", query, points)
        low, high = int(lengths.min()), int(lengths.max())
        if low < k or high > N:
            raise ValueError(f"knn: lengths go from {low} to {high}, must lie in k = {k} .. N = "
                             f"{N}; pass a smaller k or larger clouds")
    if B * M == 0:
        empty = torch.empty(B, M, k, device=query.device)
        return empty, empty.long()
    if use_triton(query):
        return launch("knn", query, lambda: knn_triton(query, points, k, lengths),
                      lambda: knn_torch(query, points, k, lengths))
    on_cpu = query.device.type == "cpu"
    if on_cpu and N <= FEW and numba:
        return knn_lists(query, points, k, lengths)
    if on_cpu and N > FEW and cKDTree:
        return knn_tree(query, points, k, lengths)
    return knn_torch(query, points, k, lengths)


@_operator.register_fake
def _(query, points, k, lengths, check):
    shape = (query.shape[0], query.shape[1], k)
    return query.new_empty(shape), query.new_empty(shape, dtype=torch.int64)


def check_clouds(name, query, points):
    for what, xyz in (("query", query), ("points", points)):
        if xyz.dim() != 3 or xyz.shape[-1] != 3:
            raise ValueError(f"{name}: {what} must be (B, N, 3), not {tuple(xyz.shape)}")
        if not xyz.is_floating_point():
            raise ValueError(f"{name}: {what} is {xyz.dtype}; pass floating-point coordinates")
    if len(points) != len(query) or points.device != query.device:
        raise ValueError(f"{name}: points has {len(points)} clouds on {points.device}, but query "
                         f"has {len(query)} on {query.device}; pass one batch on one device")


def lengths_of(name, points, lengths):
    B, N, _ = points.shape
    if lengths is None:
        return torch.full((B,), N, dtype=torch.int64, device=points.device)
    if lengths.shape != (B,) or lengths.is_floating_point() or lengths.device != points.device:
        raise ValueError(f"{name}: lengths must be ({B},) integers on {points.device}, not "
                         f"{tuple(lengths.shape)} {lengths.dtype} on {lengths.device}")
    return lengths.contiguous()


def check_values(name, query, points):
    for what, xyz in (("query", query), ("points", points)):
        bad = xyz.numel() // 3 - int((xyz.abs() <= 1e18).all(-1).sum())  # NaN fails, too
        if bad:
            raise ValueError(f"{name}: {what} holds {bad} points with NaN, Inf or values beyond "
                             "1e18; remove them when the data is read")


def knn(query, points, k, lengths=None, check=None):
    """The k nearest of points (B, N, 3) to each query (B, M, 3): dist2 and index, both (B, M, k).

    k         1 .. 64, and at most the points of each cloud
    lengths   (B,) integers: only the first lengths[b] points of cloud b exist
    check     raise on NaN, Inf, and lengths out of range. Always done on the CPU; on CUDA only with
              check=True, since it synchronises host and device. Unchecked, missing neighbours and
              those at a distance of NaN or Inf have index -1 and dist2 inf
    dist2 carries no gradient: recompute it from the gathered points where one is needed.
    """
    check_clouds("knn", query, points)
    N = points.shape[1]
    if k > N:
        raise ValueError(f"knn: k = {k} neighbours from clouds of {N} points; "
                         f"pass k <= {N} or larger clouds")
    if not 1 <= k <= MAX_K:
        raise ValueError(f"knn: k = {k}; pass k in 1 .. {MAX_K}, the limit of the kernel")
    check = bool(check) or query.device.type == "cpu"
    return _operator(query.detach().float().contiguous(), points.detach().float().contiguous(), k,
                     lengths_of("knn", points, lengths), check)


def _brute_force(query, points, k):  # float64, all distances, a stable sort
    table = (query[:, :, None].double() - points[:, None].double()).square().sum(-1)
    dist2, index = table.sort(dim=-1, stable=True)
    return dist2[..., :k].float(), index[..., :k]


def main():
    device, where = machine(numba)
    shapes = [(2, 8, 300, 5), (2, 16, 3000, 16)]
    if device.type == "cuda":
        shapes = [(32, 64, 1024, 32), (1, 20000, 20000, 16), (8, 2048, 40000, 64)]
    for B, M, N, k in shapes:
        points = torch.rand(B, N, 3, device=device)
        query = torch.rand(B, M, 3, device=device)
        reference = "torch" if use_triton(query) else "brute force"
        if reference == "brute force":  # a lattice: ties, and distances exact in fp32
            points = (points * 64).round() / 64
            query = (query * 64).round() / 64
        seconds, (dist2, index) = fastest(lambda: knn(query, points, k), device)
        full = torch.full((B,), N, device=device)
        if reference == "torch":
            d, n = knn_torch(query, points, k, full)
        else:
            d, n = _brute_force(query, points, k)
        wrong = ((index != n) | (dist2 != d)).nonzero().tolist()
        if wrong:
            i = tuple(wrong[0])
            sys.exit(f"DIFFERS on {where}: {k} of {B} x {N} for {M} queries, {len(wrong)} of "
                     f"{B * M * k}, first at {i}: index {int(index[i])}, dist2 {float(dist2[i])}, "
                     f"{reference}: {int(n[i])}, {float(d[i])}")
    print(f"ok: knn agrees with {reference} on {where}, torch {torch.__version__}, triton "
          f"{triton.__version__ if triton else 'absent'}: {k} of {B} x {N} points for {M} queries "
          f"in {seconds * 1e3:.1f} ms, {12 * B * (M + N + M * k) / 1e6:.1f} MB moved")


if __name__ == "__main__":
    main()
