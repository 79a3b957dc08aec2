"""A model repository of the Hugging Face hub -> its files on this disk: pinned to a commit, resumable, checksummed.

The `huggingface_hub` library speaks the protocol: it resolves a revision, lists files with their checksums, adds the user's
token, retries. Since its version 2 it throws a file away that a dead process left half done, so which bytes are still to come
and whether a file is the one that the hub lists is settled here. A file lies under its own name once its checksum is right:
sha256 of what git-lfs keeps, git's own sha1 of what it does not. Until then it is NAME.part, and a later call asks for the rest.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kobza.config import InputError, require
from kobza.hub.wheel import REMEDY, Unavailable

# What a model needs to be read; never a pickle, never code.
WANTED = re.compile(
    r"config\.json|generation_config\.json|model\.safetensors|model-\d{5}-of-\d{5}\.safetensors"
    r"|model\.safetensors\.index\.json|tokenizer\.json|tokenizer_config\.json|tokenizer\.model(\.v\d+)?|vocab\.json"
    r"|merges\.txt|added_tokens\.json|special_tokens_map\.json|chat_template\.jinja"
)
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
COMMIT = re.compile(r"[0-9a-f]{40}")
SMALL_BYTES = 64 << 20  # a file that is no tensor is read whole later: larger is no tokenizer
FILES = 2000  # of a repository that are looked at
CHUNK = 1 << 20

Progress = Callable[[str, int, int], None]  # file, bytes there, bytes in all


@dataclass(frozen=True)
class HubFile:
    """A file that the hub lists: its name, size and checksum, "sha256:..." or "git:..."."""

    name: str
    size: int
    digest: str


@dataclass(frozen=True)
class Snapshot:
    """A repository at one commit."""

    repository: str
    commit: str
    license: str | None
    files: tuple[HubFile, ...]

    @property
    def small(self) -> tuple[HubFile, ...]:
        """All but the weights."""
        return tuple(file for file in self.files if not file.name.endswith(".safetensors"))


def look_up(repository: str, revision: str | None = None, endpoint: str | None = None) -> Snapshot:
    """The commit that a revision (default: the main branch) is now, and the files of a model in it."""
    from huggingface_hub import HfApi

    with errors(repository, revision):
        info = HfApi(endpoint=endpoint).model_info(repository, revision=revision, files_metadata=True, timeout=30)
    commit = info.sha or ""
    require(COMMIT.fullmatch(commit) is not None, f"{repository}: the hub names no commit for it; {REMEDY}")
    siblings = info.siblings or []
    require(len(siblings) <= FILES, f"{repository}: {len(siblings):,} files; a model has fewer than {FILES:,}")
    files = tuple(_listed(repository, entry) for entry in siblings if WANTED.fullmatch(entry.rfilename))
    names = [file.name for file in files]
    other = sorted({Path(entry.rfilename).suffix for entry in siblings} & {".gguf", ".bin", ".pt", ".pth"})
    hint = f"; it has {', '.join(other)}, which is not pulled by a repository's name" if other else ""
    require(
        "config.json" in names, f"{repository}: no config.json, so this is no model in the Hugging Face layout{hint}"
    )
    weights = [name for name in names if name.endswith(".safetensors")]
    require(bool(weights), f"{repository}: no model.safetensors{hint}; look for a conversion of it to safetensors")
    return Snapshot(repository, commit, _license(info), files)


def _listed(repository: str, entry: Any) -> HubFile:
    """A file of the list, with what will show that it is the one."""
    name, size = entry.rfilename, entry.size
    lfs = entry.lfs.sha256 if entry.lfs is not None else None
    digest = f"sha256:{lfs}" if lfs else f"git:{entry.blob_id}"
    known = isinstance(size, int) and size >= 0 and re.fullmatch(r"sha256:[0-9a-f]{64}|git:[0-9a-f]{40}", digest)
    require(
        bool(known), f"{repository}: the hub lists {name} without size and checksum; it cannot be checked, so refused"
    )
    small = size <= SMALL_BYTES or name.endswith(".safetensors")
    require(small, f"{repository}: {name} has {size:,} bytes; such a file has at most {SMALL_BYTES:,}")
    return HubFile(name, size, digest)


def _license(info: Any) -> str | None:
    """The license that a model's card names."""
    card = info.card_data.to_dict() if info.card_data is not None else {}
    return card.get("license") if isinstance(card.get("license"), str) else None


def download(snapshot: Snapshot, folder: Path, progress: Progress, endpoint: str | None = None) -> Path:
    """The folder with every file of the snapshot, each checked; what an earlier call brought is not asked for again."""
    folder.mkdir(parents=True, exist_ok=True)
    there = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    missing, free = sum(file.size for file in snapshot.files) - there, shutil.disk_usage(folder).free
    full = (
        f"{snapshot.repository}: {missing / 1e9:.1f} GB are to be fetched and {free / 1e9:.1f} GB are free in {folder}"
    )
    require(missing <= free, f"{full}; free some space")
    for file in snapshot.files:
        assert WANTED.fullmatch(file.name)  # and so no part of a path
        final = folder / file.name
        if not final.is_file():
            fetch(snapshot, file, final, progress, endpoint)
        progress(file.name, file.size, file.size)
    return folder


