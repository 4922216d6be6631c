"""Settings are declared with their allowed values; any other value gives the same kind of error:
`--flag VALUE: expected ...`, exit code 2.

    parser = command_line("python -m study", __doc__)
    parser.add_argument("--workers", type=integer(1), default=2)

Only the standard library is imported here, so that every command of the project can share this.
"""

import argparse
import dataclasses
import os
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable

from harness.terminal import visible

LARGEST = 10**9        # of a count; what exceeds it is a slip of the finger, and fits into no tensor
HUGE = 1e300           # no float is as large; so neither infinite nor an integer that is too long for a float


class UserError(ValueError):
    """Something the user can mend; shown as one line."""


class SettingError(UserError):
    """A setting, or a combination of several, that is not allowed: `--flag VALUE: expected ...`."""


@dataclass(frozen=True)
class Kind:
    """A kind of value. As argparse's `type` it turns a word into a value."""
    expected: str | Callable   # what the message says, or a function that returns it
    holds: Callable            # value of any type -> is it one of the kind?
    read: Callable = str       # word -> value; ValueError if it cannot be read
    names: tuple | dict = ()   # all there are, if it is a choice

    def __call__(self, word):
        value = self.fit(word)
        if value is None:
            raise argparse.ArgumentTypeError(self.refusal(word))
        return value

    def fit(self, value):
        """Return the value, read if it is a word; None if it is not of the kind."""
        try:
            value = self.read(value) if isinstance(value, str) else value
            return value if self.holds(value) else None
        except (ValueError, OSError):
            return None

    def expect(self):
        return self.expected() if callable(self.expected) else self.expected

    def refusal(self, value):
        """Return the message without the flag: `VALUE: expected ...`."""
        return f"{shown(value)}: expected {self.expect()}"


def shown(value):
    """Return a value as one line; quoted where one could not see it otherwise."""
    word = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return word if word.isprintable() and word.strip() == word != "" else repr(word)


def arg(default, kind, help, needs=""):
    """Declare a setting as a field of a dataclass; those of a run come together in settings.Args.

    kind: what it may be, beside its default. needs: other settings without which it has no effect, as
    "--algo sft or pretrain; --attempts above 1"; all of these clauses must hold, see `met`.
    """
    return dataclasses.field(default=default, metadata={"kind": kind, "help": help, "needs": needs})


# A setting that may be left open: the preset or the game fills it in, or it stays None.
optional = partial(arg, None)


def flag(default, help, needs=""):
    """Declare a setting that is on if its flag is there."""
    return arg(default, Kind("true or false", lambda value: isinstance(value, bool)), help, needs)


def met(args, clause):
    """Return whether settings are as one clause of `needs` says: "--kl-coef above 0", "--resume", or that one
    of several has one of the values named, "--algo ppo or --sft-loss psft or iw-sft"."""
    for word in re.split(", | or ", clause):
        if word.startswith("--"):
            flag, _, word = word.partition(" ")
            found = getattr(args, flag[2:].replace("-", "_"))
        if word.startswith("above"):
            holds = (found or 0) > float(word[5:])
        else:
            holds = word in str(found).split(",") if word else found
        if holds:
            return True
    return False


# ------------------------------------------------------------------------------------------------------------
# Numbers

def is_number(value, *types):
    return isinstance(value, types) and not isinstance(value, bool)


def integer(low, high=LARGEST, step=1):
    """Take integers from low to high, every step-th."""
    steps, end = f" in steps of {step}" * (step > 1), "10^9" if high == LARGEST else high
    return Kind(f"an integer from {low} to {end}{steps}",
                lambda n: is_number(n, int) and low <= n <= high and (n - low) % step == 0, int)


def real(expected, holds):
    """Take finite numbers for which `holds`."""
    return Kind(expected, lambda x: is_number(x, int, float) and abs(x) < HUGE and holds(x), float)


def above(low):
    return real(f"a number above {low}", lambda x: x > low)


def at_least(low):
    return real(f"a number of at least {low}", lambda x: x >= low)


def between(low, high):
    return real(f"a number from {low} to {high}", lambda x: low <= x <= high)


def inside(low, high):
    return real(f"a number above {low} and below {high}", lambda x: low < x < high)


# ------------------------------------------------------------------------------------------------------------
# Words, lists, files

def one_of(names):
    """Take one of these names. A dict may grow later: what it holds is looked up each time."""
    return Kind(lambda: f"one of {', '.join(names)}",
                lambda name: isinstance(name, str) and name in names, names=names)


def several(kind):
    """Take different words of a kind, joined by commas; the value is a string without spaces around them."""
    def read(words):
        found = [kind.fit(word.strip()) for word in words.split(",")]
        return "" if None in found or len(set(found)) < len(found) else ",".join(map(str, found))

    return Kind(lambda: f"{kind.expect()}; or several, each once, joined by commas",
                lambda words: isinstance(words, str) and words, read)


def pair(expected, kind):
    """Take two numbers of a kind, joined by a comma; the value is a tuple."""
    return Kind(expected, lambda two: isinstance(two, tuple) and len(two) == 2 and all(map(kind.holds, two)),
                lambda words: tuple(map(float, words.split(","))))


def text(expected, holds=bool):
    """Take words for which `holds`, but never the empty one."""
    return Kind(expected, lambda word: isinstance(word, str) and word and holds(word))


def can_be_a_file(name):
    path = Path(name)
    return not path.is_dir() and os.access(path if path.exists() else path.parent, os.W_OK)


FILE = text("a file that can be written, in a folder that is there", can_be_a_file)


# ------------------------------------------------------------------------------------------------------------

def command_line(prog, description, refuse=None, **more):
    """Return an argument parser whose errors are one line. refuse: called with it in place of exiting."""
    parser = argparse.ArgumentParser(prog=prog, description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, **more)
    # Else -1e-3 and -inf would be taken for flags.
    parser._negative_number_matcher = re.compile(r"-(\.?\d|inf|nan)", re.I)
    refuse = refuse or (lambda message: parser.exit(2, f"{prog}: error: {visible(message)}\n"))
    # argparse says "argument --flag: VALUE: expected ...".
    surplus = re.compile(r"^argument (\S+):(?=.*: expected)|^argument ")
    parser.error = lambda message: refuse(surplus.sub(r"\1", message))
    return parser
