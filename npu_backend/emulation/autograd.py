"""Backward through the CPU kernels: right, or an error.

PyTorch lets an operator without a registered derivative pass with a warning, and leaves `.grad` at None. So every
operator has an autograd kernel for CPU tensors:

    npu_fusion_attention, _v2, _v3    its gradient is computed by the operator that the vendor has for it
    all others                        the backward raises: the vendor's have none either, but for `ONLY_OF_THE_VENDOR`
    those that write into tensors     raise at once if a gradient would be needed, as `out=` does in PyTorch

Maximum and sum of npu_fusion_attention have no derivative, as on the NPU: what is computed from them needs no gradient.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree

from npu_backend.emulation.fusion import LOWEST
from npu_backend.emulation.mode import arithmetic, is_exact

GRADIENTS = {
    "npu::npu_fusion_attention": "npu_fusion_attention_grad",
    "npu::npu_fusion_attention_v2": "npu_fusion_attention_grad_v2",
    "npu::npu_fusion_attention_v3": "npu_fusion_attention_grad_v3",
}
UNMARKED = {"npu::npu_kv_rmsnorm_rope_cache": ("k_cache", "ckv_cache")}
"""Arguments that an operator writes into and that its schema does not mark, besides `out`."""
ONLY_OF_THE_VENDOR = ("npu::npu_rms_norm", "npu::npu_swiglu", "npu::npu_moe_gating_top_k")
"""Operators that have a derivative in torch_npu and none here: a layer is computed for inference only."""
NOT_OF_THE_GRADIENT = ("dropout_mask",)
"""Arguments of the forward that its gradient does not take; without dropout they count for nothing."""


def autograd_kernel(name: str) -> Callable[..., Any]:
    """The autograd kernel of an operator, `namespace::name.overload`, for CPU tensors."""
    return functools.partial(_differentiate if name in GRADIENTS else _run, name)


def _operator(name: str) -> Any:
    namespace, _, rest = name.partition("::")
    packet, _, overload = rest.partition(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")


def _below_autograd(operator: Any, args: Any, options: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args, **options)


def _needs_gradient(leaves: list[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in leaves)


def _run(name: str, *args: Any, **options: Any) -> Any:
    """An operator without a derivative."""
    operator = _operator(name)
    leaves, spec = pytree.tree_flatten((args, options))
    written = _written(name, args, options)
    if not _needs_gradient(leaves):
        results = _below_autograd(operator, args, options)
        for x in written:
            torch.autograd.graph.increment_version(x)  # so that a backward notices what it saved is gone
        return results
    if written:
        raise RuntimeError(
            f"{name} writes into the tensors it is given and has no derivative, but one of its arguments requires "
            "grad; call it under torch.no_grad()"
        )
    results = _NoDerivative.apply(name, spec, *leaves)
    gives_a_list = [str(x.type) for x in operator._schema.returns] == ["List[Tensor]"]
    return list(results) if gives_a_list else results


def _written(name: str, args: Any, options: dict[str, Any]) -> list[Tensor]:
    """The tensors that a call writes into: what the schema marks, `out` and `UNMARKED`, which it does not."""
    arguments = _operator(name)._schema.arguments
    by_name = dict(zip((a.name for a in arguments), args, strict=False)) | options
    marked = [by_name[a.name] for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    unmarked = [by_name.get(argument) for argument in UNMARKED.get(name, ())]
    return [x for x in (*marked, *unmarked, *(by_name.get("out") or [])) if isinstance(x, Tensor)]


class _NoDerivative(torch.autograd.Function):
    """Runs an operator; what comes out requires grad, and says what is wrong when that is asked for."""

    @staticmethod
    def forward(ctx: Any, name: str, spec: Any, *leaves: Any) -> Any:
        ctx.name = name
        args, options = pytree.tree_unflatten(leaves, spec)
        results = _below_autograd(_operator(name), args, options)
        return tuple(results) if isinstance(results, list) else results  # autograd does not look into lists

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        if ctx.name in ONLY_OF_THE_VENDOR:
            raise RuntimeError(f"{ctx.name} has no derivative here; torch_npu has one, which is not implemented")
        raise RuntimeError(
            f"{ctx.name} has no derivative, here as on the NPU; npu_fusion_attention has one (docs/operators.md)"
        )


def _differentiate(name: str, *args: Any, **options: Any) -> Any:
    """An operator whose gradient is another operator: tensors are query, key, value; the rest are options."""
    operator = _operator(name)
    if not _needs_gradient(pytree.tree_leaves((args, options))):
        return _below_autograd(operator, args, options)
    names = [a.name for a in operator._schema.arguments]
    given = dict(zip(names, args, strict=False)) | options
    query, key, value = (given.pop(x) for x in ("query", "key", "value"))
    return _Differentiable.apply(name, given, query, key, value)


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, options: dict[str, Any], query: Tensor, key: Tensor, value: Tensor) -> Any:
        results = _below_autograd(_operator(name), (query, key, value), options)
        ctx.name, ctx.options, ctx.exact = name, options, is_exact()
        ctx.save_for_backward(query, key, value, *results[:3])
        ctx.mark_non_differentiable(*(x for x in results[1:] if isinstance(x, Tensor)))
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, out, maximum, total = ctx.saved_tensors
        dy = gradients[0]  # all other results have none
        if ((maximum == LOWEST) & (total != -LOWEST)).any():
            raise RuntimeError(
                f"{ctx.name}: a query saw no key; its output is a mean of all values, of which the vendor's gradient "
                "is not the derivative: mask otherwise, or give inner_precise=2, which makes such rows 0"
            )
        options = {key: x for key, x in ctx.options.items() if key not in NOT_OF_THE_GRADIENT}
        options["scale_value"] = options.pop("scale", 1.0)
        gradient = getattr(torch.ops.npu, GRADIENTS[ctx.name])
        head_num, layout = options.pop("head_num"), options.pop("input_layout")
        with arithmetic("exact" if ctx.exact else "staged"):
            dq, dk, dv, *_rest = gradient(
                query, key, value, dy.contiguous(), head_num, layout,
                softmax_max=maximum, softmax_sum=total, attention_in=out, **options,
            )  # fmt: skip
        return None, None, dq, dk, dv
