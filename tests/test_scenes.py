"""The released street-view format and the cutting of views, on a small folder written here."""

import io
import json
import math
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from games import cities, routes, unpickle, views

METRE = 1 / (6_371_000 * math.pi / 180)     # degrees of latitude
MAPPING = "gps_pano_mapping.pkl"


# ------------------------------------------------------------------------------------------------------ a small folder

def geocode(x, y):
    """Metres east and north of a corner in New York."""
    return (40.75 + y * METRE, -73.98 + x * METRE / math.cos(math.radians(40.75)))


def block(index, landmark, heading):
    return ('{\n"intersection_idx": "%d",\n"landmarks": "%s",\n"distance": "93 meters",\n"human_heading": "29",\n'
            '"to_next_intersection_heading": "%s",\n}\n') % (index, landmark, heading)


MILESTONES = [("Joe's Diner is on your left behind", "0 (north)"), ("No landmark nearby", "90 (east)"),
              ("Bar: 21, Soho is on your right", "181 (south)")]
TEXT = "".join(block(i, *milestone) for i, milestone in enumerate(MILESTONES))


def a_route(**changes):
    """North for 100 m, east for 60, south for 40. Its points are up to 4 m off the panoramas."""
    place = {"name": "Bar: 21, Soho", "geocode": list(geocode(50, 60))}
    return {"start_place": {"relocated_geocode": list(geocode(2, -3))}, "init_heading": 0, "dest_place": place,
            "route_results": {"geocode_list": [list(geocode(0, 104)), list(geocode(57, 100)), list(geocode(60, 60))],
                              "landmark_list": [{"name": "Joe's Diner", "geocode": list(geocode(-9, 92))}, None]},
            "milestone_info": TEXT} | changes


STOPS = ([(0, y) for y in range(0, 101, 20)] + [(x, 100) for x in (20, 40, 60)] + [(60, 80), (60, 60)] + [(500, 500)])
TABLE = {geocode(x, y): f"pano_{x}_{y}-A" for x, y in STOPS}


def write_panorama(path, pixels, rotation):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=95, subsampling=0)
    path.with_suffix(".metadata.json").write_text(json.dumps({"rotation": rotation, "panoId": path.stem}))
    return str(path)


def write_folder(folder, infos=None, table=TABLE, pictures=()):
    folder.mkdir(exist_ok=True)
    infos = [a_route()] if infos is None else infos
    (folder / "route_infos.json").write_text(json.dumps([infos, len(infos)]))
    (folder / MAPPING).write_bytes(pickle.dumps(table))
    for name in pictures:
        write_panorama(folder / "street_views" / f"{name}.jpg", np.full((8, 16, 3), 90, np.uint8), 12.5)
    return folder


def raises(message, function, *args, **kwargs):
    """The message of the ValueError that must come: one line, with `message` in it."""
    with pytest.raises(ValueError) as caught:
        function(*args, **kwargs)
    text = str(caught.value)
    assert message in text and "\n" not in text and len(text) < 500, text
    return text


# -------------------------------------------------------------------------------------------------------------- routes

def test_a_route_is_read(tmp_path):
    world = routes.load(write_folder(tmp_path))
    [route] = world.routes
    assert world.skipped == () and routes.load(tmp_path) is world
    assert route.name == f"route 0 of {tmp_path / 'route_infos.json'}" and route.init_heading == 0
    assert route.start == routes.Place(geocode(0, 0), str(tmp_path / "street_views" / "pano_0_0-A.jpg"))
    assert [(leg.heading, leg.direction, leg.landmark, leg.side) for leg in route.legs] == [
        (0, "north", "Joe's Diner", "left behind"), (90, "east", None, None), (181, "south", "Bar: 21, Soho", "right")]
    assert [leg.end.geocode for leg in route.legs] == [geocode(0, 100), geocode(60, 100), geocode(60, 60)]
    between = [[place.geocode for place in leg.between] for leg in route.legs]
    assert between == [[geocode(0, y) for y in (20, 40, 60, 80)], [geocode(20, 100), geocode(40, 100)], [geocode(60, 80)]]


@pytest.mark.parametrize("text", [
    TEXT.replace(",\n}", "\n}"),
    TEXT.replace("\n{", "\n\n {").replace("\n", "  \r\n  "),
    TEXT.replace('"', ""),
    TEXT.replace(' "', " '").replace('",', "',"),
    TEXT.replace("No landmark nearby", "No landmarks nearby"),
    TEXT.replace('"landmarks": "No landmark nearby",\n', ""),
    "{}" + TEXT.replace('"0 (north)', '"360 ( North )'),
])
def test_milestones_are_read_as_leniently_as_the_released_parser_does(tmp_path, text):
    expected = routes.load(write_folder(tmp_path / "a")).routes[0].legs
    legs = routes.load(write_folder(tmp_path / "b", [a_route(milestone_info=text)])).routes[0].legs
    for leg, other in zip(legs, expected, strict=True):
        assert (leg.heading, leg.direction, leg.landmark, leg.side) == (other.heading, other.direction, other.landmark, other.side)


