"""Random streams: the run's seed, and independent streams of torch's generators.

Owns the derivation of independent seeds from the run's seed, and :class:`RandomStream`, a state of torch's generators
that is swapped in for a block. Does not touch Python's and NumPy's generators, nor randomness inside a dataset.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch


def run_seed() -> int:
    """The seed of this run: ``PL_GLOBAL_SEED`` (set by ``seed_everything``), else ``torch.initial_seed()``; 63 bits."""
    return int(os.environ.get("PL_GLOBAL_SEED") or torch.initial_seed()) & (2**63 - 1)


@contextmanager
def seed_variables_kept() -> Iterator[None]:
    """After the block the environment variables that ``seed_everything`` writes are as they were."""
    names = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part, so that streams with different parts are unrelated.

    >>> derive_seed(0, "worker", 1) == derive_seed(0, "worker", 1), derive_seed(0, 1) == derive_seed(1, 0)
    (True, False)
    """
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & (2**63 - 1)


def process_state() -> dict[str, torch.Tensor | None]:
    """The state of the process's torch generators."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None}


def set_process_state(state: Mapping[str, Any]) -> None:
    """Sets a state of :func:`process_state`; a CUDA state is ignored where there is no CUDA."""
    if state["cpu"] is not None:
        torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


class RandomStream:
    """A state of torch's global generators (CPU, and ``device`` if that is a CUDA device), for a worker or another use.

    Workers' turns, validations, samplers and loaders draw from streams, so that none shifts the numbers of another.

    Args:
        seed: seed of the stream's generators.
        device: the device whose generator is swapped too; None: the CPU's generator only.
    """

    def __init__(self, seed: int, device: torch.device | None = None) -> None:
        self._cuda = device if device is not None and device.type == "cuda" else None
        self.cpu_state = torch.Generator().manual_seed(seed).get_state()
        self.cuda_state = torch.Generator(self._cuda).manual_seed(seed).get_state() if self._cuda is not None else None

    @property
    def state(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The generators' states; the tensors are replaced, never written to, so that a reference is a snapshot."""
        return self.cpu_state, self.cuda_state

    @state.setter
    def state(self, state: tuple[torch.Tensor, torch.Tensor | None]) -> None:
        self.cpu_state, self.cuda_state = state

    @contextmanager
    def active(self) -> Iterator[None]:
        """Torch draws from this stream inside the block; afterwards torch's previous state is back, untouched."""
        with self.outside_kept(), self.loaded():
            yield

    @contextmanager
    def outside_kept(self) -> Iterator[None]:
        """Torch's generators are after the block as they were before it."""
        outside_cpu = torch.get_rng_state()
        outside_cuda = None if self._cuda is None else torch.cuda.get_rng_state(self._cuda)
        try:
            yield
        finally:
            torch.set_rng_state(outside_cpu)
            if self._cuda is not None and outside_cuda is not None:
                torch.cuda.set_rng_state(outside_cuda, self._cuda)

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """Torch draws from this stream inside the block, and its generators stay where the block leaves them."""
        torch.set_rng_state(self.cpu_state)
        if self._cuda is not None and self.cuda_state is not None:
            torch.cuda.set_rng_state(self.cuda_state, self._cuda)
        try:
            yield
        finally:
            self.cpu_state = torch.get_rng_state()
            if self._cuda is not None:
                self.cuda_state = torch.cuda.get_rng_state(self._cuda)
