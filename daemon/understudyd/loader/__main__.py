"""`python -m understudyd.loader --fd N`: one loader on the inherited socket N. Spawned by the daemon only."""

import os
import sys

from understudyd.loader.child import main

match sys.argv[1:]:
    case ["--fd", number] if number.isdigit():
        os._exit(main(int(number)))  # threads may hang in a read: do not wait for them
    case _:
        sys.exit("the daemon spawns loaders: python -m understudyd.loader --fd N")
