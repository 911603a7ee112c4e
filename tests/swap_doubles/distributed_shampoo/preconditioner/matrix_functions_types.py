"""Configurations, by the names of the package that this stands in for."""

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class PerturbationConfig:
    perturb_before_computation: bool = True


@dataclass
class PseudoInverseConfig:
    rank_rtol: float = 0.0


@dataclass
class RootInvConfig:
    pass


@dataclass(kw_only=True)
class EighEigendecompositionConfig:
    rank_deficient_stability_config: object = field(default_factory=PerturbationConfig)
    tolerance: float = 0.0
    eigendecomposition_offload_device: str = ""


@dataclass(kw_only=True)
class EigenConfig(RootInvConfig, EighEigendecompositionConfig):
    pass


@dataclass(kw_only=True)
class CoupledNewtonConfig(RootInvConfig):
    max_iterations: int = 100
    tolerance: float = 1e-6


@dataclass(kw_only=True)
class CoupledHigherOrderConfig(RootInvConfig):
    rel_epsilon: float
    abs_epsilon: float
    max_iterations: int = 100
    tolerance: float = 1e-8


@dataclass(kw_only=True)
class SVDOrthogonalizationConfig:
    scale_by_dims_fn: Callable = lambda d_in, d_out: 1.0


@dataclass(kw_only=True)
class NewtonSchulzOrthogonalizationConfig:
    scale_by_dims_fn: Callable = lambda d_in, d_out: 1.0
    num_iterations: int = 5
    coefficients: tuple = (3.4445, -4.7750, 2.0315)
