"""An artifact read back by our own reader: the engine for whoever has no other, independent of what wrote it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import kobza
from kobza.config import InputError
from kobza.export.proof.engine import EngineError, Reference
from kobza.formats.headers import inside, read_json
from kobza.formats.load import load_model
from kobza.formats.template import ChatTemplate, find_template
from kobza.tokenizer import LibraryTokenizer, Tokenizer, load_tokenizer


def open_own(path: Path, tokenizer_text: Callable[[dict[str, Any]], str] | None = None) -> Reference:
    """A Hugging Face folder or a .gguf as an engine: weights, tokenizer, template and ends all out of the artifact.

    tokenizer_text: the metadata of a .gguf -> the text of its tokenizer.json; a folder needs none.
    """
    path = Path(path)
    try:
        foreign = load_model(path)
        if foreign.kind == "gguf":
            assert tokenizer_text is not None, "a .gguf needs a reader of its vocabulary"
            tokenizer: Tokenizer = LibraryTokenizer(tokenizer_text(foreign.metadata))
            ends = [foreign.metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
        else:
            # the library leaves out a character that it does not know, so that is what the file means
            tokenizer, ends = load_tokenizer(inside(path, "tokenizer.json"), "skip"), _folder_ends(path)
        template = find_template(path)
    except InputError as error:
        raise EngineError(f"kobza's reader: {error}") from None
    except (ValueError, KeyError, TypeError, OSError, RuntimeError) as error:  # of the tokenizers library, of json
        raise EngineError(f"kobza's reader: {path}: {str(error).splitlines()[0]}") from None
    known = [i for i in ends if _is_id(i, foreign.config.vocab_size)]
    found = template if isinstance(template, ChatTemplate) else None
    return Reference(foreign.model, tokenizer, found, known, f"kobza {kobza.__version__}, reading it back")


def _folder_ends(folder: Path) -> Sequence[Any]:
    """What generation_config.json, else config.json, calls eos."""
    for name in ("generation_config.json", "config.json"):
        found = read_json(inside(folder, name)).get("eos_token_id") if (folder / name).exists() else None
        if found is not None:
            return found if isinstance(found, list) else [found]
    return ()


def _is_id(value: Any, vocab_size: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocab_size
