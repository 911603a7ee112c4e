"""Builds spectral_kernels._C. pyproject.toml has the metadata."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils import cpp_extension
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ModuleNotFoundError:
    sys.exit(
        "spectral-kernels is compiled against the torch that will run it, and there is none here: "
        "pip and uv build in an isolated environment of their own, which has no torch even where "
        "yours has one. Install torch first, then without build isolation:\n"
        '    pip install ninja pybind11 "setuptools>=77" wheel\n'
        "    pip install --no-build-isolation ."
    )

ROOT = Path(__file__).parent.resolve()


# The oldest torch that what is built here runs with, and every later one: of torch only the stable
# interface of that version is used, which is C functions.
LEAST_TORCH = (2, 11)


# Programs that call the compiler which their arguments name.
LAUNCHERS = ("ccache", "sccache", "distcc", "icecc")


def compiler_found() -> bool:
    """Whether the C++ compiler that torch would call exists, and what CXX calls it by."""
    words = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    while len(words) > 1 and Path(words[0]).name in LAUNCHERS and shutil.which(words[0]):
        words = words[1:]
    return shutil.which(words[0]) is not None


# Machine code for these, and PTX of the first, which the driver compiles for any later processor
# that none of them runs on.
ARCHITECTURES = ("80", "86", "89", "90a", "100a", "120")


def toolkit() -> Path | None:
    """The CUDA toolkit: CUDA_HOME, or the folder that the nvcc on the PATH names itself."""
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=str(Path(home) / "bin") if home else None)
    if nvcc is None:
        return None
    said = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True
    ).stderr
    top = re.search(r"^#\$ TOP=(.*)$", said, re.MULTILINE)
    return Path(top[1].strip()).resolve() if top else Path(nvcc).resolve().parents[1]


# What torch calls architectures in TORCH_CUDA_ARCH_LIST, and the processors that have one name
# without the instructions that the kernels for them are made of.
FAMILIES = {
    **dict.fromkeys(("kepler", "kepler+tesla", "maxwell", "maxwell+tegra", "pascal"), "60"),
    **{"volta": "70", "volta+tegra": "72", "turing": "75", "ampere": "80 86"},
    **{"ampere+tegra": "87", "ada": "89", "hopper": "90a", "blackwell": "100a 120"},
    "blackwell+tegra": "110",
}
LEAST = 80


def architectures_wanted(listed: str) -> tuple[str, ...]:
    """Those of TORCH_CUDA_ARCH_LIST, as nvcc calls them."""
    if listed.strip() == "native":  # the cards of this machine
        cards = range(torch.cuda.device_count())
        numbers = {"".join(map(str, torch.cuda.get_device_capability(card))) for card in cards}
        own = {"90": "90a", "100": "100a"}
        return tuple(own.get(number, number) for number in sorted(numbers)) or ARCHITECTURES
    found: list[str] = []
    older = []
    for word in re.findall(r"[^\s,;]+", listed):
        name = word.lower().removesuffix("+ptx")
        number = re.fullmatch(r"(\d+)\.?(\d)([af]?)", name)
        if number is None and name not in FAMILIES:
            sys.exit(
                f"TORCH_CUDA_ARCH_LIST has {word!r}, which is no architecture such as 8.0, 9.0a, "
                "12.0+PTX or Ampere"
            )
        names = FAMILIES[name] if number is None else "".join(number.groups())
        for each in names.split():
            if int(each.rstrip("af")) < LEAST:
                older.append(word)
            elif each not in found:
                found.append(each)
    if "90" in found:
        sys.exit(
            "TORCH_CUDA_ARCH_LIST asks for 9.0, which lacks the instructions that the kernels for "
            "Hopper are made of: write 9.0a"
        )
    if older:
        print(f"spectral-kernels: no CUDA kernels for {', '.join(older)}: they need 8.0 or later.")
    return tuple(found)


def cuda_left_out(why: str) -> None:
    """Without the CUDA part, in one sentence."""
    if os.environ.get("SPECTRAL_KERNELS_CUDA") == "1":
        sys.exit(f"SPECTRAL_KERNELS_CUDA=1: {why}")
    print(
        f"spectral-kernels: {why}, so the CUDA part is not built; on a card the Triton kernels and "
        "the reference run."
    )


def release_of(nvcc: Path) -> tuple[int, int] | None:
    """What an nvcc says that it is."""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", said)
    return (int(found[1]), int(found[2])) if found else None


def cuda_wanted() -> Path | None:
    """The toolkit to build the CUDA part with, or None without it."""
    wish = os.environ.get("SPECTRAL_KERNELS_CUDA", "auto")
    if wish not in ("0", "1", "auto"):
        sys.exit(f"SPECTRAL_KERNELS_CUDA must be 0, 1 or auto, not {wish!r}")
    if wish == "0" or (wish == "auto" and torch.version.cuda is None):
        return None
    found = toolkit()
    if found is None:
        cuda_left_out("no nvcc under CUDA_HOME or on the PATH")
        return None
    release = release_of(found / "bin" / "nvcc")
    needed = tuple(map(int, (torch.version.cuda or "0.0").split(".")[:2]))
    if release is not None and release[0] != needed[0] and torch.version.cuda is not None:
        cuda_left_out(
            f"nvcc is of CUDA {release[0]}.{release[1]} and torch of {torch.version.cuda}, whose "
            "first numbers must agree"
        )
        return None
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if listed.strip() and not architectures_wanted(listed):
        cuda_left_out(f"TORCH_CUDA_ARCH_LIST={listed} names no architecture from 8.0 on")
        return None
    return found


def cuda_options(home: Path) -> dict:
    """Sources, flags and libraries of the CUDA part, with which a CPU torch can load it too."""
    # torch looks for a toolkit only if it was built for CUDA itself.
    cpp_extension.CUDA_HOME = str(home)
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    architectures = architectures_wanted(listed) if listed.strip() else ARCHITECTURES
    # Remarks of ptxas that have to stop the build. The compiler may have been chosen by the user.
    checked = [sys.executable, str(ROOT / "csrc" / "cuda" / "checked_nvcc.py")]
    compiler = os.environ.get("PYTORCH_NVCC") or shlex.quote(str(home / "bin" / "nvcc"))
    if checked[1] not in compiler:
        os.environ["PYTORCH_NVCC"] = f"{shlex.join(checked)} {compiler}"
    nvcc = ["-O3", "--threads=0", "-Xcompiler", "-fvisibility=hidden"]
    for name in architectures:
        nvcc.append(f"-gencode=arch=compute_{name},code=sm_{name}")
    first = architectures[0]
    nvcc.append(f"-gencode=arch=compute_{first},code=compute_{first}")
    folders = [home / "lib64", home / "lib", *home.glob("targets/*/lib")]
    listed = ",".join(architectures)
    cuda = ROOT / "csrc" / "cuda"
    return {
        "sources": sorted(str(p.relative_to(ROOT)) for p in cuda.glob("*/*.c*")),
        "nvcc": nvcc,
        "defines": [("SPECTRAL_KERNELS_CUDA_ARCHITECTURES", f'"{listed}"')],
        "library_dirs": [str(p) for p in folders if (p / "libcudart_static.a").exists()],
        "libraries": ["cudart_static", "rt", "dl", "pthread"],
        "description": f"for sm_{', sm_'.join(architectures)}",
    }


def pybind11_headers() -> list[str]:
    """Those of pybind11 itself, before torch's: 2.11's copy is closed to the stable interface."""
    try:
        import pybind11
    except ModuleNotFoundError:
        return []
    return [pybind11.get_include()]


def extensions() -> list:
    """The compiled part, or nothing where it cannot be compiled."""
    if sys.platform == "win32" or not compiler_found():
        print(
            "spectral-kernels: no C++ compiler, so only the Python part is installed; every "
            "function runs on the 'reference' backend, slowly."
        )
        return []
    sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("*.cpp"))
    sources += sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / "cpu").rglob("*.cpp"))
    headers = [str(p.relative_to(ROOT)) for s in ("*.h", "*.inl") for p in (ROOT / "csrc").rglob(s)]
    # Torch adds a -std of its own only where there is none, and 2.11 an older one. Contraction to
    # fused multiply-adds is what the micro-kernels are written for, and Python's -fwrapv keeps
    # loops from being vectorized. No -march, no -ffast-math: instruction sets are chosen at run
    # time.
    flags = [
        "-std=c++20",
        "-O3",
        "-g0",
        "-fopenmp",
        "-fvisibility=hidden",
        "-ffp-contract=fast",
        "-fno-wrapv",
    ]
    flags += ["-Wall", "-Wextra", "-Wno-unused-parameter"]
    home = cuda_wanted()
    cuda = cuda_options(home) if home else {"description": "not built"}
    sources += cuda.get("sources", [])
    print(f"spectral-kernels: {len(sources)} C++ files; CUDA: {cuda['description']}")
    if home:
        print(
            "spectral-kernels: some 3 minutes an architecture on two cores. "
            "TORCH_CUDA_ARCH_LIST=9.0a builds for one card, MAX_JOBS=8 eight files at a time, "
            "SPECTRAL_KERNELS_CUDA=0 without CUDA C++; pip -v shows the progress."
        )
    target = LEAST_TORCH[0] << 56 | LEAST_TORCH[1] << 48
    extension = CppExtension(
        "spectral_kernels._C",
        sources,
        depends=headers,
        include_dirs=pybind11_headers(),
        # Also keeps out those headers of torch that are not stable.
        define_macros=[("TORCH_TARGET_VERSION", hex(target)), *cuda.get("defines", [])],
        extra_compile_args={"cxx": flags, "nvcc": cuda.get("nvcc", [])},
        library_dirs=cuda.get("library_dirs", []),
        libraries=cuda.get("libraries", []),
        extra_link_args=["-fopenmp"],
    )
    unstable = {"c10", "torch", "torch_python", "c10_cuda", "torch_cuda"}
    extension.libraries = [name for name in extension.libraries if name not in unstable]
    return [extension]


modules = extensions()
setup(ext_modules=modules, cmdclass={"build_ext": BuildExtension} if modules else {})
