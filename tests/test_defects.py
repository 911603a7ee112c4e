"""One test for every fault found in public code that this library must not have.

The names say whose fault it is. Where a fault is one of speed, the test counts work.
"""

from __future__ import annotations

import math

import pytest
import spectral_kernels as sk
import torch
from support.optimizers import parameter, with_grads
from torch import Tensor, nn

FP64 = torch.float64


pytestmark = pytest.mark.usefixtures("one_thread")


def update(optimizer: torch.optim.Optimizer, param: nn.Parameter, seed: int = 0) -> Tensor:
    """What one step with a Gaussian gradient moves."""
    with_grads([param], seed)
    before = param.detach().clone()
    optimizer.step()
    return before - param.detach()


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def deva(param: nn.Parameter, **options: object) -> torch.optim.Optimizer:
    return sk.optim.DeVA([param], **{"lr": 1.0, "weight_decay": 0.0, **options})


# DeVA, commit 2e4d26e


def test_deva_drops_the_first_gradient_and_its_decay() -> None:
    param = parameter(8, 8)
    assert rms(update(deva(param), param)) > 0.1
    zero = parameter(8, 8)
    optimizer = deva(zero, weight_decay=0.25)
    before = zero.detach().clone()
    zero.grad = torch.zeros_like(zero)
    optimizer.step()
    torch.testing.assert_close(zero.detach(), 0.75 * before)


@pytest.mark.parametrize("variant", ["schatten", "instant", "sign", "low_memory"])
def test_deva_starts_twenty_times_too_large(variant: str) -> None:
    param = parameter(32, 32)
    optimizer = deva(param, variant=variant)
    sizes = [rms(update(optimizer, param, seed)) for seed in range(12)]
    # low_memory divides by the gradient's own size, so it shrinks as momentum averages noise out.
    assert sizes[0] > 0.1 and max(sizes) < 0.4


@pytest.mark.parametrize("variant", ["schatten", "instant", "sign", "low_memory", "linf"])
def test_deva_has_an_absolute_eps(variant: str) -> None:
    moved = []
    for exponent in (0, -30):
        param = parameter(16, 16)
        optimizer = deva(param, variant=variant)
        for seed in range(3):
            with_grads([param], seed, 2.0**exponent)
            optimizer.step()
        moved.append(param.detach().clone())
    assert torch.equal(*moved)


