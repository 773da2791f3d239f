"""Chat templates of model families, and messages for them."""

import json

from dflash_decode import chat_template
from tests.support import ROOT

# How the templates of model families go about it, shortened, by family.
FAMILIES = json.loads((ROOT / "tests" / "support" / "data" / "chat_templates.json").read_text(encoding="utf-8"))
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
TOOLS = [{"type": "function", "function": {
    "name": "get_weather", "description": 'The "weather" & <more> — 天気', "parameters": {
        "type": "object", "required": ["city"], "properties": {
            "city": {"type": "string", "description": "A city"}, "unit": {"type": "string", "enum": ["c", "f"]},
            "days": {"type": "array", "items": {"type": "integer"}}, "any": {"type": ["string", "null"]}}}}}]
def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def ours(template, messages, add=True, tools=None, documents=None, **variables):
    return chat_template.render(template, "model", messages, tools, documents, add, TOKENS | variables)
