"""The documentation holds what is committed: numbers, commands, settings, files."""

import csv
import re
from collections import defaultdict
from statistics import mean

import pytest
from dvc.utils.flatten import flatten
from helpers import ROOT

from stages.render import read_curves
from transfer.architecture import describe
from transfer.common.settings import MODES, load_params


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


DOCS, GUIDES = sorted((ROOT / "docs").iterdir()), ["docs/guide.md", "docs/guia.md"]
PAGES = ["README.md", "CONTRIBUTING.md", "tests/README.md"]
PAGES += [f"docs/{path.name}" for path in DOCS if path.suffix == ".md"]
TEXTS = {page: read(page) for page in PAGES}
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.M | re.S)
NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?:e-\d+)?(?!\.?\w)")
SETTINGS = load_params(str(ROOT / "params.yaml"))
SWEEPS = [f"docs/{path.name}" for path in DOCS if path.suffix == ".csv"]
TABLES = ["metrics/evaluation.json", "metrics/details.json", "benchmarks/results.json", *SWEEPS]
UNNAMED = {"README.md": SWEEPS} | dict.fromkeys(GUIDES, TABLES[:1])  # without their names


def printed(numbers) -> set[str]:
    formats = (".0f", ".1f", ".2f", ".3f", ".1e")
    return {f"{abs(n):{each}}".replace("e-0", "e-") for n in numbers for each in formats}


def lines(table: str) -> list[set[str]]:
    """What one line of a page may hold: all about one value of what differs; of JSON, all."""
    text, known, runs = read(table), defaultdict(set), defaultdict(list)
    if table not in SWEEPS:
        numbers = map(float, re.findall(r": (\d+\.\d.*?),?\n", text))
        return [{*re.findall(r"\d+", text), *printed(n * k for n in numbers for k in (1, 100))}]
    for row in csv.DictReader(text.splitlines()):
        value = next(setting for key, setting in row.items() if key != "seed")
        frozen, finetuned = (100 * float(row[f"{mode}.accuracy"]) for mode in MODES)
        numbers = (frozen, finetuned, finetuned - frozen, float(row.get("minutes", 0)))
        known[value].update(row.values(), printed(numbers), {value.replace("e-0", "e-")})
        part = (row["model.weights"], row.get("train.shared.images"))
        runs[value, part].append((frozen, finetuned))
    for (value, _), pairs in runs.items():
        known[value] |= printed(map(mean, zip(*pairs, strict=True)))
    return [*known.values()]


@pytest.mark.parametrize("page", PAGES)
def test_numbers_are_those_of_the_committed_tables_that_a_page_names(page):
    """Those in each row, or each column, of Markdown tables; in prose, those with two decimals."""
    text = TEXTS[page]
    named = [t for t in TABLES if t.split("/")[1] in text or t in UNNAMED.get(page, [])]
    known = [line for table in named for line in lines(table)]
    text = re.sub(r"(?<=\d),(?=\d{3})", "", FENCE.sub("", text) if known else "")
    text = re.sub(r"(?<=\d),(?=\d\d\b)", ".", text)  # Spanish
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        rows = [row.strip("|").split("|") for row in table.splitlines() if "| ---" not in row]
        grids = (rows, zip(*rows, strict=True))
        lists = [[NUMBER.findall(" ".join(line)) for line in grid] for grid in grids]
        wrong = [[ns for ns in grid if not any({*ns} <= line for line in known)] for grid in lists]
        assert [] in wrong  # those of the rows and of the columns
    prose = NUMBER.findall(re.sub(r"^\|.*", "", text, flags=re.M))
    exact = [line for t in named if t not in SWEEPS for line in lines(t)] or known
    settings = [v for v in flatten(SETTINGS.model_dump()).values() if isinstance(v, float)]
    short = {f"{value:.0e}".replace("e-0", "e-") for value in settings}  # as in params.yaml
    assert {n for n in prose if re.search(r"\.\d\d|e", n)} <= short.union(*exact)


@pytest.mark.parametrize("page", PAGES)
def test_form_and_names_of_a_page(page):
    text, code = TEXTS[page], "".join(body for _, body in FENCE.findall(TEXTS[page]))
    assert page != "README.md" or text.count("\n") <= 130
    fences = re.findall(r"^ *```(.*)$", text, re.M)
    assert [bool(language) for language in fences] == [True, False] * (len(fences) // 2)
    assert re.findall(r"dvc exp run (?=-)(?!--temp|--queue|--run-all).*", text) == []
    links = re.findall(r"(?:\]\(|src=\")([^):#\"]+)[)#\"]", text)
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []
    files = re.findall(r"`((?:stages|transfer|tools|tests|benchmarks)/[\w/]+\.\w+)`", text)
    files += [f"{m.replace('.', '/')}.py" for m in re.findall(r"-m ((?:stages|tools)[.\w]+)", code)]
    assert [file for file in files if not (ROOT / file).exists()] == []
    targets = re.findall(r"^([a-z-]+):", read("Makefile"), re.M)
    assert {*re.findall(r"^ *make ([a-z-]+)", code, re.M)} <= {*targets}
    settings = re.findall(r"-S '?([\w.]+)=|`((?:data|model|train|figures)\.[\w.]+\w)`", text)
    assert {*map("".join, settings)} <= {*flatten(SETTINGS.model_dump())}


def test_guides_have_the_same_commands_and_figures_and_real_outputs(monkeypatch):
    monkeypatch.chdir(ROOT)
    example = SETTINGS.changed({"model": {"name": "resnet18", "blocks": None, "head": "linear"}})
    real = describe(example.model, 2) + read("metrics/architecture.txt")
    names = ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy")
    for mode, curves in ((mode, read_curves(mode)) for mode in MODES):
        for epoch, values in enumerate(zip(*map(curves.get, names), strict=True), 1):
            real += f"{mode} epoch {epoch}: {' '.join(map('{} {:.4f}'.format, names, values))}\n"
    commands = []
    for text in map(TEXTS.get, GUIDES):
        shown = [body for language, body in FENCE.findall(text) if language == "text"]
        assert len(shown) == 4
        assert {*"".join(shown).splitlines()} <= {*real.splitlines()}
        commands.append(re.findall(r"^ *(?:dvc|make) .*$|\]\(\.\./figures/.*\)", text, re.M))
    assert commands[0] == commands[1] != []


def test_pins_are_compiled_from_every_dependency():
    locks = ("requirements.txt", "benchmarks/requirements.txt")
    pins = [dict(re.findall(r"^([\w-]+)==(\S+)", read(lock), re.M)) for lock in locks]
    for part, pinned in zip(read("pyproject.toml").split("\npeers = ["), pins, strict=True):
        named = {name.lower() for name in re.findall(r'^    "([\w-]+)', part, re.M)}
        assert set() < named <= {*pinned}
    assert all(pins[0].get(name, pin) == pin for name, pin in pins[1].items())
