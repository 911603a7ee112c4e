"""What `diagnostics` says, and that it costs and changes nothing where nobody asked."""

from __future__ import annotations

import copy
import csv
import math
import pickle
from functools import partial

import pytest
import spectral_kernels as sk
import torch
from support.optimizers import Factory, batches, model, parameter, stepped, train, with_grads
from support.states import assert_same

FP64 = torch.float64


pytestmark = pytest.mark.usefixtures("one_thread")


def test_watched_steps_have_the_same_bits(make: Factory) -> None:
    plain, watched = model(), model()
    expected, optimizer = make(plain.parameters()), make(watched.parameters())
    optimizer.watch(2)
    train(plain, expected, batches(6))
    train(watched, optimizer, batches(6))
    assert_same(list(watched.parameters()), list(plain.parameters()))
    assert_same(optimizer.state_dict(), expected.state_dict())
    assert optimizer.skipped == expected.skipped


def test_unwatched_steps_call_the_operator_once(make: Factory) -> None:
    net = model()
    optimizer = make(net.parameters())
    optimizer.watch(3)
    counts = []
    for _ in range(6):
        sk.call_counts(reset=True)
        train(net, optimizer, batches(1))
        counts.append(sum(sk.call_counts().values()))
    once = counts[0]
    assert counts == [once, once, 2 * once] * 2
    optimizer.watch(0)
    sk.call_counts(reset=True)
    train(net, optimizer, batches(1))
    assert sum(sk.call_counts().values()) == once
    assert optimizer._watch is None


def test_updates_are_what_the_step_subtracts(make: Factory) -> None:
    lr = 0.25
    params = [parameter(12, 7, dtype=FP64), parameter(9, 9, seed=1, dtype=FP64)]
    optimizer = make(params)
    for group in optimizer.param_groups:
        group.update(lr=lr, weight_decay=0.0)
    stepped(optimizer, params, 3)
    optimizer.watch()
    before = [param.detach().clone() for param in params]
    with_grads(params, 9)
    optimizer.step()
    shadows = optimizer.updates()
    for i, (param, old) in enumerate(zip(params, before, strict=True)):
        blocks = shadows[f"param_groups[0]['params'][{i}]"]
        moved = ((old - param.detach()) / lr).square().sum()
        total = sum(block.square().sum() for block in blocks)
        torch.testing.assert_close(total, moved, rtol=1e-9, atol=0.0)
        if len(blocks) == 1:
            torch.testing.assert_close(blocks[0], (old - param) / lr, rtol=1e-7, atol=1e-9)
        figures = optimizer.diagnostics().parameters[f"param_groups[0]['params'][{i}]"]
        assert figures.update_rms == pytest.approx(math.sqrt(float(moved) / param.numel()))


def test_orthogonality_error() -> None:
    param = parameter(8, 20, dtype=FP64)
    name = "param_groups[0]['params'][0]"

    def error(**options: object) -> float:
        optimizer = sk.optim.Muon([param], momentum=0.0, **options)
        optimizer.watch()
        optimizer.step()
        found = optimizer.diagnostics().parameters[name].orthogonality_error
        assert found is not None
        return found

    with_grads([param])
    assert error(coefficients="polar_express_8") < 1e-6
    # The band of Muon's quintic, 0.68 to 1.14.
    assert 0.05 < error() < 0.5
    # A gradient of rank one has one singular value of s.
    param.grad = torch.outer(torch.arange(1.0, 9.0), torch.arange(1.0, 21.0)).double()
    assert error(adjust_lr_fn="none") == pytest.approx(math.sqrt(7), rel=1e-6)


def test_zero_update_has_no_orthogonality() -> None:
    param = parameter(4, 5)
    param.grad = torch.zeros_like(param)
    optimizer = sk.optim.Muon([param])
    optimizer.watch()
    optimizer.step()
    (figures,) = optimizer.diagnostics().parameters.values()
    assert figures.update_rms == 0.0 and figures.orthogonality_error is None


@pytest.mark.parametrize("exponent", [0.25, 0.5])
def test_factors_and_roots(exponent: float) -> None:
    param = parameter(6, 9, dtype=FP64)
    optimizer = sk.optim.Shampoo([param], exponent=exponent, precondition_frequency=4)
    optimizer.watch()
    stepped(optimizer, [param], 4)
    (figures,) = optimizer.diagnostics().parameters.values()
    factor = optimizer.state[param]["left"]["0"] / (1 - 0.95**4)
    ridged = factor + 1e-6 * factor.abs().sum(-1).max() * torch.eye(6, dtype=FP64)
    assert figures.left_condition == pytest.approx(float(torch.linalg.cond(ridged)), rel=1e-9)
    # Taken in this very step, and then kept while the factor goes on.
    assert figures.left_residual < 1e-8 and figures.right_residual < 1e-8
    stepped(optimizer, [param], 2)
    (figures,) = optimizer.diagnostics().parameters.values()
    assert figures.left_residual > 1e-3


def test_bases() -> None:
    param = parameter(6, 6, dtype=FP64)
    optimizer = sk.optim.SOAP([param], precondition_frequency=100)
    optimizer.watch()
    stepped(optimizer, [param], 1)
    (figures,) = optimizer.diagnostics().parameters.values()
    assert figures.left_residual < 1e-12
    factor = optimizer.state[param]["left"]
    assert figures.left_condition == pytest.approx(float(torch.linalg.cond(factor)), rel=1e-6)
    stepped(optimizer, [param], 3)
    (figures,) = optimizer.diagnostics().parameters.values()
    assert figures.left_residual > 1e-3


