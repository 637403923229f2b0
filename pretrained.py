"""The frozen weights that --clip names: CLIP's by open_clip, a ViT of timm's, our nano-CLIP.

    clip = load_clip("openai")              # a FrozenCLIP, common.py
    clip = load_clip("nano=shuffled")       # a control: sizes and norms without the knowledge

A file of weights is never trusted as code, and the weights that it must have are all there or the
run ends with one line.
"""
import logging
import re
import sys
import warnings
from argparse import Namespace

import torch
from torch import nn

from checkpoint import load_weights
from common import FrozenCLIP
from run import InputError, check_weights, rank, weights_of

# ---- From a name to the frozen transformer -------------------------------------------------------
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


@torch.no_grad()
def shuffle(parts, seed):
    """Permute the weights within each matrix: the same sizes and norms, and no knowledge."""
    draw = torch.Generator().manual_seed(seed)
    for part in parts.values():
        for weight in part.parameters() if isinstance(part, nn.Module) else [part]:
            if weight is not None and weight.ndim > 1:
                order = torch.randperm(weight.numel(), generator=draw)
                weight.copy_(weight.flatten()[order].view_as(weight))


# ---- CLIP, by open_clip; nano-CLIP ---------------------------------------------------------------
OPENAI_MODELS = {           # by the shape of the patch embedding, (D, 3, P, P)
    (768, 3, 32, 32): "ViT-B-32-quickgelu", (768, 3, 16, 16): "ViT-B-16-quickgelu",
    (1024, 3, 14, 14): "ViT-L-14-quickgelu"}
# the weights that are used, by the beginnings of their names; patch embedding and heads are not
VISUAL_USED = ("class_embedding", "positional_embedding", "ln_", "transformer.", "proj")
OPEN_CLIP_USED = (*(f"visual.{name}" for name in VISUAL_USED), "token_embedding", "transformer.",
                  "positional_embedding", "ln_final", "text_projection")


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


# ---- A plain ViT, by timm ------------------------------------------------------------------------
TIMM_USED = ("cls_token", "pos_embed", "norm", "blocks.")


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


# ---- Files of weights ----------------------------------------------------------------------------
# keys under which a file may hold its state dict; as timm
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "module", "base_model")


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
