"""`grains evaluate`: base against steered, with intervals; evaluate.py is the way in."""
