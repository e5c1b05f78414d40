"""The books: which conversation's KV is where, what is promised to running turns, what is free.

Rules, kept by construction and checked by `core.audit`:

- ``held = resident + reserved`` never exceeds an engine's capacity, and nothing is ever negative.
  Amounts are whole pages.
- A conversation's KV is on one engine, its *home*, on the device (`resident`) or parked in the
  home's host memory (`parked`), never both.
- Only idle conversations are parked, those that wait for a person before those that wait for a
  tool, the longest idle first among each, and only while the host tier has room: parked KV is
  never dropped for another conversation's sake.
- An engine cannot hold more than it has. When a turn turns out longer than reserved, room is made
  by parking; what still does not fit was not kept by the engine either, and is not booked.

A lost engine's books are thrown away whole: conversations find out when they look at their home.
"""

from __future__ import annotations

from conserve_serving.core.errors import InvariantError
from conserve_serving.core.growth import age_of
from conserve_serving.core.state import ConversationState, EngineState, TurnState

# Conversations too large for what is left of the host tier that are looked past.
_PARK_SCAN = 32


# --- running turns ---------------------------------------------------------------------------
def start_turn(turn: TurnState, decoder: EngineState, *, need_tokens: int) -> None:
    """Book a turn on its decoder: ``need_tokens`` beyond what is resident there already."""
    conversation = turn.conversation
    turn.decoder = decoder
    turn.reserved = need_tokens
    turn.context = decoder.pages(turn.prompt_tokens)
    decoder.reserved_tokens += need_tokens
    decoder.active_turns += 1
    decoder.active_tokens += turn.context
    decoder.placed_turns += 1
    decoder.turns[turn.id] = turn
    if conversation.home is not decoder:
        _settle_home(conversation, decoder)
    elif decoder.idle.pop(conversation.id, None) is not None:
        decoder.idle_tokens -= conversation.resident
    if conversation.parked:  # coming back to the device: part of ``need_tokens`` becomes resident
        _unpark(conversation, turn)
    conversation.active += 1


def start_prefill(turn: TurnState, prefiller: EngineState, *, need_tokens: int) -> None:
    """Book a turn's prompt on the prefiller until it has been handed over."""
    turn.prefiller = prefiller
    turn.prefill_reserved = need_tokens
    prefiller.reserved_tokens += need_tokens
    prefiller.handing_over_tokens += need_tokens
    prefiller.placed_turns += 1
    prefiller.turns[turn.id] = turn


def add_backlog(engine: EngineState, turn: TurnState, tokens: int) -> None:
    turn.backlog = tokens
    engine.prefill_backlog_tokens += tokens
    if turn.index > 1:
        engine.tail_backlog_tokens += tokens


def end_backlog(engine: EngineState | None, turn: TurnState) -> None:
    """The prompt is prefilled, or nobody waits for it any more."""
    if engine is not None and turn.backlog:
        engine.prefill_backlog_tokens -= turn.backlog
        if turn.index > 1:
            engine.tail_backlog_tokens -= turn.backlog
        engine.prefilled_turns += 1
    turn.backlog = 0


def correct_prompt(turn: TurnState, prompt_tokens: int) -> int:
    """The prompt's exact length is known: book the difference, as far as there is room for it.

    Returns:
        Tokens that became free on the decoder.
    """
    decoder = turn.decoder
    if decoder is None:
        return 0
    context = decoder.pages(prompt_tokens)
    more = max(min(context - turn.context, decoder.free_tokens), -turn.reserved)
    turn.reserved += more
    decoder.reserved_tokens += more
    decoder.active_tokens += context - turn.context
    turn.context = context
    turn.prompt_tokens = prompt_tokens
    return -more


def start_egress(turn: TurnState) -> None:
    """The prompt is computed and its KV is on the prefiller's link."""
    if turn.prefiller is not None:
        turn.leaving = turn.moving_tokens
        turn.prefiller.egress_tokens += turn.leaving


def end_prefill(turn: TurnState) -> EngineState | None:
    """Take the turn off its prefiller's books; returns the prefiller."""
    prefiller = turn.prefiller
    if prefiller is not None:
        prefiller.egress_tokens -= turn.leaving
        turn.leaving = 0
        prefiller.reserved_tokens -= turn.prefill_reserved
        prefiller.handing_over_tokens -= turn.prefill_reserved
        prefiller.turns.pop(turn.id, None)
    turn.prefill_reserved = 0
    turn.prefiller = None
    return prefiller


