"""The other end of template.py: a process that renders chat templates and can do nothing else.

Run as a script (`python -I -S -B jinja_worker.py FOLDER...`), never imported by kobza: it needs jinja2 alone, whose folder is
given as an argument, and starts in a tenth of a second. A line of JSON in, a line of JSON out:

    {"source", "trim", "seconds", "characters", "now", "context"}  ->  {"text"}  or  {"error", "kind", "line"}

Three fences stand around a template, which is a stranger's program. Jinja's own sandbox keeps it from Python's internals.
Should it get out: files, sockets, processes and new imports are refused by an audit hook, and by the limits of the operating
system where it has them. What only takes too long or too much is ended by those limits, or by the parent's clock.

The environment is the one transformers renders with, so that a template means here what it means there: blocks trimmed, `break`
and `continue`, `raise_exception`, `strftime_now`, a `tojson` that leaves < and & alone, `{% generation %}`.
"""

import json
import pprint  # noqa: F401  jinja2 imports it when first needed, and then the fence is up
import re
import sys
import textwrap  # noqa: F401  as pprint
import unicodedata  # noqa: F401  as pprint: "\N{...}" in a template
from datetime import datetime

MEMORY_BYTES = 512 << 20  # address space; the process itself takes about 60 MB of it
POWER_BITS = 1 << 16  # of the result of **
WIDEST = 1 << 16  # fields of a format, "%9999d" and "{:9999}"
REPEATED = 16 << 20  # elements of a text or list times a number
KEPT = 8  # compiled templates
FORBIDDEN = frozenset(
    "open import os. subprocess. socket. ctypes. shutil. mmap. fcntl. pty. glob. tempfile. urllib. http. ftplib. smtplib. "
    "sqlite3. winreg. msvcrt. _winapi. signal. webbrowser. cpython. resource. gc. marshal. pickle. "
    "sys.addaudithook sys.settrace sys.setprofile".split()
)  # audit events; a name that ends in a point stands for all that begin with it


