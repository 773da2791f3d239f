"""Other people's decoders and kernels on the same work."""
