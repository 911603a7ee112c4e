"""Backends and instruction sets as a fixture, poisoned workspaces, and a count of what ran."""

from __future__ import annotations

import collections
import contextlib
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

from ranks.workers import Workers  # noqa: E402
from support.fuzzing import refusal  # noqa: E402
from support.optimizers import CONFIGS, FEW, Factory  # noqa: E402 (found by the path above)

# A family that only test_new_family.py puts into a copy of the repository.
collect_ignore = ["toy_family"]

ISAS = ("baseline", "avx2", "avx512", "avx512bf16", "amx")
# Sets that this processor lacks are no parameters: a skip of every test in every such set would
# bury the other skips. The summary names them, and test_tiles.py skips them once.
REFUSED = {isa: why for isa in ISAS if _extension.MODULE is not None and (why := refusal(isa))}
BACKENDS = (*(f"cpu-{isa}" for isa in ISAS if isa not in REFUSED), "reference", "triton", "cuda")

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


# Of backends whose tests are runs of their own.
MARKS = {"triton": "triton", "cuda": "emulated"}


@dataclass(frozen=True)
class Backend:
    """A backend by the name that `use_backend` takes, and its instruction set if it is fixed."""

    name: str
    isa: str | None


def _param(name: str) -> object:
    return pytest.param(name, marks=getattr(pytest.mark, MARKS[name])) if name in MARKS else name


@pytest.fixture(params=[_param(name) for name in BACKENDS])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Everything in the test runs on one backend, the CPU kernels with one instruction set.

    On one thread: the matrices are small, and test_threads.py shows that the bits are the same.
    """
    request.node.user_properties.append(("backend", request.param))
    name, _, isa = request.param.partition("-")
    if name in ("triton", "cuda") and torch.float64 in request.node.callspec.params.values():
        pytest.skip("the kernels for a GPU compute in float32 at most")
    if name == "cpu" and _extension.MODULE is None:
        pytest.skip(_extension.REASON)
    if isa:
        _extension.MODULE.set_isa_cap(isa)
        assert _extension.MODULE.current_isa() == isa
    torch.set_num_threads(1)
    _dispatch.call_counts(reset=True)
    try:
        with contextlib.ExitStack() as inside:
            if name == "cuda":
                import emulated_cuda

                whole = _in_full(request.node, "cuda")
                inside.enter_context(emulated_cuda.emulated(refuse=True, any_rows=whole))
            inside.enter_context(_dispatch.use_backend(name))
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
def seeded() -> None:
    """Random inputs are the same in every run."""
    torch.manual_seed(0)


@pytest.fixture
def without_peers(one_thread: None) -> Iterator[None]:
    """Benchmarks have no contenders but torch, whatever is installed."""
    from spectral_kernels.benchmarks import peers

    peers.point(["none"])
    yield
    peers.point([])


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
def poisoned_tensors(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What torch allocates is NaN, and what the emulated kernels ask it for."""
    monkeypatch.setenv("EMULATION_POISON", "1")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


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
    for item in items:
        if item.path.name.startswith("test_cuda_"):
            item.add_marker("emulated")
    others = [item for item in items if bool(item.get_closest_marker("triton")) != INTERPRETING]
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in set(others)]
    _leave_most_to_the_long_run(items)
    for item in items:
        for name, why in KNOWN_FAILURES.items():
            if name in item.name:
                item.add_marker(pytest.mark.xfail(reason=why, raises=AssertionError))
    if config.option.markexpr:
        return
    long = [item for item in items if item.get_closest_marker("long")]
    if long:
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in set(long)]


