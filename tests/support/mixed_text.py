"""Lines of mixed text for comparisons of tokenizers: code, several languages, emoji, digits, blanks, odd characters."""

import random

_WORDS = {
    "en": "the of don't you'll WE'VE I'M John's quick, brown fox; isn't it? e.g. state-of-the-art HTTPServer x86_64",
    "de": "Straße über größer Äpfel Donaudampfschifffahrt „Zitat“ daß Weißbier",
    "fr": "l'été ça déjà œuvre Noël aujourd'hui « citation » où",
    "tr": "İstanbul'da ığdır şöyle çağ öğrenci kalem'in",
    "ru": "Привет, мир! Съешь ещё этих мягких булок",
    "el": "Καλημέρα κόσμε άνθρωπος ΣΊΣΥΦΟΣ",
    "he": "שלום עולם מִקְרָא",
    "ar": "مرحبا بالعالم، كَتَبَ ١٢٣٤",
    "hi": "नमस्ते दुनिया क्षत्रिय १२३",
    "th": "สวัสดีชาวโลก ประเทศไทย",
    "zh": "你好，世界！機器學習 模型。 一二三",
    "ja": "こんにちは世界 カタカナ ﾊﾝｶｸ 日本語のテキスト。",
    "ko": "안녕하세요 세계 ㄱㄴㄷ 자연어",
    "vi": "Cửa Việt Tiếng Việt nghiêng",
    "code": "for(i=0;i<10;++i){ def f(x): return {'a':[1,2]} <div class=\"a\"> a->b() ==!= // /* */ `x` $PATH #define",
    "numbers": "1 12 123 1234 12345 1234567 3.14e-10 0x1F 1,000,000 ½ ² Ⅷ ٣ 2024-01-31 100% $5.99",
    "emoji": "😀 👩‍👩‍👧‍👦 🇫🇷 👍🏽 ❤️ 🦙🚀 (╯°□°）╯",
    "marks": "!? ... ??? --- ___ === *** ~~~ |x| ^y^ <<>> +-= :: ;; '' \"\" “” ’s ‘t …",
    "odd": "e\u0301 n\u0303 \u200b x\u00a0y \ufeff \u2028 \u00ad \U0001f600\ufe0f a\u0300\u0301 ﬁ Å \u212b z\u0302",
}
_BLANKS = [" ", " ", " ", " ", " ", "  ", "   ", "\t", "\n", "\n\n", " \n", "\r\n", "\n\n\n", "    ", "\t\t", "",
           " \t ", "\u3000", "\u00a0"]


def mixed_lines(count: int, seed: int = 0) -> list[str]:
    """`count` texts, each of one to a dozen words of one to three kinds, with blanks of all kinds between them."""
    rng = random.Random(seed)
    kinds, lines = list(_WORDS), []
    for _ in range(count):
        words = [word for kind in rng.sample(kinds, rng.choice((1, 1, 2, 3))) for word in _WORDS[kind].split(" ")]
        line = rng.choice(_BLANKS) if rng.random() < 0.2 else ""
        for _ in range(rng.randint(1, 12)):
            line += rng.choice(words) + rng.choice(_BLANKS)
        lines.append(line if rng.random() < 0.3 else line.rstrip(" "))
    return lines
