"""Optimizers whose matrix work is done by this package's kernels."""

from ._diagnostics import Diagnostics, ParameterDiagnostics
from ._distributed import Distributed
from ._qk_clip import qk_clip_
from ._routing import param_groups
from .deva import DeVA
from .muon import Muon
from .shampoo import Shampoo
from .soap import SOAP

__all__ = [
    "SOAP",
    "DeVA",
    "Diagnostics",
    "Distributed",
    "Muon",
    "ParameterDiagnostics",
    "Shampoo",
    "param_groups",
    "qk_clip_",
]
