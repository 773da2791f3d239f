<<<<<<< HEAD
"""DFlash speculative decoding, as a thin loop over the public ops of dflash_kernels."""
=======
"""The DFlash decoding loop, thin, on top of dflash_kernels' public ops."""
>>>>>>> decode
