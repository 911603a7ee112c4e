"""Blocks and their preconditioners, by the names of the package that this stands in for."""

from fractions import Fraction

import torch

from distributed_shampoo.preconditioner.matrix_functions import (
    matrix_eigendecomposition,
    matrix_inverse_root,
    pack_upper_triangular,
    unpack_upper_triangular,
)


class BaseShampooKroneckerFactorsUnwrapped:
    factor_matrices: tuple[torch.Tensor, ...]
    roots: tuple[float, ...]
    amortized_computation_config: object
    epsilon: float
    use_trace_scaling: bool = False

    def __init__(self, shape, config, epsilon):
        self.factor_matrices = tuple(torch.zeros(n * (n + 1) // 2) for n in shape)
        self.dims = shape
        self.roots = (4.0,) * len(shape)
        self.amortized_computation_config = config
        self.epsilon = epsilon

    def _pack_matrix(self, matrix):
        return pack_upper_triangular(matrix)

    def _unpack_matrix(self, matrix):
        return unpack_upper_triangular(
            matrix, self.dims[0] if len(matrix) == self._size(0) else self.dims[1]
        )

    def _size(self, side):
        return self.dims[side] * (self.dims[side] + 1) // 2

    def amortized_computation(self, bias_correction2):
        for index, packed in enumerate(self.factor_matrices):
            matrix = self._unpack_matrix(packed / bias_correction2)
            if not matrix.isfinite().all():
                raise ValueError("factor matrix is not finite")
            self._amortized_computation(index, matrix)


class RootFactors(BaseShampooKroneckerFactorsUnwrapped):
    def __init__(self, *args):
        super().__init__(*args)
        self.inv_factor_matrices = [torch.eye(n) for n in self.dims]

    def _amortized_computation(self, index, matrix):
        self.inv_factor_matrices[index] = matrix_inverse_root(
            A=matrix,
            root=Fraction(self.roots[index]),
            root_inv_config=self.amortized_computation_config,
            epsilon=self.epsilon,
        )


class EigenFactors(BaseShampooKroneckerFactorsUnwrapped):
    def __init__(self, *args):
        super().__init__(*args)
        self.eigen = [None] * len(self.dims)

    def _amortized_computation(self, index, matrix):
        self.eigen[index] = matrix_eigendecomposition(
            A=matrix,
            epsilon=self.epsilon,
            eigendecomposition_config=self.amortized_computation_config,
        )


class BaseShampooPreconditionerList:
    def __init__(self, blocks, beta2=0.9):
        self._masked_kronecker_factors_unwrapped = blocks
        self._use_bias_correction = True
        self._bias_correction2 = 1.0
        self._beta2 = beta2

    def update_preconditioners(self, masked_grad_list, step, perform_amortized_computation):
        self._update_factor_matrices(masked_grad_list=masked_grad_list)
        if self._use_bias_correction:
            self._bias_correction2 = 1.0 - self._beta2 ** float(step)
        if perform_amortized_computation:
            for block in self._masked_kronecker_factors_unwrapped:
                block.amortized_computation(bias_correction2=self._bias_correction2)

    def _compute_outer_product_list(
        self, grad, order, preconditioned_dims_selector, kronecker_factors
    ):
        products = (grad @ grad.T, grad.T @ grad)
        return tuple(
            x for x, yes in zip(products, preconditioned_dims_selector, strict=True) if yes
        )

    def _update_factor_matrices(self, masked_grad_list):
        for grad, block in zip(
            masked_grad_list, self._masked_kronecker_factors_unwrapped, strict=True
        ):
            products = self._compute_outer_product_list(grad, 2, (True, True), block)
            for factor, product in zip(block.factor_matrices, products, strict=True):
                factor.lerp_(block._pack_matrix(product), 1 - self._beta2)

    @staticmethod
    def _precondition_grad(
        grad, preconditioned_dims_selector, preconditioner_list, dims=([0], [0])
    ):
        remaining = list(preconditioner_list)
        for axis, selected in enumerate(preconditioned_dims_selector):
            if selected:
                matrix = remaining.pop(0)
                matrix = matrix.T if dims[1] == [0] else matrix
                grad = torch.movedim(torch.tensordot(matrix, grad, ([1], [axis])), 0, axis)
        return grad

    def precondition(self, grads):
        return [
            self._precondition_grad(
                grad=grad,
                preconditioned_dims_selector=(True, True),
                preconditioner_list=tuple(block.inv_factor_matrices),
            )
            for grad, block in zip(grads, self._masked_kronecker_factors_unwrapped, strict=True)
        ]
