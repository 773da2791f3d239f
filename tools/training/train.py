"""Trains a DFlash drafter for a target: texts, features, training, checkpoint, one command.

    python -m tools.training --model smollm2 --answers build/texts --work build/drafter --minutes 85
    python -m tools.training --config recipe.toml

Each stage keeps what it made under --work and is skipped when that is complete; training goes on from its last state,
so a run that was cut off, or whose --minutes or --steps is raised, is continued by the same command. The result is
<work>/checkpoint: config.json and safetensors in z-lab's format, the draft vocabulary, the list of training prompts,
and a plot. A file of --config names options and their values in TOML; the command line goes before it.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import tomllib
import torch

from dflash_decode.checkpoint import CheckpointError, read_directory
from dflash_decode.checkpoint.tokenizer import Tokenizer, load_tokenizer
from dflash_decode.model.config import read_draft_config
from dflash_decode.model.vocabulary import read_vocabulary
from tools.training import checkpoint, plots
from tools.training.drafter import Shape, TrainedDrafter
from tools.training.features import Features, LiveTexts, Texts, digest_of, write_features
from tools.training.optimise import Recipe, Training
from tools.training.target import Target, load_target
from tools.training.texts import ANSWER, ROOM
from tools.training.write import answer_tokens, read_answers, read_parts, read_prompts, variables, write_texts

WRITTEN = "written.json"  # what had been asked for when the target had written it


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--config", type=Path, help="a TOML file of these options, without the dashes")
    p.add_argument("--model", default="smollm2", help="the target: smollm2, a Llama's .gguf file or the "
                   "Hugging Face directory of any family")
    p.add_argument("--work", type=Path, default=Path("build/drafter"), help="folder of all stages")
    p.add_argument("--checkpoint", type=Path, help="folder of the result; by default <work>/checkpoint")
    p.add_argument("--answers", type=Path, nargs="*", default=[],
                   help="conversations that the target has written: files, or folders of tools.training.write")
    p.add_argument("--write-tokens", type=int, default=0, help="have the target write so many tokens of answers first")
    p.add_argument("--write-minutes", type=float, default=math.inf, help="but for at most so long")
    p.add_argument("--answer-tokens", type=answer_tokens, default=ANSWER, help="longest answer that it writes; texts "
                   f"are cut to so many tokens and {ROOM} before them")
    p.add_argument("--template", type=variables, default={}, help="variables of the chat template for what it writes, "
                   """as JSON: '{"enable_thinking": false}'""")
    p.add_argument("--prompts", type=Path, nargs="*", default=[], help="prompts to answer before the target's own")
    p.add_argument("--without", type=Path, nargs="*", default=[], help="prompts that must not be answered; texts with "
                   "them are left out")
    p.add_argument("--limit", type=int, help="use only this many texts, for a rehearsal")
    p.add_argument("--features", choices=("stored", "live"), help="keep the target's hidden states on disk, or compute "
                   "them for every step; by default stored on a CPU, live on a GPU")
    p.add_argument("--layers", type=int, default=3)
    p.add_argument("--target-layer-ids", type=int, nargs="+", help="target layers whose outputs the drafter reads; by "
                   "default four, from the second to the last but one")
    p.add_argument("--block-size", type=int, default=8)
    p.add_argument("--intermediate", type=int, help="size of the drafter's MLPs; by default the target's")
    p.add_argument("--conv-taps", type=int, default=0, help="rows of a block that each of DFlash2's convolutions "
                   "mixes; by default there are none, as in DFlash")
    p.add_argument("--conv-group", type=int, default=16, help="channels that share a coefficient of a row")
    p.add_argument("--mask-token", default="<empty_output>", help="a token that the target never writes, or its id")
    p.add_argument("--start", type=Path, help="a checkpoint of the same shape to start from, whose draft "
                   "vocabulary is kept; held-out texts are chosen among those that it was not trained on")
    p.add_argument("--early-share", type=float, help="share of the time with short blocks; by default "
                   f"{Recipe.early_share}, and 0 with --start")
    p.add_argument("--minutes", type=float, help=f"time to train; by default {Recipe.minutes:g}, without --steps")
    p.add_argument("--steps", type=int, help="end after so many steps, if the minutes have not passed by then")
    p.add_argument("--texts-per-step", type=int, default=Recipe.texts)
    p.add_argument("--blocks-per-text", type=int, default=Recipe.blocks)
    p.add_argument("--matrix-rate", type=float, default=Recipe.matrix_rate, help="Muon's learning rate")
    p.add_argument("--vector-rate", type=float, default=Recipe.vector_rate, help="AdamW's learning rate")
    p.add_argument("--decay-from", type=float, default=Recipe.decay_from, help="share of the time with full rates")
    p.add_argument("--start-share", type=float, default=Recipe.start_share,
                   help="share of the weights of --start in the averaged result")
    p.add_argument("--visits", type=int, default=Recipe.visits, help="steps on a group of texts; after the first, "
                   "blocks begin where decoding would go on")
    p.add_argument("--vocabulary", type=int, help="tokens that the drafter can draft, the most frequent ones of the "
                   f"answers; by default {Recipe.vocabulary:,}, or those of --start")
    p.add_argument("--negatives", type=int, default=Recipe.negatives, help="random other tokens per step")
    p.add_argument("--noise", type=float, default=Recipe.noise, help="added to the features, which have unit size")
    p.add_argument("--save-seconds", type=float, default=120.0, help="how often the state and a checkpoint are written")
    p.add_argument("--shard-mb", type=int, help="write the weights in shards of at most this size")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = p.parse_args(given)
    if args.config:
        # A second reading: what the command line names goes before the file, and the file before the defaults.
        p.set_defaults(**from_file(p, args.config))
        args = p.parse_args(given)
    return complete(p, args)


def complete(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """Fills in what depends on other options, and refuses what does not go together."""
    try:
        kept = args.draft_vocabulary = read_vocabulary(args.start) if args.start else None
    except CheckpointError as error:
        parser.error(str(error))
    if kept is not None and args.vocabulary is not None:
        parser.error(f"--vocabulary must be left out with --start, whose {len(kept):,} tokens are kept; "
                     f"got {args.vocabulary}")
    if args.vocabulary is None:
        args.vocabulary = Recipe.vocabulary if kept is None else len(kept)
    if args.early_share is None:
        args.early_share = 0.0 if args.start else Recipe.early_share
    if args.block_size < 2:
        parser.error(f"--block-size must be at least 2; got {args.block_size}")
    for name in ("minutes", "steps"):
        if (value := getattr(args, name)) is not None and value <= 0:
            parser.error(f"--{name} must be positive; got {value}")
    if args.minutes is None and args.steps is None:
        args.minutes = Recipe.minutes
    return args


def from_file(parser: argparse.ArgumentParser, file: Path) -> dict[str, object]:
    """The options that a TOML file names, as the command line would give them."""
    actions = {action.dest: action for action in parser._actions}
    found: dict[str, object] = {}
    for name, value in tomllib.loads(file.read_text(encoding="utf-8")).items():
        action = actions.get(name.replace("-", "_"))
        if action is None or action.dest in ("help", "config"):
            parser.error(f"{file}: option must be one of --help's; got {name}")
        values = value if isinstance(value, list) else [value]
        if isinstance(value, list) != (action.nargs is not None):
            parser.error(f"{file}: {name} must be {'a list' if action.nargs else 'one value'}; got {value!r}")
        try:
            made = [(action.type or str)(one if isinstance(one, str) else json.dumps(one)) for one in values]
        except argparse.ArgumentTypeError as error:
            parser.error(f"{file}: {name} {error}")
        except (ValueError, TypeError):
            parser.error(f"{file}: {name} must be of type {action.type.__name__}; got {value!r}")
        if action.choices and any(one not in action.choices for one in made):
            parser.error(f"{file}: {name} must be one of {', '.join(action.choices)}; got {value!r}")
        found[action.dest] = made if action.nargs else made[0]
    return found


def to_write(args: argparse.Namespace) -> str | None:
    """What the target is still asked to write: None if nothing, or if that stage has ended, by tokens or by time."""
    asked = json.dumps([args.write_tokens, args.write_minutes, args.answer_tokens, args.template])
    done = args.work / "texts" / WRITTEN
    return asked if args.write_tokens and not (done.is_file() and done.read_text() == asked) else None


def collect_texts(args: argparse.Namespace) -> list[dict]:
    """The conversations of --answers, and those that the target writes, but for those with prompts of --without."""
    found = read_answers(args.answers)
    if args.write_tokens:
        found += read_parts(args.work / "texts")
    never = {prompt for file in args.without for prompt in read_prompts(file)}
    kept = [row for row in found if not never & {row["prompt"], *(prompt for prompt, _ in row.get("before", ()))}]
    if len(kept) < len(found):
        print(f"{len(found) - len(kept)} texts are left out: they have prompts of --without")
    if not (found := kept):
        raise SystemExit("no training text: give --answers or --write-tokens")
    return found[:args.limit]


def mask_of(tokenizer: Tokenizer, target: Target, name: str) -> int:
    mask = int(name) if name.isdigit() else tokenizer.token_id(name)
    if mask is None or mask >= target.vocab:
        raise SystemExit(f"--mask-token must be one of the tokenizer's, or an id below {target.vocab}; got {name!r}")
    return mask


def layers_of(target: Target, given: Sequence[int] | None) -> list[int]:
    """The layers whose outputs are features. The last layer's would be normed by some models, so it is none of them."""
    last = target.layers - 2
    layers = sorted(set(given or (1 + i * (last - 1) // 3 for i in range(4))))
    if not 0 <= layers[0] <= layers[-1] <= last:
        raise SystemExit(f"--target-layer-ids must be between 0 and {last}, the last layer but one; got {layers}")
    return layers


def check_shape(shape: Shape, target: Target, start: Path | None) -> None:
    """Refuses a drafter that our own loop would, or that is not of the shape of the one that it starts from."""
    try:
        made = read_draft_config(config := shape.config(target))
        if start is not None:
            before = read_draft_config(kept := json.loads((start / "config.json").read_text()))
            if before != made:
                names = [name for name in config | kept if config.get(name) != kept.get(name)]
                raise SystemExit(f"--start must have the shape of the run; {start} has another {', '.join(names)}")
    except (ValueError, NotImplementedError, OSError) as error:
        raise SystemExit(f"the drafter: {error}") from None


def features_of(args: argparse.Namespace, target: Target, tokenizer: Tokenizer, texts: list[dict],
                layers: list[int]) -> Texts:
    how, kept = args.features or ("live" if target.device.type == "cuda" else "stored"), args.work / "features"
    longest = ROOM + args.answer_tokens
    if how == "live":
        return LiveTexts(target, tokenizer, texts, layers, longest)
    if not (kept / "features.json").is_file():
        return write_features(target, tokenizer, texts, layers, kept, longest)
    found = Features(kept)
    if (found.digest, found.target_layer_ids, found.longest) != (digest_of(texts), tuple(layers), longest):
        raise SystemExit(f"{kept} has features of other texts, of other layers than {layers}, or cut to another length "
                         f"than {longest}: remove it, or use another --work")
    return found


def main() -> None:
    args = arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    tokenizer, target = load_tokenizer(args.model), load_target(args.model, args.device)
    mask, layers = mask_of(tokenizer, target, args.mask_token), layers_of(target, args.target_layer_ids)
    shape = Shape.of(target, args.layers, tuple(layers), args.block_size, mask, args.intermediate,
                     args.conv_taps, args.conv_group)
    check_shape(shape, target, args.start)
    if asked := to_write(args):
        del target  # so that it is not in memory twice while it writes
        write_texts(args.model, args.work / "texts", args.write_tokens, args.prompts, args.without, device=args.device,
                    seed=args.seed, minutes=args.write_minutes, budget=args.answer_tokens, template=args.template)
        (args.work / "texts" / WRITTEN).write_text(asked)
        target = load_target(args.model, args.device)
    written = collect_texts(args)
    print(f"{len(written)} texts", flush=True)
    features = features_of(args, target, tokenizer, written, layers)
    print(f"{len(features)} texts of {len(features.ids)} tokens", flush=True)
    recipe = Recipe(minutes=args.minutes, steps=args.steps, texts=args.texts_per_step, blocks=args.blocks_per_text,
                    seed=args.seed, vocabulary=args.vocabulary, matrix_rate=args.matrix_rate, noise=args.noise,
                    negatives=args.negatives, early_share=args.early_share, vector_rate=args.vector_rate,
                    decay_from=args.decay_from, start_share=args.start_share, visits=args.visits)
    drafter = TrainedDrafter(shape, target.norm, features.scale, args.seed)
    try:
        if args.start:
            drafter.load_tensors(read_directory(args.start).tensors)
        training = Training(drafter, target, features, recipe, args.work, checkpoint.read_prompts(args.start),
                            args.draft_vocabulary)
        if training.resume():
            print(f"going on at step {training.step}, minute {training.seconds / 60:.1f}", flush=True)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    out = args.checkpoint or args.work / "checkpoint"
    checkpoint.write_prompts(out, (row["prompt"] for row in written), args.start)

    def keep() -> None:
        checkpoint.write(out, drafter, target, training.vocabulary.ids, args.shard_mb)
        checkpoint.write_record(out, training, args.start)
        plots.plot(training.history, out / "training.png")

    training.run(save_every=args.save_seconds, saved=keep)
    if args.start and args.start_share:
        training.average(read_directory(args.start).tensors)
    keep()
    print(f"{out}: acceptance length {training.history[-1]['acceptance']:.3f} at random places of held-out answers")
