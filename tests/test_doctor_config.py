"""kobza.doctor.files.config: nothing on clean folders, each injected bug by its own code, hostile folders, the corrected copy."""

import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
from functools import cache

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kobza.config import InputError
from kobza.doctor import explain
from kobza.doctor.files import config, folder, rope
from kobza.doctor.files.config import CHECKS, open_
from kobza.doctor.files.fix import write_fixed
from kobza.doctor.finding import examine, exit_code
from kobza.doctor.mutations import specimens
from kobza.doctor.mutations.config import CONTROLS, MUTATIONS

CODES = explain.FOLDER
ALL = (*specimens.FAMILIES, "gemma1")


def findings(subject):
    return [finding for outcome in examine(CHECKS, subject) for finding in outcome.findings]


def failures(outcomes):
    return [outcome.reason for outcome in outcomes if outcome.status == "failed"]


# ---- the specimens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.parametrize("family", ALL)
def test_a_specimen_is_what_transformers_loads(family, tmp_path):
    """Every tensor is used, none is missing, the ids are those of its tokenizer, and the model computes."""
    transformers = pytest.importorskip("transformers")
    import tokenizers
    import torch

    path = specimens.folder(tmp_path, family, seed=1, dtype="bf16")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    assert model.dtype == torch.bfloat16
    text = "Hello, world! Кобзар 2024\n\n  def f(x): ґ"
    ids = transformers.AutoTokenizer.from_pretrained(path)(text)["input_ids"]
    assert ids == tokenizers.Tokenizer.from_file(str(path / "tokenizer.json")).encode(text).ids
    logits = model(torch.tensor([ids])).logits.float()
    assert torch.isfinite(logits).all() and logits.std() > 0.5


@pytest.mark.parametrize("family", ALL)
def test_a_specimen_differs_by_seed_and_is_the_same_twice(family, tmp_path):
    raw = [specimens.folder(tmp_path / str(i), family, seed) for i, seed in enumerate((0, 0, 1))]
    first, again, other = ((path / "model.safetensors").read_bytes() for path in raw)
    assert first == again != other and len(first) == len(other)


def test_bf16_bits_round_to_the_nearest_even():
    torch = pytest.importorskip("torch")
    ties = [0.0, 1.00390625, 1.01171875, -3e38]
    values = np.concatenate([np.random.default_rng(0).standard_normal(1000), ties]).astype(np.float32)
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(specimens.bf16_bits(values), expected)


# ---- the proof ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("control", CONTROLS, ids=lambda control: control.name)
def test_nothing_is_found_on_a_clean_folder(control, dtype, tmp_path):
    for seed in range(3):
        outcomes = examine(CHECKS, control.make(tmp_path / str(seed), seed, dtype))
        assert not failures(outcomes) and exit_code(outcomes) == 0
        assert [finding for outcome in outcomes for finding in outcome.findings] == []


@pytest.fixture(scope="module")
def found_in(tmp_path_factory):
    """A mutation -> its findings, examined once for all tests."""
    return cache(lambda mutation: findings(mutation.make(tmp_path_factory.mktemp("mutation"), 0, "fp32")))


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: f"{mutation.code} {mutation.name}")
def test_a_bug_is_found_by_its_own_code(mutation, found_in):
    found = found_in(mutation)
    assert mutation.code in {finding.code for finding in found}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: f"{mutation.code} {mutation.name}")
def test_a_patch_mends_a_copy_and_leaves_the_original(mutation, tmp_path):
    subject = mutation.make(tmp_path / "found", 0, "fp32")
    before = {path.name: path.read_bytes() for path in (tmp_path / "found").iterdir()}
    found = findings(subject)
    lines = write_fixed(tmp_path / "found", found, tmp_path / "fixed")
    patched = {(finding.code, finding.where) for finding in found if finding.patch}
    assert len(lines) == len({(f.patch["file"], *f.patch["key"]) for f in found if f.patch}) and bool(lines) == bool(
        patched
    )
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "found").iterdir()}
    if patched:
        shutil.copy(tmp_path / "found" / "model.safetensors", tmp_path / "fixed")
        after = {(finding.code, finding.where) for finding in findings(open_(tmp_path / "fixed"))}
        assert not after & patched
        assert after <= {(finding.code, finding.where) for finding in found}, "the patch broke something else"


