"""analyse.py and attention.py: open attention is the fast one, numbers are right on known data, and
what cannot be looked at is said in one line."""
import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import analyse
import attention
import common
import nanoclip
import pretrained
import train_cls
from attention import alignment, deletion, effective_rank, layers_of, opened, pearson, relevance
from checkpoint import misfit
from data.synthetic_objects import ALL_CLASSES, OBJECT_CLASSES
from run import InputError
from test_files import shapes

pytestmark = pytest.mark.usefixtures("one_thread")


def scaled_open_clip():
    """open_clip's ViT with layer scales, small, random."""
    from open_clip.transformer import VisionTransformer
    with torch.random.fork_rng():
        torch.manual_seed(0)
        visual = VisionTransformer(32, 8, 48, 3, 4, 4.0, ls_init_value=0.3, output_dim=24).eval()
        for block in visual.transformer.resblocks:
            for scale in (block.ls_1, block.ls_2):
                nn.init.uniform_(scale.gamma, 0.2, 0.8)
    return visual


def clip_of(name):
    if name == "scaled":
        return common.FrozenCLIP(name, name, pretrained.open_clip_parts(scaled_open_clip()))
    return pretrained.load_clip(name)


# --- open attention -------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["nano", "nano=shuffled", "timm:test_vit=random", "scaled"])
@pytest.mark.parametrize("deep", [False, True])
def test_open_attention_computes_what_the_fast_one_does(name, deep):
    clip = clip_of(name)
    torch.manual_seed(0)
    encoder = common.EPCLEncoder(clip, 5, deep_prompt=deep).eval()
    tokens, centers = torch.randn(3, 9, clip.width), torch.randn(3, 9, 3)
    with torch.no_grad():
        fast = encoder(tokens, centers)
        with opened(clip) as blocks:
            slow = encoder(tokens, centers)
        again = encoder(tokens, centers)
    for a, b, c in zip(fast, slow, again):
        assert (a - b).abs().max() <= 1e-5 * a.abs().max() and torch.equal(a, c)
    for block in blocks:
        assert block.A.shape == (3, block.heads, 15, 15)
        torch.testing.assert_close(block.A.sum(3), torch.ones(3, block.heads, 15))
    assert not any(isinstance(block, attention.Open) for block in clip.blocks)


def test_blocks_that_compute_something_else_are_refused():
    cfg = {"recipe": {"groups": 4, "neighbours": 4, "dropout": 0.0}, **dict.fromkeys(
        ("no_task_token", "deep_prompt", "no_transformer"), False)}
    model = common.Classifier(pretrained.load_clip("timm:test_vit=random"), 3, cfg).eval()
    points = torch.randn(2, 16, 3)
    attention.check_open(model, points)
    fine = model.encoder.clip.blocks[0].attn
    fine.q_norm = nn.LayerNorm(fine.head_dim)           # as in newer transformers of timm
    with pytest.raises(InputError, match="blocks are not those of a plain ViT"):
        attention.check_open(model, points)


@pytest.mark.parametrize("name", ["nano", "timm:test_vit=random"])
def test_pictures_go_through_the_tower_as_they_do_in_clip(name):
    clip, stem = pretrained.load_clip(name), attention.load_stem(name, 0, "cpu")
    draw = torch.Generator().manual_seed(0)
    pictures = torch.rand(2, 3, stem.size, stem.size, generator=draw)
    x = (pictures - stem.mean) / stem.std
    if name == "nano":
        expected = nanoclip.load()[0].visual(x)
        torch.testing.assert_close(x, pictures * 2 - 1)
    else:
        import timm
        with torch.random.fork_rng():
            torch.manual_seed(0)
            expected = timm.create_model("test_vit", pretrained=False).eval().forward_features(x)
        expected = expected[:, 0]
    found = clip.project(attention.see(clip, stem, pictures)[:, 0])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# --- relevance ------------------------------------------------------------------------------------

def test_relevance_is_chefers_rule_written_out():
    rng = np.random.default_rng(0)
    A = [torch.tensor(rng.random((2, 3, 4, 4)), requires_grad=True) for _ in range(3)]
    gradient = [rng.normal(size=(2, 3, 4, 4)) for _ in range(3)]
    score = sum((a * torch.tensor(g)).sum((1, 2, 3)) for a, g in zip(A, gradient))
    found = relevance(score, [SimpleNamespace(A=a) for a in A])
    for b in range(2):
        R = np.eye(4)
        for a, g in zip(A, gradient):
            step = np.maximum(g[b] * a[b].detach().numpy(), 0).mean(0)
            R = R + step @ R
        np.testing.assert_allclose(found[b].numpy(), R[0])


