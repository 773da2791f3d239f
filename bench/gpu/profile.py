"""Profiles one replay of a recorded step: microseconds in kernels, and in the gaps between them.

    python -m bench.gpu.profile OUT.json [--tiny]

A step's launches run in sequence, so time outside kernels is a gap: launch latency, and filling and draining of the
chip. The file is written after each step.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, supported_activities

from bench.case import Sizes, device_name
from bench.ops.whole import GEOMETRIES, filled, recorded
from bench.random_model import random_drafter, random_target
from dflash_bench.results import commit, write_json


def table(events: Iterable[tuple[str, float, float]]) -> dict:
    """From (kernel's name, begin and end in microseconds): the time of each kernel, longest first, and the gaps.
    Overlapping time counts once."""
    by_name, covered, at, begin, end = {}, 0.0, -float("inf"), float("inf"), -float("inf")
    count = 0
    for name, start, stop in sorted(events, key=lambda event: event[1]):
        entry = by_name.setdefault(name, {"name": name, "count": 0, "us": 0.0})
        entry["count"] += 1
        entry["us"] += stop - start
        covered += max(0.0, stop - max(start, at))
        at, begin, end, count = max(at, stop), min(begin, start), max(end, stop), count + 1
    whole = end - begin if count else 0.0
    return {"launches": count, "us": whole, "kernels_us": covered, "gaps_us": whole - covered,
            "kernels": sorted(by_name.values(), key=lambda entry: -entry["us"])}


def replay(graph) -> list[tuple[str, float, float]]:
    """The kernels of one replay."""
    graph.replay()
    torch.cuda.synchronize()
    if ProfilerActivity.CUDA not in supported_activities():  # on a stand-in for a GPU
        return []
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        graph.replay()
        torch.cuda.synchronize()
    return [(e.name, e.time_range.start, e.time_range.end) for e in seen.events()
            if e.device_type == DeviceType.CUDA and not e.name.startswith(("Memcpy", "Memset"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    sizes = Sizes("cuda", options.tiny)
    model, _, batches, capacities, context, _ = GEOMETRIES[sizes.name]
    device = torch.device("cuda", torch.cuda.current_device())
    found = {"device": device_name("cuda"), "commit": commit(), "steps": []}
    with device:
        target = random_target(model, device, sizes.dtype, max(capacities))
        drafter = random_drafter(model, target)
        wanted = (("a DFlash step", model.block, True, batches[0]), ("a baseline step", 1, False, batches[0]),
                  ("a DFlash step", model.block, True, batches[-1]))
        for name, width, with_draft, batch in wanted[1:2] if sizes.tiny else wanted:
            caches = filled(target, drafter, batch, context + model.block)
            graph = recorded(target, drafter if with_draft else None, caches, batch, width, capacities[0], context)
            what = f"{name} of {model.name}, {batch} x context {context}, capacity {capacities[0]}"
            found["steps"].append({"step": what, **table(replay(graph))})
            write_json(options.out, found)
            print(what, {k: v for k, v in found["steps"][-1].items() if k.endswith(("us", "launches"))}, flush=True)


if __name__ == "__main__":
    main()
