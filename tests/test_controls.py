"""controls.py: its rows, what it trains again and what not, its table."""
import json
from pathlib import Path

import pytest

import controls
import nanoclip
import pretrained
import train_cls
from run import ABLATIONS, InputError

SCRIPT = """
import json, os, sys
from pathlib import Path
names = "--out", "--resume"
out = Path(next(value for name, value in zip(sys.argv, sys.argv[1:]) if name in names))
with open("started.txt", "a") as file:
    print(*sys.argv[1:], "threads", os.environ["OMP_NUM_THREADS"], file=file)
if "--fail" in sys.argv:
    sys.exit("error: no such thing")
out.mkdir(exist_ok=True)
score = .5 + .01 * int(out.name[-1]) * (1 + ("shuffled" in out.name)) - .1 * ("random" in out.name)
(out / "results.json").write_text(json.dumps({
    "metrics": {"accuracy": score}, "best_on_test": {"accuracy": score + .1}, "seconds": 7,
    "parameters": {"trainable": 1234}}))
"""


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A train_cls.py that is done at once and notes what it was asked for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(controls, "SCRIPT", tmp_path / "script.py")
    monkeypatch.setattr(controls.os, "cpu_count", lambda: 2)
    Path("script.py").write_text(SCRIPT)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")                  # so that it is as before afterwards
    monkeypatch.delenv("OMP_NUM_THREADS")

    def started():
        lines = Path("started.txt").read_text().splitlines()
        Path("started.txt").unlink()
        return lines
    return started


def test_train_cls_takes_the_flags_of_every_row():
    groups = controls.variants_of("nano", "raw")
    assert [len(group) for group in groups] == [5, 4]
    seen = set()
    for group in groups:
        for flags in group.values():
            cfg, _, _ = train_cls.settings(train_cls.flags([*flags, "--seed", "1"]))
            seen.add((cfg["clip"], cfg["no_transformer"], cfg["unfreeze"], cfg["text_loss"]))
    assert len(seen) == 9
    assert ("nano=random", False, False, "off") in seen and ("nano", False, True, "raw") in seen


def test_the_papers_ablations_are_a_table_of_their_own(trained, capsys):
    (group,) = controls.ablations_of("nano", "cosine")
    found = [train_cls.settings(train_cls.flags(flags))[0] for flags in group.values()]
    assert all(cfg["text_loss"] == "cosine" and cfg["clip"] == "nano" for cfg in found)
    changed = [{name for name in ABLATIONS if cfg[name]} for cfg in found]
    assert changed == [set(), {"no_task_token"}, {"deep_prompt"}, {"unfreeze"}]
    controls.main(["--ablations", "--seeds", "2", "--out", "here"])
    assert len(trained()) == 8 and "| deep prompts | 1,234 |" in capsys.readouterr().out
    with pytest.raises(InputError, match="had other flags"):
        controls.main(["--seeds", "2", "--out", "here"])


def test_without_a_text_tower_there_are_no_rows_of_the_text_loss(tiny_clip):
    (group,) = controls.variants_of(tiny_clip, "raw")
    assert len(controls.variants_of("nano", "off")) == 1
    own = controls.variants_of(f"nano={nanoclip.FILE}", "off")[0]["random, frozen"][1]
    assert own == f"nano={nanoclip.FILE}=random"
    assert pretrained.load_clip(own).sha256 == pretrained.load_clip("nano=random").sha256
    assert train_cls.settings(train_cls.flags(["--clip", own]))[0]["clip"] == own
    assert group["random, frozen"][1] == "timm:test_vit=random"
    assert group["shuffled, frozen"][1] == f"{tiny_clip}=shuffled"


def test_everything_is_trained_once_and_the_table_pairs_by_seed(trained, capsys):
    controls.main(["--seeds", "3", "--jobs", "2", "--epochs", "2", "--out", "here"])
    first = trained()
    assert len(first) == 27 and all("--epochs 2" in line for line in first)
    assert all(line.endswith("threads 1") for line in first)
    assert sum("--seed 2" in line for line in first) == 9
    lines = capsys.readouterr().out.splitlines()
    assert "| pretrained, frozen | 1,234 | 51.0 ± 0.8 |  | 61.0 ± 0.8 | 7 |" in lines
    # 0, 2, 4 against 0, 1, 2 points: 1 point more, Student's t with 2 degrees of freedom
    assert "| shuffled, frozen | 1,234 | 52.0 ± 1.6 | +1.0 [-1.5, +3.5] | 62.0 ± 1.6 | 7 |" in lines
    row = "| random, frozen | 1,234 | 41.0 ± 0.8 | -10.0 [-10.0, -10.0] | 51.0 ± 0.8 | 7 |"
    assert row in lines

    Path("here/no-transformer-1/results.json").unlink()         # killed before it saved anything
    Path("here/shuffled-frozen-2/results.json").unlink()        # stopped: it goes on
    Path("here/shuffled-frozen-2/last.pt").write_text("")
    controls.main(["--seeds", "3", "--epochs", "2", "--out", "here"])
    again = trained()
    assert len(again) == 2 and any("--no-transformer" in line for line in again)
    assert any(line.startswith("--resume here/shuffled-frozen-2") for line in again)


def test_what_cannot_be_done_is_one_line(trained):
    with pytest.raises(InputError, match="seed 0: train_cls.py ended with exit code 1: no such"):
        controls.main(["--out", "bad", "--fail", "1"])
    Path("bad/random-frozen-0").mkdir(exist_ok=True)
    Path("bad/random-frozen-0/config.json").touch()
    with pytest.raises(InputError, match="the trainings there had other flags; give another --out"):
        controls.main(["--out", "bad", "--epochs", "3"])
    for words in (["--seed", "3"], ["--seed=3"], ["--see", "3"]):
        with pytest.raises(InputError, match="--seed: controls.py gives it to train_cls.py itself"):
            controls.main(words)
    with pytest.raises(InputError, match="--clip nano=random: is a control itself"):
        controls.main(["--clip", "nano=random"])
    assert json.loads(Path("bad/controls.json").read_text())["flags"] == ["--fail", "1"]
    Path("bad/controls.json").write_text("{")
    with pytest.raises(InputError, match="bad/controls.json: .*; give another --out"):
        controls.main(["--out", "bad"])
