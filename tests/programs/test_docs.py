"""The pages for readers: their links lead somewhere, their code runs and prints what stands below it."""

import contextlib
import io
import re
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import pytest

import optax_normuon  # noqa: F401 - its modules are among those that a page may change

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
ELSEWHERE = {"docs/migration.md"}
"""Pages whose Python blocks another test runs: `parity_tests/test_migration.py`."""

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
NEEDS = re.compile(r"^# needs \S", re.MULTILINE)
"""What a block that is not run says in the page: a package or a machine that the tests lack."""

PYTHON = [
    name
    for name in (str(page.relative_to(ROOT)) for page in PAGES)
    if name not in ELSEWHERE and "```python" in (ROOT / name).read_text()
]
"""Pages whose Python blocks run here, from top to bottom, as one program."""

PACKAGES = {path.parent.name for path in ROOT.glob("*/__init__.py")}
"""The packages of this repository."""


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub writes them into addresses."""
    prose = BLOCK.sub("", page.read_text())
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """The links within the repository that lead to no file, or to no heading of a page."""
    broken = []
    for link in LINK.findall(BLOCK.sub("", page.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_to_a_file_and_a_heading(page):
    assert broken_links(page) == []


def test_a_link_to_no_file_and_one_to_no_heading_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One\n[a](page.md) [b](#one) [c](#two) [d](missing.md) [e](page.md#none)\n")
    assert broken_links(page) == ["#two", "missing.md", "page.md#none"]


class Ran(NamedTuple):
    """A Python block that ran: its code, what it printed, and what the page says that it prints."""

    code: str
    printed: str
    written: str | None


def run_page(text: str) -> tuple[list[Ran], dict[str, object]]:
    """The Python blocks of a page, run one after the other, and the names that they defined.

    A block's output is the block without a language below it, before any other Python block.
    """
    names: dict[str, object] = {}
    ran: list[Ran] = []
    for language, body in BLOCK.findall(text):
        if language == "python" and NEEDS.search(body):
            compile(body, "a block that is not run", "exec")
        elif language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(body, names)
            ran.append(Ran(body, out.getvalue(), None))
        elif language == "" and ran and ran[-1].printed:
            ran[-1] = ran[-1]._replace(written=body)
    return ran, names


def names_of_packages() -> dict[tuple[str, str], object]:
    """What every name of every module of this project stands for now."""
    return {
        (module, name): value
        for module, found in list(sys.modules.items())
        if module.split(".")[0] in PACKAGES
        for name, value in list(vars(found).items())
    }


def rebound(before: dict[tuple[str, str], object]) -> list[tuple[str, str]]:
    """The names that stand for something else since; they are put back."""
    changed = [
        key for key, value in names_of_packages().items() if before.get(key, value) is not value
    ]
    for module, name in changed:
        setattr(sys.modules[module], name, before[module, name])
    return changed


def without_padding(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def cells(text: str) -> list[list[str]]:
    """The cells of each line of a table, in Markdown or as a script prints it."""
    return [line.replace("|", " ").replace("`", "").split() for line in text.splitlines()]


TABLES = {"docs/stages.md": "image = evaluate(steps", "docs/dialects.md": "name_of = {coefficients"}
"""By page a line of the script that prints a table of the page."""


@pytest.mark.parametrize("name", PYTHON)
def test_the_code_of_a_page_runs_and_prints_what_stands_below_it(name):
    text, before = (ROOT / name).read_text(), names_of_packages()
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        ran, _ = run_page(text)
    assert rebound(before) == []  # The next test would meet it.
    for block in ran:
        if block.written is not None:
            assert without_padding(block.printed) == without_padding(block.written)
    if name in TABLES:
        (printed,) = (block.printed for block in ran if TABLES[name] in block.code)
        rows = cells(BLOCK.sub("", text))
        assert len(cells(printed)) > 10
        assert [row for row in cells(printed) if row not in rows] == []


def test_code_that_leaves_a_module_changed_is_seen_and_mended():
    before = names_of_packages()
    run_page(
        "```python\nfrom normuon_core import polar_iteration\n"
        "polar_iteration.gram_restarts = lambda steps, short: ()\n```\n"
    )
    assert rebound(before) == [("normuon_core.polar_iteration", "gram_restarts")]
    assert names_of_packages() == before


def test_another_output_below_the_code_is_seen():
    ran, names = run_page("```python\nx = 1\nprint(x)\n```\n\n```\n2\n```\n")
    assert ran == [Ran("x = 1\nprint(x)\n", "1\n", "2\n")]
    assert names["x"] == 1


def test_a_block_is_left_out_only_where_the_page_says_what_it_needs():
    assert run_page("```python\n# needs a package\nraise ValueError\n```\n")[0] == []
    with pytest.raises(ValueError, match="run"):
        run_page('```python\nraise ValueError("run")\n```\n')
    with pytest.raises(SyntaxError):
        run_page("```python\n# needs a package\nno python\n```\n")


def paths_of(text: str) -> set[str]:
    """The files and folders of the repository that a page names in code font, by their full path."""
    spans = re.findall(r"`([^`\s]+)`", BLOCK.sub("", text))
    tops = "|".join(entry.name for entry in ROOT.iterdir() if entry.is_dir())
    return {span for span in spans if re.fullmatch(rf"({tops})/[\w./\-]*", span)}


def programs_of(text: str) -> set[str]:
    """The files that a page's commands run, by their path: of `python -m` and of `pytest`."""
    modules = re.findall(r"python -m ([a-z_]+(?:\.[a-z_]+)*)", text)
    ours = [name.replace(".", "/") for name in modules if (ROOT / name.split(".")[0]).exists()]
    tests = re.findall(r"(?:tests|parity_tests)/[\w/]+\.py", text)
    return {*tests, *(f"{n}/__main__.py" if (ROOT / n).is_dir() else f"{n}.py" for n in ours)}


def missing(paths: set[str]) -> list[str]:
    return sorted(path for path in paths if not (ROOT / path).exists())


def missing_targets(text: str) -> list[str]:
    """The targets of `make` that a page names and the Makefile lacks."""
    there = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return sorted(set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)) - set(there))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_files_and_programs_that_a_page_names_exist(page):
    text = page.read_text()
    assert missing(paths_of(text) | programs_of(text)) == []
    assert missing_targets(text) == []


def test_files_and_programs_that_do_not_exist_are_found():
    text = "`docs/none.md` `tests/none/` `python -m benchmarks.none` and pytest tests/none.py"
    found = paths_of(text) | programs_of(text)
    assert missing(found) == ["benchmarks/none.py", "docs/none.md", "tests/none.py", "tests/none/"]
    assert missing_targets("`make none`, `make test`\nmake never") == ["never", "none"]
    assert len(paths_of((ROOT / "CONTRIBUTING.md").read_text())) > 30
