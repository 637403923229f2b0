"""Time the kernels and the training steps, beside whatever peer is installed and beside a floor.

    python bench.py kernels                every workload: ours, plain torch, peers; do they agree?
    python bench.py kernels --quick        small shapes, for a first look
    python bench.py train --task det       a real training step on random data of the published shapes
    python bench.py table                  README's table, from what was measured

Contenders take turns in one process, so that a busy moment hits all of them; the median counts, the
spread stands beside it. Every figure is appended to bench.jsonl with machine, versions, commit and
date. A peer is whatever of pointnet2_ops, mmcv, pytorch3d, torch_cluster, pykeops, fpsample and
scipy can be imported; none is required.
"""
import argparse
import importlib
import json
import subprocess
import time
from pathlib import Path

import numpy as np
import torch

import common
from common import InputError, gather
from kernels import farthest_point_sample, interpolate, knn

fps_file, knn_file = (importlib.import_module(f"kernels.{name}") for name in ("fps", "knn"))
OUT = Path(__file__).parent / "bench.jsonl"

#       B, N, m
FPS = [(32, 1024, 64), (32, 8192, 1200), (8, 40_000, 2048), (2, 80_000, 20_000), (1, 120_000, 2048)]
#       B, queries, N, k
KNN = [(32, 64, 1024, 32), (8, 2048, 40_000, 64), (1, 80_000, 80_000, 16), (1, 1_000_000, 4096, 3)]
#       B, N, S, C, dtype
INTERPOLATE = [(8, 40_000, 2048, C, dtype) for C in (256, 512) for dtype in (torch.float32, torch.bfloat16)]
#       B, N, G, K, C
GROUP = [(32, 1024, 64, 32, 3), (8, 2048, 1024, 16, 256)]


# --------------------------------------------------------------------------------------------------
# Clock and floors
# --------------------------------------------------------------------------------------------------

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
    """What this machine can do, measured: bytes a second of a copy, distances a second, seconds of one
    small step (FPS cannot start the next before it), floating-point operations a second of a product."""
    x = torch.rand(64 * 2 ** 20, device=device)                                 # 256 MB
    y = torch.empty_like(x)
    a, b, out = torch.rand(1024, 1, device=device), torch.rand(1, 512, device=device), torch.empty(1024, 512, device=device)
    tiny = torch.rand(64, device=device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    n = 4096 if device.type == "cuda" else 1024
    p, q = torch.rand(n, n, device=device, dtype=dtype), torch.rand(n, n, device=device, dtype=dtype)

    def distances():                                    # 7 passes over 2^19 pairs in cache; a distance takes 8
        for _ in range(4):
            torch.sub(a, b, out=out)
            out.mul_(out).add_(1.0).sub_(a).mul_(out).add_(b).add_(a)

    def steps():
        for _ in range(100):
            tiny.argmax()

    took = rounds({"copy": lambda: y.copy_(x), "pairs": distances, "step": steps, "product": lambda: p @ q}, device)
    ms = {name: float(np.min(t)) for name, t in took.items()}
    return {"bytes": 2 * x.nbytes / ms["copy"] * 1e3, "pairs": 4 * out.numel() / ms["pairs"] * 1e3,
            "step": ms["step"] / 100 / 1e3, "flop": 2 * n ** 3 / ms["product"] * 1e3}


def machine(device):
    """What ran, for every line of bench.jsonl."""
    facts = {**common.versions(), "threads": torch.get_num_threads(), "device": "CPU"}
    facts["numba"] = getattr(optional("numba"), "__version__", None)           # FPS on CPUs
    if device.type == "cuda":
        driver = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
                                capture_output=True, text=True).stdout.strip().split("\n")[0]
        facts.update(device=torch.cuda.get_device_name(), driver=driver)
    elif Path("/proc/cpuinfo").exists():
        names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
        facts["device"] = f"CPU, {names[0] if names else 'unknown'}"
    return facts


