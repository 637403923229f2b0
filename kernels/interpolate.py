"""Interpolation: the features of the k nearest source points, weighted by inverse squared distance.

    out[b, n] = sum_j w_j feats[b, i_j] / sum_j w_j
    w_j = 1 / (|query[b, n] - points[b, i_j]|² + 1e-8)

PointNet++ (arXiv 1706.02413), section 3.4, equation 2 with p = 2. query (B, N, 3), points
(B, S, 3), feats (B, S, C) -> (B, N, C). The neighbours i_1 .. i_k come from knn; ties go to the
lowest index. A query that coincides with source points (a squared distance of 0 in fp32) gets
exactly their feature, or the mean if several of its k neighbours coincide: the 1e-8 alone would
blur clouds of small scale. The gradient goes to feats only, not to the coordinates.

Plain torch writes the gathered (B, N, k, C) rows to memory and reads them back. The fused forward
moves 4·B·N·C·(k + 1) bytes in fp32, and the backward no more. The backward is a gather as well:
edges are sorted by source point once, and each source point sums its queries in a fixed order.
There are no atomics: results are deterministic, nothing is zero-filled, bf16 is rounded once.
`group`, the gather of patches, shares both kernels: weight 1, one row for each target.

    python kernels/interpolate.py
"""
import sys

import torch

if __package__:
    from .knn import check_clouds, knn
    from .launch import fastest, launch, machine, use_triton
else:  # run as a script
    from knn import check_clouds, knn
    from launch import fastest, launch, machine, use_triton

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows: every call takes the torch path
    triton = None


# Forward and backward are one operation, a segment sum over edges e sorted by target row t:
#     out[t] = sum of weight[e] * rows[source[e]] over ends[t] <= e < ends[t + 1]

def gather_sum_torch(rows, source, weight, ends):  # (R, C), (E,), (E,), (T + 1,) -> (T, C)
    if rows.numel() == 0 or source.numel() == 0:
        return rows.new_zeros(len(ends) - 1, rows.shape[1])
    wide = torch.promote_types(rows.dtype, torch.float32)  # accumulate in fp32, or float64
    return torch.nn.functional.embedding_bag(
        source, rows.to(wide), ends, mode="sum", per_sample_weights=weight.to(wide),
        include_last_offset=True).to(rows.dtype)


