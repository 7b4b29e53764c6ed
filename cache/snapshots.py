"""What rows kept in slots of their own after the first chunks of their prompts, for later rows that begin alike. No JAX here."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from kvcascade.cache.prefix import key, parts


@dataclasses.dataclass
class Snapshots:
    """Contents by the tokens that led to them, whole chunks from a text's beginning; of those there is no room for, the one used longest ago goes.

    A prompt enters in the same chunks whatever else runs, so what a row has in its slots then is a function of its tokens.
    """

    room: int
    """Bytes of all contents."""
    chunk: int
    """Tokens."""
    nbytes: int = 0
    _known: dict[bytes, tuple[tuple[int, ...], Any, int]] = dataclasses.field(default_factory=dict)

    def find(self, space: bytes, tokens: Sequence[int]) -> tuple[int, Any]:
        """Of how many of the tokens, at most, the content is known, and that; 0 and None where it is not."""
        found, name = (0, None), space
        for index, part in enumerate(parts(tokens, self.chunk), 1):
            name = key(name, part)
            stop = index * self.chunk
            if (known := self._known.get(name)) and known[0] == tuple(tokens[:stop]):
                self._known[name] = self._known.pop(name)  # the last used is the last
                found = stop, known[1]
        return found

    def lacks(self, space: bytes, tokens: Sequence[int]) -> bool:
        """Whether the content after all of these tokens is not known, and there are whole chunks of them."""
        return (
            bool(self.room and tokens)
            and len(tokens) % self.chunk == 0
            and self._name(space, tokens) not in self._known
        )

    def keep(self, space: bytes, tokens: Sequence[int], content: Any, nbytes: int) -> None:
        """Know the content after these tokens, of so many bytes; what has more than there is room for is not kept."""
        if nbytes > self.room:
            return
        name = self._name(space, tokens)
        _, _, before = self._known.pop(name, ((), None, 0))
        self._known[name] = tuple(tokens), content, nbytes
        self.nbytes += nbytes - before
        while self.nbytes > self.room:
            _, _, size = self._known.pop(next(iter(self._known)))
            self.nbytes -= size

    def _name(self, space: bytes, tokens: Sequence[int]) -> bytes:
        for part in parts(tokens, self.chunk):
            space = key(space, part)
        return space
