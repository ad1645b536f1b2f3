"""Half an hour of everything at once, against a real server."""
