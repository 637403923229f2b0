"""train_cls.py and objects.py: official formats, broken input, the loop, resume, several processes."""
import io
import json
import os
import pickle
import re
import signal
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import objects
import train_cls
from common import InputError
from objects import load_objects

ROOT = Path(__file__).parent.parent
CUBE = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)], np.float32)
FACES = [[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]]


def off(vertices=CUBE, faces=FACES, header="OFF\n{} {} 0\n"):
    lines = [header.format(len(vertices), len(faces))]
    lines += ["{} {} {}\n".format(*v) for v in vertices]
    lines += [" ".join(map(str, [len(f), *f])) + "\n" for f in faces]
    return "".join(lines).encode()


def array(content, save=np.save, **more):
    file = io.BytesIO()
    save(file, content, **more)
    return file.getvalue()


def pcd(points, kind, block=b""):
    header = ("# .PCD v0.7\nVERSION 0.7\nFIELDS rgb x y z\nSIZE 4 4 4 4\nTYPE U F F F\nCOUNT 1 1 1 1\n"
              f"WIDTH {len(points)}\nHEIGHT 1\nVIEWPOINT 0 0 0 1 0 0 0\nPOINTS {len(points)}\nDATA {kind}\n")
    return header.encode() + block


def pcd_rows(points):
    rows = np.zeros(len(points), [("rgb", "u4"), ("xyz", "f4", 3)])
    rows["xyz"] = points
    return rows


def pcd_columns(points):
    """One LZF block whose bytes are all written out: runs of at most 32."""
    data = bytes(4 * len(points)) + np.ascontiguousarray(points.T).tobytes()
    packed = b"".join(bytes([len(data[i:i + 32]) - 1]) + data[i:i + 32] for i in range(0, len(data), 32))
    return struct.pack("<II", len(packed), len(data)) + packed


def ply(points):
    head = (f"ply\nformat binary_little_endian 1.0\nelement vertex {len(points)}\nproperty float x\n"
            "property float y\nproperty float z\nend_header\n")
    return head.encode() + points.astype("<f4").tobytes()


CLOUD = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
TEXT = "\n".join(" ".join(map(repr, map(float, p))) for p in CLOUD)


# --- files ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("suffix, blob", [
    (".npy", array(CLOUD)),
    (".npy", array(np.c_[CLOUD, np.zeros((50, 3))].astype(np.float64))),
    (".npz", array(np.zeros(2), np.savez, points=CLOUD)),
    (".xyz", TEXT.encode()),
    (".txt", ("# a remark\n" + TEXT.replace(" ", ",")).encode()),
    (".csv", ("x;y;z\n" + TEXT.replace(" ", ";")).encode()),
    (".ply", ply(CLOUD)),
    (".pcd", pcd(CLOUD, "ascii", "\n".join("0 " + line for line in TEXT.split("\n")).encode())),
    (".pcd", pcd(CLOUD, "binary", pcd_rows(CLOUD).tobytes())),
    (".pcd", pcd(CLOUD, "binary_compressed", pcd_columns(CLOUD))),
])
def test_a_cloud_is_read_as_it_is_from_every_format(suffix, blob):
    xyz, faces = objects.read_object(blob, suffix)
    assert faces is None and xyz.dtype == np.float32
    np.testing.assert_allclose(xyz, CLOUD, rtol=1e-6)


def test_lzf_copies_what_it_wrote_even_where_the_copy_overlaps_itself():
    # 'ab', then 7 bytes from 2 back: abababab + a; then a long copy, 7 + 3 + 2 = 12 bytes from 9 back
    assert objects.lzf(bytes([1]) + b"ab" + bytes([5 << 5, 1]) + bytes([7 << 5, 3, 8]), 21) == \
        b"ababababa" + b"ababababaaba"


