#include "root_rows.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <stdexcept>
#include <string>

namespace spectral_kernels {
namespace {

// x N(x)^p
double coupled(const RootRow& row, double x, int p) {
  return x * std::pow(row.a + x * (row.b + x * (row.c + x * (row.d + x * row.e))), p);
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

constexpr int kLong = 4;  // degree of a long row
using Quartic = std::array<double, kLong + 1>;

double value(const double* c, int degree, double x) {
  double sum = c[degree];
  for (int k = degree - 1; k >= 0; k--) sum = sum * x + c[k];
  return sum;
}

// The zeros in (low, 1) of a polynomial that has as many there as its degree: each between two of
// its derivative's, by Newton's method inside a shrinking bracket.
void real_zeros(const double* c, int degree, double low, double* zeros) {
  if (degree == 1) {
    zeros[0] = -c[0] / c[1];
    return;
  }
  double derivative[kLong] = {}, bounds[kLong + 1];
  for (int k = 1; k <= degree; k++) derivative[k - 1] = k * c[k];
  bounds[0] = low;
  real_zeros(derivative, degree - 1, low, bounds + 1);
  bounds[degree] = 1;
  for (int i = 0; i < degree; i++) {
    double left = bounds[i], right = bounds[i + 1], x = 0.5 * (left + right);
    const bool rising = value(c, degree, right) > value(c, degree, left);
    for (int step = 0; step < 60; step++) {
      const double y = value(c, degree, x);
      ((y > 0) == rising ? right : left) = x;
      double next = x - y / value(derivative, degree - 1, x);
      if (!(next > left && next < right)) next = 0.5 * (left + right);
      const bool still = std::abs(next - x) <= 1e-12 * x;
      x = next;
      if (still) break;
    }
    zeros[i] = x;
  }
}

// As quadratic_row, on six points.
RootRow quartic_row(double& low, int p) {
  const double q = 1.0 / p;
  if (low > 0.97) {  // rounding hides the extrema: the Taylor row of (1 - e)^(-1/p)
    RootRow row{0, 0, 0};
    double power[kLong + 1] = {1, 0, 0, 0, 0}, coefficient = 1;  // of e^k = (1 - x)^k
    double* const sum[] = {&row.a, &row.b, &row.c, &row.d, &row.e};
    for (int k = 0; k <= kLong; k++) {
      for (int i = 0; i <= k; i++) *sum[i] += coefficient * power[i];
      for (int i = kLong; i > 0; i--) power[i] -= power[i - 1];
      coefficient *= (q + k) / (k + 1);
    }
    low = 1 - 2 * p * coefficient * std::pow(1 - low, kLong + 1);
    return row;
  }
  constexpr int kPoints = kLong + 2;
  const double tau = std::pow(low, q), pi = std::acos(-1.0);
  double x[kPoints];
  for (int i = 0; i < kPoints; i++)
    x[i] = std::pow(tau + (1 - tau) * 0.5 * (1 - std::cos(pi * i / (kPoints - 1))), p);
  x[0] = low;
  x[kPoints - 1] = 1;
  constexpr int kMostExchanges = 50;
  for (int exchange = 0; exchange < kMostExchanges; exchange++) {
    double h[kPoints];
    const double error = alternating_error(x, kPoints, q, h);
    // Newton's form on all points but the first, from 1 downwards, and its expansion.
    double difference[kLong + 1];
    for (int i = 0; i <= kLong; i++) {
      const int at = kPoints - 1 - i;
      difference[i] = (1 + (at % 2 == 0 ? -error : error)) * h[at];
    }
    for (int order = 1; order <= kLong; order++)
      for (int i = kLong; i >= order; i--)
        difference[i] =
            (difference[i] - difference[i - 1]) / (x[kPoints - 1 - i] - x[kPoints - 1 - i + order]);
    Quartic n{};
    for (int i = kLong; i >= 0; i--) {
      const double point = x[kPoints - 1 - i];
      for (int k = kLong; k > 0; k--) n[size_t(k)] = n[size_t(k - 1)] - point * n[size_t(k)];
      n[0] = difference[i] - point * n[0];
    }
    double slope[kLong + 1], extrema[kLong], moved = 0;
    for (int k = 0; k <= kLong; k++) slope[k] = (q + k) * n[size_t(k)];
    real_zeros(slope, kLong, low, extrema);
    for (int i = 0; i < kLong; i++) moved = std::max(moved, std::abs(extrema[i] - x[i + 1]));
    if (moved < 1e-4 * std::min(x[1], 1 - low)) {
      const double scale = 1 / (1 + std::abs(error));
      const RootRow row{scale * n[0], scale * n[1], scale * n[2], scale * n[3], scale * n[4]};
      low = coupled(row, low, p);
      return row;
    }
    std::copy_n(extrema, kLong, x + 1);
  }
  throw std::runtime_error("no quartic root row for low=" + std::to_string(low) +
                           ", p=" + std::to_string(p));
}

// Two linear rows, `quadratic` quadratic ones, then quartic ones; the last of the lowest degree
// that reaches the tolerance.
std::vector<RootRow> mixed_schedule(double low, int p, double tolerance, size_t quadratic) {
  constexpr size_t kLinear = 2;
  std::vector<RootRow> rows;
  while (1 - low > tolerance) {
    double next = low;
    RootRow row = linear_row(next, p);
    if (rows.size() >= kLinear && 1 - next > tolerance) {
      next = low;
      row = quadratic_row(next, p);
      if (rows.size() >= kLinear + quadratic && 1 - next > tolerance) {
        next = low;
        row = quartic_row(next, p);
      }
    }
    rows.push_back(row);
    low = next;
  }
  return rows;
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

int root_products(const std::vector<RootRow>& rows, int p) {
  int power = -1;  // of N^p M: squarings, and a product for every other bit
  for (int rest = p; rest > 0; rest /= 2) power += 1 + rest % 2;
  int products = 0;
  for (size_t step = 0; step < rows.size(); step++) {
    const RootRow& row = rows[step];
    products += row.c == 0 ? 0 : row.e == 0 ? 1 : 2;
    products += (step > 0) + (step + 1 < rows.size() ? power : 0);
  }
  return products;
}

std::vector<RootRow> short_root_schedule(double low, int p, double tolerance) {
  constexpr size_t kMost = 64;
  std::vector<RootRow> best = mixed_schedule(low, p, tolerance, kMost);
  if (p == 1) return best;
  for (const size_t quadratic : {0, 1}) {
    std::vector<RootRow> rows = mixed_schedule(low, p, tolerance, quadratic);
    if (root_products(rows, p) < root_products(best, p)) best = std::move(rows);
  }
  return best;
}

}  // namespace spectral_kernels
