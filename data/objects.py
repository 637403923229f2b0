"""Object data sets, as their owners publish them -> one prepared file each.

    path = prepare("modelnet40", "ModelNet40.zip", stored=8192)
    (xyz, label), test, classes, form = load(path, points=1024, fraction=0.2)
    xyz = read_one("chair.obj", stored=8192, points=1024)

ModelNet40/10 in four forms, ScanObjectNN, and anybody's own folder. Meshes are sampled once,
uniformly by area.
"""
import os
import zipfile
import zlib
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np

from data.files import (broken, files_in, is_litter, loose_in, part_folder, passed_over,
                        read_lines, read_pickle, reading, refuse_copies, say, zip_members)
from data.meshes import SUFFIXES, read_object, sample_surface
from data.prepared import (in_parallel, is_fresh, kept_in, load_prepared, prepared_folder, save_npz,
                           sources_of)
from run import InputError, barrier, rank

MODELNET40 = tuple("""airplane bathtub bed bench bookshelf bottle bowl car chair cone cup curtain
    desk door dresser flower_pot glass_box guitar keyboard lamp laptop mantel monitor night_stand
    person piano plant radio range_hood sink sofa stairs stool table tent toilet tv_stand vase
    wardrobe xbox""".split())
MODELNET10 = tuple("bathtub bed chair desk dresser monitor night_stand sofa table toilet".split())
SCANOBJECTNN = tuple("""bag bin box cabinet chair desk display door shelf table bed pillow sink sofa
    toilet""".split())
PARTS = ("train", "test")
PART_NAMES = ("train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval")

HOW_TO_GET = {
    "modelnet40": "get ModelNet40.zip from modelnet.cs.princeton.edu and pass --root "
                  "ModelNet40.zip",
    "modelnet10": "get ModelNet10.zip from modelnet.cs.princeton.edu and pass --root "
                  "ModelNet10.zip",
    "scanobjectnn": "ask for h5_files.zip at hkust-vgd.github.io/scanobjectnn, unpack it and pass "
                    "--root FOLDER/h5_files",
    "folder": "pass --root FOLDER with FOLDER/{train,test}/CLASS/*, or FOLDER/CLASS/* "
              "(a part becomes the test set)",
}


# ---- One object ----------------------------------------------------------------------------------

class Source(NamedTuple):
    """Where one object's points are: a file, or a member of a .zip."""
    name: str                               # CLASS/file
    label: int
    path: str
    member: str = ""
    part: int = -1                          # 0: train, 1: test, -1: the data has no split

    def where(self):
        return f"{self.path}::{self.member}" if self.member else self.path

    def read(self):
        with reading(self.where(), "repair the file or move it out of the data"):
            if self.member:
                with zipfile.ZipFile(self.path) as archive:
                    blob = archive.read(self.member)
            else:
                blob = Path(self.path).read_bytes()
            return read_object(blob, Path(self.member or self.path).suffix.lower())


def sample(source, stored):
    """One object -> (points (stored, 3) float32, how many of them are its own).

    A mesh is sampled uniformly by area; a larger cloud loses random points, a smaller one repeats
    its own, which farthest point sampling never picks before all others.
    """
    xyz, faces = source.read()
    # the same content, the same sample: whatever the file is called, in any order of the files
    rng = np.random.default_rng(zlib.crc32(np.ascontiguousarray(xyz).data))
    if faces is not None:
        with reading(source.where(), "repair the file or move it out of the data"):
            return sample_surface(xyz, faces, stored, rng), stored
    if (xyz == xyz[0]).all():
        raise broken(source.where(), "all its points coincide")
    order = rng.permutation(len(xyz))[:stored]
    again = rng.integers(0, len(xyz), max(0, stored - len(xyz)))
    return xyz[np.concatenate([order, again])], len(order)


def read_one(path, stored, points):
    """Somebody's mesh or cloud of at least `points` points -> (stored, 3) float32."""
    if Path(path).suffix.lower() not in SUFFIXES:
        raise InputError(f"{path}: not a format this script reads ({' '.join(SUFFIXES)})")
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; give a mesh or a cloud")
    xyz, count = sample(Source(Path(path).name, 0, str(path)), stored)
    if count < points:
        raise InputError(f"{path}: has {count:,} points, and {points:,} are needed; give a larger "
                         "cloud")
    return xyz


