"""The report room: metrics read strictly, landmarks right, the coach shy but awake, pictures and a page that hold."""

import html.parser
import itertools
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kobza.pages.shell import printable, svg_text, write_png
from kobza.report.coach import Facts, meaning, remarks
from kobza.report.landmarks import Landmarks, entropy, measure_landmarks
from kobza.report.metrics import read_metrics, series
from kobza.report.page import flags, render, short, write_report
from kobza.report.picture import MAX_POINTS, decimate, loss_figure, smooth, spread

LANDMARKS = Landmarks(uniform=math.log(65), unigram=3.31, bigram=2.45, mean_token_bytes=1.0, mean_pair_count=800.0)
FACTS = Facts(65, 800_000, 1_000_000, steps=1000, warmup_steps=50, lr=1e-3, dropout=0.1, eval_interval=50)


def make_records(train, val, every=50, seed=0, train_noise=0.03, val_noise=0.003, tokens_per_step=1000):
    """Train and validation loss as functions of the share of the run in [0, 1] -> 1,001 noisy records."""
    generator = np.random.default_rng(seed)
    records = []
    for step in range(FACTS.steps + 1):
        x = step / FACTS.steps
        record = {
            "step": step,
            "train_loss": train(x) * (1 + train_noise * generator.standard_normal()),
            "lr": 1e-3,
            "grad_norm": 0.8 * math.exp(0.25 * generator.standard_normal()),
            "tokens": step * tokens_per_step,
            "seconds": 0.1 * step,
            "tokens_per_second": 1e4,
        }
        if step % every == 0:
            record["val_loss"] = val(x) * (1 + val_noise * generator.standard_normal())
            record["val_bpb"] = record["val_loss"] / math.log(2)
        records.append(record)
    return records


def fall(x, floor=1.4, speed=60.0):
    """A healthy fall from ln 65 towards the floor."""
    return floor + (LANDMARKS.uniform - floor) / (1 + speed * x)


def codes(records, landmarks=LANDMARKS, facts=FACTS):
    return {remark.code for remark in remarks(records, landmarks, facts)}


HEALTHY = make_records(fall, lambda x: fall(x) + 0.05)


# ---- metrics ----


def write_lines(path, *lines, end="\n"):
    path.write_text("\n".join(lines) + end)
    return path


def test_metrics_come_back_as_written(tmp_path):
    path = write_lines(tmp_path / "metrics.jsonl", *map(json.dumps, HEALTHY))
    assert read_metrics(path) == HEALTHY


@given(cut=st.integers(0, 200))
@settings(max_examples=50, deadline=None)
def test_metrics_of_a_killed_run_keep_every_whole_line(tmp_path_factory, cut):
    path = tmp_path_factory.getbasetemp() / "killed.jsonl"
    whole = [{"step": i, "train_loss": 1.5 * i} for i in range(6)]
    text = "".join(json.dumps(record) + "\n" for record in whole)[:cut]
    path.write_text(text)
    kept = read_metrics(path)
    assert kept == whole[: len(kept)]
    assert text.count("\n") <= len(kept) <= text.count("\n") + 1


