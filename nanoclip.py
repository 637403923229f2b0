"""nano-CLIP: open_clip's own CLIP class in a small configuration, and a tokenizer of whole words.

    model, tokenize = load()                            # data/nanoclip.safetensors, checked
    model.encode_text(tokenize(["a photo of a chair"]))                 # (1, 512)

train_clip.py trains it on pictures of procedural objects, and --clip nano takes it as any other
CLIP. It is there to run, test and teach the method without a download; what it reaches says nothing
about CLIP.
"""
import hashlib
import json
import re
from pathlib import Path

import torch
from torch import nn

from checkpoint import load_weights, misfit
from run import InputError, check_weights

FILE = Path(__file__).parent / "data" / "nanoclip.safetensors"
SHA256 = "5b83a1b0b5eef39ed2d8a8483a4e1dc7d56624f6933943c59ce4c8c25f33b754"   # of FILE
DEPTH_FILE = FILE.with_name("nanodepth.safetensors")    # what train_clip2point.py made of it
DEPTH_SHA256 = "d45f1e45750c34775953e71c06c2a8c1cf5460826321c9a921408c20873e84cb"
SIZE = range(1, 1025)               # a larger one would be built before it is refused
ABOUT = {                       # form of what the file says of itself; checkpoint.misfit
    "words": [str], "config": {
        "embed_dim": SIZE, "stem": SIZE,
        "vision_cfg": {"layers": range(1, 25), "width": SIZE, "head_width": SIZE,
                       "patch_size": SIZE, "image_size": SIZE, "patch_dropout": float,
                       "ls_init_value": (None, float)},
        "text_cfg": {"context_length": SIZE, "width": SIZE, "heads": SIZE,
                     "layers": range(1, 25)}}}


class UnknownWords(LookupError):
    """Prompts have words that the text tower never saw: these."""


class Words:
    """Texts -> (n, length) int64: <start>, one number for each word, <end>, zeros.

    CLIP's text tower reads the row of the highest number, so <end> is the last of the list.
    """

    def __init__(self, words, length):
        self.words, self.length = ["<pad>", "<start>", *words, "<end>"], length
        self.number = {word: i for i, word in enumerate(self.words)}

    def __call__(self, texts):
        split = [re.findall(r"[a-z0-9]+", text.lower())[:self.length - 2] for text in texts]
        unknown = sorted({word for words in split for word in words} - self.number.keys())
        if unknown:
            raise UnknownWords(", ".join(unknown)[:200])
        rows = [[1, *map(self.number.get, words), len(self.words) - 1] for words in split]
        return torch.tensor([row + [0] * (self.length - len(row)) for row in rows])


def build(config, words):
    """-> open_clip's CLIP with random weights, its tokenizer.

    config: the settings of open_clip's `CLIP`, and `stem`: channels of the first convolution. A few
    3 x 3 convolutions of stride 2 stand for the patch embedding: with few pictures they learn
    faster than one product per patch (Xiao et al. 2021, "Early convolutions help transformers").
    EPCL leaves out both.
    """
    from open_clip.model import CLIP                    # takes seconds
    config = dict(config)
    channels = config.pop("stem")
    tokenize = Words(words, config["text_cfg"]["context_length"])
    config["text_cfg"] = {**config["text_cfg"], "vocab_size": len(tokenize.words)}
    model = CLIP(**config)
    layers, before, patch = [], 3, config["vision_cfg"]["patch_size"]
    while patch > 1:
        layers += [nn.Conv2d(before, channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels),
                   nn.ReLU()]
        before, channels, patch = channels, 2 * channels, patch // 2
    model.visual.conv1 = nn.Sequential(*layers,
                                       nn.Conv2d(before, config["vision_cfg"]["width"], 1))
    return model, tokenize


def save(path, model, config, words):
    """Weights in fp16, configuration and words in the metadata: one file that needs no other."""
    from safetensors.torch import save_file
    # one entry: safetensors writes several in random order, and the same run makes the same file
    about = {"nanoclip": json.dumps({"config": config, "words": words})}
    save_file(halved(model), path, about)


def halved(model):
    """Its weights in fp16, counts as they are."""
    state = {name: w.detach().cpu().contiguous() for name, w in model.state_dict().items()}
    return {name: w.half() if w.is_floating_point() else w for name, w in state.items()}


def load(path=None, seed=None):
    """-> model in eval mode, its tokenizer. Without a path: the one of this repository, whose
    sha256 must be the right one. seed: random weights of the same sizes instead."""
    from safetensors import safe_open
    if path is None:
        path = FILE
        if not path.is_file():
            raise InputError(f"--clip nano: {path} is missing; copy it from nanoEPCL, too, or make "
                             "one with python train_clip.py and pass --clip "
                             "nano=RUN/nanoclip.safetensors")
        if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
            raise InputError(f"--clip nano: {path} is not the file of this repository; restore it, "
                             f"or pass --clip nano={path} if you made it")
    check_weights(path, "--clip")
    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["nanoclip"])
            state = {name: file.get_tensor(name) for name in file.keys()}
        if misfit(about, ABOUT, "it"):
            raise ValueError
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed or 0)
            model, tokenize = build(about["config"], about["words"])
    except Exception:                   # whatever a changed file leads to
        raise InputError(f"--clip nano: {path} is not a file that train_clip.py wrote, or cut "
                         "short") from None
    if seed is None:
        load_weights(model, state, where=f"--clip nano: {path}: its weights", what="its config")
    return model.eval(), tokenize


def save_depth(path, tower, image):
    """A depth tower in fp16. image: fingerprint of the image tower that it was taught by."""
    from safetensors.torch import save_file
    save_file(halved(tower), path, {"image": image})


def load_depth(tower, image):
    """The depth tower of this repository into `tower`, a copy of the image tower."""
    from safetensors import safe_open
    if not DEPTH_FILE.is_file():
        raise InputError(f"{DEPTH_FILE}: is missing; restore it, or make one with python "
                         "train_clip2point.py and pass --eval RUN")
    if hashlib.sha256(DEPTH_FILE.read_bytes()).hexdigest() != DEPTH_SHA256:
        raise InputError(f"{DEPTH_FILE}: is not the file of this repository; restore it, or pass "
                         "--eval RUN if you trained it")
    with safe_open(DEPTH_FILE, "pt") as file:
        if file.metadata()["image"] != image:
            raise InputError(f"{DEPTH_FILE}: was taught by another nano-CLIP than {FILE}; restore "
                             "both, or make one with python train_clip2point.py")
        tower.load_state_dict({name: file.get_tensor(name) for name in file.keys()})
