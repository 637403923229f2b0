"""EPCL, the model that every script shares: points -> tokens -> frozen CLIP -> features.

"Frozen CLIP Model is An Efficient Point Cloud Backbone", arXiv 2212.04098. From top to bottom:

    1  PointTokenizer   a cloud becomes G tokens, one for each patch       section 3.2.1, eq. (9)
    2  TaskToken        a few learned tokens that tell CLIP of the task    section 3.2.1
    3  FrozenCLIP       CLIP's image transformer, never trained            Figure 3
    4  EPCLEncoder      1 and 2 through 3: the method                      Figure 3, eq. (5)
    5  Classifier       the head that names an object, and its loss        section 3.2.2
    6  farthest, ...    what the scripts share beside the model

Shapes: B clouds, N points, C classes (in the tokenizer: extra channels of a point), G patches
("groups"), K neighbours, T task tokens, L tokens of a cloud, D width of the transformer, E width of
CLIP's image-text space. Coordinates are x, y, z in the unit of the data; a script says where it
normalises them.
"""
import hashlib
import logging
import re
import sys
import warnings
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from checkpoint import load_weights
from kernels import farthest_point_sample, group, knn, use_triton
from run import InputError, all_reduce, check_weights, rank, weights_of, world_size

# ---- 1. Point tokenizer --------------------------------------------------------------------------
def gather(values, idx):
    """Rows of each cloud: values (B, N, C), idx (B, ...) -> (B, ..., C)."""
    if values.requires_grad and use_triton(values):
        # torch's own gradient, a scatter-add, differs from run to run on a GPU
        return group(values, idx)
    rows = idx.flatten(1)[..., None].expand(-1, -1, values.shape[-1])
    return values.gather(1, rows).view(*idx.shape, values.shape[-1])


class PointTokenizer(nn.Module):
    """Cut clouds into patches and turn every patch into a token: mini-PointNet, eq. (9).

    points (B, N, 3 + C) -> tokens (B, G, D), centers (B, G, 3). lengths (B,): only the first
    lengths[b] points of cloud b exist, at least G.

    The paper says "three-layer MLP"; the released code has four layers with a max in the middle,
    and so have we. Their 1x1 convolutions are linear layers over the last axis.
    """

    def __init__(self, groups, neighbours, width, channels=0):
        super().__init__()
        self.groups, self.neighbours = groups, neighbours
        self.first = nn.Sequential(nn.Linear(3 + channels, 128), BatchNorm(128), nn.ReLU(),
                                   nn.Linear(128, 256))
        self.second = nn.Sequential(nn.Linear(512, 512), BatchNorm(512), nn.ReLU(),
                                    nn.Linear(512, width))

    def forward(self, points, lengths=None):
        xyz = points[..., :3].contiguous()                              # (B, N, 3)
        chosen = farthest_point_sample(xyz, self.groups, lengths=lengths)       # (B, G)
        centers = gather(xyz, chosen)                                   # (B, G, 3)
        _, idx = knn(centers, xyz, self.neighbours, lengths)            # (B, G, K)
        patches = gather(points, idx)                                   # (B, G, K, 3 + C)
        offset = patches[..., :3] - centers[:, :, None]                 # not scaled, as released
        x = self.first(torch.cat([offset, patches[..., 3:]], -1))       # (B, G, K, 256)
        # second[0] reads [maximum over the patch | point]. The first half is the same for all K
        # points and multiplied once for each patch
        joint = self.second[0]
        of_patch, of_point = joint.weight.split(256, 1)                 # (512, 256) each
        x = F.linear(x, of_point, joint.bias) + F.linear(x.amax(2, keepdim=True), of_patch)
        return self.second[1:](x).amax(2), centers      # x (B, G, K, 512) -> (B, G, D); (B, G, 3)