def test_metrics_cut_inside_a_character_are_tolerated(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st\xd0')
    assert read_metrics(path) == [{"step": 1}]


def test_metrics_of_a_resumed_run_count_the_later_writing(tmp_path):
    lines = ['{"step": 1}', '{"step": 2, "train_loss": 9}', '{"step": 3}', '{"step": 2, "train_loss": 4}']
    path = write_lines(tmp_path / "metrics.jsonl", *lines)
    assert read_metrics(path) == [{"step": 1}, {"step": 2, "train_loss": 4}]


@pytest.mark.parametrize(
    "line", ["{", "[1]", "null", '{"train_loss": 1}', '{"step": 1.5}', '{"step": true}', '{"step": 1, "lr": "x"}']
)
def test_metrics_with_a_bad_line_name_file_line_and_remedy(tmp_path, line):
    path = write_lines(tmp_path / "metrics.jsonl", '{"step": 0}', line, '{"step": 2}')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2.*delete") as error:
        read_metrics(path)
    assert "\n" not in str(error.value)


def test_metrics_with_a_bad_last_line_that_was_written_whole_are_refused(tmp_path):
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(write_lines(tmp_path / "metrics.jsonl", '{"step": 0}', "{oops"))


def test_metrics_that_are_absent_say_so(tmp_path):
    with pytest.raises(ValueError, match="no metrics at"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_series_leaves_out_what_is_not_finite():
    records = [{"step": i, "x": x} for i, x in enumerate([1.0, math.nan, None, math.inf, 2])] + [{"step": 9}]
    steps, values = series(records, "x")
    assert steps.tolist() == [0, 4] and values.tolist() == [1, 2]


# ---- landmarks ----


def test_landmarks_of_a_text_that_alternates():
    marks = measure_landmarks(np.array([0, 1] * 50, dtype=np.uint16), 4, token_bytes=[1, 3, 9, 9])
    assert marks.uniform == pytest.approx(math.log(4))
    assert marks.unigram == pytest.approx(math.log(2))
    assert marks.bigram == pytest.approx(0.0, abs=1e-12)
    assert marks.mean_token_bytes == pytest.approx(2.0)
    assert marks.mean_pair_count == pytest.approx(99 / 2)


@given(st.lists(st.integers(0, 5), min_size=2, max_size=60), st.sampled_from([6, 3000]))
@settings(max_examples=60, deadline=None)
def test_landmarks_equal_plain_counting(ids, vocab_size):
    pairs = list(itertools.pairwise(ids))
    expected = -sum(
        pairs.count(pair) / len(pairs) * math.log(pairs.count(pair) / ids[:-1].count(pair[0])) for pair in set(pairs)
    )
    for dtype in (np.uint8, np.uint16, np.uint32, np.uint64):
        marks = measure_landmarks(np.array(ids, dtype=dtype), vocab_size)
        assert marks.bigram == pytest.approx(expected, abs=1e-9)
        assert 0 <= marks.unigram <= marks.uniform + 1e-9


def test_landmarks_do_not_overflow_at_a_large_vocabulary():
    ids = np.array([65_535, 65_534] * 10 + [65_535], dtype=np.uint16)
    assert measure_landmarks(ids, 65_536).bigram == pytest.approx(0.0, abs=1e-12)


def test_landmarks_look_at_the_beginning_only(monkeypatch):
    monkeypatch.setattr("kobza.report.landmarks.LOOK_AT_TOKENS", 4)
    assert measure_landmarks(np.array([1, 1, 1, 1, 0, 0]), 2).unigram == 0


def test_landmarks_read_a_memmap(tmp_path):
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "train.bin")
    ids = np.memmap(tmp_path / "train.bin", dtype=np.uint16, mode="r")
    assert measure_landmarks(ids, 100).unigram == pytest.approx(math.log(100))


@pytest.mark.parametrize(
    ("ids", "vocab_size", "token_bytes", "message"),
    [
        ([0, 7], 5, None, "from 0 to 7 but vocab_size is 5"),
        ([0, -1], 5, None, "from -1 to 0"),
        ([0], 5, None, "1 tokens"),
        ([0, 0], 1, None, "vocab_size is 1"),
        ([0.5, 1.0], 5, None, "float64"),
        ([[0, 1], [1, 0]], 5, None, "shape"),
        ([0, 1], 5, [1, 1], "has 2 rows but vocab_size is 5"),
    ],
)
def test_landmarks_refuse_what_they_cannot_count(ids, vocab_size, token_bytes, message):
    with pytest.raises(ValueError, match=message):
        measure_landmarks(np.array(ids), vocab_size, token_bytes)


def test_entropy_ignores_zeros():
    assert entropy([1, 0, 1]) == pytest.approx(math.log(2))


# ---- what a loss means ----


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (math.nan, "broken down"),
        (6.0, "worse than blind guessing"),
        (4.17, "knows nothing yet"),
        (3.7, "learning which tokens are common"),
        (3.3, "knows which tokens are common"),
        (2.8, "learning which token follows"),
        (2.45, "knows which token follows"),
        (2.2, "sound of the language"),
        (1.8, "learning to spell"),
        (1.4, "hold together"),
    ],
)
def test_meaning_names_the_place_of_a_loss(loss, words):
    assert words in meaning(loss, LANDMARKS)


def test_meaning_says_perplexity_and_bits_per_byte():
    text = meaning(math.log(7), LANDMARKS)
    assert "as between 7.0 equally likely tokens of 65" in text
    assert f"{math.log2(7):.2f} bits" in text


def test_meaning_speaks_of_spelling_for_characters_only():
    assert "spell" not in meaning(3.0, Landmarks(math.log(4096), 6.5, 4.5))


def test_meaning_warns_where_pairs_are_too_rare_to_count():
    assert "reads too low" in meaning(3.0, Landmarks(math.log(4096), 6.5, 2.5, mean_pair_count=1.5))
    assert "reads too low" not in meaning(3.0, LANDMARKS)


