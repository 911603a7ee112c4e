"""swap_in and its undoing."""

from __future__ import annotations

import copy
import functools
import gc
import importlib
import logging
import pickle
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from spectral_kernels import swap_in
from spectral_kernels.swap import ADAPTERS
from support.moves import gradient, parameters, steps
from support.packages import DOUBLES, doubles, nothing_left_behind
from torch import Tensor
from torch.optim import _muon

__all__ = ["doubles", "nothing_left_behind"]

pytestmark = pytest.mark.usefixtures("native", "one_thread", "nothing_left_behind")

MUON = ["torch.optim._muon._single_tensor_muon", "torch.optim._muon._zeropower_via_newtonschulz"]
METHODS = ["project", "project_back", "update_preconditioner", "get_orthogonal_matrix_QR"]


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
