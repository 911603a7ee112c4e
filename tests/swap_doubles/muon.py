"""A small stand-in for Keller Jordan's module of the same name."""

import torch
from stand_in import averaged, iterated
from torch.optim import Optimizer


def zeropower_via_newtonschulz5(G, steps):
    x = G.bfloat16()
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    return iterated(x, [(3.4445, -4.7750, 2.0315)] * steps)


class SingleDeviceMuon(Optimizer):
    def __init__(self, params, lr=0.02, weight_decay=0.0, momentum=0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group, p, buffer in averaged(self):
            mixed = p.grad.lerp(buffer, group["momentum"])
            update = zeropower_via_newtonschulz5(mixed, steps=5)
            p.mul_(1 - group["lr"] * group["weight_decay"])
            scale = max(1, p.shape[-2] / p.shape[-1]) ** 0.5
            p.add_(update, alpha=-group["lr"] * scale)
