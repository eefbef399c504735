// The ops of the CPU engine, and the only file that knows torch (its stable ABI): argument checks, memory, dispatch on
// dtype and instruction set. The schemas are in narrowdeep/ops/chain.py, the meaning in narrowdeep/ops/*/reference.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

#include "common/isa.h"
#include "mlp/args.h"
#include "mlp/mlp.h"

namespace {

using narrowdeep::Isa;
using narrowdeep::Parallel;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kDefaultSegment = 64;  // where a backward finds nothing saved and has to run the forward again

Parallel pool() {
  return Parallel{int64_t(torch::stable::get_num_threads()), [](int64_t count, narrowdeep::Task task, void* context) {
                    torch::stable::parallel_for(0, count, 1, [task, context](int64_t begin, int64_t end) {
                      for (int64_t i = begin; i < end; ++i) task(context, i);
                    });
                  }};
}

void check_shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(tensor.dim() == int64_t(shape.size()), name, " must have ", shape.size(), " dimensions, got ", tensor.dim());
  int64_t d = 0;
  for (int64_t size : shape) {
    STD_TORCH_CHECK(tensor.size(d) == size, name, " must have size ", size, " in dimension ", d, ", got ", tensor.size(d));
    ++d;
  }
}

void check_like(const char* name, const Tensor& tensor, const Tensor& x) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " must be on the CPU");
  STD_TORCH_CHECK(tensor.scalar_type() == x.scalar_type(), name, " must have the dtype of x");
}

void check_input(const Tensor& x, int64_t dims) {
  STD_TORCH_CHECK(x.is_cpu(), "x must be on the CPU");
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double,
                  "x must be float32 or float64");
  STD_TORCH_CHECK(x.dim() == dims, "x must have ", dims, " dimensions, got ", x.dim());
}

// The six parameters of a chain, contiguous.
struct Params {
  Tensor first_weight, first_bias, hidden_weight, hidden_bias, last_weight, last_bias;

  template <class T>
  narrowdeep::MlpParams<const T> pointers() const {
    return {first_weight.const_data_ptr<T>(), first_bias.const_data_ptr<T>(), hidden_weight.const_data_ptr<T>(),
            hidden_bias.const_data_ptr<T>(),  last_weight.const_data_ptr<T>(), last_bias.const_data_ptr<T>()};
  }
  template <class T>
  narrowdeep::MlpParams<T> mutable_pointers() const {
    return {first_weight.mutable_data_ptr<T>(), first_bias.mutable_data_ptr<T>(), hidden_weight.mutable_data_ptr<T>(),
            hidden_bias.mutable_data_ptr<T>(),  last_weight.mutable_data_ptr<T>(), last_bias.mutable_data_ptr<T>()};
  }
};

// Calls body with a value of the C++ type of x's dtype.
template <class Body>
void dispatch(const Tensor& x, const Body& body) {
  if (x.scalar_type() == ScalarType::Float) {
    body(float());
  } else {
    body(double());
  }
}

// ---- MLP ------------------------------------------------------------------------------------------------------------

narrowdeep::MlpShape mlp_shape(const Tensor& x, const Params& p, double scale, bool offset, int64_t segment) {
  check_input(x, 2);
  STD_TORCH_CHECK(p.first_weight.dim() == 2, "first_weight must have 2 dimensions, got ", p.first_weight.dim());
  STD_TORCH_CHECK(p.last_weight.dim() == 2, "last_weight must have 2 dimensions, got ", p.last_weight.dim());
  STD_TORCH_CHECK(p.hidden_weight.dim() == 3, "hidden_weight must have 3 dimensions, got ", p.hidden_weight.dim());
  STD_TORCH_CHECK(segment >= 0, "segment must be at least 0, got ", segment);
  const int64_t in = x.size(1), width = p.first_weight.size(0), out = p.last_weight.size(0), layers = p.hidden_weight.size(0);
  check_shape("first_weight", p.first_weight, {width, in});
  check_shape("first_bias", p.first_bias, {width});
  check_shape("hidden_weight", p.hidden_weight, {layers, width, width});
  check_shape("hidden_bias", p.hidden_bias, {layers, width});
  check_shape("last_weight", p.last_weight, {out, width});
  check_shape("last_bias", p.last_bias, {out});
  STD_TORCH_CHECK(width >= 1 && in >= 1 && out >= 1, "first_weight and last_weight must not be empty");
  STD_TORCH_CHECK(!offset || width == in + 1 + out, "first_weight must have in + 1 + out = ", in + 1 + out,
                  " rows in offset form, got ", width);
  check_like("first_weight", p.first_weight, x);
  check_like("first_bias", p.first_bias, x);
  check_like("hidden_weight", p.hidden_weight, x);
  check_like("hidden_bias", p.hidden_bias, x);
  check_like("last_weight", p.last_weight, x);
  check_like("last_bias", p.last_bias, x);
  return {x.size(0), in, width, out, layers, segment, offset, scale};
}

