"""Ends what another thread does by raising in it. Knows threads, nothing of engines.

Python raises at the thread's next instruction: a loop in Python ends at once, a call of compiled code not before it
returns. Threads cannot be killed, and two engines must never work on the same weights, so nothing stronger is right.
"""

import ctypes


class StepHung(BaseException):
    """A step was ended from outside; no request's fault, so nothing that contains requests' failures may take it."""


def interrupt(thread_id: int) -> None:
    """Raise StepHung in the thread with this `ident`; nothing happens if it has ended."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread_id), ctypes.py_object(StepHung))
