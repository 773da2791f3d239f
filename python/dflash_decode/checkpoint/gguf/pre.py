"""How text is cut before a tokenizer's merges, by the names that tokenizer.ggml.pre has in llama.cpp.

The expressions are those of the models' own tokenizer.json. Each one cuts the pieces that the one before it left.
"""

from collections.abc import Callable
from functools import partial

from tokenizers import Regex, normalizers, pre_tokenizers

_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}"
_HAN, _CJK, _KANA = r"&&[^\p{Han}]]", "[一-龥ࠀ-一가-\ud7ff]+", "[一-龥\u3040-ゟ゠-ヿ]+"
_ASCII_MARKS = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""
_BY_SIDES = rf"{_ASCII_MARKS}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+"
_LATIN = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ"
    "-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-"
    "ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)


def _cased(end: str, digits: str, lead: str = r"[^\r\n\p{L}\p{N}]?", close: str = "]", marks: str = "[\r\n/]*") -> str:
    """Words whose capitals come first."""
    return (rf"{lead}{_UPPER}{close}*{_LOWER}{close}+{end}|{lead}{_UPPER}{close}+{_LOWER}{close}*{end}|{digits}"
            rf"| ?[^\s\p{{L}}\p{{N}}]+{marks}|{_REST}")


def _words(digits: str, endings: str = _ENDINGS + "|", word: str = _WORD, marks: str = _MARKS,
           rest: str = _REST) -> str:
    return f"{endings}{word}|{digits}|{marks}|{rest}"


_LLAMA3, _QWEN2, _GPT4O = _words(r"\p{N}{1,3}"), _words(r"\p{N}"), _cased(_ENDINGS + "?", r"\p{N}{1,3}")
_FINNISH = "\u0020?[^(\\s|.,!?…。，、।۔،)]+"
_LONG_BLANKS = "|".join(rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4)) + r"|\s{1,2}(?!\S)|\s{1}"
_DEEPSEEK3 = (r"\p{N}{1,3}", _KANA, rf"{_BY_SIDES}[\r\n]*|{_REST}")
_THREES = r"\d{1,3}(?=(?:\d{3})*\b)"
# Names -> the expressions, one after the other.
_SPLITS: dict[str, tuple[str, ...]] = {
    "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 dbrx smaug-bpe chatglm-bpe glm4 glm5":
        (_LLAMA3,),
    "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2": (_QWEN2,),
    "qwen35": (_words(r"\p{N}", word=r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+", marks=r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"),),
    "jais-2": (_words(r"\p{N}{1,3}", rest=rf"\s*[\r\n]+|{_LONG_BLANKS}"),),
    "ufakzeka": (_words(r"\p{N}", endings=""),),
    "seed-coder": (_words(r"\p{N}{1}", marks=r" ?[^\s\p{L}\p{N}\r\n]+"),),
    "bailingmoe bailingmoe2 llada-moe": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",),
    "exaone-moe": (_words(r"\p{N}", word=r"[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+",
                          marks=r" ?[^\s\p{L}\p{N}]+[\r\n/]?", rest=r"\s*[\r\n]|\s+(?!\S)|\s+"),),
    "laguna": (r"[^\n]+|[\n]+", _QWEN2),
    "minicpm5": (r"\p{N}{1,3}", _words(r"\p{N}+")),
    "tekken": (_cased("", r"\p{N}"),),
    "gpt-4o llama4 kanana2 talkie minimax-m2 granite-embed-multi-97m": (_GPT4O,),
    "tiny_aya cohere2moe": (_THREES, _GPT4O),
    "kimi-k2": (r"[\p{Han}]+|" + _cased(_ENDINGS + "?", r"\p{N}{1,3}", close=_HAN, marks=r"[\r\n]*"),),
    "youtu": ("[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|" + _KANA, _cased(_ENDINGS + "?", r"\p{N}")),
    "deepseek-v3 hunyuan-dense joyai-llm hy_v4": _DEEPSEEK3,
    "spark2_5": (r"\p{N}{1,3}", _KANA, rf"{_BY_SIDES}|[\r\n]|\s+(?!\S)|\s+", r"\p{N}"),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}"),
    "deepseek-llm": (r"[\r\n]", rf"\s?[{_LATIN}]+", "\\s?[!-/:-~！-／：-～‘-‟\u3000-。]+", r"\s+$", _CJK, r"\p{N}"),
    "default": (r"[\p{P}\$\+<=>\^~\|]+",
                r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)", r"\p{N}+",
                "[0-9][0-9][0-9]"),
    "superbpe": (r"\p{N}+", r"(?=(\d{3})+(?!\d))"),
    "poro-chat bloom gpt3-finnish": (_FINNISH,),
    "viking": (_FINNISH, r"\p{N}"),
}
_GPT2_ALONE = ("gpt-2 phi-2 gigachat a.x-4.0 mellum modern-bert exaone4 mpt olmo jais trillion granite-docling "
               "roberta-bpe jina-v1-en jina-v2-code jina-es jina-de jina-v2-es jina-v2-de")
_GPT2_DIGITS = "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2"
_GPT2_CUTS = {"chameleon": ("<sentinel:[0-9]+>", "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z", "([\\t\\n]|    |  )", r"\p{N}",
                            r"[\p{P}!-/:-@\[-`{-~]")}
# Of models whose tokenizer.json composes characters first; a GGUF file does not say so.
_NFC = {"qwen2", "command-r", "mpt"}
IGNORES_MERGES = {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "minicpm5",
                  "youtu", "glm4", "glm5", "tekken", "granite-embed-multi-97m"}  # a word that is a token is that token
ADDS_BOS = {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken",
            "chameleon"}  # where the file does not say


def _cut(*expressions: str) -> list[pre_tokenizers.PreTokenizer]:
    return [pre_tokenizers.Split(Regex(one), behavior="isolated") for one in expressions]


def _bytes(words: bool) -> pre_tokenizers.PreTokenizer:
    """Writes bytes as characters; words: cuts as GPT-2 does before."""
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)


def _sequence(*steps: pre_tokenizers.PreTokenizer) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([*steps])


def _cut_to_bytes(cuts: tuple[str, ...], words: bool) -> pre_tokenizers.PreTokenizer:
    return _sequence(*_cut(*cuts), _bytes(words))


PRE: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    **{name: lambda: _bytes(True) for name in _GPT2_ALONE.split()},
    **{name: lambda: _sequence(pre_tokenizers.Digits(individual_digits=True), _bytes(True))
       for name in _GPT2_DIGITS.split()},
    **{name: partial(_cut_to_bytes, cuts, True) for name, cuts in _GPT2_CUTS.items()},
    **{name: partial(_cut_to_bytes, cuts, False) for names, cuts in _SPLITS.items() for name in names.split()},
    "falcon": lambda: _sequence(pre_tokenizers.Punctuation(behavior="contiguous"), _bytes(True),
                                pre_tokenizers.Digits(individual_digits=False), *_cut("[0-9][0-9][0-9]")),
}


def normalizer_of(pre: str) -> normalizers.Normalizer | None:
    return normalizers.NFC() if pre in _NFC else None
