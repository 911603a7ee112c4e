"""`make gpu`: tests and timings on a card, in a few minutes, without a network.

    python -m spectral_kernels.benchmarks.gpu [--budget SECONDS] [--json FILE] [--rehearse]

Parts run one after another; one that fails is written down and the next one begins, and the result
file is complete after every part. `--rehearse` goes through the same code on tiny matrices on the
CPU, with the kernels interpreted (TRITON_INTERPRET=1): its times mean nothing.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import spectral_kernels as sk
import torch
from spectral_kernels import _cuda, _extension, _records
from torch import Tensor

from .inputs import decaying, factor
from .newton_schulz import gram_form, gram_newton_schulz, standard

FORMAT = 1
_MUON = sk.coefficients.resolve("muon").rows

# Layers of transformers, batches of heads, low rank and convolutions; the long ones last.
SHAPES: tuple[tuple[int, ...], ...] = (
    *((768, 768), (768, 3072), (1024, 4096), (2048, 2048), (4096, 4096), (2048, 8192)),
    *((12, 768, 768), (24, 768, 3072), (8, 2048, 2048), (64, 128, 4096), (64, 128, 7168)),
    *((24, 256, 1536), (224, 16, 4096), (126, 64, 576), (3, 257, 1000), (4096, 14336)),
    *((64, 1024, 2816), (50304, 768)),
)
FACTORS = (768, 1024, 2048, 3072)
ROOTS = ((256, 32), (128, 64), (64, 128), (16, 512), (4, 1024), (1, 2048))
LISTS: dict[str, tuple[tuple[int, int], ...]] = {
    "gpt2-small": (((768, 768),) * 4 + ((3072, 768), (768, 3072))) * 12,
    "lora": ((16, 4096), (4096, 16)) * 112,
    "llama-430m-layer": ((1024, 1024),) * 4 + ((1024, 4096),) * 2 + ((4096, 1024),),
}

_TINY_SHAPES = ((12, 20), (2, 40, 24), (70, 90))
_MOST_ROUNDS = 60
_LEAST_ROUNDS = 7


@dataclass
class Session:
    """One run: where its results go and how long it may take.

    Attributes:
        device: the card, or the CPU when rehearsing.
        path: the result file.
        budget: seconds for everything.
        record: what is written.
    """

    device: torch.device
    path: Path
    budget: float
    record: dict[str, Any]
    start: float = field(default_factory=time.monotonic)

    @property
    def rehearsing(self) -> bool:
        """Whether this is no card."""
        return self.device.type != "cuda"

    @property
    def left(self) -> float:
        """Seconds that remain."""
        return self.budget - (time.monotonic() - self.start)

    def say(self, line: str) -> None:
        """A line of progress."""
        print(f"[{time.monotonic() - self.start:5.0f} s] {line}", flush=True)

    def save(self) -> None:
        """Writes what there is so far."""
        self.path.write_text(_records.text(self.record))

    def part(self, name: str, work: Callable[[Session], Any]) -> None:
        """Runs a part, whatever became of the ones before."""
        if self.left <= 0:
            self.say(f"{name}: left out, the time is over")
            self.record["parts"][name] = "left out: no time"
            return self.save()
        self.say(f"{name} ...")
        began = time.monotonic()
        try:
            self.record[name] = work(self)
            outcome = "done"
        except Exception as error:
            traceback.print_exc()
            outcome = f"failed: {type(error).__name__}: {str(error)[:300]}"
        seconds = time.monotonic() - began
        self.record["parts"][name] = f"{outcome} in {seconds:.0f} s"
        self.say(f"{name}: {outcome}")
        self.save()

    def wait(self) -> None:
        """Until the card is idle."""
        if not self.rehearsing:
            torch.cuda.synchronize()


# Facts and ceilings.


def facts(session: Session) -> dict[str, Any]:
    """What this was measured on."""
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "spectral_kernels": sk.__version__,
        "nvcc": _output(["nvcc", "--version"]).splitlines()[-1:],
        "backends": {
            name: dict(sk.explain("gram", _gaussian(session, (8, 8)), backend=name).rejected)
            for name in ("cuda", "triton")
        },
    }
    if session.rehearsing:
        return found | {"card": "none: a rehearsal in the interpreter"}
    properties = torch.cuda.get_device_properties(session.device)
    return found | {
        "card": properties.name,
        "capability": list(torch.cuda.get_device_capability(session.device)),
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "driver": _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
    }


def ceilings(session: Session) -> dict[str, float]:
    """What the card reaches in this run: TFLOP/s of large products, TB/s of a large copy."""
    n = 8192 if not session.rehearsing else 64
    found = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a, b = (_gaussian(session, (n, n), dtype, seed) for seed in (1, 2))
        seconds = _times(session, {"mm": _bound(torch.mm, a, b)}, 2.0)["mm"]["median_s"]
        found[str(dtype).removeprefix("torch.") + "_tflops"] = 2 * n**3 / seconds / 1e12
    x = _gaussian(session, (2**28 if not session.rehearsing else 2**12,))
    y = torch.empty_like(x)
    seconds = _times(session, {"copy": lambda: y.copy_(x)}, 1.0)["copy"]["median_s"]
    found["copy_tb_s"] = 2 * x.numel() * 4 / seconds / 1e12
    for name, value in found.items():
        session.say(f"  {name}: {value:.3g}")
    return found


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


# Tests.


def tests(session: Session) -> dict[str, Any]:
    """tests/test_gpu.py in a process of its own, which a crash may take down."""
    root = Path(os.environ.get("SPECTRAL_KERNELS_SOURCE", "."))
    limit = min(180.0, session.left / 2)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--maxfail=25", "-p", "no:cacheprovider"]
    command += [str(root / "tests" / "test_gpu.py")]
    return _finished(command, limit, root)


def sanitizer(session: Session) -> dict[str, Any] | str:
    """The small cases of tests/test_gpu.py under compute-sanitizer, where that is installed."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return "compute-sanitizer is not installed"
    root = Path(os.environ.get("SPECTRAL_KERNELS_SOURCE", "."))
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", "pytest"]
    command += ["-q", "-x", "-p", "no:cacheprovider", "-k", "agrees and float32"]
    limit = min(60.0, session.left / 4)
    return _finished([*command, str(root / "tests" / "test_gpu.py")], limit, root)


