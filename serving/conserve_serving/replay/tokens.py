"""Token ids for prompts: reproducible, and different for every turn of every conversation."""

from __future__ import annotations

import random
import sys
from array import array
from typing import Final

#: Ids drawn lie in [FIRST_ID, FIRST_ID + ID_COUNT): ordinary words in every vocabulary in use
#: (the smallest common one has 32,000 ids; special tokens sit below 1,000 or at the top).
FIRST_ID: Final = 1_000
ID_COUNT: Final = 1 << 14


def id_range(vocabulary: int | None) -> tuple[int, int]:
    """First id and number of ids to draw from, a power of two.

    Args:
        vocabulary: ids of the model; None: as many as any model in use has.

    Raises:
        ValueError: the vocabulary is too small to draw from.
    """
    if vocabulary is None or vocabulary >= FIRST_ID + ID_COUNT:
        return FIRST_ID, ID_COUNT
    if vocabulary < 2:
        raise ValueError(f"vocabulary is {vocabulary}: give the model's, at least 2")
    count = 1 << ((vocabulary // 2).bit_length() - 1)  # the upper half: special tokens sit below
    return vocabulary - count, count


def fresh_ids(
    count: int, *, seed: int, conversation: str, turn: int, vocabulary: int | None = None
) -> list[int]:
    """``count`` token ids that depend on the arguments and on nothing else.

    Args:
        count: how many.
        seed, conversation, turn: what names the ids; another turn gets unrelated ones, so that
            no prefix cache can help where the trace says the text is new.
        vocabulary: see `id_range`.
    """
    if count <= 0:
        return []
    first, kinds = id_range(vocabulary)
    rng = random.Random(f"{seed}/{conversation}/{turn}")  # noqa: S311 - a workload, not a secret
    # All ids at once, 16 bits each, in one long integer: 50 times as fast as one by one, and a
    # prompt is made while others are being timed.
    draws = rng.getrandbits(16 * count) & _repeated(kinds - 1, count)
    ids = array("H")
    ids.frombytes((draws + _repeated(first, count)).to_bytes(2 * count, sys.byteorder))
    return ids.tolist() if sys.byteorder == "little" else ids.tolist()[::-1]


def _repeated(value: int, count: int) -> int:
    """``value`` in each of ``count`` 16-bit places."""
    return int.from_bytes(value.to_bytes(2, "little") * count, "little")
