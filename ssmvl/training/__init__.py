"""Stages and runs; the only package that imports Composer."""

import os

# The threads of GNU OpenMP, which torch uses, wait for each other many times per step, and spin for milliseconds before
# they sleep. With more busy processes than cores, they spin on cores that the others need, and a step takes 30 times as
# long. Spinning for 0.2 to 0.5 ms is long enough on idle cores. The limit is read when torch is first imported.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "10000"
