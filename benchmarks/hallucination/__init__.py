"""Object hallucination in a tiny world: images, questions about them, and a leaning to say yes."""
