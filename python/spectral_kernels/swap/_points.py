"""Replaceable functions: compared before, put in place together, taken out again together."""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import _checks, _dispatch
from ._meter import Meter
from ._report import Tally

_MARK = "__spectral_kernels_replacement__"
# Backends that are worth replacing plain torch with, by kind of device.
_FAST = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}


class Refused(Exception):
    """Why something stays as it is, in one sentence."""


@dataclass(frozen=True)
class Options:
    """The options of `swap_in`.

    Attributes:
        backend: the `backend` argument of the library's functions; None chooses.
        allow_ridge: see `swap_in`.
        devices: kinds of device whose tensors are taken.
        measure: estimate the time saved.
    """

    backend: str | None
    allow_ridge: bool
    measure: bool = False
    devices: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        devices = {
            device
            for device, backends in _FAST.items()
            if self.backend is not None
            or any(_dispatch.unavailable(name) is None for name in backends)
        }
        object.__setattr__(self, "devices", frozenset(devices))


@dataclass(frozen=True)
class Point:
    """One function of somebody else's module or class, and what takes its place.

    Attributes:
        owner: the module or class that holds it.
        name: its name there.
        fast: the replacement; it takes the function itself and then the function's parameters.
        declines: with the function's own parameters; why this call is left to the function itself,
            or None.
        imported_by_name: also replace it in modules that from-imported it.
        repeatable: it changes no objects but the tensors among its arguments, so that it can be
            timed on copies of them.
    """

    owner: ModuleType | type
    name: str
    fast: Callable[..., Any]
    declines: Callable[..., str | None]
    imported_by_name: bool = False
    repeatable: bool = True

    def __str__(self) -> str:
        return f"{_name_of(self.owner)}.{self.name}"

    def raw(self) -> Any:
        """What the owner holds itself, a staticmethod object included."""
        try:
            return vars(self.owner)[self.name]
        except KeyError:
            raise Refused(f"{_name_of(self.owner)} has no {self.name} any more") from None

    def check(self) -> Callable[..., Any]:
        """The function, if it is free and has the parameters that `fast` was written for.

        Raises:
            Refused: it does not exist, has been replaced already, or its parameters changed.
        """
        raw = self.raw()
        own = raw.__func__ if isinstance(raw, staticmethod) else raw
        if not callable(own):
            raise Refused(f"{self} is no function any more but {own!r}")
        if hasattr(own, _MARK):
            raise Refused(f"{self} has been replaced by an earlier swap_in; undo that one first")
        expected = list(inspect.signature(self.fast).parameters.values())[1:]
        if isinstance(self.owner, type) and not isinstance(raw, staticmethod):
            expected[0] = expected[0].replace(name="self")
        require_parameters(str(self), own, [parameter.name for parameter in expected])
        found = inspect.signature(own).parameters
        for ours in expected:
            theirs = found[ours.name].default
            # None stands for a default of the package's own type, which `declines` looks at.
            if ours.default is not None and ours.default != theirs:
                raise Refused(
                    f"{self} has {ours.name}={theirs!r}, not {ours.default!r} as expected"
                )
        return own


def require_parameters(what: str, function: Callable[..., Any], expected: Sequence[str]) -> None:
    """Refuses a function whose parameters have other names or another order."""
    try:
        found = list(inspect.signature(function).parameters)
    except (TypeError, ValueError) as error:
        raise Refused(f"the parameters of {what} are unknown: {error}") from error
    if found != list(expected):
        raise Refused(
            f"{what}({', '.join(found)}) is not the version that this was written for, "
            f"{what.rpartition('.')[2]}({', '.join(expected)})"
        )


@dataclass
class Calls:
    """Calls of one replacement: how many ran on the kernels, how many were left, and why.

    Attributes:
        taken: calls that ran on the kernels.
        left: reason -> calls that were left to the original.
        meter: their times, where they are measured.
    """

    taken: int = 0
    left: Counter[str] = field(default_factory=Counter)
    meter: Meter | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def count(self, reason: str | None) -> None:
        """Counts one call."""
        with self._lock:
            if reason is None:
                self.taken += 1
            else:
                self.left[reason] += 1

    def tally(self) -> Tally:
        """The counts as they are now."""
        with self._lock:
            seconds = self.meter.seconds if self.meter is not None else None
            return Tally(self.taken, dict(self.left), seconds)

    def __str__(self) -> str:
        return str(self.tally())


