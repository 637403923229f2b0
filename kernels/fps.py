"""Farthest point sampling: m points of a cloud, each the farthest from all samples before it.

    index[b, 0] = start[b]
    index[b, i] = argmax_n min_{j < i} |xyz[b, n] - xyz[b, index[b, j]]|²      (ties: lowest n)

PointNet++ (arXiv 1706.02413), section 3.2. xyz (B, N, 3) -> index (B, m) int64, 10·B·N·m
operations. Distances are fp32, (dx·dx + dy·dy) + dz·dz without fused multiply-add, so that all
implementations below choose the same points. Clouds are independent, but the m steps of a cloud
are sequential: the run time is m times the latency of one step.

    fps_torch        reference implementation. Memory traffic: 60·B·N·m bytes
    fps_boxes        CPU with numba: points are grouped in bounding boxes, and a step skips the
                     boxes that the new sample cannot affect
    _fps_registers   GPU, up to 8,192 points: one program per cloud holds points and distances in
                     registers; 12·B·N + 8·B·m bytes in all
    _fps_round       GPU, larger clouds: several programs share a cloud and find dozens of samples
                     per launch; 24·B·N bytes a launch, 16 + sqrt(m) launches
    _fps_rest        GPU, the few clouds that need more rounds: reads the cloud from L2 in every
                     step, 20·B·N bytes a sample

    python kernels/fps.py
"""
import math
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
    import numba
    from scipy.spatial import cKDTree
except ImportError:  # optional, CPU only: same result without them, about 10x slower
    numba = None

IN_REGISTERS = ((1024, 4), (2048, 4), (4096, 8), (8192, 8))  # largest N, warps: best on an H100
STREAMED = (4096, 16)  # of _fps_rest: points per iteration, warps
FEW = 256  # up to this many samples, sorting a cloud costs a CPU more than it saves


def fps_torch(xyz, m, start, lengths):  # (B, N, 3), (B,), (B,) -> (B, m)
    B, N, _ = xyz.shape
    lengths = lengths.clamp(1, N)
    far = torch.minimum(start.clamp(min=0), lengths - 1).long()[:, None]
    planes = xyz.permute(2, 0, 1).contiguous()  # (3, B, N): x of all clouds, then y, then z
    square = torch.empty_like(planes)
    nearest = torch.full((B, N), float("inf"), device=xyz.device)  # to the closest sample
    nearest.masked_fill_(torch.arange(N, device=xyz.device) >= lengths[:, None], -1.0)
    index = torch.empty(B, m, dtype=torch.int64, device=xyz.device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a step is too short to parallelise: 100x slower on busy cores
    try:
        for i in range(m):
            index[:, i:i + 1] = far
            torch.sub(planes, planes.gather(2, far.expand(3, B, 1)), out=square)
            square.mul_(square)
            distance = square[0].add_(square[1]).add_(square[2])
            torch.minimum(nearest, distance, out=nearest)
            torch.argmax(nearest, 1, keepdim=True, out=far)  # torch returns the first maximum
    finally:
        torch.set_num_threads(threads)
    return index


if numba:
    @numba.njit(nogil=True)  # without fastmath: nothing is fused or reordered
    def _fps_boxes(planes, order, low, high, size, far, index):
        # planes (3, N): x, y, z of one cloud, sorted so that `size` consecutive points lie close
        # together; order (N,): their indices; low, high (3, boxes): their bounding boxes. A box is
        # skipped if the new sample is at least as far from it as any of its points is from the
        # samples before; rounding is monotone, so the bound needs no margin
        x, y, z = planes[0], planes[1], planes[2]
        N = len(x)
        boxes = low.shape[1]
        nearest = np.full(N, np.inf, np.float32)
        bits = nearest.view(np.int32)  # same order as the floats; an integer maximum vectorises
        distance = np.empty(boxes, np.float32)  # from the new sample to each box
        radius = np.full(boxes, np.inf, np.float32)  # the largest `nearest` in each box
        farthest = np.zeros(boxes, np.int64)  # and its position; ties: lowest index
        zero = np.float32(0)
        for i in range(len(index)):
            index[i] = order[far]
            cx, cy, cz = x[far], y[far], z[far]
            for k in range(boxes):
                dx = max(max(low[0, k] - cx, cx - high[0, k]), zero)
                dy = max(max(low[1, k] - cy, cy - high[1, k]), zero)
                dz = max(max(low[2, k] - cz, cz - high[2, k]), zero)
                distance[k] = (dx * dx + dy * dy) + dz * dz
            best = np.float32(-1)
            for k in range(boxes):
                if distance[k] < radius[k]:
                    first = k * size
                    end = min(first + size, N)
                    # slices that start at 0 and one loop per operation: so LLVM vectorises them
                    xs, ys, zs = x[first:end], y[first:end], z[first:end]
                    near, near_bits = nearest[first:end], bits[first:end]
                    for n in range(len(xs)):
                        dx, dy, dz = xs[n] - cx, ys[n] - cy, zs[n] - cz
                        d = (dx * dx + dy * dy) + dz * dz
                        near[n] = d if d < near[n] else near[n]
                    most = np.int32(-1)
                    for n in range(len(xs)):
                        most = max(most, near_bits[n])
                    winner = -1
                    for n in range(first, end):
                        if bits[n] == most and (winner < 0 or order[n] < order[winner]):
                            winner = n
                    radius[k] = nearest[winner]
                    farthest[k] = winner
                tied = radius[k] == best and order[farthest[k]] < order[far]
                if radius[k] > best or tied:
                    best = radius[k]
                    far = farthest[k]


def fps_boxes(xyz, m, start, lengths):
    """`fps_torch` on a CPU, skipping boxes that cannot change. Clouds run in parallel threads."""
    index = torch.empty(len(xyz), m, dtype=torch.int64)
    workers = min(torch.get_num_threads(), len(xyz))

    def sample_clouds(worker):
        for b in range(worker, len(xyz), workers):
            cloud = xyz[b, :int(lengths[b])].numpy()
            if m <= FEW:  # one box: nothing is skipped
                size = len(cloud)
                order = np.arange(size)
            else:  # in the order of a k-d tree, 64 consecutive points lie close together
                size = 64
                order = cKDTree(cloud, size, balanced_tree=False, compact_nodes=False).indices
            planes = np.ascontiguousarray(cloud[order].T)
            firsts = np.arange(0, len(cloud), size)
            low = np.minimum.reduceat(planes, firsts, axis=1)
            high = np.maximum.reduceat(planes, firsts, axis=1)
            far = int(np.flatnonzero(order == int(start[b]))[0])
            _fps_boxes(planes, order, low, high, size, far, index[b].numpy())

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(sample_clouds, range(workers)))
    return index


