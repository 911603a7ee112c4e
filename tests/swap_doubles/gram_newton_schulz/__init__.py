from .gram_newton_schulz import GramNewtonSchulz, StandardNewtonSchulz

__all__ = ["GramNewtonSchulz", "StandardNewtonSchulz"]
