"""The command line: info, the options of bench, and run, which must not be noticed by a script."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from spectral_kernels import _extension, cli, info

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


def script(folder: Path, text: str) -> str:
    path = folder / "script.py"
    path.write_text(textwrap.dedent(text))
    return str(path)


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


def test_run_keeps_argv_main_and_exit_code(tmp_path):
    path = script(
        tmp_path,
        """
        import json, sys
        import beside
        class Local: pass
        print(json.dumps([sys.argv, __name__, Local.__module__, sys.path[0], beside.NAME]))
        sys.exit(7)
        """,
    )
    (tmp_path / "beside.py").write_text("NAME = 'neighbour'\n")
    said = command("run", path, "--report", "-m", "--op=x", "")
    assert said.returncode == 7, said.stderr
    argv, name, module, first, neighbour = json.loads(said.stdout)
    assert argv == [path, "--report", "-m", "--op=x", ""]
    assert (name, module, neighbour) == ("__main__", "__main__", "neighbour")
    assert first == str(tmp_path)


def test_run_swaps_before_the_script_begins(tmp_path):
    path = script(
        tmp_path,
        """
        import torch
        from spectral_kernels import call_counts
        weight = torch.nn.Parameter(torch.randn(8, 4))
        weight.grad = torch.randn(8, 4)
        torch.optim.Muon([weight]).step()
        assert call_counts(), "torch's own code ran"
        """,
    )
    said = command("run", path)
    assert said.returncode == 0, said.stderr


def test_run_shows_the_traceback_that_python_shows(tmp_path):
    path = script(
        tmp_path,
        """
        def inner():
            raise KeyError("lost")
        try:
            inner()
        except KeyError as error:
            raise RuntimeError("outer") from error
        """,
    )
    plain = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=60)
    said = command("run", path)
    assert said.returncode == plain.returncode == 1
    assert said.stderr == plain.stderr


def test_run_shows_a_syntax_error_as_python_does(tmp_path):
    path = script(tmp_path, "x = (\n")
    plain = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=60)
    said = command("run", path)
    assert said.returncode == plain.returncode == 1
    assert said.stderr == plain.stderr


def test_run_runs_a_module(tmp_path):
    (tmp_path / "train.py").write_text("import sys; print(__name__, sys.argv[1:])\n")
    said = subprocess.run(
        [sys.executable, "-m", "spectral_kernels.cli", "run", "-m", "train", "--steps", "3"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
    )
    assert said.stdout == "__main__ ['--steps', '3']\n", said.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"), [([], "which script?"), (["no.py"], "there is no script 'no.py'")]
)
def test_run_without_a_script(arguments, sentence, capsys):
    assert cli.main(["run", *arguments]) == 2
    assert sentence in capsys.readouterr().err
