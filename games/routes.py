"""Read the navigation game's routes from a folder in the format of the released V-IRL data. The built-in
cities (games/cities.py) use this format, too:

    route_infos.json        [routes, how many]; a route: turning points, and what the walker is told there
    gps_pano_mapping.pkl    {(latitude, longitude): panorama id}
    street_views/           <id>.jpg and <id>.metadata.json; looked at for image tasks only

The pickle comes from the internet: no function that it names is ever imported.

    python -c "from games import routes; print(routes.load('FOLDER').routes[0])"
"""
import io
import json
import math
import os
import pickle
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from games import views
from games.compass import COMPASS, SIDES

MAPPING = "gps_pano_mapping.pkl"
EARTH = 6_371_000.0     # metres
RADIUS = 20.0           # metres: a point is moved to the nearest panorama if there is one as near as this
APART = 8.0             # metres that a point on the way keeps from both ends of its leg
POINTS = 5              # points tried on a leg, the released straight_line_length


@dataclass(frozen=True)
class Place:
    """A point of a route."""
    geocode: tuple[float, float]    # (latitude, longitude) of its panorama, degrees
    panorama: str                   # path of its jpg; a built-in city's is drawn when it is first asked for


@dataclass(frozen=True)
class Leg:
    """Turn, then move until `end`: one block of milestone_info."""
    heading: int                    # degrees clockwise from north, 0 to 359
    direction: str                  # of COMPASS, as the block says it
    landmark: str | None            # what stands at `end`, if anything does
    side: str | None                # of SIDES: where it stands for someone who arrives
    between: tuple[Place, ...]      # points one may pass on the way, in order
    end: Place


@dataclass(frozen=True)
class Route:
    # "route 17 of path/to/route_infos.json", counted from 0: for error messages
    name: str
    start: Place
    init_heading: int               # degrees, 1 to 360; 0: none given, the game draws one
    legs: tuple[Leg, ...]


def distance(a, b):
    """Return metres on the sphere between points (..., 2) of latitude and longitude in degrees, by the
    haversine formula."""
    a, b = np.radians(a), np.radians(b)
    half = np.sin((b - a) / 2) ** 2     # (..., 2)
    chord = half[..., 0] + np.cos(a[..., 0]) * np.cos(b[..., 0]) * half[..., 1]
    return 2 * EARTH * np.arcsin(np.sqrt(np.minimum(chord, 1)))


# -------------------------------------------------------------------------------------- which panoramas exist

def _attempt(what, function, *arguments):
    """Return function(*arguments); ValueError (one line) that begins with `what`, whatever a damaged or
    hostile file provokes."""
    try:
        return function(*arguments)
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{what}: {said[:300]}") from None


def _geocode(point):
    """Return (latitude, longitude) as floats of a pair of numbers."""
    lat, lon = map(float, point)
    if not (abs(lat) <= 90 and abs(lon) <= 180):        # so is NaN
        raise ValueError(f"no latitude and longitude on earth: {lat}, {lon}")
    return lat, lon


class _Dtype:
    """Stand in for numpy.dtype in a pickled numpy number or string."""

    def __init__(self, letters, *_):
        if not re.fullmatch("[fiub][1248]|U[0-9]{1,4}", letters):
            raise ValueError(f"refused the numpy.dtype {letters!r:.80}, neither a number nor a string")
        self.dtype = np.dtype(letters)

    def __setstate__(self, state):
        self.dtype = self.dtype.newbyteorder(state[1])


def _scalar(dtype, data):
    """Make a number or string of its bytes, as numpy's function does that a pickle names."""
    return np.frombuffer(data, dtype.dtype)[0].item()


class _Plain(pickle._Unpickler):    # the one in Python: the one in C can be made to fill all memory
    """Read dicts, tuples, lists, strings, numbers and numpy scalars. pickle.load would import and call
    whatever the author of the file wrote."""
    KNOWN = {"numpy.dtype": _Dtype, "numpy.core.multiarray.scalar": _scalar,
             "numpy._core.multiarray.scalar": _scalar}

    def find_class(self, module, name):
        if f"{module}.{name}" not in self.KNOWN:
            raise pickle.UnpicklingError(f"refused to load {module}.{name}")
        return self.KNOWN[f"{module}.{name}"]


def read_mapping(path):
    """Return {(latitude, longitude): panorama id} of a gps_pano_mapping.pkl. An error if it holds anything
    else, above all anything that would run code."""
    mapping = {}
    for point, name in _Plain(io.BytesIO(path.read_bytes())).load().items():
        if not re.fullmatch(r"(?!\.)[\w:.=-]{1,200}", name):
            raise ValueError(f"{name!r:.80} cannot be the id of a panorama")
        mapping[_geocode(point)] = name
    return mapping


def _snap(point, known):
    """Return the Place nearest to a point, or None if there is none within RADIUS.

    known: the points (n, 2) of all panoramas, sorted by latitude, and their Places in that order."""
    geocodes, places = known
    reach = math.degrees(RADIUS / EARTH) * 1.001    # of latitude: what lies beyond is not worth measuring
    first, last = np.searchsorted(geocodes[:, 0], (point[0] - reach, point[0] + reach))
    metres = distance(np.array(point), geocodes[first:last])
    return places[first + metres.argmin()] if metres.min(initial=math.inf) <= RADIUS else None