class BatchNorm(nn.BatchNorm1d):
    """Batch norm over the last axis with the statistics of all processes, on any device.

    torch's SyncBatchNorm does not run on CPUs, and without shared statistics two processes would
    not follow the loss curve of one.
    """

    def forward(self, x):                                               # (..., C)
        rows = x.flatten(0, -2)
        if not self.training or world_size() == 1:
            return super().forward(rows).view(x.shape)
        rows = rows.float()
        total = all_reduce(torch.cat([rows.sum(0), rows.new_tensor([len(rows)])]))
        n = total[-1].detach()
        mean = total[:-1] / n
        var = all_reduce((rows - mean).square().sum(0)) / n
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
        out = (rows - mean) * (var + self.eps).rsqrt() * self.weight + self.bias
        return out.to(x.dtype).view(x.shape)


# ---- 2. Task token -------------------------------------------------------------------------------
class TaskToken(nn.Module):
    """T learned tokens, the same for every cloud: ids 0..T-1 -> embedding -> MLP -> (T, D).

    Paper 3.2.1: "a fully-connected layer with several learnable parameters", initialised "as
    enumerated numbers" after P-tuning v2. The release has an embedding and two layers with GELU,
    and so have we.
    """

    def __init__(self, count, width):
        super().__init__()
        self.embedding = nn.Embedding(count, width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self):
        return self.mlp(self.embedding.weight)                          # (T, D)


# ---- 3. Frozen CLIP ------------------------------------------------------------------------------
def freeze(module):
    """Turn all parameters into buffers that are not saved, so that nothing is left to train.

    No optimiser finds them in `parameters()`, no checkpoint in `state_dict()`; `.to()` still moves
    them, and gradients still flow through them to the tokens.
    """
    for part in module.modules():
        for name, weight in list(part._parameters.items()):
            if weight is not None:
                del part._parameters[name]
                part.register_buffer(name, weight.detach(), persistent=False)


class FrozenCLIP(nn.Module):
    """CLIP's image transformer without its patch embedding: what EPCL keeps of it. See `load_clip`.

    class_token, class_position (D,); ln_pre; blocks, each (B, L, D) -> (B, L, D), attending over
    the L tokens of one cloud; ln_post; proj (D, E) or None. trainable=True leaves the weights as
    parameters: the paper's "w/o CLIP frozen", Table 4. name: as --clip gave it. model: its
    architecture, ViT-B-32-quickgelu for example, wherever the file of weights lies.
    """

    def __init__(self, name, model, parts, text=None, trainable=False):
        super().__init__()
        for part, value in parts.items():
            setattr(self, part, value)
        self.name, self.model, self.text, self.trainable = name, model, text, trainable
        self.no_text = "has no text tower"      # why there is no text loss: `prompt_features`
        self.width = len(self.class_token)
        self.embed = self.width if self.proj is None else self.proj.shape[1]
        self.sha256 = fingerprint(self.named_parameters())
        if not trainable:
            freeze(self)

    def train(self, mode=True):
        return super().train(mode and self.trainable)                   # frozen: always eval

    def half_weights(self):
        """Hold the matrices in bf16: half the memory, no cast in every step. Norms stay fp32."""
        for part in self.modules():
            if not isinstance(part, (FrozenCLIP, nn.LayerNorm)):
                for name, weight in part._buffers.items():
                    part._buffers[name] = weight.bfloat16()

    def start(self):
        return (self.class_token + self.class_position).view(1, 1, -1)  # (1, 1, D)

    def project(self, x):
        """The class row as CLIP reads it: (B, D) -> (B, E)."""
        x = self.ln_post(x)
        return x if self.proj is None else x @ self.proj

    @torch.no_grad()
    def text_features(self, prompts):
        """CLIP's features of the prompts, not normalised: (prompts, E); None without text tower."""
        if self.text is None:
            return None
        encode, tokenize = self.text
        return encode(tokenize(prompts)).float()


def fingerprint(named_tensors):
    """sha256 over names and float32 values: the same weights, the same hash, in any file."""
    digest = hashlib.sha256()
    for name, tensor in sorted(named_tensors):
        digest.update(name.encode())
        digest.update(tensor.detach().float().contiguous().numpy().data)
    return digest.hexdigest()


CLIP_NAMES = ("openai, MODEL/TAG of open_clip (ViT-B-16/laion2b_s34b_b88k), ViT-B-32.pt as OpenAI "
              "ships it, MODEL=FILE, timm:NAME=FILE, nano (small, comes with this repository), "
              "nano=FILE (what train_clip.py wrote); untrained: random, MODEL=random, "
              "timm:NAME=random, nano[=FILE]=random; permuted within each matrix, texts as before: "
              "NAME=shuffled, for any NAME that has weights")


