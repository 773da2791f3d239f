"""DFlash speculative decoding: a thin loop over the public ops of dflash_kernels."""
