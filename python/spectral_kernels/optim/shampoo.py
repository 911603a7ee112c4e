"""Shampoo and KL-Shampoo."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import _backend
from .._options import ShampooOptions, chosen
from . import _diagnostics, _rules
from ._base import MatrixOptimizer, Params
from ._forms import Form, Layout, Slot, side, step_slot
from ._groups import Values
from ._state import as_matrices
from ._work import Part

SIDES = ("both", "left", "right", "shorter")


class Shampoo(MatrixOptimizer):
    """Shampoo or KL-Shampoo for matrices, AdamW for everything else.

        L <- beta2 L + (1 - beta2) G G^T;  R <- beta2 R + (1 - beta2) G^T G
        M <- beta1 M + (1 - beta1) G
        P = (L + delta I)^(-e) M (R + delta I)^(-e)          (L, R, M debiased, e the exponent)
        W <- (1 - lr weight_decay) W - lr P ||D||_F / ||P||_F,  D the grafted direction

    for every block of at most block_size rows and columns. Roots are taken at the first step and
    then at every precondition_frequency-th, at different ones for different blocks. A root that
    fails (see `inverse_root` for what is tried) leaves what stands there, at first the identity; it
    is tried again at the next step, counted in `failed_roots`, and warned of the first time.

    Args:
        params: see `Muon`.
        lr: a number, or a tensor of one number.
        betas: beta1 in [0, 1), beta2 in [0, 1]; beta2 = 1 sums, as AdaGrad.
        weight_decay: decoupled.
        exponent: e, one of 1, 1/2, 1/3, ..., 1/8; default 1/4, and 1/2 with `kl`, which needs it.
        kl: KL-Shampoo's factors, see `shampoo_step_`.
        kl_order: its `kl_order`.
        sides: "both", "left", "right", or "shorter": the factor of the shorter side only.
        block_size: None keeps matrices whole.
        precondition_frequency: steps from root to root.
        stagger: spread the roots of different blocks evenly over the steps.
        graft: "adam", "rmsprop", "adagrad", "sgd" or "none": whose step length, see
            `shampoo_step_`.
        graft_beta2: in [0, 1); default beta2, or 0.999 if that is 1.
        graft_eps: added to sqrt(V), times its root mean square if graft_eps_mode is "relative".
        graft_eps_mode: "relative" or "absolute".
        ridge, relative_ridge: delta = max(ridge, relative_ridge ||L||_inf).
        root_method: see `inverse_root`.
        debias: see above.
        max_root_failures: when a block's root has failed more often than this in a row, the next
            step raises.
        state_dtype: None, or torch.bfloat16 for momentum_buffer and graft_sq in 2 bytes an element
            (float64 parameters keep theirs), rounded at random as `Muon`'s momentum: means are
            those of exact moments, runs repeat, and the error of an element has a standard
            deviation of at most 2^-8 / sqrt(1 - beta^2) of its largest magnitude so far, with the
            beta of each moment. Factors and roots stay in full precision, and so does graft_sq of
            "adagrad", a sum without decay in which errors would gather.
        maximize: ascend.
        nonfinite: "skip" leaves a block, or a tensor of AdamW's, with a non-finite gradient alone
            and counts it in `skipped`; "propagate" lets it become NaN; "raise" raises before
            anything is written.
        capturable: `step` may be recorded in a CUDA graph, see `MatrixOptimizer.step`.
        adamw: AdamW's own lr, betas, eps, weight_decay, amsgrad, maximize; see `add_param_group`.
            Without them AdamW's lr and maximize are those above, its betas and weight_decay
            too where they are given, and the rest is as in torch.optim.AdamW. A beta2 of 1 leaves
            AdamW's at 0.999.
        distributed: see `Muon`.

    Raises:
        TypeError, ValueError: a parameter or value that cannot work, with its place.

    State of a matrix: step, momentum_buffer, graft_sq (the parameter's shape), and dicts of blocks,
    by their number in row-major order as str, "0" and so on: left, right, left_root, right_root,
    root_failures; float32, float64 under float64, and the first two state_dtype. block_size, sides
    and graft are fixed by a parameter's first step.

    Source: Gupta et al., arXiv 1802.09568; Shi et al., arXiv 2309.06497; KL: arXiv 2509.03378.
    """

    _operator = "shampoo_step_"
    _shared = ("weight_decay", "betas")
    _structure: ClassVar[tuple[str, ...]] = ("block_size", "sides", "graft")
    _failing: list[tuple[str, Tensor, int]]
    _known_failures: dict[int, tuple[Tensor, bool]]
    _failed_roots = 0
    _warned_of_roots = False
    _own_rules: ClassVar[Mapping[str, _rules.Rule]] = {
        "betas": _rules.betas(adagrad=True),
        "exponent": _rules.optional(_rules.real(0.125, 1.0, include_high=True)),
        **_rules.of(ShampooOptions, "kl", "kl_order"),
        "sides": _rules.choice(*SIDES),
        "block_size": _rules.optional(_rules.whole(1)),
        "precondition_frequency": _rules.whole(1),
        "stagger": _rules.flag,
        "graft_beta2": _rules.optional(_rules.real(0.0, 1.0)),
        **_rules.of(ShampooOptions, "graft", "graft_eps", "graft_eps_mode"),
        **_rules.of(ShampooOptions, "ridge", "relative_ridge", "root_method", "debias"),
        "max_root_failures": _rules.whole(0),
    }

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = _rules.unwritten((0.9, 0.95)),
        weight_decay: float = _rules.unwritten(0.01),
        *,
        exponent: float | None = None,
        kl: bool = False,
        kl_order: str = "sequential",
        sides: str = "both",
        block_size: int | None = 1024,
        precondition_frequency: int = 10,
        stagger: bool = True,
        graft: str = "adam",
        graft_beta2: float | None = None,
        graft_eps: float = 1e-8,
        graft_eps_mode: str = "relative",
        ridge: float = 0.0,
        relative_ridge: float = 1e-6,
        root_method: str = "auto",
        debias: bool = True,
        max_root_failures: int = 3,
        state_dtype: torch.dtype | None = None,
        maximize: bool = False,
        nonfinite: str = "skip",
        capturable: bool = False,
        adamw: Mapping[str, Any] | None = None,
        distributed: Any = None,
    ) -> None:
        super().__init__(params, _rules.arguments(locals()), adamw, distributed)

    @classmethod
    def like_distributed(
        cls,
        params: Params,
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = _rules.unwritten((0.9, 1.0)),
        epsilon: float = 1e-12,
        weight_decay: float = 0.0,
        max_preconditioner_dim: int = 1024,
        precondition_frequency: int = 1,
        use_bias_correction: bool = True,
        **options: Any,
    ) -> Shampoo:
        """Shampoo with the arguments and defaults of facebookresearch/optimizers.

        An absolute ridge `epsilon`, roots by eigendecomposition in float64 at steps that all blocks
        share, and no grafting unless `graft` asks for it (with graft_eps absolute). What differs:
        biases, norms and embeddings take AdamW (with its betas and this weight_decay), small
        matrices are not merged into vectors, and roots are used from the first step, not only from
        the precondition_frequency-th.

        Args:
            params: see `Muon`.
            lr, betas, epsilon, weight_decay, max_preconditioner_dim, precondition_frequency,
                use_bias_correction: of DistributedShampoo.
            options: of this class.

        Raises:
            TypeError, ValueError: as the constructor.
        """
        defaults: dict[str, Any] = {
            "ridge": epsilon,
            "relative_ridge": 0.0,
            "root_method": "eigen",
            "block_size": max_preconditioner_dim,
            "precondition_frequency": precondition_frequency,
            "stagger": False,
            "debias": use_bias_correction,
            "graft": "none",
            "graft_eps_mode": "absolute",
        }
        return cls(params, lr, betas, weight_decay, **{**defaults, **options})

    def _layout(self, form: Form, values: Values) -> Layout:
        *batch, m, n = form.shape
        blocks = [(_size(rows), _size(cols)) for rows, cols in _blocks(m, n, values)]
        sides = values["sides"]
        if sides == "shorter":
            sides = "left" if m <= n else "right"
        left = [side(batch, rows, present=sides != "right") for rows, _ in blocks]
        right = [side(batch, cols, present=sides != "left") for _, cols in blocks]
        grafted = values["graft"] not in ("none", "sgd")
        narrow = None if values["graft"] == "adagrad" else values["state_dtype"]
        return {
            "step": step_slot(form, len(blocks)),
            "momentum_buffer": Slot(None, narrow=values["state_dtype"]),
            "left": left,
            "right": right,
            "left_root": [replace(slot, identity=True) for slot in left],
            "right_root": [replace(slot, identity=True) for slot in right],
            "graft_sq": Slot(None, narrow=narrow) if grafted else Slot((0,)),
            "root_failures": [Slot((*batch, 2), torch.int64) for _ in blocks],
        }

    def _check_together(self, values: Values) -> None:
        root = _root_of(values)
        if values["kl"] and root != 2:
            raise ValueError(
                f"kl weights its factors by inverse square roots: exponent is 1/{root}, not 1/2"
            )
        if values["root_method"] == "newton_db" and root not in (2, 4, 8):
            raise ValueError(f"newton_db takes square roots: exponent is 1/{root}")

    def _cut(self, matrices: Tensor, values: Values) -> list[Tensor]:
        m, n = matrices.shape[-2:]
        if max(m, n) <= (values["block_size"] or math.inf):
            return [matrices]
        return [matrices[..., rows, cols] for rows, cols in _blocks(m, n, values)]

    def _entries(
        self, matrices: Tensor, state: Values, form: Form, layout: Layout, values: Values
    ) -> list[list[Tensor]]:
        blocks = self._cut(matrices, values)
        columns = [blocks]
        for name, slot in layout.items():
            if isinstance(slot, list):
                columns.append([state[name][str(block)] for block in range(len(slot))])
            elif slot.shape is None:
                columns.append(self._cut(as_matrices(name, state[name], form), values))
            elif name != "step":
                columns.append([state[name]] * len(blocks))
        columns.append([state["step"]] if len(blocks) == 1 else list(state["step"]))
        return [list(entry) for entry in zip(*columns, strict=True)]

    def _options(self, values: Values, part: Part) -> dict[str, Any]:
        beta1, beta2 = values["betas"]
        graft_beta2 = values["graft_beta2"]
        if graft_beta2 is None:
            graft_beta2 = beta2 if beta2 < 1.0 else 0.999
        return chosen(
            ShampooOptions,
            values,
            beta1=beta1,
            beta2=beta2,
            graft_beta2=graft_beta2,
            root=_root_of(values),
        )

    def _side_figures(
        self, name: str, state: Values, block: int, values: Values
    ) -> tuple[float | None, float | None]:
        factor, root = state[name][str(block)], state[f"{name}_root"][str(block)]
        if not factor.numel():
            return None, None
        step = state["step"] if len(state[name]) == 1 else state["step"][block]
        ridged = _ridged(factor, step, values)
        residual = _diagnostics.root_residual(root, _root_of(values), ridged)
        return _diagnostics.condition(ridged), residual

    def _check_ready(self) -> None:
        for name, failures, limit in self._failing:
            if int(failures.max()) > limit:
                raise RuntimeError(
                    f"{int(failures.max())} inverse roots of {name} in a row have failed, more "
                    f"than max_root_failures={limit}: its factors are not finite or far from "
                    "semidefinite; a larger relative_ridge or smaller steps help"
                )
        self._failing.clear()

    def _staggered(self, values: Values) -> bool:
        return bool(values["stagger"])

    def _call(self, part: Part, grads: list[Tensor], lr: Tensor, values: Values) -> None:
        failures, counts = part.lists[-2], part.lists[-1]
        self._learn_failures(failures)
        # Before the first applied step the roots are the identity.
        refresh = self._due(
            part,
            values,
            stagger=self._staggered(values),
            at_first=True,
            again=map(self._has_failed, failures),
        )
        watched = [
            (i, failures[i].clone(), counts[i].clone())
            for i, flag in enumerate(refresh)
            if flag and failures[i].numel()
        ]
        part.options["refresh"] = refresh
        super()._call(part, grads, lr, values)
        if watched:
            self._judge(part, watched, values)

    def _learn_failures(self, failures: Sequence[Tensor]) -> None:
        """Which of the last roots failed, where a device knows and the host does not yet."""
        unknown = [
            failed
            for failed in failures
            if failed.device.type != "cpu" and id(failed) not in self._known_failures
        ]
        if not unknown:
            return
        if _backend.is_capturing():
            raise RuntimeError(
                "a CUDA graph is being recorded, and it has to be read which inverse roots have "
                "failed: take a step outside of the graph before"
            )
        found = torch.stack([failed.any() for failed in unknown]).tolist()
        for failed, value in zip(unknown, found, strict=True):
            self._known_failures[id(failed)] = failed, bool(value)

    def _has_failed(self, failed: Tensor) -> bool:
        """Whether the last root of an entry failed, without waiting for a device at every step."""
        if failed.device.type == "cpu":
            return bool(failed.any())
        return self._known_failures[id(failed)][1]

    def _judge(
        self, part: Part, watched: Sequence[tuple[int, Tensor, Tensor]], values: Values
    ) -> None:
        """What became of the roots that were due, of which some numbers from before are kept.

        One wait for the device, however many there were.
        """
        found = []
        for entry, failed_before, count_before in watched:
            failed, count = part.lists[-2][entry], part.lists[-1][entry]
            new = (failed - failed_before).clamp(min=0).reshape(-1, 2).sum(0)
            # Failures in a row: a root that was taken ends the row.
            taken = (count > count_before).unsqueeze(-1) & (failed == failed_before)
            failed.masked_fill_(taken, 0)
            found.append(torch.cat([new, failed.max()[None], count.max().long()[None]]))
        for (entry, *_), (*sides, most, steps) in zip(
            watched, torch.stack(found).tolist(), strict=True
        ):
            failed, count = part.lists[-2][entry], part.lists[-1][entry]
            self._known_failures[id(failed)] = failed, most > 0
            if count.device.type != "cpu":
                self._counts.learn(count, steps)
            self._failed_roots += sum(sides)
            limit = values["max_root_failures"]
            if most > limit:
                self._failing.append((part.names[entry], failed, limit))
            if any(sides) and not self._warned_of_roots:
                self._warned_of_roots = True
                self._warn_of_roots(part, entry, sides, values)

    def _warn_of_roots(self, part: Part, entry: int, sides: Sequence[int], values: Values) -> None:
        factors, roots = part.lists[2:4], part.lists[4:6]
        count = part.lists[-1][entry]
        for where, failed, factor, root in zip(
            ("left", "right"), sides, factors, roots, strict=True
        ):
            if not failed:
                continue
            ridged = _ridged(factor[entry], count, values)
            residual = _diagnostics.root_residual(root[entry], _root_of(values), ridged)
            warnings.warn(
                f"the {where} inverse root of {part.names[entry]} failed at step "
                f"{int(count.max())}: what stood there stays, with a residual of {residual:.3g} "
                "(0 is exact), and it is tried again at the next step. Later failures are counted "
                "in `failed_roots`, without a warning",
                RuntimeWarning,
                stacklevel=11,
            )

    @property
    def failed_roots(self) -> int:
        """How many inverse roots have failed so far."""
        return self._failed_roots

    def __getstate__(self) -> dict[str, Any]:
        names = ("_failed_roots", "_warned_of_roots")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in names}}

    def _forget(self) -> None:
        super()._forget()
        self._failing = []
        self._known_failures = {}


def _ridged(factor: Tensor, step: Tensor, values: Values) -> Tensor:
    """A + delta I in float64, as the root of a factor is taken of it at a step."""
    factor = factor.double()
    beta2 = values["betas"][1]
    if values["debias"] and beta2 < 1.0 and not values["kl"]:
        weight = 1.0 - beta2 ** step.double().clamp(min=1.0)
        factor = factor / weight[..., None, None]
    row_sum = factor.abs().sum(-1).amax(-1)
    delta = (values["relative_ridge"] * row_sum).clamp(min=values["ridge"])
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    return factor + delta[..., None, None] * eye


def _root_of(values: Values) -> int:
    """p of the roots, from the exponent 1 / p."""
    exponent = values["exponent"]
    if exponent is None:
        return 2 if values["kl"] else 4
    root = round(1.0 / exponent)
    if abs(exponent * root - 1.0) > 1e-9:
        raise ValueError(f"exponent must be one of 1, 1/2, 1/3, ..., 1/8, not {exponent!r}")
    return root


def _blocks(m: int, n: int, values: Values) -> list[tuple[slice, slice]]:
    """Rows and columns of every block, row by row."""
    rows, cols = (_ranges(size, values["block_size"] or max(size, 1)) for size in (m, n))
    return [(r, c) for r in rows for c in cols]


def _ranges(size: int, block: int) -> list[slice]:
    return [slice(start, min(start + block, size)) for start in range(0, max(size, 1), block)]


def _size(part: slice) -> int:
    return int(part.stop - part.start)
