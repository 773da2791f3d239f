"""The name of our attention backend in vLLM's registry, and the logger of both of its modules."""

import logging

LOG = logging.getLogger("vllm.dflash_kernels")
NAME = "DFLASH"
