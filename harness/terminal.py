"""Print text safely: no control characters, none that the terminal cannot show, and no traceback when the
program that reads the output (`| head`) has ended. All may import it: it needs the standard library alone.
"""

import io
import os
import re
import sys

# Control characters but for tab and line break; what turns the direction of text; halves of characters.
ACTING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text):
    r"""Write out characters that act on a terminal: ESC becomes \x1b."""
    return ACTING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class SafeStream(io.TextIOWrapper):
    def write(self, text):
        return super().write(visible(text))


def command(main):
    """Run the `main` of a command and show what it says; do not complain of a reader that has gone."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream:                             # None: closed by who started it
            how = {what: getattr(stream, what) for what in ("encoding", "line_buffering", "write_through")}
            setattr(sys, name, SafeStream(stream.buffer, errors="backslashreplace", **how))
    try:
        try:
            main()
        finally:
            for stream in filter(None, (sys.stdout, sys.stderr)):
                stream.flush()
    except BrokenPipeError:
        silence()
        sys.exit(141)                          # as a shell calls the end by SIGPIPE


def silence():
    """Send to nowhere what is still to be printed, for its reader has gone."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
