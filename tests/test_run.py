"""`spectral-kernels run`: a script must not notice it, and every process below it is swapped."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from spectral_kernels import cli
from spectral_kernels.swap import _report

# A loaded machine imports torch in twenty seconds, and some scripts have six processes.
LIMIT = 300


def script(folder: Path, text: str, name: str = "script.py") -> str:
    path = folder / name
    path.write_text(textwrap.dedent(text))
    return str(path)


def under(
    command: list[str], *arguments: str, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command, *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        timeout=LIMIT,
        # A shell's background jobs ignore interrupts, and would hand that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def run(*arguments: str, cwd: Path | None = None, **environment: str):
    return under(["-m", "spectral_kernels.cli", "run"], *arguments, cwd=cwd, **environment)


def started(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """What `run` becomes, without the second that it takes to get there."""
    return under([], *arguments, cwd=cwd, **cli.startup_environment(0))


def same_as_python(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs it both ways; output, errors and status are those that Python gives."""
    plain = under([], *arguments, cwd=cwd)
    ours = started(*arguments, cwd=cwd)
    assert (ours.returncode, ours.stdout, ours.stderr) == (
        plain.returncode,
        plain.stdout,
        plain.stderr,
    )
    return ours


# What a script can see of the way it was started. The environment differs in two variables.
LOOK = """
    import atexit, inspect, os, pickle, sys
    import beside

    class Local:
        pass

    atexit.register(print, "last")
    atexit.register(print, "first")
    print(sys.argv, __name__, __file__, __spec__ and __spec__.name, __package__, __loader__)
    print(sys.path, sys.flags, sys.warnoptions, sys._xoptions, beside.NAME)
    print(Local.__module__, type(pickle.loads(pickle.dumps(Local()))) is Local)
    print(inspect.getsource(Local), sys.modules["__main__"].Local is Local)
    print(sorted(set(sys.modules) - {"sitecustomize"}), sys.excepthook is sys.__excepthook__)
    ours = ("PYTHONPATH", "SPECTRAL_KERNELS_RUN")
    print(sorted((k, v) for k, v in os.environ.items() if k not in ours))
    print([finder for finder in sys.meta_path if type(finder).__name__ != "ImportHook"])
    sys.exit(3)
"""


def without_addresses(text: str) -> str:
    return re.sub(r"0x[0-9a-f]+", "", text)


def test_a_script_sees_what_it_sees_under_python(tmp_path):
    path = script(tmp_path, LOOK)
    script(tmp_path, "NAME = 'neighbour'\n", "beside.py")
    arguments = ["--", path, "--report", "-m", "--op=x", "", "--", "-"]
    plain, ours = under([], *arguments[1:]), run(*arguments)
    assert ours.returncode == plain.returncode == 3, ours.stderr
    expected = without_addresses(plain.stdout).splitlines()
    assert without_addresses(ours.stdout).splitlines() == expected
    assert expected[-2:] == ["first", "last"]


def test_a_module_and_pythons_own_options(tmp_path):
    script(tmp_path, LOOK, "train.py")
    script(tmp_path, "NAME = 'neighbour'\n", "beside.py")
    options = ["-O", "-X", "dev", "-W", "ignore::ImportWarning"]
    plain = under([*options, "-m", "train"], "--steps", "3", cwd=tmp_path)
    ours = under(
        [*options, "-m", "spectral_kernels.cli", "run", "-m", "train"], "--steps", "3", cwd=tmp_path
    )
    assert ours.returncode == plain.returncode == 3, ours.stderr
    assert without_addresses(ours.stdout) == without_addresses(plain.stdout)


@pytest.mark.parametrize(
    "text",
    [
        """
        def inner():
            raise KeyError("lost")
        try:
            inner()
        except KeyError as error:
            raise RuntimeError("outer") from error
        """,
        "x = (\n",
        "raise SystemExit('a sentence')",
        "import nowhere",
    ],
    ids=["exception", "syntax", "exit with a sentence", "import"],
)
def test_errors_are_shown_as_python_shows_them(text, tmp_path):
    assert same_as_python(script(tmp_path, text)).returncode == 1


