"""Tables of cases, written as text: a case per line, its cells parted by " | ", comments after "  # "."""


def rows(text):
    """Return the cells of each line that is not blank."""
    lines = (line.partition("  # ")[0] for line in text.splitlines() if line.strip())
    return [[cell.strip() for cell in f"{line} ".split(" | ")] for line in lines]


def numbers(text):
    """Return the numbers of a line."""
    return [float(x) for x in text.split()]
