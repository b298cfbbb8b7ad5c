"""What the benchmark's headline is computed with."""

import pytest

from benchmarks.bench import minutes_to

RUNS = [
    {"minutes": minutes, "accuracy": accuracy}
    for minutes, accuracy in ((2, 0.80), (4, 0.88), (16, 0.86), (32, 0.90))
]


@pytest.mark.parametrize(
    ("accuracy", "minutes"),
    [
        (0.84, 2 * 2**0.5),  # halfway on a logarithmic scale
        (0.88, 4),
        (0.89, 4 * 8**0.5),  # the run of 16 minutes does not count
        (0.70, 2),  # at most those of the shortest run
        (0.90, 32),
        (0.91, None),  # not reached
    ],
)
def test_minutes_to_an_accuracy_are_read_between_the_runs(accuracy, minutes):
    assert minutes_to(accuracy, RUNS) == pytest.approx(minutes)
