"""Goes through the cases: correctness first, then time."""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import math
import os
import sys
import textwrap
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from spectral_kernels import _extension, _operators, _records, info

from . import peers
from .case import (
    DTYPES,
    MEMORY,
    OURS,
    Case,
    Family,
    Problem,
    Work,
    dtype_name,
    within_rule,
    worst_entry,
)
from .place import CPU, Place, current_isa
from .timing import Load, Timing, fma_peak, idle_check

if TYPE_CHECKING:
    from rich.console import Console

FORMAT = 1

FAMILIES: tuple[Family, ...] = tuple(
    importlib.import_module(f"{__package__}.{name}").FAMILY for name in _operators.FAMILIES
)
OPS = tuple(op for family in FAMILIES for op in family.ops)

# Seconds of timing for one case, all contenders together.
BUDGET = 2.0
QUICK_BUDGET = 0.4

# This command, for a process of its own.
COMMAND = (sys.executable, "-m", "spectral_kernels.cli")

# What caps torch's own kernels, oneDNN's and MKL's; all three are read when torch is loaded.
_CAPS = {
    "baseline": ("default", "SSE41", "SSE4_2"),
    "avx2": ("avx2", "AVX2", "AVX2"),
    "avx512": ("avx512", "AVX512_CORE", "AVX512"),
    "avx512bf16": ("avx512", "AVX512_CORE_BF16", "AVX512"),
    "amx": ("avx512", "AVX512_CORE_AMX", "AVX512"),
}
_CAP_VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")


def blank(case: Case, threads: int, place: Place = CPU) -> dict[str, Any]:
    """The row of a case of which nothing is known yet."""
    return {
        "key": case.key,
        "op": case.op,
        "shape": case.shape,
        "dtype": dtype_name(case.dtype),
        "variant": case.variant,
        "threads": threads,
        "isa": place.kind,
        "failure": None,
    }


def run_case(
    case: Case, threads: int, budget: float, *, check: bool = True, place: Place = CPU
) -> dict[str, Any]:
    """One case on a number of threads, as a row of the result file.

    A row has "failure" instead of times where ours cannot run or breaks the accuracy rule. Without
    `check` nothing is compared.
    """
    row = blank(case, threads, place)
    wrong_before = _extension.faults()
    with place.setting(threads):
        try:
            problem = case.build(place.device)
            errors, failures = _errors(problem) if check else ({}, {})
        except Exception as error:
            return row | {"failure": _sentence(error), "contenders": []}
        baseline = [math.nan]
        if check and OURS not in failures:
            baseline = _baseline_errors(problem, errors)
        # One entry of a list speaks for all: the one that comes off worst beside its baseline.
        entry_shown = worst_entry(errors[OURS], baseline) if OURS in errors else 0
        shown = {name: each[entry_shown] for name, each in errors.items()}
        row["contenders"] = [
            {"name": contender.name, "error": shown.get(contender.name)}
            for contender in problem.contenders
        ]
        for entry in row["contenders"]:
            if entry["name"] in failures:
                entry["failure"] = failures[entry["name"]]
        if OURS in failures:
            return row | {"failure": failures[OURS]}
        if check:
            row["baseline_error"] = baseline[entry_shown]
            if len(baseline) > 1:
                row |= {
                    "worst_entry": entry_shown,
                    "entry_errors": errors[OURS],
                    "baseline_entry_errors": baseline,
                }
            entry = f"entry {entry_shown}: " if len(baseline) > 1 else ""
            pairs = zip(errors[OURS], baseline, strict=True)
            if not all(within_rule(*pair, case.dtype) for pair in pairs):
                row["failure"] = (
                    f"{entry}error {shown[OURS]:.1e} is more than twice plain torch's "
                    f"{baseline[entry_shown]:.1e}"
                )
                return row
        calls = {c.name: c.run for c in problem.contenders if c.name not in failures}
        with Load() as load:
            _peaks(problem.work, threads, place)  # the place keeps the highest
            timings, replays = place.times(calls, budget, problem.period)
            peaks = _peaks(problem.work, threads, place)
        row["others_load"] = load.others
        row["peak_gflops_a_thread"] = peaks
        bound, least = _bound(problem.work, peaks, threads, place)
        row["bound"] = bound
        row["share_of_peak"] = None if least is None else least / timings[OURS].median
    own = {contender.name: contender for contender in problem.contenders}
    for entry in row["contenders"]:
        name = entry["name"]
        if name in timings:
            entry.update(_times(timings[name], timings[OURS], case, name))
            entry["torch"] = own[name].torch
            work = own[name].work
            _, alone = _bound([work] if work else (), peaks, threads, place)
            entry["share_of_peak"] = (
                row["share_of_peak"] if name == OURS else alone and alone / timings[name].median
            )
        if name in replays and OURS in replays:
            entry["graph"] = _times(replays[name], replays[OURS], case, name)
    for name, most in case.error_goals.items():
        if name in errors:
            worst = worst_entry(errors[OURS], errors[name])
            ratio = errors[OURS][worst] / errors[name][worst]
            row.setdefault("error_goals", []).append({"name": name, "ratio": ratio, "goal": most})
    if _extension.faults() != wrong_before:
        row["failure"] = f"results of LAPACK had to be computed again: {_extension.faults()}"
    return row


