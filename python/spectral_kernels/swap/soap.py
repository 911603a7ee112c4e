"""The public SOAP class (github.com/nikhilvyas/SOAP) on fast products and refreshes.

The class's own `step` runs; what it calls for the matrix work is replaced where the parameter is a
matrix, or becomes one by `merge_dims`. State, its layout and `state_dict` stay the class's. Three
things make it faster. Both factors come from one read of the gradient, one triangle each. The
momentum is carried from basis to basis only when there is a new one, where the class rotates it out
and in at every step. A new basis comes from CholeskyQR, not from Q^T A Q and Householder QR. The
first gradient, which sets the bases, is left to the class, so that both start from the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import _checks
from ..eigenbasis import refresh_eigenbasis
from ..kron_factor import kron_factors_update_, kron_precondition
from ._adapter import Adapter, optimizer_classes
from ._points import (
    Options,
    Point,
    Refused,
    Replacement,
    agree,
    require_parameters,
    trial_matrix,
    unfit,
)

State = dict[str, Any]

# Methods that are replaced, and those that the replacements call.
_METHODS = ("project", "project_back", "update_preconditioner", "get_orthogonal_matrix_QR")
_CALLED = {
    "init_preconditioner": (
        "self",
        "grad",
        "state",
        "precondition_frequency",
        "shampoo_beta",
        "max_precond_dim",
        "precondition_1d",
        "merge_dims",
    ),
    "merge_dims": ("self", "grad", "max_precond_dim"),
    "get_orthogonal_matrix": ("self", "mat"),
}
_TRIAL_STEPS = 5


class Soap(Adapter):
    """The class SOAP of a module soap."""

    name = "SOAP"
    modules = (".soap",)

    @classmethod
    def holds(cls, module: ModuleType) -> bool:
        """Whether it defines an optimizer with the methods of this implementation."""
        return bool(soap_classes(module))

    def points(self, module: ModuleType) -> list[Point]:
        """Four methods."""
        return [
            point
            for optimizer in soap_classes(module)
            for point in EigenbasisMethods(optimizer, self.options).points()
        ]

    def prove(self, points: list[Point]) -> None:
        """Five steps of a small square matrix."""
        prove_methods(points, self.options)


def soap_classes(module: ModuleType) -> list[type[Optimizer]]:
    """The optimizers of a module that have this family's methods, DeVA's left out."""
    return [
        optimizer
        for optimizer in eigenbasis_classes(module)
        if not optimizer.__name__.startswith("DeVA")
    ]


def eigenbasis_classes(module: ModuleType) -> list[type[Optimizer]]:
    """The optimizers of a module with methods that only this family has, by these names."""
    return [
        optimizer
        for optimizer in optimizer_classes(module)
        if all(name in vars(optimizer) for name in ("init_preconditioner", "get_orthogonal_matrix"))
    ]


class EigenbasisMethods:
    """The methods that SOAP and DeVA's public classes share, for one class.

    `state` has "GG", the factors, and "Q", their bases: one a dimension, [] where it has none.
    """

    def __init__(self, owner: type[Optimizer], options: Options) -> None:
        self.owner = owner
        self.options = options

    def points(self) -> list[Point]:
        """All methods of the class."""
        name = f"{self.owner.__module__}.{self.owner.__qualname__}"
        for method, parameters in _CALLED.items():
            if not hasattr(self.owner, method):
                raise Refused(f"{name} has no {method} any more")
            require_parameters(f"{name}.{method}", getattr(self.owner, method), parameters)
        return [
            Point(self.owner, "project", self.project, self.declines_projection),
            Point(self.owner, "project_back", self.project_back, self.declines_projection),
            Point(
                self.owner,
                "update_preconditioner",
                self.update_preconditioner,
                self.declines_update,
            ),
            Point(
                self.owner,
                "get_orthogonal_matrix_QR",
                self.get_orthogonal_matrix_QR,
                self.declines_refresh,
            ),
        ]

    def project(
        self,
        own: Callable[..., Tensor],
        them: Any,
        grad: Tensor,
        state: State,
        merge_dims: bool = False,
        max_precond_dim: int = 10000,
    ) -> Tensor:
        """Q_L^T G Q_R."""
        left, right = (_present(q) for q in state["Q"])
        return kron_precondition(
            self._matrix(them, grad, merge_dims, max_precond_dim),
            None if left is None else left.mT,
            right,
            backend=self.options.backend,
        ).reshape(grad.shape)

    def project_back(
        self,
        own: Callable[..., Tensor],
        them: Any,
        grad: Tensor,
        state: State,
        merge_dims: bool = False,
        max_precond_dim: int = 10000,
    ) -> Tensor:
        """Q_L G Q_R^T."""
        left, right = (_present(q) for q in state["Q"])
        return kron_precondition(
            self._matrix(them, grad, merge_dims, max_precond_dim),
            left,
            None if right is None else right.mT,
            backend=self.options.backend,
        ).reshape(grad.shape)

    def update_preconditioner(
        self,
        own: Callable[..., None],
        them: Any,
        grad: Tensor,
        state: State,
        max_precond_dim: int = 10000,
        merge_dims: bool = False,
        precondition_1d: bool = False,
    ) -> None:
        """New factors; every `precondition_frequency` steps new bases, and the momentum in them."""
        shape = {"merge_dims": merge_dims, "max_precond_dim": max_precond_dim}
        refresh = state["step"] % state["precondition_frequency"] == 0
        if refresh:
            momentum = them.project_back(state["exp_avg"], state, **shape)
        self._update_factors(
            self._matrix(them, grad, merge_dims, max_precond_dim),
            state["GG"],
            state["shampoo_beta"],
        )
        if refresh:
            state["Q"] = them.get_orthogonal_matrix_QR(state, max_precond_dim, merge_dims)
            state["exp_avg"] = them.project(momentum, state, **shape)

    def get_orthogonal_matrix_QR(
        self,
        own: Callable[..., list[Any]],
        them: Any,
        state: State,
        max_precond_dim: int = 10000,
        merge_dims: bool = False,
    ) -> list[Any]:
        """One round of orthogonal iteration, columns and second moment in descending order."""
        squares = state["exp_avg_sq"]
        matrix = self._matrix(them, squares, merge_dims, max_precond_dim)
        bases: list[Any] = []
        for axis, (factor, basis) in enumerate(zip(state["GG"], state["Q"], strict=True)):
            if _present(basis) is None:
                bases.append([])
                continue
            values, new = refresh_eigenbasis(basis, factor, backend=self.options.backend)
            order = values.argsort(descending=True, stable=True)
            bases.append(new[:, order])
            matrix = matrix.index_select(axis, order)
        state["exp_avg_sq"] = matrix.reshape(squares.shape)
        return bases

    def declines_projection(
        self,
        them: Any,
        grad: Tensor,
        state: State,
        merge_dims: bool = False,
        max_precond_dim: int = 10000,
    ) -> str | None:
        """Anything but a matrix with a basis on one side at least."""
        if not state["Q"]:
            return "no bases yet"
        return self._unfit(them, grad, state["Q"], merge_dims, max_precond_dim)

    def declines_update(
        self,
        them: Any,
        grad: Tensor,
        state: State,
        max_precond_dim: int = 10000,
        merge_dims: bool = False,
        precondition_1d: bool = False,
    ) -> str | None:
        """The first gradient, a subclass that rotates in its own way, and what is no matrix."""
        if state["Q"] is None or state["step"] == 0:
            return "first gradient"
        for name in ("project", "project_back"):
            if getattr(type(them), name) is not getattr(self.owner, name) or name in vars(them):
                return f"{type(them).__name__} has its own {name}"
        if not 0.0 <= state["shampoo_beta"] <= 1.0:
            return f"shampoo_beta={state['shampoo_beta']}"
        sides = [*state["Q"], *state["GG"]]
        return self._unfit(them, grad, sides, merge_dims, max_precond_dim)

    def declines_refresh(
        self, them: Any, state: State, max_precond_dim: int = 10000, merge_dims: bool = False
    ) -> str | None:
        """What is no matrix; float64, which the class refreshes in float32."""
        squares = state["exp_avg_sq"]
        if squares.dtype != torch.float32:
            return str(squares.dtype).removeprefix("torch.")
        sides = [*state["Q"], *state["GG"]]
        return self._unfit(them, squares, sides, merge_dims, max_precond_dim)

    def _update_factors(self, grad: Tensor, factors: list[Any], beta: float) -> None:
        left, right = (_present(factor) for factor in factors)
        skipped = torch.zeros((), dtype=torch.int64, device=grad.device)
        kron_factors_update_(left, right, grad, beta, skipped=skipped, backend=self.options.backend)
        if skipped:
            # The class lets a non-finite gradient into its factors.
            for factor, x in ((left, grad), (right, grad.mT)):
                if factor is not None:
                    factor.lerp_(x @ x.mT, 1.0 - beta)

    @staticmethod
    def _matrix(them: Any, x: Tensor, merge_dims: bool, max_precond_dim: int) -> Tensor:
        merged: Tensor = them.merge_dims(x, max_precond_dim) if merge_dims else x
        return merged

    def _unfit(
        self, them: Any, x: Tensor, sides: list[Any], merge_dims: bool, max_precond_dim: int
    ) -> str | None:
        if merge_dims and x.ndim == 4 and them._data_format == "channels_last":
            return "channels_last"
        matrix = self._matrix(them, x, merge_dims, max_precond_dim)
        reason = unfit(matrix, self.options, dtypes=_checks.FULL)
        if reason is not None:
            return reason
        present = [side for side in sides if isinstance(side, Tensor)]
        if not present:
            return "no preconditioned dimension"
        for side in present:
            if side.dtype != x.dtype:
                return f"{x.dtype} with {side.dtype} factors".replace("torch.", "")
        return None


def prove_methods(points: list[Point], options: Options) -> None:
    """Five steps of a small square matrix, by the class and by a swapped subclass of it.

    Columns of a basis have no sign, so magnitudes are compared in it.
    """
    for owner in {point.owner for point in points if isinstance(point.owner, type)}:
        trial = type(owner.__name__, (owner,), {name: vars(owner)[name] for name in _METHODS})
        for point in EigenbasisMethods(trial, options).points():
            Replacement(point, point.check()).put_in()
        theirs, mine = _trial(owner), _trial(trial)
        for key in theirs:
            what = f"{owner.__module__}.{owner.__qualname__}'s {key}"
            agree(what, mine[key], theirs[key], 1e-3)


def _trial(owner: type) -> dict[str, Tensor]:
    optimizer: Any = object.__new__(owner)
    optimizer._data_format = "channels_first"
    size = 4
    # What the class makes its factors of.
    dtype = torch.get_default_dtype()
    scales = torch.tensor([4.0**-i for i in range(size)], dtype=dtype, device="cpu")
    grad = trial_matrix(size, size, 1.0, dtype) * scales
    state: State = {
        "step": 0,
        "exp_avg": torch.zeros_like(grad),
        "exp_avg_sq": torch.zeros_like(grad),
    }
    optimizer.init_preconditioner(grad, state, precondition_frequency=2, shampoo_beta=0.5)
    for step in range(_TRIAL_STEPS):
        grad = trial_matrix(size, size, 1.0 + 0.1 * step, dtype) * scales
        if step > 0:
            state["step"] += 1
            rotated = optimizer.project(grad, state)
            state["exp_avg"].lerp_(rotated, 0.25)
            state["exp_avg_sq"].lerp_(rotated.square(), 0.25)
        optimizer.update_preconditioner(grad, state)
    return {
        "left factor": state["GG"][0],
        "right factor": state["GG"][1],
        "rotation": optimizer.project(grad, state).abs(),
        "rotation back": optimizer.project_back(state["exp_avg"], state),
        "momentum": state["exp_avg"].abs(),
        "second moment": state["exp_avg_sq"],
    }


def _present(side: Any) -> Tensor | None:
    return side if isinstance(side, Tensor) else None
