"""The tests: one module per module of the packages, and `python -m tests` for everything that CI runs."""
