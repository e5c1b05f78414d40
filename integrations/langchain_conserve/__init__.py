"""ConServe for LangChain and LangGraph: ``ChatConServe`` in place of ``ChatOpenAI``.

``chat_model`` tags the calls · ``middleware`` tags those of a model that stays what it is, and says
when an agent is idle or over · ``identity`` says which conversation a call belongs to · ``lineage``
tells those of one thread apart by their messages.
"""

from typing import TYPE_CHECKING, Any

from langchain_conserve.chat_model import ChatConServe

if TYPE_CHECKING:
    from langchain_conserve.middleware import ConversationMiddleware

__all__ = ["ChatConServe", "ConversationMiddleware"]


def __getattr__(name: str) -> Any:
    # ChatConServe needs langchain-core alone; the middleware needs langchain and langgraph.
    if name == "ConversationMiddleware":
        from langchain_conserve.middleware import (  # noqa: PLC0415 - see above
            ConversationMiddleware,
        )

        return ConversationMiddleware
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