@pytest.mark.parametrize("limit", [0, 10000])
@pytest.mark.parametrize("variant", ["schatten", "instant", "sign", "low_memory", "linf"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_deva_overwrites_the_gradient(variant: str, limit: int, nesterov: bool) -> None:
    param = parameter(6, 9)
    optimizer = deva(param, variant=variant, max_precond_dim=limit, nesterov=nesterov)
    for seed in range(3):
        with_grads([param], seed)
        assert param.grad is not None
        before = param.grad.clone()
        optimizer.step()
        assert torch.equal(param.grad, before)


def test_deva_ignores_its_variance_flag() -> None:
    moved = []
    for variance in ("momentum", "none"):
        param = parameter(8, 8)
        optimizer = deva(param, variance=variance)
        for seed in range(3):
            update(optimizer, param, seed)
        moved.append(param.detach().clone())
    assert not torch.allclose(*moved, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, FP64])
def test_deva_takes_only_float32(dtype: torch.dtype) -> None:
    param = parameter(8, 12, dtype=dtype)
    optimizer = deva(param)
    for seed in range(3):
        assert 0.1 < rms(update(optimizer, param, seed)) < 0.4


def test_deva_cuts_convolutions_into_kernel_slices() -> None:
    conv, flat = parameter(6, 2, 3, 3), parameter(6, 18)
    flat.data.copy_(conv.data.flatten(1))
    optimizers = deva(conv), deva(flat)
    for seed in range(3):
        with_grads([conv], seed)
        assert conv.grad is not None
        flat.grad = conv.grad.flatten(1)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(conv.detach().flatten(1), flat.detach())


def test_deva_low_memory_does_not_run() -> None:
    param = parameter(5, 7)
    optimizer = deva(param, variant="low_memory")
    assert rms(update(optimizer, param)) > 0.0
    assert optimizer.state[param]["exp_avg_sq"].shape == (12,)


@pytest.mark.parametrize("variant", ["schatten", "instant", "sign", "low_memory", "linf"])
def test_deva_fails_on_one_dimension(variant: str) -> None:
    bias, weight = parameter(7), parameter(7, 3)
    with_grads([bias, weight])
    before = bias.detach().clone()
    sk.optim.DeVA([bias, weight], variant=variant).step()
    assert not torch.equal(bias, before)


@pytest.mark.parametrize("shape", [(2, 6, 3), (9, 3, 6)])
def test_deva_picks_the_orientation_of_a_batch_from_its_size(shape: tuple[int, ...]) -> None:
    batch = parameter(*shape, dtype=FP64)
    single = [nn.Parameter(matrix.clone()) for matrix in batch.detach()]
    group = {"params": [batch], "batched": True}
    together, apart = (sk.optim.DeVA(params, stagger=False) for params in ([group], single))
    for seed in range(3):
        with_grads([batch], seed)
        assert batch.grad is not None
        for matrix, grad in zip(single, batch.grad, strict=True):
            matrix.grad = grad.clone()
        together.step()
        apart.step()
    assert torch.equal(batch.detach(), torch.stack([matrix.detach() for matrix in single]))


@pytest.mark.parametrize("make", [sk.optim.DeVA, sk.optim.SOAP])
def test_deva_and_soap_rotate_the_momentum_out_and_in_at_every_step(make: type) -> None:
    """Ours is kept rotated: between refreshes its rotation does not change a bit of it."""
    param = parameter(8, 8, dtype=FP64)
    optimizer = make([param], betas=(0.5, 0.95), precondition_frequency=100)
    for seed in range(4):
        update(optimizer, param, seed)
    state = optimizer.state[param]
    left, right = state["left_basis"].clone(), state["right_basis"].clone()
    expected = 0.5 * state["exp_avg"]
    param.grad = torch.zeros_like(param)
    optimizer.step()
    state = optimizer.state[param]
    assert torch.equal(state["exp_avg"], expected)
    assert torch.equal(state["left_basis"], left) and torch.equal(state["right_basis"], right)


def test_deva_loses_the_second_moment_when_columns_are_sorted() -> None:
    """A refresh that swaps eigenvalues moves no column, so V stays with its directions."""
    param = parameter(2, 2, dtype=FP64)
    optimizer = deva(param, shampoo_beta=0.5, precondition_frequency=1, compute_dtype=FP64)
    for step in range(12):
        # The larger singular value changes sides half-way.
        values = (3.0, 1.0) if step < 6 else (1.0, 3.0)
        param.grad = torch.diag(torch.tensor(values, dtype=FP64))
        optimizer.step()
    state = optimizer.state[param]
    factor, basis = state["left"], state["left_basis"]
    assert factor[0, 0] < factor[1, 1]
    # Whatever column the larger value began in, both columns are still where they were.
    torch.testing.assert_close(basis[:, 0].abs(), torch.tensor([1.0, 0.0], dtype=FP64))


def test_deva_decays_what_has_moved() -> None:
    lr, decay = 0.5, 0.5
    param = parameter(6, 6, dtype=FP64)
    start = param.detach().clone()
    optimizer = deva(param, lr=lr, weight_decay=decay)
    optimizer.watch()
    with_grads([param])
    optimizer.step()
    (blocks,) = optimizer.updates().values()
    torch.testing.assert_close(param.detach(), (1 - lr * decay) * start - lr * blocks[0])


@pytest.mark.parametrize("variant", ["schatten", "linf"])
def test_deva_linf_steps_outside_no_grad(variant: str) -> None:
    param = parameter(4, 4)
    optimizer = deva(param, variant=variant)
    with torch.enable_grad():
        with_grads([param])
        optimizer.step()
    assert param.is_leaf and param.grad_fn is None
    assert all(not x.requires_grad for x in optimizer.state[param].values())


def test_deva_factors_are_never_debiased() -> None:
    """Bases do not depend on a factor's scale; the eps of Gamma is relative, so neither does U."""
    moved = []
    for beta in (0.5, 0.999):
        param = parameter(8, 8, dtype=FP64)
        moved.append(update(deva(param, shampoo_beta=beta), param))
    torch.testing.assert_close(*moved)


def test_deva_and_soap_run_one_python_iteration_a_parameter() -> None:
    params = [parameter(4 + i, 9) for i in range(12)]
    for optimizer in (sk.optim.DeVA(params), sk.optim.SOAP(params)):
        with_grads(params)
        sk.call_counts(reset=True)
        optimizer.step()
        assert sum(sk.call_counts().values()) == 1


# torch.optim.Muon 2.13


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_torch_muon_overwrites_its_momentum(dtype: torch.dtype) -> None:
    param = parameter(8, 8, dtype=dtype)
    optimizer = sk.optim.Muon([param], nesterov=False, momentum=0.5)
    with_grads([param])
    assert param.grad is not None
    expected = 0.5 * param.grad.float()
    optimizer.step()
    torch.testing.assert_close(optimizer.state[param]["momentum_buffer"], expected)


# gram-newton-schulz


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, FP64])
@pytest.mark.parametrize("method", ["standard", "gram"])
@pytest.mark.parametrize("transpose", [False, True])
def test_gram_newton_schulz_normalises_its_input_in_place(
    dtype: torch.dtype, method: str, transpose: bool
) -> None:
    x = torch.randn(6, 14, generator=torch.Generator().manual_seed(0)).to(dtype)
    x = x.mT if transpose else x
    before = x.clone()
    sk.newton_schulz(x, coefficients="polar_express", method=method)
    sk.newton_schulz(x, compute_dtype=torch.float16)
    assert torch.equal(x, before)


