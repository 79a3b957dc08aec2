"""kobza eval: losses that add up, measures that move one way in training, memorisation told from learning, tasks, the verb."""

import json
import math
import random
import sys

import numpy as np
import pytest
from test_run import SMALL, verse

from kobza.checkpoint import checkpoint_path, list_checkpoints, load_checkpoint
from kobza.cli import main
from kobza.config import InputError
from kobza.evals import measures as m
from kobza.evals.copies import TextIndex
from kobza.evals.evaluation import How, evaluate, make_subject, progress
from kobza.evals.loss import blocks, loss_by_position, measure_loss, side_by_side
from kobza.evals.memorise import find_copies, usual_copy
from kobza.evals.score import Scored, score
from kobza.evals.stats import Estimate, difference, over_units, ratio, share, trend
from kobza.evals.tasks import choose, judge, read_tasks
from kobza.evals.texts import pieces_like, read_documents, stretches, write
from kobza.recipes import train as recipe
from kobza.run import open_run
from kobza.tokenizer import CharTokenizer

CPU = "--device=cpu"
QUICK = ["--samples=5", "--sample-tokens=80", CPU]


def train(folder, name, text, **settings):
    """A run on a text, without its pictures -> its folder. settings: those of SMALL, by their last name, that differ."""
    small = dict(word.split("=") for word in SMALL) | {"--data.val_fraction": "0.1", "--train.checkpoint_interval": "0"}
    known = {name.split(".")[-1]: name for name in small}
    argv = [f"{k}={v}" for k, v in (small | {known[name]: value for name, value in settings.items()}).items()]
    (folder / f"{name}.txt").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "draw", lambda run, *_: (run.out / "loss.png", run.out / "report.html"))
        assert main(["train", str(folder / f"{name}.txt"), "--out", str(folder / name), *argv]) == 0
    return folder / name


