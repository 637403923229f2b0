"""What train_cls.py and train_fewshot.py share: object data sets, and the head that names an object.

    splits = load_objects("folder", "my/meshes", stored=8192, points=1024)
    splits.train.xyz (S, stored, 3), splits.train.label (S,), splits.test, splits.classes
    model = Classifier(clip, len(splits.classes), cfg)

ModelNet40/10, ScanObjectNN and anybody's own folder are read as their owners publish them. Files are read with numpy, trimesh (OFF, OBJ, STL, PLY) and, where the data is HDF5, h5py; a pickle
may hold numpy arrays and nothing that could run. Meshes are sampled once, uniformly by area, and
kept beside the data. Whatever is wrong with a file ends in an InputError of one line that names it.
"""
import hashlib
import io
import os
import pickle
import struct
import warnings
import zipfile
import zlib
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import common
from common import BatchNorm, Dropout, EPCLEncoder, InputError, PointTokenizer
from synthetic import OBJECT_CLASSES, object_clouds, sample_surface

MODELNET40 = tuple("""airplane bathtub bed bench bookshelf bottle bowl car chair cone cup curtain
    desk door dresser flower_pot glass_box guitar keyboard lamp laptop mantel monitor night_stand person
    piano plant radio range_hood sink sofa stairs stool table tent toilet tv_stand vase wardrobe
    xbox""".split())
MODELNET10 = tuple("bathtub bed chair desk dresser monitor night_stand sofa table toilet".split())
SCANOBJECTNN = tuple("""bag bin box cabinet chair desk display door shelf table bed pillow sink sofa
    toilet""".split())

HOW_TO_GET = {
    "modelnet40": "get ModelNet40.zip from modelnet.cs.princeton.edu and pass --root ModelNet40.zip",
    "modelnet10": "get ModelNet10.zip from modelnet.cs.princeton.edu and pass --root ModelNet10.zip",
    "scanobjectnn": "ask for h5_files.zip at hkust-vgd.github.io/scanobjectnn, unpack it and pass "
                    "--root FOLDER/h5_files",
    "folder": "pass --root FOLDER with FOLDER/{train,test}/CLASS/*, or FOLDER/CLASS/* "
              "(a part becomes the test set)",
}


class Objects(NamedTuple):
    xyz: torch.Tensor                       # (S, P, 3) float32, in the unit of the data
    label: torch.Tensor                     # (S,) int64


class Splits(NamedTuple):
    train: Objects
    test: Objects
    classes: tuple                          # names; label = index
    form: str                               # what was read, for the log and the results


def load_objects(name, root=None, stored=8192, points=1, test_fraction=0.2, workers=1,
                 synthetic=(16, 10)):
    """Read a data set by its name; `stored` points of each object are kept.

    points: what the caller needs of every cloud; fewer is an error that names the file.
    synthetic: objects of each class (train, test) for the built-in data.
    """
    counts = ()
    if name == "synthetic":
        splits = [object_clouds(n, stored, seed) for n, seed in zip(synthetic, (1, 2))]
        classes, form = OBJECT_CLASSES, "procedural objects of synthetic.py"
    else:
        root = Path(root or f"data/{name}")
        if not root.exists():
            raise InputError(f"--root {root}: no such file or folder; {HOW_TO_GET[name]}")
        if name == "folder":
            splits, classes, form, counts = read_folder(root, stored, test_fraction, workers)
        elif name == "scanobjectnn":
            splits, classes, form = read_scanobjectnn(root)
        else:
            splits, classes, form, counts = read_modelnet(name, root, stored, workers)
    for where, count in counts:
        if count < points:
            raise InputError(f"{where}: has {count:,} points, fewer than --points {points}; "
                             f"pass --points {count} or move the file out of the data")
    for (xyz, label), split in zip(splits, ("training", "test")):
        if len(label) == 0:
            raise InputError(f"{form}: no {split} objects found")
        if not 0 <= label.min() <= label.max() < len(classes):
            raise InputError(f"{form}: {split} labels reach from {label.min()} to {label.max()}, "
                             f"but there are {len(classes)} classes; fetch the data again")
        if not np.isfinite(xyz).all():
            bad = int(np.flatnonzero(~np.isfinite(xyz).all((1, 2)))[0])
            raise InputError(f"{form}: {split} cloud {bad} has NaN or infinite coordinates; "
                             "fetch the data again")
        if xyz.shape[1] < points:
            raise InputError(f"{form}: clouds have {xyz.shape[1]:,} points, fewer than --points "
                             f"{points}; pass --points {xyz.shape[1]}")
    tensors = [Objects(torch.from_numpy(np.ascontiguousarray(xyz, np.float32)),
                       torch.from_numpy(np.asarray(label, np.int64))) for xyz, label in splits]
    return Splits(*tensors, tuple(classes), form)


