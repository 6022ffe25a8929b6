"""Records the parameter trees of public models, with the role that each leaf has in its model.

Run from the repository's root with a Python 3.12 of its own, as no model is a dependency here:

    python3.12 -m venv /tmp/models && /tmp/models/bin/pip install -r tests/model_trees/requirements.txt
    /tmp/models/bin/pip install --no-deps -r tests/model_trees/requirements-no-deps.txt
    /tmp/models/bin/python -m tests.model_trees.record [NAME ...]

`torch_llama` needs torch==2.13.0, transformers==4.57.6 and jax alone, in any environment.

Models are made abstractly: nothing is computed, no weight is downloaded. Depth and sometimes stages
are cut; widths, heads, vocabularies and labels are the published configuration's. One JSON file a model
holds its source, and for each leaf the keys of its path with their kind, shape, dtype and role. Complex
leaves are left out: they have no update here.

A role is what the leaf is *in the model's code*, decided by reading that code; what `optax_normuon`
makes of the leaf plays no part. It is said once for each kind of leaf, by patterns over paths
(`fnmatch`, `*` crosses `/`) beside the function that makes the model. Recording fails where a leaf fits
no pattern or two, or where a pattern fits no leaf.

What the default convention makes of each kind:

- AdamW: token, patch, position and type embeddings (tied heads with them), class and mask tokens,
  relative position biases (`table`), output heads (the layer that gives labels or tokens; a U-Net's or a
  generator's last convolution is a convolution), norms, biases, vectors (also stacked over layers or
  experts, and kernels with one side of 1), depthwise convolutions, the per-channel tables of
  state-space models (A_log, D, step sizes).
- Matrices: everything that multiplies features by features: linear layers; each expert's; routers;
  LoRA's A and B; convolutions with the spatial and input axes merged into the inputs, transposed ones
  too; the dense layers of time embeddings and poolers; recurrent weights, gates merged into the outputs.
- Attention kernels with axes of heads: heads merged into the side on which they stand, outputs for
  queries, keys and values, inputs for the output projection. An axis that separates keys from values,
  layers or experts is a batch axis.

`doubt` marks the leaves of which neither name nor shape nor neighbours tell the role for certain:
asking about them is right, guessing wrong is not.
"""

import fnmatch
import importlib
import importlib.metadata
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from .roles import Model, Role

HERE = Path(__file__).parent

KINDS = {
    jax.tree_util.DictKey: ("dict", lambda key: key.key),
    jax.tree_util.GetAttrKey: ("attribute", lambda key: key.name),
    jax.tree_util.SequenceKey: ("index", lambda key: key.idx),
    jax.tree_util.FlattenedIndexKey: ("flat", lambda key: key.key),
}


def record(model: Model) -> dict:
    """The model as JSON.

    Raises:
      ValueError: leaves without a role or with two, or patterns without a leaf.
    """
    leaves = [
        (path, _name(path), leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(model.make())[0]
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    faults, met, recorded = [], set(), []
    for path, name, leaf in leaves:
        fitting = [p for p in model.roles if fnmatch.fnmatchcase(name, p)]
        met.update(fitting)
        if len(fitting) != 1:
            faults.append(f"{name} {leaf.shape}: fits {fitting or 'no pattern'}")
            continue
        role = model.roles[fitting[0]]
        named = sorted(role.reduction_axis + role.output_axis)
        if named and (len(set(named)) != len(named) or named[-1] >= len(leaf.shape)):
            faults.append(f"{name} {leaf.shape}: {role} does not fit")
        recorded.append(
            {
                "path": [_key(key) for key in path],
                "shape": list(leaf.shape),
                "dtype": leaf.dtype.name,
                "role": _role(role),
            }
        )
    faults += [f"{pattern}: fits no leaf" for pattern in model.roles if pattern not in met]
    if faults:
        raise ValueError(f"{model.name}:\n" + "\n".join(faults))
    return {
        "package": model.package,
        "version": importlib.metadata.version(model.package),
        "code": model.code,
        "url": model.url,
        "convention": model.convention,
        "leaves": recorded,
    }


def _name(path) -> str:
    """The keys with `/` between them, NNX's `value` included."""
    return "/".join(str(KINDS[type(key)][1](key)) for key in path)


def _key(key) -> list:
    kind, get = KINDS[type(key)]
    return [kind, get(key)]


def _role(role: Role) -> dict:
    if role.adamw is not None:
        said = {"adamw": role.adamw}
    else:
        said = {
            "reduction_axis": list(role.reduction_axis),
            "output_axis": list(role.output_axis),
        }
    return said if role.doubt is None else {**said, "doubt": role.doubt}


def write(recorded: dict, path: Path) -> None:
    """One line a leaf, so that a change of a model can be read as a difference of lines."""
    leaves = ",\n".join("  " + json.dumps(leaf) for leaf in recorded["leaves"])
    head = {key: value for key, value in recorded.items() if key != "leaves"}
    opened = json.dumps(head, indent=1).rstrip("}").rstrip()
    path.write_text(f'{opened},\n "leaves": [\n{leaves}\n ]\n}}\n')


MODULES = ("linen", "nnx", "maxtext", "equinox", "haiku", "torch")


def find_models() -> dict[str, Model]:
    """By name; a module whose framework is not installed is left out, and said so."""
    models = {}
    for framework in MODULES:
        try:
            module = importlib.import_module(f".{framework}_models", __package__)
        except ModuleNotFoundError as error:
            print(f"{framework}_models: left out, {error}")
            continue
        models.update({model.name: model for model in module.MODELS})
    return models


def main(names: list[str]) -> None:
    models = find_models()
    failed = False
    for name in names or models:
        try:
            recorded = record(models[name])
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error}")
            failed = True
            continue
        write(recorded, HERE / f"{name}.json")
        print(f"{name}: {len(recorded['leaves'])} leaves")
    sys.exit(failed)


if __name__ == "__main__":
    main(sys.argv[1:])
