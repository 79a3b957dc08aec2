"""What a function does -> what it is called: a few thousand pairs out of the standard library's own docstrings.

Always at hand, with no network: the first sentence of each public function's or class's docstring is a gloss, its name the word.
Modules written in Python are parsed, not imported; the built-in types and a few modules written in C are asked. The table depends
on the version of Python alone, and the file's name carries its checksum.
"""

from __future__ import annotations

import ast
import csv
import importlib
import inspect
import io
import re
import sysconfig
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from kobza.hub.cache import default_cache, sha256, write_whole
from kobza.hub.wheel import Unavailable

ASKED = (
    "builtins",
    "math",
    "cmath",
    "itertools",
    "time",
)  # written in C: their docstrings are only in the running modules
# Not everywhere there, or no library: tests, other people's packages, what systems leave out or put into packages apart.
APART = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "antigravity",
    "this",
    "pydoc_data",
    "lib2to3",
    "distutils",
    "ensurepip",
}
APART |= {"idlelib", "tkinter", "turtle", "turtledemo"}
WORDS = range(4, 31)  # of a gloss
SENTENCE = re.compile(r"[A-Z][^.:`<>|\\_*=]*[a-z)]\.(?=\s|$)")  # plain words: no code, no lists
MODULE_BYTES = 1 << 20


def glosses(cache: Path | None = None) -> tuple[Path, str]:
    """Path of a table with the columns gloss, word and module, and a line on what it is."""
    rows = clean(pairs(Path(sysconfig.get_paths()["stdlib"])))
    if not rows:
        raise Unavailable("this Python comes without its docstrings; give a table of your own")
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerows([("gloss", "word", "module"), *rows])
    data = table.getvalue().encode()
    path = (cache or default_cache()) / f"glosses-{sha256(data)[:12]}.csv"
    note = f"table: {len(rows):,} glosses of Python's standard library"
    return path if path.exists() and path.read_bytes() == data else write_whole(path, data), note


def pairs(folder: Path) -> Iterator[tuple[str, str, str]]:
    """(docstring, name, module) of what is public in the standard library, by module."""
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        private = any(part.startswith("_") and part != "__init__" or part in APART for part in parts)
        if private or path.stat().st_size > MODULE_BYTES:
            continue
        module = ".".join(part for part in parts if part != "__init__")
        yield from ((text, name, module) for text, name in documented(ast.parse(path.read_bytes())))
    for module in ASKED:
        for name, thing in sorted(vars(importlib.import_module(module)).items()):
            members = (
                sorted(vars(thing).items()) if inspect.isclass(thing) and not issubclass(thing, BaseException) else []
            )
            yield from ((member.__doc__ or "", name, module) for name, member in [(name, thing), *members])


def documented(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(docstring, name) of the functions and classes of a module, and of the methods of its classes."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or "", node.name
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            methods = (n for n in node.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
            yield from ((ast.get_docstring(n) or "", n.name) for n in methods)


def clean(found: Iterator[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """(gloss, word, module), sorted: each gloss once, and none that says its word or that several words share."""
    words: dict[str, dict[str, str]] = defaultdict(dict)
    for text, name, module in found:
        sentence = SENTENCE.match(" ".join(text.split()))
        if sentence and not name.startswith("_") and len(name) > 2:
            words[sentence[0]].setdefault(name, module)
    rows = [(gloss, *next(iter(names.items()))) for gloss, names in words.items() if len(names) == 1]
    return sorted(row for row in rows if len(row[0].split()) in WORDS and row[1].lower() not in row[0].lower())
