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
import re
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from checkpoint import load_weights
from kernels import farthest_point_sample, group, knn, use_triton
from run import InputError, all_reduce, world_size

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
    """CLIP's image transformer without its patch embedding: what EPCL keeps of it. Where its
    weights come from: `load_clip`, pretrained.py.

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
        print_warning(run.print, clip.name)


WARNINGS = {
    "random": "the transformer has RANDOM weights: these numbers say nothing about CLIP",
    "shuffled": "the transformer has SHUFFLED weights: these numbers say nothing about CLIP",
    "nano": "nano-CLIP is small and saw procedural objects: these numbers say nothing about CLIP"}


def print_warning(show, name):
    """What numbers with a --clip name are not worth, if anything."""
    kind = re.split("[=:]", name)[-1]
    kind = kind if kind in ("random", "shuffled") else name.split("=")[0]
    if kind in WARNINGS:
        show(f"warning  {WARNINGS[kind]}")
