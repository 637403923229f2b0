"""Time the kernels and the training steps, beside whatever peer is installed and beside a floor.

    python bench.py kernels                every workload: ours, plain torch, peers; do they agree?
    python bench.py kernels --quick        small shapes, for a first look
    python bench.py train --task det       a real training step on random data, published shapes
    python bench.py table                  the tables of docs/results.md, from what was measured

Contenders take turns in one process, so that a busy moment hits all of them; the median counts, the
spread stands beside it. Every figure is appended to docs/bench.jsonl with machine, versions, commit
and date. A peer is whatever of pointnet2_ops, mmcv, pytorch3d, torch_cluster, pykeops, fpsample,
scipy, spconv, torchsparse and MinkowskiEngine can be imported; none is required.
"""
import functools
import importlib
import json
import subprocess
import time
from pathlib import Path

import numpy as np
import torch
from torch.profiler import record_function

try:
    import triton
    import triton.language as tl
except ImportError:                                     # macOS, Windows: no GPU to measure
    triton = None

from common import gather
from data.synthetic_street import scan_street
from kernels import (SparseTensor, ball_query, farthest_point_sample, interpolate, knn, splat,
                     submanifold_conv)
from run import (InputError, Parser, Run, Setup, main_guard, parameter_groups, versions,
                 whole)

fps_file, knn_file, ball_file, splat_file, sparse_file = (
    importlib.import_module(f"kernels.{name}")
    for name in ("fps", "knn", "ball_query", "splat", "sparse_conv"))
OUT = Path(__file__).parent / "docs" / "bench.jsonl"

#       B, N, m
FPS = [(32, 1024, 64), (32, 8192, 1200), (8, 40_000, 2048), (2, 80_000, 20_000), (1, 120_000, 2048)]
#       B, queries, N, k
KNN = [(32, 64, 1024, 32), (8, 2048, 40_000, 64), (1, 80_000, 80_000, 16), (1, 1_000_000, 4096, 3)]
#       B, queries, N, radius, k: the detector's patches, and the second level of LAMM's
BALL = [(8, 2048, 40_000, 0.2, 64), (8, 256, 2048, 1.6, 512)]
#       B, N, S, C, dtype
INTERPOLATE = [(8, 40_000, 2048, C, dtype)
               for C in (256, 512) for dtype in (torch.float32, torch.bfloat16)]
#       B, N, G, K, C
GROUP = [(32, 1024, 64, 32, 3), (8, 2048, 1024, 16, 256)]
#         B, N, H, W, radius in pixels: ten views of 32 objects, one of a room
SPLAT = [(320, 1024, 224, 224, 2.24), (1, 200_000, 1024, 1024, 2.0)]
#         V, C
SPARSE = [(100_000, 64), (100_000, 153), (100_000, 256)]    # 153: of the outdoor release


# ---- Clock and floors ----------------------------------------------------------------------------
def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def rounds(calls, device, most=7, budget=30.0):
    """{name: call} in turns -> {name: milliseconds of each round}. The first round warms up."""
    times = {name: [] for name in calls}
    spent = dict.fromkeys(calls, 0.0)
    for i in range(most + 1):
        for name, call in calls.items():
            if spent[name] > budget and len(times[name]) > 0:
                continue
            wait(device)
            begin = time.perf_counter()
            call()
            wait(device)
            seconds = time.perf_counter() - begin
            spent[name] += seconds
            if i or seconds > budget / 2:               # what takes this long needs no warm-up
                times[name].append(1e3 * seconds)
    return times


