"""The store's desk and its messages, over a real socket to a real listener."""

from __future__ import annotations

import http.server
import json
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from conserve_serving.engines.sglang.desk import Desk
from conserve_serving.engines.sglang.poster import Poster

WAIT_S = 10.0


class Listener:
    """A gateway that answers with the statuses it is given, then 200."""

    def __init__(self) -> None:
        self.messages: queue.Queue[dict[str, Any]] = queue.Queue()
        self.statuses: list[int] = []
        listener = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                status = listener.statuses.pop(0) if listener.statuses else 200
                if status == 0:
                    self.close_connection = True
                    return
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()
                if status == 200:
                    listener.messages.put(json.loads(body))

            def log_message(self, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/conserve/v1/handoffs"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class Shelf:
    """A transport in memory."""

    def __init__(self) -> None:
        self.pages: set[str] = set()
        self.claims: dict[str, list[str]] = {}
        self.released: list[str] = []
        self.collections = threading.Semaphore(0)
        self.lose_at_claim: str | None = None
        self.trouble: Exception | None = None

    def has(self, key: str) -> bool:
        return key in self.pages

    def claim(self, conversation: str, keys: Sequence[str]) -> list[str]:
        if self.trouble is not None:
            trouble, self.trouble = self.trouble, None
            raise trouble
        self.claims[conversation] = list(keys)
        return [key for key in keys if key == self.lose_at_claim]

    def release(self, conversation: str) -> int:
        self.released.append(conversation)
        return 0

    def collect(self) -> None:
        self.collections.release()


@pytest.fixture
def listener() -> Iterator[Listener]:
    listener = Listener()
    yield listener
    listener.close()


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


@pytest.fixture
def poster(listener: Listener) -> Iterator[Poster]:
    poster = Poster(listener.url, sleep=lambda _: None)
    yield poster
    poster.close()


def make_desk(shelf: Shelf, poster: Poster | None, **more: Any) -> Desk:
    arguments: dict[str, Any] = {
        "engine": "p0",
        "page_tokens": 64,
        "rank": 0,
        "ranks": 1,
        "expect_timeout_s": 30.0,
        "collect_interval_s": None,
        "clock": time.monotonic,
    }
    tell = poster.send if poster is not None else None
    return Desk(shelf, tell=tell, **{**arguments, **more})


@pytest.fixture
def desk(shelf: Shelf, poster: Poster) -> Iterator[Desk]:
    desk = make_desk(shelf, poster)
    yield desk
    desk.close()


def test_a_complete_prompt_is_claimed_and_acknowledged(
    desk: Desk, shelf: Shelf, listener: Listener
) -> None:
    desk.written(["k1"])
    shelf.pages.add("k1")
    desk.expect("c", ["k1", "k2"])
    shelf.pages.add("k2")
    desk.written(["k2"])
    message = listener.messages.get(timeout=WAIT_S)
    assert message.pop("duration_s") >= 0.0
    assert message == {"engine": "p0", "key": "k2", "tokens": 128}
    assert shelf.claims == {"c": ["k1", "k2"]}


def test_a_page_removed_before_it_could_be_claimed_is_told(
    desk: Desk, shelf: Shelf, listener: Listener
) -> None:
    shelf.pages |= {"k1", "k2"}
    shelf.lose_at_claim = "k2"
    desk.expect("c", ["k1", "k2"])
    message = listener.messages.get(timeout=WAIT_S)
    assert (message["tokens"], message["error"]) == (64, "partial_pages")


def test_a_full_store_is_told(desk: Desk, shelf: Shelf, listener: Listener) -> None:
    desk.expect("c", ["k1", "k2"])
    desk.failed(["k1", "k2"], "store_full")
    message = listener.messages.get(timeout=WAIT_S)
    assert (message["tokens"], message["error"]) == (0, "store_full")
    assert shelf.claims == {}


def test_a_rank_says_which_it_is(shelf: Shelf, poster: Poster, listener: Listener) -> None:
    desk = make_desk(shelf, poster, rank=1, ranks=2)
    shelf.pages.add("k1")
    desk.expect("c", ["k1"])
    message = listener.messages.get(timeout=WAIT_S)
    assert (message["rank"], message["ranks"]) == (1, 2)
    desk.close()


def test_ended_conversations_are_released_in_order(desk: Desk, shelf: Shelf) -> None:
    desk.release("a")
    desk.release("b")
    assert desk.flush()
    assert shelf.released == ["a", "b"]


@pytest.mark.parametrize("trouble", [OSError("stale file handle"), RuntimeError("a back end's")])
def test_trouble_of_a_transport_costs_one_prompt_only(
    desk: Desk, shelf: Shelf, listener: Listener, trouble: Exception
) -> None:
    shelf.pages |= {"k1"}
    shelf.trouble = trouble
    desk.expect("a", ["k1"])
    desk.expect("b", ["k1"])
    assert listener.messages.get(timeout=WAIT_S)["key"] == "k1"
    assert shelf.claims == {"b": ["k1"]}


def test_a_reader_tells_nobody_and_still_releases(shelf: Shelf) -> None:
    desk = make_desk(shelf, None)
    shelf.pages.add("k1")
    desk.expect("c", ["k1"])
    desk.release("c")
    assert desk.flush()
    assert shelf.released == ["c"]
    desk.close()


def test_it_collects_by_itself(shelf: Shelf) -> None:
    desk = make_desk(shelf, None, collect_interval_s=0.01)
    assert shelf.collections.acquire(timeout=WAIT_S)
    assert shelf.collections.acquire(timeout=WAIT_S)
    desk.close()


def test_a_prompt_whose_pages_never_come_is_told_in_the_end(
    shelf: Shelf, poster: Poster, listener: Listener
) -> None:
    desk = make_desk(shelf, poster, expect_timeout_s=0.05)
    desk.expect("c", ["k1"])
    assert listener.messages.get(timeout=WAIT_S)["error"] == "partial_pages"
    desk.close()


def test_messages_are_sent_again_and_in_order(poster: Poster, listener: Listener) -> None:
    listener.statuses = [503, 0, 200]
    poster.send({"n": 1})
    poster.send({"n": 2})
    assert [listener.messages.get(timeout=WAIT_S)["n"] for _ in range(2)] == [1, 2]
    poster.close()
    assert (poster.sent, poster.lost) == (2, 0)


def test_a_message_nobody_takes_is_given_up(poster: Poster, listener: Listener) -> None:
    listener.statuses = [400, 503, 503, 503, 503, 503]
    poster.send({"n": 1})  # refused for good
    poster.send({"n": 2})  # five tries
    poster.send({"n": 3})
    assert listener.messages.get(timeout=WAIT_S) == {"n": 3}
    poster.close()
    assert (poster.sent, poster.lost) == (1, 2)


def test_a_gateway_that_is_not_there_costs_no_more_than_the_message() -> None:
    poster = Poster("http://127.0.0.1:9/x", sleep=lambda _: None)
    poster.send({"n": 1})
    poster.close()
    assert (poster.sent, poster.lost) == (0, 1)
