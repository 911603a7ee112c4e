"""What the specification alone promises of iterations, the polar factor and Muon."""

import math

import pytest
import torch
from spectral_kernels.coefficients import gram_restarts, names, resolve
from spectral_kernels.reference import gram, muon_step_, newton_schulz, polar
from support.cases import step_options

F64 = torch.float64
MUON = resolve("muon").rows
OPTIONS = {
    "method": "standard",
    "restarts": (),
    "compute_dtype": F64,
    "eps": 0.0,
    "norm": "frobenius",
    "norm_factor": 1.0,
}


pytestmark = pytest.mark.usefixtures("seeded", "one_thread")


def ns(x, rows=MUON, **options):
    return newton_schulz(x, rows, **{**OPTIONS, **options})


def relative(x, y):
    return float((x.double() - y).norm() / y.norm())


def by_svd(x, rows, nu):
    """The same polynomial on the singular values."""
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    s = s / nu(s)
    for a, b, c in rows:
        s = a * s + b * s**3 + c * s**5
    return (u * s) @ vh


def spectrum(low, m=40, n=60):
    u, _, vh = torch.linalg.svd(torch.randn(m, n, dtype=F64), full_matrices=False)
    return (u * torch.logspace(0, math.log10(low), m, dtype=F64)) @ vh


# gram


def test_gram_of_integers_is_exact():
    x = torch.randint(-8, 9, (3, 7, 11)).float()
    assert torch.equal(gram(x), x @ x.mT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gram_is_symmetric_to_the_bit(dtype):
    g = gram(torch.randn(33, 65).to(dtype))
    assert g.dtype == dtype
    assert torch.equal(g, g.mT)


def test_F04_gram_of_a_nan_matrix_leaves_the_others():
    x = torch.randn(3, 4, 5)
    clean = gram(x)
    x[1, 2, 3] = math.inf
    assert gram(x)[1].isnan().all()
    assert torch.equal(gram(x)[::2], clean[::2])


def test_gram_overflows_as_torch_does():
    assert gram(torch.full((1, 2), 1e30)).item() == math.inf


# Newton-Schulz


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (9, 9), (1, 7), (7, 1)])
def test_polynomial_acts_on_singular_values(name, shape):
    x = torch.randn(shape, dtype=F64)
    rows = resolve(name).rows
    expected = by_svd(x, rows, torch.linalg.norm)
    assert relative(ns(x, rows), expected) < 2e-11
    restarts = gram_restarts(name, *shape) or ()
    assert relative(ns(x, rows, method="gram", restarts=restarts), expected) < 2e-11
    assert relative(ns(x, rows, method="gram"), expected) < 2e-11


def test_schatten8_and_the_norm_factor():
    x = torch.randn(6, 9, dtype=F64)
    expected = by_svd(x, MUON, lambda s: 1.02 * (s**8).sum() ** 0.125)
    assert relative(ns(x, norm="schatten8", norm_factor=1.02), expected) < 1e-12


def test_eps_is_a_floor_as_in_torch():
    x = 1e-9 * torch.randn(6, 9, dtype=F64)
    assert relative(ns(x, eps=1e-7), by_svd(x, MUON, lambda s: 1e-7)) < 1e-12
    assert torch.equal(ns(x, eps=1e-12), ns(x))


@pytest.mark.parametrize(
    ("dtype", "exponents"),
    [
        (F64, (-1000, -300, 300, 1000)),
        (torch.float32, (-110, -60, 60, 120)),
        (torch.bfloat16, (-100, 100)),
        (torch.float16, (-6, 10)),
    ],
)
@pytest.mark.parametrize("method", ["standard", "gram"])
def test_F01_F02_any_power_of_two_gives_the_same_bits(dtype, exponents, method):
    x = torch.rand(5, 8).to(dtype) + 0.5
    expected = ns(x, compute_dtype=dtype, method=method)
    for exponent in exponents:
        scaled = x * 2.0 ** (exponent // 2) * 2.0 ** (exponent - exponent // 2)
        assert torch.equal(ns(scaled, compute_dtype=dtype, method=method), expected), exponent


def test_F01_subnormal_input():
    x = torch.randn(5, 8, dtype=F64)
    assert relative(ns(x * 2.0**-1060), ns(x)) < 1e-3
    assert (ns(torch.full((3, 3), 5e-324, dtype=F64)) - ns(torch.ones(3, 3, dtype=F64))).norm() == 0


def test_F03_zero_in_zero_out():
    x = torch.randn(3, 4, 5)
    x[1] = 0.0
    out = ns(x, compute_dtype=torch.float32)
    assert torch.equal(out[1], torch.zeros(4, 5))
    assert torch.equal(out[0], ns(x[0], compute_dtype=torch.float32))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_F04_a_bad_matrix_leaves_its_batch_mates(bad):
    x = torch.randn(3, 4, 5)
    clean = ns(x, compute_dtype=torch.bfloat16)
    x[1, 0, 0] = bad
    out = ns(x, compute_dtype=torch.bfloat16)
    assert out[1].isnan().all()
    assert torch.equal(out[::2], clean[::2])


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0), (2, 0, 4), (0, 3, 4)])
def test_F25_empty(shape):
    assert ns(torch.zeros(shape)).shape == shape
    assert polar(torch.zeros(shape)).shape == shape


