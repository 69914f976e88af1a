"""Compiles clients' schemas, regular expressions and grammars for the engine, in processes that can be ended."""
