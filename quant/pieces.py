"""Token ids to text, one by one, in whole characters."""

from __future__ import annotations

from typing import Any

BROKEN = "\ufffd"  # what a tokenizer makes of bytes that are no whole character yet


class Pieces:
    """Turns tokens into text one by one, in whole characters.

    A token's text depends on those before it (a leading space, the bytes of one character), so a
    piece is what the decoded text gains over that of the piece before.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # of the last piece, then what is not told yet
        self._told = 0  # how many of them are told

    def add(self, token: int) -> str:
        """The text that is now known to be whole, perhaps none."""
        self._ids.append(token)
        return self._gain(whole=True)

    def rest(self) -> str:
        """What was held back, at the end."""
        return self._gain(whole=False)

    def _gain(self, whole: bool) -> str:
        before, now = self._decode(self._ids[: self._told]), self._decode(self._ids)
        if len(now) <= len(before) or (whole and now.endswith(BROKEN)):
            return ""
        self._ids, self._told = self._ids[self._told :], len(self._ids) - self._told
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text
