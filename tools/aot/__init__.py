"""Kernels compiled for GPUs that are not here."""
