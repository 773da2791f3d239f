"""DFlash speculative decoding, as a thin loop over the public ops of dflash_kernels."""
