"""What the specification promises of steps in eigenbases, SOAP's and DeVA's alike."""

import json
import math
from pathlib import Path

import pytest
import torch
from support.specified import F64, NONE, PUBLIC_DEVA, PUBLIC_LINF, Rotated, eye, relative

GOLDEN = json.loads((Path(__file__).parent / "golden" / "public_trajectories.json").read_text())


pytestmark = pytest.mark.usefixtures("seeded", "one_thread")


PUBLIC = {
    "soap": ("soap", {"permute_squares": True}),
    "soap_normalized": ("soap", {"permute_squares": True, "normalize_grads": True}),
    "soap_uncorrected": ("soap", {"permute_squares": True, "correct_bias": False}),
    "deva": ("deva", PUBLIC_DEVA),
    "deva_plain": ("deva", {**PUBLIC_DEVA, "nesterov": False}),
    "deva_sign": ("deva", {**PUBLIC_DEVA, "sign": True}),
    "deva_instant": ("deva", {**PUBLIC_DEVA, "variance": "instant"}),
    "deva_linf": ("deva", {**PUBLIC_LINF, "nesterov": False}),
    "deva_linf_nesterov": ("deva", PUBLIC_LINF),
}


@pytest.mark.parametrize("case", PUBLIC)
def test_follows_the_public_class(case):
    group = next(group for group in GOLDEN["groups"] if case in group["ends"])
    start = torch.tensor(group["start"], dtype=F64)
    kind, options = PUBLIC[case]
    linf = options.get("norm") == "linf"
    opt = Rotated(start, kind, "" if linf else "lr", weight_decay=GOLDEN["weight_decay"], **options)
    scale = 1.0 if linf else 0.2 * math.sqrt(max(start.shape))
    for grad in group["grads"]:
        step = int(opt.count) + 1
        refresh = step % GOLDEN["frequency"] == 0
        opt.step(torch.tensor(grad, dtype=F64), lr=GOLDEN["lr"], refresh=refresh, scale=scale)
    end = torch.tensor(group["ends"][case], dtype=F64)
    assert float((opt.param - end).norm() / (end - start).norm()) < 1e-9


def test_golden_cases_are_all_compared():
    names = {name for group in GOLDEN["groups"] for name in group["ends"]}
    assert {name for name in names if not name.startswith("shampoo")} == set(PUBLIC)


BOTH = pytest.mark.parametrize("kind", ["soap", "deva"])


@BOTH
def test_first_call(kind):
    w, g = torch.randn(4, 6, dtype=F64), torch.randn(4, 6, dtype=F64)
    opt = Rotated(w, kind, weight_decay=0.5)
    opt.step(g, refresh=1)
    assert relative(opt.left, 0.2 * g @ g.mT) < 1e-14
    # An eigenbasis, biggest eigenvalue first; its bits depend on where LAPACK finds its matrix.
    for factor, q in ((opt.left, opt.left_basis), (opt.right, opt.right_basis)):
        rotated = q.mT @ factor @ q
        values = rotated.diagonal()
        assert relative(q.mT @ q, eye(len(q))) < 1e-14
        assert float((rotated - values.diag()).norm()) < 1e-14 * float(factor.norm())
        assert (values.diff() < 1e-14 * values[0]).all()
    idle = kind == "soap"
    assert torch.equal(opt.param, w) == idle
    assert opt.count == (0 if idle else 1)
    assert bool(opt.m.any()) != idle


@BOTH
def test_a_first_gradient_of_zero_leaves_the_bases_to_the_next(kind):
    w = torch.randn(4, 6, dtype=F64)
    opt = Rotated(w, kind, weight_decay=0.5)
    opt.step(torch.zeros(4, 6, dtype=F64), lr=0.5)
    assert not opt.left_basis.any()
    assert torch.equal(opt.param, w if kind == "soap" else 0.75 * w)
    opt.step(torch.randn(4, 6, dtype=F64))
    assert relative(opt.left_basis.mT @ opt.left_basis, eye(4)) < 1e-13


