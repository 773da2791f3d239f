"""Greedy verification of a drafted block."""

import torch


def verify_greedy(draft_ids, target_ids, logits, context_lens, block_lens, accept_lens, commit_lens, tokens, bonus,
                  new_lens):
    target = logits.argmax(-1) if target_ids is None else target_ids
    q = draft_ids.shape[1]
    i = torch.arange(q, device=draft_ids.device)
    widths = torch.full_like(context_lens, q) if block_lens is None else block_lens.clamp(0, q)
    drafts = draft_ids[:, 1:]
    agrees = (drafts == target[:, :-1]) & (drafts >= 0) & (i[1:] < widths[:, None])
    accept = agrees.long().cumprod(1).sum(1)
    live = widths > 0
    commit = torch.where(live, accept + 1, 0)
    last = target.gather(1, accept[:, None])[:, 0]
    new_tokens = torch.where(i < commit[:, None], target, -1)
    bonus.copy_(torch.where(live, last, -1))
    tokens.copy_(new_tokens)
    accept_lens.copy_(accept)
    commit_lens.copy_(commit)
    new_lens.copy_(context_lens + commit)
