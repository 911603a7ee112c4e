"""Which backend runs an operator, and why.

A backend is asked for by the `backend` argument, by `with use_backend(...)`, or by the environment
variable SPECTRAL_KERNELS_BACKEND, in this order; it then runs or raises. Otherwise the first of the
device's candidates that can run is taken. The choice depends on the operator, the device, dtype and
shape of its tensors and its options, never on global state such as
`torch.get_float32_matmul_precision`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import _cuda, _extension, _native, reference
from ._backend import check_device, check_distinct, check_writable, raise_if_nonfinite
from ._operators import TABLE

__all__ = ["Explanation", "call_counts", "explain", "run", "use_backend"]

BACKENDS = ("cuda", "triton", "cpu", "reference")
_ENVIRONMENT = "SPECTRAL_KERNELS_BACKEND"

# First choice first.
_CANDIDATES = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}

OPERATORS = tuple(TABLE)

# Methods of inverse_root that exist for comparison only.
_REFERENCE_METHODS = ("newton", "newton_db")


class _Asked(threading.local):
    stack: list[str]

    def __init__(self) -> None:
        self.stack = []


_asked = _Asked()
_python_counts: dict[str, int] = {}
_counts_lock = threading.Lock()


@dataclass(frozen=True)
class Explanation:
    """What would run, and why nothing else.

    Attributes:
        op: the operator.
        backend: the backend that would run it, or None if the one that was asked for cannot.
        asked_by: "argument", "use_backend", "environment" or "automatic".
        rejected: backend -> reason, for every backend that cannot run it.
    """

    op: str
    backend: str | None
    asked_by: str
    rejected: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.backend or 'cannot run'} ({self.asked_by})"]
        lines += [f"  not {backend}: {reason}" for backend, reason in self.rejected.items()]
        return "\n".join(lines)


def _check_backend(name: str, source: str) -> str:
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"{source} must be one of auto, {', '.join(BACKENDS)}, not {name!r}")
    return name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs everything inside on one backend, in this thread.

    Args:
        name: "cpu", "cuda", "triton", "reference", or "auto" for the automatic choice.

    Raises:
        ValueError: an unknown name. A call inside raises RuntimeError if the backend cannot run it.
    """
    _asked.stack.append(_check_backend(name, "backend"))
    try:
        yield
    finally:
        _asked.stack.pop()


def _asked_for(backend: str | None) -> tuple[str, str]:
    if backend is not None:
        return _check_backend(backend, "backend"), "argument"
    if _asked.stack:
        return _asked.stack[-1], "use_backend"
    name = os.environ.get(_ENVIRONMENT, "")
    if name:
        return _check_backend(name, _ENVIRONMENT), "environment"
    return "auto", "automatic"


def unavailable(backend: str) -> str | None:
    """Why a backend cannot run anything here, or None."""
    if backend == "cpu" and _extension.MODULE is None:
        return _extension.REASON
    if backend == "cuda":
        return _cuda.unavailable()
    if backend == "triton":
        if not _has_triton():
            return "Triton is not installed"
        if not (torch.cuda.is_available() or _interpreting()):
            return "there is no card, and TRITON_INTERPRET is not 1"
    return None


def _asked_once(function: Callable[[], bool]) -> Callable[[], bool]:
    """torch.compiler.assume_constant_result, which would import torch._dynamo."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_asked_once
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@_asked_once
def _are_registered() -> bool:
    """Whether Triton's operators are; they become so here, since hardly anybody needs it."""
    importlib.import_module(f"{__package__}._triton_library")
    return _extension.MODULE is not None


def _interpreting() -> bool:
    """Whether Triton runs kernels on CPU tensors, which it decides when it is imported."""
    return os.environ.get("TRITON_INTERPRET", "") == "1"


def _triton_kernels() -> ModuleType:
    return importlib.import_module(f"{__package__}.triton_kernels")


def _triton_rejection(tensors: Sequence[Tensor], options: Mapping[str, Any]) -> str | None:
    interpreting = _interpreting()
    for tensor in tensors:
        if tensor.ndim < 2:
            continue  # a counter or a learning rate
        if not interpreting and tensor.device.type != "cuda":
            return f"a tensor is on {tensor.device}"
        if tensor.dtype == torch.float64:
            return "its kernels compute in float32 at most, and a tensor is float64"
    if options.get("compute_dtype") == torch.float64:
        return "its kernels compute in float32 at most, not in float64"
    return None


