"""A small stand-in for the module of the same name."""

import torch
from stand_in import averaged
from torch.optim import Optimizer

from pytorch_optimizer.optimizer.shampoo_utils import zero_power_via_newton_schulz_5


class Muon(Optimizer):
    def __init__(self, params, lr=2e-2, momentum=0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group, p, buffer in averaged(self):
            update = zero_power_via_newton_schulz_5(buffer, num_steps=5)
            p.add_(update, alpha=-group["lr"])
