"""What swap_in replaces, refuses, waits for and puts back."""

from __future__ import annotations

import copy
import functools
import gc
import importlib
import logging
import pickle
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import spectral_kernels as sk
import torch
from spectral_kernels import _dispatch, swap_in
from spectral_kernels.swap import ADAPTERS
from swap_support import DOUBLES, doubles, gradient, parameters, steps
from torch import Tensor
from torch.optim import _muon
from torch.utils._pytree import tree_leaves

__all__ = ["doubles"]

pytestmark = pytest.mark.usefixtures("native", "one_thread")

MUON = ["torch.optim._muon._single_tensor_muon", "torch.optim._muon._zeropower_via_newtonschulz"]
METHODS = ["project", "project_back", "update_preconditioner", "get_orthogonal_matrix_QR"]


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Any:
    """Every test puts back what it replaced."""
    before = dict(vars(_muon))
    finders = list(sys.meta_path)
    yield
    assert vars(_muon) == before
    assert sys.meta_path == finders


def module_of(name: str, **contents: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(contents)
    return module


# In and out.


def test_undo_restores_every_object() -> None:
    own = (_muon._single_tensor_muon, _muon._zeropower_via_newtonschulz)
    swap = swap_in("torch.optim.Muon")
    assert swap.replaced == MUON
    assert _muon._single_tensor_muon is not own[0]
    swap.undo()
    assert (_muon._single_tensor_muon, _muon._zeropower_via_newtonschulz) == own
    assert swap.replaced == []
    assert "replaced for a while in torch.optim._muon:" in str(swap)
    swap.undo()


def test_context_manager_undoes_on_errors_too() -> None:
    own = _muon._single_tensor_muon
    with pytest.raises(KeyError), swap_in("torch.optim.Muon"):
        assert _muon._single_tensor_muon is not own
        raise KeyError
    assert _muon._single_tensor_muon is own


def test_undo_inside_the_context() -> None:
    with swap_in("torch.optim.Muon") as swap:
        swap.undo()
        assert swap.replaced == []


def test_second_swap_is_refused_and_changes_nothing() -> None:
    with swap_in("torch.optim.Muon") as first:
        replaced = _muon._single_tensor_muon
        with swap_in("torch.optim.Muon") as second:
            assert second.replaced == []
            assert "earlier swap_in" in second.refused["torch.optim._muon"]
        assert _muon._single_tensor_muon is replaced
        assert first.replaced == MUON
    with swap_in("torch.optim.Muon") as third:
        assert third.replaced == MUON and not third.refused


def test_undo_refuses_if_somebody_patched_on_top(monkeypatch: Any) -> None:
    swap = swap_in("torch.optim.Muon")
    replaced = _muon._single_tensor_muon
    with monkeypatch.context() as patch:
        patch.setattr(_muon, "_single_tensor_muon", functools.partial(replaced))
        orthogonalize = _muon._zeropower_via_newtonschulz
        with pytest.raises(RuntimeError, match=r"_single_tensor_muon changed after swap_in"):
            swap.undo()
        assert swap.replaced == MUON
        assert _muon._zeropower_via_newtonschulz is orthogonalize
    swap.undo()


def test_a_kept_reference_runs_the_original_after_undo() -> None:
    with swap_in("torch.optim.Muon") as swap:
        kept = _muon._zeropower_via_newtonschulz
        calls = swap.calls[MUON[1]]
        kept(gradient((4, 6), 0).float(), (3.4445, -4.775, 2.0315), 5, 1e-7)
    assert calls.taken == 1
    x = gradient((4, 6), 0).float()
    arguments = ((3.4445, -4.775, 2.0315), 5, 1e-7)
    assert torch.equal(kept(x, *arguments), _muon._zeropower_via_newtonschulz(x, *arguments))
    assert calls.taken == 1


# What is refused.


def test_changed_parameters_are_refused(monkeypatch: Any) -> None:
    def renamed(grad: Tensor, coefficients: Any, ns_steps: int, eps: float) -> Tensor:
        return grad

    monkeypatch.setattr(_muon, "_zeropower_via_newtonschulz", renamed)
    own = _muon._single_tensor_muon
    with swap_in("torch.optim.Muon") as swap:
        assert swap.replaced == [] and _muon._single_tensor_muon is own
        assert swap.refused["torch.optim._muon"] == (
            "torch.optim._muon._zeropower_via_newtonschulz(grad, coefficients, ns_steps, eps) is "
            "not the version that this was written for, "
            "_zeropower_via_newtonschulz(grad, ns_coefficients, ns_steps, eps)"
        )
        assert "refused torch.optim._muon" in str(swap)
        p = parameters(((4, 4),))
        steps(torch.optim.Muon(p), p, 1)


@pytest.mark.parametrize("name", ["_single_tensor_muon", "_adjust_lr"])
def test_missing_names_are_refused(name: str, monkeypatch: Any) -> None:
    monkeypatch.delattr(_muon, name)
    with swap_in("torch.optim.Muon") as swap:
        assert swap.replaced == []
        assert swap.refused["torch.optim._muon"] == f"torch.optim._muon has no {name} any more"


def test_other_numbers_are_refused(monkeypatch: Any) -> None:
    own = _muon._zeropower_via_newtonschulz

    def twice(grad: Tensor, ns_coefficients: Any, ns_steps: int, eps: float) -> Tensor:
        return 2 * own(grad, ns_coefficients, ns_steps, eps)

    monkeypatch.setattr(_muon, "_zeropower_via_newtonschulz", twice)
    with swap_in("torch.optim.Muon") as swap:
        assert swap.replaced == []
        assert "does not compute what the version" in swap.refused["torch.optim._muon"]


def test_a_failing_trial_is_refused(monkeypatch: Any) -> None:
    def broken(grad: Tensor, ns_coefficients: Any, ns_steps: int, eps: float) -> Tensor:
        raise OSError("no such thing")

    monkeypatch.setattr(_muon, "_zeropower_via_newtonschulz", broken)
    with swap_in("torch.optim.Muon") as swap:
        assert swap.replaced == []
        assert "failed with OSError: no such thing" in swap.refused["torch.optim._muon"]


def test_without_kernels_everything_is_refused(monkeypatch: Any) -> None:
    monkeypatch.setattr(_dispatch, "unavailable", lambda backend: "the compiled part was not built")
    with swap_in() as swap:
        assert swap.replaced == []
        assert "the compiled part was not built" in swap.refused["torch.optim._muon"]


def test_changed_defaults_are_refused(doubles: None, monkeypatch: Any) -> None:
    muon = importlib.import_module("optimizers.muon")
    monkeypatch.setattr(muon.msign, "__defaults__", (6, 1e-20))
    with swap_in("DeVA") as swap:
        assert swap.replaced == []
        assert swap.refused == {
            "optimizers.muon": "optimizers.muon.msign has steps=6, not 5 as expected"
        }


def test_soap_with_changed_code_is_refused(doubles: None, monkeypatch: Any) -> None:
    soap = importlib.import_module("soap")
    own = soap.SOAP.update_preconditioner

    def faster(
        self: Any,
        grad: Tensor,
        state: Any,
        max_precond_dim: int = 10000,
        merge_dims: bool = False,
        precondition_1d: bool = False,
    ) -> None:
        own(self, 2 * grad, state, max_precond_dim, merge_dims, precondition_1d)

    monkeypatch.setattr(soap.SOAP, "update_preconditioner", faster)
    with swap_in("SOAP") as swap:
        assert swap.replaced == []
        assert "soap.SOAP's left factor does not compute" in swap.refused["soap"]
        assert soap.SOAP.update_preconditioner is faster


def test_shampoo_without_a_function_is_refused_whole(doubles: None, monkeypatch: Any) -> None:
    importlib.import_module("distributed_shampoo")
    spectral = sys.modules[
        "distributed_shampoo.preconditioner.spectral_descent_preconditioner_list"
    ]
    monkeypatch.delattr(spectral, "matrix_orthogonalization")
    lists = sys.modules["distributed_shampoo.preconditioner.shampoo_preconditioner_list"]
    own = lists.matrix_inverse_root
    with swap_in("distributed_shampoo") as swap:
        assert swap.replaced == [] and lists.matrix_inverse_root is own
        (reason,) = swap.refused.values()
        assert "has no matrix_orthogonalization any more" in reason


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("shampoo_preconditioner_list", "BaseShampooPreconditionerList"),
        ("matrix_functions_types", "CoupledNewtonConfig"),
    ],
)
def test_shampoo_without_a_class_is_refused(
    place: str, name: str, doubles: None, monkeypatch: Any
) -> None:
    importlib.import_module("distributed_shampoo")
    monkeypatch.delattr(f"distributed_shampoo.preconditioner.{place}.{name}")
    with swap_in("distributed_shampoo") as swap:
        assert swap.replaced == [] and len(swap.refused) == 1


