"""Faults that show over runs: checkpoints, hyper-parameters, dtypes, threads, repetition."""

from __future__ import annotations

import copy
import io
import pickle
import threading
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
    distance,
    gaussian,
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

# Checkpoints and hyper-parameters.


def _reloaded(optimizer: Optimizer, subject: Subject, params: list[nn.Parameter]) -> Optimizer:
    """A new optimizer over the same parameters with the saved state of the old."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    fresh = undecayed(subject, params)
    fresh.load_state_dict(torch.load(file, weights_only=False))
    return fresh


@_fault("resumed run")
def _resumed(subject: Subject) -> str:
    through, stopped = new_params((6, 9), (7, 7)), new_params((6, 9), (7, 7))
    one, other = undecayed(subject, through), undecayed(subject, stopped)
    for step in range(2 * STEPS):
        if step == 7:
            other = _reloaded(other, subject, stopped)
        for params, optimizer in ((through, one), (stopped, other)):
            give_gradients(params, step)
            optimizer.step()
    if not same_bits(copies_of(through), copies_of(stopped)):
        apart = max(distance(a.double(), b.double()) for a, b in zip(stopped, through, strict=True))
        raise Wrong(f"differs from a run that was never stopped by {apart:.1g}")
    return "has the bits of a run that was never stopped"


@_fault("state of 16-bit parameters, resumed")
def _resumed_dtype(subject: Subject) -> str:
    params = new_params((6, 9), dtype=torch.bfloat16)
    optimizer = made(subject, params, "bfloat16 parameters")
    take_steps(optimizer, params, 4)
    before = state_of(optimizer, params[0])
    after = state_of(_reloaded(optimizer, subject, params), params[0])
    pairs = list(zip(before, after, strict=True))
    cast = sum(a.dtype != b.dtype or not torch.equal(a, b) for a, b in pairs)
    if cast:
        raise Wrong(f"{cast} of {len(pairs)} state tensors are rounded to 16 bits")
    return "state is as it was saved"


@_fault("copies")
def _copied(subject: Subject) -> str:
    params, optimizer = begun(subject, (6, 9), steps=3)
    twin = copy.deepcopy(optimizer)
    pickle.loads(pickle.dumps(optimizer.state_dict()))
    (copied,) = twin.param_groups[0]["params"]
    take_steps(optimizer, params, 3)
    take_steps(twin, [copied], 3)
    if not same_bits(copies_of(params), copies_of([copied])):
        raise Wrong("a deep copy goes on otherwise")
    return "a deep copy goes on as the original"


@_fault("changed learning rate")
def _changed_lr(subject: Subject) -> str:
    params, optimizer = begun(subject, (6, 9), steps=3)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = copies_of(params)
    take_steps(optimizer, params, 2)
    if not same_bits(copies_of(params), before):
        raise Wrong("lr = 0 in the group is ignored")
    return "a changed group value counts at the next step"


@_fault("schedules of two groups")
def _schedule(subject: Subject) -> str:
    matrices, biases = new_params((6, 9), (7, 7)), new_params((6,), (7,))
    groups = [{"params": [m, b]} for m, b in zip(matrices, biases, strict=True)]
    try:
        optimizer = undecayed(subject, groups)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise NotApplicable(f"refuses biases: {str(error).splitlines()[0][:120]}") from None
    torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda _: 1.0, lambda _: 0.5])
    return "two groups take two schedules"


@_fault("no decay that was asked for")
def _decay(subject: Subject) -> str:
    if not subject.knows("weight_decay"):
        raise NotApplicable("has no weight_decay")
    params = new_params((6, 9), (6,))
    optimizer = made(subject, params, "biases")
    before = copies_of(params)
    for _ in range(4):
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
    moved = [tuple(p.shape) for p, b in zip(params, before, strict=True) if not torch.equal(p, b)]
    if moved:
        raise Wrong(f"weight_decay=0 and zero gradients move parameters of shape {moved}")
    return "weight_decay=0 decays nothing"


@_fault("closures")
def _closure(subject: Subject) -> str:
    params, optimizer = begun(subject, (6, 9))
    before = copies_of(params)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = params[0].square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure) for _ in range(3)]
    if any(loss is None for loss in losses) or torch.equal(params[0], before[0]):
        raise Wrong("step(closure) returns nothing or does not move")
    return "are called with gradients on, and their loss is returned"


@_fault("idle first step")
def _first(subject: Subject) -> str:
    params = new_params((6, 9))
    before = copies_of(params)
    take_steps(undecayed(subject, params), params, 1)
    if torch.equal(params[0], before[0]):
        raise Wrong("the first step moves nothing")
    return "the first step moves"


@_fault("16-bit parameters")
def _sixteen_bit(subject: Subject) -> str:
    for dtype in (torch.bfloat16, torch.float16):
        params = new_params((6, 9), (7, 7), dtype=dtype)
        before = copies_of(params)
        take_steps(undecayed(subject, params), params)
        if not all_finite(params) or same_bits(copies_of(params), before):
            raise Wrong(f"{dtype} parameters do not move or become non-finite")
    return "bfloat16 and float16 parameters train"


@_fault("float64 parameters")
def _double(subject: Subject) -> str:
    params, optimizer = begun(subject, (6, 9), dtype=torch.float64)
    take_steps(optimizer, params)
    narrow = [x.dtype for x in state_of(optimizer, params[0]) if x.shape == (6, 9)]
    if not all_finite(params) or any(dtype != torch.float64 for dtype in narrow):
        raise Wrong(f"their state is {narrow[0]}" if narrow else "they become non-finite")
    return "train, with float64 state"


@_fault("another default device")
def _meta(subject: Subject) -> str:
    params = new_params((6, 9))
    before = copies_of(params)
    torch.set_default_device("meta")
    try:
        take_steps(undecayed(subject, params), params, 3)
    finally:
        torch.set_default_device(None)
    if torch.equal(params[0], before[0]):
        raise Wrong("with another default device steps do nothing")
    return "steps do not depend on it"


# Threads and repetition.


@_fault("repeated run")
def _repeated(subject: Subject) -> str:
    first = copies_of(_trained(subject))
    if any(not same_bits(first, copies_of(_trained(subject))) for _ in range(3)):
        raise Wrong("the same steps give other bits")
    return "the same steps give the same bits"


def _trained(subject: Subject, order: int = 1) -> list[nn.Parameter]:
    """Some steps of three matrices; where each is due to be refreshed depends on no other."""
    params = new_params((24, 40), (33, 33), (24, 40))
    optimizer = undecayed(subject, params[::order], stagger=False)
    take_steps(optimizer, params)
    return params


@_fault("order of parameters")
def _order(subject: Subject) -> str:
    if not same_bits(copies_of(_trained(subject)), copies_of(_trained(subject, -1))):
        raise Wrong("parameters in another order give other bits")
    return "does not matter, to the bit"


@_fault("number of threads")
def _threads(subject: Subject) -> str:
    before = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            params = new_params((96, 130), (130, 130))
            take_steps(undecayed(subject, params), params, 3)
            results.append(copies_of(params))
    finally:
        torch.set_num_threads(before)
    if not all(same_bits(result, results[0]) for result in results):
        raise Wrong("1, 2 and 4 threads give different bits")
    return "does not matter, to the bit"


@_fault("two threads of the user")
def _user_threads(subject: Subject) -> str:
    expected = copies_of(_trained(subject))
    results: list[Any] = [None] * 4

    def work(i: int) -> None:
        try:
            results[i] = copies_of(_trained(subject))
        except Exception as error:
            results[i] = error

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for result in results:
        if isinstance(result, Exception):
            raise result
        if not same_bits(result, expected):
            raise Wrong("optimizers in several threads disturb one another")
    return "do not disturb one another"


@_fault("a simple problem")
def _simple(subject: Subject) -> str:
    params = new_params((8, 12))
    target = gaussian((8, 12), 77)
    optimizer = undecayed(subject, params, lr=0.02)
    losses = []
    for _ in range(400):
        params[0].grad = (params[0].detach() - target).clone()
        losses.append(float(params[0].grad.square().sum()))
        optimizer.step()
    if not losses[-1] < 0.5 * losses[0]:
        raise Wrong(f"400 steps leave {losses[-1] / losses[0]:.2g} of a quadratic loss")
    return f"400 steps leave {losses[-1] / losses[0]:.2g} of a quadratic loss"
