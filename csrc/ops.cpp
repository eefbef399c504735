// The ops of the CPU engine, and the only file that knows torch (its stable ABI): argument checks, memory, dispatch on
// dtype and instruction set. The schemas are in narrowdeep/ops/chain.py, the meaning in narrowdeep/ops/*/reference.py.
// More than 400 lines, because it is the only one.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <numeric>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#include "common/args.h"
#include "ntk/args.h"
#include "peak/args.h"

namespace {

using narrowdeep::ChainParams;
using narrowdeep::ChainShape;
using narrowdeep::Parallel;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

constexpr int64_t kDefaultSegment = 64;  // where a backward finds nothing saved and has to run the forward again

Parallel pool() {
  return Parallel{int64_t(torch::stable::get_num_threads()), [](int64_t count, narrowdeep::Task task, void* context) {
                    torch::stable::parallel_for(0, count, 1, [task, context](int64_t begin, int64_t end) {
                      for (int64_t i = begin; i < end; ++i) task(context, i);
                    });
                  }};
}

// Every error of the engine is a std::runtime_error: torch makes RuntimeError of it in all its versions, and of other
// exceptions not.
template <class... Words>
void check(bool ok, const Words&... words) {
  if (ok) return;
  std::ostringstream text;
  (text << ... << words);
  throw std::runtime_error(text.str());
}
template <auto op>
struct Guarded;
template <class Result, class... Args, Result (*op)(Args...)>
struct Guarded<op> {
  static Result run(Args... args) {
    try {
      return op(std::move(args)...);
    } catch (const std::runtime_error&) {
      throw;
    } catch (const std::exception& error) {
      throw std::runtime_error(error.what());
    }
  }
};

// ---- tensors --------------------------------------------------------------------------------------------------------
Sizes joined(Sizes head, const Sizes& tail) {
  head.insert(head.end(), tail.begin(), tail.end());
  return head;
}
Sizes sizes_of(const Tensor& tensor) {
  const torch::headeronly::IntHeaderOnlyArrayRef sizes = tensor.sizes();
  return Sizes(sizes.begin(), sizes.end());
}

void check_dims(const char* name, const Tensor& tensor, int64_t dims) {
  check(tensor.dim() == dims, name, " must have ", dims, " dimensions, got ", tensor.dim());
}
void check_shape(const char* name, const Tensor& tensor, const Sizes& shape) {
  check_dims(name, tensor, int64_t(shape.size()));
  for (size_t d = 0; d < shape.size(); ++d)
    check(tensor.size(int64_t(d)) == shape[d], name, " must have size ", shape[d], " in dimension ", d, ", got ",
          tensor.size(int64_t(d)));
}
void check_like(const char* name, const Tensor& tensor, const char* of, const Tensor& input) {
  check(tensor.scalar_type() == input.scalar_type(), name, " must have the dtype of ", of);
}

// Contiguous, and its data where elements of its type may lie: a storage may begin anywhere. What has no such data is
// refused before torch is asked for it, which would print a stack.
Tensor ready(const Tensor& any) {
  check(any.defined(), "every tensor must be given");
  check(any.is_cpu(), "every tensor must be on the CPU, as the others are");
  int32_t layout = 0;
  aoti_torch_get_layout(any.get(), &layout);
  check(layout == aoti_torch_layout_strided(), "tensors must be dense, none sparse or nested");
  const Tensor tensor = any.is_contiguous() ? any : torch::stable::contiguous(any);  // a call of torch's costs 1 us
  const bool aligned = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % tensor.element_size() == 0;
  return aligned ? tensor : torch::stable::clone(tensor);
}
std::optional<Tensor> ready(const std::optional<Tensor>& any) {
  if (!any.has_value()) return std::nullopt;
  return ready(*any);
}

// An uninitialised tensor that may be large. Large ones come from the system page by page, and at 4 KiB a page that costs
// more than the arithmetic on them (100 ms for 154 MB, measured): huge pages are asked for where the system has them.
Tensor new_large(const Tensor& like, const Sizes& shape) {
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

// ---- a span ---------------------------------------------------------------------------------------------------------
// The six parameters; those of the first and the last layer may be absent.
struct Params {
  std::optional<Tensor> first_weight, first_bias;
  Tensor hidden_weight, hidden_bias;
  std::optional<Tensor> last_weight, last_bias;

  template <class T>
  ChainParams<const T> pointers() const {
    const auto data = [](const std::optional<Tensor>& t) { return t.has_value() ? t->const_data_ptr<T>() : nullptr; };
    return {data(first_weight), data(first_bias), hidden_weight.const_data_ptr<T>(), hidden_bias.const_data_ptr<T>(),
            data(last_weight),  data(last_bias)};
  }
};

struct Settings {
  double scale;
  bool offset;
  int64_t outputs, start, segment;
};

// A span with its arguments checked. `Family` says how many dimensions an image and a filter have, `kDims`: 0 or 2.
template <class Family>
struct Span {
  Tensor input;
  Params params;
  ChainShape shape;
  Sizes tap, image;

  Span(const Tensor& input_any, const Params& any, const Settings& settings)
      : input(ready(input_any)), params{ready(any.first_weight), ready(any.first_bias),  ready(any.hidden_weight),
                                        ready(any.hidden_bias),  ready(any.last_weight), ready(any.last_bias)} {
    constexpr int64_t dims = Family::kDims;
    const Params& p = params;
    const bool first = p.first_weight.has_value(), last = p.last_weight.has_value(), offset = settings.offset;
    check(p.first_bias.has_value() == first, "first_weight and first_bias must be given together");
    check(p.last_bias.has_value() == last, "last_weight and last_bias must be given together");
    const char* const name = input_name();
    check(input.scalar_type() == ScalarType::Float || input.scalar_type() == ScalarType::Double, name,
          " must be float32 or float64");
    check_dims(name, input, 2 + dims + (first ? 0 : 1));
    if (first) check_dims("first_weight", *p.first_weight, 2 + dims);
    if (last) check_dims("last_weight", *p.last_weight, 2 + dims);
    check_dims("hidden_weight", p.hidden_weight, 3 + dims);
    check(settings.segment >= 0, "segment must be at least 0, got ", settings.segment);
    check(settings.start >= 0 && settings.start <= int64_t(1) << 62, "start must be from 0 to 2**62, got ",
          settings.start);
    check(!first || settings.start == 0, "start must be 0 with the first layer, got ", settings.start);
    check(settings.outputs >= 1, "outputs must be at least 1, got ", settings.outputs);

    const int64_t layers = p.hidden_weight.size(0), width = p.hidden_weight.size(1);
    // In plain form the last layer alone has outputs: without it nothing bounds them, and nothing reads them.
    const int64_t outputs = offset || last ? settings.outputs : 1;
    check(layers > 0 || first || last, "a span must have at least one layer");
    if (dims) {
      const int64_t size = first ? p.first_weight->size(3) : p.hidden_weight.size(4);
      check(size % 2 == 1, "filters must have an odd size, got ", size);
      tap = {size, size};
      image = {input.size(2), input.size(3)};
      check(image[0] >= 1 && image[1] >= 1, name, " must have images of at least 1x1 pixels, got ", image[0], "x",
            image[1]);
    }
    const int64_t batch = first ? input.size(0) : input.size(2 + dims);
    const int64_t in = first ? input.size(1) : offset ? width - 1 - outputs : 0;
    if (first) {
      check_shape("first_weight", *p.first_weight, joined({width, in}, tap));
      check_shape("first_bias", *p.first_bias, {width});
    }
    check_shape("hidden_weight", p.hidden_weight, joined({layers, width, width}, tap));
    check_shape("hidden_bias", p.hidden_bias, {layers, width});
    if (last) {
      check_shape("last_weight", *p.last_weight, joined({outputs, width}, tap));
      check_shape("last_bias", *p.last_bias, {outputs});
    }
    check(width >= 1, "hidden_weight must not be empty");
    check(!first || in >= 1, name, " must have at least one feature or channel");
    check(!offset || (in >= 1 && width == in + 1 + outputs),
          "hidden_weight must have in + 1 + out = ", max(in, 1) + 1 + outputs, " rows", first ? "" : " or more",
          " in offset form, got ", width);
    shape = {batch,
             in,
             width,
             outputs,
             layers,
             settings.segment,
             settings.start,
             first,
             last,
             offset,
             settings.scale,
             dims ? tap[0] : 1,
             {dims ? image[0] : 1, dims ? image[1] : 1}};
    if (!first) check_shape(name, input, state());
    bound_segment();
    for (const auto& [label, tensor] : given()) check_like(label, *tensor, name, input);
  }

  const char* input_name() const { return params.first_weight.has_value() ? "x" : "state"; }
  void check_grad(const Tensor& grad) const {
    const char* const name = params.last_weight.has_value() ? "grad_out" : "grad";
    check_shape(name, grad, output());
    check_like(name, grad, input_name(), input);
  }

  std::vector<std::pair<const char*, const Tensor*>> given() const {
    std::vector<std::pair<const char*, const Tensor*>> list;
    if (shape.first)
      list.insert(list.end(), {{"first_weight", &*params.first_weight}, {"first_bias", &*params.first_bias}});
    list.insert(list.end(), {{"hidden_weight", &params.hidden_weight}, {"hidden_bias", &params.hidden_bias}});
    if (shape.last) list.insert(list.end(), {{"last_weight", &*params.last_weight}, {"last_bias", &*params.last_bias}});
    return list;
  }

  // (units, batch) of one word of a state; a state at the border of a span; the output.
  Sizes word() const { return joined(joined({shape.width}, image), {shape.batch}); }
  Sizes state() const { return joined({shape.offset ? 3 : 1}, word()); }
  Sizes output() const { return shape.last ? Sizes{shape.batch, shape.out} : state(); }
  // narrowdeep.ops.reference.saved_shape
  Sizes saved() const {
    int64_t rows = 0;
    if (shape.segment == 1) rows = max(0, shape.layers + 1 - (shape.first ? 0 : 1) - (shape.last ? 0 : 1));
    if (shape.segment > 1) rows = max(1, (shape.layers + shape.segment - 1) / shape.segment) - (shape.first ? 0 : 1);
    return joined({rows, shape.offset && shape.segment > 1 ? 2 : 1}, word());
  }
  // A segment of more layers than there are is all of them; kernels compute with it and must not overflow.
  void bound_segment() {
    if (shape.segment > 1 && shape.segment > shape.layers) shape.segment = max(2, shape.layers);
  }
  static int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
};

// ---- the ops of a family --------------------------------------------------------------------------------------------
struct Mlp : narrowdeep::Mlp {
  static constexpr int64_t kDims = 0;
};
struct Cnn : narrowdeep::Cnn {
  static constexpr int64_t kDims = 2;
};
template <class T>
narrowdeep::ChainKernels<narrowdeep::Mlp, T> kernels_of(const narrowdeep::Mlp&) {
  return narrowdeep::selected_kernels<narrowdeep::ChainKernels<narrowdeep::Mlp, T>>();
}
template <class T>
narrowdeep::ChainKernels<narrowdeep::Cnn, T> kernels_of(const narrowdeep::Cnn&) {
  return narrowdeep::selected_kernels<narrowdeep::ChainKernels<narrowdeep::Cnn, T>>();
}
template <class T>
narrowdeep::GramKernels<narrowdeep::Mlp, T> gram_of(const narrowdeep::Mlp&) {
  return narrowdeep::selected_kernels<narrowdeep::GramKernels<narrowdeep::Mlp, T>>();
}
template <class T>
narrowdeep::GramKernels<narrowdeep::Cnn, T> gram_of(const narrowdeep::Cnn&) {
  return narrowdeep::selected_kernels<narrowdeep::GramKernels<narrowdeep::Cnn, T>>();
}

template <class Family>
void run_forward(const Span<Family>& span, const Tensor& output, const Tensor& saved) {
  if (span.shape.batch == 0) return;
  dispatch(span.input, [&](auto zero) {
    using T = decltype(zero);
    kernels_of<T>(Family()).forward(
        {span.shape, span.params.template pointers<T>(), span.input.template const_data_ptr<T>(),
         output.mutable_data_ptr<T>(), saved.mutable_data_ptr<T>()},
        pool());
  });
}

using MaybeTensor = std::optional<Tensor>;

template <class Family>
std::tuple<Tensor, Tensor> forward(Tensor input, MaybeTensor first_weight, MaybeTensor first_bias, Tensor hidden_weight,
                                   Tensor hidden_bias, MaybeTensor last_weight, MaybeTensor last_bias, double scale,
                                   bool offset, int64_t outputs, int64_t start, int64_t segment) {
  const Span<Family> span(input, {first_weight, first_bias, hidden_weight, hidden_bias, last_weight, last_bias},
                          {scale, offset, outputs, start, segment});
  Tensor output = new_large(span.input, span.output()), saved = new_large(span.input, span.saved());
  run_forward(span, output, saved);
  return {output, saved};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Uninitialised gradients of a span's input and parameters, empty where not needed; zeros of no samples.
struct NewGradients {
  Gradients all;
  const bool need_input;

  template <class Span>
  NewGradients(const Span& span, bool need_input, bool need_params)
      : all{of(span, span.input, need_input),
            of(span, span.params.first_weight, need_params),
            of(span, span.params.first_bias, need_params),
            of(span, span.params.hidden_weight, need_params),
            of(span, span.params.hidden_bias, need_params),
            of(span, span.params.last_weight, need_params),
            of(span, span.params.last_bias, need_params)},
        need_input(need_input) {}

  template <class T>
  T* input() const {
    return need_input ? std::get<0>(all).template mutable_data_ptr<T>() : nullptr;
  }
  template <class T>
  ChainParams<T> params() const {
    return {std::get<1>(all).template mutable_data_ptr<T>(), std::get<2>(all).template mutable_data_ptr<T>(),
            std::get<3>(all).template mutable_data_ptr<T>(), std::get<4>(all).template mutable_data_ptr<T>(),
            std::get<5>(all).template mutable_data_ptr<T>(), std::get<6>(all).template mutable_data_ptr<T>()};
  }

 private:
  template <class Span>
  static Tensor of(const Span& span, const MaybeTensor& like, bool needed) {
    if (!needed || !like.has_value()) return torch::stable::new_empty(span.input, {0});
    Tensor gradient = new_large(*like, sizes_of(*like));
    if (span.shape.batch == 0) torch::stable::zero_(gradient);
    return gradient;
  }
};

template <class Family>
Gradients backward(Tensor grad_any, Tensor input, MaybeTensor first_weight, MaybeTensor first_bias,
                   Tensor hidden_weight, Tensor hidden_bias, MaybeTensor last_weight, MaybeTensor last_bias,
                   Tensor saved_any, double scale, bool offset, int64_t outputs, int64_t start, int64_t segment,
                   bool need_input, bool need_params) {
  Span<Family> span(input, {first_weight, first_bias, hidden_weight, hidden_bias, last_weight, last_bias},
                    {scale, offset, outputs, start, segment});
  const Tensor grad = ready(grad_any);
  Tensor saved = ready(saved_any);
  span.check_grad(grad);
  check_like("saved", saved, span.input_name(), span.input);
  check_shape("saved", saved, span.saved());
  const bool any = span.shape.batch > 0 && (need_input || need_params);
  if (segment == 0) {
    span.shape.segment = kDefaultSegment;
    span.bound_segment();
    if (any) {
      saved = new_large(span.input, span.saved());
      run_forward(span, new_large(span.input, span.output()), saved);
    }
  }
  const NewGradients results(span, need_input, need_params);
  if (any) {
    dispatch(span.input, [&](auto zero) {
      using T = decltype(zero);
      kernels_of<T>(Family()).backward({span.shape, span.params.template pointers<T>(), grad.const_data_ptr<T>(),
                                        span.input.template const_data_ptr<T>(), saved.const_data_ptr<T>(),
                                        results.template input<T>(), need_params, results.template params<T>()},
                                       pool());
    });
  }
  return results.all;
}

// Tangents of a span's input and parameters, null where there are none.
template <class Family>
class Tangents {
 public:
  Tangents(const Span<Family>& span, const std::vector<MaybeTensor>& given) : span_(span) {
    const Params& p = span.params;
    const MaybeTensor primals[] = {span.input,    p.first_weight, p.first_bias, p.hidden_weight,
                                   p.hidden_bias, p.last_weight,  p.last_bias};
    const char* const names[] = {span.shape.first ? "x_t" : "state_t",
                                 "first_weight_t",
                                 "first_bias_t",
                                 "hidden_weight_t",
                                 "hidden_bias_t",
                                 "last_weight_t",
                                 "last_bias_t"};
    for (int i = 0; i < 7; ++i) data_.push_back(data(names[i], given[i], primals[i]));
  }
  // The data of a tangent, checked against its primal; null when there is none.
  const void* data(const char* name, const MaybeTensor& tangent, const MaybeTensor& primal) {
    if (!tangent.has_value()) return nullptr;
    check(primal.has_value(), name, " is the tangent of what is not given");
    check_like(name, *tangent, span_.input_name(), span_.input);
    check(sizes_of(*tangent) == sizes_of(*primal), name, " must have the shape of its primal");
    owners_.push_back(ready(*tangent));
    return owners_.back().const_data_ptr();
  }
  template <class T>
  const T* input() const {
    return at<T>(0);
  }
  template <class T>
  ChainParams<const T> params() const {
    return {at<T>(1), at<T>(2), at<T>(3), at<T>(4), at<T>(5), at<T>(6)};
  }

 private:
  const Span<Family>& span_;
  std::vector<Tensor> owners_;
  std::vector<const void*> data_;
  template <class T>
  const T* at(int i) const {
    return static_cast<const T*>(data_[i]);
  }
};

template <class Family>
Tensor jvp(Tensor input, MaybeTensor first_weight, MaybeTensor first_bias, Tensor hidden_weight, Tensor hidden_bias,
           MaybeTensor last_weight, MaybeTensor last_bias, MaybeTensor input_t, MaybeTensor first_weight_t,
           MaybeTensor first_bias_t, MaybeTensor hidden_weight_t, MaybeTensor hidden_bias_t, MaybeTensor last_weight_t,
           MaybeTensor last_bias_t, double scale, bool offset, int64_t outputs, int64_t start) {
  const Span<Family> span(input, {first_weight, first_bias, hidden_weight, hidden_bias, last_weight, last_bias},
                          {scale, offset, outputs, start, 0});
  const Tangents<Family> tangents(
      span, {input_t, first_weight_t, first_bias_t, hidden_weight_t, hidden_bias_t, last_weight_t, last_bias_t});
  Tensor output = new_large(span.input, span.output());
  if (span.shape.batch == 0) return output;
  dispatch(span.input, [&](auto zero) {
    using T = decltype(zero);
    kernels_of<T>(Family()).jvp(
        {span.shape, span.params.template pointers<T>(), tangents.template params<T>(),
         span.input.template const_data_ptr<T>(), tangents.template input<T>(), output.mutable_data_ptr<T>()},
        pool());
  });
  return output;
}

template <class Family>
Gradients backward_jvp(Tensor grad_any, MaybeTensor grad_t, Tensor input, MaybeTensor first_weight,
                       MaybeTensor first_bias, Tensor hidden_weight, Tensor hidden_bias, MaybeTensor last_weight,
                       MaybeTensor last_bias, MaybeTensor input_t, MaybeTensor first_weight_t, MaybeTensor first_bias_t,
                       MaybeTensor hidden_weight_t, MaybeTensor hidden_bias_t, MaybeTensor last_weight_t,
                       MaybeTensor last_bias_t, double scale, bool offset, int64_t outputs, int64_t start,
                       bool need_input, bool need_params) {
  const Span<Family> span(input, {first_weight, first_bias, hidden_weight, hidden_bias, last_weight, last_bias},
                          {scale, offset, outputs, start, 0});
  const Tensor grad = ready(grad_any);
  span.check_grad(grad);
  Tangents<Family> tangents(
      span, {input_t, first_weight_t, first_bias_t, hidden_weight_t, hidden_bias_t, last_weight_t, last_bias_t});
  const void* const grad_tangent = tangents.data(span.shape.last ? "grad_out_t" : "grad_t", grad_t, grad);
  const NewGradients results(span, need_input, need_params);
  if (span.shape.batch > 0 && (need_input || need_params)) {
    dispatch(span.input, [&](auto zero) {
      using T = decltype(zero);
      kernels_of<T>(Family()).backward_jvp(
          {span.shape, span.params.template pointers<T>(), tangents.template params<T>(), grad.const_data_ptr<T>(),
           static_cast<const T*>(grad_tangent), span.input.template const_data_ptr<T>(), tangents.template input<T>(),
           results.template input<T>(), need_params, results.template params<T>()},
          pool());
    });
  }
  return results.all;
}

// Theta(x1, x2): narrowdeep/ops/gram/reference.py
template <class Family>
Tensor gram(Tensor x1_any, Tensor x2_any, Tensor first_weight, Tensor first_bias, Tensor hidden_weight,
            Tensor hidden_bias, Tensor last_weight, Tensor last_bias, double scale, bool offset, bool symmetric,
            int64_t trainable, int64_t reduce) {
  const int64_t outputs = last_weight.dim() ? last_weight.size(0) : 0;
  const Span<Family> span(x1_any, {first_weight, first_bias, hidden_weight, hidden_bias, last_weight, last_bias},
                          {scale, offset, outputs, 0, 0});
  const Tensor& x1 = span.input;
  const Tensor x2 = symmetric ? x1 : ready(x2_any);
  check_like("x2", x2, "x", x1);
  Sizes wanted = sizes_of(x1);
  wanted[0] = x2.dim() ? x2.size(0) : 0;
  check_shape("x2", x2, wanted);
  check(reduce >= 0 && reduce <= 2, "reduce must be 0, 1 or 2, got ", reduce);
  const narrowdeep::Reduce kind{reduce};
  const int64_t rows = x1.size(0), columns = x2.size(0);
  Sizes result{rows, columns};
  if (kind != narrowdeep::Reduce::kTrace) result.push_back(outputs);
  if (kind == narrowdeep::Reduce::kFull) result.push_back(outputs);
  Tensor out = torch::stable::new_zeros(x1, result, ScalarType::Double);
  if (rows == 0 || columns == 0) return out;
  ChainShape shape = span.shape;
  shape.batch = symmetric ? rows : rows + columns;
  dispatch(x1, [&](auto zero) {
    using T = decltype(zero);
    std::vector<T> x(x1.const_data_ptr<T>(), x1.const_data_ptr<T>() + x1.numel());
    if (!symmetric) x.insert(x.end(), x2.const_data_ptr<T>(), x2.const_data_ptr<T>() + x2.numel());
    const narrowdeep::GramPairs pairs{rows, columns, symmetric, kind, out.mutable_data_ptr<double>()};
    gram_of<T>(Family()).gram({shape, span.params.template pointers<T>(), x.data(), trainable, pairs}, pool());
  });
  return out;
}

}  // namespace

// narrowdeep::BackwardCosts for narrowdeep.memory, through ctypes. `sizes` are batch, in, width, out, layers, segment,
// filter size, height and width of the image; `flags` first, last, offset, need_params, double precision, convolutions.
// Returns 0, or 1 where NARROWDEEP_ISA names no instruction set of this machine.
extern "C" __attribute__((visibility("default"))) int narrowdeep_backward_costs(const int64_t* sizes, const bool* flags,
                                                                                int64_t threads, int64_t* costs) {
  const ChainShape shape{sizes[0],
                         sizes[1],
                         sizes[2],
                         sizes[3],
                         sizes[4],
                         sizes[5],
                         0,
                         flags[0],
                         flags[1],
                         flags[2],
                         1.0,
                         sizes[6],
                         {sizes[7], sizes[8]}};
  const auto ask = [&](auto family) {
    return flags[4] ? kernels_of<double>(family).backward_costs(shape, threads, flags[3])
                    : kernels_of<float>(family).backward_costs(shape, threads, flags[3]);
  };
  try {
    const narrowdeep::BackwardCosts found = flags[5] ? ask(narrowdeep::Cnn()) : ask(narrowdeep::Mlp());
    costs[0] = found.kept;
    costs[1] = found.segment;
    costs[2] = found.longest;
    costs[3] = found.held;
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}

// narrowdeep::PeakKernels on every thread, for benchmarks, through ctypes. Returns the operations of all threads, or the
// length of one's chain; 0 where NARROWDEEP_ISA names no instruction set of this machine.
extern "C" __attribute__((visibility("default"))) int64_t narrowdeep_multiply_adds(int64_t rounds, bool independent,
                                                                                   bool double_precision) {
  try {
    const auto run = double_precision ? narrowdeep::selected_kernels<narrowdeep::PeakKernels<double>>().multiply_adds
                                      : narrowdeep::selected_kernels<narrowdeep::PeakKernels<float>>().multiply_adds;
    const Parallel parallel = pool();
    std::vector<int64_t> operations(size_t(parallel.threads));
    narrowdeep::parallel_for(parallel, parallel.threads,
                             [&](int64_t thread) { operations[size_t(thread)] = run(rounds, independent); });
    return independent ? std::accumulate(operations.begin(), operations.end(), int64_t(0)) : operations.front();
  } catch (const std::exception&) {
    return 0;
  }
}

#define ND_OP(op) TORCH_BOX(&Guarded<&op>::run)

STABLE_TORCH_LIBRARY_IMPL(narrowdeep, CPU, m) {
  m.impl("mlp_forward", ND_OP(forward<Mlp>));
  m.impl("mlp_backward", ND_OP(backward<Mlp>));
  m.impl("mlp_jvp", ND_OP(jvp<Mlp>));
  m.impl("mlp_backward_jvp", ND_OP(backward_jvp<Mlp>));
  m.impl("mlp_gram", ND_OP(gram<Mlp>));
  m.impl("cnn_forward", ND_OP(forward<Cnn>));
  m.impl("cnn_backward", ND_OP(backward<Cnn>));
  m.impl("cnn_jvp", ND_OP(jvp<Cnn>));
  m.impl("cnn_backward_jvp", ND_OP(backward_jvp<Cnn>));
  m.impl("cnn_gram", ND_OP(gram<Cnn>));
}