if triton:
    @triton.jit(do_not_specialize=["T", "k"])  # no recompilation for a new size
    def _forward(feats, source, weight, out, T, k, C, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
        # one program: BLOCK_T queries x BLOCK_C channels; each query has k edges
        t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
        t = t.to(tl.int64)  # t * C may exceed 2^31
        c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        inside = (t < T)[:, None] & (c < C)[None, :]
        total = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
        for j in range(k):
            s = tl.load(source + t * k + j, t < T, 0)
            w = tl.load(weight + t * k + j, t < T, 0.0)
            row = tl.load(feats + s[:, None] * C + c[None, :], inside, 0.0)
            total += w[:, None] * row.to(tl.float32)
        tl.store(out + t[:, None] * C + c[None, :], total.to(out.dtype.element_ty), inside)

    @triton.jit
    def _backward(grad, source, weight, ends, out, C,
                  BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr):
        # one program: one source point x BLOCK_C channels, its edges BLOCK_E at a time. A source
        # point without edges gets zeros
        t = tl.program_id(0).to(tl.int64)
        c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        last = tl.load(ends + t + 1)
        total = tl.zeros([BLOCK_E, BLOCK_C], tl.float32)
        for first in range(tl.load(ends + t), last, BLOCK_E):
            e = first + tl.arange(0, BLOCK_E)
            s = tl.load(source + e, e < last, 0)
            w = tl.load(weight + e, e < last, 0.0)
            inside = (e < last)[:, None] & (c < C)[None, :]
            row = tl.load(grad + s[:, None] * C + c[None, :], inside, 0.0)
            total += w[:, None] * row.to(tl.float32)
        tl.store(out + t * C + c, tl.sum(total, 0).to(out.dtype.element_ty), c < C)


def blocks(C):
    """Block sizes of the forward and of the backward kernel for C channels: best on an H100."""
    if C <= 64:
        return dict(BLOCK_T=16, BLOCK_C=64, num_warps=4), dict(BLOCK_E=16, BLOCK_C=64, num_warps=2)
    return dict(BLOCK_T=4, BLOCK_C=256, num_warps=4), dict(BLOCK_E=4, BLOCK_C=128, num_warps=2)


def forward_triton(feats, source, weight, k):  # (R, C), (T * k,), (T * k,) -> (T, C)
    T, C = source.numel() // k, feats.shape[1]
    config = blocks(C)[0]
    out = torch.empty(T, C, dtype=feats.dtype, device=feats.device)
    grid = triton.cdiv(T, config["BLOCK_T"]), triton.cdiv(C, config["BLOCK_C"])
    with torch.cuda.device_of(feats):  # Triton launches on the current device
        _forward[grid](feats, source, weight, out, T, k, C, **config, enable_fp_fusion=False)
    return out


def backward_triton(grad, source, weight, ends):  # (R, C), (E,), (E,), (T + 1,) -> (T, C)
    T, C = len(ends) - 1, grad.shape[1]
    config = blocks(C)[1]
    out = torch.empty(T, C, dtype=grad.dtype, device=grad.device)
    grid = T, triton.cdiv(C, config["BLOCK_C"])
    with torch.cuda.device_of(grad):
        _backward[grid](grad, source, weight, ends, out, C, **config, enable_fp_fusion=False)
    return out


def in_triton(rows, source):  # float64 and empty sums run in torch
    return use_triton(rows) and rows.dtype != torch.float64 and rows.numel() * source.numel() > 0


@torch.library.custom_op("nanoepcl::interpolate", mutates_args=())
def _operator(feats: torch.Tensor, source: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    # feats (B, S, C); source and weight (B, N, k). source indexes the rows of all clouds, B * S
    (B, N, k), C = source.shape, feats.shape[2]
    rows, source, weight = feats.flatten(0, 1), source.flatten(), weight.flatten()

    def in_torch():
        ends = torch.arange(0, B * N * k + 1, k, device=rows.device)
        return gather_sum_torch(rows, source, weight, ends)

    if in_triton(rows, source):
        out = launch("interpolate", rows, lambda: forward_triton(rows, source, weight, k), in_torch)
    else:
        out = in_torch()
    return out.view(B, N, C)


@torch.library.custom_op("nanoepcl::interpolate_backward", mutates_args=())
def _operator_backward(grad: torch.Tensor, source: torch.Tensor, weight: torch.Tensor,
                       S: int) -> torch.Tensor:
    (B, _, k), C = source.shape, grad.shape[2]
    target, order = source.flatten().sort(stable=True)  # stable: queries of a source point in order
    ends = torch.searchsorted(target, torch.arange(B * S + 1, device=grad.device))
    rows, source, weight = grad.flatten(0, 1), order // k, weight.flatten()[order]
    inputs = rows, source, weight, ends
    if in_triton(rows, source):
        out = launch("interpolate's gradient", rows, lambda: backward_triton(*inputs),
                     lambda: gather_sum_torch(*inputs))
    else:
        out = gather_sum_torch(*inputs)
    return out.view(B, S, C)


@_operator.register_fake
def _(feats, source, weight):
    return feats.new_empty(source.shape[0], source.shape[1], feats.shape[2])


@_operator_backward.register_fake
def _(grad, source, weight, S):
    return grad.new_empty(grad.shape[0], S, grad.shape[2])


def _save(ctx, inputs, output):
    ctx.S = inputs[0].shape[1]
    ctx.save_for_backward(inputs[1], inputs[2])


def _gradient(ctx, grad):  # of feats; none for source and weight
    return _operator_backward(grad.contiguous(), *ctx.saved_tensors, ctx.S), None, None


_operator.register_autograd(_gradient, setup_context=_save)


def neighbour_weights(dist2):  # (B, N, k) ascending -> (B, N, k), sums to 1
    weight = 1 / (dist2 + 1e-8)
    weight = torch.where(dist2[..., :1] == 0, (dist2 == 0).float(), weight)  # coincident: exact
    return weight / weight.sum(-1, keepdim=True)


def interpolate(query, points, feats, k=3, lengths=None, check=None):
    """Features (B, N, C) at query (B, N, 3), from feats (B, S, C) at points (B, S, 3).

    k         1 .. 8 neighbours, and at most the points of each cloud
    lengths   (B,) integers: only the first lengths[b] points of cloud b exist
    check     as in knn: always on the CPU, on CUDA only with check=True. Unchecked, a missing
              neighbour has weight 0, and a query without any neighbour gets NaN
    The result has the dtype of feats; float32, bfloat16 and float16 accumulate in float32.
    Differentiable in feats, not in the coordinates.
    """
    check_clouds("interpolate", query, points)
    B, S, _ = points.shape
    if feats.dim() != 3 or feats.shape[:2] != (B, S) or feats.device != points.device:
        raise ValueError(f"interpolate: feats must be ({B}, {S}, C) on {points.device}, one row "
                         f"for each point, not {tuple(feats.shape)} on {feats.device}")
    if not feats.is_floating_point():
        raise ValueError(f"interpolate: feats is {feats.dtype}; pass floating-point features")
    if not 1 <= k <= min(8, S):
        raise ValueError(f"interpolate: k = {k} neighbours from clouds of {S} points; pass k in "
                         "1 .. 8 and at most the points of a cloud")
    dist2, index = knn(query, points, k, lengths, check)
    source = index.clamp(min=0) + S * torch.arange(B, device=index.device)[:, None, None]
    return torch.ops.nanoepcl.interpolate(feats.contiguous(), source, neighbour_weights(dist2))


def group(feats, idx):
    """Rows of each cloud: feats (B, S, C), idx (B, ...) int64 -> (B, ..., C).

    torch.gather's values. Its gradient on a GPU adds to feats with atomics, in any order; this one
    is the gather of `interpolate`, one edge for each row and weight 1: the same bits in every run.
    """
    B, S, C = feats.shape
    rows = idx.flatten(1)[..., None]  # (B, R, 1)
    source = rows + S * torch.arange(B, device=idx.device)[:, None, None]
    weight = torch.ones(source.shape, device=feats.device)
    rows = torch.ops.nanoepcl.interpolate(feats.contiguous(), source, weight)
    return rows.view(*idx.shape, C)


def _brute_force(query, points, feats, k):  # float64, all (B, N, S) distances
    table = (query[:, :, None].double() - points[:, None].double()).square().sum(-1)
    dist2, index = table.sort(dim=-1, stable=True)
    weight = neighbour_weights(dist2[..., :k].float()).double()
    clouds = torch.arange(len(feats), device=feats.device)[:, None, None]
    return (weight[..., None] * feats.double()[clouds, index[..., :k]]).sum(2)


def main():
    device, where = machine()
    shapes = [(2, 40, 30, 20), (2, 100, 64, 80)]
    if device.type == "cuda":
        shapes = [(2, 1000, 64, 40), (8, 8192, 1024, 256)]
    for B, N, S, C in shapes:
        # coordinates on a lattice: distances are exact in fp32
        query = (torch.rand(B, N, 3, device=device) * 64).round() / 64
        points = (torch.rand(B, S, 3, device=device) * 64).round() / 64
        query[:, :9] = points[:, :9]
        feats = torch.randn(B, S, C, device=device, requires_grad=True)
        grad = torch.randn(B, N, C, device=device)

        def both_ways():
            out = interpolate(query, points, feats)
            return out, torch.autograd.grad(out, feats, grad)[0]

        seconds, (out, gradient) = fastest(both_ways, device)
        expected = _brute_force(query, points, feats, 3)
        expected_gradient, = torch.autograd.grad(expected, feats, grad.double())
        for what, a, b in (("values", out, expected), ("gradient", gradient, expected_gradient)):
            error = ((a - b).abs() / b.abs().max()).nan_to_num(9.0).flatten()
            if error.max() > 1e-5:  # sums in fp32: a few 1e-7
                worst = int(error.argmax())
                sys.exit(f"DIFFERS on {where}: {what} of {B} x {N} x {C} from {S} points, error "
                         f"{float(error[worst]):.1e} of the maximum at flat index {worst}: "
                         f"{float(a.flatten()[worst])}, brute force: {float(b.flatten()[worst])}")
    print(f"ok: interpolate and its gradient agree with brute force on {where}, torch "
          f"{torch.__version__}, triton {triton.__version__ if triton else 'absent'}: {B} x {N} x "
          f"{C} from {S} points in {seconds * 1e3:.1f} ms, "
          f"{32 * B * N * C / 1e6:.1f} MB moved")


if __name__ == "__main__":
    main()
