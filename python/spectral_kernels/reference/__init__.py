"""The specification in plain PyTorch: every operator, float64-capable, without speed tricks.

One file a family. The signatures are those of `torch.ops.spectral_kernels`, except that rows of
coefficients are (a, b, c) triples. It is what the tests hold the kernels against, and the backend
"reference" where there is no compiled one: any float dtype, any device, one matrix after another.
"""

from .inverse_root import inverse_root, shampoo_step_
from .kron_factor import kron_factors_update_, kron_precondition
from .newton_schulz import muon_step_, newton_schulz, polar
from .symmetric_matmul import gram

__all__ = [
    "gram",
    "inverse_root",
    "kron_factors_update_",
    "kron_precondition",
    "muon_step_",
    "newton_schulz",
    "polar",
    "shampoo_step_",
]
