"""A small stand-in for the module of the same name: half precision, no Gram form."""

import torch

ROWS = [
    [4.0848, -6.8946, 2.9270],
    [3.9505, -6.3029, 2.6377],
    [3.7418, -5.5913, 2.3037],
    [2.8769, -3.1427, 1.2046],
    [2.8366, -3.0525, 1.2012],
]


class GramNewtonSchulz:
    def __init__(
        self,
        ns_epsilon=1e-7,
        ns_use_kernels=True,
        ns_coefficients=None,
        use_gram_newton_schulz=True,
        gram_newton_schulz_reset_iterations=None,
        compile_kwargs=None,
    ):
        self.ns_epsilon = ns_epsilon
        self.ns_coefficients = ROWS if ns_coefficients is None else ns_coefficients
        self.use_gram_newton_schulz = use_gram_newton_schulz
        self._kernel_backend = object() if ns_use_kernels else None

    def __call__(self, X):
        x = X.to(torch.float32)
        tall = x.shape[-2] > x.shape[-1]
        x = x.mT if tall else x
        # As in the original, this writes a float32 argument.
        x /= torch.linalg.matrix_norm(x, keepdim=True) + self.ns_epsilon
        x = x.half()
        for a, b, c in self.ns_coefficients:
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
        return (x.mT if tall else x).to(X.dtype)


class StandardNewtonSchulz(GramNewtonSchulz):
    def __init__(self, ns_use_kernels=True, **options):
        super().__init__(ns_use_kernels=ns_use_kernels, use_gram_newton_schulz=False, **options)
