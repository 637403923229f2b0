"""The model: freezing, attention, parity with the release, weights from files."""
import argparse

import pytest
import torch
import torch.nn.functional as F

import common
import pretrained
import train_cls
from run import InputError, parameter_groups


@pytest.fixture(scope="module")
def clip():
    return pretrained.load_clip("random")


def config(clip_name="random", **changes):
    """What `train_cls.settings` would give, small."""
    args = train_cls.flags(["--points", "64", "--groups", "8", "--neighbours", "8",
                            "--batch-size", "4"])
    cfg, _, _ = train_cls.settings(args)
    return {**cfg, "clip": clip_name, **changes}


# --- the model ------------------------------------------------------------------------------------

def test_the_paper_s_classifier_trains_3067176_weights_and_they_are_these(clip):
    model = train_cls.Classifier(clip, 40, config())
    counts = {}
    for name, weight in model.named_parameters():
        part = ".".join(name.split(".")[:2 if name.startswith("encoder") else 1])
        counts[part] = counts.get(part, 0) + weight.numel()
    assert counts == {"tokenizer": 691_456, "encoder.position": 99_584, "encoder.task": 1_211_904,
                      "norm": 1_536, "embed": 920_576, "head": 142_120}
    matrices, vectors = parameter_groups(model, 0.04)
    held = {id(p) for group in (matrices, vectors) for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    assert sum(p.numel() for group in (matrices, vectors) for p in group["params"]) == 3_067_176
    assert (len(matrices["params"]), matrices["weight_decay"]) == (13, 0.04)
    assert (len(vectors["params"]), vectors["weight_decay"]) == (24, 0.0)
    assert sum(p.numel() for p in vectors["params"]) == 10_792
    # class token, its position, ln_pre, ln_post, proj, blocks; conv1 and 49 positions are not used
    assert common.sizes(model) == (3_067_176, 87_849_216 - 2_359_296 - 49 * 768)


def test_frozen_weights_stay_bit_identical_without_gradient_optimiser_or_checkpoint(tiny_clip):
    clip = pretrained.load_clip(tiny_clip)
    frozen = {n: b.clone() for n, b in clip.named_buffers()}
    model = train_cls.Classifier(clip, 5, config())
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=0.01)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model.train()(torch.randn(4, 64, 3))[0], torch.arange(4)).backward()
        optimizer.step()
    assert all(torch.equal(b, frozen[n]) and b.grad is None for n, b in clip.named_buffers())
    assert len(frozen) == len(list(clip.named_buffers())) > 50 and not list(clip.parameters())
    assert not any("clip" in name for name in model.state_dict())
    assert not any(module.training for module in clip.modules())
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert len(moved) == len(before), set(before) - set(moved)


def test_a_file_that_is_called_random_is_not(tmp_path):
    names = ["random", "nano=random", "timm:vit=random", "nano=random.pt", "nano=not_random"]
    assert [*map(pretrained.is_random, names)] == [True, True, True, False, False]


@pytest.mark.parametrize("name", ["timm", "nano", "nano=shuffled", "random"])
def test_unfreeze_trains_every_weight_of_clip_that_the_classifier_uses(tiny_clip, name):
    name = tiny_clip if name == "timm" else name
    clip, frozen = pretrained.load_clip(name, trainable=True), pretrained.load_clip(name)
    model = train_cls.Classifier(clip, 5, config(unfreeze=True))
    trained, rest = common.sizes(model)
    assert rest == 0 and trained == sum(common.sizes(train_cls.Classifier(frozen, 5, config())))
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    F.cross_entropy(model.train()(torch.randn(4, 64, 3))[0], torch.arange(4)).backward()
    optimizer.step()
    same = [n for n, p in model.named_parameters() if torch.equal(p, before[n])]
    assert not same and any(n.startswith("encoder.clip.blocks") for n in model.state_dict())


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("name", ["timm", "nano"])
def test_unfrozen_weights_that_nothing_reads_are_not_trained(tiny_clip, name, class_token):
    """Else torchrun's processes wait for a gradient that never comes."""
    clip = pretrained.load_clip(tiny_clip if name == "timm" else name, trainable=True)
    encoder = common.EPCLEncoder(clip, task_tokens=3, with_class_token=class_token)
    found = encoder(torch.randn(2, 6, clip.width), torch.randn(2, 6, 3))
    (found.patches.square().sum() + found.tasks.square().sum()).backward()
    assert all((p.grad is not None) == p.requires_grad for p in encoder.parameters())
    assert all(p.requires_grad for p in clip.blocks.parameters())


