"""Clean chat templates of the families, and what people break in them.

The families' folders are specimens.py's. What only a file of a template shows (Llama-2's, Mistral's, a thinking Qwen's, a
Modelfile) stands here, in the form released ones have.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kobza.doctor.files.template import TemplateSubject, open_
from kobza.doctor.mutations.proof import Control, Mutation
from kobza.doctor.mutations.specimens import edit, folder

Edit = Callable[[Path], Any]

LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '<s>' + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + '</s>' }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ '<s>' }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ message['content'] + '</s>' }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
THINKING = """{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.last %}
            {{- '<think>\\n\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
TOOLED = (
    "{%- if tools %}{{- '<|im_start|>system\nTools:\n' }}{%- for tool in tools %}{{- tool | tojson + '\n' }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}{%- endif %}{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' + message.content }}"
    "{%- for call in message.tool_calls or [] %}{{- '<tool_call>' + call.function | tojson + '</tool_call>' }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
# Each line ends where its tag ends: what the line end after it becomes depends on trim_blocks.
LEANING = """{% for message in messages %}
    {% if message.role in ('system', 'user', 'assistant') %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""
PLAIN = (
    "{% for message in messages %}{{ {'system': '', 'user': 'User: ', 'assistant': 'Assistant:'}[message.role] }}"
    "{{ ' ' if message.role == 'assistant' else '' }}{{ message.content }}"
    "{{ eos_token if message.role == 'assistant' else '' }}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
CHATML_GO = """{{ if .System }}<|im_start|>system
{{ .System }}<|im_end|>
{{ end }}{{ if .Prompt }}<|im_start|>user
{{ .Prompt }}<|im_end|>
{{ end }}<|im_start|>assistant
{{ .Response }}<|im_end|>
"""
MESSAGES_GO = """{{- range $i, $_ := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 }}<|im_start|>{{ .Role }}
{{ .Content }}{{ if not (and $last (eq .Role "assistant")) }}<|im_end|>
{{ end }}
{{- if and $last (ne .Role "assistant") }}<|im_start|>assistant
{{ end }}
{{- end }}"""


def modelfile(template: str, *stops: str, system: str = "") -> str:
    """The text of a Modelfile."""
    lines = ["FROM ./model.gguf", f'TEMPLATE """{template}"""', *(f'PARAMETER stop "{stop}"' for stop in stops)]
    return "\n".join(lines + ([f'SYSTEM "{system}"'] if system else [])) + "\n"


def write(path: Path, name: str, text: str) -> Path:
    """A file of that text in the folder."""
    path.mkdir(parents=True, exist_ok=True)
    (path / name).write_bytes(text.encode())
    return path / name


def chat(change: Callable[[str], str]) -> Edit:
    """An edit of a folder's chat template; it must change something."""

    def apply(config: dict[str, Any]) -> None:
        before = config.get("chat_template", "")
        config["chat_template"] = change(before)
        assert config["chat_template"] != before, "the mutation changes nothing"

    return lambda path: edit(path, "tokenizer_config.json", apply)


def swap(old: str, new: str) -> Edit:
    """A folder's chat template with `new` in the place of `old`."""
    return chat(lambda text: text.replace(old, new))


def _broken(family: str, change: Edit) -> Callable[[Path, int, str], TemplateSubject]:
    def make(path: Path, seed: int, dtype: str) -> TemplateSubject:
        change(folder(path / family, family, seed, dtype))
        return open_(path / family)

    return make


def _file(name: str, text: str) -> Callable[[Path, int, str], TemplateSubject]:
    return lambda path, seed, dtype: open_(write(path, name, text))


def _beside(family: str, change: Edit) -> Callable[[Path, int, str], TemplateSubject]:
    """A clean folder compared with a changed copy."""

    def make(path: Path, seed: int, dtype: str) -> TemplateSubject:
        one, two = folder(path / "one", family, seed, dtype), folder(path / "two", family, seed, dtype)
        change(two)
        return open_(one, against=two)

    return make


def _tooled(change: Edit) -> Edit:
    """Both of _beside's folders with a template that knows tools, the second one changed."""

    def both(path: Path) -> None:
        for name in ("one", "two"):
            chat(lambda _: TOOLED)(path.parent / name)
        change(path)

    return both


def _with_modelfile(text: str) -> Callable[[Path, int, str], TemplateSubject]:
    """Qwen's template without its default system message, compared with a Modelfile."""

    def make(path: Path, seed: int, dtype: str) -> TemplateSubject:
        one = folder(path / "qwen", "qwen", seed, dtype)
        swap("{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}", "")(one)
        return open_(one, against=write(path / "ollama", "Modelfile", text))

    return make


def _with_rows(family: str, *rows: list[tuple[str, str]]) -> Callable[[Path, int, str], TemplateSubject]:
    def make(path: Path, seed: int, dtype: str) -> TemplateSubject:
        one = folder(path / family, family, seed, dtype)
        lines = [json.dumps({"messages": [{"role": role, "content": text} for role, text in row]}) for row in rows]
        return open_(one, train_jsonl=write(path, "train.jsonl", "\n".join(lines)))

    return make


def _ends(*names: str) -> Edit:
    """generation_config.json with the ids of these tokens as its ends."""

    def change(path: Path) -> None:
        added = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
        ids = {token["content"]: token["id"] for token in added}
        edit(path, "generation_config.json", lambda config: config.update(eos_token_id=[ids[name] for name in names]))

    return change


def _clean(family: str) -> Control:
    return Control(family, lambda path, seed, dtype: open_(folder(path / family, family, seed, dtype)))


GOOD_ROWS = (
    [("user", "Hi"), ("assistant", "Hello")],
    [("user", "2 + 2?"), ("assistant", "4"), ("user", "sure?"), ("assistant", "yes")],
)
NO_LOOP = (
    "{% set m = messages[-1] %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STOP = "<|im_end|>"
ASK = "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
LLAMA_ASK = "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
GEMMA_ASK = "{{ '<start_of_turn>model\n' }}"

CONTROLS: tuple[Control, ...] = (
    *(_clean(family) for family in ("llama", "gemma", "qwen", "phi")),
    Control("gpt2 with a plain template", _broken("gpt2", chat(lambda _: PLAIN))),
    Control("llama 2, a file", _file("llama2.jinja", LLAMA2)),
    Control("mistral, a file", _file("mistral.jinja", MISTRAL)),
    Control("qwen 3 with thoughts", _broken("qwen", chat(lambda _: THINKING))),
    Control("qwen beside itself", _beside("qwen", lambda path: None)),
    Control("a template with tools beside itself", _beside("qwen", _tooled(lambda path: None))),
    Control("Modelfile, turn by turn", _file("Modelfile", modelfile(CHATML_GO, STOP))),
    Control("Modelfile, .Messages", _file("Modelfile", modelfile(MESSAGES_GO, STOP, "<|im_start|>"))),
    Control("qwen beside its Modelfile", _with_modelfile(modelfile(CHATML_GO, STOP))),
    Control("llama with training rows", _with_rows("llama", *GOOD_ROWS)),
)

MUTATIONS: tuple[Mutation, ...] = (
    Mutation("C1", "header always there", _broken("llama", swap(LLAMA_ASK, LLAMA_ASK[35:-12]))),
    Mutation(
        "C1", "header always there, Phi's", _broken("phi", swap("{% if add_generation_prompt %}", "{% if true %}"))
    ),
    Mutation("C1", "header never there", _broken("qwen", swap(ASK, ""))),
    Mutation(
        "C1",
        "another header asked than trained",
        _broken("qwen", swap("{{- '<|im_start|>assistant\n'", "{{- '<|im_start|>bot\n'")),
    ),
    Mutation("C2", "prompt without its line end", _broken("gemma", swap(GEMMA_ASK, GEMMA_ASK.replace("\n", "")))),
    Mutation(
        "C2", "prompt with a blank too many", _broken("qwen", swap(ASK, ASK.replace("assistant\n", "assistant\n ")))
    ),
    Mutation(
        "C2",
        "prompt ends in the next word's blank",
        _broken("gpt2", chat(lambda _: PLAIN.replace("{{ 'Assistant:' }}", "{{ 'Assistant: ' }}"))),
    ),
    Mutation("C3", "no loop", _broken("qwen", chat(lambda _: NO_LOOP))),
    Mutation(
        "C3",
        "one turn only",
        _broken(
            "qwen", chat(lambda text: "{% if messages|length > 2 %}{{ raise_exception('one') }}{% endif %}" + text)
        ),
    ),
    Mutation(
        "C3",
        "a line end after the last turn only",
        _broken("llama", chat(lambda text: text + "{{ '' if add_generation_prompt else '\n\n' }}")),
    ),
    Mutation(
        "C3",
        "first turn in another form",
        _broken("qwen", swap("'<|im_end|>' + '\n' }}", "'<|im_end|>' + ('' if loop.first else '\n') }}")),
    ),
    Mutation(
        "C3",
        "a Modelfile of questions only",
        _file(
            "Modelfile",
            modelfile(
                MESSAGES_GO.replace("{{ .Content }}", '{{ if ne .Role "assistant" }}{{ .Content }}{{ end }}'), STOP
            ),
        ),
    ),
    Mutation("C4", "system dropped", _broken("phi", swap("('system', 'user', 'assistant')", "('user', 'assistant')"))),
    Mutation(
        "C4",
        "system after the question",
        _broken(
            "qwen", swap("for message in messages", "for message in messages|sort(attribute='role', reverse=true)")
        ),
    ),
    Mutation(
        "C4",
        "inner white space eaten",
        _broken("qwen", swap("message.content +", "message.content.split()|join(' ') +")),
    ),
    Mutation(
        "C4", "html escaped", _broken("gemma", swap("message['content'] | trim", "message['content'] | trim | e"))
    ),
    Mutation(
        "C4",
        "each line trimmed",
        _broken("llama", swap("message['content'] | trim", "message['content'].split('\n')|map('trim')|join('\n')")),
    ),
    Mutation(
        "C4", "nobody told who speaks", _broken("qwen", swap("'<|im_start|>' + message.role + '\n'", "'<|im_start|>'"))
    ),
    Mutation(
        "C4",
        "question repeated at the end",
        _broken("qwen", swap(ASK, ASK.replace("{{- '", "{{- messages[-1].content + '"))),
    ),
    Mutation(
        "C4",
        "a role of the training rows is lost",
        _with_rows("phi", *GOOD_ROWS, [("user", "Hi"), ("tool", "42 degrees"), ("assistant", "Hello")]),
    ),
    Mutation(
        "C4", "training rows the template refuses", _with_rows("gemma", *GOOD_ROWS, [("user", "Hi"), ("user", "there")])
    ),
    Mutation(
        "C4",
        "a Modelfile with a system line of its own",
        _file("Modelfile", modelfile(CHATML_GO.replace("{{ .System }}", "Be kind."), STOP)),
    ),
    Mutation(
        "C5",
        "one header word changed",
        _beside("llama", swap("<|end_header_id|>\n\n' + message", "<|end_header_id|>\n' + message")),
    ),
    Mutation(
        "C5", "another default system message", _beside("qwen", swap("You are a helpful assistant.", "You are Qwen."))
    ),
    Mutation("C5", "tools written otherwise", _beside("qwen", _tooled(swap("tool | tojson", "tool | string")))),
    Mutation(
        "C5", "a tool's answer without the call", _beside("qwen", _tooled(swap("message.tool_calls or []", "[]")))
    ),
    Mutation(
        "C5",
        "contents trimmed on one side",
        _beside("phi", swap("message['content'] +", "(message['content'] | trim) +")),
    ),
    Mutation(
        "C5",
        "Modelfile without the line end",
        _with_modelfile(
            modelfile(CHATML_GO.replace("<|im_end|>\n{{ end }}<|im_start|>a", "<|im_end|>{{ end }}<|im_start|>a"), STOP)
        ),
    ),
    Mutation("C6", "leans on trim_blocks", _broken("qwen", chat(lambda _: LEANING))),
    Mutation("P5", "only the end of text ends", _broken("llama", _ends("<|end_of_text|>"))),
    Mutation("P5", "Gemma's turn end forgotten", _broken("gemma", _ends("<eos>"))),
    Mutation(
        "P5",
        "nothing ends an answer",
        _broken("gpt2", chat(lambda _: PLAIN.replace("{{ eos_token if message.role == 'assistant' else '' }}", ""))),
    ),
    Mutation("L2", "two beginnings", _broken("gemma", chat(lambda text: "{{ bos_token }}" + text))),
    Mutation("G1", "no beginning", _broken("llama", swap("bos_token + turn", "turn"))),
    Mutation("G10", "the report's misprint", _broken("gemma", swap("<end_of_turn>\n", "<end_of_turn>"))),
    Mutation("F1", "no stop", _file("Modelfile", modelfile(CHATML_GO))),
    Mutation("F1", "a stop of every text", _file("Modelfile", modelfile(CHATML_GO, STOP, "###"))),
    Mutation("F1", "beginning in TEMPLATE", _file("Modelfile", modelfile("<s>" + CHATML_GO, STOP))),
    Mutation("F4", "control token the tokenizer lacks", _broken("llama", swap("<|eot_id|>", "<|im_end|>"))),
)
