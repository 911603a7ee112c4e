"""What the specification of the DeVA step alone promises."""

import math

import pytest
import torch
from spectral_kernels.reference import newton_schulz
from support.inputs import MUON
from support.specified import F64, PUBLIC_DEVA, PUBLIC_LINF, Rotated, relative

pytestmark = pytest.mark.usefixtures("seeded", "one_thread")


def orthogonal(x):
    """The iteration of a step, in float64."""
    options = {"method": "standard", "restarts": (), "compute_dtype": F64, "eps": 0.0}
    return newton_schulz(x, MUON, **options, norm="schatten8", norm_factor=1.0)


# DeVA's own


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_deva_linf_with_gradient_variance_is_adam(weight_decay):
    w, grads = torch.randn(4, 5, dtype=F64), torch.randn(50, 4, 5, dtype=F64)
    for scale in (1.0, 1e-20):
        param = torch.nn.Parameter(w.clone())
        theirs = torch.optim.AdamW(
            [param], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay
        )
        ours = Rotated(
            w,
            "deva",
            "",
            norm="linf",
            variance="gradient",
            nesterov=False,
            eps_mode="outside",
            weight_decay=weight_decay,
        )
        for g in grads:
            param.grad = scale * g
            theirs.step()
            ours.step(scale * g, lr=0.01)
        assert relative(ours.param, param.detach()) < 1e-14


def test_deva_linf_without_variance_is_signum():
    w, grads = torch.randn(4, 5, dtype=F64), torch.randn(10, 4, 5, dtype=F64)
    ours = Rotated(w, "deva", "", norm="linf", variance="none", nesterov=False, weight_decay=0.1)
    m = torch.zeros_like(w)
    for g in grads:
        g = g * 1e-30
        m = 0.9 * m + 0.1 * g
        w = (1 - 0.01 * 0.1) * w - 0.01 * m.sign()
        ours.step(g, lr=0.01)
    assert relative(ours.param, w) < 1e-14


def test_deva_without_variance_is_muon():
    """Rotations commute with the iteration."""
    w, grads = torch.zeros(4, 6, dtype=F64), torch.randn(5, 4, 6, dtype=F64)
    opt = Rotated(w, "deva", variance="none")
    m = torch.zeros_like(w)
    for g in grads:
        m = 0.9 * m + 0.1 * g
        update = opt.step(g, refresh=1, scale=0.5)
        expected = orthogonal(0.1 * g + 0.9 * m)
        assert relative(update, 0.5 * expected) < 1e-11


@pytest.mark.parametrize("variance", ["momentum", "gradient", "instant", "low_memory"])
@pytest.mark.parametrize("eps_mode", ["relative", "inside", "outside"])
def test_deva_gamma_is_one_at_the_first_step(variance, eps_mode):
    g = torch.randn(5, 5, dtype=F64)
    opt = Rotated(torch.zeros(5, 5, dtype=F64), "deva", variance=variance, eps_mode=eps_mode, eps=0)
    update = opt.step(g, scale=0.7)
    plain = Rotated(torch.zeros(5, 5, dtype=F64), "deva", variance="none").step(g, scale=0.7)
    assert relative(update, plain) < 1e-10


def test_deva_update_has_the_intended_rms_from_the_start():
    shape = (24, 24)
    opt = Rotated(torch.zeros(shape, dtype=F64), "deva", beta1=0.95)
    rms = []
    for k in range(30):
        update = opt.step(torch.randn(shape, dtype=F64), refresh=k % 10 == 9, scale=0.2 * 24**0.5)
        rms.append(float(update.square().mean().sqrt()))
    assert 0.15 < rms[0] < 0.25
    assert min(rms) > 0.1
    assert max(rms) < 0.25


def test_public_deva_starts_twenty_times_too_large():
    """The defect that the corrected form mends."""
    opt = Rotated(torch.zeros(24, 24, dtype=F64), "deva", beta1=0.95, **PUBLIC_DEVA)
    opt.step(torch.randn(24, 24, dtype=F64))
    update = opt.step(torch.randn(24, 24, dtype=F64), scale=0.2 * 24**0.5)
    assert float(update.square().mean().sqrt()) > 3.0


def one_step_by_hand(variance, eps_mode, eps, m, v, g, t):
    """Gamma in the rotated basis, element by element."""
    mhat = m / (1 - 0.9**t)
    source = {"momentum": mhat, "gradient": g, "instant": g}[variance]
    top = g if variance == "instant" else mhat
    gamma = torch.empty_like(m)
    for i in range(m.shape[0]):
        for j in range(m.shape[1]):
            observed = float(source[i].norm() * source[:, j].norm())
            v[i, j] = 0.95 * v[i, j] + 0.05 * observed
    vhat = v / (1 - 0.95**t)
    mean = float(vhat.mean())
    for i in range(m.shape[0]):
        for j in range(m.shape[1]):
            energy = float(top[i].norm() * top[:, j].norm())
            if eps_mode == "outside":
                gamma[i, j] = math.sqrt(energy) / (math.sqrt(vhat[i, j]) + eps)
            else:
                floor = eps * mean if eps_mode == "relative" else eps
                gamma[i, j] = math.sqrt(energy / (vhat[i, j] + floor))
    return gamma


