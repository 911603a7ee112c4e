"""Newton-Schulz iterations, the polar factor and the Muon step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
from spectral_kernels import coefficients, optim, reference
from spectral_kernels.newton_schulz import newton_schulz, polar
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from . import peers
from .case import OURS, Case, Contender, Family, Problem, Work, one_by_one, relative_error
from .inputs import CARD_SHAPES, decaying, gaussian, rate_of
from .steps import LR, Make, Steps, combined, start

_SHAPES = ("128x128", "512x512", "768x768", "768x3072", "3072x768", "16x256x1024", "64x96x112")
_QUICK = ("768x768", "768x3072", "64x96x112")
_CPU = torch.device("cpu")
_MUON = coefficients.resolve("muon").rows


def _case(op: str, shape: str, dtype: torch.dtype, **options: Any) -> Case:
    if op == "muon_step_":
        return Case.of_list(op, shape, dtype, _build_step, **options)
    if op == "polar":
        return Case.of_matrices(op, shape, dtype, _build_polar, **options)
    return _newton_schulz(shape, dtype, **options)


def _newton_schulz(
    shape: str | Sequence[int],
    dtype: torch.dtype,
    *,
    spectrum: str = "gaussian",
    unrestarted: bool = False,
    **options: Any,
) -> Case:
    variant = " ".join(
        name for name, on in (("decaying", spectrum != "gaussian"), ("gram", unrestarted)) if on
    )
    build = partial(_build, spectrum=spectrum, unrestarted=unrestarted)
    return Case.of_matrices("newton_schulz", shape, dtype, build, variant=variant, **options)


def _build(
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    *,
    spectrum: str,
    unrestarted: bool,
) -> Problem:
    draw = gaussian if spectrum == "gaussian" else decaying
    x = draw(sizes, dtype, device=device)
    on_card = device.type == "cuda"
    options: dict[str, Any] = {"method": "gram", "restarts": ()} if unrestarted else {}
    exact = cache(lambda: standard(x.double(), _MUON))
    contenders = [Contender(OURS, lambda: newton_schulz(x, **options))]
    full = _full_work(sizes, dtype, _MUON, device)
    if x.ndim > 2:
        contenders.append(Contender("torch bmm", lambda: standard(x, _MUON), work=full, torch=True))
    if dtype == torch.bfloat16 and (x.ndim == 2 or not on_card):
        contenders.append(_torch_muon(x, full))
    if on_card:
        contenders += _compiled(x, full)
    if x.ndim == 2:
        alone = Contender("torch addmm", lambda: standard(x, _MUON), work=full, torch=True)
    else:
        alone = Contender(
            "torch loop",
            lambda: one_by_one(lambda one: standard(one, _MUON), x),
            work=full,
            torch=True,
        )
    if x.ndim == 2 or not on_card:
        contenders.append(alone)
    contenders += gram_newton_schulz(x)
    return Problem(
        contenders,
        error=lambda out: relative_error(out, exact()),
        baseline=lambda: standard(x, _MUON),
        work=work(sizes, dtype, _MUON, device),
    )


def _compiled(x: Tensor, work: Work) -> Iterator[Contender]:
    """Both forms by torch.compile, which is worth its time on cards alone."""
    for name, form in (("torch.compile", standard), ("torch.compile, Gram form", gram_form)):
        call = torch.compile(form, dynamic=False)
        yield Contender(
            name,
            partial(call, x, _MUON),
            work=work if form is standard else None,
            torch=True,
        )


def standard(x: Tensor, rows: Sequence[Sequence[float]]) -> Tensor:
    """The iteration as one writes it in torch, in x's dtype, batched."""
    iterate = x.mT if x.shape[-2] > x.shape[-1] else x
    iterate = iterate / torch.linalg.matrix_norm(iterate, keepdim=True)
    multiply_add = torch.addmm if x.ndim == 2 else torch.baddbmm
    for a, b, c in rows:
        r = iterate @ iterate.mT
        z = multiply_add(r, r, r, beta=b, alpha=c)
        iterate = multiply_add(iterate, z, iterate, beta=a)
    return iterate.mT if x.shape[-2] > x.shape[-1] else iterate


