"""Commands that measure: rollouts, classification, speed. Here ``policy`` and ``envs`` meet."""
