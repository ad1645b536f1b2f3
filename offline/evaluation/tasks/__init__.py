"""Tasks in the form of lm-evaluation-harness, and the public data formats they read."""
