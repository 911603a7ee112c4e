"""A small stand-in for the module of the same name."""

import torch

SIMPLE = (3.4445, -4.7750, 2.0315)
EXPRESS = [(8.2373, -23.1577, 16.6806), (4.0824, -2.8930, 0.5253), (1.875, -1.25, 0.375)]


def get_newton_schulz_weights(weights):
    if weights == "polar_express":
        return EXPRESS
    return [weights] if isinstance(weights[0], float) else list(weights)


def zero_power_via_newton_schulz_5(
    g, num_steps=5, eps=1e-7, safety_factor=1.0, weights=SIMPLE, dtype=torch.bfloat16
):
    x = g.to(dtype)
    norm = torch.linalg.matrix_norm(x, keepdim=True)
    return _iterate(x / norm.mul(safety_factor).clamp(min=eps), weights, num_steps)


def zero_power_via_gram_newton_schulz(
    g,
    num_steps=5,
    eps=1e-7,
    safety_factor=1.0,
    weights=SIMPLE,
    dtype=torch.float16,
    reset_steps=(2,),
):
    norm = torch.linalg.matrix_norm(g.float(), keepdim=True)
    x = (g / norm.mul(safety_factor).clamp(min=eps)).to(dtype)
    return _iterate(x, weights, num_steps)


def _iterate(x, weights, steps):
    rows = get_newton_schulz_weights(weights)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for step in range(steps):
        a, b, c = rows[min(step, len(rows) - 1)]
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
