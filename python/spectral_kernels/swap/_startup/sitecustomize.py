"""Start-up of every Python process at or below `spectral-kernels run`: swaps once torch is there.

`run` puts this folder at the head of PYTHONPATH, so that Python imports this module before any
program: before the script, and before every Python process that the script starts, in whatever way.
The process is then as it would have been, but for one hook that waits for torch.

It may meet any interpreter, also one without this library, and programs whose own modules are
called like some of the standard library. So little is imported, and nothing of the library.
"""

import os
import sys
from importlib import import_module
from importlib.machinery import SourceFileLoader

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType

_FOLDER = os.path.dirname(os.path.abspath(__file__))
# `<process id of the script>:<folder for reports, or nothing>`, set by `spectral-kernels run`.
_VARIABLE = "SPECTRAL_KERNELS_RUN"


def _neighbour(name: str) -> "ModuleType":
    """A file of `spectral_kernels.swap`, loaded without the package, which would import torch."""
    full = f"spectral_kernels_startup.{name}"
    module = type(sys)(full)
    sys.modules[full] = module
    try:
        SourceFileLoader(full, os.path.join(os.path.dirname(_FOLDER), f"{name}.py")).exec_module(
            module
        )
    finally:
        del sys.modules[full]
    return module


def _install(script: int, folder: str) -> None:
    def imported(module: "ModuleType") -> None:
        if module.__name__ == "torch" and "spectral_kernels" in sys.modules:
            return  # It imports torch just now, and is told of when it is complete itself.
        hook.remove()
        try:
            begin = import_module("spectral_kernels.swap._run").begin
        except ImportError as error:
            print(
                f"spectral-kernels run: optimizers keep their own code in process {os.getpid()} "
                f"({sys.executable}): {error}",
                file=sys.stderr,
            )
            return
        begin(script, folder)

    hook = _neighbour("_imports").ImportHook(
        lambda name: name in ("torch", "spectral_kernels"), imported
    )
    hook.install()


def _report_at_exit(script: int, folder: str) -> None:
    """Registered before anything else, so that it comes last and all children have ended."""
    import atexit

    def tell() -> None:
        if os.getpid() == script:
            print(_neighbour("_report").collected(folder), file=sys.stderr)

    atexit.register(tell)


def _begin() -> None:
    script, _, folder = os.environ.get(_VARIABLE, "").partition(":")
    if not script:
        return
    _install(int(script), folder)
    if folder and os.getpid() == int(script):
        _report_at_exit(int(script), folder)


def _run_hidden() -> None:
    """The `sitecustomize` that Python would have found without this folder."""
    sys.path[:] = [place for place in sys.path if os.path.abspath(place or ".") != _FOLDER]
    ours = sys.modules.pop(__name__)
    try:
        import_module("sitecustomize")
    except ModuleNotFoundError as error:
        if error.name != "sitecustomize":
            raise
    finally:
        sys.modules.setdefault(__name__, ours)


if __name__ == "sitecustomize":
    _begin()
    _run_hidden()
