"""Parsers that separate tool calls and reasoning from a model's text."""