def unit_sphere(xyz):
    """Centre every cloud on its mean and scale it into the unit sphere: (..., P, 3) -> the same."""
    xyz = xyz - xyz.mean(-2, keepdim=True)
    return xyz / xyz.norm(dim=-1).amax(-1).clamp_min(1e-12)[..., None, None]


def up_of(form):
    """The axis that points up in most data of a form, a string of `load`: for pictures, and for
    tests by name where --up is not given."""
    y_up = ("Point-BERT's", "text files", "HDF5 files", "folds of")     # as docs/data.md says
    first = form.split("; ")[0]             # of ScanObjectNN the path of its training file
    return "y" if first.startswith(y_up) or first.endswith(".h5") else "z"


# ---- One data set -> what there is to read -------------------------------------------------------

class Found(NamedTuple):
    """What a root holds: objects one by one, or files that hold all clouds of a part."""
    kept: str                               # the name of the prepared file
    place: Path                             # the folder whose .nanoepcl/ holds it
    classes: tuple
    form: str                               # what is read, for the log and the results
    objects: list = ()                      # of Source
    read: Callable = None                   # files -> xyz (n, P, 3), label (n,)
    files: tuple = ()                       # those of train, those of test


def find_folder(root, stored, known=()):
    """ROOT/{train,test}/CLASS/*, or ROOT/CLASS/*, of which a part is set aside later.

    known: the classes of a run that is evaluated; test/ will do, and may have some of them only.
    What is in neither form is named: objects in no class folder or below one, files of other kinds.
    """
    if root.is_file():
        raise InputError(f"--root {root}: is a file; {HOW_TO_GET['folder']}")

    def subfolders(path):
        return sorted(p.name for p in path.iterdir() if p.is_dir() and not is_litter(p.name))

    folders = {0: root / "train", 1: part_folder(root, "test")}     # as Source.part
    in_parts = folders[1].is_dir() and (folders[0].is_dir() or bool(known))
    if not in_parts:
        folders = {-1: root}
    elif not folders[0].is_dir():
        del folders[0]
    first = next(iter(folders.values()))
    classes = list(known) if 0 not in folders and in_parts else subfolders(first)
    if not classes:
        raise InputError(f"{root}: no class folders; {HOW_TO_GET['folder']}")
    parts = [name for name in classes if name.lower() in PART_NAMES]
    if parts:
        raise InputError(f"{first}: {', '.join(parts)}: names of parts, not of classes; "
                         f"{HOW_TO_GET['folder']}")
    for folder in folders.values():
        for name in subfolders(folder):
            if name != name.strip():
                raise InputError(f"{folder}: {name!r} begins or ends with a space; rename it")
    alike = {}
    for name in classes:
        if (other := alike.setdefault(name.lower(), name)) != name:
            raise InputError(f"{first}: {other} and {name}: classes that differ in case alone; "
                             "make them one, or rename one")
    for name in subfolders(folders[1]) if in_parts else ():
        if name not in classes:
            whose = f"{first} does" if 0 in folders else "the run does"
            raise InputError(f"{folders[1] / name}: a class that {whose} not have; "
                             + "add training objects or " * (0 in folders) + "remove it")
    objects, notes = [], []
    if in_parts:                            # beside the two parts
        others = [root / name for name in subfolders(root)
                  if root / name not in folders.values()]
        others = sum((files_in(folder, ())[1] for folder in others), loose_in(root, SUFFIXES))
        notes.append(passed_over(root, others))
    for part, folder in folders.items():
        notes.append(passed_over(folder, loose_in(folder, SUFFIXES)))       # in no class folder
        for label, name in enumerate(classes):
            where = folder / name
            files, others = files_in(where, SUFFIXES)
            if not files and part < 1:
                below = subfolders(where)
                if below:
                    raise InputError(f"{where}: no objects, but folders ({', '.join(below[:3])}); "
                                     f"{HOW_TO_GET['folder']}")
                raise InputError(f"{where}: no objects in this class folder "
                                 f"({' '.join(SUFFIXES)}); fill it or remove it")
            objects += [Source(f"{name}/{p.name}", label, str(p), part=part)
                        for p in files]
            notes.append(passed_over(where, others))
    if not objects:
        raise InputError(f"{first}: no objects of the run's classes; {HOW_TO_GET['folder']}")
    notes = [note for note in notes if note]
    say(notes)
    return Found(f"folder-{stored}.npz", root, tuple(classes),
                 "; ".join([f"files under {root}", *notes]), objects)


