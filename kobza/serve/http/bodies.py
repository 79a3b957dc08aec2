"""The bodies that clients send, as OpenAI and Ollama define them, with our extensions; and what of theirs cannot be honoured.

A field that OpenAI or Ollama defines and that would change the answer here in no way is refused as soon as it is set to
something that asks for an effect: silence would be a lie. Ranges stand here too, so that they are in the OpenAPI document.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from kobza.serve.http.strict import Body

Name = Annotated[str, Field(min_length=1, max_length=200)]
Count = Annotated[int, Field(ge=1, le=1 << 20)]
Texts = Annotated[list[str], Field(max_length=16)]
Share = Annotated[float, Field(gt=0, le=1)]
Whole = Annotated[int, Field(ge=0, le=2**31 - 1)]
Seed = Annotated[int, Field(ge=0, lt=2**62)]
Prompt = Annotated[str, Field(json_schema_extra={"minLength": 1})]
Prompts = Annotated[list[str], Field(min_length=1, max_length=64)]
Tokens = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]
ROLES = ["system", "developer", "user", "assistant", "tool"]
PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
SAID = {"type": "string", "minLength": 1}
CALLS = {"type": "array", "minItems": 1, "items": {"type": "object", "required": ["function"]}}
MESSAGE = {  # as the document has it; kobza/serve/chat.py reads it and says what is wrong
    "anyOf": [
        {
            "type": "object",
            "properties": {"role": {"enum": ROLES}, "content": {"anyOf": [SAID, {"type": "array", "items": PART}]}},
            "required": ["role", "content"],
        },
        {
            "type": "object",
            "properties": {"role": {"const": "assistant"}, "tool_calls": CALLS},
            "required": ["role", "tool_calls"],
        },
    ]
}
Messages = Annotated[list[dict[str, Any]], Field(max_length=4096, json_schema_extra={"items": MESSAGE})]

ANY = (...,)  # every value of the field is harmless: it never asks for another answer
PENALTY = ((None, 0), "leave it out, or use repetition_penalty (1: off)")
REFUSED = {  # field: values that ask for nothing, and why the others are refused
    "presence_penalty": PENALTY,
    "frequency_penalty": PENALTY,
    "user": (ANY, ""),
    "metadata": (ANY, ""),
    "safety_identifier": (ANY, ""),
    "prompt_cache_key": (ANY, ""),  # prefixes are shared by their ids
    "prompt_cache_retention": (ANY, ""),
    "prompt_cache_options": (ANY, ""),
    "service_tier": ((None, "auto", "default"), "there is one tier; leave it out"),
    "store": ((None, False), "nothing is stored here; leave it out"),
}
REFUSED_COMPLETION = REFUSED | {
    "best_of": ((None, 1), "all n texts are given; ask for n"),
    "suffix": ((None, ""), "the model writes onwards only; leave it out"),
}
REFUSED_CHAT = REFUSED | {
    "audio": ((None,), "this model writes text; leave it out"),
    "modalities": ((None, ["text"]), "this model writes text; leave it out"),
    "prediction": ((None,), "speculation is set when the server starts; leave it out"),
    "web_search_options": ((None,), "this server reaches nothing outside; leave it out"),
    "reasoning_effort": ((None, "none"), "this model has no such setting; leave it out"),
    "verbosity": ((None,), "this model has no such setting; leave it out"),
    "moderation": ((None,), "nothing is moderated here; leave it out"),
    "functions": ((None,), "send tools"),
    "function_call": ((None,), "send tool_choice"),
}


class StreamOptions(Body):
    """What a stream tells besides."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Knobs(Body):
    """How the next token is chosen. Left out: as the server was started."""

    model: Name
    temperature: Annotated[float, Field(ge=0, le=2, description="0: always the likeliest token")] | None = None
    top_p: Share | None = None
    seed: Seed | None = None
    stop: str | Texts | None = None
    n: Annotated[int, Field(ge=1, le=64, description="text i draws from seed + i")] | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    top_k: Annotated[Whole, Field(description="ours: the k likeliest; 0: all")] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, description="ours")] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100, description="ours; 1: off")] | None = None
    no_repeat_ngram: Annotated[Whole, Field(description="ours; 0: off")] | None = None
    min_tokens: Annotated[Whole, Field(description="ours: do not end before so many")] | None = None
    ignore_eos: Annotated[bool, Field(description="ours: write on behind an end")] | None = None
    grammar: Annotated[str, Field(description="ours: the text follows this Lark grammar")] | None = None
    regex: Annotated[str, Field(description="ours: the text matches this")] | None = None
    response_format: dict[str, Any] | None = None


