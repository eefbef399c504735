// One layer of the MLP chain: a matrix product. Widths 2 to 12 run many layers in registers (narrow.h).
#pragma once

#include "common/epilogue.h"
#include "common/state.h"
#include "mlp/narrow_few.h"
#include "mlp/narrow_tangent.h"
#include "mlp/weight_gradient.h"

namespace narrowdeep {
namespace ND_ISA {

// ---- the layer ------------------------------------------------------------------------------------------------------

// to = sum + factor * from, `from` over the first `rows` rows only; with factor 0 `from` may be null.
template <class T>
struct InputEpilogue {
  const T* from;
  int64_t rows;
  T factor;
  T* to;
  int64_t stride;
  template <int R, int V>
  ND_INLINE void operator()(int64_t row, int64_t, Vec<T> (*sum)[V]) const {
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) {
        const int64_t at = (row + r) * stride + v * kLanes<T>;
        store(to + at, row + r < rows ? fma(broadcast(factor), load(from + at), sum[r][v]) : sum[r][v]);
      }
  }
};

template <class T>
class MlpLayer {
 public:
  using Element = T;
  static constexpr int64_t kMostVectors = kTileVectors;
  static constexpr bool kRunsOfTiles = false;
  static constexpr bool kEndsTogether = true;  // a first or last layer is wide more often than the batch is large

  template <class Body>
  static void parts(const ChainShape& s, int64_t, const Body& body) {
    body(Part{0, s.batch, 1});
  }

  MlpLayer(const Tiles<T>& tiles, const ChainParams<const T>& params)
      : tiles_(tiles),
        shape_(tiles.shape),
        params_(params),
        few_(few(tiles.shape)),
        few_vectors_(vectors_of_few(tiles.shape)),
        few_memory_(few_ * (max_of(tiles.shape.width, max_of(tiles.shape.in, tiles.shape.out)) +
                            kLanes<T>)*int64_t(sizeof(T))) {}

  // With so few samples lanes run over the rows of weights (common/gemm.h): 1, 2 or 4 of them, or 0.
  static int64_t few(const ChainShape& s) {
    const int64_t least = s.batch <= 2 ? 20 : 40;  // width from which this is faster, measured
    if (kLanes<T> < 4 || s.width < least || s.batch > 4) return 0;
    return s.batch <= 2 ? s.batch : 4;
  }

  // The same of layers in registers (narrow_few.h).
  static int vectors_of_few(const ChainShape& s) {
    int vectors = 0;
    of_width(s.width, [&](auto width) { vectors = few_vectors<T, decltype(width)::value>(s.batch); });
    return vectors;
  }

  int64_t most_states() const { return INT64_MAX; }  // that a backward holds at once
  int64_t hidden_weights() const { return shape_.width * shape_.width; }
  int64_t first_weights() const { return shape_.width * shape_.in; }
  int64_t last_weights() const { return shape_.out * shape_.width; }

  // ---- forward
  void first(const T* x, const State<T>& state, T* h) const {
    product(params_.first_weight, shape_.width, shape_.in, x,
            StateEpilogue<T>{params_.first_bias, tiles_.every, state.floor, state.lo, h, tiles_.samples, {}});
  }
  void step(int64_t l, const State<T>& state, const T* h, T* h_next) const {
    const T* const weight = params_.hidden_weight + l * hidden_weights();
    product(weight, shape_.width, shape_.width, h,
            StateEpilogue<T>{params_.hidden_bias + l * shape_.width,
                             tiles_.skip,
                             state.floor,
                             state.lo,
                             h_next,
                             tiles_.samples,
                             {l + 1 < shape_.layers ? weight + hidden_weights() : weight, shape_.width}});
  }
  void last(const T* h, const State<T>& state, T* z) const {
    product(params_.last_weight, shape_.out, shape_.width, h, WriteEpilogue<T>{params_.last_bias, z, tiles_.samples});
    add_right(state, z);
  }

