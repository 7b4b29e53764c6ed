"""What may come next, foreseen cheaply: tokens that a step computes along with the next one, and keeps as far as they are what is drawn."""

from collections.abc import Callable, Sequence

from kvcascade.serve.request import Asked, Runs

type Propose = Callable[[Runs, Sequence[Asked]], list[list[int]]]
"""Of rows and what they run on: of each at most so many tokens as are asked for that may follow."""

LONGEST = 4
"""Tokens at a text's end that are looked for earlier in it."""


def ngram(tokens: Sequence[int], count: int) -> list[int]:
    """What followed when the text's last tokens were there before: of the most of them that were, and of several places the last.

    Prompt lookup (Saxena 2023; `prompt_lookup_num_tokens` in transformers, `ngram` in vLLM).
    """
    end = len(tokens)
    best, after = 0, end
    for at in range(end - 2, -1, -1):
        if tokens[at] != tokens[-1]:
            continue
        alike = 1
        while alike < LONGEST and alike <= at and tokens[at - alike] == tokens[end - 1 - alike]:
            alike += 1
        if alike > best:
            best, after = alike, at + 1
            if best == LONGEST:
                break
    text = list(tokens[after:])
    for index in range(count if text else 0):
        text.append(text[index])  # what follows goes on as it did, over the text's end if need be
    return text[:count]


def by_text(look: Callable[[Sequence[int], int], list[int]]) -> Propose:
    """What foresees by a row's tokens alone: of those and a number, at most so many that may follow."""
    return lambda device, asked: [look(each.row.tokens, each.room) for each in asked]


def by_model(device: Runs, asked: Sequence[Asked]) -> list[list[int]]:
    """A smaller model beside the device's (Leviathan et al. 2023; Chen et al. 2023), or that one itself, which reads only the high plane of its
    own cache (QuantSpec, Tiwari et al. 2025): see `device.Device.foresee`."""
    return device.foresee(asked)


PROPOSERS: dict[str, Propose] = {"ngram": by_text(ngram), "self": by_model, "draft": by_model}
"""By their names; `draft` is followed by a colon and the model."""


def proposer(name: str) -> Propose | None:
    """What foresees by this name; nothing does by one that is not there."""
    return PROPOSERS.get(name.partition(":")[0])
