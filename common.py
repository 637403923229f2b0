"""EPCL, the model that every script shares: points -> tokens -> frozen CLIP -> features.

"Frozen CLIP Model is An Efficient Point Cloud Backbone", arXiv 2212.04098. From top to bottom:

    1  PointTokenizer   a cloud becomes G tokens, one for each patch       section 3.2.1, eq. (9)
    2  TaskToken        a few learned tokens that tell CLIP of the task    section 3.2.1
    3  FrozenCLIP       CLIP's image transformer, never trained            Figure 3
    4  EPCLEncoder      1 and 2 through 3: the method                      Figure 3, eq. (5)
    5  a run            device, processes, run folder, checkpoints, flags: nothing of the method

Shapes: B clouds, N points, C extra channels, G patches ("groups"), K neighbours, T task tokens, L
tokens of a cloud, D width of the transformer, E width of CLIP's image-text space. Coordinates are
x, y, z in the unit of the data; a script says where it normalises them.
"""
import argparse
import contextlib
import hashlib
import json
import logging
import math
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from kernels import engine, farthest_point_sample, knn


class InputError(Exception):
    """What the user gave cannot be used. One line: what, where, what to do. Exit code 2."""


# --------------------------------------------------------------------------------------------------
# 1. Point tokenizer
# --------------------------------------------------------------------------------------------------

def gather(values, idx):
    """Rows of each cloud: values (B, N, C), idx (B, ...) -> (B, ..., C)."""
    rows = idx.flatten(1)[..., None].expand(-1, -1, values.shape[-1])
    return values.gather(1, rows).view(*idx.shape, values.shape[-1])


def random_rows(inside, count, draw):
    """`shuffled` of the rows where `inside` (N,) holds; how many these are is not read back from the device.

    draw is a torch.Generator on the device of `inside`.
    """
    device, N = inside.device, len(inside)
    key = torch.rand(N, device=device, generator=draw).masked_fill_(~inside, 2.0)
    rows = key.topk(min(count, N), largest=False).indices               # those inside come first
    found = inside.sum()
    again = (torch.rand(count, device=device, generator=draw) * found).long().minimum(found - 1)
    place = torch.arange(count, device=device)
    return rows[torch.where(place < found, place, again.clamp_min(0))]


def shuffled(n, count, draw):
    """`count` of n rows in random order; all of them and then some again if there are fewer."""
    rows = torch.randperm(n, device=draw.device, generator=draw)[:count]
    if n < count:
        rows = torch.cat([rows, torch.randint(n, (count - n,), device=draw.device, generator=draw)])
    return rows


class PointTokenizer(nn.Module):
    """Cut clouds into patches and turn every patch into a token: mini-PointNet, eq. (9).

    points (B, N, 3 + C) -> tokens (B, G, D), centers (B, G, 3).

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

    def forward(self, points):
        xyz = points[..., :3].contiguous()                              # (B, N, 3)
        centers = gather(xyz, farthest_point_sample(xyz, self.groups))  # (B, G, 3)
        _, idx = knn(centers, xyz, self.neighbours)                     # (B, G, K)
        patches = gather(points, idx)                                   # (B, G, K, 3 + C)
        offset = patches[..., :3] - centers[:, :, None]                 # not scaled, as theirs
        x = self.first(torch.cat([offset, patches[..., 3:]], -1))       # (B, G, K, 256)
        x = torch.cat([x.amax(2, keepdim=True).expand_as(x), x], -1)    # (B, G, K, 512)
        return self.second(x).amax(2), centers                          # (B, G, D), (B, G, 3)


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


class Dropout(nn.Dropout):
    """Dropout drawn for the whole batch: a cloud meets the same mask in one process or in eight.

    `Dropout.rows` = (first, last, total) are the rows of the batch that this process holds;
    `my_rows` sets it before each forward pass.
    """
    rows = None

    def forward(self, x):                                               # (b, ...) of a batch of B
        if not self.training or self.p == 0:
            return x
        first, last, total = Dropout.rows or (0, len(x), len(x))
        if last - first != len(x):          # called outside the loop: this is the whole batch
            first, last, total = 0, len(x), len(x)
        keep = torch.rand(total, *x.shape[1:], device=x.device)[first:last] >= self.p
        return x * keep / (1 - self.p)


# --------------------------------------------------------------------------------------------------
# 2. Task token
# --------------------------------------------------------------------------------------------------

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


# --------------------------------------------------------------------------------------------------
# 3. Frozen CLIP
# --------------------------------------------------------------------------------------------------

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
    parameters: the paper's "w/o CLIP frozen", Table 4.
    """

    def __init__(self, name, parts, text=None, trainable=False):
        super().__init__()
        for part, value in parts.items():
            setattr(self, part, value)
        self.name, self.text, self.trainable = name, text, trainable
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


