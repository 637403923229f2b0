"""ShapeNet55 as Point-BERT publishes it, with the pictures of CLIP2Point's authors.

    ROOT/ShapeNet-55/{train,test}.txt               lines SYNSET-MODEL.npy
    ROOT/shapenet_pc/SYNSET-MODEL.npy               clouds (8192, 3), y up
    ROOT/rendering/SYNSET_MODEL/{0 .. 9}.png        or ROOT/../rendering: ten views of each model

    train, test, form = find("data/ShapeNet55")
    xyz = read_cloud(train[0].path)
    pictures = read_pictures(train[0].pictures, 224)
"""
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from data.files import load_npy, reading, text_of
from run import InputError

VIEWS = 10                                  # pictures of a model
SYNSETS = {     # in the order of the field's labels, by the names of the authors' prompts
    "02691156": "airplane", "02747177": "ashcan", "02773838": "bag", "02801938": "basket",
    "02808440": "bathtub", "02818832": "bed", "02828884": "bench", "02843684": "birdhouse",
    "02871439": "bookshelf", "02876657": "bottle", "02880940": "bowl", "02924116": "bus",
    "02933112": "cabinet", "02942699": "camera", "02946921": "can", "02954340": "cap",
    "02958343": "car", "02992529": "cellular telephone", "03001627": "chair", "03046257": "clock",
    "03085013": "computer keyboard", "03207941": "dishwasher", "03211117": "display",
    "03261776": "earphone", "03325088": "faucet", "03337140": "file", "03467517": "guitar",
    "03513137": "helmet", "03593526": "jar", "03624134": "knife", "03636649": "lamp",
    "03642806": "laptop", "03691459": "loudspeaker", "03710193": "mailbox",
    "03759954": "microphone", "03761084": "microwave", "03790512": "motorcycle", "03797390": "mug",
    "03928116": "piano", "03938244": "pillow", "03948459": "pistol", "03991062": "pot",
    "04004475": "printer", "04074963": "remote control", "04090263": "rifle", "04099429": "rocket",
    "04225987": "skateboard", "04256520": "sofa", "04330267": "stove", "04379243": "table",
    "04401088": "telephone", "04460130": "tower", "04468005": "train", "04530566": "vessel",
    "04554684": "washer"}
CLASSES = tuple(SYNSETS.values())
# the ten models without usable pictures that the authors leave out, as far as their first dash
NO_PICTURES = {f"03001627-{name}" for name in (
    "udf068a6b", "u6028f63e", "uca24feec", "u481ebf18", "u45c7b89f", "ub5d972a1", "u1e22cc04",
    "ue639c33f")} | {"04379243-", "02747177-"}
HOW_TO_GET = ("get ShapeNet55 as Point-BERT's DATASET.md says, and rendering/ as CLIP2Point's "
              "README does; pass --root FOLDER with ShapeNet-55/, shapenet_pc/ and rendering/")


class Model(NamedTuple):
    path: Path                              # of the cloud
    label: int
    pictures: list                          # paths, in the order of the views; () to test


def find(root):
    """-> models to train on, to test on, what is read. Every training model has its pictures."""
    root = Path(root or "data/ShapeNet55")
    lists = [root / "ShapeNet-55" / f"{part}.txt" for part in ("train", "test")]
    for path in (*lists, root / "shapenet_pc"):
        if not path.exists():
            raise InputError(f"--root {root}: found no {path.relative_to(root)}; {HOW_TO_GET}")
    drawn = next((p for p in (root / "rendering", root.parent / "rendering") if p.is_dir()), None)
    if drawn is None:
        raise InputError(f"--root {root}: found no rendering/ in it or beside it; {HOW_TO_GET}")
    train, test = ([model_of(root, path, line) for line in text_of(path.read_bytes()).split()]
                   for path in lists)
    left_out = [model for model in train if short(model) in NO_PICTURES]
    train = [with_pictures(drawn, model) for model in train if short(model) not in NO_PICTURES]
    if not train:
        raise InputError(f"{lists[0]}: lists no models; fetch it again")
    form = f"ShapeNet55 under {root}, pictures under {drawn}"
    if left_out:
        form += f"; left out as by the authors: {len(left_out)} models without pictures"
    return train, test, form


def model_of(root, path, line):
    synset = line.partition("-")[0]
    if synset not in SYNSETS:
        raise InputError(f"{path}: {line} is of none of the 55 classes; fetch the list again")
    return Model(root / "shapenet_pc" / line, list(SYNSETS).index(synset), ())


def short(model):
    """SYNSET-MODEL as far as the second dash: as the authors name a model."""
    return "-".join(model.path.stem.split("-")[:2])


def with_pictures(drawn, model):
    folder = drawn / short(model).replace("-", "_")
    pictures = [folder / f"{view}.png" for view in range(VIEWS)]
    missing = next((path for path in pictures if not path.is_file()), None)
    if missing:
        raise InputError(f"{missing}: missing, and {model.path.name} is listed to train on; fetch "
                         "the pictures again, or take the model out of train.txt")
    return model._replace(pictures=pictures)


def read_cloud(path, least=1024):
    """-> (P, 3) float32, as it stands."""
    with reading(path, "fetch it again"):
        xyz = load_npy(Path(path).read_bytes())
        if xyz.ndim != 2 or xyz.shape[1] < 3:
            raise ValueError(f"expected rows of x y z, found shape {xyz.shape}")
        if not np.isfinite(xyz).all():
            raise ValueError("has NaN or infinite coordinates")
        if len(xyz) < least:
            raise ValueError(f"has {len(xyz):,} points, fewer than {least:,}")
    return np.ascontiguousarray(xyz[:, :3], np.float32)


def read_pictures(paths, size):
    """-> (V, size, size, 3) uint8, white where they are transparent."""
    pictures = []
    for path in paths:
        with reading(path, "fetch it again"):
            with Image.open(path) as image:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image).convert("RGB")
            if image.width != image.height:
                raise ValueError(f"is {image.width} x {image.height} pixels, not square")
        if image.width != size:
            image = image.resize((size, size), Image.Resampling.BILINEAR)
        pictures.append(np.asarray(image))
    return np.stack(pictures)
