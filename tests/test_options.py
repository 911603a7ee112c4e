"""The records of options against what they stand for: schemas and public signatures."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import spectral_kernels as sk
import torch
from spectral_kernels import _operators, _options

STEPS = [name for name, operator in _operators.TABLE.items() if operator.options is not None]
# Flattened for the schema.
_ENDS = "restart_ends"
# muon_step_ has a beta2 where it is given second moments, and none else.
_OTHER = {("muon_step_", "beta2")}


def record(name: str) -> type[_options.Options]:
    found = _operators.TABLE[name].options
    assert found is not None
    return found


def test_four_steps_have_records():
    assert STEPS == ["muon_step_", "shampoo_step_", "soap_step_", "deva_step_"]


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("name", STEPS)
def test_records_are_the_arguments_of_the_schema_in_its_order(name):
    arguments = getattr(torch.ops.spectral_kernels, name).default._schema.arguments
    named = [a.name for a in arguments if a.kwarg_only and a.name != _ENDS]
    assert [field.name for field in dataclasses.fields(record(name))] == named
    lists = _operators.TABLE[name].lists
    assert lists is not None
    assert list(lists._fields) == [a.name for a in arguments if not a.kwarg_only]


@pytest.mark.parametrize("name", STEPS)
def test_defaults_are_those_of_the_public_function(name):
    parameters = inspect.signature(getattr(sk, name)).parameters
    compared = 0
    for option, default in record(name).defaults.items():
        if option in parameters and (name, option) not in _OTHER:
            written = parameters[option].default
            assert written is None or written == default, option
            compared += written is not None
    assert compared >= 7


@pytest.mark.parametrize("name", STEPS)
def test_defaults_are_in_range(name):
    for option, kind in record(name).kinds.items():
        default = record(name).defaults[option]
        kind.kept(option, default)
        assert kind.taken(option, default) == default