@pytest.mark.parametrize("suffix, blob", [
    (".off", off()),
    (".off", off(header="OFF{} {} 0\n")),                            # ModelNet's glued header
    (".off", b"# made by hand\n" + off().replace(b"OFF\n", b"OFF\n\n# counts\n")),
    (".obj", ("".join("v {} {} {}\n".format(*v) for v in CUBE) + "".join(
        "f " + " ".join(f"{i + 1}//1" for i in f) + "\n" for f in FACES) + "vn 0 0 1\n").encode()),
])
def test_a_mesh_keeps_its_surface_and_is_sampled_on_it(suffix, blob, tmp_path):
    xyz, faces = objects.read_object(blob, suffix)
    corners = xyz[faces]                                             # polygons were cut into triangles
    area = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1).sum() / 2
    assert len(faces) == 12 and area == pytest.approx(6)
    (tmp_path / f"cube{suffix}").write_bytes(blob)
    points, count = objects.prepare(objects.Source("c/cube", 0, str(tmp_path / f"cube{suffix}")), 600)
    assert points.shape == (600, 3) and count == 600
    assert np.isclose(np.abs(points - 0.5).max(1), 0.5, atol=1e-6).all()


@pytest.mark.parametrize("name, blob, words", [
    ("cut.off", off()[:-25], "cut short"),
    ("lines.off", b"\n".join(off().split(b"\n")[:-4]), "cut short"),
    ("noface.off", off(faces=[]), "no faces"),
    ("flat.off", off(faces=[[0, 0, 1], [2, 2, 2]]), "area"),
    ("nan.off", off(np.where(CUBE == 1, np.nan, CUBE)), "NaN"),
    ("far.off", off(faces=[[0, 1, 99]]), "outside the range|names vertex 99"),
    ("words.off", b"OFF\nnot a mesh\n", "words.off"),
    ("cut.ply", ply(CLOUD)[:-100], "cut.ply"),
    ("cut.npy", array(CLOUD)[:-100], "cut.npy"),
    ("object.npy", array(np.array([{}], dtype=object), allow_pickle=True), "allow_pickle"),
    ("flat.npy", array(CLOUD[:, :2]), r"rows of x y z, found float32 of shape \(50, 2\)"),
    ("nan.npy", array(np.where(CLOUD > 1, np.nan, CLOUD)), "of 50 points are NaN"),
    ("same.npy", array(np.zeros((50, 3))), "coincide"),
    ("empty.xyz", b"", "empty.xyz"),
    ("cut.pcd", pcd(CLOUD, "binary", pcd_rows(CLOUD).tobytes()[:-9]), "cut.pcd"),
    ("cut2.pcd", pcd(CLOUD, "binary_compressed", pcd_columns(CLOUD)[:-9]), "cut2.pcd"),
    ("head.pcd", b"VERSION 0.7\nFIELDS x y", "head.pcd"),
])
def test_a_broken_file_is_named_in_one_line(tmp_path, name, blob, words):
    (tmp_path / name).write_bytes(blob)
    with pytest.raises(InputError, match=words) as error:
        objects.prepare(objects.Source(f"c/{name}", 0, str(tmp_path / name)), 32)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


# --- data sets ------------------------------------------------------------------------------------

def shapes(n, points=128, seed=0):
    """Three kinds of clouds that anything can tell apart: balls, cubes, sticks. -> {class: (n, points, 3)}."""
    rng = np.random.default_rng(seed)
    ball = rng.normal(size=(n, points, 3))
    stick = rng.uniform(-1, 1, (n, points, 3)) * [0.1, 0.1, 1]
    return {"ball": ball / np.linalg.norm(ball, axis=2, keepdims=True), "cube": rng.uniform(-1, 1, (n, points, 3)),
            "stick": stick}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """ROOT/{train,test}/CLASS/*.npy, 7 to train and 4 to test of three classes."""
    root = tmp_path_factory.mktemp("data")
    for part, n, seed in (("train", 7, 1), ("test", 4, 2)):
        for name, clouds in shapes(n, seed=seed).items():
            (root / part / name).mkdir(parents=True)
            for i, cloud in enumerate(clouds):
                np.save(root / part / name / f"{i}.npy", cloud.astype(np.float32))
    return root


