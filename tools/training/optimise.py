"""The training loop: batches, schedule, evaluation and state."""

import heapq
import json
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from .drafter import HeadLoss, TrainedDrafter
from .features import Texts
from .replay import weights_to_rejection
from .target import Target

WARM_UP = 50  # steps
EASY = 0.2  # how often a block begins at a token that the target was sure of, beside 1 + EASY where it was not at all
OPEN = 32  # groups of texts between whose visits the others come
BAR = "{desc}: {percentage:.1f} %|{bar}| {elapsed}, {remaining} left{postfix}"


@dataclass(frozen=True)
class Recipe:
    minutes: float | None = 30.0  # None: as long as the steps take
    steps: int | None = None  # where the run ends if its minutes have not passed by then
    texts: int = 16  # a step
    blocks: int = 32  # a text, of the full block size
    early_block: int = 4  # block size at first
    early_share: float = 0.3  # of the time with early_block
    vocabulary: int = 8192  # most frequent tokens that the loss sees as labels
    negatives: int = 1024  # other tokens, drawn for each step, that stand for all that are no labels
    matrix_rate: float = 5e-3
    vector_rate: float = 1e-3
    decay_from: float = 0.5  # of the time, from where the learning rates fall linearly to 0
    hard: float = 0.5  # share of the loss on the text's own token; the rest on the target's most likely
    noise: float = 0.1  # normal, added to the features, whose size is 1: a text is seen several times
    start_share: float = 0.0  # of the weights that the run started from in its result
    visits: int = 1  # of a group of texts: after the first, blocks begin where decoding would go on
    seed: int = 0


class Vocabulary:
    """The tokens that a drafter is trained to draft: ids (n,) sorted, and place (V,), -1 for the rest."""

    def __init__(self, ids: torch.Tensor, total: int):
        self.ids, self.place = ids, torch.full((total,), -1)
        self.place[ids] = torch.arange(len(ids))


def most_frequent(features: Texts, which: list[int], size: int) -> torch.Tensor:
    """The ids (at most `size`,), sorted, of the most frequent tokens of these texts' answers."""
    counts = Counter()
    for i in which:
        counts.update(features.text(i)[features.starts[i]:].tolist())
    return torch.tensor(sorted(t for t, _ in counts.most_common(size)))


@dataclass(eq=False)
class Group:
    """Texts of a step. anchors (len(which), A): the places of their blocks, None for random ones."""

    which: list[int]
    anchors: torch.Tensor | None = None
    visits: int = 0


class Batch:
    """`which` texts with `blocks` anchors each, blocks of `width`. places (len(which), blocks): the anchors. Without
    them they are random: evenly, or else rather where the target was unsure, as in decoding, whose blocks begin where
    drafts were rejected."""

    def __init__(self, f: Texts, which: list[int], blocks: int, width: int, vocabulary: Vocabulary, hard: float,
                 draw: random.Random, device, places: torch.Tensor | None = None, evenly: bool = True):
        texts, place = f.batch(which), vocabulary.place
        device, rows = torch.device(device), torch.arange(len(which))[:, None]
        anchors = torch.empty((len(which), blocks), dtype=torch.long) if places is None else places
        for r, i in enumerate(which if places is None else ()):
            free = range(f.starts[i], f.length(i) - 1)
            odds = [0.0] * len(free) if evenly else texts.odds[r, free.start:free.stop, 0].tolist()
            # Without replacement: the largest of u ** (1 / weight).
            drawn = {at: draw.random() ** (1 / (EASY + 1 - sure)) for at, sure in zip(free, odds, strict=True)}
            chosen = heapq.nlargest(blocks, free, key=drawn.__getitem__)
            anchors[r] = torch.tensor(sorted(chosen + draw.choices(free, k=blocks - len(chosen))))
        lengths = torch.tensor([f.length(i) for i in which])[:, None]
        after = anchors[..., None] + torch.arange(1, width)
        inside = after < lengths[..., None]
        after = torch.where(inside, after, anchors[..., None])
        own = place[texts.ids[rows[..., None], after]]
        likely, odds = (found.cpu()[rows[..., None], after] for found in (texts.likely, texts.odds))
        likely = place[likely]
        odds = odds * (likely >= 0)
        odds = odds / odds.sum(-1, keepdim=True).clamp_min(1e-6)
        share = torch.cat(((own >= 0).float()[..., None] * hard, odds * (1 - hard)), -1)
        self.counts = inside.to(device)
        self.shares = (share * inside[..., None]).to(device)
        self.labels = torch.cat((own[..., None], likely), -1).clamp_min(0).to(device)
        self.known = (own >= 0).to(device)
        self.first = torch.tensor([f.starts[i] for i in which]).to(device)[:, None]
        self.last = (lengths - 2).to(device)
        self.states, self.anchors = texts.states.to(device), anchors.to(device)
        self.anchor_ids = texts.ids[rows, anchors].to(device)


