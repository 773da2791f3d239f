// Runs kernels of the set for any processor on numbers that are the same everywhere, and prints a hash of each result.
// Without torch: the threads that module.cpp takes from it are one here.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cpu/activation.h"
#include "cpu/attention.h"
#include "cpu/linear.h"
#include "cpu/norm.h"
#include "cpu/verify.h"

namespace dflash {

void parallel_for_raw(int64_t begin, int64_t end, int64_t, void (*body)(int64_t, int64_t, void*), void* context) {
  body(begin, end, context);
}
int num_threads() { return 1; }
void out_of_memory(size_t) { std::abort(); }

namespace {

uint64_t state = 1;

float drawn() {  // in [-2, 2), a multiple of 2^-6: exact in every dtype
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return float(int(state >> 56) - 128) / 64;
}

struct Numbers {
  std::vector<float> f32;
  std::vector<uint16_t> bf16;
  explicit Numbers(size_t n) : f32(n), bf16(n) {
    for (size_t i = 0; i < n; ++i) {
      f32[i] = drawn();
      uint32_t bits;
      std::memcpy(&bits, &f32[i], 4);
      bf16[i] = uint16_t(bits >> 16);
    }
  }
  void* at(Dtype dtype) { return dtype == Dtype::f32 ? static_cast<void*>(f32.data()) : bf16.data(); }
};

void say(const char* op, Dtype dtype, const void* data, size_t bytes) {
  uint64_t hash = 1469598103934665603ull;
  for (size_t i = 0; i < bytes; ++i) hash = (hash ^ static_cast<const uint8_t*>(data)[i]) * 1099511628211ull;
  std::printf("%s %s %016llx\n", op, dtype == Dtype::f32 ? "float32" : "bfloat16", static_cast<unsigned long long>(hash));
}

void probe(Dtype dtype) {
  const size_t size = dtype == Dtype::f32 ? 4 : 2;
  constexpr int64_t rows = 5, width = 200, wide = 96;
  Numbers x(rows * width), weight(width), matrix(wide * width), out(rows * width);
  generic::rms_norm({{x.at(dtype), width}, {nullptr, 0}, {nullptr, 0}, weight.at(dtype), {out.at(dtype), width},
                     rows, width, 1e-6f, dtype});
  say("rms_norm", dtype, out.at(dtype), rows * width * size);
  generic::silu_and_mul({{x.at(dtype), width}, {out.at(dtype), width / 2}, rows, width / 2, dtype});
  say("silu_and_mul", dtype, out.at(dtype), rows * width / 2 * size);
  generic::linear({{{x.at(dtype), width}, rows, width, wide, matrix.at(dtype), width, nullptr, nullptr, dtype,
                    Format::none, false}, {out.at(dtype), wide}});
  say("linear", dtype, out.at(dtype), rows * wide * size);

  constexpr int64_t heads = 4, kv = 2, dim = 25, page = 2, pages = 4, block = 5;
  Numbers keys(pages * page * kv * dim), values(pages * page * kv * dim), own(block * kv * dim);
  int32_t table[] = {2, 0, 3, 1}, context[] = {5};
  AttentionParams a{};
  a.q = x.at(dtype), a.k = a.v = own.at(dtype), a.out = out.at(dtype);
  for (auto& s : {a.q_stride, a.out_stride}) s[0] = block * heads * dim, s[1] = heads * dim, s[2] = dim;
  for (auto& s : {a.k_stride, a.v_stride}) s[0] = block * kv * dim, s[1] = kv * dim, s[2] = dim;
  for (auto& s : {a.k_cache_stride, a.v_cache_stride}) s[0] = page * kv * dim, s[1] = kv * dim, s[2] = dim;
  a.k_cache = keys.at(dtype), a.v_cache = values.at(dtype), a.num_pages = pages, a.page_size = page;
  a.page_table = table, a.page_table_stride = a.max_pages = pages, a.context_lens = context;
  a.batch = 1, a.width = block, a.heads = heads, a.kv_heads = kv, a.head_dim = dim, a.left = a.right = -1;
  a.scale = 0.25f, a.dtype = a.sink_dtype = dtype;
  generic::block_attention(a);
  say("block_attention", dtype, out.at(dtype), block * heads * dim * size);

  int64_t drafts[rows], tokens[rows], bonus[1];
  int32_t accept[1], commit[1], lens[1];
  for (auto& id : drafts) id = 3;
  VerifyGreedyParams v{};
  v.draft_ids = drafts, v.draft_stride = rows, v.context_lens = context, v.accept_lens = accept;
  v.commit_lens = commit, v.tokens = tokens, v.tokens_stride = rows, v.bonus = bonus, v.new_lens = lens;
  v.requests = 1, v.block = rows, v.logits = x.at(dtype), v.logits_outer_stride = rows * width;
  v.logits_stride = v.vocab = width, v.dtype = dtype;
  generic::verify_greedy(v);
  say("verify_greedy", dtype, tokens, sizeof tokens);
}

}  // namespace
}  // namespace dflash

int main() {
  dflash::probe(dflash::Dtype::f32);
  dflash::probe(dflash::Dtype::bf16);
}
