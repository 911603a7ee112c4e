"""Muon: momentum, orthogonalised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import coefficients as _coefficients
from .. import newton_schulz as _newton_schulz
from . import _rules
from ._base import MatrixOptimizer, Params, Part, Values
from ._forms import Form, Layout, Slot, step_slot


def coefficients_rule(name: str, value: Any) -> Any:
    """A name, one row, or rows of Newton-Schulz coefficients."""
    _coefficients.resolve(value)
    return value


class Muon(MatrixOptimizer):
    """Muon for matrices, AdamW for everything else.

        M <- momentum M + (1 - momentum) G
        N = (1 - momentum) G + momentum M if nesterov, else M
        W <- (1 - lr weight_decay) W - lr scale newton_schulz(N)

    The first nine arguments, their order and defaults are those of torch.optim.Muon, whose state
    loads, but for eps: its floor changes updates of gradients below 1e-7, so it is 0 here.

    Args:
        params: tensors, (name, tensor) pairs, or groups. 2-D parameters, and 4-D and 5-D ones
            flattened to (out, rest), take the matrix rule, parameters with fewer dimensions AdamW;
            so do embeddings, heads and norms that are given by name. See `param_groups`, and
            `add_param_group` for groups with an `algorithm`, `batched` (leading dimensions are a
            batch of matrices) or `matrix_dims` ((rows, columns), each one dimension or several).
        lr: a number, or a tensor of one number.
        weight_decay: decoupled.
        momentum: in [0, 1).
        nesterov: see above.
        ns_coefficients: (a, b, c) of every Newton-Schulz step, or whatever `newton_schulz` takes as
            `coefficients`.
        eps: the norm's floor in Newton-Schulz.
        ns_steps: its number of steps, below 100.
        adjust_lr_fn: None or "original" scale = sqrt(max(1, m / n)); "match_rms_adamw" scale =
            0.2 sqrt(max(m, n)); "none" 1. The shape is that of the flattened matrix.
        coefficients: replaces ns_coefficients and ns_steps by a set with its own number of steps,
            such as "polar_express".
        method: "standard", "gram" or "auto", see `newton_schulz`.
        compute_dtype: of its products; None is bfloat16, and float64 for float64 parameters.
        maximize: ascend.
        nonfinite: "skip" leaves a matrix with a non-finite gradient alone and counts it in
            `skipped`; "propagate" lets it become NaN; "raise" raises before anything is written.
        adamw: values for the AdamW part of mixed groups: lr, betas, eps, weight_decay, amsgrad,
            maximize; defaults of torch.optim.AdamW, but lr is that of the matrices where
            adjust_lr_fn is "match_rms_adamw".

    Raises:
        TypeError, ValueError: a parameter or value that cannot work, with its place.

    State of a matrix: step, momentum_buffer (float32, float64 under float64, in the parameter's
    layout).

    Source: Jordan, "Muon" (2024); scales: KellerJordan/Muon and arXiv 2502.16982.
    """

    _operator = "muon_step_"
    _own_rules: ClassVar[Mapping[str, _rules.Rule]] = {
        "momentum": _rules.real(0.0, 1.0),
        "nesterov": _rules.flag,
        "ns_coefficients": coefficients_rule,
        "eps": _rules.real(),
        "ns_steps": _rules.optional(_rules.whole(1, 99)),
        "adjust_lr_fn": _rules.optional(_rules.choice(*_newton_schulz.SCALES)),
        "coefficients": _rules.optional(coefficients_rule),
        "method": _rules.choice(*_newton_schulz.METHODS),
        "compute_dtype": _rules.compute_dtype,
    }

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: _newton_schulz.CoefficientsLike = (3.4445, -4.7750, 2.0315),
        eps: float = 0.0,
        ns_steps: int | None = 5,
        adjust_lr_fn: str | None = None,
        *,
        coefficients: _newton_schulz.CoefficientsLike | None = None,
        method: str = "auto",
        compute_dtype: torch.dtype | None = None,
        maximize: bool = False,
        nonfinite: str = "skip",
        adamw: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "weight_decay": weight_decay,
                "momentum": momentum,
                "nesterov": nesterov,
                "ns_coefficients": ns_coefficients,
                "eps": eps,
                "ns_steps": ns_steps,
                "adjust_lr_fn": adjust_lr_fn,
                "coefficients": coefficients,
                "method": method,
                "compute_dtype": compute_dtype,
                "maximize": maximize,
                "nonfinite": nonfinite,
            },
            adamw,
        )

    def _layout(self, form: Form, values: Values) -> Layout:
        return {"step": step_slot(form), "momentum_buffer": Slot(None)}

    def _check_together(self, values: Values) -> None:
        _rows(values)

    def _adamw_lr(self, values: Values) -> Any:
        if values["adjust_lr_fn"] == "match_rms_adamw":
            return values["lr"]
        return _rules.ADAMW_DEFAULTS["lr"]

    def _options(self, values: Values, part: Part) -> dict[str, Any]:
        rows = _rows(values)
        dtype = values["compute_dtype"] or torch.bfloat16
        return {
            "momentum": values["momentum"],
            "nesterov": values["nesterov"],
            "weight_decay": values["weight_decay"],
            "rows": rows.rows,
            "scales": _newton_schulz.scales_of(part.lists[0], values["adjust_lr_fn"] or "original"),
            "method": values["method"],
            "restarts": _newton_schulz.restarts_of(part.lists[0], rows, values["method"], dtype),
            "compute_dtype": dtype,
            "eps": values["eps"],
            "norm": "frobenius",
            "norm_factor": rows.norm_factor,
            "maximize": values["maximize"],
            "nonfinite": values["nonfinite"],
        }

    def _adopt_state(self, name: str, state: dict[str, Any], form: Form) -> dict[str, Any]:
        # torch.optim.Muon counts no steps, and nothing in Muon depends on them.
        return {"step": torch.zeros(form.shape[:-2]), **state}


def _rows(values: Values) -> _coefficients.Coefficients:
    if values["coefficients"] is not None:
        return _coefficients.resolve(values["coefficients"])
    return _coefficients.resolve(values["ns_coefficients"], values["ns_steps"])