CLIP_NAMES = ("openai, MODEL/TAG of open_clip (ViT-B-16/laion2b_s34b_b88k), ViT-B-32.pt as OpenAI ships "
              "it, MODEL=FILE, timm:NAME=FILE; untrained: random, MODEL=random, timm:NAME=random")


def load_clip(name, seed=0, trainable=False):
    """FrozenCLIP from a --clip name (`CLIP_NAMES`). `random` draws its weights from `seed` alone;
    `untrained` of what comes back is the name of the same transformer with random weights.

    OpenAI trained with QuickGELU, x * sigmoid(1.702 x). In a model with exact GELU the same weights
    load without a word and every block computes something else; hence "-quickgelu", and hence a
    bare file, which does not say, is only taken in the form in which OpenAI ships it.
    """
    if name.startswith("timm:"):
        vit, _, path = name[5:].partition("=")
        clip = FrozenCLIP(name, timm_parts(vit, path, seed), None, trainable)
        clip.untrained = f"timm:{vit}=random"
        return clip
    model_name, tag, state = "ViT-B-32-quickgelu", None, None
    if name == "openai":
        tag = "openai"
    elif "=" in name:
        model_name, path = name.split("=", 1)
        if path != "random":
            state, _ = read_weights(path)
    elif Path(name).suffix in (".pt", ".pth", ".bin", ".safetensors"):
        state, archive = read_weights(name)
        if not archive:
            raise InputError(f"--clip {name}: the file does not say which activation it was trained "
                             f"with; write --clip ViT-B-32-quickgelu={name} for OpenAI's weights, "
                             f"--clip ViT-B-32={name} for others")
        model_name = OPENAI_MODELS.get(state["visual.conv1.weight"].shape, model_name)
    elif "/" in name:
        model_name, tag = name.split("/", 1)
    elif name != "random":
        raise InputError(f"--clip {name}: not a name this program knows; give {CLIP_NAMES}")

    model, tokenizer = open_clip_model(model_name, tag, seed)
    if state is not None:
        load_state(model, state, f"--clip {name}", model_name)
    text = None
    if not name.endswith("random"):         # an untrained text tower has nothing to say
        text = model.requires_grad_(False).encode_text, tokenizer
    clip = FrozenCLIP(name, open_clip_parts(model.visual), text, trainable)
    clip.untrained = f"{model_name}=random"
    return clip


OPENAI_MODELS = {           # by the shape of the patch embedding, (D, 3, P, P)
    (768, 3, 32, 32): "ViT-B-32-quickgelu", (768, 3, 16, 16): "ViT-B-16-quickgelu",
    (1024, 3, 14, 14): "ViT-L-14-quickgelu"}


