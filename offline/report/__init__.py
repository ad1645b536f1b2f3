"""The report: one HTML page about artifacts, and what was measured of them."""
