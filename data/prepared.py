"""How prepared data is kept: .npz files that record what they were made from.

What owners publish is prepared once, under ROOT/.nanoepcl/. A prepared file whose sources have
changed since, or that is cut short, is made again.
"""
import hashlib
import json
import os
import sys
import tempfile
import zipfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.files import NUMBERS, BrokenFile, load_npz, reading
from run import InputError, barrier, rank


RULES = 3                                   # raise it when a reader reads the same file otherwise


def sources_of(paths, *facts):
    """What prepared data is made from, as text: name, size and date of each file, and settings."""
    files = []
    for path in paths:
        try:
            state = os.stat(path)
            files.append([os.path.basename(path), state.st_size, state.st_mtime_ns])
        except OSError:                     # that a file is missing is a fact, too
            files.append([os.path.basename(path)])
    return json.dumps([RULES, files, *facts])


def is_fresh(path, sources):
    """Whether the prepared file is there, whole, and made from these sources."""
    try:
        with zipfile.ZipFile(path) as kept:
            return kept.read("sources").decode() == sources + contents(kept)
    except Exception:                       # missing, or not whole
        return False


def contents(archive):
    """Name and checksum of each array, as text: with others, a file is not what was prepared."""
    arrays = [member for member in archive.infolist() if member.filename != "sources"]
    return json.dumps([[member.filename, member.CRC] for member in arrays])


def load_prepared(path, names=None):
    """A prepared file -> {name: array} of those `names` (None: all) that it has."""
    with reading(path, "remove it, and it is made again"):
        return load_npz(path, names, NUMBERS + "U")


def kept_in(paths, name):
    """The array `name` of each prepared file that has it."""
    return [array for path in paths for array in load_prepared(path, [name]).values()]


def save_npz(path, sources, **arrays):
    """Write a prepared file. Two may do so at once; nothing half-written bears its name."""
    temporary = path.with_name(f"{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        with open(temporary, "w+b") as file:
            np.savez(file, **arrays)
            with zipfile.ZipFile(file, "a") as kept:
                kept.writestr(zipfile.ZipInfo("sources"), sources + contents(kept))
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); make room") from None
    finally:
        temporary.unlink(missing_ok=True)


def prepared_folder(root, name, wanted=()):
    """ROOT/.nanoepcl/NAME, created; a folder of the user's cache where ROOT cannot be written.

    wanted: {file: sources} of what will be there; a ROOT that holds all of it need not be written.
    """
    folder = Path(root) / ".nanoepcl" / name
    if writable(folder) or wanted and all(is_fresh(folder / file, wanted[file]) for file in wanted):
        return folder
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    key = hashlib.sha1(os.fsencode(Path(root).resolve())).hexdigest()[:12]
    other = cache / "nanoepcl" / key / name
    if not writable(other):
        raise InputError(f"{folder}: cannot be written, nor can {other}; set XDG_CACHE_HOME to a "
                         "folder with room for prepared data")
    if rank() == 0:
        print(f"{root}: cannot be written; what is prepared is kept in {other}", file=sys.stderr)
    return other


def writable(folder):
    """Create a folder and try it: permissions say nothing of read-only mounts."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def in_parallel(work, jobs, workers, unit, least=2, chunk=1):
    """Yield work(*job) for every job, in order; in processes where there are `least` jobs."""
    if not jobs:
        return
    workers = min(workers, len(jobs))
    many = workers > 1 and len(jobs) >= least           # processes start slowly
    pool = ProcessPoolExecutor(workers, get_context("spawn")) if many else None
    with pool or nullcontext():
        call = partial(apply, work)
        results = pool.map(call, jobs, chunksize=chunk) if pool else map(call, jobs)
        yield from tqdm(results, total=len(jobs), desc="preparing", unit=unit, disable=None,
                        leave=False)


def apply(work, job):
    return work(*job)


def prepare_rooms(root, name, rooms, workers, skip_broken, unit):
    """Prepare rooms that are not prepared, or no longer. -> paths of NAME.npz, what is left out.

    rooms: {NAME: (sources, read, *arguments)}, where read(*arguments) -> {field of Cloud: array},
    notes. The first process prepares, the others wait. With skip_broken, rooms that cannot be read
    are left out and named, a line each, also on stderr.
    """
    if not rooms:
        return [], []
    folder = prepared_folder(root, name, {f"{n}.npz": room[0] for n, room in rooms.items()})
    rooms, left_out = {folder / f"{n}.npz": room for n, room in rooms.items()}, []
    if rank() == 0:
        stale = [(path, *room) for path, room in rooms.items() if not is_fresh(path, room[0])]
        for notes in in_parallel(prepare_room, stale, workers, unit):
            if isinstance(notes, BrokenFile):
                if not skip_broken:
                    raise notes
                notes = [f"LEFT OUT {notes}"]
                left_out += notes
            for line in notes:
                print(line, file=sys.stderr)
    barrier()
    return [path for path in rooms if path.is_file()], left_out


def prepare_room(path, sources, read, *arguments):
    """One room -> the file `path`. -> notes on what was repaired, or the BrokenFile."""
    try:
        arrays, notes = read(*arguments)
    except BrokenFile as error:
        path.unlink(missing_ok=True)        # an older preparation must not stand in for it
        return error
    save_npz(path, sources, **arrays)
    return notes
