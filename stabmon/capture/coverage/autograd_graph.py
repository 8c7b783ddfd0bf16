"""Operations of a forward as autograd kept them, whoever called them.

They are searched by :mod:`stabmon.capture.coverage.op_graph`. Read are the names, numbers and edges
of the nodes, never the tensors that they saved: unpacking these may recompute a checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from stabmon.capture.coverage.op_graph import Kind, Op
from stabmon.capture.coverage.op_trace import tensors_in

KINDS: dict[str, Kind] = {
    **dict.fromkeys(("Softmax", "SafeSoftmax", "LogSoftmax"), "softmax"),
    **dict.fromkeys(("Exp", "Exp2"), "exponential"),
    **dict.fromkeys(
        ("Bmm", "Baddbmm", "Addbmm", "Mm", "Addmm", "Mv", "Linear", "Cdist", "CosineSimilarity"),
        "product",
    ),
    **dict.fromkeys(("Div", "Reciprocal", "Logsumexp"), "normaliser"),
    **dict.fromkeys(("Embedding", "EmbeddingBag"), "parametric"),
    "Mul": "mul",
    "Sum": "sum",
}
FLAT = ("Mm", "Addmm", "Mv", "Linear")
"""Products of which an operand without gradient is taken for a frozen weight, unless the other one
is a weight.
"""

ANEW = 4
"""Most nodes that autograd makes anew for the views that one operation takes."""


def kind_of(name: str) -> Kind:
    """Return the kind of a node, by its name without ``Backward0``."""
    if name in KINDS:
        return KINDS[name]
    low = name.lower()
    if "scaleddotproduct" in low or "attention" in low or "attn" in low:
        return "fused"
    if "convolution" in low or low.endswith("norm") or "rnn" in low:
        return "parametric"
    return "other"


def graph_of(output: Any, parameters: Mapping[int, str]) -> tuple[list[Op], dict[Op, list[str]]]:
    """Collect the nodes that led to ``output``.

    Args:
        output: what the forward returned.
        parameters: ``id`` of each of the model's parameters -> its name.

    Returns:
        The operations; and for each that could be attention the names of the parameters nearest
        above it.
    """
    nodes: dict[Any, Op] = {}
    order: list[Any] = []
    waiting = [tensor.grad_fn for tensor in tensors_in(output) if tensor.grad_fn is not None]
    edges: dict[Any, list[Any]] = {}
    while waiting:
        node = waiting.pop()
        if node in edges:
            continue
        following = [each for each, _ in node.next_functions]
        edges[node] = following
        order.append(node)
        waiting += [each for each in following if each is not None]
    # a node's inputs have lower numbers than it has; leaves have the highest
    for node in sorted(order, key=_number):
        _make(node, edges, nodes, parameters)
    named = {
        op: _nearest(node, edges, parameters)
        for node, op in nodes.items()
        if op.kind in ("softmax", "exponential", "fused")
    }
    return list(nodes.values()), named


def _make(
    node: Any, edges: Mapping[Any, list[Any]], nodes: dict[Any, Op], parameters: Mapping[int, str]
) -> Op:
    """Return the operation of a node, after making those of its inputs.

    Not by recursion, which deep graphs would exhaust.
    """
    waiting = [node]
    while waiting:
        this = waiting[-1]
        missing = [each for each in edges[this] if each is not None and each not in nodes]
        if this in nodes or not missing:
            waiting.pop()
            if this not in nodes:
                nodes[this] = _operation(this, edges[this], nodes, parameters)
        else:
            waiting += missing
    return nodes[node]


def _operation(
    node: Any, inputs: list[Any], nodes: Mapping[Any, Op], parameters: Mapping[int, str]
) -> Op:
    variable = getattr(node, "variable", None)
    if isinstance(variable, Tensor):
        return Op(
            "parameter"
            if id(variable) in parameters or isinstance(variable, nn.Parameter)
            else "tensor"
        )
    name = re.sub(r"Backward\d*$", "", node.name())
    kind = kind_of(name)
    factors = inputs[-2:] if kind == "product" else [each for each in inputs if each is not None]
    weighs = any(each is not None and not nodes[each].fixed for each in factors)
    frozen: Kind = "parameter" if name in FLAT and weighs else "tensor"
    made = tuple(nodes[each] if each is not None else Op(frozen) for each in factors)
    # Private, checked with torch 2.13: shapes of the gradients that a node receives, so those of
    # its results. Without them a softmax over one dimension is not left out.
    shape = tuple(node._input_metadata[0].shape) if getattr(node, "_input_metadata", None) else ()
    numel = 1
    for size in shape:
        numel *= int(size)
    number = _number(node)
    return Op(
        kind, name.lower(), made, numel if shape else 0, len(shape), span=(number, number + 1)
    )


def _nearest(
    node: Any, edges: Mapping[Any, list[Any]], parameters: Mapping[int, str], count: int = 2
) -> list[str]:
    """Return the names of the parameters that are fewest nodes above ``node``."""
    found: list[str] = []
    level, known = [node], {node}
    while level and len(found) < count:
        following = []
        for each in level:
            variable = getattr(each, "variable", None)
            if isinstance(variable, Tensor) and id(variable) in parameters:
                found.append(parameters[id(variable)])
            for one in edges.get(each, ()):
                if one is not None and one not in known:
                    known.add(one)
                    following.append(one)
        level = following
    return found


def common_module(names: Iterable[str]) -> str | None:
    """Return the innermost module that holds all parameters of these names.

    None where there are no names.

    >>> common_module(["layers.0.attention.query.weight", "layers.0.attention.key.bias"])
    'layers.0.attention'
    """
    paths = [name.split(".")[:-1] for name in names]
    if not paths:
        return None
    shared = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    if len({tuple(path) for path in paths}) == 1 and len(shared) > 1:
        shared = shared[:-1]  # one projection makes queries and keys: its holder attends
    return ".".join(shared)


def _number(node: Any) -> int:
    # Private, checked with torch 2.13: the number that a node took when it was made. Without it all
    # are 0, and a recorded call is no longer recognised in the graph.
    number = getattr(node, "_sequence_nr", None)
    return int(number()) if callable(number) else 0


def is_from_another_thread(op: Op) -> bool:
    """Return whether a node was made in another thread than one of its inputs.

    Its number is then clearly below that input's, since each thread counts by itself. A view of a
    tensor that was written in place gets its node anew while that of its user is made, so right
    after it: hence ``ANEW``.
    """
    return any(each.kind != "parameter" and each.span[0] > op.span[0] + ANEW for each in op.inputs)
