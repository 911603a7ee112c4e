"""NorMuon's second moments of neurons and cautious weight decay: muon_step_ and sk.optim.Muon."""

from __future__ import annotations

import copy
import math

import pytest
import spectral_kernels as sk
import torch
from spectral_kernels import _cuda, reference
from support.cases import later_step, new_step
from support.formats import FLOATS, named
from support.inputs import gaussian
from support.layouts import same_bits
from support.optimizers import parameter, stepped, with_grads
from support.states import assert_refused_when_written_later, assert_resumes
from support.step_rules import assert_step_rule, roundings_of
from torch import nn

LIST = ((5, 8), (9, 4), (2, 3, 7), (1, 6), (40, 12))
NEURONS = {"beta2": 0.95}
BOTH = {"beta2": 0.9, "cautious": True, "weight_decay": 0.3}


@pytest.mark.parametrize("dtype", FLOATS, ids=named)
@pytest.mark.parametrize(
    "options", [NEURONS, {"cautious": True}, BOTH], ids=["neurons", "cautious", "both"]
)
def test_step(dtype, options, backend):
    case = later_step("muon_step_", LIST, dtype, taken=2, **options)
    assert_step_rule(case, backend.name, roundings=roundings_of(dtype))


@pytest.mark.parametrize("compute_dtype", [torch.bfloat16, torch.float16], ids=named)
def test_step_with_16_bit_products(compute_dtype, backend):
    case = later_step("muon_step_", LIST, taken=2, compute_dtype=compute_dtype, **NEURONS)
    roundings = roundings_of(torch.float32, compute_dtype)
    assert_step_rule(case, backend.name, roundings=roundings)


@pytest.mark.parametrize(
    "options",
    [
        {"maximize": True},
        {"beta2": 0.0},
        {"neuron_eps": 0.1},
        {"norm": "schatten8"},
        {"scales": [0.0, 0.5, 1.0, 2.0, 4.0]},
        {"lr": 0.0},
    ],
    ids=str,
)
def test_options(options, backend):
    assert_step_rule(later_step("muon_step_", LIST, taken=1, **{**BOTH, **options}), backend.name)


@pytest.mark.parametrize("shape", [(70, 130), (130, 70), (600, 16)], ids=str)
def test_larger_matrices(shape, backend):
    """More rows and columns than one block of any kernel."""
    assert_step_rule(later_step("muon_step_", (shape,), taken=1, **BOTH), backend.name)


def test_formula():
    """Row by row, in float64 and other words than the reference's."""
    case = later_step("muon_step_", ((4, 6),), torch.float64, taken=1, lr=0.5, **BOTH)
    w, m, v = (case[name][0].clone() for name in ("params", "momentum_buffers", "second_moments"))
    n = 0.1 * case["grads"][0] + 0.9 * (0.9 * m + 0.1 * case["grads"][0])
    o = sk.newton_schulz(n, backend="reference")
    d = torch.empty_like(o)
    for i, row in enumerate(o):
        v[i] = 0.9 * v[i] + 0.1 * sum(x * x for x in row) / 6
        d[i] = row / (math.sqrt(v[i]) + 1e-8)
    u = d * math.sqrt(sum(x * x for x in o.flatten()) / sum(x * x for x in d.flatten()))
    kept = 1.0 - 0.5 * 0.3 * (u * w >= 0).double()
    assert 0 < int((kept == 1.0).sum()) < kept.numel()
    reference.muon_step_(*case.args, **case.options)
    assert torch.allclose(case["params"][0], kept * w - 0.5 * u, rtol=1e-13, atol=1e-14)
    assert torch.allclose(case["second_moments"][0], v, rtol=1e-13, atol=0)


