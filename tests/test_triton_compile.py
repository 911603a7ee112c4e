"""Triton's operators under torch.compile: whole, without a graph break."""

from __future__ import annotations

import functools
import importlib.util

import pytest
import spectral_kernels as sk
import torch
from spectral_kernels import _triton_library
from support.cases import STEPS, case, new_step
from support.inputs import gaussian, orthogonal, semidefinite
from support.layouts import same_bits
from torch.utils._pytree import tree_map

pytestmark = [pytest.mark.triton, pytest.mark.kernel, pytest.mark.usefixtures("native")]

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)


def calls() -> dict[str, tuple[object, tuple[object, ...]]]:
    """Function and tensors of every operator."""
    square = semidefinite(5, 10.0).float()
    x = gaussian(5, 7)
    functions = {
        **{name: (getattr(sk, name), (x,)) for name in ("gram", "newton_schulz", "polar")},
        "kron_precondition": (sk.kron_precondition, (x, square, None)),
        "kron_factors_update_": (
            lambda a, x, **options: sk.kron_factors_update_(a, None, x, 0.9, **options),
            (square, x),
        ),
        "inverse_root": (functools.partial(sk.inverse_root, p=4, return_info=True), (square,)),
        "eigenbasis": (sk.eigenbasis, (square,)),
        "refresh_eigenbasis": (sk.refresh_eigenbasis, (orthogonal(5, 1).float(), square)),
    }
    left_out = ("step_counts", "root_failures", "second_moments", "skipped")
    for op in STEPS:
        one = new_step(op, ((4, 6), (5, 5)))
        names = ["params", "grads", *one.names(write=True)[1:]]
        tensors = tuple(one[name] for name in names if name not in left_out)
        functions[op] = functools.partial(getattr(sk, op), lr=0.1), tensors
    return functions


@pytest.mark.parametrize("name", calls())
def test_without_a_graph_break(name):
    function, given = calls()[name]

    def call(*tensors):
        return function(*tensors, backend="triton")

    def copied() -> tuple[object, ...]:
        return tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, given)

    torch._dynamo.reset()
    sk.call_counts(reset=True)
    ours, theirs = copied(), copied()
    result = torch.compile(call, fullgraph=True, backend="aot_eager")(*ours)
    assert sk.call_counts(reset=True) == {f"{name}/triton": 1}
    assert same_bits((result, ours), (call(*theirs), theirs))


def test_all_operators_are_registered():
    assert set(calls()) == set(sk._dispatch.OPERATORS)


@pytest.mark.parametrize("op", ["gram", "kron_factors_update_", "muon_step_", "soap_step_"])
def test_is_what_the_dispatcher_expects(op):
    one = case(op, torch.float32)
    args, options = one.flat()
    overload = getattr(getattr(torch.ops, _triton_library.NAME), op).default
    torch.library.opcheck(overload, args, options)


def test_has_no_derivative():
    x = gaussian(3, 4).requires_grad_()
    with pytest.raises(RuntimeError, match="no derivative"):
        torch.ops.spectral_kernels_triton.gram(x)
