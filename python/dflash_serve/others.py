"""Fields of OpenAI's, vLLM's and llama.cpp's requests that this server does not read, and what becomes of them."""

from typing import Any

# Fields that change no answer: their values are not looked at.
HARMLESS = frozenset({
    "metadata", "prediction", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "safety_identifier",
    "service_tier", "store", "user",  # OpenAI's
    "cache_salt", "priority", "request_id", "session_id", "stream_interval",  # vLLM's
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


def unread(fields: dict[str, Any]) -> tuple[str, str] | None:
    """The first field that must be left out, and why."""
    for name, value in fields.items():
        if value is None or name in HARMLESS:
            continue
        if name not in NOT_SERVED:
            instead = f"; {_INSTEAD[name]} does that here" if name in _INSTEAD else ""
            return name, f"this server does not know it{instead}"
        if not any(value == off and isinstance(value, bool) == isinstance(off, bool) for off in NOT_SERVED[name]):
            return name, "this server does not support it"
    return None
