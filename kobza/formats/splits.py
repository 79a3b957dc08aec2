"""The patterns that first part a text for a byte-level BPE, by the names that a GGUF has for them (tokenizer.ggml.pre).

A GGUF keeps the name only; the pattern stands in llama.cpp (src/llama-vocab.cpp). These say what llama.cpp does, in the
`tokenizers` library's dialect: each applies to what the one before has parted, and a text between two matches is a part too.
"""

from __future__ import annotations

from typing import Any

ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|" + SPACES
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + SIGNS
QWEN2 = ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + SIGNS
QWEN35 = ENDINGS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + SPACES
SEED = ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|" + SPACES
DEEPSEEK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
    + SPACES
)
PUNCTUATION = r"[\p{P}\$\+<=>\^~\|]+"
BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"


def _by_case(ending: str, digits: str) -> str:
    """A word begins at a capital. llama.cpp knows the case of A to Z only: to it any other letter is of both."""
    capital, small = r"(?:(?=\p{L})[^a-z])", r"(?:(?=\p{L})[^A-Z])"
    words = (rf"[^\r\n\p{{L}}\p{{N}}]?{capital}{a}{small}{b}{ending}" for a, b in ("*+", "+*"))
    return "|".join([*words, digits, r" ?[^\s\p{L}\p{N}]+[\r\n/]*", SPACES])


GPT4O = _by_case(f"{ENDINGS}?", r"\p{N}{1,3}")
TEKKEN = _by_case("", r"\p{N}")
# The first name of a row is the one we write; the others are its equals.
SPLITS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4"), (GPT2,)),
    **dict.fromkeys(("gigachat", "a.x-4.0", "mellum", "modern-bert", "roberta-bpe", "jina-v2-es"), (GPT2,)),
    **dict.fromkeys(("jina-es", "jina-de", "jina-v2-de", "jina-v1-en", "jina-v2-code"), (GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), (r"\p{N}", GPT2)),
    **dict.fromkeys(("minerva-7b", "mellum2"), (r"\p{N}", GPT2)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0"), (LLAMA3,)),
    **dict.fromkeys(("lfm2", "jina-v5-nano", "glm4", "glm5"), (LLAMA3,)),
    **dict.fromkeys(("smaug-bpe", "dbrx", "chatglm-bpe"), (LLAMA3,)),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez"), (QWEN2,)),
    **dict.fromkeys(("hunyuan", "solar-open", "grok-2", "bailingmoe", "bailingmoe2", "llada-moe"), (QWEN2,)),
    "qwen35": (QWEN35,),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm"), (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK)),
    "seed-coder": (SEED,),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"),
    **dict.fromkeys(("bloom", "poro-chat", "gpt3-finnish"), (BLOOM,)),
    "viking": (BLOOM, r"\p{N}"),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"), (GPT4O,)),
    "tekken": (TEKKEN,),
    "default": (PUNCTUATION, GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),  # where the file names none
}
BEGINS = (
    "llama-bpe",
    "llama3",
    "llama-v3",
    "falcon3",
    "falcon-h1",
    "pixtral",
    "midm-2.0",
    "lfm2",
    "jina-v5-nano",
    "tekken",
)
"""a text begins with bos where no flag says otherwise"""
WHOLE = (*BEGINS, "glm4", "glm5")
"""a part that is a token is taken as it is (ignore_merges)"""
COMPOSED = ("qwen2", "deepseek-r1-qwen")
"""trained on texts in NFC, which the released tokenizer makes of any and llama.cpp does not"""


def split(pattern: str) -> dict[str, Any]:
    """One step as a pre-tokenizer of tokenizer.json."""
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