def find_modelnet(name, root, stored):
    """ModelNet40 or 10 in the four forms the field passes around; the first one found is used."""
    title = name.replace("modelnet", "ModelNet")
    classes = MODELNET40 if name == "modelnet40" else MODELNET10
    inside = (title, f"{name}_normal_resampled", "modelnet40_normal_resampled",
              "modelnet40_ply_hdf5_2048")
    places = [root] if root.is_file() else [root, *(root / folder for folder in inside)]
    for place in places:
        dat = [place / f"{name}_{part}_8192pts_fps.dat" for part in PARTS]
        if dat[0].is_file():                                          # 1. Point-BERT's pickles
            return Found(f"{name}-dat.npz", place, classes, f"Point-BERT's {dat[0]}", read=read_dat,
                         files=([dat[0]], [dat[1]]))
        if (place / f"{name}_train.txt").is_file():                   # 2. text files with normals
            objects = []
            for part, lines in enumerate(read_list(place / f"{name}_{part}.txt") for part in PARTS):
                for line in lines:
                    c = line.rpartition("_")[0]                # night_stand_0001 -> night_stand
                    path = place / c / f"{line}.txt"
                    label = label_of(c, classes, place)
                    objects.append(Source(f"{line}.txt", label, str(path), part=part))
            return Found(f"{name}-txt-{stored}.npz", place, classes, f"text files under {place}",
                         objects)
        if sorted(place.glob("ply_data_train*.h5")):                  # 3. PointNet's HDF5
            files = tuple(sorted(place.glob(f"ply_data_{part}*.h5")) for part in PARTS)
            refuse_copies(sum(files, []))
            return Found(f"{name}-h5.npz", place, classes, f"HDF5 files under {place}",
                         read=read_h5 if name == "modelnet40" else read_h5_of_ten, files=files)
        archive = place if place.suffix.lower() == ".zip" else place / f"{title}.zip"
        zipped = archive.is_file()
        if zipped or (place / classes[0] / "train").is_dir():         # 4. the authors' meshes
            if zipped:
                found = [(m, str(archive), m) for m in zip_members(archive, ".off")]
            else:
                found = [p for p in place.glob("*/*/*") if p.suffix.lower() == ".off"]
                found = [p for p in found if not is_litter(p.name)]
                refuse_copies(found)
                found = [(p.as_posix(), str(p), "") for p in found]
            objects = []
            for where, path, member in sorted(found):
                c, part, file = where.split("/")[-3:]
                if part in PARTS:
                    label = label_of(c, classes, where)
                    objects.append(Source(f"{c}/{file}", label, path, member, PARTS.index(part)))
            objects.sort(key=lambda source: source.part)
            return Found(f"{name}-{archive.name if zipped else 'off'}-{stored}.npz",
                         archive.parent if zipped else place, classes,
                         f"meshes of {archive if zipped else place}", objects)
    raise InputError(f"--root {root}: found none of {title}.zip, {classes[0]}/train/*.off, "
                     f"{name}_train.txt, ply_data_train*.h5, {dat[0].name}; {HOW_TO_GET[name]}")


def find_scanobjectnn(root):
    """PB_T50_RS, the hardest variant. For the others let --root name the training .h5 file."""
    name = "training_objectdataset_augmentedrot_scale75.h5"
    places = [root] if root.is_file() else [
        root / name, root / "main_split" / name, root / "h5_files" / "main_split" / name]
    train = next((path for path in places if path.is_file()), None)
    if train is None:
        raise InputError(f"--root {root}: found no main_split/{name}; {HOW_TO_GET['scanobjectnn']}")
    test = train.with_name(train.name.replace("training_", "test_"))
    return Found(f"scanobjectnn-{train.stem}.npz", train.parent, SCANOBJECTNN, str(train),
                 read=read_h5, files=([train], [test]))


def label_of(name, classes, where):
    if name not in classes:
        raise InputError(f"{where}: {name} is not one of the {len(classes)} classes of this data "
                         "set")
    return classes.index(name)


def read_list(path):
    if not path.is_file():
        raise InputError(f"{path}: missing; the archive modelnet40_normal_resampled.zip has it")
    return " ".join(read_lines(path)).split()


