"""A submission: a checkpoint, the text it wrote and how, and the file that carries both from one laptop to another.

    x.kobza    a zip, nothing in it compressed: submission.json  model.safetensors  config.json  tokenizer.json  manifest.json
               and metrics.jsonl, the run's own record, where there is one

Whoever sends a file may be hostile, so `unpack` takes the members it knows and no others, holds every size against the file's own
and against the rules before it writes, and reads tensors' headers without trusting them. Nothing in it is ever executed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import unicodedata
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from kobza.config import InputError, ModelConfig, SampleConfig, check_keys, from_dict, require, to_dict
from kobza.formats.headers import read_header

FORMAT = 1
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json")  # what the checkpoint's sha256 is over
SUBMISSION, MANIFEST, METRICS = "submission.json", "manifest.json", "metrics.jsonl"
MOST_BYTES = {  # of each member; the weights have what the rules allow
    SUBMISSION: 4_000_000,
    MANIFEST: 10_000,
    METRICS: 64_000_000,
    "config.json": 1_000_000,
    "tokenizer.json": 32_000_000,
}
MEMBERS = (*MODEL_FILES, SUBMISSION, MANIFEST, METRICS)
MOST_NAME, MOST_PROMPT, MOST_TEXT = 60, 100_000, 1_000_000  # characters
CHUNK = 1 << 20
REMEDY = "pack it again: kobza contest pack"


@dataclass(frozen=True)
class Record:
    """What a run says of its own training; its owner's word. None: it says nothing."""

    steps: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    text_sha256: str | None = None
    """of the tokens, as a checkpoint's provenance has it: the same text under another tokenizer has another"""


@dataclass(frozen=True)
class Submission:
    """Everything that is claimed of an entry; `verify` proves it."""

    name: str
    prompt: str
    sampling: SampleConfig
    text: str
    """what follows the prompt"""
    ids: tuple[int, ...]
    """the tokens drawn, with the one that ended the text if one did"""
    checkpoint: str
    """sha256 over MODEL_FILES, see `checkpoint_digest`"""
    model: ModelConfig
    n_parameters: int
    record: Record = field(default_factory=Record)
    kobza: str = ""
    torch: str = ""
    machine: str = ""

    def __post_init__(self) -> None:
        for name in ("name", "prompt", "text", "checkpoint", "kobza", "torch", "machine"):
            value = getattr(self, name)
            good = isinstance(value, str) and len(value) <= MOST_TEXT
            require(good, f"submission: {name} is no text of at most {MOST_TEXT:,} characters; {REMEDY}")
            require(is_unicode(value), f"submission: {name} holds half a surrogate pair, which no UTF-8 spells")
        most = f"the prompt has {len(self.prompt):,} characters; at most {MOST_PROMPT:,}"
        require(len(self.prompt) <= MOST_PROMPT, most)
        require(check_name(self.name) == self.name, f"submission: name {self.name!r} is not as a name is stored")
        whole = isinstance(self.ids, tuple) and all(type(i) is int and 0 <= i < 2**31 for i in self.ids)
        require(whole and len(self.ids) > 0, f"submission: ids are no list of token numbers; {REMEDY}")
        require(type(self.n_parameters) is int, f"submission: n_parameters is no whole number; {REMEDY}")

    @property
    def text_key(self) -> str:
        """What two equal texts share: prompt and text without regard to white space."""
        return hashlib.sha256(" ".join((self.prompt + self.text).split()).encode()).hexdigest()

    def to_json(self) -> str:
        """The text of submission.json."""
        return json.dumps({"format": FORMAT, **to_dict(self)}, indent=1, ensure_ascii=False)


