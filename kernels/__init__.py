"""Sampling, neighbours, ball query, interpolation, points to pixels: a file each, CPU and CUDA."""
from .ball_query import ball_query
from .fps import farthest_point_sample, numba, triton
from .interpolate import group, interpolate
from .knn import knn
from .launch import use_triton
from .splat import splat

__all__ = ["ball_query", "farthest_point_sample", "group", "interpolate", "knn", "splat",
           "use_triton"]


def engine(kind):
    """The library that runs the kernels on a "cuda" or "cpu" device, for the header of a run."""
    if kind == "cuda":
        return f"Triton {triton.__version__}" if triton else "torch (Triton not installed)"
    return f"numba {numba.__version__}" if numba else "torch"
