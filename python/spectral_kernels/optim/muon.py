"""Muon: momentum, orthogonalized."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import _lists, _restarts, coefficients as _coefficients, newton_schulz as _newton_schulz
from .._options import MuonOptions, chosen
from . import _rules, _split
from ._base import MatrixOptimizer, Params
from ._forms import Form, Layout, Slot, step_slot
from ._groups import Values
from ._state import as_matrices
from ._work import Part


def coefficients_rule(name: str, value: Any) -> Any:
    """A name, one row, or rows of Newton-Schulz coefficients."""
    _coefficients.resolve(value)
    return value


class Muon(MatrixOptimizer):
    """Muon for matrices, AdamW for everything else.

        M <- momentum M + (1 - momentum) G
        N = (1 - momentum) G + momentum M if nesterov, else M
        W <- (1 - lr weight_decay) W - lr scale newton_schulz(N)

    NorMuon with `beta2`, cautious weight decay, and MuonH with `hyperball`: see `muon_step_` for
    their formulas.

    The first nine arguments, their order and defaults are those of torch.optim.Muon, whose state
    loads, but for eps: its floor changes updates of gradients below 1e-7, so it is 0 here.

    Args:
        params: tensors, (name, tensor) pairs, or groups. 2-D parameters, and 4-D and 5-D ones
            flattened to (out, rest), take the matrix rule, parameters with fewer dimensions AdamW;
            so do embeddings, heads and norms that are given by name. See `param_groups`, and
            `add_param_group` for groups with an `algorithm`, `batched` (leading dimensions are a
            batch of matrices) or `matrix_dims` ((rows, columns), each one dimension or several);
            `use_muon`, True or False, says the algorithm too.
        lr: a number, or a tensor of one number.
        weight_decay: decoupled.
        momentum: in [0, 1).
        nesterov: see above.
        ns_coefficients: (a, b, c) of every Newton-Schulz step, or whatever `newton_schulz` takes as
            `coefficients`.
        eps: the norm's floor in Newton-Schulz.
        ns_steps: its number of steps, below 100.
        adjust_lr_fn: None or "original" scale = sqrt(max(1, m / n)); "match_rms_adamw" scale =
            0.2 sqrt(max(m, n)); "spectral_unclamped" sqrt(m / n); "none" 1. The shape is that of
            the flattened matrix.
        coefficients: replaces ns_coefficients and ns_steps by a set with its own number of steps,
            such as "polar_express".
        method: "standard", "gram" or "auto", see `newton_schulz`.
        compute_dtype: of its products; None is bfloat16, and float64 for float64 parameters.
        beta2: in [0, 1), NorMuon's: rows of the update, the neurons, are divided by the roots of
            running averages of their squares, and the update keeps its length. None: not so. With
            adjust_lr_fn="match_rms_adamw" this is the paper's update, but for the length of
            `newton_schulz`'s result.
        cautious_weight_decay: elements whose sign is against that of the update do not decay.
            AdamW's always do.
        hyperball: matrices keep their Frobenius norms (MuonH): each goes lr times its norm in the
            direction of its update, and is brought back to its sphere. adjust_lr_fn has no effect
            then, nor has weight_decay on matrices; AdamW's tensors decay as ever. A matrix of zeros
            has no sphere and is refused; over ranks, where its owner finds it, there is a warning.
        state_dtype: None, or torch.bfloat16 for momentum in 2 bytes an element in place of 4
            (float64 parameters keep theirs). It is rounded at random, by a hash of step, row,
            column and the leading bits: its mean is that of exact momentum, and a resumed or
            repeated run has the same bits. The error of an element has a standard deviation of at
            most 2^-8 / sqrt(1 - momentum^2) of the element's largest magnitude so far.
        split: a matrix is several, one below the other, such as queries, keys and values or the
            heads of each: a number of equal parts, or the rows of every part. Each is stepped as if
            it were a parameter of its own, its scale that of its own shape. A value for a group;
            `param_groups(model, split=...)` finds it. State keeps the parameter's layout and loads
            into any split.
        maximize: ascend.
        nonfinite: "skip" leaves a matrix, or a tensor of AdamW's, with a non-finite gradient alone
            and counts it in `skipped`; "propagate" lets it become NaN; "raise" raises before
            anything is written.
        capturable: `step` may be recorded in a CUDA graph, see `MatrixOptimizer.step`.
        adamw: AdamW's own lr, betas, eps, weight_decay, amsgrad, maximize; see `add_param_group`.
            Without them AdamW's lr and maximize are those above, its weight_decay too where they
            are given, and the rest is as in torch.optim.AdamW. eps above is Newton-Schulz's alone.
        distributed: spreads matrices over ranks, see `Distributed`: of plain parameters, which are
            the same on all ranks, over this process group; DTensors need nothing.

    Raises:
        TypeError, ValueError: a parameter or value that cannot work, with its place.

    State of a matrix: step (one a part), momentum_buffer (float32, float64 under float64, or
    state_dtype, in the parameter's layout); with beta2 also second_momentum_buffer, (..., m, 1),
    zeros at first and where what is loaded has none.

    Source: Jordan, "Muon" (2024); NorMuon: arXiv 2510.05491; cautious weight decay: arXiv
    2510.12402; MuonH: Wen et al., "Fantastic Pretraining Optimizers and Where to Find Them 2.1"
    (2025); rounding at random: arXiv 2010.06192; scales: KellerJordan/Muon, arXiv 2502.16982, and
    Bernstein, "Deriving Muon" (2025).
    """

    _operator = "muon_step_"
    _flag = "use_muon"
    _own_rules: ClassVar[Mapping[str, _rules.Rule]] = {
        **_rules.of(MuonOptions, "momentum", "nesterov", "eps", "method"),
        **_rules.of(MuonOptions, "compute_dtype", "beta2"),
        "ns_coefficients": coefficients_rule,
        "ns_steps": _rules.optional(_rules.whole(1, 99)),
        "adjust_lr_fn": _rules.optional(_rules.choice(*_lists.SCALES)),
        "coefficients": _rules.optional(coefficients_rule),
        "cautious_weight_decay": _rules.flag,
        "hyperball": _rules.flag,
        "split": _split.rule,
    }
    _structure = ("split", "beta2")

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        weight_decay: float = _rules.unwritten(0.1),
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
        beta2: float | None = None,
        cautious_weight_decay: bool = False,
        hyperball: bool = False,
        state_dtype: torch.dtype | None = None,
        split: int | Sequence[int] | None = None,
        maximize: bool = False,
        nonfinite: str = "skip",
        capturable: bool = False,
        adamw: Mapping[str, Any] | None = None,
        distributed: Any = None,
    ) -> None:
        super().__init__(params, _rules.arguments(locals()), adamw, distributed)

    def _layout(self, form: Form, values: Values) -> Layout:
        parts = _split.sizes_of(form.shape[-2], values["split"])
        momentum = Slot(None, narrow=values["state_dtype"])
        layout: Layout = {"step": step_slot(form, len(parts)), "momentum_buffer": momentum}
        if values["beta2"] is None:
            return layout
        return {**layout, "second_momentum_buffer": Slot((*form.shape[:-1], 1))}

    def _check_form(self, form: Form, values: Values) -> None:
        _split.sizes_of(form.shape[-2], _split.rule("split", values["split"]))

    def _cut(self, matrices: Tensor, values: Values) -> list[Tensor]:
        return _split.cut(matrices, values["split"])

    def _entries(
        self, matrices: Tensor, state: Values, form: Form, layout: Layout, values: Values
    ) -> list[list[Tensor]]:
        momenta = as_matrices("momentum_buffer", state["momentum_buffer"], form)
        sizes = _split.sizes_of(form.shape[-2], values["split"])
        parts = self._cut(matrices, values)
        # What comes from other ranks is not there yet.
        if values["hyperball"] and self._spread is None and any(map(_has_zeros, parts)):
            raise ValueError(f"hyperball=True {_NO_SPHERE.format(tuple(matrices.shape[-2:]))}")
        none = matrices.new_empty(0)
        columns = [
            parts,
            self._cut(momenta, values),
            [none] * len(parts)
            if values["beta2"] is None
            else self._cut(state["second_momentum_buffer"], values),
            _split.cut_steps(state["step"], sizes, merged=matrices.ndim == 2),
        ]
        return [list(entry) for entry in zip(*columns, strict=True)]

    def _call(self, part: Part, grads: list[Tensor], lr: Tensor, values: Values) -> None:
        if values["hyperball"] and self._spread is not None and not part.seen:
            part.seen = True
            for name, matrices in zip(part.names, part.lists[0], strict=True):
                if _has_zeros(matrices):
                    shape = tuple(matrices.shape[-2:])
                    warnings.warn(f"{name}: hyperball {_NO_SPHERE.format(shape)}", stacklevel=2)
        super()._call(part, grads, lr, values)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # of a version that had none of these
            if group["algorithm"] != "adamw":
                group.setdefault("beta2", None)
                group.setdefault("cautious_weight_decay", False)
                group.setdefault("hyperball", False)
                group.setdefault("split", None)

    def _fit_state(self, state: dict[str, Any], layout: Layout) -> dict[str, Any]:
        # Nothing depends on the counts, and everything else lies as the parameter does.
        step, slot = state.get("step"), layout["step"]
        assert isinstance(slot, Slot) and slot.shape is not None
        if isinstance(step, Tensor) and tuple(step.shape) != slot.shape and step.numel():
            state = {**state, "step": step.max().expand(slot.shape)}
        second = layout.get("second_momentum_buffer")
        if isinstance(second, Slot) and "second_momentum_buffer" not in state:
            assert second.shape is not None
            zeros = torch.zeros(second.shape, device="cpu", dtype=torch.float32)
            state = {**state, "second_momentum_buffer": zeros}
        return state

    def _check_together(self, values: Values) -> None:
        _rows(values)

    def _options(self, values: Values, part: Part) -> dict[str, Any]:
        rows = _rows(values)
        dtype = values["compute_dtype"] or torch.bfloat16
        return chosen(
            MuonOptions,
            values,
            cautious=values["cautious_weight_decay"],
            weight_decay=0.0 if values["hyperball"] else values["weight_decay"],
            rows=rows.rows,
            scales=_lists.scales_of(part.lists[0], values["adjust_lr_fn"] or "original"),
            restarts=_restarts.restarts_of(part.lists[0], rows, values["method"], dtype),
            compute_dtype=dtype,
            norm_factor=rows.norm_factor,
        )

    def _adopt_state(self, name: str, state: dict[str, Any], form: Form) -> dict[str, Any]:
        # torch.optim.Muon counts no steps, and nothing in Muon depends on them.
        return {"step": torch.zeros(form.shape[:-2], dtype=torch.float32, device="cpu"), **state}


_NO_SPHERE = (
    "keeps norms, and a matrix in one of shape {} is zero throughout: initialise it, or give its "
    "group hyperball=False"
)


def _has_zeros(matrices: Tensor) -> bool:
    """Whether a matrix of a batch has no other element."""
    return bool((matrices == 0).flatten(-2).all(-1).any())


def _rows(values: Values) -> _coefficients.Coefficients:
    if values["coefficients"] is not None:
        return _coefficients.resolve(values["coefficients"])
    return _coefficients.resolve(values["ns_coefficients"], values["ns_steps"])
