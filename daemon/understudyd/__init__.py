"""Understudy's daemon: one parent that serves, child processes that load, one GPU."""
