"""What swap_in refuses to replace."""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Any

import pytest
import torch
from spectral_kernels import _dispatch, swap_in
from support.moves import parameters, steps
from support.packages import doubles, nothing_left_behind
from torch import Tensor
from torch.optim import _muon

__all__ = ["doubles", "nothing_left_behind"]

pytestmark = pytest.mark.usefixtures("native", "one_thread", "nothing_left_behind")


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

    @functools.wraps(own)
    def faster(self: Any, grad: Tensor, *others: Any, **options: Any) -> None:
        own(self, 2 * grad, *others, **options)

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
