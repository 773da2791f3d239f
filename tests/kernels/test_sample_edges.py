"""Edges of verify_sample: logits, filters and inputs that are not what one expects."""

import pytest
import torch

from dflash_kernels import LogitAdjustments, Proposal, SamplingTensors, reference, sample_draft, verify_sample
from tests.support.sample_inputs import KINDS, block, int32, params, proposal, same, some_params
from tests.support.sample_margin import agree

NAN, INF = float("nan"), float("inf")


# ---- edges ---------------------------------------------------------------------------------------------------------

SPECIAL = [(NAN,), (INF,), (-INF,), (INF, INF), (NAN, INF), (NAN, -INF), (3e38,), (-3e38, 3e38), (-0.0, 0.0)]


@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2},
                                     {"top_k": 40, "top_p": 0.9, "min_p": 0.01}])
def test_nan_and_infinite_logits(vector_isa, filters):
    for n, special in enumerate(SPECIAL):
        for fill in (None, -INF):
            logits = torch.randn(4, 3, 1050) if fill is None else torch.full((4, 3, 1050), fill)
            for k, value in enumerate(special):
                logits[:, 1:, 700 + 339 * k] = value
            got = verify_sample(block(logits), logits, int32(1, 2, 3, 4), params(4, **filters))
            agree(block(logits), logits, int32(1, 2, 3, 4), params(4, **filters))
            agree(block(logits), logits, int32(1, 2, 3, 4), params(4, **filters),
                  proposal(KINDS[n % 3 + 1], logits), rule=("token", "block")[n % 2])
            picked = logits.gather(2, got.tokens.clamp_min(0)[..., None])[..., 0]
            possible = (~logits.isnan() & (logits > -INF)).any(-1)
            assert not (picked.isnan() & possible & (got.tokens >= 0)).any()


def test_an_infinite_temperature_and_an_infinite_logit(vector_isa):
    """Every token of finite logits is equally likely, and +inf takes all the same."""
    logits = torch.randn(4, 1, 1050)
    logits[0, 0, [5, 1026]], logits[1, 0, 700], logits[2, 0, 7:], logits[3, 0, 3] = INF, INF, -INF, NAN
    agree(block(logits), logits, int32(1, 2, 3, 4), params(4, temperature=INF))
    values, ids = logits[:, :, :12].contiguous(), torch.arange(12).expand(4, 1, 12).contiguous()
    values[1, 0, 9] = INF
    hot, lens = params(4, temperature=INF), int32(1, 2, 3, 4)
    found, want = sample_draft(values, ids, lens, hot), (ids[..., 0].clone(), values.clone())
    reference.sample.sample_draft(values, ids, lens, hot.temperature, hot.seeds, None, None, None, *want)
    assert torch.equal(found[0], want[0]) and torch.allclose(found[1], want[1], atol=1e-6)
    assert found[0][1, 0] == 9 and found[1][1, 0].tolist() == [0.0] * 9 + [1.0, 0.0, 0.0]


def test_all_mass_on_one_token(vector_isa, dtype):
    logits = torch.full((5, 3, 3000), -100.0).to(dtype)
    for at in (0, 1023, 1024, 2999):
        logits[..., at], expected = 100.0, at
        for filters in ({}, {"top_k": 1}, {"top_p": 0.1}, {"min_p": 0.5}):
            got = verify_sample(block(logits), logits, int32(1, 2, 3, 4, 5), params(5, **filters))
            assert got.accept_lens.tolist() == [2] * 5 and (got.tokens == expected).all()
        logits[..., at] = -100.0


@pytest.mark.parametrize("filters", [{"top_k": 1}, {"top_p": 0.0}, {"top_p": 1e-30}, {"min_p": 1.0}, {"min_p": 7.0}])
def test_filters_that_leave_the_most_likely(vector_isa, dtype, filters):
    logits = torch.randn(7, 2, 1300).to(dtype)
    most_likely = logits.float().argmax(-1)
    logits.scatter_(2, most_likely[..., None], 9.0)
    got = verify_sample(block(logits), logits, torch.arange(7).int(), params(7, **filters))
    assert torch.equal(got.tokens, most_likely)


@pytest.mark.parametrize("filters", [{"top_k": 1100}, {"top_k": 5000}, {"top_k": 0}, {"top_k": -3}, {"top_p": 1.0},
                                     {"top_p": 3.0}, {"min_p": 0.0}])
def test_filters_that_are_off(vector_isa, dtype, filters):
    logits = torch.randn(7, 2, 1100).to(dtype)
    same(verify_sample(block(logits), logits, torch.arange(7).int(), params(7, **filters)),
         verify_sample(block(logits), logits, torch.arange(7).int(), params(7)))


def test_equal_logits_are_kept_or_dropped_together(vector_isa, dtype):
    """Of few distinct values, zeros of both signs among them, every share and count falls among ties."""
    logits = (torch.randint(-3, 4, (40, 2, 1500)) * torch.tensor([-1.0, 1.0])[torch.randint(0, 2, (40, 2, 1500))])
    logits = logits.to(dtype)
    for filters in ("top_k", "top_p", "min_p", "all"):
        p = some_params(40, filters)
        if p.top_k is not None:
            p.top_k.mul_(20)
        agree(block(logits), logits, torch.arange(40).int(), p)


