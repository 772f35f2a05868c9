"""The broker process: one ROUTER socket, the coordinator behind it, and the fold executor."""
