"""Classification heads on the encoders of policies."""
