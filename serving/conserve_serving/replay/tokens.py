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


def fresh_ids(count: int, *, seed: int, conversation: str, turn: int) -> list[int]:
    """``count`` token ids that depend on the arguments and on nothing else.

    Args:
        count: how many.
        seed, conversation, turn: what names the ids; another turn gets unrelated ones, so that
            no prefix cache can help where the trace says the text is new.
    """
    if count <= 0:
        return []
    rng = random.Random(f"{seed}/{conversation}/{turn}")  # noqa: S311 - a workload, not a secret
    # All ids at once, 16 bits each, in one long integer: 50 times as fast as one by one, and a
    # prompt is made while others are being timed.
    draws = rng.getrandbits(16 * count) & _repeated(ID_COUNT - 1, count)
    ids = array("H")
    ids.frombytes((draws + _repeated(FIRST_ID, count)).to_bytes(2 * count, sys.byteorder))
    return ids.tolist() if sys.byteorder == "little" else ids.tolist()[::-1]


def _repeated(value: int, count: int) -> int:
    """``value`` in each of ``count`` 16-bit places."""
    return int.from_bytes(value.to_bytes(2, "little") * count, "little")