def test_an_update_that_does_more_is_refused(doubles: None, monkeypatch: Any) -> None:
    importlib.import_module("distributed_shampoo")
    lists = sys.modules["distributed_shampoo.preconditioner.shampoo_preconditioner_list"]

    def twice(
        self: Any, masked_grad_list: Any, step: Tensor, perform_amortized_computation: bool
    ) -> None:
        for _ in range(2):
            own(self, masked_grad_list, step, perform_amortized_computation)

    own = lists.BaseShampooPreconditionerList.update_preconditioners
    monkeypatch.setattr(lists.BaseShampooPreconditionerList, "update_preconditioners", twice)
    with swap_in("distributed_shampoo") as swap:
        assert swap.replaced == []
        assert "update_preconditioners does not do" in next(iter(swap.refused.values()))


# Imports.


def test_swap_before_import(doubles: None) -> None:
    with swap_in() as swap:
        assert swap.waiting == [adapter.name for adapter in ADAPTERS[1:]]
        assert "waiting for SOAP, not imported yet" in str(swap)
        soap = importlib.import_module("soap")
        assert "SOAP" not in swap.waiting and "DeVA" in swap.waiting
        assert [name for name in swap.replaced if name.startswith("soap.")] == [
            f"soap.SOAP.{method}" for method in METHODS
        ]
        # The module is loaded as it would have been.
        assert type(soap.__loader__).__name__ == "SourceFileLoader"
        assert soap.__spec__.loader is soap.__loader__
        assert Path(soap.__file__) == DOUBLES / "soap.py"
        importlib.import_module("optimizers.deva")
        importlib.import_module("distributed_shampoo")
        for name in ("muon", "gram_newton_schulz", "dion", "heavyball", "pytorch_optimizer"):
            importlib.import_module(name)
        importlib.import_module("emerging_optimizers.orthogonalized_optimizers")
        assert swap.waiting == [] and not swap.refused
    assert not hasattr(soap.SOAP.project, "__wrapped__")


