"""Move channel outliers of q, k and v into the projections around an attention, where the network's function allows.

q, k and v have one step each. Where v comes from a projection through reshapes only, dividing a row of that projection
by f_d and multiplying the output projection's column by f_d changes nothing but what the grid of v sees; for q and k a
row of one is divided by what a row of the other is multiplied with. Rows cost nothing: weights have a step a row.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from qdiff_fx.allocation.channel_factors import FactorChoice
from qdiff_fx.allocation.factor_search import EXPONENTS, smoothing_factor
from qdiff_fx.allocation.probe import flat_inputs, spread_rows
from qdiff_fx.calibration import CalibrationSet
from qdiff_fx.calibration.progress import progress_bar
from qdiff_fx.fake_quantize import ActivationQuantizer, AttentionQuantizer, QuantizerMode, preserved_modes, set_mode
from qdiff_fx.graph.edit import LayerCall, get_tensor, layer_call, set_tensor
from qdiff_fx.graph.finite import FiniteRun
from qdiff_fx.graph.memory import row_memory, rows_within
from qdiff_fx.graph.signature import CallSignature

aten = torch.ops.aten

MINIMUM_GAIN_DB = 6.0
"""Predicted from maxima, and blind to what the columns of the output projection lose at 4 bits: on the bundled
unconditional model, which has no such outliers, folding gains of 1 to 4 dB cost 1 dB of median SQNR at W4A8."""

_MOVING = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.permute.default,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.contiguous.default,
    aten.clone.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unbind.int,
    operator.getitem,
)
"""Operators that move values about and change none."""

_CASTS = (aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default, aten.dropout.default)
"""Operators that leave every value in its place."""


@dataclass(frozen=True, kw_only=True)
class _Path:
    """A projection and the moves between it and an attention, in execution order."""

    layer: LayerCall
    moves: tuple[fx.Node, ...]


@dataclass(kw_only=True)
class _Seen:
    """What the attention's operands were, by channel of the projection that each comes from."""

    rows: dict[str, Tensor]
    maxima: dict[str, Tensor]
    columns: Tensor | None


@torch.no_grad()
def fold_attention_factors(
    graph_module: fx.GraphModule,
    signature: CallSignature,
    data: CalibrationSet,
    *,
    samples: int = 32,
    batch_size: int = 4,
    seed: int = 0,
    progress: bool | None = False,
) -> tuple[FactorChoice, ...]:
    """Equalise the operands of every quantized attention; the network's full-precision output stays what it was.

    Among the exponents a of max|v_d|^a / max|W_d|^(1-a) (for q and k: max|q_d|^a / max|k_d|^(1-a)) the one with the
    least predicted error wins, if it is clearly lower. To be called before observation: what was observed of the
    operands no longer holds. Weights are replaced by new tensors; those of the original module are not touched.

    Raises: NonFiniteError naming the first layer that makes NaN or infinity.

    Left alone, with the reason in the result: operands that do not come from a projection of their own through
    reshapes (normalised, rotated, shared), outputs that do not reach a projection so.
    """
    attentions = [
        node
        for node in graph_module.graph.nodes
        if node.op == "call_module"
        and isinstance(module := graph_module.get_submodule(str(node.target)), AttentionQuantizer)
        and module.operands
    ]
    if not attentions:
        return ()
    seen = _observe(graph_module, attentions, signature, data, samples, batch_size, seed, progress)
    choices: list[FactorChoice] = []
    for node in attentions:
        name = graph_module.get_submodule(str(node.target)).name
        choices.append(_fold_value(graph_module, node, seen[node], f"{name}.value"))
        choices.append(_fold_query_key(graph_module, node, seen[node], f"{name}.query, key"))
    return tuple(choices)


