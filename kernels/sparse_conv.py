"""Sparse convolution: products at the voxels that exist, and nowhere else.

    out[v] = sum_k feats[u] weight[k],   u the voxel at  coords[v] + stride · offset[k],  if any

Choy et al. (arXiv 1904.08755), equation 3. The forms differ in offsets and in output voxels:

    submanifold_conv   offsets {-1, 0, 1}³, outputs where the inputs are (arXiv 1711.10275)
    strided_conv       offsets {0, 1}³, outputs at ⌊coords / (2 · stride)⌋ · 2 · stride
    transposed_conv    the strided one with inputs and outputs exchanged, onto the finer voxels

feats (V, C), coords (V, 4) int32, weight (K, C, D), taps in the order of conv3d: its weight is this
one after permute(2, 3, 4, 1, 0).flatten(0, 2), conv_transpose3d's after permute(2, 3, 4, 0, 1).
Neighbours are looked up once for each stride, by sorted 64-bit keys: exact, the same on every
device. In a kernel map, rows with the same set of taps stand together: a block of rows has a tap or
does not. With P pairs of rows (8.9 V on 100,000 voxels of hilly ground) blocks of 64 multiply 1.2
P, in the order of coordinates 2.8 P. A row occurs once in a tap, so the gradient of feats is the
same sum over the map turned round.

    conv_torch, weights_torch      reference, tap by tap: in fp32 P · (12 C + 16 D) bytes
    _convolve, _weight_gradient    GPU, gathered rows and sums stay on chip. With e bytes a number
                                   e·P·C read for each 128 (fp32: 64) of D, e·V·D written; for the
                                   gradient of weight e·P·(C + D) read for each 64 x 64 of C x D;
                                   4·K·V of the map each time. C and D are multiples of 16 there,
                                   filled up with zeros, for which 2·e·V·C and 2·e·V·D more move

No program adds to what another one adds to: without atomics the same input gives the same bits.
Sums are fp32, rounded once; fp32 is not multiplied as TF32: Triton and torch differ by the order of
a sum, a few 1e-7 of the largest. float64 runs in torch.        python kernels/sparse_conv.py
"""
import copy
import itertools
import sys
from collections import namedtuple

import torch
import torch.nn.functional as F

if __package__:
    from . import interpolate  # noqa: F401  its operator sums weighted rows
    from .launch import failed, launch, machine, triton, use_triton
else:  # run as a script
    import interpolate  # noqa: F401
    from launch import failed, launch, machine, triton, use_triton

if triton:  # not on macOS and Windows: every call takes the torch path
    import triton.language as tl

BITS = 17  # of x, y and z in a key; the cloud has those above them
CLOUDS, FARTHEST = 2048, 64_000  # |x|, |y|, |z|: what 17 bits hold, but for the taps of a kernel
TAPS = {n: list(itertools.product(offsets, repeat=3))  # z fastest
        for n, offsets in ((3, (-1, 0, 1)), (2, (0, 1)))}


# ---- Voxels and kernel maps ----------------------------------------------------------------------
# The voxels of one stride: coords (V, 4) int32; keys (V + 1,) int64, ascending, the last of none;
# rows (V + 1,): keys[i] belongs to coords[rows[i]], the last is -1
Grid = namedtuple("Grid", "coords keys rows")


def pack(coords):  # (V, 4) -> (V,) int64, which sort like (cloud, x, y, z)
    cloud, x, y, z = (coords.long() + coords.new_tensor([0] + 3 * [1 << BITS - 1]).long()).unbind(1)
    return ((cloud << BITS | x) << BITS | y) << BITS | z


def grid_of(coords):
    keys, rows = torch.nn.functional.pad(pack(coords), (0, 1), value=2 ** 62).sort()
    return Grid(coords, keys, torch.where(rows < len(coords), rows, -1))


def find(grid, keys):  # rows of the voxels with these keys, -1 where there is none
    place = torch.searchsorted(grid.keys, keys)
    return torch.where(grid.keys[place] == keys, grid.rows[place], -1)


