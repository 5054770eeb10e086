"""Text: corpora, tokens, parallel sentences."""
