"""`dflash-kernels generate`: one answer, streamed, and its figures."""

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from ..llm.api import LLM
from ..llm.outputs import Completion
from ..llm.params import GenerationParams
from . import report
from .conversation import Conversation


def answer(llm: LLM, conversation: Conversation, params: GenerationParams, names: dict[str, Any], *, compare: bool,
           as_json: bool, sample_from: str, rule: str) -> None:
    """Answers, and reports the answer beside the baseline's where `compare` asks for that."""
    report.start_text(llm.session)
    prompt = as_prompt(llm, conversation)
    report.warm_up(llm, params)
    found = streamed(llm, prompt, params, names, (lambda _: None) if as_json else report.write)
    baseline = None
    if compare:
        with report.status("baseline decoding, for comparison"), llm.without_drafter() as plain:
            report.warm_up(plain, params)
            baseline = plain.submit(prompt, params, chat_template_kwargs=names).result()
    if not as_json:
        report.print_answer(llm.session, found, baseline, params, sample_from)
        return
    settings = {name: value for name, value in asdict(params).items() if name in report.SETTINGS}
    value = report.header(llm.session, prompt=conversation, max_tokens=params.max_tokens,
                          sample_from=sample_from, rule=rule, stop=list(params.stop), **settings)
    print(json.dumps(value | {"kind": "generate"} | report.answer_json(llm.session, found, baseline), indent=1,
                     ensure_ascii=False))


def as_prompt(llm: LLM, conversation: Conversation) -> Conversation:
    """A text is the user's message, unless the model has no chat template."""
    if isinstance(conversation, str) and llm.tokenizer.chat_template:
        return [{"role": "user", "content": conversation}]
    return conversation


def streamed(llm: LLM, prompt: Conversation, params: GenerationParams, names: dict[str, Any],
             write: Callable[[str], None]) -> Completion:
    """The answer, whose text is written as it arrives."""
    stream, text = llm.submit(prompt, params, chat_template_kwargs=names), ""
    try:
        for chunk in stream:
            write(chunk.text)
            text = text or chunk.text
    finally:
        stream.cancel()
        write("\n" if text else "")  # what follows, an error or the shell's prompt, starts a line
    return stream.result()
