"""finetune/encode.py: conversations become the rows that a server would see, and bad ones are one line."""

import numpy as np
import pytest

from kobza.config import InputError
from kobza.finetune.config import RowsConfig
from kobza.finetune.encode import PlainEncoder, encode, encode_last, encode_pairs, encode_prompts, plain_encoder
from kobza.finetune.example import Example
from kobza.formats.chat import ChatEncoder
from kobza.formats.template import ChatTemplate
from kobza.formats.turns import Turns
from kobza.tokenizer import ByteTokenizer, CharTokenizer, LibraryTokenizer

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VERSE = "Did the passenger survive? name sex age 42 yes no\n\nuser assistant system\n" * 30
CHATML = Turns(
    ("<|im_start|>user\n", "<|im_end|>\n"), ("<|im_start|>assistant\n", "<|im_end|>\n"), "<|im_end|>",
    ("<|im_start|>system\n", "<|im_end|>\n"),
)  # fmt: skip
PASSING = CHATML.jinja().replace('"<|im_start|>assistant\\n" if add', '"<|im_start|>assistant\\n<think>\\n" if add')
EVERY = RowsConfig()  # max_len 0: whole


@pytest.fixture(scope="module")
def tokenizer():
    return LibraryTokenizer.train([VERSE], 350, SPECIALS)


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return ChatEncoder(CHATML, tokenizer)


def talk(*said, system=None, where="t.csv row 2", **more):
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    return Example(tuple(messages), where, **more)


def learned_text(tokenizer, row):
    ids = row.ids[row.learned].tolist()
    return "".join(tokenizer.decode([i], continues=True) or tokenizer.show(i) for i in ids)


