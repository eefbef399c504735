"""Files that are there whole or not at all, logs that survive a crash, and folders that one process uses at a time.

``replacing`` writes a file beside its target under a random name, syncs it and puts it in place, so that a reader, or a
crash at any moment, sees the old file or the new one. The file being written is locked (flock) as long as its writer
lives: what a killed writer left behind is found by that, and removed at the next write of the same target.
Every error names the path that was asked for.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import signal
import socket
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from io import BufferedWriter
from pathlib import Path

LOCK = ".narrowdeep.lock"
"""What a folder in use holds; it is gone when its owner ends, but for one that was killed: then it locks nobody out."""

_SAFE = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # no planted link is followed, no FIFO waited for


class FolderInUseError(OSError):
    """Another run works in the folder."""


@contextmanager
def errors_named(path: str | Path) -> Iterator[None]:
    """An OSError inside becomes one that says that ``path`` cannot be written, and why, with the same ``errno``."""
    try:
        yield
    except FolderInUseError:
        raise
    except OSError as error:
        named = OSError(f"{path} cannot be written: {error.strerror or error}")
        named.errno = error.errno
        raise named from error


@contextmanager
def replacing(path: str | Path) -> Iterator[BufferedWriter]:
    """A new binary file that takes the place of ``path`` at the end, or is removed where an exception is raised.

    Its mode follows the umask. A link at ``path`` is replaced, not followed. Inside, do nothing but write to the file:
    an OSError is taken for one of ``path``.

    Raises: OSError naming ``path``, leaving it as it is.
    """
    path = Path(path)
    with errors_named(path):
        _require_file(path)
        _remove_left_over(path)
        temporary = None
        try:
            with _undivided():
                temporary, file = _create(path)
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, path)  # before it is closed: until then the lock says that somebody owns it
                _sync_folder(path.parent)
        except BaseException:
            if temporary is not None:
                with contextlib.suppress(OSError), contextlib.closing(file):
                    temporary.unlink(missing_ok=True)
            raise


def write(path: str | Path, content: bytes | str) -> None:
    """Replace ``path`` by a file with this content; text is UTF-8.

    Raises: OSError naming ``path``, leaving it as it is.
    """
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def require_writable(path: str | Path) -> None:
    """Find out, by writing beside it, whether ``replacing`` can put a file at ``path``; nothing is left behind.

    Raises: OSError naming ``path``.
    """
    path = Path(path)
    with errors_named(path):
        _require_file(path)
        with _undivided():
            temporary, file = _create(path)
            with file:
                temporary.unlink()


class Log:
    """A text file that grows by lines, each of which other processes see at once. A context manager.

    Raises, in each method: OSError naming the path.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with errors_named(path):
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | _SAFE, 0o666)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, line: str) -> None:
        """Append ``line`` and a line break. A process that is killed afterwards does not lose it; see ``sync``."""
        left = memoryview(f"{line}\n".encode())
        with errors_named(self.path):
            while left:
                left = left[os.write(self._file, left) :]

    def sync(self) -> None:
        """Wait until every line is on the disk, where a crash of the machine does not lose it."""
        with errors_named(self.path):
            os.fsync(self._file)

    def close(self) -> None:
        """Sync and close."""
        if self._file >= 0:
            try:
                self.sync()
            finally:
                os.close(self._file)
                self._file = -1


_held = threading.local()


@contextmanager
def folder_lock(folder: str | Path) -> Iterator[None]:
    """Keep every other thread and process that asks for the same lock out of ``folder``, which must exist.

    Inside, the thread that has it may ask again. A lock ends with its process, however that ends.

    Raises: FolderInUseError that says who has it; OSError naming the folder where it cannot be written.
    """
    held: set[Path] = _held.__dict__.setdefault("folders", set())
    folder = Path(folder)
    key = folder.resolve()
    if key in held:
        yield
        return
    path = folder / LOCK
    descriptor = None
    try:
        with errors_named(folder), _undivided():
            descriptor = _take_lock(folder, path)
            held.add(key)
        yield
    finally:
        with _undivided():
            if descriptor is not None:
                held.discard(key)
                # Removed before it is let go: whoever waits for this very file sees that it is gone, and makes another.
                with contextlib.suppress(OSError):
                    if _is_at(descriptor, path):
                        path.unlink()
                os.close(descriptor)


