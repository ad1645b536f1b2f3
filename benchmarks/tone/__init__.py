"""Tone in a tiny world: a style with three causes, spread over every word of an answer."""
