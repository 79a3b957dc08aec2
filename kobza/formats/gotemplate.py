"""Ollama's Modelfiles, and the part of Go's text/template that their TEMPLATE uses: parsed and interpreted here, within bounds.

Understood: text, {{ .Field }}, {{ $x := ... }}, if / else if / else, range with variables, with, break, continue, comments, the
trim marks {{- and -}}, pipes, parentheses, strings, numbers, and the functions of `_FUNCTIONS`. Whatever else Go knows (define,
block, template, methods) is refused with its line. Nothing is executed but what stands here, so no process is needed: steps,
depth and output are counted.

How a conversation is put through a template is Ollama's doing and part of its meaning (`GoTemplate.render`): a template that
names .Messages gets them all at once; one that knows only .System, .Prompt and .Response is run once a turn, and cut off after
.Response for the turn that is to be answered.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from kobza.config import InputError, nearest, require

MOST_SOURCE = 1 << 18  # the longest released ones have about 10,000 characters
MOST_CHARACTERS = 4_000_000
MOST_STEPS = 100_000
MOST_DEPTH = 100
MOST_TOKENS = 1000  # of one action
COMMANDS = "from license template system adapter draft renderer parser parameter message requires".split()
ROLES = ("system", "user", "assistant")
FIELDS = {
    "Role": "role",
    "Content": "content",
    "Thinking": "thinking",
    "ToolName": "tool_name",
    "ToolCallID": "tool_call_id",
}


class Text(NamedTuple):
    text: str


class Action(NamedTuple):
    """{{ pipe }}: its value is written unless it declares or sets variables."""

    pipe: Pipe


class Branch(NamedTuple):
    """if, with or range; `names` are the variables of a range."""

    kind: str
    pipe: Pipe
    body: list[Any]
    orelse: list[Any]


class Jump(NamedTuple):
    """break or continue."""

    kind: str


class Pipe(NamedTuple):
    """[names := or =] command | command ...; a command is a list of operands."""

    names: tuple[str, ...]
    declares: bool
    commands: list[list[Any]]
    line: int


class Literal(NamedTuple):
    value: Any


class Fields(NamedTuple):
    """`root` ("." or "$x" or a Pipe in parentheses) and the fields that follow."""

    root: Any
    path: tuple[str, ...]


class Function(NamedTuple):
    name: str


# ---- text -> nodes ---------------------------------------------------------------------------------------------------

_TOKEN = re.compile(
    r"""(?P<space>\s+) | (?P<string>"(?:[^"\\\n]|\\.)*"|`[^`]*`) | (?P<number>[-+]?\d+(?:\.\d+)?)
    | (?P<declare>:=) | (?P<mark>[=|(),]) | (?P<path>\$?\w*(?:\.[A-Za-z_]\w*)+|\$\w*|\.) | (?P<word>[A-Za-z_]\w*)""",
    re.VERBOSE,
)


class _Piece(NamedTuple):
    """What stands between two {{ }}, or in one: `tokens` is None for text."""

    text: str
    line: int
    tokens: list[tuple[str, str]] | None


def _pieces(source: str, name: str) -> Iterator[_Piece]:
    """Text and actions in turn, trim marks obeyed, comments left out."""
    place, line, strip = 0, 1, False
    while True:
        start = source.find("{{", place)
        text = source[place:] if start < 0 else source[place:start]
        lines, marked = text.count("\n"), start >= 0 and source[start + 2 : start + 4] in ("- ", "-\n", "-\t", "-\r")
        text = text.lstrip(" \t\r\n") if strip else text
        text = text.rstrip(" \t\r\n") if marked else text
        if text:
            yield _Piece(text, line, None)
        line += lines
        if start < 0:
            return
        inner = start + (3 if marked else 2)
        tokens, place, strip = _tokens(source, inner, f"{name} line {line}")
        if tokens:
            yield _Piece("", line, tokens)
        line += source.count("\n", start, place)


def _tokens(source: str, place: int, where: str) -> tuple[list[tuple[str, str]], int, bool]:
    """The tokens of an action from `place` on, the place after its }}, and whether it ends in a trim mark."""
    comment = re.compile(r"\s*/\*.*?\*/\s*?(\s-)?\}\}", re.DOTALL).match(source, place)
    if comment:
        return [], comment.end(), comment.group(1) is not None
    tokens: list[tuple[str, str]] = []
    while True:
        end = re.compile(r"\s+-\}\}|\s*\}\}").match(source, place)
        if end:
            require(bool(tokens), f"{where}: an empty action {{{{ }}}}")
            return tokens, end.end(), "-" in end.group()
        found = _TOKEN.match(source, place)
        require(place < len(source), f"{where}: {{{{ without its }}}}")
        require(found is not None, f"{where}: unexpected {source[place : place + 10]!r} in an action")
        assert found is not None and found.lastgroup is not None
        if found.lastgroup != "space":
            tokens.append((found.lastgroup, found.group()))
            require(len(tokens) <= MOST_TOKENS, f"{where}: an action of more than {MOST_TOKENS} words")
        place = found.end()


class _Parser:
    """Pieces -> nodes; one pass, `depth` bounded."""

    def __init__(self, source: str, name: str):
        self.pieces, self.name, self.place = list(_pieces(source, name)), name, 0
        self.tokens: list[tuple[str, str]] = []
        self.line = 1

    def fail(self, message: str) -> InputError:
        return InputError(f"{self.name} line {self.line}: {message}")

    def body(self, depth: int, ends: tuple[str, ...]) -> tuple[list[Any], str]:
        """Nodes up to one of the words `ends` ("end", "else"), or to the end of the source where there are none."""
        if depth > MOST_DEPTH:
            raise self.fail(f"nested more than {MOST_DEPTH} deep")
        nodes: list[Any] = []
        while self.place < len(self.pieces):
            piece = self.pieces[self.place]
            self.place, self.line = self.place + 1, piece.line
            if piece.tokens is None:
                nodes.append(Text(piece.text))
                continue
            self.tokens = piece.tokens
            word = self.tokens[0][1] if self.tokens[0][0] == "word" else ""
            if word in ("end", "else"):
                if word not in ends:
                    raise self.fail(f"{word} without an if, range or with")
                self.tokens = self.tokens[1:]
                return nodes, word
            nodes.append(self.node(word, depth))
        if ends:
            raise self.fail("the source ends before an {{ end }}")
        return nodes, ""

    def node(self, word: str, depth: int) -> Any:
        if word in ("if", "with", "range"):
            self.tokens = self.tokens[1:]
            return self.branch(word, depth)
        if word in ("break", "continue"):
            self.tokens = self.tokens[1:]
            self.finish()
            return Jump(word)
        if word in ("define", "template", "block"):
            raise self.fail(f"{word} is not understood; write its text where it is used")
        pipe = self.pipe(depth)
        self.finish()
        return Action(pipe)

    def branch(self, kind: str, depth: int) -> Branch:
        pipe = self.pipe(depth)
        self.finish()
        body, word = self.body(depth + 1, ("end", "else"))
        orelse: list[Any] = []
        if word == "else" and self.tokens and self.tokens[0][1] in ("if", "with"):
            kind_of_else, self.tokens = self.tokens[0][1], self.tokens[1:]
            if depth > MOST_DEPTH:
                raise self.fail(f"more than {MOST_DEPTH} else-ifs")
            return Branch(kind, pipe, body, [self.branch(kind_of_else, depth + 1)])
        self.finish()
        if word == "else":
            orelse, _ = self.body(depth + 1, ("end",))
            self.finish()
        return Branch(kind, pipe, body, orelse)

    def finish(self) -> None:
        if self.tokens:
            raise self.fail(f"unexpected {self.tokens[0][1]!r}")

    def pipe(self, depth: int) -> Pipe:
        """[$a[, $b] :=] command {| command}"""
        if depth > MOST_DEPTH:
            raise self.fail(f"nested more than {MOST_DEPTH} deep")
        names, declares = self.declaration()
        commands: list[list[Any]] = [[]]
        while self.tokens:
            kind, text = self.tokens[0]
            if text == ")" and kind == "mark":
                break
            self.tokens = self.tokens[1:]
            if kind == "mark" and text == "|":
                commands.append([])
            else:
                commands[-1].append(self.operand(kind, text, depth))
        if not all(commands):
            raise self.fail("a pipe without a command")
        return Pipe(names, declares, commands, self.line)

    def declaration(self) -> tuple[tuple[str, ...], bool]:
        texts = [text for _, text in self.tokens[:4]]
        for n, marks in ((1, texts[1:2]), (2, texts[3:4])):
            pair = n == 1 or texts[1:2] == [","]
            if pair and marks in ([":="], ["="]) and all(re.fullmatch(r"\$\w+", text) for text in texts[: 2 * n : 2]):
                self.tokens = self.tokens[2 * n :]
                return tuple(texts[: 2 * n : 2]), marks == [":="]
        return (), False

    def operand(self, kind: str, text: str, depth: int) -> Any:
        if kind == "string":
            return Literal(text[1:-1] if text[0] == "`" else self.unquoted(text))
        if kind == "number":
            return Literal(float(text) if "." in text else int(text[:20]))
        if kind == "path":
            root, *path = text.split(".")
            return Fields(root or ".", tuple(part for part in path if part))
        if kind == "word":
            if text in ("true", "false", "nil"):
                return Literal({"true": True, "false": False, "nil": None}[text])
            if text not in _FUNCTIONS and text not in ("and", "or"):
                raise self.fail(f"no function {text!r}{nearest(text, sorted([*_FUNCTIONS, 'and', 'or']))}")
            return Function(text)
        if text != "(":
            raise self.fail(f"unexpected {text!r}")
        inner = self.pipe(depth + 1)
        if not self.tokens:
            raise self.fail("( without its )")
        self.tokens = self.tokens[1:]
        path = ()
        if self.tokens and self.tokens[0][0] == "path" and self.tokens[0][1].startswith("."):
            path = tuple(part for part in self.tokens[0][1].split(".") if part)
            self.tokens = self.tokens[1:] if path else self.tokens
        return Fields(inner, path)

    def unquoted(self, text: str) -> str:
        def escape(found: re.Match[str]) -> str:
            number, mark = found[1], found[2]
            if number:
                return json.dumps(chr(int(number, 16)))[1:-1]
            return found[0] if mark in '"\\/bfnrtu' else "\\\\" + mark

        try:
            # escapes two characters at a time: in "\\ x" the second backslash begins none
            return json.loads(re.sub(r"\\(?:U([0-9a-fA-F]{8})|(.))", escape, text))
        except (ValueError, OverflowError):
            raise self.fail(f"not a string: {text[:40]}") from None


# ---- nodes -> text ---------------------------------------------------------------------------------------------------


class _Jumped(Exception):
    """break or continue, on its way to its range."""


def _truth(value: Any) -> bool:
    return bool(value)


def _shown(value: Any) -> str:
    """As Go prints it."""
    if value is None:
        return "<no value>"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "[" + " ".join(_shown(item) for item in value) + "]"
    if isinstance(value, dict):
        return "map[" + " ".join(f"{key}:{_shown(item)}" for key, item in sorted(value.items())) + "]"
    return str(value)


def _same(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return a is b
    require(
        type(a) is type(b) and isinstance(a, (str, int, float, bool)),
        f"eq cannot compare {_shown(a)!r:.40} and {_shown(b)!r:.40}",
    )
    return a == b


def _ordered(a: Any, b: Any) -> tuple[Any, Any]:
    good = type(a) is type(b) and isinstance(a, (str, int, float)) and not isinstance(a, bool)
    require(good, f"{_shown(a)!r:.40} and {_shown(b)!r:.40} have no order")
    return a, b


def _length(value: Any) -> int:
    require(isinstance(value, (str, list, dict)), f"len of {_shown(value)!r:.40}")
    return len(value.encode("utf-8", "surrogatepass")) if isinstance(value, str) else len(value)


def _index(value: Any, *keys: Any) -> Any:
    for key in keys:
        if isinstance(value, dict):
            value = value.get(key)
            continue
        good = isinstance(value, list) and type(key) is int and 0 <= key < len(value)
        require(good, f"index {_shown(key)!r:.40} of {_shown(value)!r:.40}")
        value = value[key]
    return value


def _slice(value: Any, *ends: Any) -> Any:
    whole = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
    good = isinstance(whole, (bytes, list)) and len(ends) <= 2 and all(type(end) is int for end in ends)
    require(good, f"slice of {_shown(value)!r:.40}")
    start, stop = (*ends, *(0, len(whole))[len(ends) :])
    require(0 <= start <= stop <= len(whole), f"slice {start}:{stop} of {len(whole)} elements")
    part = whole[start:stop]
    return part.decode("utf-8", "replace") if isinstance(part, bytes) else part


def _printf(form: Any, *values: Any) -> str:
    left = list(values)

    def put(found: re.Match[str]) -> str:
        verb = found.group()
        require(verb in ("%s", "%d", "%v", "%q", "%%"), f"printf understands %s %d %v %q %%, not {verb!r}")
        if verb == "%%":
            return "%"
        require(bool(left), f"printf {form!r:.40}: more verbs than values")
        value = left.pop(0)
        return json.dumps(value, ensure_ascii=False) if verb == "%q" else _shown(value)

    text = re.sub(r"%.?", put, str(form))
    require(not left, f"printf {str(form)!r:.40}: more values than verbs")
    return text


def _print(*values: Any) -> str:
    """Go puts a space between two values of which neither is a text."""
    text = ""
    for i, value in enumerate(values):
        text += " " if i and not isinstance(value, str) and not isinstance(values[i - 1], str) else ""
        text += _shown(value)
    return text


def _eq(a: Any, b: Any, *others: Any) -> bool:
    return any(_same(a, other) for other in (b, *others))


_FUNCTIONS = {
    "eq": _eq,
    "ne": lambda a, b: not _same(a, b),
    "lt": lambda a, b: (lambda x: x[0] < x[1])(_ordered(a, b)),
    "le": lambda a, b: (lambda x: x[0] <= x[1])(_ordered(a, b)),
    "gt": lambda a, b: (lambda x: x[0] > x[1])(_ordered(a, b)),
    "ge": lambda a, b: (lambda x: x[0] >= x[1])(_ordered(a, b)),
    "not": lambda a: not _truth(a),
    "len": _length,
    "index": _index,
    "slice": _slice,
    "print": _print,
    "println": lambda *values: " ".join(map(_shown, values)) + "\n",
    "printf": _printf,
    "json": lambda value: json.dumps(value, ensure_ascii=False, separators=(",", ":")),
}


class _Run:
    """One execution: the output, the variables, and the steps that are left."""

    def __init__(self, name: str, data: dict[str, Any]):
        self.name, self.data, self.steps, self.size = name, data, MOST_STEPS, 0
        self.out: list[str] = []
        self.scopes: list[dict[str, Any]] = [{"$": data}]

    def write(self, text: str) -> None:
        self.size += len(text)
        require(
            self.size <= MOST_CHARACTERS, f"{self.name}: stopped: more than {MOST_CHARACTERS:,} characters come out"
        )
        self.out.append(text)

    def nodes(self, nodes: list[Any], dot: Any) -> None:
        for node in nodes:
            self.steps -= 1
            require(self.steps > 0, f"{self.name}: stopped after {MOST_STEPS:,} steps")
            if isinstance(node, Text):
                self.write(node.text)
            elif isinstance(node, Action):
                value = self.pipe(node.pipe, dot)
                if not node.pipe.names:
                    self.write(_shown(value))
            elif isinstance(node, Jump):
                raise _Jumped(node.kind)
            else:
                self.branch(node, dot)

    def branch(self, node: Branch, dot: Any) -> None:
        self.scopes.append({})
        depth = len(self.scopes)
        try:
            value = self.pipe(node.pipe, dot, bind=node.kind != "range")
            if node.kind == "range":
                self.range(node, value, dot)
            elif _truth(value):
                self.nodes(node.body, value if node.kind == "with" else dot)
            else:
                self.nodes(node.orelse, dot)
        finally:
            del self.scopes[depth - 1 :]

    def range(self, node: Branch, value: Any, dot: Any) -> None:
        require(
            value is None or isinstance(value, (list, dict)),
            f"{self.name} line {node.pipe.line}: range over {_shown(value)!r:.40}",
        )
        pairs = list(sorted(value.items()) if isinstance(value, dict) else enumerate(value or []))
        for key, item in pairs:
            names = node.pipe.names
            taken = (key, item) if len(names) == 2 else (item,)
            self.scopes.append(dict(zip(names, taken, strict=False)))
            depth = len(self.scopes)
            try:
                self.nodes(node.body, item)
            except _Jumped as jump:
                if str(jump) == "break":
                    break
            finally:
                del self.scopes[depth - 1 :]
        if not pairs:
            self.nodes(node.orelse, dot)

    def pipe(self, pipe: Pipe, dot: Any, bind: bool = True) -> Any:
        value: Any = None
        try:
            for i, command in enumerate(pipe.commands):
                self.steps -= 1
                require(self.steps > 0, f"stopped after {MOST_STEPS:,} steps")
                value = self.command(command, dot, [] if i == 0 else [Literal(value)])
        except InputError as error:
            known = str(error).startswith(self.name)
            raise error if known else InputError(f"{self.name} line {pipe.line}: {error}") from None
        if pipe.names and bind:
            require(len(pipe.names) == 1, f"{self.name} line {pipe.line}: two variables outside of a range")
            self.bind(pipe, value)
        return value

    def bind(self, pipe: Pipe, value: Any) -> None:
        name = pipe.names[0]
        if pipe.declares:
            self.scopes[-1][name] = value
            return
        for scope in reversed(self.scopes):
            if name in scope:
                scope[name] = value
                return
        raise InputError(f"{self.name} line {pipe.line}: {name} is set before it is declared with :=")

    def command(self, command: list[Any], dot: Any, piped: list[Any]) -> Any:
        first, args = command[0], [*command[1:], *piped]
        if not isinstance(first, Function):
            require(not args, f"{_shown(self.value(first, dot))!r:.40} is no function and takes no arguments")
            return self.value(first, dot)
        if first.name in ("and", "or"):  # stops at the first that decides
            require(bool(args), f"{first.name} without arguments")
            value = None
            for arg in args:
                value = self.value(arg, dot)
                if _truth(value) == (first.name == "or"):
                    return value
            return value
        values = [self.value(arg, dot) for arg in args]
        self.steps -= sum(len(value) // 1000 for value in values if isinstance(value, (str, list)))
        try:
            value = _FUNCTIONS[first.name](*values)
        except TypeError:
            raise InputError(f"{first.name} with {len(values)} arguments") from None
        require(not isinstance(value, str) or len(value) <= MOST_CHARACTERS, "stopped: too long a text")
        return value

    def value(self, operand: Any, dot: Any) -> Any:
        if isinstance(operand, Literal):
            return operand.value
        if isinstance(operand, Function):
            return self.command([operand], dot, [])
        value = self.root(operand.root, dot)
        for name in operand.path:
            if value is None:
                return None
            require(isinstance(value, dict), f"no field .{name} in {_shown(value)!r:.40}")
            require(
                name in value or "Role" not in value, f"a message has no field .{name}{nearest(name, sorted(value))}"
            )
            value = value.get(name)
        return value

    def root(self, root: Any, dot: Any) -> Any:
        if isinstance(root, Pipe):
            return self.pipe(root, dot)
        if root == ".":
            return dot
        for scope in reversed(self.scopes):
            if root in scope:
                return scope[root]
        raise InputError(f"no variable {root}")


# ---- a template, and what Ollama does with it ------------------------------------------------------------------------


@dataclass(frozen=True)
class GoTemplate:
    """A Go template of a Modelfile; `render` as ChatTemplate's. It has no tokens of its own: Ollama puts BOS before the
    text."""

    source: str
    name: str = "TEMPLATE"
    bos: str = ""
    eos: str = ""

    @cached_property
    def nodes(self) -> list[Any]:
        """The parsed template; one that names neither .Messages nor .Response ends in a {{ .Response }}, as in Ollama."""
        require(
            len(self.source) <= MOST_SOURCE, f"{self.name}: {len(self.source):,} characters; at most {MOST_SOURCE:,}"
        )
        nodes, _ = _Parser(self.source, self.name).body(0, ())
        if not {"messages", "response"} & {field.lower() for field in _fields_of(nodes)}:
            nodes.append(Action(Pipe((), False, [[Fields(".", ("Response",))]], 0)))
        return nodes

    @cached_property
    def fields(self) -> frozenset[str]:
        """The names of fields and variables that occur: {"Messages", "Role", "$i", ...}."""
        return frozenset(_fields_of(self.nodes))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        tools: Sequence[Any] | None = None,
        **extra: Any,
    ) -> str:
        """The text that Ollama makes of a conversation. It always asks for an answer, so `add_generation_prompt` only tells
        whether a last message of the assistant is to be gone on with (True) or is complete (False)."""
        turns = _collated(messages)
        if "Messages" in self.fields:
            system = "\n\n".join(turn["Content"] for turn in _turns(messages) if turn["Role"] == "system")
            data = {"System": system, "Messages": turns, "Tools": list(tools or []), "Response": ""}
            return self.execute(data | extra)
        return self._turn_by_turn(turns, add_generation_prompt, extra)

    def _turn_by_turn(self, turns: list[dict[str, Any]], asks: bool, extra: dict[str, Any]) -> str:
        text, data = [], {"System": "", "Prompt": "", "Response": ""}
        for turn in turns:
            role, content = turn["Role"], turn["Content"]
            due = {"system": data["Prompt"] or data["Response"], "user": data["Response"]}.get(role)
            if due:
                text.append(self.execute(data | extra))
                data = {"System": "", "Prompt": "", "Response": ""}
            key = {"system": "System", "user": "Prompt", "assistant": "Response"}.get(role)
            if key:
                data[key] = content
        complete = not asks and bool(data["Response"])
        nodes = self.nodes if complete else _cut(self.nodes)[0]
        return "".join(text) + _execute(nodes, self.name, data | extra)

    def execute(self, data: dict[str, Any]) -> str:
        """The text of the template for the given fields."""
        return _execute(self.nodes, self.name, data)


def _execute(nodes: list[Any], name: str, data: dict[str, Any]) -> str:
    run = _Run(name, data)
    try:
        run.nodes(nodes, data)
    except _Jumped as jump:
        raise InputError(f"{name}: {jump} outside of a range") from None
    except RecursionError:
        raise InputError(f"{name}: nested too deeply") from None
    return "".join(run.out)


def _turns(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages with Go's field names."""
    turns = []
    for message in messages:
        turn = {go: str(message.get(ours) or "") for go, ours in FIELDS.items()}
        turns.append(turn | {"Images": [], "ToolCalls": list(message.get("tool_calls") or [])})
    return turns