def block_weights(width: int, device) -> torch.Tensor:
    """exp(-(k - 1) / gamma) for the k-th masked position, gamma = 4, about 5, 7 at blocks of 8, 10, 16 (DFlash,
    section 4.2 and appendix A.1)."""
    return torch.exp(-torch.arange(width - 1, device=device) / (1 + 3 / 8 * width))


class Training:
    """The state of a run: parameters, optimisers, measurements. `folder` stores it, so that a run can be resumed."""

    def __init__(self, drafter: TrainedDrafter, target: Target, features: Texts, recipe: Recipe, folder: Path,
                 seen: Collection[str] = (), vocabulary: torch.Tensor | None = None):
        """seen: prompts that the drafter was trained on before, which cannot be held out. vocabulary (n,): its draft
        vocabulary, by default the most frequent tokens of the answers."""
        self.drafter, self.features, self.recipe, self.folder = drafter.to(target.device), features, recipe, folder
        self.device, self.embedding = target.device, target.embedding
        order = list(range(len(features)))
        random.Random(recipe.seed).shuffle(order)
        greedy = [i for i in order if features.greedy[i] and features.prompts[i] not in seen]
        self.held_out = sorted(greedy[:min(96, len(greedy) // 10)])
        hidden = set(self.held_out)
        self.used = [i for i in order if i not in hidden]
        if len(self.used) < recipe.texts or not self.held_out:
            raise ValueError(f"training: texts must be at least {recipe.texts} for a step and some to hold out, greedy "
                             f"ones that the start was not trained on; got {len(self.used)} and {len(self.held_out)}")
        if vocabulary is None:
            vocabulary = most_frequent(features, self.used, recipe.vocabulary)
        self.vocabulary = Vocabulary(vocabulary, target.vocab)
        self.head = target.head[self.vocabulary.ids.to(target.device)].contiguous()
        self.others = target.head[(self.vocabulary.place < 0).to(target.device)]
        matrices = [p for p in drafter.parameters() if p.ndim == 2]
        vectors = [p for p in drafter.parameters() if p.ndim != 2]  # and the coefficients of convolutions
        self.optimisers = [
            torch.optim.Muon(matrices, lr=recipe.matrix_rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(vectors, lr=recipe.vector_rate, betas=(0.9, 0.95), weight_decay=0.0)]
        self.rates = [recipe.matrix_rate, recipe.vector_rate]
        self.step, self.seconds, self.history = 0, 0.0, []
        self.draw = random.Random(recipe.seed + 1)
        self.waiting: list[list[int]] = []  # batches that are left of this pass over the texts
        self.open: list[Group] = []
        self.noise = torch.Generator(self.device).manual_seed(recipe.seed + 2)

    def device_name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{torch.get_num_threads()} CPU threads"

    def save(self) -> None:
        state = {"weights": self.drafter.state_dict(), "optimisers": [o.state_dict() for o in self.optimisers],
                 "step": self.step, "seconds": self.seconds, "history": self.history, "draw": self.draw.getstate(),
                 "noise": self.noise.get_state(), "waiting": self.waiting,
                 "open": [(group.which, group.anchors, group.visits) for group in self.open], "run": self._run()}
        torch.save(state, self.folder / "state.tmp")
        (self.folder / "state.tmp").replace(self.folder / "state.pt")

    def _run(self) -> dict:
        """What must be the same when a run goes on."""
        return {"texts": self.features.digest, "longest text": self.features.longest,
                "shape": asdict(self.drafter.shape), "seed": self.recipe.seed,
                "draft vocabulary": self.vocabulary.ids.tolist(), "held-out texts": self.held_out,
                "texts per step": self.recipe.texts}

    def resume(self) -> bool:
        """Goes on from the state that `folder` has, if any, as if the run had not ended. ValueError: it is of another
        run."""
        file = self.folder / "state.pt"
        if not file.is_file():
            return False
        state = torch.load(file, map_location="cpu", weights_only=True)
        if "run" not in state:
            raise ValueError(f"{file} is of an earlier version: remove it, or use another folder")
        now, kept = self._run(), state["run"]
        if others := [name for name in now if kept.get(name) != now[name]]:
            raise ValueError(f"{file} is of a run that differs in {', '.join(others)}: remove it, or use another "
                             "folder")
        self.drafter.load_state_dict(state["weights"])
        if not self.features.take_scale(self.drafter.feature_scale.cpu()):
            raise ValueError(f"{file} is of a run that differs in the scale of its features: remove it, or use "
                             "another folder")
        for optimiser, kept in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(kept)
        self.step, self.seconds, self.history = state["step"], state["seconds"], state["history"]
        version, internal, gauss = state["draw"]
        self.draw.setstate((version, tuple(internal), gauss))
        self.noise.set_state(state["noise"])
        self.waiting, self.open = state["waiting"], [Group(*group) for group in state["open"]]
        return True

    def _batches(self) -> list[list[int]]:
        """Batches of texts of similar length, in random order: all texts, but for a few that fill no batch."""
        order, size, batches = self.draw.sample(self.used, len(self.used)), self.recipe.texts, []
        for start in range(0, len(order), size * 32):
            chunk = sorted(order[start:start + size * 32], key=self.features.length)
            groups = [chunk[k:k + size] for k in range(0, len(chunk) - size + 1, size)]
            self.draw.shuffle(groups)
            batches += groups
        return batches[::-1]

    def group(self) -> Group:
        """The next group of texts. Each comes recipe.visits times, with those of other groups in between."""
        self.open = [group for group in self.open if group.visits < self.recipe.visits]
        while len(self.open) < (OPEN if self.recipe.visits > 1 else 1):
            self.waiting = self.waiting or self._batches()
            self.open.append(Group(self.waiting.pop()))
        return self.draw.choice(self.open)

    def _negatives(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """LM-head rows of random tokens outside the vocabulary, and the log of the number of tokens that each stands
        for (sampled softmax). Without them a reader with the whole LM head drafts tokens that training never made
        unlikely.
        """
        n = min(self.recipe.negatives, len(self.others))
        if n == 0:
            return None
        chosen = torch.tensor(self.draw.sample(range(len(self.others)), n), device=self.device)
        return self.others[chosen], torch.tensor(math.log(len(self.others) / n))

    @staticmethod
    def _accepted(batch: Batch, best: torch.Tensor) -> torch.Tensor:
        """(B, A): the drafts of each block that are the text's, up to the first that is not."""
        right = (best == batch.labels[..., 0].flatten()).view(batch.counts.shape)
        return (right & batch.counts & batch.known).long().cumprod(-1).sum(-1)

    def _drafted(self, batch: Batch, width: int,
                 others: tuple[torch.Tensor, torch.Tensor] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The losses (B, A, width - 1) of the masked positions, and how many drafts of each block are accepted (B, A).
        others: LM-head rows that the loss has beside the vocabulary's, and their bias."""
        hidden = self.drafter(batch.states, batch.anchors, batch.anchor_ids, width, self.embedding).flatten(0, 2)
        head, bias = self.head, None
        if others is not None:
            head, bias = torch.cat((head, others[0])), torch.zeros(len(head) + len(others[0])).to(head)
            bias[len(self.head):] = others[1]
        losses, best = HeadLoss.apply(hidden, head, bias, batch.labels.flatten(0, 2), batch.shares.flatten(0, 2),
                                      len(self.head))
        return losses.view(batch.counts.shape), self._accepted(batch, best)

    @staticmethod
    def _mean(losses: torch.Tensor, weight: torch.Tensor, batch: Batch) -> torch.Tensor:
        weight = weight * batch.counts
        return (losses * (weight / weight.sum())).sum()

    def _loss(self, batch: Batch, width: int) -> torch.Tensor:
        if self.recipe.noise:
            batch.states.add_(torch.randn(batch.states.shape, generator=self.noise, device=self.device,
                                          dtype=batch.states.dtype), alpha=self.recipe.noise)
        losses, accepted = self._drafted(batch, width, self._negatives())
        if self.recipe.visits == 1:
            return self._mean(losses, block_weights(width, self.device), batch)
        following = batch.anchors + accepted + 1
        self.following = torch.where(following > batch.last, batch.first, following).cpu()
        return self._mean(losses, weights_to_rejection(accepted, width), batch)

    @torch.no_grad()
    def evaluate(self) -> dict:
        """At random anchors of held-out greedy texts: loss, acceptance length, and the acceptance rate by position
        (given that all earlier drafts were accepted)."""
        draw, width = random.Random(0), self.drafter.shape.block
        losses, runs, tried = [], torch.zeros(width - 1), torch.zeros(width - 1)
        ranked = sorted(self.held_out, key=self.features.length)
        for start in range(0, len(ranked), 16):
            batch = Batch(self.features, ranked[start:start + 16], 32, width, self.vocabulary, 1.0, draw, self.device)
            found, accepted = self._drafted(batch, width)
            losses.append(self._mean(found, block_weights(width, self.device), batch).item())
            run = (torch.arange(width - 1, device=self.device) < accepted[..., None]).long()
            before = torch.cat((torch.ones_like(run[..., :1]), run[..., :-1]), -1) * batch.counts
            runs += run.sum((0, 1)).float().cpu()
            tried += before.sum((0, 1)).float().cpu()
        blocks = float(tried[0])
        return {"step": self.step, "minutes": self.seconds / 60, "held_out_loss": sum(losses) / len(losses),
                "acceptance": 1 + float(runs.sum()) / blocks,
                "by_position": (runs / tried.clamp_min(1)).tolist()}

    def advance(self, group: Group, share: float) -> float:
        """One step on a group, after a `share` of the time; returns its loss. Moves the group's anchors to where
        decoding would go on, if it is visited again: rejected drafts then come as often as in decoding, which they do
        not at random places. Then only drafts up to the first rejected one count in full."""
        r, block = self.recipe, self.drafter.shape.block
        width = r.early_block if share < r.early_share else block
        falling = min(1.0, max(0.0, (1 - share) / (1 - r.decay_from)))
        for optimiser, rate in zip(self.optimisers, self.rates, strict=True):
            for parameters in optimiser.param_groups:
                parameters["lr"] = rate * falling * min(1.0, (self.step + 1) / WARM_UP)
        blocks = r.blocks * block // width
        walks = group.anchors is not None and group.anchors.shape[1] == blocks
        loss = self._loss(Batch(self.features, group.which, blocks, width, self.vocabulary, r.hard, self.draw,
                                self.device, group.anchors if walks else None, r.visits == 1), width)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.drafter.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.step += 1
        group.visits += 1
        if r.visits > 1:
            group.anchors = self.following
        if not math.isfinite(value := loss.item()):
            raise FloatingPointError(f"step {self.step}: the loss is {value}")
        return value

    def average(self, start: Mapping[str, torch.Tensor]) -> None:
        """Sets the result to recipe.start_share of the weights `start` plus the rest of the trained weights, which
        keeps part of what the run forgot. The saved state remains the trained one."""
        trained = {name: weight.clone() for name, weight in self.drafter.state_dict().items()}
        self.drafter.load_tensors(start)
        with torch.no_grad():
            for name, weight in self.drafter.state_dict().items():
                if weight.is_floating_point():
                    weight.copy_(torch.lerp(trained[name], weight, self.recipe.start_share))
        self.history.append(self.evaluate() | {"loss": self.history[-1]["loss"]})

    def share(self) -> float:
        """How much of the run is done: of its minutes or of its steps, whichever end it."""
        r = self.recipe
        done = [part / whole for part, whole in ((self.seconds / 60, r.minutes), (self.step, r.steps)) if whole]
        if not done:
            raise ValueError("training: one of minutes and steps must be given; got neither")
        return max(done)

    def run(self, evaluations: int = 24, save_every: float = 120.0, saved: Callable[[], None] = lambda: None) -> None:
        """Trains until the recipe's minutes or steps are reached, including those of earlier runs. The state is kept
        every `save_every` seconds, after which saved() is called."""
        share, last, losses = self.share(), time.perf_counter(), []
        due = share
        bar = tqdm(total=100.0, initial=round(100 * share, 1), desc="training", bar_format=BAR)
        while share < 1:
            begun = time.perf_counter()
            losses.append(self.advance(self.group(), share))
            self.seconds += time.perf_counter() - begun
            share = self.share()
            if share >= min(due, 1):
                due = share + 1 / evaluations
                self.history.append(self.evaluate() | {"loss": sum(losses) / len(losses)})
                tqdm.write(json.dumps(self.history[-1]))
                losses = losses[-1:]
            if time.perf_counter() - last > save_every:
                self.save()
                saved()
                last = time.perf_counter()
            bar.n = min(round(100 * share, 1), bar.total)
            bar.set_postfix(step=self.step, loss=f"{losses[-1]:.3f}", refresh=False)
            bar.update(0)
        self.save()
        bar.close()
