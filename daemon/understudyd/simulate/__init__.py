"""What a daemon would do with recorded requests: the core machine, driven by a virtual clock."""
