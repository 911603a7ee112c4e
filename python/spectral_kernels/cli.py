"""The command `spectral-kernels`: info, bench, demo, run. Nothing imports this module."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

__all__ = ["main"]

_EXTRA = ("rich", "matplotlib", "numpy")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments; None: those of the process.

    Returns:
        The exit status: 0, 1 where a benchmark broke the accuracy rule or could not run, 2 for
        arguments that make no sense.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(arguments)
    if options.command == "info":
        info = importlib.import_module("spectral_kernels.info")
        return info.main(["--json"] if options.json else [])
    if options.command == "run":
        return _run(options.target, module=options.module, report=options.report)
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

    bench = commands.add_parser("bench", help="measure every family against its peers")
    what = bench.add_mutually_exclusive_group()
    what.add_argument("--quick", action="store_true", help="a few shapes, a minute or so")
    what.add_argument("--acceptance", action="store_true", help="the cases that have goals")
    what.add_argument("--sweep", type=int, metavar="N", help="N generated shapes an operator")
    what.add_argument(
        "--growth",
        type=int,
        nargs="?",
        const=2048,
        metavar="N",
        help="time against n up to N (2048 if not given; 4096 takes long), batch and threads",
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
    bench.add_argument(
        "--peers",
        nargs="+",
        default=[],
        metavar="NAME=FOLDER",
        help="where checkouts of public peers lie; 'none': torch only",
    )
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
        "target", nargs=argparse.REMAINDER, metavar="script.py ...", help="with its arguments"
    )
    return parser


def _run(target: list[str], *, module: bool, report: bool) -> int:
    """The script as `python script.py ...` would run it, but for the kernels."""
    if not target:
        print("spectral-kernels run: which script?", file=sys.stderr)
        return 2
    name = target[0]
    if not module and not Path(name).exists():
        print(f"spectral-kernels run: there is no script {name!r}", file=sys.stderr)
        return 2
    swap = importlib.import_module("spectral_kernels.swap")
    swap.swap_in(report=report)
    sys.argv[:] = target
    sys.excepthook = _without_our_frames
    if module:
        sys.path[0] = str(Path.cwd())
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(name).resolve().parent)
        runpy.run_path(name, run_name="__main__")
    return 0


def _without_our_frames(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """Shows a script's error as if nobody had run the script for it."""
    frame = traceback
    while frame is not None and frame.tb_frame.f_code is not _run.__code__:
        frame = frame.tb_next
    script = frame.tb_next if frame is not None else traceback
    while script is not None and script.tb_frame.f_globals.get("__name__") == "runpy":
        script = script.tb_next
    sys.__excepthook__(kind, error.with_traceback(script), script)


if __name__ == "__main__":
    sys.exit(main())
