"""Other projects' decoders and kernels on the same work."""
