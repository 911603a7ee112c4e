"""torch.optim.Muon on the fused step.

State, hyper-parameters and `state_dict` stay torch's. float32 parameters take `muon_step_`, with
products in bfloat16 as in torch and the caller's eps. For 16-bit parameters, whose momentum torch
keeps in 16 bits, and for float64, which `muon_step_` iterates in float64 and torch in bfloat16,
only the orthogonalization is replaced.

torch 2.13 overwrites the momentum of bfloat16 parameters when nesterov=False: its `.bfloat16()`
aliases the buffer, which is then divided by its norm in place. The replacement does not write its
input, so there the numbers differ, and are those of the formula.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..newton_schulz import muon_step_, newton_schulz
from ._adapter import Adapter
from ._orthogonalizer import SIMPLE
from ._points import Point, Refused, agree, require_parameters, trial_matrix, unfit

_STEP = "_single_tensor_muon"
_ORTHOGONALIZE = "_zeropower_via_newtonschulz"


class TorchMuon(Adapter):
    """torch.optim.Muon."""

    name = "torch.optim.Muon"
    modules = ("torch.optim._muon",)

    def points(self, module: ModuleType) -> list[Point]:
        """The update over a list of parameters, and the orthogonalization on its own."""
        adjust = getattr(module, "_adjust_lr", None)
        if adjust is None:
            raise Refused(f"{module.__name__} has no _adjust_lr any more")
        require_parameters(
            f"{module.__name__}._adjust_lr", adjust, ("lr", "adjust_lr_fn", "param_shape")
        )
        self._module = module
        return [
            Point(module, _STEP, self.step, self.step_declines),
            Point(
                module,
                _ORTHOGONALIZE,
                self.orthogonalize,
                self.orthogonalize_declines,
                imported_by_name=True,
            ),
        ]

    def step(
        self,
        own: Callable[..., None],
        params: list[Tensor],
        grads: list[Tensor],
        muon_momentum_bufs: list[Tensor],
        *,
        lr: float | Tensor,
        weight_decay: float,
        momentum: float,
        nesterov: bool,
        ns_coefficients: tuple[float, float, float],
        ns_steps: int,
        eps: float,
        adjust_lr_fn: str | None,
        has_complex: bool,
    ) -> None:
        """`_single_tensor_muon`."""
        lists = list(zip(params, grads, muon_momentum_bufs, strict=True))
        fused = [entry for entry in lists if self._unfit(*entry) is None]
        muon_step_(
            *_columns(fused),
            lr=lr,
            momentum=momentum,
            nesterov=nesterov,
            weight_decay=weight_decay,
            coefficients=ns_coefficients,
            steps=ns_steps,
            scale=[self._module._adjust_lr(1.0, adjust_lr_fn, p.shape) for p, _, _ in fused],
            eps=eps,
            compute_dtype=torch.bfloat16,
            nonfinite="propagate",
            backend=self.options.backend,
        )
        if len(fused) == len(lists):
            return
        own(
            *_columns([entry for entry in lists if self._unfit(*entry) is not None]),
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            nesterov=nesterov,
            ns_coefficients=ns_coefficients,
            ns_steps=ns_steps,
            eps=eps,
            adjust_lr_fn=adjust_lr_fn,
            has_complex=has_complex,
        )

    def step_declines(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        muon_momentum_bufs: list[Tensor],
        *,
        lr: float | Tensor,
        weight_decay: float,
        momentum: float,
        ns_coefficients: tuple[float, float, float],
        ns_steps: int,
        eps: float,
        has_complex: bool,
        **options: Any,
    ) -> str | None:
        """Arguments that torch rejects, or that `muon_step_` does; no matrix to take."""
        if has_complex:
            return "complex"
        if not 0.0 <= momentum < 1.0:
            return f"momentum={momentum}"
        if weight_decay < 0.0 or not (isinstance(lr, Tensor) or lr >= 0.0):
            return f"lr={lr}, weight_decay={weight_decay}"
        if isinstance(lr, Tensor) and not lr.is_floating_point():
            return f"lr of {lr.dtype}"
        if len({param.data_ptr() for param in params}) < len(params):
            return "parameters that share memory"
        reasons = [
            self._unfit(*entry) for entry in zip(params, grads, muon_momentum_bufs, strict=True)
        ]
        if None not in reasons:
            return reasons[0] if reasons else "no gradients"
        return _polynomial_declines(ns_coefficients, ns_steps, eps)

    def orthogonalize(
        self,
        own: Callable[..., Tensor],
        grad: Tensor,
        ns_coefficients: tuple[float, float, float],
        ns_steps: int,
        eps: float,
    ) -> Tensor:
        """`_zeropower_via_newtonschulz`: bfloat16 out, whatever comes in."""
        return newton_schulz(
            grad.bfloat16(),
            coefficients=ns_coefficients,
            steps=ns_steps,
            eps=eps,
            backend=self.options.backend,
        )

    def orthogonalize_declines(
        self,
        grad: Tensor,
        ns_coefficients: tuple[float, float, float],
        ns_steps: int,
        eps: float,
    ) -> str | None:
        """Anything but a plain matrix and a polynomial that torch takes too."""
        return unfit(grad, self.options) or _polynomial_declines(ns_coefficients, ns_steps, eps)

    def prove(self, points: list[Point]) -> None:
        """One step of a wide and a tall matrix in each precision."""
        step, orthogonalize = (point.check() for point in points)
        for shape in ((4, 6), (6, 4)):
            x = trial_matrix(*shape)
            agree(
                _ORTHOGONALIZE,
                self.orthogonalize(orthogonalize, x, SIMPLE, 5, 1e-7),
                orthogonalize(x, SIMPLE, 5, 1e-7),
                0.1,
            )
            options: dict[str, Any] = {
                "lr": 0.5,
                "weight_decay": 0.25,
                "momentum": 0.75,
                "ns_coefficients": SIMPLE,
                "ns_steps": 5,
                "eps": 1e-7,
                "has_complex": False,
            }
            for nesterov, adjust in ((True, None), (False, "match_rms_adamw")):
                mine, theirs = (
                    [[trial_matrix(*shape, seed)] for seed in (1.1, 1.2, 1.3)] for _ in range(2)
                )
                self.step(step, *mine, nesterov=nesterov, adjust_lr_fn=adjust, **options)
                step(*theirs, nesterov=nesterov, adjust_lr_fn=adjust, **options)
                agree(f"{_STEP}'s momentum", mine[2][0], theirs[2][0], 1e-5)
                agree(_STEP, mine[0][0], theirs[0][0], 0.1)

    def _unfit(self, param: Tensor, grad: Tensor, buffer: Tensor) -> str | None:
        for x in (param, grad, buffer):
            reason = unfit(x, self.options, dtypes=(torch.float32,))
            if reason is not None:
                return reason
        return None


def _polynomial_declines(coefficients: Sequence[float], steps: int, eps: float) -> str | None:
    if len(coefficients) != 3:
        return f"{len(coefficients)} coefficients"
    if not 1 <= steps < 100:
        return f"ns_steps={steps}"
    return f"eps={eps}" if eps < 0.0 else None


def _columns(entries: Sequence[tuple[Tensor, ...]]) -> tuple[list[Tensor], ...]:
    return tuple(list(column) for column in zip(*entries, strict=True))
