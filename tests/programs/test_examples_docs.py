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
