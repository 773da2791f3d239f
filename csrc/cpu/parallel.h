// Threads, through torch's own pool. Defined in csrc/bindings/module.cpp; kernels see no torch header.
#pragma once

#include <cstdint>

namespace dflash {

void parallel_for_raw(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);
int num_threads();

}  // namespace dflash

namespace dflash::DFLASH_ISA {
namespace {

// Elements of a row that take an op about a microsecond: less is not worth another thread of a team.
constexpr int64_t kGrainElements = 1024;

// Calls body(begin, end) on disjoint ranges that cover [0, n), each of at least `grain` items.
template <class Body>
inline void parallel_for(int64_t n, int64_t grain, const Body& body) {
  if (n <= 0) return;
  if (n <= grain) return body(int64_t{0}, n);
  parallel_for_raw(
      0, n, grain, [](int64_t b, int64_t e, void* c) { (*static_cast<const Body*>(c))(b, e); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace
}  // namespace dflash::DFLASH_ISA
