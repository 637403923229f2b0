"""data/objects.py: object data sets in the forms of their owners, and what is prepared of them."""
import os
import pickle
import shutil
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from data import objects, prepared
from data.objects import prepare, test_rows as rows_to_test
from run import InputError
from test_files import CLOUD, array, off, shapes


def table_of(*args, **kwargs):
    with np.load(prepare(*args, **kwargs), allow_pickle=False) as table:
        return dict(table)


def parts_of(table, fraction=0.2):
    """The training and the test part: xyz, label of each."""
    test = rows_to_test(table, fraction)
    return [(table["xyz"][rows], table["label"][rows]) for rows in (~test, test)]


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


@pytest.fixture
def small(tmp_path):
    """ROOT/{train,test}/{a,b}/0.npy of 50 points."""
    for part in ("train", "test"):
        for name in "ab":
            (tmp_path / part / name).mkdir(parents=True)
            np.save(tmp_path / part / name / "0.npy", CLOUD)
    return tmp_path


# --- anybody's own folder

def test_a_folder_is_read_with_and_without_a_test_part(folder):
    table = table_of("folder", folder, 128)
    (train, _), (_, test_label) = parts_of(table)
    assert table["classes"].tolist() == ["ball", "cube", "stick"]
    assert train.shape == (21, 128, 3) and train.dtype == np.float32
    assert test_label.tolist() == [0] * 4 + [1] * 4 + [2] * 4 and test_label.dtype == np.int64
    assert table["names"][[0, 20]].tolist() == ["ball/0.npy", "stick/6.npy"]
    assert table["where"][-1] == str(folder / "test" / "stick" / "3.npy")
    assert str(table["form"]) == f"files under {folder}" and (table["count"] == 128).all()
    radius = np.linalg.norm(train, axis=2)
    assert np.allclose(radius[:7], 1, atol=1e-5) and (radius[7:14] > 1.2).any()
    flat = table_of("folder", folder / "train", 128)
    assert set(flat["part"]) == {-1}
    (train, _), (test, _) = parts_of(flat, 0.3)
    assert (len(train), len(test)) == (15, 6)
    both = np.sort(np.concatenate([train, test]), 1).reshape(21, -1)
    assert len(np.unique(both, axis=0)) == 21, "an object is in one part, and in one only"


def test_what_is_set_aside_is_the_same_in_every_run_and_class_by_class():
    label, where = np.repeat([0, 1, 2], [10, 4, 5]), np.array(["data/a/x.npy"] * 19)
    mask = objects.set_aside(label, ("a", "b", "c"), 0.3, where)
    assert [mask[label == k].sum() for k in range(3)] == [3, 1, 2]
    order = np.random.default_rng([0, 1]).permutation(4)[:1]
    assert np.flatnonzero(mask[10:14]).tolist() == order.tolist()
    with pytest.raises(InputError, match="data/a: 10 objects are too few to set 10 aside"):
        objects.set_aside(label, ("a", "b", "c"), 0.99, where)


def test_too_few_objects_to_set_some_aside_is_an_error(tmp_path):
    (tmp_path / "a").mkdir()
    np.save(tmp_path / "a" / "0.npy", CLOUD)
    with pytest.raises(InputError, match="a: 1 object is too few to set 1 aside"):
        parts_of(table_of("folder", tmp_path, 32))


def test_a_sample_does_not_depend_on_what_its_file_is_called(tmp_path):
    for name in ("a.npy", "b.npy"):
        np.save(tmp_path / name, CLOUD)
    one, other = (objects.read_one(tmp_path / name, 32, 16) for name in ("a.npy", "b.npy"))
    assert (one == other).all()
    np.save(tmp_path / "b.npy", CLOUD + 1)
    assert not (objects.read_one(tmp_path / "b.npy", 32, 16) == one + 1).all()  # another draw


