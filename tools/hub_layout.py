"""Writes the Triton kernels as a repository of Hugging Face's `kernels`, and checks it.

There a kernel is a Python package that is loaded from a path under a name of its own, so that two
versions fit into one process: all imports in it are relative, or of the standard library, torch or
Triton, it registers nothing under a fixed name, and nothing in it is compiled when it is installed.
What is written is the package without its compiled part, commands and `swap_in`, so that "triton"
and "reference" are its backends.

Source: Hugging Face, "Kernel requirements" and "Writing Hub kernels", of kernels 0.17.
"""

from __future__ import annotations

import argparse
import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAME = "spectral_kernels"
# Commands, what other packages are told of, and what has a compiled part or comes with it.
LEFT_OUT = ("cli.py", "doctor", "info.py", "swap", "_C.pyi", "_extension.py")
_ABSOLUTE = re.compile(rf"^(\s*from ){NAME}((?:\.\w+)*)( import )", re.MULTILINE)
_SWAP = re.compile(
    r"if TYPE_CHECKING:\n    from \.swap.*?\n\n|    \"swap_in\",\n|\n\ndef __getattr__.*\Z",
    re.DOTALL,
)

_EXTENSION = '''"""Kernels of a hub have no compiled part: "triton" and "reference" are left."""

from types import ModuleType

MODULE: ModuleType | None = None
REASON = "a kernel of a hub has no compiled part; the package spectral-kernels has"


def warn_of_faults() -> None:
    """Nothing: LAPACK is not called by a compiled part."""


def faults() -> str:
    """Of LAPACK, none that a compiled part has found."""
    return "none"
'''

_CARD = """---
license: apache-2.0
tags: [kernels]
---
# spectral-kernels

Triton kernels for Muon, Shampoo, SOAP and DeVA: symmetric products, Newton–Schulz, Kronecker
factors, inverse roots, eigenbases, and whole optimizer steps over lists of matrices.

```python
from kernels import get_kernel

sk = get_kernel("<owner>/spectral-kernels", version={version})
optimizer = sk.optim.Muon(sk.optim.param_groups(model), lr=0.02)
```

No card has run these kernels yet. CUDA C++ and CPU kernels are in the package `spectral-kernels`
alone.
"""

_BUILD = """[general]
name = "spectral-kernels"
version = {version}
edition = 5
license = "Apache-2.0"
backends = ["cuda"]

[torch-noarch]
"""

_FLAKE = """{
  description = "spectral-kernels";
  inputs.kernel-builder.url = "github:huggingface/kernels";
  outputs =
    { self, kernel-builder }:
    kernel-builder.lib.genKernelFlakeOutputs {
      inherit self;
      path = ./.;
    };
}
"""

# Loads it as the package `kernels` does, from elsewhere and under a name of its own.
_LOADED = """
import importlib.util, pathlib, sys
package = pathlib.Path(sys.argv[1])
name = "spectral_kernels_0123456789abcdef"
spec = importlib.util.spec_from_file_location(name, package / "__init__.py")
sk = importlib.util.module_from_spec(spec)
sys.modules[name] = sk
spec.loader.exec_module(sk)
import torch
x = torch.randn(3, 20, 33)
found = {}
for backend in ("triton", "reference"):
    with sk.use_backend(backend):
        found[backend] = sk.newton_schulz(x), sk.gram(x)
for one, other in zip(*found.values()):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
layer = torch.nn.Linear(8, 6)
layer(torch.ones(2, 8)).sum().backward()
optimizer = sk.optim.Muon(sk.optim.param_groups(layer, verbose=False), lr=0.1)
with sk.use_backend("triton"):
    optimizer.step()
wanted = {"newton_schulz/triton", "gram/triton", "muon_step_/triton"}
assert wanted <= sk.call_counts().keys(), sk.call_counts()
assert not {"spectral_kernels", "triton_kernels"} & {each.split(".")[0] for each in sys.modules}
assert not [each for each in torch._C._dispatch_get_all_op_names() if "spectral" in each]
print("loaded")
"""


def major() -> int:
    """The version that users of the hub pin, of which 0 is none."""
    record = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return max(1, int(record["project"]["version"].partition(".")[0]))


def write(out: Path) -> Path:
    """Writes all files below `out`. Returns the package's folder.

    Raises:
        ValueError: there is something else already.
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty")
    package = out / "torch-ext" / NAME
    for source, target in {
        ROOT / "python" / NAME: package,
        ROOT / "triton_kernels": package / "triton_kernels",
    }.items():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in LEFT_OUT:
        path = package / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    (package / "_extension.py").write_text(_EXTENSION)
    start = package / "__init__.py"
    start.write_text(_SWAP.sub("", start.read_text()).rstrip("\n") + "\n")
    for path in package.rglob("*.py"):
        path.write_text(_relative(path.read_text(), len(path.relative_to(package).parts)))
    version = major()
    (out / "build.toml").write_text(_BUILD.format(version=version))
    (out / "flake.nix").write_text(_FLAKE)
    (out / "README.md").write_text(_CARD.format(version=version))
    shutil.copy(ROOT / "LICENSE", out / "LICENSE")
    return package


def _relative(text: str, depth: int) -> str:
    """With relative imports of what is `depth` folders above the package's own modules."""

    def relative(found: re.Match[str]) -> str:
        return f"{found[1]}{'.' * depth}{found[2].removeprefix('.')}{found[3]}"

    return _ABSOLUTE.sub(relative, text)


def foreign_imports(package: Path) -> list[str]:
    """Imports, anywhere in a file, of what is neither relative nor allowed in a hub."""
    allowed = {*sys.stdlib_module_names, "torch", "triton"}
    found = []
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            found += [
                f"{path.relative_to(package)}:{node.lineno}: {name}"
                for name in names
                if name.partition(".")[0] not in allowed
            ]
    return found


def check(package: Path) -> list[str]:
    """What is wrong with the layout, which is loaded and run in Triton's interpreter."""
    wrong = foreign_imports(package)
    wrong += [
        str(path.relative_to(package))
        for path in package.rglob("*")
        if path.is_file() and path.suffix != ".py" and path.name != "py.typed"
    ]
    result = subprocess.run(
        [sys.executable, "-c", _LOADED, str(package)],
        cwd=package.parent,
        env={"PATH": "/usr/bin:/bin", "TRITON_INTERPRET": "1", "HOME": str(package.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        wrong.append(result.stderr)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="a new or empty folder")
    options = parser.parse_args()
    try:
        package = write(options.out)
    except ValueError as error:
        parser.error(str(error))
    wrong = check(package)
    for each in wrong:
        print(each, file=sys.stderr)
    if not wrong:
        print(f"written and checked: {options.out}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
