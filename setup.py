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
        "spectral-kernels is compiled against the torch that will run it: install torch first,\n"
        '    pip install ninja pybind11 "setuptools>=77" wheel\n'
        "    pip install --no-build-isolation ."
    )

ROOT = Path(__file__).parent.resolve()


def compiler_found() -> bool:
    """Whether the C++ compiler that torch would call exists."""
    return shutil.which(os.environ.get("CXX", "c++")) is not None


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


def cuda_wanted() -> Path | None:
    """The toolkit to build the CUDA part with, or None without it."""
    wish = os.environ.get("SPECTRAL_KERNELS_CUDA", "auto")
    if wish not in ("0", "1", "auto"):
        sys.exit(f"SPECTRAL_KERNELS_CUDA must be 0, 1 or auto, not {wish!r}")
    if wish == "0" or (wish == "auto" and torch.version.cuda is None):
        return None
    found = toolkit()
    if found is None and wish == "1":
        sys.exit("SPECTRAL_KERNELS_CUDA=1: no nvcc under CUDA_HOME or on the PATH")
    return found


def cuda_options(home: Path) -> dict:
    """Sources, flags and libraries of the CUDA part, with which a CPU torch can load it too."""
    # torch looks for a toolkit only if it was built for CUDA itself.
    cpp_extension.CUDA_HOME = str(home)
    names = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(".", "").replace("+PTX", "")
    architectures = tuple(re.split(r"[ ;]+", names.strip())) if names else ARCHITECTURES
    if "90" in architectures:
        sys.exit(
            "TORCH_CUDA_ARCH_LIST asks for 9.0, which lacks the instructions that the kernels for "
            "Hopper are made of: write 9.0a"
        )
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
    # torch's own -std is the right one for its headers. Contraction to fused multiply-adds is what
    # the micro-kernels are written for, and Python's -fwrapv keeps loops from being vectorized. No
    # -march, no -ffast-math: instruction sets are chosen at run time.
    flags = ["-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-wrapv"]
    flags += ["-Wall", "-Wextra", "-Wno-unused-parameter"]
    home = cuda_wanted()
    cuda = cuda_options(home) if home else {"description": "not built"}
    sources += cuda.get("sources", [])
    print(f"spectral-kernels: {len(sources)} C++ files; CUDA: {cuda['description']}")
    return [
        CppExtension(
            "spectral_kernels._C",
            sources,
            depends=headers,
            define_macros=cuda.get("defines", []),
            extra_compile_args={"cxx": flags, "nvcc": cuda.get("nvcc", [])},
            library_dirs=cuda.get("library_dirs", []),
            libraries=cuda.get("libraries", []),
            extra_link_args=["-fopenmp"],
        )
    ]


modules = extensions()
setup(ext_modules=modules, cmdclass={"build_ext": BuildExtension} if modules else {})
