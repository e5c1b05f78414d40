"""Page keys against vectors computed with SGLang 0.5.23's own C++ extension."""

from __future__ import annotations

import hashlib
from array import array

import pytest

from conserve_serving.engines.pages import last_page_key, page_keys

#: Compiled from mem_cache/cpp_utils/hash_binding.cpp; see docs/profiles.md.
IDS = [(i * 7919 + 13) % 151936 for i in range(200)]
SGLANG_PLAIN = [
    "cce582cbf93afa0e7c396d796fde77c3287d25ac17ecbe3b10b849f61f40823b",
    "e4fe1c7900303e537eef1a2eb43a2c9c9d5b80cb2d064ecb450198f48f02ec52",
    "318d23468447e3b70fe08e7bea138d59d92554c1ef082191a25513594a774569",
]
SGLANG_EXTRA_KEY = [
    "39c7f56bc9afa1241a38d0e64c9b88ed8f27eefd58f35b53e3d93ffd8ae5189c",
    "da80eb791975a4fe0fb4b80b2fe688bf1dd70d524b9235e119531c6ae459abb9",
    "a91b273950bec350e3e83358c828ff620a9070fa5fa5efae328f28ba69f9f881",
]
SGLANG_SALT = [
    "1ce63cfafe1543def4dc682dd815f4aeab5124c811366e05c83e27c460c9f7c8",
    "6211c3367acb261a74c26bbe4671f13624c5a09515f369cd6430337c3527f4fe",
    "112e3256d3dbd7f942ed58a0859da709daaed6c743a447f86df9056baa1a5152",
]


def test_keys_are_sglangs() -> None:
    assert [key.hex() for key in page_keys(IDS, 64)] == SGLANG_PLAIN
    with_extra_key = page_keys(IDS, 64, extra_key="tenant-a")
    assert [key.hex() for key in with_extra_key] == SGLANG_EXTRA_KEY
    assert [key.hex() for key in page_keys(IDS, 64, cache_salt="s")] == SGLANG_SALT


def test_layout_is_little_endian_uint32_chained() -> None:
    first = hashlib.sha256(b"".join(i.to_bytes(4, "little") for i in (1, 2))).digest()
    second = hashlib.sha256(first + b"".join(i.to_bytes(4, "little") for i in (3, 4))).digest()
    assert page_keys([1, 2, 3, 4, 5], 2) == [first, second]


def test_array_and_list_agree_and_a_chain_can_be_continued() -> None:
    keys = page_keys(array("I", IDS), 64)
    assert keys == page_keys(IDS, 64)
    assert page_keys(IDS[64:], 64, prior=keys[0]) == keys[1:]


def test_last_page_key_names_whole_pages_only() -> None:
    assert last_page_key(IDS, 64) == SGLANG_PLAIN[-1]
    assert last_page_key(IDS[:192], 64) == SGLANG_PLAIN[-1]
    assert last_page_key(IDS[:63], 64) is None


def test_absent_and_empty_namespace_differ() -> None:
    assert page_keys(IDS, 64) != page_keys(IDS, 64, extra_key="")


@pytest.mark.parametrize("bad", [-1, 2**32])
def test_ids_beyond_32_bits_are_refused(bad: int) -> None:
    with pytest.raises(ValueError, match=r"token_ids holds an id outside"):
        page_keys([1, bad], 1)


def test_page_size_must_be_positive() -> None:
    with pytest.raises(ValueError, match="page_tokens is 0"):
        page_keys([1], 0)
