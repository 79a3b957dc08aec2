"""export/ollama.py: a Modelfile says to Ollama what the model's own template says, as our reader and as Go itself read it."""

import json
import shutil
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kobza.config import InputError, ModelConfig
from kobza.doctor.mutations import template as samples
from kobza.export.ollama import create_line, go_form, modelfile, notes, proven, quoted, rendered
from kobza.formats.gotemplate import GoTemplate, parse_modelfile
from kobza.formats.template import ChatTemplate
from kobza.formats.turns import Turns, conversations
from kobza.tokenizer import CharTokenizer, LibraryTokenizer

EOT, END = "<|endoftext|>", "<|im_end|>"
FAMILY = "👩\u200d👩\u200d👧\u00a0\U000e0041"  # joiners, a hard space, a tag: not printable
CHATML = Turns(
    ("<|im_start|>user\n", f"{END}\n"), ("<|im_start|>assistant\n", f"{END}\n"), END, ("<|im_start|>system\n", f"{END}\n")
)  # fmt: skip
LLAMA2 = Turns(
    ("<s>[INST] ", " [/INST]"), (" ", " </s>"), "</s>", ("<<SYS>>\n", "\n<</SYS>>\n\n"), inside=True, asking=""
)
ODD = Turns(
    (f'"{FAMILY}" \\U ', '"""\n'), ("\x7f`A\t", END), END, ("{{ .X }}", "\u2028\n"), default=f"Ти {FAMILY}", bos="<s>"
)
DEFINITIONS = {
    "chatml": CHATML,
    "default": replace(CHATML, default='You are "kind".\n'),
    "trims": replace(CHATML, trims=("system", "user", "assistant"), bos="<s>"),
    "llama2": LLAMA2,
    "mistral": Turns(("[INST]", "[/INST]"), ("", "</s>"), "</s>", bos="<s>"),
    "odd": ODD,
}
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}, {"role": "user", "content": "?"}]


def source(template=None, ends=(), sampling=None, tokenizer=None, **sizes):
    """What `modelfile` looks at of a Source."""
    tokenizer = tokenizer or LibraryTokenizer.train(["the cat"], 262, (EOT, END))
    return SimpleNamespace(
        name="cat",
        template=template,
        ends=tuple(tokenizer.specials[name] for name in ends),
        sampling=sampling or {},
        tokenizer=tokenizer,
        config=ModelConfig(vocab_size=300, n_layer=1, n_head=1, n_embd=8, **sizes),
    )


# ---- TEMPLATE --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", ["<s>", ""])
@pytest.mark.parametrize("name", DEFINITIONS)
def test_ollama_sends_what_the_template_writes(name, bos):
    """Through the file itself, which loses what is not printable; the beginning token stands once whoever writes it."""
    turns = DEFINITIONS[name]
    begins = turns.render(TALK).startswith("<s>")
    text = modelfile(source(turns.template(), [END]), "cat.gguf", bos if begins else "")
    for messages in conversations(turns.system is not None, turns.trims):
        if messages[-1]["role"] == "user":
            sent = (bos if begins else "") + rendered(text, messages)
            assert sent == turns.render(messages, True)


def test_a_bos_that_the_template_does_not_write_is_refused():
    with pytest.raises(InputError, match="puts '<s>' before; no Go form"):
        modelfile(source(CHATML.template()), "cat.gguf", "<s>")


@pytest.mark.parametrize(
    ("template", "messages"),
    [
        (CHATML.jinja().replace("m.content", "m.content|replace('їжак', 'fox')", 1), 1),
        ("m.content.split('</think>')[-1]".join(CHATML.jinja().rsplit("m.content", 1)), 3),
        (samples.THINKING, 4),
        ("{{ strftime_now('%d') }}" + CHATML.jinja(), 1),
        (CHATML.jinja().replace("rest = messages", "rest = messages[-3:]"), 4),
    ],
)
def test_a_template_that_has_no_go_form_is_shown_where(template, messages):
    """In one line, with the fewest messages that show it."""
    with pytest.raises(InputError) as caught:
        go_form(ChatTemplate(template, eos=END, name="cat's"))
    said = str(caught.value)
    shown, _ = json.JSONDecoder().raw_decode(said[said.index("[{") :])
    assert said.startswith("cat's: has no Go form") and "--go-template FILE" in said and "\n" not in said
    assert len(shown) == messages and all(len(message["content"]) < 20 for message in shown)


def test_ones_own_go_template_is_proven():
    own = "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
    text = modelfile(source(CHATML.template()), "cat.gguf", go_template=own)
    assert parse_modelfile(text).template.source == own
    for wrong in (own.replace("<|im_end|>\n", "<|im_end|>"), own.replace(".Role", '"user"'), "{{ .Prompt }}"):
        with pytest.raises(InputError, match="--go-template: not what .* mend it"):
            proven(wrong, CHATML.template())
    with pytest.raises(InputError, match="TEMPLATE line 1"):
        proven("{{ if }}", CHATML.template())


def test_a_dropped_system_is_found():
    own = '{{ range .Messages }}{{ if ne .Role "system" }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}{{ end }}'
    with pytest.raises(InputError, match='"role": "system"'):
        proven(own + "<|im_start|>assistant\n", CHATML.template())


# ---- the file --------------------------------------------------------------------------------------------------------


