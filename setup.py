"""Builds spectral_kernels._C. pyproject.toml has the metadata."""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ModuleNotFoundError:
    sys.exit(
        "spectral-kernels is compiled against the torch that will run it: install torch first,\n"
        '    pip install ninja pybind11 "setuptools>=77" wheel\n'
        "    pip install --no-build-isolation ."
    )

ROOT = Path(__file__).parent.resolve()


def compiler_found() -> bool:
    """Whether the C++ compiler that torch would call exists."""
    return shutil.which(os.environ.get("CXX", "c++")) is not None


def extensions() -> list:
    """The compiled part, or nothing where it cannot be compiled."""
    if os.environ.get("SPECTRAL_KERNELS_CUDA", "auto") == "1":
        sys.exit("SPECTRAL_KERNELS_CUDA=1: this version has no CUDA C++ kernels yet")
    if sys.platform == "win32" or not compiler_found():
        print(
            "spectral-kernels: no C++ compiler, so only the Python part is installed; every "
            "function runs on the 'reference' backend, slowly."
        )
        return []
    sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("*.cpp"))
    sources += sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / "cpu").rglob("*.cpp"))
    headers = [str(p.relative_to(ROOT)) for s in ("*.h", "*.inl") for p in (ROOT / "csrc").rglob(s)]
    # torch's own -std is the right one for its headers. Contraction to fused multiply-adds is what
    # the micro-kernels are written for, and Python's -fwrapv keeps loops from being vectorized. No
    # -march, no -ffast-math: instruction sets are chosen at run time.
    flags = ["-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-wrapv"]
    flags += ["-Wall", "-Wextra", "-Wno-unused-parameter"]
    print(f"spectral-kernels: {len(sources)} C++ files, CPU kernels; CUDA: not built")
    return [
        CppExtension(
            "spectral_kernels._C",
            sources,
            depends=headers,
            extra_compile_args={"cxx": flags},
            extra_link_args=["-fopenmp"],
        )
    ]


modules = extensions()
setup(ext_modules=modules, cmdclass={"build_ext": BuildExtension} if modules else {})