def gram_form(x: Tensor, rows: Sequence[Sequence[float]]) -> Tensor:
    """The Gram form as one writes it in torch, started anew before the third step."""
    iterate = x.mT if x.shape[-2] > x.shape[-1] else x
    iterate = iterate / torch.linalg.matrix_norm(iterate, keepdim=True)
    eye = torch.eye(iterate.shape[-2], dtype=torch.float32, device=x.device)
    q, r = eye, (iterate @ iterate.mT).float()
    for t, (a, b, c) in enumerate(rows):
        if t == 2:
            iterate = q.to(x.dtype) @ iterate
            q, r = eye, (iterate @ iterate.mT).float()
        z = a * eye + b * r + c * (r @ r)
        q, r = q @ z, z @ r @ z
    iterate = q.to(x.dtype) @ iterate
    return iterate.mT if x.shape[-2] > x.shape[-1] else iterate


def _full_work(
    sizes: Sequence[int],
    dtype: torch.dtype,
    rows: Sequence[Sequence[float]],
    device: torch.device,
) -> Work:
    """FLOPs of the standard form with whole products, as torch does them."""
    *batch, m, n = sizes
    short, long = min(m, n), max(m, n)
    flops = math.prod(batch) * len(rows) * (4 * short**2 * long + 2 * short**3)
    return {rate_of(dtype, device): float(flops)}


def _torch_muon(x: Tensor, work: Work) -> Contender:
    """torch.optim.Muon's own function, matrix by matrix; it scales a bf16 input in place."""
    from torch.optim._muon import _zeropower_via_newtonschulz

    def call(x: Tensor) -> Tensor:
        if x.ndim == 2:
            return _zeropower_via_newtonschulz(x, _MUON[0], len(_MUON), 1e-7)
        return torch.stack([call(one) for one in x])

    kept = x.clone()
    return Contender(
        "torch.optim.Muon",
        lambda: call(kept),
        output=lambda: call(x.clone()),
        work=work,
        torch=True,
    )


def gram_newton_schulz(x: Tensor) -> Iterator[Contender]:
    """The peer of that name, if it is there; on a CPU without its kernels, which need a card."""
    module = peers.find("gram-newton-schulz")
    if module is None:
        return
    options = {} if x.is_cuda else {"ns_use_kernels": False, "compile_kwargs": None}
    function = module.GramNewtonSchulz(ns_coefficients=[list(row) for row in _MUON], **options)
    kept = x.clone()  # it scales an fp32 input in place
    yield Contender(
        "gram-newton-schulz", lambda: function(kept), output=lambda: function(x.clone())
    )