def test_an_interrupt_reaches_the_script(tmp_path):
    path = script(
        tmp_path,
        """
        import os, signal, sys
        try:
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        os.kill(os.getpid(), signal.SIGINT)
        """,
    )
    assert same_as_python(path).returncode == -signal.SIGINT


def test_the_hidden_sitecustomize_runs(tmp_path):
    script(tmp_path, "import sys; sys.hidden = __file__", "sitecustomize.py")
    path = script(tmp_path, "import sys, sitecustomize; print(sys.hidden, sitecustomize.__file__)")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        said = started(path)
    expected = str(tmp_path / "sitecustomize.py")
    assert said.stdout.split() == [expected, expected], said.stderr


@pytest.mark.parametrize("first", ["import torch", "import spectral_kernels", "import torch.optim"])
def test_the_swap_is_there_when_torch_is(first, tmp_path):
    path = script(
        tmp_path,
        f"""
        {first}
        import sys
        import torch
        import spectral_kernels
        assert hasattr(torch.optim._muon._single_tensor_muon, "__wrapped__")
        assert type(torch.__loader__).__module__.startswith("_frozen_importlib")
        assert torch.__spec__.loader is torch.__loader__
        """,
    )
    said = started(path)
    assert (said.returncode, said.stderr) == (0, "")


def test_what_python_would_not_swap_is_refused(tmp_path):
    path = script(tmp_path, "print('ran')")
    said = under(["-E", "-m", "spectral_kernels.cli"], "run", path)
    assert (said.returncode, said.stdout) == (2, "")
    assert "Python runs with -E, -I or -S" in said.stderr


def test_another_python_says_that_it_keeps_its_own_code(tmp_path):
    """A package called torch, in an interpreter without this library, stands for that."""
    script(tmp_path, "", "torch.py")
    path = script(
        tmp_path,
        """
        import subprocess, sys
        code = "import sys; sys.path.insert(0, sys.argv[1]); import torch; print(torch.__file__)"
        folder = __file__.rpartition("/")[0]
        # The interpreter below the virtual environment knows nothing that is installed in it.
        import os
        path = os.environ["PYTHONPATH"].split(os.pathsep)[0]
        subprocess.run(
            [os.path.realpath(sys.executable), "-s", "-c", code, folder],
            env=os.environ | {"PYTHONPATH": path},
            check=True,
        )
        """,
    )
    base = under([], "-c", "import os, sys; print(os.path.realpath(sys.executable))").stdout.strip()
    has = subprocess.run([base, "-s", "-c", "import spectral_kernels"], capture_output=True)
    if has.returncode == 0:
        pytest.skip("the interpreter below has the library too")
    said = started(path)
    assert said.returncode == 0, said.stderr
    assert said.stdout.strip() == str(tmp_path / "torch.py")
    assert "optimizers keep their own code in process" in said.stderr
    assert "No module named 'spectral_kernels'" in said.stderr


STEPS = """
    import multiprocessing
    import torch

    torch.set_num_threads(1)

    class Local:
        pass

    class Data(torch.utils.data.Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, i):
            return float(hasattr(torch.optim._muon._single_tensor_muon, "__wrapped__"))

    def steps(count):
        weight = torch.nn.Parameter(torch.randn(8, 4))
        weight.grad = torch.randn(8, 4)
        optimizer = torch.optim.Muon([weight])
        for _ in range(count):
            optimizer.step()

    def worker(local, count):
        torch.set_num_threads(1)
        steps(count)
        return type(local).__module__

    def rank(index):
        steps(3 + index)
"""


def calls(said: subprocess.CompletedProcess[str]) -> tuple[int, list[int]]:
    """Of torch.optim.Muon, in all and by process, as the report says."""
    ((total, split),) = re.findall(r"_single_tensor_muon: (\d+) calls(?: \((.*?)\))?", said.stderr)
    return int(total), sorted(int(part.split(" in ")[0]) for part in split.split(", ") if part)


