"""Moments in bfloat16 of Shampoo, SOAP and DeVA; test_narrow_momentum.py has Muon's."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import pytest
import spectral_kernels as sk
import torch
from spectral_kernels import _cuda
from spectral_kernels._operators import TABLE
from spectral_kernels.reference._shared import rounded_at_random
from support.cases import Case, later_step, new_step, next_step
from support.inputs import gaussian
from support.layouts import same_bits
from support.optimizers import parameter, stepped
from support.states import assert_same
from support.step_rules import assert_threads_change_no_bits
from torch import Tensor, nn

BF16 = torch.bfloat16
MOMENTS = {
    "shampoo_step_": ("momentum_buffers", "graft_squares"),
    "soap_step_": ("exp_avgs", "exp_avg_sqs"),
    "deva_step_": ("exp_avgs", "exp_avg_sqs"),
}
LIST = ((5, 8), (9, 4), (2, 3, 7), (1, 6), (40, 12))
STEPS: dict[str, tuple[str, dict[str, Any]]] = {
    "shampoo": ("shampoo_step_", {}),
    "shampoo_rmsprop": ("shampoo_step_", {"graft": "rmsprop", "kl": True, "root": 2}),
    "soap": ("soap_step_", {}),
    "soap_sorted": ("soap_step_", {"permute_squares": True}),
    "deva": ("deva_step_", {}),
    "deva_linf": ("deva_step_", {"norm": "linf", "variance": "gradient"}),
    "deva_low_memory": ("deva_step_", {"variance": "low_memory"}),
    "deva_none": ("deva_step_", {"variance": "none"}),
}


def narrowed(case: Case) -> Case:
    """With moments in bfloat16, where that is for them."""

    def of(name: str) -> list[Tensor]:
        rows = name == "exp_avg_sqs" and case.options.get("variance") in ("low_memory", "none")
        return case[name] if rows else [x.bfloat16() for x in case[name]]

    return case.with_(**{name: of(name) for name in MOMENTS[case.op]})


def widened(case: Case) -> Case:
    return case.with_(**{name: [x.float() for x in case[name]] for name in MOMENTS[case.op]})


@pytest.fixture(params=STEPS)
def step(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    return STEPS[request.param]


def by_matrix(x: Tensor) -> list[Tensor]:
    return list(x.reshape(-1, *x.shape[-2:]))


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("refresh", [False, True], ids=["", "refresh"])
def test_moments_are_the_exact_ones_rounded_at_random(refresh, dtype, step, backend):
    """And everything else is what it is with those before they were rounded."""
    op, options = step
    narrow = narrowed(later_step(op, LIST, dtype, taken=2, **options))
    narrow = narrow.with_(refresh=[int(refresh)] * len(LIST))
    wide = widened(narrow.clone())
    steps = [int(count) for count in narrow["step_counts"]]
    narrow.run(backend.name)
    wide.run(backend.name)
    for name in TABLE[op].states:
        if name not in MOMENTS[op]:
            for mine, exact in zip(narrow[name], wide[name], strict=True):
                assert same_bits(mine, exact)
            continue
        for mine, exact, count in zip(narrow[name], wide[name], steps, strict=True):
            if mine.dtype != BF16:
                assert same_bits(mine, exact)
                continue
            for m, e in zip(by_matrix(mine), by_matrix(exact), strict=True):
                assert same_bits(m, rounded_at_random(e, count))
    for name in ("params", "step_counts"):
        for mine, exact in zip(narrow[name], wide[name], strict=True):
            assert same_bits(mine, exact)


def test_the_first_step(step, backend):
    op, options = step
    narrow = narrowed(new_step(op, LIST, **options))
    wide = widened(narrow.clone())
    narrow.run(backend.name)
    wide.run(backend.name)
    for name in ("params", "step_counts"):
        for mine, exact in zip(narrow[name], wide[name], strict=True):
            assert same_bits(mine, exact)


@pytest.mark.parametrize("op", MOMENTS)
def test_layouts_and_mates_change_no_bits(op, backend):
    case = narrowed(later_step(op, ((70, 130),), taken=1))
    plain = case.clone()
    plain.run(backend.name)
    names = MOMENTS[op]
    moved = case.with_(**{name: [case[name][0].mT.contiguous().mT] for name in names})
    moved.run(backend.name)
    mates = narrowed(later_step(op, ((70, 130), (9, 5), (70, 130)), taken=1))
    start = narrowed(later_step(op, ((70, 130),), taken=1))
    for name in ("params", "grads", *TABLE[op].states):
        mates[name][0].copy_(start[name][0])
    mates.run(backend.name)
    for name in ("params", *names):
        assert same_bits(mates[name][0], plain[name][0])
        if backend.name != "reference":  # where torch's sums go by layout
            assert same_bits(moved[name][0], plain[name][0])


@pytest.mark.parametrize("op", MOMENTS)
def test_a_skipped_matrix_keeps_its_moments(op, backend):
    case = narrowed(later_step(op, ((2, 4, 6), (5, 3)), taken=1, per_matrix_counts=True))
    good = case.clone()
    good.run(backend.name)
    case["grads"][0][1, 2, 2] = math.nan
    before = case.clone()
    case.run(backend.name)
    for name in ("params", *MOMENTS[op]):
        assert same_bits(case[name][0][1], before[name][0][1])
        assert same_bits(case[name][0][0], good[name][0][0])
        assert same_bits(case[name][1], good[name][1])
    assert int(case["skipped"]) == 1


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("op", MOMENTS)
def test_any_number_of_threads(op, threads):
    case = narrowed(later_step(op, ((300, 500), (7, 9)), taken=1))
    assert_threads_change_no_bits(case, threads, ("params", *MOMENTS[op]))


def test_the_bound_of_the_error(step):
    """Beside a run of full state, with the same gradients: in norm, and of the mean."""
    op, options = step
    shape = (24, 40)
    wide = new_step(op, (shape,), lr=0.0, **options)
    narrow = narrowed(wide.clone())
    names = [name for name in MOMENTS[op] if narrow[name][0].dtype == BF16]
    first, second = options.get("beta1", 0.9), options.get("beta2", 0.95)
    betas = dict(zip(MOMENTS[op], (wide.options.get("beta1", first), second), strict=True))
    if op == "shampoo_step_":
        betas["graft_squares"] = wide.options["graft_beta2"]
    else:
        betas["exp_avg_sqs"] = wide.options["beta2"]
    most = dict.fromkeys(names, 0.0)
    for t in range(40):
        wide, narrow = (
            next_step(x, seed=10 * t).with_(refresh=[int(t % 4 == 3)]) for x in (wide, narrow)
        )
        wide.run("cpu")
        narrow.run("cpu")
        for name in names:
            exact = wide[name][0].double()
            most[name] = max(most[name], float(exact.norm()))
            error = narrow[name][0].double() - exact
            bound = 2.0**-8 / math.sqrt(1.0 - betas[name] ** 2) * most[name]
            if name == MOMENTS[op][1] and op == "deva_step_" and options.get("norm") != "linf":
                # V follows the errors of M, which are those of r and c.
                bound *= 2.0
            assert float(error.norm()) <= bound
            assert abs(float(error.sum())) <= 6.0 * bound
            if name == MOMENTS[op][1]:
                assert float(narrow[name][0].min()) >= 0.0


def test_matrices_and_moments_do_not_share_their_errors():
    """Of one step and place; they would have a correlation of 1/2 with a hash of these alone."""
    x = [gaussian(96, 128, seed=seed) for seed in range(2)]
    x.append(x[0].square())
    errors = [(rounded_at_random(y, 3).double() - y) / y.abs() for y in x]
    for i in range(3):
        for j in range(i):
            both = torch.stack([errors[i].flatten(), errors[j].flatten()])
            assert abs(float(torch.corrcoef(both)[0, 1])) < 5.0 / math.sqrt(x[0].numel())


# What is refused.


@pytest.mark.parametrize("backend_name", ["cpu", "reference"])
def test_sums_without_decay_stay_in_full_precision(backend_name):
    case = new_step("shampoo_step_", ((4, 6),), graft="adagrad")
    squares = case.with_(graft_squares=[case["graft_squares"][0].bfloat16()])
    before = squares.clone()
    with pytest.raises(TypeError, match="graft_squares"):
        squares.run(backend_name)
    assert same_bits(squares["params"][0], before["params"][0])
    momentum = case.with_(momentum_buffers=[case["momentum_buffers"][0].bfloat16()])
    momentum.run(backend_name)


@pytest.mark.parametrize("op", MOMENTS)
@pytest.mark.parametrize("backend_name", ["cpu", "reference"])
def test_bad_moments_are_refused(op, backend_name):
    case = new_step(op, ((4, 6),))
    double = new_step(op, ((4, 6),), torch.float64)
    for name in MOMENTS[op]:
        with pytest.raises(TypeError, match=name):
            case.with_(**{name: [case[name][0].half()]}).run(backend_name)
        with pytest.raises(TypeError, match=rf"{name}\[0\] is bfloat16 of .* float64"):
            double.with_(**{name: [double[name][0].bfloat16()]}).run(backend_name)
        with pytest.raises(ValueError, match="shape"):
            case.with_(**{name: [torch.zeros(6, 4, dtype=BF16)]}).run(backend_name)
    for name in TABLE[op].states:
        if name in ("lefts", "left_roots", "left_bases"):
            with pytest.raises(TypeError):
                case.with_(**{name: [case[name][0].bfloat16()]}).run(backend_name)


def test_cuda_refuses_what_it_has_no_kernel_for(monkeypatch):
    monkeypatch.setattr(_cuda._extension, "MODULE", object())
    for op in ("soap_step_", "deva_step_"):
        said = _cuda.rejection(op, [torch.zeros(16, 16)], {"momentum_dtype": BF16})
        assert said is not None and "bfloat16" in said


def test_step_counts_are_asked_for():
    w, none = torch.ones(4, 6), [None]
    m, v = (torch.zeros(4, 6, dtype=BF16) for _ in range(2))
    g = [torch.ones_like(w)]
    for call in (sk.soap_step_, partial(sk.deva_step_, variance="gradient")):
        with pytest.raises(ValueError, match="exp_avgs in bfloat16 .* step_counts"):
            call([w], g, [m], [v], none, none, none, none, lr=0.1)
    with pytest.raises(ValueError, match="graft_squares in bfloat16 .* step_counts"):
        sk.shampoo_step_([w], g, [m.float()], none, none, none, none, [v], lr=0.1)
    assert same_bits(w, torch.ones(4, 6))


# The optimizers.

OPTIMIZERS = {
    "shampoo": (partial(sk.optim.Shampoo, lr=0.01, block_size=8), ("momentum_buffer", "graft_sq")),
    "soap": (partial(sk.optim.SOAP, lr=0.01), ("exp_avg", "exp_avg_sq")),
    "deva": (partial(sk.optim.DeVA, lr=0.02), ("exp_avg", "exp_avg_sq")),
}


@pytest.fixture(params=OPTIMIZERS)
def optimizer_of(request: pytest.FixtureRequest) -> Any:
    return OPTIMIZERS[request.param]


@pytest.mark.usefixtures("one_thread")
def test_moments_are_half_as_large_and_runs_repeat(optimizer_of):
    make, names = optimizer_of
    ends = []
    for _ in range(2):
        params = [parameter(12, 8), parameter(3, 2, 2, 2), parameter(5)]
        optimizer = make(params, state_dtype=BF16)
        stepped(optimizer, params, 4)
        ends.append([p.detach().clone() for p in params])
        for param in params[:2]:
            for name, value in optimizer.state[param].items():
                if name in names:
                    assert value.dtype == BF16 and value.any()
                elif isinstance(value, Tensor):
                    assert value.dtype != BF16
    full = make([parameter(12, 8), parameter(3, 2, 2, 2), parameter(5)])
    assert all(torch.equal(x, y) for x, y in zip(*ends, strict=True))
    assert full.memory_estimate() - optimizer.memory_estimate() == 2 * 2 * (96 + 24)


@pytest.mark.usefixtures("one_thread")
def test_checkpoints_resume_and_change_precision(optimizer_of):
    make, names = optimizer_of
    param = parameter(6, 8)
    first = make([param], state_dtype=BF16)
    stepped(first, [param], 3)
    other = nn.Parameter(param.detach().clone())
    second = make([other])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for optimizer, each in ((first, param), (second, other)):
        stepped(optimizer, [each], 3)
    assert torch.equal(param, other)
    assert_same(first.state_dict()["state"], second.state_dict()["state"])

    saved = copy.deepcopy(first.state_dict())
    saved["param_groups"][0]["state_dtype"] = None
    second.load_state_dict(saved)
    for name in names:
        assert second.state[other][name].dtype == torch.float32
        assert torch.equal(second.state[other][name], first.state[param][name].float())
    stepped(second, [other], 1)

    second.param_groups[0]["state_dtype"] = BF16
    with pytest.raises(ValueError, match=r"load_state_dict\(state_dict\(\)\)"):
        stepped(second, [other], 1)


@pytest.mark.usefixtures("one_thread")
def test_float64_and_sums_keep_their_state(optimizer_of):
    make, names = optimizer_of
    param = parameter(4, 6, dtype=torch.float64)
    optimizer = make([param], state_dtype=BF16)
    stepped(optimizer, [param], 1)
    assert all(optimizer.state[param][name].dtype == torch.float64 for name in names)
    with pytest.raises(ValueError, match=r"state_dtype must be None or torch\.bfloat16"):
        make([parameter(4, 4)], state_dtype=torch.float16)
    param = parameter(4, 6)
    optimizer = sk.optim.Shampoo([param], graft="adagrad", state_dtype=BF16)
    stepped(optimizer, [param], 2)
    assert optimizer.state[param]["graft_sq"].dtype == torch.float32
    assert optimizer.state[param]["momentum_buffer"].dtype == BF16


@pytest.mark.usefixtures("one_thread")
def test_training_is_as_good_as_with_full_state(optimizer_of):
    """A least-squares problem, at the noise floor of its stochastic gradients."""
    make, _ = optimizer_of

    def loss_after(state_dtype: torch.dtype | None) -> float:
        target = gaussian(16, 24, seed=5)
        w = nn.Parameter(torch.zeros(16, 24))
        optimizer = make([w], weight_decay=0.0, state_dtype=state_dtype)
        start = 0.05
        for t in range(150):
            x = gaussian(24, 32, seed=1000 + t)
            w.grad = (w.detach() - target) @ x @ x.mT / 32
            optimizer.param_groups[0]["lr"] = start * (1 - t / 150)
            optimizer.step()
        return float((w.detach() - target).square().mean())

    assert loss_after(BF16) < 1.2 * loss_after(None) + 1e-4
