"""ConServe for LangChain and LangGraph: ``ChatConServe`` in place of ``ChatOpenAI``.

``chat_model`` tags the calls · ``identity`` says which conversation one belongs to · ``lineage``
tells those of one thread apart by their messages.
"""

from langchain_conserve.chat_model import ChatConServe

__all__ = ["ChatConServe"]