def read_h5(files):
    """`data` and `label` of HDF5 files, in order -> xyz (n, P, 3) float32, label (n,) int64."""
    try:
        import h5py
    except ImportError:
        raise InputError(f"{files[0]}: HDF5 files need h5py; pip install h5py") from None
    xyz, label = [], []
    for path in files:
        cure = "not a readable HDF5 file with `data` and `label`: fetch it again"
        with reading(path, cure), h5py.File(path) as file:
            most = 1032 * Path(path).stat().st_size             # deflate makes no more of it
            for x in file["data"], file["label"]:
                if x.dtype.kind not in "iuf" or x.nbytes > most:
                    raise ValueError(f"its `{x.name[1:]}` is {x.dtype} of shape {x.shape}")
            xyz.append(file["data"][..., :3].astype(np.float32))
            label.append(file["label"][:].reshape(-1).astype(np.int64))
            if xyz[-1].shape[1:] != (xyz[0].shape[1], 3) or len(xyz[-1]) != len(label[-1]):
                raise ValueError(f"has {len(label[-1])} labels for clouds of shape {xyz[-1].shape}")
    return np.concatenate(xyz), np.concatenate(label)


def read_h5_of_ten(files):
    """ModelNet40's files -> the clouds of ModelNet10's classes, with its labels."""
    xyz, label = read_h5(files)
    table = np.array([MODELNET10.index(c) if c in MODELNET10 else -1 for c in MODELNET40])
    kept = table[label] >= 0
    return xyz[kept], table[label[kept]]


def read_dat(files):
    """Point-BERT's pickle [points, labels]: of each object float32 (8192, 6) and int32 (1,)."""
    path, = files
    if not path.is_file():
        raise InputError(f"{path}: missing beside its counterpart; fetch it from the same place")
    with reading(path, "not one of Point-BERT's .dat files: fetch it again"):
        points, labels = read_pickle(path)
        if len(points) != len(labels):
            raise ValueError(f"has {len(points)} clouds, {len(labels)} labels")
        return (np.stack([np.array(p, np.float32).reshape(len(p), -1)[:, :3] for p in points]),
                np.array([int(np.asarray(n).reshape(-1)[0]) for n in labels]))


def read_fold(path, classes, way, shot, points):
    """A few-shot fold of Point-BERT -> [(xyz (n, P, 3), episode label (n,)) of train, of test], the
    class of each episode label.

    {"train": [(points (8192, 6), episode label, ModelNet40 label), ...], "test": [...]}.
    """
    with reading(path, "not a few-shot fold of Point-BERT: fetch it again"):
        fold, parts, pairs = read_pickle(path), [], set()
        for part in PARTS:
            rows = [(np.array(xyz, np.float32)[:, :3], int(np.asarray(k).item()),
                     int(np.asarray(c).item())) for xyz, k, c in fold[part]]
            xyz, label, _ = zip(*rows)
            parts.append((np.stack(xyz), np.array(label)))
            pairs |= {(k, c) for _, k, c in rows}
    pairs = sorted(pairs)
    if [k for k, _ in pairs] != list(range(way)):
        raise InputError(f"{path}: its labels are not those of {way} ways; fetch it again")
    labels = [c for _, c in pairs]
    if max(labels) >= len(classes) or min(labels) < 0:
        raise InputError(f"{path}: names class {max(labels)}, but the data have {len(classes)} "
                         "classes; pass the --data it was made for")
    if len(parts[0][0]) != way * shot:
        raise InputError(f"{path}: holds {len(parts[0][0])} training clouds, {way} ways of {shot} "
                         f"shots are {way * shot}")
    clouds = [xyz for xyz, _ in parts]
    if not all(np.isfinite(xyz).all() for xyz in clouds) or clouds[0].shape[1] < points:
        raise InputError(f"{path}: has NaN coordinates, or clouds of fewer than {points} points")
    return parts, labels


# ---- One data set -> the prepared file -----------------------------------------------------------

