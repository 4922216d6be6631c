"""The built-in cities: what the files say is recomputed from their geocodes, what the pictures show from geometry."""
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
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from games import cities, drawing, show, streets

ROOT = Path(__file__).parent.parent
WORDS = ["north", "northeast", "east", "southeast", "south", "southwest", "west", "northwest"]
SIDES = ["front", "right front", "right", "right behind", "behind", "left behind", "left", "left front"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("cities")


def routes_of(root, name, file="route_infos.json"):
    routes, count = json.loads((cities.build(name, root) / file).read_text())
    assert count == len(routes)
    return routes


def points_of(route):
    return [tuple(p) for p in (route["start_place"]["relocated_geocode"], *route["route_results"]["geocode_list"])]


def bearing(a, b):
    """On the sphere, from two geocodes: not the plane's formula that the city was laid out with."""
    (lat1, lon1), (lat2, lon2) = np.radians(a), np.radians(b)
    y = math.sin(lon2 - lon1) * math.cos(lat2)
    x = math.cos(lat1) * math.sin(lat2) - math.sin(lat1) * math.cos(lat2) * math.cos(lon2 - lon1)
    return math.degrees(math.atan2(y, x)) % 360


def metres(a, b):
    (lat1, lon1), (lat2, lon2) = np.radians(a), np.radians(b)
    h = math.sin((lat2 - lat1) / 2) ** 2 + math.cos(lat1) * math.cos(lat2) * math.sin((lon2 - lon1) / 2) ** 2
    return 2 * 6371000 * math.asin(math.sqrt(h))


def signed(angle):
    return (angle + 180) % 360 - 180


# ------------------------------------------------------------------------------------------------------ the files

def test_the_lists_of_cities():
    assert len(streets.OTHERS) == 9 and len(streets.BROAD) == 4
    assert {"new-york", *streets.OTHERS, *streets.BROAD} == set(streets.CITIES)
    types = [word for name in ("new-york", *streets.OTHERS, *streets.BROAD) for word in set(streets.CITIES[name].types)]
    assert max(Counter(types).values()) == 2        # New York's two parts share theirs


@pytest.mark.parametrize("name", streets.CITIES)
def test_remarks_and_headings_follow_from_the_geocodes(root, name):
    mapping = pickle.loads((cities.build(name, root) / "gps_pano_mapping.pkl").read_bytes())
    assert len(set(mapping.values())) == len(mapping)
    assert all(re.fullmatch("[A-Za-z0-9_-]{22}", identity) for identity in mapping.values())
    routes = routes_of(root, name)
    assert len(routes) == (1000 if name == "new-york" else 100)
    for route in routes:
        points, marks = points_of(route), [*route["route_results"]["landmark_list"], route["dest_place"]]
        blocks = route["milestone_info"].split("}")[:-1]
        assert 2 <= len(points) - 1 == len(marks) == len(blocks) <= 5 and route["init_heading"] == 0
        assert set(points) <= set(mapping) and len(set(points)) == len(points)
        names = [mark["name"] for mark in marks if mark]
        assert len(set(names)) == len(names) and marks[-1]
        headings = [bearing(a, b) for a, b in zip(points, points[1:])]
        for i, (a, b, mark, block) in enumerate(zip(points, points[1:], marks, blocks)):
            fields = dict(re.findall(r'"(\w+)": "([^"]*)"', block))
            degrees, word = re.fullmatch(r"(\d+) \((\w+)\)", fields["to_next_intersection_heading"]).groups()
            assert abs(signed(headings[i] - int(degrees))) < 0.6 and word == WORDS[round(int(degrees) / 45) % 8]
            assert fields["human_heading"] == degrees and fields["intersection_idx"] == str(i + 1)
            assert abs(int(fields["distance"].split()[0]) - metres(a, b)) < 1 and 20 < metres(a, b) < 140
            if mark is None:
                assert fields["landmarks"] == "No landmark nearby"
                continue
            side = (bearing(b, mark["geocode"]) - headings[i]) % 360
            assert fields["landmarks"] == f"{mark['name']} is on your {SIDES[round(side / 45) % 8]}"
            assert abs((side + 22.5) % 45 - 22.5) < 19      # never near the border of two sides
            assert 7 < metres(b, mark["geocode"]) < 14
        for old, new in zip(headings, headings[1:]):
            assert 20 <= abs(signed(new - old)) <= 155
        said = re.findall(r"\((\w+)\)", route["milestone_info"])
        assert all(old != new for old, new in zip(said, said[1:]))      # else nobody could be told to turn


def test_new_york_has_every_direction_and_turn_and_a_held_out_set(root):
    train, held_out = routes_of(root, "new-york"), routes_of(root, "new-york", "held_out_infos.json")
    assert len(held_out) == 200 and len({tuple(points_of(route)) for route in train + held_out}) == 1200
    walked, turns, legs = Counter(), Counter(), []
    for route in train:
        headings = [bearing(a, b) for a, b in zip(points_of(route), points_of(route)[1:])]
        walked.update(WORDS[round(h / 45) % 8] for h in headings)
        turns.update((signed(b - a) < 0, abs(signed(b - a)) <= 45) for a, b in zip(headings, headings[1:]))
        legs.append(len(headings))
    assert 3 < np.mean(legs) < 3.6
    assert len(walked) == 8 and min(walked.values()) > 0.09 * sum(walked.values())
    assert len(turns) == 4 and min(turns.values()) > 0.04 * sum(turns.values())
    assert not (cities.build("lima", root) / "held_out_infos.json").exists()


def test_the_same_bytes_in_any_process(root, tmp_path):
    code = "import sys; from games import cities, streets; f = cities.build('new-york', sys.argv[1]); " \
           "cities.draw(f / 'street_views' / f'{streets.town(\"new-york\").ids[7]}.jpg')"
    subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, check=True)
    folder = cities.build("new-york", root)
    cities.draw(folder / "street_views" / f"{streets.town('new-york').ids[7]}.jpg")
    (other,) = tmp_path.iterdir()
    assert other.name == folder.name
    files = [path.relative_to(other) for path in other.rglob("*") if path.is_file()]
    assert len(files) == 6 and all((other / file).read_bytes() == (folder / file).read_bytes() for file in files)


