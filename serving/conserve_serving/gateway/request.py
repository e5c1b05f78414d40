"""Requests as the gateway reads them: the few fields it needs, everything else left as bytes.

The body is scanned once (and so checked to be JSON) by a msgspec ``Struct`` that leaves messages,
prompts and tools as ``Raw`` slices; it is forwarded as it came.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from typing import Annotated, Any, Final, TypeVar

import msgspec
from msgspec import UNSET, Raw, UnsetType

from conserve_serving.gateway.errors import InvalidRequestError

_T = TypeVar("_T")

#: Bytes of JSON per prompt token, until a conversation's own ratio has been observed.
DEFAULT_BYTES_PER_TOKEN: Final = 4.0


class Api(enum.Enum):
    """The two completion APIs."""

    CHAT = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"


class IdentityFields(msgspec.Struct):
    """Fields that may carry a conversation id, of any API. Checked where they are used."""

    session_id: Raw | UnsetType = UNSET
    session_params: Raw | UnsetType = UNSET
    conversation: Raw | UnsetType = UNSET
    conversation_id: Raw | UnsetType = UNSET
    prompt_cache_key: Raw | UnsetType = UNSET
    metadata: Raw | UnsetType = UNSET
    litellm_session_id: Raw | UnsetType = UNSET

    def identity(self) -> dict[str, Raw]:
        """Those that are there, raw."""
        return {
            name: value for name in IDENTITY_FIELDS if isinstance(value := getattr(self, name), Raw)
        }


class _Body(IdentityFields):
    """What is read of a request body."""

    model: str | None = None
    stream: bool | None = None
    stream_options: Raw | UnsetType = UNSET
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    messages: Raw | UnsetType = UNSET
    prompt: Raw | UnsetType = UNSET
    tools: Raw | UnsetType = UNSET
    n: int | None = None


_DECODER: Final = msgspec.json.Decoder(_Body)
_IDS: Final = msgspec.json.Decoder(list[Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]])
_MESSAGES: Final = msgspec.json.Decoder(list[Raw])
_ANY: Final = msgspec.json.Decoder()
#: ``Expected `int`, got `str` - at `$.max_tokens```
_FIELD: Final = re.compile(r" - at `\$\.?([^`]*)`")
_HEAD_BYTES: Final = 64
#: A prompt that is one list of numbers.
_TOKEN_IDS: Final = re.compile(rb"\s*\[\s*[-\d]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Original:
    """A request of another API, as far as its translation does not tell.

    Attributes:
        prompt_field: its field that holds the prompt.
        identity: its fields that may carry a conversation id, raw.
        continues: the conversation of the response it continues, where it names one.
        branches: that response has been continued already: this is a fork.
    """

    prompt_field: str
    identity: dict[str, Raw]
    continues: str | None = None
    branches: bool = False


@dataclass(slots=True, kw_only=True)
class TurnRequest:
    """One turn as it was asked for.

    Attributes:
        content: raw JSON of the messages array or the prompt: what the prompt is made of.
        tools: raw JSON of the tools, empty when there are none.
        token_ids: the prompt's token ids, where it was given as such.
        unwrapped: the prompt was the only one of a list; ``content`` is the prompt itself.
        original: what is known of a request that was translated into this one.
        include_usage: the client itself asked for the usage event of a stream.
        stream_options: the client's own, as a mapping.
    """

    api: Api
    body: bytes | bytearray
    model: str
    stream: bool
    stream_options: dict[str, Any] | None
    include_usage: bool
    max_output_tokens: int | None
    content: Raw
    tools: bytes
    token_ids: list[int] | None
    unwrapped: bool
    _parsed: _Body
    original: Original | None = None

    @property
    def prompt_field(self) -> str:
        """The field that holds the prompt."""
        if self.original is not None:
            return self.original.prompt_field
        return "messages" if self.api is Api.CHAT else "prompt"

    @property
    def choices(self) -> int:
        """Completions asked for; at least 1."""
        return max(1, self._parsed.n or 1)

    @property
    def prompts(self) -> int:
        """Prompts in the body: ``/v1/completions`` takes several at once."""
        if self.api is Api.CHAT or self.token_ids is not None or self.content[:1] != b"[":
            return 1
        return len(msgspec.json.decode(self.content))

    def identity(self) -> dict[str, Raw]:
        """Fields of the body that may carry a conversation id, raw."""
        if self.original is not None:
            return self.original.identity
        return self._parsed.identity()

    def messages(self) -> list[Raw]:
        """The messages, each as raw JSON. Only of chat requests."""
        return _MESSAGES.decode(self.content)


def decode_body(body: bytes | bytearray, decoder: msgspec.json.Decoder[_T]) -> _T:
    """Decode a request body.

    Raises:
        InvalidRequestError: not JSON, not UTF-8, or a field of the wrong type; names the field.
    """
    try:
        parsed = decoder.decode(body)
        if not body.isascii():
            body.decode()  # what the decoder left raw goes on to an engine
    except msgspec.ValidationError as error:
        raise wrong_type(error) from error
    except UnicodeDecodeError as error:
        raise InvalidRequestError(
            f"the request body is not valid UTF-8: {error.reason} at byte {error.start}",
            code="invalid_json",
        ) from error
    except msgspec.DecodeError as error:
        raise InvalidRequestError(
            f"the request body is not valid JSON: {error}", code="invalid_json"
        ) from error
    return parsed


def parse_turn(api: Api, body: bytes | bytearray) -> TurnRequest:
    """Read a completion request.

    Args:
        api: which of the two APIs it came in on.
        body: the whole request body.

    Raises:
        InvalidRequestError: not JSON, a field of the wrong type or missing; names the field.
    """
    parsed = decode_body(body, _DECODER)
    if not parsed.model:
        raise InvalidRequestError("model is missing: name the served model", param="model")
    content, token_ids = _content(api, parsed)
    unwrapped = api is Api.COMPLETIONS and content is not parsed.prompt
    options = _stream_options(parsed.stream_options)
    limit = parsed.max_completion_tokens
    if limit is None:
        limit = parsed.max_tokens
    if limit is not None and limit < 0:
        raise InvalidRequestError("max_tokens must not be negative", param="max_tokens")
    return TurnRequest(
        api=api,
        body=body,
        model=parsed.model,
        stream=bool(parsed.stream),
        stream_options=options,
        include_usage=bool(options and options.get("include_usage")),
        max_output_tokens=limit,
        content=content,
        tools=b"" if parsed.tools is UNSET else bytes(parsed.tools),
        token_ids=token_ids,
        unwrapped=unwrapped,
        _parsed=parsed,
    )


#: Body fields that may carry a conversation id, in the order they are believed.
IDENTITY_FIELDS: Final = (
    "session_id",
    "session_params",
    "conversation",
    "conversation_id",
    "prompt_cache_key",
    "metadata",
    "litellm_session_id",
)


def _content(api: Api, parsed: _Body) -> tuple[Raw, list[int] | None]:
    if api is Api.CHAT:
        if not isinstance(parsed.messages, Raw):
            raise InvalidRequestError("messages is missing: send a list", param="messages")
        head = bytes(memoryview(parsed.messages)[:_HEAD_BYTES])  # never a copy of it all
        if not head.startswith(b"["):
            raise InvalidRequestError("messages must be a list", param="messages")
        if head[1:].lstrip().startswith(b"]"):
            raise InvalidRequestError("messages is empty: send at least one", param="messages")
        return parsed.messages, None
    if not isinstance(parsed.prompt, Raw):
        raise InvalidRequestError("prompt is missing: send text or token ids", param="prompt")
    return _prompt(parsed.prompt, listed=False)


def _prompt(prompt: Raw, *, listed: bool) -> tuple[Raw, list[int] | None]:
    """Text or token ids; or the only one in a list of such prompts, unless ``listed`` already."""
    head = bytes(memoryview(prompt)[:_HEAD_BYTES]).lstrip()
    if head.startswith(b'"'):
        return prompt, None
    if _TOKEN_IDS.match(head):
        return prompt, _token_ids(prompt)
    if head.startswith(b"["):
        items = _MESSAGES.decode(prompt)
        if not items:
            raise InvalidRequestError("prompt is empty: send text or token ids", param="prompt")
        first = bytes(memoryview(items[0])[:1])
        if first.isdigit() or first == b"-":  # far behind its bracket
            return prompt, _token_ids(prompt)
        if len(items) == 1 and not listed:
            return _prompt(items[0], listed=True)
        if len(items) > 1:
            raise InvalidRequestError(
                "a list of prompts is several conversations: send one request for each",
                param="prompt",
            )
    raise InvalidRequestError("prompt must be text or a list of token ids", param="prompt")


def _token_ids(prompt: Raw) -> list[int]:
    try:
        return _IDS.decode(prompt)
    except msgspec.DecodeError as error:
        raise InvalidRequestError(
            f"prompt is not a list of token ids: {error}", param="prompt"
        ) from error


def _stream_options(raw: Raw | UnsetType) -> dict[str, Any] | None:
    if not isinstance(raw, Raw):
        return None
    options = _ANY.decode(raw)
    if options is not None and not isinstance(options, dict):
        raise InvalidRequestError("stream_options must be an object", param="stream_options")
    return options


def wrong_type(error: msgspec.ValidationError, where: str = "") -> InvalidRequestError:
    """The error for a field of the wrong type; ``where`` is the place of what was decoded."""
    text = str(error)
    found = _FIELD.search(text)
    field = found.group(1) if found else ""
    detail = _FIELD.sub("", text)
    if where:
        field = f"{where}.{field}".rstrip(".").replace(".[", "[")
    if not field:
        return InvalidRequestError(f"the request body must be a JSON object: {detail}")
    return InvalidRequestError(f"{field}: {detail}", param=field)
