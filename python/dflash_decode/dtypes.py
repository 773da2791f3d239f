"""Names of the supported dtypes, here and in other tools. Imports only the standard library."""

AUTO = "auto"
NAMES = {
    AUTO: AUTO,
    "bfloat16": "bfloat16", "bf16": "bfloat16",
    "float16": "float16", "fp16": "float16", "f16": "float16", "half": "float16",
    "float32": "float32", "fp32": "float32", "f32": "float32", "float": "float32", "single": "float32",
}


def dtype_name(text: str) -> str | None:
    """Our name of a dtype; None for a text that names no supported dtype."""
    return NAMES.get(text.strip().lower().removeprefix("torch."))
