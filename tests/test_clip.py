"""train_clip.py and nanoclip.py: words, pictures, loss, optimiser, the file, and --clip nano."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import common
import nanoclip
import pretrained
import train_clip
from data.meshes import sample_surface
from data.synthetic_objects import make_object
from run import InputError

SMALL = train_clip.RECIPES["synthetic"]._replace(
    objects=2, views=2, size=32, width=32, layers=2, text_width=32, text_layers=1, stem=8, epochs=2,
    batch_size=40)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A run takes seconds, its pictures are kept in tmp_path, and it is in an empty folder."""
    monkeypatch.setitem(train_clip.RECIPES, "synthetic", SMALL)
    monkeypatch.setattr(train_clip, "TEST", (1, 2))
    monkeypatch.setattr(train_clip, "prepared_folder", lambda root, name: tmp_path)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def nano_file(tmp_path_factory):
    """A file as train_clip.py writes it, its weights random but not those of seed 0."""
    torch.manual_seed(9)
    config = train_clip.config_of(SMALL)
    model, _ = nanoclip.build(config, train_clip.WORDS)
    path = tmp_path_factory.mktemp("nano") / "nano.safetensors"
    nanoclip.save(path, model, config, train_clip.WORDS)
    return path


# --- words ----------------------------------------------------------------------------------------

def test_a_text_becomes_the_numbers_of_its_words_between_start_and_end():
    words = nanoclip.Words(["a", "big", "chair"], 6)
    assert words(["A big chair.", "chair"]).tolist() == [[1, 2, 3, 4, 5, 0], [1, 4, 5, 0, 0, 0]]
    assert words(["big " * 9])[0].tolist() == [1, 3, 3, 3, 3, 5]       # the end is never cut off
    with pytest.raises(nanoclip.UnknownWords, match="^blue, zebra$"):
        words(["a zebra", "a blue chair"])


def test_the_words_suffice_for_the_prompts_of_every_class():
    words = nanoclip.Words(train_clip.WORDS, train_clip.CONTEXT)
    for prompt in (train_clip.PROMPT, common.PROMPT):
        tokens = words([prompt.format(name) for name in train_clip.NAMES])
        assert len(tokens.unique(dim=0)) == 40 and (tokens.argmax(1) > 1).all()


# --- pictures and captions ------------------------------------------------------------------------

def test_a_drawn_object_depends_on_its_seed_alone_and_fills_the_picture():
    k = train_clip.ALL_CLASSES.index("cone")
    light, about = train_clip.draw_object(5, k, 3, 4, 32)
    assert light.shape == (4, 2, 32, 32) and light.dtype == np.uint8
    np.testing.assert_array_equal(train_clip.draw_object(5, k, 3, 2, 32)[0], light[:2])
    assert not np.array_equal(train_clip.draw_object(6, k, 3, 4, 32)[0], light)
    assert (about[:, 0] == k).all() and set(about[:, 2]) <= {0, 1, 2, 3}
    bright, background = light[:, 0], light[:, 1]
    assert (bright[background == 255] == 0).all() and (bright[background == 0] > 60).all()
    assert (.05 < (background < 255).mean((1, 2))).all() and (background[:, 0, 0] == 255).all()


def test_paint_gives_the_object_its_colour_and_mirrors_half_of_the_pictures():
    light = torch.zeros(200, 2, 4, 4, dtype=torch.uint8)
    light[:, 0, :, :1] = train_clip.FULL                # the object: the left column
    light[:, 1, :, 1:] = 255
    red = torch.zeros(200, dtype=torch.int64)
    x = train_clip.paint(light, red, torch.Generator().manual_seed(0))
    assert x.shape == (200, 3, 4, 4) and x.min() >= -1 and x.max() <= 1
    left, right = x[..., 0], x[..., 3]
    mirrored = left[:, 1, 0] > right[:, 1, 0]           # green: red has little, backgrounds much
    assert 60 < mirrored.sum() < 140
    rgb = 127.5 * (1 + torch.where(mirrored[:, None], right[..., 0], left[..., 0]))
    wanted = torch.tensor(train_clip.COLOURS["red"])
    assert ((rgb / wanted - 1).abs() < .1501).all() and rgb.std(0).min() > 2


def test_captions_say_what_is_true_of_a_picture_and_no_more():
    rng = np.random.default_rng(0)
    about = np.stack([rng.integers(n, size=500) for n in (40, 10, 3, 4)], 1)
    texts, says = train_clip.captions(about, rng)
    colours = list(train_clip.COLOURS)
    for text, said, (k, c, s, v) in zip(texts, says, about):
        assert f" {train_clip.NAMES[k]}" in text and said[0]
        assert [name for name in colours if f" {name} " in text] == [colours[c]] * int(said[1])
        assert [name for name in train_clip.SHAPES if f" {name} " in text] == (
            [train_clip.SHAPES[s]] * int(said[2]))
        assert text.endswith(train_clip.VIEWS[v]) == ("seen" in text) == said[3]
    np.testing.assert_allclose(says.mean(0), train_clip.SAID, atol=.08)


