"""All benchmarks in a quarter of an hour, and the page about them: `make bench`.

`cases.py` says what is run, `running.py` runs it, `results.py` is the file that is kept. The page is made
from that file alone: `picking.py` finds figures in it, `versus.py`, `goals.py`, `sections.py` and
`gpu_section.py` say what is shown, `page.py` and `readme.py` put it together, `plots.py` draws.
"""
