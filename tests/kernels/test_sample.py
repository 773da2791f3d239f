import pytest
import torch

from dflash_kernels import LogitAdjustments, Proposal, SamplingTensors, Verified, reference, sample_draft, verify_sample
from dflash_kernels.ops.sample import workspace_size
from tests.support.sample_inputs import FILTERS, KINDS, block, int32, one_of, params, proposal, some_params
from tests.support.sample_margin import agree, from_reference, objection, one

distribution = reference.sample
NAN = float("nan")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# ---- random numbers ------------------------------------------------------------------------------------------------

def philox_in_full(counter, key):
    """All four words, in Python's integers (Salmon et al. 2011)."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [b >> 32 ^ c[1] ^ k[0], b & 0xFFFFFFFF, a >> 32 ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def test_philox_gives_the_known_answers_of_random123():
    for counter, key, answer in [
        ((0,) * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
         "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ]:
        assert " ".join(f"{w:08x}" for w in philox_in_full(counter, key)) == answer
    seeds = torch.randint(-2**63, 2**63 - 1, (200,))
    counters = torch.randint(0, 2**32, (3, 200))
    got = distribution.philox(seeds, *counters).tolist()
    assert (
        distribution.philox(torch.zeros(1, dtype=torch.int64), *torch.zeros(3, 1, dtype=torch.int64)).item()
        == 0x6627E8D5
    )
    for seed, c, word in zip(seeds.tolist(), counters.T.tolist(), got, strict=True):
        assert word == philox_in_full((*c, 0), (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))[0]


def test_the_kernel_s_random_numbers_are_those_of_the_specification(vector_isa):
    """Over 2**18 equal logits the token is the upper 18 bits of the random word, for each purpose."""
    b, bits = 300, 18
    seeds, lens = torch.randint(-2**63, 2**63 - 1, (b,)), torch.randint(0, 2**31 - 9, (b,)).int()
    p = SamplingTensors(torch.ones(b), seeds)
    flat = torch.zeros(1, 1, 1 << bits).expand(b, 1, -1)
    got = verify_sample(torch.zeros(40, 1, dtype=torch.int64), flat[:40], lens[:40], one_of(p, 40)).bonus
    word = [philox_in_full((n + 1, 0, 0, 0), (s & 0xFFFFFFFF, s >> 32 & 0xFFFFFFFF))[0]
            for s, n in zip(seeds.tolist(), lens.tolist(), strict=True)]
    assert got.tolist() == [w >> 32 - bits for w in word[:40]]
    n = 1024
    ids, probs = sample_draft(torch.zeros(b, 2, n), torch.arange(n).expand(b, 2, n).contiguous(), lens, p)
    for slot in range(2):
        word = [philox_in_full((c + 1 + slot, 2, c, 0), (s & 0xFFFFFFFF, s >> 32 & 0xFFFFFFFF))[0]
                for s, c in zip(seeds.tolist(), lens.tolist(), strict=True)]
        assert ids[:, slot].tolist() == [w >> 22 for w in word]
    assert torch.allclose(probs, torch.tensor(1 / n))


# ---- against the reference -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_the_reference(vector_isa, kind, rule):
    """Every filter and dtype; greedy requests, ragged and padded ones among them."""
    for n, filters in enumerate(FILTERS):
        logits = (torch.randn(12, 5, 211) * 2).to(DTYPES[n % 3])
        agree(block(logits, 1 + n % 2), logits, torch.randint(0, 99, (12,)).int(), some_params(12, filters, 5, n),
              proposal(kind, logits), rule=rule, block_lens=torch.randint(-1, 8, (12,)).int())


@pytest.mark.parametrize("vocab", [1, 7, 1023, 1024, 1025, 50257])
def test_agrees_at_every_size_of_the_vocabulary(vector_isa, dtype, vocab):
    b, q = (2, 2) if vocab > 2000 else (6, 4)
    logits = (torch.randn(b, q, vocab) * 3).to(dtype)
    for n, filters in enumerate(FILTERS if vocab < 2000 else ("baseline", "top_p", "all")):
        kind = KINDS[(n + vocab) % 4]
        agree(block(logits), logits, torch.arange(b).int(), some_params(b, filters, seed=n), proposal(kind, logits),
              rule=("token", "block")[n % 2])


def test_agrees_at_262144_tokens(vector_isa):
    logits = torch.randn(1, 2, 262144).bfloat16()
    for filters in ({}, {"top_k": 300}, {"top_k": 9}, {"top_p": 0.9}, {"top_p": 0.9, "top_k": 1000, "min_p": 1e-3}):
        agree(block(logits), logits, int32(3), params(1, **filters))
    agree(block(logits), logits, int32(3), params(1, 0.7), proposal("logits", logits), rule="block")


def test_no_requests_and_a_block_of_one(vector_isa, dtype):
    nothing = verify_sample(torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, 3, 9, dtype=dtype), int32(), params(0))
    assert nothing.tokens.shape == (0, 3)
    logits = torch.randn(30, 1, 100).to(dtype)
    for kind in KINDS:
        agree(block(logits), logits, torch.arange(30).int(), some_params(30), proposal(kind, logits))


def adjustments(b, q, v, seed=0):
    draw = torch.Generator().manual_seed(seed)
    words = -(-v // 32)
    bits = torch.randint(-2**31, 2**31, (3, b, q, words + 3), generator=draw).int()
    return LogitAdjustments(
        seen=bits[0, :, :1, :words].expand(b, q, words), repetition_penalty=torch.linspace(0.8, 1.6, b),
        bias=torch.randn(b, q, v + 5, generator=draw)[..., 2:v + 2],
        bitmask=bits[1:, ..., 1:words + 1].sum(0).int())


@pytest.mark.parametrize("kind", KINDS)
def test_adjustments_and_strides(vector_isa, dtype, kind):
    """Everything a view that can be one; what lies around is NaN, and what lies around outputs is left alone."""
    b, q, v = 6, 4, 1100
    wide = torch.full((b, q + 2, v + 40), NAN, dtype=dtype)
    logits = wide[:, 1:-1, 8:v + 8]
    logits.copy_(torch.randn(b, q, v) * 2)
    draft = torch.full((b, q + 3), 2**62)[:, 2:-1]
    draft.copy_(block(logits))
    q_of = proposal(kind, logits)
    if q_of is not None:
        q_of = Proposal(**{n: None if t is None else torch.cat([t, t, t], -1)[..., t.shape[-1]:2 * t.shape[-1]]
                           for n, t in vars(q_of).items()})
    changes = adjustments(b, q, v)
    for n, rule in enumerate(("token", "block")):
        ints = [torch.full((b + 4,), -7, dtype=torch.int32) for _ in range(3)]
        tokens, bonus = torch.full((b + 2, q + 5), -7), torch.full((b + 4,), -7)
        size = workspace_size(b, q, v)
        memory = torch.full((size + 64,), 123.0)
        out = Verified(ints[0][2:-2], ints[1][2:-2], tokens[1:-1, 2:-3], bonus[2:-2], ints[2][2:-2])
        agree(draft, logits, int32(*range(b)), some_params(b, "all", 4, n), q_of, changes, rule, out=out,
              workspace=memory[32:size + 32])
        assert (memory[:32] == 123).all() and (memory[-32:] == 123).all()
        for t in (*ints, bonus):
            assert (t[:2] == -7).all() and (t[-2:] == -7).all()
        border = tokens.clone()
        border[1:-1, 2:-3] = -7
        assert (border == -7).all()


def test_each_adjustment_alone(vector_isa):
    logits, all_of = torch.randn(4, 3, 200), adjustments(4, 3, 200, 1)
    for names in (("seen", "repetition_penalty"), ("bias",), ("bitmask",)):
        only = LogitAdjustments(**{n: getattr(all_of, n) for n in names})
        plain = from_reference(block(logits), logits, int32(1, 2, 3, 4), params(4))
        agree(block(logits), logits, int32(1, 2, 3, 4), params(4), None, only)
        assert any(from_reference(block(logits), logits, int32(1, 2, 3, 4), params(4), None, only).tokens[i].tolist()
                   != plain.tokens[i].tolist() for i in range(4))


def test_the_margin_refuses_what_is_wrong():
    """The comparison itself: a neighbouring token, one accepted too many or too few, are objected to."""
    logits = torch.randn(8, 4, 60)
    draft, lens, p = block(logits), torch.arange(8).int(), params(8)
    for kind in KINDS:
        q, refused = proposal(kind, logits), 0
        for rule in ("token", "block"):
            got = from_reference(draft, logits, lens, p, q, None, rule)
            for b in range(8):
                mine = [draft[b:b + 1], logits[b:b + 1], lens[b:b + 1], one(p, b), one(q, b), None, rule, 4]
                right = one(got, b)
                assert objection(*mine, right) is None
                a, last = int(right.accept_lens), (int(right.bonus) + 1) % 60
                for accept, token in ((a, last), (min(a + 1, 3), int(right.bonus)), (max(a - 1, 0), int(right.bonus))):
                    if (accept, token) == (a, int(right.bonus)):
                        continue
                    tokens = draft[b, 1:accept + 1].tolist() + [token]
                    wrong = Verified(int32(accept), int32(accept + 1), torch.tensor([tokens + [-1] * (3 - accept)]),
                                     torch.tensor([token]), lens[b:b + 1] + accept + 1)
                    refused += objection(*mine, wrong) is not None
        assert refused >= 30, kind
