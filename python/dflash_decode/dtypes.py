"""What the dtypes that a model can be kept in are called, here and elsewhere. No package but the standard library."""

AUTO = "auto"
NAMES = {
    AUTO: AUTO,
    "bfloat16": "bfloat16", "bf16": "bfloat16",
    "float16": "float16", "fp16": "float16", "f16": "float16", "half": "float16",
    "float32": "float32", "fp32": "float32", "f32": "float32", "float": "float32", "single": "float32",
}


def dtype_name(text: str) -> str | None:
    """Our name for what `text` calls a dtype; None for one that is not supported, or none at all."""
    return NAMES.get(text.strip().lower().removeprefix("torch."))