def mistakes(root):
    """A broken folder for each entry: what to do to a good one, what the message says."""
    good = root / "train" / "a" / "0.npy"
    return {
        "missing root": (lambda: None, "no such file or folder"),
        "no classes": (lambda: [p.rename(root / p.name) for p in (root / "train").iterdir()],
                       "no class folders"),
        "empty class": (lambda: (root / "train" / "empty").mkdir(),
                        "no objects in this class folder"),
        "capitals": (lambda: [p.rename(root / p.name.title()) for p in list(root.glob("t*"))],
                     "Test, Train: names of parts, not of classes; pass --root FOLDER with"),
        "train alone": (lambda: shutil.rmtree(root / "test"), "train: names of parts"),
        "valid": (lambda: (root / "test").rename(root / "valid"), "train, valid: names of parts"),
        "one level too high": (
            lambda: [(root / "data").mkdir(),
                     *((root / part).rename(root / "data" / part) for part in ("train", "test"))],
            r"data: no objects, but folders .test, train.; pass --root FOLDER"),
        "parts in classes": (
            lambda: [shutil.move(root / part / c, root / c / part)
                     for part in ("train", "test") for c in "ab"] + [
                         (root / part).rmdir() for part in ("train", "test")],
            r"a: no objects, but folders .test, train.; pass"),
        "space": (lambda: (root / "test/a").rename(root / "test/a "), "'a ' begins or ends with a"),
        "unknown test class": (lambda: (root / "test" / "zebra").mkdir(), "zebra: a class that"),
        "no test object": (lambda: [p.unlink() for p in root.glob("test/*/*")],
                           "no test objects found"),
        "few points": (lambda: np.save(good, CLOUD[:9]),
                       "0.npy: has 9 points, fewer than --points 16; pass --points 9 or move"),
        "truncated": (lambda: good.write_bytes(array(CLOUD)[:-50]), "0.npy"),
    }


def test_the_axis_that_is_up_follows_from_the_form_and_not_from_a_path():
    forms = {"HDF5 files under x": "y", "x/training_objectdataset.h5": "y",
             "x/training_objectdataset.h5; 3 left out": "y",
             "files under x/objectdataset/mine": "z", "meshes of ModelNet40.zip": "z"}
    assert {form: objects.up_of(form) for form in forms} == forms


def test_classes_that_differ_in_case_alone_are_refused(small):
    if (small / "train/A").exists():
        pytest.skip("this file system does not tell a from A")
    (small / "train/A").mkdir()
    np.save(small / "train/A/0.npy", CLOUD)
    with pytest.raises(InputError, match="train: A and a: classes that differ in case alone; make"):
        objects.find_folder(small, 32)


def test_a_script_without_a_flag_for_points_advises_none(small):
    np.save(small / "train" / "a" / "0.npy", CLOUD[:9])
    with pytest.raises(InputError, match="0.npy: has 9 points, and 16 are needed; take it out"):
        objects.check_points(table_of("folder", small, 32), 16, flag=False)


@pytest.mark.parametrize("case", mistakes(Path(".")))
def test_a_broken_folder_is_explained(small, case):
    damage, words = mistakes(small)[case]
    damage()
    with pytest.raises(InputError, match=words) as error:
        root = small / "nowhere" if case == "missing root" else small
        objects.check_points(table_of("folder", root, 32), 16)
    assert "\n" not in str(error.value) and str(small) in str(error.value)


def test_names_that_are_not_utf8_are_read(small):
    name = os.fsdecode(b"st\xfchl.npy")
    try:
        np.save(small / "train" / "a" / name, CLOUD)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    table = table_of("folder", small, 32)
    assert f"a/{name}" in table["names"].tolist() and len(table["xyz"]) == 5


