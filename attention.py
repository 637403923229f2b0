"""A transformer with its attention in the open: blocks, saliency, rows by layer, likeness.

    with opened(clip) as blocks:            # a FrozenCLIP of common.py
        logits, _ = model(points)           # what it computed before; blocks[i].A is (B, H, L, L)
        R = relevance(logits.amax(1), blocks)                   # (B, L)

    rows = see(clip, stem, pictures)        # pictures through the blocks that clouds go through

analyse.py looks into runs with it. B objects, L rows of each (class row first), H heads, D width, S
objects in all.
"""
import contextlib
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import stdtrit
from torch import nn

import common
import pretrained
from run import InputError

BATCH = 25                  # objects at a time
REMOVED = .1, .3, .5        # shares of a cloud's patches
DRAWS = 10                  # random choices of them
SHUFFLES = 1000             # permutations of the objects, to say what chance gives


# ---- Blocks --------------------------------------------------------------------------------------
class Open(nn.Module):
    """A block of open_clip or timm that shows what went in, its attention A and what came out.

    x + MSA(LN x), then + MLP(LN x), as the block itself computes it; but fused attention has no A.
    """

    def __init__(self, block):
        super().__init__()
        attn = block.attn
        if hasattr(attn, "in_proj_weight"):                             # open_clip
            self.norms, self.scales = (block.ln_1, block.ln_2), (block.ls_1, block.ls_2)
            self.qkv, self.join = (attn.in_proj_weight, attn.in_proj_bias), attn.out_proj
        else:                                                           # timm
            self.norms, self.scales = (block.norm1, block.norm2), (block.ls1, block.ls2)
            self.qkv, self.join = (attn.qkv.weight, attn.qkv.bias), attn.proj
        self.heads, self.mlp = attn.num_heads, block.mlp

    def forward(self, x):                                               # (B, L, D)
        self.before = x
        qkv = F.linear(self.norms[0](x), *self.qkv).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                            # (B, H, L, D / H)
        self.A = (q @ k.mT / k.shape[-1] ** 0.5).softmax(-1)            # (B, H, L, L)
        x = x + self.scales[0](self.join((self.A @ v).transpose(1, 2).flatten(2)))
        self.after = x + self.scales[1](self.mlp(self.norms[1](x)))
        return self.after


@contextlib.contextmanager
def opened(clip):
    """The blocks of FrozenCLIP, replaced by open ones for a while."""
    fast = clip.blocks
    clip.blocks = nn.ModuleList(map(Open, fast))
    try:
        yield clip.blocks
    finally:
        clip.blocks = fast


@torch.no_grad()
def check_open(model, points):
    """Other blocks than those two, or ones with more in them, are refused, not misread."""
    clip = model.encoder.clip
    fast = model(points)[0]
    try:
        with opened(clip):
            gap = (model(points)[0] - fast).abs().max().item()
    except (AttributeError, RuntimeError) as error:
        gap = str(error)
    if isinstance(gap, str) or gap > 1e-3 * max(1, fast.abs().max().item()):
        raise InputError(f"--clip {clip.name}: its blocks are not those of a plain ViT, with open "
                         f"attention logits differ ({gap}); take a run with another transformer")


def relevance(score, blocks):
    """How much each token mattered to the class row: score (B,) -> (B, L).

    Chefer et al., ICCV 2021, over all blocks: R = 1; R += mean over heads of (dscore/dA * A)+, @ R.
    EPCL's head reads the maximum over patch and task rows, too; that path this rule does not see.
    """
    grads = torch.autograd.grad(score.sum(), [block.A for block in blocks])
    B, _, L, _ = grads[0].shape
    R = torch.eye(L).to(grads[0]).expand(B, L, L)
    for block, grad in zip(blocks, grads):
        R = R + (grad * block.A.detach()).clamp(min=0).mean(1) @ R
    return R[:, 0]


# ---- Pictures ------------------------------------------------------------------------------------
class Stem(NamedTuple):
    """The start of an image tower, which EPCL leaves out."""
    conv: nn.Module         # (B, 3, size, size) -> (B, D, P rows and columns)
    position: torch.Tensor  # (P, D)
    size: int
    mean: torch.Tensor      # (3, 1, 1), of a picture in 0 .. 1
    std: torch.Tensor


def load_stem(name, seed, device):
    """Of a --clip name; that of NAME=shuffled is NAME's."""
    base = pretrained.base_of(name)
    if base.startswith("timm:"):
        vit, _, path = base[5:].partition("=")
        tower = pretrained.timm_model(vit, path, seed, (*pretrained.TIMM_USED, "patch_embed."))
        conv, norm = tower.patch_embed.proj, tower.default_cfg
        if conv.in_channels != 3:
            raise InputError(f"--clip {name}: its patch embedding is a network, not one product "
                             "for each patch; take a run with another transformer")
        size, position = tower.patch_embed.img_size[0], tower.pos_embed[0]
        position = position[-tower.patch_embed.num_patches:]            # without the class token's
    else:
        used = *pretrained.OPEN_CLIP_USED, "visual.conv1."
        visual = pretrained.whole_clip(base, seed, used)[1].visual
        conv, size, position = visual.conv1, visual.image_size[0], visual.positional_embedding[1:]
        norm = getattr(visual, "preprocess_cfg", {"mean": [.5] * 3, "std": [.5] * 3})   # nano's
    mean, std = (torch.tensor(norm[key], device=device)[:, None, None] for key in ("mean", "std"))
    return Stem(conv.requires_grad_(False).to(device), position.detach().to(device), size, mean,
                std)