def test_every_code_has_a_mutation_and_a_text():
    declared = {code for check in CHECKS for code in check.codes.split()}
    assert declared == {mutation.code for mutation in MUTATIONS}
    texts = tomllib.loads((CODES / "config.toml").read_text(encoding="utf-8"))
    assert declared <= set(texts)
    keys = {"title", "severity", "looks", "detect", "why", "fix", "sources"}
    assert all(set(row) == keys and row["severity"] in ("error", "warn", "info") for row in texts.values())


def test_the_texts_tell_the_worst_severity(found_in):
    texts = tomllib.loads((CODES / "config.toml").read_text(encoding="utf-8"))
    order = ["info", "warn", "error"]
    for mutation in MUTATIONS:
        for finding in found_in(mutation):
            assert order.index(finding.severity) <= order.index(texts[finding.code]["severity"]), finding


def test_without_torch_and_in_time(tmp_path):
    specimens.folder(tmp_path, "llama")
    program = (
        "import sys; from pathlib import Path; from kobza.doctor.files import config; from kobza.doctor.finding import examine\n"
        "assert not any(f for o in examine(config.CHECKS, config.open_(Path(sys.argv[1]))) for f in o.findings)\n"
        "assert not {'torch', 'transformers', 'tokenizers', 'jinja2'} & set(sys.modules), sys.modules.keys()"
    )
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, timeout=30)
    assert time.perf_counter() - start < 10  # 0.3 s on an idle core, 2 are the promise; a busy machine is no bug


FOREIGN = {
    "gpt2": {},
    "llama": {},
    "mistral": {"sliding_window": 16},
    "qwen2": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 8},
    "gemma3_text": {"query_pre_attn_scalar": 8},
    "phi3": {},
    "olmo2": {},
    "mixtral": {},
    "gpt_neox": {},
}


@pytest.mark.parity
@pytest.mark.parametrize("kind", FOREIGN)
def test_nothing_is_found_in_what_transformers_saves(kind, tmp_path):
    """Its own form of today (rope_parameters, layer_types, dtype), of families with and without a table here."""
    transformers = pytest.importorskip("transformers")
    import torch

    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    size |= {"num_key_value_heads": 2, "head_dim": 8}
    size = {"n_embd": 32, "n_layer": 2, "n_head": 4} if kind == "gpt2" else size
    ids = {"vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    values = transformers.AutoConfig.for_model(kind, **size, **ids, **FOREIGN[kind])
    transformers.AutoModelForCausalLM.from_config(values).save_pretrained(tmp_path)
    outcomes = examine(CHECKS, open_(tmp_path))
    assert not failures(outcomes) and not [finding for outcome in outcomes for finding in outcome.findings]


# ---- single rules ------------------------------------------------------------------------------------------------------------


def test_released_oddities_are_no_findings(tmp_path):
    """Llama 3.1 reaches 131,072 with 8 x 8,192; Qwen names a window it does not use; a Phi pads with rows nobody names."""
    path = specimens.folder(tmp_path, "llama")
    values = json.loads((path / "config.json").read_text())
    assert values["rope_scaling"]["factor"] * values["rope_scaling"]["original_max_position_embeddings"] < 512
    assert not findings(open_(path))
    new = {"rope_theta": values.pop("rope_theta")} | values.pop("rope_scaling")
    (path / "config.json").write_text(json.dumps(values | {"rope_parameters": new, "dtype": values.pop("torch_dtype")}))
    assert not findings(open_(path)), "the same in the form of transformers 5"


def test_a_language_model_inside_a_larger_one(tmp_path):
    """text_config is where its keys are; `where` and patches say so; a vision tower's layers are not counted."""
    path = specimens.folder(tmp_path, "gemma")

    def nest(values):
        inner = {key: values.pop(key) for key in list(values) if key not in ("architectures", "torch_dtype")}
        values |= {"model_type": "gemma3", "text_config": inner | {"num_hidden_layers": 3}}

    specimens.edit(path, "config.json", nest)
    tower = {"vision_tower.encoder.layers.7.self_attn.q_proj.weight": np.zeros((3, 3), np.float32)}
    specimens.edit_tensors(path, lambda arrays: arrays.update(tower))
    (found,) = findings(open_(path))
    assert (found.code, found.where) == ("G9", "config.json:text_config.num_hidden_layers")
    assert open_(path).patch("head_dim", 8)["key"] == ["text_config", "head_dim"]


@pytest.mark.parametrize(
    "proof, code",
    [("lm_head.weight[7, 3]", "G8"), ("q_proj.weight is (64, 32)", "G9")]
    + [("'<sep>' has id 317", "L9"), ("pair 1: 0.10009766", "G6")],
)
def test_an_error_names_the_numbers_that_disagree(proof, code, found_in):
    texts = [f.counterexample for m in MUTATIONS for f in found_in(m) if f.code == code]
    assert any(proof in text for text in texts), texts


def test_frequencies_are_those_of_transformers(tmp_path):
    """And float32, in which everybody computes them, is far nearer than the bound of G6 over all bases and widths in use."""
    for base in (1e4, 5e5, 1e6, 1e7):
        for n in (8, 64, 128, 256):
            exact = base ** -(np.arange(0, n, 2) / n)
            single = 1 / np.float32(base) ** (np.arange(0, n, 2, dtype=np.float32) / np.float32(n))
            assert np.abs(single / exact - 1).max() < 2e-6
    pytest.importorskip("transformers")
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    path = specimens.folder(tmp_path, "llama")
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](AutoConfig.from_pretrained(path), "cpu")
    assert np.abs(rope.frequencies(open_(path)) / theirs.double().numpy() - 1).max() < 1e-6


