"""Recompute what the files of the built-in cities say from their geocodes, and what the pictures show from
geometry."""
import dataclasses
import json
import math
import multiprocessing
import pickle
import re
import subprocess
import sys
from collections import Counter
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from games import cities, drawing, streets
from games.compass import COMPASS, SIDES
from games.routes import distance
from tables import cases


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("cities")


def routes_of(root, name, file="route_infos.json"):
    routes, count = json.loads((cities.build(name, root) / file).read_bytes())
    assert count == len(routes)
    return routes


def points_of(route):
    start, ends = route["start_place"]["relocated_geocode"], route["route_results"]["geocode_list"]
    return [tuple(point) for point in (start, *ends)]


def bearing(a, b):
    """Return the heading from a geocode to another on the sphere: not by the plane's formula that the city
    was laid out with."""
    (lat1, lon1), (lat2, lon2) = np.radians((a, b))
    y = math.sin(lon2 - lon1) * math.cos(lat2)
    x = math.cos(lat1) * math.sin(lat2) - math.sin(lat1) * math.cos(lat2) * math.cos(lon2 - lon1)
    return math.degrees(math.atan2(y, x)) % 360


def headings_of(route):
    return [bearing(a, b) for a, b in pairwise(points_of(route))]


def metres(a, b):
    return distance(np.array(a), np.array(b))


def signed(angle):
    return (angle + 180) % 360 - 180


def signs(town):
    """Return the landmarks at corners, and those along streets."""
    corners = [mark for mark in town.landmarks if mark.at < len(town.nodes)]
    return corners, [mark for mark in town.landmarks if mark not in corners]


def panorama_of(folder, name, index):
    return folder / "street_views" / f"{streets.town(name).ids[index]}.jpg"


# -------------------------------------------------------------------------------------------------- the files

def test_the_lists_of_cities():
    assert ("new-york", *streets.OTHERS, *streets.BROAD) == tuple(streets.CITIES)
    assert len(streets.OTHERS) == 9 and streets.BROAD == ("paris", "tokyo", "cairo", "lima")
    kinds = {name: {(mark.word, mark.board) for mark in streets.town(name).landmarks}
             for name in streets.CITIES}
    assert len(dict(every := set().union(*kinds.values()))) == len(every) == 39     # the board tells the word
    shared = Counter(kind for name in kinds if name not in streets.BROAD for kind in kinds[name])
    assert max(shared.values()) == 2        # New York's two parts share theirs
    assert {name for name in kinds if len(kinds[name]) > 3} == {*streets.BROAD}


BLOCK = r"""{
"intersection_idx": "(\d+)",
"landmarks": "(.*)",
"distance": "(\d+) meters",
"human_heading": "(\d+)",
"to_next_intersection_heading": "(\d+) \((\w+)\)",
}"""


@cases("name", streets.CITIES)
def test_remarks_and_headings_follow_from_the_geocodes(root, name):
    mapping = pickle.loads((cities.build(name, root) / "gps_pano_mapping.pkl").read_bytes())
    assert len(set(mapping.values())) == len(mapping)
    assert all(re.fullmatch("[A-Za-z0-9_-]{22}", identity) for identity in mapping.values())
    routes = routes_of(root, name)
    assert len(routes) == (1000 if name == "new-york" else 100)
    for route in routes:
        points, headings = points_of(route), headings_of(route)
        blocks = re.findall(BLOCK, route["milestone_info"])
        marks = [*route["route_results"]["landmark_list"], route["dest_place"]]
        assert 2 <= len(headings) == len(marks) == len(blocks) <= 5 and route["init_heading"] == 0
        assert set(points) <= set(mapping) and len(set(points)) == len(points)
        names = [mark["name"] for mark in marks if mark]
        assert len(set(names)) == len(names) and marks[-1]
        for i, ((a, b), heading, mark, block) in enumerate(zip(pairwise(points), headings, marks, blocks), 1):
            index, remark, length, human, degrees, word = block
            assert (index, human, word) == (str(i), degrees, COMPASS[round(int(degrees) / 45) % 8])
            assert abs(signed(heading - int(degrees))) < 0.6
            assert abs(int(length) - metres(a, b)) < 1 and 20 < metres(a, b) < 140
            if mark:
                side = (bearing(b, mark["geocode"]) - heading) % 360
                assert remark == f"{mark['name']} is on your {SIDES[round(side / 45) % 8]}"
                assert abs((side + 22.5) % 45 - 22.5) < 19      # never near the border of two sides
                assert 7 < metres(b, mark["geocode"]) < 14
            else:
                assert remark == "No landmark nearby"
        assert all(20 <= abs(signed(new - old)) <= 155 for old, new in pairwise(headings))
        # else nobody could be told to turn
        assert all(old[-1] != new[-1] for old, new in pairwise(blocks))


