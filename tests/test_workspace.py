"""Scratch memory: kept and lent again, bounded, and never part of a result."""

from __future__ import annotations

import itertools
import threading

import pytest
import spectral_kernels as sk
import torch
from spectral_kernels import _extension
from support.cases import case, labels
from support.fuzzing import instruction_set
from support.inputs import gaussian, semidefinite
from support.layouts import same_bits
from torch.profiler import ProfilerActivity, profile

pytestmark = pytest.mark.usefixtures("native")
workspace = _extension.MODULE


@pytest.fixture(autouse=True)
def as_it_was():
    limit = workspace.workspace_limit()
    workspace.release_workspace()
    workspace.reset_workspace_peak()
    yield
    workspace.set_workspace_limit(limit)
    workspace.release_workspace()


def iterate(n=200):
    return sk.newton_schulz(gaussian(n, 2 * n))


def test_blocks_are_kept_and_lent_again():
    iterate()
    kept = workspace.workspace_kept()
    assert kept > 0
    for _ in range(10):
        iterate()
    assert workspace.workspace_kept() == kept


def test_kept_memory_obeys_the_limit():
    expected = iterate()
    workspace.set_workspace_limit(1 << 20)
    assert workspace.workspace_kept() <= 1 << 20
    assert same_bits(iterate(), expected)
    assert workspace.workspace_kept() <= 1 << 20
    workspace.set_workspace_limit(0)
    assert workspace.workspace_kept() == 0
    assert same_bits(iterate(), expected)
    assert workspace.workspace_kept() == 0


def test_release_gives_everything_back():
    iterate()
    workspace.release_workspace()
    assert workspace.workspace_kept() == 0


def test_peak_is_what_was_lent_at_one_time():
    torch.set_num_threads(1)
    iterate(50)
    small = workspace.workspace_peak()
    iterate(200)
    large = workspace.workspace_peak()
    # A handful of panels of X and of X X^T, in fp32 (one block is rounded up to 2 MiB).
    assert 0 < small < large <= 12 * 200 * 400 * 4 + (2 << 20)
    workspace.reset_workspace_peak()
    assert workspace.workspace_peak() == 0
    iterate(50)
    assert workspace.workspace_peak() == small


def test_a_batch_on_one_thread_needs_no_more_than_a_matrix():
    torch.set_num_threads(1)
    iterate(50)
    one = workspace.workspace_peak()
    sk.newton_schulz(gaussian(20, 50, 100))
    assert workspace.workspace_peak() == one


def packed(rows, columns, size=4):
    """Bytes of a packed matrix at most; panels are up to 32 columns wide."""
    return rows * (columns + 31) * size


def x_bytes(m, n):
    return max(packed(m, n), packed(n, m))


def of_iteration(m, n):
    s = min(m, n)
    return 4 * x_bytes(m, n) + 5 * packed(s, s) + packed(s, s, 2)


def of_step(m, n):  # and copies of the parameter and its momentum
    return of_iteration(m, n) + 2 * 4 * m * n


def of_root(m, _):
    return 11 * packed(m, m) + 3 * packed(m, 8)


def roots(xs):  # of the m x m factors
    factors = torch.stack([x @ x.mT for x in xs.float()])
    return lambda: sk.inverse_root(factors, 4, relative_ridge=1e-4)


def muon(xs):
    grads, buffers = [x.clone() for x in xs], [torch.zeros_like(x, dtype=torch.float32) for x in xs]
    return lambda: sk.muon_step_(list(xs), grads, buffers, lr=0.1)


# Operator -> a call on a batch, the bound of one thread's packed copies (csrc/cpu/workspace.h), and
# whether it returns new matrices.
BOUNDED = {
    "gram": (lambda xs: lambda: sk.gram(xs), x_bytes, True),
    "newton_schulz": (lambda xs: lambda: sk.newton_schulz(xs), of_iteration, True),
    "muon_step_": (muon, of_step, False),
    "inverse_root": (roots, of_root, True),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(180, 240), (60, 500), (210, 70)])
