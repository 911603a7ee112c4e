"""Optimizers whose matrix work is done by this package's kernels."""

from ._routing import param_groups
from .deva import DeVA
from .muon import Muon
from .shampoo import Shampoo
from .soap import SOAP

__all__ = ["SOAP", "DeVA", "Muon", "Shampoo", "param_groups"]
