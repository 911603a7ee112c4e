"""What an optimizer can say about its last step, measured only where somebody asked for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import _checks, _dispatch


@dataclass(frozen=True)
class ParameterDiagnostics:
    """Figures of one parameter; the worst one where it is a batch of matrices or cut in blocks.

    Attributes:
        algorithm: "matrix" or "adamw"; of the latter only steps and backend are measured.
        backend: what ran the step.
        shape: the parameter's.
        steps: applied steps so far; the fewest of a batch.
        update_rms: sqrt(mean(U^2)), U the update for a learning rate of 1, without weight decay.
        orthogonality_error: ||U U^T s / ||U||_F^2 - I||_F / sqrt(s) over the shorter side s: 0 for
            a multiple of an orthogonal matrix, at most sqrt(s - 1); None where U is 0.
        left_condition, right_condition: eigenvalue ratios of the factors (float64), of A + delta I
            where roots are taken; inf where the smallest eigenvalue is not positive. None without a
            factor.
        left_residual, right_residual: how far root or basis are from the factor as it is now, age
            included: ||X^p (A + delta I) - I||_F / sqrt(n) of a root, the share of ||Q^T A Q||_F
            off the diagonal of a basis.
        root_failures: inverse roots that failed in a row, the most of any block.
    """

    algorithm: str
    backend: str
    shape: tuple[int, ...]
    steps: int
    update_rms: float | None = None
    orthogonality_error: float | None = None
    left_condition: float | None = None
    right_condition: float | None = None
    left_residual: float | None = None
    right_residual: float | None = None
    root_failures: int = 0


@dataclass(frozen=True)
class Diagnostics:
    """Figures of the last watched step.

    Attributes:
        step: its number, counted from the call of `watch`.
        skipped: matrices and AdamW's tensors that were skipped so far, for a non-finite gradient,
            say.
        parameters: by name, or by place where parameters have none.
        failed_roots: inverse roots that have failed so far.
    """

    step: int
    skipped: int
    parameters: Mapping[str, ParameterDiagnostics]
    failed_roots: int = 0

    def rows(self) -> Iterator[dict[str, Any]]:
        """One flat dict a parameter, for csv.DictWriter or pandas."""
        for name, parameter in self.parameters.items():
            row = {"step": self.step, "name": name, **asdict(parameter)}
            yield {**row, "shape": "x".join(map(str, parameter.shape))}

    def scalars(self) -> Iterator[tuple[str, float]]:
        """(tag, value) of every measured number, for a TensorBoard writer."""
        yield "skipped", float(self.skipped)
        yield "failed_roots", float(self.failed_roots)
        for name, parameter in self.parameters.items():
            for key, value in asdict(parameter).items():
                if isinstance(value, (int, float)):
                    yield f"{key}/{name}", float(value)


@dataclass
class Watch:
    """Steps to measure, and what the last of them was.

    Attributes:
        every: measure every so many steps.
        step: calls so far.
        measured: the number of the last measured step, 0 before the first.
        updates: parameter -> the updates of its blocks.
        backends: parameter -> what ran it.
    """

    every: int
    step: int = 0
    measured: int = 0
    updates: dict[str, list[Tensor]] = field(default_factory=dict)
    backends: dict[str, str] = field(default_factory=dict)

    def begin(self) -> None:
        """Counts a step."""
        self.step += 1
        if self.due:
            self.measured = self.step
            self.updates, self.backends = {}, {}

    @property
    def due(self) -> bool:
        """Whether the step that runs is measured."""
        return self.step % self.every == 0

    def rehearse(
        self,
        operator: str,
        lists: Sequence[Sequence[Tensor]],
        names: Sequence[str],
        grads: Sequence[Tensor],
        options: Mapping[str, Any],
    ) -> None:
        """Runs the step on matrices of zero and a copy of the state, and keeps what it leaves.

        The update is read off exactly that way, whatever the parameter's size and dtype.
        """
        zeros = [torch.zeros_like(param) for param in lists[0]]
        device = zeros[0].device
        # Zeros lie on no sphere: what is measured is what a parameter moves by before it is
        # brought back to its own.
        without = {"hyperball": False} if options.get("hyperball") else {}
        _dispatch.run_step(
            operator,
            None,
            zeros,
            grads,
            *[[tensor.clone() for tensor in column] for column in lists[1:]],
            torch.zeros((), dtype=torch.int64, device=device),
            torch.ones((), dtype=torch.float64, device="cpu"),
            **{**options, "weight_decay": 0.0, **without},
        )
        for name, moved, param in zip(names, zeros, lists[0], strict=True):
            if options.get("hyperball"):
                moved.mul_(_length(param) / _length(moved).clamp(min=1e-30))
            self.updates.setdefault(name, []).append(moved.neg_())
            self.backends[name] = _dispatch.explain(operator, moved, **options).backend or "none"


def _length(x: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(x.float() if x.dtype.itemsize < 4 else x, keepdim=True)


class Watched:
    """The part of an optimizer that measures its steps; a subclass is a torch optimizer too."""

    param_groups: list[dict[str, Any]]
    state: Any
    _watch: Watch | None = None

    @property
    def skipped(self) -> int:
        """How many matrices and AdamW's tensors have been skipped so far."""
        raise NotImplementedError

    @property
    def failed_roots(self) -> int:
        """How many inverse roots have failed so far; 0 in an optimizer that takes none."""
        return 0

    def _name(self, index: int, position: int) -> str:
        raise NotImplementedError

    def _routes_of(self, index: int, group: dict[str, Any]) -> list[bool]:
        raise NotImplementedError

    def _side_figures(
        self, name: str, state: Mapping[str, Any], block: int, values: Mapping[str, Any]
    ) -> tuple[float | None, float | None]:
        """Condition of a block's factor, "left" or "right", and residual of its root or basis."""
        return None, None

    def watch(self, every: int = 1) -> None:
        """Measures every so-and-so-many-th step from now on, for `diagnostics`.

        A measured step runs twice, first on matrices of zero and a copy of the state; its own
        result keeps its bits. Other steps cost nothing, and neither does an optimizer that is not
        watched. State dicts, copies and pickles are not watched.

        Args:
            every: how often; 0 stops.

        Raises:
            TypeError, ValueError: not an int of at least 0.
        """
        every = _checks.integer("every", every, 0, None)
        self._watch = Watch(every) if every else None

    def diagnostics(self) -> Diagnostics:
        """What the last measured step did, and the condition of the state as it is now.

        Eigenvalues are taken in float64 here, not in the step; this waits for the device.

        Raises:
            RuntimeError: no step has been measured, see `watch`.
        """
        watch = self._measured()
        parameters = {}
        for index, group in enumerate(self.param_groups):
            routes = self._routes_of(index, group)
            for position, (param, is_matrix) in enumerate(
                zip(group["params"], routes, strict=True)
            ):
                name = self._name(index, position)
                if is_matrix and name in watch.updates:
                    parameters[name] = self._figures(watch, name, param, group)
                elif not is_matrix and self.state[param]:
                    steps = int(self.state[param]["step"])
                    parameters[name] = ParameterDiagnostics(
                        "adamw", "torch", tuple(param.shape), steps
                    )
        return Diagnostics(watch.measured, self.skipped, parameters, self.failed_roots)

    def updates(self) -> dict[str, list[Tensor]]:
        """The updates of the last measured step, for a learning rate of 1 and without weight decay.

        Returns:
            parameter -> one tensor (..., m, n) for every block, in row-major order; what the step
            subtracted, in the parameter's dtype.

        Raises:
            RuntimeError: no step has been measured, see `watch`.
        """
        return {name: list(blocks) for name, blocks in self._measured().updates.items()}

    def _measured(self) -> Watch:
        if self._watch is None or not self._watch.measured:
            raise RuntimeError("no step has been measured: call watch() before step()")
        return self._watch

    def _figures(
        self, watch: Watch, name: str, param: Tensor, group: Mapping[str, Any]
    ) -> ParameterDiagnostics:
        state, updates = self.state[param], watch.updates[name]
        rms, error = update_figures(updates)
        sides: dict[str, float | None] = {}
        for side in ("left", "right"):
            figures = [
                self._side_figures(side, state, block, group) for block in range(len(updates))
            ]
            for key, values in zip(
                ("condition", "residual"), zip(*figures, strict=True), strict=True
            ):
                known = [value for value in values if value is not None]
                sides[f"{side}_{key}"] = max(known, default=None)
        failures = [
            int(block.max()) for block in state.get("root_failures", {}).values() if block.numel()
        ]
        return ParameterDiagnostics(
            algorithm="matrix",
            backend=watch.backends[name],
            shape=tuple(param.shape),
            steps=int(state["step"].min()) if state["step"].numel() else 0,
            update_rms=rms,
            orthogonality_error=error,
            root_failures=max(failures, default=0),
            **sides,
        )