def peak(call, device):
    """Megabytes allocated beyond what lived before; None on a CPU, which does not count them."""
    if device.type != "cuda":
        return None
    wait(device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    wait(device)
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def floors(device):
    """What this machine can do, measured: bytes a second of a copy, distances a second, seconds of
    one small step (an argmax: FPS cannot start the next before it), floating-point operations a
    second of a product."""
    x = torch.rand(64 * 2 ** 20, device=device)                                 # 256 MB
    y = torch.empty_like(x)
    a, b = torch.rand(1024, 1, device=device), torch.rand(1, 512, device=device)
    out = torch.empty(1024, 512, device=device)
    tiny = torch.rand(64, device=device)
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    n = 4096 if on_gpu else 1024
    p, q = (torch.rand(n, n, device=device, dtype=dtype) for _ in range(2))

    def distances():            # 7 passes over 2^19 pairs in cache; a distance takes 8
        for _ in range(4):
            torch.sub(a, b, out=out)
            out.mul_(out).add_(1.0).sub_(a).mul_(out).add_(b).add_(a)

    def steps():
        for _ in range(100):
            tiny.argmax()

    calls = {"copy": lambda: y.copy_(x), "pairs": distances, "step": steps,
             "product": lambda: p @ q}
    pairs, repeats = 4 * out.numel(), 100
    if on_gpu:                  # there a call of torch is mostly its launch
        programs, repeats = 8 * torch.cuda.get_device_properties(device).multi_processor_count, 4096
        pairs = programs * 1024 * repeats
        calls["pairs"] = lambda: _distances[(programs,)](x, y, repeats, enable_fp_fusion=False)
        calls["step"] = lambda: _steps[(1,)](x, y, repeats)
    took = rounds(calls, device)
    ms = {name: float(np.min(t)) for name, t in took.items()}
    return {"bytes": 2 * x.nbytes / ms["copy"] * 1e3, "pairs": pairs / ms["pairs"] * 1e3,
            "step": ms["step"] / repeats / 1e3, "flop": 2 * n ** 3 / ms["product"] * 1e3}


if triton:
    @triton.jit(do_not_specialize=["repeats"])
    def _distances(x, y, repeats):      # the arithmetic of a distance and a minimum, in registers
        lane = tl.arange(0, 1024)
        a = tl.load(x + lane)
        b = tl.load(x + 1024 + lane)
        nearest = a
        for i in range(repeats):
            dx, dy, dz = a - i, b - i, (a + b) - i
            nearest = tl.minimum(nearest, (dx * dx + dy * dy) + dz * dz)
        tl.store(y + tl.program_id(0) * 1024 + lane, nearest)

    @triton.jit(do_not_specialize=["repeats"])
    def _steps(x, y, repeats):          # one program: each argmax of 1,024 lanes needs the last one
        lane = tl.arange(0, 1024)
        a = tl.load(x + lane)
        far = tl.argmax(a, 0)
        for _ in range(repeats):
            far = tl.argmax(a + far.to(tl.float32), 0)
        tl.store(y, far.to(tl.float32))


def machine(device):
    """What ran, for every line of bench.jsonl."""
    facts = {**versions(), "threads": torch.get_num_threads(), "device": "CPU"}
    facts["numba"] = getattr(optional("numba"), "__version__", None)           # FPS on CPUs
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True)
        facts.update(device=torch.cuda.get_device_name(), driver=done.stdout.strip().split("\n")[0])
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        facts["device"] = f"CPU, {names[0] if names else 'unknown'}"
    return facts


def optional(name):
    try:
        return importlib.import_module(name)
    except Exception:                                   # absent, or built for another torch
        return None


# ---- Kernels -------------------------------------------------------------------------------------
def fps_case(device, B, N, m):
    xyz = torch.rand(B, N, 3, device=device, generator=torch.Generator(device).manual_seed(0))
    start = torch.zeros(B, dtype=torch.int64, device=device)
    lengths = torch.full((B,), N, device=device)
    calls = {"ours": lambda: farthest_point_sample(xyz, m),
             "torch": lambda: fps_file.fps_torch(xyz, m, start, lengths)}
    if device.type == "cuda":
        if pointnet2 := optional("pointnet2_ops.pointnet2_utils"):
            calls["pointnet2_ops"] = lambda: pointnet2.furthest_point_sample(xyz, m).long()
        if mmcv := optional("mmcv.ops"):
            calls["mmcv"] = lambda: mmcv.furthest_point_sample(xyz, m).long()
    elif fpsample := optional("fpsample"):
        clouds, h = xyz.numpy(), 7 if N > 10_000 else 5
        calls["fpsample"] = lambda: np.stack([
            fpsample.fps_sampling(c, m, start_idx=0).astype(np.int64) for c in clouds])
        calls["fpsample kdline"] = lambda: np.stack([
            fpsample.bucket_fps_kdline_sampling(c, m, h=h, start_idx=0).astype(np.int64)
            for c in clouds])
    if pytorch3d := optional("pytorch3d.ops"):
        calls["pytorch3d"] = lambda: pytorch3d.sample_farthest_points(xyz, K=m)[1]
    if cluster := optional("torch_cluster"):
        flat, batch = xyz.flatten(0, 1), torch.arange(B, device=device).repeat_interleave(N)
        calls["torch_cluster"] = lambda: cluster.fps(
            flat, batch, m / N, random_start=False).view(B, -1) % N
    floor = {"steps": m, "pairs": B * N * m, "bytes": 12 * B * N + 8 * B * m}
    return calls, floor, same_indices


def same_indices(a, b):
    return float((torch.as_tensor(a).cpu() == torch.as_tensor(b).cpu()).float().mean())