class Completion(Knobs):
    """POST /v1/completions"""

    prompt: Prompt | Prompts | Tokens | Annotated[list[Tokens], Field(min_length=1, max_length=64)]
    max_tokens: Annotated[int, Field(ge=0, le=1 << 20, description="0 only with echo")] | None = 16
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class ChatCompletion(Knobs):
    """POST /v1/chat/completions"""

    messages: Annotated[Messages, Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=128)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None


# ---- Ollama ----------------------------------------------------------------------------------------------------------

LOADING = "numa num_batch num_gpu main_gpu low_vram f16_kv vocab_only use_mmap use_mlock num_thread num_keep".split()
REFUSED_OPTIONS = dict.fromkeys(LOADING, (ANY, "")) | {  # how a model is loaded changes no text
    "presence_penalty": ((None, 0), "leave it out, or use repeat_penalty (1: off)"),
    "frequency_penalty": ((None, 0), "leave it out, or use repeat_penalty (1: off)"),
    "repeat_last_n": ((None, -1), "repeat_penalty looks at the whole text here; send -1 or leave it out"),
    "tfs_z": ((None, 1), "there is no such sampler here; leave it out"),
    "typical_p": ((None, 1), "there is no such sampler here; leave it out"),
    "mirostat": ((None, 0), "there is no such sampler here; leave it out"),
    "mirostat_tau": ((None,), "there is no such sampler here; leave it out"),
    "mirostat_eta": ((None,), "there is no such sampler here; leave it out"),
    "penalize_newline": ((None, True), "line ends are tokens like others; leave it out"),
    "logits_all": ((None, False), "ask for logprobs"),
    "embedding_only": ((None, False), "there are no embeddings here; leave it out"),
}
NO_IMAGES = ((None, []), "this model reads text; leave it out")
REFUSED_GENERATE = {
    "keep_alive": (ANY, ""),  # a model stays as long as the server
    "suffix": ((None, ""), "the model writes onwards only; leave it out"),
    "template": ((None, ""), "the model's own template is used; render it yourself and send raw=true"),
    "context": ((None, []), "send the text so far; what was read before is cached"),
    "images": NO_IMAGES,
    "think": ((None, False), "this model has no such setting; leave it out"),
    "width": ((None, 0), "this model writes text; leave it out"),
    "height": ((None, 0), "this model writes text; leave it out"),
    "steps": ((None, 0), "this model writes text; leave it out"),
}
REFUSED_OLLAMA_CHAT = {name: REFUSED_GENERATE[name] for name in ("keep_alive", "think")}


class Options(Body):
    """Ollama's options. Left out: as the server was started."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_k: Whole | None = None
    top_p: Share | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repeat_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    num_predict: Annotated[int, Field(ge=-2, le=1 << 20, description="-1, -2: until the context is full")] | None = None
    num_ctx: Annotated[int, Field(ge=1, le=1 << 24)] | None = None
    seed: Seed | None = None
    stop: str | Texts | None = None


class Asked(Body):
    """What /api/generate and /api/chat have in common."""

    model: Name
    stream: bool | None = None
    options: Options | None = None
    format: Literal["", "json"] | dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class Generate(Asked):
    """POST /api/generate"""

    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None


class Chat(Asked):
    """POST /api/chat"""

    messages: Messages | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=128)] | None = None


class Show(Body):
    """POST /api/show"""

    model: Name | None = None
    name: Name | None = None
    verbose: bool | None = None
