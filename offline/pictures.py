"""Images of preference pairs: where they come from, and what a row of data may say about them."""

import base64
import hashlib
import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from offline.errors import InputError

_URL_LIMIT = 32 * 2**20  # bytes
_URL_SECONDS = 30.0
# An RGB image of this size is 192 MiB, and a few copies of it are made. Cameras stay below; PIL by
# itself warns of more, and stops at nearly three times as many.
_MAX_PIXELS = 2**26
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
        value: a path (relative to `folder`, and in it), a URL, or what `datasets` and parquet files
            hold: an object with `bytes` or `path`. A `Path` is our own word for a file anywhere.
        where: file and line, for messages.
        allow_urls: download http(s) addresses; refused otherwise.

    Raises:
        InputError: no such file, a file elsewhere, not an image or one that is too large, a URL
            that is not allowed or cannot be read.
    """
    if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):
        name = value.get("path")
        return _checked(name if isinstance(name, str) and name else where, value["bytes"], where)
    if isinstance(value, Mapping):
        value = value.get("path")
    if isinstance(value, Path):
        return _checked(value.name, value, where)
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
    path = file_within(folder, value)
    if path is None:
        raise InputError(
            f"{where}: 'image' is '{value[:80]}': no such file in '{folder.name or '.'}', where "
            "paths begin and links must end"
        )
    return _checked(value, path, where)


def file_within(folder: Path, name: str) -> Path | None:
    """The file `name` in a folder, if there is one and it does not lie elsewhere: absolute paths,
    `..` and links may not lead out, since data may come from strangers."""
    try:
        path = (folder / name).resolve()
        return path if path.is_relative_to(folder.resolve()) and path.is_file() else None
    except (OSError, ValueError, RuntimeError):  # a name that no file can have, links in a circle
        return None


def _checked(name: str, source: Path | bytes, where: str) -> Picture:
    try:
        payload = source if isinstance(source, bytes) else source.read_bytes()
    except OSError as error:
        raise InputError(f"{where}: 'image' {name[:80]} cannot be read ({error})") from error
    image = _decode(payload, f"{where}: 'image' {name[:80]}")
    if min(image.size) < 1:
        raise InputError(f"{where}: 'image' {name[:80]} has no pixels")
    return Picture(name, hashlib.sha256(payload).hexdigest(), source)


def _open(payload: bytes, name: str) -> Any:
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(payload), formats=list(_ENDINGS))
    except Image.DecompressionBombError as error:
        raise InputError(f"{name} has more than {_MAX_PIXELS} pixels ({error})") from error
    except Exception as error:  # decoders raise whatever they run into
        raise InputError(
            f"{name} is not an image that can be read (known: {', '.join(_ENDINGS)})"
        ) from error
    width, height = image.size  # from the header: nothing is decoded yet
    if width * height > _MAX_PIXELS:
        raise InputError(
            f"{name} has {width} x {height} pixels, expected {_MAX_PIXELS} pixels at most"
        )
    return image


def _decode(payload: bytes, name: str) -> Any:
    from PIL import ImageOps

    image = _open(payload, name)
    try:
        image.load()
        return ImageOps.exif_transpose(image)
    except Exception as error:  # so do they here, and readers of EXIF data
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
