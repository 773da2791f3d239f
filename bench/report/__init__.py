"""Tables, plots and docs/ops.md, made from results and docstrings."""
