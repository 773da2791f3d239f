"""For those who work on the package: training, compiled kernels, a stand-in for a GPU."""
