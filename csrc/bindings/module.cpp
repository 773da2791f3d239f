// The Python module (`dflash_kernels._C`): build facts and the instruction set. The ops themselves are
// registered with torch by the other files of this folder when the library is loaded.
#include <Python.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <string>

#include "bindings/host.h"
#include "bindings/recording.h"
#include "bindings/team.h"
#include "cpu/parallel.h"
#include "cpu/rate.h"
#include "cpu/stream.h"

#if DFLASH_X86 && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#ifndef DFLASH_NVCC  // whether nvcc was there when this was built
#define DFLASH_NVCC "not found"
#endif

// "dflash sources DIGEST MACHINE", where the build has it (setup.py, sources_mark).
extern "C" __attribute__((weak)) const char dflash_sources_mark[];

namespace dflash {

void parallel_for_raw(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  if (Team* team = Team::current()) return team->run(begin, end, grain, body, context);
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, body, context));
}

int num_threads() {
  const Team* team = Team::current();
  return team ? team->threads() : static_cast<int>(torch::stable::get_num_threads());
}

void out_of_memory(size_t bytes) {
  STD_TORCH_CHECK(false, "dflash_kernels: out of memory: a thread needs ", bytes, " bytes to work in");
  std::abort();  // not reached, but the compiler cannot know
}

namespace {

constexpr const char* kIsaNames[] = {"generic", "avx2", "avx2_vnni", "avx512", "avx512_vnni", "avx512_bf16", "amx"};

// The kernel enables the AMX tile registers for a process only on request.
bool request_amx() {
#if DFLASH_X86 && defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// AVX-VNNI, which some CPUs with AVX-512 have and others have not.
bool has_avx_vnni() {
#if DFLASH_X86
  constexpr int kAvxVnni = 4;  // leaf 7.1, eax
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> kAvxVnni & 1);
#else
  return false;
#endif
}

// The highest set, by the processor's own word, and the operating system's, which must save the registers. The
// compilers' functions for this say no to everything where their runtime is another than they expect.
Isa detect() {
#if DFLASH_X86
  unsigned a, b, c, d;
  const auto has = [](unsigned word, std::initializer_list<int> bits) {
    for (int bit : bits)
      if (!(word >> bit & 1)) return false;
    return true;
  };
  constexpr int kFma = 12, kOsSaves = 27, kAvx = 28, kF16c = 29;                           // leaf 1, ecx
  constexpr int kAvx2 = 5, kBmi2 = 8, kF = 16, kDq = 17, kBw = 30, kVl = 31;               // leaf 7, ebx: AVX-512's
  constexpr int kVnni = 11, kAmxBf16 = 22, kAmxTile = 24, kBf16 = 5;                       // ecx, edx; leaf 7.1, eax
  if (!__get_cpuid(1, &a, &b, &c, &d) || !has(c, {kFma, kOsSaves, kAvx, kF16c})) return Isa::generic;
  unsigned saved, upper;
  __asm__("xgetbv" : "=a"(saved), "=d"(upper) : "c"(0));
  if (!has(saved, {1, 2}) || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !has(b, {kAvx2, kBmi2})) return Isa::generic;
  const Isa without_avx512 = has_avx_vnni() ? Isa::avx2_vnni : Isa::avx2;
  if (!has(saved, {5, 6, 7}) || !has(b, {kF, kDq, kBw, kVl})) return without_avx512;
  const bool vnni = has(c, {kVnni}), amx = has(d, {kAmxBf16, kAmxTile});  // every CPU with bf16 has vnni
  if (!vnni) return Isa::avx512;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !has(a, {kBf16})) return Isa::avx512_vnni;
  return amx && request_amx() ? Isa::amx : Isa::avx512_bf16;
#else
  return Isa::generic;
#endif
}

Isa best_isa() {
  static const Isa isa = detect();
  return isa;
}

bool has_isa(Isa isa) { return isa <= best_isa() && (isa != Isa::avx2_vnni || has_avx_vnni()); }

// The set of that name, where this CPU has it.
bool parse_isa(const char* name, Isa* isa) {
  for (int i = 0; i < int(std::size(kIsaNames)); ++i)
    if (*isa = static_cast<Isa>(i); std::strcmp(name, kIsaNames[i]) == 0) return has_isa(*isa);
  return false;
}

std::string all_isas() {
  std::string all;
  for (int i = 0; i < int(std::size(kIsaNames)); ++i)
    if (has_isa(static_cast<Isa>(i))) all += (all.empty() ? "" : ", ") + std::string(kIsaNames[i]);
  return all;
}

Isa& isa_slot() {
  static Isa isa = best_isa();
  return isa;
}

// ---- Python functions ----------------------------------------------------------------------------------------------

PyObject* py_isa(PyObject*, PyObject*) { return PyUnicode_FromString(kIsaNames[static_cast<int>(active_isa())]); }

PyObject* py_isas(PyObject*, PyObject*) {
  PyObject* list = PyList_New(0);
  for (int i = 0; list && i < int(std::size(kIsaNames)); ++i) {
    if (!has_isa(static_cast<Isa>(i))) continue;
    PyObject* name = PyUnicode_FromString(kIsaNames[i]);
    if (!name || PyList_Append(list, name) < 0) {
      Py_XDECREF(name);
      Py_DECREF(list);
      return nullptr;
    }
    Py_DECREF(name);
  }
  return list;
}

