"""route_experts: the experts and weights of published routers, ties, NaN, groups and rows alone."""

import pytest
import torch

import dflash_kernels as dk
from dflash_kernels import reference
from dflash_kernels.ops.router import SCORING
from dflash_kernels.testing import assert_within_budget, doubles, same_bits

NAN, INF = float("nan"), float("inf")
FORMS = {
    "mixtral": (8, 2, {}),
    "qwen3": (128, 8, {}),
    "qwen2": (60, 4, {"normalize": False}),
    "minimax-m2": (256, 8, {"scoring": "sigmoid", "bias": True}),
    "deepseek-v3": (256, 8, {"scoring": "sigmoid", "bias": True, "groups": 8, "top_groups": 4, "scale": 2.5}),
    "deepseek-v2": (160, 6, {"groups": 8, "top_groups": 3, "group_best": 1, "normalize": False, "scale": 16.0}),
    "ernie": (64, 6, {"bias": True, "scale": 1.5}),
    "sums of a softmax": (24, 3, {"groups": 4, "top_groups": 2}),
    "all of them": (5, 5, {"scoring": "sigmoid", "normalize": False}),
}


def problem(form, rows=40, dtype=torch.float32):
    """Logits whose scores and biases no rounding decides between."""
    experts, k, given = FORMS[form]
    logits = (torch.randn(rows, experts) * 2).to(dtype)
    bias = torch.randn(experts) * 0.2 if given.get("bias") else None
    return logits, k, given | {"bias": bias}


def from_reference(logits, k, *, bias=None, scoring="softmax", groups=1, top_groups=1, group_best=2, normalize=True,
                   scale=1.0):
    ids = torch.empty(len(logits), k, dtype=torch.int32)
    weights = torch.empty(len(logits), k, dtype=torch.float64)
    reference.router.route_experts(*doubles(logits, bias), SCORING[scoring], groups, top_groups, group_best, normalize,
                                   scale, ids, weights)
    return ids, weights