def kernel_map(inputs, outputs, taps, stride):
    """Pairs of rows by a kernel with taps `stride` apart: table (K, T) and rows (T,), int32.

    In tap k, output row rows[t] takes input row table[k, t], or none: -1. The same from the inputs'
    side follows: back_table (K, S), back_rows (S,)."""
    at, S, T = pack(outputs.coords), len(inputs.coords), len(outputs.coords)
    table = torch.stack([find(inputs, at + (((i << BITS) + j << BITS) + k) * stride)
                         for i, j, k in taps])
    back = torch.full((len(taps), S + 1), -1, device=at.device)
    back.scatter_(1, table.where(table >= 0, S), torch.arange(T, device=at.device).expand_as(table))
    tap, sides = torch.arange(len(taps), device=at.device)[:, None], ()
    for side in (table, back[:, :S]):
        rows = ((side >= 0).long() << tap % 63).sum(0).sort(stable=True)[1]  # alike ones together
        sides += side[:, rows].int(), rows.int()
    return sides


class SparseTensor:
    """Features feats (V, C) at the voxels coords (V, 4) int32: cloud, x, y, z; V may be 0.

    Clouds are 0 .. 2047, x, y, z -64,000 .. 64,000 voxels, in any order, none twice. `stride` is 1,
    and 2, 4, ... for what strided_conv returns, whose coords are multiples of it. All tensors made
    from this one share the voxels and maps of each stride. Making them waits for a GPU, once."""

    def __init__(self, coords, feats):
        if coords.dim() != 2 or coords.shape[1] != 4 or coords.dtype != torch.int32:
            raise ValueError("SparseTensor: coords must be (V, 4) int32, cloud, x, y, z, not "
                             f"{tuple(coords.shape)} {coords.dtype}")
        for least, most, what in ((0, CLOUDS - 1, coords[:, :1]), (-FARTHEST, FARTHEST, coords)):
            if len(coords) and (what.min() < least or what.max() > most):
                raise ValueError(f"SparseTensor: {int(what.min())} .. {int(what.max())} is not in "
                                 f"{least} .. {most}; shift coords, or take larger voxels")
        grid = grid_of(coords)
        twice = (grid.keys[1:] == grid.keys[:-1]).nonzero()
        if len(twice):
            raise ValueError(f"SparseTensor: {len(twice)} of {len(coords)} voxels occur before, as "
                             f"{coords[grid.rows[twice[0, 0]]].tolist()}; keep one of each")
        self.grids, self.maps = {1: grid}, {}
        self.coords, self.feats, self.stride = coords, feats, 1
        self.at(feats)  # checks them

    def at(self, feats, stride=None):
        """Other features (V', C) at the same voxels, or at those of another stride."""
        other = copy.copy(self)  # grids and maps are shared
        other.feats, other.stride = feats, stride or self.stride
        other.coords = self.grids[other.stride].coords
        V, device = len(other.coords), other.coords.device
        right = feats.is_floating_point() and feats.device == device
        if not right or feats.dim() != 2 or len(feats) != V:
            raise ValueError(f"SparseTensor: feats must be ({V}, C), floating-point, on {device}, "
                             f"not {tuple(feats.shape)}, {feats.dtype}, on {feats.device}")
        return other

    def map(self, size, stride):
        """size 3: from the voxels of a stride to themselves; 2: to those of twice the stride."""
        if (size, stride) not in self.maps:
            fine = to = self.grids[stride]
            if size == 2:
                side = fine.coords.new_tensor([1] + 3 * [2 * stride])
                above = fine.coords // side * side  # rounds down below 0, too
                keys, voxel = pack(above).unique(return_inverse=True)
                coords = above.new_empty(len(keys), 4).index_put((voxel,), above)
                to = self.grids[2 * stride] = grid_of(coords)
            self.maps[size, stride] = kernel_map(fine, to, TAPS[size], stride)
        return self.maps[size, stride]


# ---- Products ------------------------------------------------------------------------------------
def pairs(table, rows):  # of each tap: input rows and their output rows, int64: on CPUs index_add_
    for source in table:  # takes five times as long with int32, and x[rows] twice as index_select
        some = (source >= 0).nonzero()[:, 0]
        yield source.index_select(0, some), rows.index_select(0, some).long()


def conv_torch(feats, weight, table, rows):  # (S, C), (K, C, D), (K, T), (T,) -> (T, D)
    wide = torch.promote_types(feats.dtype, torch.float32)  # accumulate in fp32, or float64
    out = torch.zeros(len(rows), weight.shape[2], dtype=wide, device=feats.device)
    for (source, row), w in zip(pairs(table, rows), weight.to(wide)):
        out.index_add_(0, row, feats.index_select(0, source).to(wide) @ w)  # a row once: in order
    return out.to(feats.dtype)