def optional(name):
    try:
        return importlib.import_module(name)
    except Exception:                                   # absent, or built for another torch
        return None


# --------------------------------------------------------------------------------------------------
# Kernels
# --------------------------------------------------------------------------------------------------

def fps_case(device, B, N, m):
    xyz = torch.rand(B, N, 3, device=device, generator=torch.Generator(device).manual_seed(0))
    start, lengths = torch.zeros(B, dtype=torch.int64, device=device), torch.full((B,), N, device=device)
    calls = {"ours": lambda: farthest_point_sample(xyz, m), "torch": lambda: fps_file.fps_torch(xyz, m, start, lengths)}
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
            fpsample.bucket_fps_kdline_sampling(c, m, h=h, start_idx=0).astype(np.int64) for c in clouds])
    if pytorch3d := optional("pytorch3d.ops"):
        calls["pytorch3d"] = lambda: pytorch3d.sample_farthest_points(xyz, K=m)[1]
    if cluster := optional("torch_cluster"):
        flat, batch = xyz.flatten(0, 1), torch.arange(B, device=device).repeat_interleave(N)
        calls["torch_cluster"] = lambda: cluster.fps(flat, batch, m / N, random_start=False).view(B, -1) % N
    floor = {"steps": m, "pairs": B * N * m, "bytes": 12 * B * N + 8 * B * m}
    return calls, floor, lambda a, b: float((torch.as_tensor(a).cpu() == torch.as_tensor(b).cpu()).float().mean())


