"""Trains a DFlash drafter for a small Llama-like target: texts, features, training, checkpoint, one command.

    python -m tools.training --model smollm2 --answers build/texts --work build/drafter --minutes 85

Each stage keeps what it made under --work and is skipped when that is complete; training goes on from its last state,
so a run that was cut off, or whose --minutes is raised, is continued by the same command. The result is
<work>/checkpoint: config.json and safetensors in z-lab's format, the draft vocabulary, the list of training prompts.
"""

import argparse
from pathlib import Path

import torch

from dflash_decode.checkpoint import read_directory
from dflash_decode.checkpoint.tokenizer import load_tokenizer
from tools.training import checkpoint, plots
from tools.training.drafter import Shape, TrainedDrafter
from tools.training.features import Features, write_features
from tools.training.optimise import Recipe, Training
from tools.training.target import Target
from tools.training.write import read_answers, read_parts, write_texts


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--model", default="smollm2", help="the target: smollm2, a .gguf file or a checkpoint's directory")
    p.add_argument("--work", type=Path, default=Path("build/drafter"), help="folder of all stages and of the result")
    p.add_argument("--answers", type=Path, nargs="*", default=[],
                   help="conversations that the target has written: files, or folders of tools.training.write")
    p.add_argument("--write-tokens", type=int, default=0, help="have the target write so many tokens of answers first")
    p.add_argument("--prompts", type=Path, nargs="*", default=[], help="prompts to answer before the target's own")
    p.add_argument("--without", type=Path, nargs="*", default=[], help="prompts that must not be answered")
    p.add_argument("--limit", type=int, help="use only this many texts, for a rehearsal")
    p.add_argument("--layers", type=int, default=3)
    p.add_argument("--target-layer-ids", type=int, nargs="+", default=[1, 10, 19, 28],
                   help="target layers whose outputs the drafter reads")
    p.add_argument("--block-size", type=int, default=8)
    p.add_argument("--mask-token", default="<empty_output>", help="a token that the target never writes")
    p.add_argument("--start", type=Path, help="a checkpoint of the same shape to start from; held-out texts "
                   "are chosen among those that it was not trained on")
    p.add_argument("--early-share", type=float, default=Recipe.early_share, help="share of the time with short blocks")
    p.add_argument("--minutes", type=float, default=Recipe.minutes, help="time to train")
    p.add_argument("--texts-per-step", type=int, default=Recipe.texts)
    p.add_argument("--blocks-per-text", type=int, default=Recipe.blocks)
    p.add_argument("--matrix-rate", type=float, default=Recipe.matrix_rate, help="Muon's learning rate")
    p.add_argument("--vector-rate", type=float, default=Recipe.vector_rate, help="AdamW's learning rate")
    p.add_argument("--decay-from", type=float, default=Recipe.decay_from, help="share of the time with full rates")
    p.add_argument("--start-share", type=float, default=Recipe.start_share,
                   help="share of the weights of --start in the averaged result")
    p.add_argument("--visits", type=int, default=Recipe.visits, help="steps on a group of texts; after the first, "
                   "blocks begin where decoding would go on")
    p.add_argument("--vocabulary", type=int, default=Recipe.vocabulary, help="tokens that the drafter can draft")
    p.add_argument("--negatives", type=int, default=Recipe.negatives, help="random other tokens per step")
    p.add_argument("--noise", type=float, default=Recipe.noise, help="added to the features, which have unit size")
    p.add_argument("--shard-mb", type=int, help="write the weights in shards of at most this size")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return p.parse_args()


def collect_texts(args: argparse.Namespace) -> list[dict]:
    """The conversations of --answers, and those that the target writes."""
    found = read_answers(args.answers)
    if args.write_tokens:
        folder = args.work / "texts"
        write_texts(args.model, folder, args.write_tokens, args.prompts, args.without, device=args.device,
                    seed=args.seed)
        found += read_parts(folder)
    if not found:
        raise SystemExit("no training text: give --answers or --write-tokens")
    return found[:args.limit]


def main() -> None:
    args = arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    tokenizer, target = load_tokenizer(args.model), Target.load(args.model, args.device)
    mask = tokenizer.backend.token_to_id(args.mask_token)
    if mask is None:
        raise SystemExit(f"--mask-token must be one of the tokenizer's tokens; got {args.mask_token!r}")
    written = collect_texts(args)
    print(f"{len(written)} texts", flush=True)
    kept = args.work / "features"
    features = Features(kept) if (kept / "features.json").is_file() else write_features(
        target, tokenizer, written, sorted(args.target_layer_ids), kept)
    print(f"{len(features)} texts, {len(features.ids)} tokens with features", flush=True)
    recipe = Recipe(minutes=args.minutes, texts=args.texts_per_step, blocks=args.blocks_per_text, seed=args.seed,
                    vocabulary=args.vocabulary, matrix_rate=args.matrix_rate, negatives=args.negatives,
                    noise=args.noise, early_share=args.early_share, vector_rate=args.vector_rate,
                    decay_from=args.decay_from, start_share=args.start_share, visits=args.visits)
    shape = Shape.of(target, args.layers, features.target_layer_ids, args.block_size, mask)
    drafter = TrainedDrafter(shape, target.norm, features.scale, args.seed)
    if args.start:
        drafter.load_tensors(read_directory(args.start).tensors)
    training = Training(drafter, target, features, recipe, args.work, checkpoint.read_prompts(args.start))
    if training.resume():
        print(f"going on at step {training.step}, minute {training.seconds / 60:.1f}", flush=True)
    training.run()
    if args.start and args.start_share:
        training.average(read_directory(args.start).tensors)
    out = args.work / "checkpoint"
    checkpoint.write(out, drafter, target, training.vocabulary.ids, args.shard_mb)
    checkpoint.write_record(out, training, (row["prompt"] for row in written), args.start)
    plots.plot(training.history, out / "training.png")
    print(f"{out}: acceptance length {training.history[-1]['acceptance']:.3f} at random places of held-out answers")
