#include "root_rows.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace spectral_kernels {
namespace {

// x N(x)^p
double coupled(const RootRow& row, double x, int p) {
  return x * std::pow(row.a + x * (row.b + x * row.c), p);
}

// Equal values at both ends of [low, 1] and the interior maximum 1. `low` becomes the next lower
// bound.
RootRow linear_row(double& low, int p) {
  const double tau = std::pow(low, 1.0 / p), rho = (1 - tau) / (1 - tau * low);
  const auto value = [&](double x) { return x * std::pow(1 - rho * x, p); };
  const double top = 1 / ((p + 1) * rho), ends = std::min(value(low), value(1));
  double peak = std::max(value(low), value(1));
  if (low < top && top < 1) peak = std::max(peak, value(top));
  const double a = std::pow(peak, -1.0 / p);
  low = ends / peak;
  return {a, -a * rho, 0};
}

// N = alpha + beta v + gamma v² in v = x - 1, with x^(1/p) N alternating 1 -+ error on the four
// points.
struct Levelled {
  double error, alpha, beta, gamma;
};

Levelled level(double low, double x1, double x2, double q) {
  const double x[4] = {low, x1, x2, 1}, sign[4] = {-1, 1, -1, 1};
  double h[4], w[4], plain = 0, alternating = 0;
  for (int i = 0; i < 4; i++) {
    h[i] = std::pow(x[i], -q);
    w[i] = 1;
    for (int j = 0; j < 4; j++)
      if (j != i) w[i] /= x[i] - x[j];
    plain += w[i] * h[i];
    alternating += sign[i] * w[i] * h[i];
  }
  const double error = -plain / alternating;
  const double y1 = (1 + error) * h[1], y2 = (1 - error) * h[2], y3 = (1 + error) * h[3];
  const double slope = (y3 - y2) / (1 - x2);
  const double gamma = (slope - (y2 - y1) / (x2 - x1)) / (1 - x1);
  return {error, y3, slope + gamma * (1 - x2), gamma};
}

// Remez: the extrema of x^(1/p) N(x) are the zeros of N / p + x N', a quadratic.
RootRow quadratic_row(double& low, int p) {
  const double q = 1.0 / p;
  if (low > 0.999) {  // rounding hides the extrema: the Taylor row of (1 - e)^(-1/p)
    const double first = q, second = q * (q + 1) / 2, third = second * (q + 2) / 3;
    low = 1 - 2 * p * third * std::pow(1 - low, 3);
    return {1 + first + second, -first - 2 * second, second};
  }
  const double tau = std::pow(low, q);
  double x1 = std::pow(tau + 0.25 * (1 - tau), p), x2 = std::pow(tau + 0.75 * (1 - tau), p);
  constexpr int kMostExchanges = 50;
  for (int exchange = 0; exchange < kMostExchanges; exchange++) {
    const Levelled n = level(low, x1, x2, q);
    const double second = n.gamma * (q + 2), first = n.beta * (q + 1) + 2 * n.gamma;
    const double constant = n.alpha * q + n.beta;
    const double half =
        -0.5 * (first + std::copysign(std::sqrt(first * first - 4 * second * constant), first));
    double new1 = 1 + half / second, new2 = 1 + constant / half;
    if (new1 > new2) std::swap(new1, new2);
    const double moved = std::max(std::abs(new1 - x1), std::abs(new2 - x2));
    if (moved < 1e-4 * std::min(x1, 1 - low)) {
      const double scale = 1 / (1 + n.error);
      const RootRow row{scale * (n.alpha - n.beta + n.gamma), scale * (n.beta - 2 * n.gamma),
                        scale * n.gamma};
      low = coupled(row, low, p);
      return row;
    }
    x1 = new1;
    x2 = new2;
  }
  throw std::runtime_error("no quadratic root row for low=" + std::to_string(low) +
                           ", p=" + std::to_string(p));
}

}  // namespace

double root_tolerance(double low, double unit_roundoff) {
  return std::min(4e-4, std::max(4 * unit_roundoff, unit_roundoff / (20 * low)));
}

std::vector<RootRow> root_schedule(double low, int p, double tolerance) {
  constexpr size_t kLinearRows = 2;
  std::vector<RootRow> rows;
  while (1 - low > tolerance)
    rows.push_back(rows.size() < kLinearRows ? linear_row(low, p) : quadratic_row(low, p));
  return rows;
}

}  // namespace spectral_kernels
