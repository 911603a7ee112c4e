"""The reference's eigenbases, SOAP step and DeVA step."""

import json
import math
from pathlib import Path

import pytest
import torch
from spectral_kernels.coefficients import resolve
from spectral_kernels.reference import (
    deva_step_,
    eigenbasis,
    newton_schulz,
    refresh_eigenbasis,
    soap_step_,
)

F64 = torch.float64
GOLDEN = json.loads((Path(__file__).parent / "golden" / "public_trajectories.json").read_text())
MUON = resolve("muon").rows
NONE = torch.empty(0)


@pytest.fixture(autouse=True)
def _seeded_on_one_thread():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the matrices are small
    yield
    torch.set_num_threads(threads)


def relative(x, y):
    return float((x.double() - y).norm() / y.norm())


def eye(n):
    return torch.eye(n, dtype=F64)


def orthogonal(n):
    return torch.linalg.qr(torch.randn(n, n, dtype=F64))[0]


def with_spectrum(values, q):
    a = (q * values) @ q.mT
    return 0.5 * (a + a.mT)


# eigenbasis


def test_eigenbasis():
    a = torch.randn(3, 9, 9, dtype=F64)
    a = a @ a.mT
    values, vectors = eigenbasis(a)
    assert (values.diff() <= 0).all()
    assert relative((vectors * values[:, None]) @ vectors.mT, a) < 1e-13
    assert relative(vectors.mT @ vectors, eye(9).expand(3, 9, 9)) < 1e-13
    assert torch.equal(eigenbasis(a[1])[1], vectors[1])


def test_eigenbasis_signs():
    _, vectors = eigenbasis(torch.randn(7, 7) @ torch.randn(7, 7))
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()
    # Of elements of equal magnitude the first counts.
    _, vectors = eigenbasis(torch.tensor([[2.0, -1.0], [-1.0, 2.0]]))
    assert (vectors[0] > 0).all()


def test_eigenbasis_of_zero_nan_and_asymmetric():
    a = torch.randn(3, 4, 4)
    a[0], a[1, 0, 0] = 0.0, math.nan
    values, vectors = eigenbasis(a)
    assert torch.equal(values[0], torch.zeros(4))
    assert torch.equal(vectors[0], torch.eye(4))
    assert values[1].isnan().all()
    assert vectors[1].isnan().all()
    assert (
        relative(values[2], torch.linalg.eigvalsh(a[2].double() + a[2].double().mT).flip(0) / 2)
        < 1e-6
    )


def test_eigenbasis_of_diagonal_and_extreme_matrices():
    values, vectors = eigenbasis(torch.diag(torch.tensor([1.0, 3.0, 2.0])))
    assert values.tolist() == [3.0, 2.0, 1.0]
    assert torch.equal(vectors, torch.eye(3)[:, [1, 2, 0]])
    a = with_spectrum(torch.tensor([3.0, 2.0, 1.0], dtype=F64), orthogonal(3))
    for scale in (1e-300, 1e300):
        assert relative(eigenbasis(scale * a)[1], eigenbasis(a)[1]) < 1e-12


# refresh


