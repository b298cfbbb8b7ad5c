"""Every error ends in one line that says where it is, what is wrong and what to do."""

import signal
import sys
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn


class InputError(Exception):
    """Something given to the program is wrong. The message is one line: where, what, what to do."""

    def __init__(self, message: str):
        super().__init__(printable(message))


def printable(text: object) -> str:
    """`text` on one line: control characters, line ends and lone surrogates become escapes."""
    special = ("Cc", "Cs", "Zl", "Zp")
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in special else c
        for c in str(text)
    )


def fail(message: str) -> NoReturn:
    """Exit with status 1 and one line on stderr: "error: `message`"."""
    sys.exit(f"error: {printable(message)}")


def exit_cleanly(main: Callable[[], object], fail: Callable[[str], object] = fail) -> None:
    """Run `main`; call `fail` with one line when it ends in an InputError or is interrupted, when
    memory is exhausted, or when the system fails, for example with a full disk.

    SIGTERM and Ctrl-C unwind the stack, so temporary files are removed. The handler of Ctrl-C is
    set as well, because a shell starts background jobs with SIGINT ignored.
    """
    for stream in (sys.stdout, sys.stderr):  # names that it cannot encode must not end a stage
        with suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: fail("terminated"))
    try:
        main()
    except InputError as error:
        fail(str(error))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        fail(f"{where}{error.strerror or error}")
    except KeyboardInterrupt:
        fail("interrupted")
    except (MemoryError, RuntimeError) as error:
        if not memory_is_exhausted(error):
            raise
        fail(
            "not enough memory: lower train.shared.batch_size or model.image_size, or take fewer "
            f"images ({str(error).splitlines()[0] if str(error) else 'MemoryError'})"
        )


def memory_is_exhausted(error: Exception) -> bool:
    """Whether memory is exhausted. Python and NumPy raise MemoryError; torch, and Python where it
    cannot start a thread, raise RuntimeError, told apart by its words.

    Whoever catches all errors of other code must ask, and raise such an error again.
    """
    words = ("out of memory", "allocate memory", "not enough memory", "start new thread")
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)