def _finished(command: Sequence[str], limit: float, root: Path) -> dict[str, Any]:
    """Runs tests, at most so many seconds; exit status, counts and the end of what was said."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, cwd=root)
        output, code = done.stdout + done.stderr, done.returncode
    except subprocess.TimeoutExpired as error:
        partial = error.stdout or b""
        output, code = partial.decode() if isinstance(partial, bytes) else partial, None
    tail = output[-6000:]
    print(tail, flush=True)
    counts = {
        word: int(count)
        for count, word in re.findall(r"(\d+) (passed|failed|skipped|error)", tail[-400:])
    }
    return {"exit": code, "counts": counts, "tail": tail}


# Timing.


def _bound(function: Callable[..., Any], *args: Any, **options: Any) -> Callable[[], Any]:
    return lambda: function(*args, **options)


def _times(
    session: Session, calls: Mapping[str, Callable[[], Any]], budget: float
) -> dict[str, dict[str, Any]]:
    """First call, then interleaved rounds of eager calls and, where it works, of graph replays."""
    found: dict[str, dict[str, Any]] = {}
    ready: dict[tuple[str, str], Callable[[], Any]] = {}
    for name, call in calls.items():
        began = time.perf_counter()
        try:
            call()
            session.wait()
        except Exception as error:
            found[name] = {"failure": f"{type(error).__name__}: {str(error)[:200]}"}
            session.say(f"    {name}: {found[name]['failure']}")
            continue
        found[name] = {"first_s": time.perf_counter() - began}
        ready[name, ""] = call
        replay = _graph(session, call)
        if replay is not None:
            ready[name, "graph_"] = replay
    samples: dict[tuple[str, str], list[float]] = {key: [] for key in ready}
    repeats = {key: _repeats(session, call) for key, call in ready.items()}
    shuffle = random.Random(0).shuffle
    began = time.monotonic()
    for done in range(_MOST_ROUNDS):
        if done >= _LEAST_ROUNDS and time.monotonic() - began > budget:
            break
        keys = list(ready)
        shuffle(keys)
        for key in keys:
            samples[key].append(_sample(session, ready[key], repeats[key]))
    for (name, kind), values in samples.items():
        found[name] |= {
            f"{kind}median_s": statistics.median(values),
            f"{kind}min_s": min(values),
            f"{kind}max_s": max(values),
        }
    return found


def _graph(session: Session, call: Callable[[], Any]) -> Callable[[], Any] | None:
    if session.rehearsing:
        return None
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


def _repeats(session: Session, call: Callable[[], Any]) -> int:
    return max(1, min(50, round(2e-3 / max(_sample(session, call, 1), 1e-6))))


def _sample(session: Session, call: Callable[[], Any], repeats: int) -> float:
    if session.rehearsing:
        began = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - began) / repeats
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(repeats):
        call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3 / repeats


def _row(
    session: Session,
    key: str,
    calls: Mapping[str, Callable[[], Any]],
    error: Callable[[Any], float] | None,
    work: float,
    traffic: float,
    dtype: torch.dtype,
    budget: float = 1.5,
) -> dict[str, Any]:
    """Errors first, then times, also as shares of the floor that the run's own ceilings set.

    Args:
        session: where it runs.
        key: the row's name.
        calls: the contenders.
        error: of an output, or None.
        work, traffic: FLOPs and bytes of the cheapest form.
        dtype: of the products.
        budget: seconds.
    """
    row: dict[str, Any] = {"key": key, "gflop": work / 1e9, "mb": traffic / 1e6}
    row["floor_s"] = floor = _floor(session, work, traffic, dtype)
    errors = {}
    if error is not None:
        for name, call in calls.items():
            try:
                errors[name] = error(call())
            except Exception as problem:
                errors[name] = math.nan
                session.say(f"    {name}: {type(problem).__name__}: {str(problem)[:200]}")
    row["contenders"] = _times(session, calls, budget)
    for name, value in errors.items():
        row["contenders"][name]["error"] = value
    for entry in row["contenders"].values():
        seconds = entry.get("graph_median_s", entry.get("median_s"))
        entry["share_of_floor"] = floor / seconds if floor and seconds else None
    shown = [
        f"{name} {_shown(entry)}" + (f" err {errors[name]:.1e}" if name in errors else "")
        for name, entry in row["contenders"].items()
    ]
    session.say(f"  {key}: " + " | ".join(shown))
    return row


def _floor(session: Session, work: float, traffic: float, dtype: torch.dtype) -> float | None:
    """Seconds that the card takes at the speeds of `ceilings`, if those were measured."""
    found = session.record.get("ceilings") or {}
    name = f"{str(dtype).removeprefix('torch.')}_tflops"
    if name not in found or "copy_tb_s" not in found:
        return None
    return max(work / found[name], traffic / found["copy_tb_s"]) / 1e12


def _shown(entry: Mapping[str, Any]) -> str:
    if "failure" in entry:
        return "failed"
    best = f"{entry['median_s'] * 1e6:.0f} us"
    if "graph_median_s" in entry:
        best += f" (graph {entry['graph_median_s'] * 1e6:.0f})"
    if entry.get("share_of_floor"):
        best += f" {entry['share_of_floor']:.0%}"
    return best


def _gaussian(
    session: Session, shape: Sequence[int], dtype: torch.dtype = torch.float32, seed: int = 0
) -> Tensor:
    generator = torch.Generator(session.device).manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float32, device=session.device).to(
        dtype
    )


def _relative(exact: Tensor) -> Callable[[Any], float]:
    def error(out: Tensor) -> float:
        off = torch.linalg.matrix_norm(out.double() - exact)
        return float((off / torch.linalg.matrix_norm(exact)).max())

    return error


# Kernels.


def _backends(op: str, x: Tensor) -> list[str]:
    return [name for name in ("triton", "cuda") if sk.explain(op, x, backend=name).backend]


def _switched(switch: Callable[[bool | None], None], run: Callable[[], Any]) -> Callable[[], Any]:
    def switched() -> Any:
        switch(True)
        try:
            return run()
        finally:
            switch(None)

    return switched


def _other_products(x: Tensor, run: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
    """The CUDA C++ kernels with large products by wgmma, which is off by default."""
    if _cuda.unavailable() is not None or x.dtype == torch.float32:
        return {}
    module: Any = _extension.MODULE
    if x.device.type != "cuda" or torch.cuda.get_device_capability(x.device) != (9, 0):
        return {}
    return {"cuda, wgmma": _switched(lambda on: module.cuda_prefer_wgmma(bool(on)), run)}


def _paths(run: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
    """All CUDA C++ products of an iteration in one launch, and in one each: with the same bits."""
    module: Any = _extension.MODULE
    if _cuda.unavailable() is not None:
        return {}
    one = _switched(module.cuda_prefer_queue, run)
    each = _switched(lambda on: module.cuda_prefer_queue(None if on is None else False), run)
    if not torch.equal(one(), each()):
        raise RuntimeError("one launch for all products has not the bits of one launch each")
    return {"cuda, one launch": one, "cuda, a launch a product": each}


def newton_schulz(session: Session) -> list[dict[str, Any]]:
    """Against both forms in torch, eager and compiled, torch.optim.Muon's function and peers."""
    from torch.optim._muon import _zeropower_via_newtonschulz

    compiled, compiled_gram = (torch.compile(f, dynamic=False) for f in (standard, gram_form))
    rows: list[dict[str, Any]] = []
    for shape in _TINY_SHAPES if session.rehearsing else SHAPES:
        if session.left < 60:
            break
        x = _gaussian(session, shape, torch.bfloat16)
        calls: dict[str, Callable[[], Any]] = {
            name: _bound(sk.newton_schulz, x, backend=name)
            for name in _backends("newton_schulz", x)
        }
        if min(shape[-2:]) > _cuda.MOST_ROWS and "cuda" in calls:
            calls |= _other_products(x, calls["cuda"]) | _paths(calls["cuda"])
        calls["torch"] = _bound(standard, x, _MUON)
        if not session.rehearsing:
            calls["torch.compile"] = _bound(compiled, x, _MUON)
            calls["torch.compile, Gram form"] = _bound(compiled_gram, x, _MUON)
            if x.ndim == 2:
                copy = x.clone()
                calls["torch.optim.Muon"] = _bound(
                    _zeropower_via_newtonschulz, copy, _MUON[0], len(_MUON), 1e-7
                )
            calls |= _peers(session, x)
        # Large ones are judged by a part of the batch: float64 takes its time.
        judged = x.numel() <= 2**25
        error = _relative(standard(x.double(), _MUON)) if judged else None
        m, n = sorted(shape[-2:])
        count = math.prod(shape[:-2])
        work = count * len(_MUON) * (3.0 * m * m * n + m**3)
        traffic = 2.0 * x.numel() * x.element_size()
        key = f"newton_schulz {shape} bf16"
        rows.append(_row(session, key, calls, error, work, traffic, x.dtype))
    return rows


