"""swap_in of a function that no package has: known by its arithmetic, or refused."""

from __future__ import annotations

import importlib
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import spectral_kernels as sk
import torch
from spectral_kernels import swap_in
from support.moves import distance, gradient, moved
from support.packages import public_code
from support.states import golden
from torch import Tensor

pytestmark = pytest.mark.usefixtures("native", "one_thread")

SHAPES = ((24, 24), (17, 40), (40, 17))

# Written as in the scripts that people train with.
SIMPLE = """
    def orthogonalize(G, steps):
        assert len(G.shape) == 2
        a, b, c = (3.4445, -4.7750, 2.0315)
        X = G.bfloat16()
        if G.size(0) > G.size(1):
            X = X.T
        X = X / (X.norm() + 1e-7)
        for _ in range(steps):
            A = X @ X.T
            B = b * A + c * A @ A
            X = a * X + B @ X
        if G.size(0) > G.size(1):
            X = X.T
        return X
"""
EXPRESS = """
    ROWS = [
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ]

    def orthogonalize(G: torch.Tensor, steps: int = 5) -> torch.Tensor:
        assert G.ndim >= 2
        X = G.bfloat16()
        X = X / (X.norm(dim=(-2, -1), keepdim=True) * (1 + 2e-2) + 1e-6)
        tall = X.size(-2) > X.size(-1)
        for a, b, c in ROWS[:steps]:
            if tall:
                A = X.mT @ X
                X = a * X + X @ (b * A + c * (A @ A))
            else:
                A = X @ X.mT
                X = a * X + (b * A + c * (A @ A)) @ X
        return X
"""
SAME_DTYPE = """
    def orthogonalize(update, *, eps=1e-7):
        x = update.to(torch.bfloat16)
        wide = x if x.shape[0] <= x.shape[1] else x.mT
        wide = wide.div(wide.norm().clamp(min=eps))
        for a, b, c in [(4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377)]:
            r = wide @ wide.mT
            wide = torch.addmm(wide, torch.addmm(r, r, r, beta=b, alpha=c), wide, beta=a)
        out = wide if x.shape[0] <= x.shape[1] else wide.mT
        return out.to(update.dtype) * max(1, update.shape[0] / update.shape[1]) ** 0.5
"""
CUBIC = """
    def orthogonalize(g, iterations=12):
        x = g.float()
        x = x / x.norm()
        for _ in range(iterations):
            x = 1.5 * x - 0.5 * (x @ x.T @ x)
        return x
"""
COMPILED = SIMPLE.replace("    def", "    @torch.compile\n    def", 1)
FORMS = {
    "simple": SIMPLE,
    "polar express": EXPRESS,
    "in its own dtype, scaled": SAME_DTYPE,
    "cubic": CUBIC,
    "compiled": COMPILED,
}


@pytest.fixture
def written() -> Iterator[Any]:
    """Modules out of text, as scripts are."""
    names = []

    def make(text: str, name: str = "some_script") -> ModuleType:
        module = ModuleType(name)
        module.torch = torch
        sys.modules[name] = module
        names.append(name)
        exec(compile(textwrap.dedent(text), name, "exec"), module.__dict__)
        return module

    yield make
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_a_function_is_known_by_its_arithmetic(form, dtype, written):
    module = written(FORMS[form])
    own = module.orthogonalize
    arguments = (5,) if "compiled" in form or "simple" in form else ()
    with swap_in(own) as swap:
        assert swap.refused == {} and swap.replaced == ["some_script.orthogonalize"]
        assert module.orthogonalize is not own
        for shape in SHAPES:
            x = gradient(shape, 1).to(dtype)
            kept = x.clone()
            mine = module.orthogonalize(x, *arguments)
            assert torch.equal(x, kept)
            with torch.compiler.set_stance("force_eager"):
                theirs = own(x.clone(), *arguments)
            exact = exactly(FORMS[form], written, x, *arguments)
            assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
            errors = [
                float((each.double() - exact).norm() / exact.norm()) for each in (mine, theirs)
            ]
            assert errors[0] <= 2 * errors[1] + 2.0**-20, errors
        assert swap.calls["some_script.orthogonalize"].taken == len(SHAPES)
    assert module.orthogonalize is own


def exactly(text: str, written: Any, x: Tensor, *arguments: Any) -> Tensor:
    """The same text with every rounding to fewer digits taken out."""
    for rounding in (".bfloat16()", ".float()", ".to(torch.bfloat16)"):
        text = text.replace(rounding, ".double()")
    text = text.replace("@torch.compile", "")
    return written(text, "in_float64").orthogonalize(x.double(), *arguments)


def test_other_arguments_are_tried_anew(written):
    module = written(SIMPLE)
    with swap_in(module.orthogonalize) as swap:
        for steps in (3, 7, 3):
            module.orthogonalize(gradient((6, 9), 1).float(), steps=steps)
        assert swap.calls["some_script.orthogonalize"].taken == 3
        module.orthogonalize(gradient((6, 9), 1), 5)
        with pytest.raises(AssertionError):
            module.orthogonalize(torch.zeros(2, 3, 4), 5)
        left = swap.calls["some_script.orthogonalize"].left
        assert left == {"float64": 1, "3-D": 1}


