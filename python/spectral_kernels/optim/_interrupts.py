"""Ctrl-C during a step waits for its end, so that no parameter is left between two states."""

from __future__ import annotations

import functools
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def uninterrupted(function: Callable[P, R]) -> Callable[P, R]:
    """Holds SIGINT back while the function runs, and hands it on when it has ended.

    Only where Python would have handled it: in the main thread, under a handler of Python's. A
    second SIGINT is handed on at once, for a step that does not end.
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        handler = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is not threading.main_thread() or not callable(handler):
            return function(*args, **kwargs)
        held: list[tuple[int, FrameType | None]] = []

        def hold(number: int, frame: FrameType | None) -> None:
            if held:
                held.clear()
                handler(number, frame)
            else:
                held.append((number, frame))

        signal.signal(signal.SIGINT, hold)
        try:
            return function(*args, **kwargs)
        finally:
            signal.signal(signal.SIGINT, handler)
            if held:
                handler(*held[0])

    return wrapper
