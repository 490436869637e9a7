"""Understudy's client library: ask a daemon for images. Imports neither torch nor the daemon."""
