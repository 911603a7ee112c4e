"""Every target of swap_in takes the same path swapped as on its own, within its dtype's error."""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from spectral_kernels import call_counts, swap_in
from support.moves import distance, gradient, moved, parameters, steps
from support.optimizers import torch_scales
from support.packages import code, modules_of, public_code
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["code"]

pytestmark = pytest.mark.usefixtures("native", "one_thread")

STEPS = 25
SHAPES = ((24, 24), (17, 40), (40, 17), (1, 9))
SQUARE = ((24, 24), (17, 17))
ROW = (3.4445, -4.7750, 2.0315)

Make = Callable[[Sequence[Tensor]], Optimizer]


def exact_polynomial(x: Tensor, norm: Tensor, count: int) -> Tensor:
    a, b, c = ROW
    x = x / norm
    for _ in range(count):
        r = x @ x.mT
        x = a * x + (b * r + c * r @ r) @ x
    return x


# torch.optim.Muon


def exact_muon(grad: Tensor, ns_coefficients: Any, ns_steps: int, eps: float) -> Tensor:
    x = grad.double()
    return exact_polynomial(x, torch.linalg.norm(x).clamp(min=eps), ns_steps)


def muon(**options: Any) -> Make:
    return lambda params: torch.optim.Muon(params, lr=0.05, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [{}, {"nesterov": False}, {"adjust_lr_fn": "match_rms_adamw", "ns_steps": 3}],
    ids=["defaults", "heavy-ball", "adamw-scale"],
)
def test_muon(options: dict[str, Any], dtype: torch.dtype, monkeypatch: Any) -> None:
    make = muon(**options)
    with swap_in("torch.optim.Muon") as swap:
        mine = moved(make, SHAPES, STEPS, dtype)
        step, orthogonalize = swap.calls.values()
    # Only float32 takes the fused step; the others still orthogonalize on the kernels.
    assert step.taken == (STEPS if dtype == torch.float32 else 0)
    assert orthogonalize.taken == (0 if dtype == torch.float32 else STEPS * len(SHAPES))
    theirs = moved(make, SHAPES, STEPS, dtype)
    if dtype == torch.bfloat16 and options.get("nesterov") is False:
        # torch overwrites its momentum here; what it computes otherwise is the yardstick.
        theirs = moved(muon(), SHAPES, STEPS, dtype)
        yardstick = moved_exactly(muon(), monkeypatch)
    else:
        yardstick = moved_exactly(make, monkeypatch)
    exact = moved_exactly(make, monkeypatch)
    for x, y, of_y, true in zip(mine, theirs, yardstick, exact, strict=True):
        # And a rounding of bfloat16, in which torch iterates: on one row it may be lucky.
        assert distance(x, true) <= 2 * distance(y, of_y) + 2.0**-9


def moved_exactly(make: Make, monkeypatch: Any) -> list[Tensor]:
    """The same in float64 throughout."""
    with monkeypatch.context() as patch:
        patch.setattr("torch.optim._muon._zeropower_via_newtonschulz", exact_muon)
        return moved(make, SHAPES, STEPS, torch.float64)