// narrowdeep.ops.reference.saved_shape
std::vector<int64_t> mlp_saved_shape(const narrowdeep::MlpShape& s) {
  if (s.segment == 0) return {0, 1, s.width, s.batch};
  if (s.segment == 1) return {s.layers + 1, 1, s.width, s.batch};
  const int64_t states = s.layers ? (s.layers + s.segment - 1) / s.segment : 1;
  return {states, s.offset ? 2 : 1, s.width, s.batch};
}

Params contiguous(const Tensor& w1, const Tensor& b1, const Tensor& wh, const Tensor& bh, const Tensor& wl, const Tensor& bl) {
  using torch::stable::contiguous;
  return {contiguous(w1), contiguous(b1), contiguous(wh), contiguous(bh), contiguous(wl), contiguous(bl)};
}

void mlp_run_forward(const narrowdeep::MlpShape& shape, const Params& params, const Tensor& x, const Tensor& out,
                     const Tensor& saved) {
  if (shape.batch == 0) return;
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    narrowdeep::mlp_kernels<T>(narrowdeep::selected_isa())
        .forward({shape, params.pointers<T>(), x.const_data_ptr<T>(), out.mutable_data_ptr<T>(),
                  saved.mutable_data_ptr<T>()},
                 pool());
  });
}