def test_the_length_of_the_update_is_kept_and_rows_are_even(backend):
    """After one step with beta2 = 0 all rows have one length."""
    x = gaussian(6, 10) * torch.logspace(-2, 0, 6)[:, None]
    w, v = torch.zeros(6, 10), torch.zeros(6, 1)
    plain = torch.zeros(6, 10)
    setting = {"lr": 1.0, "scale": "none", "compute_dtype": torch.float32}
    sk.muon_step_([plain], [x], [torch.zeros(6, 10)], **setting)
    sk.muon_step_([w], [x], [torch.zeros(6, 10)], second_moments=[v], beta2=0.0, **setting)
    assert torch.allclose(w.norm(), plain.norm(), rtol=1e-5)
    assert torch.allclose(w.norm(dim=1), w.norm(dim=1).mean().expand(6), rtol=1e-4)
    assert not torch.allclose(plain.norm(dim=1), plain.norm(dim=1).mean().expand(6), rtol=0.05)


def test_no_decay_where_signs_are_against(backend):
    """At lr = 1 the update is known from zero weights."""
    x = gaussian(5, 9)
    zeros = torch.zeros(5, 9)
    setting = {"lr": 1.0, "compute_dtype": torch.float32}
    sk.muon_step_([zeros], [x], [torch.zeros(5, 9)], **setting)
    update = -zeros
    w = gaussian(5, 9, seed=3)
    w[0, 0], update_at = 0.0, torch.where(update * w >= 0, 0.25, 0.0)
    before = w.clone()
    sk.muon_step_([w], [x], [torch.zeros(5, 9)], weight_decay=0.25, cautious=True, **setting)
    expected = before * (1 - update_at) - update
    assert torch.allclose(w, expected, rtol=1e-6, atol=1e-6)
    assert update_at.any() and not update_at.all()


@pytest.mark.parametrize("order", ["C", "transposed", "every other"])
def test_any_layout(order, backend):
    case = later_step("muon_step_", ((20, 18),), taken=1, **BOTH)
    plain = case.clone()
    plain.run(backend.name)
    w, v = case["params"][0], case["second_moments"][0]
    if order == "transposed":
        w = w.mT.contiguous().mT
    elif order == "every other":
        w = torch.zeros(20, 36)[:, ::2].copy_(w)
        v = torch.zeros(40, 3)[::2, 1:2].copy_(v)
    moved = case.with_(params=[w], second_moments=[v])
    moved.run(backend.name)
    if backend.name != "reference":
        assert same_bits(w, plain["params"][0]) and same_bits(v, plain["second_moments"][0])
    assert torch.allclose(w, plain["params"][0], rtol=1e-5, atol=1e-6)