def knn_case(device, B, M, N, k):
    g = torch.Generator(device).manual_seed(0)
    points = torch.rand(B, N, 3, device=device, generator=g)
    query = points[:, :M].contiguous() if M <= N else torch.rand(B, M, 3, device=device, generator=g)
    lengths = torch.full((B,), N, device=device)
    calls = {"ours": lambda: knn(query, points, k)[1]}
    if B * M * N <= 2e9 or device.type == "cuda":
        calls["torch"] = lambda: knn_file.knn_torch(query, points, k, lengths)[1]
    if device.type == "cpu" and (spatial := optional("scipy.spatial")):
        workers = torch.get_num_threads()
        calls["cKDTree"] = lambda: np.stack([spatial.cKDTree(p).query(q, range(1, k + 1), workers=workers)[1]
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
        calls["torch_cluster"] = lambda: cluster.knn(points.flatten(0, 1), query.flatten(0, 1), k, *batch)[1].view(B, M, k) % N
    floor = {"pairs": B * M * N, "bytes": 12 * B * (M + N + M * k)}
    return calls, floor, lambda a, b: float((torch.as_tensor(a).cpu() == torch.as_tensor(b).cpu()).float().mean())


def interpolate_case(device, B, N, S, C, dtype):
    g = torch.Generator(device).manual_seed(0)
    query, points = torch.rand(B, N, 3, device=device, generator=g), torch.rand(B, S, 3, device=device, generator=g)
    feats = torch.rand(B, S, C, device=device, generator=g).to(dtype).requires_grad_()
    grad = torch.ones(B, N, C, device=device, dtype=dtype)

    def both(forward):
        feats.grad = None
        forward().backward(grad)
        return feats.grad

    def plain():                                        # the same three neighbours, gathered rows, summed
        dist2, idx = knn(query, points, 3)
        weight = 1 / (dist2 + 1e-8)
        return (gather(feats, idx) * (weight / weight.sum(-1, keepdim=True))[..., None].to(dtype)).sum(2)

    calls = {"ours": lambda: both(lambda: interpolate(query, points, feats)), "torch": lambda: both(plain)}
    floor = {"bytes": 2 * feats.element_size() * B * N * C * 4}         # both ways: three rows read, one written
    return calls, floor, lambda a, b: float(torch.isclose(a.float(), b.float(), rtol=0.02, atol=0.02).float().mean())


def group_case(device, B, N, G, K, C):
    g = torch.Generator(device).manual_seed(0)
    values = torch.rand(B, N, C, device=device, generator=g).requires_grad_()
    idx = torch.randint(N, (B, G, K), device=device, generator=g)
    centers = torch.rand(B, G, 1, C, device=device, generator=g)
    grad = torch.ones(B, G, K, C, device=device)

    def both(forward):
        values.grad = None
        forward().backward(grad)
        return values.grad

    calls = {"ours": lambda: both(lambda: gather(values, idx) - centers),
             "torch": lambda: both(lambda: torch.stack([v[i] for v, i in zip(values, idx)]) - centers)}
    floor = {"bytes": 2 * 4 * B * G * K * C * 2}
    return calls, floor, lambda a, b: float(torch.isclose(a, b, rtol=1e-3).float().mean())


def name_of(kernel, shape):
    if kernel == "FPS":
        return "FPS {} x {:,} -> {:,}".format(*shape)
    if kernel == "KNN":
        return "KNN {} x ({:,} of {:,}), k = {}".format(*shape)
    if kernel == "grouping":
        return "grouping {} x {:,}, {:,} x {}, C = {}, both ways".format(*shape)
    return "interpolation {} x {:,} from {:,}, C = {}, {}, both ways".format(*shape[:4], str(shape[4])[6:])


def kernels(device, quick):
    most = 3 if quick else 7
    limit = 3e8 if quick else 1e12                      # distances of a workload
    can = floors(device)
    facts = machine(device)
    print(f"{facts['device']}, {facts['threads']} threads; torch {facts['torch']}, triton {facts['triton']}, numba {facts['numba'] or 'absent'}; copy "
          f"{can['bytes'] / 1e9:.1f} GB/s, {can['pairs'] / 1e9:.2f} G distances/s, a small step {1e6 * can['step']:.1f} us, "
          f"product {can['flop'] / 1e12:.2f} TFLOP/s")
    write({"kind": "floors", **can, **facts})
    print(f"{'workload':66s}{'contender':17s}{'ms':>10}{'spread':>8}{'MB':>8}{'same':>8}{'ours is':>9}{'floor ms':>10}"
          f"{'of floor':>9}")
    for kernel, case, shapes in (("FPS", fps_case, FPS), ("KNN", knn_case, KNN), ("interpolation", interpolate_case, INTERPOLATE),
                                 ("grouping", group_case, GROUP)):
        for shape in shapes:
            if kernel in ("FPS", "KNN") and np.prod(shape[:3], dtype=float) > limit:
                continue
            if kernel == "interpolation" and (quick or device.type == "cpu" and shape[4] == torch.bfloat16):
                continue                                # no kernel of ours runs in bf16 on a CPU
            calls, needs, agree = case(device, *shape)
            truth, same = calls["ours"](), {"ours": 1.0}
            for who in [who for who in calls if who != "ours"]:
                try:
                    same[who] = agree(truth, calls[who]())
                except Exception as error:              # a peer whose API has changed must not cost us the table
                    if who == "torch":
                        raise
                    del calls[who]
                    print(f"{name_of(kernel, shape)}: {who} left out, {type(error).__name__}: {' '.join(str(error).split())[:120]}")
            times = rounds(calls, device, most)
            floor = 1e3 * max(needs["bytes"] / can["bytes"], needs.get("pairs", 0) / can["pairs"],
                              needs.get("steps", 0) * can["step"])
            if device.type == "cpu" and "pairs" in needs:   # trees leave out most of the distances: no such floor
                floor = None
            ours = float(np.median(times["ours"]))
            for who, ms in times.items():
                line = {"kind": "kernel", "workload": name_of(kernel, shape), "contender": who, "ms": float(np.median(ms)),
                        "spread": float(np.ptp(ms) / np.median(ms)), "mb": peak(calls[who], device),
                        "same": same[who], "floor_ms": floor, "quick": quick}
                write({**line, **facts})
                faster = "" if who == "ours" else f"{line['ms'] / ours:.2f} x"
                print(f"{line['workload'] if who == 'ours' else '':66s}{who:17s}{line['ms']:10.2f}{100 * line['spread']:6.0f} %"
                      + (f"{line['mb']:8.1f}" if line["mb"] is not None else f"{'':8s}")
                      + f"{100 * line['same']:6.1f} %{faster:>9}"
                      + (f"{floor:10.3f}{line['ms'] / floor:7.1f} x" if floor else ""), flush=True)


# --------------------------------------------------------------------------------------------------
# Training steps
# --------------------------------------------------------------------------------------------------

class Parts(common.Clock):
    """Seconds by part of a step, of modules and of functions, which are wrapped until `end`."""

    def __init__(self, device):
        super().__init__(device)
        self.undo = []

    def function(self, owner, attribute, name):
        inside = getattr(owner, attribute)

        def timed(*args, **kwargs):
            self.start()
            out = inside(*args, **kwargs)
            self.stop(name)
            return out
        setattr(owner, attribute, timed)
        self.undo.append(lambda: setattr(owner, attribute, inside))

    def end(self):
        for undo in reversed(self.undo):
            undo()


def training(task, device, batch, clip, precision):
    """-> step(), model, parts to be timed {name: module or (owner, function)}, samples a step, epoch, what."""
    script = importlib.import_module(f"train_{task}")
    setup = common.Setup(device, precision)
    data = {"cls": "modelnet40", "det": "scannet", "seg": "s3dis", "fewshot": "modelnet40"}[task]
    words = ["--data", data, "--clip", clip, *(["--batch-size", str(batch)] if batch else [])]
    cfg = script.settings(script.flags(words))[0]
    recipe, B = script.Recipe(**cfg["recipe"]), cfg["recipe"]["batch_size"]
    common.seed_all(0)
    cfg["classes"], rows = [f"class {i}" for i in range(40 if task == "cls" else 5)], torch.arange(B, device=setup.device)
    if task == "cls":
        clip, model, text = script.build(cfg, None, setup)
        xyz, label = torch.rand(B, recipe.stored, 3, device=setup.device), torch.randint(40, (B,), device=setup.device)
        step = lambda: script.train_step(model, optimizer, xyz, label, rows, text, recipe, cfg, setup)          # noqa: E731
        parts, epoch = {"data": (script, "sample_train")}, 9843
    elif task == "det":
        cfg["classes"] = list(script.SCANNET_BOXES)
        clip, model = script.build(cfg, None, setup)
        size = torch.tensor([6., 7, 3])
        boxes = torch.cat([torch.rand(B, 14, 3) * size, torch.rand(B, 14, 3) + 0.3], 2)
        scenes = [script.Scene(f"s{i}", (torch.rand(50_000, 3) * size).to(setup.device), boxes[i].to(setup.device),
                               torch.randint(18, (14,), device=setup.device)) for i in range(B)]
        step = lambda: script.train_step(model, optimizer, scenes, list(range(B)), 0, recipe, cfg, setup)       # noqa: E731
        parts = {"data": (script, "make_batch"), "FPS": (script, "farthest_point_sample"), "KNN": (script, "knn"),
                 "matching": (script, "match"), "tokenizer": model.encoder.tokenizer, "head": model}
        epoch, what = 1201, f"{recipe.points:,} points, {recipe.tokens:,} tokens"
    elif task == "seg":
        cfg["classes"] = list(script.ROOM_CLASSES)
        clip, model = script.build(cfg, None, setup)
        n = 200_000
        rooms = [script.Room("r", (torch.rand(n, 3) * torch.tensor([5., 5, 3])).to(setup.device),
                             torch.randint(256, (n, 3), device=setup.device).byte(),
                             torch.randint(13, (n,), device=setup.device).short())]
        step = lambda: script.train_step(model, optimizer, rooms, [0] * B, 0, 0, recipe, cfg, setup)            # noqa: E731
        parts = {"data": (script, "training_block"), "FPS": (script, "farthest_point_sample"), "KNN": (script, "knn"),
                 "interpolation": (script, "interpolate"), "tokenizer": model.downs[0], "tokenizer ": model.downs[1],
                 "head": model}
        epoch, what = 1000, f"{recipe.points:,} points, {recipe.tokens:,} tokens"
    else:
        model = script.Encoders(cfg, cfg["classes"], setup).classifier("frozen", 5, [0])
        n = recipe.points * 75 // 64                    # what the field's loaders draw from: 1024 of 1200
        samples, label = torch.rand(50, script.SAMPLES, n, 3, device=setup.device), torch.arange(50, device=setup.device) % 5
        step = lambda: script.train_step(model, optimizer, samples, label, rows, None, recipe, cfg, setup)      # noqa: E731
        parts, epoch = {"data": (script, "augment")}, 50
    if task in ("cls", "fewshot"):
        parts.update({"FPS": (common, "farthest_point_sample"), "KNN": (common, "knn"),
                      "tokenizer": model.encoder.tokenizer, "head": model.head})
        what = f"{recipe.points:,} points, {recipe.groups} x {recipe.neighbours} patches"
    optimizer = torch.optim.AdamW(common.parameter_groups(model, recipe.decay), lr=1e-6)     # too small to move
    parts["frozen forward"] = model.encoder.clip.blocks
    return step, model, setup, optimizer, parts, B, epoch, what


def train(task, device, batch, clip, precision, repeat):
    step, model, setup, optimizer, parts, B, epoch, what = training(task, device, batch, clip, precision)
    device = setup.device
    model.train()
    lengths = []
    for block in model.encoder.clip.blocks[:1]:
        block.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape))
    memory = peak(step, device)
    ms = rounds({"step": step}, device, repeat, budget=240.0)["step"]
    clock = Parts(device)                               # a second time, waiting after each part
    for name, part in parts.items():
        if isinstance(part, tuple):
            clock.function(*part, name)
        elif isinstance(part, torch.nn.ModuleList):
            for module in part:
                clock.module(module, name)              # the model is thrown away: its hooks may stay
        else:
            clock.module(part, name.strip())
    clock.function(torch.Tensor, "backward", "backward")
    clock.function(optimizer, "step", "optimiser")
    clock.start()
    step()
    clock.stop("the rest")
    clock.end()
    whole = sum(clock.seconds.values())
    b, L, D = lengths[0]
    blocks = len(model.encoder.clip.blocks)
    flop = b * blocks * (24 * L * D * D + 4 * L * L * D)
    can, facts = floors(device), machine(device)
    line = {"kind": "train", "task": task, "what": what, "batch": B, "precision": "bf16" if setup.bf16 else "fp32",
            "clip": clip, "data": "random", "ms": float(np.median(ms)), "spread": float(np.ptp(ms) / np.median(ms)),
            "samples_per_second": 1e3 * B / float(np.median(ms)), "epoch_samples": epoch,
            "epoch_seconds": float(np.median(ms)) / 1e3 * epoch / B, "mb": memory,
            "frozen_tflops": flop / clock.seconds["frozen forward"] / 1e12, "product_tflops": can["flop"] / 1e12,
            "parts": {name: s / whole for name, s in clock.seconds.items()}}
    write({**line, **facts})
    print(f"{facts['device']}, {facts['threads']} threads, {line['precision']}; torch {facts['torch']}; {task}, {what}, "
          f"batch {B}, {clip} (random data)")
    print(f"step     {line['ms']:.1f} ms (spread {100 * line['spread']:.0f} %), {line['samples_per_second']:.2f} samples a "
          f"second, {line['epoch_seconds']:.1f} s for {epoch:,} samples" + (f", peak {memory / 1e3:.2f} GB" if memory else ""))
    print(f"frozen   {line['frozen_tflops']:.2f} TFLOP/s forward; a matrix product reaches {line['product_tflops']:.2f}")
    print("parts    " + ", ".join(f"{name} {100 * share:.0f} %" for name, share in
                                  sorted(line["parts"].items(), key=lambda item: -item[1])))


