"""The operators that a stored graph may call: an explicit list, because a loaded graph is executed.

On it: functions of their arguments alone, without access to files, network, Python or data-dependent sizes. To extend
it, add one name here after checking that.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch

_CONVOLUTION = """
conv1d.default conv1d.padding conv2d.default conv2d.padding conv3d.default conv3d.padding
conv_transpose1d.default conv_transpose2d.input conv_transpose3d.input convolution.default
linear.default addmm.default bilinear.default embedding.default
"""
_PRODUCTS = """
matmul.default mm.default bmm.default baddbmm.default addbmm.default einsum.default dot.default mv.default
scaled_dot_product_attention.default
"""
_NORMALIZATION = """
group_norm.default native_group_norm.default layer_norm.default native_layer_norm.default rms_norm.default
batch_norm.default instance_norm.default softmax.int _softmax.default log_softmax.int _log_softmax.default
norm.Scalar norm.ScalarOpt_dim linalg_vector_norm.default
"""
_ACTIVATIONS = """
relu.default relu_.default relu6.default silu.default silu_.default gelu.default gelu_.default sigmoid.default
sigmoid_.default tanh.default tanh_.default leaky_relu.default leaky_relu_.default elu.default elu_.default
selu.default mish.default mish_.default softplus.default hardswish.default hardswish_.default hardsigmoid.default
hardtanh.default hardtanh_.default log_sigmoid.default prelu.default glu.default
"""
_ARITHMETIC = """
add.Tensor add.Scalar add_.Tensor add_.Scalar sub.Tensor sub.Scalar sub_.Tensor sub_.Scalar rsub.Tensor rsub.Scalar
mul.Tensor mul.Scalar mul_.Tensor mul_.Scalar div.Tensor div.Scalar div.Tensor_mode div.Scalar_mode div_.Tensor
div_.Scalar true_divide.Tensor floor_divide.default floor_divide.Scalar remainder.Scalar remainder.Tensor fmod.Scalar
fmod.Tensor neg.default neg_.default abs.default sign.default pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar
pow_.Scalar square.default sqrt.default sqrt_.default rsqrt.default reciprocal.default exp.default exp_.default
exp2.default expm1.default log.default log2.default log10.default log1p.default sin.default sin_.default cos.default
cos_.default tan.default atan.default atan2.default sinh.default cosh.default erf.default floor.default ceil.default
round.default trunc.default frac.default clamp.default clamp.Tensor clamp_.default clamp_min.default
clamp_min.Tensor clamp_max.default clamp_max.Tensor clip.default minimum.default maximum.default lerp.Scalar
lerp.Tensor addcmul.default addcdiv.default hypot.default logaddexp.default nan_to_num.default
"""
_COMPARISON = """
eq.Scalar eq.Tensor ne.Scalar ne.Tensor lt.Scalar lt.Tensor le.Scalar le.Tensor gt.Scalar gt.Tensor ge.Scalar
ge.Tensor logical_and.default logical_or.default logical_not.default logical_xor.default bitwise_and.Tensor
bitwise_and.Scalar bitwise_or.Tensor bitwise_or.Scalar bitwise_not.default bitwise_xor.Tensor where.self
where.ScalarSelf where.ScalarOther where.Scalar masked_fill.Scalar masked_fill.Tensor masked_fill_.Scalar
masked_fill_.Tensor isnan.default isinf.default isfinite.default
"""
_REDUCTION = """
sum.default sum.dim_IntList mean.default mean.dim var.default var.dim var.correction var_mean.correction std.default
std.dim std.correction amax.default amin.default max.default max.dim max.other min.default min.dim min.other
argmax.default argmin.default prod.default prod.dim_int cumsum.default cumprod.default logsumexp.default all.default
all.dim any.default any.dim topk.default sort.default
"""
_SHAPES = """
view.default reshape.default _unsafe_view.default view_as.default reshape_as.default flatten.using_ints
unflatten.int permute.default transpose.int t.default numpy_T.default movedim.int movedim.intlist swapaxes.default
mT.default mH.default
squeeze.default squeeze.dim squeeze.dims squeeze_.dim unsqueeze.default unsqueeze_.default expand.default
expand_as.default repeat.default tile.default repeat_interleave.self_int broadcast_to.default cat.default
concat.default concatenate.default stack.default hstack.default vstack.default chunk.default split.Tensor
split_with_sizes.default tensor_split.sections unbind.int slice.Tensor slice_scatter.default select.int
select_scatter.default narrow.default index.Tensor index_select.default gather.default take_along_dim.default
flip.default roll.default pad.default constant_pad_nd.default reflection_pad1d.default reflection_pad2d.default
replication_pad1d.default replication_pad2d.default tril.default triu.default diagonal.default meshgrid.indexing
meshgrid.default pixel_shuffle.default pixel_unshuffle.default channel_shuffle.default unfold.default im2col.default
col2im.default
"""
_RESAMPLING = """
upsample_nearest1d.vec upsample_nearest1d.default upsample_nearest2d.vec upsample_nearest2d.default
upsample_nearest3d.vec _upsample_nearest_exact1d.vec _upsample_nearest_exact2d.vec upsample_linear1d.vec
upsample_bilinear2d.vec upsample_bilinear2d.default upsample_bicubic2d.vec upsample_trilinear3d.vec
_upsample_bilinear2d_aa.vec _upsample_bicubic2d_aa.vec avg_pool1d.default avg_pool2d.default avg_pool3d.default
max_pool1d.default max_pool2d.default max_pool3d.default adaptive_avg_pool1d.default adaptive_avg_pool2d.default
adaptive_max_pool2d.default grid_sampler.default
"""
_CREATION = """
zeros.default zeros_like.default ones.default ones_like.default full.default full_like.default empty.memory_format
empty_like.default new_zeros.default new_ones.default new_full.default new_empty.default arange.default arange.start
arange.start_step linspace.default logspace.default eye.default scalar_tensor.default one_hot.default
lift_fresh_copy.default fill.Scalar fill_.Scalar zero_.default copy.default copy_.default
"""
_CONVERSION = """
to.dtype to.dtype_layout to.device to.other _to_copy.default type_as.default contiguous.default clone.default
alias.default detach.default detach_.default dropout.default dropout_.default feature_dropout.default
native_dropout.default sym_size.int sym_numel.default sym_stride.int _assert_tensor_metadata.default
"""

ATEN = frozenset(
    " ".join(
        (
            _CONVOLUTION,
            _PRODUCTS,
            _NORMALIZATION,
            _ACTIVATIONS,
            _ARITHMETIC,
            _COMPARISON,
            _REDUCTION,
            _SHAPES,
            _RESAMPLING,
            _CREATION,
            _CONVERSION,
        )
    ).split()
)
"""ATen overloads, without their namespace."""

QDIFF = frozenset(
    ("quantize.default", "conv2d.default", "linear.default", "dequantize_weight.default", "attention.default")
)
"""Operators of CONVERT-level graphs; what LOWER passes emit is never stored."""

# No pow, no shift: a chain of them makes integers that fill the memory.
SIZE_ARITHMETIC: Mapping[str, Callable[..., Any]] = {
    "operator.add": operator.add,
    "operator.sub": operator.sub,
    "operator.mul": operator.mul,
    "operator.floordiv": operator.floordiv,
    "operator.truediv": operator.truediv,
    "operator.mod": operator.mod,
    "operator.neg": operator.neg,
    "operator.eq": operator.eq,
    "operator.ne": operator.ne,
    "operator.lt": operator.lt,
    "operator.le": operator.le,
    "operator.gt": operator.gt,
    "operator.ge": operator.ge,
    "math.ceil": math.ceil,
    "math.floor": math.floor,
    "math.trunc": math.trunc,
    "torch.sym_float": torch.sym_float,
    "torch.sym_int": torch.sym_int,
    "torch.sym_max": torch.sym_max,
    "torch.sym_min": torch.sym_min,
    "torch.sym_not": torch.sym_not,
    "torch.sym_ite": torch.sym_ite,
}
"""Functions of numbers: they never get a tensor, list or string."""

GETITEM = "operator.getitem"
"""Takes one element of an operator's several results."""

_FUNCTIONS: Mapping[str, Callable[..., Any]] = {**SIZE_ARITHMETIC, GETITEM: operator.getitem}


def target_name(target: Any) -> str | None:
    """The stored name of a call_function target, or None if it is not on the list."""
    if isinstance(target, torch._ops.OpOverload):
        name = str(target)
        return name if is_allowed(name) else None
    return next((name for name, function in _FUNCTIONS.items() if function is target), None)


def is_allowed(name: str) -> bool:
    """Whether a stored graph may call the target with this name."""
    namespace, _, overload = name.partition(".")
    return name in _FUNCTIONS or overload in {"aten": ATEN, "qdiff": QDIFF}.get(namespace, ())


def resolve_target(name: str) -> Callable[..., Any] | None:
    """The function with this name; None if it is not on the list or this version of torch lacks it."""
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    if not is_allowed(name):
        return None
    namespace, packet, overload = name.split(".")
    function: Callable[..., Any] | None = getattr(getattr(getattr(torch.ops, namespace), packet, None), overload, None)
    return function
