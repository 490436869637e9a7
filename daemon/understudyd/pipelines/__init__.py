"""For authors of custom pipelines: what to derive from, what a request holds (docs/custom-pipelines.md).

A class is installed as an entry point of the group `understudy.pipelines`; its weights are added with
`understudyctl add NAME FOLDER --pipeline ENTRY_POINT`. Importing this imports no torch.
"""

from understudyd.pipelines.pipeline import CustomPipeline
from understudyd.pipelines.request import Refused, Request

__all__ = ["CustomPipeline", "Refused", "Request"]
