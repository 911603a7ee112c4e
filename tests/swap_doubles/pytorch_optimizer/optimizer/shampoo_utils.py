"""A small stand-in for the module of the same name."""

import torch


def zero_power_via_newton_schulz_5(
    g, num_steps=5, eps=1e-7, safety_factor=1.0, weights=(3.4445, -4.7750, 2.0315)
):
    x = g.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    norm = torch.linalg.matrix_norm(x, keepdim=True)
    x = x / norm.mul(safety_factor).clamp(min=eps)
    for _ in range(num_steps):
        gram = x @ x.mT
        x = weights[0] * x + (weights[1] * gram + weights[2] * gram @ gram) @ x
    return x.mT if tall else x
