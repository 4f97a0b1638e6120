"""Operators of this package: one `torch.library` operator from a function, its kernels, its fake, its gradients.

They do what `torch.library.custom_op` does and cost less than half at every call: its gradients look each argument's
default up in a list that is made anew for each (of n arguments, n lists of n), and its kernels look for aliases among
operands and results, which `opcheck` does in the tests. Where nothing but the kernel is left to run below autograd, it
is called and not dispatched to. Operators that take or return lists are `custom_op`s.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd import forward_ad

__all__ = ["operator", "refuse_tangents", "register_autograd", "register_fake", "register_kernel"]

NAMESPACE = "fla_compile"
DEVICES = ("cpu", "cuda")
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
# By operator, and by the set of dispatch keys of which none but the kernel's own is left.
_kernels: dict[OpOverload, dict[int, Callable]] = {}


class _UntilDynamo:
    """Functions that torch disables Dynamo for; before it is imported, which takes seconds, they run as they are.

    A finder that finds nothing, first in the search for modules. torch keeps what it calls in a function's place in an
    attribute of the function, and imports Dynamo where there is none.
    """

    attribute = "__dynamo_disable"
    functions: ClassVar[list[Callable]] = []

    @classmethod
    def add(cls, function: Callable) -> None:
        if "torch._dynamo" not in sys.modules:
            cls.functions.append(function)
            setattr(function, cls.attribute, function)

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> None:
        if name == "torch._dynamo":
            for function in cls.functions:
                function.__dict__.pop(cls.attribute, None)  # a kernel may be that of two devices
            cls.functions.clear()


sys.meta_path.insert(0, _UntilDynamo)  # type: ignore[arg-type]


def _untraced(function: Callable) -> Callable:
    """Dynamo must not trace what runs when a program calls an operator between two graphs."""
    disabled = torch._disable_dynamo(function)
    _UntilDynamo.add(function)
    return disabled


def operator(
    name: str, devices: Sequence[str] = DEVICES, schema: str | None = None, mutates: Sequence[str] = ()
) -> Callable[[Callable], OpOverload]:
    """Make `fla_compile::name` of a function with types (or a schema), which is its kernel on `devices`.

    It has no defaults, writes to the operands that `mutates` names alone, and returns none; one that writes has no
    gradient.
    """

    def define(kernel: Callable) -> OpOverload:
        signature = name + (schema or torch.library.infer_schema(kernel, mutates_args=mutates))
        if "=" in signature:  # the dispatcher leaves out arguments that are their defaults
            raise ValueError(f"an operator's arguments have no defaults: {signature}")
        _LIBRARY.define(signature, tags=(torch.Tag.pt2_compliant_tag,))
        op = getattr(getattr(torch.ops, NAMESPACE), name).default
        for device in devices:
            register_kernel(op, device)(kernel)
        return op

    return define


def register_kernel(op: OpOverload, device: str) -> Callable[[Callable], Callable]:
    aliases = [argument.alias_info for argument in op._schema.arguments]
    written = [i for i, alias in enumerate(aliases) if alias is not None and alias.is_write]

    def and_tell(kernel: Callable) -> Callable:
        def run(*args: Any) -> Any:
            result = kernel(*args)
            torch.autograd.graph.increment_version([args[i] for i in written])  # a kernel of ours writes unseen
            return result

        return run

    def register(kernel: Callable) -> Callable:
        run = and_tell(kernel) if written else kernel
        _LIBRARY.impl(op, _untraced(run), device.upper())
        alone = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, device.upper()))
        _kernels.setdefault(op, {})[alone.raw_repr()] = run
        return kernel

    return register


def register_fake(op: OpOverload) -> Callable[[Callable], Callable]:
    def register(fake: Callable) -> Callable:
        torch.library.register_fake(op, fake, lib=_LIBRARY)
        return fake

    return register


def refuse_tangents(args: Iterable[Any]) -> None:
    """Raises NotImplementedError for operands that carry a derivative of forward mode, which a kernel would drop."""
    if forward_ad._current_level < 0 or torch.compiler.is_compiling():
        return
    for x in args:
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError("forward-mode derivatives are not computed by fla_compile's operators")


def register_autograd(op: OpOverload, backward: Callable, *, setup_context: Callable) -> None:
    """Gradients: `setup_context(ctx, inputs, output)` and `backward(ctx, *grads)`, as those of an autograd.Function."""
    kernels, below = _kernels[op], torch._C._after_autograd_keyset

    def run(keyset: Any, *args: Any) -> Any:
        rest = keyset & below
        kernel = kernels.get(rest.raw_repr())
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(rest, *args) if kernel is None else kernel(*args)

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args_and_keyset: Any) -> Any:
            *args, keyset = args_and_keyset
            output = run(keyset, *args)
            setup_context(ctx, tuple(args), output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            if torch.is_grad_enabled():  # a graph of the backward would hold gradients that came from no graph
                raise RuntimeError(f"{op._opname} cannot be differentiated twice: create_graph is not supported")
            return (*backward(ctx, *grads), None)

    # What `Function.apply` does but for transforms of torch.func, which it refuses.
    apply = super(torch.autograd.Function, Differentiable).apply

    def differentiate(keyset: Any, *args: Any) -> Any:
        refuse_tangents(args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):  # type: ignore[attr-defined]
            if torch._C._are_functorch_transforms_active():
                return Differentiable.apply(*args, keyset)
            return apply(*args, keyset)
        return run(keyset, *args)

    Differentiable.__name__ = f"{op._opname}_differentiable"
    _LIBRARY.impl(op, _untraced(differentiate), "Autograd", with_keyset=True)