def lend(turn: TurnState) -> None:
    """Book the KV at the conversation's home on the turn, which copies it to where it will live.

    The conversation has no home until the turn is started elsewhere; what it had stays reserved
    here until `end_source` or `take_back`.
    """
    conversation, home = turn.conversation, turn.conversation.home
    if home is None:
        raise InvariantError(f"conversation {conversation.id} has no KV to be copied")
    resident, parked = conversation.resident, conversation.parked
    leave_home(conversation)
    turn.source, turn.source_reserved, turn.source_parked = home, resident, parked
    home.reserved_tokens += resident
    if parked:
        home.parked_tokens += parked
        home.parked_conversations += 1
    home.turns[turn.id] = turn


def end_source(turn: TurnState) -> tuple[EngineState, int] | None:
    """The copy is over, or nobody waits for it: take the turn off its source's books.

    Returns:
        The source and the tokens that it has still got; None when there was no source.
    """
    source = turn.source
    if source is None:
        return None
    tokens = turn.source_reserved + turn.source_parked
    source.reserved_tokens -= turn.source_reserved
    if turn.source_parked:
        source.parked_tokens -= turn.source_parked
        source.parked_conversations -= 1
    source.turns.pop(turn.id, None)
    turn.source, turn.source_reserved, turn.source_parked = None, 0, 0
    return source, tokens


def keep_copied(turn: TurnState) -> None:
    """What was copied is the conversation's at its new home, whatever becomes of the turn."""
    conversation, decoder = turn.conversation, turn.decoder
    if turn.source is None or decoder is None or conversation.home is not decoder:
        return
    tokens = min(decoder.pages(turn.expected_cached_tokens), turn.reserved)
    turn.reserved -= tokens
    decoder.reserved_tokens -= tokens
    conversation.resident += tokens
    decoder.resident_tokens += tokens


def take_back(turn: TurnState) -> None:
    """The copy came to nothing: the conversation lives where it did."""
    resident, parked = turn.source_reserved, turn.source_parked
    ended = end_source(turn)
    if ended is None or ended[0].lost:
        return
    source, conversation = ended[0], turn.conversation
    _settle_home(conversation, source)
    conversation.resident, conversation.parked = resident, parked
    source.resident_tokens += resident
    if parked:
        source.parked_tokens += parked
        source.parked_conversations += 1
    if resident and not conversation.active:
        source.idle[conversation.id] = conversation
        source.idle_tokens += resident


def end_turn(turn: TurnState, *, context_tokens: int | None) -> list[ConversationState]:
    """Take a turn off its decoder's books and book what its conversation has there now.

    Args:
        context_tokens: context after the turn; None when it did not finish, so that the
            conversation keeps what it had.

    Returns:
        Conversations parked to make room for it.
    """
    decoder, conversation = turn.decoder, turn.conversation
    if decoder is None:
        raise InvariantError(f"turn {turn.id} ends on no engine")
    decoder.reserved_tokens -= turn.reserved
    decoder.active_turns -= 1
    decoder.active_tokens -= turn.context
    del decoder.turns[turn.id]
    turn.reserved = 0
    turn.decoder = None
    conversation.active -= 1
    parked: list[ConversationState] = []
    if conversation.home is decoder and context_tokens is not None:
        parked = _grow_resident(conversation, decoder, context_tokens, turn)
    home = conversation.home
    if conversation.active == 0 and home is not None:
        if conversation.resident:
            home.idle[conversation.id] = conversation
            home.idle_tokens += conversation.resident
        elif not conversation.parked:
            leave_home(conversation)
    return parked


def _grow_resident(
    conversation: ConversationState, home: EngineState, context_tokens: int, turn: TurnState
) -> list[ConversationState]:
    target = home.pages(context_tokens)
    if conversation.active and turn.reusable_tokens is None:
        target = max(target, conversation.resident)  # another turn of it may hold the longer one
    parked: list[ConversationState] = []
    extra = target - conversation.resident - home.free_tokens
    if extra > 0:
        parked = make_room(home, target - conversation.resident)
        target = min(target, conversation.resident + home.free_tokens)
    home.resident_tokens += target - conversation.resident
    conversation.resident = target
    return parked


