"""The documentation holds what is committed: numbers, commands, settings, files."""

import csv
import importlib.util
import json
import re
from statistics import mean

import pytest
from helpers import ROOT

from tools.isolated import git
from transfer.architecture import describe
from transfer.common.settings import MODES, load_params

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "tests/README.md",
         *sorted((ROOT / "docs").glob("*.md"))]  # fmt: skip
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
README, EVERYTHING = TEXTS["README.md"], "\n".join(TEXTS.values())
FENCES = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", EVERYTHING, re.MULTILINE | re.DOTALL)
COMMANDS = "\n".join(body for language, body in FENCES if language in ("bash", "powershell"))


def committed(path: str) -> dict:
    return json.loads(git(ROOT, "show", f"HEAD:{path}"))


def committed_minutes() -> float:
    """Of the whole pipeline."""
    costs = committed("metrics/cost.json")
    return sum(cost["seconds"] for name, cost in costs.items() if name != "machine") / 60


def number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def table(name: str) -> list[dict]:
    with (ROOT / f"docs/{name}.csv").open(encoding="utf-8") as file:
        return [{key: number(text) for key, text in row.items()} for row in csv.DictReader(file)]


def accuracies(rows: list[dict], column: str, pretrained: bool) -> dict[float, list[float]]:
    """The accuracies in % of a column of docs/*.csv, for each value of the first column."""
    found: dict[float, list[float]] = {}
    for row in rows:
        if (row["model.weights"] != "random") == pretrained:
            found.setdefault(next(iter(row.values())), []).append(100 * row[column])
    return found


LINES = {  # of the figures and tables of sweeps: the column of docs/*.csv, pretrained or not
    "frozen": ("frozen.accuracy", True),
    "finetuned": ("finetuned.accuracy", True),
    "from scratch": ("finetuned.accuracy", False),
}


def both_modes(row: dict) -> str:
    """The accuracies of a row of docs/*.csv as two cells of a table."""
    return " | ".join(f"{100 * row[f'{mode}.accuracy']:.2f} %" for mode in MODES)


def check_default(row: dict) -> None:
    """The row of docs/*.csv that has the settings of params.yaml has the committed results."""
    values = committed("metrics/evaluation.json")
    for mode in MODES:
        assert row[f"{mode}.accuracy"] == pytest.approx(values[f"{mode}.accuracy"], abs=1e-4)


def test_the_numbers_of_the_readme_are_those_of_the_committed_metrics():
    values, minutes = committed("metrics/evaluation.json"), committed_minutes()
    for words in (
        f"adds {100 * values['gain']:.2f} points",
        f"{100 * values['gain_ci_low']:.2f} to {100 * values['gain_ci_high']:.2f}",
        f"p = {values['mcnemar_p']:.1e}".replace("e-0", "e-"),
        f"{minutes:.0f} minutes",
        f"{values['frozen.ece']:.3f} (frozen) and {values['finetuned.ece']:.3f} (finetuned)",
    ):
        assert words in README


def test_the_three_seeds_are_the_committed_ones():
    rows = table("seeds")
    assert [row["seed"] for row in rows] == [0, 1, 2]
    values = [[100 * row[f"{mode}.accuracy"] for row in rows] for mode in MODES]
    means = " | ".join(f"**{mean(v):.2f} %**" for v in values)
    assert f"| **the default**, mean of three seeds | {means} |" in README
    ranges = " | ".join(f"{min(v):.2f} to {max(v):.2f} %" for v in values)
    assert f"| their range | {ranges} |" in README
    check_default(rows[0])


def test_the_other_head_and_random_weights_are_the_committed_ones():
    heads = {row["model.head"]: row for row in table("heads")}
    assert set(heads) == {"conv", "linear"}
    all_images = {
        row["model.weights"]: row for row in table("images") if row["train.shared.images"] == 48_000
    }
    check_default(heads["conv"])
    check_default(all_images["IMAGENET1K_V1"])
    for head, row in heads.items():
        gain = 100 * (row["finetuned.accuracy"] - row["frozen.accuracy"])
        assert f"| {head} | {both_modes(row)} | {gain:.2f} points |" in TEXTS["docs/results.md"]
    variants = {"model.head=linear": heads["linear"], "model.weights=null": all_images["random"]}
    for setting, row in variants.items():
        cells = re.escape(both_modes(row))
        assert re.search(rf"^\| .* {setting}` \| {cells} \|$", README, re.MULTILINE)


def test_the_sweep_of_images_is_the_committed_one():
    lines = [accuracies(table("images"), *line) for line in LINES.values()]
    assert list(lines[0]) == [100, 300, 1000, 3000, 10_000, 48_000]
    for count in lines[0]:
        runs = [line[count] for line in lines]
        assert {len(values) for values in runs} == {3 if count <= 3000 else 1}
        cells = [
            f"{mean(values):.1f}"
            + (f" ({min(values):.1f} to {max(values):.1f})" if count <= 3000 else "")
            for values in runs
        ]
        assert f"| {count:,.0f} | {' | '.join(cells)} |" in TEXTS["docs/results.md"]


def test_the_sweep_of_blocks_is_the_committed_one():
    for name, line in LINES.items():
        found = accuracies(table("blocks"), *line)
        assert list(found) == list(range(1, 14))
        cells = " | ".join(f"{accuracy:.1f}" for [accuracy] in found.values())
        assert f"| {name} | {cells} |" in TEXTS["docs/results.md"]


def test_the_recipes_are_the_committed_ones():
    rows = table("recipes")
    assert [row["train.finetuned.epochs"] for row in rows] == [3, 6, 11, 15]
    for row in rows:
        cells = re.escape(f"{both_modes(row)} | {row['minutes']:.1f}")
        assert re.search(rf"^\| .* \| {cells} \|$", TEXTS["docs/results.md"], re.MULTILINE)
    [default, longer] = rows[2:]
    check_default(default)
    assert default["minutes"] == pytest.approx(committed_minutes(), abs=0.05001)
    assert f"{longer['minutes']:.0f} minutes | {both_modes(longer)} |" in README


def test_the_benchmark_is_the_committed_one():
    results = committed("benchmarks/results.json")
    page = TEXTS["docs/benchmark.md"]
    training, accuracy, steps = (results[key] for key in ("training", "accuracy", "steps"))
    for name, points in accuracy.items():
        cells = [f"{v['images_per_s']:,.0f} | {v['ratio']:.1f}" for v in
                 (training[mode][name] for mode in ("frozen", "finetuned"))]  # fmt: skip
        assert f"| {name} | {' | '.join(cells)} |" in page
        cells = [f"{p['accuracy']:.1%} ({p['minutes']:.1f})".replace("%", " %") for p in points]
        assert f"| {name} | {' | '.join(cells)} |" in page
    for name, r in steps.items():
        cells = f"{r['images_per_s']:.0f} | {r['time_ratio']:.2f} | {r['data_overhead']:+.1%}"
        assert f"| {name} | {cells.replace('%', ' %')} |" in page
    one = steps["2 threads"]
    for words in (
        f"{one['gmacs_per_s']:.0f} billion",
        f"{one['matrix_gmacs_per_s']:.0f} billion",
        f"{one['gmacs_per_s'] / one['matrix_gmacs_per_s']:.0%}".replace("%", " %"),
        results["machine"]["cpu"],
    ):
        assert words in page


def epoch_lines(mode: str) -> set[str]:
    """What is printed after each epoch, from the committed learning curves."""
    folder = ROOT / f"metrics/curves/{mode}/plots/metrics"
    values: dict[str, dict[str, str]] = {}
    for part in ("train", "validation"):
        for what in ("loss", "accuracy"):
            name = f"{part}_{what}"
            with (folder / f"{name}.tsv").open(encoding="utf-8") as file:
                for row in csv.DictReader(file, delimiter="\t"):
                    values.setdefault(row["step"], {})[name] = f"{float(row[name]):.4f}"
    return {
        f"{mode} epoch {epoch}: " + " ".join(f"{name} {value}" for name, value in row.items())
        for epoch, row in values.items()
    }


