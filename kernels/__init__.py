"""Sampling, neighbours, interpolation, points to pixels, sparse convolution: a file each."""
from .ball_query import ball_query
from .fps import farthest_point_sample, numba, triton
from .interpolate import group, interpolate
from .knn import knn
from .launch import use_triton
from .sparse_conv import (SparseTensor, devoxelise, strided_conv, submanifold_conv,
                          transposed_conv)
from .splat import splat

__all__ = ["SparseTensor", "ball_query", "devoxelise", "farthest_point_sample", "group",
           "interpolate", "knn", "splat", "strided_conv", "submanifold_conv", "transposed_conv",
           "use_triton"]


def engine(kind):
    """The library that runs the kernels on a "cuda" or "cpu" device, for the header of a run."""
    if kind == "cuda":
        return f"Triton {triton.__version__}" if triton else "torch (Triton not installed)"
    return f"numba {numba.__version__}" if numba else "torch"
