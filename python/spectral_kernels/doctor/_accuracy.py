"""Every operator against float64 on structures that gradients and factors have.

The rule is one of ensembles: over some draws, the root mean square of our errors is at most twice
that of plain torch in the same dtype, plus a few units of roundoff. One draw decides nothing, as
plain torch is exact on some by luck.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .. import _extension, coefficients
from ..eigenbasis import eigenbasis, refresh_eigenbasis
from ..inverse_root import inverse_root
from ..kron_factor import kron_factors_update_, kron_precondition
from ..newton_schulz import newton_schulz, polar
from ..symmetric_matmul import gram
from ._outcome import Finding, Wrong, examine

_M, _N = 24, 40
# Draws of an ensemble, and what is allowed beyond twice plain torch's error, in roundoffs.
_DRAWS, _ROUNDINGS = 3, 8.0
_RIDGE = 1e-5


def _draw(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")


def _repeated_rows(x: Tensor) -> Tensor:
    return x[torch.arange(len(x), dtype=torch.int64, device="cpu") // 2 * 2]


def _dead(x: Tensor) -> Tensor:
    x = x.clone()
    x[len(x) // 3 : len(x) // 2] = 0.0
    x[:, :5] = 0.0
    return x


def _one_hot(x: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(x.argmax(1), x.shape[1]).double()


def _blocks(x: Tensor) -> Tensor:
    x, m, n = x.clone(), x.shape[0] // 2, x.shape[1] // 2
    x[:m, n:] = 0.0
    x[m:, :n] = 0.0
    return x


def _graded(x: Tensor) -> Tensor:
    return x * torch.logspace(
        0, -11, len(x), base=2.0, dtype=torch.float64, device="cpu"
    ).unsqueeze(1)


def _outliers(x: Tensor) -> Tensor:
    x = x.clone()
    x[3, 7] = 1e3
    return x


def _nearly_orthogonal(x: Tensor) -> Tensor:
    return torch.linalg.qr(x.mT)[0].mT + 1e-3 * x


STRUCTURES: dict[str, Callable[[Tensor], Tensor]] = {
    "Gaussian": lambda x: x,
    "rank 3": lambda x: x[:, :3] @ x[:3] / 5.0,
    "repeated rows": _repeated_rows,
    "dead rows and columns": _dead,
    "one-hot": _one_hot,
    "blocks": _blocks,
    "graded by 2^-k": _graded,
    "outlier": _outliers,
    "nearly orthogonal": _nearly_orthogonal,
    "far from scale 1": lambda x: x * 2.0**-20,
}


@dataclass(frozen=True)
class Operator:
    """What is compared.

    Attributes:
        ours, plain: of a matrix.
        error: of a result for a matrix, judged in float64.
        shape, dtype: of the matrix.
    """

    ours: Callable[[Tensor], Tensor]
    plain: Callable[[Tensor], Tensor]
    error: Callable[[Tensor, Tensor], float]
    shape: tuple[int, int] = (_M, _N)
    dtype: torch.dtype = torch.float32


def _relative(exact: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], float]:
    def error(found: Tensor, x: Tensor) -> float:
        expected = exact(x.double())
        size = float(expected.norm())
        difference = float((found.double() - expected).norm())
        return difference / size if size else difference

    return error


def _plain_newton_schulz(x: Tensor, name: str = "muon") -> Tensor:
    chosen = coefficients.resolve(name)
    x = x / (chosen.norm_factor * x.norm())
    for a, b, c in chosen.rows:
        square = x @ x.mT
        x = a * x + (b * square + c * (square @ square)) @ x
    return x


def _iteration(name: str, shape: tuple[int, int], dtype: torch.dtype) -> Operator:
    """Newton-Schulz with some coefficients, on shapes for which its forms differ."""
    plain = partial(_plain_newton_schulz, name=name)
    ours = partial(newton_schulz, coefficients=name)
    return Operator(ours, plain, _relative(plain), shape, dtype)


def _plain_polar(x: Tensor) -> Tensor:
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    limit = max(x.shape) * torch.finfo(torch.float32).eps
    kept = (s > limit * s.max()).to(x.dtype)
    return (u * kept) @ vh


def _sides(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two fixed well-conditioned sides."""
    left, right = _draw(_M, _M, seed=1), _draw(_N, _N, seed=2)
    return left.to(x.dtype), right.to(x.dtype)


def _precondition(x: Tensor) -> Tensor:
    left, right = _sides(x)
    return left @ x @ right


def _factor(x: Tensor) -> Tensor:
    """A symmetric factor of the structure, in x's dtype."""
    x = x.double() @ x.double().mT
    return (0.5 * (x + x.mT)).float()


def _update(x: Tensor) -> Tensor:
    return 0.9 * torch.eye(_M, dtype=x.dtype, device="cpu") + 0.1 * (x @ x.mT)


def _our_update(x: Tensor) -> Tensor:
    left, right = (
        torch.eye(_M, dtype=x.dtype, device="cpu"),
        torch.eye(_N, dtype=x.dtype, device="cpu"),
    )
    kron_factors_update_(left, right, x, beta=0.9)
    return left


