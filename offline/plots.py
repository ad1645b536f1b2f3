"""Plots of a sweep (kind "grains-sweep"), and how to save them."""

from offline.plot_cells import heat_map
from offline.plot_curves import dose_response
from offline.plot_style import save

__all__ = ["dose_response", "heat_map", "save"]
