"""The text of an answer as its tokens come."""

import codecs
from collections.abc import Callable


class Answer:
    """The text of one row as its tokens come, up to a stop text or an end token."""

    def __init__(self, token_bytes: Callable[[int], bytes], end: frozenset[int], stop: tuple[str, ...]):
        self._bytes, self._end, self._stop = token_bytes, end, stop
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may span tokens
        self.text, self.count, self.done = "", 0, False

    def add(self, token: int) -> str:
        """Take a token; return the text that it completed, nothing once the answer is done."""
        if self.done:
            return ""
        self.count += 1
        if token in self._end:
            self.done = True
            return ""
        new = self._decoder.decode(self._bytes(token))
        self.text += new
        self.done = any(stop in self.text for stop in self._stop)
        return new