def prepare(name, root, stored, workers=1, known=()):
    """A data set -> the path of its prepared .npz file, made if it is not there or out of date.

    known: as `find_folder`.

    xyz (S, stored, 3) float32; count (S,), how many points are an object's own; label (S,) int64;
    part (S,) int8: 0 train, 1 test, -1 where the data has no split; names (S,), CLASS/file; where
    (S,), path or archive::member, empty for an object without a file of its own; classes (C,);
    form: what was read. HDF5 and .dat clouds keep all their points, whatever `stored`.
    """
    root = Path(root or f"data/{name}")
    if not root.exists():
        raise InputError(f"--root {root}: no such file or folder; {HOW_TO_GET[name]}")
    if name == "folder":
        found = find_folder(root, stored, known)
    elif name == "scanobjectnn":
        found = find_scanobjectnn(root)
    else:
        found = find_modelnet(name, root, stored)
    paths = list(dict.fromkeys(source.path for source in found.objects))
    for path in paths:
        if not Path(path).is_file():
            raise InputError(f"{path}: missing; the data set is incomplete, fetch it again")
    names = [(source.part, source.name, source.label) for source in found.objects]
    sources = sources_of([*paths, *sum(found.files, [])], stored, found.classes, names)
    path = prepared_folder(found.place, "objects", {found.kept: sources}) / found.kept
    if rank() == 0:                         # the first process prepares, the others wait
        if is_fresh(path, sources):
            follow(path, sources, found)
        else:
            table = read_whole(found) if found.read else sample_all(found, stored, workers)
            check(table, found, known)
            save_npz(path, sources, **table, classes=found.classes, form=found.form)
    barrier()
    if name != "folder":
        check_classes(load_prepared(path, ["label", "part"]), found)
    return path


def follow(path, sources, found):
    """Where the folder was moved, or is called otherwise, what was prepared says so from now on."""
    if kept_in([path], "form") == [found.form] or not os.access(path.parent, os.W_OK):
        return
    table = load_prepared(path)
    if found.objects:
        table["where"] = np.array([source.where() for source in found.objects], str)
    save_npz(path, sources, **{**table, "form": found.form})


def sample_all(found, stored, workers):
    """Every object, sampled."""
    objects = found.objects
    xyz = np.empty((len(objects), stored, 3), np.float32)
    count = np.empty(len(objects), np.int64)
    jobs = [(source, stored) for source in objects]
    samples = in_parallel(sample, jobs, workers, "object", least=1000, chunk=16)
    for i, (points, own) in enumerate(samples):
        xyz[i] = points
        count[i] = own
    return {"xyz": xyz, "count": count, "label": np.array([s.label for s in objects], np.int64),
            "part": np.array([s.part for s in objects], np.int8),
            "names": np.array([s.name for s in objects], str),
            "where": np.array([s.where() for s in objects], str)}


def read_whole(found):
    """Both parts as they stand in their files."""
    parts = [found.read(files) for files in found.files]
    sizes = [xyz.shape[1] for xyz, _ in parts]
    if sizes[0] != sizes[1]:
        raise InputError(f"{found.form}: training clouds have {sizes[0]:,} points, test clouds "
                         f"{sizes[1]:,}; fetch the data again")
    xyz = np.concatenate([xyz for xyz, _ in parts])
    label = np.concatenate([label for _, label in parts])
    names = [f"{found.classes[k] if 0 <= k < len(found.classes) else k}/{part}_{i}"
             for part, (_, labels) in zip(PARTS, parts) for i, k in enumerate(labels)]
    return {"xyz": np.ascontiguousarray(xyz, np.float32), "label": label.astype(np.int64),
            "count": np.full(len(label), xyz.shape[1]),
            "part": np.repeat(np.int8([0, 1]), [len(labels) for _, labels in parts]),
            "names": np.array(names, str), "where": np.full(len(label), "")}


def check(table, found, known=()):
    """Both parts have objects, labels fit the classes, coordinates are numbers. known: as
    `find_folder`."""
    if (table["part"] < 0).any():
        return                              # meshes and clouds of a folder: checked one by one
    finite = np.isfinite(table["xyz"]).all((1, 2))
    for part, title in enumerate(("training", "test")):
        mine = table["part"] == part
        label = table["label"][mine]
        if len(label) == 0 and part == 0 and known:
            continue
        if len(label) == 0:
            raise InputError(f"{found.form}: no {title} objects found")
        if not 0 <= label.min() <= label.max() < len(found.classes):
            raise InputError(f"{found.form}: {title} labels reach from {label.min()} to "
                             f"{label.max()}, but there are {len(found.classes)} classes; fetch "
                             "the data again")
        bad = np.flatnonzero(~finite[mine])
        if len(bad):
            raise InputError(f"{found.form}: {title} cloud {bad[0]} has NaN or infinite "
                             "coordinates; fetch the data again")


