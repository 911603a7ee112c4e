"""Triton kernels, importable as `spectral_kernels.triton_kernels` only.

A top-level `triton_kernels` is another package, which others look for: under that name this folder
must fail to import, not stand in for it.
"""

if __name__ != "spectral_kernels.triton_kernels":
    raise ImportError("this is spectral_kernels.triton_kernels, not the package triton_kernels")
