"""Log probabilities in OpenAI's two shapes."""

from collections.abc import Iterable

from dflash_decode import TokenLogprobs

from .replies import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob

_UNFINISHED = "\ufffd"  # a part of a character
_LEAST = -9999.0  # OpenAI's for what is impossible; JSON has no infinity


def chat_logprobs(found: Iterable[TokenLogprobs] | None) -> ChatLogprobs | None:
    if found is None:
        return None
    return ChatLogprobs(content=[
        TokenLogprob(**_one(each.text, each.logprob),
                     top_logprobs=[TopLogprob(**_one(top.text, top.logprob)) for top in each.top]) for each in found])


def completion_logprobs(found: Iterable[TokenLogprobs] | None, offset: int) -> CompletionLogprobs | None:
    """offset: the characters of the tokens before these."""
    if found is None:
        return None
    made = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    for each in found:
        logprob = max(each.logprob, _LEAST)
        made.tokens.append(each.text)
        made.token_logprobs.append(logprob)
        made.top_logprobs.append({top.text: max(top.logprob, _LEAST) for top in each.top} | {each.text: logprob})
        made.text_offset.append(offset)
        offset += len(each.text)
    return made


def _one(text: str, logprob: float) -> dict:
    return {"token": text, "logprob": max(logprob, _LEAST),
            "bytes": None if _UNFINISHED in text else list(text.encode())}
