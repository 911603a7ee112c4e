"""The public names: what there is, how it is called, what it refuses, how it is imported."""

from __future__ import annotations

import inspect
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import spectral_kernels as sk
import torch
from spectral_kernels import _dispatch
from torch import Tensor

NAMES = {
    *_dispatch.OPERATORS,
    *("RootInfo", "coefficients", "optim", "swap_in"),
    *("use_backend", "explain", "call_counts", "__version__"),
}
# Arguments besides tensors that may be given by position.
POSITIONAL = {"kron_factors_update_": {"beta"}, "inverse_root": {"p"}}
OPERATORS = sorted(_dispatch.OPERATORS)


pytestmark = pytest.mark.usefixtures("one_thread")


def run(code: str) -> str:
    """The output of a new interpreter."""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


# Names.


def test_public_names():
    assert set(sk.__all__) == NAMES
    for name in NAMES:
        assert getattr(sk, name) is not None
    optimizers = {"Muon", "Shampoo", "SOAP", "DeVA"}
    others = {"Diagnostics", "Distributed", "ParameterDiagnostics", "param_groups", "qk_clip_"}
    assert optimizers | others == set(sk.optim.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'orthogonalize'"):
        sk.orthogonalize  # noqa: B018


def test_every_operator_has_a_public_function():
    assert len(OPERATORS) >= 12
    assert all(callable(getattr(sk, name)) and name in sk.__all__ for name in OPERATORS)


@pytest.mark.parametrize("name", OPERATORS)
def test_only_tensors_are_positional(name):
    for parameter in inspect.signature(getattr(sk, name)).parameters.values():
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            assert "Tensor" in str(parameter.annotation) or parameter.name in POSITIONAL[name]
        else:
            assert parameter.kind is parameter.KEYWORD_ONLY


@pytest.mark.parametrize("name", OPERATORS)
def test_docstrings_say_what_callers_need(name):
    text = inspect.getdoc(getattr(sk, name))
    for part in ("Args:", "Raises:", "Accuracy:", "backend:"):
        assert part in text, part


# Import.


def test_import_changes_nothing_outside_and_loads_little():
    out = run(
        "import sys, torch\n"
        "flags = lambda: (torch.get_num_threads(), torch.get_float32_matmul_precision(),\n"
        "    torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled(),\n"
        "    torch.backends.cuda.matmul.allow_tf32, torch.is_grad_enabled())\n"
        "before, loaded = flags(), set(sys.modules)\n"
        "import spectral_kernels\n"
        "assert flags() == before\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - loaded}\n"
        "print(*sorted(new), len(set(sys.modules) - loaded))\n"
    )
    name, count = out.split()
    # 59 when this was written, in 50 ms of a processor from byte code: what few use, comes later.
    assert name == "spectral_kernels" and int(count) <= 66


def test_F64_import_and_functions_without_compiled_part_and_triton():
    out = run(
        "import sys\n"
        "sys.modules['spectral_kernels._C'] = sys.modules['triton'] = None\n"
        "import spectral_kernels as sk, torch\n"
        "x = torch.randn(4, 6)\n"
        "assert sk.newton_schulz(x).shape == x.shape\n"
        "print(sk.explain('newton_schulz', x).backend)\n"
        "p = torch.nn.Parameter(x.clone()); p.grad = x.clone()\n"
        "sk.optim.Shampoo([p]).step()\n"
        "try:\n"
        "    sk.gram(x, backend='cpu')\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
    )
    assert out.startswith(
        "reference\nbackend cannot run gram: cpu: the compiled part was not built"
    )


# Functions of roots and bases.


def semidefinite(n: int, *batch: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(
        *batch, n, 2 * n, generator=torch.Generator().manual_seed(n), dtype=torch.float64
    )
    return (x @ x.mT / n).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inverse_root_and_its_info(dtype):
    a = semidefinite(6, 2, 3, dtype=dtype)
    before = a.clone()
    root, info = sk.inverse_root(a, 4, relative_ridge=1e-3, return_info=True)
    assert isinstance(info, sk.RootInfo)
    assert {x.shape for x in info} == {torch.Size((2, 3))}
    assert not info.status.any() and (info.residual < 1e-3).all()
    ridged = a + info.delta[..., None, None] * torch.eye(6, dtype=dtype)
    expected = torch.linalg.matrix_power(root.double(), 4) @ ridged.double()
    torch.testing.assert_close(
        expected, torch.eye(6, dtype=torch.float64).expand(2, 3, 6, 6), rtol=0.0, atol=2e-3
    )
    assert torch.equal(sk.inverse_root(a, 4, relative_ridge=1e-3), root)
    assert torch.equal(a, before)


def test_status_of_roots():
    bad = semidefinite(4)
    bad[0, 0] = math.nan
    a = torch.stack(
        [semidefinite(4), torch.zeros(4, 4), torch.diag(torch.tensor([2.0, 1, 1, 0])), bad]
    )
    root, info = sk.inverse_root(a, 2, return_info=True)
    assert info.status.tolist() == [0, 3, 3, 4]
    assert not root[1].any()
    torch.testing.assert_close(root[2].diagonal(), torch.tensor([0.5**0.5, 1.0, 1.0, 0.0]))
    assert root[3].isnan().all()


def test_eigenbasis_and_refresh():
    a = semidefinite(5, 3)
    values, basis = sk.eigenbasis(a)
    assert (values.diff(dim=-1) <= 0).all()
    torch.testing.assert_close(basis @ torch.diag_embed(values) @ basis.mT, a)
    moved = a + 0.01 * semidefinite(5, 3).flip(0)
    quotients, new = sk.refresh_eigenbasis(basis, moved)
    torch.testing.assert_close(quotients, (basis * (moved @ basis)).sum(-2))
    torch.testing.assert_close(new.mT @ new, torch.eye(5).expand(3, 5, 5), rtol=0.0, atol=5e-6)
    # Columns follow columns.
    assert ((new * basis).sum(-2) > 0.9).all()
    shuffled = torch.tensor([3, 0, 4, 1, 2])
    _, plain = sk.refresh_eigenbasis(basis[..., shuffled], moved)
    ordered_values, ordered = sk.refresh_eigenbasis(basis[..., shuffled], moved, sort=True)
    assert (ordered_values.diff(dim=-1) <= 0).all()
    torch.testing.assert_close(plain[..., shuffled.argsort()], ordered)


# Steps over lists.


def lists(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


SHAPES = ((4, 6), (3, 5, 4), (6, 4))


def zeros(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.zeros(shape) for shape in shapes]


def sides(axis: int, start: Callable[[int], Tensor]) -> list[Tensor]:
    return [start(s[axis]).expand(*s[:-2], s[axis], s[axis]).clone() for s in SHAPES]


def step_arguments(name: str) -> list[list[Tensor | None]]:
    """Parameters, gradients and state for one step; the last matrix has no right side."""
    params, grads = lists(*SHAPES), lists(*SHAPES, seed=1)
    if name == "muon_step_":
        return [params, grads, zeros(*SHAPES)]

    def start(size: int) -> Tensor:
        return torch.eye(size) if name == "shampoo_step_" else torch.zeros(size, size)

    def zero(size: int) -> Tensor:
        return torch.zeros(size, size)

    left, right = sides(-2, zero), sides(-1, zero)
    partner_left, partner_right = sides(-2, start), sides(-1, start)
    right[-1] = partner_right[-1] = None
    factors = [left, right, partner_left, partner_right]
    if name == "shampoo_step_":
        return [params, grads, zeros(*SHAPES), *factors, zeros(*SHAPES)]
    return [params, grads, zeros(*SHAPES), zeros(*SHAPES), *factors]


STEPS = ("muon_step_", "shampoo_step_", "soap_step_", "deva_step_")


@pytest.mark.parametrize("name", STEPS)
def test_steps_over_lists(name):
    """None stands for a size-0 side, counters may be left out, lr is a number or a tensor."""
    step = getattr(sk, name)
    options = {"skip_first": False} if name == "soap_step_" else {}
    first, second = step_arguments(name), step_arguments(name)
    absent = [[torch.zeros(0) if x is None else x for x in values] for values in second]
    grads = [grad.clone() for grad in first[1]]
    step(*first, lr=0.1, **options)
    counts = [torch.zeros(s[:-2]) for s in SHAPES]
    skipped = torch.zeros((), dtype=torch.int64)
    step(
        *absent,
        lr=torch.tensor(0.1, dtype=torch.float64),
        step_counts=counts,
        skipped=skipped,
        **options,
    )
    assert not torch.equal(first[0][0], lists(*SHAPES)[0])
    for mine, theirs in zip(first, absent, strict=True):
        for x, y in zip(mine, theirs, strict=True):
            assert x is None or torch.equal(x, y)
    assert [count.flatten().tolist() for count in counts] == [[1.0], [1.0] * 3, [1.0]]
    assert int(skipped) == 0
    assert all(map(torch.equal, first[1], grads))


@pytest.mark.parametrize("name", STEPS)
def test_steps_skip_and_count(name):
    arguments = step_arguments(name)
    arguments[1][1][2, 0, 0] = math.inf
    before = [arguments[0][1][2].clone(), arguments[2][1][2].clone()]
    skipped = torch.zeros((), dtype=torch.int64)
    counts = [torch.zeros(s[:-2]) for s in SHAPES]
    getattr(sk, name)(*arguments, lr=0.1, skipped=skipped, step_counts=counts)
    assert int(skipped) == 1
    assert counts[1][2] == 0.0
    assert torch.equal(arguments[0][1][2], before[0])
    assert torch.equal(arguments[2][1][2], before[1])


@pytest.mark.parametrize("name", STEPS[1:])
def test_refresh_of_single_entries(name):
    """Refreshed by flag, entry by entry: what is not keeps its bits."""
    step = getattr(sk, name)
    arguments = step_arguments(name)
    step(*arguments, lr=0.1)
    place = 6 if name != "shampoo_step_" else 5
    before = [None if x is None else x.clone() for x in arguments[place]]
    step(*arguments, lr=0.1, refresh=[False, True, False])
    changed = [not torch.equal(x, y) for x, y in zip(before, arguments[place], strict=True)]
    assert changed == [False, True, False]
    step(*arguments, lr=0.1, refresh=False)


def test_failed_roots_are_counted():
    arguments = step_arguments("shampoo_step_")
    failures = [torch.zeros(*s[:-2], 2, dtype=torch.int64) for s in SHAPES]
    arguments[3][0].copy_(-1e6 * torch.eye(4))
    sk.shampoo_step_(*arguments, lr=0.1, root_method="eigen", root_failures=failures)
    assert failures[0].tolist() == [1, 0]
    assert torch.equal(arguments[5][0], torch.eye(4))
    assert not failures[1].any() and not failures[2].any()


@pytest.mark.parametrize("name", STEPS)
def test_empty_lists_are_no_ops(name):
    getattr(sk, name)(*([] for _ in step_arguments(name)), lr=0.1)


# Bad input. Every call gets one argument that cannot work.

EYE = torch.eye(3)
HALF = torch.eye(3, dtype=torch.bfloat16)

BAD_CALLS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: sk.inverse_root([1.0], 2), TypeError, "a must be a tensor, not list"),
    (lambda: sk.inverse_root(HALF, 2), TypeError, "a must be one of float64, float32, not"),
    (lambda: sk.inverse_root(torch.ones(2, 3), 2), ValueError, r"square, not of shape \(2, 3\)"),
    (lambda: sk.inverse_root(torch.ones(3), 2), ValueError, "at least two dimensions"),
    (lambda: sk.inverse_root(EYE, 0), ValueError, "p must be in 1..8, not 0"),
    (lambda: sk.inverse_root(EYE, 9), ValueError, "p must be in 1..8, not 9"),
    (lambda: sk.inverse_root(EYE, 2.0), TypeError, "p must be an int, not 2.0"),
    (lambda: sk.inverse_root(EYE, 2, ridge=-1.0), ValueError, "ridge must be in"),
    (lambda: sk.inverse_root(EYE, 2, relative_ridge=math.nan), ValueError, "relative_ridge must"),
    (lambda: sk.inverse_root(EYE, 2, method="qr"), ValueError, "method must be one of auto"),
    (lambda: sk.inverse_root(EYE, 3, method="newton_db"), ValueError, "must be 2, 4 or 8, not 3"),
    (lambda: sk.inverse_root(EYE, 2, backend="gpu"), ValueError, "backend must be one of"),
    (lambda: sk.inverse_root(EYE, 2, backend="triton"), RuntimeError, "cannot run inverse_root"),
    (lambda: sk.inverse_root(EYE.clone().requires_grad_(), 2), RuntimeError, "no derivative"),
    (lambda: sk.inverse_root(EYE.to_sparse(), 2), TypeError, "a must be a dense tensor"),
    (lambda: sk.eigenbasis(HALF), TypeError, "float64, float32, not torch.bfloat16"),
    (lambda: sk.eigenbasis(torch.ones(2, 3)), ValueError, "a must be square"),
    (lambda: sk.eigenbasis(EYE.clone().requires_grad_()), RuntimeError, "no derivative"),
    (lambda: sk.refresh_eigenbasis(EYE, torch.eye(4)), ValueError, r"q has shape \(3, 3\), a"),
    (lambda: sk.refresh_eigenbasis(EYE, EYE.double()), TypeError, "q is torch.float32, a"),
    (lambda: sk.refresh_eigenbasis(HALF, HALF), TypeError, "q must be one of float64, float32"),
]


@pytest.mark.parametrize("index", range(len(BAD_CALLS)))
def test_bad_calls(index):
    call, error, message = BAD_CALLS[index]
    with pytest.raises(error, match=message):
        call()


BAD_OPTIONS = {
    "muon_step_": [("momentum", 1.0), ("scale", -1.0), ("scale", [1.0]), ("compute_dtype", int)],
    "shampoo_step_": [
        ("beta1", 1.0),
        ("beta2", 1.1),
        ("graft_beta2", 1.0),
        ("root", 9),
        ("ridge", -1.0),
        ("root_method", "fast"),
        ("graft", "lion"),
        ("graft_eps_mode", "other"),
        ("kl_order", "random"),
        ("refresh", [True]),
    ],
    "soap_step_": [("beta1", 1.0), ("shampoo_beta", -1.0), ("eps", -1.0), ("refresh", [True])],
    "deva_step_": [
        ("beta2", 1.0),
        ("eps_mode", "other"),
        ("norm", "l2"),
        ("variance", "other"),
        ("coefficients", "best"),
        ("steps", 0),
        ("scale", [1.0]),
        ("compute_dtype", torch.int8),
        ("refresh", [True]),
    ],
}
COMMON = [("lr", -1.0), ("lr", torch.ones(2)), ("weight_decay", -1.0), ("nonfinite", "ignore")]


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [(name, *case) for name, cases in BAD_OPTIONS.items() for case in (*COMMON, *cases)],
)
def test_steps_refuse_bad_options_before_they_write(name, key, value):
    arguments = step_arguments(name)
    before = [[None if x is None else x.clone() for x in values] for values in arguments]
    with pytest.raises((TypeError, ValueError)) as error:
        getattr(sk, name)(*arguments, **{"lr": 0.1, key: value})
    assert key in str(error.value)
    for values, copies in zip(arguments, before, strict=True):
        assert all(x is None or torch.equal(x, y) for x, y in zip(values, copies, strict=True))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", STEPS)
