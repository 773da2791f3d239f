"""Seeded mutations of small checkpoints, and what loading them does.

`python -m tests.support.mutations COUNT SEED` tries COUNT files and prints {"outcomes": ..., "faults": [...]}:
a fault is an exception that is not documented, more memory than a bound, or more processor time than a bound for one
file.
"""

import contextlib
import json
import math
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dflash_decode.checkpoint import CheckpointError, load_checkpoint
from dflash_decode.checkpoint.gguf.file import load as load_gguf
from dflash_decode.loop import Decoder
from dflash_decode.model.dflash2 import FILE as SELECTOR
from dflash_decode.model.dflash2 import write_selector
from dflash_decode.model.drafter import Drafter
from dflash_decode.model.native import NativeTarget
from dflash_decode.requests import Request
from dflash_decode.session import drafter_for
from tests.support import tiny
from tests.support.gguf_files import write_gguf

MEMORY, SECONDS = 2 << 30, 10.0  # beyond what the process has when it begins; of the processor, for one file
VALUES = [None, True, False, "", "x", "yarn", "1", [], {}, [1], [[]], {"a": 1}, {"rope_type": "yarn", "factor": 2.0},
          -1, 0, 1, 2, 3, 7, 64, 65_535, 10**6, 10**8, 2**31 - 1, 2**31, 2**60, 2**63, 10**400, -(10**30), 0.0, -0.0,
          0.5, -0.5, 1.5, 1e-45, 1e-30, 1e39, 1e308, math.nan, math.inf, -math.inf, "\ud800", "a\0b", "..", "x" * 3000]
NAMES = ["rope_scaling", "rope_parameters", "rope_theta", "layer_types", "sliding_window", "use_sliding_window",
         "max_window_layers", "rotary_dim", "partial_rotary_factor", "is_causal", "causal", "use_swa", "block_size",
         "num_target_layers", "target_layer_ids", "mask_token_id", "head_dim", "dflash_config", "architectures",
         "draft_vocab_size", "has_lm_head", "quantization_config", "tie_word_embeddings", "attention_bias", "mlp_bias",
         "weight_map", "token_ids", "rms_norm_eps", "hidden_act", "output_multiplier", "final_logit_softcapping",
         "speculators_model_type", "transformer_layer_config", "projector_type", "mask_token",
         "sliding_window_non_causal", "selector_rank", "conv_kernel_size", "input_embedding_scale"]
WORDS = [0, 1, 2, 8, 9, 255, 2**16, 2**22, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**60, 2**63 - 1, 2**63, 2**64 - 1,
         0x7FC00000, 0x7F800000, 0x80000000, 0x3F800000]


def mutate_bytes(dice: random.Random, content: bytes, head: int) -> bytes:
    """One to three changes, most of them in the first `head` bytes."""
    data = bytearray(content)
    for _ in range(dice.randint(1, 3)):
        at = dice.randrange(max(min(len(data), head if dice.random() < 0.9 else len(data)), 1))
        kind = dice.randrange(6)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << dice.randrange(8)
        elif kind == 1:
            width = dice.choice((4, 8))
            data[at:at + width] = struct.pack("<Q", dice.choice(WORDS) & (2**(8 * width) - 1))[:width]
        elif kind == 2:
            del data[at:at + dice.choice((1, 4, 8, 100))]
        elif kind == 3:
            data[at:at] = dice.randbytes(dice.choice((1, 4, 8, 100)))
        elif kind == 4:
            data[at:at] = data[at:at + dice.choice((1, 16, 200))]
        elif dice.random() < 0.3:
            del data[at:]
    return bytes(data)


def mutate_tree(dice: random.Random, value: object) -> object:
    """The JSON value with one to three parts replaced, removed, renamed or added."""
    value = json.loads(json.dumps(value))
    for _ in range(dice.choice((1, 1, 2, 3))):
        place = value
        while isinstance(place, (dict, list)) and place:
            keys = list(place) if isinstance(place, dict) else range(len(place))
            key = dice.choice(list(keys))
            if isinstance(place[key], (dict, list)) and dice.random() < 0.7:
                place = place[key]
                continue
            change, new = dice.randrange(6), dice.choice(VALUES)
            if change == 0:
                del place[key]
            elif change == 1 and isinstance(place, dict):
                place[dice.choice(NAMES)] = new
            elif change == 2 and isinstance(place, dict):
                place[dice.choice(NAMES)] = place.pop(key)
            elif change == 3:
                place[key] = [place[key]] * dice.choice((1, 2, 4))
            elif change == 4 and type(place[key]) in (int, float) and abs(place[key]) < 1e15:
                place[key] *= dice.choice((2, -1, 0.5, 10**6))
            else:
                place[key] = new
            break
    return value


def write_json(dice: random.Random, file: Path, value: object) -> None:
    if dice.random() < 0.25:
        file.write_bytes(mutate_bytes(dice, file.read_bytes(), 10**6))
    else:
        text = json.dumps(mutate_tree(dice, value))
        digits = dice.choice((300, 4200, 4400, 20_000))
        file.write_text(text.replace("1000", "9" * digits, 1) if dice.random() < 0.03 else text)