def _rejection(
    backend: str, op: str, tensors: Sequence[Tensor], options: Mapping[str, Any]
) -> str | None:
    reason = unavailable(backend)
    if reason is not None:
        return reason
    if backend == "triton":
        return _triton_rejection(tensors, options)
    if backend in ("cpu", "cuda"):
        for tensor in tensors:
            if tensor.device.type != backend:
                return f"a tensor is on {tensor.device}"
    if backend == "cuda":
        return _cuda.rejection(op, tensors, options)
    method = options.get("method")
    if backend == "cpu" and op == "inverse_root" and method in _REFERENCE_METHODS:
        return f"method {method!r} exists for comparison, on 'reference' only"
    return None


def _choose(
    op: str, tensors: Sequence[Tensor], backend: str | None, options: Mapping[str, Any]
) -> tuple[str | None, str, dict[str, str]]:
    """The fields of an Explanation after the first, without the cost of one at every call."""
    asked, asked_by = _asked_for(backend)
    device = tensors[0].device.type if tensors else "cpu"
    if device != "cpu":  # hundreds of parameters have a handful of shapes
        kinds = {(tensor.device, tensor.dtype, tensor.shape): tensor for tensor in tensors}
        tensors = list(kinds.values())
    candidates = _CANDIDATES.get(device, ("reference",)) if asked == "auto" else (asked,)
    rejected: dict[str, str] = {}
    second: str | None = None
    for name in candidates:
        reason = _rejection(name, op, tensors, options)
        if reason is None and asked == "auto" and name == "cuda":
            reason = _cuda.elsewhere(op, tensors)
            second = None if reason is None else name
        if reason is None and not (second and name == "reference"):
            return name, asked_by, rejected
        if reason is not None:
            rejected[name] = reason
    if second:
        rejected.pop(second)
    return second, asked_by, rejected


def explain(op: str, *tensors: Tensor, backend: str | None = None, **options: Any) -> Explanation:
    """Which backend would run `op` on these tensors, and why not the others.

    Args:
        op: the name of an operator, such as "newton_schulz" or "muon_step_".
        tensors: its tensors (only device, dtype and shape matter). Of a list step that is one
            parameter: every entry of a list has the backend that it would have by itself.
        backend: as for the operator itself.
        options: options of the operator that decide, such as method="newton" of inverse_root.

    Raises:
        ValueError: an unknown operator or backend.
    """
    if op not in OPERATORS:
        raise ValueError(f"unknown operator {op!r}: expected one of {', '.join(OPERATORS)}")
    chosen, asked_by, rejected = _choose(op, tensors, backend, options)
    for name in BACKENDS:
        reason = _rejection(name, op, tensors, options)
        if reason is not None:
            rejected[name] = reason
    return Explanation(op, chosen, asked_by, rejected)


def run(op: str, tensors: Sequence[Tensor], backend: str | None, *args: Any, **options: Any) -> Any:
    """Runs `op` on the chosen backend.

    `tensors` are those that decide; `args` and `options` are the operator's own.

    Raises:
        RuntimeError: the backend that was asked for cannot run it.
    """
    chosen, _, rejected = _choose(op, tensors, backend, {**options, **_of_lists(op, args)})
    if chosen is None:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in rejected.items())
        raise RuntimeError(f"backend cannot run {op}: {reasons}")
    function: Callable[..., Any]
    if chosen in ("cpu", "cuda"):
        function = _native.operator(op)
    elif chosen == "triton" and torch.compiler.is_compiling() and _are_registered():
        function = _native.operator(op, "spectral_kernels_triton")
    else:
        function = function_of(chosen, op)
    result = function(*args, **options)
    if chosen == "cpu" and not torch.compiler.is_compiling():
        _extension.warn_of_faults()
    return result


def run_step(op: str, backend: str | None, *args: Any, **options: Any) -> None:
    """Runs a list step, every entry on the backend that it would have by itself.

    So an entry's bits do not depend on its neighbours. `args` are the operator's own: lists with
    one tensor an entry, parameters first and gradients second, then `skipped` and `lr`.

    Raises:
        RuntimeError: the backend that was asked for cannot run an entry.
        TypeError, ValueError: as the operator. Nothing is written then.
    """
    params = args[0]
    groups = _entries_by_backend(op, args, backend, options)
    if len(groups) < 2:
        run(op, params, backend, *args, **options)
        return
    if None in groups:
        run(op, [params[i] for i in groups[None]], backend, *args, **options)
    lists, rest = args[:-2], args[-2:]
    _check_together(op, lists, rest, options)
    for name, entries in groups.items():
        chosen = [[tensors[i] for i in entries] for tensors in lists]
        own = {
            key: [value[i] for i in entries] if key in _PER_ENTRY and len(value) else value
            for key, value in options.items()
        }
        run(op, chosen[0], name, *chosen, *rest, **own)


