from .muon import Muon
from .normuon import NorMuon

__all__ = ["Muon", "NorMuon"]
