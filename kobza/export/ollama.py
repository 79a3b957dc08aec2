"""A Modelfile: what Ollama needs beside a GGUF file to say what the model says.

Ollama takes its prompt from TEMPLATE, a Go template, and never from the Jinja template within the GGUF file; without TEMPLATE it
guesses one by likeness. `go_form` writes it out of the model's own template and proves it on the conversations of
formats/turns.py; `proven` does so for one that a person wrote. llama.cpp below puts the beginning token before each text by the
GGUF file's word, so TEMPLATE leaves it out. Ollama's parser of a Modelfile knows no escapes, ends a quoted value where a line
ends in the quote, and drops what is not printable: a text that cannot be written so is refused, never changed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from kobza.config import InputError, nearest, require
from kobza.export.source import Source
from kobza.formats.gotemplate import GoTemplate, parse_modelfile
from kobza.formats.template import ChatTemplate
from kobza.formats.turns import ROLES, Unlike, check_alike, conversations, knows_system, probed, trims

NO_TURNS = "{{ .Prompt }}"  # a model that was taught none goes on from the text
MOST_CONTEXT = 8192  # Ollama takes the memory for all of num_ctx at once
PARAMETERS = {  # ours and Hugging Face's -> Ollama's
    **{name: name for name in ("temperature", "top_k", "top_p", "min_p", "repeat_penalty", "num_ctx", "num_predict")},
    "seed": "seed",
    "repetition_penalty": "repeat_penalty",
}


def modelfile(
    source: Source,
    gguf_name: str,
    bos: str = "",
    system: str = "",
    parameters: Mapping[str, Any] | None = None,
    adapter: str = "",
    go_template: str = "",
    license: str = "",
) -> str:
    """The text of a Modelfile that stands beside a GGUF file, and beside an adapter's if it names one.

    bos: the text of the token that the GGUF file has put before each text, "" where it has none; parameters: over the model's own
    defaults of sampling; go_template: a person's own TEMPLATE in place of the compiled one.
    """
    placed = not system or (source.template is not None and knows_system(source.template))
    require(placed, f"{source.name}: its chat template has no place for a system; leave it out")
    if source.template is None:
        template = go_template or NO_TURNS
    else:
        template = proven(go_template, source.template, bos) if go_template else go_form(source.template, bos)
    lines = [f"FROM {quoted(f'./{gguf_name}', 'FROM')}", f"TEMPLATE {quoted(template, 'TEMPLATE')}"]
    lines += [f"ADAPTER {quoted(f'./{adapter}', 'ADAPTER')}"] if adapter else []
    lines += [f"SYSTEM {quoted(system, 'SYSTEM')}"] if system else []
    lines += [f"PARAMETER stop {quoted(text, 'PARAMETER stop')}" for text in stops(source)]
    lines += [f"PARAMETER {name} {value}" for name, value in settings(source, parameters or {}).items()]
    lines += [f"LICENSE {quoted(license, 'LICENSE')}"] if license else []
    return "\n".join(lines) + "\n"


def create_line(name: str) -> str:
    """The command that hands a Modelfile to Ollama, under a name that Ollama takes."""
    plain = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-._")[:80]
    return f"ollama create {plain or 'model'} -f Modelfile"


def stops(source: Source) -> list[str]:
    """The texts of the tokens that end an answer, less those that no Modelfile can hold: the GGUF file stops at the tokens."""
    names = {i: name for name, i in source.tokenizer.specials.items()}
    texts = [names.get(i) or source.tokenizer.decode([i]) for i in source.ends]
    return [
        text for text in dict.fromkeys(texts) if text and "\ufffd" not in text and not _lost(text, "PARAMETER stop")
    ]


def notes(source: Source) -> list[str]:
    """What a person should know of the Modelfile."""
    if source.template is None:
        return ["no chat template: TEMPLATE hands on a prompt as it is"]
    trimmed = [role for role in ROLES if trims(source.template, role)]
    said = f"the chat template trims what {' and '.join(trimmed)} say, and Ollama cannot: send it without white space around"
    return [said] if trimmed else []


def settings(source: Source, given: Mapping[str, Any]) -> dict[str, float]:
    """Ollama's parameters: the model's own defaults, what is given over them, and no penalty on repetition unless one is named.
    Ollama has one of its own accord, under which a model of characters cannot spell."""
    odd = next((name for name in given if name not in PARAMETERS), None)
    require(odd is None, f"no parameter {odd!r} of Ollama's is known here{nearest(str(odd), sorted(PARAMETERS))}")
    values: dict[str, Any] = {"repeat_penalty": 1.0, "num_ctx": min(source.config.max_seq_len, MOST_CONTEXT)}
    for found in (source.sampling, given):
        values |= {PARAMETERS[name]: value for name, value in found.items() if name in PARAMETERS and value is not None}
    for name, value in values.items():
        require(type(value) in (int, float), f"{source.name}: {name} {value!r} is no number; give another")
    return values


# ---- TEMPLATE --------------------------------------------------------------------------------------------------------


def go_form(template: ChatTemplate, bos: str = "") -> str:
    """The Go template that writes what a chat template writes when it asks for an answer, less the `bos` that stands before it
    already. InputError with the shortest conversation that has no such form."""
    try:
        source = probed(template).go(bos)
        _prove(source, template, bos)
    except Unlike as error:
        raise InputError(f"{template.name}: has no Go form: {_shown(error)}; give one: --go-template FILE") from None
    return source


def proven(source: str, template: ChatTemplate, bos: str = "") -> str:
    """A person's Go template, which is refused if it writes a conversation otherwise than the chat template."""
    try:
        _prove(source, template, bos)
    except Unlike as error:
        raise InputError(f"--go-template: not what {template.name} writes: {_shown(error)}; mend it") from None
    return source


