"""Measurements of a running server: a load generator, a comparison, a memory watch, and their plots."""
