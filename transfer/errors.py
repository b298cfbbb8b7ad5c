"""Whatever goes wrong ends in one line that says where, what and what to do."""

import signal
import sys
from collections.abc import Callable


class InputError(Exception):
    """Something given to the program is wrong. The message is one line: where, what, what to do."""


def exit_cleanly(main: Callable[[], None]) -> None:
    """Run `main`; an InputError becomes one line on stderr and exit status 1.

    So do a full disk and the like, and Ctrl-C. SIGTERM, too, leaves no temporary file behind.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: terminated"))
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        sys.exit(f"error: {where}{error.strerror or error}")
    except KeyboardInterrupt:
        sys.exit("error: interrupted")
