"""What can go wrong on a machine: fresh processes, threads, LAPACK, repetition."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from .. import _extension
from ..eigenbasis import eigenbasis, refresh_eigenbasis
from ..inverse_root import inverse_root
from ..kron_factor import kron_precondition
from ..newton_schulz import muon_step_, newton_schulz, polar
from ..symmetric_matmul import gram
from ._accuracy import instruction_set, one_thread
from ._child import COMPUTATIONS
from ._outcome import Finding, NotApplicable, Wrong, examine

# The smallest power of two at which LAPACK's eigensolver in float64 spreads its work over threads.
SIZE = 512
THREADS = (1, 2, 4)
# Ten times what an idle processor takes.
_PROCESS_SECONDS = 120.0
_REPEATS = 20


def instruction_sets() -> list[str]:
    """Those that the processor has; none without the compiled part."""
    module = _extension.MODULE
    return [] if module is None else list(module.supported_isas())


# Fresh processes.


def _start(threads: int) -> dict[str, str] | str:
    """The digests of a fresh process, or the sentence that says why there are none."""
    code = f"from spectral_kernels.doctor import _child; _child.main({threads}, {SIZE})"
    command = [sys.executable, "-c", code]
    # torch takes its number of threads from the number of cores otherwise, and a second set from
    # OMP_NUM_THREADS; the child sets its own.
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=_PROCESS_SECONDS
        )
    except subprocess.TimeoutExpired as expired:
        said = expired.stdout or b""
        text = said.decode() if isinstance(said, bytes) else said
        return f"hangs after {len(text.splitlines())} of {len(COMPUTATIONS)} computations"
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return f"exits with {done.returncode}: {lines[-1] if lines else ''}"
    return dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())


def fresh_processes(repeats: int) -> Iterator[Finding]:
    """The first results of new processes on several numbers of threads, against one thread."""
    counts = [1] + [count for count in THREADS if count > 1 for _ in range(repeats)]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(_start, counts))
    for count in THREADS:
        found = [result for other, result in zip(counts, results, strict=True) if other == count]
        subject = f"{count} thread{'s' if count > 1 else ''}"
        yield examine(
            "fresh processes",
            "bits of one thread",
            subject,
            partial(_compare, results[0], found),
        )


def _compare(expected: dict[str, str] | str, found: Sequence[dict[str, str] | str]) -> str:
    if isinstance(expected, str):
        raise Wrong(f"a process with one thread {expected}")
    wrong: dict[str, int] = {}
    for result in found:
        if isinstance(result, str):
            raise Wrong(f"a process {result}")
        for name, value in expected.items():
            wrong[name] = wrong.get(name, 0) + (result.get(name) != value)
    missing = COMPUTATIONS.keys() - expected.keys()
    if missing:
        raise Wrong(f"a process does not compute {', '.join(sorted(missing))}")
    bad = [f"{name} ({count} of {len(found)})" for name, count in wrong.items() if count]
    if bad:
        raise Wrong(f"other bits in {', '.join(bad)}")
    return f"{len(found)} process{'es' if len(found) > 1 else ''}, {len(expected)} computations"


# LAPACK.


def _in_new_thread(compute: Callable[[], Tensor]) -> Tensor:
    results: list[Tensor | BaseException] = []

    def work() -> None:
        try:
            results.append(compute())
        except BaseException as error:
            results.append(error)

    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    (result,) = results
    if isinstance(result, BaseException):
        raise result
    return result


def _symmetric(n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    half = torch.randint(-3, 4, (n, n), generator=generator, dtype=torch.float64, device="cpu")
    return half + half.mT


def _eigh_residual(a: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(a)
    return (a @ vectors - vectors * values).norm() / a.norm()


def _qr_residual(a: Tensor) -> Tensor:
    q, r = torch.linalg.qr(a)
    return (q @ r - a).norm() / a.norm()


def _svd_residual(a: Tensor) -> Tensor:
    u, s, vh = torch.linalg.svd(a)
    return ((u * s) @ vh - a).norm() / a.norm()


def _our_residual(a: Tensor) -> Tensor:
    values, vectors = eigenbasis(a)
    return (a @ vectors - vectors * values).norm() / a.norm()


_SOLVERS = {
    "torch.linalg.eigh": _eigh_residual,
    "torch.linalg.qr": _qr_residual,
    "torch.linalg.svd": _svd_residual,
    "eigenbasis": _our_residual,
}


def lapack(size: int = SIZE, calls: int = 3) -> Iterator[Finding]:
    """Residuals of decompositions in new Python threads, which bring new workers."""
    limit = size * torch.finfo(torch.float64).eps

    def check(residual: Callable[[Tensor], Tensor]) -> str:
        before = torch.get_num_threads()
        found = []
        try:
            for count in (1, 4, 2):
                torch.set_num_threads(count)
                for seed in range(calls):
                    a = _symmetric(size, seed)
                    found.append(float(_in_new_thread(partial(residual, a))))
        finally:
            torch.set_num_threads(before)
        bad = [value for value in found if not value < limit]
        if bad:
            raise Wrong(f"{len(bad)} of {len(found)} are wrong, by {max(bad):.1g}")
        return f"{len(found)} of {len(found)} are right to {max(found):.0e}"

    for name, residual in _SOLVERS.items():
        yield examine("LAPACK", "residuals in new threads", name, partial(check, residual))


# Repetition.


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device="cpu"
    )


def _factor(x: Tensor) -> Tensor:
    return x @ x.mT + 0.1 * torch.eye(x.shape[-2], dtype=torch.float32, device="cpu")


def _roots(a: Tensor) -> Tensor:
    root = inverse_root(a, 4, relative_ridge=1e-5)
    assert isinstance(root, Tensor)
    return root


def _inputs() -> dict[str, Tensor]:
    """Batches of three, made by one thread: torch's own products depend on how many there are."""
    with one_thread():
        x = _draw(3, 40, 60)
        return {
            "x": x,
            "left": _draw(3, 40, 40, seed=1),
            "right": _draw(3, 60, 60, seed=2),
            "factor": _factor(x),
            "basis": torch.linalg.qr(_draw(3, 40, 40, seed=3))[0],
        }


