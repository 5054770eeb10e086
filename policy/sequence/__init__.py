"""Sequences of tokens: a language model and translation, on any attention mechanism."""