def test_muon_with_a_scale_of_a_later_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.14 scales by sqrt(rows / columns) where it is asked to."""

    def make(params: Any) -> torch.optim.Optimizer:
        optimizer = torch.optim.Muon(params, lr=0.05)
        optimizer.param_groups[0]["adjust_lr_fn"] = "spectral_unclamped"
        return optimizer

    torch_scales(monkeypatch, "spectral_unclamped")
    theirs = moved(make, SHAPES, STEPS)
    with swap_in("torch.optim.Muon") as swap:
        mine = moved(make, SHAPES, STEPS)
        assert next(iter(swap.calls.values())).taken == STEPS
    exact = moved_exactly(make, monkeypatch)
    for x, y, true in zip(mine, theirs, exact, strict=True):
        assert distance(x, true) <= 2 * distance(y, true) + 2.0**-9


def test_muon_state_goes_over_and_back() -> None:
    whole, parts = parameters(SHAPES), parameters(SHAPES)
    own = torch.optim.Muon(whole, lr=0.05)
    steps(own, whole, 12)
    mixed = torch.optim.Muon(parts, lr=0.05)
    steps(mixed, parts, 4)
    with swap_in("torch.optim.Muon"):
        steps(mixed, parts, 4, start=4)
        loaded = torch.optim.Muon(parts, lr=0.05)
        loaded.load_state_dict(copy.deepcopy(mixed.state_dict()))
    steps(loaded, parts, 4, start=8)
    for p, q in zip(whole, parts, strict=True):
        mine, theirs = loaded.state[q], own.state[p]
        assert mine.keys() == theirs.keys() == {"momentum_buffer"}
        assert torch.allclose(mine["momentum_buffer"], theirs["momentum_buffer"], atol=1e-6)
        assert torch.allclose(q, p, atol=0.02)


def test_muon_keeps_the_momentum_that_torch_overwrites() -> None:
    (p,) = parameters(((6, 9),), torch.bfloat16)
    expected = torch.zeros_like(p)
    with swap_in("torch.optim.Muon"):
        optimizer = torch.optim.Muon([p], nesterov=False)
        for t in range(3):
            p.grad = gradient(p.shape, t).bfloat16()
            expected.lerp_(p.grad, 1 - 0.95)
            optimizer.step()
    assert torch.equal(optimizer.state[p]["momentum_buffer"], expected)


@pytest.mark.parametrize("size", [0.0, 1e-12, 1e-8, 1e15])
def test_muon_passes_eps_on(size: float) -> None:
    def scaled(shape: Sequence[int], seed: int) -> Tensor:
        return size * gradient(shape, seed)

    make = muon(eps=1e-7, weight_decay=0.0)
    theirs = moved(make, ((5, 8),), 1, gradients=scaled)[0]
    with swap_in("torch.optim.Muon"):
        mine = moved(make, ((5, 8),), 1, gradients=scaled)[0]
    assert torch.allclose(mine, theirs, rtol=0, atol=0.03 * float(theirs.abs().max()))


def test_muon_lets_nan_through_as_torch_does() -> None:
    results = []
    for swapped in (False, True):
        params = parameters(((6, 9), (5, 5)))
        optimizer = torch.optim.Muon(params)
        for p in params:
            p.grad = gradient(p.shape, 1).float()
        params[0].grad[2, 3] = float("nan")
        with swap_in("torch.optim.Muon") if swapped else contextlib.nullcontext():
            optimizer.step()
        results.append(
            [p.isnan() for p in params]
            + [optimizer.state[p]["momentum_buffer"].isnan() for p in params]
        )
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*results, strict=True))
    assert results[1][0].all() and not results[1][1].any() and int(results[1][2].sum()) == 1


@pytest.mark.parametrize(
    "options",
    [{"momentum": 1.5}, {"ns_coefficients": (1.5, -0.5, 0.0), "ns_steps": 2}, {"eps": -1.0}],
)
def test_muon_takes_torchs_arguments(options: dict[str, Any]) -> None:
    theirs = moved(muon(**options), SHAPES, 3)
    with swap_in("torch.optim.Muon"):
        mine = moved(muon(**options), SHAPES, 3)
    assert all(distance(x, y) <= 0.05 for x, y in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("options", [{"ns_steps": 100}, {"ns_coefficients": (1.0, 2.0)}])
def test_muon_raises_what_torch_raises(options: dict[str, Any]) -> None:
    for swapped in (False, True):
        params = parameters(((4, 4),))
        optimizer = torch.optim.Muon(params, **options)
        with pytest.raises(ValueError, match=r"less than 100|exactly 3"):
            if swapped:
                with swap_in("torch.optim.Muon"):
                    steps(optimizer, params, 1)
            else:
                steps(optimizer, params, 1)


def test_muon_with_tensor_lr_scheduler_and_missing_gradients() -> None:
    def run() -> list[Tensor]:
        params = parameters(SHAPES)
        frozen = params[1].detach().clone()
        optimizer = torch.optim.Muon(params, lr=torch.tensor(0.05))
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        for t in range(5):
            for i, p in enumerate(params):
                p.grad = None if i == 1 else gradient(p.shape, 10 * t + i).float()
            optimizer.step()
            scheduler.step()
        assert torch.equal(params[1], frozen)
        return [p.detach() for p in params]

    theirs = run()
    with swap_in("torch.optim.Muon"):
        mine = run()
    assert all(torch.allclose(x, y, atol=5e-3) for x, y in zip(mine, theirs, strict=True))


# SOAP and DeVA


def soap() -> Make:
    module = importlib.import_module("soap")
    return lambda params: module.SOAP(params, lr=0.01, precondition_frequency=4)


def test_soap(code: str) -> None:
    make = soap()
    theirs = moved(make, SQUARE, STEPS)
    with swap_in("SOAP") as swap:
        mine = moved(make, SQUARE, STEPS)
        calls = {name.rpartition(".")[2]: count for name, count in swap.calls.items()}
    assert all(distance(x, y) <= 1e-4 for x, y in zip(mine, theirs, strict=True))
    updates = calls["update_preconditioner"]
    assert updates.taken == (STEPS - 1) * len(SQUARE)
    assert updates.left == {"first gradient": len(SQUARE)}
    assert calls["get_orthogonal_matrix_QR"].taken == (STEPS - 1) // 4 * len(SQUARE)


def test_soap_runs_on_the_kernels(code: str) -> None:
    make = soap()
    with swap_in("SOAP"):
        call_counts(reset=True)
        moved(make, SQUARE, 9)
        ran = call_counts()
    assert {
        "kron_factors_update_/cpu",
        "kron_precondition/cpu",
        "refresh_eigenbasis/cpu",
    } == ran.keys()


def test_soap_on_shapes_whose_factors_have_null_spaces(code: str) -> None:
    # The basis of a null space is arbitrary: the class differs from itself as much if the last bit
    # of its gradients changes.
    def nudged(shape: Sequence[int], seed: int) -> Tensor:
        noise = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, shape, generator=noise).double() * 2 - 1
        return gradient(shape, seed) * (1 + 1e-7 * signs)

    make = soap()
    theirs = moved(make, SHAPES, STEPS)
    nearby = moved(make, SHAPES, STEPS, gradients=nudged)
    with swap_in("SOAP"):
        mine = moved(make, SHAPES, STEPS)
    for x, y, z in zip(mine, theirs, nearby, strict=True):
        assert distance(x, y) <= 2 * distance(z, y) + 1e-4


def test_soap_state_goes_over_and_back(code: str) -> None:
    make = soap()
    whole, parts = parameters(SQUARE), parameters(SQUARE)
    own = make(whole)
    steps(own, whole, 18)
    mixed = make(parts)
    steps(mixed, parts, 6)
    with swap_in("SOAP"):
        steps(mixed, parts, 6, start=6)
        loaded = make(parts)
        loaded.load_state_dict(copy.deepcopy(mixed.state_dict()))
    steps(loaded, parts, 6, start=12)
    for p, q in zip(whole, parts, strict=True):
        theirs, mine = own.state[p], loaded.state[q]
        assert mine.keys() == theirs.keys()
        assert mine["step"] == theirs["step"]
        for name in ("exp_avg", "exp_avg_sq"):
            # Columns of a basis have no sign.
            scale = theirs[name].abs().max()
            assert (mine[name].abs() - theirs[name].abs()).abs().max() <= 1e-3 * scale
        for x, y in zip(mine["GG"], theirs["GG"], strict=True):
            assert torch.allclose(x, y, atol=1e-5)
        assert torch.allclose(q, p, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"merge_dims": True}, {"max_precond_dim": 20}])
def test_soap_on_other_shapes(options: dict[str, Any], code: str) -> None:
    module = importlib.import_module("soap")
    shapes = ((16, 16), (8, 4, 2), (20,), (30, 12))

    def make(params: Sequence[Tensor]) -> Optimizer:
        optimizer: Optimizer = module.SOAP(params, lr=0.01, precondition_frequency=3, **options)
        return optimizer

    theirs = moved(make, shapes, 8)
    with swap_in("SOAP"):
        mine = moved(make, shapes, 8)
    assert all(distance(x, y) <= 0.05 for x, y in zip(mine, theirs, strict=True))
    assert distance(mine[0], theirs[0]) <= 1e-4
    assert distance(mine[2], theirs[2]) == 0.0


def exact_msign(x: Tensor, steps: int = 5, eps: float = 1e-20) -> Tensor:
    x = x.double()
    gram = x @ x.mT
    norm = (gram @ gram).square().sum((-2, -1), keepdim=True) ** 0.125
    return exact_polynomial(x, norm, steps).float()


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("double", "DeVASchattenNorm"),
        ("public", "DeVASchattenNorm"),
        ("public", "DeVASchattenNormSignStablization"),
        ("public", "DeVASchattenNormIns"),
    ],
    indirect=["code"],
)
def test_deva(name: str, code: str, monkeypatch: Any) -> None:
    module = importlib.import_module("optimizers.deva")

    def make(params: Sequence[Tensor]) -> Optimizer:
        optimizer: Optimizer = getattr(module, name)(params, lr=0.01, precondition_frequency=4)
        return optimizer

    theirs = moved(make, SQUARE, STEPS)
    with swap_in("DeVA") as swap:
        mine = moved(make, SQUARE, STEPS)
        assert swap.calls["optimizers.muon.msign"].taken == (STEPS - 1) * len(SQUARE)
    with monkeypatch.context() as patch:
        patch.setattr(module, "msign", exact_msign)
        true = moved(make, SQUARE, STEPS)
    for x, y, z in zip(mine, theirs, true, strict=True):
        assert distance(x, z) <= 2 * distance(y, z) + 1e-4


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (3, 6, 6), (2, 4, 3, 3)])
def test_msign(shape: tuple[int, ...], code: str) -> None:
    module = importlib.import_module("optimizers.muon")
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator)
    before = x.clone()
    theirs = module.msign(x)
    with swap_in("DeVA") as swap:
        mine = module.msign(x)
        assert swap.calls["optimizers.muon.msign"].taken == 1
    assert mine.dtype == theirs.dtype == torch.bfloat16
    assert torch.equal(x, before)
    true = exact_msign(x).double()
    assert distance(mine.double(), true) <= 2 * distance(theirs.double(), true)


# Distributed Shampoo


def shampoo(config: str, code: str) -> Make:
    package = importlib.import_module("distributed_shampoo")
    types = importlib.import_module("distributed_shampoo.preconditioner.matrix_functions_types")
    root = {
        "eigen": lambda: types.EigenConfig(),
        "newton": lambda: types.CoupledNewtonConfig(),
        "higher-order": lambda: types.CoupledHigherOrderConfig(rel_epsilon=1e-5, abs_epsilon=0.0),
        "spectral": lambda: types.NewtonSchulzOrthogonalizationConfig(),
    }[config]()
    if code == "double":
        return lambda params: package.DistributedShampoo(params, config=root)
    if config == "spectral":
        whole = replace(
            package.DefaultSpectralDescentPreconditionerConfig, orthogonalization_config=root
        )
    else:
        whole = replace(package.DefaultShampooConfig, amortized_computation_config=root)
    # The limit also keeps the package from merging the two dimensions of a small matrix.
    return lambda params: package.DistributedShampoo(
        params,
        lr=0.01,
        precondition_frequency=2,
        max_preconditioner_dim=24,
        preconditioner_config=whole,
    )


@pytest.mark.parametrize("config", ["eigen", "newton", "higher-order", "spectral"])
def test_distributed_shampoo(config: str, code: str) -> None:
    make = shampoo(config, code)
    theirs = moved(make, SQUARE, STEPS)
    with swap_in("distributed_shampoo") as swap:
        mine = moved(make, SQUARE, STEPS)
        calls = {name.rpartition(".")[2]: count for name, count in swap.calls.items()}
    assert all(distance(x, y) <= 1e-4 for x, y in zip(mine, theirs, strict=True))
    if config == "spectral":
        assert calls["matrix_orthogonalization"].taken == STEPS * len(SQUARE)
    else:
        # Eigendecompositions are computed ahead, several at a time, if torch has the threads.
        assert bool(calls["matrix_inverse_root"].taken) == (config != "eigen")
        assert calls["_precondition_grad"].taken >= STEPS * len(SQUARE)


@pytest.mark.parametrize("config", ["newton", "higher-order"])
def test_distributed_shampoos_roots_run_on_the_kernels(
    config: str, code: str, native: None
) -> None:
    make = shampoo(config, code)
    with swap_in("distributed_shampoo"):
        call_counts(reset=True)
        moved(make, ((12, 12), (12, 12)), 2)
        ran = call_counts()
    # Four factors of one size are one batch.
    assert 1 <= ran["inverse_root/cpu"] <= 2


def test_distributed_shampoo_with_a_ridge(code: str) -> None:
    make = shampoo("eigen", code)
    theirs = moved(make, SQUARE, STEPS)
    with swap_in("distributed_shampoo", allow_ridge=True):
        call_counts(reset=True)
        mine = moved(make, SQUARE, STEPS)
        assert any(name.startswith("inverse_root/") for name in call_counts())
    assert all(distance(x, y) <= 1e-4 for x, y in zip(mine, theirs, strict=True))


@pytest.mark.parametrize(
    "config",
    [
        "RootInvKLShampooPreconditionerConfig",
        "EigendecomposedShampooPreconditionerConfig",
        "EigendecomposedKLShampooPreconditionerConfig",
        "EigenvalueCorrectedShampooPreconditionerConfig",
        "DefaultSOAPConfig",
    ],
)
def test_other_preconditioners_of_distributed_shampoo(config: str) -> None:
    with modules_of(public_code()):
        package = importlib.import_module("distributed_shampoo")
        found = getattr(package, config)
        chosen = found() if isinstance(found, type) else found

        def make(params: Sequence[Tensor]) -> Optimizer:
            optimizer: Optimizer = package.DistributedShampoo(
                params,
                lr=0.01,
                precondition_frequency=3,
                max_preconditioner_dim=24,
                preconditioner_config=chosen,
            )
            return optimizer

        theirs = moved(make, SQUARE, STEPS)
        with swap_in("distributed_shampoo"):
            mine = moved(make, SQUARE, STEPS)
    assert all(distance(x, y) <= 1e-4 for x, y in zip(mine, theirs, strict=True))


def test_gradients_are_not_modified(code: str) -> None:
    makers = [muon(), soap(), shampoo("newton", code)]
    with swap_in():
        for make in makers:
            params = parameters(SQUARE)
            optimizer = make(params)
            for t in range(4):
                grads = [gradient(p.shape, t).float() for p in params]
                for p, grad in zip(params, grads, strict=True):
                    p.grad = grad.clone()
                optimizer.step()
                assert all(torch.equal(p.grad, g) for p, g in zip(params, grads, strict=True))
