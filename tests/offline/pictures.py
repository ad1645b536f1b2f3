"""Small image files for tests."""

import io

from PIL import Image


def png(colour: str, size: tuple[int, int] = (8, 6)) -> bytes:
    """The bytes of a PNG of one colour."""
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()
