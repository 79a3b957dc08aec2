"""The other end of tokenizer.py: a process that encodes with a stranger's tokenizer.json and can be killed.

Run as a script (`python -I -S -B encoder.py FOLDER`), never imported: it needs the `tokenizers` library alone, whose folder is
the argument, or `sentencepiece` for a tokenizer.model. A pattern in a tokenizer.json can take for ever on a short text, a large
vocabulary can ask for all memory, the library can bring its process down: here that ends this process only. One request on
stdin, one answer on stdout, both JSON: {"file" or "pieces", "texts", ...} -> {"plain": ids, ...} or {"error"}; with "serve",
one answer a line.
"""

import json
import sys

MEMORY_BYTES = 6 << 30  # address space, most of it never touched
CPU_SECONDS = 60
ADDED = 4000  # added tokens tried one by one


def fence():
    """The limits of the operating system, where it has them."""
    try:
        import resource
    except ImportError:
        return
    for what, most in (
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_CPU, CPU_SECONDS),
        (resource.RLIMIT_CORE, 0),
    ):
        try:
            resource.setrlimit(what, (most, most))
        except (ValueError, OSError):
            pass  # a lower limit stands already


def load(request):
    """The tokenizer, with another pre-tokenizer if one is given."""
    from tokenizers import Tokenizer

    with open(request["file"], encoding="utf-8-sig") as file:
        text = file.read()
    if "pre_tokenizer" in request:
        content = json.loads(text)
        content["pre_tokenizer"] = request["pre_tokenizer"]
        text = json.dumps(content)
    tokenizer = Tokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def coded(request):
    """ids without and with special tokens, the decoded text, decoded prefixes, tokens alone."""
    tokenizer, texts = load(request), request["texts"]
    plain = [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)]
    answer = {"plain": plain, "special": [e.ids for e in tokenizer.encode_batch(texts)]}
    answer["back"] = tokenizer.decode_batch(plain, skip_special_tokens=False)
    steps = plain[: request["steps"]]
    answer["prefixes"] = [
        [tokenizer.decode(ids[: n + 1], skip_special_tokens=False) for n in range(len(ids))] for ids in steps
    ]
    added = {token.content: i for i, token in sorted(tokenizer.get_added_tokens_decoder().items())}
    before, after = request["between"]
    answer |= {"added": added, "before": tokenizer.encode(before, add_special_tokens=False).ids}
    few = list(added)[:ADDED]
    answer["alone"] = [e.ids for e in tokenizer.encode_batch(few, add_special_tokens=False)]
    between = [before + token + after for token in few]
    answer["between"] = [e.ids for e in tokenizer.encode_batch(between, add_special_tokens=False)]
    return answer


def pieces(request):
    """ids of a sentencepiece model."""
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=request["pieces"])
    return {"plain": [model.encode(text) for text in request["texts"]]}


def serve(request):
    """One answer a line from now on: {"text", "special"} -> {"ids"}, {"ids"} -> {"names"}."""
    tokenizer, broken = None, ""
    try:
        tokenizer = load(request)
    except BaseException as error:
        broken = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        try:
            if tokenizer is None:
                answer = {"error": broken}
            elif "ids" in asked:
                answer = {"names": [tokenizer.id_to_token(i) for i in asked["ids"]]}
            else:
                answer = {"ids": tokenizer.encode(asked["text"], add_special_tokens=asked["special"]).ids}
        except BaseException as error:
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        print(json.dumps(answer), flush=True)


def main():
    sys.path[:0] = sys.argv[1:]
    fence()
    request = json.loads(sys.stdin.buffer.readline())
    if "serve" in request:
        return serve(request)
    try:
        answer = pieces(request) if "pieces" in request else coded(request)
    except BaseException as error:  # a panic of the library is no Exception
        answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main()
