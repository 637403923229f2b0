"""data/kitti.py: SemanticKITTI's map and splits, scans read rightly or named in one line."""
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from data import kitti
from data.files import BrokenFile
from run import InputError

# the published learning_map and learning_map_inv, number in the file -> class of the benchmark
MAP = {0: 0, 1: 0, 52: 0, 99: 0, 10: 1, 252: 1, 11: 2, 15: 3, 18: 4, 258: 4, 13: 5, 16: 5, 20: 5,
       256: 5, 257: 5, 259: 5, 30: 6, 254: 6, 31: 7, 253: 7, 32: 8, 255: 8, 40: 9, 60: 9, 44: 10,
       48: 11, 49: 12, 50: 13, 51: 14, 70: 15, 71: 16, 72: 17, 80: 18, 81: 19}
BACK = [10, 11, 15, 18, 20, 30, 31, 32, 40, 44, 48, 49, 50, 51, 70, 71, 72, 80, 81]
TABLE = kitti.published_classes()


def write_scan(folder, name="000000", points=50, seed=0, labels=True):
    """A scan in the published form; its labels are numbers of the map with objects above them."""
    rng = np.random.default_rng(seed)
    rows = rng.uniform((-40, -40, -2, 0), (40, 40, 2, 1), (points, 4)).astype("<f4")
    number = rng.choice(list(MAP), points).astype("<u4")
    for place, content in (("velodyne", rows), ("labels", number | 7 << 16)):
        if place == "velodyne" or labels:
            (folder / place).mkdir(parents=True, exist_ok=True)
            suffix = "bin" if place == "velodyne" else "label"
            content.tofile(folder / place / f"{name}.{suffix}")
    return rows, number


@pytest.fixture
def published(tmp_path):
    for number in range(22):
        write_scan(tmp_path / f"sequences/{number:02d}", seed=number, labels=number < 11)
    return tmp_path


def test_the_map_is_the_published_one_and_so_is_its_inverse():
    for number in range(2 ** 16):
        assert TABLE[number] == MAP.get(number, -1) - 1
    assert len(MAP) == 34 and kitti.numbers_of(kitti.CLASSES).tolist() == BACK
    assert [TABLE[number] for number in BACK] == list(range(19))
    assert [kitti.CLASSES[MAP[n] - 1] for n in (252, 254, 259, 60, 81)] == [
        "car", "person", "other-vehicle", "road", "traffic-sign"]
    assert len(kitti.THINGS) == 8 and kitti.THINGS[-1] == "motorcyclist"


def scans(root):
    return [kitti.pairs(root, sequences) for sequences in (kitti.TRAIN, kitti.VAL)]


def test_the_split_is_the_published_one(published):
    train, test = scans(published)
    assert [path.parts[-3] for path, _ in train] == "00 01 02 03 04 05 06 07 09 10".split()
    assert [path.parts[-3] for path, _ in test] == ["08"]
    assert [(path.parts[-3], label) for path, label in kitti.pairs(
        published, kitti.TEST, labels=False)] == [(str(n), None) for n in range(11, 22)]
    write_scan(published / "sequences/08", "000010")
    write_scan(published / "sequences/08", "000002")
    names = [path.stem for path, _ in scans(published)[1]]
    assert names == ["000000", "000002", "000010"]
    (published / "dataset").mkdir()
    (published / "sequences").rename(published / "dataset/sequences")
    assert len(scans(published)[0]) == 10


def test_a_scan_is_read_as_it_was_written(tmp_path):
    rows, number = write_scan(tmp_path, points=300)
    paths = tmp_path / "velodyne/000000.bin", tmp_path / "labels/000000.label"
    scan = kitti.read_scan(*paths, TABLE)
    assert (scan.xyz == rows[:, :3]).all() and (scan.remission == rows[:, 3]).all()
    assert scan.label.tolist() == [MAP[n] - 1 for n in number]
    assert scan.xyz.dtype == scan.remission.dtype == np.float32
    assert (kitti.read_scan(paths[0]).label == kitti.IGNORE).all()
    kitti.write_labels(tmp_path / "out/000000.label", scan.label.clip(0),
                       kitti.numbers_of(kitti.CLASSES))
    written = np.fromfile(tmp_path / "out/000000.label", "<u4")
    assert written.tolist() == [BACK[max(MAP[n] - 1, 0)] for n in number]


def test_remission_has_the_scale_that_is_given(tmp_path):
    rows, _ = write_scan(tmp_path)
    rows[:, 3] *= 200
    rows[0, 3] = 200
    path = tmp_path / "velodyne/000000.bin"
    rows.tofile(path)
    with pytest.raises(BrokenFile, match="remission from .* to 200, expected 0 to 1; pass --rem"):
        kitti.read_scan(path)
    np.testing.assert_allclose(kitti.read_scan(path, full=200).remission, rows[:, 3] / 200)


def spoil(rows, row, column, value):
    rows = rows.copy()
    rows[row, column] = value
    return rows.tobytes()


