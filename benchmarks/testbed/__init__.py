"""Does steering work? GrAInS against its rivals in worlds where the right effect is known."""