@dataclass(frozen=True)
class Verdict:
    """What `verify` found: every line says what was looked at, or why the entry is refused."""

    ok: bool
    lines: tuple[str, ...]

    def to_json(self) -> str:
        """For the store."""
        return json.dumps({"ok": self.ok, "lines": self.lines}, ensure_ascii=False)


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can spell a text: it has no half of a surrogate pair."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def check_name(name: str) -> str:
    """A person's name as it is stored: composed, white space joined; refused if empty, long, or with what cannot be seen."""
    require(is_unicode(name), "the name holds half a surrogate pair, which no UTF-8 spells; type it again")
    short = f"the name has {len(name):,} characters; at most {MOST_NAME}"
    require(len(name) <= 4 * MOST_NAME, short)
    name = " ".join(unicodedata.normalize("NFC", name).split())
    require(0 < len(name) <= MOST_NAME, "the name is empty; give one" if not name else short)
    unseen = next(
        (c for c in name if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn") and c != "\u200d"), None
    )
    require(unseen is None, f"the name holds {unseen!r}, which cannot be seen; leave it out")
    seen = any(unicodedata.category(c)[0] in "LNPS" for c in name)
    require(seen, f"the name {name!r} holds nothing that can be seen; give one")
    return name


def name_key(name: str) -> str:
    """What two spellings of a name share: case and width do not matter. name_key("ＡDA") == name_key("ada")"""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())


def read_submission(text: str, where: str) -> Submission:
    """A Submission from the text of a submission.json; whatever is missing, unknown or of another type is refused."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({str(error)[:100]}); {REMEDY}") from None
    require(isinstance(content, dict), f"{where}: not an object; {REMEDY}")
    found = content.pop("format", None)
    require(found == FORMAT, f"{where}: format {str(found)[:20]!r} and this kobza reads {FORMAT}; update kobza")
    check_keys(Submission, content, where)
    missing = [f.name for f in fields(Submission) if f.name not in content]
    require(not missing, f"{where}: {', '.join(missing)} missing; {REMEDY}")
    tables = {name: content[name] for name in ("sampling", "model", "record")}
    flat = [name for name, value in tables.items() if not isinstance(value, dict)]
    require(not flat, f"{where}: {', '.join(flat)} must be an object; {REMEDY}")
    require(isinstance(content["ids"], list), f"{where}: ids must be a list; {REMEDY}")
    try:
        parts = {
            "sampling": from_dict(SampleConfig, tables["sampling"], f"{where}: sampling"),
            "model": from_dict(ModelConfig, tables["model"], f"{where}: model"),
            "record": read_record(tables["record"], f"{where}: record"),
        }
        return Submission(**content | parts | {"ids": tuple(content["ids"])})
    except (TypeError, OverflowError) as error:
        raise InputError(f"{where}: {str(error)[:100]}; {REMEDY}") from None


def read_record(values: Mapping[str, Any], where: str) -> Record:
    """A Record; a number that is none, or not finite, is refused."""
    check_keys(Record, dict(values), where)
    record = Record(**values)
    given = {name: value for name, value in vars(record).items() if value is not None}
    types = {"steps": (int,), "tokens": (int,), "seconds": (int, float), "text_sha256": (str,)}
    for name, value in given.items():
        good = type(value) in types[name] and (isinstance(value, str) or 0 <= value < 2**53)
        require(good, f"{where}: {name} is {str(value)[:80]!r}; {REMEDY}")
    return record


# ---- files ---------------------------------------------------------------------------------------------------------


def file_digest(path: Path) -> str:
    """The sha256 of a file."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}; {REMEDY}") from None


def checkpoint_digest(folder: Path) -> str:
    """The sha256 of a checkpoint: over the names and sha256 of its weights, config and tokenizer."""
    lines = (f"{name} {file_digest(folder / name)}\n" for name in MODEL_FILES)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def collect(checkpoint: Path, metrics: Path | None, folder: Path) -> None:
    """Copy what a submission needs of a checkpoint (and its run's record) into a new folder, under a manifest of its own."""
    folder.mkdir(parents=True)
    for name in MODEL_FILES:
        shutil.copyfile(checkpoint / name, folder / name)
    sizes = {name: (folder / name).stat().st_size for name in MODEL_FILES}
    entries = {name: {"bytes": sizes[name], "sha256": file_digest(folder / name)} for name in MODEL_FILES}
    (folder / MANIFEST).write_text(json.dumps(entries, indent=1))
    if metrics is not None and metrics.is_file():
        shutil.copyfile(metrics, folder / METRICS)


