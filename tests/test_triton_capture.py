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
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support import STEPS, Case, case, new_step
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

pytestmark = [pytest.mark.triton, pytest.mark.kernel]

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

SHAPES = ((96, 200), (300, 70), (2, 150, 150))

# Step, whether it refreshes -> launches of kernels, calls of torch, for every distinct shape.
MOST = {
    ("muon_step_", 0): (7, 3),
    ("shampoo_step_", 0): (10, 155),
    ("shampoo_step_", 1): (120, 670),
    ("soap_step_", 0): (12, 125),
    ("deva_step_", 0): (38, 160),
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
            if hasattr(value, "cache_clear"):
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
        torch.Tensor, "data_ptr", lambda x: addresses.setdefault(id(x), len(addresses) << 30)
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
    for found, most in zip(many, MOST[op, refresh], strict=True):
        assert 0 < found.total() <= most * len(SHAPES), found.most_common(10)


@pytest.mark.parametrize(
    "label", ["gram", "newton_schulz", "kron_factors_update_", "kron_precondition"]
)
def test_an_operator_waits_for_nothing(label, count):
    launched, _ = count(case(label, torch.float32))
    assert launched.total() > 0


@pytest.mark.parametrize("op", ["soap_step_", "deva_step_"])
def test_a_refresh_of_bases_waits(op, count):
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        count(step_of(op, SHAPES, 1))


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
