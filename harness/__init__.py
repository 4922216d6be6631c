"""Settings, loading, evaluation and files of a run.

It is imported before torch, and limits how long threads of GNU OpenMP spin.

At the end of each small operation the threads wait for each other. By default they wait in a loop for
milliseconds, about the length of a process's turn on a core. If another process holds the core that the last
thread needs, a rollout on two cores gets dozens of times slower. After some 100 microseconds they now sleep.
On a quiet machine that costs 5 % of the speed. Beside a busy core, a run on two threads takes twice as long
as a run on one. (With GOMP_SPINCOUNT at 3000, not at 10000 as here: 15 %, and 1.4 times as long.) libgomp,
which torch loads, reads this variable once; a value that the user has set is kept.
"""

import os

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")

if not any(name in os.environ for name in WAITING):
    os.environ["GOMP_SPINCOUNT"] = "10000"
