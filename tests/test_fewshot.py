"""train_fewshot.py: data, episodes, folds, statistics, pairing, resume, wrong input."""
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
import render
import run
import train_fewshot as fewshot
from data import objects
from data.objects import MODELNET40
from run import InputError
from test_bench import nano_file
from test_files import shapes
from train_fewshot import Data, Objects

CLASSES = ("ball", "cube", "stick", "plate", "ring", "cone")
TRAIN, TEST = np.repeat(np.arange(6), 5), np.repeat(np.arange(6), 21)


def clouds(label, points=96, seed=0):
    """Clouds that a classifier can tell apart: every class is stretched along its own axes."""
    stretch = np.array([(1, 1, 1), (3, 1, 1), (1, 3, 1), (1, 1, 3), (3, 3, 1), (1, 3, 3)])
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(len(label), points, 3)) * stretch[label % 6, None]).astype(np.float32)


def small_data(cfg=None):
    parts = [Objects(objects.unit_sphere(torch.from_numpy(clouds(label, seed=seed))),
                     torch.from_numpy(label)) for seed, label in enumerate((TRAIN, TEST))]
    return Data(*parts, CLASSES, "stretched clouds")


@pytest.fixture
def small(monkeypatch, tmp_path, tiny_clip):
    """Small data, a small transformer and two epochs in place of the real ones."""
    monkeypatch.setattr(fewshot, "load_data", small_data)
    for name, recipe in fewshot.RECIPES.items():
        monkeypatch.setitem(fewshot.RECIPES, name, recipe._replace(
            points=64, groups=8, neighbours=8, stored=96, epochs=2, batch_size=6))
    monkeypatch.chdir(tmp_path)
    return ["--way", "3", "--shot", "4", "--episodes", "2", "--clip", tiny_clip]


def results(folder="runs/fewshot-synthetic-1"):
    return json.loads(Path(folder, "results.json").read_text(encoding="utf-8"))


# --- data -----------------------------------------------------------------------------------------

def config(*words):
    return fewshot.settings(fewshot.flags(words))[0]


def test_the_built_in_data_fill_the_largest_episode_of_the_table(monkeypatch):
    per_class = dict(zip(("train", "test"), fewshot.SYNTHETIC))
    assert per_class["train"] >= max(s for _, s in fewshot.TABLE3)
    assert per_class["test"] >= fewshot.QUERIES
    monkeypatch.setattr(fewshot, "SYNTHETIC", (1, 2))
    monkeypatch.setitem(fewshot.RECIPES, "synthetic", RECIPE._replace(stored=64))
    data = fewshot.load_data(config())
    assert data.train.xyz.shape == (20, 64, 3) and data.test.xyz.shape == (40, 64, 3)
    assert sorted(data.train.label.tolist()) == list(range(len(data.classes))) == list(range(20))
    assert np.bincount(data.test.label).tolist() == [2] * 20


def test_a_folder_becomes_scaled_objects_of_both_parts(tmp_path, monkeypatch):
    for name, found in shapes(5, seed=0).items():
        (tmp_path / name).mkdir()
        for i, cloud in enumerate(found):
            np.save(tmp_path / name / f"{i}.npy", cloud * 7 + 3)
    for unit in (True, False):
        monkeypatch.setitem(fewshot.RECIPES, "folder", RECIPE._replace(stored=128, unit=unit))
        words = ["--data", "folder", "--root", str(tmp_path), "--workers", "1"]
        data = fewshot.load_data(config(*words, "--test-fraction", "0.4"))
        assert data.classes == ("ball", "cube", "stick") and str(tmp_path) in data.form
        assert np.bincount(data.train.label).tolist() == [3] * 3
        assert np.bincount(data.test.label).tolist() == [2] * 3
        for part in data[:2]:
            assert part.xyz.shape == (len(part.label), 128, 3) and part.text is None
            assert part.xyz.dtype == torch.float32 and part.label.dtype == torch.int64
            norm = part.xyz.norm(dim=2).amax(1)
            assert torch.allclose(norm, torch.ones(len(norm))) if unit else (norm > 2).all()
    np.save(tmp_path / "cube/0.npy", cloud[:9])
    with pytest.raises(InputError, match="0.npy: has 9 points, fewer than --points 64"):
        fewshot.load_data(config(*words))


# --- episodes -------------------------------------------------------------------------------------