# A second in the interpreter, or in the emulation, is what a card does in microseconds. So `make
# test` goes through this many cases of every test with the fixture `backend`, none of which takes
# many seconds: of Triton's kernels, and of those in CUDA C++, whose edges of tiles, orders of
# blocks and accesses outside of tensors are tested in test_cuda_*.py. 0 leaves a file to the long
# run: what it tests is the same code for every backend, or stands in a file of the backend's own. A
# file may say its numbers itself, as SAMPLED_CASES = {"triton": 2, "cuda": 1}. Of a test marked
# in_full("cuda") every case is run: nothing else in `make test` shows what those kernels do there.
SAMPLED_CASES = {
    "test_defaults.py": {"triton": 6, "cuda": 4},
    "test_deva.py": {"triton": 1, "cuda": 1},
    "test_dispatch.py": {"triton": 0, "cuda": 0},
    "test_eigenbasis.py": {"triton": 1, "cuda": 1},
    "test_failure_modes.py": {"triton": 0, "cuda": 1},
    "test_hyperball.py": {"triton": 1, "cuda": 0},
    "test_inverse_root.py": {"triton": 1, "cuda": 1},
    "test_inverse_root_structures.py": {"triton": 1, "cuda": 2},
    "test_kron_factor.py": {"triton": 2, "cuda": 1},
    "test_muon_step.py": {"triton": 2, "cuda": 1},
    "test_narrow_momentum.py": {"triton": 1, "cuda": 0},
    "test_narrow_moments.py": {"triton": 2, "cuda": 0},
    "test_neurons.py": {"triton": 0, "cuda": 0},
    "test_newton_schulz.py": {"triton": 2, "cuda": 1},
    "test_nonfinite.py": {"triton": 3, "cuda": 3},
    "test_ops.py": {"triton": 0, "cuda": 1},
    "test_optim_split.py": {"triton": 0, "cuda": 1},
    "test_polar.py": {"triton": 2, "cuda": 1},
    "test_red_zones.py": {"triton": 0, "cuda": 0},
    "test_shampoo_step.py": {"triton": 1, "cuda": 1},
    "test_soap_step.py": {"triton": 1, "cuda": 1},
    "test_symmetric_matmul.py": {"triton": 2, "cuda": 1},
    "test_threads.py": {"triton": 0, "cuda": 0},
}
# Where a backend does not keep a rule that the CPU kernels keep. CUDA's products are of fp16 halves
# of a matrix scaled as a whole: they keep 22 bits of its largest elements, fewer of those below
# 2^-14 of them, and nothing below 2^-38.
KNOWN_FAILURES = {
    "test_rows_far_below_the_largest[cuda-": "rows far below the largest lose digits",
    "test_an_overflow_stays_where_torch_has_it[cuda-bfloat16": "small elements beside huge ones",
    "test_an_overflow_stays_where_it_is[cuda-bfloat16": "small elements beside huge ones",
    "test_a_ridge_far_below_the_spectrum_costs_no_accuracy[cuda-10.0-1-float32": "22 bits",
    "test_every_block_keeps_the_error_rule[cuda-one-hot-1": "22 bits of the largest block",
    "test_every_block_keeps_the_error_rule[cuda-one-hot-2": "22 bits of the largest block",
    "test_every_block_keeps_the_error_rule[cuda-one-hot-3": "22 bits of the largest block",
    "test_every_block_keeps_the_error_rule[cuda-zero block-1": "22 bits of the largest block",
    "test_every_block_keeps_the_error_rule[cuda-zero block-3": "22 bits of the largest block",
    "test_every_block_keeps_the_error_rule[cuda-blocks": "22 bits of the largest block",
    "test_every_block_keeps_the_error_rule[cuda-graded-1": "22 bits of the largest block",
    "test_every_block_keeps_the_error_rule[cuda-diagonal-1": "22 bits of the largest block",
    "test_steps_and_residual_are_the_specifications[cuda-4-float32": "a step more, by rounding",
    "test_every_block_keeps_the_error_rule[triton-zero block-1": "1.3 times what the rule allows",
}
_SLOW = (
    *("awkward", "convergent", "deepseek", "polar_express_8", "127", "130", "trajectory"),
    *("every_small", "band", "steps", "long_run", "same_update", "test_first_step", "2, 0, 4"),
)


def _sampled(item: pytest.Item) -> dict[str, int]:
    own = getattr(getattr(item, "module", None), "SAMPLED_CASES", None)
    return own or SAMPLED_CASES.get(item.path.name, {})


def _in_full(item: pytest.Item, backend: str) -> bool:
    """Whether no case on this backend is left to the long run, see the marker."""
    return any(backend in mark.args for mark in item.iter_markers("in_full"))


def _leave_most_to_the_long_run(items: list[pytest.Item]) -> None:
    functions: dict[tuple[str, str], list[pytest.Item]] = collections.defaultdict(list)
    sampled, kept = set(), set()
    for item in items:
        params = getattr(item, "callspec", None)
        name = params.params.get("backend") if params else None
        # Other tests have parameters of that name too.
        if not item.get_closest_marker(MARKS.get(name, "none")):
            continue
        if not _sampled(item):
            raise pytest.UsageError(
                f"{item.path.name} has tests of every backend, and no SAMPLED_CASES: how many cases"
                " `make test` runs of each, see tests/conftest.py"
            )
        sampled.add(item)
        possible = torch.float64 not in params.params.values()
        if possible and _in_full(item, name):
            kept.add(item)
        elif possible and not any(word in item.name for word in _SLOW):
            functions[name, item.nodeid.partition("[")[0]].append(item)
    for (name, _), cases in functions.items():
        most = _sampled(cases[0])[name]
        if most:
            step = max(1, -(-len(cases) // most))
            kept.update(cases[step // 2 :: step])
    for item in sampled - kept:
        if not item.get_closest_marker("kernel"):
            item.add_marker("long")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Where a GPU has no kernel for a case, it says so, and the case is none of its tests.

    Of a test that is run there in full, only what has no kernel at all.
    """
    try:
        return (yield)
    except RuntimeError as error:
        gpu = [name for name, mark in MARKS.items() if item.get_closest_marker(mark)]
        refused = gpu and str(error).startswith("backend cannot run")
        if refused and (not _in_full(item, gpu[0]) or "there is no" in str(error)):
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


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    """Processes that stay for the whole run, for tests of several ranks."""
    found = Workers()
    yield found
    found.close()
