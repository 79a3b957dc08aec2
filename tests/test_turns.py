"""formats/turns.py, and what formats/chat.py learns of a chat: one definition of a template, the same tokens in all its forms."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kobza.config import InputError
from kobza.doctor.mutations import template as samples
from kobza.formats.chat import ChatEncoder, Rewritten
from kobza.formats.gotemplate import GoTemplate
from kobza.formats.template import ChatTemplate
from kobza.formats.turns import Turns, explained, turns_from_example
from kobza.tokenizer import ByteTokenizer, CharTokenizer, LibraryTokenizer

SPECIALS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "[INST]", "[/INST]", "<bos>", "<start_of_turn>"),
    *("<end_of_turn>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
)
VERSE = "the cat sat on the mat\n\nuser: the dog's model, 42 < 43?  assistant\n system їжак їсть яблуко INST SYS\n" * 30
EXAMPLE = """<s>Below are a task and its solution. {SYSTEM}

### Instruction:
{INPUT}

### Response:
{OUTPUT}</s>

### Instruction:
{INPUT}

### Response:
{OUTPUT}</s>

"""


def turns_of(template: ChatTemplate) -> Turns | None:
    """The definition that writes what a template writes, None where the template does more; `why_not` then tells."""
    try:
        return explained(template)
    except InputError:
        return None


def why_not(template: ChatTemplate) -> str:
    """What of a template no definition by turns writes, in a line; "" where one does."""
    try:
        explained(template)
    except InputError as error:
        return str(error)
    return ""


def header(role):
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


def chatml(**more):
    user, assistant, system = ((f"<|im_start|>{role}\n", "<|im_end|>\n") for role in ("user", "assistant", "system"))
    return Turns(user, assistant, "<|im_end|>", system, **more)


DEFINITIONS = {
    "chatml": chatml(),
    "chatml, default": chatml(default="You are \"kind\" \\ {{ x }}.\n"),
    "llama2": Turns(
        ("<s>[INST] ", " [/INST]"), (" ", " </s>"), "</s>", ("<<SYS>>\n", "\n<</SYS>>\n\n"), inside=True, asking="",
        trims=("user", "assistant"),
    ),
    "llama2, default": Turns(("<s>[INST] ", " [/INST]"), (" ", " </s>"), "</s>", ("<<", ">>\n"), True, "їж"),
    "llama3": Turns(
        (header("user"), "<|eot_id|>"), (header("assistant"), "<|eot_id|>"), "<|eot_id|>", (header("system"), "<|eot_id|>"),
        bos="<|begin_of_text|>", trims=("system", "user", "assistant"),
    ),
    "gemma": Turns(
        ("<start_of_turn>user\n", "<end_of_turn>\n"), ("<start_of_turn>model\n", "<end_of_turn>\n"), "<end_of_turn>",
        bos="<bos>", trims=("user", "assistant"),
    ),
    "phi": Turns(
        ("<|user|>\n", "<|end|>\n"), ("<|assistant|>\n", "<|end|>\n"), "<|end|>", ("<|system|>\n", "<|end|>\n"),
        closing="<|endoftext|>",
    ),
    "mistral": Turns(("[INST]", "[/INST]"), ("", "</s>"), "</s>", bos="<s>"),
    "from an example": turns_from_example(EXAMPLE, SPECIALS, "<s>"),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return LibraryTokenizer.train([VERSE, EXAMPLE], 420, SPECIALS)


@pytest.fixture(scope="module")
def sentencepiece():
    """A tokenizer of Llama 2's kind: a space before a text and after some tokens, bytes for what it does not know."""
    from tokenizers import Tokenizer as Inner
    from tokenizers import models, normalizers, trainers

    inner, byte_names = Inner(models.BPE()), [f"<0x{b:02X}>" for b in range(256)]
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=[*SPECIALS, *byte_names], show_progress=False)
    inner.train_from_iterator(VERSE.splitlines(), trainer)
    content = json.loads(inner.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in SPECIALS]
    content["model"] |= {"byte_fallback": True, "fuse_unk": True}
    steps = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    content["decoder"] = {"type": "Sequence", "decoders": [*steps, strip]}
    return LibraryTokenizer(json.dumps(content))


