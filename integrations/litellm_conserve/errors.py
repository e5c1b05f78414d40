"""LiteLLM's exceptions for what the SDK raises, so that its retries and cooldowns work.

    gateway or SDK                         LiteLLM                       retried, cooled down
    400                                    BadRequestError               no
    400 context_length_exceeded            ContextWindowExceededError    no (its own fallbacks)
    400 content_policy_violation           ContentPolicyViolationError   no (its own fallbacks)
    401                                    AuthenticationError           no
    403                                    PermissionDeniedError         no
    404                                    NotFoundError                 no
    408, 504, no answer in time            Timeout                       yes
    409                                    APIError                      yes
    429                                    RateLimitError                yes
    502                                    BadGatewayError               yes
    503                                    ServiceUnavailableError       yes
    500, refused, broken off               InternalServerError           yes
    other 4xx                              BadRequestError               no
    other 5xx, not a chat completion       APIError                      yes

A refused connection is an InternalServerError because that is what LiteLLM's own ``openai/``
provider makes of it, and because its Router does not cool down what raised APIConnectionError.
"""

from __future__ import annotations

from typing import Any, Final

import litellm
import openai

PROVIDER: Final = "conserve"

#: By status; built with (message, llm_provider, model, response).
_BY_STATUS: Final[dict[int, Any]] = {
    401: litellm.AuthenticationError,
    403: litellm.PermissionDeniedError,
    404: litellm.NotFoundError,
    429: litellm.RateLimitError,
    500: litellm.InternalServerError,
    502: litellm.BadGatewayError,
    503: litellm.ServiceUnavailableError,
}
#: By the error's own code, whatever the status.
_BY_CODE: Final[dict[str, Any]] = {
    "context_length_exceeded": litellm.ContextWindowExceededError,
    "content_policy_violation": litellm.ContentPolicyViolationError,
}
_TIMEOUTS: Final = (408, 504)
#: The SDK passes on what its HTTP library raises while a stream is read; it is httpx in openai 2,
#: httpx2 in 3.
_TRANSPORTS: Final = frozenset({"httpx", "httpx2", "httpcore", "httpcore2"})


def is_transport_error(error: BaseException) -> bool:
    """Whether an HTTP library raised it."""
    return type(error).__module__.partition(".")[0] in _TRANSPORTS


def to_litellm(error: Exception, *, model: str) -> Exception:
    """LiteLLM's exception for one of the SDK or its HTTP library; any other as it is."""
    if not (isinstance(error, openai.OpenAIError) or is_transport_error(error)):
        return error
    response = getattr(error, "response", None)
    mapped = _mapped(error, getattr(error, "status_code", None), model, response)
    # Where LiteLLM looks for Retry-After.
    mapped.litellm_response_headers = getattr(response, "headers", None)
    known: Exception = mapped
    return known


def not_a_completion(model: str, address: str, answer: object) -> Exception:
    """An answer that the SDK let through, but that is no chat completion."""
    mapped: Exception = _api_error(
        f"{address} answered with {type(answer).__name__}, not a chat completion: is api_base (or "
        "CONSERVE_BASE_URL) the gateway's address?",
        status=500,
        model=model,
    )
    return mapped


def bad_parameter(name: str, problem: object, *, model: str) -> Exception:
    """A parameter of LiteLLM's call that cannot be used."""
    mapped: Exception = litellm.BadRequestError(
        message=f"ConServe: {name}: {problem}", model=model, llm_provider=PROVIDER
    )
    return mapped


def _mapped(error: Exception, status: int | None, model: str, response: Any) -> Any:
    text = str(getattr(error, "message", "") or error) or type(error).__name__
    common = {"message": f"ConServe: {text}", "model": model, "llm_provider": PROVIDER}
    if isinstance(error, openai.APITimeoutError) or (
        status is None and "Timeout" in type(error).__name__
    ):
        return litellm.Timeout(**common)
    if status in _TIMEOUTS:
        return litellm.Timeout(**common, exception_status_code=status)
    by_code = _BY_CODE.get(str(getattr(error, "code", None)))
    if by_code is not None:
        return by_code(**common, response=response)
    if status is None:  # no answer, or one that broke off
        return litellm.InternalServerError(**common, response=response)
    if status in _BY_STATUS:
        return _BY_STATUS[status](**common, response=response)
    if status == 409 or not 400 <= status < 500:
        return _api_error(common["message"], status=max(status, 409), model=model)
    return litellm.BadRequestError(**common, response=response)


def _api_error(message: str, *, status: int, model: str) -> Any:
    return litellm.APIError(status_code=status, message=message, llm_provider=PROVIDER, model=model)