def test_workers_of_every_kind_are_swapped_and_counted(tmp_path):
    path = script(
        tmp_path,
        STEPS
        + """
    if __name__ == "__main__":
        steps(1)
        for method, count in (("fork", 2), ("spawn", 3), ("forkserver", 4)):
            with multiprocessing.get_context(method).Pool(1) as pool:
                print(pool.starmap(worker, [(Local(), count)]))
                pool.close()
                pool.join()
        loader = torch.utils.data.DataLoader(Data(), num_workers=2, multiprocessing_context="spawn")
        print([float(batch) for batch in loader])
    """,
    )
    said = run("--report", path)
    assert said.returncode == 0, said.stderr
    lines = said.stdout.splitlines()
    # As under Python, spawned workers find the script's classes in its second import.
    assert lines[:3] == ["['__main__']", "['__mp_main__']", "['__mp_main__']"]
    assert lines[3] == "[1.0, 1.0]"
    assert calls(said) == (10, [1, 2, 3, 4])


@pytest.mark.long
def test_ranks_of_torch_spawn_are_swapped_and_counted(tmp_path):
    path = script(
        tmp_path,
        STEPS
        + """
    if __name__ == "__main__":
        torch.multiprocessing.spawn(rank, nprocs=2)
    """,
    )
    said = run("--report", path)
    assert said.returncode == 0, said.stderr
    assert calls(said) == (7, [3, 4])


@pytest.mark.long
def test_ranks_of_torchrun_are_swapped_and_counted(tmp_path):
    path = script(
        tmp_path,
        STEPS
        + """
    torch.distributed.init_process_group("gloo")
    steps(3 + torch.distributed.get_rank())
    torch.distributed.destroy_process_group()
    """,
    )
    said = run(
        "--report",
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", path),
    )
    assert said.returncode == 0, said.stderr
    assert calls(said) == (7, [3, 4])


def test_a_process_without_a_report_is_named(tmp_path):
    path = script(
        tmp_path,
        """
        import os, subprocess, sys
        if len(sys.argv) == 1:
            subprocess.run([sys.executable, __file__, "child"])
        else:
            import torch
            os._exit(0)
        """,
    )
    said = run("--report", path)
    assert said.returncode == 0
    assert re.search(r"process \d+ ended without a report: its calls are not counted", said.stderr)


def test_a_report_of_nothing(tmp_path):
    said = run("--report", script(tmp_path, "print('no optimizer')"))
    assert said.stdout == "no optimizer\n"
    assert said.stderr == "swap_in:\n  nothing replaced\n  no process imported torch\n"


def test_reports_add_up(tmp_path):
    """Calls and seconds are summed, reasons too; waiting is what waits everywhere."""
    one = _report.Report(
        {"m": {"f": _report.Tally(2, {"2-D": 1}, 0.5)}}, {}, ["a", "b"], {"x": "why"}, 1.0
    )
    two = _report.Report(
        {"m": {"f": _report.Tally(3, {"2-D": 2}, 0.25), "g": _report.Tally(1, {}, 0.0)}},
        {"n": {"h": _report.Tally(0, {}, None)}},
        ["b", "c"],
        {},
        None,
    )
    for name, report in (("1", one), ("2", two)):
        _report.written(report, tmp_path / f"{name}.json", f"process {name}")
    _report.written(None, tmp_path / "3.json", "process 3")
    sum_ = _report.total(tmp_path)
    assert str(sum_) == textwrap.dedent(
        """\
        swap_in:
          replaced in m:
            f: 5 calls (2 in process 1, 3 in process 2), 0.75 s, 3 left as they were (2-D: 3)
            g: 1 call, 0 s
          replaced for a while in n:
            h: 0 calls
          waiting for b, not imported yet
          refused x: why
          saved 1 s, by timing the originals on copies
          process 3 ended without a report: its calls are not counted"""
    )
    assert json.loads((tmp_path / "1.json").read_text())["process"] == "process 1"
    assert _report.since(two, two).calls == 0
    assert (
        str(_report.since(two, one).replaced["m"]["f"])
        == "1 call, -0.25 s, 1 left as they were (2-D: 1)"
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [([], "which script?"), (["--"], "which script?"), (["no.py"], "there is no script 'no.py'")],
)
def test_run_without_a_script(arguments, sentence, capsys):
    assert cli.main(["run", *arguments]) == 2
    assert sentence in capsys.readouterr().err
