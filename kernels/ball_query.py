"""Ball query: for each query the first k points of its cloud that lie within a radius.

    index[b, m] = the k smallest n with |query[b, m] - points[b, n]|² < radius²

query (B, M, 3), points (B, N, 3) -> index (B, M, k) int64, ascending. A ball of fewer points
repeats its first one; a ball without any is -1 throughout. The grouping of PointNet++ (arXiv
1706.02413), section 3.2, as in pointnet2_ops, 3DETR and EPCL's detector: in a shuffled cloud the
first k are a random choice, which fills the ball however dense it is; the k nearest do not.
Squared distances are fp32, (dx·dx + dy·dy) + dz·dz without fused multiply-add, and radius² is the
fp32 square of the fp32 radius: CPU, interpreter and GPU find the same points.

9·B·M·N operations at most: a query that has its k points reads no further. torch computes all
distances, in pieces that fit in cache. The Triton kernel keeps them in registers and writes only
the result, 8·B·M·k bytes. On a CPU with numba, a loop over 256 points at a time replaces torch: 8
times as fast for the patches of 8 rooms of 40,000 points, in one thread.

    python kernels/ball_query.py
"""
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

if __package__:
    from .knn import check_clouds, check_values, lengths_of
    from .launch import fastest, launch, machine, use_triton
else:  # run as a script
    from knn import check_clouds, check_values, lengths_of
    from launch import fastest, launch, machine, use_triton

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows: every call takes the torch path
    triton = None

try:
    import numba
except ImportError:  # optional, CPU only: same result without it
    numba = None

PIECE = 2 ** 19  # distances at a time in torch, at least one row of N
BLOCKS = dict(BLOCK_M=1, BLOCK_N=128, num_warps=1)  # one warp: no barriers. Best on an H100


def square(radius):
    """radius² as all implementations compare with it: rounded to fp32 before and after."""
    return float(np.float32(radius) * np.float32(radius))


def ball_torch(query, points, radius, k, lengths):  # -> (B, M, k) int64
    (B, M, _), N = query.shape, points.shape[1]
    index = torch.full((B, M, k), -1, device=query.device)
    n = torch.arange(N, device=query.device)
    rows = max(1, PIECE // max(1, N))
    for b in range(B):
        x, y, z = points[b].T.contiguous()  # (N,)
        for i in range(0, M, rows):
            qx, qy, qz = query[b, i:i + rows].T[..., None]  # (rows, 1)
            d = (qx - x).square_().add_((qy - y).square_()).add_((qz - z).square_())
            hit = (d < square(radius)) & (n < lengths[b])  # (rows, N)
            row, found = hit.nonzero().T  # in the order of rows, then of indices
            count = hit.sum(1)  # (rows,)
            place = torch.arange(len(row), device=query.device) - (count.cumsum(0) - count)[row]
            kept = place < k
            out = index[b, i:i + rows]
            out[row[kept], place[kept]] = found[kept]
            missing = torch.arange(k, device=query.device) >= count[:, None]
            out.copy_(torch.where(missing, out[:, :1], out))
    return index


if numba:
    @numba.njit(nogil=True)  # without fastmath: nothing is fused or reordered
    def _ball_blocks(query, planes, radius2, index):
        # query (M, 3), planes (3, N): x, y, z; index (M, k). LLVM vectorises the loop over a block;
        # most blocks hold no point of the ball and end there
        x, y, z = planes[0], planes[1], planes[2]
        k = index.shape[1]
        hit = np.empty(256, np.uint8)
        for m in range(len(query)):
            qx, qy, qz = query[m, 0], query[m, 1], query[m, 2]
            count = 0
            for first in range(0, len(x), 256):
                xs, ys, zs = x[first:first + 256], y[first:first + 256], z[first:first + 256]
                hits = hit[:len(xs)]
                for n in range(len(xs)):
                    dx, dy, dz = qx - xs[n], qy - ys[n], qz - zs[n]
                    hits[n] = (dx * dx + dy * dy) + dz * dz < radius2
                some = np.uint8(0)
                for n in range(len(xs)):
                    some |= hits[n]
                if some:
                    for n in range(len(xs)):
                        if hits[n] and count < k:
                            index[m, count] = first + n
                            count += 1
                    if count == k:
                        break
            index[m, count:] = index[m, 0] if count else -1


def ball_blocks(query, points, radius, k, lengths):
    """`ball_torch` on a CPU, in one loop. Clouds run in parallel threads."""
    B, M, _ = query.shape
    workers = min(torch.get_num_threads(), B)
    index = torch.empty(B, M, k, dtype=torch.int64)

    def search_clouds(worker):
        for b in range(worker, B, workers):
            planes = np.ascontiguousarray(points[b, :int(lengths[b])].numpy().T)
            _ball_blocks(query[b].numpy(), planes, np.float32(square(radius)), index[b].numpy())

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(search_clouds, range(workers)))
    return index


