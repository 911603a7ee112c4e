"""What the backends written in Python ask of the lists and options of a step, before any write."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._backend import (
    check_device,
    check_distinct,
    check_list,
    check_matrix,
    check_skipped,
    check_writable,
)
from ._options import (
    BasisLists,
    DevaOptions,
    MuonLists,
    MuonOptions,
    ShampooLists,
    ShampooOptions,
    SoapOptions,
)

_COUNTS = (torch.float32, torch.float64, torch.int64)


class Backend(NamedTuple):
    """What backends ask in different ways.

    Attributes:
        check_kind: whether a state may be of this kind: by name, its layout and dtype.
        check_side: a factor over rows (-2) or columns (-1) of a parameter, or an absent one.
        raise_nonfinite: for nonfinite="raise", of some lists by name.
        distinct: whether lists must not share memory.
    """

    check_kind: Callable[[str, Tensor], None]
    check_side: Callable[[str, Tensor, Tensor, int], None]
    raise_nonfinite: Callable[..., None]
    distinct: bool


def check_muon(lists: MuonLists, options: MuonOptions, backend: Backend) -> None:
    """Those of `muon_step_`."""
    _check_common(lists, options, "momentum_buffers", backend)
    present = options.beta2 is not None
    _check_rows("second_moments", lists.second_moments, lists.params, present=present)
    _check_contents(lists, options, backend, [*lists[2:4]])


def check_shampoo(lists: ShampooLists, options: ShampooOptions, backend: Backend) -> None:
    """Those of `shampoo_step_`."""
    params, squares = lists.params, lists.graft_squares
    _check_common(lists, options, "momentum_buffers", backend)
    _check_factors(lists, "roots", backend)
    if options.squares:
        # In a sum without decay errors of rounding would gather.
        narrow = options.graft != "adagrad"
        _check_state("graft_squares", squares, params, backend, narrow=narrow)
    else:
        check_list("graft_squares", squares, len(params))
    _check_failures(lists.root_failures, params)
    used = squares if options.squares else ()
    _check_contents(lists, options, backend, [*lists[2:8]], graft_squares=used)


def check_soap(lists: BasisLists, options: SoapOptions, backend: Backend) -> None:
    """Those of `soap_step_`."""
    _check_common(lists, options, "exp_avgs", backend)
    _check_state("exp_avg_sqs", lists.exp_avg_sqs, lists.params, backend, narrow=True)
    _check_factors(lists, "bases", backend)
    _check_contents(lists, options, backend, [*lists[2:8]])


def check_deva(lists: BasisLists, options: DevaOptions, backend: Backend) -> None:
    """Those of `deva_step_`."""
    params, squares = lists.params, lists.exp_avg_sqs
    _check_common(lists, options, "exp_avgs", backend)
    _check_factors(lists, "bases", backend)
    used: Sequence[Tensor] = ()
    if options.variance == "none":
        check_list("exp_avg_sqs", squares, len(params))
    elif options.variance == "low_memory":
        _check_lines("exp_avg_sqs", squares, params, backend)
        # A number a row and column is one row of a matrix.
        used = [v.unsqueeze(-2) for v in squares]
    else:
        _check_state("exp_avg_sqs", squares, params, backend, narrow=True)
        used = squares
    _check_contents(lists, options, backend, [lists.exp_avgs, used, *lists[4:8]], exp_avg_sqs=used)


Lists = MuonLists | ShampooLists | BasisLists
StepOptions = MuonOptions | ShampooOptions | SoapOptions | DevaOptions


def _check_contents(
    lists: Lists,
    options: StepOptions,
    backend: Backend,
    states: Sequence[Sequence[Tensor]],
    **instead: Sequence[Tensor],
) -> None:
    """Memory, and for nonfinite="raise" numbers: gradients first, then state, parameters last.

    `states` are the lists that are written beside the parameters; `instead` has what is looked at
    in the place of some lists.
    """
    if backend.distinct:
        check_distinct([lists.params, *states], lists.grads)
    counters = ("params", "grads", "root_failures", "step_counts", "skipped", "lr")
    names = [name for name in lists._fields if name not in counters]
    given = lists._asdict() | instead
    looked_at = {name: given[name] for name in ("grads", *names, "params")}
    backend.raise_nonfinite(options.nonfinite, **looked_at)


def _check_common(lists: Lists, options: StepOptions, momenta: str, backend: Backend) -> None:
    """Parameters, gradients, counters, the learning rate; first moments, of that name; options."""
    params = lists.params
    check_list("grads", lists.grads, len(params))
    check_list("step_counts", lists.step_counts, len(params))
    check_skipped(lists.skipped, params[0] if len(params) else None)
    check_rate(lists.lr, params)
    for i, (param, grad, count) in enumerate(
        zip(params, lists.grads, lists.step_counts, strict=True)
    ):
        check_matrix(f"params[{i}]", param)
        check_matrix(f"grads[{i}]", grad)
        check_writable(f"params[{i}]", param)
        for name, x in (("params", param), ("grads", grad), ("step_counts", count)):
            check_device(f"{name}[{i}]", x, params[0])
        _check_shape("grads", i, grad, param)
        if count.dtype not in _COUNTS:
            raise TypeError(
                f"step_counts[{i}] must be float32, float64 or int64, not {count.dtype}"
            )
        check_writable(f"step_counts[{i}]", count)
        if count.ndim and count.shape != param.shape[:-2]:
            raise ValueError(
                f"step_counts[{i}] must be 0-dim or have the batch's shape "
                f"{tuple(param.shape[:-2])}, not {tuple(count.shape)}"
            )
    _check_state(momenta, getattr(lists, momenta), params, backend, narrow=True)
    options.check(len(params))


def check_rate(lr: Tensor, params: Sequence[Tensor]) -> None:
    """A learning rate, whose value is looked at where it is at hand."""
    if lr.numel() != 1:
        raise ValueError(f"lr must be one number, not of shape {tuple(lr.shape)}")
    if lr.device.type == "cpu":
        if not 0.0 <= float(lr) < math.inf:
            raise ValueError(f"lr must be in [0, inf), not {float(lr)!r}")
    elif len(params):
        check_device("lr", lr, params[0])


def _check_shape(name: str, i: int, x: Tensor, param: Tensor) -> None:
    if x.shape != param.shape:
        raise ValueError(
            f"{name}[{i}] has shape {tuple(x.shape)}, params[{i}] {tuple(param.shape)}"
        )


def _check_state(
    name: str,
    state: Sequence[Tensor],
    params: Sequence[Tensor],
    backend: Backend,
    *,
    narrow: bool = False,
) -> None:
    """State of the parameters' shapes; `narrow`: bfloat16 too beside those that are not float64."""
    check_list(name, state, len(params))
    for i, (x, param) in enumerate(zip(state, params, strict=True)):
        place = f"{name}[{i}]"
        if narrow and x.dtype == torch.bfloat16:
            if param.dtype == torch.float64:
                raise TypeError(f"{place} is bfloat16 of a parameter that is float64")
            check_matrix(place, x)
        else:
            backend.check_kind(place, x)
        check_device(place, x, param)
        _check_shape(name, i, x, param)
        check_writable(place, x)


