"""The time of a decoding step, computed from its parts."""
