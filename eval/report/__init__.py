"""Runs side by side: means over seeds, intervals, pictures."""
