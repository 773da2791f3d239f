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

enum class Isa { generic = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, amx = 4 };

template <class Params>
using Kernel = void (*)(const Params&);

// The entries of one kernel, indexed by Isa; a null entry means "use the next lower set".
template <class Params>
struct KernelSet {
  Kernel<Params> entry[5];
};

}  // namespace dflash

// Declares `name` in the namespaces of its instruction sets and defines the table `name##_kernels`. KERNEL: up to
// avx512. DOT_KERNEL: with code for its dot products of bf16 and int8. AMX_KERNEL: with code for AMX beside that;
// a kernel of AMX calls the others by its own namespace.
#if DFLASH_X86
#define DFLASH_DECLARE_KERNEL(name, Params)                 \
  namespace dflash::generic { void name(const Params&); }   \
  namespace dflash::avx2 { void name(const Params&); }      \
  namespace dflash::avx512 { void name(const Params&); }    \
  namespace dflash {                                        \
  inline constexpr KernelSet<Params> name##_kernels{        \
      {generic::name, avx2::name, avx512::name, nullptr, nullptr}}; \
  }
#define DFLASH_DECLARE_DOT_KERNEL(name, Params)                   \
  namespace dflash::generic { void name(const Params&); }         \
  namespace dflash::avx2 { void name(const Params&); }            \
  namespace dflash::avx512 { void name(const Params&); }          \
  namespace dflash::avx512_bf16 { void name(const Params&); }     \
  namespace dflash::amx { using avx512_bf16::name; }              \
  namespace dflash {                                              \
  inline constexpr KernelSet<Params> name##_kernels{              \
      {generic::name, avx2::name, avx512::name, avx512_bf16::name, nullptr}}; \
  }
#define DFLASH_DECLARE_AMX_KERNEL(name, Params)                 \
  namespace dflash::generic { void name(const Params&); }       \
  namespace dflash::avx2 { void name(const Params&); }          \
  namespace dflash::avx512 { void name(const Params&); }        \
  namespace dflash::avx512_bf16 { void name(const Params&); }   \
  namespace dflash::amx { void name(const Params&); }           \
  namespace dflash {                                            \
  inline constexpr KernelSet<Params> name##_kernels{            \
      {generic::name, avx2::name, avx512::name, avx512_bf16::name, amx::name}}; \
  }
#else
#define DFLASH_DECLARE_KERNEL(name, Params)                 \
  namespace dflash::generic { void name(const Params&); }   \
  namespace dflash {                                        \
  inline constexpr KernelSet<Params> name##_kernels{        \
      {generic::name, nullptr, nullptr, nullptr, nullptr}}; \
  }
#define DFLASH_DECLARE_DOT_KERNEL(name, Params) DFLASH_DECLARE_KERNEL(name, Params)
#define DFLASH_DECLARE_AMX_KERNEL(name, Params) DFLASH_DECLARE_KERNEL(name, Params)
#endif
