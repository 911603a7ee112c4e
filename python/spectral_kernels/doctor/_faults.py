"""Faults that users of matrix optimizers have reported, each as a check of any optimizer.

A check makes the optimizer it is given, lets it take a few steps on small parameters and returns a
sentence, or raises `Wrong` with one.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ._accuracy import one_thread
from ._outcome import BY_DESIGN, FAILED, Finding, NotApplicable, Wrong, examine
from ._subjects import Subject

Check = Callable[[Subject], str]
FAULTS: dict[str, Check] = {}

# Steps after which every optimizer here has left its first step and refreshed a basis or root.
_STEPS = 12
# How much two computations of one thing may differ where products are in bfloat16.
_NOISE = 0.05
# Numbers by which gradients are scaled are powers of two, so that nothing is rounded.
_TINY, _SMALL, _LARGE = 2.0**-66, 2.0**-27, 2.0**66


def _fault(name: str) -> Callable[[Check], Check]:
    def register(check: Check) -> Check:
        FAULTS[name] = check
        return check

    return register


def run_faults(subject: Subject, names: Iterable[str] | None = None) -> list[Finding]:
    """Every fault, or the named ones, on one optimizer."""
    findings = []
    for name in FAULTS if names is None else names:
        check = FAULTS[name]
        with torch.random.fork_rng(devices=[]), one_thread():
            torch.manual_seed(0)
            finding = examine("optimizers", name, subject.name, partial(check, subject))
        reason = subject.by_design.get(name)
        if finding.outcome == FAILED and reason is not None:
            sentence = f"{finding.sentence}; {reason}"
            finding = Finding(finding.section, name, subject.name, BY_DESIGN, sentence)
        findings.append(finding)
    return findings


# Parameters, gradients, steps.


def _gaussian(shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    # bfloat16 numbers, so that every dtype holds the same ones.
    drawn = torch.randn(tuple(shape), generator=generator, dtype=torch.float32, device="cpu")
    return drawn.bfloat16().to(dtype)


def _params(
    *shapes: Sequence[int], dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[nn.Parameter]:
    return [nn.Parameter(_gaussian(s, seed + i, dtype)) for i, s in enumerate(shapes)]


def _gradients(params: Sequence[Tensor], seed: int, scale: float = 1.0) -> None:
    """New Gaussian gradients in the layout of each parameter."""
    for i, param in enumerate(params):
        grad = torch.empty_like(param, memory_format=torch.preserve_format)
        with torch.no_grad():
            grad.copy_(_gaussian(param.shape, 1000 * seed + i + 100).double() * scale)
        param.grad = grad


def _run(
    optimizer: Optimizer, params: Sequence[Tensor], steps: int = _STEPS, scale: float = 1.0
) -> None:
    for step in range(steps):
        _gradients(params, step + 1, scale)
        optimizer.step()


def _copies(params: Iterable[Tensor]) -> list[Tensor]:
    return [param.detach().clone() for param in params]


def _moved(params: Sequence[Tensor], before: Sequence[Tensor]) -> list[Tensor]:
    return [p.detach().double() - b.double() for p, b in zip(params, before, strict=True)]


def _way(subject: Subject, params: list[nn.Parameter], scale: float = 1.0) -> list[Tensor]:
    """How far some steps without decay take the parameters."""
    before = _copies(params)
    _run(_undecayed(subject, params), params, scale=scale)
    return _moved(params, before)


def _undecayed(subject: Subject, params: Any, **settings: Any) -> Optimizer:
    return subject.make(params, weight_decay=0.0, **settings)


def _same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a.nan_to_num(nan=1.5e9), b.nan_to_num(nan=1.5e9)) for a, b in pairs)


def _apart(one: Tensor, other: Tensor) -> float:
    """The relative distance of two ways."""
    one, other = one.detach(), other.detach()
    size = float(other.norm())
    return float((one - other).norm()) / size if size else float(one.norm())


def _state_tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested state."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _state_tensors(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _state_tensors(each)


def _state(optimizer: Optimizer, param: Tensor) -> list[Tensor]:
    return list(_state_tensors(dict(optimizer.state.get(param, {}))))


def _finite(tensors: Iterable[Tensor]) -> bool:
    return all(bool(x.isfinite().all()) for x in tensors)


def _made(subject: Subject, params: list[nn.Parameter], what: str, **settings: Any) -> Optimizer:
    """An optimizer over parameters that it may refuse with a sentence."""
    try:
        return _undecayed(subject, params, **settings)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise NotApplicable(f"refuses {what}: {str(error).splitlines()[0][:120]}") from None


# Scale of the gradients.


def _as_far(subject: Subject, scale: float) -> str:
    usual = float(_way(subject, _params((12, 20)))[0].norm())
    scaled = float(_way(subject, _params((12, 20)), scale)[0].norm())
    ratio = scaled / usual
    if not math.isfinite(ratio) or not 0.9 < ratio < 1.1:
        raise Wrong(f"moves {ratio:.3g} times as far when gradients are {scale:.1g} times as large")
    return f"moves {ratio:.3f} times as far"


@_fault("small gradients")
def _small(subject: Subject) -> str:
    return _as_far(subject, _SMALL)


@_fault("tiny gradients")
def _tiny(subject: Subject) -> str:
    return _as_far(subject, _TINY)


@_fault("large gradients")
def _large(subject: Subject) -> str:
    return _as_far(subject, _LARGE)


@_fault("gradient spike")
def _spike(subject: Subject) -> str:
    params = _params((12, 20))
    optimizer = _undecayed(subject, params)
    _run(optimizer, params)
    before = _copies(params)
    _gradients(params, 50, 1e3)
    optimizer.step()
    _run(optimizer, params)
    moved, calm = _moved(params, before)[0].norm(), _way(subject, _params((12, 20)))[0].norm()
    if not float(moved) < 20.0 * float(calm):
        raise Wrong(
            f"a spike of 1000 moves {float(moved / calm):.3g} times as far as {_STEPS} steps"
        )
    return f"moves {float(moved / calm):.2f} times as far as {_STEPS} calm steps"


@_fault("zero gradients")
def _zero(subject: Subject) -> str:
    params = _params((6, 9), (7, 7))
    optimizer = _undecayed(subject, params)
    for _ in range(3):
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
    _run(optimizer, params)
    if not _finite(params):
        raise Wrong("zero gradients make parameters non-finite")
    return "stays finite and goes on"


# Structure.


@_fault("gradients of rank one")
def _rank_one(subject: Subject) -> str:
    params = _params((16, 24))
    optimizer = _undecayed(subject, params)
    before = _copies(params)
    for step in range(2 * _STEPS):
        params[0].grad = _gaussian((16, 1), step) @ _gaussian((1, 24), 99)
        optimizer.step()
    if not _finite(params):
        raise Wrong("parameters become non-finite")
    return f"moved by {float(_moved(params, before)[0].norm()):.2g}, finite"


@_fault("dead rows")
def _dead_rows(subject: Subject) -> str:
    params = _params((16, 24))
    optimizer = _undecayed(subject, params)
    before = _copies(params)
    for step in range(_STEPS):
        _gradients(params, step)
        assert params[0].grad is not None
        params[0].grad[5:9] = 0.0
        optimizer.step()
    moved = _moved(params, before)[0]
    dead, live = float(moved[5:9].norm()), float(moved[:5].norm())
    if not dead <= 1e-2 * live:
        raise Wrong(f"rows whose gradients are zero move {dead / live:.2g} times as far as others")
    return f"dead rows move {dead / live:.1g} times as far as live ones"


# Shapes, layouts, routing.


def _flattened_too(subject: Subject, *shape: int) -> tuple[Tensor, Tensor]:
    """The ways of 4-D weights, flattened, and of the matrix that they flatten to."""
    params = _params(shape)
    _made(subject, params, "4-D parameters")
    flat = nn.Parameter(params[0].detach().flatten(1).clone())
    return _way(subject, params)[0].flatten(1), _way(subject, [flat])[0]


@_fault("convolution weights")
def _convolution(subject: Subject) -> str:
    four, two = _flattened_too(subject, 8, 4, 3, 3)
    ratio = float(four.norm() / two.norm())
    apart = _apart(four, two)
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
    params = _params((3, 8, 12))
    _made(subject, params, "undeclared 3-D parameters")
    together = _way(subject, params)[0]
    for i in range(3):
        alone = [nn.Parameter(_params((3, 8, 12))[0].detach()[i].clone())]
        before = _copies(alone)
        optimizer = _undecayed(subject, alone)
        for step in range(_STEPS):
            whole = _params((3, 8, 12))
            _gradients(whole, step + 1)
            assert whole[0].grad is not None
            alone[0].grad = whole[0].grad[i].clone()
            optimizer.step()
        apart = _apart(together[i], _moved(alone, before)[0])
        if apart > 0.2:
            raise Wrong(f"is not three matrices to it: one moves otherwise by {apart:.2g}")
    return "every matrix moves as it does alone"


@_fault("biases and scalars")
def _biases(subject: Subject) -> str:
    params = _params((6, 9), (6,), ())
    optimizer = _made(subject, params, "biases")
    before = _copies(params)
    _run(optimizer, params)
    still = [tuple(p.shape) for p, b in zip(params, before, strict=True) if torch.equal(p, b)]
    if still or not _finite(params):
        raise Wrong(f"parameters of shape {still} do not move" if still else "become non-finite")
    return "all move"


@_fault("single rows and columns")
def _thin(subject: Subject) -> str:
    params = _params((1, 40), (40, 1), (1, 1), (3, 200))
    before = _copies(params)
    _run(_undecayed(subject, params), params)
    still = [tuple(p.shape) for p, b in zip(params, before, strict=True) if torch.equal(p, b)]
    if still or not _finite(params):
        raise Wrong(f"parameters of shape {still} do not move" if still else "become non-finite")
    return "all move"


@_fault("empty parameters")
def _empty(subject: Subject) -> str:
    params = [
        nn.Parameter(torch.zeros(shape, dtype=torch.float32, device="cpu"))
        for shape in ((0, 4), (4, 0))
    ] + _params((6, 9))
    optimizer = _made(subject, params, "empty parameters")
    before = _copies(params)
    _run(optimizer, params, 3)
    if torch.equal(params[2], before[2]):
        raise Wrong("the matrix beside them does not move")
    return "are passed over"


@_fault("transposed parameters")
def _transposed(subject: Subject) -> str:
    plain = _params((12, 20))
    turned = [nn.Parameter(plain[0].detach().mT.contiguous().mT)]
    return _alike(subject, plain, turned, "a transposed layout")


@_fault("channels-last weights")
def _channels_last(subject: Subject) -> str:
    plain = _params((8, 4, 3, 3))
    _made(subject, plain, "4-D parameters")
    last = [nn.Parameter(plain[0].detach().to(memory_format=torch.channels_last))]
    return _alike(subject, plain, last, "channels-last layout")


def _alike(
    subject: Subject, plain: list[nn.Parameter], other: list[nn.Parameter], what: str
) -> str:
    layout = other[0].stride()
    apart = _apart(_way(subject, other)[0], _way(subject, plain)[0])
    if not apart < _NOISE:
        raise Wrong(f"{what} moves otherwise by {apart:.2g}")
    if other[0].stride() != layout:
        raise Wrong(f"{what} is lost")
    return f"as in plain layout, to {apart:.1g}"


@_fault("gradients in another layout")
def _gradient_layout(subject: Subject) -> str:
    expected = _way(subject, _params((12, 20)))[0]
    params = _params((12, 20))
    before, optimizer = _copies(params), _undecayed(subject, params)
    for step in range(_STEPS):
        _gradients(params, step + 1)
        assert params[0].grad is not None
        params[0].grad = params[0].grad.mT.contiguous().mT
        optimizer.step()
    apart = _apart(_moved(params, before)[0], expected)
    if not apart < _NOISE:
        raise Wrong(f"moves otherwise by {apart:.2g}")
    return f"as in the parameter's layout, to {apart:.1g}"


@_fault("expanded gradients")
def _expanded(subject: Subject) -> str:
    plain, expanded = _params((12, 20)), _params((12, 20))
    row = _gaussian((1, 20), 5)
    moves = []
    for params, grad in ((plain, row.expand(12, 20).contiguous()), (expanded, row.expand(12, 20))):
        before, optimizer = _copies(params), _undecayed(subject, params)
        for _ in range(_STEPS):
            params[0].grad = grad
            optimizer.step()
        moves.append(_moved(params, before)[0])
    if not torch.equal(row, _gaussian((1, 20), 5)):
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
        optimizer = _undecayed(subject, [param])
        param.grad = _gaussian((5, 5), 1)
        optimizer.step()
        optimizer.step()
    except (TypeError, ValueError, RuntimeError) as error:
        if memory.any():
            raise Wrong(f"are half written, then refused: {error}") from None
        return "are refused before anything is written"
    raise Wrong("are written, several elements at one address")


@_fault("parameters without gradients")
def _without(subject: Subject) -> str:
    params = _params((6, 9), (7, 7))
    optimizer = subject.make(params)
    before = _copies(params)
    for step in range(4):
        _gradients(params, step)
        params[1].grad = None
        optimizer.step()
    if not torch.equal(params[1], before[1]) or params[1].grad is not None:
        raise Wrong("a parameter without a gradient is changed")
    _run(optimizer, params)
    if torch.equal(params[1], before[1]):
        raise Wrong("it does not move when gradients come later")
    return "stay as they are, and join in later"


# Memory that is not the optimizer's.


@_fault("gradient written")
def _gradient_written(subject: Subject) -> str:
    params = _params((6, 9), (7, 7))
    optimizer = subject.make(params)
    for step in range(_STEPS):
        _gradients(params, step)
        before = _copies([p.grad for p in params if p.grad is not None])
        optimizer.step()
        after = [p.grad for p in params if p.grad is not None]
        if len(after) != len(before) or not _same(before, after):
            raise Wrong(f"step {step + 1} changes the gradients")
    return "gradients keep every bit"


@_fault("state of 16-bit parameters")
def _sixteen_bit_state(subject: Subject) -> str:
    """A cast that is none returns the buffer itself, and what is done in place is done to it."""
    settings = {"nesterov": False} if subject.knows("nesterov") else {}
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        params = _params((12, 20), dtype=dtype)
        optimizer = _made(subject, params, f"{dtype} parameters", **settings)
        _run(optimizer, params, 3)
        found.append([x.double() for x in _state(optimizer, params[0]) if x.shape == (12, 20)])
    for half, full in zip(*found, strict=True):
        # Rotated moments may differ in the signs of basis vectors, so lengths are compared.
        ratio = float(half.norm() / full.norm()) if float(full.norm()) else 1.0
        if not 0.9 < ratio < 1.1:
            raise Wrong(f"a buffer is {ratio:.2g} times that of float32 parameters")
    return "buffers are those of float32 parameters"


@_fault("shared state")
def _shared(subject: Subject) -> str:
    params = _params((6, 6), (6, 6), (6, 9))
    optimizer = _undecayed(subject, params)
    _run(optimizer, params)
    owners: dict[int, str] = {}
    for i, param in enumerate(params):
        assert param.grad is not None
        for name, tensor in (("itself", param), ("its gradient", param.grad)):
            owners[tensor.untyped_storage().data_ptr()] = f"parameter {i}, {name}"
    for i, param in enumerate(params):
        ends: set[tuple[int, int]] = set()
        for x in _state(optimizer, param):
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
    params = _params((6, 9))
    optimizer = _undecayed(subject, params)
    _run(optimizer, params, 3)
    before = [x.data_ptr() for x in _state(optimizer, params[0])]
    _run(optimizer, params)
    moved = sum(
        a != b
        for a, b in zip(before, [x.data_ptr() for x in _state(optimizer, params[0])], strict=False)
    )
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

    params = _params((6, 9))
    before = settings()
    _run(_undecayed(subject, params), params)
    if settings() != before:
        raise Wrong(f"changed from {before} to {settings()}")
    return "are left alone"


# What is not finite.


def _with_nan(subject: Subject, shapes: list[Sequence[int]], at: int) -> tuple[Any, ...]:
    """Params before and after one step with a NaN in one gradient, the error if there was one."""
    params = _params(*shapes)
    optimizer = _made(subject, params, f"parameters of shape {tuple(shapes[at])}")
    _run(optimizer, params, 4)
    before = _copies(params)
    _gradients(params, 60)
    grad = params[at].grad
    assert grad is not None
    grad.view(-1)[3] = math.nan
    try:
        optimizer.step()
    except Exception as error:
        if not _same(_copies(params), before):
            raise Wrong(f"raises after others were written: {error}") from None
        return params, optimizer, before, error
    return params, optimizer, before, None


@_fault("NaN in a matrix's gradient")
def _nan(subject: Subject) -> str:
    params, optimizer, _, error = _with_nan(subject, [(6, 9), (7, 7)], 0)
    if error is not None:
        return f"raises before anything is written: {type(error).__name__}"
    if not _finite(params):
        raise Wrong("parameters become NaN")
    if not _finite(x for param in params for x in _state(optimizer, param)):
        raise Wrong("state becomes NaN")
    before = _copies(params)
    _run(optimizer, params, 25)
    if any(torch.equal(p, b) for p, b in zip(params, before, strict=True)):
        raise Wrong("the matrix never moves again")
    if not _finite(params):
        raise Wrong("parameters become NaN later")
    return "the matrix is left out of that step and goes on"


@_fault("NaN in a bias's gradient")
def _nan_bias(subject: Subject) -> str:
    params, optimizer, _, error = _with_nan(subject, [(6, 9), (6,)], 1)
    if error is not None:
        return f"raises before anything is written: {type(error).__name__}"
    _run(optimizer, params, 5)
    if not _finite(params):
        raise Wrong("parameters become NaN for good")
    return "the bias is left out of that step and goes on"


@_fault("NaN beside other matrices")
def _nan_mates(subject: Subject) -> str:
    params, _, _, error = _with_nan(subject, [(7, 7), (7, 7), (6, 9)], 1)
    if error is not None:
        return f"raises before anything is written: {type(error).__name__}"
    clean = _params((7, 7), (7, 7), (6, 9))
    optimizer = _undecayed(subject, clean)
    _run(optimizer, clean, 4)
    _gradients(clean, 60)
    optimizer.step()
    if not (torch.equal(params[0], clean[0]) and torch.equal(params[2], clean[2])):
        raise Wrong("other matrices of the same step move otherwise")
    return "others move as if it were not there"


@_fault("overflowed loss scale")
def _overflow(subject: Subject) -> str:
    params = _params((6, 9), (7, 7))
    optimizer = _undecayed(subject, params)
    _run(optimizer, params, 3)
    for _ in range(2):
        _gradients(params, 9)
        for param in params:
            assert param.grad is not None
            param.grad.fill_(math.inf)
        try:
            optimizer.step()
        except Exception as error:
            return f"raises: {type(error).__name__}"
    _run(optimizer, params, 25)
    if not _finite(params):
        raise Wrong("two steps of infinite gradients make everything NaN for good")
    return "goes on after two steps of infinite gradients"


# Errors.


@_fault("half a step before an error")
def _half(subject: Subject) -> str:
    params = _params((6, 9), (7, 7), (5, 8))
    optimizer = _undecayed(subject, params)
    _run(optimizer, params, 3)
    before = _copies(params)
    _gradients(params, 60)
    dense = params[2].grad
    assert dense is not None
    params[2].grad = dense.to_sparse()
    try:
        optimizer.step()
    except Exception as error:
        if not _same(_copies(params), before):
            raise Wrong(f"other parameters moved before {type(error).__name__}") from None
        return "an error leaves all parameters as they were"
    raise NotApplicable("takes sparse gradients")


@_fault("values that make no sense")
def _values(subject: Subject) -> str:
    taken = []
    for value in (-1.0, math.nan, math.inf):
        try:
            subject.make(_params((6, 9)), lr=value)
        except Exception:
            # Each project has errors of its own for this.
            continue
        taken.append(f"lr={value}")
    if taken:
        raise Wrong(f"accepts {', '.join(taken)}")
    return "negative and non-finite learning rates are refused"


# Checkpoints and hyper-parameters.


def _reloaded(optimizer: Optimizer, subject: Subject, params: list[nn.Parameter]) -> Optimizer:
    """A new optimizer over the same parameters with the saved state of the old."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    fresh = _undecayed(subject, params)
    fresh.load_state_dict(torch.load(file, weights_only=False))
    return fresh


