"""A tokenizer without a vocabulary file: deterministic, reversible, about 4 bytes a token.

A token is one to four ASCII characters packed into an integer (base 99), or one character of any
other kind, or a special token. A newline always begins a token and nothing else forces a
boundary, so the ids before a cut never depend on the text after it. From that follow the two
properties the KV cache needs:

- text cut after any token encodes to the same ids again, so an answer cut by ``max_tokens`` is
  found when it comes back as history;
- text appended with a leading newline, or as a segment of its own (chat messages are), leaves
  every earlier id unchanged. Text appended in any other way changes at most one token.

Ids are the same in every process: they are computed, not learned.
"""

from __future__ import annotations

import re
from array import array
from collections import OrderedDict
from collections.abc import Iterable
from typing import Final

_ALPHABET: Final = "\t\n\r" + "".join(map(chr, range(32, 127)))
_BASE: Final = len(_ALPHABET) + 1  # digit 0 means "no character"
_PIECES: Final = _BASE**4
_CODE_POINTS: Final = _PIECES
_SPECIALS: Final = _CODE_POINTS + 0x110000

#: Text of the special tokens, in the order of their ids.
_SPECIAL_TEXT: Final = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<|media_start|>",
    "<|media_end|>",
)
END_OF_TEXT: Final = _SPECIALS
IM_START: Final = _SPECIALS + 1
IM_END: Final = _SPECIALS + 2
TOOL_CALL: Final = _SPECIALS + 3
TOOL_CALL_END: Final = _SPECIALS + 4
TOOL_RESPONSE: Final = _SPECIALS + 5
TOOL_RESPONSE_END: Final = _SPECIALS + 6
MEDIA_START: Final = _SPECIALS + 7
MEDIA_END: Final = _SPECIALS + 8
#: Placeholders of media parts (images, audio): distinct content gets distinct ids.
MEDIA_PADS: Final = _SPECIALS + 64
_MEDIA_PAD_COUNT: Final = 1 << 20
#: Every id below this one detokenizes (special tokens and media placeholders to nothing).
VOCAB_SIZE: Final = MEDIA_PADS + _MEDIA_PAD_COUNT

_TOKEN: Final = re.compile(r"[\t\n\r -~][\t\r -~]{0,3}|[^\t\n\r -~]")
_DIGIT: Final = {char: digit for digit, char in enumerate(_ALPHABET, start=1)}

#: Entries of the piece tables before they are emptied: bounds memory at about 100 MB.
_MAX_TABLE: Final = 500_000


class _Ids(dict[str, int]):
    """Piece of text → id; filled as pieces are met."""

    def __missing__(self, piece: str) -> int:
        if len(self) >= _MAX_TABLE:
            self.clear()
        first = _DIGIT.get(piece[0])
        if first is None:
            code = ord(piece)
            value = _CODE_POINTS + (0xFFFD if 0xD800 <= code <= 0xDFFF else code)
        else:
            value = first
            for place, char in enumerate(piece[1:], start=1):
                value += _DIGIT[char] * _BASE**place
        self[piece] = value
        return value


class _Texts(dict[int, str]):
    """Id → piece of text; filled as ids are met."""

    def __missing__(self, token: int) -> str:
        if len(self) >= _MAX_TABLE:
            self.clear()
        text = self[token] = _text_of(token)
        return text


def _text_of(token: int) -> str:
    if not 0 <= token < VOCAB_SIZE:
        raise ValueError(f"token id {token} is out of range: ids are 0 … {VOCAB_SIZE - 1}")
    if token >= _SPECIALS:
        return ""
    if token >= _CODE_POINTS:
        code = token - _CODE_POINTS
        return "\ufffd" if 0xD800 <= code <= 0xDFFF else chr(code)
    chars = []
    while token:
        token, digit = divmod(token, _BASE)
        if digit:
            chars.append(_ALPHABET[digit - 1])
    return "".join(chars)


_ids = _Ids()
_texts = _Texts()


def encode(text: str) -> array[int]:
    """The ids of ``text`` as unsigned 32-bit integers; never a special token."""
    return array("I", map(_ids.__getitem__, _TOKEN.findall(text)))


def decode(tokens: Iterable[int], *, skip_special_tokens: bool = True) -> str:
    """The text of ``tokens``.

    Raises:
        ValueError: an id is negative or not below ``VOCAB_SIZE``.
    """
    if skip_special_tokens:
        return "".join(map(_texts.__getitem__, tokens))
    return "".join(
        _SPECIAL_TEXT[token - _SPECIALS]
        if _SPECIALS <= token < _SPECIALS + len(_SPECIAL_TEXT)
        else _texts[token]
        for token in tokens
    )


def media_pad(fingerprint: int) -> int:
    """The placeholder id for a media part whose content hashes to ``fingerprint``."""
    return MEDIA_PADS + fingerprint % _MEDIA_PAD_COUNT


class SegmentCache:
    """``encode`` with memory: a conversation sends its whole history again at every turn.

    Keeps the most recently used segments within ``max_tokens`` tokens altogether; ``tokens`` says
    how many that are now.
    """

    def __init__(self, *, max_tokens: int = 8_000_000, min_chars: int = 64) -> None:
        self._max_tokens = max_tokens
        self._min_chars = min_chars
        self.tokens = 0
        self._segments: OrderedDict[str, array[int]] = OrderedDict()

    def encode(self, text: str) -> array[int]:
        """As the module's ``encode``; the caller must not change the result."""
        if len(text) < self._min_chars:
            return encode(text)
        known = self._segments.get(text)
        if known is not None:
            self._segments.move_to_end(text)
            return known
        ids = encode(text)
        self._segments[text] = ids
        self.tokens += len(ids)
        while self.tokens > self._max_tokens and len(self._segments) > 1:
            _, dropped = self._segments.popitem(last=False)
            self.tokens -= len(dropped)
        return ids