def test_batches_where_a_function_takes_them(written):
    module = written(EXPRESS)
    batch = torch.stack([gradient((6, 9), seed).float() for seed in range(3)])
    with swap_in(module.orthogonalize) as swap:
        whole = module.orthogonalize(batch)
        assert torch.equal(whole[1], module.orthogonalize(batch[1]))
        assert swap.calls["some_script.orthogonalize"].taken == 2


def test_zero_stays_zero_and_nan_stays_alone(written):
    module = written(SIMPLE)
    with swap_in(module.orthogonalize):
        assert not module.orthogonalize(torch.zeros(4, 6), 5).any()
        x = gradient((4, 6), 0).float()
        x[0, 0] = torch.nan
        assert module.orthogonalize(x, 5).isnan().all()


REFUSED = {
    "another polynomial": (SIMPLE.replace("B @ X", "B @ X + 0.01 * X"), "relative difference"),
    "another norm": (SIMPLE.replace("X.norm()", "torch.linalg.matrix_norm(X, 2)"), "difference"),
    "no norm": (SIMPLE.replace("(X.norm() + 1e-7)", "1.0"), "relative difference"),
    "wide ones only": (SIMPLE.replace("X = X / (", "X = X * (1 + 0.2 * (len(G) > 5)) / ("), "diff"),
    "another shape": (
        SIMPLE.replace("return X", "return X[:2]"),
        r"it returns \(2, 6\) for \(4, 6\)",
    ),
    "an error": (SIMPLE.replace("return X", "raise KeyError('x')"), "failed with KeyError: 'x'"),
    "noise": (SIMPLE.replace("return X", "return X + 0.3 * torch.rand_like(X)"), "difference"),
    "unknown arguments": (
        SIMPLE.replace("steps):", "steps, layer):"),
        "needs layer, which no trial",
    ),
    "anything": (SIMPLE.replace("steps):", "steps=5, *more):"), "does not say what it takes"),
    "rounded more": (SIMPLE.replace("return X", "return (X * 2).round() / 2"), "difference"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_an_iteration_is_refused_with_the_difference(what, written, caplog):
    text, reason = REFUSED[what]
    module = written(text)
    own = module.orthogonalize
    state = torch.random.get_rng_state()
    with caplog.at_level("WARNING", logger="spectral_kernels"):
        swap = swap_in(own)
    assert module.orthogonalize is own and swap.replaced == []
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(swap.refused["some_script.orthogonalize"])
    assert "some_script.orthogonalize keeps its own code" in caplog.text
    assert torch.equal(torch.random.get_rng_state(), state)


def test_functions_without_a_place_are_refused(written):
    def local(G, steps):
        return G

    module = written(SIMPLE)
    with pytest.raises(ValueError, match="is in no module under a name of its own"):
        swap_in(local)
    importer = written("from some_script import orthogonalize", "importer")
    own = module.orthogonalize
    with swap_in(own) as swap:
        assert importer.orthogonalize is module.orthogonalize is not own
        again = swap_in(module.orthogonalize)
        assert "replaced by an earlier swap_in" in str(again.refused)
        assert swap.waiting == []
    assert importer.orthogonalize is own


# In a script that knows nothing of it.

SCRIPT = (
    "import sys, torch\n"
    + textwrap.dedent(SIMPLE)
    + textwrap.dedent("""
    class Mine(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 0.1})

        @torch.no_grad()
        def step(self):
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(orthogonalize(p.grad, 5), alpha=group["lr"])

    w = torch.nn.Parameter(torch.eye(6))
    optimizer = Mine([w])
    for _ in range(3):
        w.grad = torch.eye(6)
        optimizer.step()
    print(orthogonalize.__module__, float(w.detach().trace()))
    """)
)


def test_run_replaces_a_function_of_the_script(tmp_path):
    path = Path(tmp_path) / "train.py"
    path.write_text(SCRIPT)
    command = [sys.executable, "-m", "spectral_kernels.cli", "run", "--report"]
    names = ["--function", "orthogonalize", "--function", "missing"]
    said = subprocess.run(
        [*command, *names, str(path)], capture_output=True, text=True, timeout=300
    )
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("__main__ ")
    assert "replaced in __main__:\n    orthogonalize: 3 calls" in said.stderr
    assert "waiting for missing" in said.stderr


def test_run_wants_a_name(capsys):
    cli = importlib.import_module("spectral_kernels.cli")
    assert cli.main(["run", "--function", "a b", __file__]) == 2
    assert "'a b' names no function" in capsys.readouterr().err
    assert sk.swap_in is swap_in


def test_modded_nanogpts_own_function_under_its_normuon(monkeypatch):
    """The public script's function, called by the optimizer that stands below it."""
    (folder,) = public_code(["modded-nanogpt"])
    script = golden("parity").nanogpt_module(folder / "train_gpt_medium.py")
    monkeypatch.setitem(sys.modules, script.__name__, script)

    def make(params: Any) -> torch.optim.Optimizer:
        for param in params:
            param.label = "mlp"
        made: torch.optim.Optimizer = script.NorMuon(params, lr=0.05, custom_sizing=False)
        return made

    with torch.compiler.set_stance("force_eager"):
        (theirs,) = moved(make, ((17, 40),), 10)
        with swap_in(script.polar_express) as swap:
            (mine,) = moved(make, ((17, 40),), 10)
            (calls,) = swap.calls.values()
            assert calls.taken == 10 and not calls.left
    assert distance(mine, theirs) <= 0.05
