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

// Rows in a full block: R * V accumulators, V vectors of B and a broadcast must fit in the registers.
// clang-format off
template <int V>
constexpr int kBlockRows = kRegisters == 32 ? (V == 4 ? 6 : V == 2 ? 12 : 16) : (V == 4 ? 2 : V == 2 ? 6 : 8);
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

// Calls rows.template operator()<R>(row) for blocks of R rows that cover [row, end): full blocks of kBlockRows<V>, then
// smaller ones.
template <int V, class Rows>
ND_INLINE void for_row_blocks(int64_t row, int64_t end, const Rows& rows) {
  constexpr int kRows = kBlockRows<V>;
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

// All rows of C for 1, 2 or 4 vectors of columns. Never inlined: every call would unroll it again.
template <class T, class Epilogue>
__attribute__((noinline)) void multiply(int vectors, int64_t rows, const T* a, int64_t row_stride, int64_t k_stride,
                                        const T* b, int64_t ldb, int64_t depth, const Epilogue& epilogue) {
  if (vectors == 4) {
    for_row_blocks<4>(0, rows, MultiplyRows<T, 4, Epilogue>{a, row_stride, k_stride, b, ldb, depth, epilogue});
  } else if (vectors == 2) {
    for_row_blocks<2>(0, rows, MultiplyRows<T, 2, Epilogue>{a, row_stride, k_stride, b, ldb, depth, epilogue});
  } else {
    for_row_blocks<1>(0, rows, MultiplyRows<T, 1, Epilogue>{a, row_stride, k_stride, b, ldb, depth, epilogue});
  }
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