@given(
    loss=st.floats(0, 1e4) | st.sampled_from([math.nan, math.inf]),
    marks=st.lists(st.floats(0, 12), min_size=3, max_size=3).map(sorted),
)
@settings(max_examples=100, deadline=None)
def test_meaning_has_words_for_every_loss(loss, marks):
    bigram, unigram, uniform = marks
    assert meaning(loss, Landmarks(uniform, unigram, bigram)).endswith(".")


# ---- the coach: silent on healthy runs ----


@given(
    seed=st.integers(0, 2**32 - 1),
    floor=st.floats(1.0, 2.1),
    speed=st.floats(40, 70),  # faster ones are flat by the end, and the coach is right to say so
    every=st.sampled_from([20, 50, 100, 200]),
    train_noise=st.floats(0, 0.06),
    val_noise=st.floats(0, 0.01),
    seen=st.floats(0.01, 1),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_no_remark_on_a_healthy_run_finished_or_not(seed, floor, speed, every, train_noise, val_noise, seen):
    records = make_records(
        lambda x: fall(x, floor, speed), lambda x: fall(x, floor, speed) + 0.03, every, seed, train_noise, val_noise
    )
    assert codes(records[: max(1, int(seen * len(records)))]) == set()


@pytest.mark.parametrize("count", [0, 1, 2, 5, 12])
def test_no_remark_on_the_first_records(count):
    assert codes(HEALTHY[:count]) == set()


def test_no_remark_where_nothing_was_evaluated():
    assert codes([{k: v for k, v in r.items() if not k.startswith("val")} for r in HEALTHY]) == set()


# ---- the coach: each rule fires on what it is for ----


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("every", [50, 125])
def test_overfit_is_seen_and_the_best_step_named(seed, every):
    records = make_records(lambda x: fall(x, 0.8), lambda x: fall(x, 0.8) + 1.2 * x, every, seed)
    (found,) = [r for r in remarks(records, LANDMARKS, FACTS) if r.code == "overfit"]
    best = min((r for r in records if "val_loss" in r), key=lambda r: r["val_loss"])
    assert found.severity == "warning" and found.step == best["step"]
    assert f"{best['val_loss']:.3f}" in found.text and "--train.patience" in found.remedy


def test_overfit_is_not_said_when_train_loss_rises_as_well():
    assert "overfit" not in codes(make_records(lambda x: fall(x) + 1.2 * x, lambda x: fall(x) + 1.2 * x))


def test_overfit_waits_for_three_evaluations_above_the_best():
    def turn(x):
        return fall(x) if x <= 0.8 else fall(0.8) + 2 * (x - 0.8)

    records = make_records(lambda x: fall(x) - 0.3 * x, turn, val_noise=0.001)
    assert "overfit" not in codes(records[:901])
    assert "overfit" in codes(records[:951])


@pytest.mark.parametrize(("level", "lr", "remedy"), [(4.17, 1e-6, "Raise"), (3.32, 0.1, "Lower"), (3.32, 1e-3, "text")])
def test_no_learning_is_seen_and_the_remedy_fits_the_rate(level, lr, remedy):
    facts = Facts(65, 800_000, 1_000_000, 1000, 50, lr, 0.0, 50)
    records = make_records(lambda x: level, lambda x: level, train_noise=0.01)
    (found,) = [r for r in remarks(records, LANDMARKS, facts) if r.code == "no_learning"]
    assert found.severity == "warning" and remedy in found.remedy


def test_no_learning_is_not_said_early_or_while_the_loss_falls():
    flat = make_records(lambda x: 4.17, lambda x: 4.17, train_noise=0.01)
    assert codes(flat[:200]) == set()
    slow = make_records(lambda x: 4.17 - 0.6 * x, lambda x: 4.17 - 0.6 * x, train_noise=0.01)
    assert "no_learning" not in codes(slow)


def test_plateau_is_seen():
    flat = make_records(lambda x: fall(min(x, 0.2)), lambda x: fall(min(x, 0.2)), val_noise=0.001)
    assert codes(flat) == {"plateau"}
    assert codes(flat[:800]) == {"plateau"}
    assert codes(flat[:500]) == set()


def test_plateau_is_not_said_when_noise_hides_the_answer():
    assert codes(make_records(lambda x: fall(min(x, 0.2)), lambda x: fall(min(x, 0.2)), val_noise=0.02)) == set()


def with_spikes(steps, grad=5.0):
    records = [dict(r) for r in HEALTHY]
    for step in steps:
        records[step]["train_loss"] *= 1.8
        records[step]["grad_norm"] *= grad
    return records


def test_one_spike_is_a_note_with_its_step_and_numbers():
    (found,) = remarks(with_spikes([600]), LANDMARKS, FACTS)
    assert (found.code, found.step, found.severity) == ("spike", 600, "info")
    assert "gradient norm" in found.text and "--train.lr" in found.remedy


def test_a_hard_batch_without_a_gradient_jump_is_no_spike():
    assert codes(with_spikes([600], grad=1.0)) == set()


def test_spikes_are_seen_where_no_gradient_norm_was_recorded():
    records = [{k: v for k, v in r.items() if k != "grad_norm"} for r in with_spikes([600])]
    assert codes(records) == {"spike"}


def test_repeated_spikes_point_at_the_rate():
    found = {r.code: r for r in remarks(with_spikes([300, 301, 500, 700]), LANDMARKS, FACTS)}
    assert set(found) == {"spike", "rate_too_high"}
    assert found["rate_too_high"].step == 300 and "3 times" in found["rate_too_high"].text


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda x: 4.17 + 2 * x, "above the"),
        (lambda x: fall(x) if x < 0.5 else 3.0, "diverged"),
        (lambda x: 6.0 if x > 0.1 else 4.17, "above the"),
    ],
)
def test_a_rate_too_high_is_seen(loss, words):
    (found,) = [r for r in remarks(make_records(loss, loss), LANDMARKS, FACTS) if r.code == "rate_too_high"]
    assert words in found.text and found.severity == "warning" and "--train.lr" in found.remedy


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_divergence(bad):
    records = [*HEALTHY[:300], {**HEALTHY[300], "train_loss": bad, "grad_norm": bad}]
    (found,) = remarks(records, LANDMARKS, FACTS)
    assert (found.code, found.step) == ("rate_too_high", 300)


