"""Splits: how block_attention cuts positions into softmaxes of their own, and shares them out.

Their ends are absolute positions, the same for every request, batch and capacity. The first EACH have SPLIT positions;
from there on each octave of positions has EACH again, so that a split is an eighth to a sixteenth of what is before its
end: short contexts have enough splits to fill a chip, long ones have no more than they need. Under a window of `left`
positions they grow no longer than an eighth of it: `octaves` says how often they double at most.
"""

import triton
import triton.language as tl

SPLIT, EACH = 128, 8
MOST_OCTAVES = 19  # of positions below 2**30


def octaves_of(left: int, split: int, each: int) -> int:
    """How often splits double at most if a row sees `left` positions before its own."""
    return min(max((left // (split * each)).bit_length() - 1, 0), MOST_OCTAVES)


def splits_in(reach: int, octaves: int, split: int, each: int) -> int:
    """Splits that positions [0, reach) lie in; as many positions elsewhere lie in one more at most."""
    last = max(reach - 1, 0) // split
    octave = min(max((last // each).bit_length() - 1, 0), octaves)
    return each * octave + (last >> octave) + 1


@triton.jit
def split_of(position, octaves, SPLIT: tl.constexpr, EACH: tl.constexpr):
    """The split that a position from -1 on lies in; that of -1 is -1."""
    first = (position + SPLIT) // SPLIT - 1  # towards zero, both divide alike
    # The largest power of two in a number below 2**24 is its float32's exponent.
    exponent = ((first // EACH).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
    octave = tl.minimum(tl.maximum(exponent, 0), octaves)
    return EACH * octave + (first >> octave)


@triton.jit
def begin_of(split, octaves, SPLIT: tl.constexpr, EACH: tl.constexpr):
    """The position that a split begins at."""
    octave = tl.minimum(tl.maximum(split // EACH - 1, 0), octaves)
    return (split - EACH * octave) * SPLIT << octave


@triton.jit
def share_of(number, shares, first, end, octaves, SPLIT: tl.constexpr, EACH: tl.constexpr):
    """Splits [begin, end) that program `number` of `shares` has of those that positions [first, end) lie in: those that
    begin in its part of the positions, which are shared out evenly; the first program also the one that first is in."""
    count = end - first
    at = first + number * (count // shares) + tl.minimum(number, count % shares)
    after = number + 1
    to = first + after * (count // shares) + tl.minimum(after, count % shares)
    begin = split_of(tl.where(number == 0, first, at - 1), octaves, SPLIT, EACH) + tl.where(number == 0, 0, 1)
    return begin, split_of(to - 1, octaves, SPLIT, EACH) + 1
