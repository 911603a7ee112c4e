"""Targets of swap_in that differ from torch's Muon by one function: the orthogonalization."""

from __future__ import annotations

import importlib
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from spectral_kernels import swap_in
from spectral_kernels.swap import ADAPTERS
from support.moves import distance, gradient, moved, parameters, steps
from support.oracles import exact_newton_schulz
from support.packages import DOUBLES, modules_of, public_code
from torch import Tensor
from torch.optim import Optimizer

pytestmark = pytest.mark.usefixtures("native", "one_thread")

SHAPES = ((24, 24), (17, 40), (40, 17))
STEPS = 10
SIMPLE = [(3.4445, -4.7750, 2.0315)] * 5
QUINTIC = [
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
]
EXPRESS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]
EXPRESS_1_05 = [
    (a / 1.05, b / 1.05**3, c / 1.05**5)
    for a, b, c in (
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    )
]


@dataclass(frozen=True)
class Target:
    """One target of swap_in.

    Attributes:
        name: as swap_in knows it.
        clone: the folder of its public code.
        module: what holds the function.
        call: with that module, orthogonalizes a matrix by the function.
        rows: what it iterates with.
        owner: the module of the optimizer.
        make: with that module, an optimizer of matrices.
        divisor: of the norm.
        batches: it takes batches of matrices.
        point: the replaced function's last name.
        doubles: the folder of its stand-in.
    """

    name: str
    clone: str
    module: str
    call: Callable[[ModuleType, Tensor], Tensor]
    rows: Sequence[tuple[float, float, float]]
    owner: str
    make: Callable[[ModuleType, Sequence[Tensor]], Optimizer]
    point: str
    divisor: float = 1.0
    batches: bool = True
    doubles: Path = DOUBLES


def jordan(module: ModuleType, params: Sequence[Tensor]) -> Optimizer:
    made: Optimizer = module.SingleDeviceMuon(params, lr=0.05)
    return made


def gram(module: ModuleType, x: Tensor) -> Tensor:
    made = module.GramNewtonSchulz(
        ns_use_kernels=False, ns_coefficients=EXPRESS_1_05, compile_kwargs=None
    )
    # It writes what it is given.
    result: Tensor = made(x.clone())
    return result


class ByGram(Optimizer):
    """The package's Muon compiles its parts, so a small one calls the object it would call."""

    def __init__(self, params: Sequence[Tensor], orthogonalize: Callable[[Tensor], Tensor]) -> None:
        super().__init__(params, {"lr": 0.05})
        self.orthogonalize = orthogonalize

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            p.add_(self.orthogonalize(p.grad.clone()), alpha=-self.param_groups[0]["lr"])


def by_gram(module: ModuleType, params: Sequence[Tensor]) -> Optimizer:
    return ByGram(params, module.GramNewtonSchulz(ns_use_kernels=False, compile_kwargs=None))


def emerging(module: ModuleType, params: Sequence[Tensor]) -> Optimizer:
    made: Optimizer = module.Muon(params, lr=0.01)
    return made


def koz(module: ModuleType, params: Sequence[Tensor]) -> Optimizer:
    public = "use_muon" in str(module.Muon.__init__.__code__.co_consts)
    groups: Any = [{"params": list(params), "use_muon": True}] if public else params
    made: Optimizer = module.Muon(groups)
    return made


def koz_gram(module: ModuleType, params: Sequence[Tensor]) -> Optimizer:
    groups: Any = [{"params": list(params), "use_muon": True}]
    made: Optimizer = module.Muon(groups, ns_method="gram_newton_schulz")
    return made


