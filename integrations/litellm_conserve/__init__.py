"""Reserved for the LiteLLM provider.

Until it exists, LiteLLM reaches ConServe as any OpenAI-compatible server: ``openai/<model>`` with
``api_base`` set to the gateway and ``extra_headers`` from ``conserve_agents.headers_for``.
"""
