"""Products of few rows under every instruction set of this CPU, against the most that the machine could do.

    python -m bench.rows [--shapes NAME...] [--runs N] [--add] [--json OUT]

The bound of a product is the longer of two times: its bytes at the read bandwidth, and its operations at the rate of
the set's own multiply-add in registers. Both are measured between the calls, which take turns with torch's, and are
those of the fastest fifth of the probes. Writes bench/results/<device>/rows.json.
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
from dflash_kernels.testing import every_isa, use_isa

# op, outputs, inputs
SHAPES = {"qkv": ("linear", 960, 576), "o": ("linear", 576, 576), "gate_up": ("linear", 3072, 576),
          "down": ("linear", 576, 1536), "head": ("lm_head_argmax", 49152, 576), "large": ("linear", 4096, 4096),
          "draft head": ("lm_head_argmax", 8192, 576), "draft head, K 1": ("lm_head_topk", 8192, 576)}
ROWS, DRAFT_ROWS = (1, 2, 4, 8, 16, 32), (7, 14, 28)
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

    guess = max(weights[0].data.nbytes / 4e10, cost.linear_flops(rows, n, x.shape[1]) / 2e11)
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


def peer_of(op: str, x: torch.Tensor, weight: torch.Tensor | tuple[torch.Tensor, torch.Tensor]):
    """torch's way to the same result, for 8 bits by its own product for such weights."""
    product = (lambda: torch.ops.aten._weight_int8pack_mm(x, *weight)) if isinstance(weight, tuple) else \
        (lambda: F.linear(x, weight))
    if op == "linear":
        return product
    if op == "lm_head_argmax":
        return lambda: product().argmax(-1)

    def topk():
        logits = product()
        return logits.max(-1), logits.float().logsumexp(-1)
    return topk


def shape_rows(name: str, sizes: Sizes, runs: int, isas: list[str]):
    op, n, k = SHAPES[name]
    plain = [(torch.randn(n, k) / k**0.5).to(sizes.dtype) for _ in range(sizes.copies_of(n * k * 2))]
    read, rates = ReadBandwidth(sizes.buffer, 32), {isa: MatrixRate(isa) for isa in isas}
    for bits in (16, 8):
        quantized = [dk.quantize_weight(w) for w in plain] if bits == 8 else []
        weights = [dk.pack_weight(*q) for q in quantized] or [dk.pack_weight(w) for w in plain]
        for rows in DRAFT_ROWS if name.startswith("draft") else ROWS:
            x = sizes.random(rows, k)
            inputs = [(q, s.to(sizes.dtype)) for q, s in quantized] or plain
            ours = {isa: calls_of(op, x, weights, isa, at / len(isas)) for at, isa in enumerate(isas)}
            peers = [peer_of(op, x, w) for w in inputs]
            times = interleaved({"read": read, **{f"rate {isa}": rate for isa, rate in rates.items()},
                                 **{isa: call for isa, (call, _) in ours.items()},
                                 "torch": over_copies(lambda i, peers=peers: peers[i](), len(peers), 1)}, runs=runs)
            for isa in isas:
                yield row_of(name, op, (rows, n, k), bits, isa, times, ours[isa][1], read, rates[isa])


def row_of(name: str, op: str, shape: tuple[int, int, int], bits: int, isa: str, times: dict[str, Timing], calls: int,
           read: ReadBandwidth, rate: MatrixRate) -> dict:
    rows, n, k = shape
    moved, flops = cost.linear_bytes(rows, n, k, 2, bits // 8), cost.linear_flops(rows, n, k)
    if op != "linear":
        moved = cost.lm_head_bytes(rows, n, k, 2) - (n * k if bits == 8 else 0)
    gbps, tflops = read.gbps(fast(times["read"])), rate.tflops(fast(times[f"rate {isa}"]))
    seconds = times[isa].median / calls
    bound = max(moved / gbps / 1e9, flops / tflops / 1e12)
    return {"shape": name, "op": op, "n": n, "k": k, "bits": bits, "rows": rows, "isa": isa, "us": seconds * 1e6,
            "p20": times[isa].p20 / calls * 1e6, "p80": times[isa].p80 / calls * 1e6, "gbps": moved / seconds / 1e9,
            "tflops": flops / seconds / 1e12, "read_gbps": gbps, "rate_tflops": tflops, "bound_us": bound * 1e6,
            "pct_of_bound": 100 * bound / seconds, "torch_us": times["torch"].median * 1e6}


def fast(timing: Timing) -> Timing:
    return dataclasses.replace(timing, median=timing.p20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--add", action="store_true", help="keep the file's rows of other shapes")
    parser.add_argument("--json", type=output, help="another file")
    options = parser.parse_args()
    sizes, isas = Sizes(), [isa for isa in every_isa() if isa not in ("generic", "reference")]
    file: Path = options.json or results_folder() / "rows.json"
    info = dk.build_info()
    header = {"device": device_name(), "threads": info["threads"], "torch": info["torch"], "commit": commit()}
    before = json.loads(file.read_text(encoding="utf-8"))["products"] if options.add and file.exists() else []
    kept = [row for row in before if row["shape"] not in options.shapes]
    for name in options.shapes:
        for row in shape_rows(name, sizes, options.runs, isas):
            kept.append(row)
            print(f"{name:<16} {row['bits']:2} bits {row['rows']:3} rows {row['isa']:<12} {row['us']:9.1f} us "
                  f"{row['gbps']:6.1f} GB/s {row['tflops']:.3f} TFLOP/s {row['pct_of_bound']:4.0f} % of the bound "
                  f"{row['torch_us'] / row['us']:6.2f} x torch", flush=True)
        kept.sort(key=lambda row: (list(SHAPES).index(row["shape"]), -row["bits"], isas.index(row["isa"]), row["rows"]))
        write_json(file, {"header": header, "command": f"python -m bench.rows --runs {options.runs}",
                          "products": kept})


if __name__ == "__main__":
    main()