def test_strides_and_batches():
    x = torch.randn(2, 3, 8, 5, dtype=F64)
    view = x.mT[..., ::2, :]
    out = ns(view)
    assert torch.equal(out[1, 2], ns(view[1, 2]))
    assert relative(out[1, 2], ns(view[1, 2].contiguous())) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_as_good_as_torchs(dtype):
    """Against float64, at most twice the error of the same iteration written in torch."""
    for low in (1e-1, 1e-4):
        x = spectrum(low, 128, 192).to(dtype)
        exact = ns(x.double())
        y = x / x.norm()
        for a, b, c in MUON:
            r = y @ y.mT
            y = a * y + (b * r + c * r @ r) @ y
        bound = 2.0 * relative(y, exact)
        assert relative(ns(x, compute_dtype=dtype), exact) <= bound
        method = {"method": "gram", "restarts": (3,) if dtype == torch.float32 else ()}
        assert relative(ns(x, compute_dtype=dtype, **method), exact) <= bound


def test_mixed_gram_is_more_accurate_than_standard_in_bf16():
    x = torch.randn(40, 200).bfloat16()
    exact = ns(x.double())
    mixed = relative(ns(x, compute_dtype=torch.bfloat16, method="gram"), exact)
    assert mixed < 0.5 * relative(ns(x, compute_dtype=torch.bfloat16), exact)


def test_autocast_does_not_reach_in():
    x = torch.randn(6, 9)
    expected = ns(x, compute_dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ns(x, compute_dtype=torch.float32), expected)


def test_F31_the_input_is_unchanged():
    x = torch.randn(5, 8).bfloat16()
    before = x.clone()
    ns(x, compute_dtype=torch.bfloat16)
    polar(x)
    gram(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"method": "qr"}, ValueError, "'qr'"),
        ({"norm": "spectral"}, ValueError, "'spectral'"),
        ({"restarts": (5,)}, ValueError, "1..4"),
        ({"restarts": (0,)}, ValueError, "\\(0,\\)"),
        ({"compute_dtype": torch.int32}, TypeError, "int32"),
        ({"eps": -1.0}, ValueError, "-1.0"),
        ({"eps": math.nan}, ValueError, "nan"),
        ({"norm_factor": 0.0}, ValueError, "0.0"),
        ({"rows": ()}, ValueError, "rows"),
        ({"rows": ((1.0, 2.0),)}, ValueError, "rows"),
        ({"x": torch.zeros(3)}, ValueError, "\\(3,\\)"),
        ({"x": torch.zeros(3, 3, dtype=torch.int64)}, TypeError, "int64"),
        ({"x": torch.zeros(3, 3).to_sparse()}, TypeError, "sparse"),
        ({"x": [[1.0]]}, TypeError, "list"),
    ],
)
def test_errors_name_the_value(options, error, words):
    x = options.pop("x", torch.ones(3, 3)) if "x" in options else torch.ones(3, 3)
    rows = options.get("rows", MUON)
    rest = {k: v for k, v in options.items() if k != "rows"}
    with pytest.raises(error, match=words):
        newton_schulz(x, rows, **{**OPTIONS, **rest})


