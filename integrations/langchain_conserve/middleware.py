"""``ConversationMiddleware``: conversations for agents whose model stays what it is."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, NotRequired

from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.messages.utils import convert_to_openai_messages
from langchain_core.utils.function_calling import convert_to_openai_tool
from langchain_openai.chat_models.base import BaseChatOpenAI

from conserve_agents import ConServeError, Conversation, Gateway, TokenCounter, wire
from conserve_agents.conversation import end_all
from conserve_agents.gateway import default_api_key
from conserve_agents.logs import warn_once
from langchain_conserve import identity
from langchain_conserve.chat_model import ChatConServe
from langchain_conserve.identity import Call, call_site, run_thread
from langchain_conserve.runs import Runs

try:
    from langchain.agents.middleware.types import (
        AgentMiddleware,
        AgentState,
        ModelRequest,
        ModelResponse,
        PrivateStateAttr,
        ToolCallRequest,
    )
    from langgraph.runtime import Runtime
except ImportError as error:
    raise ImportError(
        "ConversationMiddleware needs LangGraph: pip install 'conserve-agents[langgraph]'"
    ) from error

#: The node that ``create_agent`` runs tools in: an agent below it lives as long as the tool call.
_TOOLS: Final = "tools"
_OPENAI: Final = "https://api.openai.com"
#: What telling conversations apart can fail with, should LangChain's insides change.
_TAGGING_ERRORS: Final = (ConServeError, AttributeError, LookupError, TypeError, ValueError)


class ConversationState(AgentState[Any]):
    """The agent's state with the thread of a run that was given none."""

    conserve_thread: NotRequired[Annotated[str, PrivateStateAttr]]


