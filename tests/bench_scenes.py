"""Seconds to lay out the built-in cities, to draw a panorama, to cut its four views and to load a training set.

    python tests/bench_scenes.py [--repeats 7]

Medians, one thread; nothing is cached but what a run of many pictures has at hand (a city's plan, a size's geometry).
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from harness.ranges import command_line, integer
from scenes import cities, routes, views


def median(run, inputs):
    """Median milliseconds of run(x) over the inputs, after one more that does not count."""
    seconds = []
    for x in inputs:
        start = time.perf_counter()
        run(x)
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds[1:])


def main():
    parser = command_line("python tests/bench_scenes.py", __doc__)
    parser.add_argument("--repeats", type=integer(1), default=7)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        for name in cities.CITIES:
            start = time.perf_counter()
            folder = cities.build(name, root)
            print(f"{name:<18} laid out, routes and files written in {time.perf_counter() - start:.2f} s")
        start = time.perf_counter()
        world = routes.load(str(cities.build("new-york", root)), held_out=False, pictures=False, skip_bad=False)
        print(f"new-york's {len(world.routes)} training routes loaded in {time.perf_counter() - start:.2f} s")
        for width, size in ((256, 53), (2560, 640)):
            folder = cities.build("london", root, width=width)
            files = [folder / "street_views" / f"{identity}.jpg" for identity in cities.town("london").ids[:args.repeats + 1]]
            print(f"a panorama of {width} pixels drawn in {median(cities.draw, files):.0f} ms")
            read = median(lambda file: views.grid(file, 33, size), files)
            print(f"its four views of {size} pixels: {read:.1f} ms, of which without reading the file "
                  f"{median(lambda file: views.grid(file, 77, size), files):.1f} ms")


if __name__ == "__main__":
    main()
