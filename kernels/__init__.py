"""Farthest point sampling, nearest neighbours, interpolation: one file each, CPU and CUDA."""
from .fps import farthest_point_sample
from .interpolate import interpolate
from .knn import knn

__all__ = ["farthest_point_sample", "interpolate", "knn"]