std::tuple<Tensor, Tensor> mlp_forward(Tensor x_any, Tensor w1, Tensor b1, Tensor wh, Tensor bh, Tensor wl, Tensor bl,
                                       double scale, bool offset, int64_t segment) {
  const Params params = contiguous(w1, b1, wh, bh, wl, bl);
  const Tensor x = torch::stable::contiguous(x_any);
  const narrowdeep::MlpShape shape = mlp_shape(x, params, scale, offset, segment);
  Tensor out = torch::stable::new_empty(x, {shape.batch, shape.out});
  Tensor saved = torch::stable::new_empty(x, mlp_saved_shape(shape));
  mlp_run_forward(shape, params, x, out, saved);
  return {out, saved};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mlp_backward(
    Tensor grad_out_any, Tensor x_any, Tensor w1, Tensor b1, Tensor wh, Tensor bh, Tensor wl, Tensor bl, Tensor saved_any,
    double scale, bool offset, int64_t segment, bool need_input, bool need_params) {
  const Params params = contiguous(w1, b1, wh, bh, wl, bl);
  const Tensor x = torch::stable::contiguous(x_any), grad_out = torch::stable::contiguous(grad_out_any);
  Tensor saved = torch::stable::contiguous(saved_any);
  narrowdeep::MlpShape shape = mlp_shape(x, params, scale, offset, segment);
  check_shape("grad_out", grad_out, {shape.batch, shape.out});
  check_like("grad_out", grad_out, x);
  if (segment == 0) {
    shape.segment = kDefaultSegment;
    saved = torch::stable::new_empty(x, mlp_saved_shape(shape));
    mlp_run_forward(shape, params, x, torch::stable::new_empty(grad_out, {shape.batch, shape.out}), saved);
  } else {
    check_like("saved", saved, x);
    const std::vector<int64_t> expected = mlp_saved_shape(shape);
    check_shape("saved", saved, {expected[0], expected[1], expected[2], expected[3]});
  }
  const auto zeros = [&](const Tensor& like) {
    return need_params ? torch::stable::new_zeros(like, like.sizes()) : torch::stable::new_empty(like, {0});
  };
  const Params grads{zeros(params.first_weight), zeros(params.first_bias),  zeros(params.hidden_weight),
                     zeros(params.hidden_bias),  zeros(params.last_weight), zeros(params.last_bias)};
  Tensor grad_x = need_input ? torch::stable::new_empty(x, x.sizes()) : torch::stable::new_empty(x, {0});
  if (shape.batch > 0 && (need_input || need_params)) {
    dispatch(x, [&](auto zero) {
      using T = decltype(zero);
      narrowdeep::MlpBackward<T> args{shape, params.pointers<T>(), grad_out.const_data_ptr<T>(), x.const_data_ptr<T>(),
                                      saved.const_data_ptr<T>(), nullptr, {}};
      if (need_input) args.grad_x = grad_x.mutable_data_ptr<T>();
      if (need_params) args.grads = grads.mutable_pointers<T>();
      narrowdeep::mlp_kernels<T>(narrowdeep::selected_isa()).backward(args, pool());
    });
  }
  return {grad_x,           grads.first_weight, grads.first_bias, grads.hidden_weight,
          grads.hidden_bias, grads.last_weight,  grads.last_bias};
}

Tensor mlp_jvp(Tensor x_any, Tensor w1, Tensor b1, Tensor wh, Tensor bh, Tensor wl, Tensor bl, std::optional<Tensor> x_t,
               std::optional<Tensor> w1_t, std::optional<Tensor> b1_t, std::optional<Tensor> wh_t,
               std::optional<Tensor> bh_t, std::optional<Tensor> wl_t, std::optional<Tensor> bl_t, double scale, bool offset) {
  const Params params = contiguous(w1, b1, wh, bh, wl, bl);
  const Tensor x = torch::stable::contiguous(x_any);
  const narrowdeep::MlpShape shape = mlp_shape(x, params, scale, offset, 0);
  Tensor out = torch::stable::new_empty(x, {shape.batch, shape.out});
  std::vector<Tensor> owners;
  // The data of a tangent, checked against its primal; null when there is none.
  const auto tangent = [&](const char* name, const std::optional<Tensor>& t, const Tensor& primal) -> const void* {
    if (!t.has_value()) return nullptr;
    check_like(name, *t, x);
    STD_TORCH_CHECK(t->dim() == primal.dim(), name, " must have the shape of its primal");
    for (int64_t d = 0; d < primal.dim(); ++d)
      STD_TORCH_CHECK(t->size(d) == primal.size(d), name, " must have the shape of its primal");
    owners.push_back(torch::stable::contiguous(*t));
    return owners.back().const_data_ptr();
  };
  const void* const data[] = {tangent("x_t", x_t, x),
                              tangent("first_weight_t", w1_t, params.first_weight),
                              tangent("first_bias_t", b1_t, params.first_bias),
                              tangent("hidden_weight_t", wh_t, params.hidden_weight),
                              tangent("hidden_bias_t", bh_t, params.hidden_bias),
                              tangent("last_weight_t", wl_t, params.last_weight),
                              tangent("last_bias_t", bl_t, params.last_bias)};
  if (shape.batch == 0) return out;
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    const auto at = [&](int i) { return static_cast<const T*>(data[i]); };
    narrowdeep::mlp_kernels<T>(narrowdeep::selected_isa())
        .jvp({shape, params.pointers<T>(), {at(1), at(2), at(3), at(4), at(5), at(6)}, x.const_data_ptr<T>(), at(0),
              out.mutable_data_ptr<T>()},
             pool());
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(narrowdeep, CPU, m) {
  m.impl("mlp_forward", TORCH_BOX(&mlp_forward));
  m.impl("mlp_backward", TORCH_BOX(&mlp_backward));
  m.impl("mlp_jvp", TORCH_BOX(&mlp_jvp));
}
