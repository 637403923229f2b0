"""train_cls.py: sampling, losses, metric, the loop, resume, several processes."""
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
import common
import render
import run
import train_cls
from data import objects
from run import InputError
from test_files import CLOUD, shapes

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """ROOT/{train,test}/CLASS/*.npy, 7 to train and 4 to test of three classes."""
    root = tmp_path_factory.mktemp("data")
    for part, n, seed in (("train", 7, 1), ("test", 4, 2)):
        for name, clouds in shapes(n, seed=seed).items():
            (root / part / name).mkdir(parents=True)
            for i, cloud in enumerate(clouds):
                np.save(root / part / name / f"{i}.npy", cloud.astype(np.float32))
    return root


@pytest.mark.parametrize("change, words", [
    (lambda root: np.save(root / "train/cube/0.npy", CLOUD[:9]), "0.npy: has 9 points, fewer"),
    (lambda root: (root / "train/cube/0.npy").write_bytes(b"cut"), "0.npy"),
])
def test_an_object_that_cannot_be_used_is_named(tmp_path, change, words):
    for part in ("train", "test"):
        for name in ("ball", "cube"):
            (tmp_path / part / name).mkdir(parents=True)
            np.save(tmp_path / part / name / "0.npy", CLOUD)
    change(tmp_path)
    args = train_cls.flags(["--data", "folder", "--root", str(tmp_path), "--points", "16",
                            "--groups", "8", "--neighbours", "8"])
    with pytest.raises(InputError, match=words):
        train_cls.load_data(train_cls.settings(args)[0])


def test_a_fraction_of_the_training_objects_is_of_each_class_and_follows_the_seed(folder):
    def loaded(*more):
        args = train_cls.flags(["--data", "folder", "--root", str(folder), "--points", "64",
                                "--groups", "8", "--neighbours", "8", *more])
        return train_cls.load_data(train_cls.settings(args)[0])
    (whole, test, _, _), (few, same, _, form) = loaded(), loaded("--train-fraction", "0.4")
    assert few.label.tolist() == 3 * [0] + 3 * [1] + 3 * [2] and torch.equal(test.xyz, same.xyz)
    assert form.endswith("; 9 of 21 training objects, drawn from the seed")
    assert all((few.xyz[i] == whole.xyz).all((1, 2)).sum() == 1 for i in range(9))
    again, other = (loaded("--train-fraction", "0.4", "--seed", seed)[0] for seed in "01")
    assert torch.equal(few.xyz, again.xyz) and not torch.equal(few.xyz, other.xyz)
    assert loaded("--train-fraction", "0.001")[0].label.tolist() == [0, 1, 2]


# --- sampling, loss, metric -----------------------------------------------------------------------

def test_training_samples_come_from_the_cloud_and_do_not_depend_on_how_a_batch_is_shared():
    recipe = train_cls.RECIPES["synthetic"]._replace(points=64, stored=256)
    xyz = objects.unit_sphere(torch.randn(4, 256, 3))

    def draw(seed=0):
        return torch.Generator().manual_seed(seed)
    whole = train_cls.sample_train(xyz, recipe, draw(), 4)
    assert torch.equal(train_cls.sample_train(xyz[2:], recipe, draw(), 4, 2), whole[2:])
    assert whole.shape == (4, 64, 3) and whole.isfinite().all()
    assert not torch.equal(train_cls.sample_train(xyz, recipe, draw(1), 4), whole)
    again = draw()                                      # the same numbers, to undo scale and shift
    torch.rand(4, 256, generator=again), torch.randperm(75, generator=again)
    scale, shift = torch.rand(2, 4, 1, 3, generator=again)
    back = (whole - (shift * 0.4 - 0.2)) / (2 / 3 + scale * 5 / 6)
    for cloud, sample in zip(xyz, back):
        distance, nearest = torch.cdist(sample.double(), cloud.double()).min(1)
        assert distance.max() < 1e-5 and len(nearest.unique()) == 64
    test = common.farthest(xyz, 64)
    assert torch.equal(test[:, 0], xyz[:, 0]) and torch.equal(test, common.farthest(xyz, 64))


