#pragma once

#include "cpu/isa.h"
#include "cpu/rope_head.h"
#include "params/context.h"

DFLASH_DECLARE_KERNEL(write_context_kv, WriteContextKvParams)
