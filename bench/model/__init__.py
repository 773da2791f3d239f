"""A model of the time of a decoding step."""
