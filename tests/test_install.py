"""What an installation holds, and that it works from another folder."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import setuptools
import torch
import wheel_check
from spectral_kernels import _extension
from torch.utils import cpp_extension

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


@pytest.mark.skipif(shutil.which("objdump") is None, reason="there is no objdump")
@pytest.mark.skipif(_extension.MODULE is None, reason="there is no compiler")
def test_wheel_keeps_its_limits(wheel):
    found = wheel_check.findings(wheel)
    assert [each for each in found if each.wrong] == []
    assert {"bytes", "members", "libraries", "C++ symbols of torch"} < {each.what for each in found}


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


@dataclass(frozen=True)
class Said:
    """What setup.py printed, and whether it gave up."""

    said: str
    failed: bool


@pytest.fixture
def build(monkeypatch, capsys):
    """setup.py in this process, up to the build itself, under an environment."""
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    for name in ("PYTORCH_NVCC", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST", "CXX"):
        monkeypatch.setenv(name, "")  # so that what is set by the build is undone
        monkeypatch.delenv(name)

    def run(*, torchs: str | None = None, search: Path | None = None, **environment: str) -> Said:
        monkeypatch.setattr(torch.version, "cuda", torchs)
        if search is not None:
            monkeypatch.setenv("PATH", f"{search}{os.pathsep}{os.environ['PATH']}")
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        try:
            runpy.run_path(str(ROOT / "setup.py"))
        except SystemExit as error:
            return Said(str(error.code), True)
        return Said(capsys.readouterr().out, False)

    return run


def test_the_folder_of_triton_kernels_is_not_a_package_of_its_own():
    result = subprocess.run(
        [sys.executable, "-c", "import triton_kernels"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0 and "spectral_kernels.triton_kernels" in result.stderr


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
@pytest.mark.parametrize(
    ("wish", "listed"),
    [("8.0 9.0+PTX", None), ("8.0;9.0a", "for sm_80, sm_90a")],
)
def test_hopper_is_built_with_its_own_instructions(wish, listed, build, tmp_path):
    home = toolkit_of(tmp_path, "13.0")
    done = build(CUDA_HOME=home, SPECTRAL_KERNELS_CUDA="1", TORCH_CUDA_ARCH_LIST=wish)
    if listed is None:
        assert done.failed and "write 9.0a" in done.said
    else:
        assert not done.failed and listed in done.said


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


@pytest.mark.skipif(NVCC is None, reason="there is no nvcc")
def test_what_one_architecture_has_compiles_for_all(tmp_path):
    """For those that a build makes where nobody says which."""
    listed = re.search(r"^ARCHITECTURES = \((.*)\)", (ROOT / "setup.py").read_text(), re.MULTILINE)
    architectures = re.findall(r"\w+", listed[1])
    assert {"80", "90a", "120"} <= set(architectures)
    kernels = (ROOT / "csrc" / "cuda").glob("*/*.cu")
    special = [path for path in kernels if "sm90" in path.read_text()]
    assert [path.name for path in special] == ["product_wgmma.cu"]
    for architecture in architectures:
        for source in special:
            command = [NVCC, "-std=c++17", "-O1", f"-arch=compute_{architecture}", "-ptx"]
            command += [str(source), "-o", str(tmp_path / "kernel.ptx")]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{architecture}: {done.stderr[-2000:]}"


# What the machine has, and what setup.py makes of it.


def toolkit_of(folder: Path, release: str) -> str:
    """A toolkit that is no more than an nvcc which says its release."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.99'\n")
    nvcc.chmod(0o755)
    return str(folder)


needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")


@needs_compiler
@pytest.mark.parametrize("wish", ["auto", "1"])
@pytest.mark.parametrize(("release", "fits"), [("11.8", False), ("12.4", True), ("13.0", False)])
def test_an_nvcc_of_another_cuda_than_torchs_is_a_sentence(release, fits, wish, build, tmp_path):
    home = toolkit_of(tmp_path, release)
    done = build(torchs="12.8", CUDA_HOME=home, SPECTRAL_KERNELS_CUDA=wish)
    if fits:
        assert not done.failed and "CUDA: for sm_80" in done.said
        assert "MAX_JOBS" in done.said and "TORCH_CUDA_ARCH_LIST=9.0a" in done.said
        return
    assert f"nvcc is of CUDA {release} and torch of 12.8" in done.said
    assert done.failed == (wish == "1")
    assert done.failed or "CUDA: not built" in done.said


@needs_compiler
def test_a_cuda_torch_without_nvcc_is_a_sentence(build, tmp_path):
    done = build(torchs="12.8", CUDA_HOME=str(tmp_path), SPECTRAL_KERNELS_CUDA="auto")
    assert not done.failed and "CUDA: not built" in done.said
    assert "no nvcc under CUDA_HOME or on the PATH, so the CUDA part is not built" in done.said


