"""Trains a drafter: the target writes text, its hidden states are stored, the drafter is optimised."""