@_fault("resumed run")
def _resumed(subject: Subject) -> str:
    through, stopped = _params((6, 9), (7, 7)), _params((6, 9), (7, 7))
    one, other = _undecayed(subject, through), _undecayed(subject, stopped)
    for step in range(2 * _STEPS):
        if step == 7:
            other = _reloaded(other, subject, stopped)
        for params, optimizer in ((through, one), (stopped, other)):
            _gradients(params, step)
            optimizer.step()
    if not _same(_copies(through), _copies(stopped)):
        apart = max(_apart(a.double(), b.double()) for a, b in zip(stopped, through, strict=True))
        raise Wrong(f"differs from a run that was never stopped by {apart:.1g}")
    return "has the bits of a run that was never stopped"


@_fault("state of 16-bit parameters, resumed")
def _resumed_dtype(subject: Subject) -> str:
    params = _params((6, 9), dtype=torch.bfloat16)
    optimizer = _made(subject, params, "bfloat16 parameters")
    _run(optimizer, params, 4)
    before = _state(optimizer, params[0])
    after = _state(_reloaded(optimizer, subject, params), params[0])
    pairs = list(zip(before, after, strict=True))
    cast = sum(a.dtype != b.dtype or not torch.equal(a, b) for a, b in pairs)
    if cast:
        raise Wrong(f"{cast} of {len(pairs)} state tensors are rounded to 16 bits")
    return "state is as it was saved"