def unit_sphere(xyz):
    """Centre every cloud on its mean and scale it into the unit sphere: (..., P, 3) -> the same."""
    xyz = xyz - xyz.mean(-2, keepdim=True)
    return xyz / xyz.norm(dim=-1).amax(-1).clamp_min(1e-12)[..., None, None]


# --------------------------------------------------------------------------------------------------
# One file -> points
# --------------------------------------------------------------------------------------------------

MESHES = (".off", ".obj", ".stl")
CLOUDS = (".npy", ".npz", ".xyz", ".txt", ".csv", ".pcd")
SUFFIXES = (*MESHES, ".ply", *CLOUDS)       # a .ply may be either


def read_object(blob, suffix):
    """The content of a file -> (points or vertices (N, 3) float32, faces (F, 3) int64 or None).

    Raises ValueError with what is wrong; the caller knows the file's name.
    """
    faces = None
    if suffix in (*MESHES, ".ply"):
        xyz, faces = read_mesh(blob, suffix)
    elif suffix == ".npy":
        xyz = np.load(io.BytesIO(blob), allow_pickle=False)
    elif suffix == ".npz":
        arrays = np.load(io.BytesIO(blob), allow_pickle=False)
        usual = [n for n in ("xyz", "points", "pos", "data") if n in arrays.files]
        xyz = arrays[(usual or arrays.files)[0]]
    elif suffix == ".pcd":
        xyz = read_pcd(blob)
    else:                                   # text: blanks, commas or semicolons, a heading is skipped
        lines = blob.decode("utf-8", "replace").replace(",", " ").replace(";", " ").splitlines()
        lines = [line for line in lines if line.strip() and line.lstrip()[0] in "+-.0123456789nN"]
        xyz = np.loadtxt(lines, ndmin=2)
    xyz = np.asarray(xyz)
    if xyz.ndim != 2 or xyz.shape[1] < 3 or len(xyz) == 0 or xyz.dtype.kind not in "fiu":
        raise ValueError(f"expected rows of x y z, found {xyz.dtype} of shape {xyz.shape}")
    xyz = xyz[:, :3].astype(np.float32)
    bad = np.count_nonzero(~np.isfinite(xyz).all(1))
    if bad:
        raise ValueError(f"{bad:,} of {len(xyz):,} points are NaN or infinite")
    if faces is not None and not 0 <= faces.min() <= faces.max() < len(xyz):
        raise ValueError(f"a face names vertex {faces.max()}, but there are {len(xyz):,}")
    return xyz, faces


def read_mesh(blob, suffix):
    """OFF, OBJ, STL, PLY through trimesh: text or binary, polygons, ModelNet's `OFF490 518 0`."""
    import trimesh                          # here, so that --help stays quick
    mesh = trimesh.load(io.BytesIO(blob), file_type=suffix[1:], process=False, skip_materials=True)
    if isinstance(mesh, trimesh.Scene):
        mesh = trimesh.util.concatenate(list(mesh.geometry.values()))
    faces = np.asarray(getattr(mesh, "faces", ()), np.int64).reshape(-1, 3)
    if suffix == ".off":                    # trimesh does not mind missing lines
        lines = [line.partition(b"#")[0].split() for line in blob.replace(b"OFF", b" ", 1).split(b"\n")]
        (vertices, polygons, *_), *lines = [line for line in lines if line]
        missing = int(vertices) + int(polygons) - len(lines)
        if missing > 0 or int(polygons) and len(lines[-1]) <= int(lines[-1][0]):
            raise ValueError(f"cut short: the header promises {int(vertices):,} vertices and "
                             f"{int(polygons):,} faces, the last {max(missing, 1):,} are not there")
    if suffix in MESHES and len(faces) == 0:
        raise ValueError("no faces; save a cloud as .ply, .npy or .xyz instead")
    return np.asarray(mesh.vertices), faces if len(faces) else None


