"""Videos from disk: lists, decoding, clips."""