@BOTH
@pytest.mark.parametrize("permute", [False, True])
def test_refresh_transports_the_moment(kind, permute):
    if kind == "deva":
        options = {"reference": True, "eps_mode": "inside"} if permute else {}
    else:
        options = {"permute_squares": permute}
    opt = Rotated(torch.zeros(4, 6, dtype=F64), kind, **options)
    for _ in range(3):
        opt.step(torch.randn(4, 6, dtype=F64))
    other = Rotated(opt.param, kind, **options)
    for name in ("m", "v", "left", "right", "left_basis", "right_basis", "count"):
        setattr(other, name, getattr(opt, name).clone())
    g = torch.randn(4, 6, dtype=F64)
    opt.step(g)
    other.step(g, refresh=1)

    def back(o):
        return o.left_basis @ o.m @ o.right_basis.mT

    assert torch.equal(opt.param, other.param)
    assert relative(back(other), back(opt)) < 1e-13
    assert not torch.equal(other.left_basis, opt.left_basis)
    if not permute:
        assert torch.equal(other.v, opt.v)
    else:
        left = (opt.left_basis * (other.left @ opt.left_basis)).sum(0).argsort(descending=True)
        right = (opt.right_basis * (other.right @ opt.right_basis)).sum(0).argsort(descending=True)
        assert torch.equal(other.v, opt.v[left][:, right])


@BOTH
def test_F16_a_permuted_basis_changes_nothing(kind):
    """Columns of the bases, and of the state in them, in another order: the same trajectory."""
    w, grads = torch.randn(5, 5, dtype=F64), torch.randn(20, 5, 5, dtype=F64)
    opt, other = Rotated(w, kind), Rotated(w, kind)
    for k, g in enumerate(grads):
        for o in (opt, other):
            o.step(g, lr=0.1, refresh=k % 4 == 3)
        if k in (2, 9):
            order = torch.randperm(5)
            other.left_basis.copy_(other.left_basis[:, order])
            other.m.copy_(other.m[order])
            other.v.copy_(other.v[order])
    assert relative(other.param, opt.param) < 1e-10


@BOTH
@pytest.mark.parametrize("sides", ["l", "r"])
def test_one_sided_step(kind, sides):
    w, grads = torch.zeros(4, 6, dtype=F64), torch.randn(4, 4, 6, dtype=F64)
    opt = Rotated(w, kind, sides, weight_decay=0.1)
    for g in grads:
        opt.step(g, lr=0.1, refresh=1)
    assert opt.param.isfinite().all()
    # The other side's identity is the same as a basis that is one.
    swapped = Rotated(w.mT.contiguous(), kind, "r" if sides == "l" else "l", weight_decay=0.1)
    for g in grads:
        swapped.step(g.mT, lr=0.1, refresh=1)
    assert relative(swapped.param.mT, opt.param) < 1e-12


@BOTH
def test_F04_bad_matrices_keep_every_bit(kind):
    w, grads = torch.randn(3, 4, 5), torch.randn(3, 3, 4, 5)
    clean, opt = Rotated(w, kind), Rotated(w, kind)
    for o in (clean, opt):
        for g in grads[:2]:
            o.step(g, refresh=1)
    before = [x.clone() for x in opt.state]
    clean.step(grads[2], refresh=1)
    for bad, count in ((math.nan, 1), (math.inf, 2), (3e38, 3)):
        for state, value in zip(opt.state, before, strict=True):
            state.copy_(value)
        g = grads[2].clone()
        g[1, 0, 0] = bad
        opt.step(g, refresh=1)
        assert opt.skipped == count
        for new, old, mate in zip(opt.state, before, clean.state, strict=True):
            assert torch.equal(new[1], old[1])
            assert torch.equal(new[::2], mate[::2])


