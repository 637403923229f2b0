"""Which path a kernel takes: Triton on a GPU, and torch where Triton cannot run. What the kernel
files share when they check themselves.

A GPU alone is not enough for Triton: it builds its launcher with gcc or clang, and a card may be
too new or too small for it. The torch paths give the same results there, only later.
"""
import os
import sys
import time

import torch

try:
    import triton
except ImportError:  # macOS, Windows: every call takes the torch path
    triton = None

failed = set()  # kernels that Triton could not build or launch in this process


def use_triton(tensor):
    """Triton runs on CUDA tensors; with TRITON_INTERPRET=1 its interpreter runs on the CPU, too."""
    return triton is not None and (tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")


def launch(name, tensor, in_triton, in_torch):
    """in_triton(), or in_torch() from the first failure on a GPU: it is announced in one line."""
    if name not in failed:
        try:
            return in_triton()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # triton raises its own, RuntimeError, OSError, ...
            if not tensor.is_cuda:  # the interpreter: a mistake in the kernel
                raise
            failed.add(name)
            reason = " ".join(str(error).split())[:160]
            print(f"{name}: Triton cannot run it here ({type(error).__name__}: {reason}); torch "
                  "does, slower. Triton needs gcc or clang on PATH", file=sys.stderr)
    return in_torch()


def machine(numba=None):
    """Where a kernel file checks itself: the device, and its name for the report."""
    if torch.cuda.is_available():
        sm = "sm_%d%d" % torch.cuda.get_device_capability()
        return torch.device("cuda"), f"{torch.cuda.get_device_name()} ({sm})"
    return torch.device("cpu"), f"CPU (numba {numba.__version__})" if numba else "CPU"


def fastest(call, device):
    """call() four times, of which the first compiles -> seconds of the fastest, what it returned.

    Ends the program where Triton could not run: why has been printed.
    """
    seconds = []
    for _ in range(4):
        begin = time.perf_counter()
        returned = call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    if failed:
        sys.exit(1)
    return min(seconds), returned
