"""bench.py: every case runs small, its answers agree, the table is made of what was measured."""
import json

import pytest
import torch

import bench
import common
import train_cls
import train_det
import train_seg
from common import InputError


def small(monkeypatch, folder):
    """Shapes that are over in no time, a small transformer, results in `folder`."""
    load = common.load_clip
    monkeypatch.setattr(common, "load_clip", lambda name, *a, **k: load("timm:test_vit=random", *a, **k))
    monkeypatch.setattr(bench, "OUT", folder / "bench.jsonl")
    monkeypatch.setattr(bench, "FPS", [(2, 200, 9)])
    monkeypatch.setattr(bench, "KNN", [(2, 30, 200, 5), (1, 900, 900, 4), (1, 3000, 50, 3)])
    monkeypatch.setattr(bench, "INTERPOLATE", [(2, 300, 20, 8, torch.float32)])
    monkeypatch.setattr(bench, "GROUP", [(2, 90, 10, 4, 3)])
    for script, data, recipe in ((train_cls, "modelnet40", dict(points=64, groups=8, neighbours=8, stored=96, batch_size=4)),
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
        assert line["ms"] > 0 and line["floor_ms"] > 0 and line["torch"] == torch.__version__
    assert len(who) == 6 and all("ours" in contenders for contenders in who.values())
    assert who["KNN 1 x (900 of 900), k = 4"]["cKDTree"]["same"] > .99            # its ties may differ
    assert all(c["torch"]["same"] == 1 for name, c in who.items() if "torch" in c)
    bench.main(["table"])
    printed = capsys.readouterr().out
    assert "| FPS 2 x 200 -> 9 |" in printed and printed.count("| interpolation") == 1


@pytest.mark.parametrize("task", ["cls", "det", "seg"])
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
    with pytest.raises(InputError, match="fewshot trains with the step of cls"):
        bench.main(["train", "--task", "fewshot"])