class Replacement:
    """A point whose function has been replaced."""

    def __init__(self, point: Point, own: Callable[..., Any], *, measure: bool = False) -> None:
        self.point = point
        self.calls = Calls(meter=Meter(repeatable=point.repeatable) if measure else None)
        self._own = own
        self._original = point.raw()
        self._active = True
        function = self._wrapper()
        static = isinstance(self._original, staticmethod)
        self._replacement: Any = staticmethod(function) if static else function
        self._holders: list[tuple[ModuleType, str]] = []

    def _wrapper(self) -> Callable[..., Any]:
        own, fast, declines, calls = self._own, self.point.fast, self.point.declines, self.calls
        meter = calls.meter

        # The name, module and __wrapped__ of the original: pickles and signatures stay the same.
        @functools.wraps(own)
        def replacement(*args: Any, **kwargs: Any) -> Any:
            # A reference that somebody kept lives on after undo().
            if not self._active or torch.compiler.is_compiling():
                return own(*args, **kwargs)
            if meter is not None and meter.suspended():
                return own(*args, **kwargs)
            reason = declines(*args, **kwargs)
            calls.count(reason)
            if reason is not None:
                return own(*args, **kwargs)
            if meter is not None:
                return meter.run(own, fast, args, kwargs)
            return fast(own, *args, **kwargs)

        setattr(replacement, _MARK, True)
        return replacement

    def put_in(self) -> None:
        """Replaces the function, here and in the modules that hold it already."""
        setattr(self.point.owner, self.point.name, self._replacement)
        if self.point.imported_by_name:
            self._holders = _exchange(self._own, self._replacement)

    def foreign(self) -> list[str]:
        """Where something else has taken the place of the replacement."""
        places = [(self.point.owner, self.point.name), *self._holders]
        return [
            f"{_name_of(owner)}.{name}"
            for owner, name in places
            if vars(owner).get(name) is not self._replacement
        ]

    def take_out(self) -> None:
        """Puts the function back, also in modules that have imported the replacement since."""
        self._active = False
        setattr(self.point.owner, self.point.name, self._original)
        if self.point.imported_by_name:
            _exchange(self._replacement, self._own)


def put_in(
    points: Iterable[Point], prove: Callable[[], None], *, measure: bool = False
) -> list[Replacement]:
    """Replaces all functions, or none.

    Raises:
        Refused: one of them is missing, changed or replaced, or `prove` found other numbers.
    """
    checked = [(point, point.check()) for point in points]
    try:
        # Somebody's own code may make its tensors on the default device.
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.device("cpu"):
            prove()
    except Refused:
        raise
    except Exception as error:
        what = ", ".join(str(point) for point, _ in checked)
        raise Refused(f"a trial of {what} failed with {type(error).__name__}: {error}") from error
    replacements = [Replacement(point, own, measure=measure) for point, own in checked]
    for replacement in replacements:
        replacement.put_in()
    return replacements


def _exchange(old: Any, new: Any) -> list[tuple[ModuleType, str]]:
    """Puts `new` where modules hold `old`; the places."""
    modules = [module for module in list(sys.modules.values()) if isinstance(module, ModuleType)]
    places = [
        (module, name)
        for module in modules
        for name, value in list(vars(module).items())
        if value is old
    ]
    for module, name in places:
        setattr(module, name, new)
    return places


def _name_of(owner: ModuleType | type) -> str:
    if isinstance(owner, ModuleType):
        return owner.__name__
    return f"{owner.__module__}.{owner.__qualname__}"


# What adapters ask about tensors.


def unfit(
    x: Tensor,
    options: Options,
    *,
    dtypes: Sequence[torch.dtype] = _checks.FLOATS,
    batches: bool = False,
) -> str | None:
    """Why no fast kernel takes this matrix (or batch of them), or None."""
    if type(x) not in (Tensor, torch.nn.Parameter):
        return f"a {type(x).__name__}"
    if x.ndim < 2 or (x.ndim > 2 and not batches):
        return f"{x.ndim}-D"
    if x.layout != torch.strided or x.dtype not in dtypes:
        return str(x.dtype if x.layout == torch.strided else x.layout).removeprefix("torch.")
    if x.requires_grad and torch.is_grad_enabled():
        return "needs a gradient"
    if x.device.type not in options.devices:
        return f"no kernels for {x.device.type}"
    return None


def agree(what: str, mine: Tensor, theirs: Tensor, bound: float) -> None:
    """Refuses where two results differ by more than `bound` of the larger one's magnitude."""
    if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
        raise Refused(
            f"{what} returns {theirs.dtype} {tuple(theirs.shape)}, not {mine.dtype} "
            f"{tuple(mine.shape)} as the version that this was written for"
        )
    scale = max(float(theirs.abs().max()), float(mine.abs().max()))
    error = float((mine.double() - theirs.double()).abs().max())
    if not error <= bound * scale:
        raise Refused(
            f"{what} does not compute what the version that this was written for does "
            f"(relative difference {error / scale:.1e} in a trial, at most {bound:.0e} expected)"
        )


def trial_matrix(
    rows: int, cols: int, seed: float = 1.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """A well-conditioned matrix that leaves torch's random state alone."""
    i = torch.arange(rows, dtype=torch.float64, device="cpu")[:, None]
    j = torch.arange(cols, dtype=torch.float64, device="cpu")
    wave = torch.sin(seed * (2.3 * i * i + 0.9 * i + 1.7 * j * (i + 1) + 0.4))
    return (wave + (i == j)).to(dtype)
