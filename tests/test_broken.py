"""Files that cannot be read: whatever is in them, one line that names the file."""
import copy
import importlib
import io
import json
import math
import pickle
import struct
import warnings
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from test_files import CLOUD, CUBE, FACES, array, off, pcd, pcd_columns, pcd_rows, ply, ply_mesh
from test_scannet import TSV, raw_scan

import checkpoint
import look
import nanoclip
import pretrained
import run
import train_clip
import train_cls
import train_fewshot
from data import files, kitti, objects, prepared, s3dis, scannet, shapenet, synthetic_rooms
from data.files import BrokenFile
from run import InputError

CORNERS = CUBE[:, :3]
STL = b"made by hand".ljust(80) + struct.pack("<I", 4) + b"".join(
    np.float32([[0, 0, 1], *CORNERS[[i, i + 1, i + 3]]]).tobytes() + b"\0\0" for i in range(4))
OBJ = "".join("v {} {} {}\n".format(*v) for v in CORNERS) + "".join(
    "f " + " ".join(str(i + 1) for i in f) + "\n" for f in FACES)
TEXT = "\n".join(" ".join(map(repr, map(float, p))) for p in CLOUD)
ROOM = array(CLOUD, np.savez, xyz=CLOUD, label=np.arange(50) % 3, instance=np.arange(50),
             rgb=np.arange(150, dtype=np.uint8).reshape(50, 3), offset=np.zeros(3),
             boxes=np.float32([[0, 0, 0, 1, 1, 1, 2]]))
BOXES = [{"class": "chair", "center": [0, 0, 1.5], "size": [1, 2, 1]}]
EPISODE = {"classes": ["b", "a"], "train": [[2], [0]], "test": [[2, 3], [0, 1]],
           "of": {"train": 6, "test": 6}}
PICTURE = io.BytesIO()
Image.fromarray(np.arange(1024, dtype=np.uint8).reshape(16, 16, 4)).save(PICTURE, "PNG")
LINES = "".join(json.dumps({"epoch": i, "accuracy": i / 9, "miou": None}) + "\n" for i in (1, 2))
DAT = [[np.float32(CLOUD)] * 3, [np.int32([1]), np.int32([0]), np.int32([2])]]
FOLD = {part: [(np.float32(CLOUD), k, 5 - k) for k in (0, 1)] for part in ("train", "test")}


def one_object(path):
    return objects.read_one(path, 20, 4)


def episode(path):
    part = train_fewshot.Objects(torch.zeros(6, 4, 3), torch.tensor([0, 0, 1, 1, 2, 2]))
    data = train_fewshot.Data(part, part, ("a", "b", "c"), "")
    return train_fewshot.clouds_of(train_fewshot.read_episode(path, data, 2, 1), data)


def votenet(path):
    """VoteNet's points, each of its labels, its boxes: whichever the file may be."""
    vert = path.with_name("good_vert.npy")
    vert.write_bytes(array(np.c_[CLOUD, np.zeros((50, 3))]))
    nothing = path.with_name("nothing")
    for which in range(4):
        paths = [vert, nothing, nothing, nothing]
        paths[which] = path
        try:
            scannet.read_votenet(*paths)
        except InputError as error:
            assert str(path) in str(error)
    return scannet.read_votenet(path, nothing, nothing, nothing)


def labels_of_a_scan(path):
    scan = path.with_name("good.bin")
    np.full((50, 4), 0.5, "<f4").tofile(scan)
    return kitti.read_scan(scan, path, kitti.published_classes())