EMERGING = "emerging_optimizers.orthogonalized_optimizers"
TARGETS = [
    Target(
        "KellerJordan/Muon",
        "Muon",
        "muon",
        lambda module, x: module.zeropower_via_newtonschulz5(x, steps=5),
        SIMPLE,
        "muon",
        jordan,
        "zeropower_via_newtonschulz5",
    ),
    Target(
        "gram-newton-schulz",
        "gram-newton-schulz",
        "gram_newton_schulz.gram_newton_schulz",
        gram,
        EXPRESS_1_05,
        "gram_newton_schulz.gram_newton_schulz",
        by_gram,
        "__call__",
    ),
    Target(
        "dion",
        "dion",
        "dion.newton_schulz_triton",
        lambda module, x: module.zeropower_via_newtonschulz5(x),
        QUINTIC,
        "dion.muon",
        lambda module, params: module.Muon(params, lr=0.05, use_polar_express=False),
        "zeropower_via_newtonschulz5",
    ),
    Target(
        "dion",
        "dion",
        "dion.polar_express",
        lambda module, x: module.polar_express(x),
        EXPRESS,
        "dion.muon",
        lambda module, params: module.Muon(params, lr=0.05),
        "polar_express",
        divisor=1.02,
    ),
    Target(
        "emerging-optimizers",
        "Emerging-Optimizers",
        f"{EMERGING}.muon_utils",
        lambda module, x: module.newton_schulz(x.float(), steps=5),
        QUINTIC,
        f"{EMERGING}.muon",
        emerging,
        "newton_schulz",
    ),
    Target(
        "heavyball",
        "HeavyBall",
        "heavyball.utils",
        lambda module, x: module.inplace_orthogonal_(x),
        QUINTIC,
        "heavyball",
        lambda module, params: module.Muon(params, lr=0.05),
        "inplace_orthogonal_",
        batches=False,
    ),
    Target(
        "pytorch-optimizer",
        "pytorch_optimizer",
        "pytorch_optimizer.optimizer.shampoo_utils",
        lambda module, x: module.zero_power_via_newton_schulz_5(x.clone()),
        SIMPLE,
        "pytorch_optimizer.optimizer.muon",
        koz,
        "zero_power_via_newton_schulz_5",
    ),
    Target(
        "pytorch-optimizer",
        "pytorch_optimizer_4",
        "pytorch_optimizer.optimizer.utils.matrix",
        lambda module, x: module.zero_power_via_newton_schulz_5(x, weights=EXPRESS),
        EXPRESS,
        "pytorch_optimizer.optimizer.muon",
        koz,
        "zero_power_via_newton_schulz_5",
        doubles=DOUBLES / "pytorch_optimizer_4",
    ),
    Target(
        "pytorch-optimizer",
        "pytorch_optimizer_4",
        "pytorch_optimizer.optimizer.utils.matrix",
        lambda module, x: module.zero_power_via_gram_newton_schulz(x),
        SIMPLE,
        "pytorch_optimizer.optimizer.muon",
        koz_gram,
        "zero_power_via_gram_newton_schulz",
        doubles=DOUBLES / "pytorch_optimizer_4",
    ),
]


@pytest.fixture(params=TARGETS, ids=[f"{target.clone}-{target.point}" for target in TARGETS])
def target(request: pytest.FixtureRequest) -> Target:
    chosen: Target = request.param
    return chosen


@pytest.fixture(params=["double", "public"])
def code(request: pytest.FixtureRequest, target: Target) -> Iterator[str]:
    """The target's code, eager: nothing here is worth compiling."""
    folders = [target.doubles] if request.param == "double" else public_code([target.clone])
    with modules_of(folders), torch.compiler.set_stance("force_eager"):
        if request.param == "public":
            try:
                importlib.import_module(target.module)
            except ModuleNotFoundError as error:
                # Its own module has to be where it was.
                if str(error.name).startswith(target.module.partition(".")[0]):
                    raise
                pytest.skip(f"{target.name} needs {error.name}")
            except (ImportError, SyntaxError) as error:
                # Emerging-Optimizers is written for Python 3.12.
                if sys.version_info >= (3, 12):
                    raise
                pytest.skip(f"{target.name} needs a newer Python: {error}")
        yield request.param


def exact(target: Target, x: Tensor) -> Tensor:
    return polynomial(x, target.rows, target.divisor)


def polynomial(x: Tensor, rows: Sequence[Sequence[float]], divisor: float = 1.0) -> Tensor:
    """In float64."""
    return torch.from_numpy(exact_newton_schulz(x, rows, divisor).astype(float))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(24, 24), (17, 40), (40, 17), (3, 12, 20)])
def test_function(target: Target, code: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if len(shape) > 2 and not target.batches:
        pytest.skip("batches stay its own")
    module = importlib.import_module(target.module)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    theirs = target.call(module, x)
    with swap_in(target.name) as swap:
        assert not swap.refused
        mine = target.call(module, x)
        (calls,) = (c for name, c in swap.calls.items() if name.endswith(f".{target.point}"))
        assert (calls.taken, calls.left) == (1, {})
    assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
    true = exact(target, x)
    assert distance(mine.double(), true) <= 2 * distance(theirs.double(), true) + 1e-6


def test_path(target: Target, code: str) -> None:
    owner = importlib.import_module(target.owner)

    def make(params: Sequence[Tensor]) -> Optimizer:
        return target.make(owner, params)

    theirs = moved(make, SHAPES, STEPS)
    with swap_in(target.name) as swap:
        mine = moved(make, SHAPES, STEPS)
        taken = sum(calls.taken for calls in swap.calls.values())
        # dion stacks matrices of one shape.
        assert 1 <= taken <= STEPS * len(SHAPES)
    again = moved(make, SHAPES, STEPS)
    for x, y, z in zip(mine, theirs, again, strict=True):
        # Both have products in 16 bits, and round differently.
        assert distance(x, y) <= 0.05
        # HeavyBall rounds at random.
        assert torch.equal(y, z) or target.name == "heavyball"


def test_swap_before_import_and_back(target: Target, code: str) -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] == target.module.partition(".")[0]:
            del sys.modules[name]
    swap = swap_in(target.name)
    try:
        assert swap.waiting == [target.name]
        importlib.import_module(target.owner)
        importlib.import_module(target.module)
        assert swap.waiting == [] and not swap.refused
        assert any(name.endswith(f".{target.point}") for name in swap.replaced)
    finally:
        swap.undo()
    module = importlib.import_module(target.module)
    owner = module if hasattr(module, target.point) else module.GramNewtonSchulz
    function = vars(owner)[target.point]
    assert not hasattr(function, "__spectral_kernels_replacement__")