@pytest.mark.parametrize("guide", ["docs/guide.md", "docs/guia.md"])
def test_the_outputs_in_the_guides_are_real(guide):
    example = {"name": "resnet18", "blocks": None, "head": "linear"}
    settings = load_params(str(ROOT / "params.yaml")).changed({"model": example}).model
    real = {*describe(settings, 2).splitlines(), *epoch_lines("frozen"), *epoch_lines("finetuned")}
    real |= set((ROOT / "metrics/architecture.txt").read_text(encoding="utf-8").splitlines())
    shown = re.findall(r"^```text\n(.*?)^```$", TEXTS[guide], re.MULTILINE | re.DOTALL)
    assert len(shown) == 4
    assert [line for text in shown for line in text.splitlines() if line not in real] == []
    values = committed("metrics/evaluation.json")
    for key in ("frozen.accuracy", "finetuned.accuracy", "gain"):
        number = f"{100 * values[key]:.2f}"
        assert (number.replace(".", ",") if guide == "docs/guia.md" else number) in TEXTS[guide]


def test_the_guides_have_the_same_commands_and_figures():
    one, other = (
        re.findall(r"^ *(?:dvc|make) .*$|\]\(\.\./figures/.*\)", TEXTS[guide], re.MULTILINE)
        for guide in ("docs/guide.md", "docs/guia.md")
    )
    assert one == other
    assert len(one) > 10


def test_the_readme_is_one_screen_of_reading():
    assert README.count("\n") <= 130


@pytest.mark.parametrize("page", TEXTS)
def test_files_that_a_page_names_exist(page):
    folder = (ROOT / page).parent
    links = re.findall(r"(?:\]\(|src=\")([^):#\"]+)[)\"]", TEXTS[page])
    assert [link for link in links if not (folder / link).exists()] == []


@pytest.mark.parametrize("page", TEXTS)
def test_every_code_fence_names_its_language(page):
    fences = re.findall(r"^ *```(.*)$", TEXTS[page], re.MULTILINE)
    assert len(fences) % 2 == 0
    assert all(fences[::2])
    assert not any(fences[1::2])


@pytest.mark.parametrize("target", sorted(set(re.findall(r"make ([a-z-]+)", COMMANDS))))
def test_targets_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize(
    "module", sorted(set(re.findall(r"-m ((?:tools|stages)[\w.]+)", COMMANDS)))
)
def test_modules_exist(module):
    assert importlib.util.find_spec(module)


@pytest.mark.parametrize(
    "setting",
    sorted(set(re.findall(r"-S '?([\w.]+)=", COMMANDS)))
    + sorted(set(re.findall(r"`((?:data|model|train|figures)\.[\w.]+\w)`", EVERYTHING))),
)
def test_settings_exist(setting):
    value = load_params(str(ROOT / "params.yaml"))
    for name in setting.split("."):
        value = getattr(value, name)


def test_pins_are_compiled_from_every_dependency():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    needed, peers = text.split("\npeers = [")
    pins = {}
    for part, lock in ((needed, "requirements.txt"), (peers, "benchmarks/requirements.txt")):
        locked = (ROOT / lock).read_text(encoding="utf-8")
        pins[lock] = dict(re.findall(r"^([\w-]+)==(\S+)", locked, re.M))
        named = re.findall(r'^    "([\w-]+)', part, re.M)
        assert named
        assert [name for name in named if name.lower() not in pins[lock]] == []
    one, other = pins.values()
    assert {n: v for n, v in other.items() if one.get(n, v) != v} == {}  # where both pin it