class _Recorder(FiniteRun):
    """Runs the graph and looks at each attention while its operands are at hand."""

    def __init__(self, graph_module: fx.GraphModule, seen: Mapping[fx.Node, _Seen]) -> None:
        super().__init__(graph_module)
        self.seen = seen
        self.shapes: dict[fx.Node, torch.Size] = {}
        self._keep(graph_module)

    def _keep(self, graph_module: fx.GraphModule) -> None:
        """Sizes live to the end of the run, a projection's output until its attention has been looked at."""
        until: dict[fx.Node, list[fx.Node]] = {}
        for attention in self.seen:
            paths = (_path_back(argument, attention) for argument in _operands(attention).values())
            until[attention] = [path.layer.node for path in paths if path is not None]
        waiting = {node for nodes in until.values() for node in nodes}
        for user, nodes in self.user_to_last_uses.items():
            self.user_to_last_uses[user] = [
                node for node in nodes if node not in waiting and isinstance(node.meta.get("val"), Tensor)
            ]
        for attention, nodes in until.items():
            self.user_to_last_uses.setdefault(attention, []).extend(dict.fromkeys(nodes))

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self.seen:
            self.shapes[n] = result.shape
            self._look(n, self.seen[n])
        return result

    def _look(self, node: fx.Node, seen: _Seen) -> None:
        for operand, argument in _operands(node).items():
            path = _path_back(argument, node)
            if path is None:
                continue
            value: Tensor = self.env[argument]
            source = self.env[path.layer.node]
            axis = path.layer.channel_axis % source.ndim
            channels = torch.arange(source.shape[axis], device=value.device)
            index = channels.view([-1 if position == axis else 1 for position in range(source.ndim)])
            moved = self._replay(index.expand(source.shape), path.layer.node, path.moves)
            by_channel = seen.maxima.setdefault(
                operand, torch.zeros(len(channels), dtype=torch.float32, device=value.device)
            )
            by_channel.scatter_reduce_(0, moved.flatten(), value.abs().float().flatten(), "amax")
            rows = moved.select(-2, 0)
            if bool((moved == rows.unsqueeze(-2)).all()):
                seen.rows[operand] = rows

    def _replay(self, index: Tensor, start: fx.Node, moves: Sequence[fx.Node]) -> Tensor:
        """Where the elements of `index`, in the place of the output of `start`, end up after `moves`."""
        values: dict[fx.Node, Any] = {start: index}
        for move in moves:
            args, kwargs = fx.map_arg((move.args, dict(move.kwargs)), lambda node: values.get(node, self.env.get(node)))
            operator_: Any = move.target
            values[move] = args[0] if operator_ in _CASTS else operator_(*args, **kwargs)
        result: Tensor = values[moves[-1]] if moves else index
        return result

    def columns(self, node: fx.Node, rows: Tensor, path: _Path) -> Tensor | None:
        """[C_in]: the channel of the value projection that each input channel of the output projection comes from."""
        index = rows.unsqueeze(-2).expand(self.shapes[node])
        moved = self._replay(index, node, path.moves)
        by_channel = moved.movedim(path.layer.channel_axis, 0).flatten(1)
        return by_channel[:, 0] if bool((by_channel == by_channel[:, :1]).all()) else None


def _observe(
    graph_module: fx.GraphModule,
    attentions: Sequence[fx.Node],
    signature: CallSignature,
    data: CalibrationSet,
    samples: int,
    batch_size: int,
    seed: int,
    progress: bool | None,
) -> dict[fx.Node, _Seen]:
    seen = {node: _Seen(rows={}, maxima={}, columns=None) for node in attentions}
    device = next(graph_module.parameters()).device
    memory = row_memory(graph_module, flat_inputs(data, torch.tensor([0]), signature, device))
    batch_size = rows_within(2 * memory.forward, batch_size)
    with preserved_modes(graph_module):
        set_mode(graph_module, QuantizerMode.PASS)
        batches = torch.split(spread_rows(data, samples, seed), batch_size)
        with progress_bar("attention factors", total=len(batches), progress=progress) as bar:
            for rows in batches:
                recorder = _Recorder(graph_module, seen)
                recorder.run(*flat_inputs(data, rows, signature, device))
                for node, item in seen.items():
                    path = _path_forward(graph_module, node)
                    if path is not None and "value" in item.rows:
                        item.columns = recorder.columns(node, item.rows["value"], path)
                bar.update(1)
    return seen