def test_a_folder_is_read_with_and_without_a_test_part(folder):
    data = load_objects("folder", folder, 128)
    assert data.classes == ("ball", "cube", "stick")
    assert data.train.xyz.shape == (21, 128, 3) and data.test.label.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    radius = data.train.xyz.norm(dim=2)
    assert torch.allclose(radius[:7], torch.ones(7, 128), atol=1e-5) and (radius[7:14] > 1.2).any()
    flat = load_objects("folder", folder / "train", 128, test_fraction=0.3)
    assert (len(flat.train.label), len(flat.test.label)) == (15, 6)
    both = torch.cat([flat.train.xyz, flat.test.xyz]).sort(1).values.flatten(1)
    assert len(both.unique(dim=0)) == 21, "an object is in one part, and in one only"


def test_prepared_data_is_kept_and_prepared_again_when_a_file_changes(tmp_path, monkeypatch):
    for part in ("train", "test"):
        for name in "ab":
            (tmp_path / part / name).mkdir(parents=True)
            np.save(tmp_path / part / name / "0.npy", CLOUD)
    first = load_objects("folder", tmp_path, 32)
    assert len(list(tmp_path.glob(".nanoepcl-*.npz"))) == 1 and not list(tmp_path.glob("*.tmp"))
    monkeypatch.setattr(objects, "sample_all", lambda *a: pytest.fail("prepared again"))
    assert torch.equal(load_objects("folder", tmp_path, 32).train.xyz, first.train.xyz)
    monkeypatch.undo()
    changed = tmp_path / "train" / "a" / "0.npy"
    np.save(changed, CLOUD * 2 + 1)
    os.utime(changed, (1e9, 1e9))                       # a file system may count time in ticks
    assert not torch.equal(load_objects("folder", tmp_path, 32).train.xyz, first.train.xyz)
    for cache in tmp_path.glob(".nanoepcl-*.npz"):
        cache.write_bytes(b"half a file")
    with pytest.raises(InputError, match="not a readable cache; delete it"):
        load_objects("folder", tmp_path, 32)


