"""What is done to its end, whatever comes in between."""

from __future__ import annotations

from collections.abc import Callable


def uninterrupted(action: Callable[[], object]) -> None:
    """Do it; where Ctrl-C interrupts it, do it again from its start, and raise `KeyboardInterrupt` once it is done.

    For what may be begun again, however far it came.
    """
    interrupt: KeyboardInterrupt | None = None
    while True:
        try:
            action()
            break
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt
