"""Files that are whole or not there, logs and locks: what a kill, a full disk, a planted link or a second run does."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from narrowdeep import files
from narrowdeep.files import FolderInUseError, Log, folder_lock, replacing, write

ROOT = Path(__file__).parent.parent


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@contextmanager
def process(code: str) -> Iterator[subprocess.Popen[str]]:
    """Another Python that runs ``code``, caught when it has printed a line; killed at the end."""
    child = subprocess.Popen(
        [sys.executable, "-c", "import sys, time\nfrom narrowdeep import files\n" + code],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        yield child
    finally:
        child.kill()
        child.communicate()


WAIT = "print('ready', flush=True); time.sleep(600)"


def saving(path: Path) -> str:
    return f"with files.replacing({str(path)!r}) as file:\n    file.write(bytes(10**6)); file.flush(); {WAIT}"


def test_write_replaces(tmp_path):
    path = tmp_path / "file"
    write(path, "é\n")
    assert path.read_bytes() == b"\xc3\xa9\n"
    write(path, b"\x00\x01")
    assert path.read_bytes() == b"\x00\x01"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660), (0o077, 0o600)])
def test_modes_follow_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write(tmp_path / "file", b"")
        with Log(tmp_path / "log") as log:
            log.write("line")
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("file", "log")] == [mode, mode]


def test_an_error_leaves_the_old_file(tmp_path):
    write(tmp_path / "file", b"old")
    with pytest.raises(TypeError, match="int"), replacing(tmp_path / "file") as file:
        file.writelines([b"new", 1])
    assert (tmp_path / "file").read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("function", ["fsync", "replace", "open"])
def test_what_fails_names_the_path_and_leaves_the_old_file(tmp_path, monkeypatch, function):
    path = tmp_path / "file"
    write(path, b"old")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a temporary name")

    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail)
        with pytest.raises(OSError, match=f"^{path} cannot be written: No space left on device$") as caught:
            write(path, b"new")
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_names_the_path(tmp_path, monkeypatch):
    """The kernel's own answer: what is opened for the temporary file is /dev/full."""
    path, opened = tmp_path / "file", os.open
    write(path, b"old")

    def full(name: object, flags: int, mode: int = 0o777) -> int:
        if "narrowdeep-" not in str(name):
            return opened(str(name), flags, mode)
        os.close(opened(str(name), flags, mode))
        return opened("/dev/full", os.O_WRONLY)

    monkeypatch.setattr(os, "open", full)
    monkeypatch.setattr(files, "_is_at", lambda *_: True)
    with pytest.raises(OSError, match=f"^{path} cannot be written: No space left on device$"):
        write(path, bytes(10**5))
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_a_full_disk_under_a_log_names_the_path(tmp_path, monkeypatch):
    with Log(tmp_path / "log") as log:
        log.write("first")

        def full(*_: object) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            with pytest.raises(OSError, match=f"^{tmp_path / 'log'} cannot be written: No space left on device$"):
                log.write("second")


def test_a_log_goes_on_after_a_short_write(tmp_path, monkeypatch):
    written = os.write
    monkeypatch.setattr(os, "write", lambda file, data: written(file, data[:3]))
    (tmp_path / "log").write_text("0\n")
    with Log(tmp_path / "log") as log:
        log.write("first é")
        log.write("second")
    assert (tmp_path / "log").read_text() == "0\nfirst é\nsecond\n"


def test_a_log_is_synced_where_asked_and_at_the_end(tmp_path, monkeypatch):
    synced: list[bytes] = []
    monkeypatch.setattr(os, "fsync", lambda _: synced.append((tmp_path / "log").read_bytes()))
    with Log(tmp_path / "log") as log:
        log.write("a")
        log.sync()
        log.write("b")
    assert synced == [b"a\n", b"a\nb\n"]


