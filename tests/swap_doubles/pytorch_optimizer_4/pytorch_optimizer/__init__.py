from .optimizer.muon import Muon

__all__ = ["Muon"]