def _build_polar(sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Problem:
    x = gaussian(sizes, dtype, device=device)
    exact = cache(lambda: reference.polar(x.double()))

    def svd() -> Tensor:
        u, _, vh = torch.linalg.svd(x.float(), full_matrices=False)
        return (u @ vh).to(dtype)

    return Problem(
        [Contender(OURS, lambda: polar(x)), Contender("torch.linalg.svd", svd, torch=True)],
        error=lambda out: relative_error(out, exact()),
        baseline="torch.linalg.svd",
    )


def _build_step(
    shapes: tuple[tuple[int, int], ...], dtype: torch.dtype, device: torch.device
) -> Problem:
    steps = Steps(start(shapes, device), dtype)

    def muon(cls: Callable[..., Optimizer]) -> Callable[[int], Make]:
        return lambda every: lambda params: cls(params, lr=LR, weight_decay=0.1)

    contenders = [
        steps.contender(OURS, muon(optim.Muon)),
        steps.contender("torch.optim.Muon", muon(torch.optim.Muon), torch=True),
    ]
    library = peers.find("pytorch-optimizer")
    if library is not None:
        make = muon(partial(_marked, library.Muon))
        contenders.append(steps.contender("pytorch-optimizer", make, judged=False))
    library = peers.find("heavyball")
    if library is not None:
        contenders.append(steps.contender("heavyball", muon(library.Muon), judged=False))
    return Problem(
        contenders,
        error=steps.error(lambda: steps.oracle(muon(optim.Muon)(1))),
        baseline="torch.optim.Muon",
        work=combined([work(matrix, torch.bfloat16, _MUON, device) for matrix in shapes]),
    )


def _marked(cls: Callable[..., Optimizer], params: list[Parameter], **options: Any) -> Optimizer:
    """pytorch-optimizer's groups must say whether they are for Muon."""
    return cls([{"params": params, "use_muon": True}], **options)


def work(
    sizes: Sequence[int],
    dtype: torch.dtype,
    rows: Sequence[Sequence[float]],
    device: torch.device = _CPU,
) -> tuple[Work, ...]:
    """FLOPs of the forms within the accuracy rule, symmetric products as one triangle."""
    *batch, m, n = sizes
    short, long, count = min(m, n), max(m, n), math.prod(batch)
    rate, steps = rate_of(dtype, device), len(rows)
    forms: list[Work] = [{rate: float(count * steps * (3 * short**2 * long + short**3))}]
    halves = rate == "bf16"
    growth = coefficients.BFLOAT16_GROWTH if dtype.itemsize == 2 else coefficients.FULL_GROWTH
    restarts = coefficients.gram_restarts(rows, m, n, growth)
    if restarts is not None:
        # Steps of the standard form, then the last ones on R. A Q of two 16-bit numbers meets X.
        alone, last = len(restarts), steps - len(restarts)
        wide = count * short**2 * long * (3 * alone + (5 if halves else 3))
        standard, of_r = count * alone * short**3, count * (4 * last - 3) * short**3
        if halves:
            forms.append({"bf16": float(wide + standard), "fp32": float(of_r)})
        else:
            forms.append({rate: float(wide + standard + of_r)})
    return tuple(forms)


def _cases() -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for shape in _SHAPES:
            yield _case("newton_schulz", shape, dtype, quick=shape in _QUICK)
        yield _newton_schulz((256, 1024), dtype, spectrum="decaying")
    for shape in ("256x256", "64x32x64"):
        yield _case("polar", shape, torch.float32)
    yield _case("muon_step_", "small-list", torch.float32, quick=True)
    yield _case("muon_step_", "gpt2-block", torch.float32)
    yield _case("muon_step_", "gpt2-block", torch.bfloat16)


def _acceptance() -> Iterator[Case]:
    fp32, bf16 = torch.float32, torch.bfloat16
    square, wide = (768, 768), (768, 3072)
    yield _newton_schulz(square, fp32, goals={"torch addmm": 3.0})
    yield _newton_schulz(wide, fp32, goals={"torch addmm": 4.6})
    yield _newton_schulz(wide, fp32, unrestarted=True, goals={"torch addmm": 6.0})
    yield _newton_schulz(square, bf16, goals={"torch.optim.Muon": 1.4})
    yield _newton_schulz(wide, bf16, goals={"torch.optim.Muon": 1.85})
    for sizes in ((64, 64, 128), (64, 96, 112), (64, 128, 128)):
        yield _newton_schulz(sizes, fp32, goals={"torch bmm": 2.8, "torch loop": 5.0})
        yield _newton_schulz(sizes, bf16, goals={"torch bmm": 1.5, "torch.optim.Muon": 8.0})
    for shape, goal in (("small-list", 2.0), ("gpt2-block", 1.75)):
        yield _case("muon_step_", shape, fp32, goals={"torch.optim.Muon": goal})


def _card() -> Iterator[Case]:
    for shape in CARD_SHAPES:
        yield _case("newton_schulz", shape, torch.bfloat16)
    for shape in ("gpt2-small", "lora", "llama-430m-layer"):
        yield _case("muon_step_", shape, torch.float32)
    for sizes in ((128, 512), (768, 768), (768, 3072)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            yield _newton_schulz(sizes, dtype, spectrum="decaying")


FAMILY = Family(
    "newton_schulz", ("newton_schulz", "polar", "muon_step_"), _cases, _case, _acceptance, _card
)