# --- loss and optimiser ---------------------------------------------------------------------------

def test_the_loss_is_clip_s_where_every_caption_is_true_of_one_picture():
    torch.manual_seed(0)
    image, text = F.normalize(torch.randn(2, 6, 8), dim=2)
    scale = torch.tensor(5.0)
    logits = scale * image @ text.T
    wanted = (F.cross_entropy(logits, torch.arange(6)) + F.cross_entropy(logits.T, torch.arange(6)))
    loss, right = train_clip.contrastive(image, text, scale, torch.eye(6))
    assert loss.item() / 6 == pytest.approx(wanted.item() / 2, rel=1e-5)
    assert right.item() == (logits.argmax(1) == torch.arange(6)).sum()


def test_a_caption_that_is_true_of_two_pictures_pulls_at_both():
    image = F.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(1)), dim=1)
    text = image[[0, 0, 2]].clone()
    true = torch.tensor([[1., 1, 0], [1, 1, 0], [0, 0, 1]])
    image.requires_grad_()
    train_clip.contrastive(image, text, torch.tensor(1.0), true)[0].backward()
    assert image.grad[1] @ text[0] < 0                  # picture 1 goes towards its caption
    loss = [train_clip.contrastive(F.normalize(x, dim=1), text, torch.tensor(9.0), true)[0]
            for x in (image.detach(), image.detach()[[0, 0, 2]])]
    assert loss[1] < loss[0]


def test_muon_s_steps_are_orthogonal_and_as_long_as_adamw_s():
    torch.manual_seed(0)
    for shape in ((64, 16), (16, 64), (32, 32)):
        x = train_clip.orthogonal(torch.randn(2, *shape))
        values = torch.linalg.svdvals(x)
        assert x.shape == (2, *shape) and .6 < values.min() and values.max() < 1.3
    weight, other = (torch.nn.Parameter(torch.zeros(64, 16)) for _ in range(2))
    optimizer = train_clip.Muon([{"params": [weight], "muon": 3.0}, {"params": [other], "muon": 0}],
                                lr=.01, weight_decay=0)
    weight.grad = other.grad = torch.randn(64, 16)
    optimizer.step()
    weight, other = weight.detach(), other.detach()
    assert weight.square().mean().sqrt() == pytest.approx(3 * .2 * .01, rel=.3)
    assert other.square().mean().sqrt() == pytest.approx(.01, rel=.01)


def test_every_weight_is_in_one_group_and_the_matrices_of_blocks_are_muon_s():
    model, _ = nanoclip.build(train_clip.config_of(SMALL), train_clip.WORDS)
    groups = train_clip.optimizer_of(model, SMALL).param_groups
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    muon = {id(p) for group in groups if group["muon"] for p in group["params"]}
    assert muon == {id(p) for name, p in model.named_parameters()
                    if "resblocks" in name and name.endswith("weight") and p.ndim == 2}
    assert all(group["weight_decay"] == 0 for group in groups if group["params"][0].ndim < 2)


def test_a_few_pictures_and_their_captions_are_learned(small):
    run = type("", (), {"setup": train_clip.Setup("cpu", "fp32"), "draw": torch.Generator()})()
    drawn = zip(*(train_clip.draw_object(1, k, 0, 2, 32) for k in (0, 6, 11, 19, 24, 31)))
    light, about = map(np.concatenate, drawn)
    model, tokenize = nanoclip.build(train_clip.config_of(SMALL), train_clip.WORDS)
    optimizer = train_clip.optimizer_of(model, SMALL)
    light, rows = torch.from_numpy(light), np.arange(12)
    sums = np.array([train_clip.train_step(model, tokenize, optimizer, light, about, rows,
                                           np.random.default_rng(i), run).tolist()
                     for i in range(150)])
    first, last = sums[:10].mean(0), sums[-10:].mean(0)
    assert first[1] / 12 < .5 and last[1] / 12 > .7 and last[0] < .7 * first[0]


# --- the file, and --clip nano --------------------------------------------------------------------

def test_the_file_holds_the_model_in_fp16_with_its_words(nano_file):
    torch.manual_seed(9)
    made, _ = nanoclip.build(train_clip.config_of(SMALL), train_clip.WORDS)
    model, tokenize = nanoclip.load(nano_file)
    assert not model.training and tokenize.words[2:-1] == train_clip.WORDS
    for name, weight in made.state_dict().items():
        kept = model.state_dict()[name]
        assert kept.dtype == weight.dtype
        torch.testing.assert_close(kept, weight.half().to(weight.dtype))
    assert nano_file.stat().st_size < 2.3 * sum(w.numel() for w in made.state_dict().values()) + 2e4


