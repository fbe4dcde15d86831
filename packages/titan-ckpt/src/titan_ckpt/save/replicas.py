"""Small regular tensors that several ranks hold: are they the same everywhere?

A tensor that is not sharded is saved once, by one of its holders, and loaded by all. Where it differs between them,
such as the state of a random number generator, all but one would lose theirs. So the ranks compare digests of such
tensors with each save. Larger ones are not compared: reading all replicated weights takes longer than saving them.

Called by `snapshot`: `group_by_holders` when it plans, on rank 0; `digests_of` with each save.
"""

from collections.abc import Mapping, Sequence

import torch

from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.checksum import checksum
from titan_ckpt.format.safetensors_header import bytes_of
from titan_ckpt.state.shards import Part

MOST_COMPARED = 64 << 10  # bytes of a tensor

# Names of tensors that the same ranks hold, by the number of the group.
Groups = dict[int, list[str]]


def group_by_holders(held: Sequence[Sequence[Part]]) -> list[Groups]:
    """Group the small regular tensors by the set of ranks that hold them.

    Args:
        held: What each rank holds.

    Returns:
        For each rank the groups that it is in; those with a single holder are left out. There are few: one per
        pipeline stage, and one for all.
    """
    holders: dict[str, list[int]] = {}
    for rank, parts in enumerate(held):
        for part in parts:
            if not part.layout and part.nbytes <= MOST_COMPARED:
                holders.setdefault(part.name, []).append(rank)
    by_holders: dict[tuple[int, ...], list[str]] = {}
    for name, ranks in holders.items():
        if len(ranks) > 1:
            by_holders.setdefault(tuple(ranks), []).append(name)
    groups: list[Groups] = [{} for _ in held]
    for number, (holding, names) in enumerate(by_holders.items()):
        for rank in holding:
            groups[rank][number] = names
    return groups


def digests_of(groups: Groups, tensors: Mapping[str, torch.Tensor]) -> dict[int, str]:
    """Return a digest of each group's tensors.

    Args:
        groups: This rank's groups.
        tensors: This rank's tensors by name, on any device.

    Returns:
        The digests by group.
    """
    hashes = tensor_digests({name: tensors[name] for names in groups.values() for name in names})
    return {number: checksum("".join(hashes[name] for name in names).encode()) for number, names in groups.items()}


def tensor_digests(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return a digest of each tensor's bytes; those of one GPU are brought to the host in one transfer."""
    found: dict[str, str] = {}
    by_device: dict[torch.device, list[str]] = {}
    for name, tensor in tensors.items():
        by_device.setdefault(tensor.device, []).append(name)
    for device, names in by_device.items():
        if device.type == "cpu":
            found |= {name: checksum(bytes_of(tensors[name])) for name in names}
            continue
        dense = (tensors[name].resolve_conj().resolve_neg().contiguous() for name in names)
        flat = [tensor.view(-1).view(torch.uint8) for tensor in dense]
        joined, at = torch.cat(flat).cpu().numpy(), 0
        for name, part in zip(names, flat, strict=True):
            found[name], at = checksum(joined[at : at + len(part)]), at + len(part)
    return found


def first_difference(digests: Sequence[Mapping[int, str]]) -> tuple[int, int, int] | None:
    """Return the first group whose digests differ, with two ranks between which they do; None if there is none."""
    known: dict[int, tuple[int, str]] = {}
    for rank, of_rank in enumerate(digests):
        for number, digest in of_rank.items():
            first, expected = known.setdefault(number, (rank, digest))
            if digest != expected:
                return number, first, rank
    return None


def difference_error(first: int, second: int, hashes: Sequence[Mapping[str, str]]) -> CheckpointError:
    """Return the error that names what differs between two ranks, given the digests of each one's tensors."""
    names = [name for name, digest in hashes[first].items() if hashes[second].get(name) != digest]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return CheckpointError(
        f"tensors that are not sharded differ between rank {second} and rank {first}: {', '.join(names[:3])}{more}. "
        "They are saved once and loaded on all ranks, so they must be the same. Put what each rank has of its own, "
        "such as the state of its random numbers, into a tensor that is sharded over the ranks (a DTensor with "
        "Shard(0), one row per rank)"
    )