def spelled(tokenizer, ids, start=0, stop=None):
    """The text of ids[start:stop] with the names of special tokens in it. Behind such a token a text begins anew (its space)."""
    names = {i: name for name, i in tokenizer.specials.items()}
    parts, run = [], []
    for place, i in enumerate([*ids[:stop], None][start:], start):
        if i is None or i in names:
            first = place - len(run) - 1
            parts.append(tokenizer.decode(run, continues=first >= 0 and ids[first] not in names))
            parts.append(names.get(i, ""))
            run = []
        else:
            run.append(i)
    return "".join(parts)


odd = st.sampled_from(
    [
        "",
        " ",
        "\n",
        "\n\n",
        " a",
        "a ",
        "the cat",
        "</think>",
        "<think>",
        "{{ x }}",
        "{% if %}",
        '"',
        "\\",
        "'",
        "]",
        "<",
        "|>",
        "s",
    ]
    + [
        *SPECIALS,
        "<|im_",
        "end|>",
        "_of_turn>",
        "[/INS",
        "T]",
        "### Response:\n",
        "{USER}",
        "👩‍👩‍👧",
        "їжак",
        "\u2028",
        "\x00",
    ]
)
character = st.characters(exclude_categories=("Cs",), exclude_characters=[chr(c) for c in range(0xFDD0, 0xFDF0)])
words = st.lists(st.one_of(odd, st.text(character, max_size=6)), max_size=4).map("".join)
conversations = st.tuples(st.none() | words, st.lists(st.tuples(words, words), min_size=1, max_size=3))


def as_messages(turns, conversation):
    system, pairs = conversation
    said = [] if system is None or turns.system is None else [("system", system)]
    said += [(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)]
    return [
        {"role": role, "content": text.strip() if role in turns.trims else text} for role, text in said
    ]  # Go cannot trim: who sends does


def trained(encoder, messages):
    """(ids, learned) of the rows that a conversation is trained on."""
    try:
        return [encoder.encode_learned(messages)]
    except Rewritten:
        answers = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
        return [encoder.encode_answer(messages[: k + 1]) for k in answers]


def spans(learned):
    """(start, stop) of each run of learned tokens."""
    edges = [i for i in range(len(learned) + 1) if (learned + [False])[i] != ([False] + learned)[i]]
    return list(zip(edges[0::2], edges[1::2], strict=True))


@pytest.mark.parametrize("name", DEFINITIONS)
@settings(max_examples=15, deadline=None)
@given(conversation=conversations)
def test_one_definition_is_the_same_tokens_everywhere(tokenizer, name, conversation):
    """What is trained on, what a server sends and what Ollama sends are the same ids; each answer that is learned stands behind
    the ids that ask for it, and ends in the end token."""
    check_same_tokens(DEFINITIONS[name], tokenizer, conversation)


@pytest.mark.parametrize("name", ["llama2", "mistral", "gemma"])
@settings(max_examples=15, deadline=None)
@given(conversation=conversations)
def test_and_by_a_tokenizer_that_puts_spaces_before_texts(sentencepiece, name, conversation):
    check_same_tokens(DEFINITIONS[name], sentencepiece, conversation)