@pytest.mark.parametrize("variance", ["momentum", "gradient", "instant"])
@pytest.mark.parametrize("eps_mode", ["relative", "inside", "outside"])
def test_deva_gamma(variance, eps_mode):
    opt = Rotated(
        torch.zeros(3, 4, dtype=F64),
        "deva",
        variance=variance,
        eps_mode=eps_mode,
        eps=0.1,
        nesterov=False,
    )
    v = torch.zeros(3, 4, dtype=F64)
    for t in range(1, 4):
        g = torch.randn(3, 4, dtype=F64)
        update = opt.step(g)
        ql, qr = opt.left_basis, opt.right_basis
        gamma = one_step_by_hand(variance, eps_mode, 0.1, opt.m, v, ql.mT @ g @ qr, t)
        plain = orthogonal(opt.m)
        assert relative(ql.mT @ update @ qr, gamma * plain) < 1e-12
        assert relative(opt.v, v) < 1e-13


def test_deva_low_memory():
    opt = Rotated(torch.zeros(3, 4, dtype=F64), "deva", variance="low_memory", eps=0.1, sign=True)
    rows, columns = torch.zeros(3, dtype=F64), torch.zeros(4, dtype=F64)
    for t in range(1, 4):
        g = torch.randn(3, 4, dtype=F64)
        update = opt.step(g)
        ql, qr = opt.left_basis, opt.right_basis
        g = ql.mT @ g @ qr
        rows = 0.95 * rows + 0.05 * g.square().sum(1)
        columns = 0.95 * columns + 0.05 * g.square().sum(0)
        assert relative(opt.v, torch.cat([rows, columns])) < 1e-13
        mhat = opt.m / (1 - 0.9**t)

        def ratio(norms, v, t=t):
            v = v / (1 - 0.95**t)
            return (norms / (v + 0.1 * v.mean()).sqrt()).sqrt()

        gamma = ratio(mhat.norm(dim=1), rows)[:, None] * ratio(mhat.norm(dim=0), columns)
        plain = orthogonal((0.9 * opt.m + 0.1 * g).sign())
        assert relative(ql.mT @ update @ qr, gamma * plain) < 1e-12


ELEMENTWISE = ("momentum", "gradient", "instant")


@pytest.mark.parametrize(
    ("norm", "variance"),
    [*(("linf", v) for v in ELEMENTWISE), *(("schatten", v) for v in (*ELEMENTWISE, "low_memory"))],
)
def test_F07_deva_is_free_of_scale(variance, norm):
    w, grads = torch.randn(6, 7), torch.randn(5, 6, 7)
    grads = grads / grads.abs().max()
    results = []
    for scale in (1.0, 2.0**-40, 2.0**40):
        opt = Rotated(w, "deva", "" if norm == "linf" else "lr", norm=norm, variance=variance)
        for k, g in enumerate(grads):
            opt.step(scale * g, lr=0.1, refresh=k % 2)
        results.append(opt.param)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_deva_skips_out_of_range_only_where_its_scale_is_relative():
    tiny = torch.full((4, 5), 2.0**-51)
    for options, skipped in (
        ({}, 1),
        ({"nonfinite": "propagate"}, 1),
        ({"variance": "none"}, 1),
        ({"eps_mode": "inside"}, 0),
        (PUBLIC_DEVA, 0),
    ):
        opt = Rotated(torch.ones(4, 5), "deva", **options)
        opt.step(tiny)
        assert opt.skipped == skipped
    opt = Rotated(torch.ones(4, 5), "deva", "", norm="linf", variance="none")
    opt.step(tiny)
    assert opt.skipped == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"norm": "nuclear"}, "'nuclear'"),
        ({"variance": "full"}, "'full'"),
        ({"eps_mode": "absolute"}, "'absolute'"),
        ({"norm": "linf", "variance": "low_memory"}, "low_memory"),
        ({"reference": True}, "eps_mode='relative'"),
        ({"reference": True, "eps_mode": "inside", "variance": "gradient"}, "'gradient'"),
        ({**PUBLIC_LINF, "variance": "instant"}, "'instant'"),
        ({"rows": ()}, "rows"),
    ],
)
def test_F36_deva_bad_options(change, words):
    opt = Rotated(torch.ones(4, 5), "deva")
    with pytest.raises(ValueError, match=words):
        opt.step(torch.ones(4, 5), **change)
    assert torch.equal(opt.param, torch.ones(4, 5))


def test_low_memory_state_has_its_own_shape():
    opt = Rotated(torch.ones(4, 5), "deva")
    with pytest.raises(ValueError, match=r"exp_avg_sqs\[0\] must have shape \(9,\)"):
        opt.step(torch.ones(4, 5), variance="low_memory")
    batch = Rotated(torch.randn(2, 4, 5), "deva", variance="low_memory")
    batch.step(torch.randn(2, 4, 5))
    assert batch.v.shape == (2, 9)
    assert batch.v.all()
