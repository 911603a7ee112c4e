"""What an installation holds, and that it works from another folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from spectral_kernels import _extension

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "tools" / "results" / "cuda_kernels.json"
NVCC = shutil.which("nvcc")
# Installed as part of the package under other names than in the repository.
FOLDERS = {
    "python/spectral_kernels": "spectral_kernels",
    "triton_kernels": "spectral_kernels/triton_kernels",
    "benchmarks": "spectral_kernels/benchmarks",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel of the working tree, compiled anew."""
    pip = [sys.executable, "-m", "pip"]
    # Not importlib's find_spec: looking for pip turns setuptools' own distutils off.
    if subprocess.run([*pip, "--version"], check=False, capture_output=True).returncode:
        pytest.skip("needs pip")
    folder = tmp_path_factory.mktemp("wheel")
    command = [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    # With the CUDA part where there is a compiler for it, and for one processor, which is quicker.
    cuda = {"SPECTRAL_KERNELS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0a"} if NVCC else {}
    environment = os.environ | cuda
    command += ["--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, cwd=folder, env=environment)
    (built,) = folder.glob("spectral_kernels-*.whl")
    return built


def test_wheel_holds_all_of_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (licence,) = [name for name in archive.namelist() if name.endswith("/LICENSE")]
        assert b"Apache License" in archive.read(licence)
    expected = {
        f"{target}/{path.relative_to(ROOT / source).as_posix()}"
        for source, target in FOLDERS.items()
        for path in (ROOT / source).rglob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == expected
    assert {name.partition("/")[0] for name in names} == {"spectral_kernels"}
    # Developers' tools and results stay in the repository.
    tools = {path.name for path in (ROOT / "tools").glob("*.py")}
    assert len(tools) >= 6 and not tools & {Path(name).name for name in names}
    assert not [name for name in names if name.endswith((".json", ".md", ".png"))]
    assert {"spectral_kernels/py.typed", "spectral_kernels/_C.pyi"} < names
    libraries = [name for name in names if name.endswith(".so")]
    assert len(libraries) == (0 if _extension.MODULE is None else 1)


def run_installed(wheel, tmp_path, code):
    """What a program prints that imports the package from the wheel alone."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "elsewhere").mkdir()
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "site"), str(TABLE)],
        cwd=tmp_path / "elsewhere",
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_installed_wheel_runs_from_another_folder(wheel, tmp_path):
    code = """
import importlib.util, pathlib, sys, torch
import spectral_kernels as sk, spectral_kernels.swap, spectral_kernels.benchmarks.run
site = pathlib.Path(sys.argv[1])
assert site in pathlib.Path(sk.__file__).parents, sk.__file__
x = torch.randn(3, 5)
assert torch.equal(sk.gram(x), sk.gram(x).mT)
spec = importlib.util.find_spec("triton_kernels")
assert spec is None or site not in pathlib.Path(spec.origin).parents
print(sk.explain("gram", x).backend)
"""
    expected = "reference" if _extension.MODULE is None else "cpu"
    assert run_installed(wheel, tmp_path, code) == expected


@pytest.mark.skipif(NVCC is None, reason="there is no nvcc")
def test_the_cuda_part_loads_and_answers_beside_a_cpu_torch(wheel, tmp_path):
    code = """
import json, pathlib, sys, torch, spectral_kernels as sk
from spectral_kernels import _cuda, _dispatch, info
assert _cuda.architectures() == ["sm_90a"]
x = torch.randn(8, 16)
assert sk.gram(x).shape == (8, 8)
assert sk.call_counts() == {"gram/cpu": 1}
for op in _cuda.OPERATORS:
    assert sk.explain(op, x).rejected["cuda"] == "torch was built without CUDA", op
try:
    sk.gram(x, backend="cuda")
except RuntimeError as error:
    print(error)
elsewhere = torch.empty(40, 40, device="meta", dtype=torch.float64)
assert "not in fp64" in _cuda.rejection("newton_schulz", [elsewhere], {})
names = {name for name, _, _ in _cuda.kernels()}
table = json.loads(pathlib.Path(sys.argv[2]).read_text())["kernels"]
print("not in the table:", sorted(names.symmetric_difference(row["kernel"] for row in table)))
info.main([])
"""
    said = run_installed(wheel, tmp_path, code)
    assert "backend cannot run gram: cuda: torch was built without CUDA" in said
    assert "sm_90a" in said
    assert re.search(r"gram kernel +15 variants", said)
    assert "not in the table: []" in said


def test_the_folder_of_triton_kernels_is_not_a_package_of_its_own():
    result = subprocess.run(
        [sys.executable, "-c", "import triton_kernels"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0 and "spectral_kernels.triton_kernels" in result.stderr


def test_a_missing_torch_is_a_sentence(tmp_path):
    code = "import sys; sys.modules['torch'] = None; sys.argv = ['setup.py', '--version']; "
    code += "exec(compile(open('setup.py').read(), 'setup.py', 'exec'))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode != 0
    assert "install torch first" in result.stderr and "Traceback" not in result.stderr


def run_setup(tmp_path, **environment):
    """What setup.py says that is asked for its version only, with a toolkit that is not there."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    cuda = {"SPECTRAL_KERNELS_CUDA": "1", "CUDA_HOME": str(tmp_path), **environment}
    return subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env=os.environ | cuda,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
@pytest.mark.parametrize(
    ("wish", "listed"),
    [("8.0 9.0+PTX", None), ("8.0;9.0a", "for sm_80, sm_90a")],
)
def test_hopper_is_built_with_its_own_instructions(wish, listed, tmp_path):
    done = run_setup(tmp_path, TORCH_CUDA_ARCH_LIST=wish)
    if listed is None:
        assert done.returncode != 0 and "write 9.0a" in done.stderr
    else:
        assert done.returncode == 0 and listed in done.stdout


@pytest.mark.parametrize(
    ("remark", "status", "expected"),
    [
        ("", 0, 0),
        ("ptxas info : Used 168 registers", 0, 0),
        ("(C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized", 0, 1),
        ("error: no such file", 2, 2),
    ],
)
def test_the_build_stops_where_wgmma_is_serialized(remark, status, expected):
    compiler = [sys.executable, "-c", "import sys; print(sys.argv[1]); sys.exit(int(sys.argv[2]))"]
    checked = ROOT / "csrc" / "cuda" / "checked_nvcc.py"
    command = [sys.executable, str(checked), *compiler, remark, str(status)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == expected
    assert remark in done.stdout


@pytest.mark.skipif(NVCC is None, reason="there is no nvcc")
def test_no_wgmma_of_the_kernels_is_serialized(tmp_path):
    checked = ROOT / "csrc" / "cuda" / "checked_nvcc.py"
    source = ROOT / "csrc" / "cuda" / "symmetric_matmul" / "product_wgmma.cu"
    command = [sys.executable, str(checked), NVCC, "-std=c++17", "-O3", "-arch=sm_90a"]
    command += ["-cubin", str(source), "-o", str(tmp_path / "kernel.cubin")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
