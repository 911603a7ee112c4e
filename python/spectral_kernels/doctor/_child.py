"""What a fresh process of the doctor does.

Every computation runs in a new Python thread, whose workers have never done anything, and is
printed as a line "name digest".
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..eigenbasis import eigenbasis, refresh_eigenbasis
from ..inverse_root import inverse_root
from ..newton_schulz import polar


def digest(tensors: Iterable[Tensor]) -> str:
    """Of all bits."""
    found = hashlib.sha256()
    for x in tensors:
        found.update(x.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def _singular(n: int) -> Tensor:
    """A factor of rank n / 4, whose root takes the way by an eigendecomposition."""
    half = torch.randint(
        -2,
        3,
        (n, n // 4),
        generator=torch.Generator().manual_seed(0),
        dtype=torch.float32,
        device="cpu",
    )
    return half @ half.mT


def _root(n: int) -> list[Tensor]:
    root = inverse_root(_singular(n), 4)
    assert isinstance(root, Tensor)
    return [root]


def _ridged(n: int) -> list[Tensor]:
    root, info = inverse_root(_singular(n), 4, relative_ridge=1e-9, return_info=True)
    return [root, info.status.float()]


def _basis(n: int) -> list[Tensor]:
    # Integers: the factor's bits depend on nobody's products.
    half = torch.randint(
        -3, 4, (n, n), generator=torch.Generator().manual_seed(1), dtype=torch.float64, device="cpu"
    )
    return list(eigenbasis(half + half.mT))


def _refresh(n: int) -> list[Tensor]:
    # All ones: every column of A Q is a multiple of one vector.
    generator = torch.Generator().manual_seed(2)
    q = torch.eye(n, dtype=torch.float32, device="cpu")[
        torch.randperm(n, generator=generator, dtype=torch.int64, device="cpu")
    ]
    return list(refresh_eigenbasis(q, torch.ones(n, n, dtype=torch.float32, device="cpu")))


def _polar(n: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [
        polar(
            torch.randint(
                -3, 4, (n, n // 2), generator=generator, dtype=torch.float32, device="cpu"
            )
        )
    ]


COMPUTATIONS: dict[str, Callable[[int], list[Tensor]]] = {
    "inverse_root of a singular factor": _root,
    "inverse_root with a small ridge": _ridged,
    "eigenbasis": _basis,
    "refresh_eigenbasis by Householder": _refresh,
    "polar": _polar,
}


def main(threads: int, size: int) -> None:
    """Prints every computation's digest."""
    torch.set_num_threads(threads)
    for name, compute in COMPUTATIONS.items():

        def work(name: str = name, compute: Callable[[int], list[Tensor]] = compute) -> None:
            print(name, digest(compute(size)), flush=True)

        worker = threading.Thread(target=work)
        worker.start()
        worker.join()