class ConversationMiddleware(AgentMiddleware[ConversationState, Any, Any]):
    """Tags an agent's model calls, and says when the agent is idle and when it is over.

        create_agent(ChatOpenAI(base_url=…), tools, middleware=[ConversationMiddleware()])

    The model stays as it is: any ``ChatOpenAI`` that is pointed at a ConServe gateway.
    ``ChatConServe`` tags by itself and gets the signals only. The run's ``thread_id`` names the
    conversation, as for ``ChatConServe``. A run without one is a conversation of its own, and goes
    on in the one whose history it brings back.

    Signals: when the agent has answered, its conversation is *idle* (its KV is the first to be
    parked when memory is short); a sub-agent that ran in a tool call is over, and ends. An
    exception or an interrupt sends no signal. Threads are ended by :meth:`end_thread`.

    Args:
        gateway: for signals; None: where the agent's model calls go, with the model's key.
        token_counter: counts first turns; None: bytes / 4. One that does I/O is run on a worker
            thread by async agents.
        end_after_run: end the conversation whenever the agent has answered: for one-shot runs.

    Raises:
        GatewayUrlError: ``gateway`` is not an http or https URL.
    """

    state_schema = ConversationState

    def __init__(
        self,
        *,
        gateway: Gateway | str | None = None,
        token_counter: TokenCounter | None = None,
        end_after_run: bool = False,
    ) -> None:
        super().__init__()
        self._gateway: Final = Gateway(gateway) if isinstance(gateway, str) else gateway
        self._counter: Final = token_counter
        self._end_after_run: Final = end_after_run
        self._runs: Final = Runs()
        #: The gateways that calls went to, by account.
        self._met: Final[dict[str, Gateway]] = {}

    # --- the run -----------------------------------------------------------------------------

    # The hooks' second argument is LangChain's to name; what it holds is not needed.

    def before_agent(
        self,
        state: ConversationState,
        runtime: Runtime[Any],  # noqa: ARG002 - see above
    ) -> dict[str, Any] | None:
        """Give a run a thread, where nothing names its conversation."""
        site = call_site()
        if site.explicit is not None or site.thread_id is not None:
            return None
        return {"conserve_thread": self._runs.thread_of(state["messages"])}

    async def abefore_agent(
        self, state: ConversationState, runtime: Runtime[Any]
    ) -> dict[str, Any] | None:
        """:meth:`before_agent`, on the event loop: it does no I/O."""
        return self.before_agent(state, runtime)

    def after_agent(
        self,
        state: ConversationState,
        runtime: Runtime[Any],  # noqa: ARG002 - see above
    ) -> None:
        """The agent has answered: say so."""
        for gateway, talk, over in self._left(state):
            if over:
                talk.end()
            else:
                _idle(gateway, talk)

    async def aafter_agent(
        self,
        state: ConversationState,
        runtime: Runtime[Any],  # noqa: ARG002 - see above
    ) -> None:
        """:meth:`after_agent` without blocking the event loop."""
        left = self._left(state)
        for gateway, talk, over in left:
            await (talk.aend() if over else asyncio.to_thread(_idle, gateway, talk))

    def _left(self, state: ConversationState) -> list[tuple[Gateway, Conversation, bool]]:
        """The conversation that this agent leaves, at which gateway, and whether it is over."""
        own = state.get("conserve_thread")
        if own is not None:
            self._runs.remember(own, state["messages"])
        with run_thread(own):
            site = call_site()
        over = self._end_after_run or site.agent.rpartition("|")[2].partition(":")[0] == _TOOLS
        found = [
            (gateway, identity.known.latest(site, gateway=account))
            for account, gateway in self._met.items()
        ]
        return [(gateway, talk, over) for gateway, talk in found if talk is not None]

    # --- model calls -------------------------------------------------------------------------

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ModelResponse[Any]:
        """Tag the call."""
        with run_thread(_thread(request.state)):
            turn = self._turn(request)
            if turn is None:
                return handler(request)
            with turn.followed():
                return turn.answered(handler(turn.request))

    async def awrap_model_call(
        self,
        request: ModelRequest[Any],
        handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]],
    ) -> ModelResponse[Any]:
        """Tag the call."""
        with run_thread(_thread(request.state)):
            counts = self._counter is not None and self._counter.blocking
            turn = await asyncio.to_thread(self._turn, request) if counts else self._turn(request)
            if turn is None:
                return await handler(request)
            with turn.followed():
                return turn.answered(await handler(turn.request))

    def _turn(self, request: ModelRequest[Any]) -> _Turn | None:
        """The call with its tag; None where it is to be left as it is. Never raises."""
        try:
            account = _account(request.model)
            if account is None:
                warn_once(
                    "model",
                    "calls of %s are not tagged: point a ChatOpenAI at the gateway (base_url)",
                    type(request.model).__name__,
                )
                return None
            if account not in self._met:
                self._met[account] = self._gateway or _gateway_of(request.model)
            return (
                None if isinstance(request.model, ChatConServe) else self._tagged(request, account)
            )
        except _TAGGING_ERRORS as error:
            warn_once("tag", "model call sent untagged, for tagging it failed: %r", error)
            return None

    def _tagged(self, request: ModelRequest[Any], account: str) -> _Turn | None:
        model: Any = request.model
        given = dict(request.model_settings.get("extra_headers") or {})
        defaults = model.default_headers or {}
        taken = wire.CONVERSATION_ID.lower()
        if any(name.lower() == taken for name in (*given, *defaults)):
            return None
        messages: list[BaseMessage] = list(request.messages)
        if request.system_message is not None:
            messages.insert(0, request.system_message)
        call = identity.known.begin(call_site(), messages, gateway=account)
        if call is None:
            return None
        try:
            talk = call.conversation
            talk.use_gateway(lambda: self._met[account])
            tools = _schemas(request.tools) if talk.turns <= 1 else None
            tags = talk.headers_for(_prompt(talk, messages), tools, counter=self._counter)
            settings = {**request.model_settings, "extra_headers": {**given, **tags}}
            changed: dict[str, Any] = {"model_settings": settings}
            # The next turn echoes what the answer's headers say of the placement. (With a
            # response format langchain-openai has none to show, and warns.)
            hidden = not model.include_response_headers and request.response_format is None
            if hidden:
                changed["model"] = model.model_copy(update={"include_response_headers": True})
            return _Turn(call, request.override(**changed), messages, hide_headers=hidden)
        except BaseException:  # whatever it was, the call is not running; raised again
            call.end()
            raise

    # --- tool calls --------------------------------------------------------------------------

    def wrap_tool_call(
        self, request: ToolCallRequest, handler: Callable[[ToolCallRequest], Any]
    ) -> Any:
        """What a tool calls belongs to the run, too."""
        with run_thread(_thread(request.state)):
            return handler(request)

    async def awrap_tool_call(
        self, request: ToolCallRequest, handler: Callable[[ToolCallRequest], Awaitable[Any]]
    ) -> Any:
        """What a tool calls belongs to the run, too."""
        with run_thread(_thread(request.state)):
            return await handler(request)

    # --- the end -----------------------------------------------------------------------------

    def end_thread(self, thread_id: str) -> int:
        """End a thread's conversations at the gateway, its sub-agents' included. Never raises.

        Returns:
            How many the gateway confirmed.
        """
        return sum(
            end_all(identity.known.forget(str(thread_id), gateway=account))
            for account in list(self._met)
        )

    async def aend_thread(self, thread_id: str) -> int:
        """:meth:`end_thread` without blocking the event loop."""
        return await asyncio.to_thread(self.end_thread, thread_id)