def environment(trim, now):
    """A sandboxed jinja2 Environment with what transformers puts into it."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

    class Sandbox(ImmutableSandboxedEnvironment):
        # Listed operators are also kept from being computed while the template is compiled.
        intercepted_binops = frozenset(["*", "**", "%"])

        def call_binop(self, context, operator, left, right):
            check_size(operator, left, right)
            return super().call_binop(context, operator, left, right)

        def unsafe_undefined(self, obj, attribute):
            # Jinja itself only complains once the value is used; no honest template asks for it.
            raise SecurityError(f"attribute {attribute!r} of a {type(obj).__name__}")

    class Generation(Extension):
        """{% generation %}...{% endgeneration %} marks what the assistant wrote; here it only lets it through."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_through"), [], [], body).set_lineno(line)

        def _through(self, caller):
            return caller()

    class Dict:
        """`dict(...)` without the type, whose attributes lead further."""

        def __call__(self, *args, **kwargs):
            return dict(*args, **kwargs)

        def fromkeys(self, *args):
            return dict.fromkeys(*args)

    class Namespace(jinja2.utils.Namespace):
        def __setitem__(self, name, value):
            if str(name).startswith("_"):
                raise SecurityError(f"a namespace has no attribute {name!r}")
            super().__setitem__(name, value)

    def namespace(*args, **kwargs):
        made = Namespace()
        for name, value in dict(*args, **kwargs).items():
            made[name] = value
        return made

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message):
        raise Refusal(str(message))

    def strftime_now(form):
        if len(form) > 1000:
            raise Excess(f"strftime_now takes a form of at most 1,000 characters, not {len(form):,}")
        return (datetime.fromisoformat(now) if now else datetime.now()).strftime(form)

    made = Sandbox(trim_blocks=trim, lstrip_blocks=trim, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = tojson
    made.globals.update(raise_exception=raise_exception, strftime_now=strftime_now, dict=Dict(), namespace=namespace)
    return made


class Refusal(Exception):
    """What a template raises by itself: a conversation it will not render."""


class Excess(Exception):
    """More than is allowed."""


def check_size(operator, left, right):
    """Raise Excess before an operator makes something enormous; what is left is for the limit of memory."""
    if operator == "*":
        for many, times in ((left, right), (right, left)):
            if isinstance(many, (str, bytes, list, tuple)) and isinstance(times, int) and len(many) * times > REPEATED:
                raise Excess(f"{len(many):,} elements times {times:,}")
        if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > POWER_BITS:
            raise Excess("a product of too many digits")
    elif operator == "**":
        if (
            isinstance(left, int)
            and isinstance(right, int)
            and abs(left) > 1
            and left.bit_length() * right > POWER_BITS
        ):
            raise Excess(f"a power of too many digits: exponent {right:,}")
    elif isinstance(left, str):
        digits = [d for field in re.findall(r"%(?:\([^)]*\))?[-+ #]*(\d*)\.?(\d*)", left) for d in field if d]
        stars = [n for n in (right if isinstance(right, tuple) else ()) if "*" in left and isinstance(n, int)]
        if max((int(d[:12]) for d in digits), default=0) > WIDEST or max(stars, default=0) > WIDEST:
            raise Excess("a field of a format wider than 65,536 characters")


def limit(seconds):
    """Let this process use `seconds` more of the processor, should the parent that watches the clock be gone."""
    try:
        import resource
    except ImportError:
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    most = int(used.ru_utime + used.ru_stime + seconds) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (most, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def fence():
    """From here on: no more memory than MEMORY_BYTES, no file, no process, no socket, no import."""
    import os

    os.environ.clear()
    try:
        import resource
    except ImportError:  # Windows
        resource = None
    sizes = {"RLIMIT_AS": MEMORY_BYTES, "RLIMIT_FSIZE": 0, "RLIMIT_NOFILE": 3, "RLIMIT_NPROC": 0, "RLIMIT_CORE": 0}
    for name, size in sizes.items():
        kind = getattr(resource, name, None)
        if kind is not None:
            hard = resource.getrlimit(kind)[1]
            try:
                resource.setrlimit(kind, (size if hard < 0 else min(size, hard), size if hard < 0 else min(size, hard)))
            except (ValueError, OSError):
                pass  # this system does not let it be lowered; the other fences stand
    allowed = {"resource.setrlimit"}

    def refuse(event, args):
        if event not in allowed and (event in FORBIDDEN or event.split(".")[0] + "." in FORBIDDEN):
            raise PermissionError(f"a chat template may not: {event}")

    sys.addaudithook(refuse)


def render(request, kept):
    """The answer to one request."""
    key = (request["source"], request["trim"], request["now"])
    try:
        limit(request["seconds"])
        if key not in kept:
            while len(kept) >= KEPT:
                kept.pop(next(iter(kept)))
            kept[key] = environment(request["trim"], request["now"]).from_string(request["source"])
        parts, size = [], 0
        for part in kept[key].generate(**request["context"]):
            parts.append(part)
            size += len(part)
            if size > request["characters"]:
                raise Excess(f"more than {request['characters']:,} characters come out")
        return {"text": "".join(parts)}
    except BaseException as error:  # whatever it is, it is the template's, and the next request must be answered
        return describe(error)


def describe(error):
    """An exception -> {"error", "kind", "line"}; the line is that of the template, None where it is not known."""
    from jinja2 import TemplateSyntaxError
    from jinja2.sandbox import SecurityError

    line = getattr(error, "lineno", None)
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    kinds = {Refusal: "refusal", Excess: "excess", TemplateSyntaxError: "syntax", SecurityError: "security"}
    kinds |= {PermissionError: "security", MemoryError: "memory", RecursionError: "recursion"}
    kind = next((name for type_, name in kinds.items() if isinstance(error, type_)), "error")
    message = " ".join(str(error)[:2000].split()) or type(error).__name__
    return {"error": message[:300], "kind": kind, "line": line if isinstance(line, int) else None}


def warm():
    """Render once what makes jinja2 and Python import and look up things lazily: later they could not."""
    text = "{% generation %}{{ '\\N{SPACE}' }}{{ x|tojson }}{{ strftime_now('%d %b %Y') }}{% endgeneration %}{{ 1.5|pprint }}"
    wrong = ["{{ raise_exception('no') }}", "{{ ''.__class__ }}", "{{ none.x.y }}", "{% if %}", "{{ '{}'.format(1) }}"]
    asked = {"trim": True, "now": "", "seconds": 2, "characters": 100, "context": {"x": ["\u0457"]}}
    for source in (text, *wrong):
        render({**asked, "source": source}, {})


def main():
    """Answer requests until there are no more."""
    sys.path += sys.argv[1:]
    sys.setrecursionlimit(1000)
    warm()
    answers = open(sys.stdout.fileno(), "w", encoding="ascii", newline="\n", closefd=False)
    requests = open(sys.stdin.fileno(), encoding="ascii", newline="\n", closefd=False)
    fence()
    print(json.dumps({"ready": True}), file=answers, flush=True)
    kept = {}
    for line in requests:
        if not line.strip():
            continue
        answer = render(json.loads(line), kept)
        try:
            said = json.dumps(answer)
        except MemoryError:
            said = json.dumps({"error": "too large an output", "kind": "memory", "line": None})
        print(said, file=answers, flush=True)


if __name__ == "__main__":
    main()
