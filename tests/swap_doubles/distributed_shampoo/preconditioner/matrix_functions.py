"""Matrix functions, by the names of the package that this stands in for, all through LAPACK."""

import torch

from distributed_shampoo.preconditioner import matrix_functions_types as types


def pack_upper_triangular(matrix):
    rows, columns = torch.triu_indices(*matrix.shape)
    return matrix[rows, columns]


def unpack_upper_triangular(packed, dim):
    rows, columns = torch.triu_indices(dim, dim)
    matrix = packed.new_zeros(dim, dim)
    matrix[rows, columns] = matrix[columns, rows] = packed
    return matrix


def matrix_inverse_root(A, root, root_inv_config=None, epsilon=0.0):
    config = types.EigenConfig() if root_inv_config is None else root_inv_config
    ridge = epsilon
    if isinstance(config, types.CoupledHigherOrderConfig):
        ridge = max(config.abs_epsilon, config.rel_epsilon * float(A.abs().sum(1).max()))
    values, vectors = torch.linalg.eigh(A + ridge * torch.eye(len(A), dtype=A.dtype))
    if values[0] < epsilon:
        values = values - values[0] + epsilon
    return (vectors * values ** (-1 / float(root))) @ vectors.T


def matrix_eigendecomposition(
    A, epsilon=0.0, eigendecomposition_config=None, eigenvectors_estimate=None
):
    return torch.linalg.eigh(A + epsilon * torch.eye(len(A), dtype=A.dtype))


def matrix_orthogonalization(A, orthogonalization_config=None):
    config = orthogonalization_config
    if isinstance(config, types.SVDOrthogonalizationConfig):
        u, _, vh = torch.linalg.svd(A, full_matrices=False)
        return (u @ vh) * config.scale_by_dims_fn(A.shape[1], A.shape[0])
    a, b, c = config.coefficients
    x = A / A.norm().clamp(min=1e-8)
    for _ in range(config.num_iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x * config.scale_by_dims_fn(A.shape[1], A.shape[0])
