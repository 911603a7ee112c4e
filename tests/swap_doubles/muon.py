"""A small stand-in for Keller Jordan's module of the same name."""

import torch
from torch.optim import Optimizer


def zeropower_via_newtonschulz5(G, steps):
    a, b, c = 3.4445, -4.7750, 2.0315
    x = G.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class SingleDeviceMuon(Optimizer):
    def __init__(self, params, lr=0.02, weight_decay=0.0, momentum=0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                buffer = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                mixed = p.grad.lerp(buffer, group["momentum"])
                update = zeropower_via_newtonschulz5(mixed, steps=5)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                scale = max(1, p.shape[-2] / p.shape[-1]) ** 0.5
                p.add_(update, alpha=-group["lr"] * scale)
