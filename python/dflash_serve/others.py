"""Fields of OpenAI's, vLLM's and llama.cpp's requests that this server does not read, and what becomes of them."""

from typing import Any

from .fields import Asked

# Fields that change no answer: their values are not looked at.
HARMLESS = frozenset({
    "metadata", "prediction", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "safety_identifier",
    "service_tier", "store", "user",  # OpenAI's
    "priority", "request_id", "session_id", "stream_interval",  # vLLM's
    "cache_prompt", "id_slot", "n_cache_reuse", "sse_ping_interval",  # llama.cpp's
})
_OFF = (None, False)
# Fields that would change the answer: what they can be without that. null is always one of these.
NOT_SERVED: dict[str, tuple[object, ...]] = {
    "audio": (None,), "functions": (None, []), "function_call": (None, "none"), "modalities": (None, ["text"]),
    "moderation": (None,), "verbosity": (None, "medium"), "web_search_options": (None,),  # OpenAI's
    "best_of": (None, 1), "echo": _OFF, "suffix": (None, ""),  # of completions
    "add_generation_prompt": (None, True), "allowed_token_ids": (None, []), "bad_words": (None, []),  # vLLM's
    "chat_template": (None,), "continue_final_message": _OFF, "documents": (None, []),
    "include_reasoning": (None, True), "include_stop_str_in_output": _OFF, "length_penalty": (None, 1),
    "prompt_logprobs": (None,), "repetition_detection": (None,), "return_prompt_text": _OFF, "return_token_ids": _OFF,
    "return_token_offsets": _OFF, "return_tokens_as_token_ids": _OFF, "skip_special_tokens": (None, True),
    "spaces_between_special_tokens": (None, True), "thinking_token_budget": (None,), "truncate_prompt_tokens": (None,),
    "use_beam_search": _OFF,
    "grammar": (None, ""), "mirostat": (None, 0), "typical_p": (None, 1),  # llama.cpp's
}
# Fields of other servers and of older versions, and the field that does the same here.
_INSTEAD = {
    "guided_choice": "structured_outputs", "guided_grammar": "structured_outputs", "guided_json": "structured_outputs",
    "guided_regex": "structured_outputs", "json_schema": "response_format", "max_new_tokens": "max_tokens",
    "n_predict": "max_tokens", "n_probs": "logprobs", "repeat_penalty": "repetition_penalty", "stop_sequences": "stop",
}


# Fields inside of others that change no answer.
_HARMLESS_INSIDE = {"stream_options": ("include_obfuscation",), "response_format.json_schema": ("description",)}
_INSTEAD_INSIDE = {"response_format.schema": '; {"type": "json_schema", "json_schema": {"schema": ...}} does that here'}


def unread(asked: Asked) -> tuple[str, str] | None:
    """The first field that must be left out, and why."""
    form = asked.response_format
    inside = {"stream_options": asked.stream_options, "response_format": form,
              "response_format.json_schema": form and form.json_schema, "structured_outputs": asked.structured_outputs}
    for outer, found in inside.items():
        for name, value in ((found and found.model_extra) or {}).items():
            if value not in (None, False) and name not in _HARMLESS_INSIDE.get(outer, ()):
                path = f"{outer}.{name[:80]}"
                return path, f"this server does not support it{_INSTEAD_INSIDE.get(path, '')}"
    return _unread(asked.model_extra or {})


def _unread(fields: dict[str, Any]) -> tuple[str, str] | None:
    for name, value in fields.items():
        if value is None or name in HARMLESS:
            continue
        if name not in NOT_SERVED:
            instead = f"; {_INSTEAD[name]} does that here" if name in _INSTEAD else ""
            return name, f"this server does not know it{instead}"
        if not any(value == off and isinstance(value, bool) == isinstance(off, bool) for off in NOT_SERVED[name]):
            return name, "this server does not support it"
    return None
