"""Meta's Distributed Shampoo (facebookresearch/optimizers, as of August 2026) on fast kernels.

Replaced in the modules that import them: `matrix_inverse_root` (coupled Newton and higher-order
iterations), `matrix_eigendecomposition`, `matrix_orthogonalization` (Newton-Schulz); and in the
lists of preconditioners the factor products, the preconditioning, the packing of triangles, and the
loop over blocks, so that the roots of many blocks are computed together.

An `EigenConfig` with epsilon = 1e-12 asks for eigenvalues down to rounding. It keeps the package's
own decomposition, run on several factors at a time, one thread each. Only with allow_ridge=True it
becomes an iterative root of A + delta I, delta = max(epsilon, 1e-6 |A|_inf) in float32. The
iterative configurations are replaced where they converge, not where few iterations damp the root.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import lru_cache
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks
from ..inverse_root import inverse_root
from ..kron_factor import kron_precondition
from ..newton_schulz import newton_schulz
from ..symmetric_matmul import gram
from ._adapter import Adapter
from ._points import Options, Point, Refused, agree, require_parameters, trial_matrix, unfit

_PACKAGE = "distributed_shampoo.preconditioner"
_CONFIGS = (
    "CoupledHigherOrderConfig",
    "CoupledNewtonConfig",
    "EigenConfig",
    "EighEigendecompositionConfig",
    "NewtonSchulzOrthogonalizationConfig",
)
_FIELDS = (
    "amortized_computation_config",
    "epsilon",
    "factor_matrices",
    "roots",
    "use_trace_scaling",
)
# Fewer iterations than this floor the small eigenvalues, which is then part of the method.
_CONVERGING_ITERATIONS = 30
_CONVERGED_TOLERANCE = 1e-3
_RELATIVE_RIDGE = {torch.float32: 1e-6, torch.float64: 1e-12}
# Statuses of inverse_root: converged, and fell back to an eigendecomposition.
_ACCEPTED = (0, 2)
# Elements of stored factors whose roots are computed together: 64 MiB in float32.
_BATCH_ELEMENTS = 1 << 24
_BOUND = 1e-3


class _Ask(NamedTuple):
    """What a block asks for: the root or, for root None, the eigendecomposition of a factor."""

    factor: Tensor
    root: Fraction | None
    config: Any
    epsilon: float

    def key(self) -> Any:
        """The same for the same question; different, mostly, for other factors."""
        factor = self.factor
        kind = factor.shape, factor.dtype, factor.device, self.root, id(self.config), self.epsilon
        return kind, *factor.diagonal()[:4].tolist()


class _Ahead(threading.local):
    """Answers that were computed ahead; None where an iteration did not converge."""

    def __init__(self) -> None:
        self._answers: dict[Any, list[tuple[_Ask, Any]]] = {}

    def set(self, answers: Iterable[tuple[_Ask, Any]]) -> None:
        """Forgets the old answers."""
        self._answers = {}
        for ask, answer in answers:
            self._answers.setdefault(ask.key(), []).append((ask, answer))

    def find(self, ask: _Ask) -> tuple[_Ask, Any] | None:
        """The answer for a factor that is equal in every bit, being computed anew for the call."""
        if not self._answers:
            return None
        for known in self._answers.get(ask.key(), ()):
            if torch.equal(known[0].factor, ask.factor):
                return known
        return None


class DistributedShampoo(Adapter):
    """distributed_shampoo.DistributedShampoo."""

    name = "distributed_shampoo"
    modules = ("distributed_shampoo.distributed_shampoo",)

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._ahead = _Ahead()

    def points(self, module: ModuleType) -> list[Point]:
        """Eight functions of two modules."""
        lists = _module("shampoo_preconditioner_list")
        spectral = _module("spectral_descent_preconditioner_list")
        self._types = _module("matrix_functions_types")
        for name in _CONFIGS:
            if not hasattr(self._types, name):
                raise Refused(f"{self._types.__name__} has no {name} any more")
        base = getattr(lists, "BaseShampooPreconditionerList", None)
        blocks = getattr(lists, "BaseShampooKroneckerFactorsUnwrapped", None)
        if not isinstance(base, type) or not isinstance(blocks, type):
            raise Refused(f"{lists.__name__} has not the classes of the version expected")
        for name, parameters in (
            ("amortized_computation", ("self", "bias_correction2")),
            ("_unpack_matrix", ("self", "matrix")),
        ):
            if not hasattr(blocks, name):
                raise Refused(f"{blocks.__name__} has no {name} any more")
            require_parameters(f"{blocks.__name__}.{name}", getattr(blocks, name), parameters)
        missing = set(_FIELDS).difference(inspect.get_annotations(blocks))
        if missing:
            raise Refused(f"{blocks.__name__} has no {', '.join(sorted(missing))} any more")
        root = Point(lists, "matrix_inverse_root", self.root, self.root_declines)
        eigendecomposition = Point(
            lists,
            "matrix_eigendecomposition",
            self.eigendecomposition,
            self.eigendecomposition_declines,
        )
        self._own_root, self._own_eigendecomposition = root.check(), eigendecomposition.check()
        return [
            root,
            eigendecomposition,
            Point(
                base,
                "update_preconditioners",
                self.update,
                self.update_declines,
                repeatable=False,
            ),
            Point(lists, "pack_upper_triangular", self.pack, self.pack_declines),
            Point(lists, "unpack_upper_triangular", self.unpack, self.unpack_declines),
            Point(base, "_compute_outer_product_list", self.products, self.products_declines),
            Point(base, "_precondition_grad", self.precondition, self.precondition_declines),
            Point(
                spectral,
                "matrix_orthogonalization",
                self.orthogonalize,
                self.orthogonalize_declines,
            ),
        ]

    # Inverse roots and eigendecompositions.

    def root(
        self,
        own: Callable[..., Tensor],
        A: Tensor,
        root: Fraction,
        root_inv_config: Any = None,
        epsilon: float = 0.0,
    ) -> Tensor:
        """`matrix_inverse_root`: computed ahead, or by one call of `inverse_root`."""
        ask = _Ask(A, root, root_inv_config, epsilon)
        known = self._ahead.find(ask) or self._roots([ask])[0]
        result: Tensor | None = known[1]
        if result is None:
            return own(A=A, root=root, root_inv_config=root_inv_config, epsilon=epsilon)
        return result

    def root_declines(
        self, A: Tensor, root: Fraction, root_inv_config: Any = None, epsilon: float = 0.0
    ) -> str | None:
        """Configurations whose result is not that of a converged iteration."""
        ask = _Ask(A, root, root_inv_config, epsilon)
        if self._ahead.find(ask) is not None:
            return None
        return unfit(A, self.options, dtypes=_checks.FULL) or self._root_declines(ask)

    def eigendecomposition(
        self,
        own: Callable[..., tuple[Tensor, Tensor]],
        A: Tensor,
        epsilon: float = 0.0,
        eigendecomposition_config: Any = None,
        eigenvectors_estimate: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`matrix_eigendecomposition`, computed ahead."""
        known = self._ahead.find(_Ask(A, None, eigendecomposition_config, epsilon))
        assert known is not None
        values, vectors = known[1]
        return values, vectors

    def eigendecomposition_declines(
        self,
        A: Tensor,
        epsilon: float = 0.0,
        eigendecomposition_config: Any = None,
        eigenvectors_estimate: Tensor | None = None,
    ) -> str | None:
        """What was not computed ahead."""
        if self._ahead.find(_Ask(A, None, eigendecomposition_config, epsilon)) is None:
            return "eigendecomposition of one factor"
        return None

    def update(
        self,
        own: Callable[..., None],
        them: Any,
        masked_grad_list: tuple[Tensor, ...],
        step: Tensor,
        perform_amortized_computation: bool,
    ) -> None:
        """`update_preconditioners`, with the roots of many blocks computed together."""
        own(
            them,
            masked_grad_list=masked_grad_list,
            step=step,
            perform_amortized_computation=False,
        )
        for blocks in _batches(them._masked_kronecker_factors_unwrapped):
            with self._computed_ahead(blocks, them._bias_correction2):
                for block in blocks:
                    block.amortized_computation(bias_correction2=them._bias_correction2)

    def update_declines(
        self,
        them: Any,
        masked_grad_list: tuple[Tensor, ...],
        step: Tensor,
        perform_amortized_computation: bool,
    ) -> str | None:
        """Steps without new roots."""
        return None if perform_amortized_computation else "no new roots due"

    @contextlib.contextmanager
    def _computed_ahead(self, blocks: Sequence[Any], bias_correction2: Any) -> Iterator[None]:
        """Inside, the functions above find what these blocks will ask for."""
        iterative: dict[Any, list[_Ask]] = {}
        decomposed: list[_Ask] = []
        for block in blocks:
            if block.use_trace_scaling:
                continue
            rooted = hasattr(block, "inv_factor_matrices")
            for index, stored in enumerate(block.factor_matrices):
                ask = _Ask(
                    block._unpack_matrix(stored / bias_correction2),
                    Fraction(block.roots[index]) if rooted else None,
                    block.amortized_computation_config,
                    block.epsilon,
                )
                if unfit(ask.factor, self.options, dtypes=_checks.FULL) is not None:
                    continue
                if rooted and self._root_declines(ask) is None:
                    iterative.setdefault(ask.key()[0], []).append(ask)
                elif self._plain_eigh(ask.config) and ask.factor.device.type == "cpu":
                    decomposed.append(ask)
        answers = _in_parallel(decomposed, self._own_answer)
        for asks in iterative.values():
            answers += self._roots(asks)
        self._ahead.set(answers)
        try:
            yield
        finally:
            self._ahead.set(())

    def _own_answer(self, ask: _Ask) -> Any:
        """By the package's own code."""
        if ask.root is None:
            return self._own_eigendecomposition(ask.factor, ask.epsilon, ask.config)
        return self._own_root(ask.factor, ask.root, ask.config, ask.epsilon)

    def _roots(self, asks: list[_Ask]) -> list[tuple[_Ask, Tensor | None]]:
        """(A + delta I)^(-1/root) of factors of one shape, root and configuration."""
        first = asks[0]
        assert first.root is not None
        ridge, relative_ridge = self._ridge(first)
        results, info = inverse_root(
            torch.stack([ask.factor for ask in asks]),
            first.root.numerator,
            ridge=ridge,
            relative_ridge=relative_ridge,
            method="iteration",
            return_info=True,
            backend=self.options.backend,
        )
        if first.root.denominator > 1:
            results = torch.linalg.matrix_power(results, first.root.denominator)
        return [
            (ask, result if status in _ACCEPTED else None)
            for ask, result, status in zip(asks, results, info.status.tolist(), strict=True)
        ]

    def _ridge(self, ask: _Ask) -> tuple[float, float]:
        if isinstance(ask.config, self._types.CoupledHigherOrderConfig):
            return float(ask.config.abs_epsilon), float(ask.config.rel_epsilon)
        if isinstance(ask.config, self._types.EigenConfig):
            return float(ask.epsilon), _RELATIVE_RIDGE[ask.factor.dtype]
        return float(ask.epsilon), 0.0

    def _root_declines(self, ask: _Ask) -> str | None:
        root, config = ask.root, ask.config
        if root is None or not (1 <= root.numerator <= 8 and root.denominator <= 8):
            return f"root {root}"
        if min(self._ridge(ask)) < 0.0:
            return "a negative epsilon"
        if isinstance(config, self._types.EigenConfig):
            if not self.options.allow_ridge:
                return "EigenConfig without allow_ridge"
            if not self._plain_eigh(config):
                return "EigenConfig with a pseudo-inverse or on another device"
            return None
        newton = isinstance(config, self._types.CoupledNewtonConfig)
        if not newton and not isinstance(config, self._types.CoupledHigherOrderConfig):
            return type(config).__name__
        if newton and root.denominator != 1:
            return f"root {root}"
        if (
            config.max_iterations < _CONVERGING_ITERATIONS
            or config.tolerance > _CONVERGED_TOLERANCE
        ):
            return f"{config.max_iterations} iterations, tolerance {config.tolerance}"
        return None

    def _plain_eigh(self, config: Any) -> bool:
        """Whether a configuration is an eigendecomposition of the factor and nothing else."""
        return (
            isinstance(config, self._types.EighEigendecompositionConfig)
            and config.tolerance == 0.0
            and not config.eigendecomposition_offload_device
            and isinstance(config.rank_deficient_stability_config, self._types.PerturbationConfig)
        )

    # Packed storage.

    def pack(self, own: Callable[..., Tensor], matrix: Tensor) -> Tensor:
        """`pack_upper_triangular`, by one gather."""
        packed, _ = _packing(matrix.shape[0], matrix.device)
        return matrix.reshape(-1).index_select(0, packed)

    def pack_declines(self, matrix: Tensor) -> str | None:
        """Anything but a square matrix."""
        if matrix.ndim == 2 and matrix.shape[0] != matrix.shape[1]:
            return "not square"
        return unfit(matrix, self.options)

    def unpack(self, own: Callable[..., Tensor], packed: Tensor, dim: int) -> Tensor:
        """`unpack_upper_triangular`, by one gather."""
        _, full = _packing(dim, packed.device)
        return packed.index_select(0, full).view(dim, dim)

    def unpack_declines(self, packed: Tensor, dim: int) -> str | None:
        """Anything but a packed triangle."""
        if packed.shape != (dim * (dim + 1) // 2,):
            return "not packed"
        return unfit(packed[None], self.options)

    # Products.

    def products(
        self,
        own: Callable[..., tuple[Tensor, ...]],
        them: Any,
        grad: Tensor,
        order: int,
        preconditioned_dims_selector: tuple[bool, ...],
        kronecker_factors: Any,
    ) -> tuple[Tensor, ...]:
        """`_compute_outer_product_list`: G G^T and G^T G."""
        return tuple(
            gram(x, backend=self.options.backend)
            for x, selected in zip((grad, grad.mT), preconditioned_dims_selector, strict=True)
            if selected
        )

    def products_declines(
        self,
        them: Any,
        grad: Tensor,
        order: int,
        preconditioned_dims_selector: tuple[bool, ...],
        kronecker_factors: Any,
    ) -> str | None:
        """Anything but a matrix."""
        return unfit(grad, self.options)

    def precondition(
        self,
        own: Callable[..., Tensor],
        grad: Tensor,
        preconditioned_dims_selector: tuple[bool, ...],
        preconditioner_list: tuple[Tensor, ...],
        dims: tuple[list[int], list[int]] = ([0], [0]),
    ) -> Tensor:
        """`_precondition_grad`: X^T G Y, or X G Y^T where dims contracts the second index."""
        remaining = iter(preconditioner_list)
        left, right = (
            next(remaining) if selected else None for selected in preconditioned_dims_selector
        )
        if dims[1] == [0]:
            left = None if left is None else left.mT
        else:
            right = None if right is None else right.mT
        return kron_precondition(
            grad.to(preconditioner_list[0].dtype), left, right, backend=self.options.backend
        ).to(grad.dtype)

    def precondition_declines(
        self,
        grad: Tensor,
        preconditioned_dims_selector: tuple[bool, ...],
        preconditioner_list: tuple[Tensor, ...],
        dims: tuple[list[int], list[int]] = ([0], [0]),
    ) -> str | None:
        """Anything but a matrix and preconditioners of one dtype, as many as selected."""
        if dims not in (([0], [0]), ([0], [1])):
            return f"dims={dims}"
        if not preconditioner_list:
            return "no preconditioned dimension"
        if (
            sum(preconditioned_dims_selector) != len(preconditioner_list)
            or len({x.dtype for x in preconditioner_list}) > 1
        ):
            return "preconditioners that do not fit"
        for x in (grad, *preconditioner_list):
            reason = unfit(x, self.options)
            if reason is not None:
                return reason
        return None

    def orthogonalize(
        self, own: Callable[..., Tensor], A: Tensor, orthogonalization_config: Any = None
    ) -> Tensor:
        """`matrix_orthogonalization` by Newton-Schulz, in the dtype of A."""
        config = orthogonalization_config
        return newton_schulz(
            A,
            coefficients=config.coefficients,
            steps=config.num_iterations,
            eps=1e-8,
            backend=self.options.backend,
        ).mul_(config.scale_by_dims_fn(A.shape[1], A.shape[0]))

    def orthogonalize_declines(self, A: Tensor, orthogonalization_config: Any = None) -> str | None:
        """A singular value decomposition, and anything but a plain matrix."""
        config = orthogonalization_config
        if not isinstance(config, self._types.NewtonSchulzOrthogonalizationConfig):
            return type(config).__name__
        if config.num_iterations < 1:
            return f"{config.num_iterations} iterations"
        return unfit(A, self.options)

    # Trial.

    def prove(self, points: list[Point]) -> None:
        """Each function on matrices of order 4, both of the package's and its replacement."""
        own = {point.name: point.check() for point in points}
        x = trial_matrix(4, 6)
        spd = x @ x.mT + torch.eye(4, dtype=torch.float32, device="cpu")
        for config in (
            self._types.CoupledNewtonConfig(),
            self._types.CoupledHigherOrderConfig(rel_epsilon=1e-4, abs_epsilon=0.0),
        ):
            arguments = {"A": spd, "root": Fraction(4), "root_inv_config": config, "epsilon": 1e-3}
            original = own["matrix_inverse_root"]
            what = f"matrix_inverse_root by {type(config).__name__}"
            agree(what, self.root(original, **arguments), original(**arguments), _BOUND)
        config = self._types.NewtonSchulzOrthogonalizationConfig()
        original = own["matrix_orthogonalization"]
        agree(
            "matrix_orthogonalization",
            self.orthogonalize(original, x, config),
            original(x, orthogonalization_config=config),
            _BOUND,
        )
        original = own["_compute_outer_product_list"]
        mine, theirs = (
            product(SimpleNamespace(), x, 2, (True, True), None)
            for product in (lambda *args: self.products(original, *args), original)
        )
        for side in range(2):
            agree("_compute_outer_product_list", mine[side], theirs[side], _BOUND)
        original = own["_precondition_grad"]
        right = trial_matrix(6, 6, 1.3)
        for dims in (([0], [0]), ([0], [1])):
            for selector, sides in (((True, True), (spd, right)), ((False, True), (right,))):
                agree(
                    "_precondition_grad",
                    self.precondition(original, x, selector, sides, dims),
                    original(x, selector, sides, dims),
                    _BOUND,
                )
        packed = self.pack(own["pack_upper_triangular"], spd)
        agree("pack_upper_triangular", packed, own["pack_upper_triangular"](spd), 0.0)
        original = own["unpack_upper_triangular"]
        agree("unpack_upper_triangular", self.unpack(original, packed, 4), original(packed, 4), 0.0)
        self._prove_update(own["update_preconditioners"])

    def _prove_update(self, original: Callable[..., None]) -> None:
        """That a step with roots is one without, and then every block's `amortized_computation`."""
        asked: list[float] = []
        block = SimpleNamespace(
            use_trace_scaling=True,
            factor_matrices=(),
            amortized_computation=lambda bias_correction2: asked.append(bias_correction2),
        )
        them = SimpleNamespace(
            _update_factor_matrices=lambda masked_grad_list: asked.append(len(masked_grad_list)),
            _use_bias_correction=False,
            _bias_correction2=0.5,
            _beta2=1.0,
            _masked_kronecker_factors_unwrapped=(block, block),
        )
        for update in (original, lambda *args: self.update(original, *args)):
            asked.clear()
            update(them, (), torch.tensor(1.0, dtype=torch.float32, device="cpu"), True)
            if asked != [0, 0.5, 0.5]:
                raise Refused("update_preconditioners does not do what the version expected does")


def _module(name: str) -> ModuleType:
    module = sys.modules.get(f"{_PACKAGE}.{name}")
    if module is None:
        raise Refused(f"{_PACKAGE} has no module {name} any more")
    return module


@lru_cache(maxsize=16)
def _packing(dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the elements of a packed triangle stand in the matrix, and the reverse."""
    rows, columns = torch.triu_indices(dim, dim, dtype=torch.int64, device=device)
    packed = rows * dim + columns
    full = torch.empty(dim, dim, dtype=torch.int64, device=device)
    full[rows, columns] = full[columns, rows] = torch.arange(
        packed.numel(), dtype=torch.int64, device=device
    )
    small = torch.int32 if dim < 1 << 15 else torch.int64
    return packed.to(small), full.view(-1).to(small)


def _batches(blocks: Sequence[Any]) -> Iterator[list[Any]]:
    """The blocks in order, as many at a time as have `_BATCH_ELEMENTS`, one at least."""
    batch: list[Any] = []
    elements = 0
    for block in blocks:
        size = sum(factor.numel() for factor in block.factor_matrices)
        if batch and elements + size > _BATCH_ELEMENTS:
            yield batch
            batch, elements = [], 0
        batch.append(block)
        elements += size
    if batch:
        yield batch


def _in_parallel(asks: list[_Ask], answer: Callable[[_Ask], Any]) -> list[tuple[_Ask, Any]]:
    """The answers, one a thread, without those that fail; none for a single thread.

    LAPACK gains little from several threads within a decomposition.
    """
    total = torch.get_num_threads()
    workers = min(total, len(asks))
    if workers < 2:
        return []

    def start() -> None:
        torch.set_num_threads(total // workers)

    def attempt(ask: _Ask) -> tuple[_Ask, Any] | None:
        try:
            with torch.no_grad():
                return ask, answer(ask)
        except Exception:
            # The package calls the function again itself, and handles what it raises.
            return None

    largest_first = sorted(asks, key=lambda ask: -ask.factor.numel())
    try:
        with ThreadPoolExecutor(workers, initializer=start) as pool:
            return [known for known in pool.map(attempt, largest_first) if known is not None]
    finally:
        # set_num_threads is meant for a thread, but threads that start later take its last value.
        torch.set_num_threads(total)