def test_the_two_losses_by_hand():
    logits, label = torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1])
    embedding, text = torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    head, raw = train_cls.loss_terms(logits, embedding, label, text, "raw")
    assert head.item() == pytest.approx(np.log1p(np.exp(-2)) + np.log(2), rel=1e-6)
    assert raw.item() == pytest.approx(np.log1p(np.exp(-3)) + np.log1p(np.exp(-8)), rel=1e-5)
    _, cosine = train_cls.loss_terms(logits, embedding, label, text, "cosine")
    assert cosine.item() == pytest.approx(2 * np.log1p(np.exp(-100)), abs=1e-6)
    assert train_cls.loss_terms(logits, embedding, label, None, "raw")[1].item() == 0


def test_accuracies_and_worst_pairs_of_a_confusion_matrix_made_by_hand():
    confusion = torch.tensor([[8, 2, 0], [1, 1, 0], [0, 0, 0]])     # the third class never occurs
    overall, mean = train_cls.accuracies(confusion)
    assert overall == pytest.approx(9 / 12) and mean == pytest.approx((0.8 + 0.5) / 2)
    assert train_cls.worst_pairs(confusion, ("bed", "sofa", "car")).split("\n")[1:] == [
        "         bed taken for sofa: 2 of 10", "         sofa taken for bed: 1 of 2"]


# --- runs -----------------------------------------------------------------------------------------

def test_the_picture_frames_what_is_named_wrongly_and_nothing_else(monkeypatch):
    drawn = []
    monkeypatch.setattr(render, "sheet", lambda cells, **_: drawn.append(cells))

    class Named(torch.nn.Module):               # by the first coordinate of a cloud's first point
        def forward(self, points):
            return torch.nn.functional.one_hot(points[:, 0, 0].long(), 3).float(), None

    xyz = torch.rand(60, 30, 3)
    label = torch.arange(60) % 3
    xyz[:, 0, 0] = label.roll(1).float().where(torch.arange(60) % 4 == 0, label.float())
    cfg = {"classes": ["cup", "desk", "bed"], "up": "z"}
    train_cls.picture(Named(), xyz, label, run.Setup("cpu", "fp32"), cfg, "title")
    cells, = drawn
    rows = np.linspace(0, 59, 24).round().astype(int)
    assert len(cells) == 24
    for row, cell in zip(rows, cells):
        true, named = (cfg["classes"][k] for k in (label[row], int(xyz[row, 0, 0])))
        assert cell.caption == f"{true}\nnamed {named}"
        assert (cell.frame == render.RED) == (row % 4 == 0) and (true == named) == (row % 4 != 0)
        assert (cell.picture == render.draw_object(xyz[row])).all()
    train_cls.picture(Named(), xyz[:2], label[:2], run.Setup("cpu", "fp32"), cfg, "title")
    assert len(drawn[1]) == 2


def arguments(folder, clip, out, *more):
    return ["--data", "folder", "--root", str(folder), "--clip", clip, "--out", str(out),
            "--points", "64", "--groups", "8", "--neighbours", "8", "--epochs", "3",
            "--batch-size", "6", "--lr", "0.002", *more]


