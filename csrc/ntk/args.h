// The empirical tangent kernels as the kernels see them. Meaning: narrowdeep/ops/gram/reference.py.
#pragma once

#include <cstdint>

#include "common/args.h"

namespace narrowdeep {

enum class Reduce : int64_t { kFull = 0, kTrace = 1, kDiagonal = 2 };

// The pairs of samples, and what is kept of each pair's (out, out) matrix.
struct GramPairs {
  int64_t rows, columns;  // N1, N2
  bool symmetric;         // the columns are the rows
  Reduce reduce;
  double* out;  // (N1, N2[, out[, out]]), zeroed by the caller
};

template <class T>
struct ChainGram {
  ChainShape shape;  // batch: all samples, N1 + N2, or N1 if symmetric; segment is not read
  ChainParams<const T> params;
  const T* x;         // (batch, in)[image]: x1, and after it x2 unless symmetric
  int64_t trainable;  // bit i: the i-th parameter counts
  GramPairs pairs;
};

// The entry point of one family and one instruction set.
template <class Family, class T>
struct GramKernels {
  void (*gram)(const ChainGram<T>&, const Parallel&);
};

}  // namespace narrowdeep
