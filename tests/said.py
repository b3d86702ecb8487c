"""What the package says through Lightning's log during a test."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def said(level: int = logging.INFO) -> Iterator[list[str]]:
    """Inside, Lightning's log has this level; the list has the messages of the package."""
    lines: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith("DiLoCo"):
                lines.append(record.getMessage())

    log, listener = logging.getLogger("lightning.pytorch"), Listener()
    before = log.level
    log.addHandler(listener)
    log.setLevel(level)
    try:
        yield lines
    finally:
        log.removeHandler(listener)
        log.setLevel(before)
