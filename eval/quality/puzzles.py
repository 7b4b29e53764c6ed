"""Puzzles: a context in which something is hidden, and what is asked about it.

Contexts are made here from a seed, after RULER (Hsieh et al. 2024), pass-key retrieval (Mohtashami & Jaggi 2023), and, since finding
needles certifies little, copying and chained arithmetic.
"""

import dataclasses
import random
from collections.abc import Callable, Sequence

from kvcascade.cache.errors import BadInput
from kvcascade.model.tokenizer import Tokenizer, encode_within

NOISE = (
    "The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.", "A door closed in the hall.",
    "The train was late that day.", "Nobody had seen the cat.", "It rained for an hour.", "They talked about the weather.",
    "The book lay on the table.", "A dog barked twice.", "She walked to the station.", "The coffee was cold.", "He forgot the umbrella.",
    "The shop opens at nine.", "Somebody laughed upstairs.", "The letter came on Monday.", "A boat crossed the lake.", "The lamp was lit.",
)  # fmt: skip
WORDS = (
    "apple", "river", "stone", "cloud", "tiger", "music", "paper", "bread", "chair", "green", "house", "light", "money", "night", "ocean",
    "plant", "queen", "radio", "sugar", "table", "uncle", "voice", "water", "young", "zebra", "bridge", "candle", "dragon", "engine",
    "flower", "garden", "hammer", "island", "jacket", "kitten", "ladder", "marble", "needle", "orange", "pencil", "rabbit", "silver",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Puzzle:
    """What is hidden in a context, each sentence at its depth (0: start, 1: end; None: where the task says), and what is asked then."""

    hidden: Sequence[tuple[float | None, str]]
    turns: list[tuple[str, str]]
    """Questions and answers; the answer follows the question as its continuation."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """A puzzle in tokens: a context of an exact length, and the turns over it."""

    context: list[int]
    turns: list[tuple[list[int], list[int]]]
    answers: tuple[str, ...] = ()
    """The turns' answers in words."""
    name: str = ""
    """What it was made from; no other has the same."""


def _number(rng: random.Random, digits: int) -> str:
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def _passkey(rng: random.Random, depth: float) -> Puzzle:
    key = _number(rng, 5)
    return Puzzle(
        [(depth, f"The pass key is {key}. Remember it.")], [("What is the pass key? The pass key is", f" {key}")]
    )


def _needle(word: str, number: str) -> str:
    return f"The magic number of {word} is {number}."


def _ask(word: str) -> str:
    return f"What is the magic number of {word}? The magic number of {word} is"


def _single(rng: random.Random, depth: float) -> Puzzle:
    word, number = rng.choice(WORDS), _number(rng, 5)
    return Puzzle([(depth, _needle(word, number))], [(_ask(word), f" {number}")])


def _multikey(rng: random.Random, depth: float) -> Puzzle:
    words, numbers = rng.sample(WORDS, 4), [_number(rng, 5) for _ in range(4)]
    hidden = [(None if i else depth, _needle(w, n)) for i, (w, n) in enumerate(zip(words, numbers, strict=True))]
    return Puzzle(hidden, [(_ask(words[0]), f" {numbers[0]}")])


def _multivalue(rng: random.Random, depth: float) -> Puzzle:
    word, numbers = rng.choice(WORDS), [_number(rng, 3) for _ in range(3)]
    hidden = [(depth, f"One magic number of {word} is {number}.") for number in numbers]
    question = f"What are the magic numbers of {word}, in the order of the text? The magic numbers of {word} are"
    return Puzzle(hidden, [(question, f" {numbers[0]}, {numbers[1]}, {numbers[2]}")])


def _tracking(rng: random.Random, depth: float) -> Puzzle:
    names, value = rng.sample("ABCDEFGHJKLMNPQRSTUVWXYZ", 3), _number(rng, 3)
    first, second, third = names
    hidden = [(depth, f"{first} = {value}."), (None, f"{second} = {first}."), (None, f"{third} = {second}.")]
    return Puzzle(hidden, [(f"What is the value of {third}? {third} =", f" {value}")])


def _common(rng: random.Random, depth: float) -> Puzzle:
    often, *others = rng.sample(WORDS, 8)
    words = [often] * 8 + others
    rng.shuffle(words)
    return Puzzle(
        [(depth, f"The words are: {', '.join(words)}.")], [("The word that comes most often is", f" {often}")]
    )


def _copying(rng: random.Random, depth: float) -> Puzzle:
    words = rng.sample(WORDS, 6)
    return Puzzle(
        [(depth, f"The list is: {' '.join(words)}.")], [(f"Again, the list is: {words[0]}", " " + " ".join(words[1:]))]
    )


def _arithmetic(rng: random.Random, depth: float) -> Puzzle:
    values, steps = [rng.randrange(1, 5)], []
    for _ in range(2):
        steps.append(rng.randrange(1, 3))
        values.append(values[-1] + steps[-1])
    hidden = [
        (depth, f"Tom has {values[0]} apples."), (None, f"Ann has {steps[0]} more than Tom."), (None, f"Bob has {steps[1]} more than Ann."),
    ]  # fmt: skip
    names = ("Tom", "Ann", "Bob")
    return Puzzle(hidden, [(f"How many apples has {n}? {n} has", f" {v}") for n, v in zip(names, values, strict=True)])


def _multiturn(rng: random.Random, depth: float) -> Puzzle:
    words, numbers = rng.sample(WORDS, 3), [_number(rng, 5) for _ in range(3)]
    hidden = [(None if i else depth, _needle(w, n)) for i, (w, n) in enumerate(zip(words, numbers, strict=True))]
    return Puzzle(hidden, [(_ask(w), f" {n}") for w, n in zip(words, numbers, strict=True)])


TASKS: dict[str, Callable[[random.Random, float], Puzzle]] = {
    "passkey": _passkey,
    "single": _single,
    "multikey": _multikey,
    "multivalue": _multivalue,
    "tracking": _tracking,
    "common": _common,
    "copying": _copying,
    "arithmetic": _arithmetic,
    "multiturn": _multiturn,
}


def sample(
    task: str, encoding: Tokenizer, length: int, depth: float, seed: int, number: int = 0, before: Sequence[int] = ()
) -> Sample:
    """Make a context of exactly `length` tokens with a puzzle in it, `before` at its begin; the same arguments give the same sample.

    Any other task, length, depth, seed or number gives another puzzle. What has no depth of its own is hidden after the rest, in equal steps
    to the end. Raises BadInput where the context is too short.
    """
    if task not in TASKS:
        raise BadInput(f"no task {task!r}; there are {', '.join(TASKS)}")
    if not 0 <= depth <= 1:
        raise BadInput(f"a depth of {depth}; it must be between 0 and 1")
    name = f"{task}/{length}/{depth:g}/{seed}/{number}"
    rng = random.Random(name)  # of a text: the same on every machine
    puzzle = TASKS[task](rng, depth)
    tokens = lambda text: encode_within(encoding, text)
    hidden = [tokens(" " + text) for _, text in puzzle.hidden]
    room = length - sum(map(len, hidden)) - len(before)
    if room < 0:
        raise BadInput(f"{length} tokens are too few for the task {task}, which hides {length - room}")
    noise: list[list[int]] = []
    while sum(map(len, noise)) < room:
        noise.append(tokens(" " + rng.choice(NOISE)))
    noise[-1:] = [noise[-1][: room - sum(map(len, noise[:-1]))]] if noise else []
    later = sum(where is None for where, _ in puzzle.hidden)
    places, seen = [], 0
    for where, _ in puzzle.hidden:
        seen += where is None
        share = depth + (1 - depth) * seen / (later + 1) if where is None else where
        places.append(round(share * max(len(noise) - 1, 0)))  # before the last, which may be cut short
    context = list(before)
    for index, sentence in enumerate([*noise, []]):
        context += [token for place, each in zip(places, hidden, strict=True) if place == index for token in each]
        context += sentence
    turns = [
        (tokens(("\n" if i else "\n\n") + question), tokens(answer))
        for i, (question, answer) in enumerate(puzzle.turns)
    ]
    return Sample(context, turns, tuple(answer for _, answer in puzzle.turns), name)