def test_processes_that_race_for_a_folder_share_it(tmp_path):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        folders = pool.starmap(cities.build, [("lagos", tmp_path)] * 6, chunksize=1)
        panorama = folders[0] / "street_views" / f"{streets.town('lagos').ids[0]}.jpg"
        pool.map(cities.draw, [panorama] * 4, chunksize=1)
    assert set(folders) == {folders[0]} and list(tmp_path.iterdir()) == [folders[0]]       # nothing left aside
    assert sorted(path.suffix for path in panorama.parent.iterdir()) == [".jpg", ".json"]
    assert Image.open(panorama).size == (256, 128)


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")
    folder = cities.build("lagos", tmp_path)
    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        cities.draw(folder / "street_views" / f"{streets.town('lagos').ids[0]}.jpg")
    assert not list((folder / "street_views").glob("*.jpg")) and not list((folder / "street_views").glob(".*"))
    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="disk full"):
        cities.build("cairo", tmp_path)
    assert list(tmp_path.iterdir()) == [folder]


def test_errors_are_one_line_that_says_what_is_wrong(root, tmp_path):
    def message(call, *args, **kwargs):
        with pytest.raises(ValueError) as error:
            call(*args, **kwargs)
        assert "\n" not in str(error.value)
        return str(error.value)
    assert "unknown city 'atlantis', expected one of new-york," in message(cities.build, "atlantis", tmp_path)
    for width in (0, -2, 255, 1e3, "256", 10**6):
        assert "width" in message(cities.build, "lima", tmp_path, width=width)
    views = cities.build("lima", root) / "street_views"
    foreign = streets.town("cairo").ids[0]
    assert f"{foreign}.jpg: lima has no panorama of that name" in message(cities.draw, views / f"{foreign}.jpg")
    assert "no panorama" in message(cities.draw, views / f"{streets.town('lima').ids[0]}.png")
    assert "city.json: not a built-in city's file" in message(cities.draw, tmp_path / "street_views" / "x.jpg")
    for text in ("[]", "{", '{"city": "atlantis", "width": 2, "digest": ""}', '{"city": [], "width": 2, "digest": ""}'):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        (folder / "city.json").write_text(text)
        assert "build the city again" in message(cities.draw, folder / "street_views" / "x.jpg")
    old = tmp_path / "old"
    old.mkdir()
    (old / "city.json").write_text((views.parent / "city.json").read_text().replace('"digest": "', '"digest": "0'))
    assert "another version" in message(cities.draw, old / "street_views" / f"{streets.town('lima').ids[0]}.jpg")


