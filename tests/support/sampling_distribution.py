"""Whether emitted tokens follow the target's distribution: a chi-square test over many requests decoded at once.

The target is a chain over V tokens: its logits after token t are table[t]. The drafter of slot i draws from a
distribution of its own that knows nothing of the prefix, as DFlash's does. All requests decode until each has POSITIONS
tokens, block after block, so what a rejected block asked of the random numbers meets what the next one asks.
"""


import torch

from dflash_kernels import LogitAdjustments, Proposal, SamplingTensors, sample_draft, verify_sample
from dflash_kernels.reference import sample as reference

V, WIDTH, POSITIONS, ANCHOR = 32, 4, 3, 5
FILTERS = {
    "baseline": {}, "top_k": {"top_k": 7}, "top_p": {"top_p": 0.8}, "min_p": {"min_p": 0.08},
    "all": {"top_k": 12, "top_p": 0.9, "min_p": 0.03},
}
PROPOSALS = ("one_hot", "sparse", "dense", "logits")
_DTYPES = {"top_k": torch.int32, "top_p": torch.float32, "min_p": torch.float32}


def params(requests: int, temperature: float, filters: dict, greedy_every: int = 0, seed: int = 0) -> SamplingTensors:
    temp = torch.full((requests,), temperature)
    if greedy_every:
        temp[::greedy_every] = 0.0
    seeds = torch.arange(requests) * 7919 + seed
    return SamplingTensors(temp, seeds, **{n: torch.full((requests,), x, dtype=_DTYPES[n]) for n, x in filters.items()})


def drafts(kind: str, distribution: SamplingTensors, lens: torch.Tensor, head: torch.Tensor):
    """Draft ids (B, WIDTH - 1) and the Proposal that they were drawn from; head (slots, V) are the drafter's
    logits."""
    b = len(lens)
    if kind == "one_hot":
        return head.argmax(-1).expand(b, -1), None
    k = 6 if kind == "sparse" else V
    top = head.topk(k)
    values, ids = (t.expand(b, -1, -1).contiguous() for t in (top.values, top.indices))
    baseline = SamplingTensors(distribution.temperature, distribution.seeds)
    chosen, probs = sample_draft(values, ids, lens, baseline)
    if kind == "sparse":
        return chosen, Proposal(probs=probs, ids=ids)
    if kind == "logits":
        return chosen, Proposal(logits=head.expand(b, -1, -1).contiguous())
    return chosen, Proposal(probs=torch.zeros(b, len(head), V).scatter_(-1, ids, probs))


def decode(table, head, kind: str, rule: str, distribution: SamplingTensors, verify=verify_sample,
           adjustments: LogitAdjustments | None = None):
    """The first POSITIONS tokens (B, POSITIONS) of every request, and the mean number accepted in a step."""
    b = len(distribution.seeds)
    lens, anchor = torch.full((b,), 11, dtype=torch.int32), torch.full((b,), ANCHOR)
    text, have = torch.full((b, POSITIONS + WIDTH), -1), torch.zeros(b, dtype=torch.long)
    accepted = []
    while bool((have < POSITIONS).any()):
        x, proposal = drafts(kind, distribution, lens, head)
        block = torch.cat((anchor[:, None], x), 1)
        widths = torch.where(have < POSITIONS, WIDTH, 0).int()
        out = verify(block, table[block], lens, distribution, proposal=proposal, rule=rule, block_lens=widths,
                     adjustments=adjustments)
        accepted.append(out.accept_lens[widths > 0].double().mean().item())
        for i in range(WIDTH):
            here = (out.commit_lens > i) & (have + i < text.shape[1])
            text[here, have[here] + i] = out.tokens[here, i]
        have += out.commit_lens
        anchor, lens = torch.where(widths > 0, out.bonus, anchor), out.new_lens
    return text[:, :POSITIONS], accepted[0]


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """The p-value of `counts` under `expected`, cells below 5 put together; 0 where something impossible came up."""
    counts, expected = counts.double().flatten(), expected.double().flatten()
    if bool((counts[expected <= 0] > 0).any()):
        return 0.0
    rare = expected < 5
    counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    use = expected > 0
    counts, expected = counts[use], expected[use]
    if len(counts) < 2:
        return 1.0
    statistic = ((counts - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2, dtype=torch.float64), statistic / 2).item()


def p_values(table, text: torch.Tensor, distribution: SamplingTensors) -> dict[str, float]:
    """Of the first token, and of each neighbouring pair, against the chain's distribution in float64."""
    sampled = distribution.temperature > 0
    one = {name: None if getattr(distribution, name) is None else getattr(distribution, name)[-1:] for name in _DTYPES}
    rows = reference.distribution(table[None].float(), distribution.temperature[-1:], **one)[0]
    text, n = text[sampled], int(sampled.sum())
    now = rows[ANCHOR]
    found = {"token 1": chi_square(text[:, 0].bincount(minlength=V), now * n)}
    for i in range(1, POSITIONS):
        pairs = (text[:, i - 1] * V + text[:, i]).bincount(minlength=V * V)
        found[f"tokens {i}, {i + 1}"] = chi_square(pairs, now[:, None] * rows * n)
        now = now @ rows
    return found


def chain(seed: int = 0):
    """A target's table (V, V) and a drafter's logits (WIDTH - 1, V) that is somewhat like it."""
    draw = torch.Generator().manual_seed(seed)
    table = torch.randn(V, V, generator=draw) * 1.5
    table += torch.randn(V, generator=draw) * 1.5
    head = torch.log_softmax(table, -1).exp().mean(0).log() + torch.randn(WIDTH - 1, V, generator=draw) * 0.5
    return table, head


def greedy_text(table) -> list[int]:
    text, token = [], ANCHOR
    for _ in range(POSITIONS):
        token = int(table[token].argmax())
        text.append(token)
    return text


SEEN: list[float] = []  # every p-value of this run, for the summary
NOTES: list[str] = []  # further lines of it


def summary() -> list[str]:
    if not SEEN:
        return NOTES
    return [
        f"{len(SEEN)} p-values of sampled text against the target's distribution; the smallest {min(SEEN):.2g}",
        *NOTES,
    ]