# ---- hostile folders ---------------------------------------------------------------------------------------------------------

junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**4000),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
KEYS = "config.json generation_config.json tokenizer.json tokenizer_config.json".split()


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return {family: specimens.folder(tmp_path_factory.mktemp(family), family) for family in ALL}


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_under_any_key_is_borne(data, clean, tmp_path):
    """A check may find something, skip, or refuse in a line; it never breaks."""
    family = data.draw(st.sampled_from(ALL))
    path = tmp_path / family
    if not path.exists():
        shutil.copytree(clean[family], path)
    file = data.draw(st.sampled_from([name for name in KEYS if (path / name).exists()]))
    right = (clean[family] / file).read_text(encoding="utf-8")
    values = json.loads(right)
    for key in data.draw(st.lists(st.sampled_from(sorted(values)), min_size=1, max_size=3)):
        inner = values[key] if isinstance(values[key], dict) and values[key] and data.draw(st.booleans()) else values
        inner[key if inner is values else data.draw(st.sampled_from(sorted(inner)))] = data.draw(junk)
    (path / file).write_text(json.dumps(values), encoding="utf-8")
    try:
        subject = open_(path)
    except InputError:
        return
    finally:
        (path / file).write_text(right, encoding="utf-8")
    outcomes = examine(CHECKS, subject)
    assert not [reason for reason in failures(outcomes) if reason.split(":")[0].endswith(("Error", "Exception"))]
    config.facts(subject)
    for finding in [finding for outcome in outcomes for finding in outcome.findings]:
        assert len(finding.got) < 2000 and len(finding.counterexample) < 2000


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"a": ' * 100_000,
        "[" * 100_000,
        '{"hidden_size": ' + "9" * 100_000 + "}",
        "\xff\xfe",
        '{"a": 1, "a": 2}',
    ],
)
def test_a_config_that_is_none_is_refused_in_a_line(text, tmp_path):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError) as error:
        open_(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


def test_no_config_and_no_folder_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(InputError):
            open_(path)


def test_an_index_that_leads_out_is_not_followed(tmp_path):
    path = specimens.folder(tmp_path / "model", "llama")
    (path / "model.safetensors").rename(tmp_path / "out.safetensors")
    for name in ("../out.safetensors", str(tmp_path / "out.safetensors")):
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
        outcomes = examine(CHECKS, open_(path))
        assert len(failures(outcomes)) == 1 and exit_code(outcomes) == 2 and not open_(path).tensors


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"])
def test_a_link_out_of_the_folder_is_not_followed(name, tmp_path):
    path = specimens.folder(tmp_path / "model", "llama")
    secret = tmp_path / "secret"
    secret.write_text('{"secret": "s3cret"}')
    (path / name).unlink(missing_ok=True)
    (path / name).symlink_to(secret)
    try:
        outcomes = examine(CHECKS, open_(path))
    except InputError as error:
        assert name == "config.json" and "s3cret" not in str(error)
        return
    assert len(failures(outcomes)) == 1 and "link" in failures(outcomes)[0] and "s3cret" not in repr(outcomes)


def test_a_pickle_is_not_opened_and_the_safe_way_is_named(tmp_path):
    path = specimens.folder(tmp_path, "llama")
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/kobza-was-here'\ntR.")
    outcomes = examine(CHECKS, open_(path))
    skipped = [outcome.reason for outcome in outcomes if outcome.status == "skipped" and "pickle" in outcome.reason]
    assert skipped and all("safetensors" in reason for reason in skipped) and not failures(outcomes)


@pytest.mark.parametrize("cut", [4, 100, -1])
def test_a_truncated_file_of_weights_could_not_be_examined(cut, tmp_path):
    path = specimens.folder(tmp_path, "gpt2")
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    outcomes = examine(CHECKS, open_(path))
    assert len(failures(outcomes)) == 1 and exit_code(outcomes) == 2


def test_quantised_tensors_are_skipped_not_judged(tmp_path):
    path = specimens.folder(tmp_path, "llama")
    specimens.edit(path, "config.json", lambda values: values.update(quantization_config={"quant_method": "gptq"}))
    specimens.edit_tensors(path, lambda arrays: arrays.pop("model.layers.0.self_attn.q_proj.weight"))
    assert not findings(open_(path))


# ---- the corrected copy ------------------------------------------------------------------------------------------------------


def test_a_copy_is_not_written_over_anything(tmp_path):
    path = specimens.folder(tmp_path / "model", "gemma")
    specimens.edit(path, "config.json", lambda values: values.update(rms_norm_eps=1e-5))
    found = findings(open_(path))
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("x")
    for out in (path, path / "inside", tmp_path, full):
        with pytest.raises(InputError, match="--fix"):
            write_fixed(path, found, out)
    assert [p.name for p in full.iterdir()] == ["mine"] and not (path / "inside").exists()
    assert (
        write_fixed(path, [f for f in found if not f.patch], tmp_path / "new") == [] and not (tmp_path / "new").exists()
    )
    assert write_fixed(path, found, tmp_path / "new") == ["config.json: rms_norm_eps 1e-06, was 1e-05 (G4)"]
    assert not list((tmp_path / "new").glob("*.safetensors"))
    assert (tmp_path / "new" / "tokenizer.json").read_bytes() == (path / "tokenizer.json").read_bytes()


def test_facts_name_what_is_there_without_effect(tmp_path):
    rows = dict(row for row in config.facts(open_(specimens.folder(tmp_path, "qwen")))["What the files say"])
    assert rows["sliding window"] == "256, present but switched off"
    assert rows["rows of the embedding beyond the vocabulary"] == "7"
    assert folder.DEFAULTS["gemma"]["tie_word_embeddings"] is True


@pytest.mark.parity
@pytest.mark.parametrize("kind", sorted(folder.DEFAULTS))
def test_the_defaults_are_those_of_transformers(kind):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.for_model(kind).to_dict()
    flat = theirs | (theirs.get("rope_parameters") or {})
    for key, value in folder.DEFAULTS[kind].items():
        their_key = folder.OTHER_NAMES.get(key, key) if kind == "gpt2" else key
        if key == "head_dim" and value == 0 or key == "rope_theta" and kind == "gemma3_text":
            continue  # derived; two bases
        assert flat[their_key] == value, key
