"""Spans: how block_attention cuts positions into softmaxes of their own, and shares them out.

Their ends are absolute positions, the same for every request, batch and capacity. The first EACH have SPAN positions;
from there on each octave of positions has EACH again, so that a span is an eighth to a sixteenth of what is before its
end: short contexts have enough spans to fill a chip, long ones have no more than they need. Under a window of `left`
positions they grow no longer than an eighth of it: `octaves` says how often they double at most.
"""

import triton
import triton.language as tl

SPAN, EACH = 128, 8
MOST_OCTAVES = 19  # of positions below 2**30


def octaves_of(left: int, span: int, each: int) -> int:
    """How often spans double at most if a row sees `left` positions before its own."""
    return min(max((left // (span * each)).bit_length() - 1, 0), MOST_OCTAVES)


def spans_in(reach: int, octaves: int, span: int, each: int) -> int:
    """Spans that positions [0, reach) lie in; as many positions elsewhere lie in one more at most."""
    last = max(reach - 1, 0) // span
    octave = min(max((last // each).bit_length() - 1, 0), octaves)
    return each * octave + (last >> octave) + 1


@triton.jit
def span_of(position, octaves, SPAN: tl.constexpr, EACH: tl.constexpr):
    """The span that a position from -1 on lies in; that of -1 is -1."""
    first = (position + SPAN) // SPAN - 1  # towards zero, both divide alike
    # The largest power of two in a number below 2**24 is its float32's exponent.
    exponent = ((first // EACH).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
    octave = tl.minimum(tl.maximum(exponent, 0), octaves)
    return EACH * octave + (first >> octave)


@triton.jit
def begin_of(span, octaves, SPAN: tl.constexpr, EACH: tl.constexpr):
    """The position that a span begins at."""
    octave = tl.minimum(tl.maximum(span // EACH - 1, 0), octaves)
    return (span - EACH * octave) * SPAN << octave


@triton.jit
def share_of(number, shares, first, end, octaves, SPAN: tl.constexpr, EACH: tl.constexpr):
    """Spans [begin, end) that program `number` of `shares` has of those that positions [first, end) lie in: those that
    begin in its part of the positions, which are shared out evenly; the first program also the one that first is in."""
    count = end - first
    at = first + number * (count // shares) + tl.minimum(number, count % shares)
    after = number + 1
    to = first + after * (count // shares) + tl.minimum(after, count % shares)
    begin = span_of(tl.where(number == 0, first, at - 1), octaves, SPAN, EACH) + tl.where(number == 0, 0, 1)
    return begin, span_of(to - 1, octaves, SPAN, EACH) + 1
