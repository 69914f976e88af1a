"""Measurements: load on a running server, comparisons, memory, and the cost of single parts."""
