"""Triton kernels, importable as `spectral_kernels.triton_kernels` only.

A top-level `triton_kernels` is another package, which others look for: under that name this folder
must fail to import, not stand in for it.
"""

if __name__ == "triton_kernels":
    raise ImportError("this is spectral_kernels.triton_kernels, not the package triton_kernels")

import importlib
from collections.abc import Callable
from typing import Any

from spectral_kernels._operators import TABLE

# Operator -> the family that holds it; all of them have kernels here.
FAMILIES = {name: operator.family for name, operator in TABLE.items()}


def operator(name: str) -> Callable[..., Any]:
    """The function of an operator, under the reference's signature."""
    return getattr(importlib.import_module(f".{TABLE[name].module}", __name__), name)