def test_what_is_not_read_is_named_and_litter_is_nothing(small, capsys):
    box = small / "train" / "a"
    (box / "more").mkdir()
    for name in ("more/o9.xyz", "o7.glb", "._0.npy", ".DS_Store", "Thumbs.db"):
        (box / name).touch()
    for folder in (small, small / "train", small / "test"):
        (folder / "__MACOSX" / "a").mkdir(parents=True)
        (folder / "__MACOSX" / "a" / "._0.npy").touch()
    np.save(small / "train" / "b" / "1.NPY", CLOUD)
    (small / "train" / "b" / "1.NPY.npy").rename(small / "train" / "b" / "1.NPY")
    (small / "test" / "loose.off").touch()
    (small / "more").mkdir()
    (small / "more" / "0.obj").touch()
    said = [f"{small}: passed over 1 file: more/0.obj",
            f"{box}: passed over 2 files: more/o9.xyz, o7.glb",
            f"{small / 'test'}: passed over 1 file: loose.off"]
    for _ in range(2):
        table = table_of("folder", small, 32)
        assert table["names"].tolist() == ["a/0.npy", "b/0.npy", "b/1.NPY", "a/0.npy", "b/0.npy"]
        assert str(table["form"]) == "; ".join([f"files under {small}", *said])
        assert capsys.readouterr().err.splitlines() == said
    for name in ("more/o9.xyz", "o7.glb"):
        (box / name).unlink()
    assert "glb" not in str(table_of("folder", small, 32)["form"])


def test_copies_of_an_object_are_refused(small):
    for name in ("0.off", "0 (1).npy", "0 - Copy.npy", "0 copy.npy"):
        path = small / "train" / "b" / name
        path.touch()
        with pytest.raises(InputError, match="by its name a copy of 0.npy, which would count"):
            prepare("folder", small, 32)
        path.unlink()
    assert len(table_of("folder", small, 32)["xyz"]) == 4


def test_val_stands_for_test_but_not_beside_it(small):
    first = table_of("folder", small, 32)
    (small / "test").rename(small / "val")
    second = table_of("folder", small, 32)
    assert (first["xyz"] == second["xyz"]).all() and second["part"].tolist() == [0, 0, 1, 1]
    (small / "test").mkdir()
    with pytest.raises(InputError, match="has both test/ and val/, and a run tests on one"):
        prepare("folder", small, 32)


# --- preparing

def test_prepared_data_is_kept_and_prepared_again_when_a_file_changes(small, monkeypatch):
    first = table_of("folder", small, 32)
    kept = small / ".nanoepcl" / "objects"
    assert [p.name for p in kept.iterdir()] == ["folder-32.npz"]
    monkeypatch.setattr(objects, "sample", lambda *a: pytest.fail("prepared again"))
    assert (table_of("folder", small, 32)["xyz"] == first["xyz"]).all()
    monkeypatch.undo()
    table_of("folder", small, 40)
    assert sorted(p.name for p in kept.iterdir()) == ["folder-32.npz", "folder-40.npz"]
    changed = small / "train" / "a" / "0.npy"
    np.save(changed, CLOUD * 2 + 1)
    os.utime(changed, (1e9, 1e9))                       # a file system may count time in ticks
    assert not (table_of("folder", small, 32)["xyz"] == first["xyz"]).all()
    np.save(small / "train" / "a" / "1.npy", CLOUD)
    assert len(table_of("folder", small, 32)["xyz"]) == 5
    (small / "train" / "a" / "1.npy").unlink()
    assert len(table_of("folder", small, 32)["xyz"]) == 4


