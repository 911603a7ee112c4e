"""A small stand-in for the module of the same name."""

import torch
from stand_in import averaged
from torch.optim import Optimizer

from emerging_optimizers.orthogonalized_optimizers import muon_utils


class Muon(Optimizer):
    def __init__(self, params, lr=3e-4, momentum=0.95, fp32_matmul_prec="medium"):
        super().__init__(params, {"lr": lr, "momentum": momentum})
        self.precision = fp32_matmul_prec

    @torch.no_grad()
    def step(self, closure=None):
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self.precision)
        for group, p, buffer in averaged(self):
            update = muon_utils.newton_schulz(
                buffer, steps=5, coefficient_type="quintic", use_syrk=False
            )
            p.add_(update, alpha=-group["lr"] * max(p.shape) ** 0.5)
        torch.set_float32_matmul_precision(before)