def said(examples, encoder, rows=EVERY, make=encode, **more):
    with pytest.raises(InputError) as caught:
        make(examples, encoder, rows, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_rows_are_what_a_server_sends_and_an_answer(tokenizer, encoder):
    examples = [talk("Age?", "42", system="Be kind."), talk("a", "yes", "b", "no", where="t.csv row 3")]
    rows, notes = encode(examples, encoder, EVERY, [tokenizer.specials["<|im_end|>"]])
    assert notes == [] and [row.where for row in rows] == ["t.csv row 2", "t.csv row 3"]
    assert [learned_text(tokenizer, row) for row in rows] == ["42<|im_end|>", "yes<|im_end|>no<|im_end|>"]
    for row, example in zip(rows, examples, strict=True):
        sent = encoder.encode(list(example.messages[:-1]), True)
        assert row.ids[: len(sent)].tolist() == sent and not row.learned[0]
        assert (row.ids.dtype, row.learned.dtype, row.cut) == (np.int32, np.bool_, 0)
        assert row.learned[-1] and row.ids[-1] == tokenizer.specials["<|im_end|>"]
        whole = encoder.encode(list(example.messages))
        assert whole[: len(row.ids)] == row.ids.tolist()


def test_the_first_token_is_no_target(tokenizer):
    """An answer that nothing asks for begins at once: what stands first cannot be told from anything."""
    bare = ChatEncoder(Turns(("<|im_start|>", ""), ("", "<|im_end|>"), "<|im_end|>"), tokenizer)
    row = encode([Example(({"role": "assistant", "content": "42"},), "w")], bare, EVERY).rows[0]
    assert row.learned.tolist() == [False] + [True] * (len(row.ids) - 1)


def test_learn_is_answers_last_or_all(tokenizer, encoder):
    examples = [talk("a", "yes", "b", "no")]
    last = encode(examples, encoder, RowsConfig(learn="last")).rows[0]
    every = encode(examples, encoder, RowsConfig(learn="all")).rows[0]
    assert learned_text(tokenizer, last) == "no<|im_end|>"
    assert every.learned.tolist() == [False] + [True] * (len(every.ids) - 1)
    assert every.ids.tolist() == encoder.encode(list(examples[0].messages))


def test_a_conversation_becomes_a_row_an_answer_where_its_past_is_rewritten(tokenizer):
    encoder = ChatEncoder(ChatTemplate(PASSING), tokenizer)
    examples = [talk("a", "yes", "b", "no"), talk("c", "no", where="t.csv row 3")]
    rows, notes = encode(examples, encoder, EVERY)
    assert [row.where for row in rows] == ["t.csv row 2, message 2", "t.csv row 2, message 4", "t.csv row 3"]
    assert [learned_text(tokenizer, row) for row in rows] == [
        f"\n</think>\n\n{answer}<|im_end|>" for answer in ("yes", "no", "no")
    ]
    for row, messages in zip(
        rows, (examples[0].messages[:1], examples[0].messages[:3], examples[1].messages[:1]), strict=True
    ):
        sent = encoder.encode(list(messages), True)
        assert row.ids[: len(sent)].tolist() == sent and row.learned.sum() == len(row.ids) - len(sent)
    assert len(notes) == 1 and notes[0].startswith("2 conversations became a row an answer") and "\n" not in notes[0]
    assert [r.where for r in encode(examples, encoder, RowsConfig(learn="last")).rows] == ["t.csv row 2", "t.csv row 3"]


def test_a_long_row_is_cut_at_its_end_and_counted(tokenizer, encoder):
    examples = [talk("Age?", "42 " * 40), talk("Age? " * 60, "42", where="t.csv row 3"), talk("a", "yes")]
    whole = encode(examples, encoder, EVERY).rows
    rows, notes = encode(examples, encoder, RowsConfig(max_len=40))
    for row, full in zip(rows, whole, strict=True):
        assert row.ids.tolist() == full.ids[:40].tolist() and row.learned.tolist() == full.learned[:40].tolist()
        assert row.cut == max(len(full.ids) - 40, 0)
    assert [bool(row.learned.any()) for row in rows] == [True, False, True] and rows[2].cut == 0
    assert notes == ["2 of 3 rows are longer than 40 tokens and cut at their end; of 1 no answer is left"]


def test_the_end_is_learned_though_padding_may_have_its_id(tokenizer, encoder):
    """What is learned stands beside the ids, so no id is ever left out for what it is."""
    end = tokenizer.specials["<|im_end|>"]
    rows = encode([talk(f"{i}", "yes") for i in range(50)], encoder, EVERY, [end]).rows
    assert all(row.learned[row.ids == end].tolist()[-1] for row in rows)
    assert all(row.learned[row.ids == end].sum() == 1 for row in rows)


def test_an_end_at_which_the_model_does_not_stop_is_told(tokenizer, encoder):
    notes = encode([talk("a", "yes")], encoder, EVERY, [tokenizer.specials["<|endoftext|>"]]).notes
    assert notes == ["answers end in <|im_end|>, where the model did not stop so far; from now on it must"]


def test_reasoning_is_masked_where_there_is_one(tokenizer, encoder):
    examples = [talk("a", "<think>\n42\n</think>\n\nyes"), talk("b", "no")]
    masked = RowsConfig(reasoning="masked")
    rows = encode(examples, encoder, masked).rows
    assert learned_text(tokenizer, rows[0]) == "<think></think>\n\nyes<|im_end|>"
    assert learned_text(tokenizer, encode(examples, encoder, EVERY).rows[0]) == "<think>\n42\n</think>\n\nyes<|im_end|>"
    assert "no effect: no answer has a reasoning" in said(examples[1:], encoder, masked)
    assert "no effect with --learn all" in said(examples, encoder, RowsConfig(reasoning="masked", learn="all"))
    assert learned_text(tokenizer, encode_last(examples, encoder, masked)[0]) == "<think></think>\n\nyes<|im_end|>"


def test_the_variables_of_an_example_reach_the_template(tokenizer):
    encoder = ChatEncoder(ChatTemplate("{% if mood %}{{ mood }}{% endif %}" + CHATML.jinja()), tokenizer)
    rows = encode([talk("a", "yes", extra={"mood": "kind"}), talk("a", "yes")], encoder, EVERY).rows
    assert tokenizer.decode(rows[0].ids.tolist()).startswith("kind") and len(rows[1].ids) < len(rows[0].ids)


@pytest.mark.parametrize("answer", ["", "  \n", None])
def test_an_empty_answer_is_named(encoder, answer):
    example = Example(({"role": "user", "content": "a"}, {"role": "assistant", "content": answer}), "t.csv row 7")
    for make in (encode, encode_last):
        assert said([talk("a", "b"), example], encoder, make=make).startswith(
            "t.csv row 7: message 2 is an empty answer"
        )


def test_what_is_wrong_names_the_row(tokenizer, encoder):
    refusing = ChatEncoder(Turns(CHATML.user, CHATML.assistant, "<|im_end|>", name="g.jinja"), tokenizer)
    assert (
        said([talk("a", "b", system="S")], refusing)
        == "t.csv row 2: g.jinja: knows no system; say it in the first question"
    )
    loop = (
        "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    dropping = ChatEncoder(
        ChatTemplate(loop + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}", name="d.jinja"),
        tokenizer,
    )
    for learn in ("answers", "last", "all"):
        line = said([talk("a", "b", system="Sing.")], dropping, RowsConfig(learn=learn))
        assert line.startswith("t.csv row 2: d.jinja: drops what the system says ('Sing.')")
    letters = CharTokenizer("".join(sorted(set("usersystemassistant\nab"))), "error", SPECIALS)
    assert said([talk("ж", "b")], ChatEncoder(CHATML, letters)).startswith(
        "t.csv row 2: 1 character is not in the vocabulary"
    )
    assert "no answer to learn" in said([talk("a")], encoder)


# ---- preferences and rewards -----------------------------------------------------------------------------------------


def test_pairs_share_the_ids_of_their_question(tokenizer, encoder):
    (pair,) = encode_pairs([talk("a", "yes", "b", "no", rejected="maybe 42")], encoder, EVERY)
    n = int(pair[0].learned.argmax())
    assert (
        pair[0].ids[:n].tolist()
        == pair[1].ids[:n].tolist()
        == encoder.encode(list(talk("a", "yes", "b").messages), True)
    )
    assert [learned_text(tokenizer, row) for row in pair] == ["no<|im_end|>", "maybe 42<|im_end|>"]
    assert not pair[1].learned[:n].any() and pair[0].where == pair[1].where == "t.csv row 2"
    wide = [{"role": "user", "content": "a"}]
    (spanning,) = encode_pairs(
        [Example((*wide, {"role": "assistant", "content": "\n\nyes"}), "w", rejected="no")], encoder, EVERY
    )
    sent = encoder.encode(wide, True)
    assert all(row.ids[: len(sent)].tolist() == sent for row in spanning)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (talk("a", "yes"), "t.csv row 2: no rejected answer"),
        (talk("a", "yes", rejected=" "), "t.csv row 2: an empty rejected answer"),
        (talk("a", "yes", rejected="yes"), "t.csv row 2: chosen and rejected are the same"),
        (talk("a", "", rejected="yes"), "t.csv row 2: message 2 is an empty answer"),
        (talk("a", rejected="yes"), "t.csv row 2: the conversation does not end in an answer"),
    ],
)
def test_what_is_no_pair_is_one_line(encoder, example, message):
    assert said([example], encoder, make=encode_pairs).startswith(message)


