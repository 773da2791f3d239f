"""Model of the time of a DFlash step on another machine, from its bytes, products, messages and launches.

A step is a draft pass followed by a verify pass. Each part takes the longer of two times: its bytes over the bandwidth,
and its arithmetic over the matrix rate. Tensor parallelism divides both and adds two all-reduces per layer. Every layer
adds the gaps between its kernels. A step commits the acceptance length: tokens/s = batch x acceptance length / step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

# Launches of ours, as tests/bench/test_step_model.py counts them for Qwen3-8B: a layer's two norms, q/k norm and RoPE,
# activation, attention and the combination of its splits, four products, and for three of them the sum of K's chunks.
# Outside the layers a pass has the block's ids, embedding, last norm, head (2), verification; drafting eleven more.
KERNELS_A_LAYER, KERNELS_A_PASS, KERNELS_OF_DRAFTING = 13, 6, 11
# A dense MLP has four of them. With experts there are the router's product and its sum, the choice, and two, with one
# before them that sorts more than so many pairs of a row and an expert.
MORE_KERNELS_OF_EXPERTS, SORTED_APART = 5 - 4, 2048


@dataclass(frozen=True)
class Layers:
    """A stack of transformer layers. experts: 0 for a dense MLP, else the number of experts of width `mlp`."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    experts: int = 0
    chosen: int = 0

    @property
    def kv_weights(self) -> int:
        """The weights of one layer's key and value projections."""
        return 2 * self.hidden * self.kv_heads * self.head_dim

    @property
    def attention_weights(self) -> int:
        """The weights of one layer's query, output, key and value projections."""
        return 2 * self.hidden * self.heads * self.head_dim + self.kv_weights

    @property
    def mlp_weights(self) -> int:
        """The weights of one layer's MLP, or of one expert: gate, up, down."""
        return 3 * self.hidden * self.mlp

    def coverage(self, rows: int) -> float:
        """The expected number of experts of a layer that are read when each of `rows` tokens independently chooses
        `chosen` different ones at random."""
        return self.experts * (1 - (1 - self.chosen / self.experts) ** rows) if self.experts else 1.0

    def weights(self, rows: int) -> float:
        """The weights read by a pass of `rows` tokens, including the router of experts."""
        mlp = self.mlp_weights * self.coverage(rows) + self.hidden * self.experts
        return self.layers * (self.attention_weights + mlp)

    def active(self) -> int:
        """The weights that one token is multiplied with."""
        mlp = self.mlp_weights * (self.chosen if self.experts else 1) + self.hidden * self.experts
        return self.layers * (self.attention_weights + mlp)

    def kv_bytes(self, element: int = 2) -> int:
        """The bytes of one token in all layers' caches."""
        return self.layers * 2 * self.kv_heads * self.head_dim * element

    def attention_flops(self, context: int) -> int:
        """The arithmetic of one query row in all layers: scores and the weighted sum of values."""
        return self.layers * 4 * self.heads * self.head_dim * context


@dataclass(frozen=True)
class Geometry:
    """A target and its drafter.

    element: bytes of a target weight; those of its LM head and of the drafter have two. target_layer_ids: the target
    layers that the drafter reads. draft_vocab: rows of the draft head.
    """

    name: str
    target: Layers
    draft: Layers
    vocab: int
    block: int
    target_layer_ids: int
    element: int = 2
    draft_vocab: int | None = None

    @property
    def head(self) -> int:
        return self.vocab * self.target.hidden

    @property
    def draft_head(self) -> int:
        return (self.draft_vocab or self.vocab) * self.draft.hidden

    @property
    def features(self) -> int:
        """The weights of the projection of the target layers' outputs."""
        return self.target_layer_ids * self.target.hidden * self.draft.hidden

    @property
    def resident_bytes(self) -> float:
        """The bytes of target, drafter, and the target's LM head and embedding."""
        every = self.target.weights(10**9) * self.element
        return every + 2 * (2 * self.head + self.draft.weights(1) + self.features)


GEOMETRIES = {g.name: g for g in (
    Geometry("smollm2", Layers(30, 576, 9, 3, 64, 1536), Layers(3, 576, 9, 3, 64, 1536), 49152, 8, 4,
             draft_vocab=8192),
    Geometry("qwen3-8b", Layers(36, 4096, 32, 8, 128, 12288), Layers(5, 4096, 32, 8, 128, 12288), 151936, 16, 5),
    # transformers' MiniMaxM2Config; fp8 weights as the checkpoint has them. The drafter's MLP width is a guess that
    # makes 0.6 B parameters, which is what its page says.
    Geometry("minimax-m2.7", Layers(62, 3072, 48, 8, 128, 1536, experts=256, chosen=8),
             Layers(5, 3072, 48, 8, 128, 8192), 200064, 8, 5, element=1),
)}