def _prove(source: str, template: ChatTemplate, bos: str) -> None:
    """Raise Unlike where the two differ. Words that the chat template trims come trimmed: Go cannot."""
    go = GoTemplate(source)
    talks = conversations(knows_system(template), [role for role in ROLES if trims(template, role)])
    check_alike(template, lambda messages, _: bos + go.render(messages, True), "and Ollama were sent", talks, True)


def _shown(error: Unlike) -> str:
    return f"of {json.dumps(error.messages, ensure_ascii=False)} ({error})"


# ---- what Ollama makes of the file -----------------------------------------------------------------------------------


def quoted(text: str, what: str) -> str:
    """A value as a Modelfile has it; InputError where it cannot hold it."""
    lost = _lost(text, what)
    require(not lost, f"{what} {text[:40]!r}: {lost}, which a Modelfile loses; take it out")
    return _marked(text)


def _marked(text: str) -> str:
    mark = "" if re.fullmatch(r"[\w./+-]+", text) else '"""' if '"' in text or "\n" in text else '"'
    return f"{mark}{text}{mark}"


def _lost(text: str, what: str) -> str:
    """What a Modelfile does not give back of a text, in words; "" where it gives back all."""
    odd = next((c for c in text if not c.isprintable() and c not in "\t\n"), None)
    if odd is not None:
        return f"it holds U+{ord(odd):04X}"
    try:
        read = parse_modelfile(f"FROM {'x' if what != 'FROM' else _marked(text)}\nSYSTEM {_marked(text)}\n")
    except InputError:
        return "a line of it ends in three quotes"
    return "" if read.system == text else "a line of it ends in three quotes"


def rendered(text: str, messages: Sequence[Mapping[str, Any]]) -> str:
    """What Ollama sends llama.cpp for a conversation under a Modelfile: TEMPLATE with SYSTEM, where the conversation brings no
    system of its own, and the history of MESSAGE before. llama.cpp puts the beginning token before it."""
    found = parse_modelfile(text)
    require(found.template is not None, "the Modelfile has no TEMPLATE; Ollama would guess one")
    assert found.template is not None
    told = bool(messages) and messages[0].get("role") == "system"
    system = [{"role": "system", "content": found.system}] if found.system and not told else []
    return found.template.render([*system, *found.messages, *messages], True)