def test_the_count_of_frozen_weights_has_every_weight_that_does_not_learn(clip):
    model = train_cls.Classifier(clip, 5, config())
    trained, frozen = common.sizes(model)
    model.encoder.position.requires_grad_(False)
    some = sum(p.numel() for p in model.encoder.position.parameters())
    assert common.sizes(model) == (trained - some, frozen + some)


def test_every_token_reaches_every_token_of_its_cloud_and_none_of_another(clip):
    encoder = common.EPCLEncoder(clip, task_tokens=3).eval()
    tokens, centers = torch.randn(2, 6, 768), torch.randn(2, 6, 3)
    other = tokens.clone()
    other[0, 4] += torch.randn(768)
    with torch.no_grad():
        pairs = zip(encoder(tokens, centers), encoder(other, centers))
        changed = torch.cat([(a - b).abs().view(2, -1, 768).amax(2) for a, b in pairs], 1)
    assert changed.shape == (2, 10)             # 1 + 6 + 3
    assert (changed[0] > 1e-4).all(), "class, patch and task rows must all see the perturbed patch"
    assert (changed[1] == 0).all(), "clouds of a batch must not attend to each other"


def test_the_output_for_a_cloud_does_not_depend_on_the_rest_of_the_batch(tiny_clip):
    model = train_cls.Classifier(pretrained.load_clip(tiny_clip), 5, config()).eval()
    clouds = torch.randn(3, 64, 3)
    with torch.no_grad():
        assert torch.allclose(model(clouds)[0][1], model(clouds[1:2])[0][0], atol=1e-5)