def read_pcd(blob):
    """Point Cloud Library's PCD 0.7, ascii, binary or compressed -> (N, 3), without NaN rows."""
    header, where = {}, 0
    while "DATA" not in header:
        end = blob.index(b"\n", where)      # ValueError where the header is cut short
        word, _, rest = blob[where:end].decode("ascii", "replace").partition(" ")
        header[word], where = rest.split(), end + 1
    names, count = header["FIELDS"], int(header["POINTS"][0])
    repeats = [int(n) for n in header.get("COUNT", ["1"] * len(names))]
    types = [np.dtype(kind.lower() + size) for kind, size in zip(header["TYPE"], header["SIZE"])]
    column = [names.index(axis) for axis in "xyz"]
    if header["DATA"] == ["ascii"]:
        first = np.cumsum([0, *repeats])
        xyz = np.loadtxt(blob[where:].decode().splitlines(), ndmin=2)[:, first[column]]
    elif header["DATA"] == ["binary"]:      # row after row
        row = np.dtype([(f"f{i}", t, (n,)) for i, (t, n) in enumerate(zip(types, repeats))])
        table = np.frombuffer(blob, row, count, where)
        xyz = np.stack([table[f"f{i}"].reshape(count) for i in column], 1)
    else:                                   # one LZF block, column after column
        packed, size = struct.unpack_from("<II", blob, where)
        data = lzf(blob[where + 8:where + 8 + packed], size)
        first = np.cumsum([0, *(t.itemsize * n * count for t, n in zip(types, repeats))])
        xyz = np.stack([np.frombuffer(data, types[i], count, first[i]) for i in column], 1)
    if len(xyz) != count:
        raise ValueError(f"cut short: the header promises {count:,} points, found {len(xyz):,}")
    return xyz[np.isfinite(xyz).all(1)]     # in a PCD, NaN means that the sensor saw nothing


def lzf(packed, size):
    """Unpack LZF, which PCD uses: runs of bytes, and copies of what was written before."""
    out, i = bytearray(), 0
    while i < len(packed):
        control, i = packed[i], i + 1
        if control < 32:                    # control + 1 bytes as they are
            out += packed[i:i + control + 1]
            i += control + 1
            continue
        length = control >> 5
        if length == 7:
            length, i = length + packed[i], i + 1
        start, i = len(out) - ((control & 31) << 8) - packed[i] - 1, i + 1
        for k in range(length + 2):         # may overlap itself
            out.append(out[start + k])
    if len(out) != size:
        raise ValueError("the compressed block is cut short")
    return bytes(out)


class Source(NamedTuple):
    """Where one object's points are: a file, or a member of a .zip."""
    name: str                               # CLASS/file: the seed of its sample
    label: int
    path: str
    member: str = ""

    def where(self):
        return f"{self.path}::{self.member}" if self.member else self.path

    def read(self):
        try:
            if self.member:
                with zipfile.ZipFile(self.path) as archive:
                    blob = archive.read(self.member)
            else:
                blob = Path(self.path).read_bytes()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")       # numpy's remarks on empty text
                return read_object(blob, Path(self.member or self.path).suffix.lower())
        except Exception as error:                    # whatever a reader makes of a broken file
            raise broken(self.where(), error) from None


def broken(where, error, cure="repair the file or move it out of the data"):
    """The InputError for a file that a reader choked on."""
    text = " ".join(str(error).split())[:150] or type(error).__name__
    return InputError(f"{where}: {text}; {cure}")


def prepare(source, stored):
    """One object -> (points (stored, 3) float32, how many of them are its own).

    A mesh is sampled uniformly by area; a larger cloud loses random points, a smaller one repeats
    its own, which farthest point sampling never picks before all others.
    """
    xyz, faces = source.read()
    rng = np.random.default_rng(zlib.crc32(source.name.encode()))     # whatever the order of the files
    if faces is not None:
        try:
            return sample_surface(xyz, faces, stored, rng), stored
        except ValueError as error:
            raise broken(source.where(), error) from None
    if (xyz == xyz[0]).all():
        raise broken(source.where(), "all its points coincide")
    order = rng.permutation(len(xyz))[:stored]
    again = rng.integers(0, len(xyz), max(0, stored - len(xyz)))
    return xyz[np.concatenate([order, again])], len(order)


# --------------------------------------------------------------------------------------------------
# One data set -> [(xyz, label) of train, of test], classes, form, [(file, points)]
# --------------------------------------------------------------------------------------------------

