"""The DFlash decoding loop, thin, on top of dflash_kernels' public ops."""
