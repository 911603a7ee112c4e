"""QK-clip: attention logits bounded through the weights that make them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _checks


@torch.no_grad()
def qk_clip_(
    max_logits: Tensor,
    queries: Sequence[Tensor],
    keys: Sequence[Tensor] = (),
    *,
    threshold: float = 100.0,
    alpha: float = 0.5,
) -> Tensor:
    """Scales the queries and keys of every head whose logits went beyond a threshold, after a step.

        g_h = min(1, threshold / max_logits_h)
        W_q,h <- g_h^alpha W_q,h,  W_k,h <- g_h^(1 - alpha) W_k,h

    so that the logits of head h, which are linear in both, shrink by g_h. Without keys of its own,
    as where several heads share one (grouped queries, the rotary part of multi-head latent
    attention), the queries take all of g_h: call it once for each part.

    Args:
        max_logits: (heads,) the largest logit of every head in the last forward pass, scaled as the
            softmax sees it. Over several ranks it has to be the largest of all.
        queries: weights (heads * d, in), and biases (heads * d,), of which d rows after d rows make
            a head; scaled in place.
        keys: the same of the keys, with as many heads.
        threshold: positive; 100 in the source.
        alpha: in [0, 1], how much of it the queries take where there are keys.

    Returns:
        g, float32, (heads,): 1 where nothing was clipped. A logit that is not finite clips nothing.

    Raises:
        TypeError, ValueError: bad input, naming it, before anything is written.

    Source: Kimi K2, arXiv 2507.20534 (MuonClip).
    """
    threshold = _checks.number("threshold", threshold)
    if threshold == 0.0:
        raise ValueError("threshold must be positive, not 0.0")
    alpha = _checks.number("alpha", alpha, 0.0, 1.0, include_high=True)
    if not isinstance(max_logits, Tensor) or not max_logits.is_floating_point():
        raise TypeError(f"max_logits must be a floating-point tensor, not {max_logits!r}")
    if max_logits.ndim != 1 or not max_logits.numel():
        raise ValueError(f"max_logits must be (heads,), not of shape {tuple(max_logits.shape)}")
    heads = len(max_logits)
    for name, tensors in (("queries", queries), ("keys", keys)):
        if isinstance(tensors, Tensor):
            raise TypeError(f"{name} must be a sequence of tensors, not one")
        for i, x in enumerate(tensors):
            if not isinstance(x, Tensor) or not x.is_floating_point():
                raise TypeError(f"{name}[{i}] must be a floating-point tensor, not {type(x)}")
            if x.ndim not in (1, 2) or x.shape[0] % heads:
                raise ValueError(
                    f"{name}[{i}] has shape {tuple(x.shape)}, whose rows are not those of "
                    f"{heads} heads"
                )
    logits = max_logits.float()
    clipped = logits.isfinite() & (logits > threshold)
    factors = torch.where(clipped, threshold / logits, 1.0)
    for tensors, power in ((queries, alpha if len(keys) else 1.0), (keys, 1.0 - alpha)):
        for x in tensors:
            each = (factors**power).to(x.device).repeat_interleave(x.shape[0] // heads)
            # Rounded once, and what is not clipped keeps its bits.
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            x.copy_(wide * (each if x.ndim == 1 else each[:, None]))
    return factors
