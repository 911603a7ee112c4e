"""Microsoft's dion (github.com/microsoft/dion, commit 0a059a4) on fast kernels.

Its two orthogonalizations without Triton, which Muon, NorMuon, Dion2 and Dion3 call; those with
Triton stay, and so does Dion's own, a QR decomposition. An optimizer keeps the function that it
found when it was made: one that was made before the swap stays as it is. Both functions add their
epsilon to the norm, where the replacement takes it as a floor.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..newton_schulz import newton_schulz
from ._orthogonalizer import QUINTIC, Orthogonalizer, Row

_SAFETY = 1.02
_POLAR_EXPRESS: tuple[Row, ...] = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def _divided(row: Row, factor: float) -> Row:
    """The row that maps s as the given one maps s / factor."""
    a, b, c = row
    return a / factor, b / factor**3, c / factor**5


_ROWS = (_divided(_POLAR_EXPRESS[0], _SAFETY), *_POLAR_EXPRESS[1:])


class Dion(Orthogonalizer):
    """The modules dion.newton_schulz_triton and dion.polar_express."""

    name = "dion"
    modules = ("dion.newton_schulz_triton", "dion.polar_express")
    functions = ("zeropower_via_newtonschulz5", "polar_express")

    def zeropower_via_newtonschulz5(
        self, own: Callable[..., Tensor], G: Tensor, epsilon: float = 1e-7
    ) -> Tensor:
        """Five rows; products in bfloat16, and a bfloat16 result."""
        return newton_schulz(
            G.bfloat16(), coefficients=QUINTIC, eps=float(epsilon), backend=self.options.backend
        )

    def polar_express(self, own: Callable[..., Tensor], G: Tensor, epsilon: float = 1e-6) -> Tensor:
        """Five rows under 1.02 |G|; products in bfloat16, and a bfloat16 result."""
        eps = float(epsilon) / _SAFETY
        return newton_schulz(
            G.bfloat16(), coefficients=_ROWS, eps=eps, backend=self.options.backend
        )

    def zeropower_via_newtonschulz5_declines(self, G: Tensor, epsilon: float = 1e-7) -> str | None:
        """A negative epsilon, and what is no matrix."""
        return f"epsilon={float(epsilon)}" if epsilon < 0.0 else self.declines_matrix(G)

    def polar_express_declines(self, G: Tensor, epsilon: float = 1e-6) -> str | None:
        """A negative epsilon, and what is no matrix."""
        return self.zeropower_via_newtonschulz5_declines(G, epsilon)