@_fault("copies")
def _copied(subject: Subject) -> str:
    params = _params((6, 9))
    optimizer = _undecayed(subject, params)
    _run(optimizer, params, 3)
    twin = copy.deepcopy(optimizer)
    pickle.loads(pickle.dumps(optimizer.state_dict()))
    (copied,) = twin.param_groups[0]["params"]
    _run(optimizer, params, 3)
    _run(twin, [copied], 3)
    if not _same(_copies(params), _copies([copied])):
        raise Wrong("a deep copy goes on otherwise")
    return "a deep copy goes on as the original"


@_fault("changed learning rate")
def _changed_lr(subject: Subject) -> str:
    params = _params((6, 9))
    optimizer = _undecayed(subject, params)
    _run(optimizer, params, 3)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = _copies(params)
    _run(optimizer, params, 2)
    if not _same(_copies(params), before):
        raise Wrong("lr = 0 in the group is ignored")
    return "a changed group value counts at the next step"


@_fault("schedules of two groups")
def _schedule(subject: Subject) -> str:
    matrices, biases = _params((6, 9), (7, 7)), _params((6,), (7,))
    groups = [{"params": [m, b]} for m, b in zip(matrices, biases, strict=True)]
    try:
        optimizer = _undecayed(subject, groups)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise NotApplicable(f"refuses biases: {str(error).splitlines()[0][:120]}") from None
    torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda _: 1.0, lambda _: 0.5])
    return "two groups take two schedules"