def read_folder(root, stored, test_fraction, workers):
    """ROOT/{train,test}/CLASS/*, or ROOT/CLASS/* of which test_fraction is set aside."""
    def subfolders(path):
        return sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))

    split = (root / "train").is_dir() and (root / "test").is_dir()
    classes = subfolders(root / "train" if split else root)
    if not classes:
        raise InputError(f"{root}: no class folders; {HOW_TO_GET['folder']}")
    for name in subfolders(root / "test") if split else ():
        if name not in classes:
            raise InputError(f"{root / 'test' / name}: a class that {root / 'train'} does not have; "
                             "add training objects or remove it")
    sources = {"train": [], "test": []}
    for label, name in enumerate(classes):
        for part in ("train", "test") if split else (".",):
            folder = root / part / name
            files = sorted(folder.glob("*")) if folder.is_dir() else []
            found = [Source(f"{name}/{p.name}", label, str(p)) for p in files
                     if p.suffix.lower() in SUFFIXES]
            if not found and part != "test":
                raise InputError(f"{folder}: no objects in this class folder "
                                 f"({' '.join(SUFFIXES)}); fill it or remove it")
            if split:
                sources[part] += found
                continue
            n = max(1, round(test_fraction * len(found)))
            if n >= len(found):
                raise InputError(f"{folder}: {len(found)} objects are too few to set {n} aside")
            order = np.random.default_rng([0, label]).permutation(len(found))    # in every run the same
            sources["test"] += [found[i] for i in sorted(order[:n])]
            sources["train"] += [found[i] for i in sorted(order[n:])]
    return prepare_all(sources, classes, root, stored, workers, f"files under {root}")


def read_modelnet(name, root, stored, workers):
    """ModelNet40 or 10 in the four forms the field passes around; the first one found is used."""
    title = name.replace("modelnet", "ModelNet")
    classes = MODELNET40 if name == "modelnet40" else MODELNET10
    inside = (title, f"{name}_normal_resampled", "modelnet40_normal_resampled",
              "modelnet40_ply_hdf5_2048")
    for place in [root] if root.is_file() else [root, *(root / folder for folder in inside)]:
        dat = [place / f"{name}_{part}_8192pts_fps.dat" for part in ("train", "test")]
        archive = place if place.suffix == ".zip" else place / f"{title}.zip"
        sources = {"train": [], "test": []}
        if dat[0].is_file():                                          # 1. Point-BERT's pickles
            return [read_dat(path) for path in dat], classes, f"Point-BERT's {dat[0]}", ()
        if (place / f"{name}_train.txt").is_file():                   # 2. text files with normals
            for part in sources:
                for line in read_list(place / f"{name}_{part}.txt"):
                    c = line.rpartition("_")[0]                       # night_stand_0001 -> night_stand
                    sources[part].append(Source(f"{line}.txt", label_of(c, classes, place),
                                                str(place / c / f"{line}.txt")))
            return prepare_all(sources, classes, place, stored, workers, f"text files under {place}")
        if sorted(place.glob("ply_data_train*.h5")):                  # 3. PointNet's HDF5, 2048 points
            splits = [read_h5(sorted(place.glob(f"ply_data_{part}*.h5"))) for part in sources]
            if name == "modelnet10":
                splits = [subset(*split, MODELNET40, MODELNET10) for split in splits]
            return splits, classes, f"HDF5 files under {place}", ()
        if archive.is_file() or (place / classes[0] / "train").is_dir():     # 4. the authors' meshes
            if archive.is_file():
                found = [(m, str(archive), m) for m in zip_members(archive)]
            else:
                found = [(str(p), str(p), "") for p in place.glob("*/*/*.off")]
            for name_, path, member in sorted(found):
                c, part, file = name_.split("/")[-3:]
                if part in sources:
                    sources[part].append(Source(f"{c}/{file}", label_of(c, classes, name_), path,
                                                member))
            return prepare_all(sources, classes, archive.parent if archive.is_file() else place,
                               stored, workers, f"meshes of {archive if archive.is_file() else place}")
    raise InputError(f"--root {root}: found none of {title}.zip, {classes[0]}/train/*.off, "
                     f"{name}_train.txt, ply_data_train*.h5, {dat[0].name}; {HOW_TO_GET[name]}")


def read_scanobjectnn(root):
    """PB_T50_RS, the hardest variant. For the others let --root name the training .h5 file."""
    name = "training_objectdataset_augmentedrot_scale75.h5"
    places = [root] if root.is_file() else [
        root / name, root / "main_split" / name, root / "h5_files" / "main_split" / name]
    train = next((path for path in places if path.is_file()), None)
    if train is None:
        raise InputError(f"--root {root}: found no main_split/{name}; {HOW_TO_GET['scanobjectnn']}")
    test = train.with_name(train.name.replace("training_", "test_"))
    return [read_h5([train]), read_h5([test])], SCANOBJECTNN, str(train)