PyObject* py_set_isa(PyObject*, PyObject* args) {
  const char* name;
  if (!PyArg_ParseTuple(args, "s", &name)) return nullptr;
  Isa isa;
  if (!parse_isa(name, &isa)) {
    PyErr_Format(PyExc_ValueError, "instruction set must be one of %s, which this CPU has; got %s", all_isas().c_str(),
                 name);
    return nullptr;
  }
  isa_slot() = isa;
  Py_RETURN_NONE;
}

PyObject* py_build_info(PyObject*, PyObject*) {
  const char* sources = dflash_sources_mark ? dflash_sources_mark : "";
  return Py_BuildValue("{s:s,s:s,s:s,s:s}", "compiler", __VERSION__, "sources", sources, "torch_abi", "2.10", "nvcc",
                       DFLASH_NVCC);
}

PyObject* py_stream_read(PyObject*, PyObject* args) {
  unsigned long long address;
  long long bytes;
  int far = 0;
  if (!PyArg_ParseTuple(args, "KL|p", &address, &bytes, &far)) return nullptr;
  uint64_t sum = 0;
  const StreamReadParams p{reinterpret_cast<const void*>(address), bytes, far != 0, &sum};
  Py_BEGIN_ALLOW_THREADS
  best_of(stream_read_kernels, active_isa())(p);  // not recorded: the sum is on this stack
  Py_END_ALLOW_THREADS
  return PyLong_FromUnsignedLongLong(sum);
}

PyObject* py_matrix_rate(PyObject*, PyObject* args) {
  const char* what;
  long long rounds;
  if (!PyArg_ParseTuple(args, "sL", &what, &rounds)) return nullptr;
  const auto is = [&](const char* name) { return std::strcmp(what, name) == 0; };
  if (!is("f32") && !is("bf16") && !is("int8")) {
    PyErr_Format(PyExc_ValueError, "matrix_rate: what must be f32, bf16 or int8; got %s", what);
    return nullptr;
  }
  int64_t flops = 0;
  float sum = 0;
  const MatrixRateParams p{is("int8") ? Multiplied::int8 : is("bf16") ? Multiplied::bf16 : Multiplied::f32, rounds,
                           &flops, &sum};
  Py_BEGIN_ALLOW_THREADS
  best_of(matrix_rate_kernels, active_isa())(p);  // not recorded, as above
  Py_END_ALLOW_THREADS
  return PyLong_FromLongLong(flops);
}

PyMethodDef kMethods[] = {
    {"isa", py_isa, METH_NOARGS, "isa() -> str: the instruction set in use"},
    {"isas", py_isas, METH_NOARGS, "isas() -> list[str]: the sets this CPU has, lowest first"},
    {"set_isa", py_set_isa, METH_VARARGS, "set_isa(name): use this instruction set from now on"},
    {"build_info", py_build_info, METH_NOARGS, "build_info() -> dict[str, str]"},
    {"recording", py_recording, METH_NOARGS, "recording() -> bool: whether this thread's launches are being noted"},
    {"record_size", py_record_size, METH_O, "record_size(recording) -> int"},
    {"stream_read", py_stream_read, METH_VARARGS,
     "stream_read(address, bytes, far=False) -> int: reads memory once, sums its words; far: asks for lines into the "
     "second-level cache"},
    {"matrix_rate", py_matrix_rate, METH_VARARGS,
     "matrix_rate(what, rounds) -> int: multiplies and adds in registers, as products of f32, bf16 or int8 do, and "
     "counts the operations"},
    {"replay", py_replay, METH_O, "replay(recording)"},
    {nullptr, nullptr, 0, nullptr}};

#define DFLASH_TEXT_OF(NAME) #NAME
#define DFLASH_TEXT(NAME) DFLASH_TEXT_OF(NAME)
#define DFLASH_INIT_OF(NAME) PyInit_##NAME
#define DFLASH_INIT(NAME) DFLASH_INIT_OF(NAME)

PyModuleDef kModule = {PyModuleDef_HEAD_INIT, DFLASH_TEXT(DFLASH_MODULE), nullptr, -1, kMethods,
                       nullptr,               nullptr,                    nullptr, nullptr};

}  // namespace

Isa active_isa() { return isa_slot(); }

}  // namespace dflash

extern "C" __attribute__((visibility("default"))) PyObject* DFLASH_INIT(DFLASH_MODULE)() {
  if (const char* forced = std::getenv("DFLASH_ISA"); forced && *forced) {
    dflash::Isa isa;
    if (!dflash::parse_isa(forced, &isa)) {
      PyErr_Format(PyExc_ImportError, "DFLASH_ISA must be one of the sets this CPU has (%s); got %s",
                   dflash::all_isas().c_str(), forced);
      return nullptr;
    }
    dflash::isa_slot() = isa;
  }
  PyObject* module = PyModule_Create(&dflash::kModule);
  if (module && !dflash::add_capture(module)) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
