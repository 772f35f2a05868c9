"""Benchmarks: each compares in one run, prints a table, and ends with one JSON object on stdout."""