def test_a_modelfile_is_read_back():
    found = source(
        CHATML.template(), [END, EOT], {"temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1}, max_seq_len=64
    )
    said = 'Be "kind".\n  Ти кіт. '
    text = modelfile(
        found, "cat Q8.gguf", system=said, parameters={"top_p": 0.5, "min_p": 0.1}, adapter="a.gguf", license="MIT\n"
    )
    read = parse_modelfile(text)
    assert read.from_ == "./cat Q8.gguf" and read.system == said and read.adapter == "./a.gguf" and "LICENSE" in text
    assert read.stops == [END, EOT]
    numbers = {name: float(value[0]) for name, value in read.parameters.items() if name != "stop"}
    assert numbers == {"temperature": 0.6, "top_p": 0.5, "min_p": 0.1, "repeat_penalty": 1.1, "num_ctx": 64}
    assert rendered(text, TALK).startswith(f"<|im_start|>system\n{said}{END}\n<|im_start|>user\nHi")
    own = [{"role": "system", "content": "No."}, *TALK]
    assert rendered(text, own).startswith(f"<|im_start|>system\nNo.{END}\n<|im_start|>user\nHi")


def test_a_model_that_was_taught_no_turns_goes_on_from_the_text():
    tokenizer = CharTokenizer.train(["the cat\n"])
    text = modelfile(source(tokenizer=tokenizer, max_seq_len=100_000), "cat.gguf")
    assert rendered(text, [{"role": "user", "content": "the "}]) == "the "
    read = parse_modelfile(text)
    assert read.stops == [] and read.parameters == {"repeat_penalty": ["1.0"], "num_ctx": ["8192"]}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"system": "a\u200db"}, "SYSTEM 'a.*b': it holds U\\+200D, which a Modelfile loses"),
        ({"system": 'x """  \ny'}, "SYSTEM .* three quotes"),
        ({"parameters": {"temprature": 1}}, "no parameter 'temprature' .*did you mean temperature"),
        ({"parameters": {"top_k": "many"}}, "cat: top_k 'many' is no number"),
        ({"license": "a\rb"}, "LICENSE .* U\\+000D"),
    ],
)
def test_what_a_modelfile_cannot_hold_is_one_line(more, message):
    with pytest.raises(InputError, match=message) as caught:
        modelfile(source(CHATML.template()), "cat.gguf", **more)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("template", [None, replace(CHATML, system=None).template()])
def test_a_system_without_a_place_is_refused(template):
    with pytest.raises(InputError, match="cat: its chat template has no place for a system"):
        modelfile(source(template), "cat.gguf", system="x")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(['"', '"""', "\n", " ", "\t", "a", "#", "FROM x", "їж", "\\", "\u00a0", "'", "\r"])).map(
        "".join
    )
)
def test_any_text_is_read_back_or_refused(text):
    try:
        value = quoted(text, "SYSTEM")
    except InputError as error:
        assert "\n" not in str(error)
        return
    assert parse_modelfile(f"SYSTEM {value}\nFROM x\n").system == text
    assert parse_modelfile(f"FROM x\nMESSAGE user {value}").messages == [{"role": "user", "content": text}]


def test_what_ollama_loses_is_lost_to_our_reader_too():
    """So the certificate sees it in a Modelfile that a person wrote."""
    read = parse_modelfile(f'FROM x\nTEMPLATE """{FAMILY}{{{{ .Prompt }}}}\n"""\nPARAMETER stop "a\u00a0b"\n')
    assert read.template.source == "👩👩👧{{ .Prompt }}\n" and read.stops == ["ab"]


def test_what_ollama_cannot_do_is_said():
    trimming = replace(CHATML, trims=("user", "assistant")).template()
    assert [len(notes(source(template))) for template in (CHATML.template(), None, trimming)] == [0, 1, 1]
    assert "trims what user and assistant say" in notes(source(trimming))[0]


def test_the_command():
    assert create_line("My Cat (Q4_K)") == "ollama create my-cat-q4_k -f Modelfile"
    assert create_line("їжак") == "ollama create model -f Modelfile"


# ---- as Go reads it --------------------------------------------------------------------------------------------------

GO = """package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type Message struct{ Role, Content string }

func main() {
	var asked []struct {
		Source   string
		Messages []*Message
	}
	if json.NewDecoder(os.Stdin).Decode(&asked) != nil {
		os.Exit(1)
	}
	out := []string{}
	for _, a := range asked {
		var text strings.Builder
		t := template.Must(template.New("").Option("missingkey=zero").Parse(a.Source))
		if err := t.Execute(&text, map[string]any{"Messages": a.Messages, "System": "", "Response": ""}); err != nil {
			panic(err)
		}
		out = append(out, text.String())
	}
	json.NewEncoder(os.Stdout).Encode(out)
}
"""


@pytest.fixture(scope="module")
def by_go(tmp_path_factory):
    """What Go's own text/template makes of [(source, messages)]."""
    go = shutil.which("go")
    if go is None:
        pytest.skip("no go here, so our interpreter of its templates is not held against it")
    folder = tmp_path_factory.mktemp("go")
    (folder / "main.go").write_text(GO)
    subprocess.run([go, "build", "-o", "render", "main.go"], cwd=folder, check=True, timeout=300)

    def render(asked):
        lines = [{"Source": text, "Messages": messages} for text, messages in asked]
        done = subprocess.run(
            [folder / "render"], input=json.dumps(lines), capture_output=True, text=True, check=True, timeout=60
        )
        return json.loads(done.stdout)

    return render


def test_go_itself_writes_the_same(by_go):
    asked = []
    for turns in DEFINITIONS.values():
        bos = "<s>" if turns.render(TALK).startswith("<s>") else ""
        forms = [go_form(turns.template(), bos), go_form(turns.template())]
        asked += [(form, m) for form in forms for m in conversations(turns.system is not None, turns.trims)]
    ours = [GoTemplate(text).render(messages, True) for text, messages in asked]
    assert len(asked) == 80 * len(DEFINITIONS) and by_go(asked) == ours