# polar


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6), (1, 4)])
def test_polar(shape):
    x = torch.randn(shape, dtype=F64)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    assert relative(polar(x), u @ vh) < 1e-13
    assert relative(polar(polar(x)), u @ vh) < 1e-13
    assert relative(polar(1e-300 * x), u @ vh) < 1e-13


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_polar_of_low_rank_is_a_partial_isometry(dtype):
    x = (torch.randn(8, 3, dtype=F64) @ torch.randn(3, 6, dtype=F64)).to(dtype)
    p = polar(x).double()
    u, _, vh = torch.linalg.svd(x.double(), full_matrices=False)
    assert relative(p, u[:, :3] @ vh[:3]) < 64 * torch.finfo(dtype).eps
    assert float(torch.linalg.svdvals(p)[3:].max()) < 64 * torch.finfo(dtype).eps


def test_polar_of_zero_nan_and_16_bit():
    x = torch.randn(3, 4, 4)
    x[0], x[1, 0, 0] = 0.0, math.nan
    out = polar(x)
    assert torch.equal(out[0], torch.zeros(4, 4))
    assert out[1].isnan().all()
    assert torch.equal(out[2], polar(x[2]))
    assert polar(torch.randn(4, 3).bfloat16()).dtype == torch.bfloat16


# Muon

MUON_OPTIONS = {
    **step_options("muon_step_"),
    **OPTIONS,
    "momentum": 0.95,
    "compute_dtype": torch.bfloat16,
}


class Muon:
    """One parameter with its state."""

    def __init__(self, param, batched_count=False):
        self.param = param.clone()
        state = torch.float64 if param.dtype == F64 else torch.float32
        self.buffer = torch.zeros_like(param, dtype=state)
        self.count = torch.zeros(param.shape[:-2] if batched_count else ())
        self.skipped = torch.zeros((), dtype=torch.int64)

    def step(self, grad, lr=0.02, scale=1.0, **options):
        muon_step_(
            [self.param],
            [grad],
            [self.buffer],
            [torch.empty(0)],
            [self.count],
            self.skipped,
            torch.tensor(lr),
            scales=[scale],
            **{**MUON_OPTIONS, **options},
        )


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_muon_follows_torchs(shape, nesterov, monkeypatch):
    """With one iteration in both, since bf16 rounding differs by the place of the division."""
    monkeypatch.setattr(
        "torch.optim._muon._zeropower_via_newtonschulz",
        lambda grad, coefficients, steps, eps: ns(grad.double(), eps=eps).to(grad.dtype),
    )
    param = torch.nn.Parameter(torch.randn(shape))
    ours = Muon(param.detach())
    start = param.detach().clone()
    theirs = torch.optim.Muon([param], lr=0.02, weight_decay=0.1, nesterov=nesterov)
    scale = math.sqrt(max(1, shape[0] / shape[1]))
    for _ in range(50):
        param.grad = torch.randn(shape)
        theirs.step()
        ours.step(param.grad, scale=scale, nesterov=nesterov, compute_dtype=F64, eps=1e-7)
    distance = float((param.detach() - start).norm())
    assert float((ours.param - param.detach()).norm()) < 2e-6 * distance
    assert ours.count == 50


def test_bf16_iteration_is_as_good_as_torchs_own():
    x = spectrum(1e-2).float()
    exact = ns(x.double())
    theirs = torch.optim._muon._zeropower_via_newtonschulz(x.clone(), MUON[0], 5, 1e-7)
    assert relative(ns(x, compute_dtype=torch.bfloat16), exact) < 2.0 * relative(theirs, exact)


def test_muon_step_is_the_formula():
    w, grads = torch.randn(4, 6, dtype=F64), torch.randn(2, 4, 6, dtype=F64)
    opt = Muon(w)
    m = torch.zeros_like(w)
    for g in grads:
        opt.step(g, lr=0.1, scale=0.5, maximize=True, compute_dtype=torch.bfloat16)
        m = 0.95 * m - 0.05 * g
        w = (1 - 0.1 * 0.1) * w - 0.1 * 0.5 * ns(-0.05 * g + 0.95 * m)
    # float64 parameters iterate in float64.
    assert relative(opt.param, w) < 1e-7  # lr is a float32 tensor
    assert relative(opt.buffer, m) < 1e-15


def test_F18_clipping_is_harmless():
    w, g = torch.randn(4, 6), torch.randn(4, 6)
    results = []
    for scale in (1.0, 2.0**-80, 2.0**80):
        opt = Muon(w)
        opt.step(scale * g)
        results.append(opt.param)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_F04_skip_keeps_every_bit_of_that_matrix():
    w, g = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    clean, opt = Muon(w, batched_count=True), Muon(w, batched_count=True)
    for o in (clean, opt):
        o.step(g)
    before = opt.param.clone(), opt.buffer.clone()
    bad = g.clone()
    bad[1, 3, 4] = math.nan
    clean.step(g)
    opt.step(bad)
    assert torch.equal(opt.param[1], before[0][1])
    assert torch.equal(opt.buffer[1], before[1][1])
    assert torch.equal(opt.param[::2], clean.param[::2])
    assert opt.count.tolist() == [2, 1, 2]
    assert opt.skipped == 1


