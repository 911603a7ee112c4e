"""The step in two phases: everything is checked, then everything is written."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _backend, _checks, _dispatch
from . import _adamw
from ._groups import Group, Values
from ._interrupts import uninterrupted
from ._parameters import check_grad
from ._planning import Planning
from ._schedule import due
from ._work import AdamwCall, Current, MatrixCall, Part, Share, Work

# Steps without a single gradient, from the first one on, that look like a mistake.
IDLE_STEPS = 3


class Stepping(Planning):
    """The step of an optimizer."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step. Everything is checked before anything is written.

        A step of an optimizer that has no state yet, at which lr is 0 in every group and all
        gradients are zeros, creates the state of those parameters and does nothing else: it is
        counted nowhere, and what follows is what would follow without it. By such a step
        torch.distributed.checkpoint has state made that it wants to save or to load into.

        A CUDA graph can record it where every group has capturable=True, as in torch.optim: the
        step counts of AdamW's tensors then are on the device, and an lr that is a tensor there can
        be changed between replays. Numbers are those of the recording: a float lr, weight_decay,
        betas. Roots and bases are refreshed by the host's schedule, so no step with a refresh can
        be recorded, and a replay has none: take every precondition_frequency-th step outside.

        Args:
            closure: evaluates the model anew, with gradients enabled, and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            TypeError, ValueError: a gradient or hyper-parameter that cannot work, naming it.
            RuntimeError: a backend that was asked for cannot run, or a graph is being recorded that
                could not repeat the step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._step()
        return loss

    @torch._disable_dynamo
    @uninterrupted
    def _step(self) -> None:
        if _backend.is_capturing():
            self._check_capture()
            self._recorded = True
        if self._spread is not None:
            calls = None
            matrix, adamw = self._spread.step()
        else:
            work = self._work()
            only_makes_state = self._only_makes_state(work)
            if self._watch is not None and not only_makes_state:
                self._watch.begin()
            calls = self._calls(work)
            if only_makes_state:
                return
            matrix, adamw = map(bool, calls)
            if self._idle is not None:
                self._count_idle(matrix or adamw)
        if not matrix:
            self._warn(adamw)
        if calls is not None:
            self._run_all(*calls)
        self._warn_of_skip()

    def _work(self) -> list[Work]:
        """What a step is made of, checked."""
        self._check_ready()
        work = [
            (index, group, self._current(index, group), self._gather(index, group))
            for index, group in enumerate(self.param_groups)
        ]
        for index, group, _, shares in work:
            if group["nonfinite"] == "raise":
                for share in shares:
                    self._raise_nonfinite(index, share)
        return work

    def _calls(self, work: Sequence[Work]) -> tuple[list[MatrixCall], list[AdamwCall]]:
        """The calls of both algorithms, planned."""
        matrix_calls: list[MatrixCall] = []
        adamw_calls: list[AdamwCall] = []
        for index, group, current, (matrix, adamw) in work:
            matrix_calls += self._matrix_calls(index, group, current, matrix)
            if adamw.params:
                assert current.adamw is not None
                plan = self._adamw_plan(index, adamw, current.adamw)
                adamw_calls += [(part, adamw.grads, current.adamw, group) for part in plan.adamw]
        return matrix_calls, adamw_calls

    def _matrix_calls(
        self, index: int, group: Group, current: Current, share: Share, batch: int = 0
    ) -> list[MatrixCall]:
        """The calls for a share of a group's matrices; each batch of a step has its own plans."""
        if not share.params:
            return []
        assert current.matrix is not None
        lr = _checks.learning_rate(group["lr"])
        plan = self._plan(index, group, share, current.matrix, batch)
        return [(part, share.grads, current.matrix, lr) for part in plan.parts]

    def _run_all(
        self, matrix_calls: Sequence[MatrixCall], adamw_calls: Sequence[AdamwCall]
    ) -> None:
        for matrix_call in matrix_calls:
            self._run(*matrix_call)
        for part, grads, values, how in adamw_calls:
            _adamw.run(part, grads, values, self._counter(part.device), how)

    def _check_capture(self) -> None:
        """Raises RuntimeError where a graph of this step would not repeat it."""
        where = "a CUDA graph is being recorded, and "
        if self._spread is not None:
            raise RuntimeError(f"{where}ranks tell one another of errors in every step")
        if self._watch is not None and self._watch.due:
            raise RuntimeError(f"{where}this step is one that diagnostics measure")
        for index, group in enumerate(self.param_groups):
            if not any(param.grad is not None for param in group["params"]):
                continue
            name = f"param_groups[{index}]"
            if not group["capturable"]:
                raise RuntimeError(f"{where}{name} has capturable=False")
            if group["nonfinite"] == "raise":
                raise RuntimeError(f"{where}{name} has nonfinite='raise', which reads gradients")
            for key in ("lr", "adamw_lr"):
                lr = group.get(key)
                if isinstance(lr, Tensor) and lr.device.type == "cpu":
                    raise RuntimeError(
                        f"{where}{key} of {name} is a tensor on the CPU, whose later values no "
                        "replay would see: it has to be on the device, or a number"
                    )
            for position, param in enumerate(group["params"]):
                if param.grad is None:
                    continue
                if not self.state[param] or param.device not in self._skipped:
                    raise RuntimeError(
                        f"{where}{self._name(index, position)} has no state yet, which every "
                        "replay would set to zero: call init_state(), or take a step before"
                    )

    def _gather(self, index: int, group: Group) -> tuple[Share, Share]:
        """What has a gradient, checked: matrices, and AdamW's."""
        matrix, adamw = Share(), Share()
        routes = self._routes_of(index, group)
        for position, (key, is_matrix) in enumerate(zip(group["params"], routes, strict=True)):
            if key.grad is None:
                continue
            param, grad = key, key.grad
            if self._spread is not None:
                param, grad = self._spread.pieces(key)
            if not (
                type(grad) is Tensor
                and grad.dtype is param.dtype
                and grad.layout is torch.strided
                and grad.shape == param.shape
                and not grad.is_meta
            ):
                check_grad(self._name(index, position), param, grad)
                if not is_matrix:
                    grad = grad.to(param.dtype)
            (matrix if is_matrix else adamw).add(param, grad, position, key)
        return matrix, adamw

    def _raise_nonfinite(self, index: int, share: Share) -> None:
        """nonfinite="raise" for every group, before the first one is written."""
        for position, grad in zip(share.positions, share.grads, strict=True):
            if not _adamw.all_finite(grad):
                raise ValueError(f"{self._name(index, position)} has a non-finite gradient")

    def _run(self, part: Part, grads: list[Tensor], values: Values, lr: Tensor) -> None:
        """The step of one part."""
        if part.made_from is not values:
            part.options, part.made_from = self._options(values, part), values
        for param, form, staged in part.staged:
            staged.copy_(form.matrices(param))
        cut: list[Tensor] = []
        for place, source in part.sources:
            grad = grads[place] if source is None else source.matrices(grads[place])
            cut += self._cut(grad, values)
        self._call(part, cut, lr, values)
        for param, form, staged in part.staged:
            form.write(param, staged)

    def _due(
        self,
        part: Part,
        values: Values,
        *,
        stagger: bool,
        at_first: bool = False,
        again: Iterable[bool] | None = None,
    ) -> list[int]:
        """For every entry of a part whether roots or bases are taken anew."""
        capturing = _backend.is_capturing()
        if self._recorded and not capturing:
            self._counts.forget(part.lists[-1])
        flags = due(
            part.lists[-1],
            part.offsets,
            values["precondition_frequency"],
            self._counts,
            stagger=stagger,
            at_first=at_first,
            again=again,
        )
        if capturing and any(flags):
            raise RuntimeError(
                f"a CUDA graph is being recorded, and {part.names[flags.index(1)]} is due for new "
                "roots or bases, which only some steps take: record a step without, and take those "
                "with outside of the graph"
            )
        return flags

    def _call(self, part: Part, grads: list[Tensor], lr: Tensor, values: Values) -> None:
        """One call of the list operator."""
        params = part.lists[0]
        if self._watch is not None and self._watch.due:
            self._watch.rehearse(self._operator, part.lists, part.names, grads, part.options)
        _dispatch.run_step(
            self._operator,
            None,
            params,
            grads,
            *part.lists[1:],
            self._counter(params[0].device),
            lr,
            **part.options,
        )

    # Steps that do nothing, or less than somebody expects.

    def _only_makes_state(self, work: Sequence[Work]) -> bool:
        """Whether a step is one that `step` says creates state only."""
        if any(self.state.values()) or not self._stands_still():
            return False
        grads = [grad for *_, shares in work for share in shares for grad in share.grads]
        return bool(grads) and not any(bool(grad.any()) for grad in grads)

    def _stands_still(self) -> bool:
        """Whether lr is 0 in every group."""
        return not any(float(group["lr"]) for group in self.param_groups)

    def _warn(self, stepping: bool) -> None:
        if stepping and not self._warned:
            self._warned = True
            warnings.warn(
                f"{type(self).__name__} has no matrix to update: all parameters with a gradient go "
                "to AdamW (were they flattened by a wrapper?)",
                stacklevel=7,
            )

    def _count_idle(self, stepping: bool) -> None:
        """Warns once where no parameter has had a gradient in any of the first steps."""
        if stepping:
            self._idle = None
            return
        self._check_whole()
        assert self._idle is not None
        self._idle += 1
        if self._idle != IDLE_STEPS:
            return
        wanting = [
            self._name(index, position)
            for index, group in enumerate(self.param_groups)
            for position, param in enumerate(group["params"])
            if param.requires_grad
        ]
        if wanting:
            warnings.warn(
                f"nothing has moved in the first {IDLE_STEPS} steps of this "
                f"{type(self).__name__}: none of its {len(wanting)} parameters that require grad "
                f"({wanting[0]} is the first) has had a gradient. Was the model sharded "
                "(fully_shard), moved, or loaded with assign=True after the optimizer was made? It "
                "has other parameters since then: make the optimizer afterwards",
                stacklevel=7,
            )

    def _warn_of_skip(self) -> None:
        """Says once that something was skipped, where the counter can be read without waiting."""
        if self._warned_of_skip:
            return
        counter = self._skipped.get(torch.device("cpu"))
        if counter is not None and int(counter):
            self._warned_of_skip = True
            warnings.warn(
                f"{type(self).__name__} skipped {int(counter)} of its tensors for a non-finite or "
                "overflowing gradient; `skipped` counts further ones",
                stacklevel=7,
            )
