"""Block reconstruction: AdaRound and LSQ over subgraphs of the prepared graph."""

from qdiff_fx.reconstruction.config import ReconstructionConfig
from qdiff_fx.reconstruction.driver import reconstruct
from qdiff_fx.reconstruction.result import BlockResult

__all__ = ["BlockResult", "ReconstructionConfig", "reconstruct"]
