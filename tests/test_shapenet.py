"""data/shapenet.py on small files in the published form."""
import shutil

import numpy as np
import pytest
from PIL import Image

from data import shapenet
from run import InputError

TRAIN = ["02691156-1a04e3", "03001627-u1e22cc04-04a5", "03001627-99b", "04379243--c5d"]
TEST = ["04554684-77"]


@pytest.fixture
def root(tmp_path):
    publish(tmp_path / "ShapeNet55")
    return tmp_path / "ShapeNet55"


def publish(root):
    """Four models to train on, two of which the authors leave out, and one to test on."""
    (root / "ShapeNet-55").mkdir(parents=True)
    (root / "shapenet_pc").mkdir()
    for part, names in (("train", TRAIN), ("test", TEST)):
        lines = "".join(f"{name}.npy\n" for name in names)
        (root / f"ShapeNet-55/{part}.txt").write_text(lines)
        for i, name in enumerate(names):
            xyz = np.random.default_rng(i).normal(size=(1100, 3)).astype(np.float32)
            np.save(root / f"shapenet_pc/{name}.npy", xyz)
    for name in ("02691156_1a04e3", "03001627_99b"):
        (root / "rendering" / name).mkdir(parents=True)
        for view in range(10):
            Image.new("RGB", (8, 8), (20 * view, 0, 9)).save(root / f"rendering/{name}/{view}.png")


def test_models_come_with_their_pictures_in_the_order_of_the_views(root):
    train, test, form = shapenet.find(root)
    assert [model.path.stem for model in train] == [TRAIN[0], TRAIN[2]]
    assert [shapenet.CLASSES[model.label] for model in (*train, *test)] == [
        "airplane", "chair", "washer"]
    assert "left out as by the authors: 2 models without pictures" in form
    pictures = shapenet.read_pictures(train[1].pictures, 8)
    assert pictures.shape == (10, 8, 8, 3) and pictures.dtype == np.uint8
    assert pictures[:, 3, 3].tolist() == [[20 * view, 0, 9] for view in range(10)]
    assert shapenet.read_pictures(train[1].pictures, 4).shape == (10, 4, 4, 3)
    xyz = shapenet.read_cloud(train[0].path)
    assert np.array_equal(xyz, np.load(root / f"shapenet_pc/{TRAIN[0]}.npy"))
    assert len(shapenet.CLASSES) == len(set(shapenet.CLASSES)) == 55


def test_pictures_may_lie_beside_the_clouds_as_in_the_release(root):
    (root / "rendering").rename(root.parent / "rendering")
    assert shapenet.find(root)[0][0].pictures[9] == (
        root.parent / "rendering/02691156_1a04e3/9.png")


def test_transparent_pictures_are_on_white(root):
    path = root / "clear.png"
    Image.new("RGBA", (8, 8), (9, 9, 9, 0)).save(path)
    assert (shapenet.read_pictures([path], 8) == 255).all()


@pytest.mark.parametrize("change, words", [
    (lambda root: shutil.rmtree(root / "rendering"), "found no rendering/ in it or beside it; get"),
    (lambda root: (root / "ShapeNet-55/test.txt").unlink(), "found no ShapeNet-55/test.txt; get"),
    (lambda root: (root / "rendering/03001627_99b/4.png").unlink(),
     "03001627_99b/4.png: missing, and 03001627-99b.npy is listed"),
    (lambda root: (root / "ShapeNet-55/train.txt").write_text("12345678-9.npy"),
     "train.txt: 12345678-9.npy is of none of the 55 classes"),
    (lambda root: (root / "ShapeNet-55/train.txt").write_text(""), "train.txt: lists no models"),
])
def test_what_is_missing_is_one_line(root, change, words):
    change(root)
    with pytest.raises(InputError, match=words):
        shapenet.find(root)


def test_a_broken_cloud_or_picture_is_named(root):
    path = root / "shapenet_pc/x.npy"
    for content, words in ((np.zeros((9, 3)), "x.npy: has 9 points, fewer than 1,024; fetch"),
                           (np.zeros(9), "x.npy: expected rows of x y z, found shape"),
                           (np.full((2000, 3), np.nan), "x.npy: has NaN or infinite")):
        np.save(path, content)
        with pytest.raises(InputError, match=words):
            shapenet.read_cloud(path)
    picture = root / "rendering/03001627_99b/0.png"
    whole = picture.read_bytes()
    picture.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(InputError, match="0.png: .*; fetch it again"):
        shapenet.read_pictures([picture], 8)
    Image.new("RGB", (8, 9)).save(picture)
    with pytest.raises(InputError, match="0.png: is 8 x 9 pixels, not square"):
        shapenet.read_pictures([picture], 8)
