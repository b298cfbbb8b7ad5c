"""The documentation holds what is committed: files, commands, settings, numbers, outputs."""

import re
import tomllib
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

import pytest
from dvc.utils.flatten import flatten
from helpers import ROOT

from stages.network import describe
from stages.train import print_row
from transfer.model import Network, classifier
from transfer.run import read_csv
from transfer.settings import MODES, ModelSettings, load_params

README, GUIDES = ROOT / "README.md", [ROOT / "docs/guide.md", ROOT / "docs/guia.md"]
PATHS = [README, ROOT / "CONTRIBUTING.md", *ROOT.glob("*/README.md"), *ROOT.glob("docs/*.md")]
PAGES = {path: path.read_text(encoding="utf-8") for path in sorted(PATHS)}
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.M | re.S)
PROSE = {page: FENCE.sub("", text) for page, text in PAGES.items()}
SETTINGS = load_params(str(ROOT / "params.yaml")).model_dump()
TABLES = [*ROOT.glob("docs/*.csv"), *ROOT.glob("metrics/[dem]*.*"), *ROOT.glob("benchmarks/*.json")]
IN_TABLES, IN_PROSE = r"\d+\.\d+|(?<=\| )\d+(?= (?:% )?\|)", r"\d+\.\d\d+|\d[.\d]*(?=e-)"
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def numbers_in(table: Path) -> list[float]:
    """The numbers in a table; of a sweep also gains, means over seeds, deviations."""
    text = table.read_text(encoding="utf-8")
    numbers = [*map(float, re.findall(r"(?<![\w.])\d+\.?\d*(?:e-?\d+)?(?![\w.])", text))]
    runs = defaultdict(list)
    for row in read_csv(table) if table.parent.name == "docs" else []:
        measured = [name for name in row if name.split(".")[0] in (*MODES, "moved")]
        results = {name: float(row.pop(name)) for name in measured}
        key = tuple(value for name, value in row.items() if name != "seed")  # what differs
        gain = results["finetuned.accuracy"] - results["frozen.accuracy"]
        runs[key].append((*results.values(), gain))
    for values in runs.values():
        columns = [*zip(*values, strict=True)]
        numbers += [*sum(values, ()), *map(mean, columns)]
        numbers += [stdev(column) for column in columns if len(column) > 1]
    return numbers


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)", PROSE[page], re.M)
    slugs = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
    return {*slugs, *re.findall(r'<a id="(.*?)"', PROSE[page])}


@each_page
def test_files_headings_commands_and_settings_that_a_page_names_exist(page):
    for link in re.findall(r"\]\(([^)\s:]+)\)", PROSE[page]):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
    code = [body for _, body in FENCE.findall(PAGES[page])] + re.findall(r"`(.+?)`", PROSE[page])
    code = "\n".join(code)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^(?:SWEEPS := .*|[a-z-]+)", makefile, re.M)
    used = re.findall(r"^ *make ([a-z-]+(?: [a-z-]+)*)", code, re.M)
    assert {*" ".join(used).split()} <= {*" ".join(targets).split()}
    files = re.findall(r"(?:stages|tools|transfer|tests|docs|benchmarks)/[\w/]+\.\w+", code)
    modules = re.findall(r"-m ((?:stages|tools|transfer|benchmarks)\.\w+)", code)
    files += [f"{module.replace('.', '/')}.py" for module in modules]
    assert [file for file in files if not (ROOT / file).exists()] == []
    settings = re.findall(r"-S *'?([\w.]+)=|^((?:data|model|train|figures)\.[\w.]+)$", code, re.M)
    assert {*map("".join, settings)} <= {*flatten(SETTINGS)}
    assert page != README or PAGES[page].count("\n") <= 120


@pytest.mark.skipif(SETTINGS["data"]["source"] != "cifar10.md5", reason="not the pages' data")
@each_page
def test_numbers_are_those_of_the_committed_tables_that_a_page_names(page):
    """In tables those with decimals and those alone in a cell, in prose those with two decimals."""
    text = re.sub(r"(?<=\d),(?=\d{3})", "", PROSE[page])
    text = re.sub(r"(?<=\d),(?=\d)", ".", text)  # Spanish
    found = []
    for line in text.splitlines():
        exact = IN_TABLES if line.startswith("|") else IN_PROSE
        found += re.findall(rf"(?<![\w.])(?:{exact})(?:e-\d+)?(?!\.?\w)", line)
    # The README has numbers of all sweeps, the guides those of the answer.
    also = {README: ".csv"} | dict.fromkeys(GUIDES, "evaluation")
    named = [t for t in TABLES if t.name in PAGES[page] or also.get(page, "no") in t.name]
    settings = [value for value in flatten(SETTINGS).values() if isinstance(value, float)]
    known = set()
    for number in sum(map(numbers_in, named), [0.05, *settings]):  # a level of significance
        for form in (".0f", ".1f", ".2f", ".3f", ".0e", ".1e", "g"):
            known |= {f"{abs(n):{form}}".replace("e-0", "e-") for n in (number, 100 * number)}
    assert not named or [number for number in found if number not in known] == []


def test_guides_have_the_same_commands_and_figures_and_real_outputs(capsys):
    for mode in MODES:
        for row in read_csv(ROOT / f"metrics/curves/{mode}.csv"):
            print_row(mode, {k: v if k == "epoch" else float(v) for k, v in row.items()})
    example = {"name": "resnet18", "blocks": None, "head": "linear"}
    network = Network(ModelSettings(**SETTINGS["model"] | example), ["cat", "dog"])
    real = describe(network, classifier("resnet18")) + capsys.readouterr().out
    real += (ROOT / "metrics/architecture.txt").read_text(encoding="utf-8")
    shared = []
    for text in map(PAGES.get, GUIDES):
        shown = "".join(body for language, body in FENCE.findall(text) if language == "text")
        assert shown
        assert [line for line in shown.splitlines() if line not in real.splitlines()] == []
        shared.append(re.findall(r"^ *(?:dvc|make|python) .*$|\]\(\.\./figures/.*\)", text, re.M))
    assert shared[0] == shared[1] != []


def test_pins_cover_every_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = project["dependencies"] + project["optional-dependencies"]["dev"]
    names = {re.match(r"[\w.-]+", line)[0].lower().replace(".", "-") for line in lines}
    lock = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    assert names - {*re.findall(r"^([\w-]+)==", lock, re.M)} == set()