# --- homes and parking -----------------------------------------------------------------------
def _settle_home(conversation: ConversationState, engine: EngineState) -> None:
    leave_home(conversation)
    conversation.home = engine
    engine.ages[age_of(conversation.turns)] += 1
    engine.foreseen_tokens += conversation.foreseen


def adopt(conversation: ConversationState, engine: EngineState, tokens: int) -> None:
    """Book a conversation that is known to live on ``engine`` from before: what fits of it."""
    resident = min(engine.pages(tokens), engine.free_tokens)
    if resident <= 0:
        return  # nothing of it is there, or can be
    _settle_home(conversation, engine)
    conversation.resident = resident
    engine.resident_tokens += resident
    engine.idle[conversation.id] = conversation
    engine.idle_tokens += resident


def leave_home(conversation: ConversationState) -> int:
    """Strike a conversation off its home's books; returns the tokens it had there."""
    home, tokens = conversation.home, conversation.context_tokens
    if home is None:
        return 0
    home.ages[age_of(conversation.turns)] -= 1
    home.foreseen_tokens -= conversation.foreseen
    if home.idle.pop(conversation.id, None) is not None:
        home.idle_tokens -= conversation.resident
    home.resident_tokens -= conversation.resident
    if conversation.parked:
        home.parked_tokens -= conversation.parked
        home.parked_conversations -= 1
    conversation.resident = conversation.parked = 0
    conversation.home = None
    return 0 if home.lost else tokens


def grow_older(conversation: ConversationState) -> None:
    """Count a finished turn."""
    home = conversation.home
    if home is not None:
        home.ages[age_of(conversation.turns)] -= 1
        home.ages[age_of(conversation.turns + 1)] += 1
    conversation.turns += 1


def make_room(engine: EngineState, tokens: int) -> list[ConversationState]:
    """Park the longest-idle conversations until ``tokens`` are free, or nothing more can be parked.

    Returns:
        The conversations parked, each with its size in ``parked``.
    """
    victims, _ = _choose(engine, tokens, None)
    park(engine, victims)
    return victims


def find_room(
    engine: EngineState, tokens: int, *, keep: ConversationState | None = None
) -> list[ConversationState] | None:
    """Conversations to be parked so that ``tokens`` are free; None when that cannot be had.

    Args:
        engine: where room is needed.
        tokens: how much is to be free.
        keep: a conversation that must stay on the device.
    """
    if engine.free_tokens >= tokens:
        return []
    if engine.reachable_tokens(keep) < tokens:
        return None
    victims, free = _choose(engine, tokens, keep)
    return victims if free >= tokens else None


def _choose(
    engine: EngineState, tokens: int, keep: ConversationState | None
) -> tuple[list[ConversationState], int]:
    """The longest idle that the host tier has room for, and what is free without them."""
    victims: list[ConversationState] = []
    host_free = engine.host_capacity_tokens - engine.parked_tokens
    free = engine.free_tokens
    too_large = 0
    for conversation in engine.idle.values():  # in the order in which they may go
        if free >= tokens or host_free <= 0 or too_large == _PARK_SCAN:
            break
        size = conversation.resident
        if conversation is keep:
            continue
        if size > host_free:
            too_large += 1
            continue
        host_free -= size
        free += size
        victims.append(conversation)
    return victims, free


def park_first(conversation: ConversationState) -> None:
    """Put an idle conversation before all that are to be parked when room is needed."""
    home = conversation.home
    if home is not None and conversation.id in home.idle:
        home.idle.move_to_end(conversation.id, last=False)


def park(engine: EngineState, conversations: list[ConversationState]) -> None:
    """Move idle conversations to the host tier, which has room for them."""
    for conversation in conversations:
        size = conversation.resident
        engine.resident_tokens -= size
        engine.idle_tokens -= size
        engine.parked_tokens += size
        engine.parked_conversations += 1
        conversation.parked, conversation.resident = size, 0
        del engine.idle[conversation.id]


def _unpark(conversation: ConversationState, turn: TurnState) -> None:
    home = conversation.home
    if home is None:
        raise InvariantError(f"conversation {conversation.id} is parked nowhere")
    size = conversation.parked
    home.parked_tokens -= size
    home.parked_conversations -= 1
    home.reserved_tokens -= size
    turn.reserved -= size
    home.resident_tokens += size
    conversation.resident, conversation.parked = size, 0
