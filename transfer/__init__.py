"""The library of the pipeline. Whatever runs a part of it imports this before torch."""

import os

# GNU OpenMP's threads wait for work in a busy loop, 300,000 rounds or more, which takes the cores
# from other programs: beside them a training is many times slower. It reads this when torch is
# imported; results do not depend on it. What it costs and brings: docs/ablations.md.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
# With fewer threads than train.threads asks for, as these can have it, oneDNN waits for ever for a
# thread that never comes (seen with torch 2.15).
for name in ("OMP_THREAD_LIMIT", "OMP_DYNAMIC", "OMP_MAX_ACTIVE_LEVELS"):
    os.environ.pop(name, None)