def draw(way=3, shot=4, queries=20, seed=(0,), classes=CLASSES):
    return fewshot.draw_episode(TRAIN, TEST, classes, way, shot, queries, list(seed))


def test_an_episode_has_the_right_counts_of_the_right_classes_and_no_cloud_twice():
    for seed in range(20):
        episode = draw(seed=(seed,))
        assert len(set(episode.classes)) == 3
        for rows, label, count in ((episode.train, TRAIN, 4), (episode.test, TEST, 20)):
            assert [len(r) for r in rows] == [count] * 3
            assert len(set(sum(rows, []))) == 3 * count
            for c, r in zip(episode.classes, rows):
                assert (label[r] == c).all()


def test_the_same_seed_draws_the_same_episode_and_another_seed_another():
    assert draw(seed=(0, 3, 4, 7)) == draw(seed=(0, 3, 4, 7))
    assert len({str(draw(seed=(0, 3, 4, i))) for i in range(10)}) == 10


def test_every_class_is_drawn_about_equally_often():
    count = np.bincount(sum((draw(way=2, seed=(s,)).classes for s in range(600)), []), minlength=6)
    assert (abs(count - 200) < 60).all(), count                     # 5 standard deviations


def test_queries_0_takes_the_whole_test_part_of_the_classes():
    episode = draw(way=6, queries=0)
    assert sorted(sum(episode.test, [])) == list(range(len(TEST)))


@pytest.mark.parametrize("more, words", [
    (dict(way=7), "7 ways, but there are 6 classes"),
    (dict(shot=6), "has 5 train clouds, an episode needs 6; pass a smaller --shot"),
    (dict(queries=22), "has 21 test clouds, an episode needs 22"),
])
def test_an_episode_that_the_data_cannot_fill_is_refused(more, words):
    with pytest.raises(InputError, match=words):
        draw(**more)


def test_an_episode_written_down_is_read_back(tmp_path):
    data, episode = small_data(), draw()
    path = tmp_path / "3way_4shot/0.json"
    fewshot.write_episode(path, episode, data)
    assert fewshot.find_fold(tmp_path, 3, 4, 0) == path
    assert fewshot.read_episode(path, data, 3, 4) == episode


def test_clouds_of_an_episode_are_those_of_its_rows_with_labels_from_0():
    data, episode = small_data(), draw()
    train, test, labels = fewshot.clouds_of(episode, data)
    assert labels == episode.classes
    assert train.label.tolist() == [0] * 4 + [1] * 4 + [2] * 4 and len(test.label) == 60
    assert torch.equal(train.xyz[5], data.train.xyz[episode.train[1][1]])
    assert torch.equal(test.xyz[20], data.test.xyz[episode.test[1][0]])


@pytest.mark.parametrize("change, words", [
    (lambda e: e["classes"].__setitem__(0, "teapot"),
     "names the class teapot, which is not in the data"),
    (lambda e: e["train"][0].__setitem__(0, 999), "names train clouds that are not in the data"),
    (lambda e: e["test"][0].__setitem__(0, -1), "names test clouds that are not in the data"),
    (lambda e: e["test"].reverse(), "names test clouds that are not in the data"),
    (lambda e: e["of"].__setitem__("train", 29),
     "names train clouds that are not in the data .29 clouds"),
    (lambda e: e["train"][2].pop(), "is not a 3-way 4-shot episode"),
    (lambda e: e.pop("of"), "not an episode file"),
    (lambda e: e.__setitem__("train", "many"), "not an episode file"),
])
def test_an_episode_file_that_does_not_fit_the_data_is_refused(tmp_path, change, words):
    path = tmp_path / "0.json"
    fewshot.write_episode(path, draw(), small_data())
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(InputError, match=words):
        fewshot.read_episode(path, small_data(), 3, 4)


def fold(way=2, shot=3, queries=4, classes=(39, 7), points=80):
    """What Point-BERT published, with fewer points."""
    rng = np.random.default_rng(0)
    content = {}
    for part, n in (("train", shot), ("test", queries)):
        content[part] = []
        for k in rng.permutation(np.repeat(np.arange(way), n)):
            xyz = clouds(np.array([k]), points, rng.integers(99))[0]
            normals = np.zeros((points, 3), np.float32)
            row = np.concatenate([xyz, normals], 1), k, np.int64(classes[k])
            content[part].append(row)
    return content


