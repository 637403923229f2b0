"""bench.py: every case runs small, its answers agree, the table is made of what was measured."""
import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import bench
import common
import train_cls
import train_det
import train_fewshot
import train_seg
from common import InputError

TASKS = ["cls", "fewshot", "det", "seg"]


def small(monkeypatch, folder):
    """Shapes that are over in no time, a small transformer, results in `folder`."""
    load = common.load_clip
    monkeypatch.setattr(common, "load_clip", lambda name, *a, **k: load("timm:test_vit=random", *a, **k))
    monkeypatch.setattr(bench, "OUT", folder / "bench.jsonl")
    monkeypatch.setattr(bench, "FPS", [(2, 200, 9)])
    monkeypatch.setattr(bench, "KNN", [(2, 30, 200, 5), (1, 900, 900, 4), (1, 3000, 50, 3)])
    monkeypatch.setattr(bench, "INTERPOLATE", [(2, 300, 20, 8, torch.float32)])
    monkeypatch.setattr(bench, "GROUP", [(2, 90, 10, 4, 3)])
    monkeypatch.setattr(train_fewshot, "RECIPES", dict(train_fewshot.RECIPES))
    for script, data, recipe in ((train_fewshot, "modelnet40", dict(points=64, groups=8, neighbours=8, batch_size=4)),
                                 (train_cls, "modelnet40", dict(points=64, groups=8, neighbours=8, stored=96, batch_size=4)),
                                 (train_det, "scannet", dict(points=300, tokens=64, queries=64, layers=2, batch_size=2)),
                                 (train_seg, "s3dis", dict(points=128, tokens=32, neighbours=8, batch_size=2))):
        monkeypatch.setitem(script.RECIPES, data, script.RECIPES[data]._replace(**recipe))


@pytest.fixture
def quick(monkeypatch, tmp_path):
    small(monkeypatch, tmp_path)
    return tmp_path / "bench.jsonl"


def test_kernels_are_timed_beside_their_peers_and_agree(quick, capsys):
    bench.main(["kernels", "--device", "cpu"])
    lines = [json.loads(line) for line in quick.read_text().splitlines()]
    floors, kernels = lines[0], lines[1:]
    assert floors["kind"] == "floors" and all(floors[name] > 0 for name in ("bytes", "pairs", "step", "flop"))
    who = {}
    for line in kernels:
        who.setdefault(line["workload"], {})[line["contender"]] = line
        assert line["ms"] > 0 and line["torch"] == torch.__version__
        assert (line["floor_ms"] is None) == line["workload"].startswith(("FPS", "KNN"))     # trees have none
    assert len(who) == 6 and all("ours" in contenders for contenders in who.values())
    assert who["KNN 1 x (900 of 900), k = 4"]["cKDTree"]["same"] > .99            # its ties may differ
    assert all(c["torch"]["same"] == 1 for name, c in who.items() if "torch" in c)
    bench.main(["table"])
    printed = capsys.readouterr().out
    assert "| FPS 2 x 200 -> 9 |" in printed and printed.count("| interpolation") == 1


@pytest.mark.parametrize("task", TASKS)
def test_a_real_training_step_is_timed_by_its_parts(quick, task, capsys):
    backward = torch.Tensor.backward
    bench.main(["train", "--task", task, "--repeat", "1", "--device", "cpu"])
    line = json.loads(quick.read_text())
    assert line["data"] == "random" and torch.Tensor.backward is backward
    assert sum(line["parts"].values()) == pytest.approx(1)
    assert {"FPS", "KNN", "data", "tokenizer", "frozen forward", "backward", "head", "optimiser"} <= set(line["parts"])
    assert line["samples_per_second"] == pytest.approx(1e3 * line["batch"] / line["ms"])
    bench.main(["table"])
    assert f"| {task}, " in capsys.readouterr().out


def test_what_cannot_be_done_is_one_line(quick):
    with pytest.raises(InputError, match="nothing measured yet"):
        bench.main(["table"])


# --- what a step must not do ----------------------------------------------------------------------

@pytest.mark.parametrize("task", TASKS)
def test_a_step_reads_nothing_back_from_the_device(quick, monkeypatch, task):
    """Tensors without values: whoever asks for one, or for how many there are, gets an exception."""
    fake = FakeTensorMode()
    clip = common.load_clip("any")
    for module in clip.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else fake.from_tensor(buffer)
    monkeypatch.setattr(common, "load_clip", lambda *a, **k: clip)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *a: self)
    monkeypatch.setattr(torch.optim, "AdamW", torch.optim.SGD)          # AdamW reads its step count, which is on the CPU
    seen = []

    def match(out, batch):                                              # the one that must wait
        seen.append(task)
        return torch.zeros(*out.logits.shape[:2], batch.real.shape[1], dtype=torch.int64)

    monkeypatch.setattr(train_det, "match", match)
    with fake:
        step, model = bench.training(task, "cpu", None, "any", "fp32")[:2]
        model.train()
        step()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert seen == (["det"] if task == "det" else [])


@pytest.mark.parametrize("task", TASKS)
def test_a_step_never_waits_for_the_gpu(quick, monkeypatch, task):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA card: torch.cuda.set_sync_debug_mode has nothing to watch without one")
    step, model = bench.training(task, "cuda", None, "any", "auto")[:2]
    model.train()
    step()                                                              # compiles kernels, which waits
    match = train_det.match

    def allowed(*args):                                                 # Hungarian matching is the host's work
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
    torch.compile(model, backend="eager", fullgraph=True)(*seen[0])     # a graph break is an exception
