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
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np

from games import views
from games.compass import COMPASS, SIDES
from harness.ranges import HUGE, is_number

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


@dataclass(frozen=True)
class World:
    routes: tuple[Route, ...]
    skipped: tuple[str, ...]        # why, one line per bad route that was left out


def distance(a, b):
    """Return metres on the sphere between points (..., 2) of latitude and longitude in degrees, by the
    haversine formula."""
    a, b = np.radians(a), np.radians(b)
    half = np.sin((b - a) / 2) ** 2     # (..., 2)
    chord = half[..., 0] + np.cos(a[..., 0]) * np.cos(b[..., 0]) * half[..., 1]
    return 2 * EARTH * np.arcsin(np.sqrt(np.minimum(chord, 1)))


# -------------------------------------------------------------------------------------- which panoramas exist

def _brief(value):
    """Return a value of unknown size and origin as one short line."""
    plain = isinstance(value, (str, float)) or isinstance(value, int) and value.bit_length() < 99
    return repr(value if plain else type(value).__name__).strip("'")[:80]


def _number(value, what):
    """Return float(value), if it is a finite number."""
    if is_number(value, int, float) and abs(value) < HUGE:
        return float(value)
    raise ValueError(f"{what}: {_brief(value)} is not a finite number")


def _geocode(value, what):
    """Return (latitude, longitude) as floats of a pair of numbers."""
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise ValueError(f"{what}: expected [latitude, longitude], got {_brief(value)}")
    lat, lon = (_number(degrees, what) for degrees in value)
    if abs(lat) > 90 or abs(lon) > 180:
        raise ValueError(f"{what}: no latitude and longitude on earth: {lat}, {lon}")
    return lat, lon


class _Dtype:
    """Stand in for numpy.dtype in a pickled numpy number or string."""

    def __init__(self, letters, *_):
        if not re.fullmatch("[fiub][1248]|U[0-9]{1,4}", letters):
            raise ValueError(f"refused the numpy.dtype {_brief(letters)}, neither a number nor a string")
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


def _read(path, kind, parse=json.loads):
    """Return what `parse` makes of a file's bytes; ValueError (one line) whatever a damaged or hostile file
    provokes."""
    data = views.read_bytes(path)
    try:
        return parse(data)
    except Exception as error:
        raise ValueError(f"{path}: not {kind}: {_brief(str(error))}") from None


def read_mapping(path):
    """Return {(latitude, longitude): panorama id} of a gps_pano_mapping.pkl.

    ValueError (one line) if it is missing or holds anything else, above all anything that would run code."""
    entries = _read(path, "a table of panoramas", lambda data: _Plain(io.BytesIO(data)).load().items())
    mapping = {}
    for row, (point, name) in enumerate(entries):
        what = f"{path}: entry {row}"
        point = _geocode(point, what)
        if not isinstance(name, str) or not re.fullmatch(r"(?!\.)[\w:.=-]{1,200}", name):
            raise ValueError(f"{what}: {_brief(name)} cannot be the id of a panorama")
        mapping[point] = name
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

def _get(raw, *keys):
    """Return raw[key][key]...; ValueError that names the key which is missing."""
    for depth, key in enumerate(keys, 1):
        if not isinstance(raw, dict) or key not in raw:
            raise ValueError(f"missing key {'.'.join(keys[:depth])}")
        raw = raw[key]
    return raw


# "key": "value", on a line of its own, quoted or not
FIELD = re.compile(r"""^[{\s]*["']*([^:\n]*?)["']*[^\S\n]*:"""
                   r"""[^\S\n]*["']*(.*?)["']*[^\S\n]*,*[^\S\n]*$""", re.M)


def _blocks(text):
    """Return milestone_info as a list of dicts of strings, by the released code's rules: a block ends at }, a
    field at the end of its line, and commas and quotes around it do not matter."""
    if not isinstance(text, str):
        raise ValueError(f"milestone_info: expected a string, got {_brief(text)}")
    return [dict(fields) for block in text.split("}") if (fields := FIELD.findall(block))]


