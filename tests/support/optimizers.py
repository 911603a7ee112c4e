"""Every optimizer in several settings, and models that they train."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import pytest
import spectral_kernels as sk
import torch
from torch import Tensor, nn

Factory = Callable[..., torch.optim.Optimizer]

CONFIGS: dict[str, Factory] = {
    "muon": partial(sk.optim.Muon, lr=0.02),
    "muon_plain": partial(
        sk.optim.Muon, lr=0.02, nesterov=False, adjust_lr_fn="match_rms_adamw", weight_decay=0.0
    ),
    "muon_fp32": partial(
        sk.optim.Muon, lr=0.02, coefficients="polar_express", compute_dtype=torch.float32
    ),
    "shampoo": partial(sk.optim.Shampoo, lr=0.01, precondition_frequency=3),
    "shampoo_blocks": partial(sk.optim.Shampoo, lr=0.01, block_size=5, precondition_frequency=3),
    "shampoo_one_sided": partial(sk.optim.Shampoo, lr=0.01, exponent=0.5, sides="shorter"),
    "kl_shampoo": partial(sk.optim.Shampoo, lr=0.01, kl=True, precondition_frequency=2),
    "shampoo_like_distributed": partial(sk.optim.Shampoo.like_distributed, graft="adam"),
    "soap": partial(sk.optim.SOAP, lr=0.01, precondition_frequency=3),
    "soap_one_side": partial(sk.optim.SOAP, lr=0.01, max_precond_dim=9, skip_first=False),
    "deva": partial(sk.optim.DeVA, lr=0.05, precondition_frequency=3),
    "deva_instant": partial(sk.optim.DeVA, lr=0.05, variant="instant"),
    "deva_sign": partial(sk.optim.DeVA, lr=0.05, variant="sign", normalize_grads=True),
    "deva_low_memory": partial(sk.optim.DeVA, lr=0.05, variant="low_memory"),
    "deva_linf": partial(sk.optim.DeVA, lr=0.05, variant="linf"),
    "deva_reference": partial(sk.optim.DeVA, lr=0.05, reference=True, precondition_frequency=3),
}
# One setting of each class, where more would show nothing new.
FEW = ("muon", "shampoo", "soap", "deva")


class Model(nn.Module):
    """A convolution, two linear layers and their biases."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3)
        self.hidden = nn.Linear(24, 12)
        self.out = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.hidden(torch.tanh(self.conv(x)).flatten(1))))


def model(dtype: torch.dtype = torch.float32, seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return Model().to(dtype)


def batches(count: int, dtype: torch.dtype = torch.float32) -> Iterator[tuple[Tensor, Tensor]]:
    """Four classes that a linear map of the input decides."""
    generator = torch.Generator().manual_seed(1)
    teacher = torch.randn(32, 4, generator=generator, dtype=torch.float32)
    for _ in range(count):
        x = torch.randn(32, 2, 4, 4, generator=generator, dtype=torch.float32)
        yield x.to(dtype), (x.flatten(1) @ teacher).argmax(1)


def train(
    net: Model, optimizer: torch.optim.Optimizer, steps: Iterable[tuple[Tensor, Tensor]]
) -> list[float]:
    losses = []
    for x, y in steps:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x).float(), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def with_grads(params: Iterable[nn.Parameter], seed: int = 0, scale: float = 1.0) -> None:
    """New Gaussian gradients."""
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        grad = torch.randn(param.shape, generator=generator, dtype=torch.float32)
        param.grad = (scale * grad).to(param.dtype)


def stepped(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], count: int) -> None:
    """Takes some steps with Gaussian gradients."""
    for seed in range(count):
        with_grads(params, seed)
        optimizer.step()


def parameter(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype))


def torch_scales(monkeypatch: pytest.MonkeyPatch, adjust: str) -> None:
    """torch.optim.Muon takes `adjust` in its groups, also where only a later version does."""
    module = importlib.import_module("torch.optim._muon")
    own = module._adjust_lr

    def adjust_lr(lr: float, adjust_lr_fn: str | None, param_shape: torch.Size) -> float:
        if adjust_lr_fn != "spectral_unclamped":
            return own(lr, adjust_lr_fn, param_shape)
        return lr * (param_shape[0] / param_shape[1]) ** 0.5

    if adjust == "spectral_unclamped":
        monkeypatch.setattr(module, "_adjust_lr", adjust_lr)


def needs_kernels() -> None:
    """For comparisons of layouts, on which the bits of torch's products depend."""
    if sk.explain("muon_step_", torch.zeros(2, 2)).backend == "reference":
        pytest.skip("the reference's bits depend on strides")
