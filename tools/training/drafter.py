"""The drafter under training: z-lab's DFlash layers over many blocks of one text at a time.

One text of T tokens carries A blocks of S positions [anchor, MASK x (S - 1)]. A row of block a sees

    the text's features at positions < anchor(a)      and      the S positions of its own block, both directions:

        keys   0 1 2 3 4 5 6 7 8 | block 0 | block 1
        block 0, anchor 3:
               x x x . . . . . . | x x x x | . . . .
        block 1, anchor 6:
               x x x x x x . . . | . . . . | x x x x
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dflash_decode.model.rope import Rope

from .target import Target, rope_table, rotate


@dataclass(frozen=True)
class Shape:
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    target_layer_ids: tuple[int, ...]
    block: int
    mask_id: int
    eps: float
    theta: float
    taps: int = 0  # of DFlash2's convolutions; 0: the drafter has none
    group: int = 0  # channels that share a coefficient of a row

    @classmethod
    def of(cls, target: Target, layers: int, target_layer_ids: tuple[int, ...], block: int, mask_id: int,
           intermediate: int | None = None, taps: int = 0, group: int = 0) -> "Shape":
        return cls(target.hidden, intermediate or target.intermediate, layers, target.heads, target.kv_heads,
                   target.head_dim, tuple(target_layer_ids), block, mask_id, target.eps, float(target.theta), taps,
                   group if taps else 0)

    def config(self, target: Target) -> dict:
        """config.json as the z-lab collection writes it."""
        convolutions = {"conv_kernel_size": self.taps, "conv_group_size": self.group} if self.taps else {}
        return convolutions | {
            "architectures": ["DFlashDraftModel"], "model_type": "qwen3", "hidden_act": "silu",
            "hidden_size": self.hidden, "intermediate_size": self.intermediate, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim,
            "vocab_size": target.vocab, "rms_norm_eps": self.eps, "rope_theta": self.theta, "rope_scaling": None,
            "max_position_embeddings": target.max_positions, "attention_bias": False,
            "attention_dropout": 0.0, "tie_word_embeddings": False, "use_sliding_window": False,
            "sliding_window": None, "layer_types": ["full_attention"] * self.layers, "torch_dtype": "bfloat16",
            "bos_token_id": target.bos_id, "eos_token_id": target.eos_id,
            "block_size": self.block, "num_target_layers": target.layers,
            "dflash_config": {"mask_token_id": self.mask_id, "target_layer_ids": list(self.target_layer_ids)},
        }


POSITIONS = 4096  # more than a training text and a block have
LAYER = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "self_attn.q_norm",
         "self_attn.k_norm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm",
         "post_attention_layernorm")
CONVOLUTIONS = "attention_conv", "mlp_conv"
CONVOLUTION = "kernel_projection", "base_kernel"


def rms_norm(x, weight, eps):
    return F.rms_norm(x, weight.shape, weight, eps)


@torch.compile
def project(x, norm, weights, q_norm, k_norm, cos, sin, eps):
    """Rows (B, R, H) -> their (q,) k, v heads (B, R, h, D), q and k normalised and rotated. norm None: x is already
    normalised."""
    head_dim, x = k_norm.shape[0], x if norm is None else rms_norm(x, norm, eps)
    *q, k, v = (F.linear(x, weight).unflatten(-1, (-1, head_dim)) for weight in weights)
    rotated = [rotate(rms_norm(y, weight, eps), cos, sin) for y, weight in zip((*q, k), (q_norm, k_norm)[-1 - len(q):],
                                                                               strict=True)]
    return (*rotated, v)


@torch.compile
def gated(x, gate, up, down):
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


@torch.compile
def finish(x, attended, o, post_norm, gate, up, down, eps):
    """The rest of a layer after its attention."""
    x = x + F.linear(attended, o)
    return x + gated(rms_norm(x, post_norm, eps), gate, up, down)


def convolve(x, own, base):
    """x (B, A, S, H): each row of a block and the rows before it, by the coefficients base (t, H) and own (B, A, S, t,
    G), rounded as `grouped_conv` does."""
    groups, found = own.shape[-1], 0.0
    rows = x.float().unflatten(-1, (groups, -1))
    for tap in range(min(len(base), x.shape[2])):
        before = F.pad(rows, (0, 0, 0, 0, tap, 0))[:, :, :x.shape[2]]
        found = found + (base[tap].float().unflatten(-1, (groups, -1)) + own[..., tap, :, None].float()) * before
    return found.flatten(-2).to(x.dtype)


@torch.compile
def convolve_in(x, norm, projection, base, width, eps):
    """Rows (B, R, H) -> a sublayer's input, and the coefficients of the convolution after it."""
    normed = rms_norm(x, norm, eps).unflatten(1, (-1, width))
    own = F.linear(normed, projection).unflatten(-1, (2, base.shape[1], -1))
    return convolve(normed, own[..., 0, :, :], base[0]).flatten(1, 2), own[..., 1, :, :]