@pytest.fixture(scope="session")
def finished(folder, tiny_clip, tmp_path_factory):
    """A run of three epochs that nothing disturbed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train_cls.main(arguments(folder, tiny_clip, out))
    return out


def lines(folder):
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"}
            for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_tests_as_often_as_asked(folder, tiny_clip, finished, tmp_path, capsys):
    run = tmp_path / "seldom"
    train_cls.main([*arguments(folder, tiny_clip, run), "--every", "2"])
    table = capsys.readouterr().out
    seldom, always = lines(run), lines(finished)
    assert ["accuracy" in line for line in seldom] == [False, True, True]   # and after the last
    for few, all_of_it in zip(seldom, always, strict=True):             
        assert few == {name: all_of_it[name] for name in few}
    rows = [line for line in table.splitlines() if line[:5].strip().isdigit()]
    rates = [f"{line['lr']:.2e}" for line in always]
    assert [row.index(rate) for row, rate in zip(rows, rates)] == [rows[0].index(rates[0])] * 3


def test_a_run_learns_and_leaves_every_file(finished):
    assert {p.name for p in finished.iterdir()} == {
        "config.json", "metrics.jsonl", "log.txt", "train_cls.py", "last.pt", "best.pt",
        "results.json", "confusion.csv", "look.png"}
    with open(finished / "confusion.csv", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    classes = head[1:]
    counts = torch.tensor([[int(n) for n in row[1:]] for row in rows])
    assert head[0] == "true" and [row[0] for row in rows] == classes == ["ball", "cube", "stick"]
    assert train_cls.accuracies(counts)[0] == lines(finished)[-1]["accuracy"]
    assert Image.open(finished / "look.png").width == 8 * (140 + 12)
    results = json.loads((finished / "results.json").read_text())
    assert results["metrics"]["accuracy"] == lines(finished)[-1]["accuracy"]
    assert results["best_on_test"]["accuracy"] == max(line["accuracy"] for line in lines(finished))
    assert results["epoch"] == 3 and len(results["clip"]["sha256"]) == 64
    assert lines(finished)[-1]["loss"] < 0.8 * lines(finished)[0]["loss"]
    saved = torch.load(finished / "last.pt", weights_only=True)
    assert not any(name.startswith("encoder.clip") for name in saved["model"])
    config = json.loads((finished / "config.json").read_text())
    assert config["recipe"]["lr"] == 0.002 and config["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("epoch, step", [(0, 1), (1, 0), (1, 2), (2, 1)])
def test_a_run_stopped_anywhere_and_resumed_ends_like_one_that_was_not(
        finished, folder, tiny_clip, tmp_path, monkeypatch, epoch, step):
    calls = iter(range(1000))                   # 4 steps an epoch; asked after all but the last,
    stop_at = 4 * epoch + (step - 1 if step else -1)    # and once at the end of the epoch
    with monkeypatch.context() as patch:
        patch.setattr(run.Stopper, "now", lambda self, step: next(calls) == stop_at)
        with pytest.raises(SystemExit) as stopped:
            train_cls.main(arguments(folder, tiny_clip, tmp_path / "run"))
    assert stopped.value.code == 130
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert (saved["at"]["epoch"], saved["at"]["step"]) == (epoch, step)
    train_cls.main(["--resume", str(tmp_path / "run")])
    assert lines(tmp_path / "run") == lines(finished)
    for name in ("last.pt", "best.pt"):
        parts, whole = (torch.load(folder / name, weights_only=True)
                        for folder in (tmp_path / "run", finished))
        assert all(torch.equal(parts["model"][n], whole["model"][n]) for n in whole["model"])
        assert {**parts["at"], "seconds": 0} == {**whole["at"], "seconds": 0}
        if name == "last.pt":
            states = parts["optimizer"]["state"], whole["optimizer"]["state"]
            for a, b in zip(*(state.values() for state in states)):
                assert all(torch.equal(a[k], b[k]) for k in b)
    results = [json.loads((folder / "results.json").read_text())
               for folder in (tmp_path / "run", finished)]
    assert all(results[0][k] == results[1][k] for k in results[1] if k != "seconds")


def test_eval_repeats_the_result_and_vote_and_predict_answer(finished, folder, tmp_path, capsys):
    accuracy = json.loads((finished / "results.json").read_text())["metrics"]["accuracy"]
    for what in (finished, finished / "last.pt"):
        train_cls.main(["--eval", str(what), "--vote", "3"])
        printed = capsys.readouterr().out
        assert f"accuracy {100 * accuracy:.2f} %" in printed and "3 votes, one repeat" in printed
    file = str(folder / "test" / "stick" / "0.npy")
    train_cls.main(["--eval", str(finished), "--predict", file, file])
    assert Image.open(finished / "predicted/look.png").width == 2 * (140 + 12)
    train_cls.main(["--eval", str(finished), "--predict", file, "--export", str(tmp_path / "new")])
    assert Image.open(tmp_path / "new/look.png").width == 140 + 12
    capsys.readouterr()
    train_cls.main(["--eval", str(finished), "--predict", file])
    words = re.findall(r"(\w+) ([\d.]+) %", capsys.readouterr().out)
    assert {w for w, _ in words} == {"ball", "cube", "stick"}
    assert sum(float(p) for _, p in words) == pytest.approx(100, abs=0.5)


def test_test_objects_alone_are_evaluated_by_the_runs_names(finished, folder, tmp_path, capsys):
    shutil.copytree(folder / "test", tmp_path / "test")
    shutil.rmtree(tmp_path / "test/ball")                   # not every class need be there
    with pytest.raises(InputError, match="test: names of parts, not of classes; pass --root"):
        train_cls.main(arguments(tmp_path, "random", tmp_path / "run"))
    train_cls.main(["--eval", str(finished), "--root", str(tmp_path)])
    said = capsys.readouterr().out
    with open(finished / "confusion.csv", encoding="utf-8") as file:
        rows = [[int(n) for n in row[1:]] for row in list(csv.reader(file))[1:]]
    right = (rows[1][1] + rows[2][2]) / sum(rows[1] + rows[2])
    assert f"data     folder: {sum(rows[1] + rows[2])} test, 3 classes" in said
    assert f"accuracy {100 * right:.2f} %" in said
    (tmp_path / "test/stick").rename(tmp_path / "test/pole")
    with pytest.raises(InputError, match="test/pole: a class that the run does not have; remove"):
        train_cls.main(["--eval", str(finished), "--root", str(tmp_path)])


@pytest.mark.parametrize("flags, words", [
    (["--resume", "{run}"], "the run is finished after epoch 3; --eval"),
    (["--resume", "{run}/best.pt"], "holds no optimiser"),
    (["--resume", "{run}", "--eval", "{run}"], "give one of them"),
    (["--eval", "{run}", "--lr", "0.5"], "was trained with lr 0.002, not 0.5"),
    (["--eval", "{run}", "--batch-size", "3"], "was trained with batch-size 6, not 3; leave"),
    (["--eval", "{run}", "--clip", "random"], "ViT-B-32-quickgelu with the weights"),
    (["--eval", "{run}", "--clip", "timm:test_vit=nowhere.pt"], "no such file: nowhere.pt; if it"),
    (["--batch-size", "1"], "--batch-size 1, --accumulate 1, 20 training clouds: batch norm needs "
                            "two clouds in each part of a step; pass --batch-size 2 or more"),
    (["--accumulate", "9"], "pass --batch-size 18 or more"),
    (["--eval", "{run}", "--no-task-token"], "no-task-token False, not True"),
    (["--eval", "nowhere"], "no such checkpoint"),
    (["--predict", "x.npy"], "--predict needs a run"),
    (["--export", "x"], "--export says where --predict draws; give both"),
    (["--eval", "{run}", "--predict", "x.docx"], "x.docx: not a format"),
    (["--eval", "{run}", "--predict", "missing.npy"], "missing.npy: "),
    (["--groups", "600"], "--groups 600 must be at most --points 256"),
    (["--neighbours", "65"], "at most 64"),
    (["--deep-prompt", "--no-task-token"], "exclude each other"),
    (["--no-transformer", "--unfreeze"], "leaves nothing"),
    (["--lr", "-1"], "must be above 0"),
    (["--dropout", "1"], "at least 0 and below 1"),
    (["--test-fraction", "0.3"], "--test-fraction: the data have a test set of their own"),
    (["--clip", "timm:test_vit=random", "--text-loss", "raw"], "timm:test_vit=random has no text"),
    (["--eval", "{run}", "--predict", "gone.obj"], "gone.obj: no such file; give a mesh or a cl"),
    (["--eval", "{run}", "--predict", "gone.obj", "--root", "x"], "no data; leave --root out"),
    (["--test-fraction", "1.5"], "between 0 and 1"),
    (["--train-fraction", "0"], "between 0 and 1"), (["--train-fraction", "nan"], "between"),
    (["--device", "cuda"], "no CUDA device"),
    (["--data", "modelnet40", "--root", "nowhere"], "princeton"),
    (["--data", "modelnet40"], "data/modelnet40: no such file or folder"),
    (["--out", "{run}"], "holds a run; --resume"),
    (["--out", "{run}/log.txt/run"], "log.txt: nothing can be written in it; give another"),
    (["--data", "modelnet40", "--root", "nowhere", "--clip", "nano=gone.safetensors"],
     "--clip: no such file: gone.safetensors"),         # before the data, which take minutes
    (["--data", "modelnet40", "--root", "nowhere", "--clip", "gone.pt=shuffled"],
     "--clip: no such file: gone.pt"),
    (["--data", "modelnet40", "--root", "nowhere", "--init-official", "gone.pth"],
     "--init-official: no such file: gone.pth"),
    (["--init-official", "{run}/last.pt"], "not a checkpoint of the authors'"),
    (["--init-official", "any.pth", "--unfreeze"], "leave --clip and --unfreeze out"),
    (["--init-official", "any.pth", "--clip", "random"], "leave --clip and --unfreeze out"),
])
def test_a_mistake_on_the_command_line_is_answered_in_one_line(finished, flags, words, monkeypatch):
    if flags[0] == "--device" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    monkeypatch.setattr(train_cls, "SYNTHETIC", (1, 1))
    with pytest.raises(InputError, match=re.escape(words)) as error:
        train_cls.main([flag.format(run=finished) for flag in flags])
    assert "\n" not in str(error.value)


def test_a_run_that_was_killed_between_its_last_epoch_and_its_results_is_finished(
        finished, tmp_path, folder):
    shutil.copytree(finished, tmp_path / "run")
    for name in ("results.json", "look.png"):
        (tmp_path / "run" / name).unlink()
    train_cls.main(["--resume", str(tmp_path / "run")])
    for name in ("look.png", "metrics.jsonl", "last.pt"):
        assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes()
    was, now = (json.loads((run / "results.json").read_bytes())
                for run in (finished, tmp_path / "run"))
    assert now == was
    with pytest.raises(InputError, match="the run is finished"):
        train_cls.main(["--resume", str(tmp_path / "run")])


@pytest.mark.parametrize("flag, value", [
    ("--seed", "1e20"), ("--seed", "9" * 20), ("--points", "1e20"), ("--points", "9" * 20),
    ("--epochs", "9" * 5000), ("--workers", "0"), ("--lr", "high")])
def test_a_number_that_is_none_is_one_line(flag, value, capsys):
    with pytest.raises(SystemExit) as left:
        train_cls.flags([flag, value])
    printed = capsys.readouterr().err
    assert left.value.code == 2 and printed.startswith(f"error: argument {flag}: ")
    assert printed.count("\n") == 1


@pytest.mark.parametrize("value", ["nan", "inf", "1e300", "0", "-1"])
def test_a_learning_rate_that_is_none_is_one_line(value):
    with pytest.raises(InputError, match="must be above 0 and below 1000"):
        train_cls.settings(train_cls.flags(["--lr", value]))


def script(*args):
    env = {k: v for k, v in os.environ.items()
           if k not in ("WORLD_SIZE", "RANK", "TRITON_INTERPRET")}
    return subprocess.Popen([sys.executable, *args], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env={**env, "OMP_NUM_THREADS": "1"})


def test_an_error_is_one_line_on_stderr_and_exit_code_2():
    process = script("train_cls.py", "--data", "folder", "--root", "no/such/folder")
    out, err = process.communicate(timeout=600)
    assert process.returncode == 2 and out == ""
    assert err.count("\n") == 1
    assert err.startswith("error: --root no/such/folder: no such file or folder")


def test_help_needs_no_gpu_no_weights_and_no_triton():
    code = "import sys; sys.modules['triton'] = None; import train_cls; train_cls.main(['--help'])"
    process = script("-c", code)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0 and "--no-task-token" in out and "modelnet40" in out, err


def when_saved(process, folder):
    """Wait until a training has a checkpoint. The limits here are for a machine that is busy."""
    deadline = time.time() + 600
    while not (folder / "last.pt").exists() and time.time() < deadline and process.poll() is None:
        time.sleep(0.05)


def test_ctrl_c_saves_and_says_how_to_go_on(folder, tiny_clip, tmp_path):
    more = arguments(folder, tiny_clip, tmp_path / "run", "--epochs", "5000")
    process = script("train_cls.py", *more)
    when_saved(process, tmp_path / "run")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 130, err
    assert f"go on with: python train_cls.py --resume {tmp_path / 'run'}" in out
    assert "Traceback" not in err
    assert checkpoint.load_checkpoint(tmp_path / "run", "cls")["at"]["epoch"] >= 1


NO_DROPOUT = """
import sys, torch
torch.nn.Dropout.forward = lambda self, x: x
import run, train_cls
run.main_guard(train_cls.main)
"""


def test_two_processes_follow_the_loss_curve_of_one(folder, tiny_clip, tmp_path):
    """Shares of 3 and 4 of each batch of 7, without dropout: each process draws its own masks. A
    low rate: AdamW turns rounding into steps of its own size."""
    (tmp_path / "no_dropout.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})"
                                            + NO_DROPOUT)
    slow = ("--batch-size", "7", "--lr", "1e-5", "--device", "cpu")
    torchrun = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29517")
    for name, launcher in (("one", ()), ("two", torchrun)):
        process = script(*launcher, str(tmp_path / "no_dropout.py"),
                         *arguments(folder, tiny_clip, tmp_path / name, *slow))
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
    assert "2 processes" in out and out.count("result ") == 1
    for two, one in zip(lines(tmp_path / "two"), lines(tmp_path / "one"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["train_accuracy"] == one["train_accuracy"]
        assert two["accuracy"] == one["accuracy"]


def test_a_killed_process_ends_the_others_with_one_line(folder, tiny_clip, tmp_path):
    more = arguments(folder, tiny_clip, tmp_path / "run", "--epochs", "5000", "--device", "cpu")
    process = script("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29523",
                     "train_cls.py", *more)
    when_saved(process, tmp_path / "run")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.terminate()
        pytest.skip("needs Linux: finds the processes of torchrun in /proc")
    first, second = map(int, children.read_text().split()[:2])
    os.kill(second, signal.SIGKILL)
    begin = time.time()
    out, err = process.communicate(timeout=600)
    assert process.returncode == 1 and time.time() - begin < 60
    assert err.count("error: another process of this run was ended; --resume goes on") == 1
    assert "[rank" not in err, err                      # torchrun has a report of its own
    assert not Path(f"/proc/{first}").exists()
    assert checkpoint.load_checkpoint(tmp_path / "run", "cls")["at"]["epoch"] >= 1



def test_a_compiled_model_has_no_graph_break_and_learns_the_same(
        folder, tiny_clip, tmp_path, monkeypatch):
    slow = ("--lr", "1e-5", "--epochs", "2")
    train_cls.main(arguments(folder, tiny_clip, tmp_path / "plain", *slow))
    compiler = torch.compile                    # without code generation: no C compiler needed
    monkeypatch.setattr(torch, "compile",
                        lambda m: compiler(m, backend="aot_eager", fullgraph=True))
    train_cls.main(arguments(folder, tiny_clip, tmp_path / "compiled", *slow, "--compile"))
    for ours, plain in zip(lines(tmp_path / "compiled"), lines(tmp_path / "plain"), strict=True):
        assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-5)


def test_accumulation_and_every_ablation_train(folder, tiny_clip, tmp_path):
    variants = (["--accumulate", "2"], ["--unfreeze"], ["--deep-prompt"], ["--no-transformer"],
                ["--no-task-token", "--dropout", "0.3"])
    for i, more in enumerate(variants):
        train_cls.main(arguments(folder, tiny_clip, tmp_path / str(i), "--epochs", "2", *more))
        losses = [line["loss"] for line in lines(tmp_path / str(i))]
        assert losses[1] < losses[0], more


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint_before(
        folder, tiny_clip, tmp_path, monkeypatch):
    real, calls = train_cls.loss_terms, iter(range(100))

    def break_down(*args):
        head, text = real(*args)
        return head * (float("nan") if next(calls) == 5 else 1), text
    monkeypatch.setattr(train_cls, "loss_terms", break_down)
    with pytest.raises(InputError, match="not finite in epoch 2"):
        train_cls.main(arguments(folder, tiny_clip, tmp_path / "run"))
    saved = checkpoint.load_checkpoint(tmp_path / "run", "cls")
    assert saved["at"]["epoch"] == 1 and all(w.isfinite().all() for w in saved["model"].values())


SHARED = ROOT.parent / "shared" / "data"


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs real meshes and weights, not distributed")
def test_real_meshes_and_a_real_pretrained_vit_train(tmp_path):
    root = tmp_path / "shapes"
    for part in ("train", "test"):
        for name in ("Bottle", "Guitar", "Bed"):
            (root / part / name).mkdir(parents=True)
            for path in sorted((SHARED / "shapes20" / part / name).iterdir())[:4]:
                (root / part / name / path.name).symlink_to(path)
    clip = f"timm:vit_tiny_patch16_224={SHARED / 'vit_tiny_patch16_224.safetensors'}"
    train_cls.main(["--data", "folder", "--root", str(root), "--clip", clip,
                    "--out", str(tmp_path / "run"), "--points", "256", "--groups", "16",
                    "--neighbours", "16", "--epochs", "6", "--batch-size", "6", "--lr", "0.001"])
    losses = [line["loss"] for line in lines(tmp_path / "run")]
    assert losses[-1] < losses[0]


def test_weights_are_known_by_their_hash_wherever_they_lie(folder, tiny_clip, tmp_path, monkeypatch,
                                                           capsys):
    """The file moves after one epoch: --resume and --eval take its new place, and no other file."""
    here, there = tmp_path / "here.safetensors", tmp_path / "there.safetensors"
    shutil.copy(tiny_clip.split("=")[1], here)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(run.Stopper, "now", lambda self, step: True)
        train_cls.main(arguments(folder, f"timm:test_vit={here}", tmp_path / "run"))
    here.rename(there)
    with pytest.raises(InputError, match=f"no such file: {here}; if it was moved, --clip names"):
        train_cls.main(["--resume", str(tmp_path / "run")])
    moved = ["--clip", f"timm:test_vit={there}"]
    train_cls.main(["--resume", str(tmp_path / "run"), *moved])
    saved = checkpoint.load_checkpoint(tmp_path / "run", "cls")
    assert saved["config"]["clip"] == saved["frozen"]["name"] == moved[1]
    capsys.readouterr()
    train_cls.main(["--eval", str(tmp_path / "run")])
    there.rename(here)
    train_cls.main(["--eval", str(tmp_path / "run"), "--clip", f"timm:test_vit={here}"])
    first, second = [line for line in capsys.readouterr().out.splitlines() if "result" in line]
    assert first.split(";")[0] == second.split(";")[0]


def test_the_split_belongs_to_the_run(tiny_clip, tmp_path, monkeypatch, capsys):
    """More objects would make others of each class the test set: a run keeps what it set aside."""
    root = tmp_path / "data"
    for name, clouds in shapes(20).items():
        (root / name).mkdir(parents=True)
        for i, cloud in enumerate(clouds):
            np.save(root / name / f"o{i}.npy", cloud.astype(np.float32))
    small = arguments(root, tiny_clip, tmp_path / "whole", "--epochs", "2")
    train_cls.main(small)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(run.Stopper, "now", lambda self, step: True)
        train_cls.main([*small, "--out", str(tmp_path / "parts")])
    split = checkpoint.load_checkpoint(tmp_path / "whole", "cls")["config"]["split"]
    assert [len(names) for names in split] == [48, 12]
    printed = capsys.readouterr().out
    shutil.copy(root / "ball/o1.npy", root / "ball/aa.npy")
    np.save(root / "cube/short.npy", CLOUD[:9])             # too few points, but not of the run
    train_cls.main(["--eval", str(tmp_path / "whole")])
    again = capsys.readouterr().out
    assert "left out, since the run was begun without them: ball/aa.npy, cube/short.npy" in again
    assert "48 train, 12 test" in again
    result = [line for line in printed.splitlines() if "result" in line]
    assert result and result == [line for line in again.splitlines() if "result" in line]
    train_cls.main(["--resume", str(tmp_path / "parts")])
    assert "left out" in capsys.readouterr().out
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    (root / "ball/o1.npy").unlink()
    with pytest.raises(InputError, match="ball/o1.npy is missing, one of 60 objects"):
        train_cls.main(["--eval", str(tmp_path / "whole")])