@needs_compiler
@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ("Ampere", "CUDA: for sm_80, sm_86"),
        ("Ampere;Hopper", "CUDA: for sm_80, sm_86, sm_90a"),
        ("8.0,8.9+PTX", "CUDA: for sm_80, sm_89"),
        ("8.6  9.0a;", "CUDA: for sm_86, sm_90a"),
        ("5.2 7.5 8.0", "no CUDA kernels for 5.2, 7.5: they need 8.0 or later"),
        ("8.0 8.0+PTX Ampere", "CUDA: for sm_80, sm_86"),
        ("12.0", "CUDA: for sm_120"),
        ("native", "CUDA: for sm_"),
    ],
)
def test_architectures_as_torch_writes_them(wish, said, build, tmp_path):
    home = toolkit_of(tmp_path, "13.0")
    done = build(CUDA_HOME=home, SPECTRAL_KERNELS_CUDA="1", TORCH_CUDA_ARCH_LIST=wish)
    assert not done.failed and said in done.said


@needs_compiler
@pytest.mark.parametrize("wish", ["8", "Amper", "8.0 sm_90", "8.0x"])
def test_unknown_architectures_are_a_sentence(wish, build, tmp_path):
    home = toolkit_of(tmp_path, "13.0")
    done = build(CUDA_HOME=home, SPECTRAL_KERNELS_CUDA="1", TORCH_CUDA_ARCH_LIST=wish)
    assert done.failed
    assert repr(wish.split()[-1]) in done.said and "no architecture such as" in done.said


@needs_compiler
def test_only_older_architectures_leave_the_cuda_part_out(build, tmp_path):
    home = toolkit_of(tmp_path, "12.8")
    done = build(torchs="12.8", CUDA_HOME=home, TORCH_CUDA_ARCH_LIST="7.0;7.5")
    assert not done.failed and "names no architecture from 8.0 on" in done.said
    assert "CUDA: not built" in done.said


@pytest.mark.parametrize(
    ("cxx", "found"),
    [
        ("cc-for-tests", True),
        ("ccache cc-for-tests", True),
        ("cc-for-tests -stdlib=libc++", True),
        ("ccache no-such-compiler", False),
        ("no-such-compiler", False),
    ],
)
def test_compilers_behind_launchers_are_found(cxx, found, build, tmp_path):
    for name in ("ccache", "cc-for-tests"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    done = build(search=tmp_path, CXX=cxx, SPECTRAL_KERNELS_CUDA="0")
    assert ("C++ files" in done.said) == found
    assert ("no C++ compiler" in done.said) != found


def test_a_missing_torch_is_a_sentence_about_isolated_builds(build, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    done = build()
    assert done.failed and "install torch first" in done.said.lower()
    assert "isolated environment" in done.said and "--no-build-isolation" in done.said


def test_without_a_compiled_part_there_is_one_warning_at_import():
    code = """
import sys, warnings
sys.modules["spectral_kernels._C"] = None
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    try:
        import spectral_kernels as sk
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error.name}") from error
    import torch
    sk.gram(torch.randn(3, 4))
    sk.optim.Muon([torch.nn.Parameter(torch.randn(3, 4))])
mine = [str(each.message) for each in said if "spectral_kernels" in str(each.message)]
assert len(mine) == 1, mine
print(mine[0])
print(sk.explain("gram", torch.randn(3, 4)).backend)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT / "docs"
    )
    assert "no compiled part" in done.stdout and "CXX names it" in done.stdout
    assert done.stdout.endswith("reference\n")


def test_a_source_distribution_is_whole(tmp_path):
    """All that the repository tracks, but what only its own service reads."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("needs git and a checkout")
    code = "from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    subprocess.run(
        [sys.executable, "-c", f"import sys; {code}", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    tracked = {name for name in listed.stdout.split("\n") if name and (ROOT / name).is_file()}
    missing = {name for name in tracked - names if not name.startswith((".ci/", ".git"))}
    assert not {name for name in missing if not name.endswith(LEFT_OUT)}
    metadata = subprocess.run(
        ["tar", "xzOf", str(archive), f"{archive.name.removesuffix('.tar.gz')}/PKG-INFO"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for line in ("Requires-Python: >=3.11", "Requires-Dist: torch>=2.11", "License-Expression:"):
        assert line in metadata
    for version in ("3.11", "3.12", "3.13"):
        assert f"Classifier: Programming Language :: Python :: {version}" in metadata


# Pictures, and what linters read.
LEFT_OUT = (".png", ".pre-commit-config.yaml")


@pytest.mark.long
def test_setup_in_a_venv_takes_its_torch(tmp_path):
    """`make setup PYTHON=...` of a virtual environment that has torch, which is a stand-in here."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    user, mine = tmp_path / "user", tmp_path / "mine"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(user)], check=True)
    (site,) = user.glob("lib/python*/site-packages")
    (site / "torch.py").write_text("FROM = 'the user'\n")
    subprocess.run(
        ["make", "--quiet", f"VENV={mine}", f"PYTHON={user}/bin/python", f"{mine}/.python"],
        cwd=ROOT,
        check=True,
    )
    code = "import torch; print(torch.FROM)"
    found = subprocess.run(
        [mine / "bin" / "python", "-c", code], capture_output=True, text=True, check=True
    )
    assert found.stdout == "the user\n"
