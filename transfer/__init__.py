"""The library of the pipeline. Whatever runs a part of it imports this before torch."""

import os

# GNU OpenMP's threads wait for work in a busy loop, 300,000 rounds or more, which takes the cores
# from other programs: beside them a training is many times slower. It reads this when torch is
# imported; results do not depend on it. What it costs and brings: docs/benchmark.md.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
