"""Steps on a card that is not there: launches are counted, and nothing waits for the device.

Tensors are on the meta device, which has shapes and no values: whatever asks for a value fails, so
what passes can be captured in a CUDA graph. Launches of the kernels are counted in place of being
run, and so are calls of torch, which launch at least one kernel each.
"""

from __future__ import annotations

import collections
import contextlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.cases import STEPS, Case, case, new_step
from support.inputs import orthogonal, semidefinite
from support.layouts import same_bits
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

pytestmark = [pytest.mark.triton, pytest.mark.kernel]

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

SHAPES = ((96, 200), (300, 70), (2, 150, 150))

# Step, whether it refreshes -> launches of kernels, calls of torch, for every distinct shape.
MOST = {
    ("muon_step_", 0): (8, 2),
    ("shampoo_step_", 0): (6, 2),
    ("shampoo_step_", 1): (120, 670),
    ("soap_step_", 0): (6, 1),
    ("deva_step_", 0): (16, 2),
}


class Calls(TorchDispatchMode):
    """Counts what launches something; a tensor may not come to the card, nor leave it."""

    _FREE = ("empty", "new_empty", "empty_like", "empty_strided", "detach")

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        found = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        on_card = any(x.is_meta for x in found)
        # A number of torch's own is passed by value.
        assert not on_card or all(x.is_meta or x.ndim == 0 for x in found), f"{func} moves a tensor"
        name = func.overloadpacket.__name__
        if on_card and not func.is_view and name not in self._FREE:
            self.counts[name] += 1
        return out


def modules() -> list[ModuleType]:
    """All of them, imported before any is patched: a later one would take over what stands in."""
    package = importlib.import_module("spectral_kernels.triton_kernels")
    names = [x.stem for x in Path(package.__file__).parent.glob("*.py") if x.stem != "__init__"]
    return [importlib.import_module(f"{package.__name__}.{name}") for name in sorted(names)]


def forget_tables() -> None:
    for module in modules():
        for value in vars(module).values():
            if hasattr(value, "cache_clear") and not isinstance(value, type):
                value.cache_clear()


@pytest.fixture
def count(monkeypatch):
    """Runs a case on a pretended sm_90: launches of kernels, and calls of torch."""
    launched = collections.Counter()
    stand_ins = {
        "launch": lambda kernel, programs, *_, **__: launched.update([kernel.__name__]),
        "architecture": lambda device: "sm_90",
        "upload": lambda table, device: torch.empty(table.shape, dtype=table.dtype, device=device),
    }
    for module in modules():
        for name in stand_ins.keys() & vars(module).keys():
            monkeypatch.setattr(module, name, stand_ins[name])
    addresses: dict[int, int] = {}
    monkeypatch.setattr(
        torch.Tensor, "data_ptr", lambda x: addresses.setdefault(id(x), len(addresses) << 40)
    )
    # There is none for this device.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    forget_tables()

    def run(one: Case) -> tuple[collections.Counter[str], collections.Counter[str]]:
        one = Case(one.op, tree_map(moved, one.args), one.options)
        bases = importlib.import_module("spectral_kernels.triton_kernels.eigenbasis")
        for name in ("left_bases", "right_bases"):
            for q in one[name] if name in one.names(write=True) else ():
                bases._initialised[q] = True
        launched.clear()
        step = importlib.import_module("spectral_kernels.triton_kernels").operator(one.op)
        with Calls() as calls:
            step(*one.args, **one.options)
        return launched.copy(), calls.counts

    yield run
    forget_tables()


def moved(x: object) -> object:
    if not isinstance(x, torch.Tensor):
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def step_of(op: str, shapes: tuple[tuple[int, ...], ...], refresh: int) -> Case:
    options = {} if op == "muon_step_" else {"refresh": [refresh] * len(shapes)}
    if op in ("muon_step_", "deva_step_"):
        options["compute_dtype"] = torch.bfloat16
    return new_step(op, shapes, **options)