@pytest.mark.parametrize("given, heading", [(0, 0), (17, 17), (360, 360), (361, 1), (-90, 270), (0.0, 0), (12.7, 12)])
def test_a_given_heading_is_never_taken_for_none(tmp_path, given, heading):
    assert routes.load(write_folder(tmp_path, [a_route(init_heading=given)])).routes[0].init_heading == heading


def test_points_on_the_way_by_brute_force(tmp_path):
    rng = np.random.default_rng(0)
    table = {geocode(*rng.uniform(-30, 230, 2)): f"p{i}" for i in range(150)}
    starts = rng.uniform(0, 200, (200, 2))
    stops = starts + rng.uniform(-1, 1, (200, 2)) * np.linspace(20, 200, 200)[:, None]
    points = [list(map(float, geocode(*xy))) for pair in zip(starts, stops) for xy in pair]
    raw = []
    for a, b in zip(points[::2], points[1::2]):
        raw.append(a_route(start_place={"relocated_geocode": a}, milestone_info=block(1, "No landmark nearby", "9 (east)"),
                           route_results={"geocode_list": [b]}))
    world = routes.load(write_folder(tmp_path, raw, table), skip_bad=True)

    def metres(a, b):       # on a plane: a few mm off over this distance
        return math.hypot((a[0] - b[0]) / METRE, (a[1] - b[1]) / METRE * math.cos(math.radians(40.751)))

    def snapped(point):
        best = min(table, key=lambda known: metres(known, point))
        return best if metres(best, point) <= 20 else None

    expected = []
    for a, b in zip(points[::2], points[1::2]):
        a, b, way = snapped(a), snapped(b), []
        for step in range(1, 6) if a and b else ():
            point = snapped([p + (q - p) * step / 5 for p, q in zip(a, b)])
            if point and metres(point, a) > 8 and metres(point, b) > 8 and point not in way[-1:]:
                way.append(point)
        expected += [(a, b, way)] if a and b else []
    found = [(route.start.geocode, route.legs[0].end.geocode, [place.geocode for place in route.legs[0].between])
             for route in world.routes]
    assert found == expected and len(expected) > 50 and len(world.skipped) == 200 - len(expected)


def test_distances_on_the_sphere():
    assert routes.distance(np.array([0.0, 0.0]), np.array([0.0, 1.0])) == pytest.approx(111_194.93, abs=0.01)
    assert routes.distance(np.array([60.0, 179.9999]), np.array([60.0, -179.9999])) == pytest.approx(11.119, abs=0.01)
    assert routes.distance(np.array([90.0, 3.0]), np.array([-90.0, 3.0])) == pytest.approx(math.pi * 6_371_000)


def without(*keys):
    raw = a_route()
    inner = raw
    for key in keys[:-1]:
        inner = inner[key]
    del inner[keys[-1]]
    return raw


def ends(*points):
    return a_route(route_results={"geocode_list": list(points)})


def told(old, new):
    return a_route(milestone_info=TEXT.replace(old, new, 1))


A, B, C = (list(geocode(*xy)) for xy in ((0, 100), (60, 100), (60, 60)))
BAD = [
    ("missing key start_place", without("start_place")),
    ("missing key start_place.relocated_geocode", without("start_place", "relocated_geocode")),
    ("missing key route_results.geocode_list", without("route_results", "geocode_list")),
    ("missing key milestone_info", without("milestone_info")),
    ("missing key start_place", [1, 2]),
    ("missing key start_place", None),
    ("milestone_info: expected a string", a_route(milestone_info=[{"landmarks": "x"}])),
    ("geocode_list: expected a list of turning points", ends()),
    ("milestone_info has 3 blocks for 2 turning points", ends(A, B)),
    ("milestone_info has 0 blocks for 3 turning points", a_route(milestone_info="walk north")),
    ("geocode_list[1]: expected [latitude, longitude], got dict", ends(A, {"lat": 1}, C)),
    ("geocode_list[1]: expected [latitude, longitude], got list", ends(A, B + [1], C)),
    ("geocode_list[2]: nan is not a finite number", ends(A, B, [40.7, math.nan])),
    ("geocode_list[2]: inf is not a finite number", ends(A, B, [math.inf, 1])),
    ("geocode_list[2]: int is not a finite number", ends(A, B, [10 ** 400, 1])),
    ("geocode_list[2]: 40.7 is not a finite number", ends(A, B, ["40.7", 1])),
    ("geocode_list[2]: True is not a finite number", ends(A, B, [True, 1])),
    ("geocode_list[2]: no latitude and longitude on earth: -173.98", ends(A, B, [-173.98, 40.7])),
    ("start_place.relocated_geocode: expected [latitude, longitude], got NoneType", a_route(start_place={"relocated_geocode": None})),
    ("the start has no panorama within 20 m in gps_pano_mapping.pkl", a_route(start_place={"relocated_geocode": list(geocode(0, -21))})),
    ("turning point 1 has no panorama within 20 m", ends(A, list(geocode(90, 100)), C)),
    ("block 1: missing key to_next_intersection_heading", told('"to_next_intersection_heading": "90 (east)"', '"x": "1"')),
    ("block 1: to_next_intersection_heading: expected", told("90 (east)", "90 (eastish)")),
    ("block 1: to_next_intersection_heading: expected", told("90 (east)", "(east)")),
    ("block 1: to_next_intersection_heading: expected", told("90 (east)", "ninety (east)")),
    ('expected the like of "177 (south)", got 90', told("90 (east)", "90")),
    ("block 2: landmarks: expected", told("is on your right", "is near your right")),
    ("block 2: landmarks: expected", told("Soho is on your right", "Soho is on your nose")),
    ("block 2: landmarks: expected", told("Bar: 21, Soho is", " is")),
    ("init_heading: north is not a finite number", a_route(init_heading="north")),
    ("init_heading: NoneType is not a finite number", a_route(init_heading=None)),
    ("init_heading: nan is not a finite number", a_route(init_heading=math.nan)),
]


