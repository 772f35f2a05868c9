"""The worker process: one DEALER socket, the participant behind it, and the torch executor."""