@pytest.mark.parametrize(("op", "refresh"), MOST, ids=str)
def test_a_step_waits_for_nothing_and_its_launches_are_those_of_its_shapes(op, refresh, count):
    few = count(step_of(op, SHAPES * 2, refresh))
    many = count(step_of(op, SHAPES * 4, refresh))
    assert [x.total() for x in many] == [x.total() for x in few]
    assert many[0].total() > 0
    for found, most in zip(many, MOST[op, refresh], strict=True):
        assert found.total() <= most * len(SHAPES), found.most_common(10)


def specialised(kernel, args):
    """What of a launch's arguments Triton compiles for: alignment of addresses, and of numbers."""
    given = getattr(kernel, "kwargs", {})  # of the interpreter's functions
    free = getattr(kernel, "do_not_specialize", None) or given.get("do_not_specialize") or ()
    for name, value in zip(kernel.arg_names, args, strict=False):
        if isinstance(value, torch.Tensor):
            yield name, value.dtype, value.storage_offset() * value.element_size() % 16 == 0
        elif isinstance(value, int) and not isinstance(value, bool) and name not in free:
            yield name, value == 1, value % 16 == 0


@pytest.mark.parametrize(("op", "refresh"), MOST, ids=str)
def test_no_length_of_a_list_is_compiled_for(op, refresh, count, monkeypatch):
    """Kernels that lists of 8 take are those that lists of 5, 6 and 7 take."""
    seen = collections.defaultdict(set)

    def launch(kernel, programs, *args, **options):
        constants = tuple(sorted((k, str(v)) for k, v in options.items()))
        seen[kernel.__name__].add((tuple(specialised(kernel, args)), constants))

    for module in modules():
        if "launch" in vars(module):
            monkeypatch.setattr(module, "launch", launch)
    count(step_of(op, ((96, 200),) * 8, refresh))
    first = {name: set(keys) for name, keys in seen.items()}
    assert first
    for length in (5, 6, 7):
        count(step_of(op, ((96, 200),) * length, refresh))
    assert seen == first


# Launches of a step over a list of two shapes, whatever its length, and calls of functions of the
# package in Python, at most: what takes the time of the host.
WORK = {
    "muon_step_": (23, 400),
    "soap_step_": (17, 250),
    "shampoo_step_": (18, 250),
    "deva_step_": (42, 460),
}


@pytest.mark.parametrize("new", [False, True], ids=["same-gradients", "new-gradients"])
@pytest.mark.parametrize("op", WORK)
def test_python_work_does_not_grow_with_the_list(op, new):
    """No function is called for every entry, and at most addresses are uploaded."""
    from triton_host_time import lists_of, moved as apart, step_of, stubbed

    calls: collections.Counter[str] = collections.Counter()

    def note(frame, event, arg):
        path = Path(frame.f_code.co_filename)
        inside = path.parent.name in ("triton_kernels", "spectral_kernels")
        # The public function looks at the type of everything that it is given.
        if event == "call" and inside and path.stem != "_checks":
            calls[f"{path.stem}.{frame.f_code.co_name}"] += 1

    def work(shapes):
        args = lists_of(shapes, op)
        with stubbed() as stubs:
            for grads in apart(args[1], 3) if new else [args[1]] * 3:
                step, stubs.launches, stubs.uploads = step_of(args, grads, op), 0, 0
                calls.clear()
                sys.setprofile(note)
                step()
                sys.setprofile(None)
        return calls.copy(), stubs.launches, stubs.uploads

    forget_tables()
    few, many = (work(((96, 200), (700, 80)) * count) for count in (2, 20))
    forget_tables()
    for one, other in zip(few, many, strict=True):
        assert one == other
    launches, most = WORK[op]
    assert many[0].total() <= most, many[0].most_common(10)
    assert many[1:] == (launches, int(new))