def test_an_interrupted_preparation_leaves_nothing(tmp_path, monkeypatch):
    for part in ("train", "test"):
        (tmp_path / part / "a").mkdir(parents=True)
        np.save(tmp_path / part / "a" / "0.npy", CLOUD)

    def stop(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(objects, "prepare", stop)
    with pytest.raises(KeyboardInterrupt):
        load_objects("folder", tmp_path, 32)
    assert not list(tmp_path.glob(".nanoepcl*"))


def mistakes(root):
    """A broken folder for each entry: what to do to a good one, what the message says."""
    good = root / "train" / "a" / "0.npy"
    return {
        "missing root": (lambda: None, "no such file or folder"),
        "no classes": (lambda: [p.rename(root / p.name) for p in (root / "train").iterdir()], "no class folders"),
        "empty class": (lambda: (root / "train" / "empty").mkdir(), "no objects in this class folder"),
        "unknown test class": (lambda: (root / "test" / "zebra").mkdir(), "zebra: a class that"),
        "few points": (lambda: np.save(good, CLOUD[:9]), r"0.npy: has 9 points, fewer than --points 16"),
        "truncated": (lambda: good.write_bytes(array(CLOUD)[:-50]), "0.npy"),
    }


@pytest.mark.parametrize("case", mistakes(Path(".")))
def test_a_broken_folder_is_explained(tmp_path, case):
    root = tmp_path / "data"
    for part in ("train", "test"):
        for name in "ab":
            (root / part / name).mkdir(parents=True)
            np.save(root / part / name / "0.npy", CLOUD)
    damage, words = mistakes(root)[case]
    damage()
    with pytest.raises(InputError, match=words) as error:
        load_objects("folder", tmp_path / "nowhere" if case == "missing root" else root, 32, points=16)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_too_few_objects_to_set_some_aside_is_an_error(tmp_path):
    (tmp_path / "a").mkdir()
    np.save(tmp_path / "a" / "0.npy", CLOUD)
    with pytest.raises(InputError, match="too few to set 1 aside"):
        load_objects("folder", tmp_path, 32)


@pytest.mark.parametrize("form", ["off", "zip", "txt", "h5", "dat", "dat python2"])
def test_modelnet_is_read_in_each_of_its_forms(tmp_path, form):
    """Two train and one test object of chair and night_stand, in the layout of each archive."""
    rng = np.random.default_rng(3)
    names = [(c, part, f"{c}_{i:04d}") for c in ("chair", "night_stand")
             for i, part in ((1, "train"), (2, "train"), (3, "test"))]
    clouds = {n: rng.normal(size=(2048, 6)).astype(np.float32) for _, _, n in names}
    labels = {"chair": 8, "night_stand": 23}
    if form in ("off", "zip"):
        tree = {f"ModelNet40/{c}/{part}/{n}.off": off(header="OFF{} {} 0\n") for c, part, n in names}
        tree["ModelNet40/airplane/train/airplane_0001.off"] = off()
        if form == "zip":
            with zipfile.ZipFile(tmp_path / "ModelNet40.zip", "w") as archive:
                for name, blob in {**tree, "__MACOSX/ModelNet40/chair/train/x.off": b"", "ModelNet40/README.txt": b""}.items():
                    archive.writestr(name, blob)
        else:
            for name, blob in tree.items():
                (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / name).write_bytes(blob)
    elif form == "txt":
        root = tmp_path / "modelnet40_normal_resampled"
        for c, part, n in names:
            (root / c).mkdir(parents=True, exist_ok=True)
            np.savetxt(root / c / f"{n}.txt", clouds[n], "%.6f", ",")
            with open(root / f"modelnet40_{part}.txt", "a") as file:
                file.write(n + "\r\n")
    elif form == "h5":
        h5py = pytest.importorskip("h5py", reason="needs h5py: reads the HDF5 form")
        for part in ("train", "test"):
            group = [(c, n) for c, p, n in names if p == part]
            with h5py.File(tmp_path / f"ply_data_{part}0.h5", "w") as file:
                file["data"] = np.stack([clouds[n][:, :3] for _, n in group])
                file["label"] = np.array([[labels[c]] for c, _ in group], np.uint8)
    else:
        for part in ("train", "test"):
            group = [(c, n) for c, p, n in names if p == part]
            blob = pickle.dumps([[clouds[n] for _, n in group], [np.array([labels[c]], np.int32) for c, _ in group]],
                                protocol=2 if form == "dat python2" else 5)
            if form == "dat python2":                                # numpy 1 wrote another module name
                blob = blob.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            (tmp_path / f"modelnet40_{part}_8192pts_fps.dat").write_bytes(blob)
    data = load_objects("modelnet40", tmp_path, stored=2048, points=1024)
    extra = [0] if form in ("off", "zip") else []
    assert data.train.label.tolist() == [*extra, 8, 8, 23, 23] and data.test.label.tolist() == [8, 23]
    assert len(data.classes) == 40 and data.train.xyz.shape[1:] == (2048, 3)
    if form in ("txt", "h5", "dat", "dat python2"):
        expected = np.sort(clouds["chair_0001"][:, :3], 0)
        np.testing.assert_allclose(np.sort(data.train.xyz[0].numpy(), 0), expected, atol=1e-6)
    if form == "h5":
        ten = load_objects("modelnet10", tmp_path, stored=2048)
        assert ten.train.label.tolist() == [2, 2, 6, 6] and len(ten.classes) == 10


def test_modelnet_that_is_not_there_names_every_form_and_where_to_get_it(tmp_path):
    with pytest.raises(InputError) as error:
        load_objects("modelnet40", tmp_path)
    for word in ("ModelNet40.zip", "modelnet40_train.txt", "ply_data_train*.h5", "8192pts_fps.dat", "princeton"):
        assert word in str(error.value)


def test_a_pickle_that_would_run_something_does_not(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)
    (tmp_path / "modelnet40_train_8192pts_fps.dat").write_bytes(pickle.dumps([[Hostile()], [1]]))
    with pytest.raises(InputError, match="modelnet40_train_8192pts_fps.dat: it asks for (posix|nt).system"):
        load_objects("modelnet40", tmp_path)
    assert not (tmp_path / "ran").exists()
    sneaky = b"cnumpy.testing._private.utils\nruncode\n."
    with pytest.raises(pickle.UnpicklingError):
        objects.NumpyOnly(io.BytesIO(sneaky)).load()


def test_scanobjectnn_and_its_mistakes(tmp_path):
    h5py = pytest.importorskip("h5py", reason="needs h5py: ScanObjectNN is HDF5")
    folder = tmp_path / "main_split"
    folder.mkdir()
    for part, labels in (("training", [0, 14]), ("test", [3])):
        with h5py.File(folder / f"{part}_objectdataset_augmentedrot_scale75.h5", "w") as file:
            file["data"] = np.random.default_rng(0).normal(size=(len(labels), 2048, 3)).astype(np.float32)
            file["label"] = np.array(labels)
    data = load_objects("scanobjectnn", tmp_path)
    assert data.classes[14] == "toilet" and data.train.label.tolist() == [0, 14] and data.test.label.tolist() == [3]
    path = folder / "test_objectdataset_augmentedrot_scale75.h5"
    with h5py.File(path, "a") as file:
        file["label"][0] = 15
    with pytest.raises(InputError, match="test labels reach from 15 to 15, but there are 15 classes"):
        load_objects("scanobjectnn", tmp_path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match="test_objectdataset_augmentedrot_scale75.h5"):
        load_objects("scanobjectnn", tmp_path)


# --- sampling, loss, metric -----------------------------------------------------------------------

def test_training_samples_come_from_the_cloud_and_do_not_depend_on_how_a_batch_is_shared():
    recipe = train_cls.RECIPES["synthetic"]._replace(points=64, stored=256)
    xyz = objects.unit_sphere(torch.randn(4, 256, 3))
    torch.manual_seed(0)
    whole = train_cls.sample_train(xyz, recipe, 4)
    torch.manual_seed(0)
    assert torch.equal(train_cls.sample_train(xyz[2:], recipe, 4, 2), whole[2:])
    assert whole.shape == (4, 64, 3) and whole.isfinite().all()
    torch.manual_seed(1)
    assert not torch.equal(train_cls.sample_train(xyz, recipe, 4), whole)
    torch.manual_seed(0)                                # draw the same numbers, undo scale and shift
    torch.rand(4, 256), torch.randperm(75)
    scale, shift = torch.rand(2, 4, 1, 3)
    back = (whole - (shift * 0.4 - 0.2)) / (2 / 3 + scale * 5 / 6)
    for cloud, sample in zip(xyz, back):
        distance, nearest = torch.cdist(sample.double(), cloud.double()).min(1)
        assert distance.max() < 1e-5 and len(nearest.unique()) == 64
    test = train_cls.sample_test(xyz, 64)
    assert torch.equal(test[:, 0], xyz[:, 0]) and torch.equal(test, train_cls.sample_test(xyz, 64))


def test_the_two_losses_by_hand():
    logits, label = torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1])
    embedding, text = torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    head, raw = train_cls.loss_terms(logits, embedding, label, text, "raw")
    assert head.item() == pytest.approx(np.log1p(np.exp(-2)) + np.log(2), rel=1e-6)
    assert raw.item() == pytest.approx(np.log1p(np.exp(-3)) + np.log1p(np.exp(-8)), rel=1e-5)
    _, cosine = train_cls.loss_terms(logits, embedding, label, text, "cosine")
    assert cosine.item() == pytest.approx(2 * np.log1p(np.exp(-100)), abs=1e-6)
    assert train_cls.loss_terms(logits, embedding, label, None, "raw")[1].item() == 0