@BOTH
def test_nonfinite_raise_and_propagate(kind):
    g = torch.randn(4, 5)
    opt = Rotated(torch.randn(4, 5), kind)
    opt.step(g)
    opt.step(g)
    before = [x.clone() for x in opt.state]
    g[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"grads\[0\]"):
        opt.step(g, nonfinite="raise")
    assert all(torch.equal(x, y) for x, y in zip(opt.state, before, strict=True))
    opt.step(g, nonfinite="propagate", refresh=1)
    assert not opt.param.isfinite().any()


@BOTH
def test_F32_gradients_unchanged_and_16_bit_parameters(kind):
    w, grads = torch.randn(4, 5).bfloat16(), torch.randn(3, 4, 5).bfloat16()
    low, full = Rotated(w, kind), Rotated(w.float(), kind)
    for g in grads:
        before = g.clone()
        low.step(g, lr=0.1)
        assert torch.equal(g, before)
    full.step(grads[0].float(), lr=0.1)
    assert low.m.dtype == low.left.dtype == torch.float32
    assert torch.equal(Rotated(w, kind).param, w)
    once = Rotated(w, kind)
    once.step(grads[0], lr=0.1)
    assert torch.equal(once.param, full.param.bfloat16())


@BOTH
def test_normalize_maximize_and_decay(kind):
    w, grads = torch.randn(4, 5, dtype=F64), torch.randn(2, 4, 5, dtype=F64)
    options = {"skip_first": False} if kind == "soap" else {}
    plain = Rotated(w, kind, **options)
    other = Rotated(w, kind, normalize_grads=True, maximize=True, correct_bias=False, **options)
    update = plain.step(grads[0])
    normalized = other.step(grads[0])
    assert normalized.square().mean() == pytest.approx(1.0)
    if kind == "soap":
        assert relative(normalized, -update / update.square().mean().sqrt()) < 1e-10
    decayed = Rotated(w, kind, weight_decay=0.5, **options)
    decayed.step(grads[0], lr=0.25)
    step = 0.25 * update * (0.875 if kind == "soap" else 1.0)
    assert relative(decayed.param, 0.875 * w - step) < 1e-13


def test_soap_without_bases_is_adam():
    w, grads = torch.randn(4, 5, dtype=F64), torch.randn(30, 4, 5, dtype=F64)
    # eps outside the bias correction, as in the public class.
    adam = torch.nn.Parameter(w.clone())
    theirs = torch.optim.Adam([adam], lr=0.01, betas=(0.9, 0.95), eps=0.0)
    ours = Rotated(w, "soap", "", eps=0.0)
    for g in grads:
        adam.grad = g.clone()
        theirs.step()
        ours.step(g, lr=0.01)
    assert relative(ours.param, adam.detach()) < 1e-13


def test_soap_skip_first_false_uses_the_first_gradient():
    g = torch.randn(5, 5, dtype=F64)
    opt = Rotated(torch.zeros(5, 5, dtype=F64), "soap", skip_first=False, eps=0.0)
    update = opt.step(g)
    # Adam's first step is the sign, in the basis in which G is diagonal.
    u, _, vh = torch.linalg.svd(g)
    rotated = opt.left_basis.mT @ update @ opt.right_basis
    assert relative(rotated.abs().diagonal(), torch.ones(5, dtype=F64)) < 1e-10
    assert opt.count == 1
    assert relative((u.mT @ opt.left_basis).abs(), eye(5)) < 1e-10
    assert relative((vh @ opt.right_basis).abs(), eye(5)) < 1e-10


@pytest.mark.parametrize("change", [{"beta1": 1.0}, {"shampoo_beta": -1.0}, {"eps": -1.0}])
@BOTH
def test_F36_bad_options(kind, change):
    opt = Rotated(torch.ones(4, 5), kind)
    with pytest.raises(ValueError, match=next(iter(change))):
        opt.step(torch.ones(4, 5), **change)
    assert torch.equal(opt.param, torch.ones(4, 5))
    opt.left_basis = NONE
    with pytest.raises(ValueError, match=r"lefts\[0\] has shape \(4, 4\), left_bases\[0\] \(0,\)"):
        opt.step(torch.ones(4, 5))
