// The host side of the CUDA C++ kernels: compiled without CUDA's headers, against torch's stable ABI alone.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "bindings/host.h"

namespace dflash {

// An op as torch calls it. Nothing is registered when the library is loaded: _gpu.py says which ops are.
struct BoxedOp {
  const char* name;
  void (*function)(StableIValue*, uint64_t, uint64_t);
};

extern const BoxedOp kWriteContextKv;

// The device of a tensor is the current one while this lives.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& t) : device_(t.get_device_index()), guard_(device_) {}

  void* stream() const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    return stream;
  }

  void check(const char* op, const char* error) const {
    STD_TORCH_CHECK(error == nullptr, op, ": the CUDA C++ kernel was not launched: ", error);
  }

 private:
  torch::stable::accelerator::DeviceIndex device_;
  torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace dflash
