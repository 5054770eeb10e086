"""How fast the parts are, each beside what a user would otherwise run."""
