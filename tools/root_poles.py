"""Poles of inverse roots: csrc/cpu/inverse_root/pole_table.inl.

    python tools/root_poles.py > csrc/cpu/inverse_root/pole_table.inl

For p = 2 and 4 and spectra from 2^-k to 1: the fewest poles with which a quadratic in x and a sum
of w / (x + s) have x^(-1/p) to a relative error of 0.05 / p, which the cubic that follows takes
below rounding. Least squares with weights that grow where the error is largest; it takes minutes.
Needs NumPy and SciPy.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import least_squares

ROOTS, EXPONENTS = (2, 4), range(2, 24, 2)
ERROR = 0.05  # of R^p
MARGIN = 1.02  # between the points
POINTS, ROUNDS, EVALUATIONS = 600, 25, 40
DEGREE = 2


class Fit:
    """The best of some rounds: error, log s of every pole, weights w and then c0, c1, c2."""

    def __init__(self, p: int, low: float, start: np.ndarray) -> None:
        t = (1.0 - np.cos(np.pi * np.linspace(0.0, 1.0, POINTS))) / 2.0
        self.x = np.exp(math.log(low) * (1.0 - t))
        self.root = self.x ** (1.0 / p)
        self.weights = np.ones(POINTS)
        self.error, self.poles, self.linear = math.inf, start, np.zeros(0)
        bounds = (math.log(low) - 5.0, 3.5)
        poles = start
        for _ in range(ROUNDS):
            poles = least_squares(self.weighted_error, poles, bounds=bounds, max_nfev=EVALUATIONS).x
            linear = self.solve(poles)
            error = np.abs(self.basis(poles) @ linear - 1.0)
            if error.max() < self.error:
                self.error, self.poles, self.linear = float(error.max()), poles, linear
            self.weights = self.weights * np.sqrt(error / error.max() + 1e-4)
            self.weights = self.weights / self.weights.max()

    def basis(self, poles: np.ndarray) -> np.ndarray:
        x = self.x[:, None]
        powers = [x**i for i in range(DEGREE + 1)]
        return np.hstack([1.0 / (x + np.exp(poles)), *powers]) * self.root[:, None]

    def solve(self, poles: np.ndarray) -> np.ndarray:
        basis = self.basis(poles) * self.weights[:, None]
        scale = np.linalg.norm(basis, axis=0)
        found: np.ndarray = np.linalg.lstsq(basis / scale, self.weights, rcond=None)[0] / scale
        return found

    def weighted_error(self, poles: np.ndarray) -> np.ndarray:
        return (self.basis(poles) @ self.solve(poles) - 1.0) * self.weights


def fewest(p: int, exponent: int) -> Fit:
    bottom, count = -exponent * math.log(2.0) - 0.7, 0
    while True:
        count += 1
        tops = (0.5, -0.5, 1.5) if count > 1 else (bottom / 2.0,)
        fits = [Fit(p, 2.0**-exponent, np.linspace(bottom, top, count)[-count:]) for top in tops]
        best = min(fits, key=lambda fit: fit.error)
        if best.error <= ERROR / p:
            return best


def numbers(values: np.ndarray) -> str:
    return "{" + ", ".join(f"{value:.12g}" for value in values) + "}"


def main() -> None:
    print("constexpr Poles kTable[] = {")
    for p in ROOTS:
        for exponent in EXPONENTS:
            fit = fewest(p, exponent)
            order, count = np.argsort(-fit.poles), len(fit.poles)
            columns = (np.exp(fit.poles)[order], fit.linear[:count][order], fit.linear[count:])
            line = ", ".join(map(numbers, columns))
            print(f"    {{{p}, {exponent}, {MARGIN * fit.error:.3g}, {line}}},")
    print("};")


if __name__ == "__main__":
    main()
