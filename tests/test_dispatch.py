"""The choice of a backend, what is said about it, and the counters that prove it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import spectral_kernels as sk
import torch
from pretended_card import card
from spectral_kernels import _cuda, _dispatch, _extension
from support.cases import case, labels
from support.inputs import gaussian, semidefinite
from support.layouts import same_bits

FIRST = "cpu" if _extension.MODULE is not None else "reference"


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("SPECTRAL_KERNELS_BACKEND", raising=False)
    sk.call_counts(reset=True)


def ran():
    """The backend of the only call since the last reset."""
    ((key, count),) = sk.call_counts(reset=True).items()
    assert count == 1
    return key.partition("/")[2]


def test_the_automatic_choice_is_compiled_code():
    sk.gram(gaussian(3, 4))
    assert ran() == FIRST


def test_argument_beats_context_beats_environment(monkeypatch, native):
    x = gaussian(3, 4)
    monkeypatch.setenv("SPECTRAL_KERNELS_BACKEND", "reference")
    sk.gram(x)
    assert ran() == "reference"
    with sk.use_backend("cpu"):
        sk.gram(x)
        assert ran() == "cpu"
        sk.gram(x, backend="reference")
        assert ran() == "reference"
    with sk.use_backend("auto"):
        sk.gram(x)
        assert ran() == "cpu"
    sk.gram(x)
    assert ran() == "reference"


def test_contexts_nest_and_end_with_an_exception(native):
    with sk.use_backend("reference"):
        with pytest.raises(ZeroDivisionError), sk.use_backend("cpu"):
            _ = 1 // 0
        sk.gram(gaussian(3, 4))
        assert ran() == "reference"
    sk.gram(gaussian(3, 4))
    assert ran() == "cpu"


def test_a_context_belongs_to_its_thread(native):
    with sk.use_backend("reference"):
        thread = threading.Thread(target=sk.gram, args=(gaussian(3, 4),))
        thread.start()
        thread.join()
    assert ran() == "cpu"


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_backend_that_cannot_run_says_why(name):
    x = gaussian(3, 4)
    explanation = sk.explain("gram", x, backend=name)
    assert explanation.backend is None and explanation.asked_by == "argument"
    with pytest.raises(RuntimeError) as failure:
        sk.gram(x, backend=name)
    assert f"{name}: {explanation.rejected[name]}" in str(failure.value)
    with sk.use_backend(name), pytest.raises(RuntimeError, match="backend cannot run gram"):
        sk.gram(x)
    assert not sk.call_counts()


def test_unknown_names(monkeypatch):
    x = gaussian(3, 4)
    with pytest.raises(ValueError, match="'gpu'"):
        sk.gram(x, backend="gpu")
    with pytest.raises(ValueError, match="'gpu'"), sk.use_backend("gpu"):
        pass
    with pytest.raises(ValueError, match="unknown operator 'syrk'"):
        sk.explain("syrk", x)
    monkeypatch.setenv("SPECTRAL_KERNELS_BACKEND", "fast")
    with pytest.raises(ValueError, match="SPECTRAL_KERNELS_BACKEND.*'fast'"):
        sk.gram(x)


@pytest.mark.parametrize("op", _dispatch.OPERATORS)
def test_explain_tells_the_choice_and_every_rejection(op, native):
    explanation = sk.explain(op, gaussian(3, 4))
    assert (explanation.op, explanation.backend, explanation.asked_by) == (op, "cpu", "automatic")
    assert set(explanation.rejected) <= {"cuda", "triton"}
    text = str(explanation)
    assert text.startswith(f"{op}: cpu (automatic)")
    assert all(f"not {name}: {why}" in text for name, why in explanation.rejected.items())


def test_methods_for_comparison_run_on_the_specification(native):
    a = semidefinite(5, 10.0)
    for method in ("newton", "newton_db"):
        assert sk.explain("inverse_root", a, method=method).backend == "reference"
        sk.inverse_root(a, 4, ridge=0.01, method=method)
        assert ran() == "reference"
        with pytest.raises(RuntimeError, match=method):
            sk.inverse_root(a, 4, ridge=0.01, method=method, backend="cpu")


@pytest.mark.parametrize("label", [label for label in labels() if "-" not in label])
def test_every_call_is_counted(label, backend):
    for _ in range(3):
        case(label).run()
    assert sk.call_counts(reset=True) == {f"{label}/{backend.name}": 3}
    assert sk.call_counts() == {}


def test_choice_does_not_depend_on_global_flags(native):
    x = gaussian(30, 70)
    expected = sk.newton_schulz(x)
    old = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(precision)
            assert same_bits(sk.newton_schulz(x), expected)
    finally:
        torch.set_float32_matmul_precision(old)


def test_same_bits_for_a_matrix_alone_and_in_a_batch_of_another_size(backend):
    """The choice of method depends on the matrix, never on its neighbours."""
    for shape in ((8, 9), (8, 64), (64, 8), (33, 33)):
        x = gaussian(20, *shape)
        together = sk.newton_schulz(x)
        assert same_bits(together[7], sk.newton_schulz(x[7]))
        assert same_bits(together[:3], sk.newton_schulz(x[:3]))


# Instruction sets.


def python(code, **environment):
    """Runs code in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_cap_takes_the_best_set_up_to_it(native):
    module = _extension.MODULE
    supported = module.supported_isas()
    assert supported[0] == "baseline" and set(supported) <= set(module.compiled_isas())
    try:
        for name in module.compiled_isas():
            module.set_isa_cap(name)
            expected = name if name in supported else supported[-1]
            assert module.current_isa() == expected
        with pytest.raises(ValueError, match="unknown instruction set 'sse9'.*baseline"):
            module.set_isa_cap("sse9")
        assert module.current_isa() == expected
    finally:
        module.set_isa_cap("")
    assert os.environ.get("SPECTRAL_KERNELS_CPU_ISA") or module.current_isa() == supported[-1]


