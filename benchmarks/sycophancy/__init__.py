"""Sycophancy in a tiny world: a task on which the right effect of steering is known."""
