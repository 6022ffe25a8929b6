"""MkDocs' hook: the site is made of the pages that GitHub shows, where they lie.

`README.md` becomes the start page, a page in `docs/` keeps its name, and what pages link to outside of
`docs/` (results, the guide for contributors, pictures) lies on the site as in the repository. Links to
code lead to `repo_url`. Every package has a page of its public names.
"""

import ast
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent
PACKAGES = ("optax_normuon", "torch_ref", "normuon_core")
SHOWN = {".md", ".png", ".svg"}
"""What is copied to the site; anything else is code, and a link to it leads to the repository."""

LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)


def on_config(config: MkDocsConfig) -> None:
    """An entry of the navigation with a star stands for every page that it matches, or for none."""
    config.nav = _expanded(config.nav or [])


def _expanded(entries: list) -> list:
    result = []
    for entry in entries:
        ((title, target),) = entry.items()
        if isinstance(target, list):
            target = _expanded(target)
        elif "*" in target:
            # On the site `docs/` is the root, and the rest of the repository lies beside its pages.
            found = {
                path.relative_to(root).as_posix()
                for root in (ROOT / "docs", ROOT)
                for path in root.glob(target)
            }
            target = sorted(found)
        if target:
            result.append({title: target})
    return result


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Adds the start page, what lies outside of `docs/`, and the pages of public names."""
    waiting = [
        "README.md",
        "CHANGELOG.md",
        *(f"docs/{f.src_uri}" for f in files.documentation_pages()),
    ]
    seen = set()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        if not path.startswith("docs/"):
            files.append(File.generated(config, _on_site(path), abs_src_path=str(ROOT / path)))
        if path.endswith(".md"):
            text = FENCE.sub("", (ROOT / path).read_text())
            linked = {_in_repository(path, link) for _, _, link in LINK.findall(text)}
            waiting += [one for one in sorted(linked) if Path(one).suffix in SHOWN and _there(one)]
    for package in PACKAGES:
        page = File.generated(config, f"api/{package}.md", content=_public_names(package))
        files.append(page)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links by the places of pages on the site; text within `<details>` is Markdown, as on GitHub."""
    path = _path_of(page.file.src_uri)

    def rewritten(match: re.Match) -> str:
        picture, text, link = match.groups()
        target, _, anchor = link.partition("#")
        if not target or re.match(r"[a-z]+:", link):
            return match[0]
        named = _in_repository(path, link)
        if files.get_file_from_path(_on_site(named)):
            start = posixpath.dirname(page.file.src_uri)
            target = posixpath.relpath(_on_site(named), start or ".")
            return f"{picture}[{text}]({target}{'#' + anchor if anchor else ''})"
        if not _there(named):
            return match[0]
        kind = "tree" if (ROOT / named).is_dir() else "blob"
        return f"[{text}]({config.repo_url}/{kind}/main/{named})" if config.repo_url else text

    markdown = markdown.replace("<details>", '<details markdown="1">')
    parts, end = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [LINK.sub(rewritten, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join(parts) + LINK.sub(rewritten, markdown[end:])


def _in_repository(page: str, link: str) -> str:
    """The path of what a page of the repository links to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link.partition("#")[0]))


def _there(path: str) -> bool:
    return not path.startswith("..") and (ROOT / path).exists()


def _on_site(path: str) -> str:
    """Where a file of the repository lies on the site."""
    return "index.md" if path == "README.md" else path.removeprefix("docs/")


def _path_of(src_uri: str) -> str:
    """The file of the repository that lies there on the site."""
    if src_uri == "index.md":
        return "README.md"
    return f"docs/{src_uri}" if (ROOT / "docs" / src_uri).exists() else src_uri


def _public_names(package: str) -> str:
    """A page with the docstring of each name in the package's `__all__`."""
    tree = ast.parse((ROOT / package / "__init__.py").read_text())
    (names,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    shown = [f"::: {package}.{name}" for name in names if not name.startswith("__")]
    return "\n\n".join([f"# {package}", ast.get_docstring(tree) or "", *shown]) + "\n"
