// The ops of the CPU engine, and the only file that knows torch (its stable ABI): argument checks, memory, dispatch on
// dtype and instruction set. The schemas are in narrowdeep/ops/chain.py, the meaning in narrowdeep/ops/*/reference.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <optional>
#include <tuple>
#include <vector>

#include "common/isa.h"
#include "conv/conv.h"
#include "gram/gram.h"
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

void check_shape(const char* name, const Tensor& tensor, const std::vector<int64_t>& shape) {
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
  narrowdeep::ChainParams<const T> pointers() const {
    return {first_weight.const_data_ptr<T>(), first_bias.const_data_ptr<T>(), hidden_weight.const_data_ptr<T>(),
            hidden_bias.const_data_ptr<T>(),  last_weight.const_data_ptr<T>(), last_bias.const_data_ptr<T>()};
  }
  template <class T>
  narrowdeep::ChainParams<T> mutable_pointers() const {
    return {first_weight.mutable_data_ptr<T>(), first_bias.mutable_data_ptr<T>(), hidden_weight.mutable_data_ptr<T>(),
            hidden_bias.mutable_data_ptr<T>(),  last_weight.mutable_data_ptr<T>(), last_bias.mutable_data_ptr<T>()};
  }
};

// An uninitialised tensor that may be large. Large ones come from the system page by page, and at 4 KiB a page that costs
// more than the arithmetic on them (100 ms for 154 MB, measured): huge pages are asked for where the system has them.
Tensor new_large(const Tensor& like, const std::vector<int64_t>& shape) {
  Tensor tensor = torch::stable::new_empty(like, shape);
#if defined(__linux__)
  constexpr uintptr_t kHugePage = uintptr_t(1) << 21;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  const uintptr_t end = begin + uintptr_t(tensor.numel()) * tensor.element_size();
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage, last = end / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // advice: may be refused
#endif
  return tensor;
}

// Calls body with a value of the C++ type of x's dtype.
template <class Body>
void dispatch(const Tensor& x, const Body& body) {
  if (x.scalar_type() == ScalarType::Float) {
    body(float());
  } else {
    body(double());
  }
}

// ---- the families ---------------------------------------------------------------------------------------------------
// A family is a Shape, made from the arguments with all checks; the dimensions of a hidden state; and the kernels.

// What both shapes begin with, checked: batch, in, width, out and layers. `tap` and `image` as in chain_args.h.
struct Sizes {
  int64_t batch, in, width, out, layers;
};

std::vector<int64_t> joined(std::vector<int64_t> head, const std::vector<int64_t>& tail) {
  head.insert(head.end(), tail.begin(), tail.end());
  return head;
}

Sizes check_chain(const Tensor& x, const Params& p, bool offset, int64_t segment, const std::vector<int64_t>& tap) {
  const int64_t dims = int64_t(2 + tap.size());
  check_input(x, dims);
  STD_TORCH_CHECK(p.first_weight.dim() == dims, "first_weight must have ", dims, " dimensions, got ", p.first_weight.dim());
  STD_TORCH_CHECK(p.last_weight.dim() == dims, "last_weight must have ", dims, " dimensions, got ", p.last_weight.dim());
  STD_TORCH_CHECK(p.hidden_weight.dim() == dims + 1, "hidden_weight must have ", dims + 1, " dimensions, got ",
                  p.hidden_weight.dim());
  STD_TORCH_CHECK(segment >= 0, "segment must be at least 0, got ", segment);
  const int64_t in = x.size(1), width = p.first_weight.size(0), out = p.last_weight.size(0), layers = p.hidden_weight.size(0);
  check_shape("first_weight", p.first_weight, joined({width, in}, tap));
  check_shape("first_bias", p.first_bias, {width});
  check_shape("hidden_weight", p.hidden_weight, joined({layers, width, width}, tap));
  check_shape("hidden_bias", p.hidden_bias, {layers, width});
  check_shape("last_weight", p.last_weight, joined({out, width}, tap));
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
  return {x.size(0), in, width, out, layers};
}