def test_a_token_that_the_score_does_not_depend_on_has_no_relevance():
    clip = pretrained.load_clip("nano")
    torch.manual_seed(0)
    x = torch.randn(2, 6, clip.width, requires_grad=True)
    with opened(clip) as blocks:
        y = blocks[0](x)
        keep = torch.ones(6, 1)
        keep[4] = 0
        blocks[1](torch.cat([y[:, :4], y[:, 5:]], 1))                       # without row 4
        R = relevance(blocks[1].after[:, 0, 3], [blocks[1]])
        assert R.shape == (2, 5) and (R > 0).any(1).all()
        one = relevance(blocks[0].after[:, 4, 3], [blocks[0]])              # of another row
    assert torch.equal(one, torch.tensor([[1.0, 0, 0, 0, 0, 0]] * 2))


class Marked(nn.Module):
    """A classifier that is right as long as it sees the one patch of each cloud that is marked."""

    def __init__(self, groups):
        super().__init__()
        self.tokenizer = SimpleNamespace(groups=groups)

    def encoder(self, tokens, centers):
        return None, tokens, None

    def read(self, _, tokens, __):
        seen = tokens.amax((1, 2))
        return torch.stack([torch.full_like(seen, 0.5), seen], 1), None


def test_deletion_counts_what_is_lost_with_the_patches_that_matter(monkeypatch):
    S, G, T = 200, 20, 5
    model, rng = Marked(G), np.random.default_rng(0)
    tokens = torch.zeros(S, G, 1)
    tokens[range(S), rng.integers(G, size=S)] = 1
    label = torch.ones(S, dtype=torch.int64)

    def found(model, tokens):
        task = torch.full((len(tokens), T), 0.2)
        R = torch.cat([torch.ones(len(tokens), 1), tokens[..., 0], task], 1)
        return tokens, tokens, model.read(*model.encoder(tokens, None))[0], R

    monkeypatch.setattr(attention, "cloud_relevance", found)
    report = deletion(model, tokens, label)
    assert report["accuracy"] == 1 and [step["patches"] for step in report["removed"]] == [2, 6, 10]
    for step in report["removed"]:
        assert step["most_relevant"] == 0 and step["least_relevant"] == 1
        kept = 1 - step["patches"] / G
        assert abs(step["random"] - kept) < 0.05        # 2,000 draws: four standard deviations
        mean, low, high = step["most_relevant_minus_random"]
        assert low < mean < high < 0 and mean == pytest.approx(-step["random"])
    assert report["relevance_on_task_tokens"] == pytest.approx(0.5)         # 1 on patches, 5 x .2
    assert report["task_tokens_among_rows"] == T / (T + G)


def test_an_interval_covers_what_it_says():
    rng, inside = np.random.default_rng(0), 0
    for _ in range(300):
        _, low, high = attention.interval(torch.from_numpy(rng.normal(2, 1, 100)))
        inside += low < 2 < high
    assert 0.91 < inside / 300 < 0.985


# --- rows, block by block -------------------------------------------------------------------------

@pytest.mark.parametrize("covariance, rank", [
    (torch.eye(7), 7), (torch.diag(torch.tensor([3.0, 0, 0])), 1),
    (torch.diag(torch.tensor([2.0, 2, 0])), 2), (torch.ones(5, 5), 1),
    (torch.diag(torch.tensor([2.0, 1, 1])), 16 / 6)])
def test_effective_rank_of_known_matrices(covariance, rank):
    assert effective_rank(covariance).item() == pytest.approx(rank)
    assert effective_rank(torch.stack([covariance, 9 * covariance])).tolist() == pytest.approx(
        [rank] * 2)