def _collated(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Neighbours of one role become one message, as Ollama does it."""
    turns: list[dict[str, Any]] = []
    for turn in _turns(messages):
        if turns and turns[-1]["Role"] == turn["Role"] != "tool":
            turns[-1]["Content"] += "\n\n" + turn["Content"]
        else:
            turns.append(turn)
    return turns


def _fields_of(nodes: list[Any]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, Action | Branch):
            yield from _fields_of_pipe(node.pipe)
        if isinstance(node, Branch):
            yield from _fields_of(node.body)
            yield from _fields_of(node.orelse)


def _fields_of_pipe(pipe: Pipe) -> Iterator[str]:
    for operand in (operand for command in pipe.commands for operand in command):
        if isinstance(operand, Fields):
            yield from operand.path
            if isinstance(operand.root, Pipe):
                yield from _fields_of_pipe(operand.root)


def _cut(nodes: list[Any]) -> tuple[list[Any], bool]:
    """The nodes up to the first {{ .Response }}, and whether there was one: what follows it comes after the answer."""
    kept: list[Any] = []
    for node in nodes:
        if isinstance(node, Branch):
            body, found = _cut(node.body)
            orelse, found_else = ([], False) if found else _cut(node.orelse)
            kept.append(node._replace(body=body, orelse=orelse))
            if found or found_else:
                return kept, True
            continue
        kept.append(node)
        if isinstance(node, Action) and "Response" in _fields_of_pipe(node.pipe):
            return kept, True
    return kept, False


# ---- Modelfile -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Modelfile:
    """What a Modelfile says. `parameters` are lists, since `stop` may stand several times; `lines` tells where a command
    stands."""

    from_: str
    template: GoTemplate | None = None
    system: str = ""
    parameters: dict[str, list[str]] = field(default_factory=dict)
    adapter: str = ""
    messages: list[dict[str, str]] = field(default_factory=list)
    lines: dict[str, int] = field(default_factory=dict)

    @property
    def stops(self) -> list[str]:
        """The texts at which an answer is cut off."""
        return self.parameters.get("stop", [])


def read_modelfile(path: Path) -> Modelfile:
    """The Modelfile at a path."""
    try:
        with path.open("rb") as stream:
            raw = stream.read(16 * MOST_SOURCE + 1)
        require(len(raw) <= 16 * MOST_SOURCE, f"{path}: more than {16 * MOST_SOURCE:,} bytes; that is no Modelfile")
        text = raw.decode("utf-8").removeprefix("\ufeff")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8; that is no Modelfile") from None
    return parse_modelfile(text, path.name)


def parse_modelfile(text: str, name: str = "Modelfile") -> Modelfile:
    """parse_modelfile('FROM x.gguf\\nPARAMETER stop "<|im_end|>"').stops -> ["<|im_end|>"]

    What is not printable is lost, as Ollama loses it: the joiner in an emoji, a space that does not break.
    """
    text = "".join(c for c in text if c.isprintable() or c in "\t\r\n")
    made: dict[str, Any] = {"parameters": {}, "messages": [], "lines": {}}
    for line, command, value in _commands(text, name):
        made["lines"].setdefault(command, line)
        if command == "parameter":
            key, _, given = value.partition(" ")
            require(bool(given.strip()), f"{name} line {line}: PARAMETER {key} has no value")
            made["parameters"].setdefault(key.lower(), []).append(_unquote(given.strip(), f"{name} line {line}"))
        elif command == "message":
            role, _, said = value.partition(" ")
            require(role in ROLES, f"{name} line {line}: a message's role is {role!r}; one of {', '.join(ROLES)}")
            made["messages"].append({"role": role, "content": _unquote(said.strip(), f"{name} line {line}")})
        elif command == "template":
            made["template"] = GoTemplate(_unquote(value, f"{name} line {line}"), f"{name}:TEMPLATE")
        elif command in ("from", "system", "adapter"):
            made["from_" if command == "from" else command] = _unquote(value, f"{name} line {line}")
    require("from_" in made, f"{name}: no FROM line; it names the model")
    return Modelfile(**made)


def _commands(text: str, name: str) -> Iterator[tuple[int, str, str]]:
    """(line, command in lower case, value with its quotes) of each command; a value in quotes may span lines."""
    lines = text.replace("\r\n", "\n").split("\n")
    i = 0
    while i < len(lines):
        start, line = i + 1, lines[i].strip()
        i += 1
        if not line or line.startswith("#"):
            continue
        word, _, value = line.partition(" ")
        command = word.lower()
        require(command in COMMANDS, f"{name} line {start}: no command {word[:40]!r}{nearest(command, COMMANDS)}")
        quoted = value.strip().partition(" ")[2] if command in ("parameter", "message") else value
        while not _closed(quoted.strip()):
            require(i < len(lines), f"{name} line {start}: a quote that is not closed")
            value, quoted, i = f"{value}\n{lines[i]}", f"{quoted}\n{lines[i]}", i + 1
        yield start, command, value.strip()


def _closed(value: str) -> bool:
    mark = '"""' if value.startswith('"""') else '"' if value.startswith('"') else ""
    return not mark or (len(value) >= 2 * len(mark) and value.endswith(mark))


def _unquote(value: str, where: str) -> str:
    """The text of a value; Ollama knows no escapes."""
    require(_closed(value), f"{where}: a quote that is not closed")
    mark = '"""' if value.startswith('"""') else '"' if value.startswith('"') else ""
    return value[len(mark) : len(value) - len(mark)]
