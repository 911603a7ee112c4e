"""Every operator: the table that backends, fakes and dispatch are made from."""

from __future__ import annotations

from dataclasses import dataclass

from ._options import (
    BasisLists,
    DevaOptions,
    MuonLists,
    MuonOptions,
    Options,
    ShampooLists,
    ShampooOptions,
    SoapOptions,
)


@dataclass(frozen=True)
class Operator:
    """One operator.

    Attributes:
        family: the file that holds it in every folder, and the public function of its name.
        options: of a list step, what it takes beside its lists.
        lists: of a list step, its tensors in their order.
        home: the module of a backend in Python, where that is not the family's.
        in_place: whether it writes its arguments and returns nothing.
    """

    family: str
    options: type[Options] | None = None
    lists: type[MuonLists] | type[ShampooLists] | type[BasisLists] | None = None
    home: str = ""
    in_place: bool = False

    @property
    def module(self) -> str:
        """The module that holds it in a backend written in Python."""
        return self.home or self.family

    @property
    def states(self) -> tuple[str, ...]:
        """Of a list step, the lists that hold state: those between gradients and step counts."""
        names: tuple[str, ...] = self.lists._fields if self.lists is not None else ()
        return names[2:-3]


def _step(
    family: str,
    lists: type[MuonLists] | type[ShampooLists] | type[BasisLists],
    options: type[Options],
    home: str = "",
) -> Operator:
    return Operator(family, options, lists, home, in_place=True)


TABLE = {
    "gram": Operator("symmetric_matmul"),
    "newton_schulz": Operator("newton_schulz"),
    "polar": Operator("newton_schulz"),
    "muon_step_": _step("newton_schulz", MuonLists, MuonOptions),
    "kron_factors_update_": Operator("kron_factor", in_place=True),
    "kron_precondition": Operator("kron_factor"),
    "inverse_root": Operator("inverse_root"),
    "shampoo_step_": _step("inverse_root", ShampooLists, ShampooOptions, "inverse_root_step"),
    "eigenbasis": Operator("eigenbasis"),
    "refresh_eigenbasis": Operator("eigenbasis"),
    "soap_step_": _step("eigenbasis", BasisLists, SoapOptions),
    "deva_step_": _step("deva", BasisLists, DevaOptions),
}