def test_clip_nano_is_loaded_as_any_other_clip(nano_file):
    clip = pretrained.load_clip(f"nano={nano_file}")
    model, tokenize = nanoclip.load(nano_file)
    assert clip.model == "nano" and clip.width == 32 and clip.embed == 512
    assert not list(clip.parameters())
    text = common.prompt_features(clip, ["chair", "tv_stand"])
    wanted = model.encode_text(tokenize([common.PROMPT.format(c) for c in ("chair", "tv stand")]))
    torch.testing.assert_close(text, wanted.detach())
    # blocks compute what the model computes from the tokens of a picture
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tokens = model.visual.conv1(x).flatten(2).mT + model.visual.positional_embedding[1:]
    rows = clip.ln_pre(torch.cat([clip.start().expand(3, -1, -1), tokens], 1))
    for block in clip.blocks:
        rows = block(rows)
    torch.testing.assert_close(clip.project(rows[:, 0]), model.encode_image(x), rtol=1e-4,
                               atol=1e-4)


def test_unknown_words_are_named_and_there_is_no_text_loss(nano_file):
    clip = pretrained.load_clip(f"nano={nano_file}")
    assert common.prompt_features(clip, ["chair", "espresso_maker", "sofa"]) is None
    assert clip.no_text == "DOES NOT KNOW the words espresso, maker"


def test_shuffled_weights_are_the_same_numbers_in_another_order(nano_file):
    name = f"nano={nano_file}"
    clip, mixed = pretrained.load_clip(name), pretrained.load_clip(f"{name}=shuffled", seed=3)
    assert mixed.model == "nano" and mixed.sha256 != clip.sha256
    assert torch.equal(mixed.text_features(["a chair"]), clip.text_features(["a chair"]))
    assert pretrained.load_clip(f"{name}=shuffled", seed=3).sha256 == mixed.sha256
    assert pretrained.load_clip(f"{name}=shuffled", seed=4).sha256 != mixed.sha256
    for (part, was), now in zip(clip.named_buffers(), mixed.buffers()):
        if was.ndim > 1:
            assert not torch.equal(was, now), part
            assert torch.equal(was.flatten().sort().values, now.flatten().sort().values)
        else:
            assert torch.equal(was, now), part
    with pytest.raises(InputError, match="pass random"):
        pretrained.load_clip("random=shuffled")


def test_any_clip_with_weights_can_be_shuffled(tiny_clip):
    clip, mixed = pretrained.load_clip(tiny_clip), pretrained.load_clip(f"{tiny_clip}=shuffled")
    assert clip.model == mixed.model and clip.sha256 != mixed.sha256
    sizes = [[w.norm().item() for w in c.buffers()] for c in (clip, mixed)]
    np.testing.assert_allclose(*sizes, rtol=1e-4)


def test_a_missing_altered_or_foreign_nano_file_is_one_line(nano_file, tmp_path, monkeypatch):
    here = tmp_path / "nanoclip.safetensors"
    monkeypatch.setattr(nanoclip, "FILE", here)
    with pytest.raises(InputError, match="is missing; copy it from nanoEPCL, too"):
        pretrained.load_clip("nano")
    shutil.copy(nano_file, here)
    with pytest.raises(InputError, match="is not the file of this repository; restore it"):
        pretrained.load_clip("nano")
    with pytest.raises(InputError, match="is not the file of this repository"):
        pretrained.load_clip("nano=random")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(nano_file.read_bytes()[:-10])
    (tmp_path / "text").write_text("no weights")
    for path in (cut, tmp_path / "text"):
        with pytest.raises(InputError, match="is not a file that train_clip.py wrote"):
            pretrained.load_clip(f"nano={path}")
    with pytest.raises(InputError, match="--clip: no such file: .*none; if it"):
        pretrained.load_clip(f"nano={tmp_path / 'none'}")
    with pytest.raises(InputError, match="wrote is read as --clip nano=.*nanoclip.safetensors"):
        pretrained.load_clip(str(here))


def test_the_file_of_this_repository_knows_its_classes():
    """data/nanoclip.safetensors: its hash, its size, all forty names, texts that can be told apart
    and are as long as train_clip.py makes them."""
    assert nanoclip.FILE.stat().st_size < 6e6
    clip = pretrained.load_clip("nano")
    text = common.prompt_features(clip, train_clip.ALL_CLASSES)
    assert text.shape == (40, 512) and clip.width == 128
    assert (text - text.mean(0)).norm(dim=1).mean().item() == pytest.approx(4.5, rel=.1)
    alike = torch.nn.functional.normalize(text - text.mean(0), dim=1)
    assert (alike @ alike.T - torch.eye(40)).max() < .9