def label_of(name, classes, where):
    if name not in classes:
        raise InputError(f"{where}: {name} is not one of the {len(classes)} classes of this data set")
    return classes.index(name)


def subset(xyz, label, classes, kept):
    """The clouds whose class is kept, with labels in the order of `kept`."""
    table = np.array([kept.index(c) if c in kept else -1 for c in classes])
    mask = table[label] >= 0
    return xyz[mask], table[label[mask]]


def read_list(path):
    if not path.is_file():
        raise InputError(f"{path}: missing; the archive modelnet40_normal_resampled.zip has it")
    return path.read_text().split()


def zip_members(path):
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        raise InputError(f"{path}: not a readable .zip (cut short?); fetch it again") from None
    return [n for n in names if n.endswith(".off") and not n.startswith("__MACOSX")]


def read_h5(files):
    """data (n, P, 3) and label (n, 1) or (n,) of each file, in the order of the names."""
    try:
        import h5py
    except ImportError:
        raise InputError(f"{files[0]}: HDF5 files need h5py; pip install h5py") from None
    xyz, label = [], []
    for path in files:
        try:
            with h5py.File(path) as file:
                xyz.append(file["data"][..., :3].astype(np.float32))
                label.append(file["label"][:].reshape(-1).astype(np.int64))
        except (OSError, KeyError) as error:
            raise broken(path, error, "not a readable HDF5 file with `data` and `label`: "
                                      "fetch it again") from None
    return np.concatenate(xyz), np.concatenate(label)


class NumpyOnly(pickle.Unpickler):
    """Loads numpy arrays and plain containers; a pickle that asks for anything else is refused."""
    ALLOWED = {"multiarray._reconstruct", "multiarray.scalar", "numeric._frombuffer",
               "numpy.ndarray", "numpy.dtype"}

    def find_class(self, module, name):
        short = f"{module.rpartition('.')[2]}.{name}"
        numpy_module = module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray",
                                  "numpy.core.numeric", "numpy._core.numeric")
        if numpy_module and short in self.ALLOWED:
            core = "numpy._core" if np.lib.NumpyVersion(np.__version__) >= "2.0.0" else "numpy.core"
            return super().find_class(module.replace("numpy._core", "numpy.core")
                                      .replace("numpy.core", core), name)
        if (module, name) == ("_codecs", "encode"):   # how pickle's protocol 2 writes bytes
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not a numpy array")


def read_dat(path):
    """Point-BERT's pickle [points, labels]: of each object float32 (8192, 6) and int32 (1,)."""
    if not path.is_file():
        raise InputError(f"{path}: missing beside its counterpart; fetch it from the same place")
    try:
        with open(path, "rb") as file:
            points, labels = NumpyOnly(file).load()
        return (np.stack([np.asarray(p, np.float32)[:, :3] for p in points]),
                np.array([int(np.asarray(n).reshape(-1)[0]) for n in labels]))
    except Exception as error:
        raise broken(path, error, "not one of Point-BERT's .dat files: fetch it again") from None


# --------------------------------------------------------------------------------------------------
# Many files -> one array, prepared once
# --------------------------------------------------------------------------------------------------

def prepare_all(sources, classes, root, stored, workers, form):
    """Sample every object in parallel; the result is kept in ROOT/.nanoepcl-*.npz if possible.

    The file's name holds a hash of all names, sizes and dates, so changed data is prepared again.
    It is written under a temporary name: an interrupted run leaves nothing half-written.
    """
    every = sources["train"] + sources["test"]
    for path in {s.path for s in every}:
        if not Path(path).is_file():
            raise InputError(f"{path}: missing; the data set is incomplete, fetch it again")
    stamp = [(part, s.name, s.label, os.path.getsize(s.path), os.path.getmtime(s.path))
             for part in ("train", "test") for s in sources[part]]
    key = hashlib.sha1(repr((stored, tuple(classes), stamp)).encode()).hexdigest()[:12]
    cache, keep = root / f".nanoepcl-{key}.npz", os.access(root, os.W_OK)
    if keep and not cache.is_file() and common.rank() == 0:
        xyz, count = sample_all(every, stored, workers)
        with open(cache.with_suffix(".tmp"), "wb") as file:
            np.savez(file, xyz=xyz, count=count)
        cache.with_suffix(".tmp").replace(cache)
    if common.world_size() > 1:
        torch.distributed.barrier()                   # the first process prepares, the others read
    if cache.is_file():
        try:
            with np.load(cache, allow_pickle=False) as kept:
                xyz, count = kept["xyz"], kept["count"]
        except Exception:
            raise InputError(f"{cache}: not a readable cache; delete it and start again") from None
    else:
        xyz, count = sample_all(every, stored, workers)
    label, n = np.array([s.label for s in every], np.int64), len(sources["train"])
    counts = [(s.where(), int(c)) for s, c in zip(every, count)]
    return [(xyz[:n], label[:n]), (xyz[n:], label[n:])], classes, form, counts