RECIPE = fewshot.RECIPES["modelnet40"]._replace(points=64)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", ["2way_3shot", "2way3shot"])
def test_a_published_fold_is_read_with_its_own_labels(tmp_path, name, protocol):
    (tmp_path / name).mkdir()
    (tmp_path / name / "0.pkl").write_bytes(pickle.dumps(fold(), protocol))
    path = fewshot.find_fold(tmp_path, 2, 3, 0)
    train, test, labels = fewshot.clouds_of_fold(path, MODELNET40, 2, 3, RECIPE)
    assert [MODELNET40[c] for c in labels] == ["xbox", "car"]
    assert train.xyz.shape == (6, 80, 3) and test.xyz.shape == (8, 80, 3)
    assert train.label.tolist() == [k for _, k, _ in fold()["train"]]
    assert test.label.tolist() == [k for _, k, _ in fold()["test"]]
    assert torch.allclose(train.xyz.norm(dim=2).amax(1), torch.ones(6))     # into the unit sphere


def spoil(part="train", i=0, points=None, k=None, c=None):
    content = fold()
    old = content[part][i]
    content[part][i] = (old[0] if points is None else points, old[1] if k is None else k,
                        old[2] if c is None else c)
    return content


class Evil:
    def __reduce__(self):
        return print, ("this must not be printed",)


@pytest.mark.parametrize("content, words", [
    (spoil(c=40), "2 ways"),                                        # two classes under one label
    (fold(classes=(40, 7)), "names class 40, but the data have 40 classes"),
    (spoil(k=5), "labels are not those of 2 ways"),
    (fold(shot=2), "holds 4 training clouds, 2 ways of 3 shots are 6"),
    (fold(points=50), "fewer than 64 points"),
    (spoil(points=np.full((80, 6), np.nan, np.float32)), "NaN"),
    (spoil(points=np.zeros((3, 6), np.float32)), "not a few-shot fold"),
    ({"train": []}, "not a few-shot fold"),
    ([1, 2], "not a few-shot fold"),
    (Evil(), "asks for builtins.print, .*; not a few-shot fold"),
])
def test_a_fold_that_is_broken_or_would_run_code_is_refused(tmp_path, content, words, capsys):
    path = tmp_path / "0.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match=f"(?s){path}: .*{words}"):
        fewshot.clouds_of_fold(path, MODELNET40, 2, 3, RECIPE)
    assert capsys.readouterr().out == ""


# --- statistics -----------------------------------------------------------------------------------

def test_mean_and_population_deviation_by_hand():
    assert fewshot.mean_std([2, 4, 4, 4, 5, 5, 7, 9]) == (5, 2)
    assert fewshot.percent([0.5, 0.7]) == "60.0 ± 10.0"


def test_paired_difference_and_its_interval_by_hand():
    # differences 1, 2, 3, 4: mean 2.5, sample deviation 1.29099, t(3, 0.975) = 3.18245
    mean, low, high = fewshot.paired([11, 22, 33, 44], [10, 20, 30, 40])
    half = 3.182446 * 1.2909944 / 2
    assert mean == 2.5
    assert (low, high) == pytest.approx((2.5 - half, 2.5 + half), abs=1e-5)
    assert fewshot.paired([1], [0]) == (1, -np.inf, np.inf)


def test_pairs_are_formed_by_episode_whatever_the_order_of_the_lines():
    done = [{"setting": [5, 10], "episode": i, "variant": v, "last": x, "best": x, "seconds": 1.0}
            for v, scores in (("frozen", (.9, .1, .5)), ("random", (.8, .0, .4)))
            for i, x in enumerate(scores)]
    cfg = {"data": "synthetic", "settings": [(5, 10)], "compare": ["frozen", "random"],
           "table": False, "shots_all": None}
    forth, back = (fewshot.report(rows, cfg, "tiny") for rows in (done, done[::-1]))
    assert forth == back
    assert any("random" in line and "-10.0   [-10.0, -10.0]" in line for line in forth), forth
    assert any("frozen" in line and "50.0 ± 32.7" in line for line in forth)


# --- points ---------------------------------------------------------------------------------------

