"""Makes ``pytorch_lightning`` and ``lightning_fabric`` names of ``lightning.pytorch`` and ``lightning.fabric``.

Lightning is published twice, with the same code and different classes: the Trainer of ``pytorch_lightning`` takes no
strategy of ``lightning.pytorch``. Projects, and packages that build the Trainer inside, which import
``pytorch_lightning`` run unchanged after::

    import lightning_diloco.as_pytorch_lightning  # before anything imports `pytorch_lightning`

From then on, and until the process ends, ``pytorch_lightning.x`` is the very module ``lightning.pytorch.x``, whatever
is imported first; the package ``pytorch_lightning`` isn't read and need not be installed.

Elsewhere: the warning of a DilocoStrategy made without this import (``strategy.py``).

Raises:
    ImportError: ``pytorch_lightning`` or ``lightning_fabric`` has been imported already.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib import metadata
from importlib.abc import InspectLoader, Loader
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType

from typing_extensions import override

_PACKAGES = {"pytorch_lightning": "lightning.pytorch", "lightning_fabric": "lightning.fabric"}
_OF_THE_DISTRIBUTION = ("__about__", "__version__")  # modules that `lightning` has one level further up
_ANY = metadata.DistributionFinder.Context()


class _Alias(metadata.DistributionFinder, Loader):
    """Finds ``lightning.pytorch.x`` for ``pytorch_lightning.x``, and the version of ``lightning`` for theirs."""

    @override
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        real = _real_name(fullname)
        known = real is not None and (real in sys.modules or importlib.util.find_spec(real) is not None)
        return ModuleSpec(fullname, self) if known else None

    @override
    def exec_module(self, module: ModuleType) -> None:
        real = _real_name(module.__name__)
        assert real is not None
        sys.modules[module.__name__] = importlib.import_module(real)  # importlib returns what it finds there

    def get_code(self, fullname: str) -> CodeType | None:
        """For ``python -m`` and ``runpy``, which run the code of a module again."""
        real = _real_name(fullname)
        spec = None if real is None else importlib.util.find_spec(real)
        loader = None if spec is None else spec.loader
        return loader.get_code(fullname if spec is None else spec.name) if isinstance(loader, InspectLoader) else None

    @override
    def find_distributions(self, context: metadata.DistributionFinder.Context = _ANY) -> list[metadata.Distribution]:
        alias = context.name is not None and context.name.replace("-", "_").lower() in _PACKAGES
        return [metadata.distribution("lightning")] if alias else []


def _real_name(fullname: str) -> str | None:
    package, dot, rest = fullname.partition(".")
    return _PACKAGES[package] + dot + rest if package in _PACKAGES else None


def _install() -> None:
    for alias, real in _PACKAGES.items():
        imported = any(name == alias or name.startswith(f"{alias}.") for name in sys.modules)
        if imported and sys.modules.get(alias) is not importlib.import_module(real):
            raise ImportError(
                f"`{alias}` was imported before `lightning_diloco.as_pytorch_lightning`, and can't become a name of"
                f" `{real}` any more: its classes may be in use. Put `import lightning_diloco.as_pytorch_lightning`"
                f" above every import of `{alias}` and of packages that import it: at the top of the script that is"
                " started, or in the first cell of a notebook after restarting its kernel.",
                name=__name__,
            )
    for alias, real in _PACKAGES.items():
        sys.modules[alias] = importlib.import_module(real)
        for part in _OF_THE_DISTRIBUTION:
            module = importlib.import_module(f"lightning.{part}")
            sys.modules[f"{alias}.{part}"] = module
            if not hasattr(sys.modules[alias], part):  # `__version__` is there, as the number
                setattr(sys.modules[alias], part, module)
    sys.meta_path.insert(0, _Alias())


_install()