def test_import_after_undo_is_untouched(doubles: None) -> None:
    swap_in().undo()
    soap = importlib.import_module("soap")
    assert not hasattr(soap.SOAP.project, "__wrapped__")


def test_names_imported_before_and_after(doubles: None) -> None:
    muon = importlib.import_module("optimizers.muon")
    before = module_of("imported_before", msign=muon.msign, alias=muon.msign)
    own = muon.msign
    sys.modules["imported_before"] = before
    try:
        with swap_in("DeVA"):
            assert muon.msign is not own
            assert before.msign is before.alias is muon.msign
            after = importlib.import_module("optimizers.deva")
            assert after.msign is muon.msign
        assert muon.msign is before.msign is before.alias is after.msign is own
    finally:
        del sys.modules["imported_before"]


@pytest.mark.parametrize(
    ("target", "module", "name"),
    [
        ("torch.optim.Muon", "torch.optim._muon", "_zeropower_via_newtonschulz"),
        ("KellerJordan/Muon", "muon", "zeropower_via_newtonschulz5"),
        ("dion", "dion.newton_schulz_triton", "zeropower_via_newtonschulz5"),
        ("dion", "dion.polar_express", "polar_express"),
        (
            "emerging-optimizers",
            "emerging_optimizers.orthogonalized_optimizers.muon_utils",
            "newton_schulz",
        ),
        ("heavyball", "heavyball.utils", "inplace_orthogonal_"),
        (
            "pytorch-optimizer",
            "pytorch_optimizer.optimizer.shampoo_utils",
            "zero_power_via_newton_schulz_5",
        ),
    ],
)
def test_functions_of_every_target_imported_before(
    target: str, module: str, name: str, doubles: None
) -> None:
    defined = importlib.import_module(module)
    own = getattr(defined, name)
    before = module_of("imported_before", **{name: own})
    sys.modules["imported_before"] = before
    try:
        with swap_in(target):
            assert getattr(defined, name) is not own
            assert getattr(before, name) is getattr(defined, name)
        assert getattr(before, name) is getattr(defined, name) is own
    finally:
        del sys.modules["imported_before"]


