"""Layers of a model, by the names of its parameters: what fragments are made of, and what reports are broken down by.

Owns the two rules. Imports nothing of Lightning.
"""

import re
from collections.abc import Sequence

MOST = 20
"""Layers in a report at most: more would be unreadable, and would cost more to measure."""


def layer_of(name: str) -> str:
    """The layer of a parameter: what shares the module path up to its first number.

    Without a number it is the path of the parameter's module.

    >>> layer_of("blocks.3.mlp.weight"), layer_of("embedding.weight"), layer_of("scale")
    ('blocks.3', 'embedding', 'scale')
    """
    numbered = re.match(r"(?:[^.]+\.)*?\d+(?=\.)", name)
    return numbered.group() if numbered else name.rpartition(".")[0] or name


def layer_groups(names: Sequence[str], most: int = MOST) -> dict[str, str]:
    """Parameter name → the group of layers that reports add it to.

    A group is a layer. With more than ``most`` layers, ``most`` runs of successive layers, as equal in number as
    possible, which are called after the first and the last of them.

    >>> layer_groups(["in.weight", "blocks.0.a.weight", "blocks.0.b.weight", "blocks.1.a.weight"], most=2)
    {'in.weight': 'in-blocks.0', 'blocks.0.a.weight': 'in-blocks.0', 'blocks.0.b.weight': 'in-blocks.0', \
'blocks.1.a.weight': 'blocks.1'}
    >>> set(layer_groups([f"blocks.{i}.weight" for i in range(4)], most=2).values()) == {"blocks.0-1", "blocks.2-3"}
    True
    """
    layers = list(dict.fromkeys(map(layer_of, names)))
    runs: dict[int, list[str]] = {}
    for i, layer in enumerate(layers):
        runs.setdefault(i * most // len(layers) if len(layers) > most else i, []).append(layer)
    called = {layer: _called(run) for run in runs.values() for layer in run}
    return {name: called[layer_of(name)] for name in names}


def _called(run: Sequence[str]) -> str:
    if len(run) == 1:
        return run[0]
    (path, _, _), (other, _, last) = run[0].rpartition("."), run[-1].rpartition(".")
    return f"{run[0]}-{last if path == other else run[-1]}"
