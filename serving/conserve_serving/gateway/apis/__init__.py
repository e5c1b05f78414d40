"""Other APIs, translated to chat completions, so that a turn has one way through the gateway.

client, chat        the client that hears another API; chat completions read as blocks
request, errors     reading bodies; what is refused, in each API's own form
messages_request, messages_answer     Anthropic Messages
responses_request, responses_answer, items     OpenAI Responses
store               responses and conversations remembered, bounded by time, number and bytes
messages, responses                   the routes of both
"""