def test_samples_come_from_their_cloud_and_differ(small):
    recipe = fewshot.RECIPES["synthetic"]
    xyz = torch.from_numpy(clouds(np.arange(3), 300))
    samples = fewshot.presample(xyz, recipe, torch.device("cpu"))       # (3, SAMPLES, 75, 3)
    assert samples.shape == (3, fewshot.SAMPLES, 75, 3)
    for cloud, drawn in zip(xyz, samples):
        own = set(map(tuple, cloud.tolist()))
        sets = [frozenset(map(tuple, s.tolist())) for s in drawn]
        assert all(s <= own and len(s) == 75 for s in sets) and len(set(sets)) > 1


def test_augmented_points_are_one_sample_scaled_and_shifted():
    torch.manual_seed(0)
    samples = torch.randn(5, 4, 75, 3)
    draw = torch.Generator().manual_seed(0)
    out = fewshot.augment(samples, 64, draw)                            # (5, 64, 3)
    assert out.shape == (5, 64, 3)
    for b in range(5):
        fits = []
        for s in range(4):                  # an axis keeps its order of points
            lo, hi = samples[b, s].amin(0), samples[b, s].amax(0)
            scale = (out[b].amax(0) - out[b].amin(0)) / (hi - lo)
            fits.append(bool((scale <= 1.5 + 1e-5).all()))
        assert any(fits)
    flat = fewshot.augment(torch.ones(1000, 4, 75, 3), 64, draw)[:, 0]
    assert 2 / 3 - .2 - 1e-5 <= flat.min() < .5 and 1.65 < flat.max() <= 1.7 + 1e-5


# --- the run --------------------------------------------------------------------------------------

def test_a_run_writes_its_episodes_and_the_same_episodes_give_the_same_numbers(small, capsys):
    fewshot.main(small)
    printed = capsys.readouterr().out
    assert "population standard deviation over 2 episodes" in printed and "best on test" in printed
    assert "2 of each of 3-way 4-shot, 20 test clouds of each class" in printed
    first = results()
    assert first["metrics"]["accuracy"] == np.mean([t["last"] for t in first["trainings"]])
    lines = Path("runs/fewshot-synthetic-1/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2
    fewshot.main([*small, "--folds", "runs/fewshot-synthetic-1/episodes"])
    again = results("runs/fewshot-synthetic-2")
    for a, b in zip(first["trainings"], again["trainings"]):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}
    capsys.readouterr()
    with pytest.raises(InputError, match="reads no weights and no data; leave --clip out"):
        fewshot.main(["--eval", "runs/fewshot-synthetic-1", *small[-2:]])
    with pytest.raises(InputError, match="and no data; leave --workers and --device out"):
        fewshot.main(["--eval", "runs/fewshot-synthetic-1", "--workers", "2", "--device", "cpu"])
    fewshot.main(["--eval", "runs/fewshot-synthetic-1"])
    assert capsys.readouterr().out.splitlines() == printed.splitlines()[-4:-1]
    assert printed.splitlines()[-1] == "look     runs/fewshot-synthetic-1/look.png"
    # three classes, each with three shots and five queries
    assert Image.open("runs/fewshot-synthetic-1/look.png").width == 8 * (120 + 12)


def test_the_picture_shows_shots_and_queries_of_each_class_as_they_were_named(monkeypatch):
    drawn = []
    monkeypatch.setattr(render, "sheet", lambda cells, **k: drawn.append((cells, k["columns"])))

    class Second(torch.nn.Module):                                  # names everything "desk"
        def forward(self, points):
            return torch.tensor([[0.0, 1, 0]]).expand(len(points), 3), None

    shots, test = (Objects(torch.rand(len(label), 20, 3), torch.tensor(label))
                   for label in ([0, 0, 1, 1, 2, 2], [0, 1, 2] * 7))
    names = ["cup", "desk", "bed"]
    fewshot.picture(Second(), shots, test, names, run.Setup("cpu", "fp32"), "y")
    (cells, columns), = drawn
    assert columns == 2 + 5 and len(cells) == 3 * columns
    for k, name in enumerate(names):
        row = cells[k * columns:(k + 1) * columns]
        assert [cell.caption for cell in row] == [f"{name}\nshot"] * 2 + [f"{name}\nnamed desk"] * 5
        assert {cell.frame for cell in row[:2]} == {None}
        assert {cell.frame for cell in row[2:]} == {render.GREEN if name == "desk" else render.RED}
        assert (row[1].picture == render.draw_object(shots.xyz[2 * k + 1], 120, "y")).all()
        assert (row[3].picture == render.draw_object(test.xyz[k + 3], 120, "y")).all()