if triton:
    @triton.jit
    def _point(cloud, n):
        return tl.load(cloud + n * 3), tl.load(cloud + n * 3 + 1), tl.load(cloud + n * 3 + 2)

    @triton.jit
    def _square(dx, dy, dz):
        return (dx * dx + dy * dy) + dz * dz

    @triton.jit(do_not_specialize=["N", "m"])  # no recompilation for a new size
    def _fps_registers(xyz, start, lengths, index, N, m, BLOCK: tl.constexpr):
        # one program per cloud; all vectors are (BLOCK,) and stay in registers for all m steps
        b = tl.program_id(0).to(tl.int64)  # int64: b * N * 3 may exceed 2^31
        length = tl.minimum(tl.maximum(tl.load(lengths + b).to(tl.int32), 1), N)
        far = tl.minimum(tl.maximum(tl.load(start + b), 0), length - 1).to(tl.int32)
        n = tl.arange(0, BLOCK)
        cloud = xyz + b * N * 3
        x = tl.load(cloud + n * 3, n < length, 0.0)
        y = tl.load(cloud + n * 3 + 1, n < length, 0.0)
        z = tl.load(cloud + n * 3 + 2, n < length, 0.0)
        nearest = tl.where(n < length, float("inf"), -1.0)  # -1: padding is never the maximum
        for i in range(m):
            tl.store(index + b * m + i, far.to(tl.int64))
            cx, cy, cz = _point(cloud, far)
            nearest = tl.minimum(nearest, _square(x - cx, y - cy, z - cz))
            far = tl.argmax(nearest, 0, tie_break_left=True).to(tl.int32)

    @triton.jit
    def _key(distance, n):  # one int64 that sorts by distance, ties by descending index
        return (distance.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (0x7FFFFFFF - n)

    @triton.jit(do_not_specialize=["N", "m", "B", "turn"])
    def _fps_round(xyz, lengths, nearest, mail, done, index, N, m, B, turn,
                   PROGRAMS: tl.constexpr, BLOCK: tl.constexpr, BEST: tl.constexpr):
        # PROGRAMS programs share one cloud, each owns BLOCK of its points, and one launch is one
        # round. The launch before left in `mail` the keys of the BEST farthest points of each
        # program, in descending order. The key of any other point is at most `bound`, the largest
        # of the last keys, and keys only decrease. So every program runs FPS on the listed points
        # alone; while the farthest of them reaches `bound`, it is the farthest of the whole cloud.
        # A round yields at least one sample, typically dozens (kaolin does the same with one
        # sorted list). Then each program leaves its own list for the next launch.
        #
        # No program waits for another: the end of a launch is the barrier. Two mail boxes and a
        # row of `done` per round keep what is read apart from what is written.
        g = tl.program_id(0)
        b = tl.program_id(1).to(tl.int64)
        i = tl.load(done + turn.to(tl.int64) * B + b)  # samples so far
        if i < m:
            length = tl.minimum(tl.maximum(tl.load(lengths + b).to(tl.int32), 1), N)
            lane = tl.arange(0, BLOCK)
            n = (lane // 8 * PROGRAMS + g) * 8 + lane % 8  # a region is shared by all programs
            cloud = xyz + b * N * 3
            x = tl.load(cloud + n * 3, n < length, 0.0)
            y = tl.load(cloud + n * 3 + 1, n < length, 0.0)
            z = tl.load(cloud + n * 3 + 2, n < length, 0.0)
            near = tl.load(nearest + b * N + n, n < length, 0.0)
            slot = tl.arange(0, PROGRAMS * BEST)
            key = tl.load(mail + (turn % 2 * B + b) * PROGRAMS * BEST + slot)
            bound = tl.max(tl.where(slot % BEST == BEST - 1, key, 0), 0)
            real = key > 0  # 0: an empty slot
            candidate = tl.where(real, 0x7FFFFFFF - (key & 0x7FFFFFFF), 0)
            distance = (key >> 32).to(tl.int32).to(tl.float32, bitcast=True)
            px, py, pz = _point(cloud, candidate)
            largest = tl.max(key, 0)
            while (largest >= bound) & (i < m):
                far = (0x7FFFFFFF - (largest & 0x7FFFFFFF)).to(tl.int32)
                if g == 0:
                    tl.store(index + b * m + i, far.to(tl.int64))
                cx, cy, cz = _point(cloud, far)
                near = tl.minimum(near, _square(x - cx, y - cy, z - cz))
                distance = tl.minimum(distance, _square(px - cx, py - cy, pz - cz))
                largest = tl.max(tl.where(real, _key(distance, candidate), 0), 0)
                i += 1
            tl.store(nearest + b * N + n, near, n < length)
            key = tl.where(n < length, _key(near, n), 0)
            written = mail + (((turn + 1) % 2 * B + b) * PROGRAMS + g) * BEST
            for j in range(BEST):
                largest = tl.max(key, 0)
                tl.store(written + j, largest)
                key = tl.where(key == largest, 0, key)
        if g == 0:
            tl.store(done + (turn + 1).to(tl.int64) * B + b, i)

    @triton.jit(do_not_specialize=["N", "m", "B", "turn"])
    def _fps_rest(xyz, lengths, nearest, done, index, N, m, B, turn, BLOCK: tl.constexpr):
        # the samples that the rounds have left: one program per cloud, which it reads BLOCK points
        # at a time for each of them. A thread always gets the same points: no barrier is needed
        b = tl.program_id(0).to(tl.int64)
        length = tl.minimum(tl.maximum(tl.load(lengths + b).to(tl.int32), 1), N)
        found = tl.load(done + turn.to(tl.int64) * B + b)
        far = tl.load(index + b * m + found - 1).to(tl.int32)
        cloud = xyz + b * N * 3
        for i in range(found, m):
            cx, cy, cz = _point(cloud, far)
            best = tl.full([BLOCK], -1.0, tl.float32)  # largest distance of each lane
            best_index = tl.zeros([BLOCK], tl.int32)
            for first in range(0, length, BLOCK):
                n = first + tl.arange(0, BLOCK)
                dx = tl.load(cloud + n * 3, n < length, 0.0) - cx
                dy = tl.load(cloud + n * 3 + 1, n < length, 0.0) - cy
                dz = tl.load(cloud + n * 3 + 2, n < length, 0.0) - cz
                d = tl.load(nearest + b * N + n, n < length, -1.0)
                d = tl.minimum(d, _square(dx, dy, dz))  # padding stays at -1
                tl.store(nearest + b * N + n, d, n < length)
                best_index = tl.where(d > best, n, best_index)  # >: a tie keeps the lower index
                best = tl.maximum(best, d)
            far = tl.min(tl.where(best == tl.max(best, 0), best_index, 0x7FFFFFFF), 0)
            tl.store(index + b * m + i, far.to(tl.int64))


def shares(N):
    """How a cloud of N points is divided: programs, points of each, keys of each.

    The fastest on an H100 whose rounds suffice: a list of 256 keys in all, twice that from 65,537
    points on. Fewer keys cost less in each step, but more rounds: with half of them, 2,048 samples
    of a room take 59 of the 61 rounds that `fps_triton` plans.
    """
    programs = 16 if N <= 2 ** 16 else max(64, triton.next_power_of_2(triton.cdiv(N, 4096)))
    block = triton.next_power_of_2(max(256, triton.cdiv(N, programs)))
    best = max(2, min(16, 512 // programs))
    return dict(PROGRAMS=programs, BLOCK=block, BEST=best, num_warps=4 if block <= 2048 else 8)


def fps_rounds(xyz, m, start, lengths, share, rounds, streamed=STREAMED):
    """`fps_torch` in `rounds` launches of `_fps_round`, what is then missing by `_fps_rest`.

    Everything is queued without waiting for the device, so the number of rounds is fixed before.
    """
    B, N, _ = xyz.shape
    index = torch.empty(B, m, dtype=torch.int64, device=xyz.device)
    nearest = torch.full((B, N), float("inf"), device=xyz.device)
    done = torch.zeros(rounds + 1, B, dtype=torch.int32, device=xyz.device)
    mail = torch.zeros(2, B, share["PROGRAMS"], share["BEST"], dtype=torch.int64,
                       device=xyz.device)
    far = torch.minimum(start.long().clamp(min=0), lengths.long().clamp(1, N) - 1)
    mail[0, :, 0, -1] = (0x7F800000 << 32) + 0x7FFFFFFF - far  # first list: `start`, at infinity
    for turn in range(rounds):
        _fps_round[(share["PROGRAMS"], B)](xyz, lengths, nearest, mail, done, index, N, m, B, turn,
                                           **share, enable_fp_fusion=False)
    block, warps = streamed
    _fps_rest[(B,)](xyz, lengths, nearest, done, index, N, m, B, rounds, BLOCK=block,
                    num_warps=warps, enable_fp_fusion=False)
    return index


def fps_triton(xyz, m, start, lengths, in_registers=IN_REGISTERS):
    B, N, _ = xyz.shape
    with torch.cuda.device_of(xyz):  # Triton launches on the current device
        for block, warps in in_registers:
            if N <= block:
                index = torch.empty(B, m, dtype=torch.int64, device=xyz.device)
                _fps_registers[(B,)](xyz, start, lengths, index, N, m, BLOCK=block,
                                     num_warps=warps, enable_fp_fusion=False)
                return index
        # rooms, lidar frames and lattices need 0.7 to 1.1 sqrt(m) rounds, a cloud whose points
        # are repeated more
        return fps_rounds(xyz, m, start, lengths, shares(N), min(m, 16 + math.isqrt(m)))


@torch.library.custom_op("nanoepcl::farthest_point_sample", mutates_args=())
def _operator(xyz: torch.Tensor, m: int, start: torch.Tensor, lengths: torch.Tensor,
              check: bool) -> torch.Tensor:
    B, N, _ = xyz.shape
    if check and B:  # inside the operator, so that torch.compile keeps the checks
        bad = B * N - int((xyz.abs() <= 1e18).all(-1).sum())  # NaN fails the comparison, too
        if bad:
            raise ValueError(f"farthest_point_sample: xyz holds {bad} points with NaN, Inf or "
                             "values beyond 1e18; remove them when the data is read")
        low, high = int(lengths.min()), int(lengths.max())
        if low < m or high > N:
            raise ValueError(f"farthest_point_sample: lengths go from {low} to {high}, must lie in "
                             f"m = {m} .. N = {N}; pass a smaller m or larger clouds")
        if not ((start >= 0) & (start < lengths)).all():
            raise ValueError(f"farthest_point_sample: start = {start.tolist()} must lie in "
                             f"0 .. lengths - 1, lengths = {lengths.tolist()}")
    if B == 0:
        return torch.empty(0, m, dtype=torch.int64, device=xyz.device)
    if use_triton(xyz):
        return launch("farthest_point_sample", xyz, lambda: fps_triton(xyz, m, start, lengths),
                      lambda: fps_torch(xyz, m, start, lengths))
    if numba and xyz.device.type == "cpu":
        return fps_boxes(xyz, m, start, lengths)
    return fps_torch(xyz, m, start, lengths)


@_operator.register_fake
def _(xyz, m, start, lengths, check):
    return xyz.new_empty(xyz.shape[0], m, dtype=torch.int64)


def farthest_point_sample(xyz, m, start=0, lengths=None, check=None):
    """Indices (B, m) int64 of m points of each cloud of xyz (B, N, 3), the first of them `start`.

    start     int or (B,) integers
    lengths   (B,) integers: only the first lengths[b] points of cloud b exist
    check     raise on NaN, Inf, and lengths or start out of range. Always done on the CPU; on CUDA
              only with check=True, since it synchronises host and device. Unchecked, lengths and
              start are clamped, points repeat where m > lengths[b], and a cloud with NaN yields
              arbitrary valid indices
    A point repeats only if all others coincide with samples. Indices carry no gradient.
    """
    name = "farthest_point_sample"
    if xyz.dim() != 3 or xyz.shape[-1] != 3:
        raise ValueError(f"{name}: xyz must be (B, N, 3), not {tuple(xyz.shape)}")
    if not xyz.is_floating_point():
        raise ValueError(f"{name}: xyz is {xyz.dtype}; pass floating-point coordinates")
    B, N, _ = xyz.shape
    if not 1 <= m <= N:
        raise ValueError(f"{name}: m = {m} samples from clouds of {N} points; pass m in 1 .. N, "
                         "or larger clouds")
    if not isinstance(start, torch.Tensor):
        if not 0 <= start < N:
            raise ValueError(f"{name}: start = {start} is outside clouds of {N} points")
        start = torch.full((B,), start, dtype=torch.int64, device=xyz.device)
    if lengths is None:
        lengths = torch.full((B,), N, dtype=torch.int64, device=xyz.device)
    for what, value in (("start", start), ("lengths", lengths)):
        if value.shape != (B,) or value.is_floating_point() or value.device != xyz.device:
            raise ValueError(f"{name}: {what} must be ({B},) integers on {xyz.device}, not "
                             f"{tuple(value.shape)} {value.dtype} on {value.device}")
    check = bool(check) or xyz.device.type == "cpu"
    return _operator(xyz.detach().float().contiguous(), m, start.contiguous(), lengths.contiguous(),
                     check)


def _brute_force(xyz, m):  # float64, step by step
    xyz = xyz.double().cpu()
    clouds = torch.arange(len(xyz))
    index = [torch.zeros(len(xyz)).long()]
    nearest = torch.full(xyz.shape[:2], float("inf")).double()
    for _ in range(m - 1):
        distance = (xyz - xyz[clouds, index[-1]][:, None]).square().sum(-1)
        nearest = torch.minimum(nearest, distance)
        index.append(nearest.argmax(1))
    return torch.stack(index, 1)


def main():
    device, where = machine(numba)
    shapes = [(2, 300, 32), (8, 1024, 64)]
    if device.type == "cuda":
        shapes = [(32, 1024, 64), (8, 40000, 512), (8, 8192, 1200)]
    for B, N, m in shapes:
        xyz = torch.rand(B, N, 3, device=device)
        reference = "torch" if use_triton(xyz) else "brute force"
        if reference == "brute force":
            xyz = (xyz * 64).round() / 64  # a lattice: ties, and distances exact in fp32
        seconds, index = fastest(lambda: farthest_point_sample(xyz, m), device)
        full = torch.full((B,), N, device=device)
        if reference == "torch":
            expected = fps_torch(xyz, m, 0 * full, full)
        else:
            expected = _brute_force(xyz, m)
        index, expected = index.cpu(), expected.cpu()
        wrong = (index != expected).nonzero().tolist()
        if wrong:
            b, i = wrong[0]
            sys.exit(f"DIFFERS on {where}: {B} x {N} -> {m}, {len(wrong)} of {B * m} indices, "
                     f"first at [{b}, {i}]: {int(index[b, i])}, {reference}: {int(expected[b, i])}")
    print(f"ok: farthest_point_sample agrees with {reference} on {where}, torch "
          f"{torch.__version__}, triton {triton.__version__ if triton else 'absent'}: "
          f"{B} x {N} -> {m} in {seconds * 1e3:.1f} ms, "
          f"{(12 * B * N + 8 * B * m) / 1e6:.1f} MB moved")


if __name__ == "__main__":
    main()
