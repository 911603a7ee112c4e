"""Backends and instruction sets as a fixture, poisoned workspaces, and a count of what ran."""

from __future__ import annotations

import collections
import os
import sys
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from spectral_kernels import _dispatch, _extension

sys.path.insert(0, str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parent.parent / "tools"))
pytest.register_assert_rewrite("support")

from optim_support import CONFIGS, FEW, Factory  # noqa: E402 (found by the path above)
from support import refusal  # noqa: E402

ISAS = ("baseline", "avx2", "avx512", "avx512bf16", "amx")
# Sets that this processor lacks are no parameters: a skip of every test in every such set would
# bury the other skips. The summary names them, and test_tiles.py skips them once.
REFUSED = {isa: why for isa in ISAS if _extension.MODULE is not None and (why := refusal(isa))}
BACKENDS = (*(f"cpu-{isa}" for isa in ISAS if isa not in REFUSED), "reference", "triton")

# Triton decides when it is imported whether kernels are interpreted, so they have a run of their
# own: `TRITON_INTERPRET=1 pytest`.
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

# One example of a list step takes a few milliseconds; a slow machine is no failure.
settings.register_profile(
    "default",
    deadline=None,
    max_examples=200,
    derandomize="CI" in os.environ,
    database=None if "CI" in os.environ else settings.default.database,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("default")


@dataclass(frozen=True)
class Backend:
    """A backend by the name that `use_backend` takes, and its instruction set if it is fixed."""

    name: str
    isa: str | None


def _param(name: str) -> object:
    return pytest.param(name, marks=pytest.mark.triton) if name == "triton" else name


@pytest.fixture(params=[_param(name) for name in BACKENDS])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Everything in the test runs on one backend, the CPU kernels with one instruction set.

    On one thread: the matrices are small, and test_threads.py shows that the bits are the same.
    """
    request.node.user_properties.append(("backend", request.param))
    name, _, isa = request.param.partition("-")
    if name == "triton" and torch.float64 in request.node.callspec.params.values():
        pytest.skip("the Triton kernels compute in float32 at most")
    if name == "cpu" and _extension.MODULE is None:
        pytest.skip(_extension.REASON)
    if isa:
        _extension.MODULE.set_isa_cap(isa)
        assert _extension.MODULE.current_isa() == isa
    torch.set_num_threads(1)
    _dispatch.call_counts(reset=True)
    try:
        with _dispatch.use_backend(name):
            yield Backend(name, isa or None)
        ran = {key.partition("/")[2] for key, count in _dispatch.call_counts().items() if count}
        assert ran <= {name}, f"asked for {name}, but {ran} ran"
    finally:
        if isa:
            _extension.MODULE.set_isa_cap("")


@pytest.fixture
def native() -> None:
    """Needs the compiled part."""
    if _extension.MODULE is None:
        pytest.skip(_extension.REASON)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """What is small gains nothing from a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=CONFIGS)
def make(request: pytest.FixtureRequest) -> Factory:
    """Every optimizer, in every setting."""
    return CONFIGS[request.param]


@pytest.fixture(params=FEW)
def make_few(request: pytest.FixtureRequest) -> Factory:
    """Every optimizer, in one."""
    return CONFIGS[request.param]


@pytest.fixture
def backend_emulated(native: None) -> Iterator[None]:
    """The CUDA C++ kernels, run on the CPU. Built by the first test that asks for it."""
    import emulated_cuda

    torch.set_num_threads(1)
    with emulated_cuda.emulated():
        yield


@pytest.fixture(autouse=True, scope="session")
def poisoned_workspace() -> Iterator[None]:
    """Scratch memory is NaN when it is lent, so that a read of something unwritten shows."""
    if _extension.MODULE is None:
        yield
        return
    _extension.MODULE.poison_workspace(True)
    yield
    _extension.MODULE.poison_workspace(False)


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """A test that changes the number of threads does not change the next one."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves `long` tests to runs that ask for them with -m, and Triton's to a run of their own."""
    others = [item for item in items if bool(item.get_closest_marker("triton")) != INTERPRETING]
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in set(others)]
    if INTERPRETING:
        _leave_most_to_the_long_run(items)
    if config.option.markexpr:
        return
    long = [item for item in items if item.get_closest_marker("long")]
    if long:
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in set(long)]


# What `make test` goes through in the interpreter, which takes a second for what a card does in
# microseconds: cases of every test of an operator, none of which takes many seconds.
_INTERPRETED_CASES = {
    "test_symmetric_matmul.py": 2,
    "test_newton_schulz.py": 2,
    "test_kron_factor.py": 2,
    "test_inverse_root.py": 1,
    "test_eigenbasis.py": 1,
    "test_deva.py": 1,
    "test_defaults.py": 6,
    "test_nonfinite.py": 3,
}
_SLOW_IN_THE_INTERPRETER = (
    *("awkward", "convergent", "deepseek", "polar_express_8", "127", "130", "trajectory"),
    *("every_small", "band", "steps", "long_run", "same_update", "test_first_step", "2, 0, 4"),
)


def _leave_most_to_the_long_run(items: list[pytest.Item]) -> None:
    functions: dict[str, list[pytest.Item]] = collections.defaultdict(list)
    for item in items:
        if item.path.name not in _INTERPRETED_CASES:
            continue
        params = getattr(item, "callspec", None)
        possible = params is None or torch.float64 not in params.params.values()
        if possible and not any(word in item.name for word in _SLOW_IN_THE_INTERPRETER):
            functions[item.nodeid.partition("[")[0]].append(item)
    kept = set()
    for cases in functions.values():
        step = max(1, -(-len(cases) // _INTERPRETED_CASES[cases[0].path.name]))
        kept.update(cases[step // 2 :: step])
    for item in items:
        if item not in kept and not item.get_closest_marker("kernel"):
            item.add_marker("long")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Where Triton has no kernel for a case, it says so, and the case is none of its tests."""
    try:
        return (yield)
    except RuntimeError as error:
        if item.get_closest_marker("triton") and str(error).startswith("backend cannot run"):
            pytest.skip(str(error))
        raise


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Tests per backend and instruction set: a backend of which all were skipped must be seen."""
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            for key, value in getattr(report, "user_properties", ()):
                if key == "backend":
                    counts[value][outcome] += 1
    if not counts:
        return
    terminalreporter.section("tests per backend")
    for name in [*BACKENDS, *sorted(set(counts) - set(BACKENDS))]:
        if name in counts:
            figures = ", ".join(f"{count} {outcome}" for outcome, count in counts[name].items())
            terminalreporter.write_line(f"{name:15} {figures}")
    for isa, why in REFUSED.items():
        terminalreporter.write_line(f"{f'cpu-{isa}':15} none: {why}")
