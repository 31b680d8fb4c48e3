"""CONVERT passes, in order: from a calibrated graph to backend-neutral integer operators. What is saved."""

from qdiff_fx.passes.base import GraphPass
from qdiff_fx.passes.convert.attention import ConvertAttention
from qdiff_fx.passes.convert.biases import FoldBiasCorrections
from qdiff_fx.passes.convert.layers import ConvertLayers
from qdiff_fx.passes.convert.views import ViewsToReshapes

CONVERT: tuple[GraphPass, ...] = (
    FoldBiasCorrections(),
    ConvertLayers(),
    ConvertAttention(),
    ViewsToReshapes(),
)