@dataclass(frozen=True)
class Machine:
    """One device.

    gbps: memory bandwidth, 1e9 bytes/s.
    tflops: dense bfloat16; fp8 is twice that.
    link_gbps: bandwidth to the other devices, one direction.
    memory: GB.
    share: the share of bandwidth and rate that kernels reach.
    reduce_us: the time of an empty all-reduce.
    gap_us: the time between two kernels of a graph.
    """

    name: str
    gbps: float
    tflops: float
    link_gbps: float
    memory: float
    share: float = 0.85
    reduce_us: float = 8.0
    gap_us: float = 1.0

    def ideal(self) -> "Machine":
        """The roofline: only bytes and arithmetic."""
        return replace(self, share=1.0, reduce_us=0.0, gap_us=0.0, link_gbps=float("inf"))


# Makers' data sheets for the SXM parts: bandwidth, dense rate, NVLink in one direction, memory.
MACHINES = {m.name: m for m in (Machine("H100", 3350, 989, 450, 80), Machine("H200", 4800, 989, 450, 141),
                                Machine("B200", 8000, 2250, 900, 180))}


@dataclass(frozen=True)
class Step:
    """Microseconds by part. verify and draft hold their weights and arithmetic, *_kv the reads of the context."""

    verify: float
    verify_kv: float
    draft: float
    draft_kv: float
    draft_head: float
    draft_context: float
    all_reduce: float
    gaps: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())

    def tokens_per_s(self, batch: int, acceptance: float) -> float:
        return batch * acceptance / self.total * 1e6


def step(g: Geometry, machine: Machine, batch: int, context: int, block: int | None = None, tp: int = 1,
         drafting: bool = True) -> Step:
    """One step of `batch` requests with `context` tokens each. Baseline decoding is block=1, drafting=False."""
    rows, drafted = batch * (block or g.block), float(drafting)

    def us(nbytes: float, flops: float = 0.0, element: int = 2) -> float:
        rate = machine.tflops * (2 if element == 1 else 1)
        return max(nbytes / machine.gbps / 1e3, flops / rate / 1e6) / machine.share / tp

    def cache(layers: Layers) -> float:
        return us(batch * context * layers.kv_bytes(), rows * layers.attention_flops(context))

    def reduce(layers: Layers) -> float:
        """The time of the all-reduces, two per layer, in a ring."""
        if tp == 1:
            return 0.0
        moved = 2 * (tp - 1) / tp * rows * layers.hidden * 2
        return 2 * layers.layers * (machine.reduce_us + moved / machine.link_gbps / 1e3)

    t, d = g.target, g.draft
    projected = g.features + d.layers * d.kv_weights
    return Step(
        verify=us(t.weights(rows) * g.element, 2 * rows * t.active(), g.element) + us(2 * g.head, 2 * rows * g.head),
        verify_kv=cache(t), draft=drafted * us(2 * d.weights(rows), 2 * rows * d.active()),
        draft_kv=drafted * cache(d),
        draft_head=drafted * us(2 * g.draft_head, 2 * rows * g.draft_head),
        draft_context=drafted * us(2 * projected, 2 * rows * projected), all_reduce=reduce(t) + drafted * reduce(d),
        gaps=launches(g, drafting, rows) * machine.gap_us)


def launches(g: Geometry, drafting: bool = True, rows: int = 1) -> int:
    """The number of kernels in a step whose passes have `rows` tokens."""
    layers, t = g.target.layers + drafting * g.draft.layers, g.target
    more = t.layers * (MORE_KERNELS_OF_EXPERTS + (rows * t.chosen > SORTED_APART)) if t.experts else 0
    return layers * KERNELS_A_LAYER + more + KERNELS_A_PASS + drafting * KERNELS_OF_DRAFTING


def acceptance_of(histogram: Sequence[int], block: int | None = None) -> float:
    """The mean tokens per step, from the numbers of steps that committed 1, 2, ... tokens. A shorter block cuts the
    tokens of a step, if the drafts at its positions stay the same."""
    width = block or len(histogram)
    steps = sum(histogram)
    return sum(min(n, width) * count for n, count in enumerate(histogram, 1)) / steps if steps else 1.0


def fits(g: Geometry, machine: Machine, tp: int) -> bool:
    """Whether the weights leave a tenth of the memory for caches."""
    return g.resident_bytes / tp <= 0.9e9 * machine.memory