def sample_all(sources, stored, workers):
    """-> xyz (S, stored, 3), count (S,)."""
    xyz, count = np.empty((len(sources), stored, 3), np.float32), np.empty(len(sources), np.int64)
    bar = tqdm(total=len(sources), desc="preparing", unit="object", disable=None, leave=False)

    def collect(results):
        for i, (points, n) in enumerate(results):
            xyz[i], count[i] = points, n
            bar.update()

    if workers == 1 or len(sources) < 1000:           # for few objects, processes start too slowly
        collect(prepare(source, stored) for source in sources)
    else:
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            collect(pool.map(prepare, sources, [stored] * len(sources), chunksize=16))
    bar.close()
    return xyz, count


# --------------------------------------------------------------------------------------------------
# The head, and its loss
# --------------------------------------------------------------------------------------------------

PROMPT = "point cloud of a big {}."         # PointCLIP's; the release leaves out the full stop
TEXT_SCALE = 100.0          # CLIP's own exp(logit_scale), for --text-loss cosine


class Classifier(nn.Module):
    """EPCL with the released classification head.

    points (B, N, 3) -> logits (B, C), embedding (B, 512). The text loss reads the embedding, too.
    """

    def __init__(self, clip, classes, cfg):
        super().__init__()
        recipe = cfg["recipe"]
        self.encoder = EPCLEncoder(
            clip, PointTokenizer(recipe["groups"], recipe["neighbours"], clip.width),
            task_tokens=classes, dropout=recipe["dropout"], task_token=not cfg["no_task_token"],
            deep_prompt=cfg["deep_prompt"], transformer=not cfg["no_transformer"])
        wide = clip.width + (0 if cfg["no_transformer"] else clip.embed)
        self.norm = nn.LayerNorm(clip.width)
        self.embed = nn.Sequential(nn.Linear(wide, 512), BatchNorm(512), nn.ReLU(), Dropout(0.2),
                                   nn.Linear(512, 512), nn.LayerNorm(512))
        self.head = nn.Sequential(Dropout(0.5), nn.Linear(512, 256), BatchNorm(256), nn.ReLU(),
                                  Dropout(0.5), nn.Linear(256, classes))

    def forward(self, points):
        x, _ = self.encoder(points)                             # (B, 1 + G + T, 768)
        if self.encoder.transformer:
            pooled = self.norm(x[:, 1:]).amax(1)                # (B, 768), task rows included: theirs
            x = torch.cat([self.encoder.clip.project(x[:, 0]), pooled], 1)        # (B, 512 + 768)
        else:
            x = self.norm(x).amax(1)                            # (B, 768)
        embedding = self.embed(x)                               # (B, 512)
        return self.head(embedding), embedding


def prompt_features(clip, classes):
    """CLIP's text features of the class names (C, 512), the rows of the text loss; None without tower."""
    text = clip.text_features([PROMPT.format(name.replace("_", " ")) for name in classes])
    if text is not None and text.shape[1] != 512:
        raise InputError(f"--clip {clip.name}: text features have {text.shape[1]} numbers, the "
                         "embedding of the head has 512; pass --text-loss off")
    return text


def loss_terms(logits, embedding, label, text, kind):
    """Cross-entropy of the head and of the similarities with text (C, 512), summed over the clouds.

    The two are weighted 1 : 1. Paper 3.2.2 calls the second "the same as that in CLIP", which
    scales both sides to length one and multiplies by 100: kind "cosine". The release takes raw
    products: "raw".
    """
    head = F.cross_entropy(logits.float(), label, reduction="sum")
    if text is None:
        return head, torch.zeros_like(head)
    embedding = embedding.float()
    if kind == "cosine":
        embedding, text = TEXT_SCALE * F.normalize(embedding, dim=1), F.normalize(text, dim=1)
    return head, F.cross_entropy(embedding @ text.T, label, reduction="sum")
