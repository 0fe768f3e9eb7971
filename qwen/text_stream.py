"""From a reply's token bytes to the text that may be shown: incremental UTF-8 and stop strings.

Pure generators; knows no tokenizer and no model. Both yield exactly one text (maybe empty) for
every item they take, and then at most one more with what was held back, so that a caller can tell
which token a piece of text came with.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence


def stream_utf8(chunks: Iterable[bytes]) -> Iterator[str]:
    """Decode bytes that may be cut anywhere, also inside a character.

    Args:
        chunks: The bytes of one token each.

    Yields:
        One text per chunk without the character that is still incomplete; at the end what is
        left of it. Invalid bytes become U+FFFD.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for chunk in chunks:
        yield decoder.decode(chunk)
    rest = decoder.decode(b"", final=True)
    if rest:
        yield rest


def stream_until_stop(texts: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """Pass text on up to the first stop string, of which nothing is ever shown.

    The stop string that is complete first wins, as if the text came character by character; of
    several that end together, the longest. So the result does not depend on where the text is cut.

    Args:
        texts: Consecutive pieces of a text.
        stops: Non-empty stop strings.

    Yields:
        One text per piece without an end that may become a stop string; at the end what was held
        back. After a match the generator ends and takes no further piece.
    """
    held = ""
    for text in texts:
        held += text
        end = find_stop(held, stops)
        if end is not None:
            yield held[:end]
            return
        safe = len(held) - _possible_stop_length(held, stops)
        yield held[:safe]
        held = held[safe:]
    if held:
        yield held


def find_stop(text: str, stops: Sequence[str]) -> int | None:
    """Find where the stop string begins that is complete first; None when there is none."""
    matches = []
    for stop in stops:
        start = text.find(stop)
        if start >= 0:
            matches.append((start + len(stop), start))
    return min(matches)[1] if matches else None


def _possible_stop_length(text: str, stops: Sequence[str]) -> int:
    """Return the length in characters of the longest end of `text` that begins a stop string."""
    longest = 0
    for stop in stops:
        for length in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:length]):
                longest = length
                break
    return longest
