// The empirical tangent kernel of the MLP chain as the kernels see it. Meaning: narrowdeep/ops/gram/reference.py.
#pragma once

#include <cstdint>

#include "mlp/args.h"

namespace narrowdeep {

enum class Reduce : int64_t { kFull = 0, kTrace = 1, kDiagonal = 2 };

template <class T>
struct MlpGram {
  MlpShape shape;  // batch: all samples, rows first
  MlpParams<const T> params;
  const T* x;             // (batch, in): x1, and after it x2 unless symmetric
  int64_t rows, columns;  // N1, N2
  bool symmetric;         // the columns are the rows, batch == rows
  int64_t trainable;      // bit i: the i-th parameter counts
  Reduce reduce;
  double* out;  // (N1, N2[, out[, out]]), zeroed by the caller
};

// The entry points of one instruction set.
template <class T>
struct GramKernels {
  void (*mlp)(const MlpGram<T>&, const Parallel&);
};

}  // namespace narrowdeep
