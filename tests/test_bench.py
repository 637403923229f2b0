"""bench.py: every case runs small, its answers agree, the table is made of what was measured."""
import importlib
import json
import time

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import record_function

import bench
import common
import kernels
import nanoclip
import pretrained
import run
import train_clip
import train_clip2point
import train_cls
import train_det
import train_fewshot
import train_outdoor
import train_seg
from run import InputError

TASKS = ["cls", "fewshot", "det", "seg"]
PARTS = {"data", "backward", "head", "optimiser"}
EPCL = {"FPS", "tokenizer", "frozen forward"}
MORE_PARTS = {"cls": EPCL | {"KNN"}, "fewshot": EPCL | {"KNN"},
              "det": EPCL | {"ball query", "matching"}, "seg": EPCL | {"KNN", "interpolation"},
              "clip2point": {"depth maps", "tower forward", "loss"},
              "outdoor": EPCL | {"KNN", "interpolation", "sparse convolution"}}
FILES = [importlib.import_module(f"kernels.{name}")
         for name in ("fps", "knn", "ball_query", "interpolate", "splat", "sparse_conv")]


pytestmark = pytest.mark.usefixtures("one_thread")


def small(monkeypatch, folder):
    """Shapes that are over in no time, a small transformer, results in `folder`."""
    load = pretrained.load_clip
    monkeypatch.setattr(pretrained, "load_clip",
                        lambda name, *a, **k: load("timm:test_vit=random", *a, **k))
    monkeypatch.setattr(bench, "OUT", folder / "bench.jsonl")
    monkeypatch.setattr(bench, "FPS", [(2, 200, 9)])
    monkeypatch.setattr(bench, "KNN", [(2, 30, 200, 5), (1, 900, 900, 4), (1, 3000, 50, 3)])
    monkeypatch.setattr(bench, "BALL", [(2, 30, 900, 0.4, 8)])
    monkeypatch.setattr(bench, "INTERPOLATE", [(2, 300, 20, 8, torch.float32)])
    monkeypatch.setattr(bench, "GROUP", [(2, 90, 10, 4, 3)])
    monkeypatch.setattr(bench, "SPLAT", [(2, 90, 20, 30, 1.5)])
    monkeypatch.setattr(bench, "SPARSE", [(400, 8)])
    patches = dict(points=64, groups=8, neighbours=8, batch_size=4)
    for script, data, recipe in (
            (train_fewshot, "modelnet40", patches),
            (train_cls, "modelnet40", dict(patches, stored=96)),
            (train_det, "scannet",
             dict(points=300, tokens=64, fine=64, queries=64, layers=2, batch_size=2)),
            (train_seg, "s3dis", dict(points=128, tokens=32, neighbours=8, batch_size=2)),
            (train_clip2point, "shapenet", dict(points=64, batch_size=2)),
            (train_outdoor, "semantickitti",
             dict(voxel=0.5, width=0.25, blocks="11111111", tokens=16, neighbours=4,
                  batch_size=2))):
        monkeypatch.setitem(script.RECIPES, data, script.RECIPES[data]._replace(**recipe))
    load_whole = train_clip2point.load_both_towers     # CLIP2Point takes CLIP whole
    monkeypatch.setattr(train_clip2point, "load_both_towers",
                        lambda name, *a: load_whole("nano=" + nano_file(folder), *a))


def nano_file(folder):
    config = train_clip.config_of(train_clip.RECIPES["synthetic"]._replace(
        size=32, width=32, layers=1, text_width=32, text_layers=1, stem=8))
    model, _ = nanoclip.build(config, train_clip.WORDS)
    nanoclip.save(folder / "nano.safetensors", model, config, train_clip.WORDS)
    return str(folder / "nano.safetensors")


