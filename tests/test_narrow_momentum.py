"""Momentum in bfloat16, rounded at random: muon_step_ and sk.optim.Muon(state_dtype=...)."""

from __future__ import annotations

import copy
import math

import pytest
import spectral_kernels as sk
import torch
from spectral_kernels import _cuda
from spectral_kernels.reference._shared import rounded_at_random
from support.cases import later_step, new_step
from support.inputs import gaussian
from support.layouts import same_bits
from support.optimizers import parameter, stepped
from support.states import assert_refused_when_written_later, assert_resumes
from support.step_rules import assert_threads_change_no_bits
from torch import Tensor, nn

BF16 = torch.bfloat16
LIST = ((5, 8), (9, 4), (2, 3, 7), (1, 6), (40, 12))


def narrow(case):
    return case.with_(momentum_buffers=[m.bfloat16() for m in case["momentum_buffers"]])


def ulp(x: Tensor) -> Tensor:
    """The distance of bfloat16 numbers about x."""
    return torch.exp2(torch.frexp(x.abs().clamp(min=2.0**-126))[1].double() - 8.0)


# The rounding itself.


def test_numbers_of_bfloat16_stay():
    x = torch.tensor([[0.0, -0.0, 1.0, -1.5, 3.0e38, 2.0**-133, math.inf, -math.inf]])
    x = x.bfloat16().float()
    for step in range(20):
        assert same_bits(rounded_at_random(x, step), x.bfloat16())


def test_nan_stays_and_nothing_finite_becomes_infinite():
    hidden = torch.tensor([0x7F800001, -0x7FFFFF], dtype=torch.int32).view(torch.float32)
    largest = torch.finfo(torch.float32).max
    x = torch.cat([hidden, torch.tensor([largest, -largest])])[None]
    for step in range(20):
        y = rounded_at_random(x, step)
        assert y[0, :2].isnan().all() and y[0, 2:].isfinite().all()


def test_every_element_goes_to_a_neighbour_and_keeps_its_mean():
    """Over steps for each element, and over elements in each step."""
    x = gaussian(48, 64)
    steps = 400
    total = torch.zeros(48, 64, dtype=torch.float64)
    for step in range(steps):
        y = rounded_at_random(x, step).double()
        way = (y - x.double()) / ulp(x)
        assert way.abs().max() < 1.0
        # An element errs by at most 1 in ulps, with variance at most 1/4.
        assert abs(way.mean()) < 5.0 * 0.5 / math.sqrt(x.numel())
        total += way
    assert (total / steps).abs().max() < 6.0 * 0.5 / math.sqrt(steps)
    assert abs((total / steps).mean()) < 5.0 * 0.5 / math.sqrt(steps * x.numel())


def test_steps_rows_and_columns_are_independent():
    x = torch.full((64, 64), 1.0 + 2.0**-8)  # half way
    ups = [(rounded_at_random(x, step) > 1.0).double() - 0.5 for step in range(3)]
    for a, b in ((ups[0], ups[1]), (ups[1], ups[2]), (ups[0][1:], ups[0][:-1])):
        assert abs((4.0 * a * b).mean()) < 5.0 / math.sqrt(a.numel())
    assert abs((4.0 * ups[0][:, 1:] * ups[0][:, :-1]).mean()) < 5.0 / 63.0
    assert abs((4.0 * ups[0] * ups[0].mT).mean()) < 5.0 / 45.0


# The step.


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16], ids=str)
def test_momentum_is_the_exact_one_rounded_at_random(dtype, backend):
    """And the update is that of the momentum before it was rounded."""
    case = narrow(later_step("muon_step_", LIST, dtype, taken=2))
    wide = case.with_(momentum_buffers=[m.float() for m in case["momentum_buffers"]])
    case, wide = case.clone(), wide.clone()
    steps = [int(count) for count in case["step_counts"]]
    case.run(backend.name)
    wide.run(backend.name)
    for mine, exact, step in zip(
        case["momentum_buffers"], wide["momentum_buffers"], steps, strict=True
    ):
        assert mine.dtype == BF16
        shape = (-1, *mine.shape[-2:])
        for m, e in zip(mine.reshape(shape), exact.reshape(shape), strict=True):
            assert same_bits(m, rounded_at_random(e, step))
    for w, exact in zip(case["params"], wide["params"], strict=True):
        assert same_bits(w, exact)


@pytest.mark.parametrize("order", ["transposed", "every other"])
def test_any_layout(order, backend):
    case = narrow(later_step("muon_step_", ((70, 130),), taken=1))
    plain = case.clone()
    plain.run(backend.name)
    m = case["momentum_buffers"][0]
    if order == "transposed":
        m = m.mT.contiguous().mT
    else:
        m = torch.zeros(70, 260, dtype=BF16)[:, ::2].copy_(m)
    moved = case.with_(momentum_buffers=[m])
    moved.run(backend.name)
    assert same_bits(m, plain["momentum_buffers"][0])
    assert same_bits(moved["params"][0], plain["params"][0])