def test_every_set_runs_or_says_why_not(native):
    module = _extension.MODULE
    refused = dict(module.refused_isas())
    assert [*module.supported_isas(), *refused] == module.compiled_isas()
    reasons = ("the processor has no ", "the system does not permit ", "it stands on ")
    assert all(why.startswith(reasons) for why in refused.values())


def test_environment_caps_the_instruction_set(native):
    code = "import spectral_kernels; from spectral_kernels import _C; print(_C.current_isa())"
    assert python(code, SPECTRAL_KERNELS_CPU_ISA="baseline").stdout.strip() == "baseline"
    wrong = python(
        "import torch, spectral_kernels as sk; sk.gram(torch.ones(2, 2))",
        SPECTRAL_KERNELS_CPU_ISA="sse9",
    )
    assert wrong.returncode == 1
    assert "SPECTRAL_KERNELS_CPU_ISA is 'sse9'" in wrong.stderr.splitlines()[-1]


def test_environment_keeps_float32_products_by_fma(native):
    # Large enough that splitting pays.
    code = (
        "import torch; from spectral_kernels import _C, gram; torch.manual_seed(0);"
        "x = torch.randn(768, 768); print(_C.fp32_products(), hash(gram(x).numpy().tobytes()))"
    )
    fixed = {"PYTHONHASHSEED": "0"}
    kept = python(code, SPECTRAL_KERNELS_SPLIT_FP32="0", **fixed).stdout.split()
    assert kept[0] == "fma"
    capped = python(code, SPECTRAL_KERNELS_CPU_ISA="avx512bf16", **fixed).stdout.split()
    if "avx512" in _extension.MODULE.supported_isas():
        assert kept == capped
    if "amx" in _extension.MODULE.supported_isas():
        split = python(code, **fixed).stdout.split()
        assert split[0] == "tiles" and split[1] != kept[1]
    wrong = python(
        "import torch, spectral_kernels as sk; sk.gram(torch.ones(2, 2))",
        SPECTRAL_KERNELS_SPLIT_FP32="yes",
    )
    assert wrong.returncode == 1
    assert "SPECTRAL_KERNELS_SPLIT_FP32 is 'yes'" in wrong.stderr.splitlines()[-1]


@pytest.mark.parametrize("label", ["gram", "newton_schulz", "inverse_root", "kron_precondition"])
def test_instruction_sets_differ_by_rounding_only(label, native):
    results = []
    for name in _extension.MODULE.supported_isas():
        _extension.MODULE.set_isa_cap(name)
        try:
            results.append(case(label).run("cpu")[0].double())
        finally:
            _extension.MODULE.set_isa_cap("")
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("built", "runs", "not_on"),
    [
        ("sm_80 sm_86 sm_89 sm_90a sm_100a sm_120", (80, 86, 87, 90, 100, 103, 120, 121), (70, 75)),
        ("sm_90a", (90,), (80, 89, 100, 120)),
        ("sm_90a sm_86", (86, 89, 90), (80, 100, 120)),
        ("sm_89", (89, 90, 120), (80, 86)),
    ],
)
def test_cuda_kernels_leave_processors_alone_that_they_were_not_built_for(
    built, runs, not_on, monkeypatch
):
    monkeypatch.setattr(_cuda, "architectures", built.split)
    assert all(_cuda.runs_on(*divmod(number, 10)) for number in runs)
    assert not any(_cuda.runs_on(*divmod(number, 10)) for number in not_on)


