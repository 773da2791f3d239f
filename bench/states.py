"""Targets with recurrent or convolution states, in transformers' layers: `python -m bench.states [--runs N]`.

Passes of one token, and of blocks of 8 of which all, half or one were accepted, so that the next pass takes none, 4 or
one through the mixers again. Beside them a token of transformers' own `generate`. One request, small models of random
weights in float32; each pass must give the text of `generate`. Writes bench/results/<device>/states.json.
"""

import argparse
import copy

import torch
import transformers

import dflash_kernels as dk
from bench.case import device_name, results_folder
from bench.timing import Timing, interleaved
from dflash_bench.results import commit, output, write_json
from dflash_decode.kv import PagePool
from dflash_decode.model.hf import HFTarget

BLOCK, TOKENS, PASSES = 8, 32, 8  # PASSES: at most, of each way
_SIZES = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 2,
          "num_hidden_layers": 4, "vocab_size": 8192, "max_position_embeddings": 1024, "bos_token_id": None,
          "eos_token_id": None, "pad_token_id": None}
# Name -> transformers' class and what differs from _SIZES: the layers in the order of the published model.
MODELS = {
    "Qwen3-Next": ("Qwen3Next", {
        "head_dim": 64, "linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 64,
        "linear_value_head_dim": 64, "num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 256,
        "shared_expert_intermediate_size": 256}),
    "Falcon-H1": ("FalconH1", {"head_dim": 64, "mamba_n_heads": 16, "mamba_d_head": 48, "mamba_d_ssm": 768,
                               "mamba_d_state": 64, "mamba_n_groups": 1}),
    "LFM2": ("Lfm2", {"layer_types": ["conv", "conv", "full_attention", "conv"]}),
}


def made(name: str, **sizes) -> transformers.PreTrainedModel:
    kind, changes = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**_SIZES, **changes, **sizes})
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


class Passes:
    """Passes of a target for one request, and the most likely token after each row."""

    def __init__(self, target: HFTarget, most: int):
        self.target, pool = target, PagePool(-(-most // 16), 16)
        self.caches = target.cache.allocate(pool.num_pages, 16)
        self.table = pool.table_row(pool.allocate(most), pool.num_pages)[None]

    def __call__(self, context: int, ids: list[int]) -> list[int]:
        lens = [torch.tensor([n], dtype=torch.int32) for n in (context, len(ids))]
        block = dk.prepare_block(torch.zeros(1, dtype=torch.int64), lens[0], len(ids), 0, page_table=self.table,
                                 page_size=16)
        step = self.target.make_pass(1, len(ids), self.caches)
        rows, _ = step.run(torch.tensor([ids]), block.positions, block.slots, self.table, *lens)
        found = torch.empty(len(ids), dtype=torch.int64)
        self.target.next_ids(rows, found, torch.empty(len(ids)))
        return found.tolist()


class Steps:
    """Decodes the text after a prompt in passes of `width` tokens, `accepted` of which are its next ones and the others
    are not. A function for `interleaved`; raises AssertionError for another text."""

    def __init__(self, run: Passes, prompt: list[int], text: list[int], width: int, accepted: int):
        self.run, self.prompt, self.whole, self.width, self.accepted = run, prompt, [*prompt, *text], width, accepted
        self.wrong = [(token + 1) % run.target.vocab_size for token in self.whole]
        self.starts = range(len(prompt), len(self.whole) - width, accepted)[:PASSES]

    def __call__(self, _run: int = 0) -> None:
        self.run(0, self.prompt)
        for at in self.starts:
            end = at + self.accepted
            ids = [*self.whole[at:end], *self.wrong[end:at + self.width]]
            assert self.run(at, ids)[:self.accepted] == self.whole[at + 1:end + 1], "another text than generate's"


def rows_of(name: str, runs: int, **sizes) -> dict:
    model = made(name, **sizes)
    ours, prompt = HFTarget(copy.deepcopy(model)), list(range(1, 65))
    run = Passes(ours, len(prompt) + TOKENS + BLOCK)

    def generate(tokens: int) -> list[int]:
        found = model.generate(torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False)
        return found[0, len(prompt):].tolist()

    text = generate(TOKENS)
    ways = {"one": Steps(run, prompt, text, 1, 1),
            **{f"block_{n}": Steps(run, prompt, text, BLOCK, n) for n in (BLOCK, BLOCK // 2, 1)}}
    times = interleaved({"prompt": lambda i: run(0, prompt), "generate's prompt": lambda i: generate(1),
                         "generate": lambda i: generate(TOKENS), **ways}, runs=runs, warmup=1)
    return {"model": name, "weights": sum(p.numel() for p in model.parameters()),
            "generate_ms": between(times["generate"], times["generate's prompt"], TOKENS - 1),
            **{f"{way}_ms": between(times[way], times["prompt"], len(steps.starts)) for way, steps in ways.items()}}


def between(longer: Timing, shorter: Timing, count: int) -> float:
    """Milliseconds for each of `count` steps that the longer call has more."""
    return 1e3 * (longer.median - shorter.median) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=output, help="another file")
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    rows = []
    for name in MODELS:
        rows.append(rows_of(name, options.runs))
        print(rows[-1], flush=True)
    info = dk.build_info()
    write_json(options.json or results_folder() / "states.json", {
        "header": {"device": device_name(), "threads": info["threads"], "isa": info["isa"], "torch": info["torch"],
                   "transformers": transformers.__version__, "commit": commit()},
        "command": f"python -m bench.states --runs {options.runs}", "block": BLOCK, "models": rows})


if __name__ == "__main__":
    main()
