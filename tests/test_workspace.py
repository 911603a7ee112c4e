"""Scratch memory: kept and lent again, bounded, and never part of a result."""

from __future__ import annotations

import threading

import pytest
import spectral_kernels as sk
import torch
from spectral_kernels import _extension
from support import case, gaussian, labels, same_bits, semidefinite

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
