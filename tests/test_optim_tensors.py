"""What parameters, gradients and state may be: not finite, moved and restrided, complex, mixed."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from spectral_kernels.optim import _adamw
from support.optimizers import needs_kernels, parameter, stepped, with_grads
from support.states import assert_go_on_alike, assert_same, snapshot
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")


SHAPES = ((7,), (4, 6), (), (5,), (0,))


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [parameter(*shape, seed=i, dtype=dtype) for i, shape in enumerate(SHAPES)]


# Non-finite gradients of AdamW's tensors.


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_F04_adamw_skips_a_tensor_with_a_non_finite_gradient(make_few, value, dtype, amsgrad):
    """As torch's AdamW where that tensor has no gradient in those steps, bit for bit."""
    params, others = parameters(dtype), parameters(dtype)
    vectors = [i for i, shape in enumerate(SHAPES) if len(shape) < 2]
    optimizer = make_few([{"params": params, "adamw_amsgrad": amsgrad}])
    lr = optimizer.param_groups[0]["lr"]
    decay = optimizer._current(0, optimizer.param_groups[0]).adamw["weight_decay"]
    public = torch.optim.AdamW(
        [others[i] for i in vectors], lr=lr, amsgrad=amsgrad, weight_decay=decay
    )
    with pytest.warns(UserWarning, match="skipped 1 of its tensors for a non-finite"):
        for seed in range(6):
            with_grads(params, seed)
            with_grads(others, seed)
            if seed in (0, 3, 4):
                params[0].grad[-1] = value
                others[0].grad = None
            if seed == 3:
                params[2].grad.fill_(value)
                others[2].grad = None
            optimizer.step()
            public.step()
            assert_same([params[i] for i in vectors], [others[i] for i in vectors])
    assert optimizer.skipped == 4
    for i in vectors:
        assert_same(optimizer.state[params[i]], public.state[others[i]])
    assert params[1].isfinite().all()


def test_a_batch_without_a_finite_loss_changes_nothing(make_few):
    """Every bias, norm and embedding, and every matrix; the next batch goes on."""
    names = ("b", "w", "scale", "ln_1.weight")
    params, others = parameters()[:4], parameters()[:4]
    optimizer = make_few(list(zip(names, params, strict=True)))
    other = make_few(list(zip(names, others, strict=True)))
    for seed in range(5):
        with_grads(params, seed)
        with_grads(others, seed)
        if seed == 2:
            before = snapshot(optimizer)
            for param in params:
                param.grad.mul_(math.nan)
            with pytest.warns(UserWarning, match="skipped 4 of its tensors"):
                optimizer.step()
            assert_same(snapshot(optimizer), before)
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step()
            other.step()
    assert optimizer.skipped == 4
    assert_same(params, others)


@pytest.mark.parametrize("algorithm", ["auto", "adamw"])
@pytest.mark.parametrize("group", [0, 1])
def test_F04_raise_sees_a_bias_in_any_group(make_few, algorithm, group):
    matrix, bias = parameter(5, 7), parameter(5)
    groups = [{"params": [("w", matrix)]}, {"params": [("b", bias)], "algorithm": algorithm}]
    optimizer = make_few(groups if group else groups[::-1], nonfinite="raise")
    with_grads([matrix, bias])
    optimizer.step()
    bias.grad[2] = math.inf
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="b has a non-finite gradient"):
        optimizer.step()
    assert_same(snapshot(optimizer), before)
    assert optimizer.skipped == 0


def test_F04_propagate_is_torchs(make_few):
    params, others = parameters(), parameters()
    optimizer = make_few(params, nonfinite="propagate")
    decay = optimizer._current(0, optimizer.param_groups[0]).adamw["weight_decay"]
    public = torch.optim.AdamW(
        [others[0], others[3]], lr=optimizer.param_groups[0]["lr"], weight_decay=decay
    )
    for seed in range(3):
        with_grads(params, seed)
        with_grads(others, seed)
        params[0].grad[0] = others[0].grad[0] = math.nan
        optimizer.step()
        public.step()
    assert_same([params[0], params[3]], [others[0], others[3]])
    assert params[0][0].isnan() and not params[0][1:].isnan().any()
    assert optimizer.skipped == 0


@pytest.mark.parametrize("name", ["policy", "adamw"])
def test_policy_of_one_group_may_differ(make_few, name):
    first, second = parameter(4), parameter(4)
    second_group: dict[str, Any] = {"params": [second], "nonfinite": "propagate"}
    if name == "adamw":
        second_group["algorithm"] = "adamw"
    optimizer = make_few([{"params": [first]}, second_group])
    first.grad = second.grad = torch.full((4,), math.nan)
    before = first.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        optimizer.step()
    assert torch.equal(first, before) and second.isnan().all()
    assert optimizer.skipped == 1


