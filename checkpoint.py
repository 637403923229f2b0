"""A saved run, checked once where it is loaded: --resume and --eval begin here.

    cfg, saved, folder = saved_settings(args, "cls", Recipe, SAVED, checkpoint_form(sums=4))
    check_frozen(cfg, saved, clip)                  # the frozen weights that it was trained with
    load_weights(model, saved["model"])             # the trained ones

What a script's checkpoint holds is written down beside its flags as a form; `misfit` says what has
another.
"""
import itertools
import json
import shlex
from pathlib import Path

import torch

from run import ABLATIONS, InputError


def saved_settings(args, task, recipe, own, kept, other_data=False):
    """--resume or --eval: config, checkpoint, folder. Flags that contradict them are refused.

    recipe: the script's class. own: the forms of its other settings; kept: of what it saves beside
    them. other_data: --eval may name other --data; what it was trained on is then `trained_on`.
    """
    if args.resume and args.eval:
        raise InputError("--resume goes on with a run, --eval only looks at it; give one of them")
    path = Path(args.resume or args.eval)
    saved = load_checkpoint(path, task)
    wrong = misfit(saved, {"config": config_form(recipe, own), **kept}) or next(
        iter(saved["config"]["recipe"].keys() - recipe._fields), None)
    if wrong:
        raise InputError(f"{path}: {wrong} is not as this train_{task}.py saves it; take the run's "
                         "other .pt file, the commit that its config.json names, or train anew")
    saved["file"] = str(path)
    cfg, other = saved["config"], []
    if other_data and args.eval and args.data not in (None, cfg["data"]):
        cfg.update(trained_on=cfg["data"], data=args.data, root=None)
        other = ["test_area"]
    if cfg["data"] == "synthetic" and args.root:
        raise InputError(f"--root {args.root}: the run's data is built in and has no files; "
                         + ("add --data" if other_data and args.eval else "leave --root out"))
    if args.out:
        raise InputError("--out: " + ("--resume goes on in the folder of its run" if args.resume
                                      else "--eval makes no run folder") + "; leave --out out")
    if args.root and getattr(args, "predict", None):
        raise InputError("--predict reads the files it names and no data; leave --root out")
    free = ["root", "resume", "eval", "device", "workers", "predict", "vote", "export", "clip",
            "official", "skip_broken", "tta", "export_test", *other]
    # of --clip, weights have a hash: `check_frozen`
    free += ["precision", "scale", "remission"] if args.eval else ["compile"]
    if args.eval and task in ("det", "seg") and args.batch_size:        # the others take 64 clouds
        cfg["recipe"]["batch_size"] = args.batch_size                   # or one scan at a time
    for name, value in vars(args).items():
        was = cfg["recipe"].get(name, cfg.get(name))
        if value is not None and value is not False and value != was and name not in free:
            flag = name.replace("_", "-")
            raise InputError(f"{path}: was trained with {flag} {was}, not {value}; leave --{flag} "
                             "out, or start a new run")
    for name in ("root", "workers", "precision", "compile", "clip"):
        cfg[name] = getattr(args, name) or cfg[name]
    if args.resume and "optimizer" not in saved:
        raise InputError(f"--resume {path}: holds no optimiser; resume the run's folder or last.pt")
    folder = path if path.is_dir() else path.parent
    if args.resume and saved["at"]["epoch"] >= cfg["recipe"]["epochs"] and (
            folder / "results.json").is_file():         # else it was killed before it had them
        raise InputError(f"--resume {path}: the run is finished after epoch "
                         f"{saved['at']['epoch']}; "
                         f"--eval {path} evaluates it")
    return cfg, saved, folder


def load_checkpoint(path, task):
    """A checkpoint of this task: `path` is a .pt file, or a run folder with last.pt."""
    path = Path(path) / "last.pt" if Path(path).is_dir() else Path(path)
    config = path.parent / "config.json"
    if config.is_file() and not path.is_file():
        command = shlex.join(map(str, json.loads(config.read_bytes())["command"]))
        raise InputError(f"{path}: nothing was saved yet; repeat the run: python {command}")
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint; give a run folder or a .pt file")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        found = str(saved["task"])
    except Exception:
        raise InputError(f"{path}: not a checkpoint of these scripts, or cut short; take the other "
                         ".pt file of the run, or start anew") from None
    if found != task:
        raise InputError(f"{path}: a checkpoint of train_{found}.py, not of train_{task}.py")
    return saved


# ---- Forms ---------------------------------------------------------------------------------------
WHOLE, COUNT = range(2**31), range(1, 2**24)


def amount(x):
    return misfit(x, float) is None and x >= 0