def test_the_file_is_on_the_disk_before_it_is_in_place(tmp_path, monkeypatch):
    """Order of the calls: content, name, folder."""
    calls: list[str] = []
    synced, replaced = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        calls.append("sync folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "sync file")
        synced(descriptor)

    def replace(*arguments: Path) -> None:
        calls.append("replace")
        replaced(*arguments)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write(tmp_path / "file", b"1")
    assert calls == ["sync file", "replace", "sync folder"]


def test_what_a_killed_writer_left_is_removed_at_the_next_write(tmp_path):
    path = tmp_path / "file"
    write(path, b"old")
    with process(saving(path)) as child:
        (temporary,) = set(names(tmp_path)) - {"file"}
        assert re.fullmatch(r"\.file\.narrowdeep-[0-9a-f]{16}\.tmp", temporary)
        assert (tmp_path / temporary).stat().st_size == 10**6
        write(path, b"new")  # the writer lives: its file stays
        assert names(tmp_path) == sorted(["file", temporary])
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert path.read_bytes() == b"new"
    write(tmp_path / "other", b"")  # another target's is not looked at
    assert temporary in names(tmp_path)
    write(path, b"newer")
    assert names(tmp_path) == ["file", "other"]


def test_files_that_only_look_like_temporary_ones_stay(tmp_path):
    """A user's own, a planted link and a second name of a file elsewhere, a FIFO and a folder."""
    victim, path = tmp_path / "victim", tmp_path / "file"
    victim.write_text("mine")
    mine = ["file.tmp", ".file.tmp", ".file.narrowdeep-1.tmp", f".file.narrowdeep-{'0' * 16}.tmp.gz"]
    for name in mine:
        (tmp_path / name).write_text("mine")
    pattern = ".file.narrowdeep-{}.tmp".format
    (tmp_path / pattern("1" * 16)).symlink_to(victim)
    (tmp_path / pattern("2" * 16)).hardlink_to(victim)
    os.mkfifo(tmp_path / pattern("3" * 16))
    (tmp_path / pattern("4" * 16)).mkdir()
    before = names(tmp_path)
    write(path, b"")
    assert names(tmp_path) == sorted([*before, "file"])
    assert victim.read_text() == "mine"
    assert all((tmp_path / name).read_text() == "mine" for name in mine)


def test_links_are_replaced_and_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "file").symlink_to(victim)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("file", "dangling"):
        write(tmp_path / name, b"new")
        assert (tmp_path / name).read_bytes() == b"new"
        assert not (tmp_path / name).is_symlink()
    assert victim.read_text() == "mine"
    assert names(tmp_path) == ["dangling", "file", "victim"]
    (tmp_path / "log").symlink_to(victim)
    with pytest.raises(OSError, match=f"^{tmp_path / 'log'} cannot be written: "):
        Log(tmp_path / "log")
    (tmp_path / files.LOCK).symlink_to(victim)
    with pytest.raises(OSError, match=f"^{tmp_path} cannot be written: "), folder_lock(tmp_path):
        pass
    (tmp_path / files.LOCK).unlink()
    (tmp_path / files.LOCK).hardlink_to(victim)
    with pytest.raises(OSError, match="is not a regular file"), folder_lock(tmp_path):
        pass
    assert victim.read_text() == "mine"


def test_a_planted_link_with_the_very_name_is_not_followed(tmp_path, monkeypatch):
    tokens = iter(["0" * 16, "1" * 16])
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: next(tokens))
    (tmp_path / f".file.narrowdeep-{'0' * 16}.tmp").symlink_to(tmp_path / "nowhere")
    write(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert not (tmp_path / "nowhere").exists()


def test_only_files_are_replaced(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "null").symlink_to("/dev/null")
    before = names(tmp_path)
    for name, reason in (("fifo", "not a regular file"), ("folder", "Is a directory"), ("null", "not a regular file")):
        for call in (lambda path: write(path, b""), files.require_writable):
            with pytest.raises(OSError, match=f"^{tmp_path / name} cannot be written: .*{reason}"):
                call(tmp_path / name)
    with pytest.raises(OSError, match=f"^{tmp_path / 'no' / 'file'} cannot be written: No such file"):
        write(tmp_path / "no" / "file", b"")
    assert names(tmp_path) == before


def test_require_writable_leaves_nothing(tmp_path):
    (tmp_path / "file.tmp").write_text("mine")
    files.require_writable(tmp_path / "file")
    assert names(tmp_path) == ["file.tmp"]
    (tmp_path / "file").write_text("old")
    files.require_writable(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == ["file", "file.tmp"]


@pytest.mark.parametrize("length", [199, 201, 255])
def test_long_names(tmp_path, length):
    write(tmp_path / ("n" * length), b"1")
    assert names(tmp_path) == ["n" * length]


def test_many_writers_of_one_file(tmp_path):
    """Each sees or leaves a whole file; nobody removes the temporary file of another that lives."""
    errors: list[BaseException] = []

    def work(letter: bytes) -> None:
        try:
            for _ in range(30):
                write(tmp_path / "file", letter * 5000)
                assert len(set((tmp_path / "file").read_bytes())) == 1
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(letter,)) for letter in (b"a", b"b", b"c", b"d")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert names(tmp_path) == ["file"]


def locking(folder: Path) -> str:
    return f"with files.folder_lock({str(folder)!r}):\n    {WAIT}"


def test_a_folder_is_used_by_one_process(tmp_path):
    with process(locking(tmp_path)) as child:
        owner = json.loads((tmp_path / files.LOCK).read_text())
        assert owner["pid"] == child.pid
        message = f"^{tmp_path} is in use by another run: process {child.pid} on {owner['host']}, since 20..-"
        with pytest.raises(FolderInUseError, match=message), folder_lock(tmp_path):
            pass
        assert json.loads((tmp_path / files.LOCK).read_text()) == owner
        child.send_signal(signal.SIGKILL)
        child.wait()
    with folder_lock(tmp_path):  # a killed process locks nobody out
        assert json.loads((tmp_path / files.LOCK).read_text())["pid"] == os.getpid()
    assert names(tmp_path) == []


def test_a_lock_in_the_thread_that_has_it(tmp_path):
    with folder_lock(tmp_path):
        with folder_lock(tmp_path / "." / ".."  / tmp_path.name):
            pass
        assert names(tmp_path) == [files.LOCK]
        caught: list[str] = []

        def other() -> None:
            try:
                with folder_lock(tmp_path):
                    pass
            except FolderInUseError as error:
                caught.append(str(error))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert len(caught) == 1
        assert f"process {os.getpid()} " in caught[0]
    assert names(tmp_path) == []


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b"{", b"[" * 900, b'{"pid": "a\\nb", "host": 1, "since": 2}'])
def test_a_lock_file_with_anything_in_it(tmp_path, content):
    (tmp_path / files.LOCK).write_bytes(content)
    with folder_lock(tmp_path):
        (tmp_path / files.LOCK).write_bytes(content)
        thread_error: list[BaseException] = []

        def other() -> None:
            try:
                with folder_lock(tmp_path):
                    pass
            except BaseException as error:
                thread_error.append(error)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        (error,) = thread_error
        assert isinstance(error, FolderInUseError)
        assert str(error) == f"{tmp_path} is in use by another run: its lock file does not say which"