# Emerging-Optimizers


def test_emerging_aol_rows_flip_the_sign_of_rank_one() -> None:
    x = torch.outer(torch.arange(1.0, 7.0), torch.arange(1.0, 10.0)).double()
    for name in sk.coefficients.names():
        assert float((sk.newton_schulz(x, coefficients=name) * x).sum()) > 0, name


def test_emerging_cycles_quintic_rows_beyond_their_end() -> None:
    """A sixth step repeats the last row: the first ones are steep, and would undo the fifth."""
    x = torch.diag(torch.linspace(0.1, 1.0, 8, dtype=FP64))
    rows = sk.coefficients.resolve("quintic", 7).rows
    assert len(rows) == 7 and rows[4] == rows[5] == rows[6]
    values = torch.linalg.svdvals(sk.newton_schulz(x, coefficients="quintic", steps=7))
    assert values.min() > 0.9 and values.max() < 1.1


def test_emerging_kl_starts_with_factors_a_hundred_million_too_large() -> None:
    param = parameter(6, 9, dtype=FP64)
    optimizer = sk.optim.Shampoo([param], kl=True, graft="none", weight_decay=0.0)
    with_grads([param])
    optimizer.step()
    state = optimizer.state[param]
    for side in ("left", "right"):
        mean = float(state[side]["0"].diagonal().mean())
        assert 0.05 < mean < 20.0


def test_emerging_double_norm_divides_zero_by_zero() -> None:
    for dtype in (torch.float32, FP64):
        zero = torch.zeros(3, 4, 6, dtype=dtype)
        zero[1] = torch.eye(4, 6)
        out = sk.newton_schulz(zero, coefficients="convergent", steps=30)
        assert torch.equal(out[0], torch.zeros(4, 6, dtype=dtype))
        torch.testing.assert_close(out[1], torch.eye(4, 6, dtype=dtype), atol=1e-4, rtol=0)


def test_emerging_does_not_carry_the_second_moment_to_sorted_columns() -> None:
    """Column j follows column j, so nothing has to be carried."""
    q = torch.eye(3, dtype=FP64)
    rotation, _ = torch.linalg.qr(
        torch.eye(3, dtype=FP64) + 0.01 * torch.arange(9.0).double().reshape(3, 3)
    )
    factor = rotation @ torch.diag(torch.tensor([1.0, 3.0, 2.0], dtype=FP64)) @ rotation.mT
    values, new = sk.refresh_eigenbasis(q, factor)
    assert bool(((new.mT @ q).abs().argmax(1) == torch.arange(3)).all())
    assert bool((values.argsort() == torch.tensor([0, 2, 1])).all())


# DASH


@pytest.mark.parametrize("p", [1, 2, 3, 4, 5, 8])
def test_dash_loses_the_scale_of_a_root_and_takes_only_two_and_four(p: int) -> None:
    values = torch.logspace(0, 2, 6, dtype=FP64) * 1e3
    root = sk.inverse_root(torch.diag(values), p, relative_ridge=1e-12)
    torch.testing.assert_close(root.diagonal(), values ** (-1.0 / p), rtol=1e-6, atol=0.0)


def test_dash_divides_a_zero_update_by_its_norm() -> None:
    param = parameter(5, 5)
    before = param.detach().clone()
    optimizer = sk.optim.Shampoo([param], weight_decay=0.0)
    for _ in range(2):
        param.grad = torch.zeros_like(param)
        optimizer.step()
    assert torch.equal(param.detach(), before)


