"""kozistr's pytorch-optimizer (3.9.0, commit 7a076d2, and 4.1.0) on fast kernels.

`zero_power_via_newton_schulz_5`, which its Muon variants, SCION and MARS share, and from version 4
on `zero_power_via_gram_newton_schulz`. Version 3 writes a bfloat16 argument; the replacement does
not. Gram matrices are in float32 here, so that none is rebuilt on the way. Its SOAP and Shampoo
stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from .. import _checks
from ..newton_schulz import newton_schulz
from ._orthogonalizer import SIMPLE, Orthogonalizer, Row
from ._points import Point, Refused

Weights = str | Sequence[float] | Sequence[Sequence[float]]

_STANDARD, _GRAM = "zero_power_via_newton_schulz_5", "zero_power_via_gram_newton_schulz"
_SCHEDULE = "get_newton_schulz_weights"


class PytorchOptimizer(Orthogonalizer):
    """The module pytorch_optimizer.optimizer.shampoo_utils, or utils.matrix of version 4."""

    name = "pytorch-optimizer"
    modules = (
        "pytorch_optimizer.optimizer.shampoo_utils",
        "pytorch_optimizer.optimizer.utils.matrix",
    )
    functions = (_STANDARD,)

    def points(self, module: ModuleType) -> list[Point]:
        """One function in version 3, two in version 4."""
        if module.__name__ == self.modules[0]:
            return super().points(module)
        if not hasattr(module, _SCHEDULE):
            raise Refused(f"{module.__name__} has no {_SCHEDULE} any more")
        self.module = module
        return [
            Point(module, _STANDARD, self.standard, self.standard_declines, imported_by_name=True),
            Point(module, _GRAM, self.gram, self.gram_declines, imported_by_name=True),
        ]

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

    # Version 4.

    def standard(
        self,
        own: Callable[..., Tensor],
        g: Tensor,
        num_steps: int = 5,
        eps: float = 1e-7,
        safety_factor: float = 1.0,
        weights: Weights = SIMPLE,
        dtype: torch.dtype = torch.bfloat16,
    ) -> Tensor:
        """Norm, products and result in `dtype`."""
        return newton_schulz(
            g.to(dtype),
            coefficients=self._rows(weights, num_steps),
            eps=eps,
            backend=self.options.backend,
        )

    def standard_declines(
        self,
        g: Tensor,
        num_steps: int = 5,
        eps: float = 1e-7,
        safety_factor: float = 1.0,
        weights: Weights = SIMPLE,
        dtype: torch.dtype = torch.bfloat16,
    ) -> str | None:
        """Another norm or dtype, and what is no matrix."""
        if num_steps < 1 or eps < 0.0 or safety_factor != 1.0 or dtype not in _checks.FLOATS:
            return f"num_steps={num_steps}, eps={eps}, safety_factor={safety_factor}, dtype={dtype}"
        return self.declines_matrix(g)

    def gram(
        self,
        own: Callable[..., Tensor],
        g: Tensor,
        num_steps: int = 5,
        eps: float = 1e-7,
        safety_factor: float = 1.0,
        weights: Weights = SIMPLE,
        dtype: torch.dtype = torch.float16,
        reset_steps: tuple[int, ...] = (2,),
    ) -> Tensor:
        """The norm in float32, products and result in `dtype`."""
        return newton_schulz(
            g.float(),
            coefficients=self._rows(weights, num_steps),
            method="gram",
            compute_dtype=dtype,
            eps=eps,
            backend=self.options.backend,
        ).to(dtype)

    def gram_declines(
        self,
        g: Tensor,
        num_steps: int = 5,
        eps: float = 1e-7,
        safety_factor: float = 1.0,
        weights: Weights = SIMPLE,
        dtype: torch.dtype = torch.float16,
        reset_steps: tuple[int, ...] = (2,),
    ) -> str | None:
        """As `standard_declines`; wider products need the resets where they were asked for."""
        if dtype not in (torch.float16, torch.bfloat16):
            return f"dtype={dtype}"
        return self.standard_declines(g, num_steps, eps, safety_factor, weights, dtype)

    def _rows(self, weights: Weights, steps: int) -> tuple[Row, ...]:
        schedule = getattr(self.module, _SCHEDULE)(weights)
        return tuple(schedule[min(step, len(schedule) - 1)] for step in range(steps))
