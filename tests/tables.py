"""Tables of cases, written as text: a case per line, its cells parted by " | "; what follows "  # " is a comment."""


def rows(text):
    lines = (line.partition("  # ")[0] for line in text.strip("\n").splitlines())
    return [[cell.strip() for cell in line.split(" | ")] for line in lines]
