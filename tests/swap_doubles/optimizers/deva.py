"""A small stand-in for DeVA's module of the same name: the class DeVASchattenNorm."""

import inspect
import types

from soap import SOAP

from optimizers.muon import msign


def copied(name):
    """A method of SOAP as a function of its own, as in the original, which repeats the code."""
    method = inspect.unwrap(vars(SOAP)[name])
    return types.FunctionType(
        method.__code__, method.__globals__, name, method.__defaults__, method.__closure__
    )


class DeVASchattenNorm(SOAP):
    init_preconditioner = copied("init_preconditioner")
    get_orthogonal_matrix = copied("get_orthogonal_matrix")
    project = copied("project")
    project_back = copied("project_back")
    update_preconditioner = copied("update_preconditioner")
    get_orthogonal_matrix_QR = copied("get_orthogonal_matrix_QR")

    def direction(self, state, group):
        rows = state["exp_avg"].square().sum(-1, keepdim=True).sqrt()
        columns = state["exp_avg"].square().sum(-2, keepdim=True).sqrt()
        gamma = (rows * columns / (state["exp_avg_sq"].sum().sqrt() + group["eps"])).sqrt()
        return msign(state["exp_avg"], steps=5) * gamma
