"""What the specification of the Shampoo step alone promises."""

import json
import math
from pathlib import Path

import pytest
import torch
from spectral_kernels.reference import newton_schulz, polar
from support.rule import FACTOR, unit_roundoff
from support.specified import F64, NONE, Shampoo, exact_root, eye, relative

GOLDEN = json.loads((Path(__file__).parent / "golden" / "public_trajectories.json").read_text())


pytestmark = pytest.mark.usefixtures("seeded", "one_thread")


PUBLIC = {
    "shampoo_none_4": {},
    "shampoo_none_2": {"root": 2},
    "shampoo_sgd_4": {"graft": "sgd"},
    "shampoo_adagrad_4": {"graft": "adagrad", "beta2": 1.0},
    "shampoo_rmsprop_2": {"graft": "rmsprop", "root": 2},
    "shampoo_adam_4": {"graft": "adam"},
    "shampoo_undebiased_4": {"debias": False},
}


@pytest.mark.parametrize("case", PUBLIC)
@pytest.mark.parametrize("method", ["eigen", "iteration", "newton"])
def test_follows_distributed_shampoo(case, method):
    group = next(group for group in GOLDEN["groups"] if case in group["ends"])
    start = torch.tensor(group["start"], dtype=F64)
    ridge, condition = 1e-6, 0.0
    opt = Shampoo(
        start,
        ridge=ridge,
        relative_ridge=0.0,
        root_method=method,
        weight_decay=GOLDEN["weight_decay"],
        graft_eps_mode="absolute",
        **PUBLIC[case],
    )
    for t, grad in enumerate(group["grads"], 1):
        opt.step(torch.tensor(grad, dtype=F64), lr=GOLDEN["lr"])
        debiased = opt.options["debias"] and opt.options["beta2"] < 1.0
        for factor in (opt.left, opt.right):
            largest = torch.linalg.matrix_norm(factor, 2) / ridge
            condition = max(condition, float(largest) / (1 - 0.95**t if debiased else 1))
    end = torch.tensor(group["ends"][case], dtype=F64)
    # A root answers to a rounding of its factor with u times its condition, and every step's roots
    # do; independently, so that these errors add in squares.
    allowed = FACTOR * math.sqrt(len(group["grads"])) * condition * unit_roundoff(F64)
    assert float((opt.param - end).norm() / (end - start).norm()) < allowed


def test_golden_cases_are_all_compared():
    names = {name for group in GOLDEN["groups"] for name in group["ends"]}
    assert {name for name in names if name.startswith("shampoo")} == set(PUBLIC)


@pytest.mark.parametrize("shape", [(6, 6), (4, 7), (7, 4)])
def test_decomposition(shape):
    """L^-e M R^-e = [L^-e (M M^T)^1/4] polar(M) [(M^T M)^1/4 R^-e], for any factors and e."""
    w, grads = torch.zeros(shape, dtype=F64), torch.randn(5, *shape, dtype=F64)
    for root in (2, 4):
        opt = Shampoo(w, root=root, relative_ridge=1e-3)
        for g in grads:
            update = opt.step(g)
        m = opt.momentum / (1 - 0.9**5)
        u, s, vh = torch.linalg.svd(m, full_matrices=False)
        left = opt.left_root @ (u * s.sqrt()) @ u.mT
        right = (vh.mT * s.sqrt()) @ vh @ opt.right_root
        assert relative(update, left @ polar(m) @ right) < 1e-10


@pytest.mark.parametrize("shape", [(6, 6), (4, 7), (7, 4)])
def test_without_memory_shampoo_is_the_polar_factor(shape):
    g = torch.randn(shape, dtype=F64)
    opt = Shampoo(torch.zeros(shape, dtype=F64), beta1=0.0, beta2=0.0, relative_ridge=0.0)
    update = opt.step(g)
    assert relative(update, polar(g)) < 1e-12
    rows = ((1.875, -1.25, 0.375),) * 30
    options = {"method": "gram", "restarts": (), "compute_dtype": F64, "eps": 0.0}
    same = newton_schulz(g, rows, **options, norm="frobenius", norm_factor=1.0)
    assert relative(update, same) < 1e-10


