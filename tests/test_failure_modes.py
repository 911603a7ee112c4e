"""Faults that users of other implementations reported.

F04, F21, F59 and F60 are in test_threads.py; F10, F11, F27, F30, F31, F36 and F51 in test_ops.py;
F06, F07, F09 and F16 with their families; those of optimizers and checkpoints in test_optim*.py.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import spectral_kernels as sk
import torch
from support.cases import STEPS, case, later_step, new_step, next_step
from support.formats import FLOATS, FULL, named
from support.inputs import (
    MUON,
    gaussian,
    generator,
    integers,
    orthogonal,
    semidefinite,
    with_singular_values,
)
from support.layouts import Wrapped, same_bits
from support.oracles import exact_newton_schulz, plain_newton_schulz
from support.rule import error

TESTS = str(Path(__file__).parent)

needs_backend = pytest.mark.usefixtures("backend")


# Scale.


@pytest.mark.parametrize("dtype", FULL, ids=named)
def test_F01_F02_muon_moves_as_far_at_any_gradient_scale(dtype, backend):
    case = new_step("muon_step_", ((20, 30),), dtype, weight_decay=0.0)
    direction = torch.randint(-63, 64, (20, 30), generator=generator(0)).to(dtype)
    limits = range(-110, 111, 20) if dtype == torch.float32 else range(-1000, 1001, 250)
    moves = []
    for k in limits:
        one = case.clone().with_(grads=[direction * 2.0**k])
        one.run(backend.name)
        moves.append(one["params"][0])
    assert all(same_bits(move, moves[0]) for move in moves)
    assert 2.0 < float((moves[0] - case["params"][0]).norm()) / 0.1 < 6.0


@needs_backend
@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e-20, 1e-12, 1e20, 1e30, 1e37])
def test_F01_F02_newton_schulz_at_scales_that_others_lose(scale):
    x = gaussian(16, 24)
    expected = exact_newton_schulz(x, MUON)
    # At 1e-40 a number has 16 bits left.
    assert error(sk.newton_schulz(x.double().mul(scale).float()), expected) < 1e-3


@needs_backend
@pytest.mark.parametrize("dtype", FLOATS, ids=named)
@pytest.mark.parametrize("label", ["gram", "newton_schulz", "polar", "kron_precondition"])
def test_F03_a_zero_matrix_among_others(label, dtype):
    one = case(label, dtype)
    clean = one.run()[0]
    one.args[0][1].zero_()
    result = one.run()[0]
    assert not result[1].any()
    assert same_bits(result[0], clean[0])


@pytest.mark.parametrize("op", STEPS)
def test_F03_zero_gradients_in_a_run(op, backend):
    one = later_step(op, ((5, 8), (7, 7)), taken=2)
    for _ in range(3):
        one = one.with_(grads=[torch.zeros_like(one["grads"][0]), one["grads"][1]])
        one.run(backend.name)
    assert all(x.isfinite().all() for x in one.written())
    assert int(one["skipped"]) == 0


@pytest.mark.parametrize("op", STEPS)
def test_F10_a_gradient_spike_with_coarse_products_allowed(op, backend):
    one = later_step(op, ((8, 8),), taken=2)

    def run_through_spike():
        x = one.clone()
        for t in range(8):
            x = next_step(x, 50 + t)
            if t == 2:
                x["grads"][0].mul_(1000.0)
            x.run(backend.name)
        return x.written()

    expected = run_through_spike()
    assert all(x.isfinite().all() for x in expected)
    old = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert backend.name == "reference" or same_bits(run_through_spike(), expected)
    finally:
        torch.set_float32_matmul_precision(old)


def test_F18_clipping_changes_nothing(backend):
    """The magnitude of a gradient is not Muon's business, nor is a clipping coefficient."""
    one = new_step("muon_step_", ((10, 14),))
    results = []
    for coefficient in (1.0, 1e-8, 1e8):
        clipped = one.clone()
        clipped["grads"][0].mul_(coefficient)
        clipped.run(backend.name)
        results.append(clipped["params"][0].double() - one["params"][0].double())
    assert error(results[1], results[0]) < 1e-4 and error(results[2], results[0]) < 1e-4


# Convergence.