def test_a_poor_start_that_falls_is_not_a_rate_too_high():
    assert "rate_too_high" not in codes(make_records(lambda x: 8 - 3 * x, lambda x: 8 - 3 * x))


def test_exhausted_data_is_seen_with_its_epochs():
    curves = (lambda x: fall(x, 1.0) - 0.25 * x, lambda x: fall(x, 1.0) + 0.05)
    (found,) = remarks(make_records(*curves, tokens_per_step=20_000), LANDMARKS, FACTS)
    assert found.code == "exhausted_data" and "20.0 times" in found.text
    assert codes(make_records(*curves, tokens_per_step=3_000)) == set()


def test_many_epochs_without_a_growing_gap_are_fine():
    assert codes(make_records(fall, lambda x: fall(x) + 0.05, tokens_per_step=50_000)) == set()


def test_still_improving_is_said_at_the_end_only():
    records = make_records(lambda x: 4.0 - 1.8 * x, lambda x: 4.0 - 1.8 * x)
    (found,) = remarks(records, LANDMARKS, FACTS)
    assert found.code == "still_improving" and "--train.steps=2000" in found.remedy
    assert "still_improving" not in codes(records[:900])


def test_warnings_come_first():
    severities = [r.severity for r in remarks(with_spikes([300, 500, 700]), LANDMARKS, FACTS)]
    assert severities == sorted(severities, reverse=True)


@given(
    st.lists(
        st.fixed_dictionaries(
            {}, optional={k: st.floats() | st.none() for k in ("train_loss", "val_loss", "grad_norm", "tokens", "lr")}
        ),
        max_size=80,
    )
)
@settings(max_examples=60, deadline=None)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # losses of 1e308 overflow in a mean; the coach must only survive
def test_the_coach_survives_any_numbers(rows):
    for remark in remarks([{"step": i, **row} for i, row in enumerate(rows)], LANDMARKS, FACTS):
        assert remark.text and remark.remedy and remark.severity in ("info", "warning")


# ---- picture ----


@pytest.mark.parametrize("records", [[], HEALTHY[:1], HEALTHY[1:2], HEALTHY[1:40], HEALTHY, with_spikes([10])])
def test_the_picture_is_drawn_from_any_run(records, tmp_path):
    figure = loss_figure(records, LANDMARKS)
    write_png(tmp_path / "loss.png", figure)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    low, high = figure.axes[0].get_ylim()
    assert low < LANDMARKS.bigram < LANDMARKS.uniform < high


def test_the_picture_of_a_long_run_stays_small():
    records = [{**HEALTHY[i % 1000], "step": i} for i in range(30_000)]
    lines = loss_figure(records, LANDMARKS).axes[0].lines
    assert max(len(line.get_xdata()) for line in lines) <= MAX_POINTS


