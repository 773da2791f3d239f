#include "cpu/stream.h"

#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace dflash::DFLASH_ISA {
namespace {

constexpr int64_t kStreams = 4, kStep = 256, kPrefetch = 2048;

inline uint64_t sum_step(const char* p) {
#if DFLASH_VEC == 512
  __m512i s = _mm512_setzero_si512();
  for (int i = 0; i < kStep; i += 64) s = _mm512_add_epi64(s, _mm512_loadu_si512(p + i));
  return uint64_t(_mm512_reduce_add_epi64(s));
#elif DFLASH_VEC == 256
  __m256i s = _mm256_setzero_si256();
  for (int i = 0; i < kStep; i += 32) s = _mm256_add_epi64(s, _mm256_loadu_si256((const __m256i*)(p + i)));
  uint64_t w[4];
  _mm256_storeu_si256((__m256i*)w, s);
  return w[0] + w[1] + w[2] + w[3];
#else
  uint64_t s = 0, w;
  for (int i = 0; i < kStep; i += 8) std::memcpy(&w, p + i, 8), s += w;
  return s;
#endif
}

}  // namespace

void stream_read(const StreamReadParams& p) {
  const int64_t units = p.bytes / (kStreams * kStep);
  uint64_t total = 0;
  parallel_for(units, 64, [&](int64_t begin, int64_t end) {
    uint64_t sum = 0;
    const int64_t length = (end - begin) * kStep;
    const char* base = static_cast<const char*>(p.data) + begin * kStreams * kStep;
    for (int64_t at = 0; at < length; at += kStep)
      for (int64_t s = 0; s < kStreams; ++s) {
        const char* q = base + s * length + at;
#if DFLASH_VEC
        for (int i = 0; i < kStep; i += 64) _mm_prefetch(q + kPrefetch + i, _MM_HINT_T0);
#endif
        sum += sum_step(q);
      }
    __atomic_fetch_add(&total, sum, __ATOMIC_RELAXED);
  });
  *p.sum = total;
}

}  // namespace dflash::DFLASH_ISA
