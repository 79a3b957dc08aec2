"""formats/template.py and gotemplate.py: strangers' templates rendered as elsewhere, and what hostile ones come to."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kobza.config import InputError
from kobza.doctor.mutations import template as samples
from kobza.doctor.mutations.specimens import edit, folder
from kobza.formats import template as template_module
from kobza.formats.gotemplate import GoTemplate, parse_modelfile, read_modelfile
from kobza.formats.template import MOST_CHARACTERS, ChatTemplate, Refused, find_template

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Їхав козак"},
    {"role": "assistant", "content": "  за\n\n  Дунай 👩‍👩‍👧\n"},
    {"role": "user", "content": "<b>&</b> {{ x }}"},
]
ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''|attr('__class__')|attr('__mro__') }}",
    "{{ ''['__class__'] }}",
    "{{ ''|attr('\\x5f\\x5fclass\\x5f\\x5f') }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'] }}",
    "{{ self._TemplateReference__context }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__code__ }}",
    "{{ namespace.__init__ }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{{ namespace(__class__=1) }}",
    "{{ '{0.__class__.__mro__}'.format(1) }}",
    "{{ '{x.__class__}'.format_map({'x': 1}) }}",
    "{% set f = '{0.__class__}'.format %}{{ f(1) }}",
    "{{ [1]|map(attribute='__class__')|list }}",
    "{{ messages|groupby('__class__')|list }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='x') }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
    "{% extends 'x' %}",
]
ENDLESS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(99999) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% for i in range(99999) %}{{ messages|tojson|length }}{% for j in range(9999) %}{% endfor %}{% endfor %}",
    "{% for i in range(9999) %}{{ ('ab' * 900000)|replace('a', 'c')|length }}{% endfor %}",
]
TOO_MUCH = [
    "{% for i in range(10**9) %}{% endfor %}",
    "{{ 'x' * 10**10 }}",
    "{{ 10**10 * 'x' }}",
    "{{ [0] * 10**10 }}",
    "{% set n = 10**10 %}{{ 'x' * n }}",
    "{{ 'x'.center(10**10) }}",
    "{{ 'x'|center(10**10) }}",
    "{{ 'x'.ljust(10**10) }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ '%*d' % (9999999999, 1) }}",
    "{{ '{:9999999999}'.format(1) }}",
    "{{ ('x' * 1000000)|replace('x', 'y' * 1000000) }}",
    "{{ 2 ** (10 ** 9) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "{{ 'a' * 3000000 }}{{ 'a' * 3000000 }}",
    "{{ 'x'|indent(10**10) }}{{ 'x\ny'|indent(10**10) }}",
    "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}",
    "{{ " + "-" * 50000 + "1 }}",
    "{{ " + "[" * 20000 + "]" * 20000 + " }}",
]
WRONG = [
    "{% if %}",
    "{% for x in y %}",
    "{{ nope.a.b }}",
    "{{ nope() }}",
    "{{ messages[0].content / 2 }}",
    "{{ 1 / 0 }}",
    "{{ x|nofilter }}",
    "{% generation %}",
    "{{ messages|tojson(indent={}) }}",
    "\n\n{{ raise_exception(1, 2) }}",
]


def said(template: ChatTemplate, **more) -> str:
    with pytest.raises(InputError) as caught:
        template.render(CHAT, **more)
    return str(caught.value)


def works() -> bool:
    return ChatTemplate("{{ messages[0].content }}").render(CHAT) == "Be kind."


def test_a_conversation():
    text = ChatTemplate(CHATML).render(CHAT[:2], add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nЇхав козак<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("source", ESCAPES)
def test_no_way_out_of_the_sandbox(source):
    message = said(ChatTemplate(source, seconds=20))
    assert "\n" not in message and ("sandbox" in message or "loader" in message), message
    assert works()


@pytest.mark.parametrize("source", TOO_MUCH + WRONG)
def test_too_much_or_wrong_is_one_line_in_time(source):
    start = time.perf_counter()
    message = said(ChatTemplate(source, name="t.jinja"))
    assert message.startswith("t.jinja") and "\n" not in message and len(message) < 500
    assert time.perf_counter() - start < 20 and works()


@pytest.mark.parametrize("source", ENDLESS)
def test_an_endless_template_is_stopped_by_the_clock(source):
    start = time.perf_counter()
    message = said(ChatTemplate(source, seconds=0.4))
    assert "stopped" in message and "\n" not in message
    assert time.perf_counter() - start < 20 and works()


def test_lines_are_told():
    assert said(ChatTemplate("a\nb\n{% if %}", name="t.jinja")).startswith("t.jinja line 3: not a Jinja template")
    assert said(ChatTemplate("a\n{{ messages[9].content.x }}", name="t.jinja")).startswith("t.jinja line 2: ")


def test_a_refusal_is_told_from_a_fault():
    with pytest.raises(Refused, match="line 2: refuses this conversation: no system, please"):
        ChatTemplate("\n{{ raise_exception('no system,\n please') }}").render(CHAT)
    with pytest.raises(InputError) as caught:
        ChatTemplate("{{ 1 / 0 }}").render(CHAT)
    assert not isinstance(caught.value, Refused)


def test_an_escaped_template_finds_no_file_no_process_and_no_module():
    """The fence behind the sandbox: code that runs free in the worker. A template cannot do that; a hole in Jinja could."""
    worker = str(Path(template_module.__file__).with_name("jinja_worker.py"))
    code = f"""
