"""What four ranks do in the tests of loading external weights. Each case returns what the test compares."""

from collections.abc import Callable

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from ckpt_sources import Tensors, small_external, small_internal, small_map
from titan_ckpt import CheckpointError, import_weights
from titan_ckpt.convert.load_into import load_into


def blank() -> dict[str, torch.Tensor]:
    return {name: torch.full_like(tensor, -1.0) for name, tensor in small_internal().items()}


def sharded_load(make: Callable[[torch.Tensor], DTensor]) -> dict[str, torch.Tensor]:
    """Load into sharded tensors; return them in full."""
    source, state = Tensors(small_external()), {}
    for name, tensor in blank().items():
        state[name] = make(tensor)
    load_into(state, source, small_map())
    # What is only renamed is read in slices, as large as this rank's shard.
    assert "ln" not in source.whole
    assert "tok.weight" not in source.whole
    for name in ("embed", "head"):
        local = state[name].to_local()
        read = [box for sliced, box in source.slices if sliced == "tok.weight" and box.lengths == tuple(local.shape)]
        assert read or local.numel() == 0
    return {name: tensor.full_tensor() for name, tensor in state.items()}


def one_dimension() -> dict[str, torch.Tensor]:
    mesh = init_device_mesh("cpu", (4,))
    return sharded_load(lambda tensor: distribute_tensor(tensor, mesh, [Shard(0)]))


def two_dimensions() -> dict[str, torch.Tensor]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))

    def make(tensor: torch.Tensor) -> DTensor:
        return distribute_tensor(tensor, mesh, [Replicate(), Shard(0)] if tensor.dim() == 1 else [Shard(0), Shard(1)])

    return sharded_load(make)


def fsdp() -> tuple[torch.Tensor, torch.Tensor]:
    """Load into a model under FSDP; return its output and that of the model that was loaded."""
    torch.manual_seed(0)
    whole = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))
    source = Tensors({name: tensor.detach().clone() for name, tensor in whole.state_dict().items()})
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    load_into(dict(model.named_parameters()), source)
    x = torch.ones(2, 5)
    assert not source.whole  # slices alone were read
    return model(x).detach(), whole(x).detach()


def refuses_to_import() -> str:
    try:
        import_weights(Tensors(small_internal()), "nowhere")
    except CheckpointError as error:
        return str(error)
    return "imported"
