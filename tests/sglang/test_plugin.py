"""What our store and plug-in refuse, inside real engines."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest

pytestmark = pytest.mark.sglang


@pytest.mark.parametrize("bad", [-1, 2048, 2**31])
@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
def test_token_ids_outside_the_vocabulary_are_refused(bed: Any, path: str, bad: int) -> None:
    """SGLang's scheduler would die of them, and the gateway's next attempt kill another one."""
    ids = [400, bad, 401]
    body = {"input_ids": ids} if path == "/generate" else {"model": "tiny", "prompt": ids}
    status, text = bed.decoders[0].call("POST", path, body)
    assert status == 400
    assert f"input_ids holds {bad}: this model's token ids are 0 to 2047" in text.decode()
    assert bed.decoders[0].call("GET", "/health")[0] == 200


def test_the_gateway_passes_the_refusal_on_and_every_engine_lives(gateway: Any, bed: Any) -> None:
    reply = gateway.complete("bad", [*range(300, 400), 5000], 4)
    assert reply.status == 400
    assert "this model's token ids are 0 to 2047" in reply.json()["error"]["message"]
    assert all(engine.alive for engine in bed.engines.values())
    assert gateway.complete("bad", list(range(300, 400)), 4).status == 200


def test_an_engine_of_another_layout_refuses_to_start(sglang_testbed: Any) -> None:
    bed = sglang_testbed
    stamp = json.loads((bed.store / "tiny" / "stamp.json").read_text())
    assert stamp["page_tokens"] == bed.page_tokens
    odd = bed.make("odd", "decode", ["--page-size", "32"])
    odd.start()
    try:
        with contextlib.suppress(Exception):  # how the bed says that it ended
            odd.wait_ready()
        said = odd.log.read_text(errors="replace")
    finally:
        odd.kill()
    assert "ConServe hand-off store: page_tokens is 32 here and 16 in" in said
    assert "start all engines with the same page_tokens" in said