import runpy
space = runpy.run_path({worker!r}, run_name="worker")
space["warm"]()
space["fence"]()
"""
    code += """
tried = {
    "read": lambda: open("/etc/hostname"), "list": lambda: __import__("os").listdir("/"), "module": lambda: __import__("ftplib"),
    "system": lambda: __import__("os").system("true"), "process": lambda: __import__("posix").fork(),
    "exec": lambda: __import__("os").execv("/bin/true", ["true"]),
}
for name, way in tried.items():
    try:
        way()
        print("OUT", name)
    except (PermissionError, OSError, MemoryError) as error:
        pass
print("fenced", flush=True)
"""
    found = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=60)
    assert found.stdout == "fenced\n", found.stdout + found.stderr


def test_the_worker_dies_with_its_parent_and_starts_again():
    from kobza.formats.template import _worker

    assert works()
    process = _worker()._process
    process.kill()
    process.wait()
    assert works() and _worker()._process.pid != process.pid


def test_messages_must_be_plain_and_bounded():
    with pytest.raises(InputError, match="plain JSON"):
        ChatTemplate(CHATML).render([{"role": "user", "content": object()}])
    with pytest.raises(InputError, match="characters come out"):
        ChatTemplate(CHATML).render([{"role": "user", "content": "x" * (MOST_CHARACTERS + 1)}])
    with pytest.raises(InputError, match="at most 1,048,576"):
        ChatTemplate("x" * (1 << 21)).render(CHAT)


def test_odd_characters_pass_both_ways():
    odd = "\ud800 \x00 \u2028 \U0010ffff \\ \" '"
    assert ChatTemplate("{{ messages[0].content }}").render([{"role": "user", "content": odd}]) == odd


def test_the_clock_can_be_set():
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", now="2024-07-26T12:00:00")
    assert template.render([]) == "26 Jul 2024"


def test_trim_is_a_setting():
    template = ChatTemplate("{% for m in messages %}\n{{ m.role }}\n{% endfor %}\n")
    assert template.render(CHAT[:1]) == "system\n"
    assert replace(template, trim=False).render(CHAT[:1]) == "\nsystem\n"


# ---- where templates are found ---------------------------------------------------------------------------------------


def test_the_jinja_file_wins_and_specials_come_along(tmp_path):
    path = folder(tmp_path / "llama", "llama")
    assert find_template(path).source == samples.open_(path).template.source
    (path / "chat_template.jinja").write_text("{{ bos_token }}|{{ eos_token }}|{{ messages[0].content }}")
    assert find_template(path).render(CHAT) == "<|begin_of_text|>|<|eot_id|>|Be kind."


def test_named_templates_and_tokens_as_objects(tmp_path):
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D{{ bos_token }}"}]
    config = {"chat_template": named, "bos_token": {"content": "<s>", "lstrip": False}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert find_template(tmp_path).render(CHAT) == "D<s>"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": 3}))
    with pytest.raises(InputError, match="chat_template is a int"):
        find_template(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert find_template(tmp_path) is None


def test_an_undefined_token_is_undefined(tmp_path):
    assert ChatTemplate("{{ bos_token is defined }} {{ bos_token }}").render([]) == "False "


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    (tmp_path / "secret").write_text("secret")
    inner = tmp_path / "model"
    inner.mkdir()
    (inner / "chat_template.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match="a link out of its folder"):
        find_template(inner)


def test_damaged_files_are_one_line(tmp_path):
    for name, content in {
        "tokenizer_config.json": b"[" * 100_000,
        "chat_template.jinja": b"\xff\xfe",
        "special_tokens_map.json": b"[1]",
    }.items():
        inner = tmp_path / name
        inner.mkdir()
        (inner / name).write_bytes(content)
        with pytest.raises(InputError) as caught:
            find_template(inner)
        assert "\n" not in str(caught.value)


# ---- Go --------------------------------------------------------------------------------------------------------------


def test_a_template_of_turns_is_run_once_a_turn_and_cut_after_the_answer():
    template = GoTemplate(samples.CHATML_GO)
    asked = ChatTemplate(CHATML).render(CHAT, add_generation_prompt=True)
    assert template.render(CHAT, add_generation_prompt=True) == asked
    assert template.render(CHAT[:3]) == ChatTemplate(CHATML).render(CHAT[:3])
    assert template.render(CHAT[:3], True).endswith(CHAT[2]["content"])  # to be gone on with


def test_the_cut_reaches_out_of_the_branch_that_holds_the_answer():
    template = GoTemplate("{{ .Prompt }}{{ if true }}A:{{ .Response }}!{{ else }}no{{ end }}END{{ .Prompt }}")
    assert template.render(CHAT[3:]) == "<b>&</b> {{ x }}A:"
    assert (
        template.render([*CHAT[3:], {"role": "assistant", "content": "yes"}])
        == "<b>&</b> {{ x }}A:yes!END<b>&</b> {{ x }}"
    )


def test_a_template_of_messages_gets_them_all():
    template = GoTemplate(samples.MESSAGES_GO)
    assert template.render(CHAT, True) == ChatTemplate(CHATML).render(CHAT, add_generation_prompt=True)


def test_neighbours_of_one_role_become_one_message():
    messages = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    assert GoTemplate("{{ range .Messages }}[{{ .Role }}:{{ .Content }}]{{ end }}").render(messages) == "[user:a\n\nb]"


GO = [
    ("a {{- .A -}} b", "aXb"),
    ("a {{/* no */}} b", "a  b"),
    ("a {{- /* no */ -}} b", "ab"),
    ("{{ if .A }}1{{ else }}2{{ end }}{{ if .No }}1{{ else if .A }}3{{ else }}2{{ end }}", "13"),
    ("{{ if and .A (not .No) }}y{{ end }}{{ if or .No .Empty }}n{{ else }}z{{ end }}", "yz"),
    ("{{ range $i, $x := .L }}{{ $i }}{{ $x }}{{ if eq $x 2 }}{{ break }}{{ end }},{{ end }}", "01,12"),
    ("{{ range .L }}{{ if eq . 2 }}{{ continue }}{{ end }}{{ . }}{{ end }}", "13"),
    ("{{ range .No }}x{{ else }}none{{ end }}", "none"),
    ("{{ $x := 1 }}{{ range .L }}{{ $x = . }}{{ end }}{{ $x }}", "3"),
    ("{{ $x := 1 }}{{ range .L }}{{ $x := . }}{{ end }}{{ $x }}", "1"),
    ("{{ with .D.k }}{{ . }}{{ $.A }}{{ end }}{{ with .No }}{{ else }}e{{ end }}", "vXe"),
    ('{{ len "їж" }} {{ len .L }} {{ index .L 1 }} {{ slice .L 1 2 }} {{ slice "abcd" 1 3 }}', "4 3 2 [2] bc"),
    ('{{ .A | printf "%s-%d" "q" 3 | len }}', None),
    ('{{ printf "%s-%d%%" .A 3 }} {{ print 1 2 "a" 3 }} {{ "a" | eq "a" }}', "X-3% 1 2a3 true"),
    ('{{ eq .A "Y" "X" }} {{ ne .A "Y" }} {{ lt 1 2 }} {{ ge 1 2 }} {{ json .D }}', 'true true true false {"k":"v"}'),
    ("{{ .No }}", "<no value>"),
    (r'{{ "\n\t\"їa" }}{{ `raw \n` }}', '\n\t"їaraw \\n'),
]


@pytest.mark.parametrize(("source", "text"), GO)
def test_go_as_go_means_it(source, text):
    template = GoTemplate(source + "{{ if .Response }}{{ end }}")  # names .Response: nothing is added
    data = {"A": "X", "L": [1, 2, 3], "D": {"k": "v"}, "Empty": ""}
    if text is None:
        with pytest.raises(InputError, match="TEMPLATE line 1: printf"):
            template.execute(data)
    else:
        assert template.execute(data) == text


@pytest.mark.parametrize(
    "source",
    [
        *(
            "{{ if .A }}",
            "{{ .A",
            "{{ end }}",
            "{{ foo }}",
            '{{ template "x" }}',
            '{{ define "x" }}{{ end }}',
            "{{ $x }}",
            "{{ }}",
        ),
        *(
            "{{ 1 2 }}",
            '{{ eq 1 "a" }}',
            "{{ break }}",
            "{{ $a, $b := .L }}",
            "{{ .L.x }}",
            "{{ index .L 99 }}",
            "{{ slice .L 3 1 }}",
        ),
        *(
            "{{ len }}",
            "{{ eq 1 }}",
            "{{ .A | .A }}",
            "{{ ( }}",
            '{{ "x }}',
            "{{ else }}",
            "{{ range 3 }}{{ end }}",
            "{{ $y = 1 }}",
        ),
        *("{{ if .A }}" * 300 + "{{ end }}" * 300, "{{ " + "(" * 500 + ".A" + ")" * 500 + " }}"),
        "{{ if .A }}x" + "{{ else if .A }}x" * 5000 + "{{ end }}",
        "{{ range .L }}{{ range $.L }}{{ range $.L }}{{ range $.L }}x{{ end }}{{ end }}{{ end }}{{ end }}",
        "{{ $x := `abcdefghij` }}" + "{{ $x = print $x $x }}" * 40,
        "{{ $x := `abcdefghij` }}" + "{{ $x = print $x $x }}" * 18 + "{{ $x }}" * 3,
        "{{ .A " + "| print " * 100_000 + "}}",
    ],
)
def test_other_go_is_refused_in_one_line(source):
    start = time.perf_counter()
    with pytest.raises(InputError) as caught:
        GoTemplate(source).execute({"A": "", "L": list(range(40))})
    assert str(caught.value).startswith("TEMPLATE") and "\n" not in str(caught.value)
    assert time.perf_counter() - start < 20


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            '{{ }} {{- -}} if else end range .Messages .A $x := = ( ) | eq "s" ` 1 /* */ \n , . $ with'.split(" ")
        )
    )
)
def test_any_tokens_render_or_are_refused(tokens):
    try:
        GoTemplate(" ".join(tokens)).render(CHAT)
    except InputError as error:
        assert "\n" not in str(error)


MODELFILE = '''# a comment
FROM ./model.gguf
TEMPLATE """{{ .Prompt }}
"quoted" {{ .Response }}"""
SYSTEM Be kind.
PARAMETER stop "<|im_end|>"
parameter stop User:
PARAMETER temperature 0.7
MESSAGE user "one
two"
MESSAGE assistant yes
'''


def test_a_modelfile(tmp_path):
    (tmp_path / "Modelfile").write_text(MODELFILE)
    modelfile = read_modelfile(tmp_path / "Modelfile")
    assert modelfile.from_ == "./model.gguf" and modelfile.system == "Be kind."
    assert modelfile.template.source == '{{ .Prompt }}\n"quoted" {{ .Response }}'
    assert modelfile.stops == ["<|im_end|>", "User:"] and modelfile.parameters["temperature"] == ["0.7"]
    assert modelfile.messages == [{"role": "user", "content": "one\ntwo"}, {"role": "assistant", "content": "yes"}]
    assert modelfile.lines["parameter"] == 6
    assert find_template(tmp_path / "Modelfile") == modelfile.template == find_template(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SYSTEM hi", "no FROM line"),
        ("FORM x", "line 1: no command 'FORM'; did you mean from?"),
        ('FROM x\nTEMPLATE """a\nb', "line 2: a quote that is not closed"),
        ("FROM x\nMESSAGE tool hi", "line 2: a message's role is 'tool'"),
        ("FROM x\nPARAMETER stop", "line 2: PARAMETER stop has no value"),
    ],
)
def test_a_bad_modelfile_is_one_line(text, message):
    with pytest.raises(InputError) as caught:
        parse_modelfile(text)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            ["FROM", "TEMPLATE", "PARAMETER", "MESSAGE", " ", '"', '"""', "stop", "user", "\n", "\t", "#", "\r", "їж"]
        )
    )
)
def test_any_modelfile_is_parsed_or_refused_in_one_line(parts):
    try:
        parse_modelfile("".join(parts))
    except InputError as error:
        assert "\n" not in str(error)


