"""Which rank does what, as rows that print as a table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """What becomes of one parameter.

    Attributes:
        name, shape: the parameter's.
        how: who steps it, and why.
        owner: the rank, of those that share it, that steps it whole; None where every rank steps
            what it holds.
        bucket: the number of the exchange that it travels in.
        flops: floating-point operations a step, estimated; what the owners are chosen by.
        bytes: what travels to its owner and back in a step, all ranks together.
    """

    name: str
    shape: tuple[int, ...]
    how: str
    owner: int | None = None
    bucket: int | None = None
    flops: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Table:
    """Rows of all parameters.

    Attributes:
        ranks: how many share the work.
        rows: one a parameter.
    """

    ranks: int
    rows: tuple[Row, ...]

    @property
    def loads(self) -> list[int]:
        """Estimated floating-point operations of every rank for the matrices that it owns."""
        loads = [0] * self.ranks
        for row in self.rows:
            if row.owner is not None:
                loads[row.owner] += row.flops
        return loads

    def __str__(self) -> str:
        cells = [("parameter", "shape", "owner", "bucket", "MFLOP", "kB moved", "how")]
        for row in self.rows:
            cells.append(
                (
                    row.name,
                    "x".join(map(str, row.shape)) or "scalar",
                    "-" if row.owner is None else str(row.owner),
                    "-" if row.bucket is None else str(row.bucket),
                    f"{row.flops / 1e6:.3g}" if row.flops else "-",
                    f"{row.bytes / 1e3:.4g}" if row.bytes else "-",
                    row.how,
                )
            )
        widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in cells
        ]
        loads = self.loads
        if any(loads):
            fullest = max(loads) * len(loads) / sum(loads)
            lines.append(f"{self.ranks} ranks: the fullest owner does {fullest:.2f} of the mean")
        return "\n".join(lines)