def tensors(x):
    return isinstance(x, dict) and all(
        isinstance(w, torch.Tensor) and w.is_cpu and w.layout == torch.strided
        and not w.is_complex() and isinstance(name, str) for name, w in x.items())


def moments(x):                             # of AdamW, LAMB, SGD, or train_clip.py's Muon
    return isinstance(x, dict) and len(x) > 0 and all(map(tensors, x.values())) and all(
        part.keys() in ({"step", "exp_avg", "exp_avg_sq"}, {"exp_avg", "exp_avg_sq"},
                        {"step", "momentum"}, {"momentum_buffer"}) for part in x.values())


def checkpoint_form(sums):
    """The form of what is saved beside the config; sums: the length of `run.sums`."""
    return {"frozen": {"name": str, "sha256": str, "model": (..., str)}, "model": tensors,
            "optimizer": (..., {"state": moments}), "at": {
                "epoch": WHOLE, "step": WHOLE, "sums": ([], [float] * sums), "seconds": float,
                "best": float, "best_epoch": WHOLE}}


def config_form(recipe, own):
    """The form of a config: what all scripts share, the fields of a recipe, what is a script's."""
    kinds = {int: COUNT, float: amount, bool: bool, str: str}
    fields = {name: kinds[kind] for name, kind in recipe.__annotations__.items()}
    share = {name: lambda x: amount(x) and x < 1 for name in fields if "dropout" in name}
    return {"root": (None, str), "recipe": {**fields, **share}, "seed": WHOLE, "clip": str,
            "precision": ("auto", "fp32", "bf16"), "compile": bool, "accumulate": COUNT,
            "workers": COUNT, **dict.fromkeys(ABLATIONS, bool), **own}


def misfit(value, form, name="checkpoint"):
    """-> the name of the first part of `value` that does not fit its form, or None.

    A form is {key: form}; [form] for a list of them, [form, form] for one of two; (form, form) for
    either, with ... for what may be absent; a type; a range of whole numbers; a function that says
    whether; or the value itself. A float may be whole, but not NaN or infinite.
    """
    if isinstance(form, dict) and isinstance(value, dict):
        parts = ((value.get(key, ...), part, f"{name}.{key}") for key, part in form.items())
        return next(filter(None, (misfit(*part) for part in parts)), None)
    if isinstance(form, list):
        good = isinstance(value, list) and len(form) in (1, len(value)) and not any(
            misfit(*part) for part in zip(value, itertools.cycle(form)))
    elif isinstance(form, tuple):
        good = any(misfit(value, part) is None for part in form)
    elif isinstance(form, range):
        good = type(value) is int and value in form
    elif form is float:
        good = type(value) in (int, float) and abs(value) < 1e300
    elif isinstance(form, type):
        good = type(value) is form
    else:
        good = form(value) if callable(form) else type(value) is type(form) and value == form
    return None if good else name


# ---- Weights -------------------------------------------------------------------------------------
def load_weights(model, weights, used="", where="the saved weights", what="the model"):
    """Load the weights whose names begin with (one of) `used`. None may be missing and none left
    over: a block without its layer scale computes something else."""
    own, found = ({name: w for name, w in some.items() if name.startswith(used)}
                  for some in (model.state_dict(), weights))
    if not used and any(name.startswith("encoder.tokenizer.") for name in found):
        raise InputError("the checkpoint is from before 26 November 2026, when weights were "
                         "renamed; use the code of that time, or train anew")
    need, have = ({name: tuple(w.shape) for name, w in some.items()} for some in (own, found))
    wrong = [f"{name} {have.get(name, 'missing')} for {need.get(name, 'nothing')}"
             for name in {**need, **have} if have.get(name) != need.get(name)]
    if wrong:
        raise InputError(f"{where} do not fit {what}: {len(wrong)} tensors differ, "
                         f"{', '.join(wrong[:3])}; pass those of this model")
    try:
        model.load_state_dict(found, strict=False)
    except RuntimeError:                    # sparse, quantised, on no device
        raise InputError(f"{where} are not plain numbers; pass those of {what}") from None


def check_frozen(cfg, saved, clip):
    """Note the frozen weights in the config. Trained ones are worth nothing with any other.

    The place of their file may change. Their model may not: with another activation the same
    weights compute something else.
    """
    now = {"name": clip.name, "sha256": clip.sha256, "model": clip.model}
    was = saved["frozen"] if saved else now
    cfg["frozen"] = now
    if (was["sha256"], was.get("model", clip.model)) != (clip.sha256, clip.model):
        raise InputError(f"--clip {clip.name}: {clip.model} with the weights {clip.sha256[:12]} "
                         f"(sha256) is not what the run was trained with ({was['name']}, "
                         f"{was['sha256'][:12]}); --clip may only name a new place of those")