// The same for the hidden layers after state `first`, and the two weights alone.
Sizes check_part(const Tensor& x, const Tensor& hidden_weight, const Tensor& hidden_bias, int64_t outputs, bool offset,
                 int64_t first, int64_t segment, const std::vector<int64_t>& tap) {
  const int64_t dims = int64_t(2 + tap.size());
  check_input(x, dims);
  STD_TORCH_CHECK(hidden_weight.dim() == dims + 1, "hidden_weight must have ", dims + 1, " dimensions, got ", hidden_weight.dim());
  STD_TORCH_CHECK(segment >= 0, "segment must be at least 0, got ", segment);
  STD_TORCH_CHECK(first >= 1, "first must be at least 1, got ", first);
  const int64_t in = x.size(1), width = hidden_weight.size(1), layers = hidden_weight.size(0);
  check_shape("hidden_weight", hidden_weight, joined({layers, width, width}, tap));
  check_shape("hidden_bias", hidden_bias, {layers, width});
  STD_TORCH_CHECK(width >= 1 && in >= 1 && outputs >= 1, "hidden_weight, x and outputs must not be empty");
  STD_TORCH_CHECK(!offset || width == in + 1 + outputs, "hidden_weight must have in + 1 + out = ", in + 1 + outputs,
                  " rows in offset form, got ", width);
  check_like("hidden_weight", hidden_weight, x);
  check_like("hidden_bias", hidden_bias, x);
  return {x.size(0), in, width, outputs, layers};
}

// A segment of more layers than there are is all of them; kernels compute with it and must not overflow.
int64_t bounded_segment(int64_t segment, int64_t layers) {
  return segment > 1 && segment > layers ? (layers > 2 ? layers : 2) : segment;
}

struct Mlp {
  using Shape = narrowdeep::MlpShape;
  static constexpr bool kAddsToGradients = false;  // its backward writes every gradient

  static Shape shape(const Tensor& x, const Params& p, double scale, bool offset, int64_t segment) {
    const Sizes s = check_chain(x, p, offset, segment, {});
    return {s.batch, s.in, s.width, s.out, s.layers, bounded_segment(segment, s.layers), offset, scale};
  }
  static std::vector<int64_t> state(const Shape& s) { return {s.width, s.batch}; }
  template <class T>
  static narrowdeep::MlpKernels<T> kernels() {
    return narrowdeep::mlp_kernels<T>(narrowdeep::selected_isa());
  }
  template <class T>
  static void gram(const narrowdeep::MlpGram<T>& args, const Parallel& parallel) {
    narrowdeep::gram_kernels<T>(narrowdeep::selected_isa()).mlp(args, parallel);
  }
};

struct Conv {
  using Shape = narrowdeep::ConvShape;
  static constexpr bool kAddsToGradients = true;  // its backward wants zeros to add to

  static Shape shape(const Tensor& x, const Params& p, double scale, bool offset, int64_t segment) {
    const int64_t size = p.first_weight.dim() == 4 ? p.first_weight.size(3) : 0;
    return of(check_chain(x, p, offset, segment, {size, size}), x, size, scale, offset, segment);
  }
  static Shape part(const Tensor& x, const Tensor& hidden_weight, const Tensor& hidden_bias, int64_t outputs, double scale,
                    bool offset, int64_t first, int64_t segment) {
    const int64_t size = hidden_weight.dim() == 5 ? hidden_weight.size(4) : 0;
    const Sizes s = check_part(x, hidden_weight, hidden_bias, outputs, offset, first, segment, {size, size});
    Shape shape = of(s, x, size, scale, offset, segment);
    shape.first = first;
    return shape;
  }
  static Shape of(const Sizes& s, const Tensor& x, int64_t size, double scale, bool offset, int64_t segment) {
    STD_TORCH_CHECK(size % 2 == 1, "filters must have an odd size, got ", size);
    STD_TORCH_CHECK(x.size(2) >= 1 && x.size(3) >= 1, "x must have images of at least 1x1 pixels, got ", x.size(2), "x",
                    x.size(3));
    return {s.batch, s.in, s.width, s.out, size, x.size(2), x.size(3), s.layers, bounded_segment(segment, s.layers), offset, scale};
  }
  static std::vector<int64_t> state(const Shape& s) { return {s.width, s.image_height, s.image_width, s.batch}; }
  template <class T>
  static narrowdeep::ConvKernels<T> kernels() {
    return narrowdeep::conv_kernels<T>(narrowdeep::selected_isa());
  }
  template <class T>
  static void gram(const narrowdeep::ConvGram<T>& args, const Parallel& parallel) {
    narrowdeep::gram_kernels<T>(narrowdeep::selected_isa()).conv(args, parallel);
  }
};

// ---- the ops of a family --------------------------------------------------------------------------------------------