KL = {"kl": True, "root": 2, "relative_ridge": 1e-12, "root_method": "eigen"}


@pytest.mark.parametrize("shape", [(6, 6), (4, 7), (7, 4)])
def test_kl_in_sequence_reaches_its_fixed_point_in_one_round(shape):
    g = torch.randn(shape, dtype=F64)
    opt = Shampoo(torch.zeros(shape, dtype=F64), beta1=0.0, beta2=0.0, **KL)
    for _ in range(3):
        assert relative(opt.step(g), math.sqrt(min(shape)) * polar(g)) < 1e-8
    assert opt.left.diagonal().mean() == pytest.approx(float(opt.right.diagonal().mean()))
    assert opt.failures.tolist() == [0, 0]


def test_simultaneous_kl_is_a_two_cycle():
    g = torch.randn(4, 7, dtype=F64)
    opt = Shampoo(torch.zeros(4, 7, dtype=F64), beta1=0.0, beta2=0.0, kl_order="simultaneous", **KL)
    updates = [opt.step(g) for _ in range(6)]
    for first, second in ((2, 4), (3, 5)):
        assert relative(updates[second], updates[first]) < 1e-6
    assert relative(updates[5], updates[4]) > 0.5


def test_kl_starts_from_the_rms_of_the_first_gradient():
    g = torch.randn(4, 6, dtype=F64)
    lam0 = float(g.norm()) / math.sqrt(24)
    opt = Shampoo(torch.zeros(4, 6, dtype=F64), beta2=0.9, **KL)
    opt.step(torch.zeros(4, 6, dtype=F64))
    assert not opt.left.any()
    opt.step(g, refresh=0)
    assert relative(opt.left, 0.9 * lam0 * eye(4) + 0.1 / 6 * g @ g.mT / lam0) < 1e-11
    assert relative(opt.right, 0.9 * lam0 * eye(6) + 0.1 / 4 * g.mT @ g / lam0) < 1e-11
    assert relative(opt.left_root, lam0**-0.5 * eye(4)) < 1e-11


def test_rebalancing_leaves_the_update_alone():
    grads = torch.randn(6, 4, 6, dtype=F64)
    opt = Shampoo(torch.zeros(4, 6, dtype=F64), **{**KL, "relative_ridge": 1e-6})
    other = Shampoo(torch.zeros(4, 6, dtype=F64), **{**KL, "relative_ridge": 1e-6})
    for g in grads:
        expected = other.step(g)
        assert relative(opt.step(g), expected) < 1e-9
        for factor, root, s in ((opt.left, opt.left_root, 7.0), (opt.right, opt.right_root, 1 / 7)):
            factor.div_(s)
            root.mul_(math.sqrt(s))
    assert opt.left.diagonal().mean() == pytest.approx(float(opt.right.diagonal().mean()) / 49)


GRAFTS = ("none", "adagrad", "rmsprop", "adam")


