"""A small stand-in for dion's module of the same name."""

import torch
from stand_in import parameters
from torch.optim import Optimizer

from .polar_express import polar_express


class NorMuon(Optimizer):
    def __init__(self, params, lr=0.01, mu=0.95, muon_beta2=0.95, epsilon=1e-8):
        super().__init__(params, {"lr": lr, "mu": mu, "muon_beta2": muon_beta2, "eps": epsilon})
        self._newton_schulz_func = polar_express

    @torch.no_grad()
    def step(self, closure=None):
        buffers = {"momentum": lambda p: p, "variance_neuron": lambda p: p[:, :1]}
        for group, p, state in parameters(self, **buffers):
            m, v = state["momentum"], state["variance_neuron"]
            m.mul_(group["mu"]).add_(p.grad)
            update = self._newton_schulz_func(m.bfloat16(), epsilon=torch.tensor(group["eps"]))
            update = update.to(p.dtype)
            length = update.norm()
            v.lerp_(update.square().mean(-1, keepdim=True), 1 - group["muon_beta2"])
            update = update / (v.sqrt() + 1e-8)
            p.add_(update * (length / update.norm()), alpha=-group["lr"])