def test_questions_for_rewards_ask(encoder):
    rows = encode_prompts(
        [talk("a", expected="42"), talk("a", "yes", "b", where="w"), talk("a", "yes")], encoder, EVERY
    )
    asked = [talk("a"), talk("a", "yes", "b"), talk("a")]
    assert [row.ids.tolist() for row in rows] == [encoder.encode(list(example.messages), True) for example in asked]
    assert [(row.expected, row.where) for row in rows] == [("42", "t.csv row 2"), (None, "w"), (None, "t.csv row 2")]
    line = said([talk("Age? " * 60)], encoder, RowsConfig(max_len=30), make=encode_prompts)
    assert line.startswith("t.csv row 2: the question has ") and "--max-len is 30" in line


# ---- without a template ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["library", "byte", "char"])
def test_the_plain_form_is_prompt_answer_end(tokenizer, kind):
    names = ("<|begin|>", "<|endoftext|>")
    kinds = {
        "library": tokenizer,
        "byte": ByteTokenizer(names),
        "char": CharTokenizer("".join(sorted(set("3+4=7 \n"))), "error", names),
    }
    found = kinds[kind]
    plain = plain_encoder(found, found.ends)
    assert plain.ends == {"<|endoftext|>": found.eot_id}
    (row,) = encode([talk("3+4=", "7")], plain, EVERY, found.ends).rows
    sent = found.encode_prompt("3+4=")
    assert row.ids.tolist() == [*sent, *found.encode("7", continues=True).tolist(), found.eot_id]
    assert row.learned.tolist() == [i >= len(sent) for i in range(len(row.ids))]
    assert encode([talk("3+4=", "7")], plain, RowsConfig(learn="all")).rows[0].learned.sum() == len(row.ids) - 1
    assert encode_prompts([talk("3+4=")], plain, EVERY)[0].ids.tolist() == sent
    ((good, bad),) = encode_pairs([talk("3+4=", "7", rejected="4")], plain, EVERY)
    assert good.ids.tolist() == row.ids.tolist() and bad.ids[: len(sent)].tolist() == sent


def test_what_the_plain_form_has_no_place_for(tokenizer):
    with pytest.raises(InputError, match="neither a chat template nor an end token") as caught:
        plain_encoder(ByteTokenizer(), [10])
    assert "\n" not in str(caught.value)
    plain = PlainEncoder(tokenizer, 0)
    for example in (talk("a", "b", system="S"), talk("a", "b", "c", "d"), talk("a", "b", extra={"tools": []})):
        assert "a model without a chat template" in said([example], plain)
    thinking = [talk("a", "<think>x</think>b")]
    assert "needs a chat template" in said(thinking, plain, RowsConfig(reasoning="masked"))


def test_the_first_end_that_is_a_token_ends_an_answer():
    found = ByteTokenizer(("<|endoftext|>", "<|done|>"))
    assert plain_encoder(found, [10, 257]).end == 257 and plain_encoder(found).end == 256
