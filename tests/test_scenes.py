"""Test the released street-view format and the cutting of views on a small folder written here."""

import io
import json
import math
import os
import pickle
import re
import struct
from collections import OrderedDict
from pathlib import Path
from string import Template

import numpy as np
import pytest
from PIL import Image

from games import cities, routes, views
from games.routes import load
from tables import cases, numbers, raises
from test_cities import metres

METRE = 1 / (6_371_000 * math.pi / 180)     # degrees of latitude
MAPPING = "gps_pano_mapping.pkl"


# --------------------------------------------------------------------------------------------- a small folder

def geocode(x, y):
    """Return the point so many metres east and north of a corner in New York."""
    return (40.75 + y * METRE, -73.98 + x * METRE / math.cos(math.radians(40.75)))


def block(index, landmark, heading):
    return ('{\n"intersection_idx": "%d",\n"landmarks": "%s",\n"distance": "93 meters",\n'
            '"human_heading": "29",\n"to_next_intersection_heading": "%s",\n}\n') % (index, landmark, heading)


MILESTONES = [("Joe's Diner is on your left behind", "0 (north)"), ("No landmark nearby", "90 (east)"),
              ("Bar: 21, Soho is on your right", "181 (south)")]
TEXT = "".join(block(i, *milestone) for i, milestone in enumerate(MILESTONES))
START, A, B, C = map(list, map(geocode, (2, 0, 57, 60), (-3, 104, 100, 60)))


def a_route(start=START, ends=(A, B, C), text=TEXT, heading=0):
    """Return a route north for 100 m, east for 60, south for 40. Its points are up to 4 m off the
    panoramas."""
    place = {"name": "Bar: 21, Soho", "geocode": geocode(50, 60)}
    return {"start_place": {"relocated_geocode": start}, "init_heading": heading, "dest_place": place,
            "route_results": {"geocode_list": ends, "landmark_list": [
                {"name": "Joe's Diner", "geocode": geocode(-9, 92)}, None]},
            "milestone_info": text}


STOPS = "0_0 0_20 0_40 0_60 0_80 0_100 20_100 40_100 60_100 60_80 60_60 500_500".split()
TABLE = {geocode(*map(int, stop.split("_"))): f"pano_{stop}-A" for stop in STOPS}
SHOWN = list(TABLE.values())[:-1]


def write_panorama(path, pixels, rotation=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=95, subsampling=0)
    metadata = json.dumps({"rotation": rotation, "panoId": path.stem})
    path.with_suffix(".metadata.json").write_text(metadata, encoding="utf-8")
    return str(path)


def grey(shade=90):
    return np.full((16, 32, 3), shade, np.uint8)


def write_folder(folder, *infos, table=TABLE, pictures=()):
    """Write routes, one if none is given."""
    folder.mkdir(exist_ok=True)
    infos = infos or (a_route(),)
    (folder / "route_infos.json").write_text(json.dumps([infos, len(infos)]), encoding="utf-8")
    (folder / MAPPING).write_bytes(pickle.dumps(table))
    for name in pictures:
        write_panorama(folder / "street_views" / f"{name}.jpg", grey(), 12.5)
    return folder


@pytest.fixture
def path(tmp_path):
    """Return where the table of panoramas is."""
    return tmp_path / MAPPING


def read(path, data):
    """Return the table that is read from these bytes, or from a pickle of it."""
    path.write_bytes(data if isinstance(data, bytes) else pickle.dumps(data))
    return routes._attempt(path, routes.read_mapping, path)


def legs_of(folder, *infos):
    return load(write_folder(folder, *infos))[0].legs


# ----------------------------------------------------------------------------------------------------- routes

