// The iteration that steps_kernel runs on chip, as products of the whole list.
#include <utility>

#include "../symmetric_matmul/queue.h"
#include "products.h"

namespace spectral_kernels::cuda {
namespace {

// The products of all segments, in their order.
class Iteration {
 public:
  Iteration(const ProductPlan& plan, const ProductWorkspaces& work, const Update& update)
      : plan_(plan), work_(work), update_(update), x_(work.x), next_(work.next) {
    x_format_ = {plan.planes, plan.f16};
    format_ = plan.square_planes == 2 ? Format{2, true} : x_format_;
    for (int i = 0; i < ProductPlan::kSquares; i++)
      square_[i] = work.squares + i * plan.tiling.squares;
  }

  void add(const Segment& segment, bool last) {
    const float *factor = segment.first ? work_.factor : nullptr, before = 1 / segment.before;
    uint16_t *&r = square_[0], *&half = square_[1], *&w = square_[2], *&q = square_[3],
             *&spare = square_[4];
    float r_scale = segment.r_scale, q_scale = 1;
    Product gram;
    gram.shape = Shape::kGram;
    gram.format = x_format_;
    gram.a = gram.b = x_;
    gram.d = r;
    gram.d_format = format_;
    gram.alpha = r_scale * (factor != nullptr ? 1.f : before * before);
    gram.factor = factor;
    gram.power = 2;
    products.push_back(gram);

    for (int t = 0; t < segment.steps; t++) {
      const OnChipStep& s = segment.step[t];
      const bool ends = t + 1 == segment.steps;
      // W = a I + b R + c R², which is Q in the first step
      const bool alone = t == 0;
      const float w_scale = alone && ends ? s.q_scale : s.w_scale;
      Product product = squares(r, r, w);
      product.c = r;
      product.c_format = format_;
      product.alpha = s.c * w_scale / (r_scale * r_scale);
      product.beta = s.b * w_scale / r_scale;
      product.gamma = segment.apart ? 0.f : s.a * w_scale;
      if (alone && ends) product.d_format = x_format_;
      products.push_back(product);
      if (alone) {
        q_scale = w_scale;
      } else {
        product = squares(q, w, spare);
        product.alpha = s.q_scale / (q_scale * w_scale);
        if (ends) product.d_format = x_format_;
        products.push_back(product);
        if (ends && plan_.planes == 1) {  // what the 16-bit Q leaves
          product.c = spare;
          product.c_format = x_format_;
          product.beta = -1;
          product.d = half;
          products.push_back(product);
        }
        q_scale = s.q_scale;
        std::swap(q, spare);
      }
      if (!ends) {
        product = squares(r, w, half);
        product.alpha = s.t_scale / (r_scale * w_scale);
        products.push_back(product);
        product = squares(half, w, r);
        product.alpha = s.r_scale / (s.t_scale * w_scale);
        products.push_back(product);
        r_scale = s.r_scale;
      }
      if (alone) std::swap(q, w);
    }

    Product apply;
    apply.shape = Shape::kWide;
    apply.format = apply.c_format = apply.d_format = x_format_;
    apply.a = q;
    apply.b = x_;
    apply.factor = factor;
    const float scale = (factor != nullptr ? 1.f : before) * (last ? 1.f : segment.after);
    apply.alpha = scale / q_scale;
    if (segment.apart) {
      apply.c = x_;
      apply.beta = scale * segment.step[0].a;
    }
    // On a null space Q is the product of the a, hundreds of times what it is on the rest, and X is
    // exactly 0 there where rows or columns repeat: one 16-bit Q would add the rounding of the
    // large part. What the low half adds may be rounded; kRoom keeps it within fp16.
    if (plan_.planes == 1 && segment.steps > 1) {
      constexpr float kRoom = 1 << 14;
      Product low = apply;
      low.a = half;
      low.d = next_;
      low.factor = nullptr;
      low.alpha = 1 / (kRoom * q_scale);
      products.push_back(low);
      apply.c = next_;
      apply.beta = scale * kRoom;
    }
    apply.d = last ? nullptr : next_;
    apply.update = update_;
    std::swap(x_, next_);
    if (last && update_.targets != nullptr) {
      Product look = apply;
      look.update.look = true;
      products.push_back(look);
    }
    products.push_back(apply);
  }

  std::vector<Product> products;

 private:
  Product squares(const uint16_t* a, const uint16_t* b, uint16_t* d) const {
    Product product;
    product.format = product.d_format = format_;
    product.a = a;
    product.b = b;
    product.d = d;
    return product;
  }

  const ProductPlan& plan_;
  const ProductWorkspaces& work_;
  const Update& update_;
  Format x_format_, format_;
  uint16_t *x_, *next_, *square_[ProductPlan::kSquares];
};

}  // namespace

int launch_products(const ProductPlan& plan, const std::vector<Segment>& segments,
                    const ProductWorkspaces& workspaces, const Update& update, void* stream) {
  Iteration iteration(plan, workspaces, update);
  for (const Segment& segment : segments) iteration.add(segment, &segment == &segments.back());
  if (plan.queue)
    return launch_queue(plan.entries, iteration.products, {plan.planes, plan.f16},
                        plan.square_planes, plan.tiling.tile, workspaces.buffers, stream);
  for (const Product& product : iteration.products) {
    const int error = launch_product(plan, product, workspaces.buffers, stream);
    if (error != 0) return error;
  }
  return 0;
}

}  // namespace spectral_kernels::cuda
