"""What swap_in replaces, and what it leaves to the optimizers."""

from __future__ import annotations

import contextlib
import importlib
import logging
import re
import subprocess
import sys
import threading
from typing import Any

import pytest
import spectral_kernels as sk
import torch
from spectral_kernels import _dispatch, swap_in
from support.moves import gradient, parameters, steps
from support.packages import doubles, nothing_left_behind
from test_swap import METHODS, MUON
from torch import Tensor
from torch.optim import _muon
from torch.utils._pytree import tree_leaves

__all__ = ["doubles", "nothing_left_behind"]

pytestmark = pytest.mark.usefixtures("native", "one_thread", "nothing_left_behind")


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
        with swap_in("soap") if swapped else contextlib.nullcontext():
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