def knn_case(device, B, M, N, k):
    g = torch.Generator(device).manual_seed(0)
    points = torch.rand(B, N, 3, device=device, generator=g)
    query = points[:, :M].contiguous()
    if M > N:
        query = torch.rand(B, M, 3, device=device, generator=g)
    lengths = torch.full((B,), N, device=device)
    calls = {"ours": lambda: knn(query, points, k)[1]}
    if B * M * N <= 2e9 or device.type == "cuda":
        calls["torch"] = lambda: knn_file.knn_torch(query, points, k, lengths)[1]
    if device.type == "cpu" and (spatial := optional("scipy.spatial")):
        workers = torch.get_num_threads()
        calls["cKDTree"] = lambda: np.stack([
            spatial.cKDTree(p).query(q, range(1, k + 1), workers=workers)[1]
            for q, p in zip(query.numpy(), points.numpy())])
    if device.type == "cuda" and (mmcv := optional("mmcv.ops")):
        calls["mmcv"] = lambda: mmcv.knn(k, points, query).transpose(1, 2)
    if keops := optional("pykeops.torch"):
        q, p = keops.LazyTensor(query[:, :, None]), keops.LazyTensor(points[:, None])
        calls["pykeops"] = lambda: ((q - p) ** 2).sum(-1).argKmin(k, dim=2)
    if pytorch3d := optional("pytorch3d.ops"):
        calls["pytorch3d"] = lambda: pytorch3d.knn_points(query, points, K=k).idx
    if cluster := optional("torch_cluster"):
        batch = [torch.arange(B, device=device).repeat_interleave(n) for n in (N, M)]
        calls["torch_cluster"] = lambda: cluster.knn(
            points.flatten(0, 1), query.flatten(0, 1), k, *batch)[1].view(B, M, k) % N
    floor = {"pairs": B * M * N, "bytes": 12 * B * (M + N + M * k)}
    return calls, floor, same_indices


def ball_case(device, B, M, N, radius, k):
    """Balls around points of an empty room, of its six sides: 4 x 5 x 2.5 m."""
    g = torch.Generator(device).manual_seed(0)
    points = torch.rand(B, N, 3, device=device, generator=g)
    end = torch.randint(2, (B, N, 1), device=device, generator=g).float()
    areas = torch.tensor([5 * 2.5, 4 * 2.5, 4 * 5], device=device)
    side = torch.multinomial(areas, B * N, True, generator=g).view(B, N, 1)     # at one end of it
    points = points.scatter(2, side, end) * torch.tensor([4, 5, 2.5], device=device)
    query = points[:, :M].contiguous()
    lengths = torch.full((B,), N, device=device)
    calls = {"ours": lambda: ball_query(query, points, radius, k),
             "torch": lambda: ball_file.ball_torch(query, points, radius, k, lengths)}
    if device.type == "cuda":
        if pointnet2 := optional("pointnet2_ops.pointnet2_utils"):
            calls["pointnet2_ops"] = lambda: pointnet2.ball_query(radius, k, points, query)
        if mmcv := optional("mmcv.ops"):
            calls["mmcv"] = lambda: mmcv.ball_query(0, radius, k, points, query)
    if pytorch3d := optional("pytorch3d.ops"):
        def padded():
            found = pytorch3d.ball_query(query, points, K=k, radius=radius, return_nn=False).idx
            return torch.where(found < 0, found[..., :1], found)
        calls["pytorch3d"] = padded
    last = calls["ours"]()[..., -1]         # a scan ends there where a ball is full
    read = torch.where(last > calls["ours"]()[..., 0], last + 1, N).sum()
    floor = {"pairs": int(read), "bytes": 12 * B * (M + N) + 8 * B * M * k}
    return calls, floor, same_indices


def interpolate_case(device, B, N, S, C, dtype):
    g = torch.Generator(device).manual_seed(0)
    query = torch.rand(B, N, 3, device=device, generator=g)
    points = torch.rand(B, S, 3, device=device, generator=g)
    feats = torch.rand(B, S, C, device=device, generator=g).to(dtype).requires_grad_()
    grad = torch.ones(B, N, C, device=device, dtype=dtype)

    def plain():                                # the same three neighbours, gathered rows, summed
        dist2, idx = knn(query, points, 3)
        weight = 1 / (dist2 + 1e-8)
        weight = (weight / weight.sum(-1, keepdim=True))[..., None].to(dtype)
        return (gather(feats, idx) * weight).sum(2)

    calls = {"ours": lambda: both_ways(lambda: interpolate(query, points, feats), feats, grad),
             "torch": lambda: both_ways(plain, feats, grad)}
    floor = {"bytes": 2 * feats.element_size() * B * N * C * 4}     # three rows read, one written
    return calls, floor, lambda a, b: close(a.float(), b.float(), rtol=0.02, atol=0.02)


