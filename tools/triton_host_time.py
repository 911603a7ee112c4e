"""Host time of steps on Triton, with launches stubbed: no card is needed.

    python tools/triton_host_time.py [--steps muon_step_,soap_step_] [--lists gpt2-small,lora]

Tensors are on the CPU, in memory that nothing touches, so that it need not be there; workspaces are
on the meta device. Launches and uploads are counted in place of being done, and configurations are
those of sm_90. What is left is what Python does before the kernels of a step, in CPU time of its
thread. What it takes to give a card a kernel or a table is not in it. Refreshes cannot be timed
like this: they call torch to compute.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import spectral_kernels as sk
import torch
from spectral_kernels import _dispatch
from spectral_kernels._operators import TABLE
from spectral_kernels.benchmarks import inputs
from torch import Tensor

_WARM = 3

STEPS = ("muon_step_", "soap_step_", "shampoo_step_", "deva_step_")

LISTS: dict[str, tuple[tuple[int, ...], ...]] = {
    "gpt2-small": inputs.PARAMETER_LISTS["gpt2-small"],
    "lora": inputs.PARAMETER_LISTS["lora"],
    "experts": ((64, 768, 3072),) * 24,
}


class Stubs:
    """Counts of what is not done while `stubbed`."""

    def __init__(self) -> None:
        self.launches = 0
        self.uploads = 0

    def launch(self, kernel: Any, programs: int, *args: Any, **options: Any) -> None:
        self.launches += 1

    def upload(self, table: Tensor, device: torch.device) -> Tensor:
        self.uploads += 1
        return torch.empty(table.shape, dtype=table.dtype, device=device)


@contextlib.contextmanager
def stubbed() -> Iterator[Stubs]:
    """A pretended sm_90 that is given nothing."""
    stubs = Stubs()
    names: dict[str, Any] = {
        "launch": stubs.launch,
        "upload": stubs.upload,
        "architecture": lambda device: "sm_90",
    }
    package = importlib.import_module("spectral_kernels.triton_kernels")
    files = sorted(x.stem for x in Path(package.__file__).parent.glob("*.py"))
    modules = [importlib.import_module(f"{package.__name__}.{x}") for x in files if x != "__init__"]
    kept = [(m, n, getattr(m, n)) for m in modules for n in names.keys() & vars(m).keys()]
    layout = importlib.import_module(f"{package.__name__}._layout").Layout
    kept.append((layout, "empty", layout.empty))
    names["empty"] = lambda self, space, dtype: torch.empty(0, dtype=dtype, device="meta")
    interpreting = _dispatch._interpreting
    for module, name, _ in kept:
        setattr(module, name, names[name])
    _dispatch._interpreting = lambda: True
    try:
        yield stubs
    finally:
        for module, name, value in kept:
            setattr(module, name, value)
        _dispatch._interpreting = interpreting


def lists_of(shapes: tuple[tuple[int, ...], ...], op: str = "muon_step_") -> list[Any]:
    """Lists, counters and learning rate of a step, as its operator takes them."""

    def tensors(name: str) -> list[Tensor]:
        return [_empty(name, shape) for shape in shapes]

    counts = [torch.empty((), dtype=torch.float32, device="cpu") for _ in shapes]
    skipped = torch.empty((), dtype=torch.int64, device="cpu")
    lr = torch.tensor(0.02, dtype=torch.float64, device="cpu")
    states = [tensors(name) for name in TABLE[op].states]
    if op in ("soap_step_", "deva_step_"):
        bases = importlib.import_module("spectral_kernels.triton_kernels.eigenbasis")
        bases._initialised.update((q, True) for q in itertools.chain(*states[-2:]))
    return [tensors("params"), tensors("grads"), *states, counts, skipped, lr]


def _empty(name: str, shape: tuple[int, ...]) -> Tensor:
    *batch, m, n = shape
    if name == "second_moments":
        return torch.empty(0, dtype=torch.float32, device="cpu")
    if name == "root_failures":
        return torch.empty(*batch, 2, dtype=torch.int64, device="cpu")
    side = {"left": m, "right": n}.get(name.partition("_")[0].rstrip("s"))
    sides = (m, n) if side is None else (side, side)
    return torch.empty(*batch, *sides, dtype=torch.float32, device="cpu")


def moved(tensors: Sequence[Tensor], count: int) -> list[list[Tensor]]:
    """As many lists of tensors of these shapes, at addresses 16 bytes apart."""
    room = [torch.empty(x.numel() + 4 * count, dtype=x.dtype, device="cpu") for x in tensors]
    return [
        [big[4 * i : 4 * i + x.numel()].view(x.shape) for big, x in zip(room, tensors, strict=True)]
        for i in range(count)
    ]


def step_of(
    args: Sequence[Any], grads: Sequence[Tensor], op: str = "muon_step_"
) -> Callable[[], None]:
    """A call of the public function with other gradients; nothing is refreshed."""
    params, _, *states, counts, skipped, lr = args
    if op == "muon_step_":
        states = states[:1]
    options: dict[str, Any] = {} if op == "muon_step_" else {"refresh": [0] * len(params)}
    if op == "shampoo_step_":
        *states, graft_squares, failures = states
        options |= {"graft_squares": graft_squares, "root_failures": failures}
    return partial(
        getattr(sk, op),
        params,
        grads,
        *states,
        lr=lr,
        step_counts=counts,
        skipped=skipped,
        backend="triton",
        **options,
    )


def median_ms(calls: Iterable[Callable[[], None]], rounds: int) -> float:
    """CPU time of a call, after some that warm up."""
    times = []
    for call in itertools.islice(calls, rounds + _WARM):
        start = time.thread_time()
        call()
        times.append((time.thread_time() - start) * 1e3)
    return statistics.median(times[_WARM:])


def measured(op: str, name: str, *, rounds: int) -> str:
    """A line: a step on the same tensors, and one whose gradients are others every time."""
    with stubbed() as stubs:
        args = lists_of(LISTS[name], op)
        step = step_of(args, args[1], op)
        same = median_ms(itertools.repeat(step), rounds)
        before = stubs.launches
        step()
        launches = stubs.launches - before
        steps = [step_of(args, grads, op) for grads in moved(args[1], rounds + _WARM)]
        new = median_ms(iter(steps), rounds)
    times = f"{same:7.2f} ms, with new gradients {new:7.2f} ms"
    return f"{op:13} {name:11} {launches:4} launches {times}"


def main() -> int:
    """Prints a line a step and list."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", default=",".join(STEPS))
    parser.add_argument("--lists", default=",".join(LISTS))
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    for op in options.steps.split(","):
        for name in options.lists.split(","):
            if op == "muon_step_" or name != "experts":  # their factors have no place
                print(measured(op, name, rounds=options.rounds), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