def update_figures(updates: Sequence[Tensor]) -> tuple[float | None, float | None]:
    """Root mean square and orthogonality error of a parameter's updates."""
    squares = sum(float(update.double().square().sum()) for update in updates)
    count = sum(update.numel() for update in updates)
    errors = [error for update in updates for error in _orthogonality_errors(update)]
    return (squares / count) ** 0.5 if count else None, max(errors, default=None)


def _orthogonality_errors(update: Tensor) -> list[float]:
    x = update.double()
    if x.shape[-2] > x.shape[-1]:
        x = x.mT
    product = (x @ x.mT).reshape(-1, x.shape[-2], x.shape[-2])
    size = product.shape[-1]
    trace = product.diagonal(dim1=-2, dim2=-1).sum(-1)
    scaled = product[trace > 0] * (size / trace[trace > 0])[:, None, None]
    off = scaled - torch.eye(size, dtype=x.dtype, device=x.device)
    return [float(norm) / size**0.5 for norm in torch.linalg.matrix_norm(off)]


def condition(factor: Tensor) -> float:
    """The largest ratio of eigenvalues in a batch of symmetric matrices."""
    values = torch.linalg.eigvalsh(factor.double())
    low, high = values[..., 0], values[..., -1]
    return float(torch.where(low > 0, high / low, torch.inf).max())


def root_residual(root: Tensor, p: int, ridged: Tensor) -> float:
    """||X^p (A + delta I) - I||_F / sqrt(n), the largest of a batch."""
    x = root.double()
    product = torch.linalg.matrix_power(x, p // 2) @ ridged.double()
    product = product @ torch.linalg.matrix_power(x, p - p // 2)
    size = x.shape[-1]
    off = product - torch.eye(size, dtype=x.dtype, device=x.device)
    return float((torch.linalg.matrix_norm(off) / size**0.5).max())


def basis_residual(basis: Tensor, factor: Tensor) -> float:
    """The share of ||Q^T A Q||_F that is off the diagonal, the largest of a batch."""
    q = basis.double()
    rotated = q.mT @ factor.double() @ q
    diagonal = torch.diag_embed(rotated.diagonal(dim1=-2, dim2=-1))
    whole = torch.linalg.matrix_norm(rotated)
    off = torch.linalg.matrix_norm(rotated - diagonal)
    return float(torch.where(whole > 0, off / whole, 0.0).max())
