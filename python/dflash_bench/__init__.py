"""Measures decoding: the commands of `dflash-kernels bench`."""
