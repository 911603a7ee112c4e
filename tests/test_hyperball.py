"""Weights on spheres (MuonH): muon_step_(hyperball=True) and sk.optim.Muon."""

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
from support.states import assert_resumes
from support.step_rules import assert_step_rule, roundings_of
from torch import Tensor, nn

LIST = ((5, 8), (9, 4), (2, 3, 7), (1, 6), (40, 12))
SPHERE = {"hyperball": True, "weight_decay": 0.0}
NEURONS = {"beta2": 0.9, **SPHERE}


def lengths(w: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(w.double())


@pytest.mark.parametrize("dtype", FLOATS, ids=named)
@pytest.mark.parametrize("options", [SPHERE, NEURONS], ids=["plain", "neurons"])
def test_step(dtype, options, backend):
    case = later_step("muon_step_", LIST, dtype, taken=2, **options)
    assert_step_rule(case, backend.name, roundings=roundings_of(dtype))


@pytest.mark.parametrize("lr", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("shape", [(70, 130), (130, 70), (600, 16)], ids=str)
def test_larger_matrices_and_rates(shape, lr, backend):
    """More rows and columns than one block of any kernel; steps far around the sphere."""
    assert_step_rule(later_step("muon_step_", (shape,), taken=1, lr=lr, **NEURONS), backend.name)


def test_formula():
    """In float64 and in other words than the reference's."""
    case = later_step("muon_step_", ((4, 6),), torch.float64, taken=1, lr=0.5, **SPHERE)
    w, m, g = (case[name][0].clone() for name in ("params", "momentum_buffers", "grads"))
    o = sk.newton_schulz(0.1 * g + 0.9 * (0.9 * m + 0.1 * g), backend="reference")
    radius = math.sqrt(sum(x * x for x in w.flatten()))
    u = o / math.sqrt(sum(x * x for x in o.flatten()))
    w = w / radius - 0.5 * u
    w *= radius / math.sqrt(sum(x * x for x in w.flatten()))
    reference.muon_step_(*case.args, **case.options)
    assert torch.allclose(case["params"][0], w, rtol=1e-13, atol=1e-14)


def test_lengths_are_kept(backend):
    """Over a run, each matrix of a batch its own; no step is longer than lr says."""
    case = new_step("muon_step_", ((2, 6, 10), (12, 5)), lr=0.1, scales=[3.0, 0.1], **NEURONS)
    case["params"][0][1] *= 100.0
    first = [lengths(w) for w in case["params"]]
    for t in range(5):
        case = case.with_(grads=[gaussian(*g.shape, seed=t) for g in case["grads"]])
        before = [w.clone() for w in case["params"]]
        case.run(backend.name)
        for w, old in zip(case["params"], before, strict=True):
            way = lengths(w - old) / lengths(old)
            # A tangent of 0.1 that is perpendicular to W' is the most.
            assert (way > 0.02).all() and (way <= 2 * math.sin(math.asin(0.1) / 2) + 1e-6).all()
    for w, length in zip(case["params"], first, strict=True):
        assert torch.allclose(lengths(w), length, rtol=1e-6)


@pytest.mark.parametrize("order", ["transposed", "every other"])
def test_any_layout(order, backend):
    case = later_step("muon_step_", ((20, 18),), taken=1, **NEURONS)
    plain = case.clone()
    plain.run(backend.name)
    w = case["params"][0]
    spread = torch.zeros(20, 36)[:, ::2].copy_(w)
    w = w.mT.contiguous().mT if order == "transposed" else spread
    moved = case.with_(params=[w])
    moved.run(backend.name)
    if backend.name != "reference":
        assert same_bits(w, plain["params"][0])
    assert torch.allclose(w, plain["params"][0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("zero", ["grads", "params"])
def test_without_direction_or_sphere_nothing_moves(zero, backend):
    case = new_step("muon_step_", ((4, 6),), **SPHERE)
    case = case.with_(**{zero: [torch.zeros(4, 6)]})
    before = case["params"][0].clone()
    case.run(backend.name)
    assert same_bits(case["params"][0], before)
    assert int(case["step_counts"][0]) == 1 and int(case["skipped"]) == 0


def test_scales_have_no_effect(backend):
    case = later_step("muon_step_", ((7, 9),), taken=1, **SPHERE)
    other = case.clone().with_(scales=[17.0])
    case.run(backend.name)
    other.run(backend.name)
    assert same_bits(case["params"][0], other["params"][0])


@pytest.mark.parametrize("bad", ["grads", "params"])
def test_what_is_not_finite_is_skipped(bad, backend):
    case = later_step("muon_step_", ((2, 4, 6), (5, 3)), taken=1, **SPHERE)
    good = case.clone()
    good.run(backend.name)
    case[bad][0][1, 2, 2] = math.nan
    before = case.clone()
    case.run(backend.name)
    assert same_bits(case["params"][0][1], before["params"][0][1])
    assert same_bits(case["params"][0][0], good["params"][0][0])
    assert same_bits(case["params"][1], good["params"][1])
    assert int(case["skipped"]) == 1


def test_bad_values_are_refused():
    w, g, m = (torch.ones(4, 6) for _ in range(3))
    with pytest.raises(ValueError, match=r"weight_decay must be 0, not 0\.1"):
        sk.muon_step_([w], [g], [m], lr=0.1, hyperball=True, weight_decay=0.1)
    with pytest.raises(TypeError, match="hyperball"):
        sk.muon_step_([w], [g], [m], lr=0.1, hyperball="yes")
    case = new_step("muon_step_", ((4, 6),), hyperball=True, weight_decay=0.1)
    for backend in ("cpu", "reference"):
        with pytest.raises(ValueError, match="weight_decay must be 0"):
            case.run(backend)
    assert torch.equal(w, torch.ones(4, 6))


def test_cuda_refuses_what_it_has_no_kernel_for(monkeypatch):
    monkeypatch.setattr(_cuda._extension, "MODULE", object())
    said = _cuda.rejection("muon_step_", [torch.zeros(16, 16)], {"hyperball": True})
    assert said is not None and "no CUDA C++ kernel" in said


# sk.optim.Muon


def muonh(w: Tensor, m: Tensor, g: Tensor, lr: float) -> None:
    """The public update: both normalised, at the length of before, in plain torch."""
    m.lerp_(g, 1 - 0.95)
    update = sk.newton_schulz(g.lerp(m, 0.95), backend="reference")
    radius = w.norm()
    w.sub_(lr * update * (radius / update.norm()))
    w.mul_(radius / w.norm())


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("shape", [(8, 20), (20, 8)], ids=str)
def test_optimizer_follows_plain_torch(shape):
    param = parameter(*shape, dtype=torch.float64)
    w, m = param.detach().clone(), torch.zeros(shape).double()
    optimizer = sk.optim.Muon([param], lr=0.02, hyperball=True)
    for t in range(10):
        with_grads([param], t)
        muonh(w, m, param.grad, 0.02)
        optimizer.step()
    assert torch.allclose(param, w, rtol=1e-9, atol=1e-10)


@pytest.mark.usefixtures("one_thread")
def test_parts_and_experts_have_spheres_of_their_own():
    param, experts = parameter(12, 8), parameter(3, 4, 6)
    with torch.no_grad():
        param[4:8] *= 10.0
        experts[1] *= 0.1
    groups = [{"params": [param], "split": 3}, {"params": [experts], "batched": True}]
    parts = [nn.Parameter(part.clone()) for part in param.detach().split(4)]
    optimizer = sk.optim.Muon(groups, lr=0.1, hyperball=True)
    apart = sk.optim.Muon(parts, lr=0.1, hyperball=True)
    before = lengths(param.detach().view(3, 4, 8)), lengths(experts.detach())
    for t in range(3):
        with_grads([param, experts], t)
        for part, grad in zip(parts, param.grad.split(4), strict=True):
            part.grad = grad.clone()
        optimizer.step()
        apart.step()
    assert torch.equal(param.detach(), torch.cat(parts).detach())
    after = lengths(param.detach().view(3, 4, 8)), lengths(experts.detach())
    for x, y in zip(after, before, strict=True):
        assert torch.allclose(x, y, rtol=1e-6)


@pytest.mark.usefixtures("one_thread")
def test_only_adamw_decays():
    matrix, bias = parameter(4, 6), parameter(6)
    apart = nn.Parameter(bias.detach().clone())
    optimizer = sk.optim.Muon([matrix, bias], lr=0.1, weight_decay=0.5, hyperball=True)
    plain = torch.optim.AdamW([apart], lr=0.1, weight_decay=0.5)
    length = lengths(matrix.detach())
    for t in range(3):
        with_grads([matrix, bias], t)
        apart.grad = bias.grad.clone()
        optimizer.step()
        plain.step()
    assert torch.equal(bias, apart)
    assert torch.allclose(lengths(matrix.detach()), length, rtol=1e-6)


@pytest.mark.usefixtures("one_thread")
def test_a_matrix_of_zeros_is_refused():
    good, zero = parameter(4, 6), nn.Parameter(torch.zeros(3, 5))
    optimizer = sk.optim.Muon([("good", good), ("zero", zero)], lr=0.1, hyperball=True)
    before = good.detach().clone()
    with_grads([good, zero])
    with pytest.raises(ValueError, match=r"hyperball=True keeps norms.*\(3, 5\) is zero"):
        optimizer.step()
    assert torch.equal(good, before)


@pytest.mark.usefixtures("one_thread")
def test_checkpoints_resume_and_older_groups_step_on():
    param = parameter(6, 8)
    first = sk.optim.Muon([param], lr=0.1, hyperball=True)
    stepped(first, [param], 2)
    assert_resumes((first, param), lambda other: sk.optim.Muon([other], lr=0.3), 2)
    for name in ("hyperball", "state_dtype"):
        del first.param_groups[0][name]
    older = copy.deepcopy(first)
    assert older.param_groups[0]["hyperball"] is False
    stepped(older, [older.param_groups[0]["params"][0]], 1)


@pytest.mark.usefixtures("one_thread")
def test_watched_steps_measure_the_way_before_the_projection():
    param = parameter(6, 8)
    optimizer = sk.optim.Muon([param], lr=1e-4, hyperball=True)
    optimizer.watch()
    with_grads([param])
    before = param.detach().clone()
    optimizer.step()
    ((measured,),) = optimizer.updates().values()
    assert torch.allclose(lengths(measured), lengths(before), rtol=1e-5)
    w = before.double() - 1e-4 * measured.double()
    assert torch.allclose(w * (lengths(before) / lengths(w)), param.double(), atol=1e-6)