// narrowdeep.ops.reference.saved_shape
template <class Family>
std::vector<int64_t> saved_shape(const typename Family::Shape& s) {
  if (s.segment == 0) return joined({0, 1}, Family::state(s));
  if (s.segment == 1) return joined({s.layers + 1, 1}, Family::state(s));
  const int64_t states = s.layers ? (s.layers + s.segment - 1) / s.segment : 1;
  return joined({states, s.offset ? 2 : 1}, Family::state(s));
}

Params contiguous(const Tensor& w1, const Tensor& b1, const Tensor& wh, const Tensor& bh, const Tensor& wl, const Tensor& bl) {
  using torch::stable::contiguous;
  return {contiguous(w1), contiguous(b1), contiguous(wh), contiguous(bh), contiguous(wl), contiguous(bl)};
}

template <class Family>
void run_forward(const typename Family::Shape& shape, const Params& params, const Tensor& x, const Tensor& out,
                     const Tensor& saved) {
  if (shape.batch == 0) return;
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    Family::template kernels<T>()
        .forward({shape, params.pointers<T>(), x.const_data_ptr<T>(), out.mutable_data_ptr<T>(),
                  saved.mutable_data_ptr<T>()},
                 pool());
  });
}

template <class Family>
std::tuple<Tensor, Tensor> forward(Tensor x_any, Tensor w1, Tensor b1, Tensor wh, Tensor bh, Tensor wl, Tensor bl,
                                       double scale, bool offset, int64_t segment) {
  const Params params = contiguous(w1, b1, wh, bh, wl, bl);
  const Tensor x = torch::stable::contiguous(x_any);
  const typename Family::Shape shape = Family::shape(x, params, scale, offset, segment);
  Tensor out = torch::stable::new_empty(x, {shape.batch, shape.out});
  Tensor saved = new_large(x, saved_shape<Family>(shape));
  run_forward<Family>(shape, params, x, out, saved);
  return {out, saved};
}

template <class Family>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    Tensor grad_out_any, Tensor x_any, Tensor w1, Tensor b1, Tensor wh, Tensor bh, Tensor wl, Tensor bl, Tensor saved_any,
    double scale, bool offset, int64_t segment, bool need_input, bool need_params) {
  const Params params = contiguous(w1, b1, wh, bh, wl, bl);
  const Tensor x = torch::stable::contiguous(x_any), grad_out = torch::stable::contiguous(grad_out_any);
  Tensor saved = torch::stable::contiguous(saved_any);
  typename Family::Shape shape = Family::shape(x, params, scale, offset, segment);
  check_shape("grad_out", grad_out, {shape.batch, shape.out});
  check_like("grad_out", grad_out, x);
  if (segment == 0) {
    shape.segment = bounded_segment(kDefaultSegment, shape.layers);
    saved = new_large(x, saved_shape<Family>(shape));
    run_forward<Family>(shape, params, x, torch::stable::new_empty(grad_out, {shape.batch, shape.out}), saved);
  } else {
    check_like("saved", saved, x);
    check_shape("saved", saved, saved_shape<Family>(shape));
  }
  const auto gradient_of = [&](const Tensor& like) {
    if (!need_params) return torch::stable::new_empty(like, {0});
    const torch::headeronly::IntHeaderOnlyArrayRef sizes = like.sizes();
    Tensor gradient = new_large(like, std::vector<int64_t>(sizes.begin(), sizes.end()));
    if (shape.batch == 0 || Family::kAddsToGradients) torch::stable::zero_(gradient);
    return gradient;
  };
  const Params grads{gradient_of(params.first_weight), gradient_of(params.first_bias),  gradient_of(params.hidden_weight),
                     gradient_of(params.hidden_bias),  gradient_of(params.last_weight), gradient_of(params.last_bias)};
  Tensor grad_x = need_input ? torch::stable::new_empty(x, x.sizes()) : torch::stable::new_empty(x, {0});
  if (shape.batch > 0 && (need_input || need_params)) {
    dispatch(x, [&](auto zero) {
      using T = decltype(zero);
      narrowdeep::ChainBackward<typename Family::Shape, T> args{shape, params.pointers<T>(), grad_out.const_data_ptr<T>(), x.const_data_ptr<T>(),
                                      saved.const_data_ptr<T>(), nullptr, {}};
      if (need_input) args.grad_x = grad_x.mutable_data_ptr<T>();
      if (need_params) args.grads = grads.mutable_pointers<T>();
      Family::template kernels<T>().backward(args, pool());
    });
  }
  return {grad_x,           grads.first_weight, grads.first_bias, grads.hidden_weight,
          grads.hidden_bias, grads.last_weight,  grads.last_bias};
}