@torch.compile
def convolve_out(x, added, own, base):
    """x plus a sublayer's output after its second convolution."""
    return x + convolve(added.unflatten(1, own.shape[1:3]), own, base[1]).flatten(1, 2)


class BlockAttention(torch.autograd.Function):
    """softmax over (context | own block) without the scores in memory: the CPU's flash attention over the context and a
    small product over the block, combined by their log-sum-exps. Given the combined output and log-sum-exp, either
    part's own backward is that of the whole (as in ring attention).
    """

    @staticmethod
    def forward(ctx, q, k, v, mask, k_block, v_block, blocks):
        scale, (b, h, rows, d) = q.shape[-1] ** -0.5, q.shape
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        far, far_lse = flash(q, k, v, 0.0, False, attn_mask=mask, scale=scale)
        grouped = q.reshape(b * h * blocks, rows // blocks, d)
        scores = torch.bmm(grouped, k_block.transpose(1, 2)).float().mul_(scale)
        near_lse = scores.logsumexp(-1).view(b, h, rows)
        lse = torch.logaddexp(far_lse, near_lse)
        odds = (scores - lse.reshape(b * h * blocks, -1, 1)).exp_().to(q.dtype)
        out = far * (far_lse - lse).exp_().to(q.dtype)[..., None] + torch.bmm(odds, v_block).view(q.shape)
        ctx.save_for_backward(q, k, v, mask, k_block, v_block, odds, out, lse)
        ctx.blocks = blocks
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, mask, k_block, v_block, odds, out, lse = ctx.saved_tensors
        scale, (b, h, rows, d) = q.shape[-1] ** -0.5, q.shape
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        grad = grad.contiguous()
        dq, dk, dv = flash(grad, q, k, v, out, lse, 0.0, False, attn_mask=mask, scale=scale)
        of_block = (b * h * ctx.blocks, rows // ctx.blocks)
        near = grad.view(*of_block, d)
        inner = (grad.float() * out.float()).sum(-1).view(*of_block, 1)
        ds = (torch.bmm(near, v_block.transpose(1, 2)).float().sub_(inner).mul_(odds.float()).mul_(scale)).to(q.dtype)
        dq = dq + torch.bmm(ds, k_block).view(q.shape)
        return (dq, dk, dv, None, torch.bmm(ds.transpose(1, 2), q.reshape(*of_block, d)),
                torch.bmm(odds.transpose(1, 2), near), None)


class HeadLoss(torch.autograd.Function):
    """Cross-entropy of a frozen LM head against a few weighted labels per row, in chunks, so that no (rows, vocabulary)
    tensor is kept.

    hidden (N, H); head (V, H); bias (V,) or None; labels (N, K) int64; shares (N, K) float32 summing to at most 1, the
    rest being labels that the head does not have; words: how many of the head's first rows can be drafted. Returns
    (the losses (N,) float32, the most likely of those rows (N,) int64).
    """

    @staticmethod
    def forward(ctx, hidden, head, bias, labels, shares, words):
        grad, losses, best = torch.empty_like(hidden), [], []
        for rows in torch.arange(len(hidden)).split(2048):
            at = slice(int(rows[0]), int(rows[-1]) + 1)
            logits = F.linear(hidden[at], head, bias)
            best.append(logits[:, :words].argmax(-1))
            odds = torch.softmax(logits, -1)
            found = odds.gather(1, labels[at])
            losses.append(-(found.float().clamp_min(1e-8).log() * shares[at]).sum(-1))
            wanted = F.embedding_bag(labels[at], head, mode="sum", per_sample_weights=shares[at].to(head.dtype))
            grad[at] = odds @ head * shares[at].sum(-1, keepdim=True).to(odds.dtype) - wanted
        ctx.save_for_backward(grad)
        best = torch.cat(best)
        ctx.mark_non_differentiable(best)
        return torch.cat(losses), best

    @staticmethod
    def backward(ctx, weight, _):
        return ctx.saved_tensors[0] * weight[:, None].to(ctx.saved_tensors[0].dtype), None, None, None, None, None


def stored(name: str) -> str:
    """A parameter's name in a checkpoint."""
    return name if name.endswith(CONVOLUTION[1]) else name + ".weight"


class TrainedDrafter(torch.nn.Module):
    """Parameters in float32 under z-lab's names, arithmetic in bfloat16. Features are divided by `feature_scale` (F *
    H,), which `tensors` multiplies into fc, so that fc learns from inputs of unit size."""

    def __init__(self, shape: Shape, final_norm: torch.Tensor, feature_scale: torch.Tensor, seed: int = 0):
        super().__init__()
        self.shape, s = shape, shape
        random = torch.Generator().manual_seed(seed)

        def matrix(rows, columns, gain=1.0):
            return torch.nn.Parameter(torch.randn(rows, columns, generator=random) * (gain * columns ** -0.5))

        def ones(size):
            return torch.nn.Parameter(torch.ones(size))

        q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
        named = {"fc": matrix(s.hidden, len(s.target_layer_ids) * s.hidden), "hidden_norm": ones(s.hidden),
                 "norm": torch.nn.Parameter(final_norm.float().cpu().clone())}
        for i in range(s.layers):
            made = (matrix(q, s.hidden), matrix(kv, s.hidden), matrix(kv, s.hidden), matrix(s.hidden, q, 0.0),
                    ones(s.head_dim), ones(s.head_dim), matrix(s.intermediate, s.hidden),
                    matrix(s.intermediate, s.hidden), matrix(s.hidden, s.intermediate, 0.0), ones(s.hidden),
                    ones(s.hidden))
            named |= {f"layers.{i}.{name}": value for name, value in zip(LAYER, made, strict=True)}
            for conv in CONVOLUTIONS if s.taps else ():
                base = torch.zeros(2, s.taps, s.hidden)
                base[:, 0] = 1.0  # at first a row is itself
                of = matrix(2 * s.taps * (s.hidden // s.group), s.hidden, 0.0), torch.nn.Parameter(base)
                named |= {f"layers.{i}.{conv}.{name}": value for name, value in zip(CONVOLUTION, of, strict=True)}
        self.names = list(named)
        self.weights = torch.nn.ParameterList(named.values())
        for name, table in zip(("cos", "sin"), rope_table(Rope(s.theta, s.head_dim), POSITIONS, "cpu"), strict=True):
            self.register_buffer(name, table, persistent=False)
        self.register_buffer("feature_scale", feature_scale.float().cpu().clone())

    def named(self) -> dict[str, torch.nn.Parameter]:
        return dict(zip(self.names, self.weights, strict=True))

    def tensors(self) -> dict[str, torch.Tensor]:
        """The checkpoint: bfloat16, z-lab's names."""
        out = {}
        for name, value in self.named().items():
            value = value.detach().float()
            if name == "fc":
                value = value / self.feature_scale
            out[stored(name)] = value.to(torch.bfloat16).cpu().contiguous()
        return out

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Loads the weights of a checkpoint that `tensors` wrote, under any feature scale. ValueError: it is of another
        shape."""
        mine = {stored(name): tuple(weight.shape) for name, weight in self.named().items()}
        if mine != (given := {name: tuple(tensor.shape) for name, tensor in tensors.items()}):
            name = next(name for name in sorted({*mine, *given}) if mine.get(name) != given.get(name))
            raise ValueError(f"{name} must be {mine.get(name, 'absent')}; got {given.get(name, 'none')}")
        for name, weight in self.named().items():
            value = tensors[stored(name)].float()
            weight.copy_(value * self.feature_scale.to(value.device) if name == "fc" else value)

    def forward(self, features: torch.Tensor, anchors: torch.Tensor, anchor_ids: torch.Tensor, width: int,
                embedding: torch.Tensor) -> torch.Tensor:
        """features (B, T, F * H) scaled; anchors, anchor_ids (B, A); -> normed hidden states (B, A, width - 1, H) of
        the masked positions."""
        s, (b, t, _), blocks = self.shape, features.shape, anchors.shape[1]
        w = {name: value.to(features.dtype) for name, value in self.named().items()}
        ids = torch.full((b, blocks, width), s.mask_id, device=features.device)
        ids[..., 0] = anchor_ids
        places = anchors[..., None] + torch.arange(width, device=features.device)
        cos, sin = self.cos.to(features.dtype), self.sin.to(features.dtype)
        row_cos, row_sin = cos[places].view(b, -1, 1, s.head_dim), sin[places].view(b, -1, 1, s.head_dim)
        attend = _Attention(s, anchors, t, width)
        context = F.rms_norm(F.linear(features, w["fc"]), (s.hidden,), w["hidden_norm"], s.eps)
        x = F.embedding(ids, embedding).view(b, blocks * width, s.hidden)
        for i in range(s.layers):
            q, k, v, o, q_norm, k_norm, gate, up, down, norm, post_norm = (
                w[f"layers.{i}.{name}"] for name in LAYER)
            far = project(context, None, (k, v), None, k_norm, cos[:t, None], sin[:t, None], s.eps)
            if not s.taps:
                near = project(x, norm, (q, k, v), q_norm, k_norm, row_cos, row_sin, s.eps)
                x = finish(x, attend(near[0], *far, *near[1:]), o, post_norm, gate, up, down, s.eps)
                continue
            (of_attention, attention_base), (of_mlp, mlp_base) = (
                [w[f"layers.{i}.{conv}.{name}"] for name in CONVOLUTION] for conv in CONVOLUTIONS)
            taken, own = convolve_in(x, norm, of_attention, attention_base, width, s.eps)
            near = project(taken, None, (q, k, v), q_norm, k_norm, row_cos, row_sin, s.eps)
            x = convolve_out(x, F.linear(attend(near[0], *far, *near[1:]), o), own, attention_base)
            taken, own = convolve_in(x, post_norm, of_mlp, mlp_base, width, s.eps)
            x = convolve_out(x, gated(taken, gate, up, down), own, mlp_base)
        masked = x.view(b, blocks, width, s.hidden)[:, :, 1:]
        return F.rms_norm(masked, (s.hidden,), w["norm"], s.eps)


class _Attention:
    """The mask of the module's docstring, made once for all layers of a pass."""

    def __init__(self, shape: Shape, anchors: torch.Tensor, context: int, width: int):
        self.shape, self.blocks, self.width, self.context = shape, anchors.shape[1], width, context
        self.group = shape.heads // shape.kv_heads
        seen = torch.arange(context, device=anchors.device) < anchors[..., None]  # (B, A, T)
        self.flash = anchors.device.type == "cpu"
        if self.flash:
            rows = seen.repeat_interleave(width * self.group, 1)[:, None]
            self.mask = torch.zeros(rows.shape, dtype=torch.bfloat16).masked_fill_(~rows, float("-inf"))
        else:
            own = torch.eye(self.blocks, dtype=torch.bool, device=anchors.device).repeat_interleave(width, 1)
            both = torch.cat((seen, own.expand(len(anchors), -1, -1)), -1)
            self.mask = both.repeat_interleave(width, 1)[:, None]

    def __call__(self, q, k, v, k_block, v_block):
        """q (B, A * S, heads, D), k, v (B, T, kv_heads, D), k_block, v_block (B, A * S, kv_heads, D) ->
        (B, A * S, heads * D)."""
        b, rows, heads, d = q.shape
        if not self.flash:
            # Every kernel that takes a mask takes as many key heads as query heads; not all take fewer.
            keys, values = (torch.cat(pair, 1).transpose(1, 2).repeat_interleave(self.group, 1)
                            for pair in ((k, k_block), (v, v_block)))
            out = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, self.mask)
            return out.transpose(1, 2).flatten(2)
        hkv, g = self.shape.kv_heads, self.group
        packed = q.view(b, rows, hkv, g, d).transpose(1, 2).reshape(b, hkv, rows * g, d)

        def of_block(x):
            return x.view(b, self.blocks, self.width, hkv, d).permute(0, 3, 1, 2, 4).reshape(-1, self.width, d)

        out = BlockAttention.apply(packed, k.transpose(1, 2), v.transpose(1, 2), self.mask, of_block(k_block),
                                   of_block(v_block), self.blocks)
        return out.view(b, hkv, rows, g, d).transpose(1, 2).reshape(b, rows, heads * d)
