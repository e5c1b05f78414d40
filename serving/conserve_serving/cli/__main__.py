"""`python -m conserve_serving.cli` is the same as `conserve`."""

from __future__ import annotations

from conserve_serving.cli import main

if __name__ == "__main__":
    main()