  // ---- backward: `full` is the gradient of a layer's output, `h` the value of its input, `g` becomes the gradient there
  void last_back(const T* r, const T* h, const State<T>& g, T* full) const {
    transposed(params_.last_weight, shape_.out, shape_.width, r,
               GradientEpilogue<T>{h, tiles_.skip, g.floor, g.lo, full, tiles_.samples, {}}, full);
  }
  void step_back(int64_t l, const T* full, const T* h, const State<T>& g, T* full_next) const {
    const T* const weight = params_.hidden_weight + l * hidden_weights();
    transposed(weight, shape_.width, shape_.width, full,
               GradientEpilogue<T>{h,
                                   tiles_.skip,
                                   g.floor,
                                   g.lo,
                                   full_next,
                                   tiles_.samples,
                                   {l > 0 ? weight - hidden_weights() : weight, shape_.width}},
               full_next);
  }
  void first_back(const T* full, T* grad_x) const {
    transposed(params_.first_weight, shape_.width, shape_.in, full,
               InputEpilogue<T>{full, shape_.offset ? shape_.in : 0, T(shape_.scale), grad_x, tiles_.samples}, grad_x);
  }

  // W^T full, of a weight (rows, columns). `sums`, if given, is room for the sums: what the epilogue writes.
  template <class Epilogue>
  void transposed(const T* weight, int64_t rows, int64_t columns, const T* full, const Epilogue& epilogue,
                  T* sums = nullptr) const {
    const bool by_samples = few_ == 0 || columns < kLanes<T>;
    if (by_samples && sums && large<T>(rows, columns))
      return multiply_transposed_large<T>(int(tiles_.vectors), rows, weight, columns, full, tiles_.samples, sums,
                                          epilogue);
    if (by_samples)
      return multiply<T>(int(tiles_.vectors), columns, weight, 1, columns, full, tiles_.samples, rows, epilogue);
    with_few([&](auto samples) {
      multiply_transposed_few<T, decltype(samples)::value>(rows, weight, columns, full, few_memory_.as<T>(), epilogue);
    });
  }

  static int64_t gradient_bytes() { return 0; }
  int64_t gradient_scratch(int64_t, int64_t columns) const { return tiles_.samples * padded_columns<T>(columns); }
  // Of the weight (rows, columns) and the bias of a layer; added to what is there, or written over it.
  void gradient(int64_t rows, int64_t columns, int64_t valid, const T* full, const T* h, T* weight, T* bias, bool add,
                T* scratch) const {
    const GradientOf<T> of{full, h, 0, 0, rows, columns, weight, bias, add};
    if (few_ == 0 || columns < kLanes<T>) return weight_gradient(of, 0, rows, tiles_.samples, 1, valid, scratch);
    with_few([&](auto samples) { weight_gradient_few<T, decltype(samples)::value>(of, valid, few_memory_.as<T>()); });
  }

  // The same from tiles [first, first + count), whose arrays stand `stride` apart, by all threads: shares of the rows.
  void gradient_over_tiles(const Parallel& parallel, int64_t first, int64_t count, int64_t stride,
                           GradientOf<T> of) const {
    of.full_stride = of.h_stride = stride;
    // None so small that transposing h again costs more than 1/16.
    const int64_t blocks = max_of(1, min_of(of.rows / 64, 4 * parallel.threads)), block = ceil_div(of.rows, blocks);
    const int64_t threads = min_of(parallel.threads, blocks);
    parallel_for(parallel, threads, [&](int64_t thread) {
      const Buffer scratch(int64_t(sizeof(T)) * count * tiles_.samples * padded_columns<T>(of.columns));
      for (int64_t b = thread; b < blocks; b += threads)
        weight_gradient(of, b * block, min_of((b + 1) * block, of.rows), tiles_.samples, count,
                        tiles_.valid(first + count - 1), scratch.as<T>());
    });
  }