def measure(
    cases: Sequence[Case],
    threads: Sequence[int],
    console: Console,
    budget: float,
    *,
    check: bool = True,
    limit: float = math.inf,
) -> list[dict[str, Any]]:
    """All cases on every number of threads, with a progress bar; none is begun after `limit` s."""
    # Only here, so that rows can be had where rich is not installed.
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
    )

    rows: list[dict[str, Any]] = []
    start = time.monotonic()
    with Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=console,
        transient=True,
    ) as progress:
        task = progress.add_task("", total=len(cases) * len(threads))
        for count in threads:
            for case in cases:
                if time.monotonic() - start > limit:
                    return rows
                progress.update(task, description=f"{case.key}, threads={count}")
                rows.append(run_case(case, count, budget, check=check))
                progress.advance(task)
    return rows


def _errors(problem: Problem) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Errors of those that are judged, entry by entry, and why those that cannot run cannot."""
    errors, failures = {}, {}
    for contender in problem.contenders:
        try:
            if contender.judged:
                output = (contender.output or contender.run)()
                errors[contender.name] = _each(problem.error(output))
            else:
                contender.run()
        except Exception as error:
            failures[contender.name] = _sentence(error)
    return errors, failures


def _baseline_errors(problem: Problem, errors: dict[str, list[float]]) -> list[float]:
    if isinstance(problem.baseline, str):
        return errors[problem.baseline]
    return _each(problem.error(problem.baseline()))


def _each(error: float | list[float]) -> list[float]:
    return error if isinstance(error, list) else [error]


def _sentence(error: Exception) -> str:
    first = next(iter(str(error).splitlines()), "")
    return textwrap.shorten(f"{type(error).__name__}: {first}", 120, placeholder=" …")


def _times(timing: Timing, ours: Timing, case: Case, name: str) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "median_s": timing.median,
        "low_s": timing.low,
        "high_s": timing.high,
        "samples": timing.samples,
    }
    if name != OURS:
        entry["speedup"] = timing.median / ours.median
        if name in case.goals:
            entry["goal"] = case.goals[name]
    return entry


def _peaks(work: Sequence[Work], threads: int, place: Place = CPU) -> dict[str, float]:
    rates = sorted({rate for form in work for rate in _binding(form, place)})
    peaks = {rate: place.peak(rate, threads) for rate in rates}
    return {rate: peak for rate, peak in peaks.items() if peak is not None}


def _bound(
    work: Sequence[Work], peaks: dict[str, float], threads: int, place: Place = CPU
) -> tuple[str | None, float | None]:
    """What binds the cheapest form, and the seconds that it takes at the least.

    Products of several rates come one after the other, memory meanwhile.
    """
    forms = [_binding(form, place) for form in work]
    # A form that the caches hold, and that multiplies nothing, has no bound.
    if not forms or not all(form and all(rate in peaks for rate in form) for form in forms):
        return None, None
    bounds = []
    for form in forms:
        times = {rate: amount / (peaks[rate] * 1e9 * threads) for rate, amount in form.items()}
        memory = times.pop(MEMORY, 0.0)
        products = sum(times.values())
        name = MEMORY if memory > products else place.unit(max(times, key=times.__getitem__))
        bounds.append((max(memory, products), name))
    least, name = min(bounds)
    return name, least


def _binding(form: Work, place: Place) -> Work:
    """Without the bytes that the caches hold from call to call."""
    held = form.get(MEMORY, 0.0) <= place.cached
    return {rate: amount for rate, amount in form.items() if not (rate == MEMORY and held)}


def machine() -> dict[str, Any]:
    """What a result was measured on, and how idle that was."""
    return {
        "cpu": info.cpu_model(),
        "cores": os.cpu_count(),
        "isa": current_isa(),
        "caps": {name: os.environ[name] for name in _CAP_VARIABLES if name in os.environ},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "others_load": idle_check(),
        "peak_gflops_a_thread": {rate: fma_peak(rate) for rate in ("fp32", "bf16", "fp64")},
        "peers": peers.versions(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def select(options: argparse.Namespace) -> list[Case]:
    """The cases that the options ask for.

    Raises:
        ValueError: an unknown operator, dtype or shape.
    """
    ops, dtypes = _names("op", options.op, OPS), _names("dtype", options.dtype, tuple(DTYPES))
    cases: Iterable[Case]
    if options.shape:
        wanted = [DTYPES[name] for name in dtypes or ("float32",)]
        if not ops:
            raise ValueError(f"--shape needs --op, one of {', '.join(OPS)}")
        return [
            _family(op).case(op, shape, dtype)
            for op in ops
            for shape in options.shape.split(",")
            for dtype in wanted
        ]
    if options.acceptance:
        cases = [case for family in FAMILIES for case in family.acceptance()]
    else:
        cases = [case for family in FAMILIES for case in family.cases()]
        if options.quick:
            cases = [case for case in cases if case.quick]
    return [
        case
        for case in cases
        if (not ops or case.op in ops) and (not dtypes or dtype_name(case.dtype) in dtypes)
    ]


def _names(option: str, given: str | None, known: tuple[str, ...]) -> list[str]:
    names = given.split(",") if given else []
    for name in names:
        if name not in known:
            raise ValueError(f"--{option} must be of {', '.join(known)}, not {name!r}")
    return names


def _family(op: str) -> Family:
    return next(family for family in FAMILIES if op in family.ops)


def thread_counts(given: str | None) -> list[int]:
    """(1, 2) of "1,2"; by default what torch uses.

    Raises:
        ValueError: not positive integers.
    """
    if not given:
        return [torch.get_num_threads()]
    if not all(part.isdigit() and int(part) > 0 for part in given.split(",")):
        raise ValueError(f"--threads must be like 1,2, not {given!r}")
    return [int(part) for part in given.split(",")]


def check_instruction_set(isa: str) -> None:
    """Whether `--isa` can be this set.

    Raises:
        ValueError: an unknown instruction set, or one that does not run here.
    """
    if isa not in _CAPS:
        raise ValueError(f"--isa must be one of {', '.join(_CAPS)}, not {isa!r}")
    if _extension.MODULE is None:
        raise ValueError(f"--isa needs the compiled part: {_extension.REASON}")
    if isa not in _extension.MODULE.supported_isas():
        refused = dict(_extension.MODULE.refused_isas())
        raise ValueError(f"--isa {isa}: {refused.get(isa, 'not compiled for this processor')}")


def cap_instruction_set(isa: str, argv: Sequence[str]) -> None:
    """Starts this command again with torch and us capped to `isa`; returns where it is already."""
    wanted = dict(zip(_CAP_VARIABLES, _CAPS[isa], strict=True)) | {"SPECTRAL_KERNELS_CPU_ISA": isa}
    if all(os.environ.get(name) == value for name, value in wanted.items()):
        return
    sys.stdout.flush()
    os.execve(sys.executable, [*COMMAND, *argv], os.environ | wanted)


def result_path(given: str | None, kind: str) -> Path:
    """Where the results go: `given`, or a name with the date under ./results."""
    if given:
        path = Path(given)
    else:
        stamp = datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S")
        path = Path("results") / f"{kind}-{current_isa()}-{stamp}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def write(
    path: Path, kind: str, facts: dict[str, Any], rows: list[dict[str, Any]], **more: Any
) -> None:
    """One result file, whole at every moment; `more` stands before the rows."""
    record = {"format": FORMAT, "kind": kind, "machine": facts, **more, "rows": rows}
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.write_text(_records.text(record))
    unfinished.replace(path)


def read(path: str | Path) -> dict[str, Any]:
    """A result file.

    Raises:
        ValueError: not a result file of this format.
    """
    record = json.loads(Path(path).read_text())
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"{path} is not a result file of format {FORMAT}")
    return record