@pytest.mark.parametrize("code", ["double"], indirect=True)
def test_by_optimizer_and_class(target: Target, code: str) -> None:
    if target.make is by_gram:
        pytest.skip("its optimizer is the test's own")
    owner = importlib.import_module(target.owner)
    optimizer = target.make(owner, parameters(SHAPES))
    for given in (optimizer, type(optimizer)):
        with swap_in(given) as swap:
            assert any(name.endswith(f".{target.point}") for name in swap.replaced)


@pytest.mark.parametrize("code", ["double"], indirect=True)
def test_another_version_is_refused(target: Target, code: str, monkeypatch: Any) -> None:
    module = importlib.import_module(target.module)
    owner = module if hasattr(module, target.point) else module.GramNewtonSchulz
    own = vars(owner)[target.point]

    def renamed(matrix: Tensor) -> Tensor:
        return matrix

    renamed.__module__ = module.__name__
    monkeypatch.setattr(owner, target.point, renamed)
    with swap_in(target.name) as swap:
        assert vars(owner)[target.point] is renamed
        assert "not the version" in swap.refused[module.__name__]

    def other(*args: Any, **kwargs: Any) -> Any:
        return 2 * own(*args, **kwargs)

    other.__module__, other.__wrapped__ = module.__name__, own  # type: ignore[attr-defined]
    monkeypatch.setattr(owner, target.point, other)
    with swap_in(target.name) as swap:
        assert vars(owner)[target.point] is other
        assert "does not compute" in swap.refused[module.__name__]


@pytest.mark.parametrize("code", ["double"], indirect=True)
def test_random_numbers_are_not_drawn(target: Target, code: str) -> None:
    importlib.import_module(target.module)
    state = torch.get_rng_state()
    with swap_in(target.name):
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("code", ["double"], indirect=True)
def test_what_is_no_matrix_is_left(target: Target, code: str) -> None:
    module = importlib.import_module(target.module)
    x = gradient((4, 6), 0).float().requires_grad_()
    if target.point == "__call__":
        pytest.skip("writes its argument, which autograd forbids")
    with swap_in(target.name) as swap:
        assert target.call(module, x).requires_grad
        (calls,) = (c for name, c in swap.calls.items() if name.endswith(f".{target.point}"))
        assert calls.left == {"needs a gradient": 1}


# What each one has of its own.


@pytest.fixture
def stand_ins() -> Iterator[None]:
    with modules_of([DOUBLES]):
        yield


@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"coefficient_type": "cans", "steps": 5}, (6, 9)),
        ({"coefficient_type": "quintic", "steps": 6}, (9, 6)),
        ({"coefficient_type": "simple", "steps": 3}, (6, 9)),
        (
            {
                "coefficient_type": "custom",
                "custom_coefficient_sets": [(1.5, -0.5, 0.0)],
                "steps": 8,
            },
            (2, 6, 9),
        ),
    ],
)
def test_emerging_rows_and_precision(
    options: dict[str, Any], shape: tuple[int, ...], precision: str, stand_ins: None
) -> None:
    utils = importlib.import_module(f"{EMERGING}.muon_utils")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        draws = [gradient(shape, seed).float() for seed in range(1, 33)]
        theirs = [utils.newton_schulz(x, **options) for x in draws]
        with swap_in("emerging-optimizers") as swap:
            mine = [utils.newton_schulz(x, **options) for x in draws]
            assert sum(calls.taken for calls in swap.calls.values()) == len(draws)
    finally:
        torch.set_float32_matmul_precision(before)
    kind = options["coefficient_type"]
    rows = utils._COEFFICIENT_SETS.get(kind, options.get("custom_coefficient_sets"))
    mode = "repeat_last" if kind == "cans" else "cycle"
    rows = list(utils.get_coefficient_iterator(options["steps"], rows, mode))
    true = [polynomial(x, rows) for x in draws]

    def error(found: list[Tensor]) -> float:
        """Root mean square; of one small matrix it is a matter of luck."""
        each = [distance(x.double(), y) for x, y in zip(found, true, strict=True)]
        return math.sqrt(statistics.fmean(value**2 for value in each))

    assert error(mine) <= 2 * error(theirs) + 1e-6


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"tp_group": object()}, "tensor-parallel"),
        ({"transpose": True}, "iterated on the longer side"),
        ({"steps": 0}, "steps=0, eps=1e-15, coefficient_type='quintic'"),
    ],
)
def test_emerging_calls_that_are_left(
    options: dict[str, Any], reason: str, stand_ins: None
) -> None:
    utils = importlib.import_module(f"{EMERGING}.muon_utils")
    with swap_in("emerging-optimizers") as swap:
        utils.newton_schulz(gradient((4, 6), 0).float(), **{"steps": 5, **options})
        (calls,) = swap.calls.values()
        assert calls.left == {reason: 1}