def group_case(device, B, N, G, K, C):
    g = torch.Generator(device).manual_seed(0)
    values = torch.rand(B, N, C, device=device, generator=g).requires_grad_()
    idx = torch.randint(N, (B, G, K), device=device, generator=g)
    centers = torch.rand(B, G, 1, C, device=device, generator=g)
    grad = torch.ones(B, G, K, C, device=device)

    def plain():
        return torch.stack([v[i] for v, i in zip(values, idx)]) - centers

    calls = {"ours": lambda: both_ways(lambda: gather(values, idx) - centers, values, grad),
             "torch": lambda: both_ways(plain, values, grad)}
    floor = {"bytes": 2 * 4 * B * G * K * C * 2}
    return calls, floor, lambda a, b: close(a, b, rtol=1e-3)


def splat_case(device, B, N, H, W, radius):
    g = torch.Generator(device).manual_seed(0)
    size = torch.tensor([W, H, 1.0], device=device)
    xyz = torch.rand(B, N, 3, device=device, generator=g) * size
    calls = {"ours": lambda: splat(xyz, H, W, radius)[0],
             "torch": lambda: splat_file.splat_torch(xyz, H, W, radius)[0]}
    structures = optional("pytorch3d.structures")
    if structures and (points := optional("pytorch3d.renderer.points.rasterize_points")):
        side = min(H, W)                        # its x points left, its y up; both from -1 to 1
        view = torch.cat([(size[:2] - 2 * xyz[..., :2]) / side, xyz[..., 2:]], -1)
        clouds = structures.Pointclouds(view)
        first = N * torch.arange(B, device=device)[:, None, None]

        def pytorch3d():
            index = points.rasterize_points(clouds, (H, W), 2 * radius / side, 1)[0][..., 0].long()
            return torch.where(index < 0, index, index - first)

        calls["pytorch3d"] = pytorch3d
    return calls, {"bytes": 12 * B * (N + H * W)}, same_indices


def sparse_case(device, V, C):
    """A submanifold convolution on hilly ground, both ways, maps made before.

    All 27 taps have the same matrix: libraries number their taps in different orders.
    """
    g = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    i, side = torch.arange(V, device=device), int(V ** 0.5)
    x, y = i // side, i % side
    rough = torch.rand(V, device=device, generator=g)
    z = (12 * torch.sin(x / 19) * torch.cos(y / 23) + rough).floor().long() + 16    # peers: not < 0
    coords = torch.stack([0 * i, x, y, z], 1).int()
    feats = torch.rand(V, C, device=device, generator=g).to(dtype).requires_grad_()
    weight = torch.rand(1, C, C, device=device, generator=g).div(C).to(dtype)
    weight = weight.repeat(27, 1, 1).requires_grad_()
    grad = torch.rand(V, C, device=device, generator=g).to(dtype)
    ours = SparseTensor(coords, feats)
    pairs = ours.map(3, 1)

    def plain():                                # the reference: its gradients, too
        table, rows, back_table, back_rows = pairs
        sparse_file.conv_torch(feats, weight, table, rows)
        sparse_file.weights_torch(feats, grad, table, rows)
        return sparse_file.conv_torch(grad, weight.mT, back_table, back_rows)

    calls = {"ours": lambda: both_ways(lambda: submanifold_conv(ours, weight).feats, feats, grad),
             "torch": torch.no_grad()(plain)}
    if device.type == "cuda" and (spconv := optional("spconv.pytorch")):
        @functools.cache
        def made():
            layer = spconv.SubMConv3d(C, C, 3, bias=False, indice_key="k").to(device, dtype)
            with torch.no_grad():               # (D, 3, 3, 3, C)
                layer.weight.copy_(weight.view(3, 3, 3, C, C).permute(4, 0, 1, 2, 3))
            size = (coords[:, 1:].amax(0) + 1).tolist()
            return layer, spconv.SparseConvTensor(feats, coords, size, 1)

        def in_spconv():
            layer, voxels = made()
            return layer(voxels.replace_feature(feats)).features

        calls["spconv"] = lambda: both_ways(in_spconv, feats, grad)
    if torchsparse := optional("torchsparse"):
        @functools.cache
        def layer_torchsparse():
            layer = torchsparse.nn.Conv3d(C, C, 3).to(device, dtype)
            layer.kernel.data.copy_(weight.data)
            return layer, torchsparse.SparseTensor(feats, coords)

        def in_torchsparse():
            layer, voxels = layer_torchsparse()
            return layer(voxels).feats

        calls["torchsparse"] = lambda: both_ways(in_torchsparse, feats, grad)
    if engine := optional("MinkowskiEngine"):   # has no bf16
        @functools.cache
        def layer_minkowski():
            layer = engine.MinkowskiConvolution(C, C, kernel_size=3, dimension=3).to(device)
            layer.kernel.data.copy_(weight.data)
            return layer, engine.SparseTensor(feats.float(), coords)

        def in_minkowski():
            layer, voxels = layer_minkowski()
            return layer(engine.SparseTensor(
                feats.float(), coordinate_map_key=voxels.coordinate_map_key,
                coordinate_manager=voxels.coordinate_manager)).F.to(dtype)

        calls["Minkowski fp32"] = lambda: both_ways(in_minkowski, feats, grad)
    # forward and two gradients: products of each pair; rows read, written and a map read in each
    count = int((pairs[0] >= 0).sum())
    floor = {"flop": 3 * 2 * count * C * C,
             "bytes": 3 * (feats.element_size() * (2 * V * C + 27 * C * C) + 4 * 27 * V)}
    return calls, floor, lambda a, b: close(a.float(), b.float(), rtol=0.02, atol=0.02)