def _peers(session: Session, x: Tensor) -> dict[str, Callable[[], Any]]:
    try:
        return {contender.name: contender.run for contender in gram_newton_schulz(x)}
    except Exception as error:
        session.say(f"    gram-newton-schulz: {type(error).__name__}: {str(error)[:200]}")
        return {}


def gram(session: Session) -> list[dict[str, Any]]:
    """X X^T against cuBLAS."""
    rows: list[dict[str, Any]] = []
    shapes = _TINY_SHAPES if session.rehearsing else SHAPES[:12]
    for shape in shapes:
        for dtype in (torch.bfloat16, torch.float32):
            if session.left < 45:
                return rows
            x = _gaussian(session, shape, dtype)
            calls = {name: _bound(sk.gram, x, backend=name) for name in _backends("gram", x)}
            if "cuda" in calls:
                calls |= _other_products(x, calls["cuda"])
            calls["torch"] = _bound(torch.matmul, x, x.mT)
            wide = x.double()
            error = _relative(wide @ wide.mT) if x.numel() <= 2**24 else None
            m, n = shape[-2:]
            count = float(math.prod(shape[:-2]))
            work, traffic = count * m * m * n, count * m * (m + n) * x.element_size()
            key = f"gram {shape} {dtype}"
            rows.append(_row(session, key, calls, error, work, traffic, dtype, 0.5))
    return rows


