"""MuonClip's QK-clip."""

from __future__ import annotations

import math

import pytest
import torch
from spectral_kernels.optim import qk_clip_

HEADS, WIDTH = 3, 4


def logits(q, k, x):
    parts = [(x @ w.mT).unflatten(-1, (HEADS, WIDTH)).transpose(0, 1) for w in (q, k)]
    return parts[0] @ parts[1].mT


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("shared", [False, True])
def test_logits_come_down_to_the_threshold(alpha, shared):
    q, k = (torch.randn(HEADS * WIDTH, 6, dtype=torch.float64) for _ in range(2))
    x = torch.randn(9, 6, dtype=torch.float64)
    before = logits(q, k, x)
    largest = before.amax((-2, -1))
    bound = float(largest.median())
    expected = (bound / largest).clamp(max=1.0)
    old_k = k.clone()
    found = qk_clip_(largest, [q], [] if shared else [k], threshold=bound, alpha=alpha)
    assert torch.allclose(found.double(), expected, rtol=1e-6)
    assert torch.allclose(logits(q, k, x), expected[:, None, None] * before, rtol=1e-5)
    if shared:
        assert torch.equal(k, old_k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_heads_within_the_threshold_keep_their_bits(dtype):
    weight, bias = torch.randn(6, 5).to(dtype), torch.randn(6).to(dtype)
    old = weight.clone(), bias.clone()
    given = torch.tensor([50.0, 400.0, math.nan])
    found = qk_clip_(given, [weight, bias], threshold=100.0)
    assert found.tolist() == [1.0, 0.25, 1.0]
    for x, before in zip((weight, bias), old, strict=True):
        assert torch.equal(x[:2], before[:2]) and torch.equal(x[4:], before[4:])
        assert torch.equal(x[2:4], before[2:4] * 0.25)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"threshold": 0.0}, ValueError, "threshold"),
        ({"threshold": "1"}, TypeError, "threshold"),
        ({"alpha": 1.5}, ValueError, "alpha"),
        ({"max_logits": torch.ones(2, 3)}, ValueError, "max_logits"),
        ({"max_logits": [1.0]}, TypeError, "max_logits"),
        ({"keys": [torch.ones(7, 5)]}, ValueError, r"keys\[0\]"),
        ({"queries": torch.ones(6, 5)}, TypeError, "queries"),
        ({"queries": [torch.ones(6, 5, dtype=torch.int64)]}, TypeError, r"queries\[0\]"),
    ],
    ids=str,
)
def test_bad_input_is_refused(change, error, said):
    query = torch.ones(6, 5)
    call = {"max_logits": torch.full((3,), 200.0), "queries": [query], "keys": [], **change}
    with pytest.raises(error, match=said):
        qk_clip_(call.pop("max_logits"), call.pop("queries"), call.pop("keys"), **call)
    assert torch.equal(query, torch.ones(6, 5))