def load_clip(name, seed=0, trainable=False):
    """FrozenCLIP from a --clip name (`CLIP_NAMES`). Random and shuffled weights follow `seed`."""
    base = base_of(name)
    if base.startswith("timm:"):
        vit, _, path = base[5:].partition("=")
        model_name, parts, text = f"timm:{vit}", timm_parts(timm_model(vit, path, seed)), None
    else:
        model_name, model, tokenizer = whole_clip(base, seed)
        parts = open_clip_parts(model.visual)
        text = model.encode_text, tokenizer             # only called under no_grad
    if is_random(name):
        text = None                         # an untrained text tower knows no words
    if name != base:                        # the text tower stays: a control differs in one thing
        shuffle(parts, seed)
    return FrozenCLIP(name, model_name, parts, text, trainable)


def base_of(name):
    """NAME of NAME=shuffled; any other name as it is."""
    base = name.removesuffix("=shuffled")
    if base != name and is_random(base):
        raise InputError(f"--clip {name}: random weights are not worth a shuffle; pass {base}")
    return base


def is_random(name):
    """random or NAME=random, but not a file whose name ends so."""
    return f"={name}".endswith("=random")


def whole_clip(name, seed, used=None):
    """-> architecture, CLIP with both towers, its tokenizer. used: of `from_open_clip`."""
    if name == "nano" or name.startswith("nano="):
        return nano(name, seed)
    return from_open_clip(name, seed, used)


def nano(name, seed):
    """-> architecture, the CLIP that train_clip.py made, or an untrained twin, its words."""
    import nanoclip
    path = name.removesuffix("=random").removeprefix("nano").removeprefix("=")
    return "nano", *nanoclip.load(path or None, seed if name.endswith("=random") else None)


@torch.no_grad()
def shuffle(parts, seed):
    """Permute the weights within each matrix: the same sizes and norms, and no knowledge."""
    draw = torch.Generator().manual_seed(seed)
    for part in parts.values():
        for weight in part.parameters() if isinstance(part, nn.Module) else [part]:
            if weight is not None and weight.ndim > 1:
                order = torch.randperm(weight.numel(), generator=draw)
                weight.copy_(weight.flatten()[order].view_as(weight))


def from_open_clip(name, seed, used=None):
    """-> name of the model, open_clip's CLIP, its tokenizer. used: as OPEN_CLIP_USED, its default.

    OpenAI trained with QuickGELU, x * sigmoid(1.702 x). In a model with exact GELU the same weights
    load without a word and every block computes something else; hence "-quickgelu", and hence a
    bare file, which does not say, is only taken in the form in which OpenAI ships it.
    """
    model_name, tag, state = "ViT-B-32-quickgelu", None, None
    if name == "openai":
        tag = "openai"
    elif "=" in name:
        model_name, path = name.split("=", 1)
        if path != "random":
            state, _ = read_weights(path)
    elif weights_of(name):
        state, archive = read_weights(name)
        if "visual.conv1.0.weight" in state:
            raise InputError(f"--clip {name}: what train_clip.py wrote is read as --clip "
                             f"nano={name}")
        if not archive:
            raise InputError(f"--clip {name}: the file does not say which activation it was "
                             f"trained with; write --clip ViT-B-32-quickgelu={name} for OpenAI's "
                             f"weights, --clip ViT-B-32={name} for others")
        patch = state.get("visual.conv1.weight", torch.empty(0))
        model_name = OPENAI_MODELS.get(patch.shape, model_name)
    elif "/" in name:
        model_name, tag = name.split("/", 1)
    elif name != "random":
        raise InputError(f"--clip {name}: not a name this program knows; give {CLIP_NAMES}")
    model, tokenizer = open_clip_model(model_name, tag, seed)
    if state is not None:
        load_weights(model, state, used or OPEN_CLIP_USED, f"--clip {name}: its weights",
                     model_name)
    return model_name, model, tokenizer


