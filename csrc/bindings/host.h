// The host side of an op: torch tensors in, plain parameter records out, one launch.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <initializer_list>
#include <optional>
#include <vector>

#include "cpu/isa.h"
#include "cpu/types.h"

// The namespace of the ops, and the Python module's name. On the Hugging Face hub every version has a name of its own.
#ifdef TORCH_EXTENSION_NAME
#define DFLASH_OPS TORCH_EXTENSION_NAME
#define DFLASH_MODULE TORCH_EXTENSION_NAME
#else
#define DFLASH_OPS dflash
#define DFLASH_MODULE _C
#endif
#define DFLASH_CPU_OPS_OF(NAME, M) STABLE_TORCH_LIBRARY_IMPL(NAME, CPU, M)
#define DFLASH_CPU_OPS(M) DFLASH_CPU_OPS_OF(DFLASH_OPS, M)

namespace dflash {

using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& t, const char* what) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    default: STD_TORCH_CHECK(false, what, " must be float32, bfloat16 or float16");
  }
  return Dtype::f32;
}

template <class T>
inline T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}
template <class T>
inline T* data(const std::optional<Tensor>& t) {
  return t ? static_cast<T*>(t->data_ptr()) : nullptr;
}

Isa active_isa();

// A recorded sequence of launches: the CPU's counterpart of a CUDA graph. While one is being recorded, every launch of
// this thread is run and appended, with the tensors it touches kept alive; replay runs them again on the same memory.
class Recorder {
 public:
  static Recorder* active();
  template <class Params>
  void append(Kernel<Params> kernel, const Params& params, std::vector<Tensor> keep) {
    struct Call {
      Kernel<Params> kernel;
      Params params;
    };
    calls_.push_back({[](const void* c) {
                        const Call* call = static_cast<const Call*>(c);
                        call->kernel(call->params);
                      },
                      std::make_shared<Call>(Call{kernel, params}), std::move(keep)});
  }
  void replay() const {
    for (const auto& call : calls_) call.run(call.call.get());
  }
  size_t size() const { return calls_.size(); }

 private:
  struct Entry {
    void (*run)(const void*);
    std::shared_ptr<void> call;
    std::vector<Tensor> keep;
  };
  std::vector<Entry> calls_;
};

// Runs the best entry of `set`, and records it when a recording is under way.
template <class Params>
void launch(const KernelSet<Params>& set, const Params& params, std::initializer_list<std::optional<Tensor>> tensors,
            const std::vector<Tensor>& more = {}) {
  const Kernel<Params> kernel = best_of(set, active_isa());
  kernel(params);
  if (Recorder* recorder = Recorder::active()) {
    std::vector<Tensor> keep(more);
    for (const auto& t : tensors)
      if (t) keep.push_back(*t);
    recorder->append(kernel, params, std::move(keep));
  }
}

}  // namespace dflash