# --------------------------------------------------------------------------------------------------
# Results
# --------------------------------------------------------------------------------------------------

def write(line):
    with open(OUT, "a") as file:
        file.write(json.dumps(line) + "\n")


def short(ms):
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}"


def table():
    """The newest figures of bench.jsonl as Markdown, a table for each machine."""
    if not OUT.exists():
        raise InputError(f"{OUT}: nothing measured yet; run `python bench.py kernels` first")
    lines = [json.loads(line) for line in OUT.read_text().splitlines()]
    for device in dict.fromkeys((x["device"], x["threads"]) for x in lines):
        here = [x for x in lines if (x["device"], x["threads"]) == device]
        new = {(x["workload"], x["contender"]): x for x in here if x["kind"] == "kernel"}
        last = here[-1]
        print(f"{device[0]}, {device[1]} thread{'s' * (device[1] > 1)}; torch {last['torch']}, triton {last['triton']}, "
              f"numba {last.get('numba') or 'absent'}, {last['date'][:10]}\n")
        if new:
            print("| workload | ours, ms | plain torch, ms | best peer, ms | ours is | of the floor |\n|---|---|---|---|---|---|")
        for workload in dict.fromkeys(w for w, _ in new):
            ours, plain = new[workload, "ours"], new.get((workload, "torch"))
            peers = [x for (w, who), x in new.items() if w == workload and who not in ("ours", "torch")
                     and x["date"] == ours["date"]]     # a ratio is of one run
            best = min(peers, key=lambda x: x["ms"], default=None)
            print(f"| {workload} | {short(ours['ms'])} | " + (short(plain["ms"]) if plain else "") + " | "
                  + (f"{short(best['ms'])} ({best['contender']}, {100 * best['same']:.0f} % same) | "
                     f"{best['ms'] / ours['ms']:.2f} x" if best else "none here | ")
                  + (f" | {ours['ms'] / ours['floor_ms']:.1f} x |" if ours["floor_ms"] else " | |"))
        new = {(x["task"], x["batch"], x["clip"], x["precision"]): x for x in here if x["kind"] == "train"}
        if new:
            print("\n| step (random data) | batch | ms | samples/s | frozen forward, TFLOP/s (product) | where the time goes |\n"
                  "|---|---|---|---|---|---|")
        for x in new.values():
            parts = ", ".join(f"{name} {100 * s:.0f} %" for name, s in sorted(x["parts"].items(), key=lambda i: -i[1])
                              if s > .015)
            print(f"| {x['task']}, {x['what']}, {x['clip']}, {x['precision']} | {x['batch']} | {x['ms']:.0f} | "
                  f"{x['samples_per_second']:.2f} | {x['frozen_tflops']:.3f} ({x['product_tflops']:.3f}) | {parts} |")
        print()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["kernels", "train", "table"])
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--quick", action="store_true", help="kernels: only what is over in seconds on a CPU")
    parser.add_argument("--task", choices=["cls", "fewshot", "det", "seg"], default="cls", help="train: whose step")
    parser.add_argument("--batch-size", type=common.whole(2), metavar="B", help="train: instead of the recipe's")
    parser.add_argument("--clip", default="random", metavar="NAME", help="train: frozen weights (default: random ViT-B/32)")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--repeat", type=common.whole(1), default=5, metavar="N", help="train: steps that are timed")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA device; leave it out to run on the CPU")
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if args.what == "kernels":
        kernels(device, args.quick)
    elif args.what == "train":
        train(args.task, device.type, args.batch_size, args.clip, args.precision, args.repeat)
    else:
        table()


if __name__ == "__main__":
    common.main_guard(main)