OPENAI_MODELS = {           # by the shape of the patch embedding, (D, 3, P, P)
    (768, 3, 32, 32): "ViT-B-32-quickgelu", (768, 3, 16, 16): "ViT-B-16-quickgelu",
    (1024, 3, 14, 14): "ViT-L-14-quickgelu"}
# the weights that are used, by the beginnings of their names; patch embedding and heads are not
VISUAL_USED = ("class_embedding", "positional_embedding", "ln_", "transformer.", "proj")
OPEN_CLIP_USED = (*(f"visual.{name}" for name in VISUAL_USED), "token_embedding", "transformer.",
                  "positional_embedding", "ln_final", "text_projection")
TIMM_USED = ("cls_token", "pos_embed", "norm", "blocks.")
# keys under which a file may hold its state dict; as timm
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "module", "base_model")


def open_clip_model(model_name, tag=None, seed=0):
    """-> open_clip's CLIP in eval mode with the weights `tag`, or random ones; its tokenizer."""
    import open_clip                        # takes seconds, so not while --help prints
    from open_clip.transformer import VisionTransformer
    if model_name not in open_clip.list_models():
        raise InputError(f"--clip: open_clip has no model {model_name}; open_clip.list_models() "
                         "prints those it has")
    tags = open_clip.list_pretrained_tags_by_model(model_name)
    if tag and tag not in tags:
        raise InputError(f"--clip: open_clip has no weights {tag} for {model_name}, it has "
                         f"{', '.join(tags) or 'none'}")
    logging.disable(logging.CRITICAL)       # its warnings repeat what is printed or raised here
    if tag and rank() == 0:
        print(f"loading {model_name}/{tag}; the first time it is downloaded", file=sys.stderr)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = open_clip.create_model(model_name, pretrained=tag).eval()
        except Exception as error:          # no network and no cache, a full disk, ...
            raise InputError(
                f"--clip: the weights {tag} of {model_name} are not in open_clip's cache and could "
                f"not be downloaded ({type(error).__name__}); on a connected machine fetch "
                "ViT-B-32.pt, linked from github.com/openai/CLIP, and pass --clip "
                "/path/to/ViT-B-32.pt; or try --clip nano or --data synthetic") from None
        finally:
            logging.disable(logging.NOTSET)
    if not isinstance(model.visual, VisionTransformer) or model.visual.attn_pool is not None:
        raise InputError(f"--clip: the image encoder of {model_name} is not a plain ViT; choose a "
                         "ViT")
    if not model.visual.transformer.batch_first:    # else clouds of a batch attend to each other
        raise InputError("open_clip is too old; pip install -U open_clip_torch")
    return model, open_clip.get_tokenizer(model_name)


def open_clip_parts(visual):
    """What EPCL uses of open_clip's image tower; the names inside are those of OpenAI's module."""
    return {"class_token": nn.Parameter(visual.class_embedding.detach().clone()),
            "class_position": nn.Parameter(visual.positional_embedding[0].detach().clone()),
            "ln_pre": visual.ln_pre, "blocks": visual.transformer.resblocks,
            "ln_post": visual.ln_post, "proj": visual.proj}


def timm_model(name, path, seed, used=TIMM_USED):
    """timm's plain ViT in eval mode: the paper's frozen ImageNet ViT, Table 6. path "random" draws
    untrained weights. used: the beginnings of the names of weights that `path` must have."""
    import timm
    if not path:
        raise InputError(f"--clip timm:{name}: weights come from a file; write timm:{name}=FILE, "
                         f"or timm:{name}=random")
    if not timm.is_model(name):
        raise InputError(f"--clip timm:{name}: timm has no such model; timm.list_models('vit*') "
                         "prints those it has")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vit = timm.create_model(name, pretrained=False).eval()
    if not isinstance(vit, timm.models.VisionTransformer) or vit.cls_token is None:
        raise InputError(f"--clip timm:{name}: not a ViT with a class token; choose another")
    if path != "random":
        load_weights(vit, read_weights(path)[0], used,
                     f"--clip timm:{name}={path}: its weights", name)
    return vit


