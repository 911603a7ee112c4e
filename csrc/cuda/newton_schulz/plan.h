// How lists of matrices are iterated on: which kernels serve which matrix, in which workspaces.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "../../tensor.h"
#include "on_chip.h"
#include "products.h"

namespace spectral_kernels::cuda {

// Restarts of a matrix, and the planes of its square matrices, 0 on chip.
struct Route {
  std::vector<int64_t> cuts;
  int square_planes = 0;
  bool operator<(const Route& other) const;
};

// How a list is iterated on, but for the restarts of its entries.
struct Plan {
  std::vector<Rows> rows;
  std::string method;
  bool full = false, f16 = false, schatten8 = false;
  int planes = 1;
  double norm_factor = 1, eps = 0;
  const char* op;

  Plan(ArrayRef<double> flat_rows, const std::string& method_, ScalarType compute_dtype,
       double eps_, const std::string& norm, double norm_factor_, const char* op_);

  // Steps before which X is formed anew. In full precision the Gram form keeps the accuracy of the
  // standard one only with restarts.
  std::vector<int64_t> cuts(IntArrayRef restarts) const;
  // The same for a matrix that is too large for a chip, and the planes of its square matrices.
  Route products(const Entry& e, IntArrayRef restarts) const;
  // How a matrix is served: on chip, where square_planes is 0, if it fits there.
  Route route(const Entry& e, IntArrayRef restarts, int64_t shared_memory) const;
  // Planning follows thousands of singular values through all steps, 80 us: a few plans are kept.
  std::vector<Segment> segments(const std::vector<int64_t>& steps) const;
};

// Scratch of one call.
class Scratch {
 public:
  Scratch(const OnChipSizes& sizes, const Tensor& like);

  // What products of the placed lists `plans` need beside that, one list after the other.
  ProductWorkspaces for_products(const std::vector<ProductPlan>& plans);
  // Norms of all entries.
  void add_norms(std::vector<Entry>& entries, const Plan& plan);

  uint32_t* largest() const { return reinterpret_cast<uint32_t*>(counters_.data_ptr()); }
  uint32_t* targets() const { return largest() + matrices_; }
  const Tensor& largest_bits() const { return counters_; }

  OnChipBuffers buffers;
  Norms norms;

 private:
  char* bytes(int64_t count);

  const Tensor& like_;
  int64_t packed_, matrices_;
  Tensor counters_;  // of all matrices: largest, targets, blocks arrived, the queue; zero at first
  std::vector<Tensor> kept_;
};

// Entries by how they are served; all of them are placed, scaled and packed together.
class Lists {
 public:
  Lists(const Plan& plan, const Tensor& like);

  void add(const Tensor& source, const Tensor& momentum, const Tensor& target, float scale,
           IntArrayRef restarts);
  // Refuses what cannot be served; nothing has been written before.
  void place();
  void iterate(const Update& update, void* stream);
  // From sources to targets.
  void run(void* stream);
  // What no |element| of a result exceeds.
  float most() const;
  // Those that the prologue packs.
  std::vector<Entry> packed() const;

  std::vector<Entry> entries;
  std::optional<Scratch> scratch;

 private:
  void place_products(const Route& route, const std::vector<size_t>& indices);

  const Plan& plan_;
  const Tensor& like_;
  int64_t shared_memory_;
  std::vector<Route> routes_;
  std::map<Route, std::vector<Segment>> segments_;
  std::map<Route, std::vector<Entry>> onchip_;
  std::vector<ProductPlan> products_;
  std::vector<Route> product_routes_;
  ProductWorkspaces workspaces_;
};

}  // namespace spectral_kernels::cuda