# Options of list steps with one value an entry.
_PER_ENTRY = ("refresh", "restarts", "scales")


def _of_lists(op: str, lists: Sequence[Any]) -> dict[str, Any]:
    """What decides beside parameters and options: on cards moments in bfloat16, in any entry."""
    if not TABLE[op].moments or not len(lists[0]) or lists[0][0].device.type == "cpu":
        return {}
    if torch.bfloat16 in {x.dtype for i in TABLE[op].moments for x in lists[i]}:
        return {"momentum_dtype": torch.bfloat16}
    return {}


def _entries_by_backend(
    op: str, args: Sequence[Any], backend: str | None, options: Mapping[str, Any]
) -> dict[str | None, list[int]]:
    """The numbers of a list's entries, by the backend that each would have alone."""
    params = args[0]
    kinds = {(x.device, x.dtype, x.shape) for x in params}
    devices = {device for device, *_ in kinds}
    # On a CPU no choice depends on the shape; several devices are for the operator to refuse.
    if len(kinds) < 2 or len(devices) > 1 or devices == {torch.device("cpu")}:
        return {}
    groups: dict[str | None, list[int]] = {}
    known: dict[object, str | None] = {}
    lists = args[:-2]
    alike = not _of_lists(op, lists)
    for i, x in enumerate(params):
        own = {} if alike else _of_lists(op, [tensors[i : i + 1] for tensors in lists])
        kind = x.dtype, x.shape, *own
        if kind not in known:
            known[kind] = _choose(op, (x,), backend, {**options, **own})[0]
        groups.setdefault(known[kind], []).append(i)
    return groups


def _check_together(
    op: str, lists: Sequence[Any], rest: Sequence[Tensor], options: Mapping[str, Any]
) -> None:
    """What the specification asks of a whole list, before the first of several calls writes."""
    specification = getattr(reference, op)
    skipped, lr = rest
    # No matrix is left in these, and none is on a device, which is not waited for.
    empty = [[_without_matrices(x) for x in tensors] for tensors in lists]
    rate = lr if lr.device.type == "cpu" else torch.zeros((), dtype=lr.dtype, device="cpu")
    count = torch.zeros(skipped.shape, dtype=skipped.dtype, device="cpu")
    try:
        specification(*empty, count, rate, **options)
    except (TypeError, ValueError):
        # The same once more, on copies of what was given: its message names shapes and values.
        copies = [[x.clone() for x in tensors] for tensors in lists]
        specification(*copies, *(x.clone() for x in rest), **options)
        raise
    kind = TABLE[op].lists
    assert kind is not None
    named = dict(zip(kind._fields, lists, strict=False))
    like = lists[0][0]
    for name, tensors in [*named.items(), ("skipped", [skipped])]:
        for i, x in enumerate(tensors):
            if x.numel():
                check_device(f"{name}[{i}]", x, like)
            if name != "grads":
                check_writable(f"{name}[{i}]", x)
    if lr.device.type != "cpu":
        check_device("lr", lr, like)
    check_distinct([lists[0], *lists[2:]], lists[1])
    if options["nonfinite"] == "raise":
        raise_if_nonfinite(**named)


def _without_matrices(x: Tensor) -> Tensor:
    """No matrix of x's shape, on the CPU; a single number is one."""
    shape = (0, *x.shape) if x.ndim else ()
    return torch.zeros(shape, dtype=x.dtype, device="cpu")


def function_of(backend: str, op: str) -> Callable[..., Any]:
    """The function of a backend in Python, about to be called: the call is counted."""
    with _counts_lock:
        key = f"{op}/{backend}"
        _python_counts[key] = _python_counts.get(key, 0) + 1
    if backend == "reference":
        return getattr(reference, op)
    return _triton_kernels().operator(op)


def call_counts(*, reset: bool = False) -> dict[str, int]:
    """Calls of every operator since the last reset, as "operator/backend": the proof of what ran.

    Args:
        reset: start again from zero after reading.
    """
    counts: dict[str, int] = {}
    if _extension.MODULE is not None:
        counts.update(_extension.MODULE.call_counts())
    with _counts_lock:
        counts.update(_python_counts)
        if reset:
            _python_counts.clear()
    if reset and _extension.MODULE is not None:
        _extension.MODULE.reset_call_counts()
    return dict(sorted(counts.items()))
