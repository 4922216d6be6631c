"""The built-in cities laid out: streets, panoramas, landmarks, routes.

A city is a plan of intersections (grids, rings, hexagons, ...) joined by streets, with panoramas some 20 m
apart. Most corners and half of the streets have a landmark, which is a sign. Look at one:

    python -c "from games import streets; print(*streets.town('london').landmarks, sep='\\n')"

games/towns.json holds the plans and the routes. games/streets.py and games/cities.py of commit 7e44400 made
them once, from a seed. They are kept as data because another version of numpy or of the maths library might
move a street. games/cities.toml says what a city looks like.

Positions are metres (east, north) from the city's origin, headings degrees clockwise from north.
"""
import base64
import hashlib
import json
import math
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

DEGREE = math.pi / 180 * 6371000    # metres in a degree of latitude


@dataclass(eq=False)
class Landmark:
    color: str
    emblem: str
    word: str           # "Diner"
    board: int          # the shape of its sign, which tells the word, see drawing.board
    xy: list[float]
    at: int             # the panorama where its sign is to be read: the sign faces it

    @property
    def name(self):
        return f"{self.color} {self.emblem} {self.word}"


@dataclass(frozen=True, eq=False)    # hashed by identity: a key of caches
class Town:
    """A city. The panoramas of the nodes come first: panorama i < len(nodes) is at node i."""
    name: str
    origin: list[float]         # [lat, lon]
    look: dict                  # for games/drawing.py
    digest: str                 # eight characters, in names of files: change them with anything of the city
    nodes: np.ndarray           # (N, 2)
    edges: list                 # [[a, b], ...], a < b
    ends: np.ndarray            # of every street, (2, E, 2)
    panoramas: np.ndarray       # (P, 2)
    ids: list                   # of each panorama, 22 characters
    landmarks: list
    routes: list                # of each the panoramas of start, turning points and destination
    held_out: list              # the same: routes that training never walks

    def geocode(self, xy):
        """Return [lat, lon], to the centimetre."""
        lat, lon = self.origin
        wide = DEGREE * math.cos(math.radians(lat))
        return [round(lat + xy[1] / DEGREE, 7), round(lon + xy[0] / wide, 7)]


SPECS = tomllib.loads(Path(__file__).with_name("cities.toml").read_text(encoding="utf-8"))
COLORS = {name: tuple(rgb) for name, rgb in SPECS["colors"].items()}
EMBLEMS, CITIES = SPECS["emblems"], SPECS["cities"]     # {name: color of its disc}, {name: origin and look}
OTHERS = tuple(CITIES)[1:10]        # the paper's nine benchmark cities
# For pre-training, with the words of all cities in their names, as a foundation model knows them all.
BROAD = tuple(CITIES)[10:]


# --------------------------------------------------------------------------------------------------- geometry

def bearing(a, b):
    """Return the compass heading from point a to point b, degrees in [0, 360)."""
    return math.degrees(math.atan2(b[0] - a[0], b[1] - a[1])) % 360


def axes(a, b):
    """Return the unit vectors from point a towards b, and to the right of that."""
    x, y = (b - a) / np.linalg.norm(b - a)
    return np.array([x, y]), np.array([y, -x])


def cross(a, b):
    """Return the cross products of vectors (..., 2): positive where b is to the left of a."""
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def distances(points, a, b):
    """Return the distances of points (..., 2) to the segments from a (..., 2) to b (..., 2)."""
    along = b - a
    share = np.clip(((points - a) * along).sum(-1) / (along * along).sum(-1), 0, 1)
    return np.linalg.norm(points - a - share[..., None] * along, axis=-1)


def pieces_of(a, b):
    """Return into how many equal pieces, some 20 m each, panoramas cut the street from node a to node b."""
    return max(3, round(math.dist(a, b) / 20))


# ----------------------------------------------------------------------------------------------------- a city

@cache
def town(name):
    """Return the city laid out."""
    plan = json.loads(Path(__file__).with_name("towns.json").read_bytes())[name]
    nodes = np.array(plan.pop("nodes"))
    ends, panoramas = nodes[np.transpose(plan["edges"])], [*nodes]
    for a, b in zip(*ends):
        pieces = pieces_of(a, b)
        panoramas += [a + (b - a) * k / pieces for k in range(1, pieces)]
    ids = [base64.urlsafe_b64encode(hashlib.sha256(f"{name} {i}".encode()).digest())[:22].decode()
           for i in range(len(panoramas))]      # like those of the released panoramas
    landmarks = [Landmark(*row) for row in plan.pop("landmarks")]
    return Town(name, nodes=nodes, ends=ends, panoramas=np.array(panoramas), ids=ids, landmarks=landmarks,
                **CITIES[name], **plan)
