"""The bytes that a call of each op must move and the operations that it must do: what a case is compared with."""


def norm_bytes(rows: int, width: int, itemsize: int, *, add: bool) -> int:
    """Bytes that must move: rows read and written once each; with the addition, residual too; and the weight."""
    return itemsize * ((4 if add else 2) * rows * width + width)


def norm_flops(rows: int, width: int, *, add: bool) -> int:
    return rows * width * (5 if add else 4)


def conv_bytes(rows: int, width: int, groups: int, taps: int, itemsize: int, *, add_norm: bool = False) -> int:
    """Bytes that must move: rows read and written once, coefficients of each row and of each channel; with the addition
    and the norm, the residual read and written and the norm's weight too."""
    return itemsize * ((4 if add_norm else 2) * rows * width + taps * (rows * groups + width) + add_norm * width)


def conv_flops(rows: int, width: int, taps: int, *, add_norm: bool = False) -> int:
    return rows * width * (4 * taps + (5 if add_norm else 0))


def activation_bytes(rows: int, width: int, itemsize: int) -> int:
    """Bytes that must move for rows of I = width outputs: both halves read, the result written."""
    return itemsize * 3 * rows * width


def activation_flops(rows: int, width: int) -> int:
    return rows * width * 5


def rope_bytes(tokens: int, num_heads: int, num_kv_heads: int, head_dim: int, rotary_dim: int, itemsize: int, *,
               table_itemsize: int = 4, cached: bool = False, cache_itemsize: int | None = None) -> int:
    """Bytes that must move: q and k read and written, a table row a token; with a cache V read, K and V written, in
    elements of cache_itemsize (None: itemsize)."""
    row = 2 * (num_heads + num_kv_heads) * itemsize
    if cached:
        row += num_kv_heads * (itemsize + 2 * (itemsize if cache_itemsize is None else cache_itemsize))
    return tokens * (row * head_dim + rotary_dim * table_itemsize + (16 if cached else 8))


def rope_flops(tokens: int, num_heads: int, num_kv_heads: int, head_dim: int, rotary_dim: int) -> int:
    return tokens * (num_heads + num_kv_heads) * (4 * head_dim + 3 * rotary_dim)


def context_bytes(tokens: int, layers: int, num_kv_heads: int, head_dim: int, rotary_dim: int, itemsize: int, *,
                  table_itemsize: int = 4, normed: bool = True, cache_itemsize: int | None = None) -> int:
    """Bytes that must move for `tokens` written rows: K and V read, and written in elements of cache_itemsize (None:
    itemsize), a table row and a slot a token, and the norm weights once."""
    both = itemsize + (itemsize if cache_itemsize is None else cache_itemsize)
    row = 2 * layers * num_kv_heads * head_dim * both + rotary_dim * table_itemsize + 16
    return tokens * row + (layers * head_dim * itemsize if normed else 0)


def context_flops(tokens: int, layers: int, num_kv_heads: int, head_dim: int, rotary_dim: int) -> int:
    return tokens * layers * num_kv_heads * (4 * head_dim + 3 * rotary_dim)


def block_bytes(requests: int, block: int, *, hidden: int = 0, itemsize: int = 0, slots: bool = True) -> int:
    """Bytes that must move: anchors and lengths in; ids, positions, slots and embedded rows out; rows of the anchors
    and one of the mask in."""
    return requests * (12 + block * (24 if slots else 16)) + (requests * (block + 1) + 1) * hidden * itemsize


def embed_bytes(tokens: int, hidden: int, itemsize: int) -> int:
    """Bytes that embed_tokens must move: an id, a row in and a row out for each token."""
    return tokens * (8 + 2 * hidden * itemsize)


def attention_bytes(context: int, width: int, heads: int, kv_heads: int, head_dim: int, itemsize: int,
                    cache_itemsize: int | None = None) -> int:
    """Bytes of one request that must move: visible context K/V once, block K/V once, queries in and rows out.

    context: context tokens that some query sees (at most left + Q - 1 with a window), of elements of cache_itemsize
    (None: itemsize).
    """
    cached = 2 * kv_heads * context * (itemsize if cache_itemsize is None else cache_itemsize)
    return head_dim * (cached + 2 * (kv_heads + heads) * width * itemsize)


def attention_flops(pairs: int, heads: int, head_dim: int) -> int:
    """pairs: visible (query, key) pairs of one request; a multiply and an add each for q.k and for p.v."""
    return 4 * pairs * heads * head_dim