def test_decimation_keeps_the_lowest_and_the_highest():
    y = np.zeros(50_001)
    y[777], y[40_000] = 9.0, -9.0
    kept_x, kept_y = decimate(np.arange(len(y)), y)
    assert len(kept_y) <= MAX_POINTS and kept_y.max() == 9 and kept_y.min() == -9
    assert (np.diff(kept_x) >= 0).all()


def test_smoothing_keeps_a_line_and_drops_a_spike():
    line = np.linspace(4, 1, 500)
    assert smooth(line) == pytest.approx(line)
    spiked = line.copy()
    spiked[250] = 99.0
    assert smooth(spiked) == pytest.approx(line, abs=0.02)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_labels_are_spread_apart_in_their_order(heights):
    placed = spread(heights, 0.1)
    order = np.argsort(heights, kind="stable")
    assert (np.diff(np.array(placed)[order]) >= 0.1 - 1e-9).all()


def test_svg_is_one_element_in_the_colour_of_the_page_and_the_same_every_time():
    svg = svg_text(loss_figure(HEALTHY, LANDMARKS))
    assert svg.startswith("<svg") and svg.rstrip().endswith("</svg>")
    assert "currentColor" in svg and "viewBox" in svg and "<metadata" not in svg
    assert svg == svg_text(loss_figure(HEALTHY, LANDMARKS))


# ---- page ----


VOID = {"meta", "path", "use", "rect", "br"}  # elements without an end tag


class Tags(html.parser.HTMLParser):
    """Collects tags that are still open, all tags seen, and the text."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def parsed(page):
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    return tags


EVIL = "<script>alert(1)</script> & {{ 7 * 7 }} \"'</pre>\x00\x1b[31m\ud800"


def test_the_page_is_whole_and_needs_nothing_from_outside(tmp_path):
    samples = [{"step": 0, "text": "xqz"}, {"step": 1000, "text": "\nTo be,\nor not"}]
    path = write_report(
        tmp_path, with_spikes([600]), LANDMARKS, FACTS, samples, "verse", {"train": {"lr": 1e-3}, "seed": 1}
    )
    assert path == tmp_path / "report.html" and [p.name for p in tmp_path.iterdir()] == ["report.html"]
    tags = parsed(path.read_text(encoding="utf-8"))
    assert {name for name, _ in tags.seen}.isdisjoint({"script", "link", "img", "iframe", "image"})
    assert all(not value or not value.startswith("http") for _, a in tags.seen for k, value in a.items() if "href" in k)
    for words in ("verse", "jumped once", "hold together", "To be,\nor not", "train.lr", "0.001", "1,000 of 1,000"):
        assert words in tags.text
    rows = [a for name, a in tags.seen if name == "tr"]
    assert len([a for a in rows if a.get("class") == "best"]) == 1


def test_what_the_model_wrote_stays_text(tmp_path):
    page = render(HEALTHY, LANDMARKS, FACTS, [{"step": 1, "text": EVIL}] * 2, EVIL, {EVIL: EVIL})
    tags = parsed(page)
    assert "script" not in {name for name, _ in tags.seen}
    assert tags.text.count("<script>alert(1)</script> & {{ 7 * 7 }}") == 6  # title, heading, two samples, key, value
    assert "\x00" not in page and "\x1b" not in page
    page.encode("utf-8")


@pytest.mark.parametrize("records", [[], HEALTHY[1:2], HEALTHY[:1]])
def test_the_page_of_a_run_that_hardly_began(records):
    assert "Nothing to remark" in parsed(render(records, LANDMARKS, FACTS, [], "new", {})).text


def test_the_page_of_a_broken_run_says_so():
    records = [*HEALTHY[:300], {**HEALTHY[300], "train_loss": math.nan, "val_loss": math.nan}]
    assert "diverged" in parsed(render(records, LANDMARKS, FACTS, [], "broken", {})).text


def test_flags_are_code_and_the_rest_is_escaped():
    assert flags("<b> --train.steps=2e3, a--b or --model.n_embd).") == (
        '&lt;b&gt; <code class="flag">--train.steps=2e3</code>, a--b or <code class="flag">--model.n_embd</code>).'
    )


def test_small_formats():
    assert [short(n) for n in (0, 999, 1000, 999_999, 1_234_567)] == ["0", "999", "1k", "1M", "1.23M"]
    assert printable("a\tb\nc\x07") == "a\tb\nc\ufffd"


# ---- the room as a whole ----


def test_importing_the_room_loads_nothing_heavy():
    code = (
        "import sys, kobza.report.page, kobza.report.coach, kobza.report.landmarks, kobza.report.metrics\n"
        "print([m for m in ('torch', 'matplotlib') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
