"""The run: schedule, seeds, frame of the loop, signals, checkpoints, run folder."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import checkpoint
import kernels
import run as run_module
from checkpoint import check_frozen, load_checkpoint
from run import InputError, Run, Setup, learning_rate

ROOT = Path(__file__).parent.parent
CFG = {"data": "toy", "seed": 3, "frozen": {"name": "none", "sha256": "0" * 64},
       "recipe": {"epochs": 4, "lr": 1.0, "warmup": 0}}


def loop(folder, saved=None, stop_at=None, steps=3):
    """A toy training in the frame -> what it drew, the run. Stopped at question `stop_at`."""
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    run = Run("cls", saved["config"] if saved else CFG, Setup("cpu", "fp32"), saved)
    run.open(__file__, folder)
    questions, drawn = iter(range(1000)), []
    run.stopper.now = lambda step: next(questions) == stop_at
    with run.stopper:
        for epoch in run.epochs(model, optimizer, "epoch  loss"):
            order = torch.randperm(steps, generator=run.draw)
            for step in run.steps(steps):
                data = torch.rand(1, generator=run.draw).item()
                dropped = torch.rand(1).item()
                rate = optimizer.param_groups[0]["lr"]
                drawn.append((epoch, step, order[step].item(), data, dropped, rate))
                run.sums += torch.tensor([data, 1.0], dtype=torch.float64)
            loss, n = run.totals("loss")
            run.row(loss / n if run.due(2) else None, f"{loss / n:6.3f}", loss=loss / n)
    return drawn, run


def lines(folder):
    return [line.split('"lr"')[0] for line in open(folder / "metrics.jsonl", encoding="utf-8")]


@pytest.mark.parametrize("stop_at", [0, 1, 2, 4, 7])     # 2 questions in an epoch, 1 after it
def test_a_stopped_epoch_goes_on_with_the_numbers_that_it_had_drawn(tmp_path, stop_at, capsys):
    whole, _ = loop(tmp_path / "whole")
    with pytest.raises(SystemExit) as stopped:
        loop(tmp_path / "parts", stop_at=stop_at)
    assert stopped.value.code == 130
    saved = load_checkpoint(tmp_path / "parts", "cls")
    capsys.readouterr()
    rest, run = loop(tmp_path / "parts", saved)
    assert rest == whole[-len(rest):]
    assert saved["at"]["epoch"] * 3 + saved["at"]["step"] == len(whole) - len(rest)
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    assert run.at["best_epoch"] in (2, 4)
    printed = capsys.readouterr().out.splitlines()
    assert "resumed after" in printed[0] and printed[1].startswith("epoch  loss        lr")


def test_a_finished_or_failed_run_gives_the_signal_handlers_back(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    loop(tmp_path / "a")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    with pytest.raises(SystemExit):
        loop(tmp_path / "b", stop_at=1)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    with pytest.raises(RuntimeError, match="anything"):
        with Run("cls", CFG, Setup("cpu", "fp32")).stopper:
            assert signal.getsignal(signal.SIGINT) != before[0]
            raise RuntimeError("anything")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_the_first_ctrl_c_asks_and_the_second_ends_at_once():
    run = Run("cls", CFG, Setup("cpu", "fp32"))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)   # a job behind & ignores it
    with run.stopper:
        assert not run.stopper.now(0)
        signal.raise_signal(signal.SIGINT)
        assert run.stopper.now(0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def test_a_loss_that_is_not_finite_is_named(tmp_path):
    run = Run("cls", CFG, Setup("cpu", "fp32"))
    run.begin(1)
    run.sums = torch.tensor([1.0, float("nan"), 4.0], dtype=torch.float64)
    with pytest.raises(InputError, match=r"not finite in epoch 2 \(head 0.25, text nan\)"):
        run.totals("head", "text")


def test_the_schedule_is_timm_s_with_the_cosine_counted_from_the_start():
    lr = [learning_rate(e, 3e-4, 300, 10) for e in (0, 1, 9, 10, 150, 299, 300, 400)]
    expected = [1e-6, 3.09e-5, 2.701e-4, 2.992e-4, 1.505e-4, 1.008e-6, 1e-6, 1e-6]
    assert lr == pytest.approx(expected, rel=1e-3)


def test_half_a_checkpoint_never_replaces_a_whole_one(tmp_path):
    """kill -9 while a process does nothing but save: the file under the final name always loads."""
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
            "import torch; from pathlib import Path; from run import Run, Setup\n"
            "run, n = Run('cls', {}, Setup('cpu')), 0\n"
            f"run.folder = Path({str(tmp_path)!r})\n"
            "while True:\n"
            "    weights = torch.full((500_000,), float(n))\n"
            "    run.write('last.pt', {'task': 'cls', 'n': n, 'w': weights}); n += 1\n")
    for pause in (0.0, 0.013, 0.027):
        process = subprocess.Popen([sys.executable, "-c", code])
        deadline = time.time() + 600
        last = tmp_path / "last.pt"
        before = last.stat().st_mtime_ns if last.exists() else 0
        while (not last.exists() or last.stat().st_mtime_ns == before) and time.time() < deadline:
            time.sleep(0.01)
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        process.wait()
        saved = load_checkpoint(tmp_path, "cls")
        assert (saved["w"] == saved["n"]).all()


@pytest.mark.parametrize("content, words", [
    (b"", "cut short"), (b"PK\x03\x04 nonsense", "cut short"), (None, "no such checkpoint")])
def test_a_broken_checkpoint_is_named(tmp_path, content, words):
    path = tmp_path / "last.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=words) as error:
        load_checkpoint(path, "cls")
    assert str(path) in str(error.value)


def test_a_checkpoint_of_another_script_or_of_other_frozen_weights_is_refused(tmp_path):
    run = Run("det", CFG, Setup("cpu", "fp32"))
    run.open(__file__, tmp_path / "run")
    run.write("last.pt", {"task": "det", "frozen": {"name": "openai", "sha256": "0" * 64}})
    with pytest.raises(InputError, match="train_det.py, not of train_cls.py"):
        load_checkpoint(tmp_path / "run", "cls")

    class Clip:
        name, model, sha256 = "ViT-B-32=there/w.pt", "ViT-B-32", "1" * 64

    cfg, saved = {}, load_checkpoint(tmp_path / "run", "det")
    check_frozen(cfg, None, Clip)
    assert cfg["frozen"] == {"name": Clip.name, "model": Clip.model, "sha256": Clip.sha256}
    with pytest.raises(InputError, match="is not what the run was trained with .openai, 00000"):
        check_frozen(cfg, saved, Clip)
    saved["frozen"] = {"name": "ViT-B-32=here/w.pt", "sha256": "1" * 64}    # before it had a model
    check_frozen(cfg, saved, Clip)
    saved["frozen"]["model"] = "ViT-B-32-quickgelu"     # the same weights, another activation
    with pytest.raises(InputError, match="is not what the run was trained with"):
        check_frozen(cfg, saved, Clip)


def test_a_checkpoint_with_the_names_of_before_says_what_to_do():
    model = torch.nn.Linear(2, 1)
    with pytest.raises(InputError, match="from before 26 November 2026.*train anew"):
        checkpoint.load_weights(model, {"encoder.tokenizer.first.0.weight": torch.zeros(1)})
    with pytest.raises(InputError, match=r"do not fit the model: 2 tensors differ, "
                                         r"weight \(5,\) for \(1, 2\), bias missing for \(1,\)"):
        checkpoint.load_weights(model, {"weight": torch.zeros(5)})


def test_a_run_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot be written"):
        Run("cls", CFG, Setup("cpu")).open(__file__, tmp_path / "file" / "run")


def test_a_run_that_another_process_is_writing_is_refused_until_that_process_is_gone(tmp_path):
    pytest.importorskip("fcntl", reason="Windows has other locks")
    loop(tmp_path)
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
            "import time; from run import Run, Setup\n"
            f"run = Run('cls', {CFG}, Setup('cpu')); run.open(run.open.__code__.co_filename, "
            f"{str(tmp_path)!r})\nprint('open', flush=True); time.sleep(600)")
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "open\n"
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match="another process is writing this run; wait for its end"):
        loop(tmp_path, load_checkpoint(tmp_path, "cls"))
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    other.kill()
    other.wait()
    loop(tmp_path, load_checkpoint(tmp_path, "cls"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is full")
@pytest.mark.parametrize("name", ["last.pt", "results.json", "metrics.jsonl", "log.txt"])
def test_a_full_disk_is_one_line_and_the_checkpoint_before_survives(name, tmp_path):
    _, run = loop(tmp_path)
    before = (tmp_path / "last.pt").read_bytes()
    run.log.close()
    run.log = open("/dev/full", "ab", buffering=0)
    for file in ("last.pt.tmp", "results.json.tmp"):
        (tmp_path / file).symlink_to("/dev/full")
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    writes = {"log.txt": lambda: run.print("x"), "metrics.jsonl": lambda: run.append(name, "x"),
              "last.pt": lambda: run.save(name), "results.json": lambda: run.write(name, {})}
    with pytest.raises(InputError, match=f"{name}: cannot be written .*; make room") as error:
        writes[name]()
    assert "\n" not in str(error.value) and (tmp_path / "last.pt").read_bytes() == before


def test_what_a_killed_process_left_half_written_is_cleaned(tmp_path):
    loop(tmp_path)
    (tmp_path / "best.pt.tmp").write_bytes(b"half")
    loop(tmp_path, load_checkpoint(tmp_path, "cls"))
    assert not list(tmp_path.glob("*.tmp"))


def test_a_run_without_a_checkpoint_says_which_command_to_repeat(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_cls.py", "--out", "my run"])
    Run("cls", CFG, Setup("cpu")).open(__file__, tmp_path)
    with pytest.raises(InputError, match="nothing was saved yet; repeat the run: python "
                                         "train_cls.py --out 'my run'"):
        load_checkpoint(tmp_path, "cls")


@pytest.mark.parametrize("script", ["train_cls", "train_clip", "train_clip2point", "train_det",
                                    "train_fewshot", "train_outdoor", "train_seg", "zero_shot"])
def test_ctrl_c_while_torch_is_imported_is_no_traceback(script):
    code = ("import builtins, os, runpy, signal, sys\nreal = builtins.__import__\n"
            "def interrupted(name, *args, **more):\n"
            "    name == 'torch' and os.kill(os.getpid(), signal.SIGINT)\n"
            "    return real(name, *args, **more)\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            f"builtins.__import__, sys.argv = interrupted, ['{script}.py']\n"
            f"sys.path.insert(0, {str(ROOT)!r})\n"
            f"runpy.run_path({str(ROOT)!r} + '/{script}.py', run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT and done.stderr == done.stdout == ""


def test_a_run_says_which_kernels_run(monkeypatch):
    monkeypatch.setattr(kernels, "numba", None)
    assert Setup("cpu", "fp32").describe.endswith("fp32 (asked for), kernels in torch")
    monkeypatch.setattr(kernels, "numba", type("", (), {"__version__": "0.68.1"}))
    assert Setup("cpu", "fp32").describe.endswith("kernels in numba 0.68.1")


def test_a_run_says_if_bf16_is_slow(monkeypatch):
    monkeypatch.setattr(run_module, "has_bf16", lambda: False)
    assert "bf16 (asked for; SLOW: this CPU has no" in Setup("cpu", "bf16").describe
    assert "SLOW" not in Setup("cpu", "fp32").describe + Setup("cpu").describe
    monkeypatch.setattr(run_module, "has_bf16", lambda: True)
    assert "bf16 (asked for), kernels" in Setup("cpu", "bf16").describe


def test_names_that_are_no_text_are_written_and_saved(tmp_path, capsys):
    name = "St\udcfchl.xyz"                 # how Python holds a byte that is not UTF-8
    run = Run("cls", {**CFG, "split": [[name], []]}, Setup("cpu", "fp32"))
    run.open(__file__, tmp_path)
    run.append("log.txt", f"{name} \u6905\n")
    run.write("last.pt", {"task": "cls", "config": run.cfg})
    assert (tmp_path / "log.txt").read_text(encoding="utf-8") == "St\\udcfchl.xyz \u6905\n"
    assert load_checkpoint(tmp_path, "cls")["config"]["split"] == [[name], []]


def test_a_terminal_that_lacks_a_letter_does_not_stop_a_run(tmp_path):
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
            "import run; run.main_guard(lambda: print('\\u6905', 'St\\udcfchl'))")
    for encoding in ("ascii", "cp1252", "utf-8"):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                              encoding=encoding, env={**os.environ, "PYTHONIOENCODING": encoding})
        assert done.returncode == 0 and "\\udcfc" in done.stdout, done.stderr


def test_a_name_with_a_line_break_is_one_line(capsys):
    def broken():
        raise InputError("br\noken.off: is empty; repair it")
    with pytest.raises(SystemExit) as left:
        run_module.main_guard(broken)
    assert left.value.code == 2
    assert capsys.readouterr().err == "error: br\\noken.off: is empty; repair it\n"


def test_a_file_where_a_folder_should_be_is_one_line(tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    with pytest.raises(SystemExit) as left:
        run_module.main_guard((tmp_path / "taken").mkdir)
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'taken'}: File exists; give a")
    if Path("/dev/full").exists():          # while a room is exported, say
        with pytest.raises(SystemExit):
            run_module.main_guard(lambda: Path("/dev/full").write_bytes(b"a room"))
        assert capsys.readouterr().err.startswith("error: the disk: No space left on device; give")


def test_another_process_than_the_first_speaks_if_the_first_has_not(monkeypatch, capsys):
    """torchrun ends the others when the first one fails; what only they met must be said."""
    waited = []
    monkeypatch.setattr(run_module.time, "sleep", waited.append)

    def broken():
        raise InputError("room.ply: cut short")
    for process, seconds in (("0", []), ("1", [3])):
        monkeypatch.setenv("RANK", process)
        waited.clear()
        with pytest.raises(SystemExit, match="2"):
            run_module.main_guard(broken)
        assert capsys.readouterr().err == "error: room.ply: cut short\n" and waited == seconds


def test_only_the_loss_of_a_process_is_taken_for_one(monkeypatch, capsys):
    def failed():
        raise RuntimeError("[gloo] Connection closed by peer")
    with pytest.raises(RuntimeError, match="closed by peer"):   # one process has lost none
        run_module.main_guard(failed)
    monkeypatch.setattr(run_module, "world_size", lambda: 2)

    def other():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="mat1"):
        run_module.main_guard(other)
    assert capsys.readouterr().err == ""