def check_same_tokens(turns, tokenizer, conversation):
    messages = as_messages(turns, conversation)
    training, server = ChatEncoder(turns, tokenizer), ChatEncoder(turns.template(), tokenizer)
    ollama = ChatEncoder(GoTemplate(turns.go()), tokenizer)
    assert turns.template().render(messages) == turns.render(messages)
    assert server.encode(messages) == training.encode(messages)
    beginning = [tokenizer.specials[turns.bos]] if turns.bos else []
    asked = {}
    for k, message in enumerate(messages):
        if message["role"] == "assistant":
            sent = server.encode(messages[:k], True)
            assert beginning + ollama.encode(messages[:k], True) == sent
            asked[tuple(sent)] = message["content"]
    whole = beginning + ollama.encode(messages)
    assert spelled(tokenizer, whole) + turns.closing == spelled(tokenizer, server.encode(messages))
    answers = []
    for ids, learned in trained(training, messages):
        for start, stop in spans(learned):
            answers.append(asked[tuple(ids[:start])])
            header = turns.assistant[0].removeprefix(turns.asks)
            end = turns.assistant[1].removesuffix(rest(turns))
            assert spelled(tokenizer, ids, start, stop) == header + answers[-1] + end
    assert sorted(answers) == sorted(message["content"] for message in messages if message["role"] == "assistant")


def rest(turns):
    """What stands behind the end token of an answer, before the next question."""
    return turns.assistant[1].partition(turns.end)[2]


@pytest.mark.parametrize("name", DEFINITIONS)
def test_a_definition_is_found_again_in_its_template(name):
    turns = DEFINITIONS[name]
    found = turns_of(turns.template())
    assert why_not(turns.template()) == "" and found is not None
    messages = [{"role": role, "content": " x\n"} for role in ("system", "user", "assistant", "user")][
        turns.system is None :
    ]
    for n in range(1, 5 - (turns.system is None)):
        for ask in (True, False):
            if messages[n - 1]["role"] != "system":
                assert found.render(messages[:n], ask) == turns.render(messages[:n], ask)
    assert (found.end, found.trims, found.inside) == (turns.end, turns.trims, turns.inside)


# ---- what a definition is made of ------------------------------------------------------------------------------------

CHATML_EXAMPLE = """<|im_start|>system
{SYSTEM}<|im_end|>
<|im_start|>user
{USER}<|im_end|>
<|im_start|>assistant
{ASSISTANT}<|im_end|>
<|im_start|>user
{USER}<|im_end|>
<|im_start|>assistant
{ASSISTANT}<|im_end|>"""


@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
def test_an_example_of_two_turns_is_a_definition(end):
    """However many line ends an editor leaves: the one between turns belongs to the turn before it."""
    found = turns_from_example(CHATML_EXAMPLE + end, SPECIALS)
    assert (found.user, found.assistant, found.system) == (chatml().user, chatml().assistant, chatml().system)
    assert found.stops == ["<|im_end|>"]
    without = CHATML_EXAMPLE.partition("<|im_end|>\n")[2]
    assert turns_from_example(without + end, SPECIALS).user == chatml().user


def test_a_system_within_the_first_question():
    turn = "[INST] {}{{USER}} [/INST] {{ASSISTANT}} </s>"
    text = "<s>" + turn.format("<<SYS>>{SYSTEM}<</SYS>>\n") + turn.format("")
    found = turns_from_example(text, SPECIALS, "<s>")
    assert (
        found.inside and found.bos == "<s>" and found.system == ("<<SYS>>", "<</SYS>>\n") and found.user[0] == "[INST] "
    )
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    assert found.render(messages, True) == "<s>[INST] <<SYS>>S<</SYS>>\nU [/INST]"  # the space is the answer's


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{USER}<|im_end|>{ASSISTANT}<|im_end|>", "shows one turn; show two or more"),
        ("hello", "placeholders none"),
        ("{USER}{USER}{ASSISTANT}", "placeholders {USER} {USER} {ASSISTANT}; write {SYSTEM} or nothing"),
        ("{USER} {SYSTEM} {ASSISTANT}", "placeholders {USER} {SYSTEM} {ASSISTANT}"),
        ("Q{USER}A{ASSISTANT}</s>Q{USER}B{ASSISTANT}</s>", "between a question and its answer stands 'A', then 'B'"),
        ("Q{USER}A{ASSISTANT}\nQ{USER}A{ASSISTANT}\n", "is no end token"),
        ("Q{USER}A{ASSISTANT}</s>Q{USER}A{ASSISTANT}<|im_end|>", "end them alike"),
        ("P{USER}A{ASSISTANT}</s>Q{USER}A{ASSISTANT}</s>", "the first question begins 'P' and others 'Q'"),
        ("P{SYSTEM}R{USER}A{ASSISTANT}</s>Q{USER}A{ASSISTANT}</s>", "{SYSTEM} stands neither before"),
    ],
)  # fmt: skip
def test_what_is_no_example_is_one_line(text, message):
    with pytest.raises(InputError) as caught:
        turns_from_example(text, SPECIALS)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from(["{USER}", "{ASSISTANT}", "{SYSTEM}", "{INPUT}", "</s>", "Q", "\n", " ", "<s>"]), max_size=14
    )
)
def test_any_example_is_a_definition_or_one_line(parts):
    """And a definition writes its own example."""
    text = "".join(parts)
    try:
        found = turns_from_example(text, SPECIALS, "<s>")
    except InputError as error:
        assert "\n" not in str(error)
        return
    roles = {"SYSTEM": "system", "USER": "user", "INPUT": "user", "ASSISTANT": "assistant"}
    messages = [{"role": roles[part[1:-1]], "content": part} for part in parts if part[1:-1] in roles]
    assert found.render(messages).rstrip() == text.rstrip()