def test_large_gradients_are_finite(make_few):
    """Their sum is not."""
    params, others = [parameter(64), parameter(3, 3)], [parameter(64)]
    optimizer = make_few(params)
    decay = optimizer._current(0, optimizer.param_groups[0]).adamw["weight_decay"]
    public = torch.optim.AdamW(others, lr=optimizer.param_groups[0]["lr"], weight_decay=decay)
    params[0].grad, others[0].grad = torch.full((64,), 3e38), torch.full((64,), 3e38)
    optimizer.step()
    public.step()
    assert torch.equal(params[0], others[0])
    assert optimizer.skipped == 0
    optimizer.param_groups[0]["nonfinite"] = "raise"
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_steps_that_are_skipped_on_the_device(dtype, amsgrad):
    """The calls that a GPU gets, run here: torch's fused AdamW with a flag for each tensor."""
    params, others = ([parameter(9, seed=i).detach().to(dtype) for i in range(2)] for _ in "ab")
    values = {"lr": 0.0625, "betas": (0.5, 0.75), "eps": 1e-6, "weight_decay": 0.25}
    options = {"amsgrad": amsgrad, "maximize": True}
    reals = [torch.view_as_real(x) if x.is_complex() else x for x in others]
    public = torch.optim.AdamW(reals, fused=True, **values, **options)
    part = _adamw.Part(torch.device("cpu"), (amsgrad, "skip", False))
    for place, param in enumerate(params):
        zeros = [torch.zeros_like(param) for _ in range(3)]
        state = dict(zip(("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), zeros, strict=True))
        part.add(place, param, {"step": torch.zeros(()), **state})
    skipped = torch.zeros((), dtype=torch.int64)
    for seed in range(5):
        for i, (param, real) in enumerate(zip(params, reals, strict=True)):
            grad = parameter(9, seed=10 * seed + i).detach().to(param.dtype)
            real.grad = (torch.view_as_real(grad) if grad.is_complex() else grad).clone()
            if i == 0 and seed in (0, 2, 3):
                grad[4] = math.nan
                real.grad = None
            _adamw.run_on_device(part, i, grad, {**values, **options}, skipped)
        public.step()
        assert_same(params, others)
    assert int(skipped) == 3
    assert [int(step) for step in part.steps] == [2, 5]


# Memory that moves under a parameter, and other strides on the same memory.


def restride(x: torch.Tensor) -> torch.Tensor:
    """The same memory, read in another order."""
    if x.ndim == 4:
        o, c, h, w = x.shape
        return x.as_strided(x.shape, (c * h * w, 1, w * c, c))
    return x.as_strided(x.shape, x.stride()[::-1])


def transposed(x: torch.Tensor) -> torch.Tensor:
    """The same memory, read as if its matrix lay there transposed."""
    rows, *rest = x.shape
    strides = [rows]
    for size in rest[:0:-1]:
        strides.insert(0, strides[0] * size)
    return x.as_strided(x.shape, (1, *strides))


def set_memory(param: nn.Parameter) -> None:
    with torch.no_grad():
        param.set_(torch.stack([param.detach(), param.detach()], -1)[..., 0])


MOVES: dict[str, Callable[[nn.Parameter], None]] = {
    "restrided": lambda p: setattr(p, "data", restride(p.data)),
    "channels_last": lambda p: setattr(
        p, "data", p.data.to(memory_format=torch.channels_last) if p.ndim == 4 else p.data.clone()
    ),
    "other": lambda p: setattr(p, "data", parameter(*p.shape, seed=5).detach()),
    "set": set_memory,
}


def after_three_steps(make):
    """An optimizer and its parameters, one of which is flattened and one a vector."""
    needs_kernels()
    params = [parameter(6, 3, 2, 2), parameter(7, 7), parameter(5)]
    optimizer = make(params)
    stepped(optimizer, params, 3)
    return optimizer, params


def taken_over(make, optimizer, params):
    """A new optimizer of copies of the parameters, which has got the state of the old one."""
    plain = [
        nn.Parameter(param.detach().clone(memory_format=torch.contiguous_format))
        for param in params
    ]
    other = make(plain)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return other, plain


@pytest.mark.parametrize("move", MOVES)
def test_memory_that_changes_between_steps(make, move):
    """As an optimizer of new, plain parameters that got the state."""
    optimizer, params = after_three_steps(make)
    for param in params:
        MOVES[move](param)
    other, plain = taken_over(make, optimizer, params)
    assert_go_on_alike((optimizer, params), (other, plain), range(3, 6))


@pytest.mark.parametrize("how", ["restrided", "replaced"])
def test_state_that_is_restrided_or_replaced_between_steps(make, how):
    """Parts hold views of state where a parameter is flattened or cut into blocks."""
    optimizer, params = after_three_steps(make)
    for param in params:
        state = optimizer.state[param]
        for name, value in state.items():
            # V stays positive under either.
            if how == "replaced" and isinstance(value, dict):
                state[name].update({block: each.clone() for block, each in value.items()})
            elif not isinstance(value, dict) and value.shape == param.shape:
                whole = param.ndim > 1 and how == "restrided"
                value.data = transposed(value.data) if whole else value.data.mul(2)
    other, plain = taken_over(make, optimizer, params)
    assert_go_on_alike((optimizer, params), (other, plain), range(3, 6))
    assert_same(optimizer.state_dict()["state"], other.state_dict()["state"])


@pytest.mark.parametrize("place", [0, 1])
def test_another_shape_is_refused_before_anything_is_written(make_few, place):
    params = [parameter(6, 4), parameter(8), parameter(4, 4)]
    optimizer = make_few(params)
    with_grads(params)
    optimizer.step()
    params[place].data = torch.ones((4, 6) if place == 0 else (9,))
    with_grads(params)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"has shape .*expected|differ"):
        optimizer.step()
    assert_same(snapshot(optimizer), before)


# Complex parameters, and gradients of another dtype.


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("algorithm", ["auto", "adamw"])
@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"maximize": True}], ids=str)
def test_complex_parameters_of_adamw_are_torchs(make_few, dtype, algorithm, options):
    shapes = ((7,), (3, 4), ()) if algorithm == "adamw" else ((7,), ())
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(s, dtype=dtype, generator=generator)) for s in shapes]
    others = copy.deepcopy(params)
    values = {"lr": 0.0625, "weight_decay": 0.25, "betas": (0.5, 0.75), **options}
    optimizer = make_few([{"params": params, "algorithm": algorithm, **values}])
    public = torch.optim.AdamW(others, **values)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for step in range(5):
            for param, other in zip(params, others, strict=True):
                other.grad = torch.randn(param.shape, dtype=dtype, generator=generator)
                param.grad = other.grad.clone()
            if step == 2:
                params[0].grad[3] = complex(0.0, math.nan)
                others[0].grad = None
            optimizer.step()
            public.step()
    assert_same(params, others)
    assert_same(optimizer.state_dict()["state"], public.state_dict()["state"])
    assert optimizer.skipped == 1
    again = make_few([{"params": copy.deepcopy(params), "algorithm": algorithm, **values}])
    again.load_state_dict(optimizer.state_dict())
    assert_same(again.state_dict(), optimizer.state_dict())


