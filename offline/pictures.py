"""Images of preference pairs: where they come from, and what a row of data may say about them."""

import base64
import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from offline.errors import InputError

_URL_LIMIT = 32 * 2**20  # bytes
_URL_SECONDS = 30.0
_ENDINGS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}


@dataclass(frozen=True)
class Picture:
    """One encoded image file.

    Attributes:
        name: what the data calls it: a relative path, a URL, or its row.
        sha256: of the file's bytes.
        source: the file, or its bytes.
    """

    name: str
    sha256: str
    source: Path | bytes = field(repr=False, compare=False)

    @property
    def payload(self) -> bytes:
        """The file's bytes."""
        return self.source if isinstance(self.source, bytes) else self.source.read_bytes()

    @property
    def image(self) -> Any:
        """The decoded PIL image in RGB, turned as its EXIF data says, on white where it is
        transparent: the pixels that a vLLM server would see.

        Raises:
            InputError: it cannot be decoded.
        """
        from PIL import Image

        decoded = _decode(self.payload, self.name)
        clear = decoded.mode in ("RGBA", "LA", "PA") or "transparency" in decoded.info
        if decoded.mode == "RGB" or not clear:
            return decoded.convert("RGB")
        decoded = decoded.convert("RGBA")
        ground = Image.new("RGB", decoded.size, "white")
        ground.paste(decoded, mask=decoded.getchannel("A"))
        return ground

    @cached_property
    def kind(self) -> str:
        """Its format as PIL names it, such as PNG."""
        kind = str(_open(self.payload, self.name).format)
        return "JPEG" if kind == "MPO" else kind  # a JPEG with more images behind it

    @property
    def ending(self) -> str:
        """Of a file that holds it, without the dot."""
        return _ENDINGS[self.kind]

    @property
    def data_url(self) -> str:
        """The file as a data: URL, as chat requests carry it."""
        kind = "jpeg" if self.kind == "JPEG" else self.ending
        return f"data:image/{kind};base64,{base64.b64encode(self.payload).decode()}"


def picture_of(value: Any, where: str, folder: Path, *, allow_urls: bool = False) -> Picture:
    """The picture that a row's `image` stands for.

    Args:
        value: a path (relative to `folder`), a URL, or what `datasets` and parquet files hold:
            an object with `bytes` or `path`.
        where: file and line, for messages.
        allow_urls: download http(s) addresses; refused otherwise.

    Raises:
        InputError: no such file, not an image, a URL that is not allowed or cannot be read.
    """
    if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):
        name = value.get("path")
        return _checked(name if isinstance(name, str) and name else where, value["bytes"], where)
    if isinstance(value, Mapping):
        value = value.get("path")
    if not isinstance(value, str) or not value.strip():
        found = "empty" if isinstance(value, str) else type(value).__name__
        raise InputError(f"{where}: 'image' is {found}, expected the path of an image file")
    if value.startswith(("http://", "https://")):
        if not allow_urls:
            raise InputError(
                f"{where}: 'image' is the URL {value[:80]}; nothing is downloaded unless "
                "--allow-image-urls says so"
            )
        return _checked(value, _download(value, where), where)
    if "://" in value or value.startswith("data:"):
        raise InputError(f"{where}: 'image' is '{value[:60]}', expected a path or an http(s) URL")
    path = folder / value
    try:
        there = path.is_file()
    except OSError:  # a name that no file can have
        there = False
    if not there:
        raise InputError(
            f"{where}: 'image' is '{value[:80]}': no such file beside {folder.name or '.'}"
        )
    return _checked(value, path, where)


def _checked(name: str, source: Path | bytes, where: str) -> Picture:
    payload = source if isinstance(source, bytes) else source.read_bytes()
    image = _decode(payload, f"{where}: 'image' {name[:80]}")
    if min(image.size) < 1:
        raise InputError(f"{where}: 'image' {name[:80]} has no pixels")
    return Picture(name, hashlib.sha256(payload).hexdigest(), source)


def _open(payload: bytes, name: str) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(io.BytesIO(payload), formats=list(_ENDINGS))
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(
            f"{name} is not an image that can be read (known: {', '.join(_ENDINGS)})"
        ) from error


def _decode(payload: bytes, name: str) -> Any:
    from PIL import Image, ImageOps

    image = _open(payload, name)
    try:
        image.load()
        return ImageOps.exif_transpose(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{name} is a damaged image file ({error})") from error


def _download(url: str, where: str) -> bytes:
    import httpx

    payload = bytearray()
    try:
        with httpx.stream("GET", url, timeout=_URL_SECONDS, follow_redirects=True) as response:
            response.raise_for_status()
            for chunk in response.iter_bytes():
                payload += chunk
                if len(payload) > _URL_LIMIT:
                    raise InputError(f"{where}: the image at {url[:80]} is over {_URL_LIMIT} bytes")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise InputError(f"{where}: the image at {url[:80]} cannot be read ({error})") from error
    return bytes(payload)