def open_clip_model(model_name, tag=None, seed=0):
    """-> open_clip's CLIP in eval mode with the weights `tag`, or random ones; its tokenizer."""
    import open_clip                        # takes seconds, so not while --help prints
    from open_clip.transformer import VisionTransformer
    if model_name not in open_clip.list_models():
        raise InputError(f"--clip: open_clip has no model {model_name}; open_clip.list_models() prints "
                         "those it has")
    tags = open_clip.list_pretrained_tags_by_model(model_name)
    if tag and tag not in tags:
        raise InputError(f"--clip: open_clip has no weights {tag} for {model_name}, it has "
                         f"{', '.join(tags) or 'none'}")
    logging.disable(logging.CRITICAL)       # retries, "no pretrained weights": the script says it all
    if tag and rank() == 0:
        print(f"loading {model_name}/{tag}; the first time it is downloaded", file=sys.stderr)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = open_clip.create_model(model_name, pretrained=tag).eval()
        except Exception as error:          # no network and no cache, a full disk, ...
            raise InputError(
                f"--clip: the weights {tag} of {model_name} are not in open_clip's cache and could not "
                f"be downloaded ({type(error).__name__}); on a connected machine fetch ViT-B-32.pt, "
                "linked from github.com/openai/CLIP, and pass --clip /path/to/ViT-B-32.pt; or try "
                "--clip random or --data synthetic") from None
        finally:
            logging.disable(logging.NOTSET)
    if not isinstance(model.visual, VisionTransformer) or model.visual.attn_pool is not None:
        raise InputError(f"--clip: the image encoder of {model_name} is not a plain ViT; choose a ViT")
    if not model.visual.transformer.batch_first:    # else clouds of a batch attend to each other
        raise InputError("open_clip is too old; pip install -U open_clip_torch")
    return model, open_clip.get_tokenizer(model_name)


def open_clip_parts(visual):
    """What EPCL uses of open_clip's image tower; the names inside are those of OpenAI's module."""
    return {"class_token": nn.Parameter(visual.class_embedding.detach().clone()),
            "class_position": nn.Parameter(visual.positional_embedding[0].detach().clone()),
            "ln_pre": visual.ln_pre, "blocks": visual.transformer.resblocks,
            "ln_post": visual.ln_post, "proj": visual.proj}


def timm_parts(name, path, seed):
    """The same parts of a plain ViT of timm: the paper's frozen ImageNet ViT, Table 6.

    timm's ViT has exact GELU, no ln_pre and no projection. path "random" draws untrained weights.
    """
    import timm
    if not path:
        raise InputError(f"--clip timm:{name}: weights come from a file; write timm:{name}=FILE, or "
                         f"timm:{name}=random")
    if not timm.is_model(name):
        raise InputError(f"--clip timm:{name}: timm has no such model; timm.list_models('vit*') "
                         "prints those it has")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vit = timm.create_model(name, pretrained=False).eval()
    if not isinstance(vit, timm.models.VisionTransformer) or vit.cls_token is None:
        raise InputError(f"--clip timm:{name}: not a ViT with a class token; choose another")
    if path != "random":
        load_state(vit, read_weights(path)[0], f"--clip timm:{name}={path}", name)
    position = torch.zeros(vit.embed_dim) if vit.no_embed_class else vit.pos_embed[0, 0].detach()
    return {"class_token": nn.Parameter(vit.cls_token[0, 0].detach().clone()),
            "class_position": nn.Parameter(position.clone()), "ln_pre": vit.norm_pre,
            "blocks": nn.ModuleList(vit.blocks), "ln_post": vit.norm, "proj": None}


def read_weights(path):
    """-> state dict in float32, and whether the file is a TorchScript archive: OpenAI's form.

    No pickle is trusted: .safetensors, torch.load(weights_only=True), or TorchScript.
    """
    if not Path(path).is_file():
        raise InputError(f"--clip: no such file: {path}")
    archive = False
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file
            state = load_file(path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")       # TorchScript is OpenAI's choice, not ours
                try:
                    state = torch.load(path, map_location="cpu", weights_only=True)
                except RuntimeError:
                    state, archive = torch.jit.load(path, map_location="cpu").state_dict(), True
        state = state.get("state_dict", state)
        for number in ("input_resolution", "context_length", "vocab_size"):
            state.pop(number, None)         # OpenAI's archive holds them among the weights
        return {name.removeprefix("module."): w.float() for name, w in state.items()}, archive
    except Exception as error:
        raise InputError(f"--clip: {path} is not a readable weight file "
                         f"({' '.join(str(error).split())[:120]}); fetch it again") from None


def load_state(module, state, where, what):
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"{where}: not the weights of {what} "
                         f"({' '.join(str(error).split())[:200]})") from None