def check_classes(table, found):
    """A published data set has training and test objects of each class; after a broken unzip some
    are missing."""
    for part, title in enumerate(("training", "test")):
        counts = np.bincount(table["label"][table["part"] == part], minlength=len(found.classes))
        gone = [name for name, count in zip(found.classes, counts) if count == 0]
        if gone:
            more = f" and {len(gone) - 3} more classes" if len(gone) > 3 else ""
            raise InputError(f"{found.form}: no {title} objects of {', '.join(gone[:3])}{more}; "
                             "fetch the data again, or pass --data folder for classes of your own")


# ---- The prepared file -> what scripts train and test on -----------------------------------------

def load(path, points, fraction, split=None, flag=True):
    """-> train (xyz (n, P, 3), label (n,)), test, names of the classes, what was read.

    Every object must have `points` points of its own (flag: see `check_points`). fraction: of each
    class, where the data has no split. split: what `split_of` said when a run began; later objects
    are left out and named.
    """
    table = load_prepared(path)
    form = str(table["form"])
    if split and (table["part"] < 0).any():
        test, form = rows_of_split(table, split)
        rows = np.flatnonzero(test >= 0)
        test = test[rows] == 1
        for name in ("xyz", "label", "count", "where"):
            table[name] = table[name][rows]
    else:
        test = test_rows(table, fraction)
    check_points(table, points, flag)
    train, test = ((table["xyz"][rows], table["label"][rows]) for rows in (~test, test))
    return train, test, tuple(table["classes"].tolist()), form


def split_of(path, fraction):
    """Names of the training and of the test objects where a part is set aside. Which these are
    depends on all files of a class, so a run keeps the names. None: the data has its own split."""
    table = load_prepared(path, ["part", "label", "classes", "where", "names"])
    if (table["part"] >= 0).all():
        return None
    test, names = test_rows(table, fraction), table["names"]
    return [names[~test].tolist(), names[test].tolist()]


def rows_of_split(table, split):
    """-> (S,): 0 train, 1 test, -1 not in the run's split; what was read, and what is left out."""
    part_of = {name: part for part, names in enumerate(split) for name in names}
    names, form = table["names"].tolist(), str(table["form"])
    gone, new = sorted(set(part_of) - set(names)), sorted(set(names) - set(part_of))
    if gone:
        raise InputError(f"{form}: {gone[0]} is missing, one of {len(part_of):,} objects that the "
                         "run was trained and tested with; put it back, or start a new run")
    if new:
        form += (f"; left out, since the run was begun without them: {', '.join(new[:5])}"
                 + f" and {len(new) - 5:,} more" * (len(new) > 5))
    return np.array([part_of.get(name, -1) for name in names]), form


def check_points(table, points, flag=True):
    """Every object has at least `points` points of its own, or an InputError names the first.

    flag: whether the script has a flag --points.
    """
    short = np.flatnonzero(table["count"] < points)
    if len(short) == 0:
        return
    where, count = table["where"][short[0]], int(table["count"][short[0]])
    has = f"{where}: has" if where else f"{table['form']}: clouds have"
    if not flag:
        raise InputError(f"{has} {count:,} points, and {points:,} are needed; take it out of the "
                         "data, or give clouds of more points")
    raise InputError(f"{has} {count:,} points, fewer than --points {points}; pass --points {count}"
                     + " or move the file out of the data" * bool(where))


def test_rows(table, fraction):
    """Mask (S,) of the test objects: the data's own, or a `fraction` of each class set aside."""
    if (table["part"] >= 0).all():
        return table["part"] == 1
    return set_aside(table["label"], table["classes"], fraction, table["where"])


def set_aside(label, classes, fraction, where):
    """Mask (S,) of a `fraction` of each class, in every run the same. where: (S,) as prepared."""
    test = np.zeros(len(label), bool)
    for k in range(len(classes)):
        rows = np.flatnonzero(label == k)
        n = max(1, round(fraction * len(rows)))
        if n >= len(rows):
            raise InputError(f"{Path(str(where[rows[0]])).parent}: {len(rows)} object"
                             f"{' is' if len(rows) == 1 else 's are'} too few "
                             f"to set {n} aside; add objects, or remove the class")
        order = np.random.default_rng([0, k]).permutation(len(rows))
        test[rows[order[:n]]] = True
    return test
