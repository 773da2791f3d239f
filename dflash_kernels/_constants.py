"""Numbers that the ops, the reference and the Triton kernels share. The C++ sources have the same under the same names;
tests/kernels/test_constants.py compares them."""

GREEDY = 1e-5  # temperatures below are 0
HOTTEST = 1e37  # temperature: over an infinite one the distance from an infinite logit would be NaN
SAMPLE, ACCEPT, DRAFT = 0, 1, 2  # purposes of a random number
SAMPLE_CHUNK = 1024  # tokens of the vocabulary that share a partial sum
GATE_ALPHA, GATE_LIMIT = 1.702, 7.0  # of expert_mlp's clamped activation
TINY = 1e-20  # added to the sum of a router's weights, as DeepSeek does: weights that are all zero stay so
CHUNK_SUMS, ROW_STATS = 4, 16  # float32 in verify_sample's workspace for a chunk, and for a row beside its chunks