def both_ways(forward, feats, grad):
    feats.grad = None
    forward().backward(grad)
    return feats.grad


def close(a, b, **tolerance):
    return float(torch.isclose(a, b, **tolerance).float().mean())


def name_of(kernel, shape):
    if kernel == "FPS":
        return "FPS {} x {:,} -> {:,}".format(*shape)
    if kernel == "KNN":
        return "KNN {} x ({:,} of {:,}), k = {}".format(*shape)
    if kernel == "ball query":
        return "ball query {} x ({:,} of {:,}), {} m, k = {}".format(*shape)
    if kernel == "grouping":
        return "grouping {} x {:,}, {:,} x {}, C = {}, both ways".format(*shape)
    if kernel == "splat":
        return "splat {} x {:,} points at {} x {}, r = {}".format(*shape)
    if kernel == "sparse conv":
        return "sparse conv {:,} voxels, 27 taps, C = {}, both ways".format(*shape)
    dtype = str(shape[4]).removeprefix("torch.")
    return "interpolation {} x {:,} from {:,}, C = {}, {}, both ways".format(*shape[:4], dtype)


def kernels(device, quick):
    can, facts = floors(device), machine(device)
    print(f"{facts['device']}, {facts['threads']} threads; torch {facts['torch']}, triton "
          f"{facts['triton']}, numba {facts['numba'] or 'absent'}; copy {can['bytes'] / 1e9:.1f} "
          f"GB/s, {can['pairs'] / 1e9:.2f} G distances/s, a small step {1e6 * can['step']:.2f} us, "
          f"product {can['flop'] / 1e12:.2f} TFLOP/s")
    write({"kind": "floors", **can, **facts})
    print(f"{'workload':66s}{'contender':17s}{'ms':>10}{'spread':>8}{'MB':>8}{'same':>8}"
          f"{'ours is':>9}{'floor ms':>10}{'of floor':>9}")
    cases = [("FPS", fps_case, FPS), ("KNN", knn_case, KNN),
             ("ball query", ball_case, BALL), ("interpolation", interpolate_case, INTERPOLATE),
             ("grouping", group_case, GROUP), ("splat", splat_case, SPLAT),
             ("sparse conv", sparse_case, SPARSE)]
    for kernel, case, shapes in cases:
        for shape in shapes:
            limit = 3e8 if quick else 1e12              # distances of a workload
            if kernel in ("FPS", "KNN", "ball query") and np.prod(shape[:3], dtype=float) > limit:
                continue
            half = kernel == "interpolation" and shape[4] == torch.bfloat16
            if half and device.type == "cpu" or kernel == "interpolation" and quick:
                continue                                # no kernel of ours runs in bf16 on a CPU
            if kernel == "sparse conv" and quick and shape[1] > 64:
                continue
            measure(name_of(kernel, shape), case(device, *shape), device, quick, can, facts)


def measure(workload, case, device, quick, can, facts):
    """Time the contenders of a workload, check that they agree, write and print a line for each."""
    calls, needs, agree = case
    truth, same = calls["ours"](), {"ours": 1.0}
    for who in [who for who in calls if who != "ours"]:
        try:
            same[who] = agree(truth, calls[who]())
        except Exception as error:          # a peer whose API has changed is left out
            if who == "torch":
                raise
            del calls[who]
            reason = " ".join(str(error).split())[:120]
            print(f"{workload}: {who} left out, {type(error).__name__}: {reason}")
    times = rounds(calls, device, most=3 if quick else 7)
    floor = 1e3 * max(needs["bytes"] / can["bytes"], needs.get("pairs", 0) / can["pairs"],
                      needs.get("steps", 0) * can["step"], needs.get("flop", 0) / can["flop"])
    if device.type == "cpu" and "pairs" in needs:       # trees leave out most of the distances
        floor = None
    ours = float(np.median(times["ours"]))
    for who, ms in times.items():
        line = {"kind": "kernel", "workload": workload, "contender": who,
                "ms": float(np.median(ms)), "spread": float(np.ptp(ms) / np.median(ms)),
                "mb": peak(calls[who], device), "same": same[who], "floor_ms": floor,
                "quick": quick}
        write({**line, **facts})
        label = workload if who == "ours" else ""
        faster = "" if who == "ours" else f"{line['ms'] / ours:.2f} x"
        memory = f"{'':8s}" if line["mb"] is None else f"{line['mb']:8.1f}"
        of_floor = f"{floor:10.3f}{line['ms'] / floor:7.1f} x" if floor else ""
        print(f"{label:66s}{who:17s}{line['ms']:10.2f}{100 * line['spread']:6.0f} %{memory}"
              f"{100 * line['same']:6.1f} %{faster:>9}{of_floor}", flush=True)