def in_words(logits, k, bias, scoring, groups=1, top_groups=1, group_best=2, normalize=True, scale=1.0):
    """One row, as the module's docstring says it, with Python's sort."""
    scores = (torch.sigmoid(logits) if scoring == "sigmoid" else torch.softmax(logits, 0)).tolist()
    rank = scores if bias is None else [s + b for s, b in zip(scores, bias.tolist(), strict=True)]
    size = len(scores) // groups
    best = [sum(sorted(rank[g * size:(g + 1) * size])[-group_best:]) for g in range(groups)]
    kept = sorted(range(groups), key=lambda g: -best[g])[:top_groups]
    ids = sorted((e for e in range(len(scores)) if e // size in kept), key=lambda e: -rank[e])[:k]
    total = sum(scores[e] for e in ids) if normalize else 1.0
    return ids, [scores[e] / total * scale for e in ids]


@pytest.mark.parametrize("form", FORMS)
def test_matches_reference(vector_isa, dtype, form):
    logits, k, given = problem(form, dtype=dtype)
    ids, weights = dk.route_experts(logits, k, **given)
    want_ids, want = from_reference(logits, k, **given)
    assert torch.equal(ids, want_ids)
    assert_within_budget(weights, want, want.float(), ulps=16)


@pytest.mark.parametrize("form", FORMS)
def test_the_reference_is_what_the_docstring_says(form):
    logits, k, given = problem(form, rows=10)
    logits = logits.double()
    ids, weights = from_reference(logits, k, **given)
    for row in range(10):
        want = in_words(logits[row], k, **({"scoring": "softmax"} | given))
        assert ids[row].tolist() == want[0]
        torch.testing.assert_close(weights[row].tolist(), want[1])


def block_of(family):
    """A router of transformers with random weights: what it gives for logits, and our arguments."""
    transformers = pytest.importorskip("transformers")
    if family == "mixtral":
        from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter as Router
        config = transformers.MixtralConfig(hidden_size=16, num_local_experts=16, num_experts_per_tok=3)
        return config, Router(config), {}
    if family == "qwen3":
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter as Router
        config = transformers.Qwen3MoeConfig(hidden_size=16, num_experts=16, num_experts_per_tok=3,
                                             norm_topk_prob=False)
        return config, Router(config), {"normalize": False}
    if family == "gpt-oss":
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter as Router
        config = transformers.GptOssConfig(hidden_size=16, num_local_experts=16, num_experts_per_tok=3)
        return config, Router(config), {}
    from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2TopKRouter as Router
    config = transformers.MiniMaxM2Config(hidden_size=16, num_local_experts=16, num_experts_per_tok=3)
    return config, Router(config), {"scoring": "sigmoid", "bias": torch.randn(16) * 0.5}


@pytest.mark.parametrize("family", ["mixtral", "qwen3", "gpt-oss", "minimax-m2"])
def test_published_routers_choose_the_same_and_weigh_the_same(family):
    _, router, given = block_of(family)
    torch.nn.init.normal_(router.weight)
    with torch.no_grad():
        logits, weights, ids = router(torch.randn(50, 16), *([given["bias"]] if "bias" in given else []))
    ours, found = dk.route_experts(logits, 3, **given)
    order = found.argsort(-1), weights.argsort(-1)  # MiniMax's are in no order
    assert torch.equal(ours.long().gather(1, order[0]), ids.gather(1, order[1]))
    torch.testing.assert_close(found.sort(-1).values, weights.sort(-1).values)


def test_deepseek_s_groups_choose_the_same():
    transformers = pytest.importorskip("transformers")
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    config = transformers.DeepseekV3Config(hidden_size=16, n_routed_experts=16, num_experts_per_tok=3, n_group=4,
                                           topk_group=2, routed_scaling_factor=2.5)
    router = DeepseekV3TopkRouter(config)
    torch.nn.init.normal_(router.weight)
    router.e_score_correction_bias.copy_(torch.rand(16))  # not negative: see the op's notes
    with torch.no_grad():
        logits, weights, ids = router(torch.randn(50, 16))
    ours, found = dk.route_experts(logits, 3, bias=router.e_score_correction_bias, scoring="sigmoid", groups=4,
                                   top_groups=2, scale=2.5)
    order = ours.argsort(-1), ids.argsort(-1)
    assert torch.equal(ours.long().gather(1, order[0]), ids.gather(1, order[1]))
    torch.testing.assert_close(found.gather(1, order[0]), weights.gather(1, order[1]))


def test_a_bias_counts_in_the_choice_and_not_in_the_weight(vector_isa):
    logits, bias = torch.zeros(1, 4), torch.tensor([0.0, 5.0, 0.0, 1.0])
    for scoring, weight in (("sigmoid", 0.5), ("softmax", 0.25)):
        ids, weights = dk.route_experts(logits, 2, bias=bias, scoring=scoring, normalize=False)
        assert ids.tolist() == [[1, 3]] and weights.tolist() == [[weight, weight]]


def test_an_expert_of_another_group_is_never_chosen(vector_isa):
    """Whatever is left in the groups that were chosen: scores below 0, and -inf."""
    logits = torch.tensor([[3.0, 2.0, -INF, -INF, 1.0, 1.0], [-INF] * 6])
    for best in (1, 2):
        ids, weights = dk.route_experts(logits, 2, groups=3, top_groups=1, group_best=best)
        assert ids[0].tolist() == [0, 1] and (ids[1] // 2 == 0).all()
    ids, _ = dk.route_experts(torch.zeros(1, 6), 2, bias=torch.tensor([-3.0, -3, -2, -2, -9, -1]), scoring="sigmoid",
                              groups=3, top_groups=1)
    assert ids.tolist() == [[2, 3]]


def test_first_of_equal_experts_and_groups_and_nan_before_numbers(vector_isa, dtype):
    rows = [([1.0, 2.0, 2.0, 2.0], [1, 2]), ([0.0, -0.0, 0.0, -1.0], [0, 1]), ([NAN, 5.0, NAN, INF], [0, 2]),
            ([1.0, 2.0, NAN, INF], [2, 3]), ([-INF, -INF, -INF, -INF], [0, 1]), ([-INF, 1.0, -INF, -INF], [1, 0])]
    logits = torch.tensor([values for values, _ in rows]).to(dtype)
    for given in ({}, {"scoring": "sigmoid"}, {"groups": 1}):
        ids, weights = dk.route_experts(logits, 2, **given)
        assert ids.tolist() == [want for _, want in rows]
        assert weights[2].isnan().all() and weights[3].isnan().any()
    _, weights = dk.route_experts(logits[4:], 2)
    assert weights[0].isnan().all() and weights[1].tolist() == [1.0, 0.0]
    assert dk.route_experts(logits[4:5], 2, scoring="sigmoid")[1].tolist() == [[0.0, 0.0]], "0 of a sum of 0"
    for best in (1, 2):
        ids, _ = dk.route_experts(torch.zeros(1, 8), 2, groups=4, top_groups=2, group_best=best)
        assert ids.tolist() == [[0, 1]]


def test_logits_that_scores_round_together_keep_their_order(vector_isa):
    logits = torch.tensor([[30.0, 40.0, 35.0, 0.0]])
    assert torch.sigmoid(logits)[0, :3].unique().numel() == 1
    assert dk.route_experts(logits, 3, scoring="sigmoid")[0].tolist() == [[1, 2, 0]]


@pytest.mark.parametrize("form", ["qwen3", "deepseek-v3", "qwen2"])
def test_a_row_has_the_same_bits_whatever_stands_beside_it(vector_isa, by_threads, form):
    logits, k, given = problem(form, rows=70)
    whole = dk.route_experts(logits, k, **given)
    for at in (slice(0, 1), slice(69, 70), slice(13, 29)):
        assert all(same_bits(a, b[at]) for a, b in zip(dk.route_experts(logits[at], k, **given), whole, strict=True))
    for found in by_threads(lambda: dk.route_experts(logits, k, **given)):
        assert all(map(same_bits, found, whole))


def test_strided_rows_and_no_rows():
    wide = torch.full((5, 40), NAN)
    wide[:, 3:15] = torch.randn(5, 12)
    got, want = (dk.route_experts(x, 3) for x in (wide[:, 3:15], wide[:, 3:15].contiguous()))
    assert all(map(same_bits, got, want))
    assert dk.route_experts(torch.empty(0, 12), 3)[0].shape == (0, 3)


def test_bad_input_names_what_was_expected_and_got():
    logits = torch.randn(2, 12)
    for error, text, given in (
            (ValueError, "k must be between 1 and 12; got 13", {"k": 13}),
            (ValueError, "k must be between 1 and 6; got 8", {"k": 8, "groups": 4, "top_groups": 2}),
            (ValueError, "groups must divide 12 experts; got 5", {"groups": 5}),
            (ValueError, "top_groups must be at most 3 = groups; got 4", {"groups": 3, "top_groups": 4}),
            (ValueError, "group_best must be 1 or 2, and at most the 1 experts of a group; got 2",
             {"groups": 12, "top_groups": 4}),
            (ValueError, "scoring must be softmax or sigmoid; got 'relu'", {"scoring": "relu"}),
            (TypeError, "normalize must be a bool; got int", {"normalize": 1}),
            (ValueError, r"bias must have shape \(E,\) = \(12\); got float32 \(11,\)", {"bias": torch.zeros(11)}),
            (TypeError, r"bias must be float32 \(E,\); got bfloat16", {"bias": torch.zeros(12).bfloat16()})):
        with pytest.raises(error, match=f"route_experts: {text}"):
            dk.route_experts(logits, **({"k": 2} | given))
    for experts in (1024, 1025):
        text = dk.supports("route_experts", experts=experts).reason
        assert bool(text) == (experts > 1024)
    with pytest.raises(NotImplementedError) as error:
        dk.route_experts(torch.zeros(1, 1025), 2)
    assert str(error.value) == text
    assert dk.supports("route_experts", k=9, experts=8).reason == "route_experts: k must be between 1 and 8; got 9"
