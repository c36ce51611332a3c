"""Imported last, it makes the garbage collector leave alone what is there by then.

Libraries and collected tests are a million objects that stay. Going through them again and again is a fifth of the time
that it takes to trace a program.
"""

import gc

gc.collect()
gc.freeze()
gc.set_threshold(10_000)
