"""Joules: read from GPU boards or modelled, and attributed to turns (docs/energy.md)."""
