"""Farthest point sampling, nearest neighbours, interpolation: one file each, CPU and CUDA."""
from .fps import farthest_point_sample, numba, triton
from .interpolate import interpolate
from .knn import knn

__all__ = ["farthest_point_sample", "interpolate", "knn"]


def engine(kind):
    """Who computes on "cuda" or "cpu": a run says so in its first line."""
    if kind == "cuda":
        return f"Triton {triton.__version__}" if triton else "torch, for want of Triton"
    return f"numba {numba.__version__}" if numba else "torch"
