"""Policies in the simulator: rollouts, their films, and the expert in the loop (dagger)."""

from eval.rollout.loop import rollout, summarize, write_results

__all__ = ["rollout", "summarize", "write_results"]
