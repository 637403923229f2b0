"""Points to pixels: the nearest of the points whose discs cover a pixel's centre.

    index[b, i, j] = argmin_n (z_n, n)  over all n with  (j + 1/2 - x_n)² + (i + 1/2 - y_n)² <= r²

xyz (B, N, 3) holds column x and row y in pixels, and depth z -> index (B, H, W) int64, -1 where no
point covers the pixel, and depth (B, H, W) float32, inf there. Row 0 is the top. Distances are
fp32, dx·dx + dy·dy without fused multiply-add, and equal depths go to the lowest index, so a
picture is the same on every device. Depths may be negative: an orthographic camera stands nowhere.

A key of 64 bits, depth above index, sorts like the pair. All implementations visit only the square
of pixels around a point, K = ⌊2r + 1/2⌋ + 2 on a side, about π r² of which the disc covers.

    splat_torch      reference implementation: one minimum over keys for each of the K² places in
                     the square. Memory traffic: about 200·B·N·K² bytes
    splat_loop       CPU with numba: a z-buffer, 12·B·(N + H·W) bytes
    _splat, _unpack  GPU: 64-bit atomic minima into a picture of keys, which becomes `index` in
                     place: 12·B·N + 28·B·H·W bytes and π r²·B·N atomics, in 12·B·H·W of memory

A program for each tile of pixels would write 12 bytes a pixel instead of moving 28, and need no
atomics, but each tile reads every point of its cloud, from L2. For 320 pictures of 1,024 points,
224 x 224, tiles of 16 x 16 write 0.19 and read 0.77 GB; here it is 0.45 GB and 5.2 million atomics.
For one of 200,000 points, 1,024 x 1,024, tiles read 9.8 GB; here it is 0.03 GB and 2.5 million.

    python kernels/splat.py
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
    import numba
except ImportError:  # optional: without it, a picture takes 5x as long on a CPU
    numba = None

LARGEST = 2 ** 15  # height, width and radius; below it, `square` misses no pixel by rounding
EMPTY = 2 ** 63 - 1  # the key of a pixel without a point


def square(radius, side):
    """Pixels along a side of the square around a point, at most those of the picture.

    It begins at ⌊x - r - 1/2⌋, or where it lies in the picture. The roundings of that, and those by
    which a pixel beyond the radius may pass, are below 1/2 together: hence the 1/2, and two more.
    """
    return min(int(2 * radius + 0.5) + 2, side)


def splat_torch(xyz, H, W, radius):  # -> (B, H, W) int64, (B, H, W) float32
    B, N, _ = xyz.shape
    x, y, z = xyz.unbind(-1)
    z = z + 0.0  # -0 becomes 0
    bits = z.view(torch.int32).long()
    bits = bits ^ (bits >> 32 & 0x7FFFFFFF)  # negative floats sort the other way round
    key = bits << 32 | torch.arange(N, device=xyz.device)
    key.masked_fill_(~(z < float("inf")), EMPTY)  # unchecked NaN, too
    height, width = square(radius, H), square(radius, W)
    top = (y - radius - 0.5).floor_().nan_to_num_(0.0).clamp_(0, H - height).long()
    left = (x - radius - 0.5).floor_().nan_to_num_(0.0).clamp_(0, W - width).long()
    nearest = torch.full((B, H * W), EMPTY, device=xyz.device)
    for i in range(height):
        dy = (top + i).float() + 0.5 - y
        for j in range(width):
            dx = (left + j).float() + 0.5 - x
            covers = dx * dx + dy * dy <= radius2(radius)
            pixel = (top + i) * W + left + j
            nearest.scatter_reduce_(1, pixel, key.where(covers, EMPTY), "amin")
    nearest = nearest.view(B, H, W)
    bits = nearest >> 32
    depth = (bits ^ (bits >> 32 & 0x7FFFFFFF)).int().view(torch.float32)
    empty = nearest == EMPTY
    return (nearest & 0xFFFFFFFF).masked_fill_(empty, -1), depth.masked_fill_(empty, float("inf"))


def radius2(radius):  # rounded as fp32 rounds it, everywhere
    return float(np.float32(radius) * np.float32(radius))


if numba:
    @numba.njit(nogil=True)  # without fastmath: nothing is fused or reordered
    def _splat_loop(xyz, radius, radius2, height, width, index, depth):
        # xyz (N, 3); index, depth (H, W). Points come in the order of their index and never
        # displace an equal depth: ties are ordered
        H, W = index.shape
        half = np.float32(0.5)
        for n in range(len(xyz)):
            x, y, z = xyz[n, 0], xyz[n, 1], xyz[n, 2]
            top = int(min(max(np.floor(y - radius - half), 0), H - height))
            left = int(min(max(np.floor(x - radius - half), 0), W - width))
            for i in range(top, top + height):
                dy = np.float32(i) + half - y
                for j in range(left, left + width):
                    dx = np.float32(j) + half - x
                    if dx * dx + dy * dy <= radius2 and z < depth[i, j]:
                        index[i, j] = n
                        depth[i, j] = z + np.float32(0)  # -0 becomes 0


def splat_loop(xyz, H, W, radius):
    """`splat_torch` on a CPU, in one loop. Clouds run in parallel threads."""
    B = len(xyz)
    workers = min(torch.get_num_threads(), B)
    index = torch.full((B, H, W), -1)
    depth = torch.full((B, H, W), float("inf"))

    def draw_clouds(worker):
        for b in range(worker, B, workers):
            _splat_loop(xyz[b].numpy(), np.float32(radius), np.float32(radius2(radius)),
                        square(radius, H), square(radius, W), index[b].numpy(), depth[b].numpy())

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(draw_clouds, range(workers)))
    return index, depth


if triton:
    @triton.jit
    def _flip(bits):  # the bits of a float <-> an integer that sorts like it
        return bits ^ ((bits >> 31) & 0x7FFFFFFF)

    @triton.jit
    def _first(center, radius, last):  # where the square begins; a NaN is anywhere in the picture
        first = tl.floor(center - radius - 0.5)
        return tl.minimum(tl.maximum(first, 0.0), last.to(tl.float32)).to(tl.int32)

    @triton.jit(do_not_specialize=["N", "H", "W", "height", "width", "tiles"])
    def _splat(xyz, index, N, H, W, radius, radius2, height, width, tiles,
               BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr):
        # one program: BLOCK_N points of one cloud, BLOCK_W columns of their squares at a time
        b = (tl.program_id(0) // tiles).to(tl.int64)  # int64: b * H * W may exceed 2^31
        n = (tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
        p = xyz + (b * N + n) * 3
        x = tl.load(p, n < N, 0.0)
        y = tl.load(p + 1, n < N, 0.0)
        z = tl.load(p + 2, n < N, float("inf"))
        z = tl.where(z == 0.0, 0.0, z)  # -0 becomes 0
        key = (_flip(z.to(tl.int32, bitcast=True)).to(tl.int64) << 32) | n.to(tl.int64)
        top = _first(y, radius, H - height)
        left = _first(x, radius, W - width)
        for i in range(height):
            row = top + i
            dy = row.to(tl.float32) + 0.5 - y
            for first in range(0, width, BLOCK_W):
                j = first + tl.arange(0, BLOCK_W)
                column = left[:, None] + j[None, :]  # (BLOCK_N, BLOCK_W)
                dx = column.to(tl.float32) + 0.5 - x[:, None]
                covers = (dx * dx + (dy * dy)[:, None] <= radius2) & (j < width)[None, :]
                covers = covers & (z < float("inf"))[:, None]
                pixel = index + ((b * H + row) * W)[:, None] + column
                tl.atomic_min(pixel, tl.broadcast_to(key[:, None], [BLOCK_N, BLOCK_W]), covers,
                              sem="relaxed")

    @triton.jit(do_not_specialize=["total"])
    def _unpack(index, depth, total, BLOCK: tl.constexpr):  # keys in place to indices, and depths
        pixel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        key = tl.load(index + pixel, pixel < total, 0)
        EMPTY: tl.constexpr = 0x7FFFFFFFFFFFFFFF
        bits = _flip((key >> 32).to(tl.int32))
        z = tl.where(key == EMPTY, float("inf"), bits.to(tl.float32, bitcast=True))
        tl.store(depth + pixel, z, pixel < total)
        tl.store(index + pixel, tl.where(key == EMPTY, -1, key & 0xFFFFFFFF), pixel < total)


def blocks(width):
    """Block sizes for squares of so many columns: 512 places for 128 threads."""
    columns = max(4, min(32, triton.next_power_of_2(width)))
    return dict(BLOCK_N=512 // columns, BLOCK_W=columns, num_warps=4)


UNPACK = dict(BLOCK=1024, num_warps=4)


def splat_triton(xyz, H, W, radius):
    B, N, _ = xyz.shape
    index = torch.full((B, H, W), EMPTY, device=xyz.device)  # keys, until they are unpacked
    depth = torch.empty(B, H, W, device=xyz.device)
    height, width = square(radius, H), square(radius, W)
    config = blocks(width)
    tiles = triton.cdiv(N, config["BLOCK_N"])
    with torch.cuda.device_of(xyz):  # Triton launches on the current device
        _splat[(B * tiles,)](xyz, index, N, H, W, float(radius), radius2(radius), height, width,
                             tiles, **config, enable_fp_fusion=False)
        _unpack[(triton.cdiv(B * H * W, UNPACK["BLOCK"]),)](index, depth, B * H * W, **UNPACK,
                                                            enable_fp_fusion=False)
    return index, depth


@torch.library.custom_op("nanoepcl::splat", mutates_args=())
def _operator(xyz: torch.Tensor, H: int, W: int, radius: float,
              check: bool) -> tuple[torch.Tensor, torch.Tensor]:
    if check:  # inside the operator, so that torch.compile keeps the check
        bad = xyz.numel() // 3 - int((xyz.abs() <= 1e18).all(-1).sum())  # NaN fails, too
        if bad:
            raise ValueError(f"splat: xyz holds {bad} points with NaN, Inf or values beyond 1e18; "
                             "leave them out, and those in the plane of a camera")
    if xyz.numel() == 0:
        return (torch.full((len(xyz), H, W), -1, device=xyz.device),
                torch.full((len(xyz), H, W), float("inf"), device=xyz.device))
    if use_triton(xyz):
        return launch("splat", xyz, lambda: splat_triton(xyz, H, W, radius),
                      lambda: splat_torch(xyz, H, W, radius))
    if numba and xyz.device.type == "cpu":
        return splat_loop(xyz, H, W, radius)
    return splat_torch(xyz, H, W, radius)


@_operator.register_fake
def _(xyz, H, W, radius, check):
    shape = (xyz.shape[0], H, W)
    return xyz.new_empty(shape, dtype=torch.int64), xyz.new_empty(shape)


def splat(xyz, H, W, radius, check=None):
    """The nearest point in each pixel of xyz (B, N, 3): index (B, H, W) and its depth (B, H, W).

    xyz       column and row in pixels, the first pixel's centre at (0.5, 0.5), and depth: any
              finite numbers. Points outside the picture do no harm; N may be 0
    H, W      pixels, up to 32,768
    radius    of all discs, in pixels, up to 32,768. A disc of more than √½ always covers a centre,
              a smaller one may cover none
    check     raise on NaN, Inf and values beyond 1e18. Always done on the CPU; on CUDA only with
              check=True, since it synchronises host and device. Unchecked, points with NaN or a
              depth of +Inf are left out
    Neither carries a gradient: gather the points of `index` where one is needed.
    """
    if xyz.dim() != 3 or xyz.shape[-1] != 3:
        raise ValueError(f"splat: xyz must be (B, N, 3), not {tuple(xyz.shape)}")
    if not xyz.is_floating_point():
        raise ValueError(f"splat: xyz is {xyz.dtype}; pass floating-point coordinates")
    if not (1 <= H <= LARGEST and 1 <= W <= LARGEST):
        raise ValueError(f"splat: a picture of {H} x {W} pixels; pass 1 .. {LARGEST} of each")
    if not 0 < radius <= LARGEST:  # NaN fails, too
        raise ValueError(f"splat: radius = {radius} pixels; pass one above 0, up to {LARGEST}")
    check = bool(check) or xyz.device.type == "cpu"
    return _operator(xyz.detach().float().contiguous(), H, W, float(radius), check)


def _brute_force(xyz, H, W, radius):  # float64, every point for every pixel, nearest first
    index = torch.full((len(xyz), H, W), -1, device=xyz.device)
    rows = torch.arange(H, device=xyz.device)[:, None].double() + 0.5
    columns = torch.arange(W, device=xyz.device).double() + 0.5
    for b, cloud in enumerate(xyz.double()):
        for n in cloud[:, 2].argsort(stable=True).tolist():
            covers = (columns - cloud[n, 0]) ** 2 + (rows - cloud[n, 1]) ** 2 <= radius ** 2
            index[b][covers & (index[b] < 0)] = n
    depth = torch.where(index < 0, torch.inf, xyz[..., 2].gather(1, index.flatten(1).clamp(min=0))
                        .view_as(index))
    return index, depth


def main():
    device, where = machine(numba)
    shapes = [(2, 300, 24, 40, 1.25), (4, 1024, 64, 64, 2.25)]
    if device.type == "cuda":
        shapes = [(2, 300, 24, 40, 40.0), (1, 200_000, 1024, 1024, 2.0),
                  (320, 1024, 224, 224, 2.24)]
    for B, N, H, W, radius in shapes:
        scale = torch.tensor([W + 8.0, H + 8.0, 4.0], device=device)
        xyz = torch.rand(B, N, 3, device=device) * scale - scale.new_tensor([4.0, 4.0, 2.0])
        xyz = (xyz * 64).round() / 64  # a lattice: equal depths, and distances exact in fp32
        seconds, (index, depth) = fastest(lambda: splat(xyz, H, W, radius), device)
        reference = "torch" if use_triton(xyz) else "brute force"
        expected = (splat_torch if use_triton(xyz) else _brute_force)(xyz, H, W, radius)
        wrong = ((index != expected[0]) | (depth != expected[1])).nonzero().tolist()
        if wrong:
            i = tuple(wrong[0])
            sys.exit(f"DIFFERS on {where}: {B} x {N} at {H} x {W}, radius {radius}, {len(wrong)} "
                     f"of {index.numel()} pixels, first at {i}: index {int(index[i])}, depth "
                     f"{float(depth[i])}, {reference}: {int(expected[0][i])}, "
                     f"{float(expected[1][i])}")
    print(f"ok: splat agrees with {reference} on {where}, torch {torch.__version__}, triton "
          f"{triton.__version__ if triton else 'absent'}: {B} x {N} points at {H} x {W}, radius "
          f"{radius}, in {seconds * 1e3:.1f} ms, "
          f"{(12 * B * N + 28 * B * H * W) / 1e6:.1f} MB moved")


if __name__ == "__main__":
    main()
