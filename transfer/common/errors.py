"""Every error ends in one line that says where, what and what to do."""

import json
import os
import signal
import sys
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
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


def exit_cleanly(main: Callable[[], object]) -> None:
    """Run `main`; an InputError becomes one line on stderr and exit status 1.

    So do a full disk and similar failures of the system, and Ctrl-C. SIGTERM also lets temporary
    files be removed.
    """
    signal.signal(signal.SIGTERM, lambda *_: fail("terminated"))
    try:
        main()
    except InputError as error:
        if not is_first_process():
            time.sleep(5)  # most mistakes fail in every process: let the first one report them
        fail(str(error))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        fail(f"{where}{error.strerror or error}")
    except KeyboardInterrupt:
        fail("interrupted")


def fail(message: str) -> NoReturn:
    """Exit with status 1 and one line: "error: `message`".

    Under torchrun the line goes into the error file of this process, which torchrun prints at the
    end of its own report, so that it appears once.
    """
    line = f"error: {printable(message)}"
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if _under_torchrun() and path:
        report = {"message": line, "timestamp": int(time.time())}
        Path(path).write_text(json.dumps(report), encoding="utf-8")
        sys.exit(1)
    sys.exit(line)


def is_first_process() -> bool:
    """False in all but the first of the processes that torchrun started; True without it."""
    return not _under_torchrun() or os.environ.get("RANK") == "0"


def _under_torchrun() -> bool:
    return bool(os.environ.get("TORCHELASTIC_RUN_ID"))
