"""Where cases are measured: a CPU, or a card under one backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from spectral_kernels import _extension, use_backend

from . import timing
from .case import MEMORY
from .timing import Timing, fma_peak, memory_peak

Calls = Mapping[str, Callable[[], Any]]


def current_isa() -> str:
    return _extension.MODULE.current_isa() if _extension.MODULE is not None else "reference"


@dataclass(frozen=True)
class Place:
    """The CPU.

    Attributes:
        backend: who "ours" is; None: who is chosen by itself.
        device: where the inputs are.
        cached: operands of more bytes than this come from memory at every call.
    """

    backend: str | None = None
    device: torch.device = field(default=torch.device("cpu"))
    cached: int = 64 << 20

    @property
    def kind(self) -> str:
        """What rows call it: the instruction set."""
        return current_isa()

    @contextmanager
    def setting(self, threads: int) -> Iterator[None]:
        """Runs what is inside on so many threads, with this backend."""
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with use_backend(self.backend) if self.backend else nullcontext():
                yield
        finally:
            torch.set_num_threads(before)

    def times(
        self, calls: Calls, budget: float, period: int
    ) -> tuple[dict[str, Timing], dict[str, Timing]]:
        """Times of calls, and of replayed recordings of those that can be recorded."""
        return timing.measure(calls, budget=budget, period=period), {}

    def peak(self, rate: str, threads: int) -> float | None:
        """GFLOP/s or GB/s of one thread, while the others have it too: the most that was seen so
        far, since a ceiling that was measured in a disturbed moment flatters.
        """
        now = memory_peak(threads) / threads if rate == MEMORY else fma_peak(rate, threads)
        if now is None:
            return None
        kind = (rate, threads, current_isa())
        _highest[kind] = max(now, _highest.get(kind, 0.0))
        return _highest[kind]

    def unit(self, rate: str) -> str:
        """What does the multiply-adds of a rate."""
        return "tiles" if rate == "bf16" and current_isa() == "amx" else rate


_highest: dict[tuple[str, int, str], float] = {}
CPU = Place()


@dataclass(frozen=True)
class Card(Place):
    """A card under one backend, or what rehearses one.

    Attributes:
        switch: "wgmma" or "queue": what the CUDA C++ kernels do not do by themselves everywhere.
        peaks: GFLOP/s by rate, and GB/s under "memory", measured in the same run.
    """

    device: torch.device = field(default=torch.device("cuda"))
    cached: int = 40 << 20
    switch: str = ""
    peaks: Mapping[str, float] = field(default_factory=dict, compare=False)

    @property
    def rehearsing(self) -> bool:
        """Whether this is no card."""
        return self.device.type != "cuda"

    @property
    def kind(self) -> str:
        """What rows call it: the backend."""
        return ", ".join(filter(None, (self.backend, self.switch)))

    @contextmanager
    def setting(self, threads: int) -> Iterator[None]:
        """Runs what is inside with this backend and switch; a card has no threads to set."""
        module: Any = _extension.MODULE
        switch = getattr(module, f"cuda_prefer_{self.switch}") if self.switch else None
        if switch is not None:
            switch(True)
        try:
            with super().setting(torch.get_num_threads()):
                yield
        finally:
            if switch is not None:
                switch(False if self.switch == "wgmma" else None)

    def times(
        self, calls: Calls, budget: float, period: int
    ) -> tuple[dict[str, Timing], dict[str, Timing]]:
        """By the card's clock; recordings of work that is the same at every call."""
        if self.rehearsing:
            return super().times(calls, budget, period)
        eager = timing.measure(calls, budget=budget, period=period, sample=_by_events)
        made = {name: recorded(call) for name, call in calls.items()} if period == 1 else {}
        replays = {name: replay for name, replay in made.items() if replay is not None}
        return eager, timing.measure(replays, budget=budget, sample=_by_events)

    def peak(self, rate: str, threads: int) -> float | None:
        """GFLOP/s or GB/s of the whole card."""
        return self.peaks.get(rate)

    def unit(self, rate: str) -> str:
        """A rate is called after its dtype."""
        return rate

    def ceilings(self, budget: float = 1.0) -> dict[str, float]:
        """GFLOP/s of large products of torch by rate, and GB/s of a large copy: now."""
        from .inputs import gaussian, rate_of

        n, copied = (64, 2**12) if self.rehearsing else (8192, 2**28)
        found = {}
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            a, b = (gaussian((n, n), dtype, seed, device=self.device) for seed in (1, 2))
            rate = rate_of(dtype, torch.device("cuda"))
            found[rate] = 2e-9 * n**3 / self._fastest(partial(torch.mm, a, b), budget)
        x = torch.ones(copied, dtype=torch.float32, device=self.device)
        y = torch.empty_like(x)
        found[MEMORY] = 2e-9 * x.nbytes / self._fastest(lambda: y.copy_(x), budget)
        return found

    def _fastest(self, call: Callable[[], Any], budget: float) -> float:
        eager, _ = self.times({"": call}, budget, 1)
        return eager[""].low


def recorded(call: Callable[[], Any]) -> Callable[[], Any] | None:
    """The replay of a graph of one call; None where it cannot be recorded."""
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        graph.replay()
        torch.cuda.synchronize()
    except Exception:
        torch.cuda.synchronize()
        return None
    return graph.replay


def _by_events(call: Callable[[], Any], repeats: int = 1) -> float:
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(repeats):
        call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3 / repeats
