"""The child process that moves blobs into the arena. It imports no torch and computes nothing."""
