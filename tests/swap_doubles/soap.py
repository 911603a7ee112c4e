"""A small stand-in for the public SOAP: its class, method and state names, matrices and vectors."""

import torch
from torch.optim import Optimizer


class SOAP(Optimizer):
    def __init__(
        self,
        params,
        lr=3e-3,
        betas=(0.9, 0.9),
        eps=1e-8,
        precondition_frequency=4,
        max_precond_dim=10000,
        merge_dims=False,
    ):
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "precondition_frequency": precondition_frequency,
                "max_precond_dim": max_precond_dim,
                "merge_dims": merge_dims,
            },
        )
        self._data_format = "channels_first"

    def merge_dims(self, grad, max_precond_dim):
        return grad.flatten(1) if grad.ndim > 2 else grad

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            shape = {
                "merge_dims": group["merge_dims"],
                "max_precond_dim": group["max_precond_dim"],
            }
            for p in group["params"]:
                state = self.state[p]
                if "Q" not in state:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(p)
                    state["exp_avg_sq"] = torch.zeros_like(p)
                    self.init_preconditioner(
                        p.grad, state, group["precondition_frequency"], beta2, **shape
                    )
                    self.update_preconditioner(p.grad, state, **shape)
                    continue
                rotated = self.project(p.grad, state, **shape)
                state["step"] += 1
                state["exp_avg"].mul_(beta1).add_(rotated, alpha=1 - beta1)
                state["exp_avg_sq"].mul_(beta2).add_(rotated.square(), alpha=1 - beta2)
                update = self.direction(state, group)
                p.add_(self.project_back(update, state, **shape), alpha=-group["lr"])
                self.update_preconditioner(p.grad, state, **shape)

    def direction(self, state, group):
        return state["exp_avg"] / (state["exp_avg_sq"].sqrt() + group["eps"])

    def init_preconditioner(
        self,
        grad,
        state,
        precondition_frequency=10,
        shampoo_beta=0.95,
        max_precond_dim=10000,
        precondition_1d=False,
        merge_dims=False,
    ):
        shape = self.merge_dims(grad, max_precond_dim).shape if merge_dims else grad.shape
        wanted = [len(shape) > 1 and size <= max_precond_dim for size in shape]
        state["GG"] = [
            torch.zeros(size, size) if yes else [] for size, yes in zip(shape, wanted, strict=True)
        ]
        state["Q"] = None
        state["precondition_frequency"] = precondition_frequency
        state["shampoo_beta"] = shampoo_beta

    def _rotate(self, grad, state, merge_dims, max_precond_dim, transposed):
        shape = grad.shape
        if merge_dims:
            grad = self.merge_dims(grad, max_precond_dim)
        for axis, basis in enumerate(state["Q"]):
            if len(basis) > 0:
                matrix = basis.T if transposed else basis
                grad = torch.movedim(torch.tensordot(matrix, grad, ([1], [axis])), 0, axis)
        return grad.reshape(shape)

    def project(self, grad, state, merge_dims=False, max_precond_dim=10000):
        return self._rotate(grad, state, merge_dims, max_precond_dim, True)

    def project_back(self, grad, state, merge_dims=False, max_precond_dim=10000):
        return self._rotate(grad, state, merge_dims, max_precond_dim, False)

    def update_preconditioner(
        self, grad, state, max_precond_dim=10000, merge_dims=False, precondition_1d=False
    ):
        shape = {"merge_dims": merge_dims, "max_precond_dim": max_precond_dim}
        if state["Q"] is not None:
            state["exp_avg"] = self.project_back(state["exp_avg"], state, **shape)
        matrix = self.merge_dims(grad, max_precond_dim) if merge_dims else grad
        for axis, factor in enumerate(state["GG"]):
            if len(factor) > 0:
                rows = torch.movedim(matrix, axis, 0).flatten(1)
                factor.lerp_(rows @ rows.T, 1 - state["shampoo_beta"])
        if state["Q"] is None:
            state["Q"] = self.get_orthogonal_matrix(state["GG"])
        if state["step"] > 0:
            if state["step"] % state["precondition_frequency"] == 0:
                state["Q"] = self.get_orthogonal_matrix_QR(state, max_precond_dim, merge_dims)
            state["exp_avg"] = self.project(state["exp_avg"], state, **shape)

    def get_orthogonal_matrix(self, mat):
        return [torch.linalg.eigh(m)[1].flip(1) if len(m) > 0 else [] for m in mat]

    def get_orthogonal_matrix_QR(self, state, max_precond_dim=10000, merge_dims=False):
        squares = state["exp_avg_sq"]
        matrix = self.merge_dims(squares, max_precond_dim) if merge_dims else squares
        bases = []
        for axis, (factor, basis) in enumerate(zip(state["GG"], state["Q"], strict=True)):
            if len(factor) == 0:
                bases.append([])
                continue
            order = torch.argsort((basis * (factor @ basis)).sum(0), descending=True)
            matrix = matrix.index_select(axis, order)
            bases.append(torch.linalg.qr(factor @ basis[:, order])[0])
        state["exp_avg_sq"] = matrix.reshape(squares.shape)
        return bases