// State `first` is one row of what the forward saves, and `next` the state after all layers of hidden_weight; `saved` holds
// those in between, as the forward saves them.
template <class Family>
std::vector<int64_t> state_shape(const typename Family::Shape& s) {
  return joined({s.offset ? 2 : 1}, Family::state(s));
}
template <class Family>
std::vector<int64_t> saved_part_shape(const typename Family::Shape& s) {
  const int64_t states = s.layers && s.segment ? (s.layers + s.segment - 1) / s.segment - 1 : 0;
  return joined({states, s.segment > 1 && s.offset ? 2 : 1}, Family::state(s));
}

template <class Family>
std::tuple<Tensor, Tensor> advance(Tensor state_any, Tensor x_any, Tensor wh_any, Tensor bh_any, int64_t outputs, double scale,
                                   bool offset, int64_t first, int64_t segment) {
  const Tensor state = torch::stable::contiguous(state_any), x = torch::stable::contiguous(x_any);
  const Tensor wh = torch::stable::contiguous(wh_any), bh = torch::stable::contiguous(bh_any);
  const typename Family::Shape shape = Family::part(x, wh, bh, outputs, scale, offset, first, segment);
  check_like("state", state, x);
  check_shape("state", state, state_shape<Family>(shape));
  Tensor next = torch::stable::new_empty(x, state_shape<Family>(shape));
  Tensor saved = new_large(x, saved_part_shape<Family>(shape));
  if (shape.batch == 0) return {next, saved};
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    Family::template kernels<T>().advance({shape, wh.const_data_ptr<T>(), bh.const_data_ptr<T>(), x.const_data_ptr<T>(),
                                           state.const_data_ptr<T>(), next.mutable_data_ptr<T>(), saved.mutable_data_ptr<T>()},
                                          pool());
  });
  return {next, saved};
}

template <class Family>
std::tuple<Tensor, Tensor, Tensor> retreat(Tensor grad_state_any, Tensor grad_out_any, Tensor state_any, Tensor x_any,
                                           Tensor wh_any, Tensor bh_any, Tensor saved_any, int64_t outputs, double scale,
                                           bool offset, int64_t first, int64_t segment, bool need_params) {
  using torch::stable::contiguous;
  const Tensor grad_state = contiguous(grad_state_any), grad_out = contiguous(grad_out_any), state = contiguous(state_any);
  const Tensor x = contiguous(x_any), wh = contiguous(wh_any), bh = contiguous(bh_any), saved = contiguous(saved_any);
  typename Family::Shape shape = Family::part(x, wh, bh, outputs, scale, offset, first, segment);
  check_like("grad_out", grad_out, x);
  check_shape("grad_out", grad_out, {shape.batch, outputs});
  for (const auto& [name, tensor] : {std::pair<const char*, const Tensor&>("state", state), {"grad_state", grad_state}}) {
    check_like(name, tensor, x);
    check_shape(name, tensor, state_shape<Family>(shape));
  }
  check_like("saved", saved, x);
  check_shape("saved", saved, saved_part_shape<Family>(shape));
  if (segment == 0) shape.segment = shape.layers > 2 ? shape.layers : 2;  // one, from `state`
  Tensor next = torch::stable::new_empty(x, state_shape<Family>(shape));
  const auto gradient_of = [&](const Tensor& like) {
    if (!need_params) return torch::stable::new_empty(like, {0});
    const torch::headeronly::IntHeaderOnlyArrayRef sizes = like.sizes();
    Tensor gradient = new_large(like, std::vector<int64_t>(sizes.begin(), sizes.end()));
    if (shape.batch == 0 || Family::kAddsToGradients) torch::stable::zero_(gradient);
    return gradient;
  };
  const Tensor grad_wh = gradient_of(wh), grad_bh = gradient_of(bh);
  if (shape.batch > 0) {
    dispatch(x, [&](auto zero) {
      using T = decltype(zero);
      narrowdeep::ChainRetreat<typename Family::Shape, T> args{
          shape,
          wh.const_data_ptr<T>(), bh.const_data_ptr<T>(), x.const_data_ptr<T>(), grad_out.const_data_ptr<T>(),
          grad_state.const_data_ptr<T>(), state.const_data_ptr<T>(), saved.const_data_ptr<T>(), next.mutable_data_ptr<T>(),
          need_params ? grad_wh.mutable_data_ptr<T>() : nullptr, need_params ? grad_bh.mutable_data_ptr<T>() : nullptr};
      Family::template kernels<T>().retreat(args, pool());
    });
  }
  return {next, grad_wh, grad_bh};
}