def _eigen_root(a: Tensor) -> Tensor:
    delta = _RIDGE * a.abs().sum(1).max()
    values, vectors = torch.linalg.eigh(a + delta * torch.eye(_M, dtype=a.dtype, device="cpu"))
    return (vectors * values.clamp(min=float(delta) / 2) ** -0.25) @ vectors.mT


def _root_error(found: Tensor, x: Tensor) -> float:
    """Relative to the root of the same float32 factor in float64."""
    expected = _eigen_root(_factor(x).double())
    return float((found.double() - expected).norm() / expected.norm())


def _basis_error(found: Tensor, x: Tensor) -> float:
    """What is not diagonal in Q^T A Q, and how far Q is from orthogonal."""
    q, a = found.double(), _factor(x).double()
    turned = q.mT @ a @ q
    off = turned - turned.diagonal().diag_embed()
    apart = q.mT @ q - torch.eye(_M, dtype=torch.float64, device="cpu")
    return float(off.norm() / a.norm() + apart.norm() / math.sqrt(_M))


def _start(x: Tensor) -> Tensor:
    """A basis that a refresh begins from: near that of the factor."""
    _, vectors = torch.linalg.eigh(_factor(x).double() + 1e-3 * _factor(_draw(_M, _N, seed=3)))
    return vectors.float()


def _ordered(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, a = _start(x), _factor(x)
    diagonal = (q.double().mT @ a.double() @ q.double()).diagonal()
    return q, a, diagonal.sort(descending=True, stable=True).indices


def _plain_refresh(x: Tensor) -> Tensor:
    q, a, order = _ordered(x)
    out = torch.empty_like(q)
    out[:, order] = torch.linalg.qr(a @ q[:, order])[0]
    return out


def _refresh_error(found: Tensor, x: Tensor) -> float:
    """What a QR of A Q leaves below R's diagonal, and how far the basis is from orthogonal."""
    q, a, order = _ordered(x)
    turned = found.double()[:, order].mT @ a.double() @ q.double()[:, order]
    apart = found.double().mT @ found.double() - torch.eye(_M, dtype=torch.float64, device="cpu")
    return float(turned.tril(-1).norm() / a.double().norm() + apart.norm() / math.sqrt(_M))


def _our_root(x: Tensor) -> Tensor:
    root = inverse_root(_factor(x), 4, relative_ridge=_RIDGE)
    assert isinstance(root, Tensor)
    return root


OPERATORS: dict[str, Operator] = {
    "gram": Operator(gram, lambda x: x @ x.mT, _relative(lambda x: x @ x.mT)),
    "newton_schulz": _iteration("muon", (_M, _N), torch.float32),
    "newton_schulz, wide": _iteration("deepseekv4", (64, 160), torch.float32),
    "newton_schulz, bfloat16": _iteration("muon", (96, 384), torch.bfloat16),
    "polar": Operator(polar, _plain_polar, _relative(_plain_polar)),
    "kron_factors_update_": Operator(_our_update, _update, _relative(_update)),
    "kron_precondition": Operator(
        lambda x: kron_precondition(x, *_sides(x)), _precondition, _relative(_precondition)
    ),
    "inverse_root": Operator(_our_root, lambda x: _eigen_root(_factor(x)), _root_error),
    "eigenbasis": Operator(
        lambda x: eigenbasis(_factor(x))[1],
        lambda x: torch.linalg.eigh(_factor(x))[1],
        _basis_error,
    ),
    "refresh_eigenbasis": Operator(
        lambda x: refresh_eigenbasis(_start(x), _factor(x))[1], _plain_refresh, _refresh_error
    ),
}


def _rms(errors: Sequence[float]) -> float:
    return math.sqrt(sum(e * e for e in errors) / len(errors))


def _judge(operator: Operator, plain: dict[str, float]) -> str:
    """Compares on every structure; `plain` keeps plain torch's errors from set to set."""
    worst, bad = (0.0, ""), []
    for name, structure in STRUCTURES.items():
        inputs = [
            structure(_draw(*operator.shape, seed=i)).to(operator.dtype) for i in range(_DRAWS)
        ]
        ours = _rms([operator.error(operator.ours(x), x) for x in inputs])
        theirs = plain.get(name)
        if theirs is None:
            theirs = plain[name] = _rms([operator.error(operator.plain(x), x) for x in inputs])
        allowed = 2.0 * theirs + _ROUNDINGS * torch.finfo(operator.dtype).eps / 2.0
        if not ours <= allowed:
            bad.append(f"{name} {ours:.1e} against {theirs:.1e}")
        worst = max(worst, (ours / allowed, name))
    if bad:
        raise Wrong(f"more than twice plain torch's error on {', '.join(bad)}")
    return f"at most {worst[0]:.0%} of what is allowed, on {worst[1]}"


@contextlib.contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """The CPU kernels run with this set."""
    module = _extension.MODULE
    assert module is not None
    module.set_isa_cap(name)
    try:
        yield
    finally:
        module.set_isa_cap("")


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """On matrices this small threads only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def accuracy(sets: Sequence[str]) -> Iterator[Finding]:
    """Every operator on ten structures, with every instruction set that the processor has."""
    plain: dict[str, dict[str, float]] = {name: {} for name in OPERATORS}
    for isa in sets:
        for name, operator in OPERATORS.items():
            with instruction_set(isa), one_thread():
                yield examine("accuracy", name, isa, partial(_judge, operator, plain[name]))
