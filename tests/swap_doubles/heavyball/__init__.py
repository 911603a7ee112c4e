from .chainable import Muon

__all__ = ["Muon"]