@pytest.mark.parametrize("message, bad", BAD)
def test_a_bad_route_is_named_and_can_be_skipped(tmp_path, message, bad):
    folder = write_folder(tmp_path, [a_route(), bad, a_route()])
    text = raises(message, routes.load, folder)
    assert text.startswith(f"route 1 of {folder / 'route_infos.json'}: ") and "--skip-bad-routes" in text
    world = routes.load(folder, skip_bad=True)
    assert [route.name.split()[1] for route in world.routes] == ["0", "2"]
    [line] = world.skipped
    assert line.startswith(f"route 1 of {folder / 'route_infos.json'}: ") and message in line
    write_folder(tmp_path / "all", [bad] * 2)
    raises(message, routes.load, tmp_path / "all", skip_bad=True)


@pytest.mark.parametrize("content, message", [
    (None, "No such file or directory"), (b"", "not a JSON file"), (b"{", "not a JSON file"), (b"\xff\xfe", "not a JSON file"),
    (b"[" * 200_000, "not a JSON file"), (b"1" * 5000, "not a JSON file"),
    (b"{}", "expected [routes, count]"), (b"[]", "expected [routes, count]"),
    (b"[{}, 1]", "expected [routes, count]"), (b"null", "expected [routes, count]"), (b"[[], 0]", "no routes in it"),
])
def test_bad_route_files(tmp_path, content, message):
    folder = write_folder(tmp_path)
    path = folder / "route_infos.json"
    path.unlink() if content is None else path.write_bytes(content)
    assert str(path) in raises(message, routes.load, folder)
    assert str(path) in raises(message, routes.load, folder, skip_bad=True)


def test_held_out_routes_where_there_are_any(tmp_path):
    folder = write_folder(tmp_path)
    assert routes.load(folder, held_out=True).routes == routes.load(folder).routes
    (folder / "held_out_infos.json").write_text(json.dumps([[a_route(init_heading=9)] * 2, 2]))
    routes.load.cache_clear()
    assert [route.init_heading for route in routes.load(folder, held_out=True).routes] == [9, 9]
    assert len(routes.load(folder).routes) == 1


# ------------------------------------------------------------------------------------------------------------ pictures

SHOWN = [f"pano_{x}_{y}-A" for x, y in STOPS[:-1]]


def damage(folder, name, content, suffix=".jpg"):
    path = folder / "street_views" / (name + suffix)
    path.unlink() if content is None else path.write_bytes(content(path.read_bytes()) if callable(content) else content)
    return path


