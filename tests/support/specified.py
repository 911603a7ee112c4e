"""One parameter under the specification of a step, and the mathematics to compare with."""

from __future__ import annotations

import math
from typing import Any

import torch
from spectral_kernels.reference import deva_step_, shampoo_step_, soap_step_
from torch import Tensor

from .cases import step_options
from .formats import state_dtype

F64 = torch.float64
# The absent side of a step.
NONE = torch.empty(0)


def relative(x: Tensor, y: Tensor) -> float:
    """The Frobenius norm of the difference over that of y."""
    return float((x.double() - y).norm() / y.norm())


def eye(n: int) -> Tensor:
    return torch.eye(n, dtype=F64)


def turned(n: int) -> Tensor:
    """A random orthogonal matrix of torch's own generator."""
    return torch.linalg.qr(torch.randn(n, n, dtype=F64))[0]


def with_spectrum(values: Tensor, q: Tensor | None = None) -> Tensor:
    """A symmetric matrix of these eigenvalues, exactly so; its eigenvectors are q's columns."""
    q = turned(len(values)) if q is None else q
    a = (q * values) @ q.mT
    return 0.5 * (a + a.mT)


def graded(n: int, condition: float) -> Tensor:
    return with_spectrum(torch.logspace(0, -math.log10(condition), n, dtype=F64))


def exact_root(a: Tensor, p: int) -> Tensor:
    values, vectors = torch.linalg.eigh(a.double())
    return (vectors * values ** (-1.0 / p)) @ vectors.mT


def counter() -> Tensor:
    return torch.zeros((), dtype=torch.int64)


class Stepped:
    """One parameter with its state; `lists` names it and that in the order of the step's lists."""

    lists: tuple[str, ...]
    skipped: Tensor
    options: dict[str, Any]

    @property
    def state(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name) for name in self.lists)

    def moved(self, step: Any, grad: Tensor, lr: float, **options: Any) -> Tensor:
        """Takes a step; what it has moved against, in units of lr."""
        param, *rest = self.state
        before = param.clone()
        lists = [[x] for x in (param, grad, *rest)]
        step(*lists, self.skipped, torch.tensor(lr, dtype=F64), **{**self.options, **options})
        return (before - param) / lr


_BETA = {"shampoo_beta": 0.8, "weight_decay": 0.0}
SOAP = {**step_options("soap_step_"), **_BETA}
DEVA = {**step_options("deva_step_"), **_BETA}


class Rotated(Stepped):
    """One parameter with its state, for either step."""

    lists = ("param", "m", "v", "left", "right", "left_basis", "right_basis", "count")

    def __init__(self, param: Tensor, kind: str, sides: str = "lr", **options: Any) -> None:
        *batch, m, n = param.shape
        dtype = state_dtype(param.dtype)
        self.kind = kind
        self.param = param.clone()
        self.m = torch.zeros(param.shape, dtype=dtype)
        low_memory = options.get("variance") == "low_memory"
        self.v = torch.zeros(*batch, m + n, dtype=dtype) if low_memory else torch.zeros_like(self.m)
        left, right = ("l" in sides, "r" in sides)
        self.left, self.left_basis = (
            torch.zeros(*batch, m, m, dtype=dtype) if left else NONE for _ in range(2)
        )
        self.right, self.right_basis = (
            torch.zeros(*batch, n, n, dtype=dtype) if right else NONE for _ in range(2)
        )
        self.count = torch.zeros(batch)
        self.skipped = counter()
        self.options = {**(SOAP if kind == "soap" else DEVA), **options}

    def step(
        self, grad: Tensor, lr: float = 1.0, refresh: int = 0, scale: float = 1.0, **options: Any
    ) -> Tensor:
        if self.kind == "soap":
            return self.moved(soap_step_, grad, lr, refresh=[refresh], **options)
        return self.moved(deva_step_, grad, lr, refresh=[refresh], scales=[scale], **options)


PUBLIC_DEVA = {"reference": True, "eps_mode": "inside"}
PUBLIC_LINF = {**PUBLIC_DEVA, "norm": "linf", "eps": 1e-5}


SHAMPOO = {
    "beta1": 0.9,
    "beta2": 0.95,
    "graft_beta2": 0.9,
    "root": 4,
    "ridge": 0.0,
    "relative_ridge": 1e-6,
    "root_method": "auto",
    "weight_decay": 0.0,
    "graft": "none",
    "graft_eps": 1e-8,
    "graft_eps_mode": "relative",
    "kl": False,
    "kl_order": "sequential",
    "debias": True,
    "maximize": False,
    "nonfinite": "skip",
}


class Shampoo(Stepped):
    """One parameter with its state, roots starting as the identity."""

    lists = (
        *("param", "momentum", "left", "right", "left_root", "right_root"),
        *("squares", "failures", "count"),
    )

    def __init__(self, param: Tensor, sides: str = "lr", **options: Any) -> None:
        *batch, m, n = param.shape
        dtype = state_dtype(param.dtype)
        self.param = param.clone()
        self.momentum = torch.zeros(param.shape, dtype=dtype)
        self.squares = torch.zeros(param.shape, dtype=dtype)
        self.left, self.right = NONE, NONE
        self.left_root, self.right_root = NONE, NONE
        if "l" in sides:
            self.left = torch.zeros(*batch, m, m, dtype=dtype)
            self.left_root = torch.eye(m, dtype=dtype).expand(*batch, m, m).clone()
        if "r" in sides:
            self.right = torch.zeros(*batch, n, n, dtype=dtype)
            self.right_root = torch.eye(n, dtype=dtype).expand(*batch, n, n).clone()
        self.failures = torch.zeros(*batch, 2, dtype=torch.int64)
        self.count = torch.zeros(batch)
        self.skipped = counter()
        self.options = {**SHAMPOO, **options}

    def step(self, grad: Tensor, lr: float = 1.0, refresh: int = 1, **options: Any) -> Tensor:
        return self.moved(shampoo_step_, grad, lr, refresh=[refresh], **options)