def test_accuracies_and_worst_pairs_of_a_confusion_matrix_made_by_hand():
    confusion = torch.tensor([[8, 2, 0], [1, 1, 0], [0, 0, 0]])             # the third class never occurs
    overall, mean = train_cls.accuracies(confusion)
    assert overall == pytest.approx(9 / 12) and mean == pytest.approx((0.8 + 0.5) / 2)
    assert train_cls.worst_pairs(confusion, ("bed", "sofa", "car")).split("\n")[1:] == [
        "         bed taken for sofa: 2 of 10", "         sofa taken for bed: 1 of 2"]


# --- runs -----------------------------------------------------------------------------------------

def arguments(folder, clip, out, *more):
    return ["--data", "folder", "--root", str(folder), "--clip", clip, "--out", str(out), "--points", "64",
            "--groups", "8", "--neighbours", "8", "--epochs", "3", "--batch-size", "6", "--lr", "0.002", *more]


@pytest.fixture(scope="session")
def finished(folder, tiny_clip, tmp_path_factory):
    """A run of three epochs that nothing disturbed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train_cls.main(arguments(folder, tiny_clip, out))
    return out


def lines(run):
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"}
            for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_learns_and_leaves_every_file(finished):
    assert {p.name for p in finished.iterdir()} == {"config.json", "metrics.jsonl", "log.txt", "train_cls.py",
                                                   "last.pt", "best.pt", "results.json"}
    results = json.loads((finished / "results.json").read_text())
    assert results["metrics"]["accuracy"] == lines(finished)[-1]["accuracy"]
    assert results["best_on_test"]["accuracy"] == max(line["accuracy"] for line in lines(finished))
    assert results["epoch"] == 3 and len(results["clip"]["sha256"]) == 64
    assert lines(finished)[-1]["loss"] < 0.8 * lines(finished)[0]["loss"]
    saved = torch.load(finished / "last.pt", weights_only=True)
    assert not any(name.startswith("encoder.clip") for name in saved["model"])
    config = json.loads((finished / "config.json").read_text())
    assert config["recipe"]["lr"] == 0.002 and config["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("epoch, step", [(0, 1), (1, 0), (1, 2), (2, 1)])
def test_a_run_stopped_anywhere_and_resumed_ends_like_one_that_was_not(
        finished, folder, tiny_clip, tmp_path, monkeypatch, epoch, step):
    calls = iter(range(1000))                           # 4 steps an epoch; asked after all but the last,
    stop_at = 4 * epoch + (step - 1 if step else -1)    # and once at the end of the epoch
    with monkeypatch.context() as patch:
        patch.setattr(common.Stopper, "now", lambda self, _: next(calls) == stop_at)
        with pytest.raises(SystemExit) as stopped:
            train_cls.main(arguments(folder, tiny_clip, tmp_path / "run"))
    assert stopped.value.code == 130
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert (saved["at"]["epoch"], saved["at"]["step"]) == (epoch, step)
    train_cls.main(["--resume", str(tmp_path / "run")])
    assert lines(tmp_path / "run") == lines(finished)
    for name in ("last.pt", "best.pt"):
        ours, theirs = (torch.load(run / name, weights_only=True) for run in (tmp_path / "run", finished))
        assert all(torch.equal(ours["model"][n], theirs["model"][n]) for n in theirs["model"])
        assert {k: v for k, v in ours["at"].items() if k != "seconds"} == \
            {k: v for k, v in theirs["at"].items() if k != "seconds"}
        if name == "last.pt":
            for a, b in zip(ours["optimizer"]["state"].values(), theirs["optimizer"]["state"].values()):
                assert all(torch.equal(a[k], b[k]) for k in b)
    results = [json.loads((run / "results.json").read_text()) for run in (tmp_path / "run", finished)]
    assert all(results[0][k] == results[1][k] for k in results[1] if k != "seconds")


def test_eval_repeats_the_result_and_vote_and_predict_answer(finished, folder, capsys):
    accuracy = json.loads((finished / "results.json").read_text())["metrics"]["accuracy"]
    for what in (finished, finished / "last.pt"):
        train_cls.main(["--eval", str(what), "--vote", "3"])
        printed = capsys.readouterr().out
        assert f"accuracy {100 * accuracy:.2f} %" in printed and "3 votes, one repeat" in printed
    train_cls.main(["--eval", str(finished), "--predict", str(folder / "test" / "stick" / "0.npy")])
    words = re.findall(r"(\w+) ([\d.]+) %", capsys.readouterr().out)
    assert {w for w, _ in words} == {"ball", "cube", "stick"}
    assert sum(float(p) for _, p in words) == pytest.approx(100, abs=0.5)


@pytest.mark.parametrize("flags, words", [
    (["--resume", "{run}"], "the run is finished, 3 epochs; --eval"),
    (["--resume", "{run}/best.pt"], "holds no optimiser"),
    (["--resume", "{run}", "--eval", "{run}"], "give one of them"),
    (["--eval", "{run}", "--lr", "0.5"], "was trained with lr 0.002, not 0.5"),
    (["--eval", "{run}", "--clip", "random"], "was trained with clip"),
    (["--eval", "{run}", "--no-task-token"], "no-task-token False, not True"),
    (["--eval", "nowhere"], "no such checkpoint"),
    (["--predict", "x.npy"], "--predict needs a run"),
    (["--eval", "{run}", "--predict", "x.docx"], "x.docx: not a format"),
    (["--eval", "{run}", "--predict", "missing.npy"], "missing.npy: "),
    (["--groups", "600"], "--groups 600 must be at most --points 512"),
    (["--neighbours", "65"], "at most 64"),
    (["--deep-prompt", "--no-task-token"], "exclude each other"),
    (["--no-transformer", "--unfreeze"], "leaves nothing"),
    (["--lr", "-1"], "must be above 0"),
    (["--dropout", "1"], "in 0..1"),
    (["--test-fraction", "1.5"], "between 0 and 1"),
    (["--device", "cuda"], "no CUDA device"),
    (["--data", "modelnet40", "--root", "nowhere"], "princeton"),
    (["--data", "modelnet40"], "data/modelnet40: no such file or folder"),
    (["--out", "{run}"], "holds a run; --resume"),
    (["--out", "{run}/log.txt/run"], "cannot be written"),
    (["--init-official", "{run}/last.pt"], "not a checkpoint of the authors'"),
])
def test_a_mistake_on_the_command_line_is_answered_in_one_line(finished, flags, words, monkeypatch):
    if flags[0] == "--device" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    monkeypatch.setattr(train_cls, "SYNTHETIC", (1, 1))
    with pytest.raises(InputError, match=re.escape(words)) as error:
        train_cls.main([flag.format(run=finished) for flag in flags])
    assert "\n" not in str(error.value)


def script(*args, **kwargs):
    env = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "TRITON_INTERPRET")}
    return subprocess.Popen([sys.executable, *args], cwd=ROOT, env={**env, "OMP_NUM_THREADS": "1"}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs)


def test_an_error_is_one_line_on_stderr_and_exit_code_2():
    process = script("train_cls.py", "--data", "folder", "--root", "no/such/folder")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2 and out == ""
    assert err.count("\n") == 1 and err.startswith("error: --root no/such/folder: no such file or folder")


def test_help_needs_no_gpu_no_weights_and_no_triton():
    code = "import sys; sys.modules['triton'] = None; import train_cls; train_cls.main(['--help'])"
    process = script("-c", code)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "--no-task-token" in out and "modelnet40" in out, err


def test_ctrl_c_saves_and_says_how_to_go_on(folder, tiny_clip, tmp_path):
    process = script("train_cls.py", *arguments(folder, tiny_clip, tmp_path / "run", "--epochs", "5000"))
    deadline = time.time() + 120
    while not (tmp_path / "run" / "last.pt").exists() and time.time() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert f"go on with: python train_cls.py --resume {tmp_path / 'run'}" in out and "Traceback" not in err
    assert common.load_checkpoint(tmp_path / "run", "cls")["at"]["epoch"] >= 1


def test_two_processes_follow_the_loss_curve_of_one(folder, tiny_clip, tmp_path):
    """Shares of 3 and 4 of each batch of 7. A low rate: AdamW turns rounding into steps of its own size."""
    slow = ("--batch-size", "7", "--lr", "1e-5")
    train_cls.main(arguments(folder, tiny_clip, tmp_path / "one", *slow))
    process = script("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29517",
                     "train_cls.py", *arguments(folder, tiny_clip, tmp_path / "two", *slow))
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert "2 processes" in out and out.count("result ") == 1
    for two, one in zip(lines(tmp_path / "two"), lines(tmp_path / "one"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["train_accuracy"] == one["train_accuracy"] and two["accuracy"] == one["accuracy"]


def test_a_compiled_model_has_no_graph_break_and_learns_the_same(folder, tiny_clip, tmp_path, monkeypatch):
    slow = ("--lr", "1e-5", "--epochs", "2")
    train_cls.main(arguments(folder, tiny_clip, tmp_path / "plain", *slow))
    compiler = torch.compile                            # without code generation: no C compiler needed
    monkeypatch.setattr(torch, "compile", lambda m: compiler(m, backend="aot_eager", fullgraph=True))
    train_cls.main(arguments(folder, tiny_clip, tmp_path / "compiled", *slow, "--compile"))
    for ours, plain in zip(lines(tmp_path / "compiled"), lines(tmp_path / "plain"), strict=True):
        assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-5)


def test_accumulation_and_every_ablation_train(folder, tiny_clip, tmp_path):
    for i, more in enumerate((["--accumulate", "2"], ["--unfreeze"], ["--deep-prompt"], ["--no-transformer"],
                              ["--no-task-token", "--dropout", "0.3"])):
        train_cls.main(arguments(folder, tiny_clip, tmp_path / str(i), "--epochs", "2", *more))
        losses = [line["loss"] for line in lines(tmp_path / str(i))]
        assert losses[1] < losses[0], more


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint_before(
        folder, tiny_clip, tmp_path, monkeypatch):
    real, calls = train_cls.loss_terms, iter(range(100))

    def break_down(*args):
        head, text = real(*args)
        return head * (float("nan") if next(calls) == 5 else 1), text
    monkeypatch.setattr(train_cls, "loss_terms", break_down)
    with pytest.raises(InputError, match="not finite in epoch 2"):
        train_cls.main(arguments(folder, tiny_clip, tmp_path / "run"))
    saved = common.load_checkpoint(tmp_path / "run", "cls")
    assert saved["at"]["epoch"] == 1 and all(w.isfinite().all() for w in saved["model"].values())


SHARED = ROOT.parent / "shared" / "data"


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real meshes and weights, which are not part of the project")
def test_real_meshes_and_a_real_pretrained_vit_train(tmp_path):
    root = tmp_path / "shapes"
    for part in ("train", "test"):
        for name in ("Bottle", "Guitar", "Bed"):
            (root / part / name).mkdir(parents=True)
            for path in sorted((SHARED / "shapes20" / part / name).iterdir())[:4]:
                (root / part / name / path.name).symlink_to(path)
    clip = f"timm:vit_tiny_patch16_224={SHARED / 'vit_tiny_patch16_224.safetensors'}"
    train_cls.main(["--data", "folder", "--root", str(root), "--clip", clip, "--out", str(tmp_path / "run"), "--points", "256",
                    "--groups", "16", "--neighbours", "16", "--epochs", "6", "--batch-size", "6", "--lr", "0.001"])
    losses = [line["loss"] for line in lines(tmp_path / "run")]
    assert losses[-1] < losses[0]


def test_a_cloud_in_pcd_from_a_real_sensor_is_read():
    path = SHARED / "scans" / "fragment.pcd"
    if not path.is_file():
        pytest.skip("needs the real scan, which is not part of the project")
    xyz, _ = objects.read_object(path.read_bytes(), ".pcd")
    assert xyz.shape == (113_662, 3) and np.ptp(xyz, 0).max() < 10