def write_safetensors(dice: random.Random, file: Path) -> None:
    content = file.read_bytes()
    length = struct.unpack_from("<Q", content)[0]
    if dice.random() < 0.4:
        file.write_bytes(mutate_bytes(dice, content, 8 + length))
        return
    header = json.loads(content[8:8 + length])
    if dice.random() < 0.5:
        name = dice.choice(list(header))
        header[name]["dtype"] = dice.choice(["U8", "U16", "I32", "F8_E4M3", "F4", "F16", "F32", "F64", "C64", "BOOL"])
    else:
        header = mutate_tree(dice, header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length:])


class Bases:
    """Good checkpoints, and how each part is mutated and loaded."""

    def __init__(self, folder: Path):
        self.folder = folder
        target, draft = tiny.write_target(folder / "target"), tiny.write_drafter(folder / "draft")
        self._shard(target, folder / "shards")
        vocabulary = {"token_ids": list(range(0, tiny.VOCAB, 3))}
        (draft / "draft_vocabulary.json").write_text(json.dumps(vocabulary))
        books = torch.randn(3, len(vocabulary["token_ids"]), 6)
        write_selector(draft, books[0], books[1], torch.randn(6, tiny.HIDDEN), 5)
        for arch in ("llama", "qwen3"):
            write_gguf(folder / f"{arch}.gguf", arch, ARCH__rope__scaling__type="yarn", ARCH__rope__scaling__factor=2.0)
        good = load_checkpoint(target)
        self.target = NativeTarget(good.config, good.tensors)

    @staticmethod
    def _shard(source: Path, folder: Path) -> None:
        folder.mkdir()
        shutil.copy(source / "config.json", folder)
        tensors, where = load_file(source / "model.safetensors"), {}
        for i in range(2):
            part = dict(sorted(tensors.items())[i::2])
            save_file(part, folder / f"s{i}.safetensors")
            where |= {name: f"s{i}.safetensors" for name in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))

    def load_target(self, folder: Path) -> None:
        found = load_checkpoint(folder)
        with documented():
            target = NativeTarget(found.config, found.tensors)
        self._decode(target)

    def load_draft(self, folder: Path) -> None:
        found = load_checkpoint(folder)
        self._decode(self.target, drafter_for(self.target, found, "model", lambda text: None))

    def load_gguf(self, folder: Path) -> None:
        found = load_gguf(folder / "m.gguf", torch.float32)
        with documented():
            target = NativeTarget(found.config, found.tensors)
        self._decode(target)

    @staticmethod
    def _decode(target: NativeTarget, drafter: Drafter | None = None) -> None:
        """What loads also runs."""
        decoder = Decoder(target, drafter, max_batch=1, max_context=32, page_size=8)
        for _ in decoder.stream([Request(0, [1, 2], 4)]):
            pass

    def attempt(self, dice: random.Random, folder: Path) -> tuple[str, object]:
        """(what is mutated, a call that loads it), written to `folder`."""
        kind = dice.choice(["config", "config", "weights", "index", "draft", "draft", "vocabulary", "selector",
                            "gguf", "gguf", "gguf"])
        if kind == "gguf":
            content = (self.folder / f"{dice.choice(('llama', 'qwen3'))}.gguf").read_bytes()
            (folder / "m.gguf").write_bytes(mutate_bytes(dice, content, 3200))
            return kind, self.load_gguf
        base = {"index": "shards", "draft": "draft", "vocabulary": "draft", "selector": "draft"}.get(kind, "target")
        shutil.copytree(self.folder / base, folder, dirs_exist_ok=True)
        if kind in ("weights", "selector"):
            write_safetensors(dice, folder / SELECTOR if kind == "selector" else folder / "model.safetensors")
        else:
            file = folder / {"index": "model.safetensors.index.json", "vocabulary": "draft_vocabulary.json"}.get(
                kind, "config.json")
            write_json(dice, file, json.loads(file.read_text()))
        return kind, self.load_draft if base == "draft" else self.load_target


@contextlib.contextmanager
def documented():
    """What a target and a drafter document, as the session makes it a CheckpointError."""
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        raise CheckpointError(str(error)) from error


def trial(bases: Bases, seed: str) -> tuple[str, str]:
    """(what was mutated, what came of it): "loaded", "refused", or a fault."""
    dice = random.Random(seed)
    with tempfile.TemporaryDirectory(dir=bases.folder) as name:
        kind, load = bases.attempt(dice, Path(name))
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        try:
            load(Path(name))
            return kind, "loaded"
        except CheckpointError as error:
            str(error).encode()
            return kind, "refused" if len(str(error)) <= 1000 else f"an error of {len(str(error))} characters"
        except BaseException as error:
            return kind, f"{type(error).__name__}: {str(error)[:200]}"
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def main(count: int, seed: str) -> dict:
    def too_long(*_):
        raise TimeoutError(f"more than {SECONDS} s")

    signal.signal(signal.SIGVTALRM, too_long)
    outcomes, faults = Counter(), []
    with tempfile.TemporaryDirectory() as name:
        bases = Bases(Path(name))
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for i in range(count):
            kind, outcome = trial(bases, f"{seed}-{i}")
            if outcome not in ("loaded", "refused"):
                faults.append([f"{seed}-{i}", kind, outcome])
                outcome = "fault"
            outcomes[f"{kind} {outcome}"] += 1
    return {"outcomes": dict(sorted(outcomes.items())), "faults": faults}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(int(sys.argv[1]), sys.argv[2])))