def kron_factor(session: Session) -> list[dict[str, Any]]:
    """L <- beta L + w G G^T and R likewise, and L G R, against fp32 products of torch."""
    rows: list[dict[str, Any]] = []
    for m in (24,) if session.rehearsing else FACTORS:
        for dtype in (torch.float32, torch.bfloat16):
            if session.left < 45:
                return rows
            n = 4 * m
            g = _gaussian(session, (m, n), dtype)
            left, right = (
                torch.zeros(size, size, dtype=torch.float32, device=session.device)
                for size in (m, n)
            )

            def plain(g: Tensor = g, left: Tensor = left, right: Tensor = right) -> None:
                wide = g.float()
                left.lerp_(wide @ wide.mT, 0.05)
                right.lerp_(wide.mT @ wide, 0.05)

            calls: dict[str, Callable[[], Any]] = {
                name: _bound(sk.kron_factors_update_, left, right, g, 0.95, backend=name)
                for name in _backends("kron_factors_update_", g)
            }
            calls["torch"] = plain
            work = float(m) * m * n + float(n) * n * m
            traffic = float(g.numel() * g.element_size() + 8 * (m * m + n * n))
            key = f"kron_factors {m}x{n} {dtype}"
            rows.append(_row(session, key, calls, None, work, traffic, dtype, 0.5))
            rows.append(_two_sided(session, g))
    return rows


