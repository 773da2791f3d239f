"""`dflash-kernels info`. It needs torch alone, as it says what else is missing."""

import importlib.metadata
import json

from dflash_kernels import build_info

from ..checkpoint import KNOWN
from ..extras import how_to_get

_DECODE = how_to_get("decode")
# Optional parts: distribution, what it is for, how to get it.
_PARTS = (
    ("typer", "the commands generate, chat and bench", _DECODE),
    ("rich", "the commands generate, chat and bench", _DECODE),
    ("tokenizers", "text in and out", _DECODE),
    ("jinja2", "chat templates", _DECODE),
    ("numpy", "chat templates and GGUF files", _DECODE),
    ("gguf", "GGUF files", _DECODE),
    ("safetensors", "safetensors checkpoints", _DECODE),
    ("huggingface-hub", "models by their hub ids", _DECODE),
    ("llguidance", "answers by a JSON schema or a regular expression", how_to_get("grammar")),
    *((name, "the command serve", how_to_get("serve"))
      for name in ("starlette", "uvicorn", "pydantic", "prometheus-client")),
    ("transformers", "most other Hugging Face causal LMs as targets", how_to_get("hf")),
    *(part for name, known in KNOWN.items()
      for part in ((known.distribution, f"the model {name}", known.get),
                   (known.drafter, f"speculation for {name}", known.get_drafter))),
)


def facts() -> dict[str, object]:
    """The data of `dflash-kernels info`."""
    parts = {}
    for name, purpose, how in _PARTS:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = None
        parts[name] = {"version": version, "for": purpose, "get": how}
    return build_info() | {"parts": parts, "models": list(KNOWN)}


def show(as_json: bool) -> None:
    found = facts()
    if as_json:
        print(json.dumps(found, indent=1))
        return
    rows = _rows(found)
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")


def _rows(found: dict) -> dict[str, str]:
    rows = {"dflash-kernels": found["version"], "python, torch": f"{found['python']}, {found['torch']}",
            "machine": f"{found['cpu']} ({found['platform']}), {found['threads']} threads"}
    if found["cpu_kernels"]:
        rows["CPU kernels"] = f"built ({found['compiler']})"
        rows["instruction set"] = (f"{found['isa']} in use; this CPU has {', '.join(found['isas'])} "
                                   "(DFLASH_ISA chooses)")
    else:
        rows["CPU kernels"] = ("missing (not built); the float32 reference runs instead, correct and slow; to get "
                               "them: install g++, then, in a clone, pip install --no-build-isolation "
                               "--force-reinstall --no-deps .")
    cuda = "torch sees a GPU" if found["cuda"] else "torch sees no GPU"
    rows["GPU kernels"] = f"{cuda}; CUDA C++: {found['cuda_kernels']}; nvcc {found['nvcc'] or 'not looked for'}"
    rows["ops"] = ", ".join(found["ops"])
    rows["models by name"] = ", ".join(found["models"])
    return rows | {name: part["version"] or f"missing ({part['for']}); to get it: {part['get']}"
                   for name, part in found["parts"].items()}
