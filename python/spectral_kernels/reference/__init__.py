"""The specification in plain PyTorch: every operator, float64-capable, without speed tricks.

One file a family. The signatures are those of `torch.ops.spectral_kernels`, except that rows of
coefficients are (a, b, c) triples. It is what the tests hold the kernels against, and the backend
"reference" where there is no compiled one: any float dtype, any device, one matrix after another.
"""

from .deva import deva_step_
from .eigenbasis import eigenbasis, refresh_eigenbasis, soap_step_
from .inverse_root import inverse_root
from .inverse_root_step import shampoo_step_
from .kron_factor import kron_factors_update_, kron_precondition
from .newton_schulz import muon_step_, newton_schulz, polar
from .symmetric_matmul import gram

__all__ = [
    "deva_step_",
    "eigenbasis",
    "gram",
    "inverse_root",
    "kron_factors_update_",
    "kron_precondition",
    "muon_step_",
    "newton_schulz",
    "polar",
    "refresh_eigenbasis",
    "shampoo_step_",
    "soap_step_",
]
