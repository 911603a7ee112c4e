"""torch.set_default_device and torch.set_default_dtype change nothing that is computed here."""

from __future__ import annotations

import ast
import contextlib
import copy
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
import spectral_kernels as sk
import torch
from support.cases import case, labels
from support.layouts import bits, same_bits
from support.moves import steps
from support.optimizers import CONFIGS, FEW, batches, model, train
from support.states import assert_same, tensors
from torch import nn

ROOT = Path(__file__).parents[1]
# Functions of torch that make a tensor out of none.
FACTORIES = {
    *("arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace"),
    *("logspace", "normal", "ones", "rand", "randint", "randn", "randperm", "scalar_tensor"),
    *("tensor", "tril_indices", "triu_indices", "zeros"),
}
# Constructors that take no device at all.
LEGACY = {"Tensor", "FloatTensor", "DoubleTensor", "LongTensor", "IntTensor"}


def unnamed(source: str) -> list[str]:
    """Calls that leave the device or the dtype to a default."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id == "torch"
        ):
            continue
        named = {keyword.arg for keyword in node.keywords}
        name = node.func.attr
        if name in LEGACY or (name in FACTORIES and not {"device", "dtype"} <= named):
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("folder", ["python/spectral_kernels", "triton_kernels", "benchmarks"])
def test_every_tensor_that_is_made_names_device_and_dtype(folder):
    sources = sorted((ROOT / folder).rglob("*.py"))
    assert sources
    assert {
        str(path.relative_to(ROOT)): calls
        for path in sources
        if (calls := unnamed(path.read_text()))
    } == {}


def test_the_walk_sees_what_is_missing():
    assert unnamed("torch.zeros(3, dtype=d)") == ["1: torch.zeros(3, dtype=d)"]
    assert unnamed("torch.tensor(1.0, device=d)\ntorch.Tensor(3)") != []
    assert unnamed("torch.zeros(3, dtype=d, device=c); torch.zeros_like(x); x.new_zeros(2)") == []


@contextlib.contextmanager
def defaults(device: str | None, dtype: torch.dtype | None) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_device(device)
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)


@pytest.fixture(
    params=[
        ("meta", None),
        (None, torch.bfloat16),
        (None, torch.float64),
        ("meta", torch.bfloat16),
    ],
    ids=["meta", "bfloat16", "float64", "meta, bfloat16"],
)
def other(request: pytest.FixtureRequest):
    """Other defaults, as a context."""
    return lambda: defaults(*request.param)


@pytest.mark.parametrize("label", labels())
def test_operators_give_the_same_bits(label, backend, other):
    expected = case(label).run(backend.name)
    changed = case(label).clone()
    with other():
        found = changed.run(backend.name)
    assert same_bits(found, expected)


def public_step(name: str, param: torch.Tensor, grad: torch.Tensor) -> None:
    """A list step as it is called by hand, without counters."""
    m, n = param.shape
    full = {"dtype": torch.float32, "device": "cpu"}
    square = [torch.eye(m, **full)], [torch.eye(n, **full)]
    state = [torch.zeros(m, n, **full)]
    if name == "muon_step_":
        sk.muon_step_([param], [grad], state, lr=0.5)
        return
    more = [torch.zeros(m, n, **full)]
    bases = [square[0][0].clone()], [square[1][0].clone()]
    if name == "shampoo_step_":
        sk.shampoo_step_([param], [grad], state, *square, *bases, more, lr=0.5)
        return
    getattr(sk, name)([param], [grad], state, more, *square, *bases, lr=0.5)


@pytest.mark.parametrize("name", ["muon_step_", "shampoo_step_", "soap_step_", "deva_step_"])
def test_a_list_step_without_counters_moves(name, other):
    grad = case("gram")["x"].reshape(-1)[:12].reshape(3, 4).clone()
    one, two = (torch.ones(3, 4, dtype=torch.float32, device="cpu") for _ in range(2))
    public_step(name, one, grad)
    with other():
        public_step(name, two, grad)
    assert not torch.equal(one, torch.ones_like(one))
    assert same_bits([two], [one])


def run(make, dtype: torch.dtype, context=contextlib.nullcontext):
    """Every call that an optimizer offers, on a model made before."""
    net = model(dtype)
    data = list(batches(7, dtype))
    with context():
        optimizer = make(net.parameters())
        optimizer.init_state()
        train(net, optimizer, data[:4])
        saved = copy.deepcopy(optimizer.state_dict())
        again = make(net.parameters())
        again.load_state_dict(saved)
        again.watch()
        train(net, again, data[4:])
        again.diagnostics()
        state = again.state_dict()
    return [p.detach() for p in net.parameters()], state


@functools.cache
def undisturbed(name: str, dtype: torch.dtype):
    return run(CONFIGS[name], dtype)


def assert_undisturbed(name: str, dtype: torch.dtype, other) -> None:
    params, state = undisturbed(name, dtype)
    found, theirs = run(CONFIGS[name], dtype, other)
    assert same_bits(found, params)
    for one, two in zip(tensors(state), tensors(theirs), strict=True):
        # torch keeps the count of AdamW's steps in float64 where that is the default.
        if one.dtype == two.dtype:
            assert torch.equal(bits(one), bits(two))
        else:
            assert one.ndim == 0 and float(one) == float(two)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FEW)
def test_optimizers_give_the_same_bits(name, dtype, other):
    assert_undisturbed(name, dtype, other)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in FEW])
def test_every_setting_gives_the_same_bits(name):
    assert_undisturbed(name, torch.float32, lambda: defaults("meta", torch.bfloat16))


@pytest.mark.parametrize("name", ["muon", "shampoo", "soap", "deva"])
@pytest.mark.parametrize("steps_", [1001])
def test_a_count_of_steps_loads_exactly(name, steps_, other):
    """As a plain number, which some checkpoints hold: bfloat16 has no 1001."""
    param = nn.Parameter(torch.ones(4, 6, dtype=torch.float32))
    optimizer = CONFIGS[name]([param])
    optimizer.init_state()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["step"] = steps_
    with other():
        optimizer.load_state_dict(saved)
    assert optimizer.state[param]["step"].tolist() == steps_


def test_state_of_torch_muon_loads_the_same(other):
    start = case("gram")["x"].reshape(-1)[:12].reshape(3, 4).clone()
    params = [nn.Parameter(start.clone())]
    theirs = torch.optim.Muon(params, lr=0.1)
    steps(theirs, params, 2)
    optimizer = sk.optim.Muon(params, lr=0.1)
    optimizer.load_state_dict(theirs.state_dict())
    expected = optimizer.state_dict()
    with other():
        optimizer = sk.optim.Muon(params, lr=0.1)
        optimizer.load_state_dict(theirs.state_dict())
    assert_same(optimizer.state_dict(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swapped_torch_muon_gives_the_same_bits(dtype, other, native):
    def trained(context=contextlib.nullcontext) -> torch.Tensor:
        start = case("gram")["x"].reshape(-1)[:12].reshape(3, 4)
        param = nn.Parameter(start.to(dtype, copy=True))
        grad = start.mul(3.0).sin().to(dtype)
        with context(), sk.swap_in("torch.optim.Muon") as swap:
            optimizer = torch.optim.Muon([param], lr=0.1)
            for _ in range(3):
                param.grad = grad.clone()
                optimizer.step()
            assert sum(calls.taken for calls in swap.calls.values()) == 3
            assert not swap.refused
        return param.detach()

    expected = trained()
    assert torch.isfinite(expected).all()
    assert same_bits([trained(other)], [expected])
