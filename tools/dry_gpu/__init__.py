"""A stand-in for a GPU, made of tensors in this machine's memory."""