def test_a_route_is_read(tmp_path):
    [route] = load(write_folder(tmp_path))
    assert route.name == f"route 0 of {tmp_path / 'route_infos.json'}" and route.init_heading == 0
    assert route.start == routes.Place(geocode(0, 0), str(tmp_path / "street_views" / "pano_0_0-A.jpg"))
    assert [(leg.heading, leg.direction, leg.landmark, leg.side) for leg in route.legs] == [
        (0, "north", "Joe's Diner", "left behind"), (90, "east", None, None),
        (181, "south", "Bar: 21, Soho", "right")]
    way = [[place.geocode for place in (*leg.between, leg.end)] for leg in route.legs]
    assert [point for points in way for point in points] == list(TABLE)[1:-1]
    assert [len(points) for points in way] == [5, 3, 2]


@cases("old, new", [
    (",\n}", "\n}"), ("\n", "  \r\n  "), ("\n{", "\n\n {"), ('"', ""), ('"', "'"), ("{", "{}{"),
    ("No landmark nearby", "No landmarks nearby"), ('"landmarks": "No landmark nearby",\n', ""),
    ('"0 (north)', '"360 ( North )')])
def test_milestones_are_read_as_leniently_as_the_released_parser_does(tmp_path, old, new):
    assert old in TEXT and legs_of(tmp_path, a_route(text=TEXT.replace(old, new))) == legs_of(tmp_path)


def test_a_given_heading_is_never_taken_for_none(tmp_path):
    infos = [a_route(heading=given) for given in numbers("0 17 360 361 -90 12.7")]
    found = load(write_folder(tmp_path, *infos))
    assert [route.init_heading for route in found] == numbers("0 17 360 1 270 12")


def test_points_on_the_way_by_brute_force(tmp_path):
    rng = np.random.default_rng(0)
    table = {geocode(*rng.uniform(-30, 230, 2)): f"p{i}" for i in range(150)}
    starts = rng.uniform(0, 200, (200, 2))
    stops = starts + rng.uniform(-1, 1, (200, 2)) * np.linspace(20, 200, 200)[:, None]
    pairs = [(geocode(*start), geocode(*stop)) for start, stop in zip(starts, stops)]

    def snapped(point):
        best = min(table, key=lambda known: metres(known, point))
        return best if metres(best, point) <= 20 else None

    pairs = [pair for pair in pairs if all(map(snapped, pair))]
    text = block(1, "No landmark nearby", "9 (east)")
    infos = [a_route(start, [stop], text) for start, stop in pairs]
    found = load(write_folder(tmp_path, *infos, table=table))
    expected = []
    for a, b in pairs:
        a, b, way = snapped(a), snapped(b), []
        for step in range(1, 6):
            point = snapped([p + (q - p) * step / 5 for p, q in zip(a, b)])
            if point and min(metres(point, a), metres(point, b)) > 8 and point not in way[-1:]:
                way.append(point)
        expected.append([a, *way, b])
    found = [[place.geocode for place in (route.start, *route.legs[0].between, route.legs[0].end)]
             for route in found]
    assert found == expected and len(expected) > 50


@cases("a, b, expected", """
    0 0         | 0 1          | 111194.9266
    60 179.9999 | 60 -179.9999 | 11.1195
    90 3        | -90 3        | 20015086.7960""")
def test_distances_on_the_sphere(a, b, expected):
    assert metres(numbers(a), numbers(b)) == pytest.approx(float(expected), abs=1e-3)


