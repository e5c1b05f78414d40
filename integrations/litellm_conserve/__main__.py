"""``python -m litellm_conserve``: where the ready configuration of LiteLLM's proxy lies."""

from __future__ import annotations

from litellm_conserve import CONFIG

if __name__ == "__main__":
    print(CONFIG)  # noqa: T201 - that is what it is for
