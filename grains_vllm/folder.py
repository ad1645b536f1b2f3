"""Artifacts by bare name from one folder: no other path, no link, nothing but a plain file."""

import errno
import os
import re

from grains_vllm.checks import short
from grains_vllm.errors import GrainsConfigError
from grains_vllm.vectors import read_whole

# Neither a slash nor a dot at the start, so that no name can leave the folder.
NAME = r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,254}$"


class NotInFolder(GrainsConfigError):
    """The folder holds no file of that name."""


def read(folder: str, name: str, max_bytes: int) -> bytes:
    """What a file of the folder holds.

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
    # Everything is asked of what has been opened: a name can mean another one a moment later.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC
    try:
        inside = os.open(folder, flags)
    except OSError as error:
        raise GrainsConfigError(f"admin.folder: cannot be opened ({error.strerror})") from error
    try:
        return read_whole(name, max_bytes, dir_fd=inside, follow=False)
    except FileNotFoundError as error:
        raise NotInFolder(f"file: admin.folder holds no {short(name)}") from error
    except OSError as error:
        why = "it is a symbolic link" if error.errno == errno.ELOOP else error.strerror or error
        limit = " by admin.max_bytes" if error.errno == errno.EFBIG else ""
        raise GrainsConfigError(f"file: {short(name)} cannot be read ({why}{limit})") from error
    finally:
        os.close(inside)
