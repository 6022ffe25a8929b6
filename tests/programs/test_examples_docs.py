"""What `docs/training.md` shows runs."""

import re
from pathlib import Path

import jax

PAGE = Path(__file__).parents[2] / "docs" / "training.md"


def test_the_loop_in_linen_trains():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (linen,) = [block for block in blocks if "flax.linen" in block]
    names: dict = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(linen, names)
    assert names["loss"] < 2.5  # from log 64 = 4.2


def test_every_command_of_the_page_is_there():
    page = PAGE.read_text()
    for module in set(re.findall(r"-m (examples[\w.]*|tests[\w.]*)", page)):
        path = PAGE.parents[1] / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
    for target in set(re.findall(r"`make (\w+)", page)):
        assert re.search(rf"^{target}:", (PAGE.parents[1] / "Makefile").read_text(), re.MULTILINE)