# --------------------------------------------------------------------------------------------------
# 4. The encoder: the method in one forward
# --------------------------------------------------------------------------------------------------

class EPCLEncoder(nn.Module):
    """Point tokens and task tokens through the frozen transformer, Figure 3.

    tokenizer: points -> tokens (B, G, D), centers (B, G, 3). task_tokens: T. class_token: put
    CLIP's in front; the detector has none. dropout: before `ln_pre`; the paper's supplement says
    0.3, the released classifier has 0.

    points -> rows (B, L, D), centers (B, G, 3); L = [1 +] G + T: class, patches, tasks.

    Variants: task_token=False, Table 6. deep_prompt=True, Table 8: fresh tokens for every block.
    transformer=False, L = G: the tokenizer alone, a control that the paper leaves out.
    """

    def __init__(self, clip, tokenizer, task_tokens, dropout=0.0, class_token=True, task_token=True,
                 deep_prompt=False, transformer=True):
        super().__init__()
        self.tokenizer, self.class_token, self.transformer = tokenizer, class_token, transformer
        self.position = nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, clip.width))
        self.dropout = Dropout(dropout)
        self.clip, self.task, self.prompts = clip if transformer else None, None, None
        if transformer and deep_prompt:
            prompts = torch.randn(len(clip.blocks), task_tokens, clip.width)
            self.prompts = nn.Parameter(0.02 * prompts)                 # (blocks, T, D)
        elif transformer and task_token:
            self.task = TaskToken(task_tokens, clip.width)

    def forward(self, points):
        tokens, centers = self.tokenizer(points)                        # (B, G, D), (B, G, 3)
        x = tokens + self.position(centers)                             # (B, G, D), eq. (5)
        if not self.transformer:
            return self.dropout(x), centers
        if self.class_token:
            x = torch.cat([self.clip.start().expand(len(x), -1, -1), x], 1)   # (B, 1 + G, D)
        x = self.clip.ln_pre(self.dropout(x))
        own = x.shape[1]
        if self.task is not None:                                       # after ln_pre, no position
            x = torch.cat([x, self.task().expand(len(x), -1, -1)], 1)   # (B, 1 + G + T, D)
        for i, block in enumerate(self.clip.blocks):
            if self.prompts is not None:
                x = torch.cat([x[:, :own], self.prompts[i].expand(len(x), -1, -1)], 1)
            x = block(x)                                                # x + MSA(LN x), + MLP(LN x)
        return x, centers                                               # (B, 1 + G + T, D)


# --------------------------------------------------------------------------------------------------
# 5. A run: flags, device and processes, random numbers, schedule, run folder, checkpoints
# --------------------------------------------------------------------------------------------------

ABLATIONS = ("no_task_token", "unfreeze", "deep_prompt", "no_transformer")