@dataclass(frozen=True, slots=True)
class _Turn:
    """A tagged call: what is sent, and what is to be noted when it comes back."""

    call: Call
    request: ModelRequest[Any]
    messages: list[BaseMessage]
    hide_headers: bool

    @property
    def _turn_id(self) -> str | None:
        value: str | None = self.request.model_settings["extra_headers"].get(wire.TURN_ID)
        return value

    @contextlib.contextmanager
    def followed(self) -> Iterator[None]:
        """Note that the call has come back, and if it failed: made again, it is the same turn."""
        try:
            yield
        except BaseException:  # cancelled and interrupted calls were not answered either
            if self._turn_id is not None:
                talk = self.call.conversation
                talk.failed(self._turn_id, _prompt(talk, self.messages))
            raise
        finally:
            self.call.end()

    def answered(self, response: ModelResponse[Any]) -> ModelResponse[Any]:
        """Read the answer's headers, and leave none of them in the messages unless asked for."""
        headers: dict[str, str] = {}
        for message in getattr(response, "result", ()):
            shown = message.response_metadata.get("headers")
            if isinstance(shown, dict):
                headers = shown
                if self.hide_headers:
                    del message.response_metadata["headers"]
        if headers and self._turn_id is not None:
            self.call.conversation.observe(headers, turn_id=self._turn_id)
        return response


def _prompt(talk: Conversation, messages: list[BaseMessage]) -> list[dict[str, Any]]:
    """The messages as the conversation wants them: in full for its first turn, which is counted;
    later what tells turns apart, for a long history is not cheap to convert."""
    if talk.turns <= 1:
        whole: list[dict[str, Any]] = convert_to_openai_messages(messages)
        return whole
    return [
        {
            "role": "assistant" if isinstance(message, AIMessage) else message.type,
            "content": message.content,
            "calls": message.tool_calls if isinstance(message, AIMessage) else None,
        }
        for message in messages
    ]


def _schemas(tools: Sequence[Any]) -> list[dict[str, Any]] | None:
    return [t if isinstance(t, dict) else convert_to_openai_tool(t) for t in tools] or None


def _thread(state: Any) -> str | None:
    """The thread that the run was given by :meth:`ConversationMiddleware.before_agent`."""
    found = state.get("conserve_thread") if isinstance(state, dict) else None
    return found if isinstance(found, str) else None


def _account(model: Any) -> str | None:
    """Where a model's calls go, and whose; None where that is no gateway, or cannot be tagged."""
    if not isinstance(model, BaseChatOpenAI):
        return None
    address = _address(model)
    known = address and not address.startswith(_OPENAI)
    return identity.account(address, model.openai_api_key) if known else None


def _address(model: Any) -> str:
    return str(getattr(model.root_client, "base_url", None) or model.openai_api_base or "")


def _gateway_of(model: Any) -> Gateway:
    key = getattr(model.root_client, "api_key", None) or default_api_key()
    return Gateway(_address(model), headers={"Authorization": f"Bearer {key}"})


def _idle(gateway: Gateway, talk: Conversation) -> None:
    """Tell the gateway that an agent waits for its user. Never raises: it is a hint."""
    try:
        gateway.idle_conversation(talk.id)
    except ConServeError as error:
        warn_once(f"idle {gateway.root}", "%s was not reported idle: %s", talk.id, error)
