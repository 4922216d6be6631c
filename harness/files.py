"""Share files among processes, and keep them whole in a crash: lock a folder, write under a temporary name
and rename, append lines of JSON. All may import it.
"""

import fcntl
import json
import os
import socket
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from harness.ranges import SettingError

LOCK = ".lock"          # inside the folder that it is for


# ------------------------------------------------------------------------------------------------------------
# One process per folder

class Held(SettingError):
    """Another process works in the folder."""


def lock(folder, flag="--out", patience=0):
    """Return an open file: until it is closed, or this process dies, no other can lock the folder. Held if
    another one holds it for longer than `patience`, in seconds.

    flag: what the user gave. The file itself stays: it is the kernel that knows who holds it, and a lock on a
    file that is removed keeps nobody out.
    """
    path, until = Path(folder) / LOCK, time.monotonic() + patience
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8", errors="replace",
                    opener=lambda name, how: os.open(name, how | os.O_NOFOLLOW, 0o644))
    except OSError as error:
        raise SettingError(
            f"{folder}: cannot write there ({error.strerror}); choose another {flag}") from None
    while not take(file):
        if time.monotonic() > until:
            file.seek(0)
            raise Held(f"{folder}: in use by {file.read(100)!r}; wait until it has ended, stop it, or choose "
                       f"another {flag}")
        time.sleep(0.2)
    file.truncate(0)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    print(f"process {os.getpid()} on {socket.gethostname()}, since {since}", end="", file=file, flush=True)
    return file


def take(file):
    """Try to lock an open file. Where a file system has no locks, say so and go on without."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        print(f"{file.name}: no lock, which this file system does not know ({error.strerror}); "
              "see to it that no second process works there", file=sys.stderr)
    return True


# ------------------------------------------------------------------------------------------------------------
# All or nothing

@contextmanager
def aside(final):
    """Make a folder under a private name, which is renamed to `final` at the end. Where another process was
    first, its folder stays and this one goes."""
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{final.name}-", dir=final.parent,
                                     ignore_cleanup_errors=True) as name:
        private = Path(name)
        private.chmod(0o755)                                   # a temporary one is for its owner only
        yield private
        try:
            private.rename(final)
        except OSError:
            if not final.exists():
                raise


def replace(path, write):
    """Write a file under a private name, then rename it: nobody reads half of it, and no link is followed.

    write: called with the open binary file."""
    private = path.with_name(f".{path.name}-{socket.gethostname()}-{os.getpid()}")
    try:
        with open(private, "xb") as file:
            write(file)
        private.replace(path)
    finally:
        private.unlink(missing_ok=True)


def write_atomically(path, text):
    replace(path, lambda file: file.write(text.encode("utf-8")))


# ------------------------------------------------------------------------------------------------------------
# JSON that any reader takes, and lines of it

def to_json(record, **how):
    """Return plain data as JSON text. NaN and infinities, which JSON has not, become null. how: of
    json.dumps."""
    plain = json.loads(json.dumps(record), parse_constant=lambda name: None)
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
    records = read_lines(file, {}) if file.exists() else []
    lines = [to_json(each, separators=(",", ":")) + "\n" for each in [*records, record]]
    write_atomically(file, "".join(lines))
