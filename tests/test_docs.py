import csv
import json
import re
import subprocess

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()


def committed(path: str) -> dict:
    return json.loads(subprocess.check_output(["git", "show", f"HEAD:{path}"], cwd=ROOT))


def test_the_numbers_are_those_of_the_committed_metrics():
    values, costs = committed("metrics/evaluation.json"), committed("metrics/cost.json")
    seconds = [round(costs[f"train@{mode}"]["seconds"]) for mode in ("frozen", "finetuned")]
    f, t = "frozen", "finetuned"
    for line in (
        f"| accuracy | **{values[f'{f}.accuracy']:.2%}** | **{values[f'{t}.accuracy']:.2%}** |",
        f"| loss (nats) | {values[f'{f}.loss']:.3f} | {values[f'{t}.loss']:.3f} |",
        f"| expected calibration error | {values[f'{f}.ece']:.3f} | {values[f'{t}.ece']:.3f} |",
        f"| parameters that learn | {values[f'{f}.trainable']:,} | {values[f'{t}.trainable']:,} |",
        f"| training, seconds | {seconds[0]} | {seconds[1]} |",
        f"adds {100 * values['gain']:.2f} points",
        f"{100 * values['gain_ci_low']:.2f} to {100 * values['gain_ci_high']:.2f}",
        f"p = {values['mcnemar_p']:.1e}".replace("e-0", "e-"),
    ):
        assert line.replace("%*", " %*") in README


def test_the_sweep_is_the_committed_one():
    rows = csv.DictReader((ROOT / "docs/blocks.csv").open())
    table = {row["model.blocks"]: row for row in rows}
    assert list(table) == [str(count) for count in range(1, 13)]
    for title, key in (("frozen", "frozen.accuracy"), ("finetuned", "finetuned.accuracy")):
        cells = " | ".join(f"{100 * float(row[key]):.1f}" for row in table.values())
        assert f"| {title} | {cells} |" in README


@pytest.mark.parametrize("target", sorted(set(re.findall(r"`?make ([a-z-]+)", README))))
def test_the_targets_it_names_exist(target):
    assert re.search(rf"^{target}:.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_the_files_it_names_exist():
    links = re.findall(r"\]\(([^):#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