def test_optimizer_classes_imported_before_and_after() -> None:
    from torch.optim import Muon as Before

    with swap_in() as swap:
        from torch.optim import Muon as After

        assert Before is After
        for optimizer in (Before, After):
            p = parameters(((6, 9),))
            steps(optimizer(p), p, 1)
        assert swap.calls[MUON[0]].taken == 2


def test_a_module_of_the_same_name_is_left_alone(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "soap.py").write_text("class SOAP:\n    def project(self): return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    with swap_in() as swap:
        module = importlib.import_module("soap")
        assert module.SOAP().project() == 1
        assert "SOAP" in swap.waiting and not swap.refused
    del sys.modules["soap"]


def test_a_refusal_at_import_is_logged(tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
    source = (DOUBLES / "soap.py").read_text()
    (tmp_path / "soap.py").write_text(
        source.replace("def project(self, grad,", "def project(self, g,")
    )
    monkeypatch.syspath_prepend(tmp_path)
    with caplog.at_level(logging.WARNING, "spectral_kernels"), swap_in() as swap:
        importlib.import_module("soap")
        assert "soap.SOAP.project(self, g, state" in swap.refused["soap"]
    assert "soap keeps its own code" in caplog.text
    del sys.modules["soap"]


def test_failing_imports_fail_as_before(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "soap.py").write_text("raise RuntimeError('broken module')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with swap_in() as swap:
        with pytest.raises(RuntimeError, match="broken module"):
            importlib.import_module("soap")
        assert "SOAP" in swap.waiting
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("swap_doubles_that_do_not_exist.soap")


def test_a_copy_under_another_name(doubles: None, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "my_training_code.py").write_text((DOUBLES / "soap.py").read_text())
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("my_training_code")
    with swap_in() as swap:
        assert f"my_training_code.SOAP.{METHODS[0]}" in swap.replaced
    with swap_in(module.SOAP) as swap:
        assert swap.replaced == [f"my_training_code.SOAP.{method}" for method in METHODS]
    del sys.modules["my_training_code"]


def test_reload_is_swapped_anew(doubles: None) -> None:
    with swap_in("DeVA"):
        muon = importlib.import_module("optimizers.muon")
        first = muon.msign
        importlib.reload(muon)
        assert muon.msign is not first and hasattr(muon.msign, "__wrapped__")
    assert not hasattr(muon.msign, "__wrapped__")


# Targets.


def test_targets(doubles: None) -> None:
    soap = importlib.import_module("soap")
    p = parameters(((4, 4),))

    class Derived(torch.optim.Muon):
        pass

    for target in (
        torch.optim,
        _muon,
        torch.optim.Muon,
        Derived,
        torch.optim.Muon(p),
        Derived(p),
        "TORCH.OPTIM.muon",
    ):
        with swap_in(target) as swap:
            assert swap.replaced == MUON and swap.waiting == []
    for target in (soap, soap.SOAP, soap.SOAP(p), "soap"):
        with swap_in(target) as swap:
            assert swap.replaced == [f"soap.SOAP.{method}" for method in METHODS]
    deva = importlib.import_module("optimizers.deva")
    for target in (deva, deva.DeVASchattenNorm, deva.DeVASchattenNorm(p), "DeVA"):
        with swap_in(target) as swap:
            assert "optimizers.muon.msign" in swap.replaced
            assert "optimizers.deva.DeVASchattenNorm.project" in swap.replaced
    shampoo = importlib.import_module("distributed_shampoo")
    with swap_in(shampoo) as swap:
        assert len(swap.replaced) == 8


def test_a_target_does_not_wait_and_a_name_does() -> None:
    with swap_in(torch.optim.Muon) as swap:
        assert swap.waiting == []
    with swap_in("soap") as swap:
        assert swap.waiting == ["SOAP"] and swap.replaced == []


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        ("adam", ValueError, "unknown target 'adam': expected one of torch.optim.Muon"),
        (torch.optim.SGD, ValueError, "holds nothing that can be swapped"),
        (logging, ValueError, "holds nothing that can be swapped"),
        (3, TypeError, "not 3"),
        (int, TypeError, "not <class 'int'>"),
    ],
)
def test_unknown_targets(target: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        swap_in(target)


def test_backends() -> None:
    with pytest.raises(ValueError, match="not 'fast'"):
        swap_in(backend="fast")
    if _dispatch.unavailable("cuda"):
        with pytest.raises(RuntimeError, match="backend 'cuda' cannot run"):
            swap_in(backend="cuda")
    for backend in ("cpu", "reference"):
        p = parameters(((6, 9),))
        with swap_in("torch.optim.Muon", backend=backend):
            sk.call_counts(reset=True)
            steps(torch.optim.Muon(p), p, 1)
            assert set(sk.call_counts()) == {f"muon_step_/{backend}"}


def test_report_at_exit() -> None:
    code = """
import torch, spectral_kernels as sk
sk.swap_in(report=True)
p = torch.nn.Parameter(torch.eye(4))
p.grad = torch.ones(4, 4)
torch.optim.Muon([p]).step()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.search(r"_single_tensor_muon: 1 call, [\d.e-]+ s\n", done.stderr)
    # The first call of a shape is not timed beside the original.
    assert "saved" not in done.stderr


def test_time_saved_is_estimated_on_copies() -> None:
    plain = parameters(((96, 160),))
    steps(torch.optim.Muon(plain), plain, 8)
    swap = swap_in("torch.optim.Muon", report=True)
    try:
        params = parameters(((96, 160),))
        steps(torch.optim.Muon(params), params, 8)
    finally:
        swap.undo()
    with swap_in("torch.optim.Muon") as other:
        expected = parameters(((96, 160),))
        steps(torch.optim.Muon(expected), expected, 8)
    assert torch.equal(params[0], expected[0])
    # Three originals ran besides, and what they call inside was not replaced.
    step, orthogonalize = swap.calls.values()
    assert (step.taken, orthogonalize.taken) == (8, 0)
    assert step.meter is not None and step.meter.seconds > 0.0
    (kind,) = step.meter._kinds.values()
    assert (kind.calls, len(kind.sampled)) == (8, 3)
    median = sorted(kind.sampled)[1]
    assert swap.seconds_saved == pytest.approx(8 * median - kind.seconds)
    assert "saved" in str(swap)
    assert other.seconds_saved is None


def test_originals_that_change_objects_are_not_run_twice(doubles: None) -> None:
    package = importlib.import_module("distributed_shampoo")
    types = importlib.import_module("distributed_shampoo.preconditioner.matrix_functions_types")
    paths = []
    for report in (False, True):
        swap = swap_in("distributed_shampoo", report=report)
        params = parameters(((24, 24),))
        config = types.CoupledNewtonConfig()
        steps(package.DistributedShampoo(params, config=config), params, 8)
        paths.append(params[0].detach().clone())
        swap.undo()
    assert torch.equal(*paths)
    update = next(call for name, call in swap.calls.items() if "update_preconditioners" in name)
    assert update.meter is not None and update.meter.saved == -update.meter.seconds < 0.0


# What is left to the optimizers.


def test_calls_that_are_left() -> None:
    with swap_in("torch.optim.Muon") as swap:
        p = parameters(((6, 9),), torch.float64)
        steps(torch.optim.Muon(p), p, 2)
        assert str(swap.calls[MUON[0]]) == "0 calls, 2 left as they were (float64: 2)"
        x = gradient((4, 6), 0).float().requires_grad_()
        y = _muon._zeropower_via_newtonschulz(x, (3.4445, -4.775, 2.0315), 5, 1e-7)
        assert y.requires_grad
        assert swap.calls[MUON[1]].left == {"needs a gradient": 1}


def test_subclasses_of_tensor_are_left() -> None:
    class Own(Tensor):
        pass

    x = gradient((4, 6), 0).float().as_subclass(Own)
    with swap_in("torch.optim.Muon") as swap:
        _muon._zeropower_via_newtonschulz(x, (3.4445, -4.775, 2.0315), 5, 1e-7)
        assert swap.calls[MUON[1]].left == {"a Own": 1}


def test_a_subclass_that_rotates_in_its_own_way(doubles: None) -> None:
    soap = importlib.import_module("soap")

    class Own(soap.SOAP):  # type: ignore[misc, name-defined]
        def project(self, grad: Tensor, state: Any, **options: Any) -> Tensor:
            return 2 * super().project(grad, state, **options)

    def run() -> Tensor:
        p = parameters(((12, 12),))
        steps(Own(p, lr=0.01), p, 6)
        return p[0].detach()

    theirs = run()
    with swap_in("soap") as swap:
        mine = run()
        left = swap.calls["soap.SOAP.update_preconditioner"].left
    assert left == {"first gradient": 1, "Own has its own project": 5}
    assert torch.allclose(mine, theirs, atol=1e-5)


def test_soap_lets_nan_into_its_factors(doubles: None) -> None:
    soap = importlib.import_module("soap")
    states = []
    for swapped in (False, True):
        p = parameters(((8, 8),))
        optimizer = soap.SOAP(p)
        steps(optimizer, p, 2)
        p[0].grad = gradient((8, 8), 5).float()
        p[0].grad[1, 2] = float("inf")
        if swapped:
            with swap_in("soap"):
                optimizer.step()
        else:
            optimizer.step()
        states.append([p[0], *optimizer.state[p[0]]["GG"]])
    for mine, theirs in zip(*states, strict=True):
        assert torch.equal(mine.isfinite(), theirs.isfinite())


@pytest.mark.parametrize("options", [{"max_iterations": 10}, {"tolerance": 0.1}])
def test_shampoos_iterations_that_damp_are_left(options: Any, doubles: None) -> None:
    package = importlib.import_module("distributed_shampoo")
    types = importlib.import_module("distributed_shampoo.preconditioner.matrix_functions_types")
    p = parameters(((8, 8),))
    with swap_in("distributed_shampoo") as swap:
        config = types.CoupledNewtonConfig(**options)
        steps(package.DistributedShampoo(p, config=config), p, 1)
        calls = next(c for name, c in swap.calls.items() if name.endswith("matrix_inverse_root"))
    assert calls.taken == 0 and calls.left.total() == 2
    assert "iterations, tolerance" in next(iter(calls.left))


def test_shampoo_raises_for_a_factor_that_is_not_finite(doubles: None) -> None:
    package = importlib.import_module("distributed_shampoo")
    types = importlib.import_module("distributed_shampoo.preconditioner.matrix_functions_types")
    for config in (types.EigenConfig(), types.CoupledNewtonConfig()):
        p = parameters(((8, 8), (8, 8)))
        optimizer = package.DistributedShampoo(p, config=config)
        for q in p:
            q.grad = gradient((8, 8), 0).float()
        p[0].grad[0, 0] = float("nan")
        with (
            swap_in("distributed_shampoo"),
            pytest.raises(ValueError, match="factor matrix is not finite"),
        ):
            optimizer.step()


@pytest.mark.parametrize("kind", ["RootFactors", "EigenFactors"])
def test_shampoos_decompositions_run_side_by_side(kind: str, doubles: None) -> None:
    importlib.import_module("distributed_shampoo")
    lists = sys.modules["distributed_shampoo.preconditioner.shampoo_preconditioner_list"]
    types = sys.modules["distributed_shampoo.preconditioner.matrix_functions_types"]
    torch.set_num_threads(2)

    def run() -> tuple[list[Any], set[int]]:
        threads: set[int] = set()
        own = torch.linalg.eigh

        def watched(a: Tensor) -> Any:
            threads.add(threading.get_ident())
            assert torch.get_num_threads() == (1 if swapped else 2)
            return own(a)

        blocks = [getattr(lists, kind)((n, n), types.EigenConfig(), 1e-12) for n in (8, 9, 10)]
        every = lists.BaseShampooPreconditionerList(blocks)
        grads = tuple(gradient((n, n), n).float() for n in (8, 9, 10))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.linalg, "eigh", watched)
            every.update_preconditioners(grads, torch.tensor(1.0), True)
        assert torch.get_num_threads() == 2
        results = [
            block.inv_factor_matrices if kind == "RootFactors" else block.eigen for block in blocks
        ]
        return results, threads

    swapped = False
    theirs, one = run()
    swapped = True
    with swap_in("distributed_shampoo"):
        mine, several = run()
    assert one == {threading.get_ident()} and several.isdisjoint(one)
    for x, y in zip(tree_leaves(mine), tree_leaves(theirs), strict=True):
        # Eigenvectors have no sign.
        assert torch.allclose(x.abs(), y.abs(), atol=1e-4)


def test_equal_factors_with_different_roots_stay_apart(doubles: None) -> None:
    importlib.import_module("distributed_shampoo")
    lists = sys.modules["distributed_shampoo.preconditioner.shampoo_preconditioner_list"]
    types = sys.modules["distributed_shampoo.preconditioner.matrix_functions_types"]
    blocks = [lists.RootFactors((4, 4), types.CoupledNewtonConfig(), 1e-2) for _ in range(2)]
    blocks[1].roots = (2.0, 2.0)
    blocks[1].epsilon = 1e-4
    with swap_in("distributed_shampoo"):
        every = lists.BaseShampooPreconditionerList(blocks)
        grads = (torch.zeros(4, 4), torch.zeros(4, 4))
        every.update_preconditioners(grads, torch.tensor(1.0), True)
    for block, expected in zip(blocks, (1e-2**-0.25, 1e-4**-0.5), strict=True):
        for root in block.inv_factor_matrices:
            assert torch.allclose(root, expected * torch.eye(4), rtol=1e-4)


def test_shampoos_batches_are_bounded(doubles: None, monkeypatch: Any) -> None:
    from spectral_kernels.swap import distributed_shampoo

    monkeypatch.setattr(distributed_shampoo, "_BATCH_ELEMENTS", 100)
    package = importlib.import_module("distributed_shampoo")
    types = importlib.import_module("distributed_shampoo.preconditioner.matrix_functions_types")
    p = parameters(((8, 8),) * 3)
    with swap_in("distributed_shampoo"):
        sk.call_counts(reset=True)
        steps(package.DistributedShampoo(p, config=types.CoupledNewtonConfig()), p, 1)
        assert (
            sum(n for name, n in sk.call_counts().items() if name.startswith("inverse_root")) == 3
        )


# With the rest of the world.


def test_optimizers_and_functions_pickle_while_swapped(doubles: None) -> None:
    soap = importlib.import_module("soap")
    with swap_in():
        for make in (torch.optim.Muon, soap.SOAP):
            p = parameters(((8, 8),))
            optimizer = make(p, lr=0.01)
            steps(optimizer, p, 3)
            for copied in (pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)):
                assert type(copied) is make
                q = copied.param_groups[0]["params"]
                steps(copied, q, 2, start=3)
            steps(optimizer, p, 2, start=3)
            assert torch.equal(p[0], q[0])
        function = _muon._zeropower_via_newtonschulz
        data = pickle.dumps(function)
        assert pickle.loads(data) is function
    assert pickle.loads(data) is _muon._zeropower_via_newtonschulz is not function


def test_threads() -> None:
    def run(seed: int, results: dict[int, Tensor]) -> None:
        p = parameters(((12, 20), (20, 12)))
        steps(torch.optim.Muon(p, lr=0.01 * (seed + 1)), p, 20)
        results[seed] = torch.cat([q.detach().flatten() for q in p])

    serial: dict[int, Tensor] = {}
    parallel: dict[int, Tensor] = {}
    with swap_in("torch.optim.Muon") as swap:
        for seed in range(4):
            run(seed, serial)
        threads = [threading.Thread(target=run, args=(seed, parallel)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert swap.calls[MUON[0]].taken == 2 * 4 * 20
    assert all(torch.equal(serial[seed], parallel[seed]) for seed in range(4))


def test_inside_compile_the_optimizer_keeps_its_code() -> None:
    def run() -> Tensor:
        torch._dynamo.reset()
        p = parameters(((6, 9),))
        optimizer = torch.optim.Muon(p)
        optimizer.step = torch.compile(optimizer.step, backend="eager")
        steps(optimizer, p, 2)
        return p[0].detach()

    theirs = run()
    with swap_in("torch.optim.Muon"):
        mine = run()
    assert torch.equal(mine, theirs)


def test_swapping_leaves_the_random_state_and_grad_mode_alone(doubles: None) -> None:
    importlib.import_module("distributed_shampoo")
    importlib.import_module("optimizers.deva")
    state = torch.get_rng_state()
    with swap_in():
        assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_is_kept_alive(doubles: None) -> None:
    soap = importlib.import_module("soap")
    classes = len(soap.SOAP.__subclasses__())
    with swap_in("soap"):
        pass
    gc.collect()
    assert len(soap.SOAP.__subclasses__()) == classes
