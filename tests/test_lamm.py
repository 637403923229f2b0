"""lamm.py: LAMM's released detector. The file itself was not at hand: random weights in its layout,
with names and shapes of LAMM's code, and an independent reimplementation of its forward pass."""
import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import lamm
import pretrained
import train_det as det
from data import synthetic_rooms
from run import InputError
from test_det import scene_of

FLAGS = {"vit_num_token": 64, "preenc_npoints": 256, "nqueries": 64, "dec_nlayers": 2,
         "dec_nhead": 4, "clip_vit": "ViT-B/32", "pointnet_downsample": True, "use_color": False}


def released_checkpoint(path, flags=FLAGS, classes=18):
    """A file with the names and shapes of the release, ViT-B/32 for ViT-L/14. -> its weights."""
    random = torch.Generator().manual_seed(0)
    state = {}

    def weight(name, *shape):
        spread = (2 / shape[1]) ** 0.5 if len(shape) > 1 else 0.1
        state[name] = torch.randn(shape, generator=random) * spread + (len(shape) == 1) * (
            name.endswith("weight"))

    def norm(name, n, batch=True):
        weight(f"{name}.weight", n)
        weight(f"{name}.bias", n)
        if batch:
            state[f"{name}.running_mean"] = 0.1 * torch.randn(n, generator=random)
            state[f"{name}.running_var"] = 1 + torch.rand(n, generator=random)
            state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    def linear(name, b, *a):
        weight(f"{name}.weight", b, *a)
        weight(f"{name}.bias", b)

    for level, widths in enumerate(((3, 64, 256), (259, 512, 768))):
        for i, (a, b) in enumerate(zip(widths, widths[1:])):
            layer = f"pre_encoder.layers.{level}.mlp_module.layer{i}"
            weight(f"{layer}.conv.weight", b, a, 1, 1)
            norm(f"{layer}.bn.bn", b)
    linear("encoder.pos_embed.0", 128, 3)
    linear("encoder.pos_embed.2", 768, 128)
    state["te_encoder.embedding.weight"] = torch.randn(classes + 1, 768, generator=random)
    linear("te_encoder.trans.0", 768, 768)
    linear("te_encoder.trans.2", 768, 768)
    for i, b in ((0, 768), (3, 768), (6, 256)):
        weight(f"encoder_to_decoder_projection.layers.{i}.weight", b, 768, 1)
        norm(f"encoder_to_decoder_projection.layers.{i + 1}", b)
    state["pos_embedding.gauss_B"] = torch.randn(3, 128, generator=random)
    linear("query_projection.layers.0", 256, 256, 1)
    linear("query_projection.layers.2", 256, 256, 1)
    for i in range(flags.get("dec_nlayers", 2)):
        layer = f"decoder.layers.{i}"
        for attention in ("self_attn", "multihead_attn"):
            weight(f"{layer}.{attention}.in_proj_weight", 768, 256)
            weight(f"{layer}.{attention}.in_proj_bias", 768)
            linear(f"{layer}.{attention}.out_proj", 256, 256)
        for n in (1, 2, 3):
            norm(f"{layer}.norm{n}", 256, batch=False)
        linear(f"{layer}.linear1", 256, 256)
        linear(f"{layer}.linear2", 256, 256)
    norm("decoder.norm", 256, batch=False)
    for head, n in (("sem_cls", classes + 1), ("center", 3), ("size", 3), ("angle_cls", 1),
                    ("angle_residual", 1)):
        for i in (0, 4):
            weight(f"mlp_heads.{head}_head.layers.{i}.weight", 256, 256, 1)
            norm(f"mlp_heads.{head}_head.layers.{i + 1}", 256)
        linear(f"mlp_heads.{head}_head.layers.8", n, 256, 1)
    visual, _ = pretrained.open_clip_model("ViT-B-32-quickgelu", seed=3)
    for name, w in visual.visual.state_dict().items():      # at initial weights a block does little
        larger = 4 if "resblocks" in name and w.dim() == 2 else 1
        state[f"encoder.clip_vit.{name}"] = larger * w.detach()
    content = {"model": state, "epoch": 1079}
    torch.save(content if flags is None else {**content, "args": Namespace(**flags)}, path)
    return state


