"""What is around the learning: the settings of a run.

It is imported before torch, and limits how long threads of GNU OpenMP spin.

At the end of each small operation they wait for each other, by default in a loop that lasts milliseconds, as
long as a process's turn on a core. Beside another busy process, which has the core that the last thread
needs, a rollout on two cores gets dozens of times slower. After some 100 microseconds they now sleep. On a
quiet machine that costs 5 % of the speed; beside a busy core a run on two threads takes twice as long as on
one (with a GOMP_SPINCOUNT of 3000: 15 % and 1.4 times). libgomp reads this once, when torch loads it; a value
that the user has set is kept.
"""

import os

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")

if not any(name in os.environ for name in WAITING):
    os.environ["GOMP_SPINCOUNT"] = "10000"
