"""Settings, loading, evaluation and files of a run.

It is imported before torch, and limits how long threads of GNU OpenMP spin.

At the end of each small operation the threads wait for each other. By default they wait in a loop for
milliseconds, about the length of a process's turn on a core. If another process holds the core that the last
thread needs, a rollout on two threads gets dozens of times slower. With GOMP_SPINCOUNT=10000 they sleep after
some 100 microseconds. That costs a quiet machine 5 % of its speed. Where another process keeps a core busy,
two threads still take twice as long as one. (With 3000 a quiet machine would lose 15 %, and beside a busy
core two threads would take 1.4 times as long.) libgomp, the GNU OpenMP that torch loads, reads this variable
once; a value that the user has set is kept.
"""

import os

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")

if not any(name in os.environ for name in WAITING):
    os.environ["GOMP_SPINCOUNT"] = "10000"