@pytest.mark.parametrize("op", BOUNDED)
def test_packed_copies_are_those_of_one_matrix_a_thread(op, shape, dtype, count, threads):
    make, bound, _ = BOUNDED[op]
    torch.set_num_threads(threads)
    call = make(gaussian(count, *shape).to(dtype))
    for isa in workspace.supported_isas():
        with instruction_set(isa):
            workspace.release_workspace()
            workspace.reset_workspace_peak()
            call()
            pages = 4 * 4096  # blocks are whole pages; these are below 2 MiB, where pages grow
            assert workspace.workspace_peak() <= min(threads, count) * (bound(*shape) + pages)
            # With tiles, gram reads rows of bfloat16 where they are.
            in_place = (op, dtype, isa) == ("gram", torch.bfloat16, "amx")
            assert (workspace.workspace_peak() == 0) == in_place


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("route", ["own", "lapack"])
def test_memory_of_an_eigenbasis(route, threads):
    n, count = 210, 3
    factors = torch.stack([semidefinite(n, 1e3, seed) for seed in range(count)]).float()
    torch.set_num_threads(threads)
    squares = 2 * n * n * 8
    bound = squares + (5.5 * packed(n, n, 8) + packed(384, n, 8) if route == "own" else 0)
    bound = max(bound, squares + 2 * packed(n, n, 8)) + (2 << 20) + 4 * 4096
    workspace.set_eigen_route(route)
    try:
        for isa in workspace.supported_isas():
            with instruction_set(isa):
                workspace.release_workspace()
                workspace.reset_workspace_peak()
                sk.eigenbasis(factors)
                assert 0 < workspace.workspace_peak() <= threads * bound
    finally:
        workspace.set_eigen_route("auto")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", BOUNDED)
def test_torch_memory_beyond_the_results(op, dtype):
    make, _, returns = BOUNDED[op]
    torch.set_num_threads(1)  # the profiler does not see other threads
    largest = 120 * 150 * 4
    call = make(gaussian(5, 120, 150).to(dtype))
    torch_peak(call)  # the first profile of a process can miss what happens in it
    result = call()
    of_results = result.numel() * result.element_size() if returns else 0
    assert of_results <= torch_peak(call) <= of_results + 2 * largest


def torch_peak(call):
    """The most that torch's allocator had lent at one time during a call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = call()
    del result
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0))


def test_an_error_gives_its_blocks_back():
    iterate()
    kept = workspace.workspace_kept()
    for _ in range(5):
        with pytest.raises(ValueError):
            torch.ops.spectral_kernels.inverse_root(
                semidefinite(50, 10.0), 99, ridge=0.0, relative_ridge=0.0, method="auto"
            )
    assert workspace.workspace_kept() == kept


def test_small_requests_leave_large_blocks_alone():
    iterate(400)
    large = workspace.workspace_kept()
    sk.gram(gaussian(4, 4))
    iterate(400)
    assert large <= workspace.workspace_kept() <= large + 4096 * 4


def test_threads_share_the_pool():
    threads = [threading.Thread(target=lambda: [iterate(60) for _ in range(10)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0 < workspace.workspace_kept() <= workspace.workspace_limit()


@pytest.mark.parametrize("label", labels())
def test_results_do_not_depend_on_what_the_memory_held(label):
    poisoned = case(label).run("cpu")
    workspace.poison_workspace(False)
    try:
        iterate(100)  # leaves other numbers behind
        assert same_bits(case(label).run("cpu"), poisoned)
    finally:
        workspace.poison_workspace(True)


def test_memory_does_not_grow():
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    def round_of_calls():
        for label in labels():
            case(label).run("cpu")

    for _ in range(3):
        round_of_calls()
    before = resident()
    for _ in range(20):
        round_of_calls()
    assert resident() - before < 4 << 20
