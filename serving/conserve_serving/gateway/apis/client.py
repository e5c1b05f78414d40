"""The client of a turn whose API is not chat completions: hears the same answer, translated."""

from __future__ import annotations

from conserve_serving.gateway.apis.chat import Answer
from conserve_serving.gateway.errors import UpstreamError
from conserve_serving.gateway.relay import Client, Headers


class TranslatedClient:
    """A ``relay.Client`` that passes a chat completion on in another API's form.

    Streams are translated as they arrive and never held back beyond an event; what is not
    streamed, errors among it, is translated when it is whole.

    Args:
        client: receives the translation.
        answer: translates.
        stream: whether the client asked for a stream.
        headers: further headers of the response.
    """

    def __init__(self, client: Client, answer: Answer, *, stream: bool, headers: Headers) -> None:
        self._client = client
        self._answer = answer
        self._streams = stream
        self._headers = headers
        self._held: tuple[int, Headers, bytes] | None = None
        self._parts: list[bytes] = []

    @property
    def started(self) -> bool:
        """Whether a response has been begun."""
        return self._held is not None or self._client.started

    def start(self, status: int, headers: Headers, block: bytes = b"") -> None:
        """See ``relay.Client``."""
        headers = [*(h for h in headers if h[0] != b"content-length"), *self._headers]
        if self._streams and status == 200:
            self._client.start(status, headers, block)
        else:
            self._held = (status, headers, block)

    def send(self, data: bytes) -> bool:
        """See ``relay.Client``."""
        if self._held is not None:
            self._parts.append(data)
            return True
        out = self._answer.feed(data)
        return self._client.send(out) if out else True

    async def drained(self) -> None:
        """See ``relay.Client``."""
        await self._client.drained()

    def finish(self, data: bytes = b"") -> None:
        """See ``relay.Client``."""
        held, self._held = self._held, None
        if held is None:
            if self._client.started:
                self._client.finish(self._answer.feed(data) + self._answer.end())
            return
        status, headers, block = held
        data = b"".join([*self._parts, data])
        if status == 200:
            try:
                body = self._answer.read(data)
            except UpstreamError as error:
                status, body = error.status, self._answer.error_body(error.status, error.body())
        else:
            body = self._answer.error_body(status, data)
        self._client.start(status, [*headers, (b"content-length", b"%d" % len(body))], block)
        self._client.finish(body)
