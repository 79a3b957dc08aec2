"""Teach a small language model to see: it names handwritten digits in words.

A picture of 8x8 pixels is cut into 16 patches of 2x2. A small encoder turns each patch into a vector as wide as the model's
embeddings, and these stand where the sentence has 16 placeholder tokens (kobza.vectors). The model then writes the sentence that
follows, a character at a time, as it would after any text:

    <16 patches> -> "this is a seven."

Run it with `python examples/name_digits.py`; it needs scikit-learn, for the pictures: pip install "kobza[examples]".
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from kobza.config import ModelConfig, SampleConfig, TrainConfig
from kobza.generate import generate
from kobza.model import GPT, build, n_parameters
from kobza.optim import make_optimizers
from kobza.train import IGNORE, Batch, train
from kobza.vectors import ignore, never, vectors_at

NAMES = "zero one two three four five six seven eight nine".split()
SENTENCES = [f"this is a{'n' * (name == 'eight')} {name}." for name in NAMES]
LETTERS = sorted(set("".join(SENTENCES)))
END, PLACE = len(LETTERS), len(LETTERS) + 1  # two tokens besides the letters: the sentence is over; here comes a vector
N_PATCHES, PATCH_PIXELS = 16, 4


# ---- text and pictures as tensors ----


def encode(sentence: str, length: int) -> list[int]:
    """Ids of the letters, then END up to `length`."""
    ids = [LETTERS.index(letter) for letter in sentence]
    return ids + [END] * (length - len(ids))


def decode(ids: list[int]) -> str:
    """The letters before the first END."""
    return "".join(LETTERS[i] for i in (ids[: ids.index(END)] if END in ids else ids))


def cut(pictures: Tensor) -> Tensor:
    """Pictures (N, 8, 8) -> their patches, left to right and top to bottom, (N, 16, 4)."""
    return pictures.view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, N_PATCHES, PATCH_PIXELS)


def load() -> tuple[Tensor, Tensor]:
    """The 1,797 pictures (N, 8, 8), brightness 0 to 1, and their digits (N,), shuffled once and for all."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(digits.images, dtype=torch.float32)[order] / 16, torch.tensor(digits.target)[order]


def batches(pictures: Tensor, digits: Tensor, size: int, seed: int) -> Iterator[Batch]:
    """Endless random (patches (B, 16, 4), sentences (B, T))."""
    longest = max(map(len, SENTENCES)) + 1
    sentences = torch.tensor([encode(sentence, longest) for sentence in SENTENCES])
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randint(len(pictures), (size,), generator=generator)
        yield cut(pictures[chosen]), sentences[digits[chosen]]


# ---- the model that sees ----


def build_seeing(seed: int) -> GPT:
    """A language model with an encoder beside it: patches (B, 16, 4) -> vectors (B, 16, C)."""
    config = ModelConfig(vocab_size=PLACE + 1, max_seq_len=48, n_layer=3, n_head=4, n_embd=64, position="learned")
    model = build(config, seed)
    torch.manual_seed(seed)
    # as a part of the model its weights are found by the optimizers and saved with the rest
    model.encoder = nn.Sequential(nn.Linear(PATCH_PIXELS, 64), nn.GELU(), nn.Linear(64, config.n_embd))
    return model


def sentence_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """A LossFn: cross-entropy of the sentence's letters after the patches, summed; and how many there are."""
    patches, sentences = batch
    ids = F.pad(sentences, (N_PATCHES, 0), value=PLACE)  # (B, 16 + T)
    inputs, targets = ids[:, :-1], ignore(ids[:, 1:], PLACE)
    with vectors_at(model, PLACE, model.encoder(patches)):
        logits = model(inputs)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    return loss, (targets != IGNORE).sum()


@torch.no_grad()
def name(model: GPT, pictures: Tensor) -> list[str]:
    """What the model writes after each picture (N, 8, 8), its likeliest letter at a time."""
    prompts = [[PLACE] * N_PATCHES] * len(pictures)
    sample = SampleConfig(tokens=max(map(len, SENTENCES)) + 1, temperature=0)
    with vectors_at(model, PLACE, model.encoder(cut(pictures))):
        steps = [choice.ids for choice in generate(model, prompts, sample, ends=[END], extra=[never(PLACE)])]
    return [decode([i for i in row if i is not None]) for row in zip(*steps, strict=True)]


def accuracy(written: list[str], digits: Tensor) -> float:
    """Share of the sentences that are right to the letter."""
    return sum(text == SENTENCES[digit] for text, digit in zip(written, digits.tolist(), strict=True)) / len(written)


def draw(picture: Tensor) -> list[str]:
    """A picture as 8 lines of text, two characters a pixel."""
    return ["".join(2 * " .:-=+*#%@"[int(9 * pixel)] for pixel in row) for row in picture.tolist()]


def main(steps: int = 300, seed: int = 0) -> dict[str, float]:
    """Train, show what the model says of pictures it has never seen -> its accuracy there, and that of a blind one."""
    pictures, digits = load()
    n_train = 1437  # four fifths; the rest is held out
    model = build_seeing(seed)
    config = TrainConfig(steps=steps, lr=0.003, warmup_steps=20, grad_clip=1.0)
    print(f"{n_parameters(model):,} parameters, {n_train:,} pictures to learn from, {len(pictures) - n_train} held out")
    data = batches(pictures[:n_train], digits[:n_train], 64, seed)
    for step in train(model, make_optimizers(model, config), data, config, sentence_loss):
        if step.step % 50 == 0:
            print(f"step {step.step:4}   loss {step.loss:.4f} nats a letter   {step.seconds * 1000:.0f} ms")
    pictures, digits = pictures[n_train:], digits[n_train:]
    written = name(model, pictures)
    wrong = [i for i, digit in enumerate(digits.tolist()) if written[i] != SENTENCES[digit]]
    for i in [0, 1, 2, *wrong[:1]]:
        print("\n" + "\n".join(draw(pictures[i])) + f"\n-> {written[i]}{'  (wrong)' * (i in wrong)}")
    blind = name(model, pictures.roll(1, dims=0))  # each sentence beside another's picture
    result = {"accuracy": accuracy(written, digits), "blind": accuracy(blind, digits)}
    print(
        f"\nright to the letter on held-out pictures: {result['accuracy']:.1%}; shown another's: {result['blind']:.1%}"
    )
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
