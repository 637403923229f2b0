"""look.py: what it reads from a run, and pictures of it where matplotlib is installed."""
import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import look
from run import InputError, Run, Setup

ROOT = Path(__file__).parent.parent
LINES = [{"epoch": 1, "loss": 2.0, "text": 0.0, "lr": 0.1, "seconds": 3},
         {"epoch": 2, "loss": 1.0, "text": 0.0, "lr": 0.0, "seconds": 3, "miou": 0.4}]
SHOTS = [{"setting": [5, 10], "episode": i, "variant": variant, "curve": [0.2, 0.4 + i / 10]}
         for variant in ("frozen", "random") for i in range(2)]


def run_of(folder, lines):
    folder.mkdir(parents=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    return str(folder)


def test_curves_are_those_of_metrics_jsonl(tmp_path):
    found = look.curves_of(run_of(tmp_path / "seg-1", LINES))
    assert found == {"seg-1": {"loss": [(1, 2.0), (2, 1.0)], "text": [(1, 0.0), (2, 0.0)],
                               "lr": [(1, 0.1), (2, 0.0)], "miou": [(2, 0.4)]}}


def test_a_few_shot_run_has_a_curve_for_each_variant_the_mean_of_its_episodes(tmp_path):
    found = look.curves_of(run_of(tmp_path / "few", SHOTS))
    assert list(found) == ["few 5w10s frozen", "few 5w10s random"]
    for curves in found.values():
        (first, last), = curves.values()
        assert first == (1, 0.2) and last == (2, pytest.approx(0.45))


def test_epochs_that_were_not_tested_are_no_points_of_a_curve(tmp_path):
    lines = [{**line, "curve": [None, *line["curve"], None, 1.0]} for line in SHOTS[:2]]
    (curves,) = look.curves_of(run_of(tmp_path / "few", lines)).values()
    assert curves["accuracy"] == [(2, 0.2), (3, pytest.approx(0.45)), (5, 1.0)]


@pytest.mark.parametrize("content, words", [
    (None, "metrics.jsonl: no such file; give a run folder"), ("", "is empty"),
    ('{"epoch": 1}\n{"epo', "line 2 is broken"), ("[1]\n", "line 1 is broken")])
def test_a_run_that_cannot_be_read_is_one_line(tmp_path, content, words):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(InputError) as error:
        look.curves_of(tmp_path)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_without_matplotlib_one_line_says_so(tmp_path):
    run = run_of(tmp_path / "run", LINES)
    code = ("import sys; sys.modules['matplotlib'] = None; import look, run; sys.argv[1:] = "
            f"[{run!r}]; run.main_guard(look.main)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == ("error: look.py draws with matplotlib, which is not installed; pip "
                           "install matplotlib\n")


def test_a_confusion_matrix_is_written_as_a_table_that_comes_back(tmp_path):
    run = Run("cls", {"data": "toy"}, Setup("cpu", "fp32"))
    run.folder = tmp_path
    counts = torch.tensor([[5, 1], [0, 7]])
    run.confusion(counts, ["a, b", "\udcffc"])          # a comma; a byte that is no text
    with open(tmp_path / "confusion.csv", encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [["true", "a, b", "\\udcffc"], ["a, b", "5", "1"],
                                          ["\\udcffc", "0", "7"]]


def test_pictures_show_every_metric_once_and_the_shares_of_each_class(
        tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="needs matplotlib: draws with it")
    figures = []
    save = look.save
    monkeypatch.setattr(look, "save", lambda path, figure: (figures.append(figure),
                                                            save(path, figure)))
    first, second = (run_of(tmp_path / k / "run-1", LINES[:n]) for k, n in (("a", 2), ("b", 1)))
    third = run_of(tmp_path / "few", SHOTS)
    Path(second, "confusion.csv").write_text("true,x,y\nx,3,1\ny,0,0\n", encoding="utf-8")
    look.main([first, second, third])
    curves, confusion = figures
    assert [axes.get_title() for axes in curves.axes] == ["loss", "lr", "miou", "accuracy"]
    drawn = [[line.get_label() for line in axes.lines] for axes in curves.axes]
    assert drawn == [["run-1", "run-1'"], ["run-1", "run-1'"], ["run-1"],
                     ["few 5w10s frozen", "few 5w10s random"]]
    assert curves.axes[0].lines[0].get_xydata().tolist() == [[1, 2], [2, 1]]
    assert len(curves.legends[0].get_texts()) == 4
    axes, = confusion.axes
    np.testing.assert_array_equal(axes.images[0].get_array(), [[75, 25], [0, 0]])
    assert [text.get_text() for text in axes.texts] == ["75", "25"]
    paths = [Path(first, "curves.png"), Path(second, "confusion.png")]
    assert capsys.readouterr().out.split() == [str(path) for path in paths]
    assert all((np.asarray(Image.open(path)) < 255).any() for path in paths)
    with pytest.raises(InputError, match="new.jpg: is written as a .png; end its name so"):
        look.main([second, "--out", str(tmp_path / "new.jpg")])
    nothing = run_of(tmp_path / "nothing", [{"epoch": 1, "loss": 2.0, "text": 0.0, "map25": 0.0}])
    look.main([nothing])                                    # learned nothing: that is seen
    assert [axes.get_title() for axes in figures[-1].axes] == ["loss", "map25"]
    look.main([second, "--out", str(tmp_path / "new.png")])
    assert (tmp_path / "new.png").is_file()
