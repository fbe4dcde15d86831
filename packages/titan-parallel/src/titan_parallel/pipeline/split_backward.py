"""Whether a stage's backward can run in two halves: gradients of inputs first, of weights later.

For the second half torch restarts at the nodes of the autograd graph where weights meet values that depend on the
input. So each weight must meet them in one node only: with a second one further up (a module that is called twice) the
graph in between has been freed. And torch 2.11 treats all gradients of such a node as those of its first output.

Called by `dry_run`, which also uses `nodes_below`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def is_splittable(output: Tensor, received: Tensor) -> bool:
    """Return whether each parameter meets values that depend on `received` in one node, by the node's first output.

    Args:
        output: A stage's result, with its graph.
        received: The leaf that it was computed from.
    """
    order = nodes_below(output)
    dependent = {node for node in order if getattr(node, "variable", None) is received}
    weights: dict[Any, set[Any]] = {}  # node that does not depend on the input -> the leaves below it
    met: dict[Any, set[Any]] = {}
    outputs: dict[Any, set[int]] = {}
    for node in order:
        below = [(child, number) for child, number in node.next_functions if child is not None]
        for child, number in below:
            outputs.setdefault(child, set()).add(number)
        if node in dependent or any(child in dependent for child, _ in below):
            dependent.add(node)
            for child, _ in below:
                for leaf in weights.get(child, ()):
                    met.setdefault(leaf, set()).add(node)
        else:
            leaf = {node} if hasattr(node, "variable") else set()
            weights[node] = leaf.union(*(weights[child] for child, _ in below))
    return all(len(nodes) == 1 and outputs.get(next(iter(nodes)), {0}) == {0} for nodes in met.values())


def nodes_below(x: Tensor, *, without: Any = None) -> list[Any]:
    """Return the nodes of the autograd graph of a tensor, each after the nodes below it.

    Args:
        x: The tensor; without a graph the list is empty.
        without: A node to leave out, together with the nodes that only it leads to.
    """
    root: Any = x.grad_fn
    if root is None or root is without:
        return []
    order: list[Any] = []
    seen = {root, without}
    stack = [(root, iter([child for child, _ in root.next_functions]))]
    while stack:
        node, children = stack[-1]
        for child in children:
            if child is not None and child not in seen:
                seen.add(child)
                stack.append((child, iter([below for below, _ in child.next_functions])))
                break
        else:
            order.append(node)
            stack.pop()
    return order