SPECTRA = {
    "1e2": lambda n: torch.logspace(0, -2, n, dtype=F64),
    "1e6": lambda n: torch.logspace(0, -6, n, dtype=F64),
    "1e12": lambda n: torch.logspace(0, -12, n, dtype=F64),
    "rank n/4": lambda n: torch.linspace(1, 0.1, n, dtype=F64) * (torch.arange(n) < max(1, n // 4)),
    "rank 1": lambda n: 1.0 * (torch.arange(n) == 0).double(),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("n", [1, 5, 64])
def test_refresh_is_a_round_of_orthogonal_iteration(spectrum, dtype, n):
    basis = orthogonal(n)
    a = with_spectrum(SPECTRA[spectrum](n), basis)
    turn = 0.05 * torch.randn(n, n, dtype=F64)
    q = (torch.linalg.matrix_exp(turn - turn.mT) @ basis)[:, torch.randperm(n)].to(dtype)
    a = a.to(dtype)
    values, new = refresh_eigenbasis(q, a, sort=False)
    error = (new.mT @ new - torch.eye(n, dtype=dtype)).abs().max()
    assert error <= (1e-13 * math.sqrt(n) if dtype == F64 else 5e-6)
    assert relative(values, (q.double() * (a.double() @ q.double())).sum(0)) < 64 * n * float(
        torch.finfo(dtype).eps
    )
    # The span of the leading columns is that of Householder QR on the columns in descending order.
    order = values.argsort(descending=True, stable=True)
    p = (a.double() @ q.double())[:, order]
    theirs, r = torch.linalg.qr(p)
    theirs = theirs * r.diagonal().sign()
    if spectrum == "1e2" or (spectrum == "1e6" and dtype == F64):
        assert (new[:, order].double() - theirs).abs().max() < (1e-9 if dtype == F64 else 1e-5)
    leading = max(1, n // 4)
    projector = theirs[:, :leading] @ theirs[:, :leading].mT
    ours = new[:, order][:, :leading].double()
    tolerance = 1e-9 if dtype == F64 else 1e-4
    if spectrum != "rank 1":
        assert (ours @ ours.mT - projector).abs().max() < tolerance
    sorted_values, in_order = refresh_eigenbasis(q, a, sort=True)
    assert torch.equal(in_order, new[:, order])
    assert torch.equal(sorted_values, values[order])


def test_repeated_refresh_converges_to_the_eigenbasis():
    values = torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=F64)
    basis = orthogonal(4)
    a = with_spectrum(values, basis)
    q = basis[:, [2, 0, 3, 1]] @ torch.linalg.matrix_exp(
        0.1 * torch.ones(4, 4, dtype=F64).triu(1) - 0.1 * torch.ones(4, 4, dtype=F64).tril(-1)
    )
    for _ in range(60):
        estimates, q = refresh_eigenbasis(q, a, sort=False)
    # Column j has followed column j.
    assert relative(estimates, values[[2, 0, 3, 1]]) < 1e-12
    assert relative((q.mT @ basis[:, [2, 0, 3, 1]]).abs(), eye(4)) < 1e-12


def test_F08_refresh_falls_back_to_householder_and_then_to_the_old_basis(monkeypatch):
    q = orthogonal(6)
    a = with_spectrum(SPECTRA["1e2"](6), orthogonal(6))
    _, expected = refresh_eigenbasis(q, a, sort=False)
    monkeypatch.setattr(
        torch.linalg, "cholesky_ex", lambda a, **_: (a, torch.ones((), dtype=torch.int32))
    )
    assert relative(refresh_eigenbasis(q, a, sort=False)[1], expected) < 1e-12
    monkeypatch.setattr(torch.linalg, "qr", lambda a: (a * math.nan, a))
    values, kept = refresh_eigenbasis(q, a, sort=False)
    assert torch.equal(kept, q)
    assert values.isfinite().all()


def test_refresh_of_zero_keeps_the_basis():
    q = orthogonal(5)
    values, new = refresh_eigenbasis(q, torch.zeros(5, 5, dtype=F64), sort=True)
    assert torch.equal(new, q)
    assert torch.equal(values, torch.zeros(5, dtype=F64))
    assert new.data_ptr() != q.data_ptr()


def test_refresh_keeps_directions_that_dead_rows_leave_alone():
    padded, q = torch.zeros(5, 5, dtype=F64), torch.zeros(5, 5, dtype=F64)
    padded[:3, :3] = with_spectrum(torch.tensor([3.0, 2.0, 1.0], dtype=F64), orthogonal(3))
    q[:3, :3], q[3:, 3:] = orthogonal(3), orthogonal(2)
    _, new = refresh_eigenbasis(q, padded, sort=False)
    assert relative(new[:, 3:], q[:, 3:]) < 1e-15


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_refresh_at_any_scale(dtype):
    q = orthogonal(6).to(dtype)
    a = with_spectrum(torch.logspace(0, -3, 6, dtype=F64), orthogonal(6)).to(dtype)
    values, new = refresh_eigenbasis(q, a, sort=False)
    for exponent in (-100, 100):
        scaled_values, scaled = refresh_eigenbasis(q, a * 2.0**exponent, sort=False)
        assert torch.equal(scaled, new)
        assert torch.equal(scaled_values, values * 2.0**exponent)


def test_F04_refresh_of_a_nan_matrix_leaves_the_others():
    q = orthogonal(4).expand(3, 4, 4).clone()
    a = torch.randn(3, 4, 4, dtype=F64)
    a = a @ a.mT
    clean = refresh_eigenbasis(q, a, sort=False)
    a[1, 0, 0] = math.inf
    values, new = refresh_eigenbasis(q, a, sort=False)
    assert new[1].isnan().all()
    assert values[1].isnan().all()
    assert torch.equal(new[::2], clean[1][::2])


def test_empty_bases():
    assert eigenbasis(torch.zeros(2, 0, 0))[1].shape == (2, 0, 0)
    assert (
        refresh_eigenbasis(torch.zeros(0, 3, 3), torch.zeros(0, 3, 3), sort=False)[1].numel() == 0
    )


@pytest.mark.parametrize(
    ("q", "a", "error", "words"),
    [
        (torch.eye(3), torch.eye(4), ValueError, "q has shape \\(3, 3\\), a \\(4, 4\\)"),
        (torch.eye(3), eye(3), TypeError, "float64"),
        (torch.eye(3).bfloat16(), torch.eye(3).bfloat16(), TypeError, "bfloat16"),
        (torch.ones(3, 2), torch.ones(3, 2), ValueError, "square"),
    ],
)
def test_refresh_errors(q, a, error, words):
    with pytest.raises(error, match=words):
        refresh_eigenbasis(q, a, sort=False)


# Steps

SOAP = {
    "beta1": 0.9,
    "beta2": 0.95,
    "shampoo_beta": 0.8,
    "eps": 1e-8,
    "weight_decay": 0.0,
    "correct_bias": True,
    "normalize_grads": False,
    "skip_first": True,
    "permute_squares": False,
    "maximize": False,
    "nonfinite": "skip",
}
DEVA = {
    "beta1": 0.9,
    "beta2": 0.95,
    "shampoo_beta": 0.8,
    "eps": 1e-8,
    "eps_mode": "relative",
    "weight_decay": 0.0,
    "norm": "schatten",
    "variance": "momentum",
    "nesterov": True,
    "sign": False,
    "correct_bias": True,
    "normalize_grads": False,
    "rows": MUON,
    "compute_dtype": torch.float32,
    "reference": False,
    "maximize": False,
    "nonfinite": "skip",
}


class Rotated:
    """One parameter with its state, for either step."""

    def __init__(self, param, kind, sides="lr", **options):
        *batch, m, n = param.shape
        dtype = F64 if param.dtype == F64 else torch.float32
        self.kind = kind
        self.param = param.clone()
        self.m = torch.zeros(param.shape, dtype=dtype)
        low_memory = options.get("variance") == "low_memory"
        self.v = torch.zeros(*batch, m + n, dtype=dtype) if low_memory else torch.zeros_like(self.m)
        left, right = ("l" in sides, "r" in sides)
        self.left, self.left_basis = (
            torch.zeros(*batch, m, m, dtype=dtype) if left else NONE for _ in range(2)
        )
        self.right, self.right_basis = (
            torch.zeros(*batch, n, n, dtype=dtype) if right else NONE for _ in range(2)
        )
        self.count = torch.zeros(batch)
        self.skipped = torch.zeros((), dtype=torch.int64)
        self.options = {**(SOAP if kind == "soap" else DEVA), **options}

    @property
    def state(self):
        return (
            self.param,
            self.m,
            self.v,
            self.left,
            self.right,
            self.left_basis,
            self.right_basis,
            self.count,
        )

    def step(self, grad, lr=1.0, refresh=0, scale=1.0, **options):
        before = self.param.clone()
        options = {**self.options, **options}
        step = soap_step_
        if self.kind == "deva":
            step, options = deva_step_, {**options, "scales": [scale]}
        step(
            [self.param],
            [grad],
            [self.m],
            [self.v],
            [self.left],
            [self.right],
            [self.left_basis],
            [self.right_basis],
            [self.count],
            self.skipped,
            torch.tensor(lr, dtype=F64),
            refresh=[refresh],
            **options,
        )
        return (before - self.param) / lr


PUBLIC_DEVA = {"reference": True, "eps_mode": "inside"}
PUBLIC_LINF = {**PUBLIC_DEVA, "norm": "linf", "eps": 1e-5}
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
        expected = newton_schulz(
            0.1 * g + 0.9 * m,
            MUON,
            method="standard",
            restarts=(),
            compute_dtype=F64,
            eps=0.0,
            norm="schatten8",
            norm_factor=1.0,
        )
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
        plain = newton_schulz(
            opt.m,
            MUON,
            method="standard",
            restarts=(),
            compute_dtype=F64,
            eps=0.0,
            norm="schatten8",
            norm_factor=1.0,
        )
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
        plain = newton_schulz(
            (0.9 * opt.m + 0.1 * g).sign(),
            MUON,
            method="standard",
            restarts=(),
            compute_dtype=F64,
            eps=0.0,
            norm="schatten8",
            norm_factor=1.0,
        )
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
