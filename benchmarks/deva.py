"""The DeVA step against the authors' code."""

from .case import Family

FAMILY = Family("deva", (), tuple, None)
