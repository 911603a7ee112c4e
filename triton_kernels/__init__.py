"""Triton kernels, importable as `spectral_kernels.triton_kernels` only.

A top-level `triton_kernels` is another package, which others look for: under that name this folder
must fail to import, not stand in for it.
"""

if __name__ != "spectral_kernels.triton_kernels":
    raise ImportError("this is spectral_kernels.triton_kernels, not the package triton_kernels")

import importlib
from collections.abc import Callable
from typing import Any

# Operator -> the family that holds it.
FAMILIES = {
    "gram": "symmetric_matmul",
    "newton_schulz": "newton_schulz",
    "polar": "newton_schulz",
    "muon_step_": "newton_schulz",
    "kron_factors_update_": "kron_factor",
    "kron_precondition": "kron_factor",
    "inverse_root": "inverse_root",
    "shampoo_step_": "inverse_root",
    "eigenbasis": "eigenbasis",
    "refresh_eigenbasis": "eigenbasis",
    "soap_step_": "eigenbasis",
    "deva_step_": "deva",
}


def operator(name: str) -> Callable[..., Any]:
    """The function of an operator, under the reference's signature."""
    return getattr(importlib.import_module(f".{FAMILIES[name]}", __name__), name)
