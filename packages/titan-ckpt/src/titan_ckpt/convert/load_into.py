"""`load_into`: load external weights into an existing model, sharded or not."""

from collections.abc import Mapping, Sequence

import torch

from titan_ckpt.convert.source import Exclude, TensorSource
from titan_ckpt.convert.weight_map import External, TensorRule, WeightMap, apply, probe, raise_mismatches, renames
from titan_ckpt.format.dtypes import can_cast
from titan_ckpt.state.shards import Part, ShardLayouts


class _KeepName:
    """The rule used without a weight map: a tensor keeps its name."""

    def __init__(self, name: str) -> None:
        self.internal = self.external = (name,)

    def to_internal(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        return tensors

    def to_external(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        return tensors


def load_into(
    state: Mapping[str, torch.Tensor],
    source: TensorSource,
    weight_map: WeightMap | None = None,
    *,
    ignore: Sequence[str] = (),
) -> None:
    """Fill a model's tensors, sharded or not, from weights in another format.

    Every rank does this independently; nothing is sent between ranks. For tensors that the map only renames, a rank
    reads its own shards; those that the map changes are read in full. Values are cast to the model's dtypes, from one
    of float64, float32, float16 and bfloat16 to another; no other dtype is cast.

    Args:
        state: The model's tensors by internal name, regular or DTensor; with pipeline stages, those of this rank. If
            hooks of the model create new tensors for its `state_dict()`, call `load_state_dict` with them afterwards.
        source: The weights, e.g. `open_source("...")`.
        weight_map: Converts external tensors to internal ones; None if names and shapes are the same.
        ignore: Shell patterns of external names to ignore.

    Raises:
        CheckpointError: If names, shapes or dtypes do not match, or copies of a tied weight differ; the message lists
            all mismatches, and `state` is unchanged.

    Example:
        >>> model = torch.nn.Linear(8, 1)
        >>> load_into(model.state_dict(), open_source("weights/model.safetensors"))
    """
    stored = Exclude(source, ignore)
    external = External(stored, weight_map) if weight_map is not None else None
    source = stored if external is None else external
    rules: list[TensorRule] = (
        list(weight_map.rules) if weight_map is not None else [_KeepName(name) for name in source.tensors]
    )
    here = [rule for rule in rules if any(name in state for name in rule.internal)]
    _check_match(state, source, rules, here, exact=weight_map is None)
    if external is not None:
        external.check_copies({name for rule in here for name in rule.external})
    for rule in rules:
        if not rule.internal:
            apply(rule, "to_internal", {name: source.read(name) for name in rule.external})
    layouts = ShardLayouts()
    for rule in here:
        targets = [at for name in rule.internal if name in state for at in layouts.local_parts(name, state[name])]
        if not targets:
            continue
        if renames(rule, "to_internal", source.tensors):
            _fill_slices(targets, source, rule.external[0])
        else:
            tensors = apply(rule, "to_internal", {name: source.read(name) for name in rule.external})
            for part, local in targets:
                local.copy_(tensors[part.name][part.box.slices])


def _check_match(
    state: Mapping[str, torch.Tensor],
    source: TensorSource,
    rules: Sequence[TensorRule],
    here: Sequence[TensorRule],
    *,
    exact: bool,
) -> None:
    """Compare names and shapes before anything is read.

    Args:
        state: The model's tensors.
        source: The weights.
        rules: All rules.
        here: The rules that make tensors of this rank's state.
        exact: Whether each tensor of the source must be in the state (without a weight map); otherwise it must be in a
            rule.

    Raises:
        CheckpointError: If they do not match.
    """
    known = {name for rule in rules for name in rule.external}
    made = {name for rule in here for name in rule.internal}
    wanted = {name for rule in here for name in rule.external}
    raise_mismatches(
        "the weights do not match the model",
        {
            "missing in the file": wanted - source.tensors.keys(),
            "missing in the weight map": state.keys() - made,
            "unexpected, in the file but not in the weight map": source.tensors.keys()
            - (state.keys() if exact else known),
        },
    )
    misshaped, of_other_kind = set(), set()
    for rule in here:
        for name, spec in probe(rule, "to_internal", source.tensors).items():
            if name in state and tuple(state[name].shape) != tuple(spec.shape):
                misshaped.add(f"{name}: {list(spec.shape)} in the file, {list(state[name].shape)} in the model")
            if name in state and not can_cast(spec.dtype, state[name].dtype):
                of_other_kind.add(f"{name}: {spec.dtype} in the file, {state[name].dtype} in the model")
    raise_mismatches(
        "the weights do not match the model",
        {"of another shape": misshaped, "of a dtype that is not cast (integers, booleans, float8)": of_other_kind},
    )


def _fill_slices(targets: Sequence[tuple[Part, torch.Tensor]], source: TensorSource, name: str) -> None:
    for part, local in targets:
        local.copy_(source.read_slice(name, part.box.offsets, part.box.lengths))
