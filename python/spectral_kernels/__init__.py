"""Fast kernels for matrix-aware optimizers: Muon, Shampoo, SOAP, DeVA.

Functions work on batches of matrices, (..., m, n); names that end in `_` write their arguments, and
the four `*_step_` do a whole optimizer step over lists of matrices. `optim` holds the optimizers,
`swap_in` puts the kernels under optimizers that are in use already.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import _fake as _fake, coefficients, optim
from ._dispatch import call_counts, explain, use_backend
from .deva import deva_step_
from .eigenbasis import eigenbasis, refresh_eigenbasis, soap_step_
from .inverse_root import RootInfo, inverse_root, shampoo_step_
from .kron_factor import kron_factors_update_, kron_precondition
from .newton_schulz import muon_step_, newton_schulz, polar
from .symmetric_matmul import gram

if TYPE_CHECKING:
    from .swap import swap_in as swap_in

__version__ = "0.1.0"

__all__ = [
    "RootInfo",
    "__version__",
    "call_counts",
    "coefficients",
    "deva_step_",
    "eigenbasis",
    "explain",
    "gram",
    "inverse_root",
    "kron_factors_update_",
    "kron_precondition",
    "muon_step_",
    "newton_schulz",
    "optim",
    "polar",
    "refresh_eigenbasis",
    "shampoo_step_",
    "soap_step_",
    "swap_in",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    # swap stands above everything else here and is used by few.
    if name == "swap_in":
        from .swap import swap_in

        return swap_in
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