  // ---- jvp
  void first_tangent(const T* x, const T* x_tangent, const ChainParams<const T>& tangents, const T* h,
                     const State<T>& tangent, T* full) const {
    const T scale = T(shape_.scale);
    fill(tiles_.size, T(0), tangent.base);
    fill(tiles_.size, T(0), tangent.hi);
    fill(tiles_.size, T(0), full);
    if (x_tangent) {
      product(params_.first_weight, shape_.width, shape_.in, x_tangent,
              WriteEpilogue<T>{nullptr, full, tiles_.samples});
      for (int64_t e = 0; shape_.offset && e < shape_.in * tiles_.samples; ++e) {
        if (x[e] <= T(0)) {
          full[e] += scale * x_tangent[e];
        } else {
          tangent.base[e] = scale * x_tangent[e];
        }
      }
    }
    if (tangents.first_weight)
      product(tangents.first_weight, shape_.width, shape_.in, x, AddEpilogue<T>{full, tiles_.samples});
    tangent.set_floor(tiles_.size);
    mask_tangent(tangents.first_bias, h, tangent, full);
  }
  void step_tangent(int64_t l, const ChainParams<const T>& tangents, const T* h, const T* h_next, const T* full,
                    const State<T>& tangent, T* full_next) const {
    const int64_t at = l * hidden_weights();
    product(params_.hidden_weight + at, shape_.width, shape_.width, full,
            WriteEpilogue<T>{nullptr, full_next, tiles_.samples});
    if (tangents.hidden_weight)
      product(tangents.hidden_weight + at, shape_.width, shape_.width, h, AddEpilogue<T>{full_next, tiles_.samples});
    for (int64_t i = 0; i < shape_.width; ++i)
      if (tiles_.skip[i] != T(0))
        ND_ISA::add(tiles_.samples, tangent.lo + i * tiles_.samples, full_next + i * tiles_.samples);
    mask_tangent(tangents.hidden_bias ? tangents.hidden_bias + l * shape_.width : nullptr, h_next, tangent, full_next);
  }
  void last_tangent(const ChainParams<const T>& tangents, const T* h, const T* full, const State<T>& tangent,
                    T* z) const {
    product(params_.last_weight, shape_.out, shape_.width, full,
            WriteEpilogue<T>{tangents.last_bias, z, tiles_.samples});
    if (tangents.last_weight)
      product(tangents.last_weight, shape_.out, shape_.width, h, AddEpilogue<T>{z, tiles_.samples});
    add_right(tangent, z);
  }

  // ---- many layers in registers
  bool in_registers() const { return shape_.width >= kNarrowest && shape_.width <= kWidestNarrow; }

