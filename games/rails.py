"""Turn a route into the points where a walker decides, the expert's action at each, and the instructions.

    python -c "from games import rails; print(rails.relative_turn(350, 10))"
"""
import itertools
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from games import cities, routes
from games.compass import COMPASS, word
from games.streets import BROAD, CITIES, OTHERS
from harness.ranges import text

BUILT_IN = Path("runs/cities")      # where the built-in cities are kept once they are made
MANY = {"others": OTHERS, "broad": BROAD}       # cities of visual-OOD, of pre-training
LOOKS = (*CITIES, *MANY)
LOOK = text(f"a folder of routes or one of {', '.join(LOOKS)}",
            lambda name: name in LOOKS or Path(name).is_dir())


@dataclass
class Point:
    """One decision on a route."""
    panorama: str           # file of the street view
    heading: float          # degrees; which way one faces
    landmark: str | None    # its name, and on which side it is
    side: str | None
    intersection: bool      # is the walker told that this is an intersection?
    instruction: int        # index of the sentence to follow
    action: str             # the expert's

    @property
    def observation(self):
        """Return the truth in words."""
        remark = f"{self.landmark} is on your {self.side}" if self.landmark else "No landmarks nearby"
        return remark + "; You observe an intersection" * self.intersection


def name_turn(angle):
    """Return the word for a turn by so many degrees: beyond 45 left or right, 0 is slightly left (as in the
    released code)."""
    return ("slightly " if abs(angle) <= 45 else "") + ("left" if angle <= 0 else "right")


def relative_turn(old, new):
    """Return the word for the turn from heading `old` to `new`; the angle between is in (-180, 180]."""
    return name_turn(180 - (180 - (new - old)) % 360)


def instructions(legs, heading, named=True, wording="both", turn=relative_turn):
    """Return the sentences of a route that starts with `heading`: two per leg, to turn (relative and
    absolute) and to move, with or without the names of the landmarks.

    wording "relative": no sentence says where a turn leads. The first says where one faces, and each by what
    angle to turn, in steps of the compass's 45 degrees, as "right" alone may lead in any of several
    directions. Later headings follow from the turns before, which under the absolute rule are in the prompt's
    history."""
    sentences, facing = [], word(heading)
    for i, leg in enumerate(legs):
        way = turn(heading, leg.heading)
        goal = "destination" if leg is legs[-1] else "next intersection"
        where = f" where {leg.landmark} is on your {leg.side}" if leg.landmark and named else ""
        steps = COMPASS.index(leg.direction) - COMPASS.index(facing)
        angle = (-steps if "left" in way else steps) % 8 * 45
        start = "" if i or wording == "both" else f"You face {facing}. "
        whither = f"to face {leg.direction}" if wording == "both" else f"by {angle} degrees"
        sentences += [f"{start}{'Turn' if i else 'First, turn'} {way} {whither}.",
                      f"Move forward until you reach {goal}{where}."]
        heading, facing = leg.heading, leg.direction
    return sentences


def rail(route, heading, rule, rng, drop_rate, turn=relative_turn):
    """Return the Points of a route: its start, each candidate between two turning points with probability 1 -
    drop_rate, the turning points, the destination. A turn moves one on to the next point (released code)."""
    points, place, landmark, side = [], route.start, None, None
    for i, leg in enumerate(route.legs):
        way = leg.direction if rule == "absolute" else turn(heading, leg.heading)
        points.append(Point(place.panorama, heading, landmark, side, i > 0, 2 * i, f"turn_direction({way})"))
        heading, place, landmark, side = leg.heading, leg.end, leg.landmark, leg.side
        points += [Point(between.panorama, heading, None, None, False, 2 * i + 1, "forward()")
                   for between in leg.between if rng.random() >= drop_rate]
    return points + [Point(place.panorama, heading, landmark, side, False, 2 * i + 1, "stop()")]


@lru_cache(maxsize=64)
def known_routes(look, held_out, image, size):
    """Return all routes of a look: a folder in the released format, a built-in city, "others" (the nine of
    visual-OOD) or "broad" (those of pre-training), one city after the other in turn."""
    width = max(256, 4 * size) if image else 256        # of the panoramas that are drawn for a built-in city
    found = []
    for name in MANY.get(look, (look,)):
        folder = cities.build(name, BUILT_IN, width=width) if name in CITIES else name
        found.append(routes.load(folder, held_out=held_out, pictures=image))
    return [route for group in itertools.zip_longest(*found) for route in group if route]
