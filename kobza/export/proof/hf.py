"""transformers as an engine: a folder as AutoModelForCausalLM and AutoTokenizer load it, in float32, without network or code."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from kobza.export.proof.engine import EngineError, Message, check_ids, installed
from kobza.formats.template import Refused


def open_transformers(folder: Path, adapter: Path | None = None) -> Transformers:
    """The engine of a Hugging Face folder, with PEFT's adapter on it and that one's tokenizer if one is given. EngineError where
    it will not load, or not every weight finds its place."""
    release = installed("transformers")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    loading = local | {"dtype": torch.float32, "attn_implementation": "eager", "use_safetensors": True}
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(str(adapter or folder), **local)
            model, info = AutoModelForCausalLM.from_pretrained(str(folder), output_loading_info=True, **loading)
    except Exception as error:  # of whatever kind: their code and what it calls read the whole folder
        raise EngineError(f"transformers {release} does not load {folder}: {_line(error)}") from None
    odd = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    said = "; ".join(f"{kind.replace('_', ' ')} {', '.join(names[:3])}" for kind, names in odd.items() if names)
    if said:  # it would draw the missing ones by chance
        raise EngineError(f"transformers {release} finds other weights in {folder} than its config makes: {said}")
    if adapter is None:
        return Transformers(model.eval(), tokenizer, f"transformers {release}")
    return Transformers(_adapted(model, adapter).eval(), tokenizer, f"transformers {release}, peft {installed('peft')}")


def _adapted(model: Any, adapter: Path) -> Any:
    """The model with an adapter on it; one that PEFT fills only in part is refused, for the rest would be drawn at random."""
    release = installed("peft")
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    try:
        with _quiet():
            found = PeftModel.from_pretrained(model, str(adapter))
            with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
                stored = set(file.keys())
            odd = sorted(stored ^ set(get_peft_model_state_dict(found)))
    except Exception as error:  # of whatever kind, as above
        raise EngineError(f"peft {release} does not load {adapter}: {_line(error)}") from None
    if odd:
        raise EngineError(
            f"peft {release} finds other tensors in {adapter} than its config makes: {', '.join(odd[:3])}"
        )
    return found


class Transformers:
    """A loaded model and tokenizer."""

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        self._model, self._tokenizer, self.name = model, tokenizer, name
        tokenizer.model_max_length = 1 << 40  # it would warn of texts beyond the context, which are asked for ids alone
        text = model.config.get_text_config()
        self.vocab_size, self.n_ctx = text.vocab_size, text.max_position_embeddings
        model.generation_config = _bare(model.generation_config)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def begin(self, text: str) -> list[int]:
        return self._tokenizer(text, split_special_tokens=True)["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str | None:
        return self._rendered(messages, add_generation_prompt, tokenize=False)

    def chat(self, messages: Sequence[Message]) -> list[int] | None:
        return self._rendered(messages, True, tokenize=True, return_dict=False)

    def _rendered(self, messages: Sequence[Message], add_generation_prompt: bool, **how: Any) -> Any:
        from jinja2 import TemplateError

        if self._tokenizer.chat_template is None:
            return None
        said = [dict(message) for message in messages]
        try:
            return self._tokenizer.apply_chat_template(said, add_generation_prompt=add_generation_prompt, **how)
        except TemplateError as error:
            raise Refused(f"{self.name}: refuses this conversation: {_line(error)}") from None

    @torch.inference_mode()
    def logprobs(self, ids: Sequence[int], positions: Sequence[int]) -> Tensor:
        check_ids(ids, positions, self.vocab_size, self.n_ctx)
        kept = torch.tensor(list(positions))
        logits = self._model(torch.tensor([list(ids)]), logits_to_keep=kept, use_cache=False).logits[0]  # (n, V)
        return logits.double().log_softmax(-1)

    def stops_at(self, id: int) -> bool:
        check_ids([id], (), self.vocab_size, self.n_ctx)
        others = torch.arange(self.vocab_size) != id
        return len(self._generated([0], 2, [lambda seen, scores: scores.masked_fill(others, -torch.inf)])) == 1

    def greedy(self, ids: Sequence[int], n: int) -> list[int]:
        check_ids(ids, (), self.vocab_size, self.n_ctx - n)
        return self._generated(list(ids), n, [])

    def _generated(self, ids: list[int], n: int, processors: list[Any]) -> list[int]:
        prompt = torch.tensor([ids])
        how = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": n, "logits_processor": processors}
        with _quiet():
            said = self._model.generate(prompt, do_sample=False, **how)
        return said[0, len(ids) :].tolist()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def _bare(given: Any) -> Any:
    """A generation config of which only the ends are kept: a repetition penalty would make another model of it."""
    from transformers import GenerationConfig

    ends = given.eos_token_id
    return GenerationConfig(eos_token_id=ends, pad_token_id=ends[0] if isinstance(ends, list) else ends)


@contextmanager
def _quiet() -> Iterator[None]:
    """No network, and none of their warnings and bars on the user's terminal."""
    from huggingface_hub import constants
    from transformers.utils import logging

    offline, level, bars = constants.HF_HUB_OFFLINE, logging.get_verbosity(), logging.is_progress_bar_enabled()
    constants.HF_HUB_OFFLINE = True
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _line(error: Exception) -> str:
    """An error in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