# ---- Training steps ------------------------------------------------------------------------------
DATA = {"cls": "modelnet40", "fewshot": "modelnet40", "det": "scannet", "seg": "s3dis",
        "clip2point": "shapenet", "outdoor": "semantickitti"}
EPOCH = {"cls": 9843, "fewshot": 50, "det": 1201, "seg": 1000, "clip2point": 41_952,    # samples
         "outdoor": 19_130}


def training(task, device, batch, clip, precision):
    """A real step on random data -> step(), model, its Run, samples of a step, what it is."""
    script = importlib.import_module(f"train_{task}")
    words = ["--data", DATA[task], "--clip", clip, *(["--batch-size", str(batch)] if batch else [])]
    cfg = script.settings(script.flags(words))[0]
    recipe, setup = script.Recipe(**cfg["recipe"]), Setup(device, precision)
    run = Run(task, cfg, setup)
    run.begin(0)
    data, rows, cfg["classes"] = random_data(script, task, recipe, setup.device)
    if task == "clip2point":
        clip = script.load_both_towers(cfg["clip"], 0, setup.device)
        data = data._replace(image=torch.randn(recipe.batch_size, 10, clip.visual.output_dim,
                                               device=setup.device))
        model = script.DepthTowers(clip.visual, ["depth"]).to(setup.device)
        optimizer = script.optimizer_of(model, recipe._replace(lr=1e-6))
        what = f"{recipe.points:,} points, 2 maps of {clip.size} x {clip.size}"
        return (lambda: script.train_step(model, optimizer, data, rows, clip, run),
                model, run, recipe.batch_size, what)
    if task == "outdoor":
        model = script.build(cfg, None, setup)[1]
        optimizer = torch.optim.SGD(model.parameters(), 1e-6, recipe.momentum)
        parts = script.my_parts(recipe.batch_size, 1)
        what = f"scans of {len(data[0].inverse):,} points, {recipe.tokens} tokens"
        return (lambda: script.train_step(model, optimizer, iter(data), parts, run),
                model, run, recipe.batch_size, what)
    if task == "fewshot":
        model = script.Encoders(cfg, cfg["classes"], setup).classifier("frozen", 5, [0])
    else:
        model = script.build(cfg, None, setup)[1]
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe.decay), lr=1e-6)   # it stays put

    def step():
        script.train_step(model, optimizer, data, rows, run)

    what = f"{recipe.points:,} points, "
    if task in ("cls", "fewshot"):
        what += f"{recipe.groups} x {recipe.neighbours} patches"
    else:
        what += f"{recipe.tokens:,} tokens"
    return step, model, run, recipe.batch_size, what


def random_data(script, task, recipe, device):
    """-> data and rows as the script's train_step takes them, names of the classes."""
    B = recipe.batch_size
    if task == "cls":
        xyz = torch.rand(B, recipe.stored, 3, device=device)
        label = torch.randint(40, (B,), device=device)
        return script.Objects(xyz, label), torch.arange(B, device=device), ["class"] * 40
    if task == "fewshot":
        n = recipe.points * 75 // 64            # what the field's loaders draw from: 1024 of 1200
        samples = torch.rand(50, script.SAMPLES, n, 3, device=device)
        label = torch.arange(50, device=device) % 5
        return script.Objects(samples, label), torch.arange(B, device=device), ["class"] * 5
    if task == "clip2point":
        views = torch.tensor(script.AXIS10, device=device).float().expand(B, -1, -1)
        xyz = torch.rand(B, 8192, 3, device=device)
        return script.Pairs(xyz, xyz[:0], views, None, None), torch.arange(B, device=device), []
    if task == "outdoor":                       # a simulated sensor of 64 beams
        scans = (script.Scan(f"street{i}", *scan_street(i, 64, 2100)) for i in range(B))
        return [script.voxels_of(scan, recipe.voxel) for scan in scans], None, ["class"] * 19
    if task == "det":
        size, scenes = torch.tensor([6., 7, 3]), []
        for i in range(B):
            boxes = torch.cat([torch.rand(14, 3) * size, torch.rand(14, 3) + 0.3], 1)
            arrays = torch.rand(50_000, 3) * size, boxes, torch.randint(18, (14,))
            scenes.append(script.Scene(f"s{i}", *(x.to(device) for x in arrays)))
        return scenes, list(range(B)), ["class"] * 18
    n = 200_000
    arrays = (torch.rand(n, 3) * torch.tensor([5., 5, 3]), torch.randint(256, (n, 3)).byte(),
              torch.randint(13, (n,)).short())
    room = script.Room("room", *(x.to(device) for x in arrays))
    return [room], [(i, 0) for i in range(B)], ["class"] * 13