def test_new_york_has_every_direction_and_turn_and_a_held_out_set(root):
    train, held_out = (routes_of(root, "new-york", f"{kind}_infos.json") for kind in ("route", "held_out"))
    assert len(held_out) == 200 and len({tuple(points_of(route)) for route in train + held_out}) == 1200
    walks = [headings_of(route) for route in train]
    assert 3 < np.mean([len(walk) for walk in walks]) < 3.6
    turns = [signed(b - a) for walk in walks for a, b in pairwise(walk)]
    for kinds, count, share in ((Counter(round(h / 45) % 8 for walk in walks for h in walk), 8, 0.09),
                                (Counter((turn < 0, abs(turn) <= 45) for turn in turns), 4, 0.04)):
        assert len(kinds) == count and min(kinds.values()) > share * sum(kinds.values())
    assert not (cities.build("lima", root) / "held_out_infos.json").exists()


def test_the_same_bytes_in_any_process(root, tmp_path):
    code = """import sys; from games import cities, streets; folder = cities.build('new-york', sys.argv[1])
cities.draw(folder / 'street_views' / f"{streets.town('new-york').ids[7]}.jpg")"""
    subprocess.run([sys.executable, "-c", code, tmp_path], cwd=Path(__file__).parents[1], check=True)
    folder = cities.build("new-york", root)
    cities.draw(panorama_of(folder, "new-york", 7))
    [other] = tmp_path.iterdir()
    assert other.name == folder.name
    files = [path.relative_to(other) for path in other.rglob("*") if path.is_file()]
    assert len(files) == 6
    assert all((other / file).read_bytes() == (folder / file).read_bytes() for file in files)


def test_processes_that_race_for_a_folder_share_it(tmp_path):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        folders = pool.starmap(cities.build, [("lagos", tmp_path)] * 6, chunksize=1)
        panorama = panorama_of(folders[0], "lagos", 0)
        pool.map(cities.draw, [panorama] * 4, chunksize=1)
    assert {*folders, *tmp_path.iterdir()} == {folders[0]}          # nothing left aside
    assert sorted(path.suffix for path in panorama.parent.iterdir()) == [".jpg", ".json"]
    assert Image.open(panorama).size == (256, 128)


# ------------------------------------------------------------------------------------------------ the streets

@cases("name", streets.CITIES)
def test_streets_and_signs_keep_their_distances(name):
    town = streets.town(name)
    lengths = np.linalg.norm(town.ends[0] - town.ends[1], axis=1)
    assert lengths.min() >= 60 and lengths.max() <= 140 and len(town.nodes) >= 50
    for node in town.nodes:
        own = (town.ends == node).all(-1)
        headings = sorted(streets.bearing(node, other) for other in town.ends[::-1][own])
        assert len(headings) >= 2 and min(np.diff([*headings, headings[0] + 360])) >= 25
    gaps = np.linalg.norm(town.panoramas[:, None] - town.panoramas, axis=-1)
    np.fill_diagonal(gaps, 99)
    assert gaps.min() > 8 and gaps.min(0).max() < 25
    corners, places = signs(town)
    assert len(corners) > 0.6 * len(town.nodes) and len(places) > 0.35 * len(town.edges)
    for mark in town.landmarks:
        at = town.panoramas[mark.at]
        if mark in corners:
            assert 9.9 < math.dist(mark.xy, at) < 14
        else:
            assert math.dist(mark.xy, at) == pytest.approx(8)
            assert np.linalg.norm(town.nodes - at, axis=1).min() >= 20
    assert len({mark.at for mark in town.landmarks}) == len(town.landmarks)
    for i, mark in enumerate(town.landmarks):
        same = [other.xy for other in town.landmarks[:i] if other.name == mark.name]
        assert all(math.dist(mark.xy, xy) > 400 for xy in same)