def test_complex_matrices_are_refused_with_a_way_out(make_few):
    param = nn.Parameter(torch.zeros(3, 3, dtype=torch.complex64))
    for group in ({}, {"algorithm": "matrix"}):
        with pytest.raises(TypeError, match="w.*not torch.complex64: only AdamW .*'adamw'"):
            make_few([{"params": [("w", param)], **group}])


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("grad", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_of_another_dtype_is_rounded_to_the_parameters(make_few, dtype, grad):
    params, others = parameters(dtype)[::3], parameters(dtype)[::3]
    optimizer, other = make_few(params), make_few(others)
    for param in params:
        param.grad_dtype = None
    for seed in range(3):
        for i, param in enumerate(params):
            # Values that float16 has, too.
            given = parameter(*param.shape, seed=7 * seed + i).detach().to(grad)
            kept = given.clone()
            others[i].grad, param.grad = given.to(dtype), given
            assert param.grad.dtype == grad
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            optimizer.step()
            other.step()
        assert torch.equal(params[-1].grad, kept)
    assert_same(params, others)


def test_a_gradient_that_overflows_in_the_parameters_dtype_is_skipped(make_few):
    param, weight = parameter(4, dtype=torch.float16), parameter(3, 3, dtype=torch.float16)
    optimizer = make_few([param, weight])
    param.grad_dtype = None
    param.grad = torch.full((4,), 1e6)
    before = param.detach().clone()
    with pytest.warns(UserWarning, match="skipped 1 of its tensors"):
        optimizer.step()
    assert torch.equal(param, before) and optimizer.skipped == 1
    complex_ = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    optimizer = make_few([complex_])
    complex_.grad_dtype = None
    complex_.grad = torch.ones(3)
    with pytest.raises(TypeError, match="gradient .* must be one of complex128, complex64"):
        optimizer.step()