def see(clip, stem, pictures):
    """Pictures (B, 3, size, size) through the blocks that clouds go through -> (B, 1 + P, D)."""
    x = stem.conv((pictures - stem.mean) / stem.std).flatten(2).mT + stem.position      # (B, P, D)
    x = torch.cat([clip.start().expand(len(x), -1, -1), x], 1)
    x = clip.ln_pre(x.requires_grad_())     # `relevance` needs gradients, whatever is frozen
    for block in clip.blocks:
        x = block(x)
    return x


# ---- Saliency ------------------------------------------------------------------------------------
def cloud_relevance(model, points):
    """Relevance to the class that is predicted. -> tokens, centers, logits, relevance (B, L)."""
    tokens, centers = model.tokenizer(points)
    with opened(model.encoder.clip) as blocks:
        logits, _ = model.read(*model.encoder(tokens, centers))
        return tokens, centers, logits, relevance(logits.amax(1), blocks)


def picture_relevance(clip, stem, pictures, text):
    """The same for the likeliest of texts (C, E), of length 1. -> its number, relevance (B, L)."""
    with opened(clip) as blocks:
        feature = clip.project(see(clip, stem, pictures)[:, 0])
        scores = F.normalize(feature, dim=1) @ text.to(feature).T       # (B, C)
        return scores.argmax(1), relevance(scores.amax(1), blocks)


def deletion(model, points, label):
    """Accuracy on clouds (S, N, 3) whose most or least relevant patches are left out, or random
    ones: their rows go, points of theirs may stay in patches that overlap. Nothing is trained.

    -> {"removed": [shares of objects named rightly, and their differences to random ones with a
    95 % interval over objects], ...}
    """
    draw = torch.Generator(points.device).manual_seed(0)
    G = model.tokenizer.groups
    counts = [max(1, round(share * G)) for share in REMOVED]
    found, shares = [], []
    for part, true in zip(points.split(BATCH), label.split(BATCH)):
        tokens, centers, logits, R = cloud_relevance(model, part)
        shares.append(R[:, 1 + G:].sum(1) / R[:, 1:].sum(1))            # on task tokens
        order = R[:, 1:1 + G].argsort(dim=1, descending=True, stable=True)
        chance = torch.rand(DRAWS, *order.shape, device=points.device, generator=draw).argsort(2)
        right = [logits.argmax(1) == true]
        for count in counts:
            for some in (order, order.flip(1), *chance):
                kept = [common.gather(x, some[:, count:]) for x in (tokens, centers)]
                with torch.no_grad():
                    right.append(model.read(*model.encoder(*kept))[0].argmax(1) == true)
        found.append(torch.stack(right).float())
    found = torch.cat(found, 1)                     # (1 + counts x (2 + DRAWS), S)
    steps = []
    for count, (most, least, *chance) in zip(counts, found[1:].split(2 + DRAWS)):
        chance = torch.stack(chance).mean(0)        # (S,)
        steps.append({
            "patches": count, "of": G, "most_relevant": most.mean().item(),
            "least_relevant": least.mean().item(), "random": chance.mean().item(),
            "most_relevant_minus_random": interval(most - chance),
            "least_relevant_minus_random": interval(least - chance)})
    T = R.shape[1] - 1 - G
    return {"accuracy": found[0].mean().item(), "removed": steps, "random_draws": DRAWS,
            "relevance_on_task_tokens": torch.cat(shares).mean().item(),
            "task_tokens_among_rows": T / (T + G)}


def interval(x):
    """Mean of (S,), and its 95 % interval over objects."""
    mean, half = x.mean().item(), stdtrit(len(x) - 1, 0.975) * x.std().item() / len(x) ** 0.5
    return [mean, mean - half, mean + half]


# ---- Rows, block by block ------------------------------------------------------------------------
class Layers(NamedTuple):
    """Rows after `ln_pre` (0) and after each block (1 .. N)."""
    cls: torch.Tensor       # (N + 1, S, D) class row
    mean: torch.Tensor      # (N + 1, S, D) mean of the patch rows
    numbers: dict           # of what `tokens.png` shows, a value for each layer


