"""Triton hashes its own library, hundreds of MB, before the first kernel of a process: here on a thread, beforehand.

Hashing lets go of the interpreter lock. Triton keeps the result; two threads that ask at once would both compute it.
From Python 3.12 on, os.fork within that half second warns of threads; the child has none and hashes for itself.
"""

import contextlib
import threading

from triton import knobs
from triton.runtime import cache

__all__ = ["begin_hash", "wait_for_hash"]

_thread: threading.Thread | None = None


def begin_hash() -> None:
    """Begins the hash, once a process; not for the interpreter, nor with a Triton that has no `triton_key`."""
    global _thread
    triton_key = getattr(cache, "triton_key", None)
    if _thread is not None or triton_key is None or knobs.runtime.interpret:
        return

    def run() -> None:
        # Whoever compiles asks again, and gets the error
        with contextlib.suppress(Exception):
            triton_key()

    _thread = threading.Thread(target=run, name="fla_compile.library_hash", daemon=True)
    _thread.start()


def wait_for_hash() -> None:
    """Returns when no hash runs that was begun here; at once in a fork, which has no such thread."""
    if _thread is not None:
        _thread.join()
