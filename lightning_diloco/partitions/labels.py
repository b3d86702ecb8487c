"""Labels and keys of samples, and the groups of samples that share one.

Owns where labels are found. Imports nothing of Lightning.
"""

import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeAlias

from torch.utils.data import ConcatDataset, Subset, TensorDataset

Values: TypeAlias = Sequence[Any] | Callable[[Any, int], Any]
"""A value per sample, or ``(dataset, index) →`` the value of a sample."""

_MANY = 10_000  # samples whose labels are read one by one without a warning


def labels_of(dataset: Any, given: Values | None) -> list[Hashable]:
    """The label of every sample: as given, as the dataset holds them, or the second entry of its items."""
    if given is not None:
        return values_of(dataset, given, "labels")
    found = _known_labels(dataset)
    if found is not None:
        return values_of(dataset, found, "labels")
    if len(dataset) > _MANY:
        warnings.warn(
            f"The labels of {type(dataset).__name__} are found out by reading its {len(dataset)} samples, which may"
            " take long. Pass them as `labels=`: a label per sample, or a function `(dataset, index) -> label`.",
            stacklevel=4,
        )
    return values_of(dataset, _second_entry, "labels")


def _known_labels(dataset: Any) -> Sequence[Any] | None:
    """The labels that a dataset holds beside its items, if any."""
    if isinstance(dataset, Subset):
        inside = _known_labels(dataset.dataset)
        return None if inside is None else [inside[i] for i in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        parts = [_known_labels(part) for part in dataset.datasets]
        return None if None in parts else [label for part in parts if part is not None for label in part]
    if isinstance(dataset, TensorDataset):
        tensors: Sequence[Any] = dataset.tensors
        return _plain(tensors[1]) if len(tensors) > 1 else None
    for name in ("targets", "labels"):
        held = _plain(getattr(dataset, name, None))
        if isinstance(held, Sequence) and not isinstance(held, str) and len(held) == len(dataset):
            return held
    return None


def _second_entry(dataset: Any, index: int) -> Any:
    item = dataset[index]
    if not isinstance(item, (tuple, list)) or len(item) < 2:
        raise ValueError(
            f"The labels of {type(dataset).__name__} are unknown: it has no `targets`, and its items are no pairs `(x,"
            f" label)` but a {type(item).__name__}. Pass `labels=`: a label per sample, or a function `(dataset, index)"
            " -> label`."
        )
    return item[1]


def values_of(dataset: Any, given: Values, name: str) -> list[Hashable]:
    """A plain, hashable value per sample."""
    size = len(dataset)
    values = [given(dataset, i) for i in range(size)] if callable(given) else _plain(given)
    if isinstance(values, str) or not isinstance(values, Sequence) or len(values) != size:
        count = f"{len(values)} values" if isinstance(values, Sequence) else f"a {type(values).__name__}"
        raise ValueError(
            f"`{name}` is {count} for a dataset with {size} samples. Give a value per sample, or a function `(dataset,"
            " index) -> value`."
        )
    plain = [_plain(value) for value in values]
    for i, value in enumerate(plain):
        if not isinstance(value, Hashable) or value != value:
            raise ValueError(
                f"`{name}` of sample {i} is {value!r}, which can't tell groups apart. Values must be numbers, strings"
                f" or other hashable values: pass `{name}=` with a function `(dataset, index) -> value`."
            )
    return plain


def _plain(value: Any) -> Any:
    """Tensors and arrays as Python's lists and numbers."""
    return value.tolist() if hasattr(value, "tolist") else value


def grouped(values: Sequence[Hashable]) -> list[list[int]]:
    """The indices of equal values, in the order of the values."""
    groups: dict[Hashable, list[int]] = {}
    for i, value in enumerate(values):
        groups.setdefault(value, []).append(i)
    keys: list[Any] = list(groups)
    try:
        keys.sort()
    except TypeError:  # of several types
        keys.sort(key=lambda key: (type(key).__name__, repr(key)))
    return [groups[key] for key in keys]
