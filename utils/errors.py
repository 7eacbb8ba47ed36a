"""Errors for mistakes of the user. Any function may raise one; cli/script.py prints it as one line."""

import contextlib
import re
from collections.abc import Iterator


class UsageError(ValueError):
    """The user's input cannot work. The message says in one sentence what is wrong and what would be right."""


class OutOfMemoryError(UsageError):
    """There is too little memory. run_script appends the script's advice to the message."""


def check_integer(name: str, value, low: int | None = None, high: int | None = None):
    """Raises UsageError unless value is an integer from low to high. None means no limit. name: what the user calls the
    value."""
    if type(value) is not int:  # isinstance would let a bool through
        raise UsageError(f"{name} must be an integer, not {value!r:.80}")
    if (low is not None and value < low) or (high is not None and value > high):
        allowed = f"at least {low}" if high is None else f"{low} to {high}"
        raise UsageError(f"{name} must be {allowed}, not {value}")


@contextlib.contextmanager
def convert_type_errors(where: str, *others: type[Exception]) -> Iterator[None]:
    """Turns the errors that a value of the wrong type or size causes into UsageError. where: the file that holds the
    value, for the message. others: more types of errors to convert."""
    try:
        yield
    except UsageError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, re.error, *others) as e:
        what = f"no {e}" if isinstance(e, KeyError) else str(e).partition("\n")[0]
        raise UsageError(f"{where} holds something of the wrong kind ({what})") from None