def test_a_definition_without_an_end_is_refused():
    with pytest.raises(InputError, match="no end token"):
        Turns(("Q: ", "\n"), ("A: ", "\n"), "</s>")
    with pytest.raises(InputError, match="a default for a system"):
        Turns(("Q: ", "\n"), ("A: ", "</s>"), "</s>", default="x")


def test_what_a_definition_has_no_place_for_is_refused():
    with pytest.raises(InputError, match="content is a list"):
        chatml().render([{"role": "user", "content": [{"type": "text", "text": "a"}]}])
    system = [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]
    for render in (DEFINITIONS["mistral"].render, DEFINITIONS["mistral"].template().render):
        with pytest.raises(InputError):
            render(system)
    for role in ("tool", "system"):
        odd = [{"role": "user", "content": "y"}, {"role": role, "content": "x"}]
        for render in (chatml().render, chatml().template().render):
            with pytest.raises(InputError, match=f"no place.*{role}|no place.*here"):
                render(odd)


@pytest.mark.parity
@pytest.mark.parametrize("name", DEFINITIONS)
def test_the_source_means_the_same_to_transformers(name):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    turns = DEFINITIONS[name]
    messages = as_messages(turns, ("Be kind.\n", [(" a\n\nb ", "{{ c }}"), ("Їхав", "козак\\n")]))
    for n, ask in ((len(messages), False), (len(messages) - 1, True)):
        theirs = utils.render_jinja_template([messages[:n]], None, None, turns.jinja(), add_generation_prompt=ask)[0][0]
        assert theirs == turns.render(messages[:n], ask)
        assert theirs == ChatTemplate(turns.jinja(), trim=False).render(messages[:n], add_generation_prompt=ask)


pieces = st.lists(
    st.sampled_from(["<|user|>", "<s>", "### Q:\n", "User:", " ", "\n", "[INST]", "é", '"', "\\"]), max_size=3
)
around = pieces.map("".join)
definitions = st.builds(
    lambda user, before, end, after, system, inside, default, closing, trims: Turns(
        user, (before, end + after), end, system, inside and system is not None,
        None if system is None else default, closing=closing, trims=trims,
    ),
    st.tuples(around.map("<|user|>".__add__), around), around.map("<|assistant|>".__add__),
    st.sampled_from(["</s>", "<|end|>"]), st.sampled_from(["", "\n", " "]),
    st.none() | st.tuples(around.map("<|system|>".__add__), around), st.booleans(), st.none() | st.sampled_from(["", "Be kind."]),
    st.sampled_from(["", "<|endoftext|>"]), st.sampled_from([(), ("user",), ("system", "user", "assistant")]),
)  # fmt: skip


@settings(max_examples=20, deadline=None)
@given(definitions)
def test_any_definition_is_found_again(turns):
    assert why_not(turns.template()) == ""