def _check_rows(
    name: str, state: Sequence[Tensor], params: Sequence[Tensor], *, present: bool
) -> None:
    """One number a row, (..., m, 1), of every parameter if `present`, else of none."""
    check_list(name, state, len(params))
    for i, (x, param) in enumerate(zip(state, params, strict=True)):
        if not param.numel():
            continue
        place = f"{name}[{i}]"
        check_device(place, x, param)
        if not present:
            if x.numel():
                raise ValueError(
                    f"{place} must have no element: there is no beta2, got {tuple(x.shape)}"
                )
            continue
        expected = (*param.shape[:-1], 1)
        if x.shape != expected:
            raise ValueError(f"{place} must have shape {expected}, got {tuple(x.shape)}")
        full = torch.float64 if param.dtype == torch.float64 else torch.float32
        if x.dtype != full:
            raise TypeError(f"{place} must be {full}, not {x.dtype}")
        check_writable(place, x)


def _check_lines(
    name: str, state: Sequence[Tensor], params: Sequence[Tensor], backend: Backend
) -> None:
    """One number a row and a column, (..., m + n), of every parameter."""
    check_list(name, state, len(params))
    for i, (x, param) in enumerate(zip(state, params, strict=True)):
        place = f"{name}[{i}]"
        expected = (*param.shape[:-2], param.shape[-2] + param.shape[-1])
        if x.shape != expected:
            raise ValueError(
                f"{place} must have shape {expected} for low_memory, not {tuple(x.shape)}"
            )
        backend.check_kind(place, x.unsqueeze(-2))
        check_writable(place, x)
        check_device(place, x, param)


def _check_failures(failures: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    """Counts of the left and right roots that failed."""
    check_list("root_failures", failures, len(params))
    for i, (counts, param) in enumerate(zip(failures, params, strict=True)):
        check_device(f"root_failures[{i}]", counts, param)
        expected = (*param.shape[:-2], 2)
        if counts.dtype != torch.int64 or counts.shape != expected:
            raise ValueError(
                f"root_failures[{i}] must be int64 of shape {expected}, not "
                f"{counts.dtype} of shape {tuple(counts.shape)}"
            )


def _check_factors(lists: ShampooLists | BasisLists, partner: str, backend: Backend) -> None:
    """Factors and, on the same sides, their partners: "roots" or "bases"; size 0 where absent."""
    params, given = lists.params, lists._asdict()
    for side, dim in (("left", -2), ("right", -1)):
        factors, partners = f"{side}s", f"{side}_{partner}"
        for name in (factors, partners):
            check_list(name, given[name], len(params))
            for i, (x, param) in enumerate(zip(given[name], params, strict=True)):
                backend.check_side(f"{name}[{i}]", x, param, dim)
                check_writable(f"{name}[{i}]", x)
        for i, (factor, other) in enumerate(zip(given[factors], given[partners], strict=True)):
            if bool(factor.numel()) != bool(other.numel()):
                raise ValueError(
                    f"{factors}[{i}] has shape {tuple(factor.shape)}, "
                    f"{partners}[{i}] {tuple(other.shape)}"
                )