@pytest.fixture
def quick(monkeypatch, tmp_path):
    small(monkeypatch, tmp_path)
    return tmp_path / "bench.jsonl"


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_kernels_are_timed_beside_their_peers_and_agree(quick, capsys):
    bench.main(["kernels", "--device", "cpu"])
    floors, *timed = lines(quick)
    assert floors["kind"] == "floors"
    assert all(floors[name] > 0 for name in ("bytes", "pairs", "step", "flop"))
    who = {}
    for line in timed:
        who.setdefault(line["workload"], {})[line["contender"]] = line
        assert line["ms"] > 0 and line["torch"] == torch.__version__
        search = line["workload"].startswith(("FPS", "KNN", "ball"))    # no floor on a CPU
        assert (line["floor_ms"] is None) == search
    assert len(who) == 9 and all("ours" in contenders for contenders in who.values())
    assert who["KNN 1 x (900 of 900), k = 4"]["cKDTree"]["same"] > .99      # its ties may differ
    assert all(c["torch"]["same"] == 1 for name, c in who.items() if "torch" in c)
    bench.main(["table"])
    printed = capsys.readouterr().out
    assert "| FPS 2 x 200 -> 9 |" in printed and printed.count("| interpolation") == 1
    assert printed.count("| grouping") == 1
    assert "| ball query 2 x (30 of 900), 0.4 m, k = 8 |" in printed
    assert "| splat 2 x 90 points at 20 x 30, r = 1.5 |" in printed
    assert "| sparse conv 400 voxels, 27 taps, C = 8, both ways |" in printed


def test_a_peer_whose_answer_cannot_be_had_is_left_out_and_named(quick, capsys):
    def fail():
        raise AttributeError("its API has changed")

    cpu = torch.device("cpu")
    facts, can = bench.machine(cpu), {"bytes": 1e9, "pairs": 1e9, "step": 1e-6, "flop": 1e9}
    calls = {"ours": lambda: torch.ones(3), "peer": fail, "torch": lambda: torch.ones(3)}
    bench.measure("FPS", (calls, {"bytes": 8}, bench.same_indices), cpu, True, can, facts)
    assert "FPS: peer left out, AttributeError: its API has changed" in capsys.readouterr().out
    assert [line["contender"] for line in lines(quick)] == ["ours", "torch"]
    calls = {"ours": lambda: torch.ones(3), "torch": fail}
    with pytest.raises(AttributeError):
        bench.measure("FPS", (calls, {"bytes": 8}, bench.same_indices), cpu, True, can, facts)


def contents(script):
    """Every name of the modules that a step runs through, and what stands behind it."""
    owners = [script, common, run, kernels, *FILES, torch.nn.Module, torch.Tensor, torch.optim]
    owners += [x for x in vars(common).values() if isinstance(x, type)]
    owners += [x for x in vars(script).values() if isinstance(x, type)]
    return {(str(owner), name): x for owner in owners for name, x in dict(vars(owner)).items()
            if name != "__slotnames__"}                 # Python's note that a class was pickled


@pytest.mark.parametrize("task", MORE_PARTS)
def test_a_real_training_step_is_timed_by_its_parts(quick, task, capsys, monkeypatch):
    """And nothing that the script runs is patched to this end, neither after a step nor in it."""
    script = importlib.import_module(f"train_{task}")
    before, training, steps = contents(script), bench.training, []

    def patched():
        now = contents(script)
        assert now.keys() == before.keys()
        return [name for name, x in now.items() if x is not before[name]]

    def watched(*args):
        step, *rest = training(*args)

        def watched_step():
            assert patched() == []
            assert not any("forward" in vars(module) for module in rest[0].modules())
            step()
            steps.append(task)
        return watched_step, *rest

    monkeypatch.setattr(bench, "training", watched)
    bench.main(["train", "--task", task, "--repeat", "1", "--device", "cpu"])
    assert patched() == [] and len(steps) >= 3          # shapes, time, parts
    line, = lines(quick)
    assert line["data"] == "random" and line["batch"] in (2, 4)
    assert sum(line["parts"].values()) == pytest.approx(1)
    assert PARTS | MORE_PARTS[task] <= set(line["parts"]) <= set(bench.LABELS.values())
    assert all(share > 0 for share in line["parts"].values())
    assert line["samples_per_second"] == pytest.approx(1e3 * line["batch"] / line["ms"])
    bench.main(["table"])
    assert f"| {task}, " in capsys.readouterr().out