  // Whether they renormalise as they go.
  bool renormalises() const { return few_vectors_ > 0; }
  // Layers [begin, end), of which none renormalises unless all do; with `states`, the value after layer l goes to states + (l + 1 - begin)
  // * size.
  void forward_in_registers(int64_t begin, int64_t end, const State<T>& state, T* states) const {
    of_width([&](auto width) {
      constexpr int N = decltype(width)::value;
      const T *w = params_.hidden_weight, *c = params_.hidden_bias;
      const int vectors = int(tiles_.vectors);
      if (few_vectors_ > 0)
        return with_few_vectors<N>([&](auto v, auto offset) {
          constexpr int V = decltype(v)::value;
          constexpr bool OFFSET = decltype(offset)::value;
          const auto run =
              states ? narrow_few_forward<T, N, V, OFFSET, true> : narrow_few_forward<T, N, V, OFFSET, false>;
          run(w, c, begin, end, shape_.start, tiles_.samples, tiles_.skip, state, states);
        });
      if (shape_.offset && states)
        narrow_forward<T, N, true, true>(w, c, begin, end, vectors, tiles_.skip, state.floor, state.lo, states);
      else if (shape_.offset)
        narrow_forward<T, N, true, false>(w, c, begin, end, vectors, tiles_.skip, state.floor, state.lo, nullptr);
      else if (states)
        narrow_forward<T, N, false, true>(w, c, begin, end, vectors, tiles_.skip, state.floor, state.lo, states);
      else
        narrow_forward<T, N, false, false>(w, c, begin, end, vectors, tiles_.skip, state.floor, state.lo, nullptr);
    });
  }
  // Back through layers [begin, end); `states` holds the values before each. The gradients of layer l become those of
  // layer l - begin + to of `sums`, unless these are null; where they are packed they are added.
  void backward_in_registers(int64_t begin, int64_t end, const State<T>& g, const T* states, const ChainParams<T>& sums,
                             int64_t to) const {
    of_width([&](auto width) {
      constexpr int N = decltype(width)::value;
      const int vectors = int(tiles_.vectors);
      if (!packs())
        return with_few_vectors<N>([&](auto v, auto offset) {
          const bool wanted = sums.hidden_weight != nullptr;
          narrow_few_backward<T, N, decltype(v)::value, decltype(offset)::value>(
              params_.hidden_weight, begin, end, shape_.start, tiles_.samples, tiles_.skip, g, states,
              wanted ? sums.hidden_weight + to * N * N : nullptr, wanted ? sums.hidden_bias + to * N : nullptr);
        });
      T* const packed = sums.hidden_weight ? sums.hidden_weight + to * packed_size() : nullptr;
      if (shape_.offset)
        narrow_backward<T, N, true>(params_.hidden_weight, begin, end, vectors, tiles_.skip, g.floor, g.lo, states,
                                    packed);
      else
        narrow_backward<T, N, false>(params_.hidden_weight, begin, end, vectors, tiles_.skip, g.floor, g.lo, states,
                                     packed);
    });
  }
  // The same beside tangents.
  void forward_tangent_in_registers(int64_t begin, int64_t end, const ChainParams<const T>& tangents,
                                    const State<T>& state, const State<T>& tangent, T* states,
                                    T* tangent_values) const {
    with_tangents(tangents, [&](auto width, auto offset, auto weight_t, const NarrowTangents<T>& of) {
      constexpr int N = decltype(width)::value;
      if (few_vectors_ > 0 && !states)  // the way back sums over all lanes, of which these fill a few
        return with_few_vectors<N>([&](auto v, auto) {
          narrow_few_forward_tangent<T, N, decltype(v)::value, decltype(offset)::value, decltype(weight_t)::value>(
              of, begin, end, tiles_.samples, tiles_.skip, state, tangent);
        });
      for_vectors<kTangentVectors<N>>(
          int(tiles_.vectors), kLanes<T>,
          NarrowForwardTangent<T, N, decltype(offset)::value, decltype(weight_t)::value>{
              of, begin, end, tiles_.samples, tiles_.skip, words(state, tangent), states, tangent_values});
    });
  }
  void backward_tangent_in_registers(int64_t begin, int64_t end, const ChainParams<const T>& tangents,
                                     const State<T>& g, const State<T>& g_t, const T* states, const T* tangent_values,
                                     T* packed) const {
    with_tangents(tangents, [&](auto width, auto offset, auto weight_t, const NarrowTangents<T>& of) {
      narrow_backward_tangent<T, decltype(width)::value, decltype(offset)::value, decltype(weight_t)::value>(
          of, begin, end, int(tiles_.vectors), tiles_.skip, words(g, g_t), states, tangent_values, packed);
    });
  }
  // Whether the gradients of layers in registers are packed sums, which `unpack` adds up. Few samples write them at once.
  bool packs() const { return in_registers() && few_vectors_ == 0; }
  int64_t packed_size() const {
    int64_t size = 0;
    of_width([&](auto width) { size = NarrowEntries<T, decltype(width)::value>::kSize; });
    return size;
  }
  // Gradients of layers [begin, end) from the sums of all workers, which stand `stride` apart.
  void unpack(const T* packed, int64_t stride, int64_t workers, int64_t begin, int64_t end, T* weight, T* bias) const {
    constexpr int64_t kMost = kWidestNarrow * (kWidestNarrow + 1), kAhead = 16;  // layers: other cores' sums come late
    const int64_t weights = hidden_weights(), entries = weights + shape_.width, size = packed_size();
    int64_t positions[kMost];
    of_width([&](auto width) {
      for (int64_t e = 0; e < entries; ++e) positions[e] = NarrowEntries<T, decltype(width)::value>::position(int(e));
    });
    const int64_t in_order = min_of(weights, entries / kLanes<T> * kLanes<T>);  // whole groups are
    T sums[kMost + kLanes<T>];
    for (int64_t l = begin; l < end; ++l) {
      const T* total = packed + l * size;
      if (workers > 1) {
        copy(size, total, sums);
        total = sums;
      }
      for (int64_t worker = 1; worker < workers; ++worker) {
        const T* const from = packed + worker * stride + l * size;
        for (int64_t i = 0; i < size; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(from + kAhead * size + i);
        ND_ISA::add(size, from, sums);
      }
      copy(in_order, total, weight + l * weights);
      for (int64_t e = in_order; e < weights; ++e) weight[l * weights + e] = total[positions[e]];
      for (int64_t e = 0; e < shape_.width; ++e) bias[l * shape_.width + e] = total[positions[weights + e]];
    }
  }

 private:
  const Tiles<T>& tiles_;
  const ChainShape& shape_;
  const ChainParams<const T>& params_;
  const int64_t few_;
  const int few_vectors_;
  const Buffer few_memory_;  // one tile, so one thread

  // body(a Constant of few_)
  template <class Body>
  ND_INLINE void with_few(const Body& body) const {
    if constexpr (kLanes<T> >= 4) {
      if (few_ == 1) return body(Constant<1>());
      if (few_ == 2) return body(Constant<2>());
      body(Constant<4>());
    }
  }
  template <bool B>
  struct Flag {
    static constexpr bool value = B;
  };
  static NarrowWords<T> words(const State<T>& state, const State<T>& tangent) {
    return {state.floor, tangent.floor, state.lo, tangent.lo};
  }
  // body(width, offset form, whether there is a tangent of the weight, parameters and tangents)
  template <class Body>
  ND_INLINE void with_tangents(const ChainParams<const T>& t, const Body& body) const {
    const NarrowTangents<T> of{params_.hidden_weight, params_.hidden_bias, t.hidden_weight, t.hidden_bias};
    of_width([&](auto width) {
      if (shape_.offset && t.hidden_weight) return body(width, Flag<true>(), Flag<true>(), of);
      if (shape_.offset) return body(width, Flag<true>(), Flag<false>(), of);
      if (t.hidden_weight) return body(width, Flag<false>(), Flag<true>(), of);
      body(width, Flag<false>(), Flag<false>(), of);
    });
  }
  template <class Body>
  ND_INLINE void of_width(const Body& body) const {
    of_width(shape_.width, body);
  }
  template <int N = kNarrowest, class Body>
  static ND_INLINE void of_width(int64_t width, const Body& body) {
    if constexpr (N <= kWidestNarrow) {
      if (width == N) return body(Constant<N>());
      of_width<N + 1>(width, body);
    }
  }
  // body(a Constant of few_vectors_, offset form)
  template <int N, int V = kMostFewVectors<T, N>, class Body>
  ND_INLINE void with_few_vectors(const Body& body) const {
    if constexpr (V > 0) {
      if (few_vectors_ < V) return with_few_vectors<N, V / 2>(body);
      if (shape_.offset) return body(Constant<V>(), Flag<true>());
      body(Constant<V>(), Flag<false>());
    }
  }
  template <class Epilogue>
  void product(const T* weight, int64_t rows, int64_t columns, const T* h, const Epilogue& epilogue) const {
    if (few_ == 0 || columns < kLanes<T>)
      return multiply<T>(int(tiles_.vectors), rows, weight, columns, 1, h, tiles_.samples, columns, epilogue);
    with_few([&](auto samples) {
      multiply_few<T, decltype(samples)::value>(rows, weight, columns, h, few_memory_.as<T>(), epilogue);
    });
  }
  // What the identity part of the last layer passes on, without the base.
  void add_right(const State<T>& state, T* z) const {
    const int64_t right = tiles_.right() * tiles_.samples;
    for (int64_t e = 0; shape_.offset && e < shape_.out * tiles_.samples; ++e)
      z[e] += state.hi[right + e] + state.lo[right + e];
  }
  // lo = full + bias, or what makes the tangent 0 where h is 0; full becomes the whole tangent.
  void mask_tangent(const T* bias, const T* h, const State<T>& tangent, T* full) const {
    for (int64_t i = 0; i < shape_.width; ++i)
      for (int64_t e = i * tiles_.samples; e < (i + 1) * tiles_.samples; ++e) {
        const T value = bias ? full[e] + bias[i] : full[e];
        tangent.lo[e] = h[e] <= T(0) ? tangent.floor[e] : value;
        full[e] = tangent.lo[e] - tangent.floor[e];
      }
  }
};

}  // namespace ND_ISA
}  // namespace narrowdeep
