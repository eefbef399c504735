// What kernels need from outside, without knowing torch: a parallel loop and memory.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <stdexcept>

namespace narrowdeep {

// Runs task(context, i) for every i in [0, count), on the threads of libtorch's own pool.
typedef void (*Task)(void* context, int64_t index);
struct Parallel {
  int64_t threads;
  void (*run)(int64_t count, Task task, void* context);
};

// Calls body(i) for every i in [0, count) in parallel.
template <class Body>
inline __attribute__((always_inline)) void parallel_for(const Parallel& parallel, int64_t count, const Body& body) {
  if (count == 1 || parallel.threads == 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  parallel.run(
      count, [](void* context, int64_t i) { (*static_cast<const Body*>(context))(i); }, const_cast<Body*>(&body));
}

namespace ND_ISA {

// Uninitialised memory on a cache-line boundary, freed at the end of the scope.
class Buffer {
 public:
  explicit Buffer(int64_t bytes) : data_(nullptr) {
    if (bytes > 0 && posix_memalign(&data_, 64, static_cast<size_t>(bytes)) != 0)
      throw std::runtime_error("out of memory");
  }
  ~Buffer() { free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_;
};

}  // namespace ND_ISA

}  // namespace narrowdeep
