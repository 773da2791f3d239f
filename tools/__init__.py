"""Tools for developers of the package: training, kernels compiled ahead of time, a stand-in for a GPU."""
