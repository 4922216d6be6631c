"""Name directions: headings by the compass, and sides as seen by someone who faces a heading.

    python -c "from games import compass; print(compass.word(130))"
"""
# Eight words each, 45 degrees apart, clockwise.
COMPASS = ("north", "northeast", "east", "southeast", "south", "southwest", "west", "northwest")
SIDES = ("front", "right front", "right", "right behind", "behind", "left behind", "left", "left front")


def word(heading):
    """Return a heading (degrees) in words: "southeast"."""
    return COMPASS[round(heading / 45) % 8]
