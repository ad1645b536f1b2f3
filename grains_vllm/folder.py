"""Artifacts by bare name from one folder: no other path, no link, nothing but a plain file."""

import errno
import os
import re
import stat
from pathlib import Path

from grains_vllm.checks import short
from grains_vllm.errors import GrainsConfigError

# Neither a slash nor a dot at the start, so that no name can leave the folder.
NAME = r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,254}$"


class NotInFolder(GrainsConfigError):
    """The folder holds no file of that name."""


def copy_out(folder: str, name: str, max_bytes: int, target: Path) -> None:
    """Copies a file of the folder to `target`, where nobody changes it while it is checked.

    Args:
        folder: absolute; may itself be reached through links, but must not be one.
        name: what a request said.
        max_bytes: larger files are refused before they are read.

    Raises:
        NotInFolder: there is no such file.
        GrainsConfigError: the name, the file or the folder is not what it must be.
    """
    if not re.fullmatch(NAME, name):
        raise GrainsConfigError(
            f"file: {short(name)} is not a bare file name (letters, digits, '_', '-' and '.', "
            "with no '.' at the start)"
        )
    # Everything is asked of the opened file: a name can mean another one a moment later. NONBLOCK,
    # because opening a pipe would wait for somebody to write.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        inside = os.open(folder, flags | os.O_DIRECTORY)
    except OSError as error:
        raise GrainsConfigError(f"admin.folder: cannot be opened ({error.strerror})") from error
    try:
        handle = os.open(name, flags, dir_fd=inside)
    except FileNotFoundError as error:
        raise NotInFolder(f"file: admin.folder holds no {short(name)}") from error
    except OSError as error:
        why = "is a symbolic link" if error.errno == errno.ELOOP else error.strerror
        raise GrainsConfigError(f"file: {short(name)} cannot be read ({why})") from error
    finally:
        os.close(inside)
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise GrainsConfigError(f"file: {short(name)} is not a plain file")
        if status.st_size > max_bytes:
            raise GrainsConfigError(
                f"file: {short(name)} has {status.st_size} bytes; admin.max_bytes allows "
                f"{max_bytes}"
            )
        with open(handle, "rb", closefd=False) as file:
            target.write_bytes(file.read(status.st_size))
    finally:
        os.close(handle)
