"""The laboratory: workloads, experiments and their reports, over the simulator.

``workloads`` says what arrives and when; ``describe`` what a trace looks like.
"""
