"""What the small stand-ins for public packages share; no package has a module of this name."""

import torch

QUINTIC = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


def iterated(x, rows):
    """X <- a X + (b A + c A A) X with A = X X^T of the wide form, a row a step."""
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for a, b, c in rows:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def parameters(optimizer, **buffers):
    """(group, parameter, state) of each; its first step makes zeros like what `buffers` return."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state[p]
            if not state:
                state.update((name, torch.zeros_like(like(p))) for name, like in buffers.items())
            yield group, p, state


def averaged(optimizer, name="momentum_buffer"):
    """(group, parameter, momentum) of each, the momentum moved towards the gradient."""
    for group, p, state in parameters(optimizer, **{name: lambda p: p}):
        yield group, p, state[name].lerp_(p.grad, 1 - group["momentum"])