def shared_flags(parser):
    """The flags that mean the same in every script. What is not given comes from the recipe."""
    flag = parser.add_argument
    flag("--root", metavar="DIR", help="the data as its owners publish it (default: data/<name>)")
    flag("--clip", metavar="NAME", help=f"frozen weights: {CLIP_NAMES} (default: openai; for synthetic "
                                        "data: random)")
    flag("--out", metavar="DIR", help="run folder (default: runs/<task>-<data>-<n>)")
    flag("--resume", metavar="RUN", help="go on with an interrupted run, to the same numbers")
    flag("--eval", metavar="RUN", help="evaluate a saved run, a folder or a .pt file, and stop")
    flag("--epochs", type=whole(1), metavar="N", help="passes over the training data")
    flag("--batch-size", type=whole(1), metavar="B", help="clouds of a step, over all processes")
    flag("--accumulate", type=whole(1), metavar="N", help="cut a batch into N parts: less memory")
    flag("--lr", type=float, help="highest learning rate")
    flag("--dropout", type=float, metavar="P", help="before CLIP; 0 is off")
    flag("--seed", type=whole(0), metavar="N", help="decides every random number (default 0)")
    flag("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    flag("--precision", choices=["auto", "fp32", "bf16"], help="of the matrix products (default auto)")
    flag("--compile", action="store_true", help="torch.compile: a slow first step, then faster")
    flag("--workers", type=whole(1), metavar="N", help="processes that prepare data (default: cores)")
    flag("--no-task-token", action="store_true", help="Table 6: without task tokens")
    flag("--unfreeze", action="store_true", help="Table 4: train CLIP's weights, too")
    flag("--deep-prompt", action="store_true", help="Table 8: fresh tokens in every block")
    flag("--no-transformer", action="store_true", help="control: tokenizer and head alone")


def whole(low):
    """argparse type: a whole number of at least `low`."""
    def integer(text):
        if int(text) < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}, not {text}")
        return int(text)
    return integer


def check_settings(cfg):
    recipe = cfg["recipe"]
    if recipe["lr"] <= 0 or not 0 <= recipe["dropout"] < 1:
        raise InputError(f"--lr {recipe['lr']} must be above 0, --dropout {recipe['dropout']} in 0..1")
    if cfg["deep_prompt"] and cfg["no_task_token"]:
        raise InputError("--deep-prompt and --no-task-token exclude each other; give one of them")
    if cfg["no_transformer"] and any(cfg[k] for k in ABLATIONS[:3]):
        raise InputError("--no-transformer leaves nothing for --no-task-token, --unfreeze or "
                         "--deep-prompt to change; give one of them")


def saved_settings(args, task):
    """--resume or --eval: the saved run's config, its checkpoint, its folder.

    A flag that would change what was trained is refused, not ignored.
    """
    if args.resume and args.eval:
        raise InputError("--resume goes on with a run, --eval only looks at it; give one of them")
    path = Path(args.resume or args.eval)
    saved = load_checkpoint(path, task)
    cfg, free = saved["config"], {"root", "resume", "eval", "device", "workers", "predict", "vote",
                                 "export", "skip_broken"}
    free |= {"precision", "batch_size"} if args.eval else {"compile"}
    for name, value in vars(args).items():
        was = cfg["recipe"].get(name, cfg.get(name))
        if value is not None and value is not False and value != was and name not in free:
            raise InputError(f"{path}: was trained with {name.replace('_', '-')} {was}, not {value}; "
                             f"leave --{name.replace('_', '-')} out, or start a new run")
    for name in ("root", "workers", "precision"):
        cfg[name] = getattr(args, name) or cfg[name]
    cfg["compile"] = cfg["compile"] or args.compile
    return cfg, saved, path if path.is_dir() else path.parent


def check_resume(path, saved):
    if saved["at"]["epoch"] >= saved["config"]["recipe"]["epochs"]:
        raise InputError(f"--resume {path}: the run is finished, {saved['at']['epoch']} epochs; "
                         f"--eval {path} evaluates it")
    if "optimizer" not in saved:
        raise InputError(f"--resume {path}: holds no optimiser; resume the run's folder or last.pt")


# --- device and processes

