"""Products of few rows under every instruction set of this CPU, against the most that the machine could do.

    python -m bench.rows [--shapes NAME...] [--weights NAME...] [--runs N] [--add] [--json OUT]

The bound of a product is the longer of two times: its bytes at the read bandwidth, and its operations at the rate of
the set's own multiply-add in registers, of bytes for weights in blocks. Both are measured between the calls, which take
turns with torch's, and are those of the fastest fifth of the probes. Writes bench/results/<device>/rows.json.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import torch
import torch.nn.functional as F

import dflash_kernels as dk
from bench import cost
from bench.case import Sizes, device_name, over_copies, results_folder
from bench.timing import MatrixRate, ReadBandwidth, Timing, interleaved
from dflash_bench.results import commit, output, write_json
from dflash_kernels.formats import FORMATS, packed_bytes
from dflash_kernels.testing import every_isa, use_isa

# op, outputs, inputs
SHAPES = {"qkv": ("linear", 960, 576), "o": ("linear", 576, 576), "gate_up": ("linear", 3072, 576),
          "down": ("linear", 576, 1536), "head": ("lm_head_argmax", 49152, 576), "large": ("linear", 4096, 4096),
          "draft head": ("lm_head_argmax", 8192, 576), "draft head, K 1": ("lm_head_topk", 8192, 576)}
ROWS, DRAFT_ROWS = (1, 2, 4, 8, 16, 32), (7, 14, 28)
BYTE_SETS = ("avx2", "avx2_vnni", "avx512", "avx512_vnni")  # with code of their own for blocks
DOT_SETS = ("avx2", "avx512", "avx512_bf16", "amx")
WEIGHTS = ("bf16", "int8", *FORMATS)
SECONDS = 5e-4  # about what a timed call of ours takes: longer ones are interrupted more often on a busy machine


def calls_of(op: str, x: torch.Tensor, weights: list, isa: str, start: float):
    """The op on every weight under an instruction set, recorded in stretches of SECONDS: a call, and how many weights
    it takes. start: the share of the weights to begin after, so that no set finds in a cache what another left."""
    rows, n = x.shape[0], weights[0].out_features
    out, lse = torch.empty(rows, n if op == "linear" else 0, dtype=x.dtype), torch.empty(rows)
    ids, values = torch.empty(rows, 1, dtype=torch.int64), torch.empty(rows, 1)

    def run(weight):
        if op == "linear":
            dk.linear(x, weight, out=out)
        elif op == "lm_head_argmax":
            dk.lm_head_argmax(x, weight, out_ids=ids[:, 0], out_values=values[:, 0])
        else:
            dk.lm_head_topk(x, weight, 1, out_ids=ids, out_values=values, out_lse=lse)

    rate = 2e11 if weights[0].format is None else 5e11
    guess = max(weights[0].data.nbytes / 4e10, cost.linear_flops(rows, n, x.shape[1]) / rate)
    size = max(1, min(len(weights), int(SECONDS / guess)))
    graphs = []
    with use_isa(isa):
        for at in range(0, len(weights) - size + 1, size):
            graphs.append(dk.StepGraph())
            run(weights[at])
            with graphs[-1].capture():
                for weight in weights[at:at + size]:
                    run(weight)
    first = int(start * len(graphs))
    return (lambda i: graphs[(first + i) % len(graphs)].replay()), size


def peer_of(op: str, x: torch.Tensor, weight: torch.Tensor | tuple):
    """torch's way to the same result, for 8 and 4 bits by its own product for such weights."""
    product = (lambda: F.linear(x, weight)) if isinstance(weight, torch.Tensor) else lambda: weight[0](x, *weight[1:])
    if op == "linear":
        return product
    if op == "lm_head_argmax":
        return lambda: product().argmax(-1)

    def topk():
        logits = product()
        return logits.max(-1), logits.float().logsumexp(-1)
    return topk


