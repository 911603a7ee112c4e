"""Same bits for any number of threads, any neighbours, again and again; forks and user threads."""

from __future__ import annotations

import concurrent.futures
import functools
import multiprocessing
import os
import signal
import threading
import time
from functools import partial

import pytest
import spectral_kernels as sk
import torch
from support.cases import STEPS, Case, case, labels, later_step
from support.inputs import gaussian, orthogonal, semidefinite
from support.layouts import same_bits

pytestmark = pytest.mark.usefixtures("backend")


def spd(n, condition, dtype=torch.float32):
    return semidefinite(n, condition).to(dtype)


# Large enough that one matrix is spread over threads, and batches that are worked on side by side.
LARGE = {
    "gram": lambda: (sk.gram, gaussian(150, 700)),
    "gram bf16": lambda: (sk.gram, gaussian(200, 500).bfloat16()),
    "gram of a batch": lambda: (sk.gram, gaussian(7, 40, 90)),
    "newton_schulz": lambda: (sk.newton_schulz, gaussian(150, 600)),
    "newton_schulz bf16": lambda: (sk.newton_schulz, gaussian(260, 200).bfloat16()),
    "newton_schulz fp64": lambda: (sk.newton_schulz, gaussian(120, 120).double()),
    "newton_schulz of a batch": lambda: (sk.newton_schulz, gaussian(9, 24, 40)),
    "polar": lambda: (sk.polar, gaussian(3, 60, 40)),
    "kron_precondition": lambda: (
        sk.kron_precondition,
        *(gaussian(m, n) for m, n in ((200, 300), (200, 200), (300, 300))),
    ),
    "inverse_root": lambda: (ridged_root, spd(200, 1e4)),
    "inverse_root eigen": lambda: (partial(sk.inverse_root, p=4), spd(90, 1e3)),
    "eigenbasis": lambda: (sk.eigenbasis, spd(90, 1e3)),
    "eigenbasis of a batch": lambda: (
        sk.eigenbasis,
        torch.stack([semidefinite(40, 1e3, seed) for seed in range(5)]),
    ),
    "refresh_eigenbasis": lambda: (
        sk.refresh_eigenbasis,
        orthogonal(150).float(),
        spd(150, 1e4),
    ),
}

ridged_root = partial(sk.inverse_root, p=4, relative_ridge=1e-5)


@functools.cache
def large(name: str) -> tuple:
    """The function and its inputs, made once: torch's own products depend on the threads."""
    return LARGE[name]()


def run_large(name: str, threads: int) -> object:
    function, *inputs = large(name)
    torch.set_num_threads(threads)
    return function(*inputs)


@pytest.mark.parametrize("name", LARGE)
def test_functions_give_the_same_bits_on_any_number_of_threads(name, backend):
    if backend.name == "reference":
        pytest.skip("torch's own products promise nothing")
    expected = run_large(name, 1)
    for count in (2, 3, 1):
        assert same_bits(run_large(name, count), expected), count


@pytest.mark.parametrize("op", STEPS)
def test_steps_give_the_same_bits_on_any_number_of_threads(op, backend):
    if backend.name == "reference":
        pytest.skip("torch's own products promise nothing")
    one = later_step(op, ((130, 190), (3, 20, 30), (64, 64), (200, 8), (5, 5)), taken=1)
    expected = one.clone().run(backend.name)
    for count in (2, 3):
        torch.set_num_threads(count)
        assert same_bits(one.clone().run(backend.name), expected), count


@pytest.mark.parametrize("label", labels())
def test_repeated_calls_give_the_same_bits(label, backend):
    expected = case(label).run(backend.name)
    for _ in range(20 if backend.name == "cpu" else 2):
        assert same_bits(case(label).run(backend.name), expected)


def entry(one: Case, i: int) -> Case:
    """Entry i of the lists of a step, alone."""
    lists = [name for name in ("grads", *one.names(write=True)) if name != "skipped"]
    options = {
        name: [one.options[name][i]]
        for name in ("scales", "restarts", "refresh")
        if name in one.options
    }
    return one.clone().with_(**{name: [one[name][i]] for name in lists}, **options).clone()


@pytest.mark.parametrize("op", STEPS)
def test_an_entry_does_not_see_its_neighbours(op, backend):
    shapes = ((5, 8), (2, 6, 3), (12, 12), (1, 9), (40, 70))
    one = later_step(op, shapes, taken=2)
    together = one.clone()
    together.run(backend.name)
    for i in range(len(shapes)):
        alone = entry(one, i)
        alone.run(backend.name)
        for name in alone.names(write=True):
            if name != "skipped":
                assert same_bits(alone[name][0], together[name][i]), (name, i)


@pytest.mark.parametrize("op", STEPS)
def test_a_batch_is_as_its_matrices(op, backend):
    """F21: leading dimensions are a batch, whatever they stand for."""
    one = later_step(op, ((3, 6, 5),), taken=2)
    together = one.clone()
    together.run(backend.name)
    lists = [
        name for name in ("grads", *one.names(write=True)) if name not in ("skipped", "step_counts")
    ]
    for k in range(3):
        alone = one.clone()
        alone = alone.with_(
            **{name: [x[k].clone() if x.numel() else x for x in alone[name]] for name in lists},
            step_counts=[alone["step_counts"][0].clone()],
        )
        alone.run(backend.name)
        for name in lists:
            x = together[name][0]
            assert same_bits(alone[name][0], x[k] if x.numel() else x), name