@pytest.mark.parametrize("suffix, content, message", [
    (".jpg", None, "No such file or directory"), (".jpg", b"", "an empty file"),
    (".jpg", b"<html>not found</html>", "a truncated jpg"),
    (".jpg", lambda data: data[:-2], "a truncated jpg"), (".jpg", lambda data: data[:300] + bytes(9000), "a truncated jpg"),
    (".jpg", lambda data: data[:len(data) // 2] + b"more" * 2000, "a truncated jpg"),
    (".jpg", lambda data: data[:len(data) // 2] + data[:600], "a truncated jpg"),
    (".metadata.json", None, "No such file or directory"),
    *((".metadata.json", content, "a number `rotation`") for content in (
        b"", b"{}", b"[1]", b'{"rotation": "12"}', b'{"rotation": NaN}', b'{"rotation": true}', b"[" * 200_000,
        b'{"rotation": 1' + b"0" * 999 + b"}")),
])
@pytest.mark.parametrize("name", [SHOWN[0], SHOWN[2], SHOWN[-1]])
def test_bad_pictures_are_found_before_the_game_begins(tmp_path, suffix, content, message, name):
    short = a_route(milestone_info=block(0, *MILESTONES[0]), route_results={"geocode_list": [A]})     # stays on 0, y
    away = a_route(start_place={"relocated_geocode": B},
                   milestone_info=block(0, *MILESTONES[2]), route_results={"geocode_list": [C]})
    folder = write_folder(tmp_path, [short, away], pictures=SHOWN)
    assert len(routes.load(folder, pictures=True).routes) == 2
    path = damage(folder, name, content, suffix)
    routes.load.cache_clear()
    assert len(routes.load(folder).routes) == 2                     # a text task does not look
    bad = 1 if name == SHOWN[-1] else 0
    text = raises(message, routes.load, folder, pictures=True)
    assert text.startswith(f"route {bad} of ") and str(path) in text
    world = routes.load(folder, pictures=True, skip_bad=True)
    assert len(world.routes) == 1 and len(world.skipped) == 1 and str(path) in world.skipped[0]
    (folder / "city.json").write_text("{}")                         # a built-in city draws what is missing
    routes.load.cache_clear()
    assert len(routes.load(folder, pictures=True).routes) == 2


@pytest.mark.parametrize("more", [
    bytes(100), bytes(9000), b"x", b"trailer" * 2000, b"\xff\xd8\xff\xe1", b"\xff\xd9\n"])
def test_bytes_after_a_jpg_do_no_harm(tmp_path, more):
    folder = write_folder(tmp_path, pictures=SHOWN)
    damage(folder, SHOWN[0], lambda data: data + more)
    assert routes.load(folder, pictures=True).routes
    assert views.grid(routes.load(folder).routes[0].start.panorama, 0, 8).size == (21, 21)


# --------------------------------------------------------------------------------------------- the table of panoramas

class Reduced:
    """Pickles as a call of what it is given."""
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_the_table_of_any_protocol(tmp_path, protocol):
    path = tmp_path / MAPPING
    for table in (TABLE, {}, {(1, -2): "one"}, {(i / 20, 1.0): f"p{i}" for i in range(1001)}):
        path.write_bytes(pickle.dumps(table, protocol))
        assert routes.read_mapping(path) == table


def test_numpy_scalars_in_the_table(tmp_path):
    path = tmp_path / MAPPING
    table = {(np.float64(40.25), np.float32(-73.5)): "a", (np.uint8(9), 1): "c",
             (np.int16(-7), np.dtype(">f8").type(2)): np.str_("b-é")}
    for protocol in range(3, pickle.HIGHEST_PROTOCOL + 1):
        data = pickle.dumps(table, protocol)
        for old, new in ((b"numpy.core.", b"numpy._core."), (b"numpy._core.", b"numpy.core."), (b"numpy.core.", b"numpy.core.")):
            path.write_bytes(data.replace(b"\x8c" + bytes([len(old) + 10]) + old, b"\x8c" + bytes([len(new) + 10]) + new))
            read = routes.read_mapping(path)
            assert read == table and {type(part) for key in read for part in key} == {float}
            assert {type(name) for name in read.values()} == {str}
    number = struct.pack(">d", 2.5)     # as a big-endian machine writes it
    scalar = (b"cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nX\2\0\0\0f8K\0K\1\x87R"
              b"(K\3X\1\0\0\0>NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tbC\x08" + number + b"\x86R")
    path.write_bytes(pickle.dumps({(2.5, 0.5): "x"}, 3).replace(b"G" + number, scalar))
    assert routes.read_mapping(path) == {(2.5, 0.5): "x"}


HOSTILE = [
    ("refused to load posix.system", pickle.dumps(Reduced(os.system, ("touch CANARY",)))),
    ("refused to load posix.system", pickle.dumps({(1.0, 2.0): Reduced(os.system, ("touch CANARY",))}, 0)),
    ("refused to load os.system", b"cos\nsystem\n(S'touch CANARY'\ntR."),
    ("refused to load builtins.eval", pickle.dumps(Reduced(eval, ("open('CANARY', 'w')",)))),
    ("refused to load builtins.getattr", pickle.dumps({(1.0, 2.0): Reduced(getattr, ("", "join"))})),
    ("refused to load builtins.set", pickle.dumps({(1.0, 2.0): {1, 2}}, 2).replace(b"__builtin__", b"builtins")),
    ("refused to load collections.OrderedDict", pickle.dumps(__import__("collections").OrderedDict(TABLE))),
    ("refused to load numpy.load", b"cnumpy\nload\n(S'x'\ntR."),
    ("refused to load numpy.core.multiarray.fromfile", b"cnumpy.core.multiarray\nfromfile\n."),
    ("refused to load numpy.dtype.mro", b"\x80\x04\x8c\x05numpy\x8c\x09dtype.mro\x93."),
    ("refused to load os.system", b"(S'touch CANARY'\nios\nsystem\n."),
    ("not a table of panoramas:", b"\x80\x02cnumpy\ndtype\nU\x02f8\x85\x81}(K\x01K\x02\x86U\x01xub."),
    ("not a table of panoramas:", b"Pevil\n."),
    ("not a table of panoramas:", b"\x80\x02U\x04evilQ."),
    ("not a table of panoramas:", b"\x80\x02\x82\x07."),
    ("not a table of panoramas:", b"\x80\x02\x84\x07\0\0\0."),
    ("not a table of panoramas:", b"\x80\x05\x97."),
    ("not a table of panoramas", pickle.dumps([1])),
    ("not a table of panoramas", pickle.dumps({1, 2})),
    ("not a table of panoramas", b"}U\x01x}b."),
    ("not a table of panoramas", b"cnumpy.core.multiarray\nscalar\n)b."),
    ("refused the numpy.dtype", b"cnumpy\ndtype\nU\x01O\x85R."),
    ("refused the numpy.dtype", b"cnumpy\ndtype\nU\x0af8,f8,f8,O\x85R."),
    ("refused the numpy.dtype", b"cnumpy\ndtype\nU\x0bV9999999999\x85R."),
    ("not a table of panoramas:", b"cnumpy\ndtype\n" + b")" + b"\x85" * 99_999 + b"R."),
    ("not a table of panoramas:", b"cnumpy.core.multiarray\nscalar\nU\x02f8U\x01x\x86R."),
    ("not a table of panoramas:", b"cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nU\x02f8\x85RK\x05\x86R."),
    ("not a table of panoramas:", b"cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nU\x02f8\x85RC\x01x\x86R."),
    ("not a table of panoramas:", b"U\x09os.system)R."),
    ("entry 0: expected latitude", pickle.dumps({"lat": 1})),
    ("not a table of panoramas", b"(" * 300_000 + b"t" * 300_000 + b"."),
    ("not a table of panoramas", pickle.dumps("a string")),
    ("not a table of panoramas", b"}}q\0h\0h\0h\0\x87."),
    ("not a table of panoramas:", b"."),
    ("not a table of panoramas:", b"K\x01K\x02t."),
    ("not a table of panoramas:", b""),
    ("not a table of panoramas:", b"h\x05."),
    ("not a table of panoramas:", b"<html>"),
    ("not a table of panoramas:", b"\x80\x04\x8d" + b"\xff" * 8 + b"x."),        # a string of 2**64 bytes
    ("not a table of panoramas:", b"\x80\x04\x8e" + struct.pack("<q", 1 << 50) + b"x."),
    ("not a table of panoramas:", b"I" + b"9" * 10_000 + b"\n."),
    ("entry 0: int is not a finite number", b"}\x8a\x96" + b"\x7f" * 150 + b"K\x01\x86U\x01xs."),
    ("entry 0: True is not a finite number", pickle.dumps({(True, 1): "x"})),
    ("entry 0: 1 is not a finite number", pickle.dumps({("1", 1): "x"})),
    ("entry 0: nan is not a finite number", pickle.dumps({(math.nan, 1): "x"})),
    ("entry 1: no latitude and longitude on earth", pickle.dumps({(1, 1): "x", (-91, 1): "x"})),
    ("entry 0: expected latitude, longitude and a panorama's id", pickle.dumps({(1, 2, 3): "x"})),
    ("entry 0: NoneType cannot be the id", pickle.dumps({(1, 2): None})),
    ("entry 0: ../../secret cannot be the id", pickle.dumps({(1, 2): "../../secret"})),
    ("entry 0: .. cannot be the id", pickle.dumps({(1, 2): ".."})),
    ("entry 0: a\\x00b cannot be the id", pickle.dumps({(1, 2): "a\0b"})),
    ("entry 0: a\\nb cannot be the id", pickle.dumps({(1, 2): "a\nb"})),
    ("entry 0:  cannot be the id", pickle.dumps({(1, 2): ""})),
    ("xxx... cannot be the id", pickle.dumps({(1, 2): "x" * 9999})),
]


@pytest.mark.parametrize("message, data", HOSTILE)
def test_a_hostile_table_is_refused_by_name(tmp_path, monkeypatch, message, data):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / MAPPING
    path.write_bytes(data)
    text = raises(message, routes.read_mapping, path)
    assert text.startswith(str(path))
    assert os.listdir(tmp_path) == [MAPPING]


def test_a_memo_with_a_huge_index_takes_no_memory(tmp_path):
    path = tmp_path / MAPPING
    index = b"\xff\xff\xff\x7f"          # the C unpickler would make a list of this length
    path.write_bytes(b"\x80\x02}r" + index + b"K\x01K\x02\x86U\x01xsj" + index + b".")
    assert routes.read_mapping(path) == {(1, 2): "x"}


def test_damaged_tables_are_refused_or_read_but_never_crash(tmp_path):
    path, rng = tmp_path / MAPPING, np.random.default_rng(0)
    whole = [pickle.dumps({(kind(1.5), 2.5): "one", (3, 4): "two"}, protocol) for protocol, kind in
             ((0, float), (2, float), (4, float), (3, np.float64), (5, np.float64))]
    for data in whole:
        for cut in range(len(data)):
            path.write_bytes(data[:cut])
            raises("not a table of panoramas", routes.read_mapping, path)
    for data in whole * 100:
        data = bytearray(data)
        for at in rng.integers(len(data), size=rng.integers(1, 4)):
            data[at] = rng.integers(256)
        path.write_bytes(data)
        try:
            assert type(routes.read_mapping(path)) is dict
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)


def test_json_is_read_instead_of_the_pickle(tmp_path, capsys):
    folder = write_folder(tmp_path, table={(float(lat), np.float64(lon)): name for (lat, lon), name in TABLE.items()})
    done = subprocess.run([sys.executable, "-m", "games.unpickle", str(folder / MAPPING)], capture_output=True, text=True,
                          cwd=Path(__file__).parents[1])
    out = folder / "gps_pano_mapping.json"
    assert done.returncode == 0 and f"{out}: {len(TABLE)} panoramas" in done.stdout, done
    assert routes.read_mapping(out) == TABLE
    before = routes.load(folder)
    (folder / MAPPING).write_bytes(b"cos\nsystem\n.")
    routes.load.cache_clear()
    assert routes.load(folder) == before
    with pytest.raises(SystemExit) as caught:
        unpickle.main([str(folder / MAPPING)])
    message = f"{folder / MAPPING}: not a table of panoramas: refused to load os.system\n"
    assert caught.value.code == 1 and capsys.readouterr().err == message
    for content, message in ((b"{}", "not a table"), (b"[1]", "entry 0: expected"), (b"[[1, 2]]", "entry 0: expected"),
                             (b'[[1, 2, "x"], [1, null, "y"]]', "entry 1: NoneType"),
                             (b'[[1, 2, "a/b"]]', "a/b cannot be"), (b"[", "not a JSON")):
        out.write_bytes(content)
        assert str(out) in raises(message, routes.read_mapping, out)
        routes.load.cache_clear()
        assert str(out) in raises(message, routes.load, folder)
    out.unlink()
    (folder / MAPPING).unlink()
    routes.load.cache_clear()
    assert str(folder / MAPPING) in raises("No such file or directory", routes.load, folder)


# --------------------------------------------------------------------------------------------------------------- views

def direction_map(width, height, rotation):
    """Heading and elevation (degrees) of the pixels of a panorama."""
    heading = (np.arange(width) / (width - 1) - 0.5) * 360 + 180 - rotation
    elevation = 90 - np.arange(height) / (height - 1) * 180
    return np.meshgrid(heading, elevation)


def marked(width, rotation, heading, elevation, radius=4.0):
    """A black panorama (width / 2, width, 3) with a soft white spot (in degrees) in a direction."""
    h, e = (np.radians(angle) for angle in direction_map(width, width // 2, rotation))
    a, b = math.radians(heading), math.radians(elevation)
    cos = np.sin(e) * math.sin(b) + np.cos(e) * math.cos(b) * np.cos(h - a)
    spot = np.exp(-(np.degrees(np.arccos(np.clip(cos, -1, 1))) / radius) ** 2)
    return np.repeat((255 * spot).astype(np.uint8)[..., None], 3, axis=2)


def expected_pixel(heading, elevation, facing, size, fov=90):
    """(x, y) of a direction in a view, by the pinhole camera."""
    turn, f = math.radians(heading - facing), size / 2 / math.tan(math.radians(fov / 2))
    return (size - 1) / 2 + f * math.tan(turn), (size - 1) / 2 - f * math.tan(math.radians(elevation)) / math.cos(turn)


def peak(square):
    """(x, y) of the middle of the brightest spot."""
    weights = np.where(square > square.max() * 0.6, square.astype(float), 0)
    y, x = np.indices(square.shape)
    return (weights * x).sum() / weights.sum(), (weights * y).sum() / weights.sum()


@pytest.mark.parametrize("heading, elevation, facing, rotation", [
    (0, 0, 0, 0), (10, 12, 0, 0), (-30, -25, -10, 0), (180, 20, 180, 0), (178, 5, 200, 0), (359, -8, 2, 40.3), (90, 30, 120, 180.0),
    (91.5, -31, 75.25, 359.7), (270, 3, 240, -77.7), (45, 0, 10, 135.0), (123, 10, 123, 237),
    (123, 10, 483, 237 - 720), (300, -20, 290, 60.0)])
def test_a_marked_direction_is_seen_where_it_is(heading, elevation, facing, rotation):
    panorama = marked(720, rotation, heading, elevation)
    for size, fov in ((101, 90), (64, 90), (101, 120), (64, 75)):
        square = views.view(panorama, rotation, facing, size, fov)
        assert square.shape == (size, size, 3) and square.dtype == np.uint8 and square.max() > 200
        assert peak(square[..., 0]) == pytest.approx(expected_pixel(heading, elevation, facing, size, fov), abs=0.35)
    behind = views.view(panorama, rotation, facing + 180, 64)
    assert behind.max() < 5


def keys(t):
    """Keys' cubic kernel, a = -0.5, from its textbook definition."""
    t = abs(t)
    return 1.5 * t ** 3 - 2.5 * t ** 2 + 1 if t < 1 else -0.5 * t ** 3 + 2.5 * t ** 2 - 4 * t + 2 if t < 2 else 0.0


def slow_view(pixels, rotation, heading, size, fov):
    """`view` pixel by pixel: rotate the ray, find its longitude and latitude, weigh 16 pixels."""
    height, width = pixels.shape[:2]
    f, turn, out = size / 2 / math.tan(math.radians(fov / 2)), math.radians(heading - 180 + rotation), np.zeros((size, size, 3))
    for v in range(size):
        for u in range(size):
            x, y, z = u - (size - 1) / 2, v - (size - 1) / 2, f
            x, z = x * math.cos(turn) + z * math.sin(turn), z * math.cos(turn) - x * math.sin(turn)
            column = (math.degrees(math.atan2(x, z)) / 360 + 0.5) * (width - 1)
            row = (math.degrees(math.asin(y / math.sqrt(x * x + y * y + z * z))) / 180 + 0.5) * (height - 1)
            for i in range(math.floor(row) - 1, math.floor(row) + 3):
                for j in range(math.floor(column) - 1, math.floor(column) + 3):
                    out[v, u] += pixels[min(max(i, 0), height - 1), j % width] * (keys(row - i) * keys(column - j))
    return np.clip(out, 0, 255)


@pytest.mark.parametrize("width, height, size, fov", [
    (64, 32, 23, 90), (65, 33, 16, 90), (31, 40, 20, 130), (256, 128, 53, 90), (5, 3, 9, 170), (1, 1, 3, 90)])
def test_whole_views_against_a_slow_reference(width, height, size, fov):
    rng = np.random.default_rng(width)
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    for heading, rotation in ((33, 0.0), (180, 12.6), (-77, 203.4)):
        fast, slow = views.view(pixels, rotation, heading, size, fov), slow_view(pixels, rotation, heading, size, fov)
        assert np.abs(fast - slow).max() < 0.51       # rounding
    assert (views.view(pixels, 12.6, 180, size, fov) == views.view(pixels, 12.6 + 360, -540, size, fov)).all()


def test_the_grid_shows_front_right_back_left(tmp_path):
    rotation, facing = 77.7, 200
    h, _ = direction_map(216, 108, rotation)
    colors = np.array([(200, 40, 40), (40, 200, 40), (40, 40, 200), (200, 200, 40)], np.uint8)
    path = write_panorama(tmp_path / "street_views" / "p.jpg", colors[np.round((h - facing) / 90).astype(int) % 4], rotation)
    grid = np.asarray(views.grid(path, facing, 40))
    assert grid.shape == (85, 85, 3)
    assert (grid[40:45] == 0).all() and (grid[:, 40:45] == 0).all()
    for i, (row, column) in enumerate(((0, 0), (0, 45), (45, 0), (45, 45))):
        square = grid[row:row + 40, column:column + 40]
        assert np.abs(square[4:-4, 4:-4].astype(int) - colors[i]).max() < 12 and square[:, [0, -1]].max() > 90
    pixels = np.asarray(Image.open(path).convert("RGB"))
    for i, (row, column) in enumerate(((0, 0), (0, 45), (45, 0), (45, 45))):
        assert (grid[row:row + 40, column:column + 40] == views.view(pixels, rotation, facing + 90 * i, 40)).all()


@pytest.mark.parametrize("width, size", [(3328, 53), (1000, 53), (2560, 280)])
def test_a_much_finer_panorama_is_made_smaller_where_it_was(tmp_path, width, size):
    for heading, rotation in ((181, 0.0), (45, 133.3), (3, 177.0)):       # the seam, away from it, near it
        path = write_panorama(tmp_path / f"{heading}.jpg", marked(width, rotation, heading, 9, radius=5), rotation)
        square = np.asarray(views.grid(path, heading - 20, size))[:size, :size, 0]
        assert peak(square) == pytest.approx(expected_pixel(heading, 9, heading - 20, size), abs=0.01 * size)
        whole = views.view(np.asarray(Image.open(path)), rotation, heading - 20, size)[..., 0]      # smooth: no aliasing
        assert np.abs(square.astype(int) - whole).max() <= 3
    stripes = np.repeat((np.arange(width) % 2 * 255).astype(np.uint8)[None, :, None], width // 2, axis=0).repeat(3, axis=2)
    grid = np.asarray(views.grid(write_panorama(tmp_path / "stripes.jpg", stripes, 0), 10, size)).astype(int)
    assert np.abs(grid[:size, :size] - 127.5).max() < 30


def test_grids_are_kept_within_bounds_and_apart(tmp_path, monkeypatch):
    paths = [write_panorama(tmp_path / f"{i}.jpg", np.full((16, 32, 3), 60 + 10 * i, np.uint8), 0) for i in range(6)]
    grids, panoramas = views._Cache(3 * 25 ** 2 * 3), views._Cache(2 * 16 * 32 * 3)
    monkeypatch.setattr(views, "_grids", grids)
    monkeypatch.setattr(views, "_panoramas", panoramas)
    for _ in range(2):
        for path in paths:
            for heading in (0, 90):
                views.grid(path, heading, 10)
                for cache in (grids, panoramas):
                    assert cache.used == sum(size for _, size in cache.items.values()) <= cache.limit
    assert [key[0] for key in grids.items] == [paths[4], paths[5], paths[5]] and [key[0] for key in panoramas.items] == paths[4:]
    views.grid(paths[4], 90, 10)                               # used again, so it outlives the other two
    views.grid(paths[0], 0, 10)
    assert [key[:2] for key in grids.items] == [(paths[5], 90), (paths[4], 90), (paths[0], 0)]
    made = []
    monkeypatch.setattr(views, "_cut", lambda *args: made.append(1))
    first = views.grid(paths[5], 450, 10)                      # 90, and not made anew
    first.paste((1, 2, 3), (0, 0, 25, 25))
    assert np.asarray(views.grid(paths[5], 90, 10))[3, 3].tolist() == [110, 110, 110] and not made
    monkeypatch.undo()
    monkeypatch.setattr(views, "_grids", views._Cache(10))      # too little for one
    assert views.grid(paths[0], 0, 10).size == (25, 25) and views._grids.used == 0


def jpeg(**options):
    buffer = io.BytesIO()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 128, 3), dtype=np.uint8)).convert(options.pop("mode", "RGB")).save(buffer, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("content", [
    None, b"", b"<html>", jpeg(format="JPEG")[:2000], jpeg(format="JPEG")[:30], jpeg(format="PNG"), b"\xff\xd8\xff\xd9",
    b"\xff\xd8\xff\xc0\0\x11\x08\xff\xff\xff\xff\3\1\x22\0\2\x11\1\3\x11\1\xff\xd9"])
def test_unreadable_pictures(tmp_path, content):
    path = Path(write_panorama(tmp_path / "street_views" / "p.jpg", np.zeros((8, 16, 3), np.uint8), 0))
    path.unlink() if content is None else path.write_bytes(content)
    text = raises(str(path), views.grid, path, 0, 10)
    assert text == raises(str(path), views.grid, path, 0, 10)       # and no remains in the cache


def test_gray_cmyk_and_progressive_pictures(tmp_path):
    path = Path(write_panorama(tmp_path / "p.jpg", np.zeros((8, 16, 3), np.uint8), 0))
    for i, options in enumerate(({"mode": "L"}, {"mode": "CMYK"}, {"progressive": True}, {"quality": 1})):
        path.write_bytes(jpeg(format="JPEG", **options))
        assert views.grid(path, i, 10).mode == "RGB"
        views._panoramas.items.clear()
        views._panoramas.used = 0


def test_a_bad_rotation(tmp_path):
    path = write_panorama(tmp_path / "p.jpg", np.zeros((8, 16, 3), np.uint8), 0)
    (tmp_path / "p.metadata.json").write_text('{"rotation": null}')
    assert raises("a number `rotation`", views.grid, path, 0, 10).startswith(str(tmp_path / "p.metadata.json"))


def test_a_builtin_citys_panorama_is_drawn_when_it_is_asked_for(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(cities, "draw", lambda path: asked.append(write_panorama(Path(path), np.full((8, 16, 3), 50, np.uint8), 0)))
    path = str(tmp_path / "street_views" / "p.jpg")
    raises("No such file", views.grid, path, 0, 10)             # no city.json: not ours to draw
    assert not asked
    (tmp_path / "city.json").write_text("{}")
    assert views.grid(path, 0, 10).getpixel((2, 2)) == (50, 50, 50) and asked == [path]
    views.grid(path, 1, 10)
    assert asked == [path]