class Setup:
    """Device, precision and processes, decided once; `describe` says what and why."""

    def __init__(self, device=None, precision="auto"):
        if device == "cuda" and not torch.cuda.is_available():
            raise InputError("--device cuda: torch sees no CUDA device; leave it out to run on the CPU")
        kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.device = torch.device(kind)
        if kind == "cuda":
            self.device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():      # torchrun
            dist.init_process_group("nccl" if kind == "cuda" else "gloo")
        if precision != "auto":
            self.bf16, why = precision == "bf16", "asked for"
        elif kind == "cuda":
            self.bf16 = torch.cuda.get_device_capability() >= (8, 0)
            why = "native" if self.bf16 else "this GPU has no bf16"
        else:                               # with AVX512_BF16 but without AMX, bf16 was 6 times slower
            self.bf16 = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
            why = "AMX" if self.bf16 else "this CPU has no AMX"
        name = f"CPU, {torch.get_num_threads()} threads"
        if kind == "cuda":
            name = torch.cuda.get_device_name()
        self.describe = f"{name}, {'bf16' if self.bf16 else 'fp32'} ({why}), kernels in {engine(kind)}"
        if world_size() > 1:
            self.describe += f", {world_size()} processes"

    def autocast(self):
        if self.bf16:
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def wrap(self, model, compile):
        """The model as the training loop calls it: compiled and with shared gradients, if asked."""
        model = torch.compile(model) if compile else model
        if world_size() == 1:
            return model
        ids = [self.device] if self.device.type == "cuda" else None
        with warnings.catch_warnings():     # torch 2.15 has a new name for broadcast_buffers
            warnings.simplefilter("ignore", FutureWarning)
            return nn.parallel.DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)


def world_size():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    return dist.get_rank() if world_size() > 1 else 0


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):                # every process used the sum, so every gradient counts
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


def all_reduce(x):
    """Sum over the processes, differentiable; x itself when there is one."""
    return _AllReduce.apply(x) if world_size() > 1 else x


def my_rows(total, part=0, parts=1):
    """(first, last) of this process's share of `total` rows; part of parts when accumulating."""
    first, last = rank() * total // world_size(), (rank() + 1) * total // world_size()
    n = last - first
    first, last = first + part * n // parts, first + (part + 1) * n // parts
    Dropout.rows = (first, last, total)
    return first, last


# --- random numbers and schedule

def seed_all(*numbers):
    """One seed from several (seed, epoch) for every generator."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)                 # CUDA's generators, too


def random_state():
    """torch's generators as tensors; while they train, scripts draw from no others."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state):
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def learning_rate(epoch, top, epochs, warmup, low=1e-6):
    """Cosine with linear warm-up, `epoch` epochs (a fraction counts) after the start.

    As in timm's scheduler, which the release uses, the cosine's clock starts at 0 and not after the
    warm-up, so that `top` itself is never quite reached. They step once an epoch, we once a step.
    """
    if epoch < warmup:
        return low + (top - low) * epoch / warmup
    return low + (top - low) * (1 + math.cos(math.pi * min(epoch / epochs, 1))) / 2


def parameter_groups(model, decay):
    """AdamW's groups as in the release: biases, norms and other vectors are not decayed."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [{"params": [p for p in trained if p.ndim > 1], "weight_decay": decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}]


def sizes(model):
    """Numbers of weights: trained, frozen."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained, sum(b.numel() for m in model.modules() if isinstance(m, FrozenCLIP)
                        for b in m.buffers())


class Clock:
    """Seconds by part of a model, waiting for the device; what runs inside another part is its own."""

    def __init__(self, device):
        self.device, self.seconds, self.stack = device, {}, []

    def now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def start(self, *_):
        self.stack.append([self.now(), 0.0])

    def stop(self, name):
        begin, inner = self.stack.pop()
        spent = self.now() - begin
        self.seconds[name] = self.seconds.get(name, 0) + spent - inner
        if self.stack:
            self.stack[-1][1] += spent

    def module(self, module, name):
        module.register_forward_pre_hook(self.start)
        module.register_forward_hook(lambda *_: self.stop(name))


class Stopper:
    """Ctrl-C or SIGTERM asks the loop to stop after the step; a second one ends it at once."""

    def __init__(self):
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):       # not in the main thread
                signal.signal(number, self.ask)

    def ask(self, number, frame):
        self.asked = True
        signal.signal(number, signal.SIG_DFL)

    def now(self, step):
        if world_size() == 1:
            return self.asked
        if step % 10:                       # processes must agree, which costs time: ask seldom
            return False
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        return all_reduce(torch.tensor(float(self.asked), device=device)).item() > 0


# --- run folder and checkpoints

