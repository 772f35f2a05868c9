"""The core of parablock: block descent, its protocol as state machines, its messages, and the block solver.

Nothing here opens a socket, runs an event loop or (in the protocol) reads a clock; `broker` and `workers` do.
"""