def _fold_value(graph_module: fx.GraphModule, node: fx.Node, seen: _Seen, name: str) -> FactorChoice:
    source, target = _path_back(_operands(node)["value"], node), _path_forward(graph_module, node)
    if source is None or "value" not in seen.rows:
        return _left_alone(name, "v does not come from a projection of its own through reshapes")
    if target is None or seen.columns is None:
        return _left_alone(name, "the output does not reach a projection through reshapes")
    rows = seen.columns
    if len(torch.unique(rows)) != len(rows) or target.layer.groups != 1:
        return _left_alone(name, "channels of v and columns of the output projection are not one to one")
    maxima = seen.maxima["value"][rows]
    weight = _weight(graph_module, target.layer)
    columns = weight.transpose(0, 1).flatten(1).float()
    column_maxima, energies = columns.abs().amax(dim=1), columns.double().square().sum(dim=1)

    def predicted(factor: Tensor) -> float:
        return float((maxima / factor).double().max().square() * (factor.double().square() * energies).sum())

    choice, factor = _best(name, maxima, column_maxima, predicted)
    if factor is not None:
        _scale_rows(graph_module, source.layer, rows, 1.0 / factor)
        scaled = weight * factor.to(weight).view(1, -1, *[1] * (weight.ndim - 2))
        _replace(graph_module, _weight_name(target.layer), scaled)
    return choice


def _fold_query_key(graph_module: fx.GraphModule, node: fx.Node, seen: _Seen, name: str) -> FactorChoice:
    operands = _operands(node)
    query, key = _path_back(operands["query"], node), _path_back(operands["key"], node)
    if query is None or key is None or not {"query", "key"} <= set(seen.rows):
        return _left_alone(name, "q or k does not come from a projection of its own through reshapes")
    query_rows, key_rows = seen.rows["query"].flatten(), seen.rows["key"].flatten()
    if query_rows.shape != key_rows.shape:
        return _left_alone(name, "q and k have different heads")
    pairs = torch.unique(torch.stack([query_rows, key_rows], dim=1), dim=0)
    query_rows, key_rows = pairs.unbind(dim=1)
    if len(torch.unique(query_rows)) != len(pairs) or len(torch.unique(key_rows)) != len(pairs):
        return _left_alone(name, "channels of q and k are not one to one")
    queries, keys = seen.maxima["query"][query_rows], seen.maxima["key"][key_rows]

    def predicted(factor: Tensor) -> float:
        q, k = (queries / factor).double(), (keys * factor).double()
        return float(q.max().square() * k.square().sum() + k.max().square() * q.square().sum())

    choice, factor = _best(name, queries, keys, predicted)
    if factor is not None:
        _scale_rows(graph_module, query.layer, query_rows, 1.0 / factor)
        _scale_rows(graph_module, key.layer, key_rows, factor)
    return choice


def _best(name: str, first: Tensor, second: Tensor, predicted: Any) -> tuple[FactorChoice, Tensor | None]:
    """The exponent with the least predicted error, or none where it gains too little."""
    off = predicted(torch.ones_like(first))
    errors = {exponent: predicted(smoothing_factor(first, second, exponent)) for exponent in EXPONENTS}
    exponent = min(errors, key=lambda item: errors[item])
    gain = 10.0 * float(torch.log10(torch.tensor(off / max(errors[exponent], 1e-30), dtype=torch.float64)))
    if gain < MINIMUM_GAIN_DB:
        return _left_alone(name, f"the best factor is predicted to gain less than {MINIMUM_GAIN_DB:g} dB"), None
    factor = smoothing_factor(first, second, exponent)
    return FactorChoice(layers=(name,), exponent=exponent, shifted=False, gain_db=gain), factor