def fetch(snapshot: Snapshot, file: HubFile, final: Path, progress: Progress, endpoint: str | None = None) -> None:
    """Bring one file: what is left of it, then its checksum, then its name. A part that proves wrong is fetched afresh once."""
    part = final.with_name(f"{final.name}.part")
    resumed = part.is_file() and part.stat().st_size > 0
    if resumed and part.stat().st_size > file.size:
        part.unlink()
    _receive(snapshot, file, part, progress, endpoint)
    if resumed and digest(part, file.digest) != file.digest:
        part.unlink()
        _receive(snapshot, file, part, progress, endpoint)
    found = digest(part, file.digest)
    if found != file.digest:
        part.unlink()
        raise Unavailable(
            f"{snapshot.repository}: {file.name} came with {found[:19]}... and the hub lists {file.digest[:19]}...; refused, "
            f"nothing of it is kept; {REMEDY}"
        )
    part.rename(final)


def _receive(snapshot: Snapshot, file: HubFile, part: Path, progress: Progress, endpoint: str | None) -> None:
    """Append what is missing of a file to its part."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(snapshot.repository, file.name, revision=snapshot.commit, endpoint=endpoint)
    with errors(snapshot.repository, snapshot.commit), open(part, "ab") as stream:
        sink: Any = Counted(stream, file, progress)
        try:
            http_get(
                url,
                sink,
                resume_size=sink.tell(),
                headers=build_hf_headers(),
                expected_size=file.size,
                tqdm_class=Silent,
            )
        except OSError as error:
            if "Consistency check" not in str(error):
                raise
            raise Unavailable(
                f"{snapshot.repository}: {file.name} came with another length than {file.size:,}; {REMEDY}"
            ) from None


class Counted:
    """A file that tells its length as it grows and never grows past what was announced."""

    def __init__(self, stream: Any, file: HubFile, progress: Progress):
        self.stream, self.file, self.progress = stream, file, progress

    def write(self, data: bytes) -> None:
        """Append."""
        after = self.stream.tell() + len(data)
        require(
            after <= self.file.size,
            f"{self.file.name}: the server sends more than the {self.file.size:,} bytes it lists",
        )
        self.stream.write(data)
        self.progress(self.file.name, after, self.file.size)

    def tell(self) -> int:
        """Bytes there."""
        return self.stream.tell()

    def seek(self, place: int) -> None:
        """Before a truncation."""
        self.stream.seek(place)

    def truncate(self) -> None:
        """Start again: the server would not go on in the middle."""
        self.stream.truncate()


class Silent:
    """What the library takes for a progress bar; ours is drawn by who called."""

    def __init__(self, *_args: Any, **_settings: Any):
        self.n = 0

    def update(self, n: float = 1) -> None:
        """Nothing to show."""

    def close(self) -> None:
        """Nothing to end."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *_error: object) -> None:
        return None


def digest(path: Path, like: str) -> str:
    """The checksum of a file in the manner of another: "sha256:...", or git's of a blob."""
    kind, size = like.partition(":")[0], path.stat().st_size
    sums = hashlib.sha256() if kind == "sha256" else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(CHUNK):
            sums.update(block)
    return f"{kind}:{sums.hexdigest()}"


@contextmanager
def errors(repository: str, revision: str | None) -> Iterator[None]:
    """What the library raises, as one line that names the remedy."""
    from huggingface_hub import errors as hub

    transport = hub.HfHubHTTPError.__bases__[0]  # the error of the library's HTTP client, whichever that is by now
    where = f"{repository} at {revision}" if revision else repository
    try:
        yield
    except InputError:
        raise
    except hub.OfflineModeIsEnabled:
        raise Unavailable(
            f"{where}: HF_HUB_OFFLINE is set, so the hub is not asked; unset it, or name a local folder"
        ) from None
    except hub.GatedRepoError:
        raise Unavailable(f"{where}: {_gated(repository)}") from None
    except hub.RevisionNotFoundError:
        raise Unavailable(f"{where}: no such revision; name a branch, a tag or a commit with --revision") from None
    except hub.RepositoryNotFoundError:
        raise Unavailable(
            f"{where}: no such model on the hub, or a private one; see its spelling, or log in with: hf auth login"
        ) from None
    except (hub.HFValidationError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Unavailable(f"{where}: the hub's answer is not understood: {error!r:.100}; {REMEDY}") from None
    except hub.HfHubHTTPError as error:
        code = getattr(error.response, "status_code", "?")
        said = _gated(repository) if code in (401, 403) else f"the hub answers {code}; try again later"
        raise Unavailable(f"{where}: {said}") from None
    except transport as error:
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Unavailable(f"{where}: the hub cannot be reached ({what}); {REMEDY}; what has come is kept") from None


def _gated(repository: str) -> str:
    return (
        f"access is not granted: accept its terms at https://huggingface.co/{repository} and log in with: hf auth login "
        "(or set HF_TOKEN)"
    )
