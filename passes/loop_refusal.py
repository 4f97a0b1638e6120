"""How a twin refuses its loop while Dynamo traces it, and how the one who catches the error learns why."""

from typing import NoReturn

import torch


class NotLiftable(Exception):
    """Raised while a twin is traced; `args` are reason, detail, the loop's "path/file.py:LINE", and a line, or 0."""


Told = tuple[str, str, str, int]
_told: list[Told] = []


@torch._dynamo.assume_constant_result
def _tell(reason: str, detail: str, site: str, line: int) -> bool:
    """Dynamo runs this for real while it traces; of an exception that the traced program raises it keeps little."""
    _told.append((reason, detail, site, line))
    return True


def not_liftable(error: BaseException) -> Told | None:
    """Return (reason, detail, site, line) if a `NotLiftable` is behind this error of Dynamo's, else None."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, NotLiftable):
            return seen.args[0], seen.args[1], seen.args[2], seen.args[3]
        if "NotLiftable" in f"{type(seen).__name__} {seen}":
            return _told[-1] if _told else None
        seen = seen.__cause__ or seen.__context__
    return None


def fail(reason: str, detail: str, site: str, line: int = 0) -> NoReturn:
    """Leave the loop at `site` as the user wrote it, because of what stands on `line` of it."""
    _tell(reason, detail, site, line)
    raise NotLiftable(reason, detail, site, line)
