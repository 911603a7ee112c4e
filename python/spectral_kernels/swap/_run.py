"""The swap of one process at or below `spectral-kernels run`."""

from __future__ import annotations

import atexit
import logging
import multiprocessing.util
import os
import time
from pathlib import Path

from . import Options, Swap, _report, _swapped

# Names of functions, by comma, that `spectral-kernels run --function` was given.
FUNCTIONS = "SPECTRAL_KERNELS_RUN_FUNCTIONS"

_log = logging.getLogger("spectral_kernels")


def begin(script: int, folder: str) -> None:
    """Swaps.

    Args:
        script: the process of the script itself. It warns of what is refused, for all the others.
        folder: where the reports of all processes are collected; empty: nobody asked for them.
    """
    swap = _swapped(None, Options(None, allow_ridge=False, measure=bool(folder)))
    functions = os.environ.get(FUNCTIONS, "")
    if functions:
        swap._await(functions.split(","))
    if folder:
        _Reporter(swap, Path(folder))
    elif os.getpid() == script:
        for name, reason in swap.refused.items():
            _log.warning("%s keeps its own code: %s", name, reason)


class _Reporter:
    """Writes what happened in this process, and in each that is forked from it, when it ends."""

    def __init__(self, swap: Swap, folder: Path) -> None:
        self._swap = swap
        self._folder = folder
        self._earlier: _report.Report | None = None
        self._name()
        _report.written(None, self._path, self._process)
        atexit.register(self.write)
        self._also_without_atexit()
        os.register_at_fork(after_in_child=self._forked)
        multiprocessing.util.register_after_fork(self, _Reporter._also_without_atexit)

    def write(self) -> None:
        """Writes the report; a forked process without a call has none."""
        report = self._swap.report()
        if self._earlier is not None:
            report = _report.since(report, self._earlier)
            if not report.calls:
                return
        _report.written(report, self._path, self._process)

    def _also_without_atexit(self) -> None:
        """Processes of multiprocessing that were forked end without calling atexit's functions."""
        if multiprocessing.process.parent_process() is not None:
            multiprocessing.util.Finalize(None, self.write, exitpriority=-100)

    def _forked(self) -> None:
        self._earlier = self._swap.report()
        self._name()

    def _name(self) -> None:
        self._process = f"process {os.getpid()}"
        self._path = self._folder / f"{time.time_ns()}-{os.getpid()}.json"