def test_the_command_line_saves_a_map_and_views(tmp_path, capsys):
    show.main(["milan", "--route", "2", "--out", str(tmp_path), "--width", "128", "--size", "20"])
    saved = re.search("saved (.*)", capsys.readouterr().out)[1].split(", ")
    assert [Image.open(file).size for file in saved][:2] == [(900, 900), (45, 45)]
    assert len(saved) == 1 + len(points_of(routes_of(tmp_path, "milan")[2]))


# ------------------------------------------------------------------------------------------------------ the streets

@pytest.mark.parametrize("name", streets.CITIES)
def test_streets_and_signs_keep_their_distances(name):
    town = streets.town(name)
    ends = town.nodes[np.array(town.edges)]                         # (E, 2, 2)
    lengths = np.linalg.norm(ends[:, 0] - ends[:, 1], axis=1)
    assert lengths.min() >= 60 and lengths.max() <= 140 and len(town.nodes) >= 50
    for node, neighbors in enumerate(town.neighbors):
        headings = sorted(streets.bearing(town.nodes[node], town.nodes[other]) for other in neighbors)
        assert len(headings) >= 2 and min(np.diff([*headings, headings[0] + 360])) >= 25
    gaps = np.linalg.norm(town.panoramas[:, None] - town.panoramas, axis=-1) + 99 * np.eye(len(town.panoramas))
    assert gaps.min() > 8 and gaps.min(0).max() < 25
    assert len(town.corners) > 0.6 * len(town.nodes) and len(town.places) > 0.35 * len(town.edges)
    for node, mark in town.corners.items():
        assert mark.at == node and 9.9 < math.dist(mark.xy, town.nodes[node]) < 14
    for edge, mark in town.places.items():
        at = town.panoramas[mark.at]
        assert math.dist(mark.xy, at) == pytest.approx(8) and np.linalg.norm(ends[edge] - at, axis=1).min() >= 20
    marks = [*town.corners.values(), *town.places.values()]
    for i, mark in enumerate(marks):
        color, emblem, kind = mark.name.split(" ", 2)
        spoken = streets.CITIES.values() if name in streets.BROAD else (town.city,)
        assert (color, emblem) == (mark.color, mark.emblem) and kind in [city.types[mark.board] for city in spoken]
        assert all(math.dist(mark.xy, other.xy) > 400 for other in marks[:i] if other.name == mark.name)


# ------------------------------------------------------------------------------------------------------ the pictures

@lru_cache(maxsize=64)
def picture(town, index, rotation=0.0, width=256):
    return drawing.panorama(town, index, rotation, width).astype(int)


