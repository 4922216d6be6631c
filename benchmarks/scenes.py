"""Measure how long it takes to lay out the built-in cities, to load routes, to draw and cut a panorama.

    python -m benchmarks.scenes --repeats 7

Medians, one thread. Nothing is cached but what a run of many pictures has at hand: a city's plan, a size's
geometry.
"""
import statistics
import tempfile
import time

from games import cities, routes, streets, views
from harness.ranges import command_line, integer
from harness.terminal import command


def timed(run, *args):
    """Return the seconds that run(*args) takes, and its result."""
    start = time.perf_counter()
    result = run(*args)
    return time.perf_counter() - start, result


def median(run, inputs):
    """Return the median milliseconds of run(x) over the inputs. The first warms up and does not count."""
    return 1000 * statistics.median([timed(run, x)[0] for x in inputs][1:])


def main(argv=None):
    parser = command_line("python -m benchmarks.scenes", __doc__)
    parser.add_argument("--repeats", type=integer(1), default=7)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as root:
        for name in streets.CITIES:
            seconds, _ = timed(cities.build, name, root)
            print(f"{name:<18} laid out, routes and files written in {seconds:.2f} s")
        seconds, world = timed(routes.load, str(cities.build("new-york", root)))
        print(f"new-york's {len(world.routes)} training routes loaded in {seconds:.2f} s")
        for width, size in ((256, 53), (2560, 640)):
            views_folder = cities.build("london", root, width=width) / "street_views"
            files = [views_folder / f"{name}.jpg" for name in streets.town("london").ids[:args.repeats + 1]]
            print(f"a panorama of {width} pixels drawn in {median(cities.draw, files):.0f} ms")
            # The second heading finds each panorama in memory.
            first, again = (median(lambda file: views.grid(file, heading, size), files)
                            for heading in (33, 77))
            print(f"its four views of {size} pixels: {first:.1f} ms, {again:.1f} ms without reading the file")


if __name__ == "__main__":
    command(main)
