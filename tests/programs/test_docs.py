"""The pages for readers: their links lead somewhere, their code runs and prints what stands below it."""

import contextlib
import io
import re
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
RUN = [
    "README.md",
    "docs/layouts.md",
    "docs/meshes.md",
    "docs/moving.md",
    "docs/numerics.md",
    "docs/performance.md",
    "docs/sphere.md",
]
"""Pages whose Python blocks run from top to bottom, as one program."""

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")


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


def run_page(text: str) -> list[tuple[str, str]]:
    """(what a Python block prints, what stands below it) for each block that has output below it."""
    names: dict[str, object] = {}
    printed = ""
    compared = []
    for language, body in BLOCK.findall(text):
        if language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(body, names)
            printed = out.getvalue()
        elif language == "":
            compared.append((printed, body))
    return compared


def without_padding(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


@pytest.mark.parametrize("name", RUN)
def test_the_code_of_a_page_runs_and_prints_what_stands_below_it(name):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        compared = run_page((ROOT / name).read_text())
    for printed, written in compared:
        assert without_padding(printed) == without_padding(written)


def test_another_output_below_the_code_is_seen():
    assert run_page("```python\nprint(1)\n```\n\n```\n2\n```\n") == [("1\n", "2\n")]


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


def printed_by(page: str, start: str) -> list[list[str]]:
    """The cells of each line that the page's Python block with this beginning prints."""
    (code,) = (
        body
        for language, body in BLOCK.findall((ROOT / page).read_text())
        if language == "python" and start in body
    )
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, {})
    return [line.replace("|", " ").replace("`", "").split() for line in out.getvalue().splitlines()]


@pytest.mark.parametrize(
    ("page", "start"),
    [
        ("docs/stages.md", "image = evaluate(steps"),
        ("docs/dialects.md", "name_of = {coefficients"),
    ],
)
def test_the_table_of_polynomials_and_that_of_recipes_are_what_their_scripts_print(page, start):
    text = (ROOT / page).read_text()
    rows = [
        line.replace("|", " ").replace("`", "").split()
        for line in BLOCK.sub("", text).splitlines()
        if line.startswith("|")
    ]
    printed = printed_by(page, start)
    assert len(printed) > 10
    assert [row for row in printed if row not in rows] == []
