"""Tokenizers in GGUF files."""

import unicodedata

import pytest

pytest.importorskip("tokenizers")
pytest.importorskip("gguf")

from tokenizers import pre_tokenizers

from dflash_decode.checkpoint import CheckpointError
from dflash_decode.checkpoint.gguf.pre import PRE, normalizer_of
from dflash_decode.checkpoint.tokenizer import load_tokenizer
from tests.support import ROOT
from tests.support.gguf_files import DROP, write_gguf
from tests.support.mixed_text import mixed_lines

# Of `make peers`: vocabularies of published models, lines of text, and the tokens that transformers makes of them.
VOCABULARIES = ROOT / "build/peers/llama/source/thirdparty/llama.cpp/models"
BLANK = "\u2581"
# Compared with llama.cpp's own cuts.
LINE = "It's 12345 x²=ABcDé'LL,\n  \t你好アい 한국어\r\n\n<a-b> ...   e\u0301!  "
CUTS = {
    "bloom": "It's| 12345| x²=ABcDé'LL|,\n  \t|你好アい| 한국어|\r\n\n|<a-b>| ...  | e\u0301|!  ",
    "chameleon":
        "It|'|s| |1|2|3|4|5| x|²|=|ABcDé|'|LL|,|\n|  |\t|你好アい| 한국어|\r|\n|\n|<|a|-|b|>| |.|.|.|  | e|\u0301|!|  ",
    "deepseek-coder":
        "It|'|s| |1|2|3|4|5| x|²|=|ABcDé|'|LL|,|\n|  |\t|你好アい| |한국어|\r|\n|\n|<|a|-|b|>| ...|  | e|\u0301|!|  ",
    "deepseek-llm":
        "It|'|s| |1|2|3|4|5| x|²|=|ABcD|é|'|LL|,|\n|  \t|你好アい| |한국어|\r|\n|\n|<|a|-|b|>| ...|  | e|\u0301|!|  ",
    "deepseek-v3":
        "It|'s| |123|45| x|²|=ABcD|é|'LL|,\n|  \t|你好アい| 한국어|\r\n\n|<a|-b|>| ...|  | e\u0301|!|  ",
    "default":
        "It|'|s| |123|45| x|²|=|ABcDé|'|LL|,|\n  |\t|你好アい| 한국어|\r\n\n|<|a|-|b|>| |...|  | e|\u0301|!|  ",
    "exaone-moe":
        "It|'s| |1|2|3|4|5| x|²|=ABcDé|'LL|,\n|  |\t你好アい 한국어|\r\n\n|<a|-b|>| ...|  | e\u0301|!|  ",
    "gpt-2":
        "It|'s| 12345| x|²|=|ABcDé|'|LL|,|\n  |\t|你好アい| 한국어|\r\n|\n|<|a|-|b|>| ...|  | e|\u0301!|  ",
    "gpt-4o": "It's| |123|45| x|²|=ABc|Dé'LL|,\n|  |\t你好アい| 한국어|\r\n\n|<a|-b|>| ...|  | e\u0301|!|  ",
    "kimi-k2": "It's| |123|45| x|²|=ABc|Dé'LL|,\n|  |\t|你好|アい| 한국어|\r\n\n|<a|-b|>| ...|  | e\u0301|!|  ",
    "laguna":
        "It|'s| |1|2|3|4|5| x|²|=ABcDé|'LL|,|\n|  |\t你好アい| 한국어|\r|\n\n|<a|-b|>| ...|  | e|\u0301!|  ",
    "llama-bpe":
        "It|'s| |123|45| x|²|=ABcDé|'LL|,\n|  |\t你好アい| 한국어|\r\n\n|<a|-b|>| ...|  | e|\u0301!|  ",
    "qwen2": "It|'s| |1|2|3|4|5| x|²|=ABcDé|'LL|,\n|  |\t你好アい| 한국어|\r\n\n|<a|-b|>| ...|  | e|\u0301!|  ",
    "qwen35":
        "It|'s| |1|2|3|4|5| x|²|=ABcDé|'LL|,\n|  |\t你好アい| 한국어|\r\n\n|<a|-b|>| ...|  | e\u0301|!|  ",
    "seed-coder":
        "It|'s| |1|2|3|4|5| x|²|=ABcDé|'LL|,|\n|  |\t你好アい| 한국어|\r\n\n|<a|-b|>| ...|  | e|\u0301!|  ",
    "smollm":
        "It|'s| |1|2|3|4|5| x|²|=|ABcDé|'|LL|,|\n  |\t|你好アい| 한국어|\r\n|\n|<|a|-|b|>| ...|  | e|\u0301!|  ",
    "spark2_5":
        "It|'s| |1|2|3|4|5| x|²|=ABcD|é|'LL|,|\n|  \t|你好アい| 한국어|\r|\n|\n|<a|-b|>| ...|  | e\u0301|!|  ",
    "superbpe": "It's |12|345| x|²|=ABcDé'LL,\n  \t你好アい 한국어\r\n\n<a-b> ...   e\u0301!  ",
    "tekken":
        "It|'s| |1|2|3|4|5| x|²|=ABc|Dé|'LL|,\n|  |\t你好アい| 한국어|\r\n\n|<a|-b|>| ...|  | e\u0301|!|  ",
    "tiny_aya": "It's| |12|345| x|²|=ABc|Dé'LL|,\n|  |\t你好アい| 한국어|\r\n\n|<a|-b|>| ...|  | e\u0301|!|  ",
    "viking": "It's| |1|2|3|4|5| x|²|=ABcDé'LL|,\n  \t|你好アい| 한국어|\r\n\n|<a-b>| ...  | e\u0301|!  ",
    "youtu": "It's| |1|2|3|4|5| x|²|=ABc|Dé'LL|,\n|  \t|你好アい| |한국어|\r\n\n|<a|-b|>| ...|  | e\u0301|!|  ",
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DFLASH_CACHE", str(tmp_path_factory.mktemp("cache")))


def file_with(tmp_path, tokens, **changes):
    write_gguf(tmp_path / "m.gguf", **{f"tokenizer__ggml__{name}": value for name, value in {
        "tokens": tokens, "token_type": [1] * len(tokens), "merges": DROP, "eos_token_id": 0, **changes}.items()})
    return tmp_path / "m.gguf"


@pytest.mark.slow
@pytest.mark.skipif(not VOCABULARIES.is_dir(), reason="make peers has not fetched llama.cpp's vocabularies")
@pytest.mark.parametrize("name", [
    "command-r", "deepseek-coder", "deepseek-llm", "falcon", "gemma-4", "gpt-2", "llama-bpe", "llama-spm", "mpt",
    "phi-3", "qwen2", "qwen35", "refact", "starcoder"])
def test_published_vocabularies_equal_transformers(name):
    file = VOCABULARIES / f"ggml-vocab-{name}.gguf"
    lines = (VOCABULARIES / f"{file.name}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    ids = [[int(i) for i in row.split()] for row in (VOCABULARIES / f"{file.name}.out").read_text().splitlines()]
    tokenizer = load_tokenizer(file)
    assert len(ids) >= 46 and [tokenizer.encode(line) for line in lines[:len(ids)]] == ids


@pytest.mark.parametrize("pre", sorted(PRE))
def test_every_pre_keeps_the_text(tmp_path, pre):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    found = load_tokenizer(file_with(tmp_path, [*alphabet, "th"], pre=pre, merges=["t h"]))
    for line in mixed_lines(40):
        want = unicodedata.normalize("NFC", line) if normalizer_of(pre) else line
        assert found.decode(found.encode(line)) == want


@pytest.mark.parametrize("pre", CUTS)
def test_text_is_cut_as_the_name_says(pre):
    characters = {chr(c): b for c, b in zip(*_bytes_as_characters(), strict=True)}
    pieces = [bytes(characters[c] for c in piece).decode() for piece, _ in PRE[pre]().pre_tokenize_str(LINE)]
    assert "|".join(pieces) == CUTS[pre] and "".join(pieces) == LINE


def _bytes_as_characters():
    """GPT-2's: bytes that are printed stand for themselves, the others for the characters from 256 on."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in shown]
    return [*shown, *range(256, 256 + len(others))], shown + others


def sentencepiece_tokens():
    """Pieces of the lines' first characters, with the scores of their ranks; and the bytes."""
    special, octets = ["<unk>", "<s>", "</s>"], [f"<0x{i:02X}>" for i in range(256)]
    counts: dict[str, int] = {}
    for line in mixed_lines(200, seed=1):
        for word in line.replace(" ", BLANK).split("\n"):
            for n in (1, 2, 3, 4):
                for i in range(len(word) - n + 1):
                    counts[word[i:i + n]] = counts.get(word[i:i + n], 0) + 1
    pieces = sorted(counts, key=lambda p: (-counts[p], p))[:1500]
    tokens = [*special, *octets, *pieces]
    return tokens, [2, 3, 3, *[6] * 256, *[1] * len(pieces)], [0.0] * 259 + [-float(i) for i in range(len(pieces))]


def merged(text, tokens, scores, prefix):
    """SentencePiece: of all neighbours that are a piece together, those with the highest score first."""
    parts = list((BLANK if prefix and text else "") + text.replace(" ", BLANK))
    score = dict(zip(tokens[259:], scores[259:], strict=True))
    while True:
        pairs = enumerate(zip(parts, parts[1:], strict=False))
        best = max(((score[a + b], -i) for i, (a, b) in pairs if a + b in score), default=None)
        if best is None:
            break
        i = -best[1]
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    ids = {token: i for i, token in enumerate(tokens)}
    return [i for part in parts for i in ([ids[part]] if part in score else [3 + b for b in part.encode()])]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_merges_by_score(tmp_path, prefix):
    tokens, types, scores = sentencepiece_tokens()
    found = load_tokenizer(file_with(tmp_path, tokens, token_type=types, scores=scores, model="llama", bos_token_id=1,
                                     eos_token_id=2, add_space_prefix=prefix))
    lines = mixed_lines(2000)
    differ = [line for line in lines if found.encode(line) != merged(line, tokens, scores, prefix)]
    # Merges of a library have an order, where SentencePiece takes the leftmost of equal ones.
    assert len(differ) <= 20, differ[:3]
    assert found.encode("a", add_special_tokens=True)[0] == 1 and found.stop_ids == (2,)
    assert all(found.decode(found.encode(line)) == line for line in lines[:200])


@pytest.mark.parametrize(("changes", "message"), [
    ({"model": "t5"}, "model must be gpt2 .*, llama .SentencePiece. or gemma4; got 't5': tokenizer takes the model's"),
    ({"pre": "klingon"}, "pre must be one of .*qwen2.*; got 'klingon': tokenizer takes the model's directory"),
    ({"model": "llama", "scores": [1.0]}, "must have an item for each of 4 tokens; got 1 and 4"),
    ({"model": "llama", "scores": [float("nan")] * 4}, "scores must be finite"),
    ({"model": "llama", "scores": [0.0] * 4, "unknown_token_id": 9}, r"unknown_token_id must be in \[0, 4\); got 9"),
    ({"merges": ["ab"]}, "merges must fit its tokens"),
])
def test_what_is_refused(tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(file_with(tmp_path, ["<e>", "a", "b", "ab"], **{"merges": ["a b"], **changes}))


def test_a_file_that_names_no_pre_is_said(tmp_path):
    with pytest.warns(UserWarning, match="does not say how its tokenizer cuts text"):
        load_tokenizer(file_with(tmp_path, ["<e>", "a", "b", "ab"], merges=["a b"], pre=DROP))
