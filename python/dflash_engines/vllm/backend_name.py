"""What vLLM's registry calls our attention backend, and the log that both of its modules write to."""

import logging

LOG = logging.getLogger("vllm.dflash_kernels")
NAME = "DFLASH"
