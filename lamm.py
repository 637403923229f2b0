"""The EPCL detector that LAMM released -> FrozenCLIP and weights of train_det.py's `Detector`.

The paper's authors gave out no detector of its first version, but github.com/OpenGVLab/LAMM names
one: ViT-L/14, 256 tokens in two levels, ScanNet's 18 classes. Its file is a checkpoint of 3DETR,
{"model": weights, "args": the flags it was trained with, ...}:

    python train_det.py --data scannet --root DIR --init-official epcl_scannet_vit-L-14_...pth
"""
from argparse import Namespace

import torch

import pretrained
from checkpoint import load_weights
from common import FrozenCLIP
from run import InputError

CLIP = "encoder.clip_vit."                  # the beginning of the names of CLIP's weights
RENAMED = (                                 # parts of LAMM's names -> ours, one after the other
    ("pre_encoder.layers.0.mlp_module.", "tokenizer.before.mlp."),
    ("pre_encoder.layers.1.mlp_module.", "tokenizer.mlp."),
    ("layer0.conv.", "0."), ("layer0.bn.bn.", "1."),
    ("layer1.conv.", "3."), ("layer1.bn.bn.", "4."),
    ("encoder.pos_embed.", "encoder.position."),
    ("te_encoder.embedding.", "encoder.task.embedding."),
    ("te_encoder.trans.", "encoder.task.mlp."),
    ("encoder_to_decoder_projection.layers.", "project."),
    ("pos_embedding.gauss_B", "fourier"),
    ("query_projection.layers.", "query_mlp."),
    ("decoder.norm.", "norm."), ("decoder.layers.", "decoder."),
    (".self_attn.", ".own."), (".multihead_attn.", ".cross."),
    (".norm1.", ".norms.0."), (".norm2.", ".norms.1."), (".norm3.", ".norms.2."),
    (".linear1.", ".ffn.0."), (".linear2.", ".ffn.3."),
    ("mlp_heads.sem_cls_head.layers.", "heads.logits."),
    ("mlp_heads.center_head.layers.", "heads.center."),
    ("mlp_heads.size_head.layers.", "heads.size."),
    ("mlp_heads.angle_cls_head.layers.", "heads.angle_class."),
    ("mlp_heads.angle_residual_head.layers.", "heads.angle."))
SIZES = {                                   # its flags -> the recipe's; no weight shows them
    "vit_num_token": "tokens", "preenc_npoints": "fine", "nqueries": "queries",
    "dec_nlayers": "layers"}


def released_sizes(args):
    """What the file --init-official says of its own sizes, as fields of the recipe."""
    path = args.official
    if args.clip or args.unfreeze:
        raise InputError("--init-official brings its own transformer, which stays frozen; leave "
                         "--clip and --unfreeze out")
    try:
        with torch.serialization.safe_globals([Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        flags = vars(content["args"])
        sizes = [flags.get(name, 1) for name in (*SIZES, "dec_nhead")]
        if not all(type(size) is int and 0 < size < 2**20 for size in sizes):
            raise ValueError
    except Exception:
        flags, (state, _) = {}, pretrained.read_weights(path, "--init-official")
        visual_of(path, state)                                  # both say what is wrong with it
    if args.tokens is None and "vit_num_token" not in flags:
        raise InputError(f"--init-official {path}: does not say how many tokens it was trained "
                         "with; pass --tokens 256, if it is LAMM's of 256 tokens")
    if flags.get("dec_nhead", 4) != 4:
        raise InputError(f"--init-official {path}: its decoder has {flags['dec_nhead']} heads; "
                         "DecoderLayer in train_det.py has 4, change it there")
    return {ours: flags[theirs] for theirs, ours in SIZES.items() if theirs in flags}


def visual_of(path, state):
    """-> CLIP's weights in the file, open_clip's name of their model."""
    visual = {name.removeprefix(CLIP): w for name, w in state.items() if name.startswith(CLIP)}
    patch = visual.get("conv1.weight", torch.empty(0)).shape
    if patch not in pretrained.OPENAI_MODELS:
        raise InputError(f"--init-official {path}: not LAMM's detector: it has no {CLIP}"
                         "conv1.weight of a ViT of OpenAI; give its epcl_scannet_...pth")
    return visual, pretrained.OPENAI_MODELS[patch]


def load_released(path):
    """-> FrozenCLIP with the file's weights, state dict of `Detector`."""
    state, _ = pretrained.read_weights(path, "--init-official")
    visual, name = visual_of(path, state)
    ours = {}
    for theirs, value in state.items():
        if not theirs.startswith(CLIP):
            mine = theirs
            for part, renamed in RENAMED:
                mine = mine.replace(part, renamed)
            ours[mine] = value.flatten(1) if value.ndim > 2 else value      # a 1x1 convolution
    model, _ = pretrained.open_clip_model(name)
    load_weights(model.visual, visual, pretrained.VISUAL_USED,
                 f"--init-official {path}: its {CLIP}*", name)
    return FrozenCLIP(f"official:{path}", name, pretrained.open_clip_parts(model.visual)), ours
