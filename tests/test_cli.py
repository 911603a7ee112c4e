"""The command line: info and the options of bench. `run` is in test_run.py."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from spectral_kernels import _cuda, _extension, cli, info

SECTIONS = ["versions", "cpu", "backends", "gpu", "cuda_kernels", "environment", "workspace"]


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "spectral_kernels.cli", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=120,
    )


def test_info_prints_every_section(capsys):
    assert cli.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == SECTIONS


def test_info_json_is_what_collect_says(capsys):
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert list(facts) == SECTIONS
    assert set(facts["backends"]) == {"cpu", "cuda", "triton", "reference"}
    assert facts["backends"]["reference"] == "available"
    assert facts["versions"] == info.collect()["versions"]


def test_info_says_what_is_wrong_with_the_environment():
    said = command("info", SPECTRAL_KERNELS_CPU_ISA="mmx", CUDA_HOME="/nowhere")
    assert said.returncode == 0
    assert "SPECTRAL_KERNELS_CPU_ISA" in said.stdout
    assert "not found under CUDA_HOME" in said.stdout
    if _extension.MODULE is not None:
        assert "'mmx'; known instruction sets: baseline" in said.stdout


def test_info_without_the_compiled_part(monkeypatch):
    monkeypatch.setattr(_extension, "MODULE", None)
    monkeypatch.setattr(_extension, "REASON", "no compiler here")
    facts = info.collect()
    assert facts["backends"]["cpu"] == "no compiler here"
    assert facts["versions"]["compiler"] == "no compiler here"
    assert "no compiler here" in info.text(facts)


@pytest.mark.parametrize(
    ("built", "torch_cuda", "cards", "said"),
    [
        ("", "13.0", [], "not built: that takes a torch for CUDA and nvcc"),
        ("90a", None, [], "torch was built without CUDA"),
        ("90a", "13.0", [], "torch sees no card"),
        ("90a", "13.0", [(8, 0), (8, 6)], "built for sm_90a, cards: sm_80, sm_86"),
        ("90a", "13.0", [(8, 0), (9, 0)], "available"),
    ],
)
def test_info_says_what_a_card_lacks(built, torch_cuda, cards, said, native, monkeypatch):
    monkeypatch.setattr(_cuda, "architectures", lambda: [f"sm_{built}"] if built else [])
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cards))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(_cuda, "_capability_of", lambda device: cards[device])
    assert said in info._backend("cuda")


def test_info_turns_an_error_into_a_sentence(monkeypatch):
    def broken() -> str:
        raise OSError("no such file")

    monkeypatch.setattr(info, "cpu_model", broken)
    assert info.collect()["cpu"]["model"] == "unknown: no such file"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--op", "gemm"], "--op must be of gram"),
        (["--dtype", "int8"], "--dtype must be of float64"),
        (["--threads", "0"], "--threads must be like 1,2"),
        (["--shape", "64x64"], "--shape needs --op"),
        (["--op", "gram", "--shape", "64"], "shape must be like"),
        (["--op", "inverse_root", "--shape", "64x32"], "square"),
        (["--op", "muon_step_", "--shape", "large-list"], "shape must be small-list"),
        (["--isa", "mmx"], "--isa must be one of baseline"),
        (["--peers", "soap"], "--peers takes name=folder"),
        (["--peers", "soap=/nowhere"], "there is no folder '/nowhere'"),
        (["--compare", "nowhere.json"], "nowhere.json"),
        (["--sweep", "-1"], "--sweep must be at least 1"),
    ],
)
def test_bench_refuses_what_makes_no_sense(arguments, sentence, capsys):
    pytest.importorskip("rich", reason="the extra 'cli' is not installed")
    assert cli.main(["bench", "--list", *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_bench_lists_its_cases(capsys):
    pytest.importorskip("rich", reason="the extra 'cli' is not installed")
    assert cli.main(["bench", "--list", "--acceptance", "--op", "gram"]) == 0
    assert capsys.readouterr().out.split("\n")[0] == "gram 768x3072 float32"


def test_missing_requirements_are_a_sentence(monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "rich" else found(name)
    )
    assert cli.main(["bench"]) == 2
    assert capsys.readouterr().err == (
        'spectral-kernels bench needs rich: pip install "spectral-kernels[cli]"\n'
    )


def test_isa_starts_again_with_torch_capped_the_same_way(monkeypatch):
    pytest.importorskip("rich", reason="the extra 'cli' is not installed")
    if _extension.MODULE is None:
        pytest.skip(_extension.REASON)
    started = []

    def execve(path: str, arguments: list[str], environment: dict[str, str]) -> None:
        started.append((path, arguments, environment))
        raise InterruptedError

    monkeypatch.setattr(os, "execve", execve)
    options = ["bench", "--isa", "baseline", "--op", "gram"]
    # An OSError of the options' stage ends the command.
    assert cli.main(options) == 2
    ((path, arguments, environment),) = started
    assert path == sys.executable
    assert arguments == [sys.executable, "-m", "spectral_kernels.cli", *options]
    assert environment["SPECTRAL_KERNELS_CPU_ISA"] == "baseline"
    assert environment["ATEN_CPU_CAPABILITY"] == "default"
    assert environment["ONEDNN_MAX_CPU_ISA"] == "SSE41"
