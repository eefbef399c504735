// The empirical tangent kernel of the MLP chain for one instruction set.
//
//   Theta(i, j)[a][b] = sum over affine layers of (<h_i, h_j> + 1) <B_i[a], B_j[b]>,   B = df/dz
//
// Layers are taken a segment at a time, from the last. In every segment, first each tile of samples runs forward from its
// saved state and backward once for every output, which leaves h and B of the segment's layers; then blocks of
// kRows rows by one vector of columns sum over these layers. A sum over kExact layers is of type T, their sum double.
// Nothing of the size of the parameters times the batch exists: only a segment of h and B.
//
// The floor, per pair of samples and layer: width FMAs for <h, h>, and out^2 (width + 1) for the rest.
#pragma once

#include "gram/args.h"
#include "mlp/kernels.h"

namespace narrowdeep {
namespace ND_ISA {

constexpr int kExact = 16;  // layers whose sum is of type T

// Consecutive layers that have the same shape, with h and B of every tile.
template <class T>
struct GramLayers {
  const T* h;  // at h + tile * h_tile + layer * h_layer: [h_units][samples]
  int64_t h_tile, h_layer, h_units;
  const T* b;  // at b + tile * b_tile + output * b_output + layer * b_layer: [b_units][samples]
  int64_t b_tile, b_output, b_layer, b_units;
  int64_t count;
  bool weight, bias;  // which of the two is trained
};

template <class T>
class Gram {
 public:
  Gram(const MlpGram<T>& arguments, const Parallel& pool)
      : args(arguments),
        parallel(pool),
        net(with_segment(arguments.shape), arguments.params, pool),
        outputs(arguments.shape.out),
        step(net.shape.segment),
        held(min_of(step, net.shape.layers)),
        row_block(int(min_of(8, net.samples))),
        reverse_size(Reverse<T>::elements(net)),
        reverse_memory(net.tiles * outputs * reverse_size * int64_t(sizeof(T))),
        saved((net.shape.offset ? 2 : 1) * max_of(1, ceil_div(net.shape.layers, step)) * net.shape.width *
              net.shape.batch * int64_t(sizeof(T))),
        states(net.tiles * (held + 1) * net.size * int64_t(sizeof(T))),
        full(net.tiles * outputs * held * net.size * int64_t(sizeof(T))) {}

  void run() {
    forward();
    for (int64_t i = max_of(1, ceil_div(net.shape.layers, step)) - 1; i >= 0; --i) {
      const int64_t begin = i * step, end = min_of(begin + step, net.shape.layers);
      segment(begin, end);
      add({states.as<T>(), (held + 1) * net.size, net.size, net.shape.width, full.as<T>(), outputs * held * net.size,
           held * net.size, net.size, net.shape.width, end - begin, trained(2), trained(3)});
    }
    const Reverse<T> first = reverse(0, 0);  // its arrays stand at the same place in every tile
    const int64_t tile = outputs * reverse_size;
    add({first.x, tile, 0, net.shape.in, first.g, tile, reverse_size, 0, net.shape.width, 1, trained(0), trained(1)});
    add({first.h_last, tile, 0, net.shape.width, first.r, tile, reverse_size, 0, outputs, 1, trained(4), trained(5)});
  }

 private:
  const MlpGram<T>& args;
  const Parallel& parallel;
  const Net<T> net;
  const int64_t outputs, step, held;  // held: layers of the longest segment
  const int row_block;
  const int64_t reverse_size;
  const Buffer reverse_memory, saved, states, full;

  // As many layers as leave h and B of all samples in a few MiB.
  static MlpShape with_segment(MlpShape shape) {
    const int64_t layer = shape.width * (1 + shape.out) * max_of(1, shape.batch) * int64_t(sizeof(T));
    shape.segment = max_of(8, min_of(64, (int64_t(1) << 22) / layer));
    return shape;
  }
  bool trained(int parameter) const { return args.trainable >> parameter & 1; }
  Reverse<T> reverse(int64_t tile, int64_t output) const {
    return Reverse<T>(net, reverse_memory.as<T>() + (tile * outputs + output) * reverse_size);
  }

  void forward() {
    const Buffer out(net.shape.batch * outputs * int64_t(sizeof(T)));
    mlp_forward<T>({net.shape, args.params, args.x, out.as<T>(), saved.as<T>()}, parallel);
    parallel_for(parallel, net.tiles, [&](int64_t tile) {
      load_transposed(net, tile, net.shape.in, args.x, false, reverse(tile, 0).x);
      for (int64_t a = 0; a < outputs; ++a) {
        T* const r = reverse(tile, a).r;
        for (int64_t i = 0; i < outputs * net.samples; ++i) r[i] = i / net.samples == a ? T(1) : T(0);
      }
    });
  }

