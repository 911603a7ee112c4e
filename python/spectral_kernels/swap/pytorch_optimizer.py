"""kozistr's pytorch-optimizer (3.9.0, commit 7a076d2) on fast kernels.

`zero_power_via_newton_schulz_5`, which its Muon variants, SCION and MARS share. It writes a
bfloat16 argument; the replacement does not. Its SOAP and Shampoo stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ..newton_schulz import newton_schulz
from ._orthogonalizer import SIMPLE, Orthogonalizer


class PytorchOptimizer(Orthogonalizer):
    """The module pytorch_optimizer.optimizer.shampoo_utils."""

    name = "pytorch-optimizer"
    modules = ("pytorch_optimizer.optimizer.shampoo_utils",)
    functions = ("zero_power_via_newton_schulz_5",)

    def zero_power_via_newton_schulz_5(
        self,
        own: Callable[..., Tensor],
        g: Tensor,
        num_steps: int = 5,
        eps: float = 1e-7,
        safety_factor: float = 1.0,
        weights: Sequence[float] = SIMPLE,
    ) -> Tensor:
        """Products in bfloat16, and a bfloat16 result, whatever comes in."""
        return newton_schulz(
            g.bfloat16(),
            coefficients=tuple(weights),
            steps=num_steps,
            eps=eps,
            backend=self.options.backend,
        )

    def zero_power_via_newton_schulz_5_declines(
        self,
        g: Tensor,
        num_steps: int = 5,
        eps: float = 1e-7,
        safety_factor: float = 1.0,
        weights: Sequence[float] = SIMPLE,
    ) -> str | None:
        """Another norm or form of polynomial, and what is no matrix."""
        if num_steps < 1 or eps < 0.0 or safety_factor != 1.0 or len(weights) != 3:
            return f"num_steps={num_steps}, eps={eps}, safety_factor={safety_factor}"
        return self.declines_matrix(g)