# What is said of a route in whose JSON the second column is replaced by the third.
JSON = {"ALL": a_route(), "START": START, "A": A, "B": B, "C": C, "TEXT": TEXT, "HUGE": 10**400}
@cases("message, old, new", r"""
    KeyError: 'start_place' | "start_place" | "x"
    KeyError: 'relocated_geocode' | "relocated_geocode" | "x"
    KeyError: 'geocode_list' | "geocode_list" | "x"
    KeyError: 'milestone_info' | "milestone_info" | "x"
    TypeError: list indices must be | $ALL | [1, 2]
    TypeError: 'NoneType' object is not | $ALL | null
    AttributeError: 'list' object has no | $TEXT | [{"landmarks": "x"}]
    milestone_info has 3 blocks for 0 turning points | [$A, $B, $C] | []
    milestone_info has 3 blocks for 2 turning points | [$A, $B, $C] | [$A, $B]
    milestone_info has 0 blocks for 3 turning points | $TEXT | "walk north"
    could not convert string to float: 'lat' | $B | {"lat": 1, "lng": 2}
    too many values to unpack | $B | [40.7, -73.9, 1]
    no latitude and longitude on earth: 40.7, nan | $C | [40.7, NaN]
    no latitude and longitude on earth: inf | $C | [Infinity, 1]
    OverflowError | $C | [$HUGE, 1]
    no latitude and longitude on earth: -173.98 | $C | [-173.98, 40.7]
    TypeError: 'NoneType' object is not | $START | null
    [40.749811, -73.98] has no panorama within 20 m in gps_pano | $START | [40.749811, -73.98]
    [40.750899, -73.978932] has no panorama within 20 m | $B | [40.750899, -73.978932]
    KeyError: 'to_next_intersection_heading' | to_next_intersection_heading\": \"90 | x\": \"1
    expected the like of '177 (south)', got '90 (eastish)' | 90 (east) | 90 (eastish)
    expected the like of '177 (south)' | 90 (east) | (east)
    expected the like of '177 (south)' | 90 (east) | ninety (east)
    expected the like of '177 (south)', got '90' | 90 (east) | 90
    expected the like of "Joe's | is on your right | is near your right
    expected the like of "Joe's | Soho is on your right | Soho is on your nose
    expected the like of "Joe's | Bar: 21, Soho is | is
    ValueError: invalid literal | "init_heading": 0 | "init_heading": "north"
    TypeError: int() argument | "init_heading": 0 | "init_heading": null
    ValueError: cannot convert float NaN | "init_heading": 0 | "init_heading": NaN""")
def test_a_bad_route_is_named(tmp_path, message, old, new):
    names = {name: json.dumps(value) for name, value in JSON.items()}
    old, new = (Template(part).substitute(names) for part in (old, new))
    assert old in names["ALL"]
    bad = json.loads(names["ALL"].replace(old, new, 1))
    folder = write_folder(tmp_path, a_route(), bad, a_route())
    assert raises(message, load, folder).startswith(f"route 1 of {folder / 'route_infos.json'}: ")


NO_JSON = b"", b"{", b"\xff\xfe", b"[" * 200_000, b"1" * 5000


@cases("content, message", [
    (None, "No such file or directory"), *((content, "Error: ") for content in NO_JSON),
    *((content, "Error: ") for content in (b"{}", b"[]", b"[1, 1]", b"null")),
    *((content, "there is no route") for content in (b"[[], 0]", b"[{}, 1]"))])
def test_bad_route_files(tmp_path, content, message):
    path = write_folder(tmp_path) / "route_infos.json"
    path.unlink() if content is None else path.write_bytes(content)
    assert str(path) in raises(message, load, tmp_path)


def test_held_out_routes_where_there_are_any(tmp_path):
    folder = write_folder(tmp_path)
    assert load(folder, held_out=True) == load(folder)
    held_out = json.dumps([[a_route(heading=9)] * 2, 2])
    (folder / "held_out_infos.json").write_text(held_out, encoding="utf-8")
    both = (load(folder, held_out=held_out) for held_out in (True, False))
    assert [[route.init_heading for route in found] for found in both] == [[9, 9], [0]]


# --------------------------------------------------------------------------------------------------- pictures

def damage(folder, name, content, suffix=".jpg"):
    """Overwrite a file with bytes, or with what a function makes of its own; None: remove it."""
    path = folder / "street_views" / (name + suffix)
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content(path.read_bytes()) if callable(content) else content)
    return path


