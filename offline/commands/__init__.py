"""One file per command of `grains`; what they take from the command line, and what they print."""