@pytest.mark.parametrize("options", [*({"graft": g} for g in GRAFTS), {"kl": True, "root": 2}])
def test_F07_power_of_two_gradient_scales_give_the_same_bits(options):
    w, grads = torch.randn(6, 9), torch.randn(6, 6, 9)
    grads = grads / grads.abs().max()
    results = []
    for scale in (1.0, 2.0**-40, 2.0**40):
        opt = Shampoo(w, weight_decay=0.1, **options)
        for g in grads:
            opt.step(scale * g, lr=0.1)
        results.append(opt.param)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    "options",
    [{}, {"kl": True, "root": 2, "relative_ridge": 0.0}, {"nonfinite": "propagate"}],
)
@pytest.mark.parametrize("exponent", [-51, 51])
def test_gradients_out_of_range_are_skipped_and_counted(options, exponent):
    opt = Shampoo(torch.randn(4, 5), weight_decay=0.1, **options)
    opt.step(torch.randn(4, 5))
    before = [x.clone() for x in opt.state]
    opt.step(torch.full((4, 5), 2.0**exponent))
    assert all(torch.equal(x, y) for x, y in zip(opt.state, before, strict=True))
    assert opt.skipped == 1
    opt.step(torch.full((4, 5), 2.0 ** (exponent - exponent // 51)))
    assert opt.skipped == 1


def test_an_absolute_ridge_has_no_range_but_skips_overflow():
    opt = Shampoo(torch.randn(4, 5), ridge=1e-12, relative_ridge=0.0)
    opt.step(torch.full((4, 5), 2.0**-55))
    assert (opt.count.item(), opt.skipped.item()) == (1, 0)
    before = [x.clone() for x in opt.state]
    opt.step(torch.full((4, 5), 2.0**100))
    assert all(torch.equal(x, y) for x, y in zip(opt.state, before, strict=True))
    assert opt.skipped == 1


def test_F04_a_nan_matrix_keeps_every_bit_and_its_mates_move_as_without_it():
    w, grads = torch.randn(3, 4, 5), torch.randn(2, 3, 4, 5)
    clean, opt = (Shampoo(w, graft="adam") for _ in range(2))
    for o in (clean, opt):
        o.step(grads[0])
    before = [x.clone() for x in opt.state]
    clean.step(grads[1])
    bad = grads[1].clone()
    bad[1, 0, 0] = math.nan
    opt.step(bad)
    for new, old, mate in zip(opt.state, before, clean.state, strict=True):
        assert torch.equal(new[1], old[1])
        assert torch.equal(new[::2], mate[::2])
    assert opt.skipped == 1
    assert opt.count.tolist() == [2, 1, 2]


def test_nonfinite_raise_writes_nothing_and_propagate_writes():
    g = torch.randn(4, 5)
    g[1, 1] = math.inf
    opt = Shampoo(torch.randn(4, 5))
    before = [x.clone() for x in opt.state]
    with pytest.raises(ValueError, match=r"grads\[0\]"):
        opt.step(g, nonfinite="raise")
    assert all(torch.equal(x, y) for x, y in zip(opt.state, before, strict=True))
    opt.step(g, nonfinite="propagate")
    assert not opt.param.isfinite().any()
    assert opt.failures.tolist() == [1, 1]
    assert torch.equal(opt.left_root, torch.eye(4))


def test_F08_a_failing_root_keeps_the_old_one_and_is_counted(monkeypatch):
    opt = Shampoo(torch.zeros(4, 5, dtype=F64), root_method="eigen", relative_ridge=0.0, ridge=0.0)
    opt.step(torch.randn(4, 5, dtype=F64))
    roots = opt.left_root.clone(), opt.right_root.clone()

    def fail(*_, **__):
        raise torch.linalg.LinAlgError("no convergence")

    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "eigh", fail)
        opt.step(torch.randn(4, 5, dtype=F64))
    assert torch.equal(opt.left_root, roots[0])
    assert torch.equal(opt.right_root, roots[1])
    assert opt.failures.tolist() == [1, 1]
    assert opt.count == 2
    opt.step(torch.randn(4, 5, dtype=F64))
    assert opt.failures.tolist() == [1, 1]
    assert not torch.equal(opt.left_root, roots[0])


def test_roots_are_of_the_debiased_factors_and_wait_for_a_refresh():
    grads = torch.randn(3, 4, 5, dtype=F64)
    opt = Shampoo(torch.zeros(4, 5, dtype=F64), relative_ridge=0.0, ridge=1e-3)
    opt.step(grads[0])
    root = opt.left_root.clone()
    opt.step(grads[1], refresh=0)
    assert torch.equal(opt.left_root, root)
    opt.step(grads[2])
    assert relative(opt.left_root, exact_root(opt.left / (1 - 0.95**3) + 1e-3 * eye(4), 4)) < 1e-12


def test_zero_gradients_move_nothing_and_keep_the_roots():
    w = torch.randn(4, 5)
    for options in ({}, {"graft": "adam"}, {"kl": True, "root": 2}):
        opt = Shampoo(w, weight_decay=0.5, **options)
        opt.step(torch.zeros(4, 5), lr=0.5)
        assert torch.equal(opt.param, 0.75 * w)
        assert torch.equal(opt.left_root, torch.eye(4))
        assert opt.failures.tolist() == [0, 0]
        assert opt.count == 1
        opt.step(torch.randn(4, 5))
        assert opt.param.isfinite().all()


@pytest.mark.parametrize("sides", ["l", "r", ""])
def test_one_sided(sides):
    g = torch.randn(4, 5, dtype=F64)
    opt = Shampoo(torch.zeros(4, 5, dtype=F64), sides, root=2, relative_ridge=0.0, ridge=1e-3)
    update = opt.step(g)
    if "l" in sides:
        g = exact_root(g @ g.mT + 1e-3 * eye(4), 2) @ g
    if "r" in sides:
        g = g @ exact_root(g.mT @ g + 1e-3 * eye(5), 2)
    assert relative(update, g) < 1e-10


def test_one_sided_kl_divides_by_the_other_size():
    g = torch.randn(4, 6, dtype=F64)
    opt = Shampoo(torch.zeros(4, 6, dtype=F64), "l", beta1=0.0, beta2=0.0, **KL)
    opt.step(g)
    assert relative(opt.left, g @ g.mT / 6) < 1e-12


def test_relative_graft_eps():
    g = torch.randn(4, 5, dtype=F64)
    opt = Shampoo(torch.zeros(4, 5, dtype=F64), graft="adam", graft_eps=0.5)
    update = opt.step(g)
    direction = g / (g.abs() + 0.5 * g.norm() / math.sqrt(20))
    assert float(update.norm()) == pytest.approx(float(direction.norm()), rel=1e-12)


def test_order_of_decay_and_maximize():
    w, g = torch.randn(4, 5, dtype=F64), torch.randn(4, 5, dtype=F64)
    plain, other = Shampoo(w), Shampoo(w, weight_decay=0.5, maximize=True)
    update = plain.step(g, lr=0.25)
    other.step(g, lr=0.25)
    assert relative(other.param, (1 - 0.125) * w + 0.25 * update) < 1e-14


def test_16_bit_parameters_keep_float32_state():
    w, g = torch.randn(4, 5), torch.randn(4, 5).bfloat16()
    low, full = Shampoo(w.bfloat16(), graft="adam"), Shampoo(w.bfloat16().float(), graft="adam")
    low.step(g, lr=0.1)
    full.step(g.float(), lr=0.1)
    assert torch.equal(low.momentum, full.momentum)
    assert torch.equal(low.left_root, full.left_root)
    assert torch.equal(low.param, full.param.bfloat16())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"beta1": 1.0}, "beta1"),
        ({"beta2": 1.1}, "beta2 must be in \\[0.0, 1.0\\], not 1.1"),
        ({"graft": "lion"}, "'lion'"),
        ({"graft_eps_mode": "none"}, "'none'"),
        ({"kl": True}, "root must be 2, not 4"),
        ({"kl": True, "root": 2, "kl_order": "both"}, "'both'"),
        ({"root": 9}, "9"),
        ({"weight_decay": -1.0}, "-1.0"),
        ({"graft_eps": math.nan}, "nan"),
    ],
)
def test_F36_bad_options_raise_before_anything_is_written(change, words):
    opt = Shampoo(torch.ones(4, 5))
    with pytest.raises(ValueError, match=words):
        opt.step(torch.ones(4, 5), **change)
    assert torch.equal(opt.param, torch.ones(4, 5))
    assert not opt.left.any()


def test_mismatched_state_is_named():
    opt = Shampoo(torch.ones(4, 5))
    opt.left_root = NONE
    with pytest.raises(ValueError, match=r"lefts\[0\] has shape \(4, 4\), left_roots\[0\] \(0,\)"):
        opt.step(torch.ones(4, 5))
    opt = Shampoo(torch.ones(4, 5), graft="adam")
    opt.squares = NONE
    with pytest.raises(ValueError, match=r"graft_squares\[0\]"):
        opt.step(torch.ones(4, 5))
    opt = Shampoo(torch.ones(4, 5))
    opt.failures = torch.zeros(2)
    with pytest.raises(ValueError, match=r"root_failures\[0\]"):
        opt.step(torch.ones(4, 5))
