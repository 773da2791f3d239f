"""What DSpark adds to a drafter: a Markov head, which adds W2 W1[t] to the logits that follow token t, and blocks whose
anchor's row drafts too.

Of the logits' sum the largest is taken among each row's most likely tokens before it. The confidence head that such
drafters can have is not used: how many drafts are verified is decided by their probabilities and what became of earlier
ones.
"""

import torch

from ..checkpoint.fields import Fields, shown
from .tensors import Tensors

_HEAD = "markov_head."


def read_markov(f: Fields, top: Fields) -> tuple[int, bool]:
    """The Markov head's rank, 0 without one, and whether the anchor's row drafts. Raises NotImplementedError for a head
    of another kind.

    top: the config's top level. The row drafts if sample_from_anchor says so, or dspark_bonus_anchor, its contrary.
    Where neither is there it drafts in DSpark's own format and not in that of speculators, as in vLLM and llama.cpp.
    """
    rank = f.whole("markov_rank", f.whole("dspark_markov_rank", 0, least=0), least=0)
    if (other := f.whole("dspark_markov_rank", rank, least=0)) != rank:
        f.refuse("dspark_markov_rank", f"markov_rank = {rank}", other)
    if (head := f.text("dspark_fixup_head_type", "markov")) != "markov":
        raise NotImplementedError(f"{f.what}: dspark_fixup_head_type must be 'markov'; got {shown(head)}")
    if (kind := f.text("markov_head_type", "vanilla")) != "vanilla":
        raise NotImplementedError(f"{f.what}: markov_head_type must be 'vanilla', a bias by the token before it; "
                                  f"got {shown(kind)}")
    for name in ("enable_confidence_head", "confidence_head_with_markov"):
        f.flag(name, False)
    from_anchor, bonus = f.flag("sample_from_anchor", None), f.flag("dspark_bonus_anchor", None)
    if from_anchor is not None and from_anchor is bonus:
        f.refuse("dspark_bonus_anchor", f"not sample_from_anchor = {str(from_anchor).lower()}", bonus)
    if from_anchor is None and bonus is not None:
        from_anchor = not bonus
    if from_anchor is None:
        names = top.items("architectures", (), str, "names")
        dspark = rank > 0 or f.get("projector_type") == "dspark" or any("DSpark" in name for name in names)
        from_anchor = dspark and f.get("aux_hidden_state_layer_ids") is None
    return rank, from_anchor


def take_markov(tensors: Tensors, vocab: int, draft_vocab: int, rank: int, ids_of_draft: torch.Tensor | None,
                ) -> tuple[torch.Tensor, torch.Tensor]:
    """W1 and W2 (vocab, rank), both by the target's ids. W2 is stored by the draft head's rows: a token that has none
    gets zeros, and is never drafted."""
    before = tensors.take(f"{_HEAD}markov_w1.weight", vocab, rank).contiguous()
    after = tensors.take(f"{_HEAD}markov_w2.weight", draft_vocab, rank).contiguous()
    if ids_of_draft is None and draft_vocab == vocab:
        return before, after
    ids = torch.arange(draft_vocab, device=after.device) if ids_of_draft is None else ids_of_draft
    size = max(vocab, int(ids.max()) + 1)
    wide = torch.nn.functional.pad(before, (0, 0, 0, size - vocab))
    return wide, torch.zeros_like(wide).index_copy_(0, ids, after)