@pytest.mark.parametrize("content, words", [
    (lambda r: b"", "000000.bin: 0 bytes; a scan has 16 for each point"),
    (lambda r: r.tobytes()[:-3], "000000.bin: 797 bytes; a scan has 16"),
    (lambda r: spoil(r, 3, 1, np.nan), "000000.bin: NaN or infinite numbers in 1 of 50 points"),
    (lambda r: spoil(r, 3, 3, np.inf), "000000.bin: NaN or infinite numbers in 1 of 50 points"),
    (lambda r: spoil(r, 9, 0, -40_000), "000000.bin: has a point 40,000 m from the sensor"),
    (lambda r: spoil(r, 9, 3, -.5), "000000.bin: remission from -0.5 to"),
    (lambda r: r[:49].tobytes(), "000000.label: 200 bytes for 49 points, which take 4 each"),
])
def test_a_damaged_scan_is_named(tmp_path, content, words):
    rows, _ = write_scan(tmp_path)
    paths = tmp_path / "velodyne/000000.bin", tmp_path / "labels/000000.label"
    paths[0].write_bytes(content(rows))
    with pytest.raises(BrokenFile, match=words) as error:
        kitti.read_scan(*paths, TABLE)
    assert str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)


@pytest.mark.parametrize("content, words", [
    (None, "000000.label: missing; every scan"),
    (b"", "000000.label: 0 bytes for 50 points"),
    (np.full(51, 40, "<u4").tobytes(), "000000.label: 204 bytes for 50 points"),
    (np.full(50, 41, "<u4").tobytes(), "has the label 41, which is not in the map: 0, 1, 10, 11,"),
    (np.full(50, 10 << 16 | 999, "<u4").tobytes(), "has the label 999"),
])
def test_damaged_labels_are_named(tmp_path, content, words):
    write_scan(tmp_path)
    paths = tmp_path / "velodyne/000000.bin", tmp_path / "labels/000000.label"
    paths[1].unlink()
    if content is not None:
        paths[1].write_bytes(content)
    with pytest.raises(BrokenFile, match=words) as error:
        kitti.read_scan(*paths, TABLE)
    assert str(error.value).startswith(str(paths[1])) and "\n" not in str(error.value)


def test_what_is_missing_is_named_before_anything_is_read(published):
    (published / "sequences/05/labels/000000.label").unlink()
    with pytest.raises(BrokenFile, match="05/labels/000000.label: missing"):
        scans(published)
    (published / "sequences/03/velodyne/000000.bin").unlink()
    with pytest.raises(InputError, match="sequences/03/velodyne: no scans; fetch the velodyne"):
        scans(published)
    for path in (published / "sequences/01").rglob("*.*"):
        path.unlink()
    (published / "sequences/01").rename(published / "gone")
    with pytest.raises(InputError, match="sequences/01: no such folder, and the run needs .* 01"):
        scans(published)
    with pytest.raises(InputError, match="nowhere: no such folder; fetch"):
        scans(published / "nowhere")


def test_no_scan_is_left_out_or_invented_in_silence(published, capsys):
    folder = published / "sequences/08"
    write_scan(folder, "000001")
    (folder / "velodyne/000001.bin").rename(folder / "velodyne/000001.BIN")
    (folder / "velodyne/._000000.bin").write_bytes(bytes(16))          # what a Mac leaves
    (folder / "labels/000003.label").write_bytes(bytes(16))
    (folder / "velodyne/notes.txt").write_text("x", encoding="utf-8")
    assert [path.name for path, _ in scans(published)[1]] == ["000000.bin", "000001.BIN"]
    said = capsys.readouterr().err
    assert said == f"{folder}: passed over 2 files: velodyne/notes.txt, labels/000003.label\n"
    write_scan(folder, "000000 (1)")
    with pytest.raises(InputError, match="000000"):
        scans(published)


def test_readers_in_threads_leave_the_filters_of_warnings_alone(published):
    entries = scans(published)[0] * 4
    before = [*warnings.filters]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            assert len([*pool.map(lambda entry: kitti.read_scan(*entry, TABLE), entries)]) == 40
    assert warnings.filters == before


def test_a_full_disk_is_one_line():
    with pytest.raises(InputError, match="/dev/full: cannot be written .*; make room or give"):
        kitti.write_labels("/dev/full", np.zeros(4, int), np.arange(1, 3))


def test_own_scans_have_their_own_classes(tmp_path):
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
        np.full((4, 4), .5, "<f4").tofile(tmp_path / part / "a.bin")
        np.array([0, 1, 2, 2], "<u4").tofile(tmp_path / part / "a.label")
    with pytest.raises(InputError, match="classes.txt: missing; pass --root FOLDER"):
        kitti.own_scans(tmp_path)
    (tmp_path / "classes.txt").write_text("ground\ntree\n", encoding="utf-8")
    train, test, names = kitti.own_scans(tmp_path)
    assert names == ("ground", "tree") and len(train) == len(test) == 1
    table = kitti.own_classes(names)
    assert kitti.read_scan(*train[0], table).label.tolist() == [-1, 0, 1, 1]
    np.array([0, 1, 2, 3], "<u4").tofile(test[0][1])
    with pytest.raises(BrokenFile, match="has the label 3, which is not in the map: 0 to 2; rep"):
        kitti.read_scan(*test[0], table)
    test[0][1].rename(tmp_path / "test/a.LABEL")
    assert kitti.own_scans(tmp_path)[1][0][1].name.lower() == "a.label"
    (tmp_path / "test/a.LABEL").unlink()
    with pytest.raises(BrokenFile, match="test/a.label: missing"):
        kitti.own_scans(tmp_path)