def made(kind: str, n: int, k: int, sizes: Sizes) -> tuple[list, list]:
    """Weights of that kind, more than a cache holds, and what `peer_of` takes for each: torch's 4-bit products have
    groups of 32 with a scale and a minimum, its 8-bit products one scale for a row, and what it has none of is 16 bits.
    """
    f = FORMATS.get(kind)
    plain = [(torch.randn(n, k) / k**0.5).to(sizes.dtype)
             for _ in range(sizes.copies_of(n * k * 2 if f is None else packed_bytes(f, k) * n // 16))]
    if kind == "bf16":
        return [dk.pack_weight(w) for w in plain], plain
    int8 = [dk.quantize_weight(w) for w in plain] if kind in ("int8", "q8_0") else []
    bytes_of = [(torch.ops.aten._weight_int8pack_mm, q, s.to(sizes.dtype)) for q, s in int8]
    if f is None:
        return [dk.pack_weight(*q) for q in int8], bytes_of
    packed = [dk.pack_weight(torch.randint(0, 64, (n, k // f.block * f.bytes), dtype=torch.uint8), format=kind)
              for _ in plain]
    if kind == "q8_0":
        return packed, bytes_of
    if not kind.startswith("q4"):
        return packed, plain
    codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.randint(0, 16, (n, k), dtype=torch.int32), 2)
    scales = torch.rand(k // 32, n, 2, dtype=sizes.dtype)
    return packed, [(torch.ops.aten._weight_int4pack_mm_for_cpu, codes.clone(), 32, scales.clone()) for _ in plain]


def shape_rows(name: str, sizes: Sizes, runs: int, isas: list[str], kinds: list[str]):
    op, n, k = SHAPES[name]
    read = ReadBandwidth(sizes.buffer, 32)
    for kind in kinds:
        f = FORMATS.get(kind)
        if f is not None and k % f.block:
            continue
        own = BYTE_SETS if f is not None else DOT_SETS
        sets = [isa for isa in isas if isa in own]
        rates = {isa: MatrixRate(isa, "bf16" if f is None else "int8") for isa in sets}
        weights, inputs = made(kind, n, k, sizes)
        for rows in DRAFT_ROWS if name.startswith("draft") else ROWS:
            x = sizes.random(rows, k)
            ours = {isa: calls_of(op, x, weights, isa, at / len(sets)) for at, isa in enumerate(sets)}
            peers = [peer_of(op, x, w) for w in inputs]
            times = interleaved({"read": read, **{f"rate {isa}": rate for isa, rate in rates.items()},
                                 **{isa: call for isa, (call, _) in ours.items()},
                                 "torch": over_copies(lambda i, peers=peers: peers[i](), len(peers), 1)}, runs=runs)
            for isa in sets:
                yield row_of(name, (rows, n, k), weights[0], isa, times, ours[isa][1], read, rates[isa])


def row_of(name: str, shape: tuple[int, int, int], weight: dk.PackedWeight, isa: str, times: dict[str, Timing],
           calls: int, read: ReadBandwidth, rate: MatrixRate) -> dict:
    (rows, n, k), op = shape, SHAPES[name][0]
    moved, flops = cost.linear_bytes(rows, n, k, 2) if op == "linear" else cost.lm_head_bytes(rows, n, k, 2), \
        cost.linear_flops(rows, n, k)
    moved += weight.data.nbytes - 2 * n * k
    kind = weight.format or ("int8" if weight.dtype == torch.int8 else "bf16")
    gbps, tflops = read.gbps(fast(times["read"])), rate.tflops(fast(times[f"rate {isa}"]))
    seconds = times[isa].median / calls
    bound = max(moved / gbps / 1e9, flops / tflops / 1e12)
    return {"shape": name, "op": op, "n": n, "k": k, "weights": kind, "rows": rows, "isa": isa, "us": seconds * 1e6,
            "p20": times[isa].p20 / calls * 1e6, "p80": times[isa].p80 / calls * 1e6, "gbps": moved / seconds / 1e9,
            "tflops": flops / seconds / 1e12, "read_gbps": gbps, "rate_tflops": tflops, "bound_us": bound * 1e6,
            "pct_of_bound": 100 * bound / seconds, "torch_us": times["torch"].median * 1e6}


def fast(timing: Timing) -> Timing:
    return dataclasses.replace(timing, median=timing.p20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--weights", nargs="*", choices=WEIGHTS, default=list(WEIGHTS))
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--add", action="store_true", help="keep the file's rows of other shapes and weights")
    parser.add_argument("--json", type=output, help="another file")
    options = parser.parse_args()
    sizes, isas = Sizes(), [isa for isa in every_isa() if isa not in ("generic", "reference")]
    file: Path = options.json or results_folder() / "rows.json"
    info = dk.build_info()
    header = {"device": device_name(), "threads": info["threads"], "torch": info["torch"], "commit": commit()}
    before = json.loads(file.read_text(encoding="utf-8")) if options.add and file.exists() else {"products": []}
    kept = [{"commit": before["header"]["commit"]} | row for row in before["products"]
            if row["shape"] not in options.shapes or row["weights"] not in options.weights]
    for name in options.shapes:
        for row in shape_rows(name, sizes, options.runs, isas, options.weights):
            kept.append(row | {"commit": header["commit"]})
            print(f"{name:<16} {row['weights']:<5} {row['rows']:3} rows {row['isa']:<12} {row['us']:9.1f} us "
                  f"{row['gbps']:6.1f} GB/s {row['tflops']:.3f} TFLOP/s {row['pct_of_bound']:4.0f} % of the bound "
                  f"{row['torch_us'] / row['us']:6.2f} x torch", flush=True)
        kept.sort(key=lambda row: (list(SHAPES).index(row["shape"]), WEIGHTS.index(row["weights"]),
                                   isas.index(row["isa"]), row["rows"]))
        write_json(file, {"header": header, "command": f"python -m bench.rows --runs {options.runs}",
                          "products": kept})


if __name__ == "__main__":
    main()