def test_rows_are_those_of_each_block_and_numbers_those_of_plain_numpy(monkeypatch):
    monkeypatch.setattr(attention, "BATCH", 4)
    clip = pretrained.load_clip("timm:test_vit=random")
    torch.manual_seed(0)
    inputs = torch.randn(6, 9, clip.width)              # a class row, six patches, two tasks

    def forward(x):
        for block in clip.blocks:
            x = block(x)

    found = layers_of(clip, forward, inputs, 6)
    rows = [inputs.double().numpy()]
    with torch.no_grad():
        x = inputs
        for block in clip.blocks:
            x = block(x)
            rows.append(x.double().numpy())
    rows = np.stack(rows)[:, :, :7]                     # (L + 1, 6, 7, D)
    np.testing.assert_allclose(found.cls, rows[:, :, 0], atol=1e-5)
    np.testing.assert_allclose(found.mean, rows[:, :, 1:].mean(2), atol=1e-5)
    norm = np.linalg.norm(rows, axis=3)
    change = np.linalg.norm(np.diff(rows, axis=0), axis=3)
    numbers = found.numbers
    assert numbers["norm_patches"] == pytest.approx(norm[:, :, 1:].mean((1, 2)), rel=1e-4)
    assert numbers["norm_class"] == pytest.approx(norm[:, :, 0].mean(1), rel=1e-4)
    assert numbers["change_patches"] == pytest.approx(change[:, :, 1:].mean((1, 2)), rel=1e-3)
    assert numbers["change_class"] == pytest.approx(change[:, :, 0].mean(1), rel=1e-3)
    for i, layer in enumerate(rows):
        for key, x in (("rank_patches", layer[:, 1:].reshape(36, -1)), ("rank_class", layer[:, 0])):
            e = np.linalg.eigvalsh(np.cov(x.T))
            if (i, key) != (0, "rank_class"):
                assert numbers[key][i] == pytest.approx(e.sum() ** 2 / (e ** 2).sum(), rel=1e-3)
    assert numbers["rank_class"][0] is None


# --- likeness -------------------------------------------------------------------------------------

LABEL = torch.arange(10).repeat_interleave(6)


def test_pearson_is_that_of_numpy_after_each_sides_mean_is_gone():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 5, 30))
    expected = np.corrcoef(a - a.mean(0), b - b.mean(0))[:5, 5:]
    np.testing.assert_allclose(pearson(torch.from_numpy(a), torch.from_numpy(b)), expected)


def test_what_all_objects_share_is_no_likeness():
    rng = np.random.default_rng(0)
    common_part = 20 * rng.normal(size=64)
    a, b = (torch.from_numpy(common_part + rng.normal(size=(60, 64))) for _ in range(2))
    raw = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
    assert raw.min() > 0.9                              # "alike", whatever they are
    found = alignment(pearson(a, b), LABEL)
    assert abs(found["matched"]) < 0.1 and abs(found["gap"]) < 0.1
    assert found["top1"] <= 4 / 60 and found["top1_class"] < 0.3


def test_objects_and_classes_that_are_alike_are_found():
    rng = np.random.default_rng(0)
    kind = rng.normal(size=(10, 64))[LABEL]
    own = rng.normal(size=(60, 64))
    noise = rng.normal(size=(2, 60, 64))
    a, b = (torch.from_numpy(kind + own + 0.3 * x + 5) for x in noise)
    found = alignment(pearson(a, b), LABEL)
    assert found["matched"] > 0.9 and 0.3 < found["same_class"] < 0.7
    assert abs(found["mismatched"]) < 0.15 and found["top1"] == found["top1_class"] == 1
    off = (found["same_class"] * 5 + found["mismatched"] * 54) / 59
    assert found["gap"] == pytest.approx(found["matched"] - off)
    a, b = (torch.from_numpy(kind + 0.3 * x) for x in noise)                # the class alone
    found = alignment(pearson(a, b), LABEL)
    assert found["top1_class"] == 1 and found["top1"] < 0.5
    assert found["same_class"] == pytest.approx(found["matched"], abs=0.02)


def test_permuted_objects_are_found_by_chance_alone():
    rng = np.random.default_rng(0)
    found = alignment(torch.from_numpy(rng.normal(size=(60, 60))), LABEL)
    mean, top = found["top1_permuted"]
    assert mean == pytest.approx(1 / 60, abs=4 / 60 / 1000 ** 0.5) and 3 / 60 <= top <= 4 / 60
    mean, top = found["top1_class_permuted"]
    assert mean == pytest.approx(1 / 10, abs=0.006) and 0.1 < top < 0.25


# --- a run ----------------------------------------------------------------------------------------

SMALL = ["--epochs", "1", "--points", "64", "--groups", "8", "--neighbours", "8", "--batch-size",
         "20", "--device", "cpu"]


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(train_cls, "SYNTHETIC", (2, 1))
    monkeypatch.setattr(analyse, "TEST", (1, 2))


def run_of(folder, *flags):
    train_cls.main([*SMALL, "--out", str(folder), *flags])
    return str(folder)


def test_objects_are_those_that_the_run_was_tested_on(few):
    cfg = train_cls.settings(train_cls.flags(SMALL))[0]
    _, test, classes, _ = train_cls.load_data(cfg)
    cfg["classes"] = list(classes)
    found = analyse.load_objects(cfg, 32, torch.device("cpu"))
    assert torch.equal(found.points, common.farthest(test.xyz, 64))
    assert torch.equal(found.label, test.label)
    assert found.pictures.shape == found.drawn.shape == (20, 3, 32, 32)
    for pictures in found.pictures, found.drawn:
        dark = (pictures < 0.9).float().mean((1, 2, 3))
        assert (dark > 0.03).all() and (dark < 0.9).all()


