"""What a wheel is to keep, printed as a table; the exit status is 1 where it does not.

    python tools/wheel_check.py dist/*.whl --platform 2_28

Sizes, members, dependencies, and of the compiled part the libraries that it names, the newest
symbol versions that it needs of glibc and libstdc++, and how many C++ symbols of torch bind it to
one version of torch.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from pathlib import Path
from typing import NamedTuple

# Bytes of a wheel without, and with, kernels for cards.
MOST, MOST_WITH_CUDA = 3_000_000, 60_000_000
# PEP 600: what a manylinux platform has. GCC's versions of libstdc++ are those of its toolchain.
PLATFORMS = {
    "2_28": {"GLIBC": "2.28", "GLIBCXX": "3.4.24", "CXXABI": "1.3.11"},
    "2_34": {"GLIBC": "2.34", "GLIBCXX": "3.4.29", "CXXABI": "1.3.13"},
}
# Torch's has its stable interface; the others are on every Linux that torch runs on.
LIBRARIES = re.compile(r"lib(torch_cpu|gomp|stdc\+\+|gcc_s|c|m|dl|rt|pthread)\.so|ld-linux")
# A name of a class or function of torch's C++, which the next torch may not have.
CXX_OF_TORCH = re.compile(r"_Z\w*?(?:2at|3c10|5torch|6caffe2)\d")
_VERSION = re.compile(r"\((?:0x\w+ )?(GLIBC|GLIBCXX|CXXABI)_([\d.]+)\)")
_NEEDED = re.compile(r"^\s+NEEDED\s+(\S+)", re.MULTILINE)


class Finding(NamedTuple):
    """A line of the table."""

    what: str
    found: str
    wrong: bool = False


def findings(wheel: Path, platform: str | None = None) -> list[Finding]:
    """Everything that is looked at, of one wheel."""
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        names = archive.namelist()
        libraries = [name for name in names if name.endswith(".so")]
        for name in libraries:
            archive.extract(name, folder)
        compiled = [compiled_part(Path(folder, name), platform) for name in libraries]
        has_cuda = any(cuda for _, cuda in compiled)
        [metadata] = [name for name in names if name.endswith(".dist-info/METADATA")]
        described = archive.read(metadata).decode()
    size, most = wheel.stat().st_size, MOST_WITH_CUDA if has_cuda else MOST
    return [
        Finding("bytes", f"{size:,} of at most {most:,}", size > most),
        *members(names),
        *dependencies(described),
        *(each for found, _ in compiled for each in found),
    ]


def members(names: list[str]) -> Iterator[Finding]:
    """What lies in a wheel: the package alone, and of it code alone."""
    tools = {path.name for path in Path(__file__).parent.glob("*.py")}
    strange = [
        name
        for name in names
        if ".dist-info/" not in name
        and (
            not name.startswith("spectral_kernels/")
            or not name.endswith((".py", ".pyi", ".so", "py.typed"))
            or Path(name).name in tools
        )
    ]
    yield Finding("members", f"{len(names)}; strange: {strange or 'none'}", bool(strange))
    count = sum(name.endswith(".so") for name in names)
    yield Finding("compiled parts", str(count), count != 1)


def dependencies(metadata: str) -> Iterator[Finding]:
    """That torch alone is needed, from a version on that is said."""
    found = Parser().parsestr(metadata)
    needs = [each for each in found.get_all("Requires-Dist", []) if "extra ==" not in each]
    yield Finding("needs", ", ".join(needs), [each[:7] for each in needs] != ["torch>="])
    for field in ("Requires-Python", "License-Expression", "Description-Content-Type"):
        yield Finding(field, str(found[field]), not found[field])


def compiled_part(library: Path, platform: str | None) -> tuple[list[Finding], bool]:
    """Of a library what it needs, and whether it has kernels for cards."""
    private, symbols, sections = (
        subprocess.run(
            ["objdump", how, str(library)], capture_output=True, text=True, check=True
        ).stdout
        for how in ("-p", "-T", "-h")
    )
    needed = _NEEDED.findall(private)
    foreign = [name for name in needed if not LIBRARIES.match(name)]
    found = [Finding("libraries", f"{len(needed)}; foreign: {foreign or 'none'}", bool(foreign))]
    found += versions(symbols, platform)
    undefined = [line for line in symbols.splitlines() if "*UND*" in line]
    torch = [name for name in map(_last_word, undefined) if CXX_OF_TORCH.match(name)]
    text = f"{len(torch)}: {', '.join(torch[:3])}" if torch else "none"
    found.append(Finding("C++ symbols of torch", text, bool(torch)))
    return found, ".nv_fatbin" in sections


def _last_word(line: str) -> str:
    return line.split()[-1]


def versions(symbols: str, platform: str | None) -> Iterator[Finding]:
    """The newest version of every library that symbols need, against what a platform has."""
    newest: dict[str, tuple[int, ...]] = {}
    for name, version in _VERSION.findall(symbols):
        number = tuple(map(int, version.split(".")))
        newest[name] = max(newest.get(name, ()), number)
    for name, number in sorted(newest.items()):
        limit = PLATFORMS[platform][name] if platform else ""
        beyond = platform is not None and number > tuple(map(int, limit.split(".")))
        most = f" of at most {limit}" if limit else ""
        yield Finding(name, ".".join(map(str, number)) + most, beyond)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheels", nargs="+", type=Path)
    parser.add_argument(
        "--platform", choices=PLATFORMS, help="symbols may be as new as manylinux's of that glibc"
    )
    options = parser.parse_args()
    wrong = False
    for wheel in options.wheels:
        print(wheel.name)
        for each in findings(wheel, options.platform):
            wrong |= each.wrong
            print(f"  {'WRONG ' if each.wrong else ''}{each.what}: {each.found}")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
