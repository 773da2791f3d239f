// Memory that a thread keeps between calls, so that a step allocates nothing once it has run.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace dflash {

[[noreturn]] void out_of_memory(size_t bytes);  // throws; in csrc/bindings/module.cpp

}  // namespace dflash

namespace dflash::DFLASH_ISA {
namespace {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

class ThreadMemory {
 public:
  ~ThreadMemory() { std::free(memory_); }
  // At least `bytes` bytes; what they held before may be gone.
  void* get(size_t bytes) {
    if (bytes > size_) {
      std::free(memory_);
      size_ = 0;
      const size_t size = (bytes + 4095) / 4096 * 4096;
      memory_ = std::aligned_alloc(4096, size);
      if (!memory_) out_of_memory(size);
      size_ = size;
    }
    return memory_;
  }

 private:
  void* memory_ = nullptr;
  size_t size_ = 0;
};

}  // namespace
}  // namespace dflash::DFLASH_ISA
