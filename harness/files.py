"""Files that several processes want at once, or that a crash left half written: a folder's lock, private
names, lines of JSON. All may import it.
"""

import fcntl
import json
import os
import re
import shutil
import socket
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from harness.ranges import SettingError

LOCK = ".lock"      # inside the folder that it is for
GRACE = 5.0         # seconds in which a private name may not have its lock yet


# ------------------------------------------------------------------------------------------------------------
# One process per folder

class Held(SettingError):
    """Another process works in the folder."""


class Lock:
    """A folder that one process works in, until `release` or its death: the kernel forgets its locks then.

    Another holder is waited for if it began with the same `launch`, because it is about to end: torchrun may
    start a worker again before the one that failed is gone, and NFS takes 90 s to forget a host that died.
    Held names any other. flag: what the user gave.
    """

    def __init__(self, folder, flag="--out", launch=None, patience=120):
        self.folder, self.flag, self.handle = Path(folder), flag, None
        self.made, until = not self.folder.exists(), time.monotonic() + patience
        while not self.take():
            holder, its_launch = self.holder()
            if not launch or its_launch != launch or time.monotonic() > until:
                raise Held(f"{folder}: in use by {holder}; wait until it has ended, stop it, or choose "
                           f"another {flag}")
            time.sleep(0.2)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        told = f"process {os.getpid()} on {socket.gethostname()}, since {since}; {launch}"
        with suppress(OSError):                                # a full disk; the lock holds all the same
            os.ftruncate(self.handle, 0)
            os.pwrite(self.handle, told.encode(), 0)

    def take(self):
        """Try once. Where a file system has no locks, say so and go on without."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise SettingError(f"{self.folder}: cannot write there ({error.strerror}); choose another "
                               f"{self.flag}") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return False
        except OSError as error:
            print(f"{self.folder}: no lock, which this file system does not know ({error.strerror}); "
                  "see to it that no second process works there", file=sys.stderr)
        self.handle = handle
        with suppress(OSError):                                # its last holder may just have removed it
            if os.path.samestat(os.fstat(handle), os.stat(self.folder / LOCK)):
                return True
        os.close(handle)
        return self.take()

    def holder(self):
        """Return what the holder wrote of itself, and its launch, where that can be read."""
        with suppress(OSError, ValueError):
            told = (self.folder / LOCK).read_text(encoding="utf-8")
            if found := re.fullmatch(r"(process \d+ on \S+, since [-:\d ]+); ([!-~]*)", told):
                return found.groups()
        return "another process", None

    def release(self):
        """Let the folder go, and remove it if it was made for this and nothing came into it."""
        with suppress(OSError):
            (self.folder / LOCK).unlink()
        os.close(self.handle)
        if self.made:
            with suppress(OSError):
                self.folder.rmdir()


# ------------------------------------------------------------------------------------------------------------
# All or nothing

@contextmanager
def aside(final, last=""):
    """Make a folder under a private name, which is renamed to `final` at the end. Where another process was
    first, its folder stays and this one goes; so does what a crash left behind. A `final` without the file
    `last` is a crash's, too."""
    final.parent.mkdir(parents=True, exist_ok=True)
    if not (final / last).exists():
        shutil.rmtree(final, ignore_errors=True)
    sweep(final.parent, f".{final.name}-*")
    private = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
    private.chmod(0o755)                                       # mkdtemp's are for the owner only
    handle = os.open(private, os.O_RDONLY)
    try:
        hold(handle)
        yield private
        try:
            private.rename(final)
        except OSError:
            if not (final / last).exists():
                raise
    finally:
        shutil.rmtree(private, ignore_errors=True)
        os.close(handle)


def hold(file):
    """Wait until no other process holds an open file or folder, where the file system has locks."""
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX)


def sweep(folder, pattern):
    """Remove files and folders under private names that nobody holds: those of the dead."""
    for left in folder.glob(pattern):
        with suppress(OSError):
            handle = os.open(left, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - os.fstat(handle).st_mtime > GRACE:
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
            finally:
                os.close(handle)


def replace(path, write):
    """Write a file under a private name, then rename it: nobody reads half of it, and no link is followed.

    write: called with the open binary file."""
    handle, private = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            hold(handle)                                       # see `sweep`
            write(file)
        os.chmod(private, 0o644)                               # mkstemp's are for the owner only
        os.replace(private, path)
    finally:
        Path(private).unlink(missing_ok=True)


def write_atomically(path, text):
    replace(path, lambda file: file.write(text.encode("utf-8")))


# ------------------------------------------------------------------------------------------------------------
# JSON that any reader takes, and lines of it

def to_json(record, default=None, **how):
    """Return plain data as JSON text. NaN and infinities, which JSON has not, become null.

    how: of json.dumps. What `default` makes of an object may hold such numbers, too."""
    plain = json.loads(json.dumps(record, default=default), parse_constant=lambda name: None)
    return json.dumps(plain, allow_nan=False, **how)


def read_lines(file, needs):
    """Read a file with a JSON object per line that has the fields `needs`, {name: type}.

    A last line that was cut off, as by a crash, is left out. ValueError names any other that is foreign."""
    try:
        *lines, last = Path(file).read_bytes().split(b"\n")
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror})") from None
    records = [parse(line, needs) for line in lines]
    if None in records:
        n = records.index(None)
        shown = lines[n][:60].decode("utf-8", "backslashreplace")
        raise ValueError(f"{file}, line {n + 1}: expected a JSON object with {' and '.join(needs)}, found "
                         f"{shown!r}; delete that line, or begin anew in another folder")
    return [*records, *filter(None, [parse(last, needs)])]     # the last may lack its line break alone


def parse(line, needs):
    """Return what a line says, None for one that is foreign."""
    with suppress(ValueError, RecursionError):
        record = json.loads(line.decode("utf-8"))
        if isinstance(record, dict) and all(isinstance(record.get(name), needs[name]) for name in needs):
            return record


def append_line(file, record):
    """Add a line, under the lock of the file's folder. What a crash left of a last one goes."""
    line = to_json(record, separators=(",", ":")).encode() + b"\n"
    with open(file, "a+b") as out:
        out.seek(0)
        *lines, last = out.read().split(b"\n")
        if last and parse(last, {}) is None:
            out.truncate(out.tell() - len(last))
        elif last:
            line = b"\n" + line
        out.write(line)
