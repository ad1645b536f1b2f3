"""What is seen in the tiny world: a grid of cells, each empty or with a shape or a mark in it.

Every cell is one patch of the vision tower, so an image token stands for a cell.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

GRID, PATCH = 4, 12
CELLS, SIZE = GRID**2, GRID * PATCH  # cells and pixels per side

# What the image processor subtracts and divides by, as shares of full light: paper becomes 0, so
# that what is drawn stands out.
MEAN, DEVIATION = 0.9, 0.25
# Registration marks stand for a careful photograph, smudges for a careless one.
Mark = Literal["sharp", "smudge"]
PAINT = {
    "red": (214, 40, 40),
    "blue": (38, 84, 214),
    "green": (36, 150, 62),
    "yellow": (240, 204, 28),
    "purple": (132, 50, 168),
    "orange": (244, 128, 24),
}
_SHIFTS = (-1.0, 0.0, 1.0)  # pixels, across and down
_RADII = (4.0, 4.8)
_FINE = 4  # samples per pixel and axis


class Thing(NamedTuple):
    """A shape of some color; questions name the shape alone, in one word."""

    color: str
    shape: str

    def __str__(self) -> str:
        return self.shape


@dataclass(frozen=True)
class Scene:
    """What is where.

    Attributes:
        things, marks: by cell, 0 to CELLS - 1 row by row; no cell holds both.
        seed: decides where exactly in their cells the shapes lie, their size, light and grain.
    """

    things: tuple[tuple[int, Thing], ...]
    marks: tuple[tuple[int, Mark], ...]
    seed: int

    def shows(self, shape: str) -> bool:
        return any(shape == seen.shape for _, seen in self.things)

    def count(self, mark: Mark) -> int:
        return sum(mark == seen for _, seen in self.marks)


def paint(scene: Scene) -> NDArray[np.uint8]:
    """[SIZE, SIZE, 3], the same pixels for equal scenes."""
    rng = np.random.default_rng(scene.seed)
    light = rng.uniform(222, 237)
    canvas = light + rng.normal(0.0, 3.0, (GRID, PATCH, GRID, PATCH, 3))
    variants = rng.integers(len(_SHIFTS) ** 2 * len(_RADII), size=CELLS)
    for cell, thing in scene.things:
        cover = _masks(thing.shape)[variants[cell]][..., None]
        colour = np.array(PAINT[thing.color]) * rng.uniform(0.85, 1.0)
        _blend(canvas, cell, cover, colour)
    for cell, mark in scene.marks:
        _blend(canvas, cell, _mark(mark)[..., None], np.array(30.0 if mark == "sharp" else 120.0))
    return canvas.reshape(SIZE, SIZE, 3).clip(0, 255).round().astype(np.uint8)


def picture(scene: Scene) -> Image.Image:
    return Image.fromarray(paint(scene))


def _blend(
    canvas: NDArray[np.float64], cell: int, cover: NDArray[np.float64], colour: NDArray[np.float64]
) -> None:
    patch = canvas[cell // GRID, :, cell % GRID]
    patch += cover * (colour - patch)


@cache
def _masks(shape: str) -> NDArray[np.float64]:
    """How much of each pixel a shape covers: [variants, PATCH, PATCH], 0 to 1."""
    found = []
    for down in _SHIFTS:
        for across in _SHIFTS:
            for radius in _RADII:
                axis = (np.arange(PATCH * _FINE) + 0.5) / _FINE - PATCH / 2
                y, x = np.meshgrid((axis - down) / radius, (axis - across) / radius, indexing="ij")
                fine = _inside(shape, x, y).astype(float)
                found.append(fine.reshape(PATCH, _FINE, PATCH, _FINE).mean((1, 3)))
    return np.stack(found)


def _inside(shape: str, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether points are inside the shape that fills -1..1 both ways (y down)."""
    distance = np.hypot(x, y)
    if shape == "circle":
        return distance < 1
    if shape == "ring":
        return (distance < 1) & (distance > 0.55)
    if shape == "square":
        return np.maximum(abs(x), abs(y)) < 0.9
    if shape == "diamond":
        return abs(x) + abs(y) < 1.05
    if shape == "cross":
        return (np.minimum(abs(x), abs(y)) < 0.3) & (np.maximum(abs(x), abs(y)) < 1)
    if shape == "bar":
        return (abs(y) < 0.36) & (abs(x) < 1)
    if shape == "post":
        return (abs(x) < 0.36) & (abs(y) < 1)
    if shape == "frame":
        return (np.maximum(abs(x), abs(y)) < 0.9) & (np.maximum(abs(x), abs(y)) > 0.5)
    if shape == "slash":
        return (abs(x + y) < 0.42) & (np.maximum(abs(x), abs(y)) < 0.95)
    if shape == "triangle":
        return (abs(y) < 0.9) & (abs(x) < (y + 0.9) / 1.8)
    raise ValueError(f"unknown shape {shape!r}")


@cache
def _mark(mark: Mark) -> NDArray[np.float64]:
    """How much of each pixel a mark covers: [PATCH, PATCH]."""
    axis = np.arange(PATCH) - (PATCH - 1) / 2
    y, x = np.meshgrid(axis, axis, indexing="ij")
    if mark == "smudge":
        return 0.8 * np.exp(-(x**2 + y**2) / (2 * 3.0**2))
    thin = np.minimum(abs(x), abs(y)) < 1  # two pixels wide
    return (thin & (np.hypot(x, y) > 1.5) & (np.hypot(x, y) < 6)).astype(float)