# ----------------------------------------------------------------------------------------------- the pictures

@lru_cache(maxsize=64)
def picture(town, index):
    return drawing.panorama(town, index, 0.0, 256).astype(int)


def pixel(eye, point, height, rotation, width):
    """Return row and column of a point `height` metres above the ground: the released data's convention."""
    lon = (math.degrees(math.atan2(*np.subtract(point, eye))) - 180 + rotation + 180) % 360 - 180
    lat = -math.degrees(math.atan2(height - drawing.EYE, math.dist(point, eye)))
    return round((lat / 180 + 0.5) * (width // 2 - 1)), round((lon / 360 + 0.5) * (width - 1)) % width


@cases("name", ["new-york", "london", "tokyo"])
def test_a_sign_is_where_the_geometry_says_and_not_hidden(root, name):
    town, folder = streets.town(name), cities.build(name, root, width=512)
    for mark in town.landmarks[::6]:
        path = panorama_of(folder, name, mark.at)
        cities.draw(path)
        metadata = json.loads(path.with_suffix(".metadata.json").read_bytes())
        image, eye = np.asarray(Image.open(path)).astype(int), town.panoramas[mark.at]
        right, middle = streets.axes(eye, np.array(mark.xy))[1], (drawing.STRIP + drawing.TOP) / 2
        # on the board and on the disc; left, right and above the emblem
        for far, color in ((3.5, mark.color), (2.3, streets.EMBLEMS[mark.emblem])):
            for x, y in ((-far, 0), (far, 0), (0, far)):
                seen = image[pixel(eye, mark.xy + x * right, middle + y, metadata["rotation"], 512)]
                off = {name: np.abs(seen - rgb).sum() for name, rgb in streets.COLORS.items()}
                assert min(off, key=off.get) == color and off[color] < 150, (mark, seen)


def area(town, mark, index):
    """Return the percent of the panorama in which one sign's own colors are seen: what changes without it.
    (Its back is grey.)"""
    without = dataclasses.replace(town, landmarks=[other for other in town.landmarks if other is not mark])
    seen, own = picture(town, index), [streets.COLORS[c] for c in (mark.color, streets.EMBLEMS[mark.emblem])]
    colored = np.min([np.abs(seen - color).sum(-1) for color in own], axis=0) < 90
    changed = np.abs(seen - picture(without, index)).sum(-1) > 12
    return 100 * (colored & changed).mean()


def test_a_sign_is_large_at_its_own_point_only():
    town = streets.town("new-york")
    corners, places = signs(town)
    for mark in corners[::25] + places[::40]:
        gaps = np.linalg.norm(town.panoramas - town.panoramas[mark.at], axis=1)
        elsewhere = [area(town, mark, i) for i in np.flatnonzero((gaps > 0) & (gaps < 24))]
        assert len(elsewhere) >= 2 and 0.3 < area(town, mark, mark.at) > 2.5 * max(elsewhere)


def test_emblems_and_boards_differ():
    small = [np.asarray(drawing.board("Blue", emblem, kind, 14)).astype(int)
             for emblem in streets.EMBLEMS for kind in range(3)]
    for i, a in enumerate(small):
        assert all(np.abs(a - b).mean() > 12 for b in small[:i])


@cases("name", streets.CITIES)
def test_every_city_can_be_drawn_at_any_size(name):
    town = streets.town(name)
    for width in (64, 130, 512):
        image = drawing.panorama(town, len(town.panoramas) - 1, 77.0, width)
        assert image.shape == (width // 2, width, 3) and image.dtype == np.uint8 and image.std() > 15
