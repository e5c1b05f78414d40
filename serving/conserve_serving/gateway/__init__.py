"""The gateway: OpenAI's API in front, conversations and engines behind.

http_server, http_exchange   the port: requests in, responses out
app, admin, views            routes: turns, operations, ``/conserve/v1``
gateway                      everything shared, put together once
turn, attempt, handover      the life of a turn, one plan of it, its hand-off
relay, usage                 the answer's bytes, and the counts read out of them
request, identity, lineage   what was asked, whose turn it is, what it continues
conversations, sessions      what is remembered of conversations, here and on engines
fleet, engine, observe       the engines: who is there, how loaded, how fast
runtime                      hosts the scheduler: facts in, decisions out
config, errors, metrics, placement, handoffs
"""
