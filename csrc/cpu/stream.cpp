#include "cpu/stream.h"

#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace dflash::DFLASH_ISA {
namespace {

constexpr int64_t kStreams = 4, kLine = 64, kAhead = 2048, kFarAhead = 1024;

// Adds a line's 64-bit words to sums that are added up at the end.
#if DFLASH_VEC == 512
using Words = __m512i;
inline void add_line(Words& sum, const char* p) { sum = _mm512_add_epi64(sum, _mm512_loadu_si512(p)); }
#elif DFLASH_VEC == 256
using Words = __m256i;
inline void add_line(Words& sum, const char* p) {
  const __m256i *q = (const __m256i*)p;
  sum = _mm256_add_epi64(sum, _mm256_add_epi64(_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)));
}
#else
using Words = uint64_t;
inline void add_line(Words& sum, const char* p) {
  uint64_t w;
  for (int i = 0; i < kLine; i += 8) std::memcpy(&w, p + i, 8), sum += w;
}
#endif

// The sum of four streams of `length` bytes each, one after the other in memory.
template <bool FAR>
uint64_t read(const char* base, int64_t length) {
  Words sums[kStreams] = {};
  for (int64_t at = 0; at < length; at += kLine)
    for (int64_t s = 0; s < kStreams; ++s) {
      const char* q = base + s * length + at;
#if DFLASH_VEC
      _mm_prefetch(q + (FAR ? kFarAhead : kAhead), FAR ? _MM_HINT_T1 : _MM_HINT_T0);
#endif
      add_line(sums[s], q);
    }
  uint64_t words[sizeof(sums) / 8], sum = 0;
  std::memcpy(words, sums, sizeof(sums));
  for (uint64_t w : words) sum += w;
  return sum;
}

}  // namespace

void stream_read(const StreamReadParams& p) {
  const int64_t units = p.bytes / (kStreams * kLine);
  uint64_t total = 0;
  parallel_for(units, 64, [&](int64_t begin, int64_t end) {
    const char* base = static_cast<const char*>(p.data) + begin * kStreams * kLine;
    const int64_t length = (end - begin) * kLine;
    __atomic_fetch_add(&total, p.far ? read<true>(base, length) : read<false>(base, length), __ATOMIC_RELAXED);
  });
  *p.sum = total;
}

}  // namespace dflash::DFLASH_ISA
