"""Traces, the HTTP replayer, its figures and its report; ``docs/replay.md`` is for people.

``session`` is the way in: ``prepare`` a request, ``run`` it, ``write_outputs``.
"""