  // h and B of hidden layers [begin, end); at the end of the last segment also what the first and last layer need.
  void segment(int64_t begin, int64_t end) {
    parallel_for(parallel, net.tiles, [&](int64_t tile) {
      const Buffer memory(State<T>::kArrays * net.size * int64_t(sizeof(T)));
      const State<T> state(memory.as<T>(), net.size);
      T* const h = states.as<T>() + tile * (held + 1) * net.size;
      restore_states<T>(net, tile, saved.as<T>(), reverse(tile, 0).x, begin, end, state, h);
      T *const root = state.base, *const floor = state.floor;  // the forward state is used up
      for (int64_t a = 0; a < outputs; ++a) {
        const Reverse<T> back = reverse(tile, a);
        if (end == net.shape.layers) {
          start_reverse(net, back, h + (end - begin) * net.size, root, floor);
        } else {
          set_root(net, back, root, floor);
        }
        T* const b = full.as<T>() + (tile * outputs + a) * held * net.size;
        for (int64_t l = end; l-- > begin;) {
          T* const at = b + (l - begin) * net.size;
          subtract(net.size, back.g, floor, at);
          const HiddenBackward<T> epilogue{net.keep, floor, h + (l - begin) * net.size, back.g, net.samples};
          multiply<T>(net.vectors, net.shape.width, net.params.hidden_weight + l * net.shape.width * net.shape.width, 1,
                      net.shape.width, at, net.samples, net.shape.width, epilogue);
          if (net.shape.offset && moves_after(l) && l > 0) {
            move_state(net.shape.width, net.samples, net.keep, root, back.moved, floor, back.g);
          }
        }
        if (begin == 0) subtract(net.size, back.g, floor, back.g);  // B of the first layer
      }
    });
  }

  // ---- sums over layers -------------------------------------------------------------------------------------------
  void add(const GramLayers<T>& layers) {
    if (layers.count == 0 || !(layers.weight || layers.bias)) return;
    const int64_t blocks = ceil_div(args.rows, row_block);
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

  int64_t kept() const {
    return args.reduce == Reduce::kFull ? outputs * outputs : args.reduce == Reduce::kDiagonal ? outputs : 1;
  }

  template <int R>
  void rows(const GramLayers<T>& layers, int64_t block) const {
    const int64_t row = block * R, sums = kept() * R * kLanes<T>;
    const Buffer memory(kExact * R * int64_t(sizeof(Vec<T>)) + sums * int64_t(sizeof(double)));
    T* const inner = memory.as<T>();
    double* const total = reinterpret_cast<double*>(inner + kExact * R * kLanes<T>);
    const int64_t first = args.symmetric ? row : args.rows;
    for (int64_t column = first / kLanes<T> * kLanes<T>; column < net.shape.batch; column += kLanes<T>) {
      for (int64_t i = 0; i < sums; ++i) total[i] = 0;
      block_sums<R>(layers, row, column, inner, total);
      for (int64_t k = 0; k < kept(); ++k)
        for (int r = 0; r < R; ++r)
          for (int lane = 0; lane < kLanes<T>; ++lane) put(row + r, column + lane, k, total[(k * R + r) * kLanes<T> + lane]);
    }
  }

  void put(int64_t i, int64_t j, int64_t k, double value) const {
    if (i >= args.rows || j >= net.shape.batch) return;
    if (args.symmetric) {
      if (j < i) return;
      if (j > i) {
        const int64_t mirrored = args.reduce == Reduce::kFull ? k % outputs * outputs + k / outputs : k;
        args.out[(j * args.columns + i) * kept() + mirrored] += value;
      }
    } else {
      j -= args.rows;
      if (j < 0) return;
    }
    args.out[(i * args.columns + j) * kept() + k] += value;
  }

  // total[k][r][lane] += the sum over layers for rows [row, row + R) and one vector of columns.
  template <int R>
  void block_sums(const GramLayers<T>& layers, int64_t row, int64_t column, T* inner, double* total) const {
    const int64_t samples = net.samples;
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
          products<R>(layers.h_units, h_row + (begin + l) * layers.h_layer, h_column + (begin + l) * layers.h_layer, sum);
        }
        for (int r = 0; r < R; ++r) store(inner + (l * R + r) * kLanes<T>, sum[r]);
      }
      for (int64_t a = 0; a < outputs; ++a)
        for (int64_t b = 0; b < outputs; ++b) {
          if (args.reduce != Reduce::kFull && a != b) continue;
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
          const int64_t k = args.reduce == Reduce::kFull ? a * outputs + b : args.reduce == Reduce::kDiagonal ? a : 0;
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
      const Vec<T> column = load(right + u * net.samples);
      for (int r = 0; r < R; ++r) sum[r] = fma(broadcast(left[u * net.samples + r]), column, sum[r]);
    }
  }
};

template <class T>
inline void mlp_gram(const MlpGram<T>& args, const Parallel& parallel) {
  Gram<T>(args, parallel).run();
}

template <class T>
inline GramKernels<T> gram_kernels() {
  return {mlp_gram<T>};
}

}  // namespace ND_ISA
}  // namespace narrowdeep
