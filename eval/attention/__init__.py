"""Every attention mechanism side by side."""
