"""The types of the compiled part, `_C.pyi`, are those of what was compiled."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from spectral_kernels import _extension

ROOT = Path(__file__).parent.parent
STUB = ast.parse((ROOT / "python" / "spectral_kernels" / "_C.pyi").read_text())
FUNCTIONS = {node.name: node for node in STUB.body if isinstance(node, ast.FunctionDef)}
VALUES = {
    node.target.id: ast.unparse(node.annotation)
    for node in STUB.body
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
}


def test_the_stub_names_what_the_source_defines():
    source = (ROOT / "csrc" / "module.cpp").read_text()
    assert set(re.findall(r'm\.def\(\s*"(\w+)"', source)) == FUNCTIONS.keys()
    assert set(re.findall(r'm\.attr\("(\w+)"\)', source)) == VALUES.keys()


@pytest.mark.skipif(_extension.MODULE is None, reason=_extension.REASON or "")
def test_the_stub_has_the_signatures_of_the_compiled_part():
    module = _extension.MODULE
    for name, kind in VALUES.items():
        assert type(getattr(module, name)).__name__ == kind
    compared = set()
    for name, node in FUNCTIONS.items():
        function = getattr(module, name, None)
        if function is None:
            assert name.startswith("cuda_") and not module.cuda_architectures
            continue
        parameters, result = re.match(r"\w+\((.*)\) -> (.*)\n", function.__doc__).groups()
        assert re.findall(r"(\w+): ", parameters) == [a.arg for a in node.args.args], name
        assert ast.unparse(node.returns) == result, name
        compared.add(name)
    assert {name for name in FUNCTIONS if not name.startswith("cuda_")} <= compared