def weights_torch(feats, grad, table, rows):  # (S, C), (T, D), (K, T), (T,) -> (K, C, D)
    wide = torch.promote_types(feats.dtype, torch.float32)
    some = ((feats.index_select(0, source), grad.index_select(0, row))
            for source, row in pairs(table, rows))
    return torch.stack([a.T.to(wide) @ g.to(wide) for a, g in some]).to(feats.dtype)


if triton:
    @triton.jit(do_not_specialize=["T", "K"])  # no recompilation for a new size
    def _convolve(feats, weight, table, rows, out, T, K, C, D,
                  BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr):
        # one program: BLOCK_T output rows x BLOCK_D channels, all taps and input channels in order
        j = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        for k in range(K):
            s = tl.load(table + j, j < T, -1)
            table += T
            if tl.max(s, 0) >= 0:  # most blocks have few of the taps
                row = feats + s.to(tl.int64)[:, None] * C  # int64: s * C may exceed 2^31
                for first in range(0, C, BLOCK_C):
                    c = first + tl.arange(0, BLOCK_C)
                    a = tl.load(row + c[None, :], (s >= 0)[:, None] & (c < C)[None, :], 0.0)
                    w = tl.load(weight + (k * C + c)[:, None] * D + d[None, :],
                                (c < C)[:, None] & (d < D)[None, :], 0.0)
                    total = tl.dot(a, w, total, input_precision="ieee")  # fp32 stays fp32, not TF32
        r = tl.load(rows + j, j < T, 0).to(tl.int64)
        tl.store(out + r[:, None] * D + d[None, :], total.to(out.dtype.element_ty),
                 (j < T)[:, None] & (d < D)[None, :])

    @triton.jit(do_not_specialize=["T", "K", "parts"])
    def _weight_gradient(feats, grad, table, rows, out, T, K, C, D, parts,
                         BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr):
        # one program: BLOCK_C x BLOCK_D of a tap's matrix, over every parts-th block of rows
        part = tl.program_id(0) // K
        table += (tl.program_id(0) % K).to(tl.int64) * T
        c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
        total = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
        for first in range(part * BLOCK_T, T, parts * BLOCK_T):
            j = first + tl.arange(0, BLOCK_T)
            s = tl.load(table + j, j < T, -1)
            if tl.max(s, 0) >= 0:
                r = tl.load(rows + j, s >= 0, 0).to(tl.int64)
                a = tl.load(feats + s.to(tl.int64)[:, None] * C + c[None, :],
                            (s >= 0)[:, None] & (c < C)[None, :], 0.0)
                g = tl.load(grad + r[:, None] * D + d[None, :],
                            (s >= 0)[:, None] & (d < D)[None, :], 0.0)
                total = tl.dot(tl.trans(a), g, total, input_precision="ieee")
        place = (tl.program_id(0).to(tl.int64) * C + c)[:, None] * D + d[None, :]
        tl.store(out + place, total, (c < C)[:, None] & (d < D)[None, :])


def blocks(C, D, size):  # of the forward and of the weight kernel: no spills, within 48 KB
    c, d = (max(16, triton.next_power_of_2(x)) for x in (C, D))
    most_c, most_d, warps = *((32, 128) if size == 2 else (16, 64)), 8 if d > 32 else 4
    return (dict(BLOCK_T=64, BLOCK_C=min(c, most_c), BLOCK_D=min(d, most_d), num_warps=warps),
            dict(BLOCK_T=32, BLOCK_C=min(c, 64), BLOCK_D=min(d, 64), num_warps=warps))


def aligned(x, dims=1):  # last dims filled up to multiples of 16: else a GPU loads 2 bytes each
    fill = [n for size in x.shape[:-1 - dims:-1] for n in (0, -size % 16)]
    return F.pad(x, fill) if any(fill) else x