if triton:
    @triton.jit(do_not_specialize=["M", "N", "k", "tiles"])  # no recompilation for new sizes
    def _ball_query(query, points, lengths, index, radius2, M, N, k, tiles,
                    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
        # one program: BLOCK_M queries of one cloud, whose points it reads BLOCK_N at a time until
        # each of its queries has k of them
        b = (tl.program_id(0) // tiles).to(tl.int64)  # int64: b * N * 3 may exceed 2^31
        m = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
        length = tl.minimum(tl.load(lengths + b).to(tl.int32), N)
        q = query + (b * M + m) * 3
        qx = tl.load(q, m < M, 0.0)[:, None]
        qy = tl.load(q + 1, m < M, 0.0)[:, None]
        qz = tl.load(q + 2, m < M, 0.0)[:, None]
        out = (index + (b * M + m) * k)[:, None]  # (BLOCK_M, 1) pointers
        NONE: tl.constexpr = 0x7FFFFFFF
        count = tl.where(m < M, 0, k)  # of points found; a row beyond M waits for none
        lowest = tl.full([BLOCK_M], NONE, tl.int32)
        first = 0
        while (first < length) & (tl.min(count, 0) < k):
            n = first + tl.arange(0, BLOCK_N)
            p = points + (b * N + n) * 3
            dx = qx - tl.load(p, n < length, float("inf"))[None, :]  # inf: never within
            dy = qy - tl.load(p + 1, n < length, 0.0)[None, :]
            dz = qz - tl.load(p + 2, n < length, 0.0)[None, :]
            hit = (dx * dx + dy * dy) + dz * dz < radius2  # (BLOCK_M, BLOCK_N)
            if tl.max(hit.to(tl.int32)) > 0:  # most tiles end here
                found = tl.where(hit, n[None, :], NONE)
                lowest = tl.minimum(lowest, tl.min(found, 1))
                place = count[:, None] + tl.cumsum(hit.to(tl.int32), 1) - 1
                tl.store(out + place, found.to(tl.int64), hit & (place < k))
                count += tl.sum(hit.to(tl.int32), 1)
            first += BLOCK_N
        padding = tl.where(lowest < NONE, lowest, -1).to(tl.int64)[:, None]
        for first in range(0, k, BLOCK_N):
            slot = first + tl.arange(0, BLOCK_N)[None, :]
            tl.store(out + slot, padding + tl.zeros([BLOCK_M, BLOCK_N], tl.int64),
                     (slot >= count[:, None]) & (slot < k) & (m < M)[:, None])


def ball_triton(query, points, radius, k, lengths, config=BLOCKS):
    (B, M, _), N = query.shape, points.shape[1]
    index = torch.empty(B, M, k, dtype=torch.int64, device=query.device)
    tiles = triton.cdiv(M, config["BLOCK_M"])
    with torch.cuda.device_of(query):  # Triton launches on the current device
        _ball_query[(B * tiles,)](query, points, lengths, index, square(radius), M, N, k, tiles,
                                  **config, enable_fp_fusion=False)
    return index


@torch.library.custom_op("nanoepcl::ball_query", mutates_args=())
def _operator(query: torch.Tensor, points: torch.Tensor, radius: float, k: int,
              lengths: torch.Tensor, check: bool) -> torch.Tensor:
    (B, M, _), N = query.shape, points.shape[1]
    if check and B:  # inside the operator, so that torch.compile keeps the checks
        check_values("ball_query", query, points)
        low, high = int(lengths.min()), int(lengths.max())
        if low < 0 or high > N:
            raise ValueError(f"ball_query: lengths go from {low} to {high}, must lie in 0 .. N = "
                             f"{N}")
    if B * M == 0:
        return torch.empty(B, M, k, dtype=torch.int64, device=query.device)
    if use_triton(query):
        return launch("ball_query", query,
                      lambda: ball_triton(query, points, radius, k, lengths),
                      lambda: ball_torch(query, points, radius, k, lengths))
    if query.device.type == "cpu" and numba:
        return ball_blocks(query, points, radius, k, lengths)
    return ball_torch(query, points, radius, k, lengths)


@_operator.register_fake
def _(query, points, radius, k, lengths, check):
    return query.new_empty((query.shape[0], query.shape[1], k), dtype=torch.int64)


def ball_query(query, points, radius, k, lengths=None, check=None):
    """The first k of points (B, N, 3) nearer than radius to each query (B, M, 3): index (B, M, k).

    radius    1e-18 .. 1e18. A point exactly that far away is not within it
    k         at least 1, and may exceed N
    lengths   (B,) integers: only the first lengths[b] points of cloud b exist
    check     raise on NaN, Inf, and lengths out of range. Always done on the CPU; on CUDA only with
              check=True, since it synchronises host and device. Unchecked, points at NaN or Inf are
              in no ball
    A ball of c < k points has its first point in the places c .. k - 1, too. A ball without points
    is -1 in all places, which is no index: it cannot happen to a query that is one of the points.
    """
    check_clouds("ball_query", query, points)
    if not 1e-18 <= radius <= 1e18:
        raise ValueError(f"ball_query: radius = {radius}; pass one from 1e-18 to 1e18, whose "
                         "square fp32 can hold")
    if k < 1:
        raise ValueError(f"ball_query: k = {k}; pass at least 1")
    lengths = lengths_of("ball_query", points, lengths)
    check = bool(check) or query.device.type == "cpu"
    return _operator(query.detach().float().contiguous(), points.detach().float().contiguous(),
                     float(radius), k, lengths, check)


def _brute_force(query, points, radius, k):  # float64, all distances, a stable sort
    table = (query[:, :, None].double() - points[:, None].double()).square().sum(-1)
    within, index = (table < radius ** 2).sort(dim=-1, descending=True, stable=True)
    place = torch.arange(k, device=query.device).minimum(within.sum(-1, keepdim=True) - 1)
    first = index.gather(-1, place.clamp(min=0))
    repeated = torch.where(place < torch.arange(k, device=query.device), first[..., :1], first)
    return repeated.masked_fill(~within[..., :1], -1)


def main():
    device, where = machine(numba)
    shapes = [(2, 8, 300, 0.25, 5), (2, 16, 3000, 0.25, 80)]
    if device.type == "cuda":
        shapes = [(8, 256, 2048, 0.5, 512), (1, 20000, 20000, 0.05, 16),
                  (8, 2048, 40000, 0.07, 64)]
    for B, M, N, radius, k in shapes:
        points = torch.rand(B, N, 3, device=device)
        query = torch.rand(B, M, 3, device=device)
        reference = "torch" if use_triton(query) else "brute force"
        if reference == "brute force":  # a lattice: distances are exact, many equal the radius
            points = (points * 16).round() / 16
            query = (query * 16).round() / 16
        seconds, index = fastest(lambda: ball_query(query, points, radius, k), device)
        full = torch.full((B,), N, device=device)
        if reference == "torch":
            expected = ball_torch(query, points, radius, k, full)
        else:
            expected = _brute_force(query, points, radius, k)
        wrong = (index != expected).nonzero().tolist()
        if wrong:
            i = tuple(wrong[0])
            sys.exit(f"DIFFERS on {where}: {k} of {B} x {N} within {radius} of {M} queries, "
                     f"{len(wrong)} of {B * M * k}, first at {i}: {int(index[i])}, {reference}: "
                     f"{int(expected[i])}")
    print(f"ok: ball_query agrees with {reference} on {where}, torch {torch.__version__}, triton "
          f"{triton.__version__ if triton else 'absent'}: {k} of {B} x {N} points within {radius} "
          f"of {M} queries in {seconds * 1e3:.1f} ms, "
          f"{(12 * B * (M + N) + 8 * B * M * k) / 1e6:.1f} MB moved")


if __name__ == "__main__":
    main()