def test_seconds_go_to_the_innermost_part_and_add_up_to_the_step():
    """Sleeps in place of work, as the parts of a step lie in one another."""
    def step():
        with record_function("data"):
            time.sleep(.02)
        with record_function("model"):
            time.sleep(.04)
            with record_function("tokenizer"):
                time.sleep(.03)
                with record_function("another name"):           # of no part: its time is outside
                    with record_function("nanoepcl::knn"):
                        time.sleep(.05)
                    time.sleep(.03)
            for _ in range(2):
                with record_function("frozen forward"):
                    time.sleep(.02)
        with record_function("autograd::engine::evaluate_function: MulBackward0"):
            time.sleep(.07)
            with record_function("nanoepcl::interpolate_backward"):
                time.sleep(.02)
        time.sleep(.03)

    took = []

    def timed_step():
        begin = time.perf_counter()
        step()
        took.append(time.perf_counter() - begin)

    seconds = bench.parts_of(timed_step, torch.device("cpu"), None)
    expected = {"data": .02, "head": .04, "tokenizer": .06, "KNN": .05, "frozen forward": .04,
                "backward": .07, "interpolation": .02, "the rest": .03}
    assert seconds.keys() == expected.keys()
    for name, least in expected.items():                # a busy machine sleeps longer, never less
        assert seconds[name] > least - .001, name
    assert sum(seconds.values()) == pytest.approx(took[0], abs=.02)


def test_what_cannot_be_done_is_one_line(quick):
    with pytest.raises(InputError, match="nothing measured yet"):
        bench.main(["table"])


# --- what a step must not do ----------------------------------------------------------------------

@pytest.mark.parametrize("task", TASKS)
def test_a_step_reads_nothing_back_from_the_device(quick, monkeypatch, task):
    """Tensors without values: whoever asks for one, or for how many there are, fails."""
    fake = FakeTensorMode()
    clip = pretrained.load_clip("any")
    for module in clip.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else fake.from_tensor(buffer)
    monkeypatch.setattr(pretrained, "load_clip", lambda *a, **k: clip)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *a: self)
    # AdamW reads its step count, which is on the CPU
    monkeypatch.setattr(torch.optim, "AdamW", torch.optim.SGD)
    seen = []

    def match(out, batch):                              # the one that must wait
        seen.append(task)
        return torch.zeros(*out.logits.shape[:2], batch.real.shape[1], dtype=torch.int64)

    monkeypatch.setattr(train_det, "match", match)
    monkeypatch.setattr(train_det, "CPU_TRIES", 100)    # all at once, as on a GPU
    with fake:
        step, model = bench.training(task, "cpu", None, "any", "fp32")[:2]
        model.train()
        step()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert seen == (["det"] if task == "det" else [])


@pytest.mark.parametrize("task", TASKS)
def test_a_step_never_waits_for_the_gpu(quick, monkeypatch, task):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA card: torch.cuda.set_sync_debug_mode has nothing to watch "
                    "without one")
    step, model = bench.training(task, "cuda", None, "any", "auto")[:2]
    model.train()
    step()                                              # compiles kernels, which waits
    match = train_det.match

    def allowed(*args):                                 # Hungarian matching is the host's work
        torch.cuda.set_sync_debug_mode("default")
        chosen = match(*args)
        torch.cuda.set_sync_debug_mode("error")
        return chosen

    monkeypatch.setattr(train_det, "match", allowed)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("task", TASKS)
def test_the_model_is_one_graph_for_torch_compile(quick, task):
    step, model = bench.training(task, "cpu", None, "any", "fp32")[:2]
    model.train()
    seen = []
    hook = model.register_forward_pre_hook(lambda _, args: seen.append(args))
    step()
    hook.remove()
    # a graph break is an exception
    torch.compile(model, backend="eager", fullgraph=True)(*seen[0])
