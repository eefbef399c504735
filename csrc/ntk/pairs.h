// Sums over layers of products of per-sample factors, for all pairs of samples: what the tangent kernels of both families
// end in. Samples stand in vector lanes, in tiles of `samples`.
#pragma once

#include "common/vec.h"
#include "ntk/args.h"

namespace narrowdeep {
namespace ND_ISA {

constexpr int kExact = 16;  // layers whose sum is of type T; the sum of these sums is double

// Consecutive layers of one shape: (bias + <h_i, h_j>) <b_i[a], b_j[b]> is to be added for each, without the product of h
// unless `weight`.
template <class T>
struct GramLayers {
  const T* h;  // at h + tile * h_tile + layer * h_layer: [h_units][samples]
  int64_t h_tile, h_layer, h_units;
  const T* b;  // at b + tile * b_tile + output * b_output + layer * b_layer: [b_units][samples]
  int64_t b_tile, b_output, b_layer, b_units;
  int64_t count;
  bool weight, bias;
};

template <class T>
class PairSums {
 public:
  PairSums(const GramPairs& pairs, int64_t outputs, int64_t samples, const Parallel& parallel)
      : pairs(pairs),
        outputs(outputs),
        samples(samples),
        batch(pairs.symmetric ? pairs.rows : pairs.rows + pairs.columns),
        row_block(int(min_of(8, samples & -samples))),  // divides a tile
        parallel(parallel) {}

  void add(const GramLayers<T>& layers) const {
    if (layers.count == 0 || !(layers.weight || layers.bias)) return;
    const int64_t blocks = ceil_div(pairs.rows, row_block);
    const int64_t half = (blocks + 1) / 2;
    parallel_for(parallel, blocks, [&](int64_t task) {
      // Rows further down have fewer columns left where the kernel is symmetric: every thread gets some of each.
      const int64_t block = task < half ? 2 * task : 2 * (task - half) + 1;
      switch (row_block) {
        case 8: return rows<8>(layers, block);
        case 4: return rows<4>(layers, block);
        case 2: return rows<2>(layers, block);
        default: return rows<1>(layers, block);
      }
    });
  }

 private:
  const GramPairs& pairs;
  const int64_t outputs, samples, batch;
  const int row_block;
  const Parallel& parallel;

  int64_t kept() const {
    return pairs.reduce == Reduce::kFull ? outputs * outputs : pairs.reduce == Reduce::kDiagonal ? outputs : 1;
  }

  template <int R>
  void rows(const GramLayers<T>& layers, int64_t block) const {
    const int64_t row = block * R, sums = kept() * R * kLanes<T>;
    const Buffer memory(kExact * R * int64_t(sizeof(Vec<T>)) + sums * int64_t(sizeof(double)));
    T* const inner = memory.as<T>();
    double* const total = reinterpret_cast<double*>(inner + kExact * R * kLanes<T>);
    const int64_t first = pairs.symmetric ? row : pairs.rows;
    for (int64_t column = first / kLanes<T> * kLanes<T>; column < batch; column += kLanes<T>) {
      for (int64_t i = 0; i < sums; ++i) total[i] = 0;
      block_sums<R>(layers, row, column, inner, total);
      for (int64_t k = 0; k < kept(); ++k)
        for (int r = 0; r < R; ++r)
          for (int lane = 0; lane < kLanes<T>; ++lane)
            put(row + r, column + lane, k, total[(k * R + r) * kLanes<T> + lane]);
    }
  }

  void put(int64_t i, int64_t j, int64_t k, double value) const {
    if (i >= pairs.rows || j >= batch) return;
    if (pairs.symmetric) {
      if (j < i) return;
      if (j > i) {
        const int64_t mirrored = pairs.reduce == Reduce::kFull ? k % outputs * outputs + k / outputs : k;
        pairs.out[(j * pairs.columns + i) * kept() + mirrored] += value;
      }
    } else {
      j -= pairs.rows;
      if (j < 0) return;
    }
    pairs.out[(i * pairs.columns + j) * kept() + k] += value;
  }

  // total[k][r][lane] += the sum over layers for rows [row, row + R) and one vector of columns.
  template <int R>
  void block_sums(const GramLayers<T>& layers, int64_t row, int64_t column, T* inner, double* total) const {
    const int64_t row_tile = row / samples, column_tile = column / samples;
    const T* const h_row = layers.h + row_tile * layers.h_tile + row % samples;
    const T* const h_column = layers.h + column_tile * layers.h_tile + column % samples;
    const T* const b_row = layers.b + row_tile * layers.b_tile + row % samples;
    const T* const b_column = layers.b + column_tile * layers.b_tile + column % samples;
    for (int64_t begin = 0; begin < layers.count; begin += kExact) {
      const int64_t count = min_of(kExact, layers.count - begin);
      for (int64_t l = 0; l < count; ++l) {
        Vec<T> sum[R];
        for (int r = 0; r < R; ++r) sum[r] = broadcast(layers.bias ? T(1) : T(0));
        if (layers.weight) {
          products<R>(layers.h_units, h_row + (begin + l) * layers.h_layer, h_column + (begin + l) * layers.h_layer,
                      sum);
        }
        for (int r = 0; r < R; ++r) store(inner + (l * R + r) * kLanes<T>, sum[r]);
      }
      for (int64_t a = 0; a < outputs; ++a)
        for (int64_t b = 0; b < outputs; ++b) {
          if (pairs.reduce != Reduce::kFull && a != b) continue;
          const T* const left = b_row + a * layers.b_output + begin * layers.b_layer;
          const T* const right = b_column + b * layers.b_output + begin * layers.b_layer;
          Vec<T> sum[R];
          for (int r = 0; r < R; ++r) sum[r] = Vec<T>{};
          for (int64_t l = 0; l < count; ++l) {
            Vec<T> product[R];
            for (int r = 0; r < R; ++r) product[r] = Vec<T>{};
            products<R>(layers.b_units, left + l * layers.b_layer, right + l * layers.b_layer, product);
            for (int r = 0; r < R; ++r) sum[r] = fma(load(inner + (l * R + r) * kLanes<T>), product[r], sum[r]);
          }
          const int64_t k = pairs.reduce == Reduce::kFull ? a * outputs + b : pairs.reduce == Reduce::kDiagonal ? a : 0;
          double* const to = total + k * R * kLanes<T>;
          for (int r = 0; r < R; ++r)
            for (int lane = 0; lane < kLanes<T>; ++lane) to[r * kLanes<T> + lane] += double(sum[r][lane]);
        }
    }
  }

  // sum[r] += sum over units of left[unit][r] * right[unit]
  template <int R>
  ND_INLINE void products(int64_t units, const T* left, const T* right, Vec<T>* sum) const {
    for (int64_t u = 0; u < units; ++u) {
      const Vec<T> column = load(right + u * samples);
      for (int r = 0; r < R; ++r) sum[r] = fma(broadcast(left[u * samples + r]), column, sum[r]);
    }
  }
};

}  // namespace ND_ISA
}  // namespace narrowdeep