def test_shared_count_advances_if_any_matrix_moved():
    g = torch.randn(2, 4, 5)
    opt = Muon(torch.randn(2, 4, 5))
    g[0, 0, 0] = math.inf
    opt.step(g)
    assert (opt.count.item(), opt.skipped.item()) == (1, 1)
    g[1, 0, 0] = math.inf
    opt.step(g)
    assert (opt.count.item(), opt.skipped.item()) == (1, 3)


def test_propagate_and_raise():
    g = torch.randn(2, 4, 5)
    g[1, 0, 0] = math.nan
    opt = Muon(torch.randn(2, 4, 5))
    before = opt.param.clone()
    with pytest.raises(ValueError, match=r"grads\[0\], matrix \(1,\), has a non-finite"):
        opt.step(g, nonfinite="raise")
    assert torch.equal(opt.param, before)
    assert opt.count == 0
    opt.step(g, nonfinite="propagate")
    assert opt.param[1].isnan().all()
    assert opt.buffer[1].isnan().any()
    assert opt.param[0].isfinite().all()


def test_zero_gradient_decays_only():
    w = torch.randn(4, 5, dtype=F64)
    opt = Muon(w)
    opt.step(torch.zeros(4, 5, dtype=F64), lr=0.5)
    assert torch.equal(opt.param, (1 - 0.5 * 0.1) * w)
    assert opt.count == 1


def test_F32_gradients_are_unchanged_and_16_bit_parameters_round_once():
    w, g = torch.randn(4, 6).bfloat16(), torch.randn(4, 6).bfloat16()
    before = g.clone()
    opt = Muon(w)
    opt.step(g, compute_dtype=torch.float32)
    assert torch.equal(g, before)
    update = ns(((1 + 0.95) * 0.05) * g.float(), compute_dtype=torch.float32)
    exact = (1 - 0.02 * 0.1) * w.double() - 0.02 * update.double()
    assert (opt.param - exact).abs().max() <= 2.0**-8 * exact.abs().max()
    assert opt.buffer.dtype == torch.float32


def test_empty_list_and_empty_matrices():
    skipped = torch.zeros((), dtype=torch.int64)
    muon_step_([], [], [], [], [], skipped, torch.tensor(0.1), scales=[], **MUON_OPTIONS)
    opt = Muon(torch.zeros(0, 4))
    opt.step(torch.zeros(0, 4))
    assert opt.count == 0


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"momentum": 1.5}, ValueError, "momentum must be in \\[0.0, 1.0\\), not 1.5"),
        ({"weight_decay": -0.1}, ValueError, "-0.1"),
        ({"nonfinite": "ignore"}, ValueError, "'ignore'"),
        ({"grad": torch.zeros(3, 4)}, ValueError, "\\(3, 4\\)"),
        ({"buffer": torch.zeros(4, 5).half()}, TypeError, "float16"),
        ({"param": torch.zeros(1, 5).expand(4, 5)}, ValueError, "strides"),
        ({"count": torch.zeros(3)}, ValueError, "step_counts\\[0\\]"),
        ({"skipped": torch.zeros(())}, TypeError, "skipped"),
    ],
)
def test_F36_bad_input_raises_before_anything_is_written(change, error, words):
    good, opt = Muon(torch.ones(4, 5)), Muon(torch.ones(4, 5))
    grad = change.pop("grad", torch.ones(4, 5))
    for name in ("param", "buffer", "count", "skipped"):
        if name in change:
            setattr(opt, name, change.pop(name))
    with pytest.raises(error, match=words):
        muon_step_(
            [good.param, opt.param],
            [torch.ones(4, 5), grad],
            [good.buffer, opt.buffer],
            [torch.empty(0), torch.empty(0)],
            [opt.count, good.count],
            opt.skipped,
            torch.tensor(0.1),
            scales=[1.0, 1.0],
            **{**MUON_OPTIONS, **change},
        )
    assert torch.equal(good.param, torch.ones(4, 5))
    assert torch.equal(good.buffer, torch.zeros(4, 5))
