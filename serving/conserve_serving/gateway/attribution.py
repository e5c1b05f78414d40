"""Whose turn a request is: its conversation, and how its prompt stands to that one's last.

What the request says of itself is read by ``identity``; where it names nobody, ``lineage`` tells by
its messages.
"""

from __future__ import annotations

from dataclasses import dataclass

from conserve_serving.gateway.config import IdentitySection
from conserve_serving.gateway.conversations import Conversation, Conversations
from conserve_serving.gateway.identity import Headers, IdentityResolver, Tags
from conserve_serving.gateway.lineage import Lineage, PrefixMark, Relation
from conserve_serving.gateway.request import TurnRequest
from conserve_serving.gateway.sources import LINEAGE, PREVIOUS_RESPONSE, expand


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Whose turn a request is.

    Attributes:
        tags: what it says of itself, with what named its conversation.
        conversation: whose turn it is, open.
        relation: how its prompt stands to the conversation's last one.
        kept_bytes: of that one, how much it keeps.
        mark: its prompt's, to compare the next one with.
    """

    tags: Tags
    conversation: Conversation
    relation: Relation
    kept_bytes: int
    mark: PrefixMark


class Attribution:
    """Finds the conversations of requests, and opens those that are new.

    Args:
        settings: which sources are believed, and how many prompts are remembered.
        conversations: all that are known.
    """

    def __init__(self, settings: IdentitySection, conversations: Conversations) -> None:
        self._conversations = conversations
        self._resolver = IdentityResolver(expand(settings.order, settings.aliases))
        self._lineage: Lineage | None = None
        if self._resolver.lineage:
            self._lineage = Lineage(settings.lineage_entries, conversations.is_running)

    @property
    def lineage_prompts(self) -> int:
        """Prompts remembered to recognise conversations without an id by."""
        return 0 if self._lineage is None else len(self._lineage)

    def tenant(self, headers: Headers) -> str:
        """Whose conversations a request may see: see ``IdentityResolver.tenant``."""
        return self._resolver.tenant(headers)

    def attribute(self, request: TurnRequest, headers: Headers) -> Origin:
        """Find out whose turn a request is.

        Raises:
            InvalidRequestError: an id is illegal.
        """
        original = request.original
        tags = self._resolver.resolve(
            headers,
            request.identity,
            previous=None if original is None else original.continues,
        )
        mark, kept_bytes = PrefixMark(request), 0
        conversation, relation = self._identify(request, tags, mark)
        if tags.turn_index is not None and tags.turn_id is None and conversation.is_new:
            conversation.turns = tags.turn_index - 1  # it lived before this gateway did
        if conversation.mark is not None:
            relation, kept_bytes = conversation.mark.compare(mark, request)
        return Origin(
            tags=tags,
            conversation=conversation,
            relation=relation,
            kept_bytes=kept_bytes,
            mark=mark,
        )

    def forget(self, conversation: Conversation) -> None:
        """It is over: no prompt continues it."""
        if self._lineage is not None:
            self._lineage.forget(conversation.key)

    def _identify(
        self, request: TurnRequest, tags: Tags, mark: PrefixMark
    ) -> tuple[Conversation, Relation]:
        """The turn's conversation, and what its messages alone say of it."""
        id, relation = tags.conversation, Relation.NEW
        if id is not None:
            branches = request.original is not None and request.original.branches
            if branches and tags.source == PREVIOUS_RESPONSE:
                tags.parent, id, relation = id, self._conversations.new_id(), Relation.FORK
            return self._open(id, request, tags), relation
        if self._lineage is None:
            tags.source = "none"
            return self._open(self._conversations.new_id(), request, tags), relation
        tags.source = LINEAGE
        match = self._lineage.match(request, mark, salt=f"{tags.tenant}\0{request.model}")
        relation = match.relation
        known = None if match.conversation is None else self._conversations.get(match.conversation)
        if known is None or known.ended:
            id, relation = self._conversations.new_id(), Relation.NEW
        elif relation is Relation.FORK or (relation is Relation.REPLAY and known.running):
            # The same words at the same time are another conversation, not a retry.
            id, relation = self._conversations.new_id(), Relation.FORK
            tags.parent = tags.parent or known.id
        else:
            id = known.id
        conversation = self._open(id, request, tags)
        self._lineage.remember(conversation.key, match)
        return conversation, relation

    def _open(self, id: str, request: TurnRequest, tags: Tags) -> Conversation:
        return self._conversations.open(id, tags, model=request.model, source=tags.source)
