#include "root_rows.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

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

// The error with which x^(1/p) N(x) alternates 1 - error, 1 + error on `points` points, for the N
// whose degree is two less; h = x^(-1/p) at them. N interpolates (1 -+ error) h, so its highest
// divided difference vanishes.
double alternating_error(const double* x, int points, double q, double* h) {
  double plain = 0, alternating = 0;
  for (int i = 0; i < points; i++) {
    h[i] = std::pow(x[i], -q);
    double w = 1;
    for (int j = 0; j < points; j++)
      if (j != i) w /= x[i] - x[j];
    plain += w * h[i];
    alternating += (i % 2 == 0 ? -1 : 1) * w * h[i];
  }
  return -plain / alternating;
}

// N = alpha + beta v + gamma v² in v = x - 1, levelled on (low, x1, x2, 1).
struct Levelled {
  double error, alpha, beta, gamma;
};

Levelled level(double low, double x1, double x2, double q) {
  const double x[4] = {low, x1, x2, 1};
  double h[4];
  const double error = alternating_error(x, 4, q, h);
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

// The best row for no longer a spectrum than rounding allows: it is positive, below 1 and rising
// from 0 to where that spectrum begins.
template <class Best>
RootRow shortened(Best best, double& low, int p) {
  const double shortest = 0.12 / std::sqrt(double(p));
  if (low >= shortest) return best(low, p);
  double bound = shortest;
  const RootRow row = best(bound, p);
  low = coupled(row, low, p);
  return row;
}

// `linear` linear rows, then quadratic ones, the last of them linear if that is enough.
std::vector<RootRow> mixed_schedule(double low, int p, double tolerance, size_t linear) {
  std::vector<RootRow> rows;
  while (1 - low > tolerance) {
    double after = low;
    RootRow row = shortened(linear_row, after, p);
    if (rows.size() >= linear && 1 - after > tolerance) {
      after = low;
      row = shortened(quadratic_row, after, p);
    }
    rows.push_back(row);
    low = after;
  }
  return rows;
}

}  // namespace

double root_tolerance(double unit_roundoff) { return 4 * unit_roundoff; }

std::vector<RootRow> root_schedule(double low, int p, double tolerance) {
  constexpr size_t kMostLinear = 4;
  std::vector<RootRow> best = mixed_schedule(low, p, tolerance, 0);
  for (size_t linear = 1; linear <= kMostLinear; linear++) {
    std::vector<RootRow> rows = mixed_schedule(low, p, tolerance, linear);
    if (root_products(rows, p) <= root_products(best, p)) best = std::move(rows);
  }
  return best;
}

int root_products(const std::vector<RootRow>& rows, int p) {
  int power = -1;  // of N^p M: squarings, and a product for every other bit
  for (int rest = p; rest > 0; rest /= 2) power += 1 + rest % 2;
  int products = 0;
  for (size_t step = 0; step < rows.size(); step++)
    products += (rows[step].c != 0) + (step > 0) + (step + 1 < rows.size() ? power : 0);
  return products;
}

}  // namespace spectral_kernels