READERS = {                                             # file: what is in it, who reads it
    "mesh.off": (off(), one_object), "mesh.obj": (OBJ.encode(), one_object),
    "mesh.stl": (STL, one_object), "mesh.ply": (ply_mesh(CUBE, FACES), one_object),
    "big.ply": (ply_mesh(CUBE, FACES, "big"), one_object), "cloud.ply": (ply(CLOUD), one_object),
    "cloud.npy": (array(CLOUD), one_object), "cloud.npz": (ROOM, one_object),
    "cloud.xyz": (TEXT.encode(), one_object),
    "rows.pcd": (pcd(CLOUD, "binary", pcd_rows(CLOUD).tobytes()), one_object),
    "lzf.pcd": (pcd(CLOUD, "binary_compressed", pcd_columns(CLOUD)), one_object),
    "text.pcd": (pcd(CLOUD, "ascii", ("0 " + TEXT.replace("\n", "\n0 ")).encode()), one_object),
    "room.ply": (ply(CLOUD), files.read_cloud),
    "room.npy": (array(np.c_[CLOUD, np.arange(50) % 3]), lambda p: files.read_cloud(p, 3)),
    "room.npz": (ROOM, lambda p: files.read_cloud(p, 3)),
    "boxes.json": (json.dumps(BOXES).encode(), files.read_boxes),
    "x_vert.npy": (array(np.c_[CLOUD, np.zeros((50, 4))]), votenet),
    "labels.tsv": (TSV.encode(), scannet.label_table),
    "Area_1_x.npy": (array(np.c_[CLOUD, np.zeros((50, 4))]), s3dis.read_prepared),
    "chair_1.txt": ("\n".join(f"{x} {y} {z} 1 2 3" for x, y, z in CLOUD).encode(),
                    s3dis.read_annotation),
    "scan.bin": (np.float32(np.c_[CLOUD, CLOUD[:, 0] * 0 + 0.5]).tobytes(), kitti.read_scan),
    "scan.label": (np.full(50, 40, "<u4").tobytes(), labels_of_a_scan),
    "lines.txt": ("stühle\ntische\n".encode(), files.read_lines),
    "train.dat": (pickle.dumps(DAT, 2), lambda p: objects.read_dat([p])),
    "fold.pkl": (pickle.dumps(FOLD, 5), lambda p: objects.read_fold(p, range(9), 2, 1, 4)),
    "0.json": (json.dumps(EPISODE).encode(), episode),
    "metrics.jsonl": (LINES.encode(), lambda p: look.curves_of(p.parent)),
    "model.npy": (array(np.tile(np.float32(CLOUD), (21, 1))), shapenet.read_cloud),
    "0.png": (PICTURE.getvalue(), lambda p: shapenet.read_pictures([p], 16)),
}


def nasty(blob, rng, count):
    """Flipped bytes, cut ends, doubled, zeroed and moved pieces, numbers that are larger."""
    yield b""
    yield bytes(len(blob))
    for i in range(count):
        bad, at = bytearray(blob), int(rng.integers(len(blob)))
        if rng.random() < 0.5:                          # most of the structure is in the head
            at = int(rng.integers(min(len(blob), 160)))
        end = at + int(rng.integers(1, 40))
        if i % 6 == 0:
            del bad[at:]
        elif i % 6 == 1:
            bad[at:end] = bytes(len(bad[at:end]))
        elif i % 6 == 2:
            bad[at:at] = bad[at:end]
        elif i % 6 == 3:
            del bad[at:end]
        elif i % 6 == 4:
            bad[at:at] = b"99999999999"
        else:
            for _ in range(1 + i % 4):
                bad[int(rng.integers(max(at - 8, 0), min(at + 8, len(bad))))] ^= 1 << int(
                    rng.integers(8))
        yield bytes(bad)


