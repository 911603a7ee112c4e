"""The command `spectral-kernels`: info, doctor, bench, demo, run. Nothing imports this module."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

__all__ = ["main"]

_EXTRA = ("rich", "matplotlib", "numpy")
# Holds the `sitecustomize` of the processes that `run` starts.
_STARTUP = Path(__file__).parent / "swap" / "_startup"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments; None: those of the process.

    Returns:
        The exit status: 0, 1 where a benchmark broke the accuracy rule or could not run or the
        doctor found something, 2 for arguments that make no sense.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(arguments)
    if options.command == "info":
        info = importlib.import_module("spectral_kernels.info")
        return info.main(["--json"] if options.json else [])
    if options.command == "run":
        return _run(options)
    if options.command == "doctor":
        return importlib.import_module("spectral_kernels.doctor").main(options, arguments)
    missing = [name for name in _EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"spectral-kernels {options.command} needs {' and '.join(missing)}: "
            'pip install "spectral-kernels[cli]"',
            file=sys.stderr,
        )
        return 2
    # By name, and only now: these modules need the extra's packages.
    command = importlib.import_module(f"spectral_kernels.benchmarks.{options.command}")
    return command.main(options, arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="spectral-kernels", description="Kernels for Muon, Shampoo, SOAP and DeVA."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    info = commands.add_parser("info", help="what is installed, what runs here and why")
    info.add_argument("--json", action="store_true", help="print JSON")

    doctor = commands.add_parser("doctor", help="try here what can go wrong, and give a verdict")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.add_argument("--quick", action="store_true", help="fewer processes, one instruction set")
    doctor.add_argument(
        "--impl",
        default="ours",
        metavar="NAMES",
        help="whose optimizers, by comma: ours, torch, soap, deva, distributed-shampoo, heavyball, "
        "pytorch-optimizer",
    )
    _add_peers(doctor)

    bench = commands.add_parser("bench", help="measure every family against its peers")
    what = bench.add_mutually_exclusive_group()
    what.add_argument("--quick", action="store_true", help="a few shapes, a minute or so")
    what.add_argument("--acceptance", action="store_true", help="the cases that have goals")
    what.add_argument("--sweep", type=int, metavar="N", help="N generated shapes an operator")
    what.add_argument(
        "--scaling",
        "--growth",
        dest="scaling",
        type=int,
        nargs="?",
        const=2048,
        metavar="N",
        help="time against n up to N (2048 if not given; 4096 takes long), batch and threads",
    )
    bench.add_argument(
        "--ranks",
        metavar="N,N",
        help="optimizers spread over so many processes, 1,2,4 say: predicted and measured steps, "
        "then costs on paper of cards; with --quick fewer rounds of each",
    )
    bench.add_argument("--list", action="store_true", help="name the cases and stop")
    bench.add_argument("--op", help="operators, by comma: gram,newton_schulz")
    bench.add_argument("--shape", help="shapes for --op, by comma: 768x3072,64x128x128")
    bench.add_argument("--dtype", help="float32,bfloat16,float16,float64")
    bench.add_argument("--threads", help="thread counts, by comma (default: torch's)")
    bench.add_argument(
        "--isa",
        help="cap torch and us: baseline, avx2, avx512, avx512bf16 or amx; several, by comma, or "
        "'all' of them go one after another into one result file",
    )
    _add_peers(bench)
    bench.add_argument("--json", metavar="FILE", help="the result file (default: ./results)")
    # One set of several: its rows are written for the command that started this one.
    bench.add_argument("--part", action="store_true", help=argparse.SUPPRESS)
    bench.add_argument("--compare", metavar="FILE", help="an older result file to compare with")

    demo = commands.add_parser("demo", help="microbenchmarks, then a small real training")
    demo.add_argument("--steps", type=int, default=300, help="training steps of a run")
    demo.add_argument("--output", default="results", help="folder for plots and JSON")

    run = commands.add_parser("run", help="run a training script with our kernels swapped in")
    run.add_argument("-m", dest="module", action="store_true", help="TARGET is a module")
    run.add_argument("--report", action="store_true", help="say at exit what was replaced")
    run.add_argument(
        "--function",
        action="append",
        default=[],
        metavar="NAME",
        help="also replace this function, of the script or as module.name, if it is a "
        "Newton-Schulz iteration; may be given again",
    )
    run.add_argument(
        "target", nargs=argparse.REMAINDER, metavar="script.py ...", help="with its arguments"
    )
    return parser


def _add_peers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--peers",
        nargs="+",
        default=[],
        metavar="NAME=FOLDER",
        help="where checkouts of public peers lie; 'none': torch only",
    )


def _run(options: argparse.Namespace) -> int:
    """Becomes `python script.py ...`, which swaps at its start, as do the processes it starts.

    The process itself goes on as that Python, so that signals, terminal and exit status are its
    own; nothing of this program is left in it.
    """
    target, module = options.target, options.module
    if target[:1] == ["--"]:
        target = target[1:]
    if not target:
        print("spectral-kernels run: which script?", file=sys.stderr)
        return 2
    name = target[0]
    if not module and name != "-" and not Path(name).exists():
        print(f"spectral-kernels run: there is no script {name!r}", file=sys.stderr)
        return 2
    obstacle = _obstacle()
    if obstacle is not None:
        print(
            f"spectral-kernels run: the swap cannot reach the script: {obstacle}", file=sys.stderr
        )
        return 2
    wrong = [name for name in options.function if not name.replace(".", "_").isidentifier()]
    if wrong:
        print(f"spectral-kernels run: {wrong[0]!r} names no function", file=sys.stderr)
        return 2
    folder = tempfile.mkdtemp(prefix="spectral-kernels-") if options.report else ""
    environment = os.environ | startup_environment(os.getpid(), folder, options.function)
    arguments = [*_python_options(), *(["-m"] if module else []), *target]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *arguments], environment)


def startup_environment(
    script: int, reports: str = "", functions: Sequence[str] = ()
) -> dict[str, str]:
    """The variables with which a Python process, and those that it starts, swap at their start.

    Args:
        script: the process id of the script.
        reports: the folder where all processes leave their reports; empty: none is asked for.
        functions: names of functions to replace, too.
    """
    path = [str(_STARTUP), *filter(None, [os.environ.get("PYTHONPATH")])]
    found = {"PYTHONPATH": os.pathsep.join(path), "SPECTRAL_KERNELS_RUN": f"{script}:{reports}"}
    if functions:
        found["SPECTRAL_KERNELS_RUN_FUNCTIONS"] = ",".join(functions)
    return found


def _obstacle() -> str | None:
    """Why Python would not import `sitecustomize` from PYTHONPATH, or None."""
    if sys.flags.ignore_environment or sys.flags.no_site:
        return "Python runs with -E, -I or -S"
    if os.pathsep in str(_STARTUP):
        return f"PYTHONPATH cannot name {str(_STARTUP)!r}"
    return None


def _python_options() -> list[str]:
    """Python's own options in front of this program, such as -O, -u, -W and -X."""
    before = sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv) + 1]
    program = 2 if before[-2:-1] in (["-m"], ["-c"]) else 1
    return before[:-program]


if __name__ == "__main__":
    sys.exit(main())
