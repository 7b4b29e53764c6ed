"""The text of an answer as it may be shown: whole characters, and nothing of a stop text."""

import codecs
from collections.abc import Callable, Sequence


class Visible:
    """A row's text as its tokens come; what may be the beginning of a stop text is held back until it is known not to be one."""

    def __init__(self, token_bytes: Callable[[int], bytes], stops: Sequence[str] = ()):
        self._bytes, self._stops = token_bytes, tuple(filter(None, stops))
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may span tokens
        self._held, self.stopped = "", False

    def add(self, token: int) -> str:
        """Take a token; the text that may be shown now. After a stop text nothing is."""
        return self._show(self._decoder.decode(self._bytes(token)))

    def end(self) -> str:
        """There are no more tokens: what was held back."""
        text = self._show(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _show(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max((_beginning(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _beginning(text: str, stop: str) -> int:
    """How many of a text's last characters are the first ones of a stop text."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-size:])), 0)
