"""The public DeVA code (Decoupled-Variance-Adaptation, commit 2e4d26e) on fast kernels.

`msign` of optimizers.muon, which all its classes call, and the methods that the Schatten classes
share with SOAP. DeVAEuclideanNorm has no matrix work, and DeVASchattenNormEfficient cannot run: it
calls a function that does not exist. Both stay as they are.

`msign` computes in bfloat16 whatever comes in, and so does the replacement; two correct codes
differ by 2 to 4 % of the update there. Its eps of 1e-20 is taken as a floor of 1e-10 under the
norm: the results differ where the norm of the input comes near that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

from torch import Tensor
from torch.optim import Optimizer

from ..newton_schulz import newton_schulz
from ._adapter import Adapter
from ._orthogonalizer import SIMPLE
from ._points import Point, agree, trial_matrix, unfit
from .soap import EigenbasisMethods, eigenbasis_classes, prove_methods


class Deva(Adapter):
    """The modules muon and deva of its package optimizers."""

    name = "DeVA"
    modules = (".deva", ".muon")

    @classmethod
    def holds(cls, module: ModuleType) -> bool:
        """Whether it defines msign, or classes that share SOAP's methods."""
        return (cls.wants(module.__name__) and _defines_msign(module)) or bool(deva_classes(module))

    def points(self, module: ModuleType) -> list[Point]:
        """msign where it is defined, the methods where the classes are."""
        points = [
            point
            for optimizer in deva_classes(module)
            for point in EigenbasisMethods(optimizer, self.options).points()
        ]
        if _defines_msign(module):
            points.append(
                Point(module, "msign", self.msign, self.msign_declines, imported_by_name=True)
            )
        return points

    def msign(
        self, own: Callable[..., Tensor], x: Tensor, steps: int = 5, eps: float = 1e-20
    ) -> Tensor:
        """Newton-Schulz under the Schatten-8 norm, in bfloat16."""
        return newton_schulz(
            x.bfloat16(),
            coefficients=SIMPLE,
            steps=steps,
            eps=math.sqrt(eps),
            norm="schatten8",
            backend=self.options.backend,
        )

    def msign_declines(self, x: Tensor, steps: int = 5, eps: float = 1e-20) -> str | None:
        """Anything but plain matrices; the last two dimensions hold them, as in the original."""
        if steps < 1 or eps < 0.0:
            return f"steps={steps}, eps={eps}"
        return unfit(x, self.options, batches=True)

    def prove(self, points: list[Point]) -> None:
        """msign of a wide and a tall matrix; the methods as for SOAP."""
        prove_methods(points, self.options)
        for point in points:
            if point.name == "msign":
                own = point.check()
                for shape in ((4, 6), (6, 4)):
                    x = trial_matrix(*shape)
                    agree(str(point), self.msign(own, x), own(x), 0.1)


def deva_classes(module: ModuleType) -> list[type[Optimizer]]:
    """The Schatten classes of a module that can run."""
    return [
        optimizer
        for optimizer in eigenbasis_classes(module)
        if optimizer.__name__.startswith("DeVA")
        and optimizer.__name__ != "DeVASchattenNormEfficient"
    ]


def _defines_msign(module: ModuleType) -> bool:
    msign = vars(module).get("msign")
    return callable(msign) and getattr(msign, "__module__", None) == module.__name__
