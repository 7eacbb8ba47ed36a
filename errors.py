"""The errors of a user's mistake, which scripts print as one line (cli/script.py). Any function may raise them."""

import contextlib
import re
from collections.abc import Iterator


class UsageError(ValueError):
    """The user's input cannot work. The message is one sentence: what is wrong and what would be right."""


class OutOfMemoryError(UsageError):
    """Memory is too small. Each script has its own advice, which run_script appends to the message."""


@contextlib.contextmanager
def convert_type_errors(where: str) -> Iterator[None]:
    """Makes an error within this context a UsageError, if a value of the wrong type or size caused it. where: the file
    with the value."""
    try:
        yield
    except UsageError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, re.error) as e:
        raise UsageError(f"{where} holds something of the wrong kind ({e})") from None
