"""_append_target_hidden_fused -> write_context_kv: writes the accepted rows to all draft layers' pools in one launch.

The engine's helper normalises and rotates into a workspace and then writes layer by layer. Its projection stays.
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch

from dflash_kernels import PagedKV, write_context_kv

from ..hooks import LEFT, Hook, plan

LOG = logging.getLogger("sglang.dflash_kernels")


@dataclass(frozen=True)
class Plan:
    caches: list[PagedKV]
    eps: float
    v_scale: float


def decide(worker: Any) -> Plan | str:
    """worker: SGLang's DFlashWorkerV2 with its fused helper."""
    pool, layers = worker.draft_model_runner.token_to_kv_pool, worker.draft_model.layers
    if type(pool).__name__ != "MHATokenToKVPool":
        return f"a pool of {type(pool).__name__}"
    if pool.use_hnd or pool.kv_cache_layout != "nhd":
        return "a pool that is not one row for each token"
    weight = worker._fused_kv_helper.flat_kv_weight_t
    if pool.k_buffer[0].dtype != weight.dtype:
        return f"a pool of {pool.k_buffer[0].dtype} for a drafter of {weight.dtype}"
    eps = {float(layer.self_attn.k_norm.variance_epsilon) for layer in layers}
    scales = {1.0 if layer.self_attn.v_scale is None else float(layer.self_attn.v_scale) for layer in layers}
    if len(eps) > 1 or len(scales) > 1:
        return "layers with an epsilon or a value scale of their own"
    # A token's slot is its row: pages of one token.
    caches = [PagedKV(pool.k_buffer[i].unsqueeze(1), pool.v_buffer[i].unsqueeze(1))
              for i in (layer.self_attn.attn.layer_id - pool.start_layer for layer in layers)]
    return Plan(caches, eps.pop(), scales.pop())


def fits(helper: Any, hidden: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor,
         commit_lens: torch.Tensor | None) -> bool:
    """Whether the engine's tensors have the expected form. slots (T,), or (B, Q) with commit_lens (B,)."""
    ids = (torch.int32, torch.int64)
    blocks = commit_lens is None or (slots.dim() == 2 and commit_lens.shape == slots.shape[:1]
                                     and commit_lens.dtype in ids)
    return (blocks and hidden.dim() == 2 and hidden.shape[1] == helper.flat_kv_weight_t.shape[0]
            and positions.numel() == slots.numel() == hidden.shape[0]
            and positions.dtype in ids and slots.dtype in ids)


def _append_target_hidden_fused(self, ctx_hidden, ctx_positions, ctx_cache_loc, ctx_cache_loc_2d=None,
                                commit_lens=None):
    if self._fused_kv_helper is None:
        return LEFT
    made = plan(self, "context_kv", decide, LOG)
    prefix = ctx_cache_loc_2d is not None and commit_lens is not None
    slots, commit_lens = (ctx_cache_loc_2d, commit_lens) if prefix else (ctx_cache_loc, None)
    if made is None or not fits(self._fused_kv_helper, ctx_hidden, ctx_positions, slots, commit_lens):
        return LEFT
    write(self._fused_kv_helper, made, ctx_hidden, ctx_positions, slots, commit_lens)


def write(helper: Any, made: Plan, hidden: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor,
          commit_lens: torch.Tensor | None) -> None:
    """hidden (T, H), normalised. slots (T,); or (B, Q) with commit_lens (B,), of which the first commit_lens[b] rows of
    each block are written."""
    if not slots.numel():
        return
    weight = helper.flat_kv_weight_t
    kv = torch.mm(hidden.to(weight.dtype), weight)
    longest = helper.max_position_hint
    table = helper._ensure_rope_cache(longest if longest is not None else int(positions.max()))
    write_context_kv(kv, positions.reshape(-1).long(), slots.reshape(-1).long(), made.caches,
                     k_weights=helper.k_norm_weights, eps=made.eps, v_scale=made.v_scale, rounding="end",
                     cos_sin=table if table.dtype in (kv.dtype, torch.float32) else table.float(),
                     commit_lens=None if commit_lens is None else commit_lens.int())


HELPER = "sglang.kernels.ops.speculative.fused_kv_materialize:FusedKVMaterializeHelper"
HOOK = Hook("context_kv", "sglang.srt.speculative.dflash_worker_v2:DFlashWorkerV2._append_target_hidden_fused",
            _append_target_hidden_fused, read={"0.5.23": "590699dd1e91d749"},
            beside=(f"{HELPER}.__init__", f"{HELPER}._ensure_rope_cache", f"{HELPER}.materialize"))
