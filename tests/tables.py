"""Tables of cases, written as text: a case per line, its cells parted by " | ", comments after "  # "."""
import pytest


def rows(text):
    """Return the cells of each line that is not blank."""
    lines = (line.partition("  # ")[0] for line in text.splitlines() if line.strip())
    return [[cell.strip() for cell in f"{line} ".split(" | ")] for line in lines]


def lines(text, end="\n"):
    """Return the lines of a table with one cell each; ↵ stands for `end` in a line."""
    return [line.replace("↵", end) for line, in rows(text)]


def cases(names, table, **options):
    """Return pytest's decorator that runs a test per case of a list, or per row of a text."""
    return pytest.mark.parametrize(names, rows(table) if isinstance(table, str) else table, **options)


def numbers(text):
    """Return the numbers of a line."""
    return [float(x) for x in text.split()]


def raises(message, function, *args, error=ValueError, longest=500, **kwargs):
    """Return what is said by the error that must come: one line of fewer characters than `longest`, with
    `message` in it."""
    with pytest.raises(error) as caught:
        function(*args, **kwargs)
    text = str(caught.value)
    assert message in text and "\n" not in text and len(text) < longest, text
    return text