# ----------------------------------------------------------------------------------------------------- routes

# "key": "value", on a line of its own, quoted or not
FIELD = re.compile(r"""^[{\s]*["']*([^:\n]*?)["']*[^\S\n]*:"""
                   r"""[^\S\n]*["']*(.*?)["']*[^\S\n]*,*[^\S\n]*$""", re.M)


def _blocks(text):
    """Return milestone_info as a list of dicts of strings, by the released code's rules: a block ends at }, a
    field at the end of its line, and commas and quotes around it do not matter."""
    return [dict(fields) for block in text.split("}") if (fields := FIELD.findall(block))]


def _groups(pattern, text, like):
    """Return the groups of a pattern in a text that is all of it."""
    if match := re.fullmatch(pattern, text, re.I):
        return match.groups()
    raise ValueError(f"expected the like of {like!r}, got {text!r:.80}")


def _read_block(block):
    """Return (heading, direction, landmark, side) of a block: see Leg."""
    heading, direction = _groups(rf"(-?[0-9]{{1,3}})(?:\.[0-9]*)? *\( *({'|'.join(COMPASS)}) *\)",
                                 block["to_next_intersection_heading"], "177 (south)")
    landmark = _groups(rf"no landmarks? nearby|(.*\S) is on your ({'|'.join(SIDES)})\.?",
                       block.get("landmarks", "No landmark nearby"), "Joe's Diner is on your left behind")
    return int(heading) % 360, direction.lower(), *landmark


def _between(start, end, known):
    """Return the panoramas on the way from one Place to another.

    Released code: it keeps a panorama twice or more if several of the POINTS are snapped to it (sparse
    panoramas), and the walker then goes forward without moving. Here it is kept once."""
    ends = a, b = np.array((start.geocode, end.geocode))
    places = []
    for step in range(1, POINTS + 1):
        place = _snap(a + (b - a) * step / POINTS, known)
        if place and place not in places[-1:] and distance(ends, np.array(place.geocode)).min() > APART:
            places.append(place)
    return tuple(places)


def _place(point, known):
    """Return the Place nearest to a point of a file."""
    if place := _snap(_geocode(point), known):
        return place
    raise ValueError(f"{point} has no panorama within {RADIUS:.0f} m in {MAPPING}")


def _route(raw, name, known):
    """Return a Route from an entry of route_infos.json; an error if it is bad."""
    ends, blocks = raw["route_results"]["geocode_list"], _blocks(raw["milestone_info"])
    if not 0 < len(blocks) == len(ends):
        raise ValueError(f"milestone_info has {len(blocks)} blocks for {len(ends)} turning points")
    place = start = _place(raw["start_place"]["relocated_geocode"], known)
    legs = []
    for block, end in zip(blocks, ends):
        before, place = place, _place(end, known)
        legs.append(Leg(*_read_block(block), _between(before, place, known), place))
    heading = int(raw.get("init_heading", 0))
    return Route(name, start, heading and (heading - 1) % 360 + 1, tuple(legs))


def _check_picture(panorama):
    """Raise an error if a panorama's jpg or metadata is bad. Quick: a jpg with an end marker is not decoded;
    some have more bytes after it."""
    views.read_rotation(panorama)
    with open(panorama, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
        if b"\xff\xd9" in file.read():
            return
    views.load(panorama, 256)


def pictures_of(route):
    """Return the paths of all panoramas that a route may show."""
    places = [route.start, *(place for leg in route.legs for place in (*leg.between, leg.end))]
    return [place.panorama for place in places]


def load(folder, *, held_out=False, pictures=False):
    """Return the Routes of a folder in the released format.

    held_out: read held_out_infos.json instead of route_infos.json, if the folder (a built-in training city)
    has one.
    pictures: look at all the panoramas' files, too, unless the folder is a built-in city, which draws them
    on demand.
    ValueError (one line) that names the file and the route if one is bad, and if there is none."""
    folder = Path(folder)
    infos = folder / "held_out_infos.json"
    infos = infos if held_out and infos.exists() else folder / "route_infos.json"
    raws = _attempt(infos, lambda: list(json.loads(infos.read_bytes())[0]))
    mapping = _attempt(folder / MAPPING, read_mapping, folder / MAPPING)
    places = [Place(point, str(folder / "street_views" / f"{name}.jpg"))
              for point, name in sorted(mapping.items())]
    known = np.reshape([place.geocode for place in places], (-1, 2)), places
    check = cache(_check_picture)
    look = pictures and not (folder / "city.json").exists()
    routes = []
    for i, raw in enumerate(raws):
        name = f"route {i} of {infos}"
        routes.append(_attempt(name, _route, raw, name, known))
        for panorama in pictures_of(routes[-1]) if look else ():
            _attempt(f"{name}: {panorama} or its metadata", check, panorama)
    if not routes:
        raise ValueError(f"{infos}: there is no route")
    return routes