def pack(folder: Path, out: Path) -> Path:
    """A folder of `collect` with its submission.json -> the one file; written whole or not at all."""
    aside = out.with_name(f".{out.name}.part")
    try:
        with zipfile.ZipFile(aside, "w", zipfile.ZIP_STORED) as archive:
            for name in MEMBERS:
                if (folder / name).is_file():
                    archive.write(folder / name, name)
        aside.replace(out)
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror}; take another --out") from None
    finally:
        aside.unlink(missing_ok=True)
    return out


def unpack(path: Path, folder: Path, most_bytes: int) -> Submission:
    """A submission's file -> its Submission, its checkpoint in a new folder; on any doubt an InputError and no folder."""
    require(path.is_file(), f"{path}: no such file; give what kobza contest pack wrote")
    size, where = path.stat().st_size, path.name
    require(size <= most_bytes, f"{where}: {size:,} bytes; the rules allow {most_bytes:,}")
    try:
        folder.mkdir(parents=True)
        with zipfile.ZipFile(path) as archive:
            for member in checked_members(archive, size, where):
                _take(archive, member, folder / member.filename, where)
        return open_folder(folder, where)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OverflowError, ValueError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        known = isinstance(error, InputError)
        raise error if known else InputError(f"{where}: not a submission ({str(error)[:100]}); {REMEDY}") from None
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def checked_members(archive: zipfile.ZipFile, size: int, where: str) -> list[zipfile.ZipInfo]:
    """The members of a submission's file, all that must be there, none that must not, none longer than it may be."""
    found = archive.infolist()
    names = [member.filename for member in found]
    strange = next((name for name in names if name not in MEMBERS), None)
    require(strange is None, f"{where}: {str(strange)[:80]!r} is no part of a submission; refused")
    require(len(set(names)) == len(names), f"{where}: a part is there twice; refused")
    missing = [name for name in MEMBERS if name not in names and name != METRICS]
    require(not missing, f"{where}: {', '.join(missing)} missing; {REMEDY}")
    for member in found:
        plain = member.compress_type == zipfile.ZIP_STORED and member.file_size == member.compress_size
        require(plain and not member.flag_bits & 1, f"{where}: {member.filename} is compressed or encrypted; {REMEDY}")
        most = MOST_BYTES.get(member.filename, size)
        require(
            member.file_size <= most, f"{where}: {member.filename} has {member.file_size:,} bytes; at most {most:,}"
        )
    total = sum(member.file_size for member in found)
    require(total <= size, f"{where}: its parts claim {total:,} bytes, the file has {size:,}; forged")
    return found


def _take(archive: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path, where: str) -> None:
    """One member -> a new file, never longer than announced. zipfile checks its CRC."""
    written = 0
    with archive.open(member) as source, open(target, "xb") as file:
        while block := source.read(CHUNK):
            written += len(block)
            require(written <= member.file_size, f"{where}: {member.filename} is longer than announced; forged")
            file.write(block)


def open_folder(folder: Path, where: str) -> Submission:
    """The Submission of a folder; that its weights are safetensors and its files are those that were hashed."""
    path = folder / SUBMISSION
    try:
        require(path.stat().st_size <= MOST_BYTES[SUBMISSION], f"{where}: {SUBMISSION} is too long; {REMEDY}")
        submission = read_submission(path.read_text(encoding="utf-8"), f"{where}: {SUBMISSION}")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}; {REMEDY}") from None
    except UnicodeDecodeError as error:
        bad = error.object[error.start]
        raise InputError(f"{where}: {SUBMISSION}: byte 0x{bad:02x} at {error.start} is not UTF-8; {REMEDY}") from None
    read_header(folder / "model.safetensors")
    found = checkpoint_digest(folder)
    same = f"{where}: the checkpoint's sha256 is {found[:12]} and the submission says {submission.checkpoint[:12]!r}"
    require(found == submission.checkpoint, f"{same}: weights, config or tokenizer were changed; refused")
    return submission