def test_dash_overwrites_the_gradient() -> None:
    for kl in (False, True):
        param = parameter(5, 8)
        with_grads([param])
        assert param.grad is not None
        before = param.grad.clone()
        sk.optim.Shampoo([param], kl=kl).step()
        assert torch.equal(param.grad, before)


def test_dash_stops_a_batch_by_one_scalar() -> None:
    """A hard batch-mate changes no bit of an easy matrix's root."""
    easy = torch.diag(torch.tensor([1.0, 1.1, 1.2]))
    hard = torch.diag(torch.tensor([1.0, 1e-3, 1e-6]))
    alone = sk.inverse_root(easy, 4, relative_ridge=1e-6)
    both = sk.inverse_root(torch.stack([hard, easy]), 4, relative_ridge=1e-6)
    assert torch.equal(both[1], alone)


# Distributed Shampoo


def test_distributed_shampoo_kl_leaves_out_the_sizes() -> None:
    """With the sizes, L = E[G R^-1 G^T] / n and R = E[G^T L^-1 G] / m hold together."""
    m, n = 4, 12
    param = parameter(m, n, dtype=FP64)
    optimizer = sk.optim.Shampoo(
        [param], kl=True, betas=(0.0, 0.98), precondition_frequency=1, relative_ridge=1e-12
    )
    traces = []
    for seed in range(300):
        update(optimizer, param, seed)
        state = optimizer.state[param]
        traces.append(float(state["left"]["0"].trace() * state["right"]["0"].trace()))
    # Without them the product of the traces would grow or shrink for ever.
    assert 0.5 < traces[-1] / traces[150] < 2.0


def test_distributed_shampoo_has_no_relative_ridge() -> None:
    moved = []
    for exponent in (0, -40):
        param = parameter(6, 9)
        optimizer = sk.optim.Shampoo([param], weight_decay=0.0)
        for seed in range(3):
            with_grads([param], seed, 2.0**exponent)
            optimizer.step()
        moved.append(param.detach().clone())
    assert torch.equal(*moved)


def test_distributed_shampoo_takes_blocks_one_by_one() -> None:
    param = parameter(24, 24)
    optimizer = sk.optim.Shampoo([param], block_size=6)
    with_grads([param])
    sk.call_counts(reset=True)
    optimizer.step()
    assert len(optimizer.state[param]["left"]) == 16
    assert sum(sk.call_counts().values()) == 1


# HeavyBall


def test_heavyball_uses_one_set_of_rows_for_every_matrix_that_is_not_square() -> None:
    x = torch.randn(5, 9, generator=torch.Generator().manual_seed(1), dtype=FP64)
    results = [sk.newton_schulz(x, coefficients=name) for name in ("muon", "quintic", "cubic")]
    assert not torch.allclose(results[0], results[1], atol=1e-3)
    assert not torch.allclose(results[1], results[2], atol=1e-3)


def test_heavyball_divides_a_batch_by_norms_of_the_wrong_shape() -> None:
    x = torch.randn(3, 3, 5, generator=torch.Generator().manual_seed(2), dtype=FP64)
    scales = torch.tensor([1.0, 1e3, 1e-3], dtype=FP64)[:, None, None]
    batch = sk.newton_schulz(scales * x)
    for i in range(3):
        torch.testing.assert_close(batch[i], sk.newton_schulz(x[i]), rtol=1e-9, atol=1e-12)


# SOAP


def test_soap_runs_closures_under_no_grad() -> None:
    param = parameter(4, 4)

    def closure() -> Tensor:
        loss = param.square().sum()
        loss.backward()
        return loss.detach()

    optimizer = sk.optim.SOAP([param])
    losses = [float(optimizer.step(closure)) for _ in range(3)]
    assert all(math.isfinite(loss) for loss in losses) and losses[2] < losses[0]


def test_soap_lets_nan_into_its_factors() -> None:
    param = parameter(4, 4)
    optimizer = sk.optim.SOAP([param])
    update(optimizer, param)
    param.grad = torch.full_like(param, float("nan"))
    with pytest.warns(UserWarning, match="SOAP skipped 1 of its tensors"):
        optimizer.step()
    assert all(bool(x.isfinite().all()) for x in optimizer.state[param].values())
    assert optimizer.skipped == 1