LABELS = {                  # what the profiler calls a part of a step -> its name in the table
    "step": "the rest", "data": "data", "nanoepcl::farthest_point_sample": "FPS",
    "nanoepcl::knn": "KNN", "nanoepcl::ball_query": "ball query",
    "nanoepcl::interpolate": "interpolation", "nanoepcl::interpolate_backward": "interpolation",
    "nanoepcl::sparse_conv": "sparse convolution",
    "nanoepcl::sparse_conv_weights": "sparse convolution",
    "tokenizer": "tokenizer", "frozen forward": "frozen forward", "model": "head",
    "matching": "matching", "depth maps": "depth maps", "tower forward": "tower forward",
    "loss": "loss",
    "autograd::engine::evaluate_function": "backward", "Optimizer.step#AdamW.step": "optimiser",
    "Optimizer.step#Lamb.step": "optimiser", "Optimizer.step#SGD.step": "optimiser"}


def show_parts(model):
    """Let the profiler see the parts of the model under the names of LABELS."""
    def show(module, name):
        spans = []
        module.register_forward_pre_hook(
            lambda *_: spans.append(record_function(name).__enter__()))
        module.register_forward_hook(lambda *_: spans.pop().__exit__(None, None, None))

    show(model, "model")
    if hasattr(model, "encoder"):
        tokenizer = getattr(model, "tokenizer", None) or getattr(model.encoder, "patches", None)
        for module in [tokenizer] if tokenizer else model.downs:        # train_seg.py's: two levels
            show(module, "tokenizer")
    blocks, name = transformer_of(model)
    for block in blocks:
        show(block, name)


def transformer_of(model):
    """-> its blocks, what their pass is called: EPCL's is frozen, CLIP2Point trains a tower."""
    if hasattr(model, "encoder"):
        return model.encoder.clip.blocks, "frozen forward"
    return model.towers["depth"].transformer.resblocks, "tower forward"


def parts_of(step, device, usual):
    """Seconds of a step by part, each without the labelled parts inside it.

    On a GPU these are seconds of its kernels, and what is then left of the `usual` seconds of a
    step that nobody watches: there it has none to run.
    """
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profile, record_function("step"):
        step()
        wait(device)
    seconds = {}
    for event in profile.events():
        label = LABELS.get(event.name.split(": ")[0])
        if label is None or event.device_type != torch.autograd.DeviceType.CPU:
            continue
        time_of = event.device_time_total if device.type == "cuda" else event.cpu_time_total
        seconds[label] = seconds.get(label, 0) + time_of / 1e6
        parent = event.cpu_parent
        while parent and parent.name.split(": ")[0] not in LABELS:
            parent = parent.cpu_parent
        if parent:
            outer = LABELS[parent.name.split(": ")[0]]
            seconds[outer] = seconds.get(outer, 0) - time_of / 1e6
    if device.type == "cuda":
        seconds["GPU idle"] = max(0.0, usual - sum(seconds.values()))
    return seconds


def train(task, device, batch, clip, precision, repeat):
    step, model, run, B, what = training(task, device, batch, clip, precision)
    device, setup = run.setup.device, run.setup
    model.train()
    shapes, (blocks, forward) = [], transformer_of(model)
    hook = blocks[0].register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    memory = peak(step, device)
    if not shapes:                                      # a CPU does not count memory
        step()
    hook.remove()
    ms = rounds({"step": step}, device, repeat, budget=240.0)["step"]
    show_parts(model)
    seconds = parts_of(step, device, float(np.median(ms)) / 1e3)
    b, L, D = shapes[0]
    flop = b * len(blocks) * (24 * L * D * D + 4 * L * L * D)
    can, facts, median = floors(device), machine(device), float(np.median(ms))
    whole_step = sum(seconds.values())
    line = {"kind": "train", "task": task, "what": what, "batch": B,
            "precision": "bf16" if setup.bf16 else "fp32", "clip": clip, "data": "random",
            "ms": median, "spread": float(np.ptp(ms) / median),
            "samples_per_second": 1e3 * B / median, "epoch_samples": EPOCH[task],
            "epoch_seconds": median / 1e3 * EPOCH[task] / B, "mb": memory,
            "frozen_tflops": flop / seconds[forward] / 1e12,
            "product_tflops": can["flop"] / 1e12,
            "parts": {name: s / whole_step for name, s in seconds.items()}}
    write({**line, **facts})
    memory = f", peak {memory / 1e3:.2f} GB" if memory else ""
    print(f"{facts['device']}, {facts['threads']} threads, {line['precision']}; torch "
          f"{facts['torch']}; {task}, {what}, batch {B}, {clip} (random data)")
    print(f"step     {median:.1f} ms (spread {100 * line['spread']:.0f} %), "
          f"{line['samples_per_second']:.2f} samples a second, {line['epoch_seconds']:.1f} s for "
          f"{EPOCH[task]:,} samples{memory}")
    print(f"{forward.split()[0]:8s} {line['frozen_tflops']:.2f} TFLOP/s forward; a matrix product "
          f"reaches {line['product_tflops']:.2f}")
    shares = sorted(line["parts"].items(), key=lambda item: -item[1])
    print("parts    " + ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares))


