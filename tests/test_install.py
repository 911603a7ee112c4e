"""What an installation holds, and that it works from another folder."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from spectral_kernels import _extension

ROOT = Path(__file__).parent.parent
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
    subprocess.run([*command, "--wheel-dir", str(folder), str(ROOT)], check=True, cwd=folder)
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
    assert "spectral_kernels/py.typed" in names
    libraries = [name for name in names if name.endswith(".so")]
    assert len(libraries) == (0 if _extension.MODULE is None else 1)


def test_installed_wheel_runs_from_another_folder(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "elsewhere").mkdir()
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
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "site")],
        cwd=tmp_path / "elsewhere",
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == ("reference" if _extension.MODULE is None else "cpu")


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
