"""A stand-in for a GPU, of tensors in this machine's memory."""