@pytest.mark.parametrize("op", STEPS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_F04_a_skipped_matrix_keeps_every_bit_and_harms_nobody(op, value, backend):
    shapes = ((5, 8), (3, 6, 5), (7, 7))
    one = later_step(op, shapes, taken=2, per_matrix_counts=True)
    clean = one.clone()
    clean.run(backend.name)
    for corner in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        dirty = one.clone()
        dirty["grads"][1][1][corner] = value
        dirty.run(backend.name)
        assert int(dirty["skipped"]) == 1
        for name in dirty.names(write=True):
            if name == "skipped":
                continue
            for i in (0, 2):
                assert same_bits(dirty[name][i], clean[name][i]), name
            ours, old, mates = dirty[name][1], one[name][1], clean[name][1]
            if ours.numel():
                assert same_bits(ours[1], old[1]), name
                assert same_bits((ours[0], ours[2]), (mates[0], mates[2])), name


@pytest.mark.parametrize("op", STEPS)
def test_F04_non_finite_state_is_skipped_too(op, backend):
    one = later_step(op, ((5, 8), (7, 7)), taken=2)
    momentum = one.names(write=True)[1]
    one[momentum][0][2, 3] = torch.nan
    before = one.clone()
    one.run(backend.name)
    assert int(one["skipped"]) == 1 and one["step_counts"][0] == before["step_counts"][0]
    assert same_bits(one["params"][0], before["params"][0])
    assert same_bits(one[momentum][0], before[momentum][0])


@pytest.mark.parametrize("op", STEPS)
def test_skipped_matrices_are_added_to_the_count(op, backend):
    one = later_step(op, ((5, 8), (3, 6, 5), (7, 7)), taken=2, per_matrix_counts=True)
    one["skipped"].fill_(40)
    one["grads"][0][0, 0] = one["grads"][1][2, 1, 1] = torch.nan
    for total in (42, 44):
        one.run(backend.name)
        assert int(one["skipped"]) == total


@pytest.mark.parametrize("op", STEPS)
def test_F04_other_policies(op, backend):
    one = later_step(op, ((5, 8), (7, 7)), taken=2)
    one["grads"][1][0, 0] = torch.inf
    before = one.clone()
    with pytest.raises(ValueError, match=r"grads\[1\]"):
        one.with_(nonfinite="raise").run(backend.name)
    assert same_bits(one.written(), before.written())
    spread = one.with_(nonfinite="propagate")
    spread.run(backend.name)
    assert int(spread["skipped"]) == 0
    assert spread["params"][1].isnan().any()
    assert spread["params"][0].isfinite().all()


def run_all(backend: str) -> list[list[torch.Tensor]]:
    return [case(label).run(backend) for label in labels()]


def test_F60_eight_user_threads(backend):
    expected = run_all(backend.name)
    rounds = 6 if backend.name == "cpu" else 1
    start = threading.Barrier(8)

    def work(_: int) -> bool:
        start.wait()
        with sk.use_backend(backend.name):
            return all(same_bits(run_all(backend.name), expected) for _ in range(rounds))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def test_the_interpreter_runs_while_an_operator_does(backend):
    if backend.name == "reference":
        pytest.skip("it is Python itself")
    x = semidefinite(800, 1e3)
    worker = threading.Thread(target=sk.inverse_root, args=(x, 4), kwargs={"ridge": 1e-4})
    ticks = 0
    worker.start()
    while worker.is_alive():
        ticks += 1
        time.sleep(0)
    # With the lock held there would be one or two.
    assert ticks > 20


def child(backend: str, connection) -> None:
    signal.alarm(40)
    # As DataLoader's workers do. With more threads torch.mm hangs as well: the parent's OpenMP
    # threads are gone, and libgomp does not know.
    torch.set_num_threads(1)
    results = run_all(backend) + [run_large(name, 1) for name in LARGE]
    connection.send(len(results))
    connection.close()
    os._exit(0)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_F59_operators_run_in_a_forked_child(backend):
    if backend.isa not in (None, "baseline"):
        pytest.skip("threads know nothing of instruction sets")
    for name in LARGE:
        run_large(name, 2)
    mine, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=child, args=(backend.name, theirs))
    process.start()
    theirs.close()
    try:
        assert mine.poll(60), "the forked child hangs"
        assert mine.recv() == len(labels()) + len(LARGE)
    finally:
        process.join(30)
    assert process.exitcode == 0


class Bases(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> torch.Tensor:
        return sk.eigenbasis(sk.gram(gaussian(60, 90, seed=i)))[1]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_F59_operators_run_in_a_data_loader(backend):
    if backend.isa not in (None, "baseline"):
        pytest.skip("threads know nothing of instruction sets")
    run_large("eigenbasis", 2)
    loader = torch.utils.data.DataLoader(Bases(), num_workers=1, timeout=60)
    results = torch.cat(list(loader))
    assert same_bits(results, torch.stack([Bases()[i] for i in range(4)]))