@pytest.mark.parametrize(
    ("source", "why"),
    [
        (samples.THINKING, "think"),
        (samples.LLAMA2, "INST"),  # a system keeps the white space before the first question, which else is trimmed
        ("{{ strftime_now('%d %b %Y') }}" + chatml().jinja(), "tells the date"),
        (chatml().jinja().replace("rest = messages", "rest = messages[-3:]"), "two turns are written"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:", "no token"),
        ("{{ messages[0].content }}", "two turns are written"),
        ("{% if %}", "not a Jinja template"),
    ],
)
def test_a_template_that_is_more_than_turns_is_not_explained(source, why):
    template = ChatTemplate(source, eos="</s>")
    assert turns_of(template) is None
    said = why_not(template)
    assert why in said and said and "\n" not in said


def test_released_templates_in_terms_of_turns():
    leaning = turns_of(ChatTemplate(samples.LEANING))  # by trim_blocks it is ChatML
    assert (leaning.user, leaning.assistant, leaning.system) == (chatml().user, chatml().assistant, chatml().system)
    mistral = turns_of(ChatTemplate(samples.MISTRAL, "<s>", "</s>"))
    assert mistral.system is None and mistral.bos == "<s>" and mistral.user == ("[INST] ", " [/INST]")


def test_a_token_that_begins_every_turn_is_no_beginning_of_the_text():
    """SmolLM2 calls <|im_start|> its bos: Ollama, which is to put bos there itself, would not."""
    turns = turns_of(ChatTemplate(chatml(default="kind").jinja(), "<|im_start|>", "<|im_end|>"))
    assert turns.bos == "" and turns.system == ("<|im_start|>system\n", "<|im_end|>\n") and turns.default == "kind"


# ---- what is learned of a chat ---------------------------------------------------------------------------------------

TALK = [
    {"role": "system", "content": "the cat"},
    {"role": "user", "content": "sat?"},
    {"role": "assistant", "content": "the dog"},
    {"role": "user", "content": "and <|im_end|>?"},
    {"role": "assistant", "content": "<|im_end|> 42"},
]
ROLE = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
LOOP = "{% for m in messages %}"
ASK = "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
# what released templates do with the past and with an answer's reasoning
QWEN3 = (
    LOOP + "{% set said = m.content.split('</think>')[-1].lstrip('\n') %}{% if m.role == 'assistant' and loop.last %}"
    "<|im_start|>assistant\n<think>\n{{ (m.reasoning_content or m.content.split('</think>')[0].split('<think>')[-1] "
    "if '</think>' in m.content or m.reasoning_content else '').strip('\n') }}\n</think>\n\n{{ said }}<|im_end|>\n{% else %}"
    "<|im_start|>{{ m.role }}\n{{ said }}<|im_end|>\n{% endif %}" + ASK + "{% endif %}"
)  # fmt: skip
R1 = (
    LOOP + "<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1].strip() }}<|im_end|>\n" + ASK + "<think>\n{% endif %}"
)  # fmt: skip
GLM = (
    LOOP + "{{ {'user': '<|user|>', 'assistant': '<|assistant|>', 'system': '<|system|>'}[m.role] }}\n{{ m.content }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)  # fmt: skip
OSS = (
    LOOP + "<|im_start|>{{ m.role }}<|user|>{{ m.content }}{% if m.role == 'assistant' and loop.last %}<|endoftext|>{% else %}"
    "<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)  # fmt: skip
NEMO = (
    "{% set ns = namespace(s='') %}{% if messages[0].role == 'system' %}{% set ns.s = messages[0].content + '\n' %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ (ns.s if loop.last else '') + m.content }}[/INST]"
    "{% elif m.role == 'assistant' %}{{ m.content }}</s>{% endif %}{% endfor %}"
)  # fmt: skip


def learned_texts(tokenizer, pair):
    ids, learned = pair
    return [spelled(tokenizer, ids, *span) for span in spans(learned)]


@pytest.mark.parametrize("kind", ["library", "byte", "char"])
def test_answers_and_what_ends_them_are_learned(tokenizer, kind):
    alphabet = "".join(sorted({c for m in TALK for c in m["content"]} | set("usersystemassistant\n")))
    kinds = {"library": tokenizer, "byte": ByteTokenizer(SPECIALS), "char": CharTokenizer(alphabet, "error", SPECIALS)}
    encoder = ChatEncoder(ChatTemplate(LOOP + ROLE + ASK + "{% endif %}"), kinds[kind])
    pair = encoder.encode_learned(TALK)
    assert pair[0] == encoder.encode(TALK)
    assert learned_texts(kinds[kind], pair) == ["the dog<|im_end|>", "<|im_end|> 42<|im_end|>"]
    assert learned_texts(kinds[kind], encoder.encode_learned(TALK, "last")) == ["<|im_end|> 42<|im_end|>"]
    assert encoder.encode_learned(TALK, "all")[1] == [False] + [True] * (len(pair[0]) - 1)
    assert encoder.ends == {"<|im_end|>": kinds[kind].specials["<|im_end|>"]}
    special = set(kinds[kind].specials.values())
    assert sum(i in special for i in pair[0]) == 10  # a header and an end to each turn, none of a person's


@pytest.mark.parametrize("source", [samples.CHATML_GO, samples.MESSAGES_GO])
def test_answers_are_learned_by_ollamas_templates_too(tokenizer, source):
    encoder = ChatEncoder(GoTemplate(source), tokenizer)
    ids, learned = encoder.encode_learned(TALK)
    assert learned_texts(tokenizer, (ids, learned)) == ["the dog<|im_end|>", "<|im_end|> 42<|im_end|>"]
    assert ids == ChatEncoder(chatml(), tokenizer).encode(TALK)[: len(ids)]
    assert ids[: learned.index(True)] == encoder.encode(TALK[:2], True)


def test_earlier_thoughts_that_a_template_drops(tokenizer):
    """Qwen3: what was written before the first answer, the empty thought included, is gone once a second question follows."""
    encoder = ChatEncoder(ChatTemplate(QWEN3), tokenizer)
    thinking = [*TALK[:2], {"role": "assistant", "content": "<think>\nit sat\n</think>\n\nthe dog"}, *TALK[3:]]
    for talk, first in ((TALK, "<think>\n\n</think>\n\nthe dog"), (thinking, "<think>\nit sat\n</think>\n\nthe dog")):
        with pytest.raises(Rewritten, match="reads"):
            encoder.encode_learned(talk)
        ids, learned = encoder.encode_answer(talk[:3])
        assert learned_texts(tokenizer, (ids, learned)) == [first + "<|im_end|>"]
        assert ids[: learned.index(True)] == encoder.encode(talk[:2], True)
        assert learned_texts(tokenizer, encoder.encode_learned(talk, "last"))[0].endswith(
            "</think>\n\n<|im_end|> 42<|im_end|>"
        )


def test_reasoning_is_learned_or_masked(tokenizer):
    encoder = ChatEncoder(ChatTemplate(QWEN3), tokenizer)
    for answer in (
        {"role": "assistant", "content": "<think>\nit sat\n</think>\n\nthe dog"},
        {"role": "assistant", "content": "the dog", "reasoning_content": "it sat"},
    ):
        talk = [TALK[3], answer]
        for encode in (encoder.encode_learned, encoder.encode_answer):
            whole = encode(talk)
            assert learned_texts(tokenizer, whole) == ["<think>\nit sat\n</think>\n\nthe dog<|im_end|>"]
            ids, learned = encode(talk, reasoning="masked")  # the question holds a token's name, which is no token
            assert ids == whole[0] and learned_texts(tokenizer, (ids, learned)) == [
                "<think>",
                "</think>\n\nthe dog<|im_end|>",
            ]
    with pytest.raises(InputError, match="drops the reasoning of an answer .'it sat'"):
        ChatEncoder(chatml(), tokenizer).encode_answer(talk)


def test_a_prompt_that_opens_a_thought(tokenizer):
    """DeepSeek-R1: the server's prompt ends in <think>, of which a finished conversation shows nothing."""
    encoder = ChatEncoder(ChatTemplate(R1), tokenizer)
    for said, wanted in (
        ("the dog", "\n</think>\n\nthe dog"),
        ("<think>\nit sat\n</think>\nthe dog", "it sat\n</think>\n\nthe dog"),
    ):
        talk = [*TALK[:2], {"role": "assistant", "content": said}]
        with pytest.raises(Rewritten):
            encoder.encode_learned(talk)
        ids, learned = encoder.encode_answer(talk)
        assert learned_texts(tokenizer, (ids, learned)) == [wanted + "<|im_end|>"]
        assert ids[: learned.index(True)] == encoder.encode(talk[:2], True)
    masked = encoder.encode_answer(talk, reasoning="masked")
    assert learned_texts(tokenizer, masked) == ["</think>\n\nthe dog<|im_end|>"]


def test_a_prompt_that_says_more_than_the_whole_shows(tokenizer):
    """QwQ's closed thought, Apriel's first words: the model goes on from there with the answer alone."""
    encoder = ChatEncoder(ChatTemplate(LOOP + ROLE + ASK + "So:{% endif %}"), tokenizer)
    for said in ("the dog", "end ", ""):  # "end" stands in the name of a token too
        ids, learned = encoder.encode_answer([*TALK[:2], {"role": "assistant", "content": said}])
        assert learned_texts(tokenizer, (ids, learned)) == [said + "<|im_end|>"]
        assert ids[: learned.index(True)] == encoder.encode(TALK[:2], True)


def test_a_thought_that_is_closed_otherwise_than_it_was_opened(tokenizer):
    """GLM 4.7: asked for after <think>, and shown behind a bare </think>, with the thought or without."""
    thought = "{% if m.role == 'assistant' %}{{ m.reasoning_content }}</think>{% endif %}"
    source = LOOP + "<|im_start|>{{ m.role }}\n" + thought + "{{ m.content }}<|im_end|>\n" + ASK + "<think>{% endif %}"
    encoder = ChatEncoder(ChatTemplate(source), tokenizer)
    for more, wanted in (({}, "</think>the dog"), ({"reasoning_content": "it sat"}, "it sat</think>the dog")):
        talk = [*TALK[:2], TALK[2] | more]
        ids, learned = encoder.encode_answer(talk)
        assert learned_texts(tokenizer, (ids, learned)) == [wanted + "<|im_end|>"]
        assert ids[: learned.index(True)] == encoder.encode(talk[:2], True)


def test_a_last_answer_that_is_left_open_is_closed(tokenizer):
    """GLM: an answer is ended by the mark of the next question, and the last by nothing."""
    encoder = ChatEncoder(ChatTemplate(GLM), tokenizer)
    pair = encoder.encode_learned(TALK)
    assert learned_texts(tokenizer, pair) == ["the dog<|user|>", "<|im_end|> 42<|user|>"]
    assert pair[0][:-1] == encoder.encode(TALK)


def test_answers_that_end_otherwise_when_the_conversation_goes_on(tokenizer):
    """gpt-oss: the last answer ends in another token, at which alone the model stops."""
    encoder = ChatEncoder(ChatTemplate(OSS), tokenizer)
    assert set(encoder.ends) == {"<|end|>", "<|endoftext|>"}
    with pytest.raises(Rewritten):
        encoder.encode_learned(TALK)
    assert learned_texts(tokenizer, encoder.encode_learned(TALK, "last")) == ["<|user|><|im_end|> 42<|endoftext|>"]
    assert learned_texts(tokenizer, encoder.encode_answer(TALK[:3])) == ["<|user|>the dog<|endoftext|>"]


def test_a_role_that_a_template_drops(tokenizer):
    """Mistral Nemo shows the system's words only while an answer is due; others never do."""
    nemo = ChatEncoder(ChatTemplate(NEMO), tokenizer)
    with pytest.raises(Rewritten):
        nemo.encode_learned(TALK)
    assert spelled(tokenizer, nemo.encode_answer(TALK[:3])[0]) == "[INST]the cat\nsat?[/INST]the dog</s>"
    source = LOOP + "{% if m.role != 'system' %}" + ROLE + "{% endif %}" + ASK + "{% endif %}"
    never = ChatEncoder(ChatTemplate(source, name="t.jinja"), tokenizer)
    for word in (" im", "end "):  # stands in the text, but only in the names of tokens
        with pytest.raises(InputError, match="drops what the system says"):
            never.encode_answer([{"role": "system", "content": word}, *TALK[1:3]])
    with pytest.raises(InputError, match="t.jinja: drops what the system says .'the cat'.; leave it out") as caught:
        never.encode_answer(TALK)
    assert "\n" not in str(caught.value)


def test_a_token_that_spans_prompt_and_answer(tokenizer):
    """The server's ids decide: those of the prompt, then the answer's as it goes on from there."""
    merged = next(i for i, piece in enumerate(tokenizer.pieces) if piece == b"\n\n")
    encoder = ChatEncoder(chatml(), tokenizer)
    talk = [*TALK[:2], {"role": "assistant", "content": "\n\nthe dog"}]
    assert merged in encoder.encode(talk)
    with pytest.raises(Rewritten, match="a token spans"):
        encoder.encode_learned(talk)
    ids, learned = encoder.encode_answer(talk)
    start = encoder.encode(talk[:2], True)
    assert ids[: len(start)] == start and learned.index(True) == len(start) and merged not in ids[len(start) :]
    assert spelled(tokenizer, ids) == chatml().render(talk).rstrip("\n")


def test_an_end_that_is_no_token_is_refused(tokenizer):
    plain = LibraryTokenizer.train([VERSE], 300, ["<|endoftext|>"])
    with pytest.raises(InputError, match="holds no token of this tokenizer") as caught:
        ChatEncoder(chatml(), plain).encode_learned(TALK)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="no answer to learn"):
        ChatEncoder(chatml(), tokenizer).encode_learned(TALK[:2])
    with pytest.raises(InputError, match="does not end in an answer"):
        ChatEncoder(chatml(), tokenizer).encode_answer(TALK[:2])


def test_of_several_tokens_behind_an_answer_the_models_own_ends_it(tokenizer):
    template = ChatTemplate(LOOP + "<|im_start|>{{ m.role }}\n{{ m.content }}<|end|><|im_end|>\n" + ASK + "{% endif %}")
    first, own = ChatEncoder(template, tokenizer), ChatEncoder(template, tokenizer, [tokenizer.specials["<|im_end|>"]])
    assert learned_texts(tokenizer, first.encode_learned(TALK, "last")) == ["<|im_end|> 42<|end|>"]
    assert learned_texts(tokenizer, own.encode_learned(TALK, "last")) == ["<|im_end|> 42<|end|><|im_end|>"]


@pytest.mark.parity
def test_the_same_is_learned_as_a_template_marks_itself(tokenizer):
    """transformers learns what stands between {% generation %} marks; ours finds the same without them."""
    transformers = pytest.importorskip("transformers")
    marked = "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    source = (
        LOOP
        + "{% if m.role == 'assistant' %}<|im_start|>assistant\n"
        + marked
        + "{{ '\n' }}{% else %}"
        + ROLE
        + "{% endif %}"
        + ASK
        + "{% endif %}"
    )
    inner = LibraryTokenizer(tokenizer.to_json()).inner
    inner.encode_special_tokens = False
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=source)
    talk = [{**message, "content": message["content"].replace("<|im_end|>", "їжак")} for message in TALK]
    wanted = theirs.apply_chat_template(talk, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    ids, learned = ChatEncoder(ChatTemplate(source), tokenizer).encode_learned(talk)
    assert ids == list(wanted["input_ids"]) and learned == [bool(flag) for flag in wanted["assistant_masks"]]