@_fault("no decay that was asked for")
def _decay(subject: Subject) -> str:
    if not subject.knows("weight_decay"):
        raise NotApplicable("has no weight_decay")
    params = _params((6, 9), (6,))
    optimizer = _made(subject, params, "biases")
    before = _copies(params)
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
    params = _params((6, 9))
    optimizer = _undecayed(subject, params)
    before = _copies(params)

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
    params = _params((6, 9))
    before = _copies(params)
    _run(_undecayed(subject, params), params, 1)
    if torch.equal(params[0], before[0]):
        raise Wrong("the first step moves nothing")
    return "the first step moves"


@_fault("16-bit parameters")
def _sixteen_bit(subject: Subject) -> str:
    for dtype in (torch.bfloat16, torch.float16):
        params = _params((6, 9), (7, 7), dtype=dtype)
        before = _copies(params)
        _run(_undecayed(subject, params), params)
        if not _finite(params) or _same(_copies(params), before):
            raise Wrong(f"{dtype} parameters do not move or become non-finite")
    return "bfloat16 and float16 parameters train"


@_fault("float64 parameters")
def _double(subject: Subject) -> str:
    params = _params((6, 9), dtype=torch.float64)
    optimizer = _undecayed(subject, params)
    _run(optimizer, params)
    narrow = [x.dtype for x in _state(optimizer, params[0]) if x.shape == (6, 9)]
    if not _finite(params) or any(dtype != torch.float64 for dtype in narrow):
        raise Wrong(f"their state is {narrow[0]}" if narrow else "they become non-finite")
    return "train, with float64 state"


