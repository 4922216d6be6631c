"""Tables of cases, written as text: a case per line, its cells parted by " | "; what follows "  # " is a comment."""


def rows(text):
    lines = (line.partition("  # ")[0] for line in text.splitlines() if line.strip())
    return [[cell.strip() for cell in f"{line} ".split(" | ")] for line in lines]