# ---- Results -------------------------------------------------------------------------------------
def write(line):
    with open(OUT, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def short(ms):
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}"


def table():
    """The newest figures as Markdown, a table for each machine."""
    if not OUT.exists():
        raise InputError(f"{OUT}: nothing measured yet; run `python bench.py kernels` first")
    lines = [json.loads(line) for line in OUT.read_text(encoding="utf-8").splitlines()]
    for device, threads in dict.fromkeys((x["device"], x["threads"]) for x in lines):
        here = [x for x in lines if (x["device"], x["threads"]) == (device, threads)]
        last = here[-1]
        print(f"{device}, {threads} thread{'s' * (threads > 1)}; torch {last['torch']}, triton "
              f"{last['triton']}, numba {last.get('numba') or 'absent'}, {last['date'][:10]}\n")
        kernel_table([x for x in here if x["kind"] == "kernel"])
        train_table([x for x in here if x["kind"] == "train"])
        print()


def kernel_table(lines):
    new = {(x["workload"], x["contender"]): x for x in lines}
    if new:
        print("| workload | ours, ms | plain torch, ms | best peer, ms | ours is | of the floor |\n"
              "|---|---|---|---|---|---|")
    for workload in dict.fromkeys(w for w, _ in new):
        ours, plain = new[workload, "ours"], new.get((workload, "torch"))
        peers = [x for (w, who), x in new.items() if w == workload and who not in ("ours", "torch")
                 and x["date"] == ours["date"]]         # a ratio is of one run
        best = min(peers, key=lambda x: x["ms"], default=None)
        peer, ratio = "none here", ""
        if best:
            peer = f"{short(best['ms'])} ({best['contender']}, {100 * best['same']:.0f} % same)"
            ratio = f"{best['ms'] / ours['ms']:.2f} x"
        floor = f"{ours['ms'] / ours['floor_ms']:.1f} x " if ours["floor_ms"] else ""
        plain = short(plain["ms"]) if plain else ""
        print(f"| {workload} | {short(ours['ms'])} | {plain} | {peer} | {ratio} | {floor}|")


def train_table(lines):
    new = {(x["task"], x["batch"], x["clip"], x["precision"]): x for x in lines}
    if new:
        print("\n| step (random data) | batch | ms | samples/s | frozen forward, TFLOP/s (product) "
              "| where the time goes |\n|---|---|---|---|---|---|")
    for x in new.values():
        shares = sorted(x["parts"].items(), key=lambda item: -item[1])
        parts = ", ".join(f"{name} {100 * s:.0f} %" for name, s in shares if s > .015)
        print(f"| {x['task']}, {x['what']}, {x['clip']}, {x['precision']} | {x['batch']} | "
              f"{x['ms']:.0f} | {x['samples_per_second']:.2f} | {x['frozen_tflops']:.3f} "
              f"({x['product_tflops']:.3f}) | {parts} |")


def main(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("what", choices=["kernels", "train", "table"], help="table: all that was measured")
    flag("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    flag("--quick", action="store_true", help="kernels: only what is over in seconds on a CPU")
    flag("--task", choices=DATA, default="cls",
         help="train: whose step")
    flag("--batch-size", type=whole(2), metavar="B", help="train: instead of the recipe's")
    flag("--clip", default="random", metavar="NAME",
         help="train: frozen weights (default: random ViT-B/32)")
    flag("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    flag("--repeat", type=whole(1), default=5, metavar="N", help="train: steps that are timed")
    args = parser.parse_args(argv)
    given = [name for name in ("task", "batch_size", "clip", "precision", "repeat")
             if args.what != "train" and getattr(args, name) != parser.get_default(name)]
    if given:
        raise InputError(f"--{given[0].replace('_', '-')}: belongs to bench.py train; leave it out")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA device; leave it out to run on the "
                         "CPU")
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if args.what == "kernels":
        kernels(device, args.quick)
        print(f"appended to {OUT}")
    elif args.what == "train":
        train(args.task, device.type, args.batch_size, args.clip, args.precision, args.repeat)
    else:
        table()


if __name__ == "__main__":
    main_guard(main)