def test_a_run_is_looked_into(tmp_path, few, capsys):
    run = run_of(tmp_path / "run")
    capsys.readouterr()
    analyse.main([run, "--out", str(tmp_path / "new")])
    printed, folder = capsys.readouterr().out, tmp_path / "new"
    report = json.loads((folder / "analysis.json").read_text(encoding="utf-8"))
    assert report["clip"]["name"] == "nano" and report["objects"] == 20
    form = {"chance": 0.05, "pictures": float, "clouds": float}
    assert misfit(report["zero_shot"], form) is None and report["zero_shot"]["pictures"] > 0.8
    for name in ("pictures", "clouds, untrained", "clouds, trained"):
        assert [len(x) for x in report["tokens"][name].values()] == [7, 7, 6, 6, 7, 7]
    assert report["tokens"]["clouds, untrained"] != report["tokens"]["clouds, trained"]
    control = report["correlation"]["control: the cloud drawn"]["projected"]
    assert control["matched"] > 0.15 > abs(control["mismatched"])
    assert report["words"]["captions"] == 800 and report["words"]["chance"] == 1 / 40
    assert len(report["saliency"]["removed"]) == 3
    # 6 objects of 4 cells, 8 to a row: 128 pixels and borders; words 3 to a row
    assert Image.open(folder / "saliency.png").size == (8 * 140, 3 * 157 + 2 * 17 + 12)
    assert Image.open(folder / "words.png").size[0] == 3 * 262
    sizes = {"tokens.png": (1100, 580), "correlation.png": (1100, 500), "deletion.png": (500, 380)}
    for name, package in (*((name, "matplotlib") for name in sizes), ("tsne.png", "sklearn")):
        drawn = analyse.installed("matplotlib") and analyse.installed(package)
        assert (folder / name).exists() == (f"look     {folder / name}" in printed) == drawn
        if name in sizes and drawn:
            assert Image.open(folder / name).size == sizes[name]
        assert drawn or any(name in line for line in report["left_out"])


@pytest.mark.parametrize("flags, left_out, made", [
    (["--text-loss", "off"], ["words.png: the run had no text loss"], ["saliency.png"]),
    (["--clip", "timm:test_vit=random"], ["relevance of pictures, words.png: timm:test_vit=random "
                                          "has no text tower"], ["saliency.png"]),
    (["--unfreeze", "--text-loss", "off"], ["words.png: the run had no text loss"],
     ["saliency.png"]),
    (["--deep-prompt"], ["saliency.png, deletion.png: the rule follows rows"], ["words.png"])])
def test_what_cannot_be_made_is_named(tmp_path, few, monkeypatch, capsys, flags, left_out, made):
    monkeypatch.setattr(analyse, "installed", lambda package: False)
    run = run_of(tmp_path / "run", *flags)
    capsys.readouterr()
    analyse.main([run])
    folder, printed = tmp_path / "run/analysis", capsys.readouterr().out.splitlines()
    said = [line.removeprefix("left out ") for line in printed if line.startswith("left out ")]
    assert said == json.loads((folder / "analysis.json").read_text(encoding="utf-8"))["left_out"]
    packages = ["tokens.png, correlation.png, deletion.png, tsne.png: matplotlib is not installed",
                "tsne.png: scikit-learn is not installed; pip install scikit-learn"]
    assert len(said) == 3 and all(any(line.startswith(start) for line in said)
                                  for start in left_out + packages)
    assert made == [path.name for path in folder.glob("*.png") if path.name in made]


@pytest.fixture
def data(tmp_path):
    for part, n, seed in (("train", 4, 1), ("test", 4, 2)):
        clouds = shapes(n, seed=seed)
        for name, some in zip(("chair", "wrench", "table"), clouds.values()):
            (tmp_path / "data" / part / name).mkdir(parents=True)
            for i, cloud in enumerate(some):
                np.save(tmp_path / "data" / part / name / f"{i}.npy", cloud.astype(np.float32))
    return str(tmp_path / "data")


