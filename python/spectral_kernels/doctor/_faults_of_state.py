"""Faults in what is not the parameters: memory of others, what is not finite, errors half-way."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ._outcome import NotApplicable, Wrong
from ._subjects import Subject
from ._trial import (
    STEPS,
    Check,
    all_finite,
    begun,
    copies_of,
    give_gradients,
    made,
    new_params,
    registered_in,
    same_bits,
    state_of,
    take_steps,
    undecayed,
)

FAULTS: dict[str, Check] = {}
_fault = registered_in(FAULTS)

# Memory that is not the optimizer's.


@_fault("gradient written")
def _gradient_written(subject: Subject) -> str:
    params = new_params((6, 9), (7, 7))
    optimizer = subject.make(params)
    for step in range(STEPS):
        give_gradients(params, step)
        before = copies_of([p.grad for p in params if p.grad is not None])
        optimizer.step()
        after = [p.grad for p in params if p.grad is not None]
        if len(after) != len(before) or not same_bits(before, after):
            raise Wrong(f"step {step + 1} changes the gradients")
    return "gradients keep every bit"


@_fault("state of 16-bit parameters")
def _sixteen_bit_state(subject: Subject) -> str:
    """A cast that is none returns the buffer itself, and what is done in place is done to it."""
    settings = {"nesterov": False} if subject.knows("nesterov") else {}
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        params = new_params((12, 20), dtype=dtype)
        optimizer = made(subject, params, f"{dtype} parameters", **settings)
        take_steps(optimizer, params, 3)
        found.append([x.double() for x in state_of(optimizer, params[0]) if x.shape == (12, 20)])
    for half, full in zip(*found, strict=True):
        # Rotated moments may differ in the signs of basis vectors, so lengths are compared.
        ratio = float(half.norm() / full.norm()) if float(full.norm()) else 1.0
        if not 0.9 < ratio < 1.1:
            raise Wrong(f"a buffer is {ratio:.2g} times that of float32 parameters")
    return "buffers are those of float32 parameters"


@_fault("shared state")
def _shared(subject: Subject) -> str:
    params, optimizer = begun(subject, (6, 6), (6, 6), (6, 9))
    take_steps(optimizer, params)
    owners: dict[int, str] = {}
    for i, param in enumerate(params):
        assert param.grad is not None
        for name, tensor in (("itself", param), ("its gradient", param.grad)):
            owners[tensor.untyped_storage().data_ptr()] = f"parameter {i}, {name}"
    for i, param in enumerate(params):
        ends: set[tuple[int, int]] = set()
        for x in state_of(optimizer, param):
            key = x.untyped_storage().data_ptr()
            place = (x.data_ptr(), x.numel())
            owner = owners.setdefault(key, f"state of parameter {i}")
            if x.numel() and (owner != f"state of parameter {i}" or place in ends):
                raise Wrong(f"a state tensor of parameter {i} lies in the memory of {owner}")
            if x.numel():
                ends.add(place)
    return "every state tensor has memory of its own"


@_fault("state that moves")
def _moving(subject: Subject) -> str:
    params, optimizer = begun(subject, (6, 9), steps=3)
    # Held, so that their memory is not given to those that replace them.
    before = [x.detach() for x in state_of(optimizer, params[0])]
    take_steps(optimizer, params)
    after = state_of(optimizer, params[0])
    moved = sum(a.data_ptr() != b.data_ptr() for a, b in zip(before, after, strict=False))
    if moved:
        raise Wrong(f"{moved} of {len(before)} state tensors are replaced by others")
    return "every state tensor stays where it is"


@_fault("process-wide settings")
def _settings(subject: Subject) -> str:
    def settings() -> tuple[Any, ...]:
        return (
            torch.get_num_threads(),
            torch.get_default_dtype(),
            torch.get_float32_matmul_precision(),
            torch.backends.cuda.matmul.allow_tf32,
            torch.are_deterministic_algorithms_enabled(),
            torch.is_grad_enabled(),
            torch.get_rng_state().sum().item(),
        )

    params = new_params((6, 9))
    before = settings()
    take_steps(undecayed(subject, params), params)
    if settings() != before:
        raise Wrong(f"changed from {before} to {settings()}")
    return "are left alone"


# What is not finite.


Aftermath = Callable[[Subject, list[nn.Parameter], Optimizer], str]


def _nan_fault(
    name: str, shapes: Sequence[Sequence[int]], at: int
) -> Callable[[Aftermath], Aftermath]:
    """A check of what is left by a step with a NaN in one of the gradients, unless it raises."""

    def register(aftermath: Aftermath) -> Aftermath:
        @_fault(name)
        def check(subject: Subject) -> str:
            params = new_params(*shapes)
            optimizer = made(subject, params, f"parameters of shape {tuple(shapes[at])}")
            take_steps(optimizer, params, 4)
            before = copies_of(params)
            give_gradients(params, 60)
            grad = params[at].grad
            assert grad is not None
            grad.view(-1)[3] = math.nan
            try:
                optimizer.step()
            except Exception as error:
                if not same_bits(copies_of(params), before):
                    raise Wrong(f"raises after others were written: {error}") from None
                return f"raises before anything is written: {type(error).__name__}"
            return aftermath(subject, params, optimizer)

        return aftermath

    return register


@_nan_fault("NaN in a matrix's gradient", [(6, 9), (7, 7)], 0)
def _nan(subject: Subject, params: list[nn.Parameter], optimizer: Optimizer) -> str:
    if not all_finite(params):
        raise Wrong("parameters become NaN")
    if not all_finite(x for param in params for x in state_of(optimizer, param)):
        raise Wrong("state becomes NaN")
    before = copies_of(params)
    take_steps(optimizer, params, 25)
    if any(torch.equal(p, b) for p, b in zip(params, before, strict=True)):
        raise Wrong("the matrix never moves again")
    if not all_finite(params):
        raise Wrong("parameters become NaN later")
    return "the matrix is left out of that step and goes on"


@_nan_fault("NaN in a bias's gradient", [(6, 9), (6,)], 1)
def _nan_bias(subject: Subject, params: list[nn.Parameter], optimizer: Optimizer) -> str:
    take_steps(optimizer, params, 5)
    if not all_finite(params):
        raise Wrong("parameters become NaN for good")
    return "the bias is left out of that step and goes on"


@_nan_fault("NaN beside other matrices", [(7, 7), (7, 7), (6, 9)], 1)
def _nan_mates(subject: Subject, params: list[nn.Parameter], optimizer: Optimizer) -> str:
    clean, optimizer = begun(subject, (7, 7), (7, 7), (6, 9), steps=4)
    give_gradients(clean, 60)
    optimizer.step()
    if not (torch.equal(params[0], clean[0]) and torch.equal(params[2], clean[2])):
        raise Wrong("other matrices of the same step move otherwise")
    return "others move as if it were not there"


@_fault("overflowed loss scale")
def _overflow(subject: Subject) -> str:
    params, optimizer = begun(subject, (6, 9), (7, 7), steps=3)
    for _ in range(2):
        give_gradients(params, 9)
        for param in params:
            assert param.grad is not None
            param.grad.fill_(math.inf)
        try:
            optimizer.step()
        except Exception as error:
            return f"raises: {type(error).__name__}"
    take_steps(optimizer, params, 25)
    if not all_finite(params):
        raise Wrong("two steps of infinite gradients make everything NaN for good")
    return "goes on after two steps of infinite gradients"


# Errors.


@_fault("half a step before an error")
def _half(subject: Subject) -> str:
    params, optimizer = begun(subject, (6, 9), (7, 7), (5, 8), steps=3)
    before = copies_of(params)
    give_gradients(params, 60)
    dense = params[2].grad
    assert dense is not None
    params[2].grad = dense.to_sparse()
    try:
        optimizer.step()
    except Exception as error:
        if not same_bits(copies_of(params), before):
            raise Wrong(f"other parameters moved before {type(error).__name__}") from None
        return "an error leaves all parameters as they were"
    raise NotApplicable("takes sparse gradients")


@_fault("values that make no sense")
def _values(subject: Subject) -> str:
    taken = []
    for value in (-1.0, math.nan, math.inf):
        try:
            subject.make(new_params((6, 9)), lr=value)
        except Exception:
            # Each project has errors of its own for this.
            continue
        taken.append(f"lr={value}")
    if taken:
        raise Wrong(f"accepts {', '.join(taken)}")
    return "negative and non-finite learning rates are refused"