def new_folder(out, task, data):
    """--out, or the first runs/<task>-<data>-<n> that does not exist."""
    folder = [out]
    if rank() == 0:
        if out and (Path(out) / "config.json").exists():
            raise InputError(f"--out {out}: holds a run; --resume {out} goes on with it, or give "
                             "another folder")
        n = 1
        while Path(f"runs/{task}-{data}-{n}").exists():
            n += 1
        folder = [out or f"runs/{task}-{data}-{n}"]
    if world_size() > 1:
        dist.broadcast_object_list(folder)
    return folder[0]


class Run:
    """config.json, metrics.jsonl, log.txt, the script's source, last.pt, best.pt, results.json.

    Only the first process writes. Without a folder, `print` only prints.
    """

    def __init__(self, folder):
        self.folder, self.first, self.log = folder and Path(folder), rank() == 0, None
        if folder and self.first:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.log = open(self.folder / "log.txt", "a")
            except OSError as error:
                raise InputError(f"--out {folder}: cannot be written ({error.strerror}); give another "
                                 "folder") from None

    def start(self, cfg, script, kept=None):
        """A new run, or one that goes on: the first `kept` lines of metrics.jsonl were saved, those
        after them will come again."""
        if not self.first:
            return
        if kept is not None:
            path = self.folder / "metrics.jsonl"
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
            self._write(path.name, "".join(lines[:kept]))
        else:
            self.write_json("config.json", {**cfg, "command": sys.argv, "versions": versions()})
            shutil.copy(script, self.folder / Path(script).name)

    def print(self, text):
        if self.first:
            print(text, flush=True)
            if self.log:
                print(text, file=self.log, flush=True)

    def metrics(self, line):
        if self.first:
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")

    def write_json(self, name, content):
        if self.first:
            self._write(name, json.dumps(content, indent=1) + "\n")

    def _write(self, name, text):
        (self.folder / f"{name}.tmp").write_text(text)
        (self.folder / f"{name}.tmp").replace(self.folder / name)

    def save(self, name, state):
        """Write under a temporary name, then rename: killed at any moment, the old one survives."""
        if not self.first:
            return
        try:
            with open(self.folder / f"{name}.tmp", "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            (self.folder / f"{name}.tmp").replace(self.folder / name)
        except OSError as error:
            raise InputError(f"{self.folder / name}: cannot be written ({error.strerror}); the "
                             "checkpoint before it is intact") from None


def load_checkpoint(path, task):
    """A checkpoint of this task: `path` is a .pt file, or a run folder with last.pt."""
    path = Path(path) / "last.pt" if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint; give a run folder with last.pt, or a .pt file")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        found = saved["task"]
    except Exception:
        raise InputError(f"{path}: not a checkpoint of these scripts, or cut short; take the other .pt "
                         "file of the run, or start anew") from None
    if found != task:
        raise InputError(f"{path}: a checkpoint of train_{found}.py, not of train_{task}.py")
    return saved


def check_frozen(saved, clip):
    """Trained weights are worth nothing with another frozen transformer."""
    was = saved["frozen"]
    if was["sha256"] != clip.sha256:
        raise InputError(f"--clip {clip.name}: its weights (sha256 {clip.sha256[:12]}) are not those "
                         f"the run was trained with ({was['name']}, {was['sha256'][:12]}); put that "
                         "file back")


def versions():
    """What ran, for config.json."""
    commit = None
    if shutil.which("git"):
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = None
    return {"python": platform.python_version(), "torch": torch.__version__, "triton": triton,
            "numpy": np.__version__, "commit": commit, "date": time.strftime("%Y-%m-%d %H:%M")}


def main_guard(main):
    """Run a script: an InputError becomes one line on stderr and exit code 2."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:               # before the loop: there is nothing to save yet
        print("stopped before the first step", file=sys.stderr)
        sys.exit(130)
    if world_size() > 1:                    # leave together and at once: now and then gloo's threads
        dist.barrier()                      # abort a process that has done its work and tidies up
        sys.stdout.flush()
        os._exit(0)
