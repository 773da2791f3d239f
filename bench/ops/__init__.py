"""The benchmarks of the ops, a module each."""