def timm_parts(vit):
    """The parts of `open_clip_parts`; timm's ViT has exact GELU, no ln_pre and no projection."""
    position = torch.zeros(vit.embed_dim) if vit.no_embed_class else vit.pos_embed[0, 0].detach()
    return {"class_token": nn.Parameter(vit.cls_token[0, 0].detach().clone()),
            "class_position": nn.Parameter(position.clone()), "ln_pre": vit.norm_pre,
            "blocks": nn.ModuleList(vit.blocks), "ln_post": vit.norm, "proj": None}


def read_weights(path, flag="--clip"):
    """-> state dict in float32, and whether the file is a TorchScript archive: OpenAI's form.

    No pickle is trusted: .safetensors, torch.load(weights_only=True), or TorchScript. Weights may
    lie under one of WRAPPERS, beside what else a training saved.
    """
    check_weights(path, flag)
    archive = False
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file
            state = load_file(path)
        else:
            with warnings.catch_warnings(), torch.serialization.safe_globals([Namespace]):
                warnings.simplefilter("ignore")       # TorchScript is OpenAI's choice, not ours
                try:
                    state = torch.load(path, map_location="cpu", weights_only=True)
                except RuntimeError:
                    state, archive = torch.jit.load(path, map_location="cpu").state_dict(), True
        for _ in WRAPPERS:                  # one in the other; a file may hold itself: it must end
            state = next((state[key] for key in WRAPPERS if isinstance(state.get(key), dict)),
                         state)
        state = {name.removeprefix("module."): w.float() for name, w in state.items()
                 if isinstance(w, torch.Tensor)}
    except Exception as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        raise InputError(f"{flag}: {path} " + (
            f"holds {code[1]}, which is code and not a weight; save the weights alone, "
            "torch.save(model.state_dict(), FILE)" if code else
            "is not a readable weight file, or cut short; fetch it again")) from None
    return state, archive


# ---- 4. The encoder: the method in one forward ---------------------------------------------------
class Features(NamedTuple):
    """What the frozen transformer makes of a cloud's tokens, row by row."""
    cls: torch.Tensor           # (B, D) CLIP's class token; None where it is left out
    patches: torch.Tensor       # (B, G, D)
    tasks: torch.Tensor         # (B, T, D); T is 0 where there are none


class EPCLEncoder(nn.Module):
    """Patch tokens and task tokens through the frozen transformer, Figure 3.

    tokens (B, G, D), centers (B, G, 3) -> Features.

    task_tokens: T. with_class_token: CLIP's in front; the detector has none. project: whether the
    head reads `clip.project`; what nothing reads is not trained, unfrozen or not. dropout: before
    `ln_pre`; the paper's supplement says 0.3, the released classifier has 0.

    Variants: with_task_token=False, Table 6. deep_prompt=True, Table 8: fresh tokens for every
    block. transformer=False: the patch tokens as they come, a control that the paper leaves out.
    """

    def __init__(self, clip, task_tokens, dropout=0.0, with_class_token=True,
                 with_task_token=True, deep_prompt=False, transformer=True, project=False):
        super().__init__()
        self.with_class_token, self.transformer = with_class_token, transformer
        self.position = nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, clip.width))
        self.dropout = nn.Dropout(dropout)
        self.clip = clip if transformer else None
        self.task = self.prompts = None
        if transformer and deep_prompt:
            prompts = torch.randn(len(clip.blocks), task_tokens, clip.width)
            self.prompts = nn.Parameter(0.02 * prompts)                 # (blocks, T, D)
        elif transformer and with_task_token:
            self.task = TaskToken(task_tokens, clip.width)
        if transformer and clip.trainable:
            unread = [] if with_class_token else [clip.class_token, clip.class_position]
            unread += [] if project else [*clip.ln_post.parameters(), clip.proj]
            for weight in unread:
                if weight is not None:
                    weight.requires_grad_(False)

    def forward(self, tokens, centers):
        B, G, _ = tokens.shape
        x = tokens + self.position(centers)                             # (B, G, D), eq. (5)
        if not self.transformer:
            x = self.dropout(x)
            return Features(None, x, x[:, G:])
        if self.with_class_token:
            x = torch.cat([self.clip.start().expand(B, -1, -1), x], 1)  # (B, 1 + G, D)
        x = self.clip.ln_pre(self.dropout(x))
        own = x.shape[1]                                                # rows of the cloud itself
        if self.task is not None:                                       # after ln_pre, no position
            x = torch.cat([x, self.task().expand(B, -1, -1)], 1)        # (B, 1 + G + T, D)
        with plain_attention(x):
            for i, block in enumerate(self.clip.blocks):
                if self.prompts is not None:
                    x = torch.cat([x[:, :own], self.prompts[i].expand(B, -1, -1)], 1)
                x = block(x)                                    # x + MSA(LN x), + MLP(LN x)
        return Features(x[:, 0] if self.with_class_token else None, x[:, own - G:own],
                        x[:, own:])


