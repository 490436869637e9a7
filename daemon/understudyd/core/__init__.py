"""The pure heart of the daemon: queue, residency, extents, policy.

Nothing here does I/O, reads a clock or draws a random number, and nothing here imports more than
the standard library. `machine.Machine.handle(event, now_s)` returns the actions that the shell must
perform; every action that takes time ends in exactly one event. The daemon and the simulator drive
the same machine.
"""
