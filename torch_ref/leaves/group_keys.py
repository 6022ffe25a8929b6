"""Which keys a group may have, and what those of other optimizers mean in it.

A group of AdamW has `torch.optim.AdamW`'s own keys: `betas`, `eps` and `weight_decay`, read at every
step. The constructor has other keywords for them, since there `weight_decay` is the matrices'.
"""

import difflib
from collections.abc import Collection, Mapping
from typing import Any

Group = dict[str, Any]

MATRIX, ADAMW = "normuon", "adamw"

NOTES = frozenset(
    {
        *("params", "param_names"),
        *("initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"),
    }
)
"""Keys that are no options: PyTorch, its schedulers and `torch.optim.swa_utils` keep them in a group."""

_ADAMW_KEYWORDS = {
    "betas": ("adam_b1", "adam_b2"),
    "eps": ("adam_eps",),
    "weight_decay": ("adam_weight_decay",),
}
ADAMW_KEYS = frozenset(_ADAMW_KEYWORDS)


def read_group(group: Mapping[str, Any], defaults: Group, index: int) -> Group:
    """A copy of a group that is about to be added, with Keller Jordan's `use_muon` as `optimizer`.

    Args:
      group: as the user wrote it.
      defaults: the constructor's.
      index: of the group, for errors.

    Raises:
      ValueError: a key that nothing reads, with the nearest one that something does; AdamW's keys in
        a group of matrices, or `momentum` or `beta2` in one of AdamW; `use_muon` that contradicts
        `optimizer`.
    """
    group = dict(group)
    if "use_muon" in group:
        chosen = MATRIX if group.pop("use_muon") else ADAMW
        if group.setdefault("optimizer", chosen) != chosen:
            raise ValueError(
                f"group {index}: use_muon={chosen == MATRIX} and optimizer={group['optimizer']!r}"
                " contradict each other; give one of them."
            )
    is_adamw = group.get("optimizer", defaults["optimizer"]) == ADAMW
    known = {*defaults, *NOTES, "use_muon", *(ADAMW_KEYS if is_adamw else ())}
    for key, value in group.items():
        if key in ADAMW_KEYS - known:
            raise ValueError(
                f"group {index}: {key}={value} is AdamW's, and this is a group of matrices; for AdamW"
                " write optimizer='adamw' (or use_muon=False) into the group."
            )
        if key not in known:
            raise ValueError(unknown_key(key, known, f"group {index}"))
        if is_adamw and key in ("momentum", "beta2") and value is not None:
            raise ValueError(
                f"group {index}: {key}={value} is of matrices; a group of AdamW has betas=(b1, b2)."
            )
    return group


def unknown_key(key: str, known: Collection[str], place: str) -> str:
    """The message of the error for a key that nothing reads."""
    near = difflib.get_close_matches(str(key), sorted(known), n=1, cutoff=0.6)
    meant = f"did you mean {near[0]!r}? " if near else ""
    return (
        f"{place}: nothing reads the key {key!r}; {meant}Options are"
        f" {', '.join(sorted({*known} - NOTES))}. A note of your own may be written into"
        " optimizer.param_groups once the optimizer is made."
    )


def read_adamw(group: Group, given: Collection[str], index: int) -> None:
    """Puts what an AdamW group was given under the constructor's keywords; `group` changes in place.

    Only keys that the group itself was given count: the constructor's `weight_decay`, say, is of the
    matrices.

    Raises:
      ValueError: `betas` that are no pair, or one value spelled in two ways that differ.
    """
    for key, keywords in _ADAMW_KEYWORDS.items():
        if key not in given:
            continue
        values = group[key] if key == "betas" else (group[key],)
        if not isinstance(values, list | tuple) or len(values) != len(keywords):
            raise ValueError(f"group {index}: betas={values!r}; give a pair (b1, b2).")
        for keyword, value in zip(keywords, values, strict=True):
            if keyword in given and group[keyword] != value:
                raise ValueError(
                    f"group {index}: {keyword}={group[keyword]} and {key}={group[key]} contradict each"
                    f" other; give one of them ({key} is how torch.optim.AdamW calls it)."
                )
            group[keyword] = value
    # All of it is under the constructor's keywords now.
    group.pop("betas", None)
    group.setdefault("momentum")


def settle_adamw(group: Group) -> None:
    """Leaves AdamW's own keys alone in its group; `group` changes in place.

    A value that has been written under another name since the last step replaces AdamW's own: one that
    was written by hand under the constructor's keyword, or as `momentum`. Schedulers that cycle momentum
    write that key into every group, and mean AdamW's first beta by it, as in `torch.optim.AdamW`.
    """
    if "betas" not in group:
        # The group has the constructor's keywords still, and its momentum is that of matrices.
        group.pop("momentum", None)
        group["betas"] = (group["adam_b1"], group["adam_b2"])
    b1, b2 = group["betas"]
    b1 = group.pop("momentum", b1)
    group["betas"] = (group.pop("adam_b1", b1), group.pop("adam_b2", b2))
    for key in ("eps", "weight_decay"):
        group[key] = group.pop(f"adam_{key}", group.get(key))


def adamw_keywords(group: Group) -> Group:
    """A settled AdamW group with AdamW's own keys under the constructor's keywords as well."""
    b1, b2 = group["betas"]
    own = {f"adam_{key}": group[key] for key in ("eps", "weight_decay")}
    return {**group, **own, "adam_b1": b1, "adam_b2": b2}
