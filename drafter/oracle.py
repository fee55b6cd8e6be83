"""Oracle: drafts a text that is known beforehand. The bound of what drafting can gain, and a check of the loop."""

from __future__ import annotations

from collections.abc import Sequence

from .protocol import Draft, DraftContext


class Oracle:
    """Proposes the tokens of `text` (prompt included) at every position.

    Args:
        text: ids.
    """

    taps: tuple[int, ...] = ()

    def __init__(self, text: Sequence[int]):
        self._text = list(text)

    def reset(self) -> None:
        pass

    def propose(self, context: DraftContext, width: int) -> Draft:
        first = len(context.tokens)
        return Draft(self._text[first : first + width])