def released_outputs(state, points, low, high):
    """An independent reimplementation of the release in eval mode: convolutions, sequence-first
    attention, a loop for each ball; all of it with plain functions and none of our modules.
    -> the encoder's features (B, 64, 768), outputs of the last layer of the decoder."""
    def conv(x, name):                                                      # (B, C, ...)
        w = state[f"{name}.weight"]
        return torch.einsum("oi,bi...->bo...", w.flatten(1), x) if x.dim() == 4 else F.conv1d(
            x, w, state.get(f"{name}.bias"))

    def bn(x, name):
        return F.relu(F.batch_norm(x, state[f"{name}.running_mean"], state[f"{name}.running_var"],
                                   state[f"{name}.weight"], state[f"{name}.bias"]))

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def attention(q, k, v, name, heads):                                    # (L, B, D)
        weight, bias = (state[f"{name}.in_proj_{x}"].chunk(3) for x in ("weight", "bias"))
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((q, k, v), weight, bias))
        B, D = q.shape[1:]
        q, k, v = (x.reshape(len(x), B * heads, D // heads).transpose(0, 1) for x in (q, k, v))
        x = (q @ k.transpose(1, 2) / (D // heads) ** 0.5).softmax(-1) @ v
        return linear(x.transpose(0, 1).reshape(-1, B, D), f"{name}.out_proj")

    def farthest(cloud, n):                                                 # FPS from index 0
        chosen, far = [0], torch.full((len(cloud),), float("inf"))
        for _ in range(n - 1):
            far = torch.minimum(far, ((cloud - cloud[chosen[-1]]) ** 2).sum(1))
            chosen.append(int(far.argmax()))
        return chosen

    def level(xyz, values, number, n, radius, k):       # (N, 3), (C, N) -> (n, 3), (C', n)
        centers, grouped = xyz[farthest(xyz, n)], []
        for center in centers:
            inside = ((xyz - center) ** 2).sum(1) < radius ** 2
            ball = [i for i, here in enumerate(inside.tolist()) if here][:k]
            ball += [ball[0]] * (k - len(ball))
            own = (xyz[ball] - center).T / radius                           # (3, k)
            grouped.append(own if values is None else torch.cat([own, values[:, ball]]))
        x = torch.stack(grouped, 1)[None]                                   # (1, 3 + C, n, k)
        for i in range(2):
            layer = f"pre_encoder.layers.{number}.mlp_module.layer{i}"
            x = bn(conv(x, f"{layer}.conv"), f"{layer}.bn.bn")
        return centers, x[0].max(2).values

    B, tokens = len(points), []
    for cloud in points:
        fine, values = level(cloud, None, 0, 256, 0.2, 64)
        tokens.append(level(fine, values, 1, 64, 0.2 * 4, 64 * 4))
    centers = torch.stack([c for c, _ in tokens])                           # (B, 64, 3)
    x = torch.stack([t.T for _, t in tokens])                               # (B, 64, 768)
    x = x + linear(F.gelu(linear(centers, "encoder.pos_embed.0")), "encoder.pos_embed.2")
    x = norm(x, "encoder.clip_vit.ln_pre")
    task = F.gelu(linear(state["te_encoder.embedding.weight"], "te_encoder.trans.0"))
    x = torch.cat([x, linear(task, "te_encoder.trans.2").expand(B, -1, -1)], 1).permute(1, 0, 2)
    for i in range(12):
        block = f"encoder.clip_vit.transformer.resblocks.{i}"
        h = norm(x, f"{block}.ln_1")
        x = x + attention(h, h, h, f"{block}.attn", 12)
        h = linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")
        x = x + linear(h * torch.sigmoid(1.702 * h), f"{block}.mlp.c_proj")
    features = x.permute(1, 0, 2)[:, :64]

    memory = features.transpose(1, 2)                                       # (B, 768, 64)
    for i in (0, 3, 6):
        name = "encoder_to_decoder_projection.layers"
        memory = bn(conv(memory, f"{name}.{i}"), f"{name}.{i + 1}")
    memory = memory.permute(2, 0, 1)                                        # (64, B, 256)

    def fourier(xyz):                                                       # (B, n, 3)
        share = (xyz - low[:, None]) / (high - low)[:, None] * 2 * np.pi
        phase = share @ state["pos_embedding.gauss_B"]
        return torch.cat([phase.sin(), phase.cos()], 2)                     # (B, n, 256)

    place = torch.stack([cloud[farthest(cloud, 64)] for cloud in centers])
    query = F.relu(conv(fourier(place).transpose(1, 2), "query_projection.layers.0"))
    query = F.relu(conv(query, "query_projection.layers.2")).permute(2, 0, 1)
    keys, x = memory + fourier(centers).transpose(0, 1), torch.zeros_like(query)
    for i in range(2):
        layer = f"decoder.layers.{i}"
        h = norm(x, f"{layer}.norm1")
        x = x + attention(h + query, h + query, h, f"{layer}.self_attn", 4)
        h = norm(x, f"{layer}.norm2")
        x = x + attention(h + query, keys, memory, f"{layer}.multihead_attn", 4)
        h = F.relu(linear(norm(x, f"{layer}.norm3"), f"{layer}.linear1"))
        x = x + linear(h, f"{layer}.linear2")
    x = norm(x, "decoder.norm").permute(1, 2, 0)                            # (B, 256, 64)

    def head(name):
        h = x
        for i in (0, 4):
            h = bn(conv(h, f"mlp_heads.{name}_head.layers.{i}"),
                   f"mlp_heads.{name}_head.layers.{i + 1}")
        return conv(h, f"mlp_heads.{name}_head.layers.8").transpose(1, 2)   # (B, 64, n)

    return features, {"logits": head("sem_cls"), "angle_class": head("angle_cls"),
                      "center": place + head("center").sigmoid() - 0.5,
                      "size": head("size").sigmoid() * (high - low).clamp_min(0.1)[:, None],
                      "angle": head("angle_residual")}


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    path = tmp_path_factory.mktemp("lamm") / "epcl.pth"
    state = released_checkpoint(path)
    return path, state, *lamm.load_released(path)


def test_the_released_detector_gives_the_released_features_and_boxes(released):
    path, state, clip, ours = released
    words = ["--data", "scannet", "--init-official", str(path)]
    cfg = det.settings(det.flags(words))[0]
    recipe = det.Recipe(**cfg["recipe"])
    assert (recipe.tokens, recipe.fine, recipe.queries, recipe.layers) == (64, 256, 64, 2)
    model = det.Detector(clip, 18, cfg)
    assert ours.keys() == model.state_dict().keys()
    model.load_state_dict(ours)
    model.eval()
    rooms = synthetic_rooms.room_scenes(2, 900, 9)
    batch = det.make_batch([scene_of(room) for room in rooms], 600, torch.device("cpu"))
    with torch.no_grad():
        features, expected = released_outputs(state, batch.xyz, batch.low, batch.high)
        found = model.encoder(*model.tokenizer(batch.xyz)).patches
        out = model(batch.xyz, batch.low, batch.high)
    assert features.std(1).mean() > 0.1 and (found - features).abs().max() < 1e-3
    for name, value in expected.items():
        assert value.std(1).mean() > 0.02, name             # from query to query
        assert (getattr(out, name)[-1] - value).abs().max() < 1e-4, name


def test_a_run_starts_from_the_release_and_says_what_it_is_worth(
        released, monkeypatch, tmp_path, capsys):
    path, _, clip, ours = released
    read = []
    monkeypatch.setattr(lamm, "load_released", lambda path: read.append(path) or (clip, ours))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(det.RECIPES, "synthetic", det.RECIPES["synthetic"]._replace(
        points=400, epochs=1, batch_size=2))
    scenes = [scene_of(room, f"room{i}")
              for i, room in enumerate(synthetic_rooms.room_scenes(2, 800, 9))]
    classes = tuple(f"class {i}" for i in range(18))
    monkeypatch.setattr(det, "load_scenes",
                        lambda cfg, training: (scenes, scenes[:1], classes, "two"))
    det.main(["--init-official", str(path), "--lr", "1e-9"])
    printed = capsys.readouterr().out
    assert f"transformer official:{path}, frozen" in printed and "64 tokens, 64 queries" in printed
    lines = printed.splitlines()
    start = next(line for line in lines if line.startswith("released mAP@0.25"))
    assert start.endswith("before any training here") and lines.index(start) < next(
        i for i, line in enumerate(lines) if line.startswith("run "))
    moved = tmp_path / "moved.pth"
    moved.write_bytes(Path(path).read_bytes())
    det.main(["--eval", "runs/det-synthetic-1", "--init-official", str(moved)])
    assert read == [str(path), str(moved)]
    results = json.loads(Path("runs/det-synthetic-1/results.json").read_text())
    assert f"mAP@0.25 {100 * results['metrics']['map25']:.2f} %" in capsys.readouterr().out
    with pytest.raises(InputError, match="weights do not fit the model: .*task.embedding"):
        monkeypatch.setattr(det, "load_scenes",
                            lambda cfg, training: (scenes, scenes, classes[:9], "two"))
        det.main(["--init-official", str(path)])


def test_what_is_not_the_released_detector_is_one_line(released, tmp_path):
    path, state, *_ = released
    few = {name: w for name, w in state.items() if not name.startswith(lamm.CLIP)}
    patch = {"encoder.clip_vit.conv1.weight": state["encoder.clip_vit.conv1.weight"]}
    heads = Namespace(vit_num_token=256, dec_nhead=8)
    for name, content in (("flags", {"model": {**few, **patch}}),
                          ("heads", {"model": few, "args": heads}),
                          ("bare", {"weight": torch.ones(3)})):
        torch.save(content, tmp_path / name)
    (tmp_path / "cut").write_bytes(Path(path).read_bytes()[:5000])
    for words, message in (
            (["flags"], "does not say how many tokens .*; pass --tokens 256"),
            (["heads"], "its decoder has 8 heads"), (["cut"], "is not a readable weight file"),
            (["none"], "--init-official: no such file: .*none"),
            (["bare"], "not LAMM's detector: it has no encoder.clip_vit"),
            (["flags", "--clip", "random"], "leave --clip and --unfreeze out"),
            (["flags", "--unfreeze"], "leave --clip and --unfreeze out")):
        with pytest.raises(InputError, match=message) as error:
            det.settings(det.flags(["--init-official", str(tmp_path / words[0]), *words[1:]]))
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"its encoder.clip_vit.\* do not fit ViT-B-32-quickgelu"):
        lamm.load_released(tmp_path / "flags")
    cfg = det.settings(det.flags(["--init-official", str(tmp_path / "flags"), "--tokens", "256"]))
    assert cfg[0]["recipe"]["tokens"] == 256