def _left_alone(name: str, reason: str) -> FactorChoice:
    return FactorChoice(layers=(name,), exponent=None, shifted=False, gain_db=0.0, reason=reason)


def _operands(node: fx.Node) -> dict[str, fx.Node]:
    """q, k and v of an attention call."""
    return {
        name: value
        for name, value in zip(("query", "key", "value"), node.args, strict=False)
        if isinstance(value, fx.Node)
    }


def _path_back(node: fx.Node, attention: fx.Node) -> _Path | None:
    """From an operand back to the layer that made it, if only moves lie between and nothing else reads the layer."""
    moves: list[fx.Node] = []
    while (call := layer_call(node)) is None:
        source = node.args[0] if node.op == "call_function" and node.args else None
        if node.target not in (*_MOVING, *_CASTS) or not isinstance(source, fx.Node):
            return None
        moves.append(node)
        node = source
    if not _own_weight(call) or not _feeds_only(call.node, attention):
        return None
    return _Path(layer=call, moves=tuple(reversed(moves)))


def _path_forward(graph_module: fx.GraphModule, attention: fx.Node) -> _Path | None:
    """From the attention's output to the layer that reads it, if only moves and its quantizer lie between."""
    moves: list[fx.Node] = []
    node = attention
    while len(node.users) == 1:
        user = next(iter(node.users))
        call = layer_call(user)
        if call is not None:
            return _Path(layer=call, moves=tuple(moves)) if call.input is node and _own_weight(call) else None
        quantizer = graph_module.get_submodule(str(user.target)) if user.op == "call_module" else None
        if user.target in (*_MOVING, *_CASTS):
            moves.append(user)
        elif not isinstance(quantizer, ActivationQuantizer):
            return None
        node = user
    return None


def _feeds_only(layer: fx.Node, attention: fx.Node) -> bool:
    """Whether everything that reads the layer's output, through moves, is this attention."""
    waiting = list(layer.users)
    while waiting:
        user = waiting.pop()
        if user.target in (*_MOVING, *_CASTS):
            waiting.extend(user.users)
        elif user is not attention:
            return False
    return True


def _own_weight(call: LayerCall) -> bool:
    """Whether nothing else reads the layer's weight and bias."""
    nodes = [call.weight, *(() if call.bias is None else (call.bias,))]
    nodes += [item for node in nodes for item in node.all_input_nodes]
    return all(len(node.users) == 1 for node in nodes)


def _weight_name(call: LayerCall) -> str:
    """The tensor that the layer's weight is, behind its quantizer if it has one."""
    node = call.weight
    if node.op == "call_module":
        (node,) = node.all_input_nodes
    return str(node.target)


def _weight(graph_module: fx.GraphModule, call: LayerCall) -> Tensor:
    return get_tensor(graph_module, _weight_name(call)).detach()


def _scale_rows(graph_module: fx.GraphModule, call: LayerCall, rows: Tensor, factor: Tensor) -> None:
    """Multiply rows of the weight, and entries of the bias, with `factor`."""
    weight = _weight(graph_module, call)
    scale = torch.ones(weight.shape[0], device=weight.device, dtype=torch.float32)
    scale[rows] = factor.float()
    _replace(graph_module, _weight_name(call), weight * scale.to(weight).view(-1, *[1] * (weight.ndim - 1)))
    if call.bias is not None:
        bias = get_tensor(graph_module, call.bias.target).detach()
        _replace(graph_module, str(call.bias.target), bias * scale.to(bias))


def _replace(graph_module: fx.GraphModule, name: str, values: Tensor) -> None:
    set_tensor(graph_module, name, nn.Parameter(values, requires_grad=False))