def story(n_bytes=20_000, seed=0):
    """Words of which each calls for one of two next ones, in lines that end after a third of the words: there is something to
    learn from words, and where a line ends does not show in a character."""
    rules, rng = random.Random(7), random.Random(seed)
    words = sorted({"".join(rules.choice("bdgklmnprst") + rules.choice("aeiou") for _ in range(2)) for _ in range(40)})
    after, ends = {word: rules.sample(words, 2) for word in words}, set(rules.sample(words, len(words) // 3))
    text, word = [], words[0]
    while sum(map(len, text)) < n_bytes:
        text.append(word + ("\n" if word in ends else " "))
        word = rng.choice(after[word])
    return "".join(text)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small run with five checkpoints."""
    folder = tmp_path_factory.mktemp("runs")
    settings = {"keep": 9, "max_seq_len": 32, "n_embd": 32, "micro_batch": 16, "steps": 100, "eval_interval": 20}
    return train(folder, "run", story(), **settings)


@pytest.fixture(scope="module")
def loaded(run):
    return load_checkpoint(run)


@pytest.fixture(scope="module")
def course(run):
    """The evaluations of all its checkpoints."""
    first = load_checkpoint(run)
    subject = make_subject(run, [], "text", first.tokenizer, 0)
    models = [load_checkpoint(checkpoint_path(run, step)).model for step in list_checkpoints(run)]
    return [evaluate(model, first.tokenizer, subject, How(samples=16, sample_tokens=200)) for model in models]


def call(capsys, *argv):
    """kobza eval with --json -> what it printed."""
    code = main(["eval", *map(str, argv), "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)


def refused(capsys, *argv):
    """The one line of an evaluation that is refused."""
    assert main(["eval", *map(str, argv), CPU]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("kobza: ")
    return err


# ---- intervals -----------------------------------------------------------------------------------------------------


def test_a_ratio_of_sums_is_no_mean_of_ratios():
    estimate = ratio([1.0, 9.0] * 4, [1.0, 3.0] * 4)
    assert estimate.value == 2.5 and estimate.n == 8 and 1.0 <= estimate.low < 2.5 < estimate.high <= 3.0


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(200):
        e = ratio(rng.exponential(2.0, 60), np.ones(60))
        hits += e.low <= 2.0 <= e.high
    assert 178 <= hits <= 199  # 95% of 200 is 190


def test_joining_units_leaves_the_interval():
    rng = np.random.default_rng(1)
    tops = rng.normal(1, 1, 4000)
    e = ratio(tops, np.ones(4000))
    assert (e.high - e.low) / 2 == pytest.approx(1.96 / 4000**0.5, rel=0.2) and e.n == 4000


def test_too_few_units_have_no_interval():
    assert ratio([3.0], [2.0]) == Estimate(1.5, None, None, 1) and ratio([1] * 4, [1] * 4).low is None
    assert ratio([1, 2, 3, 4, 5], [1] * 5).low is not None and difference(([1], [1]), ([1], [1])).low is None
    assert over_units(1, lambda i: 7.0) == Estimate(7.0, None, None, 1)
    assert math.isnan(ratio([], []).value) and math.isnan(share(0, 0).value)


def test_a_difference_of_two_samples():
    rng = np.random.default_rng(2)
    a, b = rng.normal(3, 1, 400), rng.normal(1, 1, 100)
    e = difference((a, np.ones(400)), (b, np.ones(100)))
    half = 1.96 * (1 / 400 + 1 / 100) ** 0.5
    assert e.value == pytest.approx(a.mean() - b.mean()) and (e.high - e.low) / 2 == pytest.approx(half, rel=0.2)


def test_wilsons_interval_as_in_the_books():
    e = share(8, 10)
    assert (round(e.low, 3), round(e.high, 3)) == (0.490, 0.943)  # Agresti & Coull 1998
    assert share(0, 10).low == 0 and share(0, 10).high > 0.2


def test_a_trend_knows_noise_from_a_step_back():
    rising = [Estimate(x, x - 0.2, x + 0.2, 9) for x in (1.0, 2.0, 1.9, 3.0)]
    assert trend(rising).spearman == pytest.approx(0.8) and (trend(rising).backward, trend(rising).beyond_noise) == (
        1,
        0,
    )
    falling = [Estimate(x, x - 0.01, x + 0.01, 9) for x in (3.0, 2.0, 1.0)]
    assert trend(falling).spearman == -1 and trend(falling).beyond_noise == 2


def test_without_scipy_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(InputError, match=r"pip install \"kobza\[eval\]\""):
        share(1, 2)


# ---- loss ----------------------------------------------------------------------------------------------------------


def test_bits_per_byte_are_all_the_bits_over_all_the_bytes(loaded):
    documents = [loaded.tokenizer.encode(text) for text in (story(300, 5), story(500, 6), "ba")]
    scored = score(loaded.model, loaded.tokenizer, documents)
    loss = measure_loss(loaded.tokenizer, documents, scored)
    nats, n = -sum(s.logprob.sum() for s in scored), sum(map(len, documents))
    assert loss.n_tokens == loss.n_bytes == n and loss.unit == "block"
    assert loss.nats_per_token.value == pytest.approx(nats / n)
    assert loss.bits_per_byte.value == pytest.approx(nats / n / math.log(2))
    assert loss.perplexity.value == pytest.approx(math.exp(nats / n))
    assert loss.nats_per_token.low < nats / n < loss.nats_per_token.high


def test_bytes_are_not_tokens():
    tokenizer = CharTokenizer("aё")
    ids = np.array([0, 1, 1, 0])  # 1, 2, 2 and 1 bytes
    scored = [Scored(np.log([0.5, 0.25, 0.25, 0.5]), np.zeros(4, bool), np.arange(4))]
    loss = measure_loss(tokenizer, [ids], scored)
    assert loss.n_bytes == 6 and loss.bits_per_byte.value == pytest.approx((1 + 2 + 2 + 1) / 6)
    assert loss.nats_per_token.value == pytest.approx(6 * math.log(2) / 4) and loss.bits_per_byte.low is None


def test_many_documents_are_what_the_bootstrap_draws(loaded):
    documents = [loaded.tokenizer.encode(story(60, seed)) for seed in range(25)]
    loss = measure_loss(loaded.tokenizer, documents, score(loaded.model, loaded.tokenizer, documents))
    assert loss.unit == "document" and loss.nats_per_token.n == 25


def test_blocks_leave_nothing_out():
    for n in range(1, 50):
        parts = blocks(np.arange(n), 8)
        assert np.concatenate(parts).tolist() == list(range(n)) and all(4 <= len(p) <= 12 or n < 4 for p in parts)


def test_loss_by_position_adds_up_and_falls_with_context(run, loaded):
    ids = open_run(run).corpus.val.array()
    scored = side_by_side(loaded.model, loaded.tokenizer, [ids])
    rows = loss_by_position(scored, 32)
    assert [(p.first, p.last) for p in rows] == [(1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 32)]
    seen = scored[0].seen
    for p in rows:
        inside = (seen >= p.first) & (seen <= p.last)
        assert p.nats_per_token.value == pytest.approx(float(-scored[0].logprob[inside].mean()))
        assert p.nats_per_token.n == pytest.approx(len(ids) / 32, abs=1)
    assert rows[0].nats_per_token.value > rows[-1].nats_per_token.value + 0.2


def test_the_loss_of_the_held_out_part_is_that_of_training(run, capsys):
    found = call(capsys, run, *QUICK, "--stride=32")
    best = json.loads((run / "best.json").read_text())["val_loss"]
    assert found["loss"]["nats_per_token"]["value"] == pytest.approx(best, abs=0.25)  # training read 300 tokens of it


# ---- measures ------------------------------------------------------------------------------------------------------


def test_cloze_candidates_are_words_of_one_length():
    text = verse()
    items = m.cloze_items(text, 32)
    assert len(items) > 100
    for item in items:
        true, *others = item.candidates
        assert f"{item.context}{true}" in text and len(set(item.candidates)) == 4
        assert {len(c) for c in others} == {len(true)} and all(c[1:] in text for c in others)


def test_line_end_pairs_end_in_the_same_character():
    text = "One, two, three,\nfour five\nsix seven, eight\n" * 30
    pairs = m.line_end_items(text, 8)
    assert len(pairs) > 20
    for end, blank in pairs:
        assert f"{end}\n" in text and f"{blank} " in text and end[-1] == blank[-1]


def norm_of(training, held_out, n=4, length=400):
    return m.make_norm(training, TextIndex(training), held_out, pieces_like(held_out, [length] * n))


def test_real_text_measures_as_real_text():
    text = verse(20_000)
    norm = norm_of(text, text)
    found = {measure.name: measure for measure in m.writing(norm.pieces, norm)}
    for name in ("spelling", "repeated 4-grams", "new 8-grams"):
        assert found[name].estimate.value == pytest.approx(found[name].reference)
    assert found["spelling"].estimate.value == 1 and found["new 8-grams"].estimate.value == 0
    assert found["line length"].estimate.value == pytest.approx(found["line length"].reference)


def test_each_measure_sees_the_fault_it_is_for():
    text = "".join(f'{line}\n"({line})" (ab)\n\n' for line in verse(20_000).split("\n"))
    norm, rng = norm_of(text, text), random.Random(0)
    real = {measure.name: measure.estimate.value for measure in m.writing(norm.pieces, norm)}

    def value(name, change):
        return {x.name: x.estimate.value for x in m.writing([change(piece) for piece in norm.pieces], norm)}[name]

    assert value("spelling", lambda t: t.replace("a", "q")) < real["spelling"] - 0.3
    assert value("line length", lambda t: t.replace("\n\n", "\n").replace(" ", "\n")) > real["line length"] + 5
    assert value("closed", lambda t: t.replace(")", "")) < real["closed"] - 0.3
    assert value("repeated 4-grams", lambda t: t[:100] * 4) > real["repeated 4-grams"] + 0.2
    assert value("new 8-grams", lambda t: "".join(rng.sample(t, len(t)))) > real["new 8-grams"] + 0.8


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("(a)", (2, 2)),
        ('(a [b) "c"', (4, 5)),
        ("a) (", (0, 2)),
        ('"a (b" c)', (2, 4)),
        ("«a „b“ c»", (4, 4)),
        ("'tis don't", (0, 0)),
    ],
)
def test_partners(text, wanted):
    assert m.partners(text) == wanted


def test_what_cannot_be_measured_says_why(loaded):
    found = {
        x.name: x for x in m.preferences(loaded.model, loaded.tokenizer, "ba") + m.writing(["ba"], norm_of("ba", "ba"))
    }
    assert all(x.estimate is None and x.why and x.progress is None for x in found.values())


def test_measures_move_one_way_over_the_checkpoints_of_a_run(course):
    trends = progress(course)
    for name in ("bits per byte", "cloze probability", "spelling", "new 8-grams"):
        assert trends[name]["spearman"] >= 0.69, name  # one pair in five out of order at most
    assert len(course) == 5
    for name, one in trends.items():
        assert one["beyond_noise"] <= 1 and one["spearman"] > 0, (name, one)


def test_written_texts_depend_on_their_seed_alone(loaded):
    many = write(loaded.model, loaded.tokenizer, 5, 40, seed=3)
    assert write(loaded.model, loaded.tokenizer, 2, 40, seed=6) == many[3:] and len(set(many)) == 5


def test_stretches_come_from_all_over(run):
    train = open_run(run).corpus.train
    pieces = stretches(train, 1000, 100, [])
    assert len(pieces) == 10 and {len(p) for p in pieces} == {100}
    assert pieces[0].tolist() == train.array(100).tolist() and pieces[-1].tolist() == train.array()[-100:].tolist()


# ---- memorisation --------------------------------------------------------------------------------------------------


def test_copies_are_counted_against_what_held_out_text_shares():
    rng = random.Random(0)
    training, held_out, other = ("".join(rng.choices("abcdefgh \n", k=4000)) for _ in range(3))
    index = TextIndex(training)
    usual = usual_copy(index, held_out)
    pieces = [held_out[:300], held_out[300:600]]
    fresh = find_copies([other[:300], other[300:600]], index, pieces, usual)
    assert not fresh.copies and fresh.share.value == 0 and fresh.longest <= usual + 2
    copied = find_copies([other[:100] + training[50:150] + other[100:200]] * 6, index, pieces, usual)
    assert copied.copies and 100 <= copied.longest < 110 and copied.share.value == pytest.approx(1 / 3, abs=0.02)
    assert copied.example[5:80] in training and copied.new[64].value < 1 and fresh.new[32].value == 1


@pytest.fixture(scope="module")
def memories(tmp_path_factory):
    """Evaluations against one text: of a model early in training and at its end on that text, and at its end on the text with
    its words shuffled."""
    folder = tmp_path_factory.mktemp("memories")
    text = verse(3000)
    words = text.split(" ")
    random.Random(1).shuffle(words)
    settings = {"keep": 20, "max_seq_len": 32, "n_embd": 64, "micro_batch": 16, "steps": 200, "eval_interval": 200}
    settings["val_fraction"] = 0.3
    own = train(folder, "own", text, **settings, checkpoint_interval=20)
    shuffled = train(folder, "shuffled", " ".join(words), **settings)
    tokenizer = load_checkpoint(own).tokenizer
    subject = make_subject(own, [], "text", tokenizer, 0)
    folders = [checkpoint_path(own, 20), checkpoint_path(own, 200), checkpoint_path(shuffled, 200)]
    how = How(samples=16, sample_tokens=256)
    return [evaluate(load_checkpoint(folder).model, tokenizer, subject, how) for folder in folders]


def test_an_overfit_model_is_flagged_by_both_rules(memories):
    _, overfit, _ = memories
    assert overfit.memorised and overfit.gap.overfit and overfit.copies.copies
    assert overfit.gap.gap.value > 1 and overfit.copies.longest > 3 * overfit.copies.usual


def test_a_model_of_the_shuffled_corpus_and_one_early_in_training_are_not_flagged(memories):
    early, _, shuffled = memories
    for e in (early, shuffled):
        assert not e.memorised and not e.gap.overfit and not e.copies.copies and e.copies.share.value < 0.01


# ---- tasks ---------------------------------------------------------------------------------------------------------


def tasks_file(tmp_path, *lines):
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_choices_are_judged_by_their_likelihood(loaded, tmp_path):
    kinds = [("ba", ["ba", "bababa", "go"]), ("", ["ba", "go ga"]), ("go", ["\n", " gagogogagaga"])]
    lines = [{"prompt": p, "choices": c, "answer": i} for p, c in kinds for i in range(len(c))]
    items = read_tasks(tasks_file(tmp_path, *lines, {"prompt": "", "choices": ["ba", "go ga"], "answer": "go ga"}))
    assert items[-1].answer == 1 and len(items) == 8
    assert any(one.right != one.normalised_right for one in choose(loaded.model, loaded.tokenizer, items))
    for one in choose(loaded.model, loaded.tokenizer, items):
        pairs = [(one.item.prompt, choice) for choice in one.item.choices]
        wanted = []
        for prompt, choice in pairs:
            ids = loaded.tokenizer.encode(prompt + choice)
            (scored,) = score(loaded.model, loaded.tokenizer, [ids], [len(prompt)])
            wanted.append(float(scored.logprob.sum()))
        assert one.logprobs == pytest.approx(wanted, abs=1e-4)
        assert one.right == (int(np.argmax(wanted)) == one.item.answer)
        by_length = [w / len(c) for w, c in zip(wanted, one.item.choices, strict=True)]
        assert one.normalised_right == (int(np.argmax(by_length)) == one.item.answer)


def test_generation_is_greedy_and_judged_by_its_match(loaded, tmp_path):
    from kobza.config import SampleConfig
    from kobza.generate import generate

    config = SampleConfig(tokens=20, temperature=0.0)
    ids = [c.ids[0] for c in generate(loaded.model, [loaded.tokenizer.encode("ba").tolist()], config)]
    text = loaded.tokenizer.decode(ids)
    line, middle = text.strip().split("\n")[0], text[5:9]
    wrong = {"prompt": "ba", "answer": "ЖЖ", "tokens": 20}
    path = tasks_file(
        tmp_path,
        {"prompt": "ba", "answer": line, "tokens": 20},
        {"prompt": "ba", "answer": middle, "match": "contains", "tokens": 20},
        {"prompt": "ba", "answer": "^.{1,3}[^Ж]+$", "match": "regex", "tokens": 20},
        wrong | {"match": "exact"},
        wrong | {"match": "contains"},
        wrong | {"match": "regex"},
    )
    judged = judge(loaded.model, loaded.tokenizer, read_tasks(path))
    assert [one.right for one in judged] == [True] * 3 + [False] * 3 and {one.given for one in judged} == {text}


@pytest.mark.parametrize(
    "line, what",
    [
        ("{", "not JSON"),
        ([1], "a list, not an object"),
        ({"prompt": "a"}, "no 'answer'"),
        ({"prompt": "a", "choises": ["a", "b"], "answer": 0}, "unknown key 'choises'"),
        ({"prompt": "a", "choices": ["a", "b"], "answer": 2}, "its place from 0 to 1"),
        ({"prompt": "a", "choices": ["a", "b"], "answer": "c"}, "none of the choices"),
        ({"prompt": "a", "choices": ["a"], "answer": 0}, "at least two strings"),
        ({"prompt": "a", "choices": ["a", "a"], "answer": 0}, "the same"),
        ({"prompt": "a", "answer": "b", "match": "regexp"}, "did you mean regex?"),
        ({"prompt": "a", "answer": "(", "match": "regex"}, "no regular expression"),
        ({"prompt": "a", "answer": "b", "tokens": 0}, "at least 1"),
        ({"prompt": 1, "answer": "b"}, "must be a string"),
        ({"prompt": "a", "answer": 4}, "must be a string"),
        ({"prompt": "a", "choices": ["a", "b"], "answer": True}, "its place"),
    ],
)
def test_a_bad_line_is_named_by_its_number(line, what, tmp_path):
    path = tasks_file(tmp_path, {"prompt": "a", "answer": "b"}, "", line)
    with pytest.raises(InputError, match="tasks.jsonl line 3: ") as caught:
        read_tasks(path)
    assert what in str(caught.value)


# ---- the verb ------------------------------------------------------------------------------------------------------


def test_json_of_a_run_on_its_held_out_part(run, capsys):
    found = call(capsys, run, *QUICK)
    assert found["text"]["sources"] == ["held-out part"] and found["loss"]["tokens"] == len(open_run(run).corpus.val)
    assert {x["name"] for x in found["measures"]} >= {"cloze", "line end", "spelling", "new 8-grams"}
    assert found["memorisation"]["memorised"] is False and found["memorisation"]["gap"]["gap"]["low"] is not None


def test_tables_for_a_person(run, capsys):
    assert main(["eval", str(run), *QUICK]) == 0
    out = capsys.readouterr().out
    for words in (
        "bits per byte",
        "tokens seen before",
        "cloze",
        "spelling",
        "longest copy",
        "memorised",
        "intervals over",
    ):
        assert words in out


def test_a_document_read_in_blocks_has_the_ids_of_training(tmp_path, monkeypatch):
    """A tokenizer that begins a text with a space does so once, not at every block."""
    seen = []

    class Noting(CharTokenizer):
        def encode(self, text, line=1, continues=False):
            seen.append((text, line, continues))
            return super().encode(text, line, continues)

    (tmp_path / "a.txt").write_text("one\ntwo\nthree\n")
    monkeypatch.setattr("kobza.data.BLOCK_BYTES", 8)
    (document,), cut = read_documents([str(tmp_path / "a.txt")], "text", Noting.train(["one two\nthree"]), 0)
    assert document.text == "one\ntwo\nthree\n" and not cut
    assert [continues for _, _, continues in seen] == [False] + [True] * (len(seen) - 1) and len(seen) > 1
    read = ["".join(text for text, _, _ in seen[:i]) for i in range(len(seen))]
    assert [line for _, line, _ in seen] == [1 + before.count("\n") for before in read]


def test_documents_of_a_jsonl_get_a_row_each(run, tmp_path, capsys):
    path = tmp_path / "some.jsonl"
    path.write_text("".join(json.dumps({"body": story(200, seed)}) + "\n" for seed in range(3)))
    found = call(capsys, run, path, "--text-field=body", *QUICK)
    rows = found["loss"]["by_document"]
    assert [row["source"] for row in rows] == [f"{path} line {n}" for n in (1, 2, 3)]
    total = sum(row["nats_per_token"]["value"] * row["tokens"] for row in rows)
    assert total / found["loss"]["tokens"] == pytest.approx(found["loss"]["nats_per_token"]["value"])


def test_a_checkpoint_without_its_run_can_be_measured_on_a_text(run, tmp_path, capsys):
    import shutil

    alone = tmp_path / "alone"
    shutil.copytree(checkpoint_path(run, 100), alone)
    (tmp_path / "text.txt").write_text(story(2000, 9))
    found = call(capsys, alone, tmp_path / "text.txt", *QUICK)
    assert found["memorisation"]["gap"] is None and found["loss"]["bits_per_byte"]["value"] > 0
    assert "training text" in {x["name"]: x["why"] for x in found["measures"]}["spelling"]
    assert "give a TEXT" in refused(capsys, alone)


def test_checkpoints_get_a_row_each_and_a_picture(run, tmp_path, capsys):
    tasks = tasks_file(tmp_path, {"prompt": "ba", "choices": ["ba", "bu"], "answer": 0})
    found = call(capsys, run, "--checkpoints", "--tasks", tasks, run.with_suffix(".txt"), "--most=2000", *QUICK)
    rows = found["checkpoints"]
    assert [row["step"] for row in rows] == [20, 40, 60, 80, 100] and all(row["tasks"]["chance"] == 0.5 for row in rows)
    assert (run / "eval.png").read_bytes()[:4] == b"\x89PNG" and found["trends"]["bits per byte"]["spearman"] > 0.8
    assert found["checkpoints"][0]["loss"]["tokens"] == 2000


def test_tasks_alone_measure_nothing_else(run, tmp_path, capsys):
    tasks = tasks_file(tmp_path, {"prompt": "ba", "choices": ["ba", "bu"], "answer": 0}, {"prompt": "a", "answer": "b"})
    found = call(capsys, run, "--tasks", tasks, CPU)
    assert "loss" not in found and found["tasks"]["choices"]["n"] == found["tasks"]["generation"]["n"] == 1
    assert [item["line"] for item in found["tasks"]["items"]] == [1, 2]


def test_bad_input_is_said_on_one_line(run, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("b")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "strange.txt").write_text("ba ba\nbaЖ")
    tasks = tasks_file(tmp_path, {"prompt": "Ж", "choices": ["ba", "bu"], "answer": 0})
    assert "too short: 1 token" in refused(capsys, run, tmp_path / "short.txt")
    assert "the text is empty" in refused(capsys, run, tmp_path / "empty.txt")
    strange = refused(capsys, run, tmp_path / "strange.txt")
    assert "strange.txt" in strange and "line 2 column 3" in strange and "--unknown skip" in strange
    assert "line 1: " in refused(capsys, run, "--tasks", tasks)
    assert "--stride is 33" in refused(capsys, run, "--stride=33")
    assert "--stride is 0" in refused(capsys, run, "--stride=0")
    assert "--samples is 4" in refused(capsys, run, "--samples=4")
    assert "--most is -1" in refused(capsys, run, "--most=-1")
    assert "--sample-tokens has no effect" in refused(capsys, run, "--tasks", tasks, "--sample-tokens=9")
    assert "--text-field has no effect" in refused(capsys, run, "--text-field=body")
    assert "wants a run's folder" in refused(capsys, checkpoint_path(run, 100), "--checkpoints")
    assert "no such run" in refused(capsys, tmp_path / "none")


def test_a_strange_character_can_be_skipped(run, tmp_path, capsys):
    (tmp_path / "strange.txt").write_text(story(500) + "Ж" + story(500, 1))
    assert call(capsys, run, tmp_path / "strange.txt", "--unknown=skip", *QUICK)["loss"]["bytes"] >= 1000
