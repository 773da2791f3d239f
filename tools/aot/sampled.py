"""The cases of sample and selector, as launched.py has those of the other nouns."""

from collections.abc import Iterator

import torch

from .launched import DTYPES, FLOATS, VOCAB, Case, Launch, case, empty, launches

BLOCK, K = 16, 15  # a request's rows, a draft's candidates
FORMS = ("one-hot", "sparse", "dense", "logits")


def floats(*shape: int) -> torch.Tensor:
    return empty(*shape, dtype=torch.float32)


def ints(*shape: int) -> torch.Tensor:
    return empty(*shape, dtype=torch.int32)


def verified(dtype: torch.dtype, adjusted: bool, form: str, rule: str = "token") -> dict[str, Launch]:
    """The launches of verify_sample by their kernels' names; of a proposal's logits the second chunks_kernel."""
    from dflash_kernels._constants import CHUNK_SUMS
    from dflash_kernels._triton.sample import CHUNK, verify_sample

    words, each, ids = -(-VOCAB // 32), floats(2), empty(2, BLOCK)
    adjustments = ints(2, BLOCK, words), each, floats(2, BLOCK, VOCAB), ints(2, BLOCK, words)
    probs = {"sparse": floats(2, BLOCK - 1, K), "dense": floats(2, BLOCK - 1, VOCAB)}.get(form)
    candidates = empty(2, BLOCK - 1, K) if form == "sparse" else None
    logits = empty(2, BLOCK - 1, VOCAB, dtype=dtype) if form == "logits" else None
    workspace = floats((CHUNK_SUMS + 1) * 2 * BLOCK * -(-VOCAB // CHUNK.value))
    found = launches(verify_sample, ids, empty(2, BLOCK, VOCAB, dtype=dtype), ints(2), each, empty(2), ints(2), each,
                     each, probs, candidates, logits, *(adjustments if adjusted else (None,) * 4), ints(2),
                     rule == "block", ints(2), ints(2), ids, empty(2), ints(2), workspace)
    return {launch.kernel.__name__: launch for launch in found}


def sample() -> Iterator[Case]:
    """For 151,936 tokens, blocks of 16 and up to 16 candidates."""
    from dflash_kernels._triton.sample import sample_draft

    for dtype in FLOATS:
        for kind in ("plain", "adjusted"):
            launch = verified(dtype, kind == "adjusted", "one-hot")["chunks_kernel"]
            yield case(f"verify_sample chunks {kind} {DTYPES[dtype]}", launch)
    for dtype, adjusted in ((torch.bfloat16, False), (torch.float32, True)):
        for form in FORMS:
            yield case(f"verify_sample rows {form} {DTYPES[dtype]}", verified(dtype, adjusted, form)["rows_kernel"])
    for form in FORMS:
        for rule in ("token", "block"):
            found = verified(torch.float32, True, form, rule)
            if "residual_kernel" in found:
                yield case(f"verify_sample residual {form} {rule}", found["residual_kernel"])
            if form != "one-hot" or rule == "token":
                yield case(f"verify_sample accept {form} {rule}", found["accept_kernel"])
    values = floats(2, BLOCK - 1, K)
    (launch,) = launches(sample_draft, values, empty(2, BLOCK - 1, K), ints(2), floats(2), empty(2), ints(2), floats(2),
                         floats(2), empty(2, BLOCK - 1), values)
    yield case("sample_draft", launch)


def selector() -> Iterator[Case]:
    """Greedy, with every filter, and a Markov head; K is one less than the power of two in the name."""
    from dflash_kernels._triton.selector import CONFIGS, select_candidates

    for most in CONFIGS:
        values, ids = floats(2, BLOCK - 1, most - 1), empty(2, BLOCK - 1, most - 1)
        for dtype in FLOATS:
            codebook = empty(VOCAB, 256, dtype=dtype)
            hidden, known = empty(2, BLOCK - 1, 256, dtype=dtype), (empty(2), codebook, codebook, ints(2))
            out = empty(2, BLOCK - 1), floats(2, BLOCK - 1)
            greedy, drawn = (None,) * 5, (floats(2), empty(2), ints(2), floats(2), floats(2))
            for name, weighs, settings, probs in (("greedy", hidden, greedy, None), ("drawn", hidden, drawn, values),
                                                  ("Markov", None, greedy, None)):
                (launch,) = launches(select_candidates, values, ids, weighs, *known, *settings, *out, probs)
                yield case(f"select_candidates {most} {name} {DTYPES[dtype]}", launch)
