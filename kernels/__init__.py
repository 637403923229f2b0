"""Sampling, nearest neighbours, ball query, interpolation: one file each, CPU and CUDA."""
from .ball_query import ball_query
from .fps import farthest_point_sample, numba, triton
from .interpolate import interpolate
from .knn import knn

__all__ = ["ball_query", "farthest_point_sample", "interpolate", "knn"]


def engine(kind):
    """The library that runs the kernels on a "cuda" or "cpu" device, for the header of a run."""
    if kind == "cuda":
        return f"Triton {triton.__version__}" if triton else "torch (Triton not installed)"
    return f"numba {numba.__version__}" if numba else "torch"