def test_batch_mates_lists_and_counts_change_no_bits(backend):
    batch = narrow(new_step("muon_step_", ((3, 6, 9), (6, 9)), per_matrix_counts=True))
    batch["step_counts"][0].copy_(torch.tensor([4.0, 0.0, 7.0]))
    batch["step_counts"][1].fill_(7.0)
    batch["params"][1].copy_(batch["params"][0][2])
    batch["grads"][1].copy_(batch["grads"][0][2])
    batch.options.update(scales=[1.0, 1.0], restarts=[(3,), (3,)])
    batch.run(backend.name)
    assert same_bits(batch["params"][1], batch["params"][0][2])
    assert same_bits(batch["momentum_buffers"][1], batch["momentum_buffers"][0][2])
    assert not same_bits(batch["momentum_buffers"][0][0], batch["momentum_buffers"][0][1])


def test_a_skipped_matrix_keeps_its_momentum(backend):
    case = narrow(later_step("muon_step_", ((2, 4, 6), (5, 3)), taken=1))
    good = case.clone()
    good.run(backend.name)
    case["grads"][0][1, 2, 2] = math.nan
    before = case.clone()
    case.run(backend.name)
    for name in ("params", "momentum_buffers"):
        assert same_bits(case[name][0][1], before[name][0][1])
        assert same_bits(case[name][0][0], good[name][0][0])
    assert int(case["skipped"]) == 1


def test_small_gradients_are_not_lost():
    """Where rounding to nearest stands still: (1 - beta) g is a tenth of half an ulp."""
    shape, beta = (32, 48), 0.95
    start, gradient = 1.0, 1.0 - 2.0**-4
    m = torch.full(shape, start, dtype=BF16)
    nearest, exact = m.clone(), m.float()
    w, count = torch.zeros(shape), torch.zeros(())
    g = torch.full(shape, gradient)
    for _ in range(60):
        sk.muon_step_([w], [g], [m], lr=0.0, momentum=beta, step_counts=[count], backend="cpu")
        exact = beta * exact + (1 - beta) * g
        nearest = (beta * nearest.float() + (1 - beta) * g).bfloat16()
    stuck = float((nearest.double() - exact).abs().mean())
    mine = m.double() - exact
    deviation = 2.0**-8 / math.sqrt(1 - beta**2)
    assert abs(float(mine.mean())) < 5.0 * deviation / math.sqrt(m.numel()) < stuck / 5.0
    assert float(mine.square().mean().sqrt()) < deviation


def test_the_bound_of_the_error():
    """Its standard deviation, at most 2^-8 / sqrt(1 - beta^2) of the largest magnitude so far."""
    shape, beta = (24, 40), 0.9
    m, exact = torch.zeros(shape, dtype=BF16), torch.zeros(shape, dtype=torch.float64)
    w, count = gaussian(*shape), torch.zeros(())
    largest = torch.zeros(shape, dtype=torch.float64)
    for t in range(80):
        g = gaussian(*shape, seed=t)
        sk.muon_step_([w], [g], [m], lr=0.0, momentum=beta, step_counts=[count], backend="cpu")
        exact = beta * exact + (1 - beta) * g.double()
        largest = torch.maximum(largest, exact.abs())
        error = (m.double() - exact) / largest
        assert float(error.square().mean().sqrt()) <= 2.0**-8 / math.sqrt(1 - beta**2)
        assert abs(float(error.mean())) <= 5.0 * 2.0**-8 / math.sqrt((1 - beta**2) * m.numel())


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(threads):
    case = narrow(later_step("muon_step_", ((300, 500), (7, 9)), taken=1))
    assert_threads_change_no_bits(case, threads, ("params", "momentum_buffers"))


def test_bad_momentum_is_refused():
    def step(m: Tensor, w: Tensor | None = None, **options: object) -> None:
        w = torch.ones(4, 6) if w is None else w
        counts = [torch.zeros(())]
        sk.muon_step_([w], [torch.ones_like(w)], [m], lr=0.1, **{"step_counts": counts, **options})

    good = torch.zeros(4, 6, dtype=BF16)
    with pytest.raises(ValueError, match="step_counts, which are missing"):
        step(good, step_counts=None)
    for backend in ("cpu", "reference"):
        with pytest.raises(TypeError, match=r"momentum_buffers"):
            step(torch.zeros(4, 6, dtype=torch.float16), backend=backend)
        with pytest.raises(TypeError, match=r"momentum_buffers\[0\] is bfloat16 of .* float64"):
            step(good, torch.ones(4, 6, dtype=torch.float64), backend=backend)
        with pytest.raises(ValueError, match="shape"):
            step(torch.zeros(6, 4, dtype=BF16), backend=backend)
        with pytest.raises(ValueError, match="overlap"):
            step(torch.zeros(6, dtype=BF16).expand(4, 6), backend=backend)
        with pytest.raises(ValueError, match="meta"):
            step(torch.zeros(4, 6, dtype=BF16, device="meta"), backend=backend)
    assert not good.any()


