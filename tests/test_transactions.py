"""Steps that are interrupted, that fail, that go on for long, and that run in a forked child."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import os
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch
from spectral_kernels.optim._interrupts import uninterrupted
from support.optimizers import CONFIGS, FEW, parameter, with_grads
from support.states import assert_same, snapshot
from torch import nn

SHAPES = ((6, 8), (7,), (5, 5), (3,))


pytestmark = pytest.mark.usefixtures("one_thread", "interruptible")


@pytest.fixture
def interruptible():
    """Ctrl-C raises, also where a shell started the tests in the background and ignores it."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def made(name: str, taken: int) -> torch.optim.Optimizer:
    """An optimizer over matrices and vectors after some steps, with gradients for the next."""
    params = [parameter(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    optimizer = CONFIGS[name](params)
    optimizer.init_state()
    for seed in range(taken):
        with_grads(params, seed)
        optimizer.step()
    with_grads(params, 9)
    return optimizer


def step_with_interrupt(optimizer: torch.optim.Optimizer, at: int) -> tuple[int, bool]:
    """A step with Ctrl-C at a line of the library or of torch.optim; lines, and whether it came."""
    count = 0

    def line(frame, event, argument):
        nonlocal count
        if event == "line":
            count += 1
            if count == at:
                sys.settrace(None)
                signal.raise_signal(signal.SIGINT)
        return line

    def call(frame, event, argument):
        name = frame.f_code.co_filename
        return line if "spectral_kernels" in name or "torch/optim" in name else None

    previous = sys.gettrace()
    sys.settrace(call)
    try:
        optimizer.step()
    except KeyboardInterrupt:
        return count, True
    finally:
        sys.settrace(previous)
    return count, False


def equal(one: object, other: object) -> bool:
    try:
        assert_same(one, other)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("taken", [0, 2])
@pytest.mark.parametrize("name", FEW)
def test_an_interrupt_leaves_the_state_before_or_after(name, taken):
    optimizer = made(name, taken)
    before = snapshot(optimizer)
    lines, interrupted = step_with_interrupt(optimizer, 0)
    assert not interrupted
    after = snapshot(optimizer)
    assert not equal(before, after)
    found = set()
    # Every 41st line, beginning at others for other optimizers.
    for at in range(1 + 5 * FEW.index(name) + taken, lines, 41):
        optimizer = made(name, taken)
        _, interrupted = step_with_interrupt(optimizer, at)
        assert interrupted, at
        now = snapshot(optimizer)
        found.add("before" if equal(now, before) else "after" if equal(now, after) else at)
    assert found <= {"before", "after"}
    assert "after" in found
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_interrupt_does_not_wait():
    reached = []

    @uninterrupted
    def endless() -> None:
        signal.raise_signal(signal.SIGINT)
        reached.append("first")
        signal.raise_signal(signal.SIGINT)
        reached.append("second")

    with pytest.raises(KeyboardInterrupt):
        endless()
    assert reached == ["first"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_users_handler_gets_the_interrupt_once(monkeypatch):
    seen = []
    mine = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        optimizer = made("muon", 1)
        optimizer.register_step_post_hook(lambda *_: seen.append("end"))
        _, interrupted = step_with_interrupt(optimizer, 60)
        assert not interrupted
        assert seen == [signal.SIGINT, "end"]
    finally:
        signal.signal(signal.SIGINT, mine)


def test_other_threads_and_default_handlers_are_left_alone():
    optimizer = made("muon", 1)
    thread = threading.Thread(target=optimizer.step)
    thread.start()
    thread.join()
    previous = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        optimizer.step()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, previous)
    states = [optimizer.state[p]["step"] for p in optimizer.param_groups[0]["params"]]
    assert all(step == 3 for step in states)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("name", FEW)
def test_an_exception_in_a_closure_changes_nothing(name, error):
    optimizer = made(name, 2)
    before = snapshot(optimizer)
    grads = [p.grad.clone() for group in optimizer.param_groups for p in group["params"]]

    def closure() -> None:
        assert torch.is_grad_enabled()
        raise error("out of it")

    with pytest.raises(error, match="out of it"):
        optimizer.step(closure)
    assert_same(snapshot(optimizer), before)
    assert_same([p.grad for g in optimizer.param_groups for p in g["params"]], grads)
    # As if it had not been.
    other = made(name, 2)
    optimizer.step()
    other.step()
    assert_same(snapshot(optimizer), snapshot(other))


def resident() -> int:
    """Bytes of memory of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def growth(name: str, first: int, last: int) -> int:
    """Of memory between two steps, on twelve matrices and their biases."""
    shapes = [(16 + i, 24 - i) for i in range(12)]
    params = [parameter(*shape, seed=i) for i, shape in enumerate(shapes)]
    params += [parameter(shape[0]) for shape in shapes]
    optimizer = CONFIGS[name](params)
    grads = [torch.randn_like(p) for p in params]
    start = 0
    for step in range(last):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad if step % 2 else grad.clone()
        optimizer.step()
        if step % 100 == 0:
            copy.deepcopy(optimizer.state_dict())
        if step == first:
            start = resident()
    return resident() - start


statm = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc/self/statm")


@statm
@pytest.mark.parametrize("name", FEW)
def test_memory_does_not_grow(name):
    assert growth(name, 100, 300) <= 2 * 2**20


@statm
@pytest.mark.long
@pytest.mark.parametrize("name", CONFIGS)
def test_memory_does_not_grow_in_a_long_run(name):
    assert growth(name, 500, 20_000) <= 2 * 2**20


def child(name: str, connection) -> None:
    signal.alarm(60)
    # As DataLoader's workers do: the parent's OpenMP threads are gone, and libgomp does not know.
    torch.set_num_threads(1)
    optimizer = made(name, 3)
    connection.send([p.tolist() for p in snapshot(optimizer)[0]])
    connection.close()
    os._exit(0)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("name", FEW)
def test_optimizers_step_in_a_forked_child(name):
    torch.set_num_threads(2)
    warm = nn.Parameter(torch.randn(200, 300))
    optimizer = CONFIGS[name]([warm])
    with_grads([warm])
    optimizer.step()
    mine, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=child, args=(name, theirs))
    process.start()
    theirs.close()
    try:
        assert mine.poll(90), "the forked child hangs"
        expected = [p.tolist() for p in snapshot(made(name, 3))[0]]
        assert mine.recv() == expected
    finally:
        process.join(30)
    assert process.exitcode == 0