def one_line(read, path):
    """Whether the file is read. If not: an InputError of one line that names it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            read(path)
            return True
        except InputError as error:
            assert str(path) in str(error) and "\n" not in str(error), error
            return False


@pytest.mark.parametrize("name", READERS)
def test_a_file_is_read_or_named_in_one_line_whatever_its_bytes(name, tmp_path):
    blob, read = READERS[name]
    path = tmp_path / name
    path.write_bytes(blob)
    assert one_line(read, path)
    refused = 0
    for bad in nasty(blob, np.random.default_rng([18, *name.encode()]), 120):
        path.write_bytes(bad)
        refused += not one_line(read, path)
    assert refused > 10


def test_hdf5_is_read_or_named_whatever_its_content(tmp_path):
    h5py = pytest.importorskip("h5py", reason="needs h5py: writes HDF5 files")
    path, label = tmp_path / "x.h5", np.arange(5)[:, None]
    clouds = np.random.default_rng(0).random((5, 20, 3)).astype("f4")

    def write(data, label, **more):
        with h5py.File(path, "w") as file:
            file.create_dataset("data", data=data, **more)
            file["label"] = label

    def read(path):
        return objects.read_h5([path])

    write(clouds, label, compression="gzip")
    xyz, found = read(path)
    assert (xyz == clouds).all() and found.tolist() == [0, 1, 2, 3, 4]
    for bad in nasty(path.read_bytes(), np.random.default_rng(18), 120):
        path.write_bytes(bad)
        one_line(read, path)
    for data, name in ((clouds, label[:4]), (clouds[0], label), (clouds[..., :2], label),
                       (clouds.astype("c8"), label), (clouds, label.astype("S"))):
        write(data, name)
        assert not one_line(read, path)
    with h5py.File(path, "w") as file:                  # 10^15 points, in a file of 2 kB
        file.create_dataset("data", (10**6, 10**9, 3), "f4", chunks=(1, 64, 3))
        file["label"] = label
    with pytest.raises(BrokenFile, match="its `data` is float32 of shape"):
        read(path)


@pytest.mark.parametrize("which", ["pose", "mesh", "segments", "objects"])
def test_each_file_of_a_published_scan_is_named(which, tmp_path):
    room = synthetic_rooms.room_scenes(1, 400, 9)[0]
    folder = raw_scan(tmp_path, "scene0191_00", room)
    table = tmp_path / "t.tsv"
    table.write_text(TSV, encoding="utf-8")
    path, nyu40 = scannet.files_of(folder)[which], scannet.label_table(table)
    for bad in nasty(path.read_bytes(), np.random.default_rng(18), 30):
        path.write_bytes(bad)
        one_line(lambda p: scannet.read_raw(folder, nyu40), path)


# --- arrays of NumPy

def header(shape, descr="'<f8'"):
    """The header of a .npy, and nothing behind it."""
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


@pytest.mark.parametrize("blob, words", [
    (header("(1000000000000000000, 3)"), "cut short: its header promises shape"),
    (header("(10000000, 3)"), "cut short: its header promises shape"),
    (header("(50, 3").replace(b"}", b"("), "EOF in multi-line"),
    (header("(50, 3)", "'|O'"), "holds object, expected numbers"),
    (header("(50, 3)", "'<c16'"), "holds complex128, expected numbers"),
    (header("(50, 3)", "'<U9'"), "holds <U9, expected numbers"),
    (header("(50, 3)", "'|V0'"), r"holds \|V0, expected numbers"),
    (header("(50,)", "[('x', '<f4')]"), "expected numbers"),
    (array(np.float64(3)), r"shape \(\)")])
@pytest.mark.parametrize("packed", [False, True])
def test_an_odd_array_is_explained_before_memory_is_asked_for(blob, words, packed, tmp_path):
    path = tmp_path / ("a.npz" if packed else "a.npy")
    if packed:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("xyz.npy", blob)
    else:
        path.write_bytes(blob)
    for read in (files.read_cloud, one_object):
        with pytest.raises(BrokenFile, match=words) as error:
            read(path)
        assert str(path) in str(error.value)


@pytest.mark.parametrize("field, content, words", [
    ("instance", CLOUD[:, 0], "expected whole numbers"),
    ("instance", np.full(50, np.nan), "has nan, expected whole numbers"),
    ("offset", np.zeros((50, 3)), r"cannot reshape .* into shape \(3,\)"),
    ("label", np.full((50, 2), 1), "reshape"),
    ("rgb", CLOUD.astype("c8"), "holds complex64")])
def test_an_odd_field_of_a_room_is_explained(field, content, words, tmp_path):
    np.savez(tmp_path / "a.npz", **{"xyz": CLOUD, "label": np.zeros(50), field: content})
    with pytest.raises(BrokenFile, match=words):
        files.read_cloud(tmp_path / "a.npz", 3)


@pytest.mark.parametrize("part, content, words", [
    ("vert", CLOUD.astype(str), "holds <U"), ("vert", np.full((5, 3), 1e300), "NaN coordinates"),
    ("sem_label", np.full(50, 1.5), "has 1.5, expected whole numbers"),
    ("ins_label", np.full(50, np.nan), "has nan, expected whole numbers"),
    ("sem_label", np.zeros((50, 1)), "one number a point"),
    ("bbox", np.full((2, 7), np.nan), "NaN in its boxes"),
    ("bbox", np.zeros(7), "at least 7 columns")])
def test_odd_values_in_votenets_files_are_explained(part, content, words, tmp_path):
    paths = [tmp_path / f"x_{name}.npy" for name in scannet.VOTENET]
    np.save(paths[0], CLOUD)
    np.save(tmp_path / f"x_{part}.npy", content)
    with pytest.raises(BrokenFile, match=words) as error:
        scannet.read_votenet(*paths)
    assert f"x_{part}.npy" in str(error.value)


def test_a_ply_that_promises_too_much_is_refused_at_once(tmp_path):
    path = tmp_path / "a.ply"
    path.write_bytes(ply(CLOUD).replace(b"vertex 50", b"vertex 9000000000"))
    with pytest.raises(BrokenFile, match="promises 9,000,000,000 vertices"):
        files.read_cloud(path)


# --- text and JSON

@pytest.mark.parametrize("content, words", [
    ("[" * 100_000, "nested too deep"), ('{"a":' * 100_000, "nested too deep"),
    (json.dumps([{**BOXES[0], "center": [0, 0, 10**400]}]), "too large"),
    (json.dumps(BOXES).replace("1.5", "1e400"), "NaN coordinates"),
    (b'[{"class": "st\xfchl"}]', "is not UTF-8"), ("9" * 5000, "a scene is a cloud and a list")])
def test_json_that_is_nested_too_deep_or_too_large_is_explained(content, words, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BrokenFile, match=words):
        files.read_boxes(path)


@pytest.mark.parametrize("text, words", [
    ("raw_category\tnyu40id\nchair\n", "int"), ("", "its nyu40id are not numbers from 0 to 40"),
    ('raw_category\tnyu40id\n"' + "x" * 200_000, "field larger"),
    ("raw_category\tnyu40id\nchair\t99\n", "its nyu40id are not numbers from 0 to 40")])
def test_scannets_table_is_read_or_explained(text, words, tmp_path):
    (tmp_path / "t.tsv").write_text(text, encoding="utf-8")
    with pytest.raises(BrokenFile, match=f"t.tsv: .*{words}.*: fetch it again"):
        scannet.label_table(tmp_path / "t.tsv")


def test_lists_that_are_not_utf_8_are_named(tmp_path):
    (tmp_path / "modelnet10_train.txt").write_bytes(b"st\xfchl_0001\n")
    with pytest.raises(BrokenFile, match="modelnet10_train.txt: is not UTF-8; save it as UTF-8"):
        objects.prepare("modelnet10", tmp_path, 10)
    (tmp_path / "metrics.jsonl").write_bytes(b"st\xfchl")
    with pytest.raises(BrokenFile, match="metrics.jsonl: is not UTF-8"):
        look.curves_of(tmp_path)


@pytest.mark.parametrize("line", ["[1]", "null", '{"accuracy": 1}', '{"epoch": 3, "a": "b"}',
                                  '{"epoch": 3, "a": {"b": 2}}', '{"epoch": 3, "a": 1e400}',
                                  '{"epoch": ' + "9" * 5000 + "}", "[" * 100_000])
def test_a_line_of_the_metrics_that_no_run_wrote_is_named(line, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(LINES + line, encoding="utf-8")
    with pytest.raises(InputError, match="metrics.jsonl: line 3 is broken; remove it"):
        look.curves_of(tmp_path)


# --- episodes, pickles, what is prepared

ODD = [None, "x", 1, 0.5, -1, [], {}, True, 2**70, math.nan, math.inf, [None], ["x"], [[]], [0.5],
       [[0.5], [2]], [[True], [0]], [[None], [0]], [["2"], ["0"]], [[2**70], [0]], "ba"]


def test_an_episode_with_odd_content_is_named(tmp_path):
    path = tmp_path / "0.json"
    path.write_text(json.dumps(EPISODE), encoding="utf-8")
    train, test, classes = episode(path)
    assert classes == [1, 0] and train.label.tolist() == [0, 1] and len(test.label) == 4
    for odd in ODD:
        for key in EPISODE:
            path.write_text(json.dumps({**EPISODE, key: odd}), encoding="utf-8")
            assert not one_line(episode, path), (key, odd)
        for part in ("train", "test"):
            of = {**EPISODE["of"], part: odd}
            path.write_text(json.dumps({**EPISODE, "of": of}), encoding="utf-8")
            assert not one_line(episode, path), (part, odd)


@pytest.mark.parametrize("content", [
    CLOUD, CLOUD.T, CLOUD.astype(">f8"), np.float32(3), np.int64(7), CLOUD > 0,
    np.arange(24, dtype="i2").reshape(2, 3, 4).transpose(1, 0, 2)], ids=lambda x: x.dtype.str)
def test_a_pickled_array_is_what_it_was(content, tmp_path):
    for protocol in range(2, 6):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps({"a": [content]}, protocol))
        found = files.read_pickle(tmp_path / "a.pkl")["a"][0]
        assert found.dtype.str[1:] == content.dtype.str[1:] and found.shape == content.shape
        assert (np.asarray(found) == content).all()


class Lie:
    """Pickles as an array whose type says another size, kind or shape than its bytes have."""

    def __init__(self, code, shape=(50, 3), state=(3, "<", None, None, None, -1, -1, 0)):
        self.code, self.shape, self.state = code, shape, state

    def __reduce__(self):
        return np._core.multiarray._reconstruct, (np.ndarray, (0,), b"b"), (
            1, self.shape, LyingType(self.code, self.state), False, CLOUD.tobytes())


class LyingType:
    def __init__(self, code, state):
        self.code, self.state = code, state

    def __reduce__(self):
        return np.dtype, (self.code, False, True), self.state


@pytest.mark.parametrize("lie, words", [
    (Lie("f8"), "cannot reshape array of size 75"), (Lie("f4", (10**9, 3)), "cannot reshape"),
    (Lie("f4", (-50, -3)), "unknown dimension"), (Lie("f4", (-1, 3)), "impossible dimension"),
    (Lie("O"), "'O', not numbers"),
    (Lie("V12"), "'V12', not numbers"), (Lie("f4,f4"), "not numbers"),
    (Lie("O8", (50, 3), (3, "|", None, None, None, 8, 8, 63)), "not numbers")])
def test_a_pickle_whose_type_lies_is_refused_before_numpy_believes_it(lie, words, tmp_path):
    path = tmp_path / "a.dat"
    path.write_bytes(pickle.dumps([[lie], [1]]))
    with pytest.raises(BrokenFile, match=words):
        objects.read_dat([path])


def test_what_the_pickle_says_of_a_number_type_beside_its_code_is_not_believed(tmp_path):
    huge = Lie("f4", state=(3, "<", ("f0",), {"f0": ("f8", 99)}, None, 2**30, 2**30, 63))
    (tmp_path / "a.dat").write_bytes(pickle.dumps([[huge], [1]]))
    xyz, label = objects.read_dat([tmp_path / "a.dat"])
    assert (xyz[0] == CLOUD).all() and label.tolist() == [1]


@pytest.mark.parametrize("name", ["xyz", "label", "part", "count", "classes", "form", "names"])
def test_prepared_data_with_other_content_is_made_again(name, tmp_path):
    for part in ("train", "test"):
        (tmp_path / part / "c").mkdir(parents=True)
        np.save(tmp_path / part / "c" / "a.npy", CLOUD)
    path = objects.prepare("folder", tmp_path, 10)
    good = path.read_bytes()
    with zipfile.ZipFile(path) as kept:
        parts = {member: kept.read(member) for member in kept.namelist()}
    for odd in (None, np.array(["a", "b"]), np.full((2, 10, 3), np.nan), np.zeros(1), np.array(1)):
        with zipfile.ZipFile(path, "w") as changed:
            for member, blob in parts.items():
                if odd is not None or member != f"{name}.npy":
                    changed.writestr(member, array(odd) if member == f"{name}.npy" else blob)
        assert objects.prepare("folder", tmp_path, 10) == path and path.read_bytes() == good
    np.savez(path, sources=np.array(b"nothing"))
    with pytest.raises(BrokenFile, match="remove it, and it is made again"):
        path.write_bytes(good[:len(good) // 2])
        prepared.load_prepared(path)


def test_a_file_where_a_folder_should_be_is_named(tmp_path):
    (tmp_path / "file.npy").write_bytes(array(CLOUD))
    with pytest.raises(InputError, match="file.npy: is a file; pass --root FOLDER"):
        objects.prepare("folder", tmp_path / "file.npy", 10)
    with pytest.raises(InputError, match="train: no clouds"):
        files.own_clouds(tmp_path / "file.npy", ("train",), "")


# --- weights and checkpoints

@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    recipe = train_clip.RECIPES["synthetic"]._replace(width=32, layers=1, text_width=32,
                                                      text_layers=1, embed=16, size=32)
    config = train_clip.config_of(recipe)
    model, _ = nanoclip.build(config, train_clip.WORDS)
    path = tmp_path_factory.mktemp("nano") / "nano.safetensors"
    nanoclip.save(path, model, config, train_clip.WORDS)
    return path, model, config


@pytest.mark.parametrize("where", [
    ("embed_dim",), ("stem",), ("vision_cfg",), ("vision_cfg", "width"), ("vision_cfg", "layers"),
    ("vision_cfg", "head_width"), ("text_cfg", "heads"), ("extra",)])
def test_nano_clip_with_other_metadata_is_refused(nano, where, tmp_path):
    path, model, config = tmp_path / "n.safetensors", nano[1], copy.deepcopy(nano[2])
    part = config
    for key in where[:-1]:
        part = part[key]
    for odd in None, "x", 0, -1, 2**40, 0.5, [], 33:
        part[where[-1]] = odd
        nanoclip.save(path, model, config, train_clip.WORDS)
        with pytest.raises(InputError, match="n.safetensors"):
            nanoclip.load(path)


def test_weight_files_are_read_or_named_whatever_their_bytes(nano, tmp_path):
    good = nano[0].read_bytes()
    bad = tmp_path / "bad.safetensors"
    for blob in nasty(good, np.random.default_rng(18), 40):
        bad.write_bytes(blob)
        one_line(nanoclip.load, bad)
        one_line(pretrained.read_weights, bad)
    path = tmp_path / "w.pt"
    torch.save({"model": {"a": torch.ones(3)}}, path)
    assert pretrained.read_weights(path)[0]["a"].tolist() == [1, 1, 1]
    for blob in nasty(path.read_bytes(), np.random.default_rng(18), 60):
        path.write_bytes(blob)
        one_line(pretrained.read_weights, path)
    loop = {}
    loop["model"] = loop                                # a box in itself
    torch.save(loop, path)
    assert pretrained.read_weights(path)[0] == {}


def saved_run(folder):
    """A checkpoint as train_cls.py saves it, of a toy model that has made a step."""
    cfg = train_cls.settings(train_cls.flags([]))[0]
    cfg.update(classes=["a", "b"], up="z", frozen={"name": "random", "sha256": "0" * 64})
    kept = run.Run("cls", cfg, run.Setup("cpu", "fp32"))
    kept.folder, kept.model = folder, torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(kept.model.parameters())
    kept.model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    kept.at.update(step=1, sums=[1.0, 2.0, 3.0, 4.0])
    draw = torch.Generator().manual_seed(0).get_state()
    kept.save("last.pt", optimizer=optimizer.state_dict(), draw=draw)
    return torch.load(folder / "last.pt", weights_only=True)


def resumed(path):
    """The checkpoint as a run that goes on meets it, up to its first step."""
    cfg, saved, folder = train_cls.settings(train_cls.flags(["--resume", str(path)]))
    model = torch.nn.Linear(2, 1)
    checkpoint.load_weights(model, saved["model"], where=saved["file"])
    going = run.Run("cls", cfg, run.Setup("cpu", "fp32"), saved)
    optimizer = torch.optim.AdamW(model.parameters())
    going.folder, going.first = path, False
    next(going.epochs(model, optimizer, ""))
    next(going.steps(5))
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return going


def leaves(content, where=()):
    if isinstance(content, dict) and content:
        for key, part in content.items():
            yield from leaves(part, (*where, key))
    yield where


def test_a_checkpoint_with_other_content_is_named(tmp_path):
    good, accepted = saved_run(tmp_path), []
    assert resumed(tmp_path).at["sums"] == [1, 2, 3, 4]
    odd = [None, "x", -1, 0.5, 2**70, math.nan, [], [0.5], {}, {"x": 1}, True, torch.ones(7),
           torch.ones(2, dtype=torch.complex64), torch.ones(1).to_sparse()]
    for i, where in enumerate(leaves(good)):
        for value in odd[i % 3::3]:
            bad = copy.deepcopy(good)
            part = bad
            for key in where[:-1]:
                part = part[key]
            if where:
                part[where[-1]] = value
            torch.save(bad if where else value, tmp_path / "last.pt")
            if one_line(resumed, tmp_path):
                accepted.append((where, value))
            if where:
                del part[where[-1]]
                torch.save(bad, tmp_path / "last.pt")
                one_line(resumed, tmp_path)
    # what is taken after all is of the kind it was, or is not read: settings of the optimiser
    # follow from the recipe, those of the frozen weights are compared with the file's own
    for where, value in accepted:
        was = good
        for key in where:
            was = was[key]
        alike = type(value) is type(was) or {type(value), type(was)} <= {int, float}
        assert alike or where[:2] in {("config", "frozen"), ("optimizer", "param_groups")} or (
            where[-1] in ("root", "official")), (where, value)
    assert len(accepted) < 30


CHANGES = [                                             # of a checkpoint's config: what is named
    ("cls", {"recipe.groups": 2000}, "--groups 2000 must be at most --points"),
    ("cls", {"recipe.more": 1}, "more is not as this train_cls.py saves it"),
    ("cls", {"recipe.dropout": 1.0}, "checkpoint.config.recipe.dropout is not as"),
    ("det", {"recipe.queries": 2000}, "--queries 2000 must be at most --tokens"),
    ("det", {"recipe.points": 100}, "patches at most --points 100"),
    ("det", {"recipe.layers": 2**40}, "checkpoint.config.recipe.layers is not as"),
    ("seg", {"recipe.tokens": 64}, "a quarter of them become tokens"),
    ("seg", {"recipe.neighbours": 5000}, "each needs 5000 neighbours"),
    ("clip", {"recipe.width": 0}, "checkpoint.config.recipe.width is not as"),
    ("clip", {"recipe.width": 250}, "its recipe has sizes that make no nano-CLIP"),
    ("fewshot", {"settings": []}, "done does not follow from its config"),
    ("fewshot", {"settings": [[5, 20]]}, "done does not follow from its config"),
    ("fewshot", {"episodes": 11}, "the run is not finished"),
    ("fewshot", {"compare": ["none"]}, "checkpoint.config.compare is not as")]


@pytest.mark.parametrize("task, change, words", CHANGES, ids=str)
def test_a_config_that_contradicts_itself_is_named_where_it_is_loaded(task, change, words,
                                                                      tmp_path):
    script = importlib.import_module(f"train_{task}")
    cfg = script.settings(script.flags([]))[0]
    cfg.update(classes=["a", "b"], published=False)
    saved = {"task": task, "config": cfg, "at": run.Run("", cfg, None).at, "model": {},
             "frozen": None if task == "clip" else {"name": "random", "sha256": "0"}}
    if task == "fewshot":
        line = {"setting": [5, 10], "variant": "frozen", "last": 0.5, "best": 0.5, "best_epoch": 1,
                "seconds": 1.0, "trained": 1, "frozen": 1, "classes": ["a"]}
        saved.update(optimizer=None, done=[{**line, "episode": i} for i in range(10)])
    torch.save(saved, tmp_path / "last.pt")
    flags = script.flags(["--eval", str(tmp_path)])
    assert script.settings(flags)[0]["classes"] == ["a", "b"]
    for key, value in change.items():
        part, _, name = key.rpartition(".")
        (cfg[part] if part else cfg)[name] = value
    torch.save(saved, tmp_path / "last.pt")
    with pytest.raises(InputError, match=words):
        script.settings(flags)


def test_a_checkpoint_is_read_or_named_whatever_its_bytes(tmp_path):
    saved_run(tmp_path)
    for blob in nasty((tmp_path / "last.pt").read_bytes(), np.random.default_rng(18), 100):
        (tmp_path / "last.pt").write_bytes(blob)
        one_line(resumed, tmp_path)
