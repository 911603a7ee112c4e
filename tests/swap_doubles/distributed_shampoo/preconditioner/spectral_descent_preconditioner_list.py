from distributed_shampoo.preconditioner.matrix_functions import matrix_orthogonalization


def precondition(grads, config):
    return [matrix_orthogonalization(g, orthogonalization_config=config) for g in grads]