def test_a_zero_gradient_averages_and_decays_only(backend):
    case = later_step("muon_step_", ((4, 6),), taken=1, lr=0.5, **BOTH)
    case = case.with_(grads=[torch.zeros(4, 6)], momentum_buffers=[torch.zeros(4, 6)])
    before = case.clone()
    case.run(backend.name)
    assert torch.allclose(case["params"][0], before["params"][0] * 0.85, rtol=1e-6)
    assert torch.allclose(case["second_moments"][0], before["second_moments"][0] * 0.9, rtol=1e-6)
    assert torch.equal(case["step_counts"][0], before["step_counts"][0] + 1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_a_bad_second_moment_skips_its_matrix(bad, backend):
    case = later_step("muon_step_", ((2, 4, 6), (5, 3)), taken=1, **BOTH)
    case["second_moments"][0][1, 2] = bad
    before = case.clone()
    good = case.clone()
    good["second_moments"][0][1, 2] = 0.1
    good.run(backend.name)
    case.run(backend.name)
    for name in ("params", "momentum_buffers", "second_moments"):
        assert same_bits(case[name][0][1], before[name][0][1]), name
        assert same_bits(case[name][0][0], good[name][0][0]), name
        assert same_bits(case[name][1], good[name][1]), name
    assert int(case["skipped"]) == 1


def test_nonfinite_gradients_propagate_and_raise(backend):
    case = new_step("muon_step_", ((4, 6),), nonfinite="propagate", **BOTH)
    case["grads"][0][1, 1] = math.inf
    raising = case.clone().with_(nonfinite="raise")
    with pytest.raises(ValueError, match="non-finite"):
        raising.run(backend.name)
    assert not raising["second_moments"][0].any()
    case.run(backend.name)
    assert case["params"][0].isnan().all() and case["second_moments"][0].isnan().all()


def test_a_zero_row_stays_zero(backend):
    x = gaussian(6, 10)
    x[2] = 0.0
    w, v = torch.zeros(6, 10), torch.zeros(6, 1)
    sk.muon_step_([w], [x], [torch.zeros(6, 10)], lr=1.0, second_moments=[v])
    assert not w[2].any() and v[2] == 0.0 and w.isfinite().all()


def test_bad_second_moments_are_refused():
    w, g, m = (torch.ones(4, 6) for _ in range(3))

    def step(v, **options):
        sk.muon_step_([w], [g], [m], lr=0.1, second_moments=v, **options)

    with pytest.raises(ValueError, match=r"second_moments\[0\] must have shape .*4, 1"):
        step([torch.zeros(4)])
    with pytest.raises(TypeError, match="second_moments"):
        step([torch.zeros(4, 1, dtype=torch.bfloat16)])
    with pytest.raises(TypeError, match=r"second_moments\[0\]"):
        step([torch.zeros(4, 1, dtype=torch.float64)])
    with pytest.raises(ValueError, match="second_moments"):
        step([])
    with pytest.raises(ValueError, match=r"beta2 .*1.0"):
        step([torch.zeros(4, 1)], beta2=1.0)
    with pytest.raises(TypeError, match="cautious"):
        step([torch.zeros(4, 1)], cautious="no")
    with pytest.raises(ValueError, match="overlap"):
        step([torch.zeros(1).as_strided((4, 1), (0, 1))])
    with pytest.raises(ValueError, match="on meta"):
        step([torch.zeros(4, 1, device="meta")])
    with pytest.raises(ValueError, match="overlap"):
        step([m[:, :1]])
    assert torch.equal(w, torch.ones(4, 6)) and torch.equal(m, torch.ones(4, 6))


@pytest.mark.parametrize("options", [{"beta2": 0.9}, {"cautious": True}], ids=str)
def test_cuda_refuses_what_it_has_no_kernel_for(options, monkeypatch):
    monkeypatch.setattr(_cuda._extension, "MODULE", object())
    said = _cuda.rejection("muon_step_", [torch.zeros(16, 16)], options)
    assert said is not None and "no CUDA C++ kernel" in said
    assert _cuda.rejection("soap_step_", [torch.zeros(16, 16)], {"beta2": 0.9}) is None


# sk.optim.Muon


def plain_normuon(w, m, v, g, t):
    """The update of NorMuon's public code in plain torch, with our Newton-Schulz."""
    m.lerp_(g, 1 - 0.95)
    u = sk.newton_schulz(g.lerp(m, 0.95), backend="reference")
    length = u.norm()
    v.lerp_(u.square().mean(-1, keepdim=True), 1 - 0.9)
    u = u / (v.sqrt() + 1e-8)
    u = u * (length / (u.norm() + 1e-8))
    w.mul_(1 - 0.02 * 0.1 * ((u * w) >= 0))
    w.sub_(0.02 * 0.2 * math.sqrt(max(w.shape)) * u)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("shape", [(8, 20), (20, 8)], ids=str)
def test_optimizer_follows_plain_torch(shape):
    param = parameter(*shape, dtype=torch.float64)
    w, m, v = param.detach().clone(), torch.zeros(shape).double(), torch.zeros(shape[0], 1).double()
    optimizer = sk.optim.Muon(
        [param],
        lr=0.02,
        beta2=0.9,
        cautious_weight_decay=True,
        adjust_lr_fn="match_rms_adamw",
    )
    for t in range(5):
        with_grads([param], t)
        plain_normuon(w, m, v, param.grad, t)
        optimizer.step()
    assert torch.allclose(param, w, rtol=1e-6, atol=1e-7)
    state = optimizer.state[param]
    assert torch.allclose(state["second_momentum_buffer"], v, rtol=1e-6)


@pytest.mark.usefixtures("one_thread")
def test_splits_have_moments_of_their_own():
    param = parameter(12, 8)
    parts = [nn.Parameter(part.clone()) for part in param.detach().split(4)]
    whole = sk.optim.Muon([param], lr=0.1, beta2=0.9, cautious_weight_decay=True, split=3)
    apart = sk.optim.Muon(parts, lr=0.1, beta2=0.9, cautious_weight_decay=True)
    for t in range(3):
        with_grads([param], t)
        for part, grad in zip(parts, param.grad.split(4), strict=True):
            part.grad = grad.clone()
        whole.step()
        apart.step()
    assert torch.equal(param.detach(), torch.cat(parts).detach())
    moments = [apart.state[part]["second_momentum_buffer"] for part in parts]
    assert torch.equal(whole.state[param]["second_momentum_buffer"], torch.cat(moments))


@pytest.mark.usefixtures("one_thread")
def test_checkpoints_resume_and_take_up_moments():
    param = parameter(6, 2, 2, 2)
    first = sk.optim.Muon([param], lr=0.1, beta2=0.9)
    stepped(first, [param], 3)
    assert first.state[param]["second_momentum_buffer"].shape == (6, 1)
    _, other = assert_resumes((first, param), lambda other: sk.optim.Muon([other], lr=0.1), 2)

    plain = sk.optim.Muon([param], lr=0.1)
    stepped(plain, [param], 1)
    saved = copy.deepcopy(plain.state_dict())
    saved["param_groups"][0]["beta2"] = 0.9
    taken_up = sk.optim.Muon([other], lr=0.1, beta2=0.9)
    taken_up.load_state_dict(saved)
    assert not taken_up.state[other]["second_momentum_buffer"].any()
    stepped(taken_up, [other], 1)
    assert taken_up.state[other]["second_momentum_buffer"].all()


@pytest.mark.usefixtures("one_thread")
def test_copies_and_older_pickles_step_on():
    param = parameter(6, 8)
    optimizer = sk.optim.Muon([param], lr=0.1, beta2=0.9)
    stepped(optimizer, [param], 1)
    copied = copy.deepcopy(optimizer)
    assert copied.param_groups[0]["beta2"] == 0.9
    for name in ("beta2", "cautious_weight_decay", "split"):
        del optimizer.param_groups[0][name]
    older = copy.deepcopy(optimizer)
    stepped(older, [older.param_groups[0]["params"][0]], 1)
    assert older.param_groups[0]["beta2"] is None


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"beta2": 1.0}, ValueError),
        ({"beta2": "0.9"}, TypeError),
        ({"cautious_weight_decay": None}, TypeError),
    ],
    ids=str,
)
def test_bad_values_are_refused(values, error):
    with pytest.raises(error, match=next(iter(values))):
        sk.optim.Muon([parameter(4, 4)], **values)


@pytest.mark.usefixtures("one_thread")
def test_a_beta2_that_is_written_later_needs_state():
    param = parameter(4, 6)
    assert_refused_when_written_later(param, "beta2", 0.9, "no second_momentum_buffer")


@pytest.mark.usefixtures("one_thread")
def test_watched_steps_measure_the_normalised_update():
    param = parameter(6, 8)
    optimizer = sk.optim.Muon([param], lr=0.5, weight_decay=0.0, beta2=0.9, adjust_lr_fn="none")
    optimizer.watch()
    with_grads([param])
    before = param.detach().clone()
    optimizer.step()
    moved = (before - param.detach()) / 0.5
    ((measured,),) = optimizer.updates().values()
    assert torch.allclose(measured, moved, atol=1e-5)
