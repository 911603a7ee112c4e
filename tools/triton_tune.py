"""Tries tile configurations of the Triton products on this card. Opt-in; it changes nothing.

    python tools/triton_tune.py [--dtypes bfloat16,float32] [--sides 384,2048]

Every candidate forms X X^T and iterates Newton-Schulz, functions that write none of their inputs,
and counts only if its error against float64 is at most twice that of plain torch. What is printed
are lines for the table in triton_kernels/_config.py, with the card as their origin. The library
itself never tunes: the same matrix has to get the same bits in every process.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import spectral_kernels as sk
import torch
from spectral_kernels.benchmarks.newton_schulz import standard
from spectral_kernels.coefficients import resolve
from spectral_kernels.triton_kernels import _config, _groups
from spectral_kernels.triton_kernels._config import Config
from torch import Tensor

_MUON = resolve("muon").rows
_ROUNDS = 15

# Operator -> ours, and the same in plain torch.
_OPERATORS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "gram": (
        lambda x: sk.gram(x, backend="triton"),
        lambda x: x @ x.mT,
    ),
    "newton_schulz": (
        lambda x: sk.newton_schulz(x, method="standard", backend="triton"),
        lambda x: standard(x, _MUON),
    ),
}


@dataclass(frozen=True)
class Trial:
    """One candidate.

    Attributes:
        config: as it would stand in the table.
        failure: why it does not count, or None.
        seconds: the median over both operators, summed; None if it does not count.
    """

    config: Config
    failure: str | None
    seconds: float | None


def candidates(origin: str) -> Iterator[Config]:
    """Every configuration that is tried."""
    for tile, depth, warps, stages in itertools.product((64, 128), (32, 64), (4, 8), (2, 3, 4)):
        yield Config(tile, depth, warps, stages, origin)
        if tile == 128 and warps == 8:
            yield Config(tile, depth, warps, stages, origin, across=2 * tile)


def tried(x: Tensor, configs: Sequence[Config], rounds: int = _ROUNDS) -> list[Trial]:
    """Checks, then times, candidates for the table's row of a matrix like x."""
    allowed = {name: _allowed(x, plain) for name, (_, plain) in _OPERATORS.items()}
    return [_tried(x, config, allowed, rounds) for config in configs]


def _tried(x: Tensor, config: Config, allowed: dict[str, float], rounds: int) -> Trial:
    seconds = 0.0
    with _standing_in(x, config):
        for name, (ours, _) in _OPERATORS.items():
            try:
                error = _error(ours(x), _OPERATORS[name][1](x.double()))
                if not error <= allowed[name]:
                    return Trial(config, f"{name} errs by {error:.1e}", None)
                seconds += _time(lambda ours=ours: ours(x), rounds, x.is_cuda)
            except Exception as problem:
                return Trial(config, f"{name}: {type(problem).__name__}: {problem}"[:160], None)
    return Trial(config, None, seconds)


def _allowed(x: Tensor, plain: Callable[[Tensor], Tensor]) -> float:
    exact = plain(x.double())
    return 2.0 * _error(plain(x), exact) + 4.0 * torch.finfo(x.dtype).eps


def _error(out: Tensor, exact: Tensor) -> float:
    return float(torch.linalg.matrix_norm(out.double() - exact) / torch.linalg.matrix_norm(exact))


@contextlib.contextmanager
def _standing_in(x: Tensor, config: Config) -> Iterator[None]:
    """The table with a candidate in the row of x."""
    row = _config.TABLE[_config.architecture(x.device)]
    key = (x.element_size(), min(x.shape[-2:]) > _config.LARGE)
    kept = row[key]
    row[key] = config
    _forget()
    try:
        yield
    finally:
        row[key] = kept
        _forget()


def _forget() -> None:
    """What was made with a configuration that is no longer in the table."""
    for made in (_groups.plan_of, _groups.groups_of_one):
        made.cache_clear()


def _time(call: Callable[[], object], rounds: int, on_card: bool) -> float:
    if on_card:
        call = _recorded(call)
    samples = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        if on_card:
            torch.cuda.synchronize()
        samples.append(time.perf_counter() - began)
    return statistics.median(samples)


def _recorded(call: Callable[[], object]) -> Callable[[], None]:
    """The same from a CUDA graph, which has no launches from Python to be timed."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    replay: Callable[[], None] = graph.replay
    return replay


def best(trials: Sequence[Trial]) -> Trial | None:
    """The fastest of those that count."""
    counted = [trial for trial in trials if trial.seconds is not None]
    return min(counted, key=lambda trial: trial.seconds or 0.0, default=None)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints every trial and the line that the table should have."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--sides", default="384,2048", help="short sides; long ones are 4 times it")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("triton_tune: torch sees no card")
        return 2
    card = torch.cuda.get_device_name()
    for dtype, side in itertools.product(options.dtypes.split(","), options.sides.split(",")):
        x = torch.randn(int(side), 4 * int(side), dtype=torch.float32, device="cuda").to(
            getattr(torch, dtype)
        )
        trials = tried(x, list(candidates(card)))
        for trial in trials:
            print(trial.config, trial.failure or f"{1e6 * (trial.seconds or 0.0):.0f} us")
        found = best(trials)
        print(f"{dtype}, short side {side}: {found.config if found else 'none that counts'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
