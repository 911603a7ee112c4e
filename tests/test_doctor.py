"""The doctor finds what is wrong, passes what is right, and says which by its exit status."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import readme_tables
import torch
from spectral_kernels import _extension, cli
from spectral_kernels.doctor import _accuracy, _child, _faults, _machine, _outcome, _subjects
from torch import Tensor
from torch.optim import Optimizer

DOCS = Path(__file__).parent.parent / "docs"


class Normalized(Optimizer):
    """Momentum of normalized gradients, with none of the faults; subclasses have one each."""

    def __init__(self, params: Any, lr: float = 1e-2, weight_decay: float = 0.0) -> None:
        if not 0.0 <= lr < float("inf"):
            raise ValueError(f"lr {lr!r}")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        for group in self.param_groups:
            for param in group["params"]:
                if self.overlaps(param):
                    raise ValueError("overlaps itself")

    @staticmethod
    def overlaps(param: Tensor) -> bool:
        return param.numel() > 1 + sum(
            (n - 1) * stride for n, stride in zip(param.shape, param.stride(), strict=True)
        )

    def load_state_dict(self, state_dict: Any) -> None:
        kept = [dict(entry) for entry in state_dict["state"].values()]
        super().load_state_dict(state_dict)
        for mine, saved in zip(self.state.values(), kept, strict=True):
            mine.update(momentum=saved["momentum"].clone())

    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            members = [
                (group, param)
                for group in self.param_groups
                for param in group["params"]
                if param.grad is not None and param.numel()
            ]
            for _, param in members:
                self.check(param)
            for group, param in members:
                self.update(group, param)
        return loss

    def check(self, param: Tensor) -> None:
        if param.grad.is_sparse:
            raise TypeError("sparse")

    def wide(self, param: Tensor) -> torch.dtype:
        return torch.float64 if param.dtype == torch.float64 else torch.float32

    def buffer(self, param: Tensor) -> Tensor:
        state = self.state[param]
        if not state:
            state["momentum"] = torch.zeros_like(param, dtype=self.wide(param))
        return state["momentum"]

    def update(self, group: Any, param: Tensor) -> None:
        if not self.finite(param.grad):
            return
        grad = param.grad.to(self.wide(param))
        self.apply(group, param, self.normalized(grad))

    def finite(self, grad: Tensor) -> bool:
        return bool(grad.isfinite().all())

    def normalized(self, grad: Tensor) -> Tensor:
        largest = grad.abs().max()
        grad = grad / largest if largest > 0 else grad
        norm = grad.norm()
        return grad * (grad.numel() ** 0.5 / norm) if norm > 0 else grad

    def apply(self, group: Any, param: Tensor, grad: Tensor) -> None:
        momentum = self.buffer(param)
        momentum.lerp_(grad, 0.1)
        param.mul_(1.0 - group["lr"] * group["weight_decay"])
        param.sub_((group["lr"] * momentum).to(param.dtype))


class FlooredNorm(Normalized):
    def normalized(self, grad):
        return grad * (grad.numel() ** 0.5 / grad.norm().clamp_min(1e-7))


class DividesByZero(Normalized):
    def normalized(self, grad):
        return grad / grad.square().mean().sqrt()


class WritesGradient(Normalized):
    def update(self, group, param):
        super().update(group, param)
        param.grad.mul_(0.5)


class SpreadsNaN(Normalized):
    def finite(self, grad):
        return True


class ChecksLate(Normalized):
    def check(self, param):
        pass


class AcceptsAnything(Normalized):
    def __init__(self, params, lr=1e-2, weight_decay=0.0):
        super().__init__(params, abs(lr) if lr == lr and abs(lr) < 1e9 else 0.0, weight_decay)

    @staticmethod
    def overlaps(param):
        return False


class FixedRate(Normalized):
    def apply(self, group, param, grad):
        super().apply({**group, "lr": 1e-2}, param, grad)


class AlwaysDecays(Normalized):
    def apply(self, group, param, grad):
        super().apply({**group, "weight_decay": 0.1}, param, grad)


class NoGradClosure(Normalized):
    def step(self, closure=None):
        with torch.no_grad():
            if closure is not None:
                closure()
        return super().step()


class NarrowState(Normalized):
    def load_state_dict(self, state_dict):
        Optimizer.load_state_dict(self, state_dict)


class LosesState(Normalized):
    def load_state_dict(self, state_dict):
        pass


class NewBuffers(Normalized):
    def apply(self, group, param, grad):
        self.state[param]["momentum"] = self.buffer(param).clone()
        super().apply(group, param, grad)


class SharedBuffers(Normalized):
    shared: Any = None

    def buffer(self, param):
        if self.shared is None:
            self.shared = torch.zeros(64, dtype=self.wide(param))
        return self.state[param].setdefault(
            "momentum", self.shared[: param.numel()].view(param.shape)
        )


class ReadsMemoryOrder(Normalized):
    def apply(self, group, param, grad):
        memory = grad.as_strided(grad.shape, torch.empty(grad.shape).stride())
        super().apply(group, param, memory)


class PerKernelScale(Normalized):
    def apply(self, group, param, grad):
        last = param.shape[-1] / param.numel() if param.ndim == 4 else 1.0
        super().apply(group, param, grad * last)


class MovesWithoutGradient(Normalized):
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    param.grad = torch.zeros_like(param)
        result = super().step(closure)
        return result


class Noisy(Normalized):
    def apply(self, group, param, grad):
        super().apply(group, param, grad * (1.0 + 1e-3 * torch.rand(())))


class SkipsTheLast(Normalized):
    calls = 0

    def apply(self, group, param, grad):
        self.calls += 1
        super().apply(group, param, grad * (1.0 + 1e-3 * self.calls))


class LeavesSettings(Normalized):
    def step(self, closure=None):
        torch.rand(1)
        return super().step(closure)


class IdleFirst(Normalized):
    def apply(self, group, param, grad):
        if not self.state[param]:
            self.buffer(param)
            return
        super().apply(group, param, grad)


class DefaultDevice(Normalized):
    def apply(self, group, param, grad):
        lr = torch.tensor(group["lr"])
        if lr.device == param.device:
            super().apply(group, param, grad)


class Uphill(Normalized):
    def apply(self, group, param, grad):
        super().apply(group, param, -grad)


class NormalizesBuffer(Normalized):
    def apply(self, group, param, grad):
        super().apply(group, param, grad)
        if param.dtype == torch.bfloat16:
            self.buffer(param).div_(self.buffer(param).norm())


class NoScalars(Normalized):
    def check(self, param):
        super().check(param)
        assert param.shape[0] > 0


class FullMagnitude(Normalized):
    def normalized(self, grad):
        return grad


INJECTED = [
    (FlooredNorm, "tiny gradients"),
    (FlooredNorm, "large gradients"),
    (FullMagnitude, "small gradients"),
    (FullMagnitude, "gradient spike"),
    (DividesByZero, "zero gradients"),
    (WritesGradient, "gradient written"),
    (SpreadsNaN, "NaN in a matrix's gradient"),
    (SpreadsNaN, "NaN in a bias's gradient"),
    (SpreadsNaN, "overflowed loss scale"),
    (ChecksLate, "half a step before an error"),
    (AcceptsAnything, "values that make no sense"),
    (AcceptsAnything, "parameters that overlap themselves"),
    (FixedRate, "changed learning rate"),
    (AlwaysDecays, "no decay that was asked for"),
    (NoGradClosure, "closures"),
    (NarrowState, "state of 16-bit parameters, resumed"),
    (LosesState, "resumed run"),
    (NewBuffers, "state that moves"),
    (SharedBuffers, "shared state"),
    (ReadsMemoryOrder, "transposed parameters"),
    (ReadsMemoryOrder, "gradients in another layout"),
    (PerKernelScale, "convolution weights"),
    (PerKernelScale, "depthwise convolution weights"),
    (MovesWithoutGradient, "parameters without gradients"),
    (Noisy, "repeated run"),
    (SkipsTheLast, "order of parameters"),
    (LeavesSettings, "process-wide settings"),
    (IdleFirst, "idle first step"),
    (DefaultDevice, "another default device"),
    (Uphill, "a simple problem"),
    (NormalizesBuffer, "state of 16-bit parameters"),
    (NoScalars, "biases and scalars"),
]


def outcomes(cls: type[Optimizer], names: list[str] | None = None) -> dict[str, _outcome.Finding]:
    found = _faults.run_faults(_subjects.Subject("test", cls), names)
    return {finding.name: finding for finding in found}


def test_an_optimizer_without_faults_passes():
    found = outcomes(Normalized)
    # As one matrix, a stack is normalized as a whole, so its matrices do move otherwise.
    bad = {name: f.sentence for name, f in found.items() if f.outcome != "passed"}
    assert bad.keys() <= {"undeclared stack of matrices"}, bad


@pytest.mark.parametrize(("cls", "name"), INJECTED, ids=lambda x: getattr(x, "__name__", x))
def test_a_fault_is_found(cls, name):
    finding = outcomes(cls, [name])[name]
    assert finding.outcome == "failed", finding.sentence
    assert finding.sentence


def test_a_documented_fault_does_not_count():
    subject = _subjects.Subject("test", IdleFirst, {"idle first step": "as documented"})
    (finding,) = _faults.run_faults(subject, ["idle first step"])
    assert finding.outcome == "by design" and finding.sentence.endswith("as documented")


def test_outcomes_of_a_check():
    def raises(error):
        def check():
            raise error

        return _outcome.examine("section", "name", "subject", check)

    assert raises(_outcome.Wrong("a")).outcome == "failed"
    assert raises(_outcome.NotApplicable("a")).outcome == "not applicable"
    assert raises(KeyError("a")).sentence == "raises KeyError: 'a'"
    assert _outcome.examine("section", "name", "subject", lambda: "fine").outcome == "passed"


# The machine.


def test_other_bits_of_a_fresh_process_are_found():
    one = dict.fromkeys(_child.COMPUTATIONS, "a")
    assert _machine._compare(one, [one, one]).startswith("2 processes")
    for bad, sentence in (
        (one | {"eigenbasis": "b"}, r"other bits in eigenbasis \(1 of 2\)"),
        ("hangs after 2 of 5 computations", "a process hangs"),
    ):
        with pytest.raises(_outcome.Wrong, match=sentence):
            _machine._compare(one, [one, bad])
    with pytest.raises(_outcome.Wrong, match="does not compute polar"):
        short = {name: "a" for name in one if name != "polar"}
        _machine._compare(short, [short])


def test_a_process_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(_machine, "_PROCESS_SECONDS", 0.2)
    assert _machine._start(1) == "hangs after 0 of 5 computations"


def test_a_wrong_decomposition_is_found(monkeypatch):
    eigh = torch.linalg.eigh

    def wrong(a):
        values, vectors = eigh(a)
        # Orthogonal all the same.
        return values, vectors.roll(1, 1)

    monkeypatch.setattr(torch.linalg, "eigh", wrong)
    found = {f.subject: f.outcome for f in _machine.lapack(size=32, calls=1)}
    assert found["torch.linalg.eigh"] == "failed"
    assert found["torch.linalg.qr"] == "passed"


def test_results_that_differ_from_call_to_call_are_found():
    calls = iter(range(100))
    with pytest.raises(_outcome.Wrong, match="call 1"):
        _machine._repeat(lambda x: x + next(calls), [torch.zeros(3, 2)])
    with pytest.raises(_outcome.Wrong, match="beside"):
        _machine._repeat(lambda x: x + x.ndim, [torch.zeros(3, 2)])


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("name", _accuracy.OPERATORS)
def test_an_inaccurate_operator_is_found(name):
    right = _accuracy.OPERATORS[name]
    wrong_by = 0.2 if right.dtype == torch.bfloat16 else 0.02
    wrong = _accuracy.Operator(
        lambda x: right.ours(x) + wrong_by * right.ours(x).flip(-1),
        right.plain,
        right.error,
        right.shape,
        right.dtype,
    )
    with pytest.raises(_outcome.Wrong, match="more than twice"):
        _accuracy._judge(wrong, {})


def test_plain_torch_keeps_the_rule():
    for name, right in _accuracy.OPERATORS.items():
        plain = _accuracy.Operator(right.plain, right.plain, right.error, right.shape, right.dtype)
        assert _accuracy._judge(plain, {}), name


# The command.


def run_main(monkeypatch, capsys, subject, *options):
    monkeypatch.setattr("spectral_kernels.doctor._own", lambda quick: iter(()))
    monkeypatch.setattr(_subjects, "_ours", lambda: [subject])
    monkeypatch.setattr(
        _faults,
        "FAULTS",
        {n: _faults.FAULTS[n] for n in ("idle first step", "gradient written")},
    )
    status = cli.main(["doctor", *options])
    return status, capsys.readouterr().out


@pytest.mark.parametrize(("cls", "status"), [(Normalized, 0), (WritesGradient, 1)])
def test_exit_status_and_json(monkeypatch, capsys, cls, status):
    found, text = run_main(monkeypatch, capsys, _subjects.Subject("test", cls), "--json")
    record = json.loads(text)
    assert found == status
    assert record["verdict"] == ("failed" if status else "passed")
    assert set(record) == {"format", "kind", "machine", "seconds", "checks", "verdict"}
    assert record["kind"] == "doctor" and record["machine"]["torch"] == torch.__version__
    for check in record["checks"]:
        assert set(check) == {
            *("implementation", "section", "name", "subject", "outcome", "sentence")
        }


def test_table_shows_what_failed(monkeypatch, capsys):
    pytest.importorskip("rich", reason="the extra 'cli' is not installed")
    status, text = run_main(monkeypatch, capsys, _subjects.Subject("test", WritesGradient))
    assert status == 1
    assert "1 passed, 1 failed" in text and "gradient written" in text
    assert text.splitlines()[-1].startswith("failed: 1 of 2 checks failed")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--impl", "adam"], "--impl must be of ours, torch"),
        (["--impl", ","], "--impl names nothing"),
        (["--peers", "soap=/nowhere"], "there is no folder '/nowhere'"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, sentence, capsys):
    assert cli.main(["doctor", *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_a_peer_that_is_not_there_is_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(_subjects.peers, "find", lambda name: None)
    assert cli.main(["doctor", "--impl", "soap"]) == 2
    assert "name its clone by --peers soap=FOLDER" in capsys.readouterr().err


def test_clones_are_found_by_their_repositories(monkeypatch, tmp_path):
    (tmp_path / "SOAP").mkdir()
    (tmp_path / "SOAP" / "soap.py").write_text("class SOAP: pass\n")
    pointed = []
    monkeypatch.setenv("SPECTRAL_KERNELS_PEERS", str(tmp_path))
    monkeypatch.setattr(_subjects, "peers", SimpleNamespace(point=pointed.append))
    _subjects.point_at_clones(["deva=x"])
    assert pointed == [[f"soap={tmp_path / 'SOAP'}", "deva=x"]]


@pytest.mark.usefixtures("native")
def test_the_whole_of_it_in_a_minute():
    def seconds():
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before = seconds()
    done = subprocess.run(
        [sys.executable, "-m", "spectral_kernels.cli", "doctor", "--quick", "--json"],
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"},
    )
    assert done.returncode in (0, 1), done.stderr
    record = json.loads(done.stdout)
    sections = {check["section"] for check in record["checks"]}
    assert sections == {"fresh processes", "LAPACK", "same bits", "accuracy", "optimizers"}
    assert {check["subject"] for check in record["checks"] if check["section"] == "optimizers"} == {
        *("Muon", "Shampoo", "SOAP", "DeVA")
    }
    assert (done.returncode == 1) == any(c["outcome"] == "failed" for c in record["checks"])
    # Of a processor's time, as the clock's depends on who else is here.
    assert seconds() - before < 60.0
    assert _extension.MODULE is not None
    assert record["machine"]["instruction_sets"] == _extension.MODULE.supported_isas()


def test_the_scoreboard_is_up_to_date():
    assert readme_tables.main(["--check", str(DOCS / "doctor.md")]) == 0
