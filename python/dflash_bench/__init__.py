"""Decoding measured: the commands `dflash-kernels bench`."""
