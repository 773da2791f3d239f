// Instruction sets: one namespace per set, one function table per kernel, chosen at run time.
//
// A kernel file csrc/cpu/<noun>.cpp is compiled once per set with -DDFLASH_ISA=<set>; everything it defines lives in
// namespace dflash::<set>, so that no inline function compiled for AVX-512 can be merged with one for plain x86-64.
#pragma once

#if defined(__x86_64__) || defined(_M_X64)
#define DFLASH_X86 1
#else
#define DFLASH_X86 0
#endif

namespace dflash {

enum class Isa { generic, avx2, avx2_vnni, avx512, avx512_vnni, avx512_bf16, amx };

template <class Params>
using Kernel = void (*)(const Params&);

// The entries of one kernel, indexed by Isa; a null entry means "use the next lower set".
template <class Params>
struct KernelSet {
  Kernel<Params> entry[7];
};

// The best entry of `set` that an instruction set allows.
template <class Params>
static inline Kernel<Params> best_of(const KernelSet<Params>& set, Isa isa) {
  int at = static_cast<int>(isa);
  while (set.entry[at] == nullptr) --at;
  return set.entry[at];
}

}  // namespace dflash

// Declares `name` in the namespaces of its instruction sets and defines the table `name##_kernels`. KERNEL: up to
// avx512. DOT_KERNEL: with code for dot products of bf16 and for AMX. BYTE_KERNEL: with code for dot products of int8.
// RATE_KERNEL: with code for all of these. A kernel calls others by its own namespace, and a BYTE_KERNEL by its table,
// as the sets of int8 have no code of their own for its callers.
#if DFLASH_X86
#define DFLASH_DECLARE_IN(set, name, Params) \
  namespace dflash::set { void name(const Params&); }
#define DFLASH_DECLARE_TABLE(name, Params, vnni256, vnni512, bf16, tiles)                         \
  DFLASH_DECLARE_IN(generic, name, Params)                                                        \
  DFLASH_DECLARE_IN(avx2, name, Params)                                                           \
  DFLASH_DECLARE_IN(avx512, name, Params)                                                         \
  namespace dflash {                                                                              \
  constexpr KernelSet<Params> name##_kernels{                                                     \
      {generic::name, avx2::name, vnni256, avx512::name, vnni512, bf16, tiles}};              \
  }
#define DFLASH_DECLARE_KERNEL(name, Params) \
  DFLASH_DECLARE_TABLE(name, Params, nullptr, nullptr, nullptr, nullptr)
#define DFLASH_DECLARE_DOT_KERNEL(name, Params)                                                   \
  DFLASH_DECLARE_IN(avx512_bf16, name, Params)                                                    \
  DFLASH_DECLARE_IN(amx, name, Params)                                                            \
  DFLASH_DECLARE_TABLE(name, Params, nullptr, nullptr, avx512_bf16::name, amx::name)
#define DFLASH_DECLARE_BYTE_KERNEL(name, Params)                                                  \
  DFLASH_DECLARE_IN(avx2_vnni, name, Params)                                                      \
  DFLASH_DECLARE_IN(avx512_vnni, name, Params)                                                    \
  DFLASH_DECLARE_TABLE(name, Params, avx2_vnni::name, avx512_vnni::name, nullptr, nullptr)
#define DFLASH_DECLARE_RATE_KERNEL(name, Params)                                                  \
  DFLASH_DECLARE_IN(avx2_vnni, name, Params)                                                      \
  DFLASH_DECLARE_IN(avx512_vnni, name, Params)                                                    \
  DFLASH_DECLARE_IN(avx512_bf16, name, Params)                                                    \
  DFLASH_DECLARE_IN(amx, name, Params)                                                            \
  DFLASH_DECLARE_TABLE(name, Params, avx2_vnni::name, avx512_vnni::name, avx512_bf16::name, amx::name)
#else
#define DFLASH_DECLARE_KERNEL(name, Params)                                                       \
  namespace dflash::generic { void name(const Params&); }                                         \
  namespace dflash {                                                                              \
  constexpr KernelSet<Params> name##_kernels{                                                     \
      {generic::name, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr}};                     \
  }
#define DFLASH_DECLARE_DOT_KERNEL(name, Params) DFLASH_DECLARE_KERNEL(name, Params)
#define DFLASH_DECLARE_BYTE_KERNEL(name, Params) DFLASH_DECLARE_KERNEL(name, Params)
#define DFLASH_DECLARE_RATE_KERNEL(name, Params) DFLASH_DECLARE_KERNEL(name, Params)
#endif
