"""Page keys: the chained hashes under which SGLang's hierarchical cache stores KV pages.

Layout, read in SGLang 0.5.23 (``mem_cache/cpp_utils/hash_binding.cpp``, ``mem_cache/utils.py``):
a page's key is ``SHA-256(previous key ‖ token ids as little-endian uint32)``, 32 raw bytes; the
first page has no previous key unless the request has a namespace (``extra_key``, ``cache_salt``),
whose SHA-256 then stands in its place. Because keys are chained, two prompts whose keys agree at
one page agree in everything before it.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Sequence
from typing import Final

_NAMESPACE_TAG: Final = b"sglang-cache-namespace-v1"


def namespace_seed(extra_key: str | None, cache_salt: str | None = None) -> bytes:
    """The digest that starts a namespaced chain; empty when there is no namespace.

    Presence and UTF-8 length are hashed with each part, so absent and empty differ.
    """
    if extra_key is None and cache_salt is None:
        return b""
    digest = hashlib.sha256(_NAMESPACE_TAG)
    for part in (extra_key, cache_salt):
        if part is None:
            digest.update(b"\x00")
        else:
            encoded = part.encode()
            digest.update(b"\x01" + len(encoded).to_bytes(8, "little") + encoded)
    return digest.digest()


def page_keys(
    token_ids: Sequence[int],
    page_tokens: int,
    *,
    extra_key: str | None = None,
    cache_salt: str | None = None,
    prior: bytes | None = None,
) -> list[bytes]:
    """Keys of the full pages of a prompt, in order; an incomplete last page has none.

    Args:
        token_ids: token ids, each in [0, 2**32). An ``array("I")`` is read without a copy.
        page_tokens: page size in tokens.
        extra_key, cache_salt: the request's cache namespace.
        prior: key of the page before ``token_ids[0]``, to continue a chain.

    Returns:
        ``len(token_ids) // page_tokens`` keys of 32 bytes.

    Raises:
        ValueError: ``page_tokens`` is not positive, or a token id does not fit in 32 bits.
    """
    if page_tokens <= 0:
        raise ValueError(f"page_tokens is {page_tokens}: give a positive page size")
    raw = memoryview(token_array(token_ids)).cast("B")
    width = 4 * page_tokens
    key = namespace_seed(extra_key, cache_salt) if prior is None else prior
    sha256 = hashlib.sha256
    keys = []
    for start in range(0, len(raw) - width + 1, width):
        digest = sha256(key)
        digest.update(raw[start : start + width])
        key = digest.digest()
        keys.append(key)
    return keys


def last_page_key(
    token_ids: Sequence[int],
    page_tokens: int,
    *,
    extra_key: str | None = None,
    cache_salt: str | None = None,
) -> str | None:
    """Hex key of the last full page, which names the whole prompt; None below one page."""
    keys = page_keys(token_ids, page_tokens, extra_key=extra_key, cache_salt=cache_salt)
    return keys[-1].hex() if keys else None


def token_array(token_ids: Sequence[int]) -> array[int]:
    """The ids as little-endian ``array("I")`` (the same object where it is one already).

    Raises:
        ValueError: a token id is negative or does not fit in 32 bits.
    """
    if isinstance(token_ids, array) and token_ids.typecode == "I":
        ids = token_ids
    else:
        try:
            ids = array("I", token_ids)
        except OverflowError as error:
            raise ValueError("token_ids holds an id outside [0, 2**32)") from error
    if sys.byteorder == "big":
        ids = array("I", ids)
        ids.byteswap()
    return ids