@pytest.mark.parametrize("scale", ["none", "scale", "graft"])
@pytest.mark.parametrize("mode", [None, "legacy_newtonschulz"])
@pytest.mark.parametrize("shape", [(8, 8), (12, 5)])
def test_heavyball_modes_and_scales(
    shape: tuple[int, int], mode: str | None, scale: str, stand_ins: None
) -> None:
    utils = importlib.import_module("heavyball.utils")
    x = gradient(shape, 2).float()
    theirs = utils.inplace_orthogonal_(x, mode, scale_mode=scale)
    with swap_in("heavyball") as swap:
        mine = utils.inplace_orthogonal_(x, mode, scale_mode=scale)
        out = torch.empty_like(x)
        assert utils.inplace_orthogonal_(x, mode, out, scale) is None
        assert sum(calls.taken for calls in swap.calls.values()) == 2
        utils.inplace_orthogonal_(gradient((4, 4), 3).float(), "qr")
        (calls,) = swap.calls.values()
        assert calls.left == {"mode='qr'": 1}
    assert torch.equal(out, mine)
    assert distance(mine.double(), theirs.double()) <= 0.05


@pytest.mark.parametrize("gram_form", [True, False])
def test_gram_objects_made_before(gram_form: bool, stand_ins: None) -> None:
    module = importlib.import_module("gram_newton_schulz")
    kind = module.GramNewtonSchulz if gram_form else module.StandardNewtonSchulz
    made, kernels = kind(ns_use_kernels=False), kind(ns_use_kernels=True)
    x = gradient((6, 15), 1).float()
    before = x.clone()
    with swap_in("gram-newton-schulz") as swap:
        made(x)
        assert torch.equal(x, before)
        kernels(x.clone())
        (calls,) = swap.calls.values()
        assert (calls.taken, calls.left) == (1, {"its own kernels": 1})


@pytest.mark.parametrize("where", ["double", "public"])
def test_normuon_of_dion_takes_its_path_on_the_kernels(where: str) -> None:
    folders = [DOUBLES] if where == "double" else public_code(["dion"])

    def make(params: Sequence[Tensor]) -> Optimizer:
        made: Optimizer = importlib.import_module("dion").NorMuon(params, lr=0.05)
        return made

    with modules_of(folders), torch.compiler.set_stance("force_eager"):
        theirs = moved(make, SHAPES, STEPS)
        with swap_in("dion") as swap:
            assert not swap.refused
            mine = moved(make, SHAPES, STEPS)
            calls = swap.calls["dion.polar_express.polar_express"]
            assert calls.taken and not calls.left
    for x, y in zip(mine, theirs, strict=True):
        # Both have products in 16 bits, and round differently.
        assert distance(x, y) <= 0.05


def test_dion_takes_its_epsilon_as_a_tensor(stand_ins: None) -> None:
    dion = importlib.import_module("dion")
    optimizer_before = dion.Muon(parameters(SHAPES))
    with swap_in("dion") as swap:
        params = parameters(SHAPES)
        optimizer = dion.Muon(params)
        steps(optimizer, params, 2)
        assert swap.calls["dion.polar_express.polar_express"].taken == 2 * len(SHAPES)
        # It holds the function that it found.
        steps(optimizer_before, list(optimizer_before.param_groups[0]["params"]), 1)
        assert swap.calls["dion.polar_express.polar_express"].taken == 2 * len(SHAPES)


def test_every_target_is_tested() -> None:
    names = {adapter.name for adapter in ADAPTERS}
    others = {"torch.optim.Muon", "distributed_shampoo", "SOAP", "DeVA"}
    assert {target.name for target in TARGETS} == names - others
