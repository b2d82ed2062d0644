# ruff: noqa: RUF001  (characters that look like others are what this is about)
"""200 texts on which tokenizers differ: scripts, emoji, runs of spaces, numbers, code, chats, special tokens."""

_SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "Größenwahn, Äpfel und Öl; straße — «naïve» café.",
    "L'été où j'ai vu l'œuvre d'art à Besançon, ça m'a plu.",
    "El niño preguntó: ¿cuántos años tienes? ¡Qué día!",
    "Zażółć gęślą jaźń. Příliš žluťoučký kůň úpěl ďábelské ódy.",
    "Çok güzel bir İstanbul akşamı; ığdır, şimşek.",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "Ґанок, їжак, єнот; ўсё ў парадку.",
    "שלום עולם, מה שלומך היום?",
    "مرحبا بالعالم، كيف حالك اليوم؟ ١٢٣",
    "سلام دنیا، امروز چطوری؟ می‌خواهم",
    "नमस्ते दुनिया, आज आप कैसे हैं? क्षत्रिय",
    "হ্যালো বিশ্ব, আজ কেমন আছেন?",
    "வணக்கம் உலகம், எப்படி இருக்கிறீர்கள்?",
    "สวัสดีชาวโลก วันนี้เป็นอย่างไรบ้าง",
    "ສະບາຍດີ ຊາວໂລກ ຂອບໃຈ",
    "မင်္ဂလာပါ ကမ္ဘာလောက",
    "გამარჯობა მსოფლიო",
    "Բարեւ աշխարհ, ինչպե՞ս ես",
    "ሰላም ልዑል እንዴት ነህ",
    "你好,世界!今天天气怎么样?我们去吃饭吧。",
    "繁體中文與簡體中文:龍、龜、鬱。",
    "こんにちは世界。今日はいい天気ですね、カタカナもﾊﾝｶｸも。",
    "안녕하세요 세계, 오늘 어떻습니까?",
    "ᄒᆞᆫ글 자모 ㄱㄴㄷ",
    "ᎣᏏᏲ ᎡᎶᎯ; ᐃᓄᒃᑎᑐᑦ",
    "𐌼𐌰𐌲 𐌲𐌻𐌴𐍃 𝔣𝔯𝔞𝔨𝔱𝔲𝔯 𝟙𝟚𝟛",
)
_SMALL = (
    "",
    " ",
    "  ",
    "   a",
    "a ",
    "a  ",
    " a",
    "\n",
    "\n\n",
    "\t",
    "\t\ta\n\n  b\r\n c",
    "a\u00a0b\u2003c\u3000d\u200bd\ufeffe",
    "1",
    "12345678901234567890",
    "3.14159e-10, 1,000,000 0x1F",
    "😀",
    "👩‍👩‍👧‍👦🏳️‍🌈🇩🇪👍🏽",
    "e\u0301 vs é; A\u030a Å; ﬁ ﬂ ½ ² ™ Ⅳ ﷺ",
    "…—–‘’“”„«»‹›",
    "!@#$%^&*()_+-=[]{}|;':\",./<>?`~",
    "don't can't I'll we've they're he'd it's",
    "DON'T CAN'T I'LL",
    "camelCaseWord snake_case_word SCREAMING_CASE kebab-case",
    "http://example.org/a/b?c=d&e=%20#f me@example.org",
    "def f(x):\n    return x + 1\n\n\nclass A:\n\tpass\n",
    "for (int i = 0; i < n; ++i) { a[i] *= 2; }  // twice",
    "SELECT * FROM t WHERE a = 'b';",
    "<html><body>\n<p>a &amp; b</p></body></html>",
    '{"a": [1, 2, {"b": null}], "c": "\\u00e9"}',
    "$\\frac{a}{b}$ \\alpha ∑∫√∞≠≤ ℝ→ℂ",
    "\x00\x01\x7f\x80",
    "a" * 60,
    " " * 33 + "x",
    "\n" * 9 + "x",
    "-" * 50,
    "日" * 20,
    "ab\u2581cd \u2581 x",
    "<0x41> <0xE2><0x82>",
)
_SPECIAL = (
    "<s>",
    "<s> a",
    "a<s>b",
    "a </s> b",
    "<unk> a",
    "[INST] hello [/INST] hi </s>",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "a<|im_end|>  b",
    "<|endoftext|>a<|endoftext|>",
    "<|im_end|",
)
CHATS = (
    [{"role": "user", "content": "hi"}],
    [
        {"role": "user", "content": " Wie geht's? "},
        {"role": "assistant", "content": "Gut.\n"},
        {"role": "user", "content": "日本語?"},
    ],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1 = ?"}],
)


def _all() -> list[str]:
    texts = [*_SMALL, *_SPECIAL, *_SENTENCES]
    texts += [f" {sentence}" for sentence in _SENTENCES]
    texts += [f"{first} {second}" for first, second in zip(_SENTENCES, _SENTENCES[7:])]
    texts += [sentence.upper() for sentence in _SENTENCES]
    texts += [sentence.replace(" ", "  ") + "\n" for sentence in _SENTENCES]
    texts += [f"{i}. {sentence[: 5 + i]}" for i, sentence in enumerate(_SENTENCES)]
    return texts[:200]


TEXTS = _all()
assert len(TEXTS) == 200
