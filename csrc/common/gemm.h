// Small matrix products with one operand in broadcasts and the other in vector lanes.
//
//   C[r][j] = sum_k A[r * row_stride + k * k_stride] * B[k * ldb + j],   j over V vectors
//
// A block of R rows by V vectors stays in registers. What happens to it then (bias, clip, accumulate, ...) is the
// epilogue's business (common/epilogue.h).
#pragma once

#include "common/vec.h"

namespace narrowdeep {
namespace ND_ISA {

template <int N>
struct Constant {
  static constexpr int value = N;
};

// Rows in a full block: R * V accumulators, V vectors of B and a broadcast must fit in the registers.
// clang-format off
template <int V>
constexpr int kBlockRows = kRegisters == 32 ? (V == 4 ? 6 : V == 3 ? 8 : V == 2 ? 12 : 16)
                                            : (V == 4 ? 2 : V == 3 ? 3 : V == 2 ? 6 : 8);
// clang-format on

// acc += A B
template <class T, int R, int V>
ND_INLINE void multiply_block(const T* a, int64_t row_stride, int64_t k_stride, const T* b, int64_t ldb, int64_t depth,
                              Vec<T> (*acc)[V]) {
  Vec<T> sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = acc[r][v];
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> column[V];
    for (int v = 0; v < V; ++v) column[v] = load(b + k * ldb + v * kLanes<T>);
    for (int r = 0; r < R; ++r) {
      const Vec<T> scalar = broadcast(a[r * row_stride + k * k_stride]);
      for (int v = 0; v < V; ++v) sum[r][v] = fma(scalar, column[v], sum[r][v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) acc[r][v] = sum[r][v];
}

// Calls rows.template operator()<R>(row) for blocks of R rows that cover [row, end): full blocks of kRows, then smaller
// ones.
template <int V, int kRows = kBlockRows<V>, class Rows>
ND_INLINE void for_row_blocks(int64_t row, int64_t end, const Rows& rows) {
  for (; row + kRows <= end; row += kRows) rows.template operator()<kRows>(row);
  if constexpr (kRows > 8)
    for (; row + 8 <= end; row += 8) rows.template operator()<8>(row);
  if constexpr (kRows > 4)
    for (; row + 4 <= end; row += 4) rows.template operator()<4>(row);
  if constexpr (kRows > 2)
    for (; row + 2 <= end; row += 2) rows.template operator()<2>(row);
  for (; row < end; ++row) rows.template operator()<1>(row);
}

template <class T, int V, class Epilogue>
struct MultiplyRows {
  const T* a;
  int64_t row_stride, k_stride;
  const T* b;
  int64_t ldb, depth;
  const Epilogue& epilogue;
  template <int R>
  ND_INLINE void operator()(int64_t row) const {
    Vec<T> acc[R][V] = {};
    multiply_block<T, R, V>(a + row * row_stride, row_stride, k_stride, b, ldb, depth, acc);
    epilogue.template operator()<R, V>(row, 0, acc);
  }
};

// All rows of C for 1 to 4 vectors of columns. Never inlined: every call would unroll it again.
template <class T, class Epilogue>
__attribute__((noinline)) void multiply(int vectors, int64_t rows, const T* a, int64_t row_stride, int64_t k_stride,
                                        const T* b, int64_t ldb, int64_t depth, const Epilogue& epilogue) {
  if (vectors == 4) {
    for_row_blocks<4>(0, rows, MultiplyRows<T, 4, Epilogue>{a, row_stride, k_stride, b, ldb, depth, epilogue});
  } else if (vectors == 3) {
    for_row_blocks<3>(0, rows, MultiplyRows<T, 3, Epilogue>{a, row_stride, k_stride, b, ldb, depth, epilogue});
  } else if (vectors == 2) {
    for_row_blocks<2>(0, rows, MultiplyRows<T, 2, Epilogue>{a, row_stride, k_stride, b, ldb, depth, epilogue});
  } else {
    for_row_blocks<1>(0, rows, MultiplyRows<T, 1, Epilogue>{a, row_stride, k_stride, b, ldb, depth, epilogue});
  }
}

// ---- large matrices -------------------------------------------------------------------------------------------------
// Past this many bytes a matrix comes from the outer caches or from memory, which is fastest in its own order.
constexpr int64_t kLargeMatrix = int64_t(1) << 20;
template <class T>
ND_INLINE bool large(int64_t rows, int64_t columns) {
  return rows * columns * int64_t(sizeof(T)) > kLargeMatrix;
}

// What MultiplyRows does for one step of the sums, which stand in `sums` between steps, [row][sample].
template <class T, int V, class Epilogue>
struct MultiplyRowsStep {
  const T* a;
  int64_t row_stride, k_stride;
  const T* b;
  int64_t ldb, depth;
  T* sums;
  bool first, last;
  const Epilogue& epilogue;
  template <int R>
  ND_INLINE void operator()(int64_t row) const {
    Vec<T> acc[R][V] = {};
    const auto at = [&](int r, int v) { return sums + (row + r) * ldb + v * kLanes<T>; };
    for (int r = 0; r < R && !first; ++r)
      for (int v = 0; v < V; ++v) acc[r][v] = load(at(r, v));
    multiply_block<T, R, V>(a + row * row_stride, row_stride, k_stride, b, ldb, depth, acc);
    if (last) return epilogue.template operator()<R, V>(row, 0, acc);
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) store(at(r, v), acc[r][v]);
  }
};

// `multiply` by the transpose of a large matrix, some of its rows at a time: the same sums in the same order.
template <class T, class Epilogue>
__attribute__((noinline)) void multiply_transposed_large(int vectors, int64_t rows, const T* a, int64_t columns,
                                                         const T* b, int64_t ldb, T* sums, const Epilogue& epilogue) {
  constexpr int64_t kStep = 16;
  for (int64_t k = 0; k < rows; k += kStep) {
    const auto step = [&](auto v) {
      constexpr int V = decltype(v)::value;
      const MultiplyRowsStep<T, V, Epilogue> body{a + k * columns,         1,    columns, b + k * ldb,       ldb,
                                                  min_of(kStep, rows - k), sums, k == 0,  k + kStep >= rows, epilogue};
      for_row_blocks<V>(0, columns, body);
    };
    if (vectors == 4) {
      step(Constant<4>());
    } else if (vectors == 3) {
      step(Constant<3>());
    } else if (vectors == 2) {
      step(Constant<2>());
    } else {
      step(Constant<1>());
    }
  }
}

// ---- few samples ----------------------------------------------------------------------------------------------------
// With fewer samples than lanes, lanes run over a row of the matrix instead, which is then read a vector at a time. Samples
// stand in the lanes of B all the same, lanes past the last one holding what it does: S, 1, 2 or 4, is at least their number.

// Lane s of the result has t[s], and those past S what the last one has.
template <class T, int S>
ND_INLINE Vec<T> spread(const T* t) {
  Vec<T> v = broadcast(t[0]);
  ND_UNROLL for (int s = 1; s < S; ++s) {
    Vec<T> behind{};
    ND_UNROLL for (int i = 0; i < kLanes<T>; ++i) behind[i] = T(i >= s);
    v = where_le0(behind, v, broadcast(t[s]));
  }
  return v;
}

// C[r] = sum_k A[r][k] B[k], A row by row, `depth` at least the lanes. `packed` is room for S (depth + lanes) elements.
template <class T, int S, class Epilogue>
__attribute__((noinline)) void multiply_few(int64_t rows, const T* a, int64_t depth, const T* b, T* packed,
                                            const Epilogue& epilogue) {
  constexpr int lanes = kLanes<T>, R = lanes / S;
  const int64_t whole = depth / lanes * lanes, stride = whole + lanes;
  for (int s = 0; s < S; ++s) {
    T* const to = packed + s * stride;
    for (int64_t k = 0; k < whole; ++k) to[k] = b[k * lanes + s];
    // The last vector of a row reaches back over what has been counted.
    for (int64_t k = depth - lanes; k < depth; ++k) to[whole + k - (depth - lanes)] = k < whole ? T(0) : b[k * lanes + s];
  }
  for (int64_t row = 0; row < rows; row += R) {
    const T* from[R];
    ND_UNROLL for (int r = 0; r < R; ++r) from[r] = a + min_of(row + r, rows - 1) * depth;
    Vec<T> acc[R * S] = {};
    const auto add = [&](int64_t at, int64_t k) {
      Vec<T> column[S];
      ND_UNROLL for (int s = 0; s < S; ++s) column[s] = load(packed + s * stride + k);
      ND_UNROLL for (int r = 0; r < R; ++r) {
        const Vec<T> weight = load(from[r] + at);
        ND_UNROLL for (int s = 0; s < S; ++s) acc[r * S + s] = fma(weight, column[s], acc[r * S + s]);
      }
    };
    for (int64_t k = 0; k < whole; k += lanes) add(k, k);
    if (whole < depth) add(depth - lanes, whole);
    alignas(64) T total[lanes];
    store(total, sum_lanes<T, lanes>(acc));
    for (int r = 0; r < min_of(R, rows - row); ++r) {
      Vec<T> sum[1][1] = {{spread<T, S>(total + r * S)}};
      epilogue.template operator()<1, 1>(row + r, 0, sum);
    }
  }
}

// C[c] = sum_r A[r][c] B[r], A row by row, `columns` at least the lanes. `packed` is room for S rows elements.
template <class T, int S, class Epilogue>
__attribute__((noinline)) void multiply_transposed_few(int64_t rows, const T* a, int64_t columns, const T* b, T* packed,
                                                       const Epilogue& epilogue) {
  constexpr int lanes = kLanes<T>, C = 8 / S;
  for (int64_t r = 0; r < rows; ++r)
    for (int s = 0; s < S; ++s) packed[r * S + s] = b[r * lanes + s];
  const auto block = [&](auto vectors, int64_t begin, int64_t first) {  // columns before `first` are done
    constexpr int V = decltype(vectors)::value;
    Vec<T> acc[V * S] = {};
    for (int64_t r = 0; r < rows; ++r) {
      ND_UNROLL for (int v = 0; v < V; ++v) {
        const Vec<T> weight = load(a + r * columns + begin + v * lanes);
        ND_UNROLL for (int s = 0; s < S; ++s)
          acc[v * S + s] = fma(weight, broadcast(packed[r * S + s]), acc[v * S + s]);
      }
    }
    for (int v = 0; v < V; ++v) {
      alignas(64) T total[lanes * S];
      for (int s = 0; s < S; ++s)
        for (int i = 0; i < lanes; ++i) total[i * S + s] = acc[v * S + s][i];
      for (int64_t c = max_of(begin + v * lanes, first); c < begin + (v + 1) * lanes; ++c) {
        Vec<T> sum[1][1] = {{spread<T, S>(total + (c - begin - v * lanes) * S)}};
        epilogue.template operator()<1, 1>(c, 0, sum);
      }
    }
  };
  int64_t c = 0;
  for (; c + C * lanes <= columns; c += C * lanes) block(Constant<C>(), c, c);
  for (; c + lanes <= columns; c += lanes) block(Constant<1>(), c, c);
  if (c < columns) block(Constant<1>(), columns - lanes, c);
}

// ---- transposition --------------------------------------------------------------------------------------------------
template <int W, bool UPPER, class V, int... I>
ND_INLINE V exchange(V x, V y, Indices<I...>) {
  constexpr int lanes = sizeof...(I);
  // UPPER false: lanes without bit W from x, lanes with it from y's lanes W below. UPPER true: the others.
  return __builtin_shufflevector(x, y, (UPPER ? (I & W ? I + lanes : I + W) : (I & W ? I - W + lanes : I))...);
}
template <class T, int W>
ND_INLINE void transpose_step(Vec<T>* rows) {
  if constexpr (W > 0) {
    typename MakeIndices<kLanes<T>>::type all;
    for (int i = 0; i < kLanes<T>; ++i) {
      if (i & W) continue;
      const Vec<T> x = rows[i], y = rows[i + W];
      rows[i] = exchange<W, false>(x, y, all);
      rows[i + W] = exchange<W, true>(x, y, all);
    }
    transpose_step<T, W / 2>(rows);
  }
}

// to[c * to_stride + r] = from[r * from_stride + c] for r < rows, c < columns.
template <class T>
inline void transpose(int64_t rows, int64_t columns, const T* from, int64_t from_stride, T* to, int64_t to_stride) {
  constexpr int lanes = kLanes<T>;
  int64_t r = 0;
  for (; r + lanes <= rows; r += lanes) {
    int64_t c = 0;
    for (; c + lanes <= columns; c += lanes) {
      Vec<T> block[lanes];
      for (int i = 0; i < lanes; ++i) block[i] = load(from + (r + i) * from_stride + c);
      transpose_step<T, lanes / 2>(block);
      for (int i = 0; i < lanes; ++i) store(to + (c + i) * to_stride + r, block[i]);
    }
    for (; c < columns; ++c)
      for (int i = 0; i < lanes; ++i) to[c * to_stride + r + i] = from[(r + i) * from_stride + c];
  }
  for (; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) to[c * to_stride + r] = from[r * from_stride + c];
}

}  // namespace ND_ISA
}  // namespace narrowdeep
