"""Loading a source into a model that is there already, whole or sharded."""

from collections.abc import Mapping, Sequence

import torch

from titan_ckpt.convert.source import TensorSource, Without
from titan_ckpt.convert.weight_map import WeightMap, apply, probe, refuse_unfit, renames
from titan_ckpt.state.shards import Layouts, Part


class _Rename:
    """The rule of those who have no weight map: a tensor keeps its name."""

    def __init__(self, name: str) -> None:
        self.native = self.foreign = (name,)

    def to_native(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        return tensors

    def to_foreign(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        return tensors


def load_into(
    state: Mapping[str, torch.Tensor],
    source: TensorSource,
    weight_map: WeightMap | None = None,
    *,
    ignore: Sequence[str] = (),
) -> None:
    """Fill a model's tensors, of whatever sharding, from weights of another program.

    Every rank does this by itself; nothing is sent between ranks. Of what the map only renames, a rank reads its own
    shards and no more; what the map changes it reads whole. Values are converted to the dtype that the model has.

    Args:
        state: the model's tensors by native name, plain or DTensor; with pipeline stages, those of this rank. A model
            whose hooks make them anew for its `state_dict()` wants them back by `load_state_dict` afterwards.
        source: the weights, e.g. a `HuggingFaceFolder`.
        weight_map: makes native tensors of foreign ones; None when names and shapes are the same.
        ignore: shell patterns of foreign names to pass over.

    Raises:
        CheckpointError: when names or shapes do not fit, all misfits in one message; `state` is unchanged then.
    """
    source = Without(source, ignore)
    rules = list(weight_map.rules) if weight_map is not None else [_Rename(name) for name in source.tensors]
    here = [rule for rule in rules if any(name in state for name in rule.native)]
    known = {name for rule in rules for name in rule.foreign}
    made = {name for rule in here for name in rule.native}
    wanted = {name for rule in here for name in rule.foreign}
    refuse_unfit(
        "the weights do not fit the model",
        {
            "missing in the file": wanted - source.tensors.keys(),
            "missing in the weight map": state.keys() - made,
            "unexpected, in the file but not in the weight map": source.tensors.keys() - known
            if weight_map is not None
            else source.tensors.keys() - state.keys(),
        },
    )
    misshaped = set()
    for rule in here:
        for name, spec in probe(rule, "to_native", source.tensors).items():
            if name in state and tuple(state[name].shape) != tuple(spec.shape):
                misshaped.add(f"{name}: {list(spec.shape)} in the file, {list(state[name].shape)} in the model")
    refuse_unfit("the weights do not fit the model", {"of another shape": misshaped})
    layouts = Layouts()
    for rule in here:
        targets = [at for name in rule.native if name in state for at in layouts.parts_of(name, state[name])]
        if not targets:
            continue
        if renames(rule, "to_native", source.tensors):
            _fill_slices(targets, source, rule.foreign[0])
        else:
            tensors = apply(rule, "to_native", {name: source.read(name) for name in rule.foreign})
            for part, local in targets:
                local.copy_(tensors[part.name][part.box.slices])


def _fill_slices(targets: Sequence[tuple[Part, torch.Tensor]], source: TensorSource, name: str) -> None:
    for part, local in targets:
        local.copy_(source.read_slice(name, part.box.offsets, part.box.lengths))