def test_an_error_names_the_place_in_the_list(backend):
    """Buffers of both dtypes are looked at apart, and counted together."""
    params = [torch.ones(4, 6), torch.ones(4, 6), torch.ones(4, 6)]
    grads = [torch.ones_like(w) for w in params]
    momenta = [torch.zeros(4, 6, dtype=BF16), torch.zeros(4, 6), torch.zeros(6, 4)]
    counts = [torch.zeros(()) for _ in params]
    in_python = backend.name in ("reference", "triton")
    place = r"momentum_buffers\[2\]" if in_python else r"momentum_buffers has shape \[6, 4\]"
    with pytest.raises(ValueError, match=place):
        sk.muon_step_(params, grads, momenta, lr=0.1, step_counts=counts)
    assert all(torch.equal(w, torch.ones(4, 6)) for w in params) and not any(map(torch.any, counts))


def test_cuda_refuses_what_it_has_no_kernel_for(monkeypatch):
    monkeypatch.setattr(_cuda._extension, "MODULE", object())
    said = _cuda.rejection("muon_step_", [torch.zeros(16, 16)], {"momentum_dtype": BF16})
    assert said is not None and "bfloat16" in said


# sk.optim.Muon


@pytest.mark.usefixtures("one_thread")
def test_state_is_half_as_large_and_runs_repeat():
    ends = []
    for _ in range(2):
        params = [parameter(12, 8), parameter(3, 2, 2, 2), parameter(5)]
        optimizer = sk.optim.Muon(params, lr=0.1, state_dtype=BF16, beta2=0.9)
        stepped(optimizer, params, 4)
        ends.append([p.detach().clone() for p in params])
        for param in params[:2]:
            assert optimizer.state[param]["momentum_buffer"].dtype == BF16
            assert optimizer.state[param]["second_momentum_buffer"].dtype == torch.float32
    full = sk.optim.Muon([parameter(12, 8), parameter(3, 2, 2, 2), parameter(5)], beta2=0.9)
    assert all(torch.equal(x, y) for x, y in zip(*ends, strict=True))
    assert full.memory_estimate() - optimizer.memory_estimate() == 2 * (96 + 24)


@pytest.mark.usefixtures("one_thread")
def test_float64_keeps_its_state():
    param = parameter(4, 6, dtype=torch.float64)
    optimizer = sk.optim.Muon([param], lr=0.1, state_dtype=BF16)
    stepped(optimizer, [param], 1)
    assert optimizer.state[param]["momentum_buffer"].dtype == torch.float64


@pytest.mark.usefixtures("one_thread")
def test_checkpoints_resume_and_change_precision():
    param = parameter(6, 8)
    first = sk.optim.Muon([param], lr=0.1, state_dtype=BF16)
    stepped(first, [param], 3)
    second, other = assert_resumes((first, param), lambda other: sk.optim.Muon([other], lr=0.1), 3)

    saved = copy.deepcopy(first.state_dict())
    saved["param_groups"][0]["state_dtype"] = None
    second.load_state_dict(saved)
    momentum = second.state[other]["momentum_buffer"]
    assert momentum.dtype == torch.float32
    assert torch.equal(momentum, first.state[param]["momentum_buffer"].float())
    stepped(second, [other], 1)


@pytest.mark.usefixtures("one_thread")
def test_a_state_dtype_that_is_written_later_says_what_to_do():
    param = parameter(4, 6)
    said = r"load_state_dict\(state_dict\(\)\)"
    optimizer = assert_refused_when_written_later(param, "state_dtype", BF16, said)
    optimizer.load_state_dict(optimizer.state_dict())
    stepped(optimizer, [param], 1)
    assert optimizer.state[param]["momentum_buffer"].dtype == BF16


@pytest.mark.parametrize("value", [torch.float16, torch.float32, "bfloat16", 16], ids=str)
def test_bad_dtypes_are_refused(value):
    with pytest.raises(ValueError, match=r"state_dtype must be None or torch\.bfloat16"):
        sk.optim.Muon([parameter(4, 4)], state_dtype=value)


@pytest.mark.usefixtures("one_thread")
def test_training_is_as_good_as_with_full_state():
    """A least-squares problem, at the noise floor of its stochastic gradients."""

    def loss_after(state_dtype: torch.dtype | None) -> float:
        target = gaussian(16, 24, seed=5)
        w = nn.Parameter(torch.zeros(16, 24))
        optimizer = sk.optim.Muon([w], lr=0.05, weight_decay=0.0, state_dtype=state_dtype)
        for t in range(120):
            x = gaussian(24, 32, seed=1000 + t)
            w.grad = (w.detach() - target) @ x @ x.mT / 32
            optimizer.param_groups[0]["lr"] = 0.05 * (1 - t / 120)
            optimizer.step()
        return float((w.detach() - target).square().mean())

    assert loss_after(BF16) < 1.2 * loss_after(None) + 1e-4
