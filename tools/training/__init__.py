"""What `tools/train_drafter.py` is made of: the target that writes its own text, features, drafter, optimisation."""