def test_missing_sides_and_singular_factors() -> None:
    param = parameter(4, 12, dtype=FP64)
    one_sided = sk.optim.Shampoo([param], sides="left", relative_ridge=0.0)
    both = sk.optim.Shampoo([param], relative_ridge=0.0)
    for optimizer in (one_sided, both):
        optimizer.watch()
        stepped(optimizer, [param], 1)
    (figures,) = one_sided.diagnostics().parameters.values()
    assert figures.right_condition is None and figures.right_residual is None
    assert figures.left_condition is not None and figures.left_condition < 1e6
    (figures,) = both.diagnostics().parameters.values()
    # One gradient leaves the longer side's factor with rank 4 of 12.
    assert figures.right_condition is not None and figures.right_condition > 1e12


def test_skipped_matrices_and_failed_roots(monkeypatch: pytest.MonkeyPatch) -> None:
    param = parameter(3, 5, 5)
    optimizer = sk.optim.Muon([{"params": [param], "batched": True}])
    optimizer.watch()
    stepped(optimizer, [param], 2)
    with_grads([param])
    param.grad[1, 0, 0] = math.nan
    optimizer.step()
    report = optimizer.diagnostics()
    (figures,) = report.parameters.values()
    assert report.skipped == 1
    assert figures.steps == 2
    assert figures.update_rms is not None and math.isfinite(figures.update_rms)

    shampoo = sk.optim.Shampoo([parameter(5, 5)])
    (param,) = shampoo.param_groups[0]["params"]
    shampoo.watch()
    stepped(shampoo, [param], 1)
    shampoo.state[param]["root_failures"]["0"][1] = 2
    (figures,) = shampoo.diagnostics().parameters.values()
    assert figures.root_failures == 2


def test_names_backends_and_rows(tmp_path) -> None:
    net = model()
    optimizer = sk.optim.Shampoo(net.named_parameters())
    optimizer.watch()
    with sk.use_backend("reference"):
        train(net, optimizer, batches(2))
    report = optimizer.diagnostics()
    assert report.step == 2
    assert report.parameters.keys() == {name for name, _ in net.named_parameters()}
    assert report.parameters["conv.weight"].backend == "reference"
    assert report.parameters["conv.weight"].shape == (6, 2, 3, 3)
    assert report.parameters["conv.bias"].algorithm == "adamw"
    assert report.parameters["conv.bias"].backend == "torch"
    rows = list(report.rows())
    with (tmp_path / "out.csv").open("w") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    with (tmp_path / "out.csv").open() as file:
        back = {row["name"]: row for row in csv.DictReader(file)}
    figures = report.parameters["hidden.weight"]
    assert float(back["hidden.weight"]["left_condition"]) == figures.left_condition
    assert back["conv.weight"]["shape"] == "6x2x3x3"
    scalars = dict(report.scalars())
    assert scalars["update_rms/hidden.weight"] == figures.update_rms
    assert all(isinstance(value, float) for value in scalars.values())


@pytest.mark.parametrize("every", [-1, 1.5, True])
def test_bad_intervals(every: object) -> None:
    optimizer = sk.optim.Muon([parameter(3, 3)])
    with pytest.raises((TypeError, ValueError), match="every"):
        optimizer.watch(every)  # type: ignore[arg-type]


def test_nothing_measured_is_said(make: Factory) -> None:
    params = [parameter(4, 4)]
    optimizer = make(params)
    with pytest.raises(RuntimeError, match="watch"):
        optimizer.diagnostics()
    optimizer.watch(5)
    stepped(optimizer, params, 4)
    with pytest.raises(RuntimeError, match="watch"):
        optimizer.updates()
    stepped(optimizer, params, 1)
    assert optimizer.diagnostics().step == 5


def test_copies_are_not_watched() -> None:
    params = [parameter(4, 4)]
    optimizer = sk.optim.Muon(params)
    optimizer.watch()
    stepped(optimizer, params, 1)
    assert "watch" not in str(optimizer.state_dict().keys())
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        with pytest.raises(RuntimeError, match="watch"):
            other.diagnostics()


def test_time_average_of_shampoo_is_semi_orthogonal() -> None:
    """With exponent 1/2 and factors that average what they precondition, E[U U^T] = c I."""
    make = partial(sk.optim.Shampoo, exponent=0.5, graft="none", betas=(0.0, 0.99))
    param = parameter(6, 18, dtype=FP64)
    optimizer = make([param], precondition_frequency=1)
    generator = torch.Generator().manual_seed(0)
    mix = torch.diag(torch.logspace(0, -1, 6, dtype=FP64))
    average = torch.zeros(6, 6, dtype=FP64)
    optimizer.watch()
    for step in range(400):
        param.grad = mix @ torch.randn(6, 18, generator=generator, dtype=FP64)
        optimizer.step()
        if step >= 200:
            (update,) = optimizer.updates()["param_groups[0]['params'][0]"]
            average += update @ update.mT
    scaled = average * 6 / average.trace()
    assert torch.linalg.norm(scaled - torch.eye(6, dtype=FP64)) / math.sqrt(6) < 0.15
    single = update @ update.mT
    single *= 6 / single.trace()
    assert torch.linalg.norm(single - torch.eye(6, dtype=FP64)) / math.sqrt(6) > 0.3