def test_the_file_of_this_repository_names_pictures_it_never_saw():
    pytest.importorskip("numba", reason="needs numba: draws meshes")
    model, tokenize = nanoclip.load()
    recipe, draw = train_clip.RECIPES["synthetic"], torch.Generator().manual_seed(0)
    drawn = [train_clip.draw_object(7, k, i, 1, recipe.size) for k in range(40) for i in range(3)]
    light, about = (torch.from_numpy(np.concatenate(part)) for part in zip(*drawn))
    x = train_clip.paint(light, torch.arange(len(light)) % 10, draw)
    with torch.no_grad():
        image = model.encode_image(x, normalize=True)
        text = model.encode_text(tokenize([train_clip.PROMPT.format(n) for n in train_clip.NAMES]),
                                 normalize=True)
    assert ((image @ text.T).argmax(1) == about[:, 0]).float().mean() > .75


# --- the script -----------------------------------------------------------------------------------

def test_a_run_writes_its_file_and_pictures_and_a_resumed_one_the_same(small, capsys):
    train_clip.main(["--out", "whole", "--device", "cpu", "--workers", "1"])
    printed = capsys.readouterr().out
    assert "160 pictures of 80 objects to train, 80 of 40 others to test" in printed
    assert "result   held-out renders, by prompt: one view" in printed
    results = json.loads(Path("whole/results.json").read_text())
    assert 0 <= results["metrics"]["accuracy"] <= 1 and len(results["by_class"]) == 40
    assert Image.open("whole/look.png").width > 200
    model, tokenize = nanoclip.load("whole/nanoclip.safetensors")
    text = model.encode_text(tokenize([train_clip.PROMPT.format(c) for c in train_clip.NAMES]))
    assert (text - text.mean(0)).norm(dim=1).mean().item() == pytest.approx(4.5, rel=.01)

    with pytest.raises(SystemExit) as ended:            # stopped in the first step of epoch 2
        steps = train_clip.train_step

        def stopping(*args):
            stopping.calls += 1
            args[-1].stopper.asked = stopping.calls == 5
            return steps(*args)
        stopping.calls = 0
        train_clip.train_step = stopping
        try:
            train_clip.main(["--out", "parts", "--device", "cpu", "--workers", "1"])
        finally:
            train_clip.train_step = steps
    assert ended.value.code == 130
    train_clip.main(["--resume", "parts", "--device", "cpu", "--workers", "1"])
    assert Path("parts/nanoclip.safetensors").read_bytes() == Path(
        "whole/nanoclip.safetensors").read_bytes()
    capsys.readouterr()
    train_clip.main(["--eval", "parts", "--device", "cpu", "--workers", "1"])
    assert "result   held-out renders" in capsys.readouterr().out


def test_real_objects_are_named_from_pictures_of_their_points(small, tmp_path, capsys):
    train_clip.main(["--out", "run", "--epochs", "1", "--device", "cpu", "--workers", "1"])
    for name, k in (("Cone", 9), ("Stairs", 31), ("Unheard", 20)):
        for part in ("train", "test"):
            (tmp_path / "own" / part / name).mkdir(parents=True)
            for i in range(2):
                rng = np.random.default_rng(i)
                xyz = make_object(train_clip.ALL_CLASSES[k], rng)
                xyz = sample_surface(*xyz, 1100, rng)
                np.save(tmp_path / "own" / part / name / f"{i}.npy", xyz)
    words = ["--eval", "run", "--real", "folder", "--root", "own", "--device", "cpu"]
    train_clip.main([*words, "--workers", "1"])
    line = "real     4 clouds of 2 classes, depth of 1,024 points, z up, by prompt among 40: one"
    assert line in capsys.readouterr().out
    train_clip.main([*words, "--workers", "1", "--up", "y"])
    assert line.replace("z up", "y up") in capsys.readouterr().out
    shutil.rmtree(tmp_path / "own/train/Cone")
    for part, name in (("train", "Stairs"), ("test", "Stairs"), ("test", "Cone")):
        shutil.rmtree(tmp_path / "own" / part / name)
    with pytest.raises(InputError, match="none of its classes is one of airplane, bathtub"):
        train_clip.main([*words, "--workers", "1"])


def test_what_the_script_cannot_do_is_one_line(small):
    with pytest.raises(InputError, match="--real needs a run: add --eval"):
        train_clip.main(["--real", "folder", "--root", "here"])
    with pytest.raises(InputError, match="--up belongs to --real"):
        train_clip.main(["--up", "y"])
    with pytest.raises(InputError, match="there are 160 pictures"):
        train_clip.main(["--batch-size", "161", "--device", "cpu", "--workers", "1"])
    with pytest.raises(InputError, match="the built-in data has no files"):
        train_clip.main(["--root", "here"])
