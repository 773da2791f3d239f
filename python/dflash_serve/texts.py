"""The texts of single tokens, for log probabilities."""

from collections.abc import Iterable

from dflash_decode import TokenLogprobs
from dflash_decode.checkpoint.tokenizer import Tokenizer

from .replies import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob

_UNFINISHED = "\ufffd"  # a part of a character
_LEAST = -9999.0  # OpenAI's for what is impossible; JSON has no infinity


class TokenTexts:
    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._kept = tokenizer, dict[int, str]()

    def text(self, token: int) -> str:
        """The text of a token inside of a text: some tokenizers drop the space before the first one."""
        if token not in self._kept:
            alone, twice = (self._tokenizer.decode([token] * n, skip_special_tokens=False) for n in (1, 2))
            self._kept[token] = twice[len(alone):]
        return self._kept[token]

    def chat(self, found: Iterable[TokenLogprobs] | None) -> ChatLogprobs | None:
        if found is None:
            return None
        return ChatLogprobs(content=[
            TokenLogprob(**self._one(each.token, each.logprob),
                         top_logprobs=[TopLogprob(**self._one(*one)) for one in each.top]) for each in found])

    def completion(self, found: Iterable[TokenLogprobs] | None, offset: int) -> CompletionLogprobs | None:
        """offset: the characters of the tokens before these."""
        if found is None:
            return None
        made = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for each in found:
            text, logprob = self.text(each.token), max(each.logprob, _LEAST)
            made.tokens.append(text)
            made.token_logprobs.append(logprob)
            made.top_logprobs.append({self.text(token): max(value, _LEAST) for token, value in each.top}
                                     | {text: logprob})
            made.text_offset.append(offset)
            offset += len(text)
        return made

    def _one(self, token: int, logprob: float) -> dict:
        text = self.text(token)
        return {"token": text, "logprob": max(logprob, _LEAST),
                "bytes": None if _UNFINISHED in text else list(text.encode())}