def test_a_folder_that_cannot_be_locked(tmp_path):
    folder = tmp_path / "none"
    with pytest.raises(OSError, match=f"^{folder} cannot be written: No such file"), folder_lock(folder):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks(tmp_path, monkeypatch, number):
    """Files are replaced as ever; what may be in use is left alone."""

    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.fcntl, "flock", flock)
    other = tmp_path / f".file.narrowdeep-{'0' * 16}.tmp"
    other.write_text("perhaps being written")
    with folder_lock(tmp_path):
        write(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert names(tmp_path) == sorted([other.name, "file"])



@pytest.fixture(params=["open", "close", "fstat", "stat", "ftruncate", "pwrite", "unlink", "replace", "fsync"])
def interrupted(request, monkeypatch):
    """Runs something again and again with a Ctrl-C after another call of one function of ``os`` each time."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    real, left = getattr(os, request.param), 0

    def call(*args, **options):
        nonlocal left
        try:
            return real(*args, **options)
        finally:
            left -= 1
            if left == 0:
                signal.raise_signal(signal.SIGINT)

    def each(run):
        nonlocal left
        for number in range(1, 100):
            left = number
            with contextlib.suppress(KeyboardInterrupt):
                run()
            came, left = left <= 0, 0
            yield
            if not came:
                return

    monkeypatch.setattr(os, request.param, call)
    yield each
    signal.signal(signal.SIGINT, previous)


def test_ctrl_c_leaves_no_lock(tmp_path, interrupted):
    def use():
        with folder_lock(tmp_path):
            pass

    for _ in interrupted(use):
        assert names(tmp_path) == []
        with folder_lock(tmp_path):
            assert names(tmp_path) == [files.LOCK]


@pytest.mark.parametrize("run", [files.require_writable, lambda path: write(path, "new")])
def test_ctrl_c_leaves_no_temporary_file(tmp_path, interrupted, run):
    path = tmp_path / "file"
    path.write_text("old")
    for _ in interrupted(lambda: run(path)):
        assert names(tmp_path) == ["file"]
        assert path.read_text() in ("old", "new")


@pytest.mark.parametrize("within", ["<lambda>", "notify_all"])  # the handler, and an Event that it might set
def test_signals_within_each_other_do_not_wait_for_one_another(tmp_path, within):
    """A second Ctrl-C arrives while the first one's handler runs."""
    code = (
        "import os, signal, sys\n"
        "from narrowdeep import files\n"
        "def within(frame, event, argument):\n"
        f"    if left and event == 'call' and frame.f_code.co_name == {within!r}:\n"
        "        left.pop()\n"
        "        signal.raise_signal(signal.SIGINT)\n"
        "left, flock = [0], files.fcntl.flock\n"
        "def interrupted(*arguments):\n"
        "    files.fcntl.flock = flock\n"
        "    sys.setprofile(within)\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "    sys.setprofile(None)\n"
        "    return flock(*arguments)\n"
        "files.fcntl.flock = interrupted\n"
        "try:\n"
        f"    with files.folder_lock({str(tmp_path)!r}):\n"
        "        print('inside')\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted')\n"
    )
    start = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    command = [sys.executable, "-c", start + code]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert (result.stdout, names(tmp_path)) == ("interrupted\n", []), result.stderr
