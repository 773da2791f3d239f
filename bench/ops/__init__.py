"""The benchmarks of the ops, one module each."""