def test_it_learns_what_can_be_learned(small):
    fewshot.main([*small, "--epochs", "25", "--lr", "3e-3", "--episodes", "1"])
    assert results()["metrics"]["accuracy"] > 0.6                   # chance is 1/3


def test_every_n_epochs_are_tested_and_the_last_and_training_is_the_same(small):
    fewshot.main([*small, "--epochs", "5"])
    fewshot.main([*small, "--epochs", "5", "--every", "2"])
    curves = []
    for i in (1, 2):
        lines = Path(f"runs/fewshot-synthetic-{i}/metrics.jsonl").read_text(encoding="utf-8")
        curves.append([json.loads(line)["curve"] for line in lines.splitlines()])
    assert curves[1] == [[None, b, None, d, e] for _, b, _, d, e in curves[0]]
    for training, (_, b, _, d, e) in zip(results("runs/fewshot-synthetic-2")["trainings"],
                                         curves[1]):
        best = max((b, 2), (d, 4), (e, 5))
        assert (training["best"], training["best_epoch"], training["last"]) == (*best, e)


def test_compare_trains_all_variants_on_the_same_episodes_from_the_same_start(
        small, monkeypatch, capsys):
    seen, fresh = [], fewshot.train_episode

    def spy(model, data, test, *rest):
        weights = model.tokenizer.first[0].weight, model.embed[0].weight
        seen.append([x.sum().item() for x in (data.xyz, test.xyz, *weights)]
                    + [model.encoder.clip and model.encoder.clip.sha256])
        return fresh(model, data, test, *rest)

    monkeypatch.setattr(fewshot, "train_episode", spy)
    names = ["frozen", "shuffled", "random", "unfreeze", "no-task-token", "no-transformer"]
    fewshot.main([*small, "--seed", "1", "--compare", ",".join(names)])     # seed 0 made tiny_clip
    printed = capsys.readouterr().out
    assert len(seen) == 12
    for episode in (seen[:6], seen[6:]):
        assert len({tuple(row[:3]) for row in episode}) == 1        # clouds and tokenizer
        assert len({row[3] for row in episode[:4]}) == 1            # head, where shapes agree
        assert [row[4] == episode[0][4] for row in episode] == [True, False, False, True, True,
                                                                False]
    assert seen[3][4] == seen[9][4]                         # each episode unfreezes CLIP anew
    lines = printed.splitlines()
    at = next(i for i, line in enumerate(lines) if "difference to frozen" in line)
    assert [line.split()[0] for line in lines[at + 1:at + 6]] == names[1:]
    trained = {t["variant"]: t["trained"] for t in results()["trainings"]}
    assert trained["unfreeze"] > trained["frozen"] == trained["shuffled"] == trained["random"]
    assert trained["random"] > trained["no-task-token"] > trained["no-transformer"]


def test_the_frozen_transformer_is_the_same_after_an_episode(small, monkeypatch):
    kept, init = [], fewshot.Encoders.__init__

    def spy(self, *args):
        init(self, *args)
        kept.append(self)

    monkeypatch.setattr(fewshot.Encoders, "__init__", spy)
    fewshot.main([*small, "--compare", "frozen,unfreeze"])
    weights = dict(kept[0].frozen.named_buffers())
    assert common.fingerprint(weights.items()) == kept[0].sha256
    assert common.fingerprint(kept[0].unfrozen.named_parameters()) == kept[0].sha256


