"""Stands in for SGLang where only starting and ending it matters: no model, no tokens."""