def test_clouds_without_meshes_are_drawn_and_a_class_without_a_word_is_named(
        tmp_path, data, monkeypatch, capsys):
    monkeypatch.setattr(analyse, "installed", lambda package: False)
    run = run_of(tmp_path / "run", "--data", "folder", "--root", data, "--clip", "nano",
                 "--batch-size", "4")
    capsys.readouterr()
    analyse.main([run])
    printed = capsys.readouterr().out
    assert "12 test objects of 3 classes; files under" in printed
    assert "pictures are depth maps" in printed
    assert "left out prompts of wrench: nano has no word for them\n" in printed
    report = json.loads((tmp_path / "run/analysis/analysis.json").read_text(encoding="utf-8"))
    assert report["zero_shot"]["chance"] == 1 / 2
    assert "words" not in report and "left out words.png: the run had no text loss" in printed
    monkeypatch.setattr(analyse, "LEAST", 13)
    with pytest.raises(InputError, match="12 test objects are too few to compare, give at least"):
        analyse.main([run])


def test_built_in_objects_are_those_that_train_cls_tests_on():
    assert analyse.TEST == (train_cls.SYNTHETIC[1], 2)


def test_two_patches_leave_saliency_out(tmp_path, data, monkeypatch, capsys):
    monkeypatch.setattr(analyse, "installed", lambda package: False)
    run = run_of(tmp_path / "run", "--data", "folder", "--root", data, "--clip", "nano",
                 "--batch-size", "4", "--groups", "2")
    analyse.main([run])
    assert "left out saliency.png, deletion.png: a cloud is too few" in capsys.readouterr().out


def test_a_run_that_cannot_be_looked_into_is_one_line(tmp_path, few):
    run = run_of(tmp_path / "run", "--no-transformer")
    saved = torch.load(tmp_path / "run/last.pt", weights_only=True)
    for change, words in (
            (lambda x: None, "was trained with --no-transformer; there is none to look into"),
            (lambda x: x.update(task="seg"), "a checkpoint of train_seg.py, not of train_cls.py"),
            (lambda x: x["config"].update(no_transformer=False, official="FILE"),
             "began with --init-official"),
            (lambda x: x["config"].pop("classes"), "checkpoint.config.classes is not as this"),
            (lambda x: (x["config"].update(no_transformer=False),
                        x["frozen"].update(sha256="0" * 64)), "is not what the run was trained")):
        new = copy.deepcopy(saved)
        change(new)
        torch.save(new, tmp_path / "run/last.pt")
        with pytest.raises(InputError) as error:
            analyse.main([run])
        assert words in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(InputError, match="no such checkpoint"):
        analyse.main([str(tmp_path / "nothing")])


# --- words ----------------------------------------------------------------------------------------

def test_the_words_of_an_embedding_that_is_a_caption_are_that_caption():
    clip = pretrained.load_clip("nano")
    captions = ["tall lamp seen from above", "flat table", "airplane seen from behind"]
    text = clip.text_features([common.PROMPT.format(caption) for caption in captions])
    mean = clip.text_features([common.PROMPT.format(name.replace("_", " ")) for name in
                               ALL_CLASSES]).mean(0)
    label = torch.tensor([OBJECT_CLASSES.index(name) for name in ("lamp", "table", "chair")])
    words, numbers = analyse.words_for(clip, text - mean, label, OBJECT_CLASSES)
    assert [caption in found for caption, found in zip(captions, words)] == [True] * 3
    assert all(len(found) == 5 for found in words)
    assert numbers["first_names_the_class"] == pytest.approx(2 / 3)


# --- t-SNE ----------------------------------------------------------------------------------------

def test_tsne_keeps_groups_apart_says_how_and_is_the_same_each_time():
    pytest.importorskip("sklearn", reason="needs scikit-learn: t-SNE is its")
    rng = np.random.default_rng(0)
    center = 10 * rng.normal(size=(3, 64))
    x = torch.from_numpy(center[np.repeat(range(3), 20)] + rng.normal(size=(60, 64)))
    shift = 100 * torch.ones(64)                        # of a modality: centring takes it away
    panels = analyse.tsne_panels(x, x, x + shift)
    assert list(panels) == ["embeddings of clouds; t-SNE, perplexity 19, seed 0",
                            "class rows, each modality centred; t-SNE, perplexity 30, seed 0"]
    alone, joint = panels.values()
    places = np.stack([alone["clouds"]]).reshape(3, 20, 2)
    middle = places.mean(1)
    spread = np.linalg.norm(places - middle[:, None], axis=2).max()
    assert min(np.linalg.norm(middle[i] - middle[i - 1]) for i in range(3)) > 2 * spread
    near = np.linalg.norm(joint["clouds"][:, None] - joint["pictures"][None], axis=2).argmin(1)
    assert (near // 20 == np.repeat(range(3), 20)).all()
    again = analyse.tsne_panels(x, x, x + shift)
    np.testing.assert_array_equal(list(again.values())[0]["clouds"], alone["clouds"])