def plain_attention(x):
    """For few tokens (B, L, D) in bf16 on a CPU: with 35 to 75 of them the gradient of torch's
    fused attention takes four times as long as that of its plain one (torch 2.14, AMD EPYC). Same
    result but for rounding."""
    few = x.device.type == "cpu" and torch.is_autocast_enabled("cpu") and x.shape[1] < 128
    return sdpa_kernel(SDPBackend.MATH) if few else nullcontext()


# ---- 5. The head that names an object, and its loss ----------------------------------------------
PROMPT = "point cloud of a big {}."         # PointCLIP's; the release leaves out the full stop
TEXT_SCALE = 100.0          # CLIP's own exp(logit_scale), for --text-loss cosine


class Classifier(nn.Module):
    """EPCL with the released classification head.

    points (B, N, 3) -> logits (B, C), embedding (B, 512). The text loss reads the embedding, too.
    """

    def __init__(self, clip, classes, cfg):
        super().__init__()
        recipe = cfg["recipe"]
        self.tokenizer = PointTokenizer(recipe["groups"], recipe["neighbours"], clip.width)
        self.encoder = EPCLEncoder(clip, task_tokens=classes, project=True, **encoder_options(cfg))
        wide = clip.width + (0 if cfg["no_transformer"] else clip.embed)
        self.norm = nn.LayerNorm(clip.width)
        self.embed = nn.Sequential(nn.Linear(wide, 512), BatchNorm(512), nn.ReLU(), nn.Dropout(0.2),
                                   nn.Linear(512, 512), nn.LayerNorm(512))
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(512, 256), BatchNorm(256), nn.ReLU(),
                                  nn.Dropout(0.5), nn.Linear(256, classes))

    def forward(self, points):
        return self.read(*self.encoder(*self.tokenizer(points)))

    def read(self, cls, patches, tasks):                        # `Features`
        rows = torch.cat([patches, tasks], 1)                   # task rows, too, as released
        x = self.norm(rows).amax(1)                             # (B, D)
        if cls is not None:
            x = torch.cat([self.encoder.clip.project(cls), x], 1)       # (B, E + D)
        embedding = self.embed(x)                               # (B, 512)
        return self.head(embedding), embedding


def prompt_features(clip, classes):
    """CLIP's text features of the class names (C, 512); None without a text tower, or if nano-CLIP
    does not know a word."""
    try:
        text = clip.text_features([PROMPT.format(name.replace("_", " ")) for name in classes])
    except LookupError as error:            # nanoclip.UnknownWords
        clip.no_text = f"DOES NOT KNOW the words {error}"
        return None
    if text is not None and text.shape[1] != 512:
        raise InputError(f"--clip {clip.name}: text features have {text.shape[1]} numbers, the "
                         "embedding of the head has 512; pass --text-loss off")
    return text


def loss_terms(logits, embedding, label, text, kind):
    """Cross-entropy of the head and of the similarities with text (C, 512), summed over the clouds.

    The two are weighted 1 : 1. Paper 3.2.2 calls the second "the same as that in CLIP", which
    scales both sides to length one and multiplies by 100: kind "cosine". The release takes raw
    products: "raw".
    """
    head = F.cross_entropy(logits.float(), label, reduction="sum")
    if text is None:
        return head, torch.zeros_like(head)
    embedding = embedding.float()
    if kind == "cosine":
        embedding, text = TEXT_SCALE * F.normalize(embedding, dim=1), F.normalize(text, dim=1)
    return head, F.cross_entropy(embedding @ text.T, label, reduction="sum")