# ---- as transformers -------------------------------------------------------------------------------------------------

DIALECT = (
    "{%- set ns = namespace(n=0) -%}\n{% for m in messages %}\n  {%- if loop.index > 3 %}{% break %}{% endif %}\n"
    "  {% set ns.n = ns.n + 1 %}\n{{ m|tojson }} {{ m.content|tojson(indent=2) }}\n{% endfor %}\n{{ ns.n }}"
    "{% generation %}\n{{ messages[-1].content }}{% endgeneration %}{{ dict(a=1) }}{{ tools }}{{ documents is none }}\n"
)


@pytest.mark.parity
@pytest.mark.parametrize(
    "source",
    [
        *(
            samples.LLAMA2,
            samples.MISTRAL,
            samples.THINKING,
            samples.LEANING,
            samples.PLAIN,
            samples.NO_LOOP,
            CHATML,
            DIALECT,
        )
    ],
)
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_the_same_text_as_transformers(source, n):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    jinja2 = pytest.importorskip("jinja2")
    messages, specials = CHAT[-n:], {"bos_token": "<s>", "eos_token": "</s>"}
    for ask in (False, True):
        try:
            theirs = utils.render_jinja_template([messages], None, None, source, add_generation_prompt=ask, **specials)[
                0
            ][0]
        except jinja2.TemplateError as error:
            with pytest.raises(InputError) as caught:
                ChatTemplate(source, "<s>", "</s>").render(messages, add_generation_prompt=ask)
            assert str(error) in str(caught.value)
        else:
            assert ChatTemplate(source, "<s>", "</s>").render(messages, add_generation_prompt=ask) == theirs


@pytest.mark.parity
@pytest.mark.parametrize("family", ["llama", "gemma", "qwen", "phi"])
def test_a_folder_as_transformers_renders_it(tmp_path, family):
    transformers = pytest.importorskip("transformers")
    path = folder(tmp_path / family, family)
    tokenizer, template = transformers.AutoTokenizer.from_pretrained(path), find_template(path)
    for ask in (False, True):
        theirs = tokenizer.apply_chat_template(CHAT[1:], tokenize=False, add_generation_prompt=ask)
        assert template.render(CHAT[1:], add_generation_prompt=ask) == theirs


def test_files_are_edited_as_the_mutations_say(tmp_path):
    path = edit(
        folder(tmp_path / "qwen", "qwen"), "tokenizer_config.json", lambda config: config.update(chat_template="x")
    )
    assert find_template(path).render([]) == "x"


def test_a_backslash_before_a_usual_character_is_itself():
    written = GoTemplate(r'{{ "a\\ x\\n" }}{{ "\n" }}').render([{"role": "user", "content": "?"}])
    assert written == "a\\ x\\n\n"