def pixel(eye, point, height, rotation, width):
    """Row and column (floats) of a point `height` metres above the ground: the released data's convention."""
    lon = (math.degrees(math.atan2(*(np.subtract(point, eye)))) - 180 + rotation + 180) % 360 - 180
    lat = -math.degrees(math.atan2(height - drawing.EYE, math.dist(point, eye)))
    return (lat / 180 + 0.5) * (width // 2 - 1), (lon / 360 + 0.5) * (width - 1)


@pytest.mark.parametrize("name", ["new-york", "london", "tokyo"])
def test_a_sign_is_where_the_geometry_says_and_not_hidden(root, name):
    town, folder = streets.town(name), cities.build(name, root, width=512)
    marks = [*town.corners.values(), *town.places.values()]
    for mark in marks[::6]:
        path = folder / "street_views" / f"{town.ids[mark.at]}.jpg"
        cities.draw(path)
        rotation = json.loads(path.with_suffix(".metadata.json").read_text())["rotation"]
        image, eye = np.asarray(Image.open(path)).astype(int), town.panoramas[mark.at]
        away = (np.array(mark.xy) - eye) / math.dist(mark.xy, eye)
        right, middle = np.array([away[1], -away[0]]), (drawing.STRIP + drawing.TOP) / 2
        spots = [(x * far, y * far, color) for far, color in ((3.5, mark.color), (2.3, streets.EMBLEMS[mark.emblem]))
                 for x, y in ((-1, 0), (1, 0), (0, 1))]         # on the board and on the disc; left, right and above the emblem
        for across, up, color in spots:
            row, column = pixel(eye, mark.xy + across * right, middle + up, rotation, 512)
            seen = image[round(row), round(column) % 512]
            distance = {name: np.abs(seen - rgb).sum() for name, rgb in streets.COLORS.items()}
            assert min(distance, key=distance.get) == color and distance[color] < 150, (mark, seen)


def area(town, mark, index):
    """Percent of the panorama in which one sign's own colors are seen: what changes without it. (Its back is grey.)"""
    def others(marks):
        return {key: other for key, other in marks.items() if other is not mark}
    without = dataclasses.replace(town, corners=others(town.corners), places=others(town.places))
    seen, own = picture(town, index), [streets.COLORS[color] for color in (mark.color, streets.EMBLEMS[mark.emblem])]
    colored = np.min([np.abs(seen - color).sum(-1) for color in own], axis=0) < 90
    return 100 * (colored & (np.abs(seen - drawing.panorama(without, index, 0.0, 256)).sum(-1) > 12)).mean()


def neighbors_of(town, index):
    """The panoramas some 20 m away along the streets."""
    return np.flatnonzero((gap := np.linalg.norm(town.panoramas - town.panoramas[index], axis=1)) * (gap < 24))


def test_a_sign_is_large_at_its_own_point_only():
    town = streets.town("new-york")
    for mark in [*town.corners.values()][::25] + [*town.places.values()][::40]:
        elsewhere = [area(town, mark, i) for i in neighbors_of(town, mark.at)]
        assert len(elsewhere) >= 2 and 0.3 < area(town, mark, mark.at) > 2.5 * max(elsewhere)


def test_rotation_turns_the_picture():
    town, step = streets.town("milan"), 360 / 255        # degrees a column: the first and last are the same direction
    turned = picture(town, 3, rotation=20 + 40 * step)
    assert np.abs(turned[:, 40:255] - picture(town, 3, rotation=20.0)[:, :215]).mean() < 0.5
    assert np.abs(turned[:, 0] - turned[:, 255]).mean() < 6


def test_emblems_and_boards_differ():
    kinds = [(emblem, board) for emblem in streets.EMBLEMS for board in range(3)]
    small = [np.asarray(drawing.board("Blue", emblem, board, 14)).astype(int) for emblem, board in kinds]
    for i, a in enumerate(small):
        assert all(np.abs(a - b).mean() > 12 for b in small[:i])


@pytest.mark.parametrize("name", streets.CITIES)
def test_every_city_can_be_drawn_at_any_size(name):
    town = streets.town(name)
    for width in (64, 130, 512):
        image = drawing.panorama(town, len(town.panoramas) - 1, 77.0, width)
        assert image.shape == (width // 2, width, 3) and image.dtype == np.uint8 and image.std() > 15