# Lists on a card that is not there.


@pytest.fixture
def pretended(monkeypatch):
    monkeypatch.setattr(_cuda, "_capability", lambda tensor: 9)
    with card(monkeypatch) as calls:
        yield calls


def on_card(*shapes, dtype=torch.bfloat16):
    return [torch.empty(shape, dtype=dtype, device="cuda") for shape in shapes]


def muon_lists(*shapes, momenta=None):
    counts = [torch.zeros((), device="cuda") for _ in shapes]
    momenta = momenta or on_card(*shapes, dtype=torch.float32)
    return {
        "params": on_card(*shapes),
        "grads": on_card(*shapes),
        "momentum_buffers": momenta,
        "step_counts": counts,
        "skipped": torch.zeros((), dtype=torch.int64, device="cuda"),
        "lr": 0.1,
    }


SMALL, LARGE = (64, 96), (600, 700)


@pytest.mark.parametrize("shapes", [(SMALL, LARGE, SMALL), (LARGE, SMALL), (LARGE,), (SMALL,)])
def test_an_entry_of_a_list_has_the_backend_that_it_has_alone(shapes, pretended):
    lists = muon_lists(*shapes)
    sk.muon_step_(**lists, scale=[float(i) for i, _ in enumerate(shapes)])
    expected = {SMALL: "cuda", LARGE: "triton"}
    found = {}
    for name, (params, grads, momenta, _, counts, skipped, _), options in pretended:
        assert skipped is lists["skipped"] and len(options["restarts"]) == len(params)
        for own in zip(params, grads, momenta, counts, options["scales"], strict=True):
            assert expected[tuple(own[0].shape)] == name
            found[int(own[-1])] = own[:-1]
    assert len(pretended) == len(set(shapes))
    names = ("params", "grads", "momentum_buffers", "step_counts")
    for i, tensors in found.items():
        assert all(x is lists[name][i] for x, name in zip(tensors, names, strict=True))
    assert sorted(found) == list(range(len(shapes)))


def test_a_bad_list_raises_before_the_first_of_several_backends_writes(pretended):
    momenta = on_card(SMALL, (5, 5), dtype=torch.float32)
    with pytest.raises(ValueError, match=r"momentum_buffers\[1\] .*\(5, 5\)"):
        sk.muon_step_(**muon_lists(SMALL, LARGE, momenta=momenta))
    momenta = [*on_card(SMALL, dtype=torch.float32), torch.empty(LARGE, device="cpu")]
    with pytest.raises(ValueError, match=r"momentum_buffers\[1\] is on cpu"):
        sk.muon_step_(**muon_lists(SMALL, LARGE, momenta=momenta))
    twice = on_card(LARGE, dtype=torch.float32) * 2
    with pytest.raises(ValueError, match="overlap in memory"):
        sk.muon_step_(**muon_lists(LARGE, LARGE, SMALL, momenta=[*twice, momenta[0]]))
    assert not pretended


def test_an_entry_that_no_backend_takes_is_named_before_any_is_run(pretended, monkeypatch):
    def refused(op, tensors, options):
        return "600 rows" if any(tensor.shape[-2] == 600 for tensor in tensors) else None

    monkeypatch.setattr(_cuda, "rejection", refused)
    with pytest.raises(RuntimeError, match="cuda: 600 rows"):
        sk.muon_step_(**muon_lists(SMALL, LARGE), backend="cuda")
    assert not pretended


def test_an_optimizer_gives_every_matrix_its_own_backend(pretended, monkeypatch):
    monkeypatch.setattr(sk.optim.Muon, "_warn_of_skip", lambda self: None)
    params = [torch.nn.Parameter(x) for x in on_card(LARGE, SMALL, LARGE)]
    for param in params:
        param.grad = torch.empty_like(param)
    sk.optim.Muon(params).step()
    ran = {tuple(x.shape): name for name, (own, *_), _ in pretended for x in own}
    assert ran == {SMALL: "cuda", LARGE: "triton"}
