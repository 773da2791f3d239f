"""Benchmarks of engines with and without our plugin."""
