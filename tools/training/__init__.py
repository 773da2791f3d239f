"""What `tools/training` is made of: the target that writes its own text, features, drafter, optimisation."""