# ---- 6. What the scripts share beside the model --------------------------------------------------
def farthest(xyz, count, batch=64):
    """The `count` farthest points of each cloud, from index 0: (S, N, 3) -> (S, count, 3)."""
    return torch.cat([gather(x, farthest_point_sample(x, count)) for x in xyz.split(batch)])


def any_rows(n, count, draw):
    """`count` of n rows in random order; all of them and then some again if there are fewer."""
    rows = torch.randperm(n, device=draw.device, generator=draw)[:count]
    if n < count:
        again = torch.randint(n, (count - n,), device=draw.device, generator=draw)
        rows = torch.cat([rows, again])
    return rows


def random_rows(inside, count, draw):
    """As `any_rows`, of the rows where `inside` (N,) holds, one at least: (count,).

    The host never waits for the device. draw: a torch.Generator there.
    """
    device, N = inside.device, len(inside)
    key = torch.rand(N, device=device, generator=draw).masked_fill_(~inside, 2.0)
    rows = key.topk(min(count, N), largest=False).indices               # those inside come first
    found = inside.sum()                    # a tensor: .item() would wait
    again = (torch.rand(count, device=device, generator=draw) * found).long().minimum(found - 1)
    position = torch.arange(count, device=device)
    return rows[torch.where(position < found, position, again.clamp_min(0))]


def check_batch(clouds, cfg):
    """One line before training if a part of a step would hold a single row for batch norm."""
    batch, parts = cfg["recipe"]["batch_size"], cfg["accumulate"]
    least = max(2, world_size()) * parts
    if min(clouds, batch) < least:
        cure = f"pass --batch-size {least} or more"
        if clouds < least:
            cure = "pass a smaller --accumulate" if parts > 1 else "add training clouds"
        raise InputError(f"--batch-size {batch}, --accumulate {parts}, {clouds} training clouds: "
                         f"batch norm needs two clouds in each part of a step; {cure}")


def encoder_options(cfg):
    """The recipe's dropout and the ablations, as EPCLEncoder takes them."""
    return {"dropout": cfg["recipe"]["dropout"], "with_task_token": not cfg["no_task_token"],
            "deep_prompt": cfg["deep_prompt"], "transformer": not cfg["no_transformer"]}


def to_device(model, saved, setup):
    """Load trained weights, if there are any; hold frozen ones in bf16 if products are in bf16."""
    if saved and saved["model"] is not None:
        load_weights(model, saved["model"], where=f"{saved['file']}: its weights")
    clip = model.encoder.clip
    if setup.bf16 and clip is not None and not clip.trainable:
        clip.half_weights()
    return model.to(setup.device)


def sizes(model):
    """Numbers of weights: trained, frozen."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    for module in model.modules():
        if isinstance(module, FrozenCLIP):
            frozen += sum(b.numel() for b in module.buffers())
    return trained, frozen


def print_model(run, model, clip, what=""):
    """The lines of a run's log that name its model and the weights of the transformer."""
    trained, frozen = sizes(model)
    encoder = "left out"
    if model.encoder.transformer:
        encoder = f"{clip.name}, {'trained, too' if clip.trainable else 'frozen'}"
    run.print(f"model    {trained:,} weights trained, {frozen:,} frozen; {what}transformer "
              f"{encoder}")
    if model.encoder.transformer:
        print_warning(run, clip.name)


WARNINGS = {
    "random": "the transformer has RANDOM weights: these numbers say nothing about CLIP",
    "shuffled": "the transformer has SHUFFLED weights: these numbers say nothing about CLIP",
    "nano": "nano-CLIP is small and saw procedural objects: these numbers say nothing about CLIP"}


def print_warning(run, name):
    """What numbers with a --clip name are not worth, if anything."""
    kind = re.split("[=:]", name)[-1]
    kind = kind if kind in ("random", "shuffled") else name.split("=")[0]
    if kind in WARNINGS:
        run.print(f"warning  {WARNINGS[kind]}")
