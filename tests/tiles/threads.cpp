// The table from eight threads at once: it is chosen once, and its kernels share nothing. Built
// with -fsanitize=thread, every race ends the program.
#include <thread>

#include "../../csrc/cpu/isa/select.h"
#include "programs.h"

namespace spectral_kernels::cpu {
namespace {

constexpr int kThreads = 8;

// What one thread reads with all others, and what it alone writes.
class Worker {
 public:
  Worker(const Kernels& kernels, const Dense& a, const Dense& b)
      : a_(a), b_(b), pa_(kernels, Kind::kF32, a), pb_(kernels, Kind::kF32, b) {}

  // Different bits from call to call, if any call disturbs another.
  bool run(int calls) {
    const Kernels& kernels = spectral_kernels::cpu::kernels();
    const int64_t P = kernels.panel[int(Kind::kF32)], m = a_.cols, n = b_.cols;
    const int64_t rows = ceil_div(m, P), cols = ceil_div(n, P);
    std::vector<double> scratch(size_t(rows * cols * P * P + 8));
    void* aligned = reinterpret_cast<void*>((uintptr_t(scratch.data()) + 63) / 64 * 64);
    Packed out(kernels, Kind::kF32, m, n), packed(kernels, Kind::kF32, m, n),
        adam(kernels, Kind::kF32, m, n);
    const Dense expected = product(a_, b_), zeros(m, n);
    Strided<float> store(zeros, false), moment(zeros, false), square(zeros, false);
    bool right = true;
    for (int call = 0; call < calls; call++) {
      Product p;
      p.a = pa_.panels;
      p.b = pb_.panels;
      p.out = out.panels;
      p.store = store.matrix;
      kernels.product[int(Kind::kF32)](p, 0, rows, 0, cols, aligned);
      Pack pack;
      pack.x = store.matrix;
      pack.out = packed.panels;
      kernels.pack[int(Kind::kF32)](pack, 0, rows);
      AdamMoments work;
      work.g = packed.panels;
      work.m = moment.matrix;
      work.v = square.matrix;
      work.beta1 = work.beta2 = 0.5;
      work.eps = 1;
      work.out = adam.panels;
      kernels.adam_moments[0](work, 0, rows);
      right = right && kernels.max_abs_bits(store.matrix, 0, m) != 0;
      right = right && out(m - 1, n - 1) == expected(m - 1, n - 1) &&
              packed(0, n - 1) == expected(0, n - 1);
    }
    return right;
  }

 private:
  const Dense &a_, &b_;
  const Packed pa_, pb_;
};

}  // namespace
}  // namespace spectral_kernels::cpu

int main(int count, char** arguments) {
  using namespace spectral_kernels::cpu;
  const int calls = count > 1 ? std::atoi(arguments[1]) : 10000;
  const Dense a = integers(19, 21, 3), b = integers(19, 17, 3);
  bool right[kThreads] = {};
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; t++)
    threads.emplace_back([&, t] {
      // The first look at the table is everybody's.
      Worker worker(kernels(), a, b);
      right[t] = worker.run(calls);
    });
  for (std::thread& thread : threads) thread.join();
  for (const bool one : right) check(one, "a thread's results");
  std::printf("%d threads, %d calls each: %d checks, %d failures\n", kThreads, calls, checks,
              failures);
  return failures == 0 ? 0 : 1;
}