@contextmanager
def _undivided() -> Iterator[None]:
    """Let Ctrl-C wait until the end: what stands inside is done whole, and whoever made a file knows that it is there.

    Only the main thread is ever interrupted. A handler that raises nothing, as while training, runs late as well.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    waiting: list[int] = []  # no Event, whose lock a second signal would wait for inside of the first one's handler
    signal.signal(signal.SIGINT, lambda number, frame: waiting.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if waiting:
            signal.raise_signal(signal.SIGINT)


def _take_lock(folder: Path, path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _SAFE, 0o666)
        try:
            if not _regular(descriptor):
                raise OSError(errno.EINVAL, f"{path} is not a regular file")
            if not _lock(descriptor):
                raise FolderInUseError(f"{folder} is in use by another run: {_owner(descriptor)}")
            if _is_at(descriptor, path):
                owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": _now()}
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(owner).encode(), 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(sep=" ", timespec="seconds")


def _owner(descriptor: int) -> str:
    """Who a lock file says that it belongs to, in words; whatever it holds."""
    try:
        owner = json.loads(os.pread(descriptor, 1000, 0))
        text = f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
        return text if text.isprintable() and len(text) < 300 else "its lock file does not say which"
    except (ValueError, KeyError, TypeError, RecursionError):
        return "its lock file does not say which"


def _lock(descriptor: int) -> bool:
    """Whether the lock on an open file is ours now; a file system without locks never says no."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
            raise
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether ``path`` still names the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _regular(descriptor: int) -> bool:
    """Whether an open file is a regular one with one name: a second name (a hard link) may be somebody else's file."""
    found = os.fstat(descriptor)
    return stat.S_ISREG(found.st_mode) and found.st_nlink <= 1


def _require_file(path: Path) -> None:
    """Raise OSError if something that is no regular file, such as a folder or a device, would be replaced."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is there and not a regular file")


def _stem(path: Path) -> str:
    """How the names of temporary files of ``path`` begin; short, because names are limited to 255 bytes."""
    name = path.name if len(os.fsencode(path.name)) <= 200 else hashlib.sha256(os.fsencode(path.name)).hexdigest()
    return f".{name}.narrowdeep-"


def _create(path: Path) -> tuple[Path, BufferedWriter]:
    """A new file beside ``path``, open for writing and locked."""

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | _SAFE, 0o666)

    while True:
        temporary = path.with_name(f"{_stem(path)}{secrets.token_hex(8)}.tmp")
        try:
            file = open(temporary, "xb", opener=opener)  # noqa: SIM115 (the caller closes it); x: O_CREAT | O_EXCL
        except FileExistsError:
            continue
        if _lock(file.fileno()) and _is_at(file.fileno(), temporary):
            return temporary, file
        file.close()  # in the moment before it was locked, another process took it for left over and removed it


def _remove_left_over(path: Path) -> None:
    """Remove temporary files of ``path`` whose writers are dead. What cannot be removed is left alone."""
    pattern = re.compile(re.escape(_stem(path)) + r"[0-9a-f]{16}\.tmp")
    for name in os.listdir(path.parent):
        if not pattern.fullmatch(name):
            continue
        with contextlib.suppress(OSError):
            descriptor = os.open(path.parent / name, os.O_RDWR | _SAFE)
            try:
                if _regular(descriptor):
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    (path.parent / name).unlink()
            finally:
                os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a crash of the machine, on file systems that know how."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