class Memory(TorchDispatchMode):
    """The most bytes that tensors made inside have at a time."""

    def __init__(self) -> None:
        super().__init__()
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {_storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.is_meta and _storage(x) not in given:
                storage = x.untyped_storage()
                self._live[_storage(x)] = StorageWeakRef(storage), storage.nbytes()
        self._live = {key: x for key, x in self._live.items() if not x[0].expired()}
        self.most = max(self.most, sum(size for _, size in self._live.values()))
        return out


def _storage(x: torch.Tensor) -> int:
    return x.untyped_storage()._cdata


# As many of 768 x 3072 as are worked on at a time, at most.
FULL = 28


@pytest.mark.parametrize("op", ["shampoo_step_", "soap_step_", "deva_step_"])
def test_temporaries_do_not_grow_with_the_list(op, count):
    """For 72 hidden layers of GPT-2s less than their state takes, as entries and as a batch."""
    one = step_of(op, ((768, 3072),), 0)

    def temporaries(args, entries):
        options = {
            name: list(one.options[name]) * entries
            for name in ("scales", "refresh")
            if name in one.options
        }
        memory = Memory()
        with memory:
            count(Case(op, args, {**one.options, **options}))
        return memory.most - size_of(args)

    def size_of(args):
        return sum(x.numel() * x.element_size() for x in tree_leaves(args) if x.ndim)

    few, many = (tuple(x * n if isinstance(x, list) else x for x in one.args) for n in (FULL, 72))
    batch = tuple(
        [x[0].new_empty(72, *x[0].shape, device="meta") if x[0].numel() else x[0]]
        if isinstance(x, list)
        else x
        for x in one.args
    )
    least = temporaries(few, FULL)
    state = size_of(many) - 2 * 72 * one["params"][0].numel() * 4
    for args, entries in ((many, 72), (batch, 1)):
        used = temporaries(args, entries)
        assert used <= 1.01 * least
        assert used <= state, f"{used / 2**30:.2f} GiB of {state / 2**30:.2f}"


@pytest.mark.parametrize(
    "label", ["gram", "newton_schulz", "kron_factors_update_", "kron_precondition"]
)
def test_an_operator_waits_for_nothing(label, count):
    launched, _ = count(case(label, torch.float32))
    assert launched.total() > 0


@pytest.mark.parametrize("matrices", [1, 6])
@pytest.mark.parametrize("op", ["soap_step_", "deva_step_"])
def test_a_refresh_of_bases_waits_once_a_pass(op, matrices, count, monkeypatch):
    """And for all matrices of a batch together: nothing else comes to the host."""
    answers = []

    def read(x):
        # All matrices are chosen, pass twice (a factorization, then the last), and are orthonormal.
        answers.append(x.shape)
        if x.ndim == 2:
            passes = sum(len(shape) == 2 for shape in answers)
            return [[0.1 if passes % 2 else 1e-3] * x.shape[1], [0.0] * x.shape[1]]
        return [True] * len(x)

    bases = importlib.import_module("spectral_kernels.triton_kernels.eigenbasis")
    monkeypatch.setattr(bases, "read", read)
    count(step_of(op, ((matrices, 96, 200),), 1))
    # One before, two passes, and one at the end, of either side.
    assert answers == [(matrices,), (2, matrices), (2, matrices), (matrices,)] * 2


def test_a_refresh_of_bases_reads_as_often_as_the_slowest_matrix_passes():
    from spectral_kernels.triton_kernels import _device
    from spectral_kernels.triton_kernels.eigenbasis import refreshed_bases

    a = torch.stack([semidefinite(12, 10.0**k, k).float() for k in (1, 3, 6)])
    q = torch.stack([orthogonal(12, k).float() for k in (1, 2, 3)])

    def reads(chosen):
        before = _device.reads()
        found = refreshed_bases(q[chosen], a[chosen], sort=False)
        return _device.reads() - before, found

    apart = [reads([k]) for k in range(3)]
    together, found = reads([0, 1, 2])
    assert together == max(count for count, _ in apart) <= 2 + 7
    for k, (_, one) in enumerate(apart):
        assert same_bits([x[k] for x in found], [x[0] for x in one])


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x + torch.ones(3).to(x.device),
    ],
)
def test_a_wait_would_be_seen(wait):
    with pytest.raises((RuntimeError, NotImplementedError, AssertionError)), Calls():
        wait(torch.empty(3, device="meta"))


def test_every_step_is_counted():
    assert {op for op, _ in MOST} == set(STEPS)