template <class Family>
Tensor jvp(Tensor x_any, Tensor w1, Tensor b1, Tensor wh, Tensor bh, Tensor wl, Tensor bl, std::optional<Tensor> x_t,
               std::optional<Tensor> w1_t, std::optional<Tensor> b1_t, std::optional<Tensor> wh_t,
               std::optional<Tensor> bh_t, std::optional<Tensor> wl_t, std::optional<Tensor> bl_t, double scale, bool offset) {
  const Params params = contiguous(w1, b1, wh, bh, wl, bl);
  const Tensor x = torch::stable::contiguous(x_any);
  const typename Family::Shape shape = Family::shape(x, params, scale, offset, 0);
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
    Family::template kernels<T>()
        .jvp({shape, params.pointers<T>(), {at(1), at(2), at(3), at(4), at(5), at(6)}, x.const_data_ptr<T>(), at(0),
              out.mutable_data_ptr<T>()},
             pool());
  });
  return out;
}

// Theta(x1, x2): narrowdeep/ops/gram/reference.py
template <class Family>
Tensor gram(Tensor x1_any, Tensor x2_any, Tensor w1, Tensor b1, Tensor wh, Tensor bh, Tensor wl, Tensor bl, double scale,
            bool offset, bool symmetric, int64_t trainable, int64_t reduce) {
  const Params params = contiguous(w1, b1, wh, bh, wl, bl);
  const Tensor x1 = torch::stable::contiguous(x1_any);
  const Tensor x2 = symmetric ? x1 : torch::stable::contiguous(x2_any);
  typename Family::Shape shape = Family::shape(x1, params, scale, offset, 0);
  check_like("x2", x2, x1);
  const torch::headeronly::IntHeaderOnlyArrayRef sizes = x1.sizes();
  check_shape("x2", x2, joined({x2.size(0)}, std::vector<int64_t>(sizes.begin() + 1, sizes.end())));
  STD_TORCH_CHECK(reduce >= 0 && reduce <= 2, "reduce must be 0, 1 or 2, got ", reduce);
  const narrowdeep::Reduce kind{reduce};
  const int64_t rows = x1.size(0), columns = x2.size(0);
  std::vector<int64_t> result{rows, columns};
  if (kind != narrowdeep::Reduce::kTrace) result.push_back(shape.out);
  if (kind == narrowdeep::Reduce::kFull) result.push_back(shape.out);
  Tensor out = torch::stable::new_zeros(x1, result, ScalarType::Double);
  if (rows == 0 || columns == 0) return out;
  shape.batch = symmetric ? rows : rows + columns;
  dispatch(x1, [&](auto zero) {
    using T = decltype(zero);
    std::vector<T> x(x1.const_data_ptr<T>(), x1.const_data_ptr<T>() + x1.numel());
    if (!symmetric) x.insert(x.end(), x2.const_data_ptr<T>(), x2.const_data_ptr<T>() + x2.numel());
    const narrowdeep::GramPairs pairs{rows, columns, symmetric, kind, out.mutable_data_ptr<double>()};
    Family::template gram<T>({shape, params.pointers<T>(), x.data(), trainable, pairs}, pool());
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(narrowdeep, CPU, m) {
  m.impl("mlp_forward", TORCH_BOX(&forward<Mlp>));
  m.impl("mlp_backward", TORCH_BOX(&backward<Mlp>));
  m.impl("mlp_jvp", TORCH_BOX(&jvp<Mlp>));
  m.impl("conv_forward", TORCH_BOX(&forward<Conv>));
  m.impl("conv_backward", TORCH_BOX(&backward<Conv>));
  m.impl("conv_jvp", TORCH_BOX(&jvp<Conv>));
  m.impl("conv_advance", TORCH_BOX(&advance<Conv>));
  m.impl("conv_retreat", TORCH_BOX(&retreat<Conv>));
  m.impl("mlp_gram", TORCH_BOX(&gram<Mlp>));
  m.impl("conv_gram", TORCH_BOX(&gram<Conv>));
}