@cases("suffix, content, message", [
    (".jpg", None, "No such file or directory"),
    *((".jpg", content, "cannot identify image file") for content in (b"<html>not found</html>", b"")),
    *((".jpg", content, "OSError: ") for content in (
        lambda data: data[:-2], lambda data: data[:300] + bytes(9000),
        lambda data: data[:len(data) // 2] + b"more" * 2000,
        lambda data: data[:len(data) // 2] + data[:600])),
    (".metadata.json", None, "No such file or directory"),
    *((".metadata.json", content, "Error: ") for content in (
        *NO_JSON, b'{"rotation": 1' + b"0" * 999 + b"}",
        *b'{} [1] {"rotation":"north"} {"rotation":null}'.split()))])
@cases("name, bad", [(SHOWN[0], 0), (SHOWN[2], 0), (SHOWN[-1], 1)])
def test_bad_pictures_are_found_before_the_game_begins(tmp_path, suffix, content, message, name, bad):
    first, last = a_route(ends=[A], text=block(0, *MILESTONES[0])), a_route(B, [C], block(0, *MILESTONES[2]))
    folder = write_folder(tmp_path, first, last, pictures=SHOWN)
    whole = load(folder, pictures=True)
    damage(folder, name, content, suffix)
    assert load(folder) == whole                        # a text task does not look
    text = raises(message, load, folder, pictures=True)
    assert text.startswith(f"route {bad} of ") and name in text
    (folder / "city.json").write_bytes(b"{}")
    assert load(folder, pictures=True) == whole         # a built-in city draws what is missing


@cases("more", [
    bytes(100), bytes(9000), b"x", b"trailer" * 2000, b"\xff\xd8\xff\xe1", b"\xff\xd9\n"])
def test_bytes_after_a_jpg_do_no_harm(tmp_path, more):
    folder = write_folder(tmp_path, pictures=SHOWN)
    path = damage(folder, SHOWN[0], lambda data: data + more)
    assert load(folder, pictures=True)[0]
    assert views.grid(path, 0, 8).size == (21, 21)


# ------------------------------------------------------------------------------------ the table of panoramas

def test_the_table_of_any_protocol(path):
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        for table in (TABLE, {}, {(1, -2): "one"}, {(i / 20, 1.0): f"p{i}" for i in range(1001)}):
            assert read(path, pickle.dumps(table, protocol)) == table


def test_numpy_scalars_in_the_table(path):
    table = {(np.float64(40.25), np.float32(-73.5)): "a", (np.uint8(9), 1): "c",
             (np.int16(-7), np.dtype(">f8").type(2)): np.str_("b-é")}
    for protocol in range(3, pickle.HIGHEST_PROTOCOL + 1):
        for name in (b"\x15numpy.core.multiarray", b"\x16numpy._core.multiarray"):      # numpy 1 and 2
            old = rb"(?<=\x8c).numpy\._?core\.multiarray"
            found = read(path, re.sub(old, lambda _: name, pickle.dumps(table, protocol)))
            assert found == table and {type(part) for key in found for part in key} == {float}
            assert {type(name) for name in found.values()} == {str}
    number = struct.pack(">d", 2.5)     # as a big-endian machine writes it
    scalar = (b"cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nX\2\0\0\0f8K\0K\1\x87R"
              b"(K\3X\1\0\0\0>NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tbC\x08" + number + b"\x86R")
    data = pickle.dumps({(2.5, 0.5): "x"}, 3).replace(b"G" + number, scalar)
    assert read(path, data) == {(2.5, 0.5): "x"}


class Reduced:
    """Pickles as a call of what it is given."""
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@cases("call, name", [
    ((os.system, ("touch CANARY",)), "posix.system"), ((eval, ("open('CANARY', 'w')",)), "builtins.eval"),
    ((getattr, ("", "join")), "builtins.getattr"), ((set, ([1],)), "builtins.set"),
    ((OrderedDict, ()), "collections.OrderedDict"), ((np.load, ("x",)), "numpy.load")])
def test_a_pickle_calls_nothing(path, monkeypatch, call, name):
    monkeypatch.chdir(path.parent)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        for table in (Reduced(*call), {(1.0, 2.0): Reduced(*call)}):
            data = pickle.dumps(table, protocol).replace(b"__builtin__", b"builtins")
            assert raises("refused to load", read, path, data).endswith(name)
    assert os.listdir() == [MAPPING]


# Pickles as bytes; {x n} stands for n times x.
@cases("message, data", r"""
    refused to load os.system | cos\nsystem\n(S'touch CANARY'\ntR.
    refused to load os.system | (S'touch CANARY'\nios\nsystem\n.
    refused to load numpy.core.multiarray.fromfile | cnumpy.core.multiarray\nfromfile\n.
    refused to load numpy.dtype.mro | \x80\x04\x8c\x05numpy\x8c\x09dtype.mro\x93.
    refused the numpy.dtype | cnumpy\ndtype\nU\x01O\x85R.
    refused the numpy.dtype | cnumpy\ndtype\nU\x0af8,f8,f8,O\x85R.
    refused the numpy.dtype | cnumpy\ndtype\nU\x0bV9999999999\x85R.
    Error: | \x80\x02cnumpy\ndtype\nU\x02f8\x85\x81}(K\x01K\x02\x86U\x01xub.
    Error: | Pevil\n.
    Error: | \x80\x02U\x04evilQ.
    Error: | \x80\x02\x82\x07.
    Error: | \x80\x02\x84\x07\0\0\0.
    Error: | \x80\x05\x97.
    Error: | }U\x01x}b.
    Error: | cnumpy.core.multiarray\nscalar\n)b.
    Error: | cnumpy\ndtype\n){\x85 99999}R.
    Error: | cnumpy.core.multiarray\nscalar\nU\x02f8U\x01x\x86R.
    Error: | cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nU\x02f8\x85RK\x05\x86R.
    Error: | cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nU\x02f8\x85RC\x01x\x86R.
    Error: | U\x09os.system)R.
    Error: | {( 300000}{t 300000}.
    Error: | }}q\0h\0h\0h\0\x87.
    Error: | .
    Error: | K\x01K\x02t.
    Error: | h\x05.
    Error: | <html>
    Error: | \x80\x04\x8d{\xff 8}x.
    Error: | \x80\x04\x8e\0\0\0\0\0\0\x04\0x.
    Error: | I{9 10000}\n.
    Error: | ]K\x01a.
    Error: | \x80\x04\x8f(K\x01K\x02\x90.
    Error: | U\x08a string.
    Error: | }U\x03latK\x01s.
    Error: | }\x8a\x96{\x7f 150}K\x01\x86U\x01xs.""")
def test_a_hostile_table_is_refused_by_name(path, monkeypatch, message, data):
    monkeypatch.chdir(path.parent)
    data = re.sub(r"{(\S+) (\d+)}", lambda found: found[1] * int(found[2]), data)
    data = data.encode().decode("unicode_escape").encode("latin-1")
    assert raises(message, read, path, data).startswith(str(path))
    assert os.listdir() == [MAPPING]


@cases("message, text", r"""
    could not convert string to float | [["north", 1, "x"]]
    TypeError: float() argument | [[1, 2, "x"], [1, null, "y"]]
    no latitude and longitude on earth | [[NaN, 1, "x"]]
    no latitude and longitude on earth | [[1, 1, "x"], [-91, 1, "x"]]
    too many values to unpack | [[1, 2, 3, "x"]]
    not enough values to unpack | [[1, "x"]]
    TypeError: expected string | [[1, 2, null]]
    '../../secret' cannot be the id | [[1, 2, "../../secret"]]
    'a/b' cannot be the id | [[1, 2, "a/b"]]
    '..' cannot be the id | [[1, 2, ".."]]
    'a\x00b' cannot be the id | [[1, 2, "a\u0000b"]]
    'a\nb' cannot be the id | [[1, 2, "a\nb"]]
    '' cannot be the id | [[1, 2, ""]]
    xxx cannot be the id | [[1, 2, "LONG"]]""")
def test_a_bad_entry_of_a_table_is_named(path, message, text):
    text = text.replace("LONG", "x" * 9999)
    table = {tuple(row[:-1]): row[-1] for row in json.loads(text)}
    assert raises(message, read, path, table).startswith(str(path))


def test_a_memo_with_a_huge_index_takes_no_memory(path):
    index = b"\xff\xff\xff\x7f"          # the C unpickler would make a list of this length
    data = b"\x80\x02}r" + index + b"K\x01K\x02\x86U\x01xsj" + index + b"."
    assert read(path, data) == {(1, 2): "x"}


def test_damaged_tables_are_refused_or_read_but_never_crash(path):
    rng = np.random.default_rng(0)
    whole = [pickle.dumps({(kind(1.5), 2.5): "one", (3, 4): "two"}, protocol) for protocol, kind in
             ((0, float), (2, float), (4, float), (3, np.float64), (5, np.float64))]
    for data in whole:
        for cut in range(len(data)):
            raises(MAPPING, read, path, data[:cut])
    for data in whole * 100:
        data = bytearray(data)
        for at in rng.integers(len(data), size=rng.integers(1, 4)):
            data[at] = rng.integers(256)
        try:
            assert type(read(path, bytes(data))) is dict
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)


def test_a_missing_table_is_named(path):
    write_folder(path.parent)
    path.unlink()
    assert str(path) in raises("No such file or directory", load, path.parent)


# ------------------------------------------------------------------------------------------------------ views

def direction_map(width, height, rotation):
    """Return heading and elevation (degrees) of the pixels of a panorama."""
    heading = (np.arange(width) / (width - 1) - 0.5) * 360 + 180 - rotation
    elevation = 90 - np.arange(height) / (height - 1) * 180
    return np.meshgrid(heading, elevation)


def keys(t):
    """Return Keys' cubic kernel, a = -0.5, from its textbook definition."""
    t = abs(t)
    if t < 1:
        return 1.5 * t**3 - 2.5 * t**2 + 1
    return -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2 if t < 2 else 0.0


def slow_view(pixels, rotation, heading, size, fov):
    """Compute `view` pixel by pixel: rotate the ray, find its longitude and latitude, weigh 16 pixels."""
    (height, width), out = pixels.shape[:2], np.zeros((size, size, 3))
    z, turn = size / 2 / math.tan(math.radians(fov / 2)), heading - 180 + rotation
    for v, u in np.ndindex(size, size):
        x, y = u - (size - 1) / 2, v - (size - 1) / 2
        column = ((math.degrees(math.atan2(x, z)) + turn + 180) % 360 / 360) * (width - 1)
        row = (math.degrees(math.asin(y / math.hypot(x, y, z))) / 180 + 0.5) * (height - 1)
        for i, j in np.ndindex(4, 4):
            i, j = math.floor(row) - 1 + i, math.floor(column) - 1 + j
            out[v, u] += pixels[min(max(i, 0), height - 1), j % width] * (keys(row - i) * keys(column - j))
    return np.clip(out, 0, 255)


@cases("sizes", ["64 32 23 90", "65 33 16 90", "31 40 20 130", "256 128 53 90", "5 3 9 170", "1 1 3 90"])
def test_whole_views_against_a_slow_reference(sizes):
    width, height, size, fov = map(int, sizes.split())
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    ways = zip(numbers("33 180 -77 359 91.5 270 123"), numbers("0 12.6 203.4 40.3 359.7 -77.7 237"))
    for heading, rotation in ways:
        fast = views.view(pixels, heading - 180 + rotation, size, fov)
        assert np.abs(fast - slow_view(pixels, rotation, heading, size, fov)).max() < 0.51       # rounding
        assert (fast == views.view(pixels, heading - 540 + rotation, size, fov)).all()


def test_the_grid_shows_front_right_back_left(tmp_path):
    rotation, facing = 77.7, 200
    h, _ = direction_map(216, 108, rotation)
    colors = np.array([(200, 40, 40), (40, 200, 40), (40, 40, 200), (200, 200, 40)], np.uint8)
    pixels = colors[np.round((h - facing) / 90).astype(int) % 4]
    path = write_panorama(tmp_path / "street_views" / "p.jpg", pixels, rotation)
    grid, pixels = np.asarray(views.grid(path, facing, 40)), np.asarray(Image.open(path).convert("RGB"))
    assert grid.shape == (85, 85, 3) and (grid[40:45] == 0).all() and (grid[:, 40:45] == 0).all()
    for i, color in enumerate(colors):
        row, column = i // 2 * 45, i % 2 * 45
        square = grid[row:row + 40, column:column + 40]
        assert np.abs(square[4:-4, 4:-4].astype(int) - color).max() < 12 and square[:, [0, -1]].max() > 90
        assert (square == views.view(pixels, facing + 90 * i - 180 + rotation, 40)).all()


@cases("width, size", [(3328, 53), (1000, 53), (2560, 280)])
def test_a_much_finer_panorama_is_made_smaller_where_it_was(tmp_path, width, size):
    h, e = np.radians(direction_map(width, width // 2, 0))
    waves = np.repeat((127 + 100 * np.sin(8 * h) * np.cos(7 * e)).astype(np.uint8)[..., None], 3, axis=2)
    for heading, rotation in ((181, 0.0), (45, 133.3), (3, 177.0)):       # the seam, away from it, near it
        path = write_panorama(tmp_path / f"{heading}.jpg", waves, rotation)
        square = np.asarray(views.grid(path, heading - 20, size))[:size, :size].astype(int)
        whole = views.view(np.asarray(Image.open(path)), heading - 200 + rotation, size)
        assert np.abs(square - whole).max() <= 3        # smooth: no aliasing
    stripes = np.zeros((width // 2, width, 3), np.uint8)
    stripes[:, 1::2] = 255
    grid = np.asarray(views.grid(write_panorama(tmp_path / "stripes.jpg", stripes), 10, size)).astype(int)
    assert np.abs(grid[:size, :size] - 127.5).max() < 30


def test_grids_are_kept_apart(tmp_path, monkeypatch):
    cut, load = [], views.load
    monkeypatch.setattr(views, "load", lambda *args: cut.append(1) or load(*args))
    paths = [write_panorama(tmp_path / f"{i}.jpg", grey(60 + 10 * i)) for i in range(3)]
    for repeat in range(2):
        for i, path in enumerate(paths):
            for heading in (0, 90):
                assert views.grid(path, heading, 10).getpixel((3, 3)) == (60 + 10 * i,) * 3
    assert len(cut) == 2 * 3


def jpeg(mode="RGB", **options):
    buffer, rng = io.BytesIO(), np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (64, 128, 3), dtype=np.uint8)).convert(mode)
    image.save(buffer, **{"format": "JPEG"} | options)
    return buffer.getvalue()


@cases("options", [{"mode": "L"}, {"mode": "CMYK"}, {"progressive": True}, {"quality": 1}])
def test_gray_cmyk_and_progressive_pictures(tmp_path, options):
    path = write_panorama(tmp_path / "p.jpg", grey())
    Path(path).write_bytes(jpeg(**options))
    assert views.grid(path, 0, 10).mode == "RGB"


def test_a_builtin_citys_panorama_is_drawn_when_it_is_asked_for(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(cities, "draw", lambda path: asked.append(write_panorama(Path(path), grey(50))))
    path = str(tmp_path / "street_views" / "p.jpg")
    raises("No such file", views.grid, path, 0, 10, error=OSError)      # no city.json: not ours to draw
    assert not asked
    (tmp_path / "city.json").write_bytes(b"{}")
    assert views.grid(path, 0, 10).getpixel((2, 2)) == (50, 50, 50) and asked == [path]
    views.grid(path, 1, 10)
    assert asked == [path]
