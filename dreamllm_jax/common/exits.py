"""How a training process ends, for whatever started it."""

PREEMPTED = 75  # asked to stop, everything is saved: start it again (EX_TEMPFAIL of sysexits.h)
HUNG = 76  # no step was finished, or another host was not heard of, for too long: start it again


class Preempted(Exception):
    """The run was asked to stop and has saved itself."""
