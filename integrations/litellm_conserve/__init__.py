"""Reserved for the LiteLLM provider. Until it exists, LiteLLM reaches ConServe as any
OpenAI-compatible server: ``model="openai/<model>"``, ``api_base="http://…/v1"`` and ``extra_headers`` from
``conserve_agents.headers_for``."""
