"""Measures the errors that the family pages show, against float64, beside plain torch.

    python docs/accuracy.py

rewrites docs/accuracy/*.md. Matrices have logarithmically spaced singular values from 1 down to
1/condition; both sides get the same rounded input, so the error is the computation's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import spectral_kernels as sk
import torch
from torch import Tensor

OUT = Path(__file__).parent / "accuracy"
NAMES = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


def spectrum(m: int, n: int, condition: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(m, n, generator=generator, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(noise, full_matrices=False)
    values = torch.logspace(0, 1, len(s), condition, dtype=torch.float64) / condition
    return (u * values.flip(0)) @ vh


def error(x: Tensor, true: Tensor) -> float:
    return float((x.double() - true).norm() / true.norm())


def table(name: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    OUT.mkdir(exist_ok=True)
    (OUT / f"{name}.md").write_text("\n".join(lines) + "\n")


def pair(mine: float, theirs: float) -> str:
    """Ours / plain torch's; ours alone where plain torch in float64 is what both are held to."""
    return f"{mine:.1e} / {theirs:.1e}" if theirs else f"{mine:.1e}"


def standard(x: Tensor, rows: Sequence[Sequence[float]]) -> Tensor:
    """The textbook iteration in x's dtype."""
    y = x / torch.linalg.matrix_norm(x.double()).to(x.dtype)
    for a, b, c in rows:
        r = y @ y.mT
        y = a * y + (b * r + c * r @ r) @ y
    return y


def newton_schulz() -> None:
    rows = []
    for name in ("muon", "quintic", "polar_express"):
        polynomial = sk.coefficients.resolve(name).rows
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            row = [name, NAMES[dtype]]
            for condition in (1e1, 1e2, 1e4):
                x = spectrum(128, 384, condition).to(dtype)
                true = standard(x.double(), polynomial)
                mine = sk.newton_schulz(x, coefficients=name)
                row.append(pair(error(mine, true), error(standard(x, polynomial), true)))
            rows.append(row)
    head = ("coefficients", "dtype", "condition 1e1", "1e2", "1e4")
    table("newton_schulz", head, rows)


def by_eigh(a: Tensor, p: int) -> Tensor:
    values, vectors = torch.linalg.eigh(a)
    return (vectors * values.clamp(min=torch.finfo(a.dtype).tiny) ** (-1 / p)) @ vectors.mT


def inverse_root() -> None:
    rows = []
    for p in (2, 4):
        for dtype in (torch.float64, torch.float32):
            for method in ("iteration", "eigen"):
                row = [f"{p}", NAMES[dtype], method]
                for condition in (1e2, 1e4, 1e6):
                    x = spectrum(128, 128, condition**0.5)
                    a = (x @ x.mT).to(dtype)
                    a = (a + a.mT) / 2
                    delta = 0.5 / condition * float(a.abs().sum(-1).max())
                    eye = torch.eye(128, dtype=torch.float64)
                    true = by_eigh(a.double() + delta * eye, p)
                    mine = sk.inverse_root(a, p, ridge=delta, method=method)
                    theirs = by_eigh(a + (delta * eye).to(dtype), p)
                    row.append(pair(error(mine, true), error(theirs, true)))
                rows.append(row)
    table("inverse_root", ("p", "dtype", "method", "condition 1e2", "1e4", "1e6"), rows)


def products(name: str, mine: Callable[[Tensor], Tensor], own: Callable[[Tensor], Tensor]) -> None:
    rows = []
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        row = [NAMES[dtype]]
        for condition in (1e1, 1e2, 1e4):
            x = spectrum(128, 384, condition).to(dtype)
            true = x.double() @ x.double().mT
            row.append(pair(error(mine(x), true), error(own(x), true)))
        rows.append(row)
    table(name, ("dtype", "condition 1e1", "1e2", "1e4"), rows)


def left_factor(x: Tensor) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    left = torch.zeros(len(x), len(x), dtype=dtype)
    sk.kron_factors_update_(left, None, x, 1.0, weight=1.0)
    return left


def wide(x: Tensor) -> Tensor:
    x = x if x.dtype == torch.float64 else x.float()
    return x @ x.mT


def off_diagonal(q: Tensor, a: Tensor) -> float:
    rotated = q.double().mT @ a.double() @ q.double()
    return float((rotated - torch.diag(rotated.diagonal())).norm() / rotated.norm())


def eigenbasis() -> None:
    rows = []
    for dtype in (torch.float64, torch.float32):
        for condition in (1e2, 1e4, 1e6):
            x = spectrum(128, 128, condition**0.5)
            a = (x @ x.mT).to(dtype)
            _, q = sk.eigenbasis(a)
            y = spectrum(128, 128, condition**0.5, seed=1)
            moved = (0.9 * a.double() + 0.1 * y @ y.mT).to(dtype)
            _, mine = sk.refresh_eigenbasis(q, moved)
            theirs = torch.linalg.qr(moved @ q).Q
            eye = torch.eye(128, dtype=torch.float64)
            orthogonal = [
                float((b.double().mT @ b.double() - eye).abs().max()) for b in (mine, theirs)
            ]
            diagonal = off_diagonal(mine, moved), off_diagonal(theirs, moved)
            rows.append([NAMES[dtype], f"{condition:.0e}", pair(*orthogonal), pair(*diagonal)])
    table("eigenbasis", ("dtype", "condition", "max |Q^T Q - I|", "off the diagonal"), rows)


def deva_update(grads: Sequence[Tensor], dtype: torch.dtype, compute: torch.dtype) -> Tensor:
    param = torch.nn.Parameter(torch.zeros(grads[0].shape, dtype=dtype))
    optimizer = sk.optim.DeVA([param], 1.0, weight_decay=0.0, compute_dtype=compute)
    for grad in grads:
        param.grad = grad.to(dtype)
        optimizer.step()
    return param.detach()


def deva() -> None:
    rows = []
    for compute in (torch.float32, torch.float16, torch.bfloat16):
        row = ["float32", NAMES[compute]]
        for condition in (1e1, 1e2, 1e4):
            grads = [spectrum(96, 96, condition, seed).float() for seed in range(5)]
            true = deva_update(grads, torch.float64, torch.float64)
            mine = error(deva_update(grads, torch.float32, compute), true)
            with sk.use_backend("reference"):
                theirs = error(deva_update(grads, torch.float32, compute), true)
            row.append(pair(mine, theirs))
        rows.append(row)
    table("deva", ("parameters", "products", "condition 1e1", "1e2", "1e4"), rows)


if __name__ == "__main__":
    newton_schulz()
    inverse_root()
    products("symmetric_matmul", sk.gram, lambda x: x @ x.mT)
    products("kron_factor", left_factor, wide)
    eigenbasis()
    deva()