def conv_triton(feats, weight, table, rows):
    size = weight.shape[2]
    feats, weight = aligned(feats), aligned(weight, dims=2)
    (K, T), (C, D) = table.shape, weight.shape[1:]
    config = blocks(C, D, feats.element_size())[0]
    out = torch.empty(T, D, dtype=feats.dtype, device=feats.device)
    grid = triton.cdiv(T, config["BLOCK_T"]), triton.cdiv(D, config["BLOCK_D"])
    with torch.cuda.device_of(feats):  # Triton launches on the current device
        _convolve[grid](feats, weight, table, rows, out, T, K, C, D, **config,
                        enable_fp_fusion=False)
    return out[:, :size].contiguous()


def weights_triton(feats, grad, table, rows):
    sizes = feats.shape[1], grad.shape[1]
    feats, grad = aligned(feats), aligned(grad)
    (K, T), C, D = table.shape, feats.shape[1], grad.shape[1]
    config = blocks(C, D, feats.element_size())[1]
    tiles = triton.cdiv(C, config["BLOCK_C"]), triton.cdiv(D, config["BLOCK_D"])
    # enough programs for any card, and the same sums on each: 2,048, or 1 for each 16 blocks
    parts = max(1, min(2048 // (K * tiles[0] * tiles[1]), T // (16 * config["BLOCK_T"])))
    out = torch.empty(parts, K, C, D, device=feats.device)
    with torch.cuda.device_of(feats):
        _weight_gradient[(K * parts, *tiles)](feats, grad, table, rows, out, T, K, C, D, parts,
                                              **config, enable_fp_fusion=False)
    return out.sum(0)[:, :sizes[0], :sizes[1]].to(feats.dtype).contiguous()


def run(in_triton, in_torch, *args):  # args: feats, another, table, rows
    dtype, kind = args[0].dtype, args[0].device.type
    plain = torch.autocast(kind, enabled=False)(in_torch)  # its products would be bf16
    bits = dtype == torch.bfloat16 and kind == "cpu"  # what Triton's interpreter would multiply
    if bits or dtype == torch.float64 or not use_triton(args[0]) or not all(map(torch.numel, args)):
        return plain(*args)
    return launch("sparse_conv", args[0], lambda: in_triton(*args), lambda: plain(*args))


@torch.library.custom_op("nanoepcl::sparse_conv", mutates_args=())
def _operator(feats: torch.Tensor, weight: torch.Tensor, table: torch.Tensor, rows: torch.Tensor,
              back_table: torch.Tensor, back_rows: torch.Tensor) -> torch.Tensor:
    return run(conv_triton, conv_torch, feats, weight, table, rows)


@torch.library.custom_op("nanoepcl::sparse_conv_weights", mutates_args=())
def _operator_weights(feats: torch.Tensor, grad: torch.Tensor, table: torch.Tensor,
                      rows: torch.Tensor) -> torch.Tensor:
    return run(weights_triton, weights_torch, feats, grad, table, rows)


_operator.register_fake(lambda feats, weight, table, rows, back_table, back_rows: feats.new_empty(
    rows.shape[0], weight.shape[2]))
_operator_weights.register_fake(lambda feats, grad, table, rows: feats.new_empty(
    table.shape[0], feats.shape[1], grad.shape[1]))


def _gradient(ctx, grad):  # of feats and weight; none for the map
    feats, weight, *pairs = ctx.saved_tensors
    grad, of_feats, of_weight = grad.contiguous(), None, None
    if ctx.needs_input_grad[0]:
        of_feats = torch.ops.nanoepcl.sparse_conv(grad, weight.mT.contiguous(), *pairs[2:],
                                                  *pairs[:2])
    if ctx.needs_input_grad[1]:
        of_weight = torch.ops.nanoepcl.sparse_conv_weights(feats, grad, *pairs[:2])
    return of_feats, of_weight, None, None, None, None


_operator.register_autograd(
    _gradient, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def convolve(feats, weight, pairs):
    """feats (S, C), weight (K, C, D), a map -> (T, D), in the dtype of feats or of autocast."""
    K, C = len(pairs[0]), feats.shape[1]
    if weight.dim() != 3 or weight.shape[:2] != (K, C) or weight.device != feats.device:
        raise ValueError(f"sparse_conv: weight must be ({K}, {C}, D) on {feats.device}, taps, "
                         f"channels in and out, not {tuple(weight.shape)} on {weight.device}")
    if torch.is_autocast_enabled(feats.device.type):
        feats = feats.to(torch.get_autocast_dtype(feats.device.type))
    return torch.ops.nanoepcl.sparse_conv(feats.contiguous(), weight.to(feats.dtype).contiguous(),
                                          *pairs)


def submanifold_conv(x, weight):
    """x with C channels, weight (27, C, D) -> D channels at the same voxels."""
    return x.at(convolve(x.feats, weight, x.map(3, x.stride)))


def strided_conv(x, weight):
    """x with C channels, weight (8, C, D) -> D channels at twice the stride, in order of coords."""
    return x.at(convolve(x.feats, weight, x.map(2, x.stride)), 2 * x.stride)


def transposed_conv(x, weight):
    """x with C channels, weight (8, C, D) -> D channels at the finer voxels that x came from."""
    if (2, x.stride // 2) not in x.maps:
        raise ValueError(f"transposed_conv: x has stride {x.stride} and does not come from a "
                         "strided_conv, to whose voxels it would return")
    pairs = x.map(2, x.stride // 2)
    return x.at(convolve(x.feats, weight, pairs[2:] + pairs[:2]), x.stride // 2)


def devoxelise(x, cloud, xyz):
    """Trilinear features (N, C) at points xyz (N, 3) of cloud (N,), in the units of x.coords.

    A voxel stands at its coords. Of the eight around a point those that are missing are left out
    and the weights of the others sum to 1; without any, features are 0. Gradients go to x.feats."""
    if xyz.dim() != 2 or xyz.shape[1] != 3 or cloud.shape != xyz.shape[:1]:
        raise ValueError(f"devoxelise: cloud {[*cloud.shape]}, xyz {[*xyz.shape]}; pass (N,), "
                         "(N, 3)")
    place = xyz.detach().float().clamp(-FARTHEST - 500, FARTHEST + 500) / x.stride
    low = place.floor()
    corners = torch.tensor(TAPS[2], device=xyz.device)  # (8, 3)
    at = torch.cat([cloud[:, None, None].expand(-1, 8, 1), (low[:, None] + corners) * x.stride], -1)
    index = find(x.grids[x.stride], pack(at.flatten(0, 1))).view(-1, 8)
    weight = (1 - corners - (place - low)[:, None]).abs().prod(-1) * (index >= 0)  # (N, 8)
    weight = weight / weight.sum(1, keepdim=True).clamp(min=1e-30)
    # a missing corner has weight 0 and reads a neighbour: would all read row 0, one program would
    # sum a million edges of its gradient
    index = torch.where(index < 0, index.amax(1, keepdim=True).clamp(min=0), index)
    return torch.ops.nanoepcl.interpolate(x.feats[None].contiguous(), index[None], weight[None])[0]


def main():
    (device, where), side = machine(), 24
    for C, D in ((3, 5), (51, 102)):  # against conv3d in float64, zeros where there is no voxel
        full = torch.rand(side, side, side, device=device) < 0.2
        coords = torch.nn.functional.pad(full.nonzero(), (1, 0)).int()
        feats, weight, grad = (torch.randn(s, device=device, requires_grad=True)
                               for s in ((len(coords), C), (27, C, D), (len(coords), D)))
        dense = feats.new_zeros(side, side, side, C, dtype=torch.float64)
        dense = dense.masked_scatter(full[..., None], feats.double()).movedim(3, 0)
        kernel = weight.double().view(3, 3, 3, C, D).permute(4, 3, 0, 1, 2)
        true = torch.nn.functional.conv3d(dense[None], kernel, padding=1)[0].movedim(0, 3)[full]
        true = true, *torch.autograd.grad(true, (feats, weight), grad.double())
        out = submanifold_conv(SparseTensor(coords, feats), weight).feats
        found = out, *torch.autograd.grad(out, (feats, weight), grad)
        if failed:
            sys.exit(1)  # why has been printed
        error = max(float(((a - b).abs().max() / b.abs().max()).nan_to_num(9.0).detach())
                    for a, b in zip(found, true))
        if error > 1e-5:  # sums in fp32: a few 1e-7
            sys.exit(f"DIFFERS on {where}: {len(coords)} voxels, {C} to {D} channels, values and "
                     f"gradients against conv3d, error {error:.1e} of the largest")
    print(f"ok: sparse_conv and its gradients agree with conv3d on {where}, torch "
          f"{torch.__version__}, triton {triton.__version__ if triton else 'absent'}: "
          f"{len(coords):,} voxels, {C} to {D} channels")


if __name__ == "__main__":
    main()