def _two_sided(session: Session, g: Tensor) -> dict[str, Any]:
    m, n = g.shape
    left, right = (_gaussian(session, (size, size), seed=size) / size**0.5 for size in (m, n))
    calls: dict[str, Callable[[], Any]] = {
        name: _bound(sk.kron_precondition, g, left, right, backend=name)
        for name in _backends("kron_precondition", g)
    }
    calls["torch"] = lambda: (left @ g.float() @ right).to(g.dtype)
    error = _relative(left.double() @ g.double() @ right.double()) if m <= 1024 else None
    work = 2.0 * m * n * (m + n)
    traffic = 2.0 * g.numel() * g.element_size() + 4.0 * (m * m + n * n)
    key = f"kron_precondition {m}x{n} {g.dtype}"
    return _row(session, key, calls, error, work, traffic, torch.float32, 0.5)


def inverse_root(session: Session) -> list[dict[str, Any]]:
    """(A + delta I)^(-1/4) against torch.linalg.eigh."""

    def eigh(a: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(a)
        values = values.clamp(min=0.0) + 1e-6 * a.abs().sum(-1).amax(-1)[..., None]
        return (vectors * values[..., None, :] ** -0.25) @ vectors.mT

    rows: list[dict[str, Any]] = []
    for count, n in ((2, 20),) if session.rehearsing else ROOTS:
        if session.left < 45:
            break
        one = factor((1, n, n), torch.float32, 1e-4)
        a = one.to(session.device).repeat(count, 1, 1)
        calls: dict[str, Callable[[], Any]] = {
            name: _bound(sk.inverse_root, a, 4, relative_ridge=1e-6, backend=name)
            for name in _backends("inverse_root", a)
        }
        calls["torch.linalg.eigh"] = _bound(eigh, a)
        error = _relative(eigh(a.double()))
        work, traffic = count * 32.0 * n**3, 8.0 * a.numel()
        key = f"inverse_root {count}x{n} fp32"
        rows.append(_row(session, key, calls, error, work, traffic, a.dtype, 1.0))
    return rows


def steps(session: Session) -> list[dict[str, Any]]:
    """Whole Muon steps against torch.optim.Muon's, then the other optimizers' against plain torch.

    Plain torch is the specification, matrix by matrix, on the card.
    """
    rows: list[dict[str, Any]] = []
    lists = {"tiny": ((12, 20), (20, 12), (30, 30))} if session.rehearsing else LISTS
    for name, shapes in lists.items():
        if session.left < 30:
            return rows
        calls: dict[str, Callable[[], Any]] = {}
        for label, make in (("ours", sk.optim.Muon), ("torch.optim.Muon", torch.optim.Muon)):
            try:
                calls[label] = _optimizer(session, make, shapes, lr=0.02, weight_decay=0.1).step
            except Exception as error:
                session.say(f"    {label}: {type(error).__name__}: {str(error)[:200]}")
        work = sum(
            len(_MUON) * (3.0 * min(shape) ** 2 * max(shape) + min(shape) ** 3) for shape in shapes
        )
        traffic = 20.0 * sum(map(math.prod, shapes))
        key = f"Muon step, {name}"
        rows.append(_row(session, key, calls, None, work, traffic, torch.bfloat16))
    for optimizer in (sk.optim.Shampoo, sk.optim.SOAP, sk.optim.DeVA):
        if session.left < 30:
            break
        name, shapes = list(lists.items())[-1]
        op = f"{optimizer.__name__.lower()}_step_"
        backends = [*_backends(op, _gaussian(session, shapes[0])), "reference"]
        calls = {
            "torch, the specification" if name == "reference" else name: _bound(
                _on, name, _optimizer(session, optimizer, shapes).step
            )
            for name in backends
        }
        # Two rotations of gradient and update, and both factors by half.
        work = sum(6.0 * m * n * (m + n) for m, n in shapes)
        traffic = sum(24.0 * m * n + 16.0 * (m * m + n * n) for m, n in shapes)
        key = f"{optimizer.__name__} step, {name}"
        rows.append(_row(session, key, calls, None, work, traffic, torch.float32, 3.0))
    return rows


def _optimizer(
    session: Session, make: Callable[..., Any], shapes: Sequence[tuple[int, int]], **options: Any
) -> Any:
    params = [torch.nn.Parameter(0.02 * _gaussian(session, shape)) for shape in shapes]
    for i, param in enumerate(params):
        param.grad = _gaussian(session, param.shape, seed=i)
    return make(params, **options)


def _on(backend: str, step: Callable[[], Any]) -> None:
    with sk.use_backend(backend):
        step()


def spectra(session: Session) -> list[dict[str, Any]]:
    """Errors on decaying spectra against plain torch's, in every dtype: the accuracy rule."""
    rows: list[dict[str, Any]] = []
    shapes = _TINY_SHAPES[:1] if session.rehearsing else ((128, 512), (768, 768), (768, 3072))
    for shape in shapes:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = decaying(shape, dtype).to(session.device)
            exact = standard(x.double(), _MUON)
            error = _relative(exact)
            plain = error(standard(x, _MUON))
            for name in _backends("newton_schulz", x):
                ours = error(sk.newton_schulz(x, backend=name))
                rows.append(
                    {"key": f"{shape} {dtype} {name}", "error": ours, "torch": plain}
                    | {"within_rule": ours <= 2.0 * plain + 1e-6}
                )
                session.say(f"  {rows[-1]['key']}: {ours:.2e}, torch {plain:.2e}")
    return rows


# Plots.


def plots(session: Session) -> list[str]:
    """Speed-ups over torch of every timed row, if matplotlib is there."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        session.say("  matplotlib is not installed: no pictures")
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = [bar for part in _TIMED for bar in _bars(session.record.get(part) or [])]
    if not bars:
        return []
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.22 * len(bars)))
    axes.barh([label for label, _ in bars], [value for _, value in bars], color="#4477aa")
    axes.axvline(1.0, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as the fastest of torch")
    axes.set_title(f"{session.record['facts'].get('card')}, torch {torch.__version__}")
    axes.tick_params(labelsize=7)
    figure.tight_layout()
    path = session.path.with_suffix(".png")
    figure.savefig(path, dpi=130)
    return [path.name]


def _bars(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, float]]:
    for row in rows:
        times = {
            name: entry.get("graph_median_s", entry.get("median_s"))
            for name, entry in row["contenders"].items()
        }
        torchs = [t for name, t in times.items() if name.startswith("torch") and t]
        for name, seconds in times.items():
            if not name.startswith("torch") and seconds and torchs:
                yield f"{row['key']} {name}", min(torchs) / seconds


_TIMED = ("newton_schulz", "gram", "kron_factor", "inverse_root", "steps")


def main(argv: Sequence[str] | None = None) -> int:
    """Goes through all parts; 0 if none failed, 1 if one did, 2 without a card."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--budget", type=float, default=450.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--parts", help="only these, by name")
    options = parser.parse_args(argv)
    if not options.rehearse and not torch.cuda.is_available():
        print("spectral-kernels gpu: torch sees no card; --rehearse goes through it without one")
        return 2
    device = torch.device("cpu" if options.rehearse else "cuda")
    stamp = datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S")
    card = "rehearsal" if options.rehearse else torch.cuda.get_device_name()
    name = f"gpu-{re.sub('[^A-Za-z0-9]+', '-', card).lower()}-{stamp}.json"
    path = options.json or Path(os.environ.get("OUT", "results")) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"format": FORMAT, "kind": "gpu", "parts": {}}
    record["budget_s"] = options.budget
    session = Session(device, path, options.budget, record)
    session.say(f"results go to {path}")
    parts: dict[str, Callable[[Session], Any]] = {
        "facts": facts,
        "ceilings": ceilings,
        "spectra": spectra,
        "tests": tests,
        "sanitizer": sanitizer,
        "newton_schulz": newton_schulz,
        "steps": steps,
        "gram": gram,
        "kron_factor": kron_factor,
        "inverse_root": inverse_root,
        "plots": plots,
    }
    wanted = options.parts.split(",") if options.parts else list(parts)
    if unknown := set(wanted) - set(parts):
        parser.error(f"--parts takes {', '.join(parts)}, not {', '.join(sorted(unknown))}")
    for part in wanted:
        session.part(part, parts[part])
    failed = [part for part, outcome in record["parts"].items() if outcome.startswith("failed")]
    session.say(f"written: {path}; failed parts: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