def test_steps_refuse_bad_lists_before_they_write(name, backend):
    def shortened(arguments, place):
        arguments[place] = arguments[place][:-1]

    def misshapen(arguments, place):
        arguments[place][-2] = torch.zeros(2, 2)

    def half(arguments, place):
        arguments[place][-2] = arguments[place][-2].bfloat16()

    for spoil in (shortened, misshapen, half):
        for place in range(1, len(step_arguments(name))):
            if spoil is half and place == 1:
                continue
            arguments = step_arguments(name)
            spoil(arguments, place)
            before = [param.clone() for param in arguments[0]]
            with sk.use_backend(backend), pytest.raises((TypeError, ValueError)):
                getattr(sk, name)(*arguments, lr=0.1)
            assert all(map(torch.equal, arguments[0], before))


def test_combinations_that_do_not_exist():
    arguments = step_arguments("shampoo_step_")
    with pytest.raises(ValueError, match="root must be 2, not 4"):
        sk.shampoo_step_(*arguments, lr=0.1, kl=True, root=4)
    arguments = step_arguments("deva_step_")
    with pytest.raises(ValueError, match="low_memory"):
        sk.deva_step_(*arguments, lr=0.1, norm="linf", variance="low_memory")
    with pytest.raises(ValueError, match="reference=True"):
        sk.deva_step_(*arguments, lr=0.1, reference=True, variance="gradient")
