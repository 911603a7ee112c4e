"""Puts known bugs into a copy of the sources, one at a time, and sees whether the tests notice.

    python tests/mutations/run.py [--only WORDS] [--kind python|c++] [--seconds 300] [--out FILE]

Nothing in the checkout is written but FILE, which keeps the results of bugs that were not tried.
For C++ the checkout's own build folder (`make setup`, or any `build_ext --inplace`) is needed: what
includes the changed file is compiled anew, the rest linked as it is.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spectral_kernels import _records

ROOT = Path(__file__).resolve().parents[2]
LIST = Path(__file__).with_name("mutations.toml")
RESULTS = Path(__file__).with_name("results.json")
# What the package is made of, as pyproject.toml maps it.
_PARTS = {
    "python/spectral_kernels": "spectral_kernels",
    "triton_kernels": "spectral_kernels/triton_kernels",
    "benchmarks": "spectral_kernels/benchmarks",
}


def mutations() -> list[dict[str, str]]:
    """The list."""
    found: list[dict[str, str]] = tomllib.loads(LIST.read_text())["mutation"]
    return found


def is_cpp(mutation: dict[str, str]) -> bool:
    return mutation["file"].startswith("csrc/")


def mutated(mutation: dict[str, str], text: str) -> str:
    """The file with the bug.

    Raises:
        ValueError: the old text does not occur exactly once.
    """
    count = text.count(mutation["old"])
    if count != 1:
        raise ValueError(f"{mutation['name']}: its text occurs {count} times in {mutation['file']}")
    return text.replace(mutation["old"], mutation["new"])


@contextlib.contextmanager
def copy_of_the_sources() -> Iterator[Path]:
    """A folder with the tests, and the package under `site`."""
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        copy = Path(folder)
        for name in ("csrc", "tests", "docs", "examples", "tools"):
            shutil.copytree(ROOT / name, copy / name, ignore=ignored)
        for pattern in ("*.md", "*.yml", "pyproject.toml", "Makefile", "setup.py"):
            for path in ROOT.glob(pattern):
                shutil.copy(path, copy / path.name)
        for source, place in _PARTS.items():
            shutil.copytree(ROOT / source, copy / "site" / place, ignore=ignored)
            target = copy / source
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(copy / "site" / place)
        yield copy


def apply(mutation: dict[str, str], copy: Path) -> None:
    path = copy / mutation["file"]
    path.write_text(mutated(mutation, path.read_text()))


# C++.


def rebuild(mutation: dict[str, str], copy: Path) -> None:
    """Compiles what includes the changed file and links it with the checkout's other objects."""
    ninja = next(iter(sorted((ROOT / "build").glob("temp*/build.ninja"))), None)
    if ninja is None:
        raise SystemExit("there is no build folder: python setup.py build_ext --inplace")
    if ": cuda_compile " in ninja.read_text():
        raise SystemExit(
            "the build folder is of an extension with CUDA kernels, which are not linked here: "
            "build it again with SPECTRAL_KERNELS_CUDA=0 python setup.py build_ext --inplace"
        )
    changed = str(ROOT / mutation["file"])
    objects = []
    for obj, source in _edges(ninja):
        if source == changed or changed in _dependencies(ninja.parent, obj):
            fresh = copy / (Path(obj).name + ".mutated.o")
            _compile(ninja, source, copy, fresh)
            objects.append(str(fresh))
        else:
            objects.append(obj)
    import torch

    libraries = Path(torch.__file__).parent / "lib"
    module = next((ROOT / "python" / "spectral_kernels").glob("_C*.so"))
    command = ["c++", "-shared", "-fopenmp", *objects, f"-L{libraries}"]
    command += ["-ltorch_cpu"]
    subprocess.run(
        [*command, "-o", str(copy / "site" / "spectral_kernels" / module.name)], check=True
    )


def _edges(ninja: Path) -> list[tuple[str, str]]:
    """Objects and their sources."""
    lines = re.findall(r"^build (\S+): compile (\S+)$", ninja.read_text(), re.MULTILINE)
    return [(str(obj), str(source)) for obj, source in lines]


def _dependencies(folder: Path, obj: str) -> str:
    asked = subprocess.run(
        [Path(sysconfig.get_path("scripts")) / "ninja", "-t", "deps", obj],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    return "\n".join(
        str(Path(os.path.normpath(folder / line.strip()))) for line in asked.stdout.splitlines()[1:]
    )


def _compile(ninja: Path, source: str, copy: Path, to: Path) -> None:
    """As the checkout compiles it, without optimizing: bugs show at any level."""
    text = ninja.read_text()
    flags = []
    for name in ("cflags", "post_cflags"):
        found = re.search(rf"^{name} = (.*)$", text, re.MULTILINE)
        flags += shlex.split(found[1]) if found else []
    place = copy / Path(source).relative_to(ROOT)
    subprocess.run(["c++", *flags, "-O1", "-c", str(place), "-o", str(to)], check=True)


# Running.


def verdict(mutation: dict[str, str], seconds: float) -> dict[str, Any]:
    """Whether a test noticed, and which."""
    with copy_of_the_sources() as copy:
        apply(mutation, copy)
        if is_cpp(mutation):
            rebuild(mutation, copy)
        begun = time.perf_counter()
        command = [sys.executable, "-P", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        command += ["-m", "not long", *mutation["tests"].split()]
        if "select" in mutation:
            command += ["-k", mutation["select"]]
        environment = {**os.environ, "PYTHONPATH": str(copy / "site")}
        try:
            done = subprocess.run(
                command, cwd=copy, env=environment, capture_output=True, text=True, timeout=seconds
            )
        except subprocess.TimeoutExpired:
            return {"outcome": "no verdict", "by": f"over {seconds:.0f} s"}
        took = round(time.perf_counter() - begun, 1)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if done.returncode == 0:
        return {"outcome": "survived", "by": "", "seconds": took}
    if done.returncode < 0:
        return {"outcome": "killed", "by": f"signal {-done.returncode}", "seconds": took}
    if done.returncode == 1 and lines:
        return {"outcome": "killed", "by": lines[0].split(" - ")[0], "seconds": took}
    # No test ran, or pytest itself did not: nothing is known.
    raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="bugs whose name or file has this in it")
    parser.add_argument("--kind", choices=("python", "c++"))
    parser.add_argument("--missing", action="store_true", help="those without a result only")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    record = json.loads(options.out.read_text()) if options.out.exists() else {}
    results: dict[str, Any] = record.get("results", {})
    names = {mutation["name"] for mutation in mutations()}
    results = {name: result for name, result in results.items() if name in names}
    for mutation in mutations():
        name = mutation["name"]
        if options.only not in name + mutation["file"] or (options.missing and name in results):
            continue
        if options.kind and is_cpp(mutation) != (options.kind == "c++"):
            continue
        results[name] = {"file": mutation["file"], **verdict(mutation, options.seconds)}
        print(f"{results[name]['outcome']}: {name} ({results[name]['by']})", flush=True)
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        options.out.write_text(_records.text({"date": date, "results": results}))
    decided = [result["outcome"] for result in results.values()]
    decided = [outcome for outcome in decided if outcome != "no verdict"]
    killed = decided.count("killed")
    print(f"{killed} of {len(decided)} are killed; {len(names)} in the list")
    return 0 if killed >= 0.95 * len(decided) else 1


if __name__ == "__main__":
    sys.exit(main())