def linear_bytes(rows: int, n: int, k: int, itemsize: int, weight_itemsize: float | None = None,
                 chunks: int = 0) -> int:
    """Bytes that move: the weight once, and the rows. weight_itemsize: bytes of the weight's elements, if they are
    others; a fraction, of blocks. chunks: of K whose float32 sums go through memory, written and read
    (_triton/linear.py, `shared`)."""
    return int((weight_itemsize or itemsize) * n * k) + itemsize * rows * (n + k) + 8 * chunks * rows * n


def linear_flops(rows: int, n: int, k: int) -> int:
    return 2 * rows * n * k


def route_bytes(rows: int, experts: int, chosen: int, itemsize: int) -> int:
    """Bytes that must move: each row's logits, and an id and a weight of each expert that it chose."""
    return rows * (itemsize * experts + 8 * chosen)


def experts_bytes(read: float, rows: int, hidden: int, inner: int, chosen: int, itemsize: int,
                  weight_itemsize: int | None = None) -> int:
    """Bytes that must move: the weights of the `read` experts that some row chose (a mean may be a fraction), the rows
    read and written, and an id and a weight of each expert of a row."""
    weights = int(3 * (weight_itemsize or itemsize) * read * hidden * inner)
    return weights + rows * (2 * itemsize * hidden + 8 * chosen)


def experts_flops(rows: int, hidden: int, inner: int, chosen: int) -> int:
    return 6 * rows * chosen * hidden * inner


def lm_head_bytes(rows: int, vocab: int, hidden: int, itemsize: int, weight_itemsize: float | None = None, *,
                  k: int = 1, lse: bool = False) -> int:
    """Bytes that must move: the weight once, in elements of weight_itemsize (None: itemsize), the rows, and k ids and
    values a row, with lse the log-sum-exp too."""
    return int((weight_itemsize or itemsize) * vocab * hidden) + rows * (itemsize * hidden + 12 * k + 4 * lse)


def lm_head_flops(rows: int, vocab: int, hidden: int) -> int:
    return 2 * rows * vocab * hidden


def combine_bytes(shards: int, rows: int, *, k: int = 1, lse: bool = False) -> int:
    """Bytes that a combine must move: the ids and values, and with lse the log-sum-exps, of every shard and of the
    result."""
    return (shards + 1) * rows * (12 * k + 4 * lse)


def verify_bytes(requests: int, block: int, *, vocab: int = 0, itemsize: int = 0, rows: int | None = None) -> int:
    """Bytes that must move: drafted and emitted ids, lengths in and out, and target ids or, with vocab, the logits of
    `rows` rows (None: all)."""
    rows = requests * block if rows is None else rows
    return rows * (vocab * itemsize if vocab else 8) + requests * (16 * block + 24)


def verify_flops(requests: int, block: int, *, vocab: int = 0, rows: int | None = None) -> int:
    return (requests * block if rows is None else rows) * max(vocab, 1)


def sample_bytes(requests: int, block: int, vocab: int, itemsize: int, *, rows: int | None = None) -> int:
    """Bytes that must move: each logit of `rows` rows (None: all) once, drafted and emitted ids, lengths."""
    rows = requests * block if rows is None else rows
    return rows * vocab * itemsize + requests * (16 * block + 36)


def sample_flops(requests: int, block: int, vocab: int, *, rows: int | None = None) -> int:
    """One exponential and three sums or comparisons for each logit of `rows` rows (None: all)."""
    return 4 * (requests * block if rows is None else rows) * vocab


def draft_bytes(requests: int, drafts: int, k: int) -> int:
    """Bytes that sample_draft must move: K ids and values a draft in; an id and K probabilities a draft out;
    temperature, seed and length of each request."""
    return requests * (drafts * (16 * k + 8) + 16)


def select_bytes(requests: int, drafts: int, k: int, rank: int, itemsize: int, *, drawn: bool = False) -> int:
    """Bytes that select_candidates must move: K rows of one codebook, a row of the other and of hidden a draft; K ids
    and values in, an id and a logarithm out; anchor and length of each request. Drawn: K probabilities out, temperature
    and seed in."""
    draft = itemsize * (k + 2) * rank + 12 * k + 12 + drawn * 4 * k
    return requests * (drafts * draft + 12 + drawn * 12)


def select_flops(requests: int, drafts: int, k: int, rank: int) -> int:
    return requests * drafts * (2 * k + 1) * rank