FUNCTIONS: dict[str, tuple[Callable[..., Tensor], tuple[str, ...]]] = {
    "gram": (gram, ("x",)),
    "newton_schulz": (newton_schulz, ("x",)),
    "polar": (polar, ("x",)),
    "kron_precondition": (kron_precondition, ("x", "left", "right")),
    "inverse_root": (_roots, ("factor",)),
    "eigenbasis": (lambda a: eigenbasis(a)[1], ("factor",)),
    "refresh_eigenbasis": (lambda q, a: refresh_eigenbasis(q, a)[1], ("basis", "factor")),
}


def repetition(sets: Sequence[str]) -> Iterator[Finding]:
    """Every function again and again, on any number of threads, alone and among others."""
    made = _inputs()
    for isa in sets:
        for name, (function, names) in FUNCTIONS.items():
            inputs = [made[each] for each in names]
            with instruction_set(isa):
                yield examine("same bits", name, isa, partial(_repeat, function, inputs))
        with instruction_set(isa):
            yield examine("same bits", "muon_step_, any order of its list", isa, _list_order)
    if not sets:
        yield examine("same bits", "compiled kernels", "-", _no_kernels)


def _no_kernels() -> str:
    raise NotApplicable(_extension.REASON)


def _repeat(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> str:
    alone = [x[1] for x in inputs]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = function(*alone)
        for i in range(_REPEATS):
            torch.set_num_threads((1, 2, 4)[i % 3])
            if not torch.equal(function(*alone), expected):
                raise Wrong(f"other bits at call {i + 1}, {torch.get_num_threads()} threads")
        if not torch.equal(function(*inputs)[1], expected):
            raise Wrong("other bits beside two other matrices")
    finally:
        torch.set_num_threads(before)
    return f"{_REPEATS} calls and a batch of three"


def _list_order() -> str:
    shapes = ((24, 40), (33, 33), (40, 24), (1, 9))

    def run(order: Sequence[int]) -> list[Tensor]:
        params = [_draw(*shapes[i], seed=i) for i in order]
        grads = [_draw(*shapes[i], seed=i + 10) for i in order]
        muon_step_(params, grads, [torch.zeros_like(p) for p in params], lr=0.1)
        return [params[list(order).index(i)] for i in range(len(shapes))]

    expected = run(range(4))
    for order in ((3, 2, 1, 0), (1, 3, 0, 2)):
        if not all(torch.equal(a, b) for a, b in zip(run(order), expected, strict=True)):
            raise Wrong(f"other bits in the order {order}")
    return "three orders"
