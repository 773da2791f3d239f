// The CUDA C++ kernel as the host sees it: no CUDA header is needed to launch it.
#pragma once

#include "params/context.h"

namespace dflash::cuda {

// Launches on the current device; nullptr, or what the CUDA runtime says is wrong.
const char* write_context_kv(const WriteContextKvParams& p, void* stream);

}  // namespace dflash::cuda
