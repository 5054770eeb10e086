"""How everything is trained: trainer, optimizer, EMA, run folder, pictures."""
