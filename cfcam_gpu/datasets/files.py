"""Files that are whole or not there, also after a power failure, and a folder that one run alone writes into."""

import errno
import os
import shutil
from pathlib import Path
from typing import IO

from cfcam_gpu.images import atomic_write

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""What fails for every further file too: a full disk, a used-up quota, a limit on sizes, a file system that closed."""


def write_file(path: Path, content: bytes, beside: Path) -> None:
    """Write a file under a name of its own in the folder ``beside``, of the same file system, and then rename it.

    The file is on the disk when it gets its name; that the name is too, `sync` makes sure of.
    """
    part = beside / f"{os.urandom(8).hex()}.part"  # of many threads
    with atomic_write(path, part, sync=True) as file:
        file.write(content)


def replace(made: Path, path: Path) -> None:
    """Give what was made the name ``path``, in place of a file or a folder that has it."""
    if path.is_dir() and not path.is_symlink():
        old = made.with_name(f"{made.name}.old")
        os.replace(path, old)
        os.replace(made, path)
        shutil.rmtree(old)
    else:
        os.replace(made, path)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


class Locked(ValueError):
    """Another run writes into the folder."""


def lock(path: Path, what: Path) -> IO[str]:
    """Hold the lock file ``path`` until the file that is returned is closed, or the process ends in whatever way.

    The file's folder is made.

    Raises:
        Locked: another process, or this one, holds it; the message calls it ``what``.
    """
    import fcntl  # not on Windows

    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = open(path, "a+")
        except FileNotFoundError:  # the run that ends has just removed its folder
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Who held the lock may have removed the file between the lines above.
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                file.truncate(0)
                file.write(str(os.getpid()))
                file.flush()
                return file
        except FileNotFoundError:
            pass
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip()
            file.close()
            raise Locked(
                f"another run{f', process {holder},' if holder else ''} is writing into {what}: wait for it, or take"
                " another folder"
            ) from error
        except BaseException:
            file.close()
            raise
        file.close()