@_fault("another default device")
def _meta(subject: Subject) -> str:
    params = _params((6, 9))
    before = _copies(params)
    torch.set_default_device("meta")
    try:
        _run(_undecayed(subject, params), params, 3)
    finally:
        torch.set_default_device(None)
    if torch.equal(params[0], before[0]):
        raise Wrong("with another default device steps do nothing")
    return "steps do not depend on it"


# Threads and repetition.


@_fault("repeated run")
def _repeated(subject: Subject) -> str:
    first = _copies(_trained(subject))
    if any(not _same(first, _copies(_trained(subject))) for _ in range(3)):
        raise Wrong("the same steps give other bits")
    return "the same steps give the same bits"


def _trained(subject: Subject, order: int = 1) -> list[nn.Parameter]:
    """Some steps of three matrices; where each is due to be refreshed depends on no other."""
    params = _params((24, 40), (33, 33), (24, 40))
    optimizer = _undecayed(subject, params[::order], stagger=False)
    _run(optimizer, params)
    return params


@_fault("order of parameters")
def _order(subject: Subject) -> str:
    if not _same(_copies(_trained(subject)), _copies(_trained(subject, -1))):
        raise Wrong("parameters in another order give other bits")
    return "does not matter, to the bit"


@_fault("number of threads")
def _threads(subject: Subject) -> str:
    before = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            params = _params((96, 130), (130, 130))
            _run(_undecayed(subject, params), params, 3)
            results.append(_copies(params))
    finally:
        torch.set_num_threads(before)
    if not all(_same(result, results[0]) for result in results):
        raise Wrong("1, 2 and 4 threads give different bits")
    return "does not matter, to the bit"


@_fault("two threads of the user")
def _user_threads(subject: Subject) -> str:
    expected = _copies(_trained(subject))
    results: list[Any] = [None] * 4

    def work(i: int) -> None:
        try:
            results[i] = _copies(_trained(subject))
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
        if not _same(result, expected):
            raise Wrong("optimizers in several threads disturb one another")
    return "do not disturb one another"


@_fault("a simple problem")
def _simple(subject: Subject) -> str:
    params = _params((8, 12))
    target = _gaussian((8, 12), 77)
    optimizer = _undecayed(subject, params, lr=0.02)
    losses = []
    for _ in range(400):
        params[0].grad = (params[0].detach() - target).clone()
        losses.append(float(params[0].grad.square().sum()))
        optimizer.step()
    if not losses[-1] < 0.5 * losses[0]:
        raise Wrong(f"400 steps leave {losses[-1] / losses[0]:.2g} of a quadratic loss")
    return f"400 steps leave {losses[-1] / losses[0]:.2g} of a quadratic loss"