@pytest.mark.parametrize("flag", ["no_task_token", "deep_prompt", "no_transformer"])
def test_ablations_change_the_rows_and_the_weights_they_name(tiny_clip, flag):
    clip = pretrained.load_clip(tiny_clip)
    model = train_cls.Classifier(clip, 5, config(**{flag: True}))
    cls, patches, tasks = model.encoder(*model.tokenizer(torch.randn(2, 64, 3)))
    assert patches.shape == (2, 8, clip.width) and (cls is None) == (flag == "no_transformer")
    assert tasks.shape == (2, 5 if flag == "deep_prompt" else 0, clip.width)
    names = [n for n, _ in model.named_parameters()]
    assert not any("task" in n for n in names)
    prompts = [p for n, p in model.named_parameters() if "prompts" in n]
    assert [p.shape for p in prompts] == ([(6, 5, 64)] if flag == "deep_prompt" else [])
    assert common.sizes(model)[1] == (0 if flag == "no_transformer" else common.sizes(clip)[1])
    F.cross_entropy(model(torch.randn(4, 64, 3))[0], torch.arange(4)).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_bf16_weights_keep_norms_in_fp32_and_change_the_features_little(tiny_clip):
    clip = pretrained.load_clip(tiny_clip)
    tokenizer = common.PointTokenizer(8, 8, clip.width).eval()
    encoder = common.EPCLEncoder(clip, task_tokens=3).eval()
    points = torch.randn(2, 64, 3)
    with torch.no_grad():
        exact = encoder(*tokenizer(points)).patches
        clip.half_weights()
        with torch.autocast("cpu", torch.bfloat16):
            rounded = encoder(*tokenizer(points)).patches.float()
    assert clip.ln_post.weight.dtype == torch.float32
    assert clip.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    assert (rounded - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("groups, bf16, plain", [(8, True, True), (8, False, False),
                                                 (130, True, False)])
def test_few_tokens_in_bf16_on_a_cpu_take_torch_s_plain_attention(tiny_clip, groups, bf16, plain):
    clip = pretrained.load_clip(tiny_clip)
    encoder = common.EPCLEncoder(clip, task_tokens=3)
    seen = []
    clip.blocks[-1].register_forward_pre_hook(
        lambda *_: seen.append(torch.backends.cuda.flash_sdp_enabled()))    # CPUs heed it, too
    tokens = torch.randn(2, groups, clip.width)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        encoder(tokens, torch.randn(2, groups, 3))
    assert seen == [not plain] and torch.backends.cuda.flash_sdp_enabled()


def official_logits(state, points):
    """An independent reimplementation of the released classifier in eval mode: 1x1 convolutions,
    OpenAI's sequence-first blocks, all of it with plain functions and none of our modules."""
    def conv(x, name):                                                      # (B * G, C, K)
        return F.conv1d(x, state[name + ".weight"], state[name + ".bias"])

    def bn(x, name):
        return F.batch_norm(x, state[name + ".running_mean"], state[name + ".running_var"],
                            state[name + ".weight"], state[name + ".bias"])

    def linear(x, name):
        return F.linear(x, state[name + ".weight"], state[name + ".bias"])

    def norm(x, name):
        weight, bias = state[name + ".weight"], state[name + ".bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias)

    B, G, K = len(points), 64, 32
    centers = []
    for cloud in points:                                                    # FPS from index 0
        chosen, far = [0], torch.full((len(cloud),), float("inf"))
        for _ in range(G - 1):
            far = torch.minimum(far, ((cloud - cloud[chosen[-1]]) ** 2).sum(1))
            chosen.append(int(far.argmax()))
        centers.append(cloud[chosen])
    centers = torch.stack(centers)                                          # (B, 64, 3)
    near = torch.cdist(centers.double(), points.double()).topk(K, largest=False).indices
    patches = torch.stack([points[b][near[b]] for b in range(B)]) - centers[:, :, None]
    x = patches.reshape(B * G, K, 3).transpose(1, 2)                        # (B * G, 3, K)
    x = F.relu(bn(conv(x, "encoder.first_conv.0"), "encoder.first_conv.1"))
    x = conv(x, "encoder.first_conv.3")
    x = torch.cat([x.max(2, keepdim=True).values.expand(-1, -1, K), x], 1)  # global first
    x = conv(F.relu(bn(conv(x, "encoder.second_conv.0"), "encoder.second_conv.1")),
             "encoder.second_conv.3").max(2).values.view(B, G, 768)
    x = x + linear(F.gelu(linear(centers, "pos_embed.0")), "pos_embed.2")
    cls = state["clip_vit.class_embedding"] + state["clip_vit.positional_embedding"][0]
    x = norm(torch.cat([cls.expand(B, 1, 768), x], 1), "clip_vit.ln_pre")
    task = F.gelu(linear(state["te_encoder.embedding.weight"], "te_encoder.trans.0"))
    task = linear(task, "te_encoder.trans.2")
    x = torch.cat([x, task.expand(B, -1, -1)], 1).permute(1, 0, 2)          # (105, B, 768)
    for i in range(12):
        block = f"clip_vit.transformer.resblocks.{i}."
        h = norm(x, block + "ln_1")
        weight, bias = state[block + "attn.in_proj_weight"], state[block + "attn.in_proj_bias"]
        q, k, v = F.linear(h, weight, bias).chunk(3, -1)
        q, k, v = (t.reshape(len(t), B * 12, 64).transpose(0, 1) for t in (q, k, v))
        a = (q @ k.transpose(1, 2) / 8).softmax(-1) @ v                     # (B * 12, 105, 64)
        x = x + linear(a.transpose(0, 1).reshape(-1, B, 768), block + "attn.out_proj")
        h = linear(norm(x, block + "ln_2"), block + "mlp.c_fc")
        x = x + linear(h * torch.sigmoid(1.702 * h), block + "mlp.c_proj")
    x = x.permute(1, 0, 2)
    cls = norm(x[:, 0], "clip_vit.ln_post") @ state["clip_vit.proj"]
    x = torch.cat([cls, norm(x[:, 1:], "norm").max(1).values], 1)           # (B, 1280)
    x = F.relu(bn(linear(x, "proj2emb.0"), "proj2emb.1"))
    x = norm(linear(x, "proj2emb.4"), "proj2emb.5")
    x = F.relu(bn(linear(x, "cls_head_finetune.1"), "cls_head_finetune.2"))
    return linear(x, "cls_head_finetune.5")


def official_checkpoint(path, classes=40):
    """A file with the release's names and shapes and random weights. -> its state dict."""
    shapes = {"encoder.first_conv.0": (128, 3, 1), "encoder.first_conv.3": (256, 128, 1),
              "encoder.second_conv.0": (512, 512, 1), "encoder.second_conv.3": (768, 512, 1),
              "pos_embed.0": (128, 3), "pos_embed.2": (768, 128), "te_encoder.trans.0": (768, 768),
              "te_encoder.trans.2": (768, 768), "proj2emb.0": (512, 1280), "proj2emb.4": (512, 512),
              "cls_head_finetune.1": (256, 512), "cls_head_finetune.5": (classes, 256)}
    random = torch.Generator().manual_seed(0)
    state = {"te_encoder.embedding.weight": torch.randn(classes, 768, generator=random)}
    for name, shape in shapes.items():
        state[name + ".weight"] = torch.randn(shape, generator=random) / shape[1] ** 0.5
        state[name + ".bias"] = torch.randn(shape[0], generator=random) * 0.1
    norms = {"encoder.first_conv.1": 128, "encoder.second_conv.1": 512, "proj2emb.1": 512,
             "cls_head_finetune.2": 256, "norm": 768, "proj2emb.5": 512}
    for name, n in norms.items():
        state[name + ".weight"] = 1 + 0.1 * torch.randn(n, generator=random)
        state[name + ".bias"] = 0.1 * torch.randn(n, generator=random)
        if name not in ("norm", "proj2emb.5"):
            state[name + ".running_mean"] = 0.1 * torch.randn(n, generator=random)
            state[name + ".running_var"] = 1 + torch.rand(n, generator=random)
            state[name + ".num_batches_tracked"] = torch.tensor(7)
    visual, _ = pretrained.open_clip_model("ViT-B-32-quickgelu", seed=3)
    state.update({f"clip_vit.{n}": w.detach() for n, w in visual.visual.state_dict().items()})
    torch.save({"base_model": {f"module.{n}": w for n, w in state.items()}, "epoch": 300,
                "metrics": {"acc": torch.tensor(92.9)}}, path)
    return state


def test_the_released_checkpoint_gives_the_released_logits(tmp_path):
    state = official_checkpoint(tmp_path / "official.pth")
    assert len(state) == 201 and sum(w.numel() for w in state.values()) == 90_919_212
    clip, ours = train_cls.load_official(tmp_path / "official.pth")
    cfg = config()
    cfg["recipe"] = train_cls.RECIPES["modelnet40"]._asdict()
    model = train_cls.Classifier(clip, 40, cfg).eval()
    model.load_state_dict(ours)
    points = torch.randn(2, 256, 3) * 0.3
    with torch.no_grad():
        logits, expected = model(points)[0], official_logits(state, points)
    assert expected.std() > 0.1
    assert (logits - expected).abs().max() < 1e-4


# --- frozen weights from names and files ----------------------------------------------------------

def test_random_weights_depend_on_the_seed_alone(clip):
    torch.manual_seed(5)
    assert pretrained.load_clip("random", seed=0).sha256 == clip.sha256
    assert pretrained.load_clip("random", seed=1).sha256 != clip.sha256


def test_the_same_weights_in_any_file_have_one_hash_and_the_text_tower_speaks(tmp_path):
    from safetensors.torch import save_file
    model, tokenizer = pretrained.open_clip_model("ViT-B-32-quickgelu", seed=2)
    state = {n: w.clone() for n, w in model.state_dict().items()}

    class Shell(torch.nn.Module):               # the names inside OpenAI's TorchScript archive
        def __init__(self, state):
            super().__init__()
            for name, tensor in state.items():
                here = self
                for part in name.split(".")[:-1]:
                    if not hasattr(here, part):
                        here.add_module(part, torch.nn.Module())
                    here = getattr(here, part)
                here.register_buffer(name.rpartition(".")[2], tensor)

        def forward(self, x):
            return x

    shell = Shell({**state, "input_resolution": torch.tensor(224)})
    torch.jit.script(shell).save(tmp_path / "ViT-B-32.pt")
    save_file(state, tmp_path / "w.safetensors")
    halves = {f"module.{n}": w.half() for n, w in state.items()}
    torch.save({"state_dict": halves}, tmp_path / "w.bin")
    archive = pretrained.load_clip(str(tmp_path / "ViT-B-32.pt"))
    named = pretrained.load_clip(f"ViT-B-32-quickgelu={tmp_path / 'w.safetensors'}")
    assert archive.sha256 == named.sha256
    half = pretrained.load_clip(f"ViT-B-32-quickgelu={tmp_path / 'w.bin'}")
    assert half.sha256 != named.sha256
    prompts = ["point cloud of a big chair.", "point cloud of a big night stand."]
    with torch.no_grad():
        expected = model.encode_text(tokenizer(prompts))
    assert torch.allclose(named.text_features(prompts), expected, atol=1e-5)
    with pytest.raises(InputError, match="does not say which activation"):
        pretrained.load_clip(str(tmp_path / "w.safetensors"))
    with pytest.raises(InputError, match="do not fit ViT-B-16: .* tensors differ"):
        pretrained.load_clip(f"ViT-B-16={tmp_path / 'w.safetensors'}")
    gelu = pretrained.load_clip(f"ViT-B-32={tmp_path / 'w.safetensors'}")
    x = torch.randn(1, 5, 768)
    with torch.no_grad():                               # the trap: same weights, other activation
        assert (gelu.blocks[0](x) - named.blocks[0](x)).abs().max() > 1e-3
    (tmp_path / "cut.pt").write_bytes((tmp_path / "ViT-B-32.pt").read_bytes()[:100_000])
    with pytest.raises(InputError, match="cut.pt is not a readable weight file"):
        pretrained.load_clip(str(tmp_path / "cut.pt"))


@pytest.mark.parametrize("name, words", [
    ("nonsense", "not a name this program knows"),
    ("missing.pt", "no such file: missing.pt; if it was moved, --clip names its new place"),
    ("ViT-X-99/openai", "open_clip has no model ViT-X-99"),
    ("ViT-B-16/nonsense", "no weights nonsense for ViT-B-16"),
    ("RN50=missing.pt", "no such file"),
    ("timm:vit_tiny_patch16_224", "weights come from a file"),
    ("timm:nonsense=x.pt", "timm has no such model"),
    ("timm:resnet18=x.pt", "not a ViT with a class token"),
])
def test_a_wrong_clip_name_says_what_is_wrong_in_one_line(name, words):
    with pytest.raises(InputError, match=words) as error:
        pretrained.load_clip(name)
    assert "\n" not in str(error.value)


def test_weights_that_cannot_be_fetched_name_the_file_and_the_alternatives(monkeypatch):
    import open_clip

    def offline(*args, **kwargs):
        raise OSError("Name or service not known")
    monkeypatch.setattr(open_clip, "create_model", offline)
    with pytest.raises(InputError) as error:
        pretrained.load_clip("openai")
    for word in ("ViT-B-32.pt", "--clip nano", "--data synthetic", "could not be downloaded"):
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_a_timm_vit_computes_the_same_as_in_timm(tiny_clip):
    import timm
    clip = pretrained.load_clip(tiny_clip)
    name, path = tiny_clip.removeprefix("timm:").split("=")
    vit = timm.create_model(name, pretrained=False).eval()
    vit.load_state_dict(pretrained.read_weights(path)[0])
    x = torch.randn(2, 7, clip.width)
    with torch.no_grad():
        expected, ours = vit.norm(vit.blocks(vit.norm_pre(x))), clip.ln_pre(x)
        for block in clip.blocks:
            ours = block(ours)
        assert torch.allclose(clip.ln_post(ours), expected, atol=1e-5)
    assert torch.allclose(clip.start()[0, 0], vit.cls_token[0, 0] + vit.pos_embed[0, 0])
    assert clip.text_features(["anything"]) is None and clip.embed == clip.width


def test_random_rows_are_all_those_inside_before_any_comes_twice():
    inside = torch.rand(500, generator=torch.Generator().manual_seed(0)) < 0.3
    n = int(inside.sum())
    for count in (1, n - 1, n, n + 1, 3 * n, 700):
        rows = common.random_rows(inside, count, torch.Generator().manual_seed(1))
        assert rows.shape == (count,) and inside[rows].all()
        assert len(rows[:n].unique()) == min(count, n)
    draws = [torch.Generator().manual_seed(i) for i in range(60)]
    assert len({common.random_rows(inside, 1, draw).item() for draw in draws}) > 40
    assert not torch.equal(rows[:n], rows[:n].sort().values)
    assert (common.random_rows(torch.tensor([False, True]), 5, torch.Generator()) == 1).all()


def vit_state():
    import timm
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return timm.create_model("test_vit", pretrained=False).state_dict()


@pytest.mark.parametrize("box", [
    lambda s: {"model": s}, lambda s: {"model_ema": s, "epoch": 3}, lambda s: {"state_dict": s},
    lambda s: {"state_dict_ema": s, "state_dict": {k: 0 * w for k, w in s.items()}},
    lambda s: {"model": s, "args": argparse.Namespace(lr=1, betas=(0.9, 0.99))},
    lambda s: {"module": {f"module.{k}": w for k, w in s.items()}},
    lambda s: {k: w for k, w in s.items() if not k.startswith(("head.", "patch_embed."))},
    lambda s: {**s, "head.weight": torch.zeros(21843, 64), "fc_norm.weight": torch.zeros(3)}])
def test_published_weights_load_from_any_box_and_with_any_head(tmp_path, box):
    torch.save(vit_state(), tmp_path / "plain.pth")
    torch.save(box(vit_state()), tmp_path / "boxed.pth")
    plain, boxed = (pretrained.load_clip(f"timm:test_vit={tmp_path / name}.pth")
                    for name in ("plain", "boxed"))
    assert boxed.sha256 == plain.sha256


class Code:
    pass


@pytest.mark.parametrize("spoil, words", [
    (lambda s: {k: w for k, w in s.items() if k != "blocks.0.norm1.weight"},
     r"do not fit test_vit: 1 tensors differ, blocks.0.norm1.weight missing for \(64,\)"),
    (lambda s: {**s, "blocks.0.ls9.gamma": torch.ones(64)},
     r"blocks.0.ls9.gamma \(64,\) for nothing"),
    (lambda s: {**s, "norm.weight": torch.ones(3)}, r"norm.weight \(3,\) for \(64,\)"),
    (lambda s: {"model": s, "args": Code()},
     r"holds test_common.Code, which is code and not a weight; save the weights alone"),
    (lambda s: [1, 2], "is not a readable weight file"),
    (lambda s: {"epoch": 3}, "tensors differ, cls_token missing")])
def test_weights_that_do_not_fit_are_named(tmp_path, spoil, words):
    torch.save(spoil(vit_state()), tmp_path / "w.pth")
    with pytest.raises(InputError, match=words) as error:
        pretrained.load_clip(f"timm:test_vit={tmp_path / 'w.pth'}")
    assert "\n" not in str(error.value) and "\x1b" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"PK\x03\x04 cut"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_that_holds_no_weights_is_named(tmp_path, content, suffix):
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"{path} is not a readable weight file, or cut short; "):
        pretrained.load_clip(f"timm:test_vit={path}")


@pytest.mark.parametrize("clouds, batch, parts, processes, words", [
    (9, 1, 1, 1, "pass --batch-size 2 or more"), (9, 4, 3, 1, "pass --batch-size 6 or more"),
    (1, 8, 1, 1, "1 training clouds: .*; add training clouds"),
    (3, 8, 2, 1, "pass a smaller --accumulate"), (9, 3, 1, 4, "pass --batch-size 4 or more"),
    (9, 2, 1, 1, None), (2, 8, 1, 1, None), (9, 4, 2, 1, None), (9, 4, 1, 4, None)])
def test_a_part_of_one_cloud_is_refused(monkeypatch, clouds, batch, parts, processes, words):
    monkeypatch.setattr(common, "world_size", lambda: processes)
    cfg = {"recipe": {"batch_size": batch}, "accumulate": parts}
    if words is None:
        return common.check_batch(clouds, cfg)
    with pytest.raises(InputError, match=f"needs two clouds in each part of a step; .*{words}|"
                                         f"{words}"):
        common.check_batch(clouds, cfg)
