"""Faults that come with certain parameters and gradients: scale, structure, shape, layout."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ._outcome import Wrong
from ._subjects import Subject
from ._trial import (
    LARGE,
    NOISE,
    SMALL,
    STEPS,
    TINY,
    Check,
    all_finite,
    begun,
    copies_of,
    distance,
    gaussian,
    give_gradients,
    made,
    moved_from,
    new_params,
    registered_in,
    take_steps,
    undecayed,
    way_of,
)

FAULTS: dict[str, Check] = {}
_fault = registered_in(FAULTS)

# Scale of the gradients.


def _as_far(subject: Subject, scale: float) -> str:
    usual = float(way_of(subject, new_params((12, 20)))[0].norm())
    scaled = float(way_of(subject, new_params((12, 20)), scale)[0].norm())
    ratio = scaled / usual
    if not math.isfinite(ratio) or not 0.9 < ratio < 1.1:
        raise Wrong(f"moves {ratio:.3g} times as far when gradients are {scale:.1g} times as large")
    return f"moves {ratio:.3f} times as far"


@_fault("small gradients")
def _small(subject: Subject) -> str:
    return _as_far(subject, SMALL)


@_fault("tiny gradients")
def _tiny(subject: Subject) -> str:
    return _as_far(subject, TINY)


@_fault("large gradients")
def _large(subject: Subject) -> str:
    return _as_far(subject, LARGE)


@_fault("gradient spike")
def _spike(subject: Subject) -> str:
    params, optimizer = begun(subject, (12, 20))
    take_steps(optimizer, params)
    before = copies_of(params)
    give_gradients(params, 50, 1e3)
    optimizer.step()
    take_steps(optimizer, params)
    moved, calm = (
        moved_from(params, before)[0].norm(),
        way_of(subject, new_params((12, 20)))[0].norm(),
    )
    if not float(moved) < 20.0 * float(calm):
        raise Wrong(
            f"a spike of 1000 moves {float(moved / calm):.3g} times as far as {STEPS} steps"
        )
    return f"moves {float(moved / calm):.2f} times as far as {STEPS} calm steps"


@_fault("zero gradients")
def _zero(subject: Subject) -> str:
    params, optimizer = begun(subject, (6, 9), (7, 7))
    for _ in range(3):
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
    take_steps(optimizer, params)
    if not all_finite(params):
        raise Wrong("zero gradients make parameters non-finite")
    return "stays finite and goes on"


# Structure.


@_fault("gradients of rank one")
def _rank_one(subject: Subject) -> str:
    params, optimizer = begun(subject, (16, 24))
    before = copies_of(params)
    for step in range(2 * STEPS):
        params[0].grad = gaussian((16, 1), step) @ gaussian((1, 24), 99)
        optimizer.step()
    if not all_finite(params):
        raise Wrong("parameters become non-finite")
    return f"moved by {float(moved_from(params, before)[0].norm()):.2g}, finite"


@_fault("dead rows")
def _dead_rows(subject: Subject) -> str:
    params, optimizer = begun(subject, (16, 24))
    before = copies_of(params)
    for step in range(STEPS):
        give_gradients(params, step)
        assert params[0].grad is not None
        params[0].grad[5:9] = 0.0
        optimizer.step()
    moved = moved_from(params, before)[0]
    dead, live = float(moved[5:9].norm()), float(moved[:5].norm())
    if not dead <= 1e-2 * live:
        raise Wrong(f"rows whose gradients are zero move {dead / live:.2g} times as far as others")
    return f"dead rows move {dead / live:.1g} times as far as live ones"


# Shapes, layouts, routing.


def _flattened_too(subject: Subject, *shape: int) -> tuple[Tensor, Tensor]:
    """The ways of 4-D weights, flattened, and of the matrix that they flatten to."""
    params = new_params(shape)
    made(subject, params, "4-D parameters")
    flat = nn.Parameter(params[0].detach().flatten(1).clone())
    return way_of(subject, params)[0].flatten(1), way_of(subject, [flat])[0]


@_fault("convolution weights")
def _convolution(subject: Subject) -> str:
    four, two = _flattened_too(subject, 8, 4, 3, 3)
    ratio = float(four.norm() / two.norm())
    apart = distance(four, two)
    if not 0.9 < ratio < 1.1 or apart > 0.5:
        raise Wrong(f"off its flattened matrix by {apart:.2g}, {ratio:.2f} times as far")
    return f"as its flattened matrix, to {apart:.1g}"


@_fault("depthwise convolution weights")
def _depthwise(subject: Subject) -> str:
    four, two = _flattened_too(subject, 64, 1, 3, 3)
    ratio = float(four.norm()) / float(two.norm())
    said = f"moves {ratio:.2f} times as far as its flattened matrix"
    if not 0.9 < ratio < 1.1:
        raise Wrong(said)
    return said


@_fault("undeclared stack of matrices")
def _stack(subject: Subject) -> str:
    params = new_params((3, 8, 12))
    made(subject, params, "undeclared 3-D parameters")
    together = way_of(subject, params)[0]
    for i in range(3):
        alone = [nn.Parameter(new_params((3, 8, 12))[0].detach()[i].clone())]
        before = copies_of(alone)
        optimizer = undecayed(subject, alone)
        for step in range(STEPS):
            whole = new_params((3, 8, 12))
            give_gradients(whole, step + 1)
            assert whole[0].grad is not None
            alone[0].grad = whole[0].grad[i].clone()
            optimizer.step()
        apart = distance(together[i], moved_from(alone, before)[0])
        if apart > 0.2:
            raise Wrong(f"is not three matrices to it: one moves otherwise by {apart:.2g}")
    return "every matrix moves as it does alone"


def _all_move(params: list[nn.Parameter], before: list[Tensor]) -> str:
    still = [tuple(p.shape) for p, b in zip(params, before, strict=True) if torch.equal(p, b)]
    if still or not all_finite(params):
        raise Wrong(f"parameters of shape {still} do not move" if still else "become non-finite")
    return "all move"


@_fault("biases and scalars")
def _biases(subject: Subject) -> str:
    params = new_params((6, 9), (6,), ())
    optimizer = made(subject, params, "biases")
    before = copies_of(params)
    take_steps(optimizer, params)
    return _all_move(params, before)


@_fault("single rows and columns")
def _thin(subject: Subject) -> str:
    params = new_params((1, 40), (40, 1), (1, 1), (3, 200))
    before = copies_of(params)
    take_steps(undecayed(subject, params), params)
    return _all_move(params, before)


@_fault("empty parameters")
def _empty(subject: Subject) -> str:
    params = [
        nn.Parameter(torch.zeros(shape, dtype=torch.float32, device="cpu"))
        for shape in ((0, 4), (4, 0))
    ] + new_params((6, 9))
    optimizer = made(subject, params, "empty parameters")
    before = copies_of(params)
    take_steps(optimizer, params, 3)
    if torch.equal(params[2], before[2]):
        raise Wrong("the matrix beside them does not move")
    return "are passed over"


@_fault("transposed parameters")
def _transposed(subject: Subject) -> str:
    plain = new_params((12, 20))
    turned = [nn.Parameter(plain[0].detach().mT.contiguous().mT)]
    return _alike(subject, plain, turned, "a transposed layout")


@_fault("channels-last weights")
def _channels_last(subject: Subject) -> str:
    plain = new_params((8, 4, 3, 3))
    made(subject, plain, "4-D parameters")
    last = [nn.Parameter(plain[0].detach().to(memory_format=torch.channels_last))]
    return _alike(subject, plain, last, "channels-last layout")


def _alike(
    subject: Subject, plain: list[nn.Parameter], other: list[nn.Parameter], what: str
) -> str:
    layout = other[0].stride()
    apart = distance(way_of(subject, other)[0], way_of(subject, plain)[0])
    if not apart < NOISE:
        raise Wrong(f"{what} moves otherwise by {apart:.2g}")
    if other[0].stride() != layout:
        raise Wrong(f"{what} is lost")
    return f"as in plain layout, to {apart:.1g}"


@_fault("gradients in another layout")
def _gradient_layout(subject: Subject) -> str:
    expected = way_of(subject, new_params((12, 20)))[0]
    params = new_params((12, 20))
    before, optimizer = copies_of(params), undecayed(subject, params)
    for step in range(STEPS):
        give_gradients(params, step + 1)
        assert params[0].grad is not None
        params[0].grad = params[0].grad.mT.contiguous().mT
        optimizer.step()
    apart = distance(moved_from(params, before)[0], expected)
    if not apart < NOISE:
        raise Wrong(f"moves otherwise by {apart:.2g}")
    return f"as in the parameter's layout, to {apart:.1g}"


@_fault("expanded gradients")
def _expanded(subject: Subject) -> str:
    plain, expanded = new_params((12, 20)), new_params((12, 20))
    row = gaussian((1, 20), 5)
    moves = []
    for params, grad in ((plain, row.expand(12, 20).contiguous()), (expanded, row.expand(12, 20))):
        before, optimizer = copies_of(params), undecayed(subject, params)
        for _ in range(STEPS):
            params[0].grad = grad
            optimizer.step()
        moves.append(moved_from(params, before)[0])
    if not torch.equal(row, gaussian((1, 20), 5)):
        raise Wrong("the gradient's memory is written")
    # Rank one: what rounding makes of the other directions may differ.
    ratio = float(moves[1].norm() / moves[0].norm())
    if not 0.9 < ratio < 1.1:
        raise Wrong(f"move {ratio:.2g} times as far as when written out")
    return f"move {ratio:.3f} times as far as when written out"


@_fault("parameters that overlap themselves")
def _overlapping(subject: Subject) -> str:
    memory = torch.zeros(40, dtype=torch.float32, device="cpu")
    try:
        param = nn.Parameter(memory.as_strided((5, 5), (1, 3)))
        optimizer = undecayed(subject, [param])
        param.grad = gaussian((5, 5), 1)
        optimizer.step()
        optimizer.step()
    except (TypeError, ValueError, RuntimeError) as error:
        if memory.any():
            raise Wrong(f"are half written, then refused: {error}") from None
        return "are refused before anything is written"
    raise Wrong("are written, several elements at one address")


@_fault("parameters without gradients")
def _without(subject: Subject) -> str:
    params = new_params((6, 9), (7, 7))
    optimizer = subject.make(params)
    before = copies_of(params)
    for step in range(4):
        give_gradients(params, step)
        params[1].grad = None
        optimizer.step()
    if not torch.equal(params[1], before[1]) or params[1].grad is not None:
        raise Wrong("a parameter without a gradient is changed")
    take_steps(optimizer, params)
    if torch.equal(params[1], before[1]):
        raise Wrong("it does not move when gradients come later")
    return "stay as they are, and join in later"
