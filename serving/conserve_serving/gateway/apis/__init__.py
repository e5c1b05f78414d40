"""Other APIs, translated to chat completions, so that a turn has one way through the gateway.

client, chat                      the client that hears another API; a chat completion as blocks
request                           reading bodies; refusals that name the field and the remedy
blocks, messages_request          Anthropic Messages: content, requests
messages_answer, messages         its answers and errors, its routes
items, responses_request          OpenAI Responses: items, requests
responses_answer, responses       its answers, its routes
store                             responses and conversations remembered: by time, number and bytes
"""
