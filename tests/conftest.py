"""Without a CUDA card, Triton's kernels are interpreted on the CPU: slow, exact, printable."""
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)

# triton.jit decides between compiler and interpreter when a kernel is defined, the kernel files
# choose between Triton and torch in each call. So the variable is set for the import alone: other
# tests and the processes they start run in torch, and `triton_device` asks for the interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
import kernels  # noqa: E402, F401
os.environ.pop("TRITON_INTERPRET", None)


@pytest.fixture
def poison_empty(monkeypatch):
    """torch.empty and its variants return NaN or an impossible index: unwritten values show."""
    def poisoned(make):
        def empty(*args, **kwargs):
            made = make(*args, **kwargs)
            if made.is_floating_point():
                return made.fill_(float("nan"))
            return made.fill_(-(2 ** 30)) if made.dtype in (torch.int32, torch.int64) else made
        return empty

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture(scope="module")
def one_thread():
    """So little work is not worth two, which wait for each other where other programs run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["cpu", "cuda"])
def triton_device(request, monkeypatch):
    """Where the public functions run Triton: on the CPU by its interpreter, or on a CUDA card."""
    triton = pytest.importorskip("triton", reason="needs triton: compares its kernels with torch")
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA card: compares compiled kernels with torch")
    if request.param == "cpu":
        import numpy
        if torch.cuda.is_available():
            pytest.skip("on a CUDA card the kernels are compiled, not interpreted")
        if (tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
                and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4)):
            pytest.skip(f"the interpreter of triton {triton.__version__} needs numpy < 2.4, not "
                        f"{numpy.__version__}")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    return torch.device(request.param)


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory):
    """A --clip name for a transformer with width 64, 6 blocks, random weights: fast to train."""
    import timm
    from safetensors.torch import save_file
    path = tmp_path_factory.mktemp("clip") / "test_vit.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(timm.create_model("test_vit", pretrained=False).state_dict(), path)
    return f"timm:test_vit={path}"
