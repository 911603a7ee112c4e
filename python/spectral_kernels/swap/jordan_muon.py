"""Keller Jordan's Muon (github.com/KellerJordan/Muon, commit 857d1ad) on fast kernels.

`zeropower_via_newtonschulz5` of its module muon; momentum, scaling and communication stay its own,
and so does its writing the gradient. It divides by |G| + 1e-7 and the replacement by max(|G|,
1e-7): the results differ where |G| comes near 1e-7.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from ..newton_schulz import newton_schulz
from ._orthogonalizer import SIMPLE, Orthogonalizer


class JordanMuon(Orthogonalizer):
    """The module muon."""

    name = "KellerJordan/Muon"
    modules = (".muon",)
    functions = ("zeropower_via_newtonschulz5",)
    arguments: ClassVar[dict[str, Any]] = {"steps": 5}

    def zeropower_via_newtonschulz5(
        self, own: Callable[..., Tensor], G: Tensor, steps: int
    ) -> Tensor:
        """Products in bfloat16, and a bfloat16 result, whatever comes in."""
        return newton_schulz(
            G.bfloat16(), coefficients=SIMPLE, steps=steps, eps=1e-7, backend=self.options.backend
        )

    def zeropower_via_newtonschulz5_declines(self, G: Tensor, steps: int) -> str | None:
        """No steps, and what is no matrix."""
        return f"steps={steps}" if steps < 1 else self.declines_matrix(G)