def test_a_prepared_file_that_is_cut_short_is_made_again(small):
    path = prepare("folder", small, 32)
    whole = path.read_bytes()
    for part in (b"half a file", b"", whole[:-50], whole[:len(whole) // 2]):
        path.write_bytes(part)
        assert len(table_of("folder", small, 32)["xyz"]) == 4


def test_an_interrupted_preparation_leaves_no_file(small, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(objects, "sample", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare("folder", small, 32)
    assert not [p for p in small.glob(".nanoepcl/**/*") if p.is_file()]


def test_what_was_prepared_follows_a_folder_that_is_moved(small, tmp_path_factory, monkeypatch):
    first = table_of("folder", small, 32)
    moved = tmp_path_factory.mktemp("elsewhere") / "data"
    small.rename(moved)
    monkeypatch.setattr(objects, "sample", lambda *a: pytest.fail("prepared again"))
    table = table_of("folder", moved, 32)
    assert (table["xyz"] == first["xyz"]).all() and str(table["form"]) == f"files under {moved}"
    assert table["where"][0] == str(moved / "train" / "a" / "0.npy")


def test_two_may_prepare_at_once(small):
    results = []

    def work():
        results.append(table_of("folder", small, 32)["xyz"])
    runs = [threading.Thread(target=work) for _ in range(3)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert len(results) == 3 and all((xyz == results[0]).all() for xyz in results)
    assert [p.name for p in (small / ".nanoepcl" / "objects").iterdir()] == ["folder-32.npz"]


def test_a_root_that_cannot_be_written_is_prepared_elsewhere(small, monkeypatch, capsys):
    can, cache = prepared.writable, small.parent / f"{small.name}-cache"
    monkeypatch.setattr(prepared, "writable", lambda p: small not in p.parents and can(p))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    path = prepare("folder", small, 32)
    assert cache in path.parents and f"{small}: cannot be written" in capsys.readouterr().err
    assert not (small / ".nanoepcl").exists()


def test_many_objects_are_prepared_in_processes_with_the_same_result(small):
    for i in range(1000):
        np.save(small / "train" / "b" / f"{i}.npy", CLOUD[:3] + i)
    path = prepare("folder", small, 4, workers=2)
    with np.load(path) as table:
        two = table["xyz"]
    path.unlink()
    assert (table_of("folder", small, 4, workers=1)["xyz"] == two).all() and len(two) == 1003


def test_a_small_cloud_repeats_its_points_and_says_how_many_are_its_own(small):
    np.save(small / "train" / "a" / "0.npy", CLOUD[:20])
    table = table_of("folder", small, 32)
    assert table["count"].tolist() == [20, 32, 32, 32]
    for points in (table["xyz"][0], table["xyz"][0, :20]):
        assert len(np.unique(points, axis=0)) == 20
    xyz, count = objects.sample(objects.Source("a/0.npy", 0, str(small / "train/a/0.npy")), 32)
    assert xyz.shape == (32, 3) and count == 20


def test_unit_sphere_centres_and_scales_every_cloud():
    xyz = objects.unit_sphere(torch.randn(4, 100, 3) * 7 + 3)
    assert xyz.mean(1).abs().max() < 1e-5
    assert torch.allclose(xyz.norm(dim=2).amax(1), torch.ones(4))


# --- ModelNet and ScanObjectNN

NAMES = [(c, part, f"{c}_{i:04d}") for c in ("chair", "night_stand")
         for i, part in ((1, "train"), (2, "train"), (3, "test"))]
LABELS = {"chair": 8, "night_stand": 23}


def lay_out(root, form, clouds):
    """Two train and one test object of chair and night_stand, in the layout of each archive."""
    parts = {part: [(c, n) for c, p, n in NAMES if p == part] for part in ("train", "test")}
    if form in ("off", "zip"):
        tree = {f"ModelNet40/{c}/{part}/{n}.off": off(header="OFF{} {} 0\n")
                for c, part, n in NAMES}
        tree["ModelNet40/airplane/train/airplane_0001.off"] = off()
        if form == "zip":
            more = {"__MACOSX/ModelNet40/chair/train/x.off": b"", "ModelNet40/README.txt": b"",
                    "ModelNet40/chair/train/._chair_0001.off": b""}
            tree["ModelNet40/chair/test/chair_0003.OFF"] = tree.pop(
                "ModelNet40/chair/test/chair_0003.off")
            with zipfile.ZipFile(root / "ModelNet40.zip", "w") as archive:
                for name, blob in {**tree, **more}.items():
                    archive.writestr(name, blob)
        else:
            for name, blob in tree.items():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_bytes(blob)
    elif form == "txt":
        root = root / "modelnet40_normal_resampled"
        for c, part, n in NAMES:
            (root / c).mkdir(parents=True, exist_ok=True)
            np.savetxt(root / c / f"{n}.txt", clouds[n], "%.6f", ",")
            with open(root / f"modelnet40_{part}.txt", "a", encoding="utf-8") as file:
                file.write(n + "\r\n")
    elif form == "h5":
        h5py = pytest.importorskip("h5py", reason="needs h5py: reads the HDF5 form")
        for part, group in parts.items():
            with h5py.File(root / f"ply_data_{part}0.h5", "w") as file:
                file["data"] = np.stack([clouds[n][:, :3] for _, n in group])
                file["label"] = np.array([[LABELS[c]] for c, _ in group], np.uint8)
    else:
        for part, group in parts.items():
            content = [[clouds[n] for _, n in group],
                       [np.array([LABELS[c]], np.int32) for c, _ in group]]
            blob = pickle.dumps(content, protocol=2 if form == "dat python2" else 5)
            if form == "dat python2":                                # numpy 1 wrote another name
                blob = blob.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            (root / f"modelnet40_{part}_8192pts_fps.dat").write_bytes(blob)


@pytest.fixture(scope="module")
def clouds():
    rng = np.random.default_rng(3)
    return {n: rng.normal(size=(2048, 6)).astype(np.float32) for _, _, n in NAMES}


def test_a_modelnet_without_some_classes_is_not_called_modelnet(tmp_path, clouds):
    lay_out(tmp_path, "off", clouds)
    for _ in range(2):                      # what was prepared before is refused, too
        with pytest.raises(InputError, match="ModelNet40: no training objects of bathtub, bed, "
                                             "bench and 34 more classes; fetch the data again, or"):
            prepare("modelnet40", tmp_path, 64)


@pytest.fixture
def few_classes(monkeypatch):
    monkeypatch.setattr(objects, "check_classes", lambda table, found: None)


@pytest.mark.usefixtures("few_classes")
@pytest.mark.parametrize("form", ["off", "zip", "txt", "h5", "dat", "dat python2"])
def test_modelnet_is_read_in_each_of_its_forms(tmp_path, form, clouds):
    lay_out(tmp_path, form, clouds)
    table = table_of("modelnet40", tmp_path, 2048)
    objects.check_points(table, 1024)
    (train, train_label), (test, test_label) = parts_of(table)
    extra = [0] if form in ("off", "zip") else []
    assert train_label.tolist() == [*extra, 8, 8, 23, 23] and test_label.tolist() == [8, 23]
    assert len(table["classes"]) == 40 and train.shape[1:] == test.shape[1:] == (2048, 3)
    assert table["part"].tolist() == [0] * len(train) + [1] * len(test)
    if form in ("txt", "h5", "dat", "dat python2"):
        expected = np.sort(clouds["chair_0001"][:, :3], 0)
        np.testing.assert_allclose(np.sort(train[0], 0), expected, atol=1e-6)
    if form == "zip":
        assert table["where"][0].endswith(".zip::ModelNet40/airplane/train/airplane_0001.off")
    if form == "h5":
        assert set(table["where"]) == {""} and table["names"][0].startswith("chair/")
        ten = table_of("modelnet10", tmp_path, 2048)
        assert parts_of(ten)[0][1].tolist() == [2, 2, 6, 6] and len(ten["classes"]) == 10
        with pytest.raises(InputError, match="HDF5.*clouds have 2,048 points, fewer than --points"):
            objects.check_points(table, 4096)


@pytest.mark.usefixtures("few_classes")
@pytest.mark.parametrize("form", ["off", "zip", "txt", "h5", "dat"])
def test_modelnet_is_prepared_again_when_its_files_change(tmp_path, form, clouds):
    lay_out(tmp_path, form, clouds)
    first = prepare("modelnet40", tmp_path, 64).stat().st_mtime_ns
    assert prepare("modelnet40", tmp_path, 64).stat().st_mtime_ns == first
    for path in tmp_path.rglob("*.*"):
        if path.is_file() and ".nanoepcl" not in path.parts:
            os.utime(path, (1e9, 1e9))
    assert prepare("modelnet40", tmp_path, 64).stat().st_mtime_ns != first


def test_modelnet_that_is_not_there_names_every_form_and_where_to_get_it(tmp_path):
    with pytest.raises(InputError) as error:
        prepare("modelnet40", tmp_path, 64)
    for word in ("ModelNet40.zip", "modelnet40_train.txt", "ply_data_train*.h5", "8192pts_fps.dat",
                 "princeton"):
        assert word in str(error.value)
    with pytest.raises(InputError, match="data/modelnet10: no such file or folder; get ModelNet10"):
        prepare("modelnet10", None, 64)


def test_a_modelnet_that_is_not_whole_is_explained(tmp_path, clouds):
    lay_out(tmp_path, "txt", clouds)
    (tmp_path / "modelnet40_normal_resampled/chair/chair_0003.txt").unlink()
    with pytest.raises(InputError, match="chair_0003.txt: missing; the data set is incomplete"):
        prepare("modelnet40", tmp_path, 64)
    (tmp_path / "modelnet40_normal_resampled/modelnet40_test.txt").unlink()
    with pytest.raises(InputError, match="modelnet40_test.txt: missing"):
        prepare("modelnet40", tmp_path, 64)
    (tmp_path / "modelnet40_train_8192pts_fps.dat").write_bytes(pickle.dumps([[CLOUD], [1]]))
    with pytest.raises(InputError, match="test_8192pts_fps.dat: missing beside its counterpart"):
        prepare("modelnet40", tmp_path, 64)
    (tmp_path / "other.zip").write_bytes(b"not an archive")
    with pytest.raises(InputError, match="other.zip: File is not a zip file; fetch it again"):
        prepare("modelnet40", tmp_path / "other.zip", 64)


def test_a_pickle_that_would_run_something_does_not(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)
    path = tmp_path / "modelnet40_train_8192pts_fps.dat"
    path.write_bytes(pickle.dumps([[Hostile()], [1]]))
    with pytest.raises(InputError, match=f"{path.name}: it asks for (posix|nt).system"):
        prepare("modelnet40", tmp_path, 64)
    assert not (tmp_path / "ran").exists()


@pytest.mark.usefixtures("few_classes")
def test_scanobjectnn_and_its_mistakes(tmp_path):
    h5py = pytest.importorskip("h5py", reason="needs h5py: ScanObjectNN is HDF5")
    folder = tmp_path / "main_split"
    folder.mkdir()
    for part, labels in (("training", [0, 14]), ("test", [3])):
        path = folder / f"{part}_objectdataset_augmentedrot_scale75.h5"
        with h5py.File(path, "w") as file:
            xyz = np.random.default_rng(0).normal(size=(len(labels), 2048, 3))
            file["data"] = xyz.astype(np.float32)
            file["label"] = np.array(labels)
    table = table_of("scanobjectnn", tmp_path, 1)
    assert table["classes"][14] == "toilet" and table["label"].tolist() == [0, 14, 3]
    assert table["part"].tolist() == [0, 0, 1]
    path = folder / "test_objectdataset_augmentedrot_scale75.h5"
    with h5py.File(path, "a") as file:
        file["label"][0] = 15
    os.utime(path, (1e9, 1e9))
    with pytest.raises(InputError, match="test labels reach from 15 to 15, but there are 15"):
        prepare("scanobjectnn", tmp_path, 1)
    with h5py.File(path, "a") as file:
        file["label"][0] = 3
        file["data"][0, 7] = np.nan
    os.utime(path, (1e9 + 1, 1e9 + 1))
    with pytest.raises(InputError, match="test cloud 0 has NaN or infinite coordinates"):
        prepare("scanobjectnn", tmp_path, 1)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match=path.name):
        prepare("scanobjectnn", tmp_path, 1)
