"""Estimates what replacements save: the original runs beside them now and then, on copies."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .._lists import tensors_in

# Of every shape, calls number 2 to 4: the first one warms caches up.
_SAMPLES = (2, 3, 4)


class _Thread(threading.local):
    """What runs in this thread.

    Attributes:
        original: an original, timed: replacements inside are switched off.
        inside: a replacement that is timed as a whole: those inside are part of it.
        children: seconds in timed calls inside each call that runs, innermost last.
    """

    def __init__(self) -> None:
        self.original = False
        self.inside = False
        self.children: list[float] = []


_thread = _Thread()


@dataclass
class _Kind:
    """Calls with arguments of the same shapes."""

    calls: int = 0
    seconds: float = 0.0
    sampled: list[float] = field(default_factory=list)


class Meter:
    """Times one replacement.

    Args:
        repeatable: the original may run once more on copies of its tensors. Where it may not, as it
            changes objects, its own loop is taken to cost nothing, so that savings come from the
            replacements inside only.
    """

    def __init__(self, *, repeatable: bool) -> None:
        self._repeatable = repeatable
        self._kinds: dict[Any, _Kind] = {}
        self._lock = threading.Lock()

    @staticmethod
    def suspended() -> bool:
        """Whether an original is being timed, so that nothing inside is to be replaced."""
        return _thread.original

    @property
    def seconds(self) -> float:
        """Spent in the replacement."""
        return sum(kind.seconds for kind in self._kinds.values())

    @property
    def saved(self) -> float | None:
        """The original's estimated seconds less the replacement's; None before any estimate."""
        if not self._repeatable:
            return -self.seconds
        known = [kind for kind in self._kinds.values() if kind.sampled]
        if not known:
            return None
        return sum(_median(kind.sampled) * kind.calls - kind.seconds for kind in known)

    def run(self, own: Callable[..., Any], fast: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The replacement's result."""
        if _thread.inside:
            return fast(own, *args, **kwargs)
        with self._lock:
            kind = self._kinds.setdefault(_shapes((args, kwargs)), _Kind())
            kind.calls += 1
            sample = self._repeatable and kind.calls in _SAMPLES
        copies = _copied((args, kwargs)) if sample else None
        _thread.inside = self._repeatable
        _thread.children.append(0.0)
        start = _now()
        try:
            return fast(own, *args, **kwargs)
        finally:
            elapsed = _now() - start
            _thread.inside = False
            kind.seconds += elapsed - _thread.children.pop()
            if copies is not None:
                kind.sampled.append(_time_original(own, *copies))
            if _thread.children:
                _thread.children[-1] += _now() - start


def _time_original(own: Callable[..., Any], args: Any, kwargs: Any) -> float:
    _thread.original = True
    try:
        with torch.random.fork_rng(devices=[]):
            start = _now()
            own(*args, **kwargs)
            return _now() - start
    finally:
        _thread.original = False


def _now() -> float:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def _median(values: list[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) is dict:
        return {key: _copied(each) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copied(each) for each in value)
    return value


def _shapes(value: Any) -> Any:
    """What decides the time of a call."""
    return tuple((x.shape, x.dtype, x.device) for x in tensors_in(value))
