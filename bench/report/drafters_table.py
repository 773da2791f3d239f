"""The table of docs/drafters.md: every published drafter, and whether it loads."""

from bench.published import entries, refusal
from dflash_decode.model.config import read_draft_config

HEAD = ["drafter", "config", "layers", "heads", "block", "aux hidden states", "attention", "outcome"]


def drafters_block() -> str:
    rows = [_row(entry, refusal(entry)) for entry in entries()]
    loaded, needs = (sum(row[-1].startswith(word) for row in rows) for word in ("loads", "loads, once"))
    lines = [f"{loaded} of {len(rows)} load, by their structure, {needs} of them with a change or an option; no "
             "weights but this repository's were loaded.", "", _line(HEAD),
             _line(["---"] * len(HEAD)), *map(_line, rows)]
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _row(entry: dict, refused: str | None) -> list[str]:
    name = [entry["name"], entry["known"]]
    if refused is not None:
        return [*name, "", "", "", "", "", f"refused: {refused.removeprefix('draft config: ')}"]
    c, needs = read_draft_config(entry["config"]), entry.get("needs")
    heads = f"{c.num_heads}/{c.num_kv_heads} of {c.head_dim}"
    return [*name, str(c.num_layers), heads, str(c.block_size), f"{len(c.target_layer_ids)}", _attention(entry),
            f"loads, once {needs}" if needs else "loads"]


def _attention(entry: dict) -> str:
    parts = []
    for count, window, causal in entry["attention"]:
        kind = f"window {window:,}" if window else "full"
        parts.append(f"{count} {kind}{', causal' if causal else ''}")
    return "; ".join(parts)
