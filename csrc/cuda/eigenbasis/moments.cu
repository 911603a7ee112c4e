// Adam's moments in a rotated basis, step sizes on the device, and the end of a step.
#include "../base/delivery.h"
#include "../base/launch.h"
#include "../base/reduce.h"
#include "elements.h"
#include "moments.h"

namespace spectral_kernels::cuda {
namespace {

constexpr int kThreads = kElementThreads;

HOST_DEVICE int64_t copy_parts(const Entry& e) { return parts_of(e.rows, e.columns); }

DEVICE float new_square(const MomentEntry& e, const Adam& adam, float g, int64_t matrix,
                        int64_t row, int64_t column) {
  const float v = read(e.squares, index(e.squares, matrix, row, column));
  return averaged(adam.second, v, g * g);
}

__global__ void __launch_bounds__(kThreads)
    adam_kernel(const __grid_constant__ TableOf<MomentEntry> table, const Adam adam,
                uint32_t* largest) {
  DYNAMIC_SHARED(uint32_t, warps);
  const auto at = place(table, blockIdx.x, [](const MomentEntry& e) { return moment_parts(e); });
  const MomentEntry& e = *at.entry;
  uint32_t most = 0;
  each_element(e.rows, e.columns, by_columns(e.moment), at.part, [&](int64_t row, int64_t column) {
    const float g = gradient_of(e, adam, at.matrix, row, column);
    const float m = new_moment(e, adam, g, at.matrix, row, column);
    const float v = new_square(e, adam, g, at.matrix, row, column);
    const float divisor = sqrtf(v) + adam.eps;
    write_at(e.direction, at.matrix, row, column, divisor == 0 ? 0.f : m / divisor);
    write_at(e.new_moment, at.matrix, row, column, m);
    write_at(e.new_squares, at.matrix, row, column, v);
    most = larger(most, larger(size_bits(m), size_bits(v)));
  });
  raise_largest<kThreads>(most, warps, largest + e.first + at.matrix);
}

// numbers

DEVICE double steps_of(const Counter& c, int64_t i) {
  const int64_t at = c.each ? i : 0;
  if (c.integer) return double(static_cast<const int64_t*>(c.steps)[at]);
  if (c.type == Type::kF64) return static_cast<const double*>(c.steps)[at];
  return double(static_cast<const float*>(c.steps)[at]);
}

__global__ void __launch_bounds__(kThreads)
    numbers_kernel(const __grid_constant__ CounterTable table, const Schedule schedule,
                   Numbers* numbers, uint32_t* largest) {
  const Counter& c = table.counters[blockIdx.x];
  const double lr = schedule.device_lr == nullptr ? schedule.lr
                    : schedule.lr_type == Type::kF64
                        ? *static_cast<const double*>(schedule.device_lr)
                        : double(*static_cast<const float*>(schedule.device_lr));
  const double decay = 1 - lr * schedule.weight_decay;
  for (int64_t i = threadIdx.x; i < c.count; i += kThreads) {
    const double t = c.steps == nullptr ? 1 : steps_of(c, i) + 1;
    double rate = schedule.decay_last ? decay * lr : lr;
    if (schedule.correct_bias)
      rate *= sqrt(1 - pow(schedule.beta2, t)) / (1 - pow(schedule.beta1, t));
    const bool debias = schedule.debias;
    numbers[c.first + i] = {float(decay), float(rate), debias ? 1 - pow(schedule.beta1, t) : 1,
                            debias ? 1 - pow(schedule.beta2, t) : 1};
    const uint32_t bits = largest[c.first + i];
    const bool usual =
        bits == 0 || !finite(bits) || (bits >= bits_of(0x1p-50f) && bits <= bits_of(0x1p50f));
    if (c.bounded && !usual) largest[c.first + i] = kRefused;
  }
}

// commit

__global__ void __launch_bounds__(kThreads)
    inverse_rms_kernel(const __grid_constant__ TableOf<MomentEntry> table, double* sums,
                       uint32_t* arrived, float* inverse) {
  DYNAMIC_SHARED(double, warps);
  const auto at = place(table, blockIdx.x, [](const MomentEntry& e) { return moment_parts(e); });
  const MomentEntry& e = *at.entry;
  double share = 0;
  each_element(e.rows, e.columns, by_columns(e.update), at.part, [&](int64_t row, int64_t column) {
    const double u = double(read(e.update, index(e.update, at.matrix, row, column)));
    share += u * u;
  });
  share = sum_of_block<kThreads>(share, warps);
  const int64_t parts = moment_parts(e), matrix = e.first + at.matrix;
  double total;
  if (!last_total<kThreads>(share, sums + e.part + at.matrix * parts, at.part, parts,
                            arrived + matrix, warps, total))
    return;
  if (threadIdx.x == 0)
    inverse[matrix] = float(1 / (sqrt(total / double(e.rows * e.columns)) + 1e-30));
}

DEVICE Move move_of(const Numbers& numbers, const float* inverse, int64_t matrix) {
  return {numbers.decay, rounded_product(numbers.rate, inverse != nullptr ? inverse[matrix] : 1.f)};
}

DEVICE float moved(const MomentEntry& e, const Move& move, int64_t matrix, int64_t row,
                   int64_t column) {
  return move(read(e.param, index(e.param, matrix, row, column)),
              read(e.update, index(e.update, matrix, row, column)));
}

__global__ void __launch_bounds__(kThreads)
    outlook_kernel(const __grid_constant__ TableOf<MomentEntry> table, const Numbers* numbers,
                   const float* inverse, uint32_t* largest) {
  DYNAMIC_SHARED(uint32_t, warps);
  const auto at = place(table, blockIdx.x, [](const MomentEntry& e) { return moment_parts(e); });
  const MomentEntry& e = *at.entry;
  const int64_t matrix = e.first + at.matrix;
  const Move move = move_of(numbers[matrix], inverse, matrix);
  uint32_t most = 0;
  each_element(e.rows, e.columns, by_columns(e.param), at.part, [&](int64_t row, int64_t column) {
    most = larger(most, lost_bits(e.param.type, moved(e, move, at.matrix, row, column)));
  });
  raise_largest<kThreads>(most, warps, largest + matrix);
}

__global__ void __launch_bounds__(kThreads)
    commit_kernel(const __grid_constant__ TableOf<MomentEntry> table, const Adam adam,
                  const Numbers* numbers, const float* inverse, NonFinite nonfinite,
                  const uint32_t* largest) {
  const auto at = place(table, blockIdx.x, [](const MomentEntry& e) { return moment_parts(e); });
  const MomentEntry& e = *at.entry;
  const int64_t matrix = e.first + at.matrix;
  if (kept(largest[matrix], nonfinite)) return;
  const Move move = move_of(numbers[matrix], inverse, matrix);
  each_element(e.rows, e.columns, by_columns(e.param), at.part, [&](int64_t row, int64_t column) {
    if (e.moment.data != nullptr) {
      const float g = gradient_of(e, adam, at.matrix, row, column);
      write_at(e.moment, at.matrix, row, column, new_moment(e, adam, g, at.matrix, row, column));
      if (e.squares.data != nullptr)
        write_at(e.squares, at.matrix, row, column, new_square(e, adam, g, at.matrix, row, column));
    }
    write_at(e.param, at.matrix, row, column, moved(e, move, at.matrix, row, column));
  });
}

__global__ void __launch_bounds__(kThreads)
    copy_kernel(const __grid_constant__ Table table, NonFinite nonfinite, const uint32_t* largest) {
  const Place at = place(table, blockIdx.x, [](const Entry& e) { return copy_parts(e); });
  const Entry& e = *at.entry;
  if (kept(largest[e.first + at.matrix], nonfinite)) return;
  each_element(e.rows, e.columns, by_columns(e.target), at.part, [&](int64_t row, int64_t column) {
    write_at(e.target, at.matrix, row, column,
             read(e.source, index(e.source, at.matrix, row, column)));
  });
}

}  // namespace

int launch_adam(const std::vector<MomentEntry>& entries, const Adam& adam, uint32_t* largest,
                void* stream) {
  return for_each_table(entries, moment_parts,
                        [&](const TableOf<MomentEntry>& table, unsigned blocks) {
                          LAUNCH(adam_kernel, dim3(blocks), dim3(kThreads),
                                 kThreads / 32 * sizeof(uint32_t), stream, table, adam, largest);
                          return launched();
                        });
}

int launch_numbers(const std::vector<Counter>& counters, const Schedule& schedule, Numbers* numbers,
                   uint32_t* largest, void* stream) {
  return for_each_counter_table(counters, [&](const CounterTable& table, unsigned blocks) {
    LAUNCH(numbers_kernel, dim3(blocks), dim3(kThreads), 0, stream, table, schedule, numbers,
           largest);
    return launched();
  });
}

int64_t place_sums(std::vector<MomentEntry>& entries) {
  int64_t parts = 0;
  for (MomentEntry& e : entries) {
    e.part = parts;
    parts += e.count * moment_parts(e);
  }
  return parts;
}

int launch_inverse_rms(const std::vector<MomentEntry>& entries, double* sums, uint32_t* arrived,
                       float* inverse, void* stream) {
  return for_each_table(entries, moment_parts,
                        [&](const TableOf<MomentEntry>& table, unsigned blocks) {
                          LAUNCH(inverse_rms_kernel, dim3(blocks), dim3(kThreads),
                                 kReduceBytes<kThreads>, stream, table, sums, arrived, inverse);
                          return launched();
                        });
}

int launch_outlook(const std::vector<MomentEntry>& entries, const Numbers* numbers,
                   const float* inverse, uint32_t* largest, void* stream) {
  return for_each_table(
      entries, moment_parts, [&](const TableOf<MomentEntry>& table, unsigned blocks) {
        LAUNCH(outlook_kernel, dim3(blocks), dim3(kThreads), kThreads / 32 * sizeof(uint32_t),
               stream, table, numbers, inverse, largest);
        return launched();
      });
}

int launch_commit(const std::vector<MomentEntry>& entries, const Adam& adam, const Numbers* numbers,
                  const float* inverse, NonFinite nonfinite, const uint32_t* largest,
                  void* stream) {
  return for_each_table(entries, moment_parts,
                        [&](const TableOf<MomentEntry>& table, unsigned blocks) {
                          LAUNCH(commit_kernel, dim3(blocks), dim3(kThreads), 0, stream, table,
                                 adam, numbers, inverse, nonfinite, largest);
                          return launched();
                        });
}

int launch_copy(const std::vector<Entry>& entries, NonFinite nonfinite, const uint32_t* largest,
                void* stream) {
  return for_each_table(entries, copy_parts, [&](const Table& table, unsigned blocks) {
    LAUNCH(copy_kernel, dim3(blocks), dim3(kThreads), 0, stream, table, nonfinite, largest);
    return launched();
  });
}

}  // namespace spectral_kernels::cuda