@pytest.mark.parametrize("temperature", [0.0, 1e-6, 1e-5, 1e-4, 1e-3, 100.0, INF])
def test_temperature_to_its_ends(vector_isa, dtype, temperature):
    logits = torch.randn(6, 3, 900).to(dtype)
    agree(block(logits), logits, torch.arange(6).int(), params(6, temperature))
    agree(block(logits), logits, torch.arange(6).int(), params(6, temperature), proposal("dense", logits))
    if temperature <= 1e-5:
        ties = torch.randint(-2, 3, (6, 3, 900)).to(dtype)
        ties[2:, :, 7], ties[3:, :, 500] = NAN, INF
        got = verify_sample(block(ties), ties, torch.arange(6).int(), params(6, temperature), proposal=None)
        assert torch.equal(got.bonus, ties.argmax(-1).gather(1, got.accept_lens[:, None].long())[:, 0])


def test_everything_masked(vector_isa, dtype):
    """A grammar that allows nothing: the first token, by torch.argmax of what is left."""
    logits = torch.randn(3, 2, 1100).to(dtype)
    nothing = LogitAdjustments(bitmask=torch.zeros(1, 1, 35, dtype=torch.int32).expand(3, 2, 35))
    for q in (None, proposal("sparse", logits), proposal("logits", logits)):
        for rule in ("token", "block"):
            agree(block(logits), logits, int32(1, 2, 3), params(3), q, nothing, rule)
    got = verify_sample(torch.zeros(3, 2, dtype=torch.int64), logits, int32(1, 2, 3), params(3), adjustments=nothing)
    assert (got.tokens == 0).all() and got.accept_lens.tolist() == [1, 1, 1]


def test_rows_that_cannot_matter_are_poison(vector_isa, dtype):
    """Rows past a request's length, and all of a padded request, may hold anything; so may proposals there."""
    logits = torch.randn(3, 5, 300).to(dtype)
    draft, lens, widths = block(logits), int32(7, 8, 9), int32(2, 0, 5)
    for kind in KINDS:
        q = proposal(kind, logits)
        clean = verify_sample(draft, logits, lens, params(3), proposal=q, block_lens=widths)
        bad, ids = logits.clone(), draft.clone()
        for b, w in enumerate(widths.tolist()):
            bad[b, w:], ids[b, w:] = NAN, 2**62
            for t in vars(q).values() if q else ():
                if t is not None:
                    t[b, max(0, w - 1):] = -(2**62) if t.dtype == torch.int64 else NAN
        same(verify_sample(ids, bad, lens, params(3), proposal=q, block_lens=widths), clean)


# ---- bad input -----------------------------------------------------------------------------------------------------

def test_bad_input_names_what_was_expected_and_got():
    d, c, x = torch.zeros(2, 3, dtype=torch.int64), int32(0, 0), torch.zeros(2, 3, 5)
    probs, ids = torch.zeros(2, 2, 4), torch.zeros(2, 2, 4, dtype=torch.int64)
    words = torch.zeros(2, 3, 1, dtype=torch.int32)
    for message, error, kwargs in [
        (r"params must be SamplingTensors; got NoneType", TypeError, {"params": None}),
        (r"params.seeds must be int64 \(B,\); got int32 \(2,\)", TypeError,
         {"params": SamplingTensors(torch.ones(2), c)}),
        (r"rule must be 'token' or 'block'; got 'tree'", ValueError, {"rule": "tree"}),
        (r"proposal must be a Proposal; got", TypeError, {"proposal": probs}),
        (r"proposal must have probs, or probs and ids, or logits", ValueError, {"proposal": Proposal(ids=ids)}),
        (r"proposal.ids must have shape \(B, Q - 1, K\)", ValueError, {"proposal": Proposal(probs, ids[..., :3])}),
        (r"proposal.probs must have K >= 1; got", ValueError, {"proposal": Proposal(probs[..., :0], ids[..., :0])}),
        (r"proposal.probs must have shape \(B, Q - 1, V\)", ValueError, {"proposal": Proposal(probs)}),
        (r"adjustments must have seen and repetition_penalty", ValueError, {"adjustments": LogitAdjustments(words)}),
        (r"adjustments.bitmask must have shape", ValueError, {"adjustments": LogitAdjustments(bitmask=words[:, :2])}),
        (r"workspace must have at least \d+ elements; got float32 \(3,\)", ValueError, {"workspace": torch.zeros(3)}),
        (r"workspace must be contiguous", ValueError, {"workspace": torch.zeros(2000)[::2]}),
        (r"draft_ids must have Q >= 1", ValueError, {"draft_ids": d[:, :0], "logits": x[:, :0]}),
        (r"logits must have V >= 1", ValueError, {"logits": x[..., :0]}),
    ]:
        with pytest.raises(error, match="^verify_sample: " + message):
            verify_sample(**{"draft_ids": d, "logits": x, "context_lens": c, "params": params(2)} | kwargs)


def test_values_are_checked_on_request(monkeypatch):
    d, x = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, 5)
    for name, bad in (("temperature", -1.0), ("temperature", NAN), ("top_p", NAN), ("min_p", -0.5)):
        p = SamplingTensors(**{"temperature": torch.ones(1), "seeds": torch.ones(1, dtype=torch.int64)}
                           | {name: torch.tensor([bad])})
        monkeypatch.delenv("DFLASH_CHECK", raising=False)
        assert 0 <= int(verify_sample(d, x, int32(0), p).bonus) < 5
        monkeypatch.setenv("DFLASH_CHECK", "1")
        with pytest.raises(ValueError, match=f"verify_sample: params.{name} must be at least 0"):
            verify_sample(d, x, int32(0), p)
