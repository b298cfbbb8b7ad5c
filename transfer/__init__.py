"""The library of the pipeline. Whatever runs a part of it imports this before torch."""

import os

# GNU OpenMP's idle threads spin for 300,000 iterations or more while they wait for work. They take
# the cores from other programs, beside which training becomes many times slower. GNU OpenMP reads
# this variable when torch is imported. Results do not depend on it.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
# These variables can allow fewer threads than train.threads. Then oneDNN waits forever for a thread
# that never starts (seen with torch 2.15).
for name in ("OMP_THREAD_LIMIT", "OMP_DYNAMIC", "OMP_MAX_ACTIVE_LEVELS"):
    os.environ.pop(name, None)