def stress_spectrum(kind, n=40):
    tail = torch.logspace(-4, -7, n - 2, dtype=torch.float64)
    values = {
        "linear to 0.5": torch.linspace(0.5, 0.0, n),
        "log to 1e-3": torch.logspace(0, -3, n),
        "log to 1e-5": torch.logspace(0, -5, n),
        "log to 1e-7": torch.logspace(0, -7, n),
        "log to 1e-9": torch.logspace(0, -9, n),
        "half zeros": torch.cat([torch.linspace(1.0, 0.1, n // 2), torch.zeros(n - n // 2)]),
        "10 non-zeros": torch.cat([torch.linspace(1.0, 0.1, 10), torch.zeros(n - 10)]),
        "2 non-zeros": torch.cat([torch.tensor([1.0, 0.5]), torch.zeros(n - 2)]),
        "2 large, a tail": torch.cat([torch.tensor([1.0, 0.5]).double(), tail]),
        "log to 1e-10, a cluster": torch.cat(
            [torch.logspace(0, -10, n - 8), torch.full((8,), 0.3)]
        ),
        "gamma": torch._standard_gamma(torch.full((n,), 3.0), generator=generator(0)) / 0.5,
    }
    return values[kind].double().sort(descending=True).values


STRESS = (
    *("linear to 0.5", "log to 1e-3", "log to 1e-5", "log to 1e-7", "log to 1e-9", "half zeros"),
    *("10 non-zeros", "2 non-zeros", "2 large, a tail", "log to 1e-10, a cluster", "gamma"),
)


def metrics(q, x):
    """How far Q is from a polar factor of X, in five ways."""
    q, x = q.double(), x.double()
    gram = q @ q.mT
    h = q.mT @ x
    h = 0.5 * (h + h.mT)
    values = torch.linalg.eigvalsh(h)
    nuclear = torch.linalg.svdvals(x).sum()
    return {
        "orthogonality": error(gram, torch.eye(len(gram), dtype=torch.float64)),
        "residual": error(q @ h, x),
        "negative part": float(values.clamp(max=0.0).norm() / values.norm()),
        "dual gap": abs(float(1.0 - (q * x).sum() / nuclear)),
        "above 1": max(float(torch.linalg.matrix_norm(q, 2)) - 1.0, 0.0),
    }


@needs_backend
@pytest.mark.parametrize("method", ["auto", "gram"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=named)
@pytest.mark.parametrize("spectrum", STRESS)
def test_F13_gram_iteration_is_stable_on_the_stress_spectra(spectrum, dtype, method):
    x = with_singular_values(40, 90, stress_spectrum(spectrum)).to(dtype)
    ours = metrics(sk.newton_schulz(x, method=method), x)
    if method == "gram":
        # Asked for by name it may lose accuracy, but it does not blow up.
        assert ours["above 1"] < 0.5 and ours["orthogonality"] < 1.5
        return
    theirs = metrics(plain_newton_schulz(x, MUON), x)
    for name, value in theirs.items():
        assert ours[name] <= 2.0 * value + 0.02, (name, ours[name], value)


@needs_backend
def test_F14_a_matrix_of_rank_one_maps_to_the_stated_band():
    x = gaussian(12, 1) @ gaussian(1, 20, seed=1)
    for coefficients, low, high in (("muon", 0.68, 1.14), ("quintic", 0.97, 1.04)):
        top = float(torch.linalg.matrix_norm(sk.newton_schulz(x, coefficients=coefficients), 2))
        assert low <= top <= high


def test_F08_a_failing_decomposition_keeps_the_old_root(monkeypatch):
    """On the specification, whose solver can be made to fail."""
    options = {"root_method": "eigen", "ridge": 0.0, "relative_ridge": 0.0, "refresh": [1]}
    one = later_step("shampoo_step_", ((5, 5),), **options)
    old = one["left_roots"][0].clone()

    def fails(*args, **options):
        raise torch.linalg.LinAlgError("no convergence")

    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "eigh", fails)
        one.run("reference")
    assert same_bits(one["left_roots"][0], old) and one["root_failures"][0].tolist() == [1, 1]
    assert int(one["skipped"]) == 0 and one["params"][0].isfinite().all()
    next_step(one, 9).run("reference")
    assert not same_bits(one["left_roots"][0], old) and one["root_failures"][0].tolist() == [1, 1]


# Shapes and layouts.


@needs_backend
@pytest.mark.parametrize("dtype", FLOATS, ids=named)
def test_F26_every_small_shape(dtype):
    wide = integers(33, 33, most=2, dtype=dtype)
    signs = torch.diag(torch.tensor([(-1.0) ** i for i in range(33)])).to(dtype)
    for m in range(1, 34):
        for n in range(1, 34):
            x = wide[:m, :n]
            assert torch.equal(sk.gram(x).double(), x.double() @ x.double().mT), (m, n)
            flipped = sk.kron_precondition(x, signs[:m, :m], signs[:n, :n])
            expected = signs[:m, :m].double() @ x.double() @ signs[:n, :n].double()
            assert torch.equal(flipped.double(), expected), (m, n)


@needs_backend
def test_F26_newton_schulz_of_every_small_shape():
    wide = gaussian(33, 33, dtype=torch.float64)
    for m in range(1, 34, 2):
        for n in range(1, 34, 3):
            x = wide[:m, :n]
            assert error(sk.newton_schulz(x), exact_newton_schulz(x, MUON)) < 1e-11, (m, n)


@pytest.mark.parametrize("op", STEPS)
def test_F25_F58_empty_entries_anywhere_in_a_long_list(op, backend):
    for count in (1, 2, 7, 70) if backend.isa == "baseline" else (1, 7):
        shapes = [(3, 4)] * count
        for position in sorted({0, count // 2, count - 1}):
            shapes[position] = (0, 4) if position % 2 else (2, 4, 0)
        one = new_step(op, shapes)
        one.run(backend.name)
        moved = [int(c) for c in one["step_counts"]]
        idle = 0 if op == "soap_step_" else 1
        assert moved == [idle if p.numel() else 0 for p in one["params"]]


@pytest.mark.parametrize("op", STEPS)
@pytest.mark.parametrize("transposed", ["params", "grads"])
def test_F28_gradient_and_parameter_of_other_layouts(op, transposed, backend):
    one = later_step(op, ((6, 9),), torch.float64)
    expected = one.run_reference()
    turned = one[transposed][0].mT.contiguous().mT
    one = one.with_(**{transposed: [turned]})
    one.run(backend.name)
    assert error(one["params"][0], expected["params"][0]) < 1e-9
    assert turned.stride() == (1, 6)


@pytest.mark.parametrize("op", STEPS)
def test_F24_blocks_of_a_matrix_are_entries(op, backend):
    """Fused projections and blocks: strided views of one parameter, each with its own state."""
    whole, grads = gaussian(7, 11), gaussian(7, 11, seed=1)
    parts = [(slice(0, 3), slice(0, 5)), (slice(0, 3), slice(5, 11)), (slice(3, 7), slice(0, 11))]
    shapes = [whole[part].shape for part in parts]
    views = new_step(op, shapes)
    views = views.with_(
        params=[whole[part] for part in parts], grads=[grads[part] for part in parts]
    )
    copies = views.clone()
    copies = copies.with_(params=[p.contiguous() for p in copies["params"]])
    for _ in range(2):
        views.run(backend.name)
        copies.run(backend.name)
    for part, alone in zip(parts, copies["params"], strict=True):
        assert error(whole[part], alone.double()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=named)
def test_F57_offsets_beyond_32_bits(dtype, backend):
    """Rows and matrices that lie 2^31 elements apart, in memory that is never touched otherwise."""
    try:
        huge = torch.empty((1 << 31) + 4096, dtype=dtype)
    except RuntimeError as failure:
        pytest.skip(f"no address space for it: {failure}")
    x = huge.as_strided((3, 5), (1 << 30, 7))
    x.copy_(integers(3, 5))
    near = x.clone()
    assert torch.equal(sk.gram(x), sk.gram(near))
    assert same_bits(sk.newton_schulz(x), sk.newton_schulz(near))
    assert torch.equal(sk.kron_precondition(x.mT, near, None), sk.gram(near))
    one = new_step("muon_step_", ((3, 5),), dtype)
    expected = one.clone().with_(params=[near]).run(backend.name)
    assert same_bits(one.with_(params=[x]).run(backend.name)[0], expected[0])
    batch = huge.as_strided((3, 4, 5), (1 << 30, 7, 1))
    batch.copy_(integers(3, 4, 5))
    assert torch.equal(sk.gram(batch), sk.gram(batch.clone()))
    one = new_step("muon_step_", ((3, 4, 5),), dtype)
    expected = one.clone().with_(params=[batch.clone()]).run(backend.name)
    assert same_bits(one.with_(params=[batch]).run(backend.name)[0], expected[0])


@needs_backend
def test_F34_wrapper_subclasses_are_refused_and_parameters_are_not():
    with pytest.raises(TypeError, match="Wrapped"):
        sk.gram(Wrapped(gaussian(3, 4)))
    with pytest.raises(TypeError, match=r"params\[0\].*Wrapped"):
        sk.muon_step_([Wrapped(gaussian(3, 4))], [gaussian(3, 4)], [torch.zeros(3, 4)], lr=0.1)
    assert sk.gram(torch.nn.Parameter(gaussian(3, 4), requires_grad=False)).shape == (3, 3)


# State and steps.


@pytest.mark.parametrize("op", STEPS)
def test_F17_steps_are_counted_once(op, backend):
    one = new_step(op, ((4, 5), (3, 3)))
    idle = 1 if op == "soap_step_" else 0  # the first call only makes the bases
    for t in range(10):
        one = next_step(one, t)
        if t == 5:
            one["grads"][0][0, 0] = torch.nan
        one.run(backend.name)
    assert [int(c) for c in one["step_counts"]] == [9 - idle, 10 - idle]
    assert int(one["skipped"]) == 1


@pytest.mark.parametrize("op", STEPS)
def test_F35_state_stays_where_it_is(op, backend):
    one = new_step(op, ((4, 5), (3, 3)))
    places = [x.data_ptr() for x in one.written()]
    for t in range(3):
        one = next_step(one, t)
        one.run(backend.name)
        assert [x.data_ptr() for x in one.written()] == places


# Import and start.


def run_python(code, timeout=120):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout, check=True
    ).stdout


def test_F64_import_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None; import torch, spectral_kernels as sk;"
        "print(sk.gram(torch.ones(2, 3)).tolist())"
    )
    assert run_python(code).strip() == "[[3.0, 3.0], [3.0, 3.0]]"


def test_import_changes_nothing_for_others():
    code = (
        "import sys, torch; threads = torch.get_num_threads(); import spectral_kernels;"
        "assert torch.get_num_threads() == threads;"
        "assert torch.tensor(2.0**-140).mul(1.0).item() == 2.0**-140 and 5e-324 * 1.0 > 0.0;"
        "print(sorted({'triton', 'matplotlib', 'rich', 'numpy.testing'} & set(sys.modules)))"
    )
    assert run_python(code).strip() == "[]"


@pytest.mark.parametrize("op", STEPS)
def test_F67_first_step_does_not_wait_for_anything(op):
    code = (
        f"import sys, time; sys.path.insert(0, {TESTS!r});"
        "import torch; from support.cases import new_step;"
        f"one = new_step({op!r}, ((64, 96), (128, 32)));"
        "start = time.perf_counter(); one.run(); print(time.perf_counter() - start)"
    )
    assert float(run_python(code)) < 2.0


# Relations that hold without any oracle.


@needs_backend
@pytest.mark.parametrize("seed", range(4))
def test_newton_schulz_commutes_with_what_the_polar_factor_does(seed):
    x = gaussian(9, 14, dtype=torch.float64, seed=seed)
    o = sk.newton_schulz(x)
    left, right = orthogonal(9, seed + 1), orthogonal(14, seed + 2)
    rows = torch.randperm(9, generator=generator(seed))
    assert error(sk.newton_schulz(x.mT).mT, o) < 1e-12
    assert same_bits(sk.newton_schulz(-x), -o)
    assert error(sk.newton_schulz(left @ x @ right), left @ o @ right) < 1e-11
    assert error(sk.newton_schulz(x[rows]), o[rows]) < 1e-12
    padded = torch.zeros(12, 20, dtype=torch.float64)
    padded[:9, :14] = x
    assert error(sk.newton_schulz(padded)[:9, :14], o) < 1e-12
    assert not sk.newton_schulz(padded)[9:].any() and not sk.newton_schulz(padded)[:, 14:].any()


@needs_backend
@pytest.mark.parametrize("seed", range(4))
def test_roots_commute_with_what_the_inverse_does(seed):
    a = semidefinite(9, 50.0, seed)
    root = sk.inverse_root(a, 4, ridge=1e-3)
    q = orthogonal(9, seed + 1)
    order = torch.randperm(9, generator=generator(seed))
    assert error(sk.inverse_root(q @ a @ q.mT, 4, ridge=1e-3), q @ root @ q.mT) < 1e-11
    turned = sk.inverse_root(a[order][:, order], 4, ridge=1e-3)
    assert error(turned, root[order][:, order]) < 1e-11
    twice = sk.inverse_root(a, 2, ridge=1e-3)
    assert error(root @ root, twice) < 1e-11
    blocks = torch.block_diag(a, 0.5 * a)
    halves = torch.block_diag(root, sk.inverse_root(0.5 * a, 4, ridge=1e-3))
    assert error(sk.inverse_root(blocks, 4, ridge=1e-3), halves) < 1e-11
