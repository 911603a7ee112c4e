"""Interleaved timing, and what the machine was doing meanwhile."""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from spectral_kernels import _extension

_SAMPLE = 2e-3  # seconds: shorter calls are timed several at a time
_ROUNDS = 5
_MOST_ROUNDS = 101
_SLOW_ROUNDS = 3  # of a contender one period of which takes half the budget
_HOPELESS = 8  # times the budget for one period: its first call is all that is measured

_PEAK_MILLISECONDS = 10
_COPIED = 128 << 20  # bytes


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the median and the quartiles of `samples` interleaved samples."""

    median: float
    low: float
    high: float
    samples: int

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles over the median."""
        return (self.high - self.low) / (2.0 * self.median)


def measure(
    calls: Mapping[str, Callable[[], Any]],
    *,
    budget: float,
    period: int = 1,
    sample: Callable[[Callable[[], Any], int], float] | None = None,
) -> dict[str, Timing]:
    """Times every call in turn, in a new random order each round.

    A call whose work changes with a period is timed over whole periods, one at least and without
    its first call, which may set things up; its time is the mean over the phases of the medians.
    Another call that takes many times the budget is timed once.

    Args:
        calls: name -> what to time; each must be ready to run again.
        budget: seconds for all rounds; the least number of rounds is done whatever it takes.
        period: calls after which the work repeats.
        sample: seconds of one of several calls, by another clock than this process's.
    """
    once = sample or _once
    first = {name: once(call, 1) for name, call in calls.items()}
    hopeless = {name for name, seconds in first.items() if seconds * period > _HOPELESS * budget}
    alone = hopeless if period == 1 else set()
    going = [name for name in calls if name not in alone]
    estimates = {name: min(first[name], once(calls[name], 1)) for name in going}
    repeats = {
        name: 1 if period > 1 else max(1, round(_SAMPLE / max(estimate, 1e-7)))
        for name, estimate in estimates.items()
    }
    slow = {name for name, seconds in estimates.items() if seconds * period > budget / 2}
    most = {name: (1 if name in hopeless else _SLOW_ROUNDS) * period for name in slow | hopeless}
    least = (max(most.values()) if len(most) == len(going) else _ROUNDS * period) if going else 0
    samples: dict[str, list[float]] = {name: [] for name in going}
    shuffle = random.Random(0).shuffle
    start = time.perf_counter()
    for done in range(_MOST_ROUNDS * period):
        whole = done % period == 0
        if whole and done >= least and time.perf_counter() - start >= budget:
            break
        shuffle(going)
        for name in going:
            if done < most.get(name, done + 1):
                samples[name].append(once(calls[name], repeats[name]))
    timings = {name: _summary(values, period) for name, values in samples.items()}
    return timings | {name: _summary([first[name]], 1) for name in alone}


def _once(call: Callable[[], Any], repeats: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize()
    return (time.perf_counter() - start) / repeats


def seconds(value: float) -> str:
    """A time in the unit that fits."""
    if value < 1e-3:
        return f"{value * 1e6:.1f} us"
    return f"{value * 1e3:.2f} ms" if value < 1.0 else f"{value:.2f} s"


def synchronize() -> None:
    """Waits for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _summary(samples: list[float], period: int) -> Timing:
    phases = [samples[phase::period] for phase in range(period)]
    quartiles = [_quartiles(phase) for phase in phases]
    low, median, high = (statistics.fmean(values) for values in zip(*quartiles, strict=True))
    return Timing(median, low, high, len(samples))


def _quartiles(samples: list[float]) -> tuple[float, float, float]:
    if len(samples) < 2:
        return samples[0], samples[0], samples[0]
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, median, high


def fma_peak(kind: str, threads: int = 1) -> float | None:
    """GFLOP/s a thread while `threads` of them do nothing but fused multiply-adds: the best of
    three, now. Together they are slower than alone, as far as the clock depends on the load.

    Args:
        kind: "fp32", "fp64" or "bf16".
        threads: how many.

    Returns:
        None where there is no compiled part, or no instruction for it in the set in use.
    """
    module = _extension.MODULE
    if module is None:
        return None
    with ThreadPoolExecutor(threads) as pool:

        def together() -> float:
            rates = pool.map(module.fma_peak, [kind] * threads, [_PEAK_MILLISECONDS] * threads)
            return statistics.fmean(rates)

        return max(together() for _ in range(3)) or None


def memory_peak(threads: int = 1) -> float:
    """GB/s of a copy that no cache holds, bytes read and written: the best of four, now."""
    source = torch.ones(_COPIED // 4, dtype=torch.float32, device="cpu")
    target = torch.empty_like(source)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        seconds = min(_once(lambda: target.copy_(source)) for _ in range(4))
    finally:
        torch.set_num_threads(before)
    return 2.0 * _COPIED / seconds / 1e9


class Load:
    """How busy other processes keep the machine while the `with` block runs.

    Attributes:
        others: their share of all cores, 0 to 1; None where /proc/stat cannot be read.
    """

    others: float | None = None

    def __enter__(self) -> Load:
        self._busy, self._own, self._wall = _busy_seconds(), _own_seconds(), time.monotonic()
        return self

    def __exit__(self, *args: object) -> None:
        busy = _busy_seconds()
        wall = time.monotonic() - self._wall
        if busy is None or self._busy is None or wall < 0.05:
            return
        others = busy - self._busy - (_own_seconds() - self._own)
        self.others = min(1.0, max(0.0, others / wall / (os.cpu_count() or 1)))


def idle_check(seconds: float = 0.3) -> float | None:
    """The share of all cores that others use while this process sleeps."""
    with Load() as load:
        time.sleep(seconds)
    return load.others


def _own_seconds() -> float:
    """CPU time of this process, and of those that it started and that have ended."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


def _busy_seconds() -> float | None:
    """CPU time of all processes, time stolen by other virtual machines included."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _, _, irq, softirq, steal, *_ = map(
        int, stat.read_text().splitlines()[0].split()[1:]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