def _read_block(block):
    """Return (heading, direction, landmark, side) of a block: see Leg."""
    towards = _get(block, "to_next_intersection_heading")
    match = re.fullmatch(r"(-?[0-9]{1,3})(?:\.[0-9]*)? *\( *([A-Za-z]+) *\)", towards)
    if not match or match[2].lower() not in COMPASS:
        raise ValueError('to_next_intersection_heading: expected the like of "177 (south)", '
                         f'got {_brief(towards)}')
    heading, direction = int(match[1]) % 360, match[2].lower()
    remark = block.get("landmarks", "No landmark nearby")
    match = re.fullmatch(rf"(?i:no landmarks? nearby)|(.*\S) is on your ({'|'.join(SIDES)})\.?", remark)
    if not match:
        raise ValueError('landmarks: expected the like of "Joe\'s Diner is on your left behind", '
                         f'got {_brief(remark)}')
    return heading, direction, *match.groups()


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


def _place(value, what, known):
    """Return the Place nearest to a point of a file."""
    if place := _snap(_geocode(value, what), known):
        return place
    raise ValueError(f"{what} has no panorama within {RADIUS:.0f} m in {MAPPING}")


def _route(raw, name, known):
    """Return a Route from an entry of route_infos.json; ValueError (one line) if it is bad."""
    start = _get(raw, "start_place", "relocated_geocode")
    ends, blocks = _get(raw, "route_results", "geocode_list"), _blocks(_get(raw, "milestone_info"))
    if not isinstance(ends, list) or not ends:
        raise ValueError("geocode_list: expected a list of turning points")
    if len(blocks) != len(ends):
        raise ValueError(f"milestone_info has {len(blocks)} blocks for {len(ends)} turning points")
    place = start = _place(start, "start_place.relocated_geocode", known)
    legs = []
    for i, (block, end) in enumerate(zip(blocks, ends)):
        before, place = place, _place(end, f"geocode_list[{i}]", known)
        try:
            legs.append(Leg(*_read_block(block), _between(before, place, known), place))
        except ValueError as error:
            raise ValueError(f"milestone_info, block {i}: {error}") from None
    heading = int(_number(raw.get("init_heading", 0), "init_heading"))
    return Route(name, start, heading and (heading - 1) % 360 + 1, tuple(legs))


def _check_picture(panorama):
    """Raise ValueError if a panorama's jpg or metadata is bad. Quick: a jpg that ends with the end marker is
    not decoded; some have more bytes after it."""
    views.read_rotation(panorama)
    with suppress(OSError), open(panorama, "rb") as file:
        head = file.read(2)
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
        if head == b"\xff\xd8" and file.read().rstrip(b"\0").endswith(b"\xff\xd9"):
            return
    try:
        views.load(panorama, 256)
    except ValueError as error:
        raise ValueError(f"{error}; download it again") from None


def pictures_of(route):
    """Return the paths of all panoramas that a route may show."""
    places = [route.start, *(place for leg in route.legs for place in (*leg.between, leg.end))]
    return [place.panorama for place in places]


@lru_cache(maxsize=16)
def load(folder, *, held_out=False, pictures=False, skip_bad=False):
    """Return the World of a folder in the released format.

    held_out: read held_out_infos.json instead of route_infos.json, if the folder (a built-in training city)
    has one.
    pictures: look at all the panoramas' files, too, unless the folder is a built-in city, which draws them
    on demand.
    skip_bad: leave bad routes out and list them in World.skipped.
    ValueError (one line) that names the file and the route otherwise, and if no route is left."""
    folder = Path(folder)
    infos = folder / "held_out_infos.json"
    infos = infos if held_out and infos.exists() else folder / "route_infos.json"
    match _read(infos, "a JSON file"):
        case [[_, *_] as raws, *_]:
            pass
        case _:
            raise ValueError(f"{infos}: expected [routes, count], with a route at least")
    places = [Place(point, str(folder / "street_views" / f"{name}.jpg"))
              for point, name in sorted(read_mapping(folder / MAPPING).items())]
    known = np.reshape([place.geocode for place in places], (-1, 2)), places
    check = cache(_check_picture)
    look = pictures and not (folder / "city.json").exists()
    routes, skipped = [], []
    for i, raw in enumerate(raws):
        name = f"route {i} of {infos}"
        try:
            route = _route(raw, name, known)
            for panorama in pictures_of(route) if look else ():
                check(panorama)
            routes.append(route)
        except ValueError as error:
            skipped.append(f"{name}: {error}")
            if not skip_bad:
                raise ValueError(f"{skipped[0]} (--skip-bad-routes leaves such routes out)") from None
    if not routes:
        raise ValueError(f"{infos}: no route is left; {skipped[0]}")
    return World(tuple(routes), tuple(skipped))
