"""Finding stop strings in text that arrives in pieces.

The string that is complete first wins; of two that end at the same character, the longer. That
depends on the text alone, not on how it is cut into tokens.
"""

from __future__ import annotations

from collections.abc import Sequence


class _Matcher:
    """Knuth-Morris-Pratt: how much of `pattern` the text seen so far ends with."""

    __slots__ = ("_failure", "_pattern", "matched")

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self.matched = 0
        # _failure[k]: length of the longest proper border of pattern[:k + 1].
        self._failure = [0] * len(pattern)
        length = 0
        for at in range(1, len(pattern)):
            while length and pattern[at] != pattern[length]:
                length = self._failure[length - 1]
            length += pattern[at] == pattern[length]
            self._failure[at] = length

    def step(self, character: str) -> bool:
        """Take one character; True once the pattern is complete (no step after that)."""
        matched = self.matched
        while matched and character != self._pattern[matched]:
            matched = self._failure[matched - 1]
        matched += character == self._pattern[matched]
        self.matched = matched
        return matched == len(self._pattern)


class StopStrings:
    """Passes text on up to the first stop string, which stays out.

    Only the longest end of the text that may still become a stop string is held back. The cost is
    O(characters) per stop string, whatever came before.
    """

    __slots__ = ("_held", "_matchers", "found")

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises ValueError for an empty stop string."""
        if not all(stops):
            raise ValueError("a stop string is empty")
        self._matchers = [_Matcher(stop) for stop in stops]
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """The text that is safe to show now. After `found` there is no more."""
        if self.found:
            return ""
        held = self._held + text
        for at, character in enumerate(text):
            complete = [matcher.matched for matcher in self._matchers if matcher.step(character)]
            if complete:
                self.found = True
                self._held = ""
                return held[: len(held) - len(text) + at + 1 - max(complete)]
        keep = max((matcher.matched for matcher in self._matchers), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """At the end of the text: what was held back after all."""
        held, self._held = self._held, ""
        return held
