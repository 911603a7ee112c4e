"""The parts of `make gpu`, in their order, and what the process of one does."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import spectral_kernels as sk
import torch
from torch.utils._pytree import tree_map

from . import run
from .case import Case, Problem
from .place import Card

if TYPE_CHECKING:
    from .gpu import Session

# Seconds of timing for one case, all contenders together.
BUDGET = 1.0
REHEARSED_BUDGET = 1e-3


@dataclass(frozen=True)
class Part:
    """A process of its own with a limit of its own.

    Attributes:
        name: the family and its backend, or what is done.
        backend: whose kernels it runs; left out where there is none.
        work: what the process does: it tells lines, a kind and a value each.
        command: tests instead: the command, given the seconds it may take; None: not installed.
        here: what is done at once.
        share: of the time that is left, at the most.
        limit: seconds at the most, where that is not the usual number.
    """

    name: str
    backend: str = ""
    work: Callable[[Worker], None] | None = None
    command: Callable[[float], Sequence[str] | None] | None = None
    here: Callable[[Session], None] | None = None
    share: float = 1.0
    limit: float | None = None


@dataclass
class Worker:
    """The process of a part: where it measures, and how it tells what it has."""

    card: Card
    lines: Path
    skip: int
    inject: dict[str, str]

    def tell(self, kind: str, value: Any) -> None:
        """A line, which is on disk when this returns."""
        with self.lines.open("a") as file:
            file.write(json.dumps({kind: value}) + "\n")

    def measure(self, cases: Iterable[Case]) -> None:
        """All cases but the first ones, which earlier processes have begun."""
        for number, case in enumerate(cases):
            if number < self.skip:
                continue
            self.tell("begin", run.blank(case, 1, self.card))
            if case.op in self.inject:
                case = injected(case, self.inject[case.op])
            budget = REHEARSED_BUDGET if self.card.rehearsing else BUDGET
            self.tell("row", run.run_case(case, 1, budget, place=self.card))


def measured(options: argparse.Namespace) -> int:
    """Runs the part that the options name, in this process."""
    (part,) = (part for part in PARTS if part.name == options.part)
    assert part.work is not None
    _, _, switch = part.name.partition(f" {part.backend} ")
    device = torch.device("cpu" if options.rehearse else "cuda")
    card = Card(part.backend or None, device, switch=switch, peaks=options.peaks)
    inject = dict(each.split("=") for each in options.inject)
    part.work(Worker(card, options.lines, options.skip, inject))
    return 0


def injected(case: Case, kind: str) -> Case:
    """A case that ends its process, never ends, or has a wrong result: for a rehearsal."""

    def build(device: torch.device) -> Problem:
        if kind == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "hang":
            time.sleep(3600.0)
        problem = case.build(device)
        ours, *others = problem.contenders
        right = ours.output or ours.run
        wrong = replace(ours, output=lambda: tree_map(lambda x: 1.5 * x, right()))
        return replace(problem, contenders=[wrong, *others])

    return replace(case, build=build)


def cases_of(name: str, rehearsing: bool) -> Iterator[Case]:
    """A family's cases for cards, or its tiny ones."""
    (family,) = (family for family in run.FAMILIES if family.name == name)
    if not rehearsing:
        yield from list(family.card()) or family.cases()
        return
    for op in family.ops:
        # Squares, for some operators take nothing else.
        case = family.case(op, "6x10" if op.endswith("_step_") else "8x8", torch.float32)
        yield replace(case, build=partial(_without_period, case))


def _without_period(case: Case, device: torch.device) -> Problem:
    """A rehearsal's times mean nothing: it does not wait for refreshes."""
    return replace(case.build(device), period=1)


def _family(name: str, backend: str, switch: str = "", ops: Sequence[str] = ()) -> Part:
    def work(worker: Worker) -> None:
        if switch == "wgmma" and torch.cuda.get_device_capability() != (9, 0):
            return  # no other card has these instructions
        cases = cases_of(name, worker.card.rehearsing)
        worker.measure(case for case in cases if not ops or case.op in ops)

    return Part(" ".join(filter(None, (name, backend, switch))), backend, work)


def _facts(worker: Worker) -> None:
    """What this is measured on, and why backends do not run there."""
    x = torch.ones(8, 8, dtype=torch.float32, device=worker.card.device)
    found = run.machine() | {
        "backends": {
            name: sk.explain("gram", x, backend=name).rejected.get(name)
            for name in ("cuda", "triton")
        },
        "python": platform.python_version(),
        "triton": _version("triton"),
        "spectral_kernels": sk.__version__,
        "nvcc": _output(["nvcc", "--version"]).splitlines()[-1:],
        "card": "none: a rehearsal in the interpreter",
    }
    if not worker.card.rehearsing:
        properties = torch.cuda.get_device_properties(worker.card.device)
        clocks = "driver_version,clocks.max.sm,clocks.sm,power.limit"
        found |= {
            "card": properties.name,
            "capability": list(torch.cuda.get_device_capability(worker.card.device)),
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "driver_and_clocks": _output(
                ["nvidia-smi", f"--query-gpu={clocks}", "--format=csv,noheader"]
            ),
        }
    worker.tell("facts", found)


def _version(module: str) -> str | None:
    try:
        return __import__(module).__version__
    except ImportError:
        return None


def _output(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _ceilings(worker: Worker) -> None:
    """What the card reaches in this run."""
    worker.tell("ceilings", worker.card.ceilings())


def source() -> Path:
    """The checkout, which has the tests."""
    return Path(os.environ.get("SPECTRAL_KERNELS_SOURCE", "."))


def _tests(limit: float) -> list[str]:
    """tests/test_gpu.py."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--maxfail=25", "-p", "no:cacheprovider"]
    return [*command, str(source() / "tests" / "test_gpu.py")]


def _sanitizer(limit: float) -> list[str] | None:
    """The small cases of tests/test_gpu.py under compute-sanitizer, where that is installed."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return None
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", "pytest"]
    command += ["-q", "-x", "-p", "no:cacheprovider", "-k", "agrees and float32"]
    return [*command, str(source() / "tests" / "test_gpu.py")]


def _plots(session: Session) -> None:
    """How many times faster ours is, case by case, if matplotlib is there."""
    try:
        from . import plots
    except ModuleNotFoundError:
        session.say("  matplotlib is not installed: no pictures")
        return
    rows = [row for row in session.rows if not row["failure"]]
    title = f"{session.facts.get('card')}, torch {torch.__version__}"
    plots.speedups(rows, session.path.with_suffix(".png"), title)


def _families(names: Iterable[str]) -> Iterator[Part]:
    for name in names:
        for backend in ("triton", "cuda"):
            yield _family(name, backend)


# Those with an optimizer's step come first.
_FIRST = ("newton_schulz", "eigenbasis", "deva", "inverse_root")
_OTHERS = tuple(family.name for family in run.FAMILIES if family.name not in _FIRST)

PARTS: tuple[Part, ...] = (
    Part("facts", work=_facts),
    Part("ceilings", work=_ceilings),
    *_families(_FIRST),
    Part("tests", command=_tests, share=0.5, limit=180.0),
    *_families(_OTHERS),
    Part("sanitizer", command=_sanitizer, share=0.25, limit=60.0),
    # What may hang a card, or is off by default, comes when all else is written.
    _family("symmetric_matmul", "cuda", "wgmma"),
    _family("newton_schulz", "cuda", "wgmma", ops=("newton_schulz",)),
    _family("newton_schulz", "cuda", "queue", ops=("newton_schulz",)),
    Part("plots", here=_plots),
)