def test_row_j_of_the_text_loss_is_the_prompt_of_the_class_with_episode_label_j(small, monkeypatch):
    seen = []

    def spy(logits, embedding, label, text, kind):
        seen.append(text)
        return logits.sum() * 0, embedding.sum() * 0

    monkeypatch.setattr(fewshot, "prompt_features",
                        lambda clip, classes: torch.eye(len(classes), 512))
    monkeypatch.setattr(fewshot, "loss_terms", spy)
    fewshot.main([*small, "--episodes", "1"])
    path = Path("runs/fewshot-synthetic-1/episodes/3way_4shot/0.json")
    episode = json.loads(path.read_text(encoding="utf-8"))
    assert [CLASSES[i] for i in seen[0].argmax(1).tolist()] == episode["classes"]


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_stopped_run_goes_on_to_the_same_result_and_repeats_nothing(
        small, monkeypatch, capsys, stop):
    command = [*small, "--compare", "frozen,no-transformer"]
    fewshot.main([*command, "--out", "whole"])
    count, now = iter(range(99)), run.Stopper.now
    monkeypatch.setattr(run.Stopper, "now", lambda self, step: next(count) == stop)
    with pytest.raises(SystemExit) as left:
        fewshot.main([*command, "--out", "parts"])
    assert left.value.code == 130
    assert (f"stopped after {stop // 2} of 4 trainings; go on with: "
            "python train_fewshot.py --resume parts\n") in capsys.readouterr().out
    monkeypatch.setattr(run.Stopper, "now", now)
    finished = torch.load("parts/last.pt", weights_only=True)["done"]
    assert len(finished) == stop // 2
    calls, train = [], fewshot.train_episode
    monkeypatch.setattr(fewshot, "train_episode", lambda *a: (calls.append(0), train(*a))[1])
    fewshot.main(["--resume", "parts"])
    assert f"run      parts, resumed after {stop // 2} trainings\n" in capsys.readouterr().out
    assert len(calls) == 4 - stop // 2
    whole, parts = (results(f)["trainings"] for f in ("whole", "parts"))
    assert [{**t, "seconds": 0} for t in whole] == [{**t, "seconds": 0} for t in parts]
    lines = Path("parts/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    lines = [json.loads(line) for line in lines]
    assert [line["last"] for line in lines] == [t["last"] for t in whole]
    with pytest.raises(InputError, match="the run is finished"):
        fewshot.main(["--resume", "parts"])


def test_published_folds_need_no_data_set(small, monkeypatch, capsys):
    monkeypatch.setattr(fewshot, "load_data", None)
    for i in range(2):
        Path("folds/3way_4shot").mkdir(parents=True, exist_ok=True)
        Path(f"folds/3way_4shot/{i}.pkl").write_bytes(pickle.dumps(fold(3, 4, 20, (7, 8, 0))))
    fewshot.main([*small, "--data", "modelnet40", "--folds", "folds"])
    first = results("runs/fewshot-modelnet40-1")["trainings"][0]
    assert first["classes"] == ["car", "chair", "airplane"]
    with pytest.raises(InputError, match="folds of ModelNet40; pass --data modelnet40"):
        fewshot.main([*small, "--folds", "folds"])
    with pytest.raises(InputError, match="3way_4shot/2.pkl or 2.json; pass --episodes 2"):
        fewshot.main([*small, "--data", "modelnet40", "--folds", "folds", "--episodes", "3"])


def test_the_table_has_a_column_for_every_setting_beside_the_papers(small, monkeypatch, capsys):
    monkeypatch.setattr(fewshot, "TABLE3", [(2, 3), (3, 4), (9, 1)])
    monkeypatch.setattr(fewshot, "PUBLISHED", {
        "EPCL, paper's Table 3": "95.1 ± 2.7,97.3 ± 1.6,91.1 ± 4.2"})
    fewshot.main([*small[4:], "--table"])
    lines = capsys.readouterr().out.splitlines()
    assert any("9-way 1-shot is left out: there are 6 classes" in line for line in lines)
    at = next(i for i, line in enumerate(lines) if line.split() == ["2w3s", "3w4s", "9w1s"])
    assert lines[at + 1].startswith("frozen, last epoch") and lines[at + 1].count("±") == 2
    assert lines[at + 2].startswith("frozen, best epoch on test") and lines[at + 2].endswith(" -")
    assert lines[at + 3].startswith("EPCL, paper's Table 3")
    assert lines[at + 3].endswith("   95.1 ± 2.7   97.3 ± 1.6   91.1 ± 4.2")
    assert "ModelNet40, CLIP ViT-B/32" in lines[at + 4]
    monkeypatch.setattr(fewshot, "TABLE3", [(9, 1)])
    with pytest.raises(InputError, match="nothing of Table 3 is in .*; pass --way and --shot"):
        fewshot.main([*small[4:], "--table"])


def test_shots_of_all_classes_are_tested_on_the_whole_test_set(small, capsys):
    fewshot.main([*small[6:], "--shots-all", "4", "--episodes", "1"])
    printed = capsys.readouterr().out
    assert "6-way 4-shot, the whole test set" in printed and "EPCL, paper's Table 5" in printed
    path = Path("runs/fewshot-synthetic-1/episodes/6way_4shot/0.json")
    episode = json.loads(path.read_text(encoding="utf-8"))
    assert len(sum(episode["test"], [])) == len(TEST) and len(sum(episode["train"], [])) == 24


@pytest.mark.parametrize("words, message", [
    (["--way", "7"], "7 ways, but there are 6 classes"),
    (["--shot", "6"], "has 5 train clouds"),
    (["--table", "--way", "5"], "three protocols"),
    (["--unfreeze", "--no-task-token"], "one variant at a time"),
    (["--unfreeze", "--compare", "frozen"], "one variant at a time"),
    (["--shots-all", "4", "--folds", "x"], "draws its own clouds"),
    (["--folds", "nowhere"], "found no 5way_10shot/0.pkl or 0.json"),
    (["--compile"], "compiled anew"),
    (["--way", "3", "--shot", "2", "--text-loss", "raw"], "no text tower; pass --text-loss off"),
    (["--shot", "4", "--batch-size", "1"], "pass --batch-size 2 or more"),
    (["--way", "2", "--shot", "2", "--accumulate", "3"], "pass a smaller --accumulate|size 6"),
    (["--points", "8", "--groups", "9"], "--groups 9"),
    (["--resume", "nowhere"], "no such checkpoint"),
    (["--way", "3", "--shot", "2", "--test-fraction", "0.3"], "have a test set of their own"),
])
def test_wrong_arguments_are_one_line(small, words, message):
    with pytest.raises(InputError, match=message) as error:
        fewshot.main([*words, "--clip", small[-1]] if "--resume" not in words else words)
    assert "\n" not in str(error.value) and not Path("runs").exists()


def test_dropout_changes_no_sample_of_a_comparison(small, monkeypatch):
    drawn, augment = [], fewshot.augment
    monkeypatch.setattr(fewshot, "augment", lambda *a: drawn.append(augment(*a)) or drawn[-1])
    fewshot.main([*small, "--episodes", "1", "--dropout", "0.3", "--compare",
                  "frozen,no-transformer"])
    half = len(drawn) // 2                                          # two epochs of two steps
    assert half == 4 and all(a.equal(b) for a, b in zip(drawn[:half], drawn[half:]))
    assert not drawn[0].equal(drawn[1])


def test_the_random_twin_of_a_nano_file_has_its_sizes(tmp_path):
    cfg = fewshot.settings(fewshot.flags(["--clip", f"nano={nano_file(tmp_path)}", "--compare",
                                          "frozen,random"]))[0]
    encoders = fewshot.Encoders(cfg, ["chair"], run.Setup("cpu", "fp32"))
    shapes = [[x.shape for x in clip.buffers()] for clip in (encoders.frozen, encoders.random)]
    assert shapes[0] == shapes[1] and encoders.frozen.sha256 != encoders.random.sha256


def test_comparing_random_with_random_is_refused(small):
    with pytest.raises(InputError, match="is random already"):
        fewshot.main([*small[:-1], "timm:test_vit=random", "--compare", "frozen,random"])


def test_several_processes_are_refused(small, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="one process"):
        fewshot.main(small)


@pytest.mark.parametrize("names", ["frozen,frozen", "frozen,clip", ""])
def test_compare_takes_known_names_once(names, capsys):
    with pytest.raises(SystemExit) as left:
        fewshot.flags(["--compare", names])
    assert left.value.code == 2
    assert "--compare" in capsys.readouterr().err


def test_the_split_belongs_to_the_run(tmp_path, monkeypatch):
    for name, found in shapes(5, seed=0).items():
        (tmp_path / name).mkdir()
        for i, cloud in enumerate(found):
            np.save(tmp_path / name / f"{i}.npy", cloud)
    monkeypatch.setitem(fewshot.RECIPES, "folder", RECIPE._replace(stored=128))
    cfg = config("--data", "folder", "--root", str(tmp_path))
    before = fewshot.load_data(cfg)
    np.save(tmp_path / "ball/00.npy", found[0])
    after = fewshot.load_data(cfg)
    assert all(torch.equal(a.xyz, b.xyz) for a, b in zip(before[:2], after[:2]))
    assert after.form == (before.form
                          + "; left out, since the run was begun without them: ball/00.npy")
