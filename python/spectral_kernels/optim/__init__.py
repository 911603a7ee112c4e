"""Optimizers whose matrix work is done by this package's kernels."""

from ._diagnostics import Diagnostics, ParameterDiagnostics
from ._routing import param_groups
from .deva import DeVA
from .muon import Muon
from .shampoo import Shampoo
from .soap import SOAP

__all__ = [
    "SOAP",
    "DeVA",
    "Diagnostics",
    "Muon",
    "ParameterDiagnostics",
    "Shampoo",
    "param_groups",
]
