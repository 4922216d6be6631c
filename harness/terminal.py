"""Print text safely: no control characters of others, no error over a sign that the terminal cannot show or a
reader (`| head`) that has ended. All may import it: it needs the standard library alone.
"""

import os
import re
import sys

# Control characters but for tab and line break; what turns the direction of text; halves of characters.
ACTING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text):
    r"""Write out characters that act on a terminal: ESC becomes \x1b."""
    return ACTING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def command(main):
    """Run the `main` of a command and show what it says; do not complain of a reader that has gone."""
    streams = sys.stdout, sys.stderr
    for stream in streams:
        stream.reconfigure(errors="backslashreplace")
    try:
        try:
            main()
        finally:
            for stream in streams:
                stream.flush()
    except BrokenPipeError:
        silence()
        sys.exit(141)                          # as a shell calls the end by SIGPIPE


def silence():
    """Send to nowhere what is still to be printed, for its reader has gone."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