@torch.no_grad()
def layers_of(clip, forward, inputs, patches):
    """forward: runs the blocks on a part of inputs (S, ...); patches: rows 1 .. patches."""
    cls, mean, norm, change, moment, total = [], [], [], [], 0, 0
    with opened(clip) as blocks:
        for part in inputs.split(BATCH):
            forward(part)
            x = torch.stack([blocks[0].before, *(block.after for block in blocks)])
            x = x[:, :, :1 + patches].double()                          # (N + 1, B, 1 + G, D)
            cls.append(x[:, :, 0])
            mean.append(x[:, :, 1:].mean(2))
            norm.append(x.norm(dim=3))                                  # (N + 1, B, 1 + G)
            change.append((x[1:] - x[:-1]).norm(dim=3))                 # (N, B, 1 + G)
            rows = x[:, :, 1:].flatten(1, 2)                            # (N + 1, B G, D)
            moment, total = moment + rows.mT @ rows, total + rows.sum(1)
    cls, mean, norm, change = (torch.cat(some, 1) for some in (cls, mean, norm, change))
    n = len(inputs) * patches
    covariance = moment / n - (total[:, :, None] @ total[:, None]) / n ** 2     # (N + 1, D, D)
    of_cls = cls - cls.mean(1, keepdim=True)
    return Layers(cls, mean, {
        "norm_patches": norm[:, :, 1:].mean((1, 2)).tolist(),
        "norm_class": norm[:, :, 0].mean(1).tolist(),
        "change_patches": change[:, :, 1:].mean((1, 2)).tolist(),
        "change_class": change[:, :, 0].mean(1).tolist(),
        "rank_patches": effective_rank(covariance).tolist(),
        "rank_class": [None, *effective_rank(of_cls.mT @ of_cls)[1:].tolist()]})    # one row at 0


def effective_rank(covariance):
    """The participation ratio of its eigenvalues, (sum e)² / sum e²: (..., D, D) -> (...)."""
    trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
    return trace ** 2 / covariance.square().sum((-2, -1)).clamp(min=1e-300)


def layers_of_clouds(model, points):
    return layers_of(model.encoder.clip, lambda x: model.encoder(*model.tokenizer(x)), points,
                     model.tokenizer.groups)


def layers_of_pictures(clip, stem, pictures):
    return layers_of(clip, lambda x: see(clip, stem, x), pictures, len(stem.position))


@torch.no_grad()
def projected(clip, layers):
    """Class rows after the last block, as CLIP reads them: (S, E)."""
    return clip.project(layers.cls[-1].float())


def settle(model, points):
    """Give an untrained tokenizer's batch norms the statistics of these clouds, as training would;
    theirs are those of nothing."""
    norms = [part for part in model.tokenizer.modules() if isinstance(part, common.BatchNorm)]
    for part in norms:
        part.momentum = None                # the mean over all batches
    model.tokenizer.train()
    with torch.no_grad():
        for part in points.split(BATCH):
            model.tokenizer(part)
    model.eval()


# ---- Likeness ------------------------------------------------------------------------------------
def pearson(a, b):
    """Correlations over the D numbers of features a (S, D), b (S, D) -> (S, S), after each side's
    mean feature is subtracted: what all clouds share would correlate with anything."""
    a, b = (x - x.mean(0) for x in (a, b))
    a, b = (F.normalize(x - x.mean(1, keepdim=True), dim=1) for x in (a, b))
    return a @ b.T


def alignment(C, label, seed=0):
    """Correlations C (S, S), cloud by picture -> how much more alike the same object is."""
    S = len(C)
    own = torch.eye(S, dtype=torch.bool, device=C.device)
    same = label[:, None] == label
    nearest = C.argmax(1).cpu()                                         # the picture most alike
    rng = np.random.default_rng(seed)
    shuffled = torch.from_numpy(np.stack([rng.permutation(S) for _ in range(SHUFFLES)]))
    kinds = label.cpu()

    def hits(truth, at):                    # (..., S) -> share that is met, under permutations
        return (truth == at).double().mean(-1)

    others = C[~own].mean()
    gap = (C.cpu()[torch.arange(S), shuffled].mean(1) - others.cpu()).double()
    by_object = hits(torch.arange(S), shuffled[:, nearest])
    by_class = hits(kinds, kinds[shuffled[:, nearest]])
    return {"matched": C[own].mean().item(), "same_class": mean_or_none(C[same & ~own]),
            "mismatched": mean_or_none(C[~same]), "gap": (C[own].mean() - others).item(),
            "gap_permuted": [gap.quantile(q).item() for q in (0.025, 0.975)],
            "top1": hits(torch.arange(S), nearest).item(),
            "top1_class": hits(kinds, kinds[nearest]).item(),
            "top1_permuted": [by_object.mean().item(), by_object.quantile(0.975).item()],
            "top1_class_permuted": [by_class.mean().item(), by_class.quantile(0.975).item()]}


def mean_or_none(x):
    return x.mean().item() if len(x) else None


def alignments(clip, clouds, pictures, label):
    """`alignment` by layer, of class rows (the first is the same in all) and of mean patch rows;
    and of the class row as CLIP reads it."""
    def by_layer(a, b):
        return [alignment(pearson(x, y), label) for x, y in zip(a, b)]
    return {"class_row": [None, *by_layer(clouds.cls[1:], pictures.cls[1:])],
            "mean_of_patches": by_layer(clouds.mean, pictures.mean),
            "projected": alignment(pearson(*(projected(clip, x) for x in (clouds, pictures))),
                                   label)}
