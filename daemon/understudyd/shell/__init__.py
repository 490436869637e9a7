"""The I/O shell around the core: sockets, child processes, memory, signals."""
