"""The argument that says which part of a corpus to prepare; in an array of jobs, the scheduler's variables do."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from titan_data.errors import DataError

if TYPE_CHECKING:
    from titan_data.shards.parts import Part

HELP = (
    "prepare one part of the source into a folder of its own in FOLDER: 0/16 to 15/16 are the parts of 16; join them "
    "with `titan-data merge FOLDER`. auto: the task of a Slurm array; auto/N: the task of an indexed Kubernetes job "
    "with N completions"
)


def parse_part(text: str, environment: Mapping[str, str]) -> Part:
    """Parse `index/count`, `auto` or `auto/count`.

    Args:
        text: The argument.
        environment: Environment variables; those of Slurm arrays and of Kubernetes' indexed jobs are understood.

    Returns:
        The part.

    Raises:
        DataError: If it is none of these, there is no such part, or the variables that `auto` needs are not set.
    """
    from titan_data.shards.parts import Part

    if (numbers := re.fullmatch(r"(\d+)/(\d+)", text)) is not None:
        return Part(int(numbers[1]), int(numbers[2]))
    auto = re.fullmatch(r"auto(?:/(\d+))?", text)
    if auto is None:
        raise DataError(f"--part {text}: write index/count, such as 0/16 for the first of 16 parts, auto, or auto/16")
    index, tasks = _task(environment)
    count = tasks if auto[1] is None else int(auto[1])
    if count is None:
        raise DataError("--part auto: the number of parts is not known from JOB_COMPLETION_INDEX: write auto/N")
    return Part(index, count)


def _task(environment: Mapping[str, str]) -> tuple[int, int | None]:
    """Return the number of this task, from 0, and the number of tasks if it is known."""
    if "SLURM_ARRAY_TASK_ID" in environment:
        first, last = (int(environment.get(f"SLURM_ARRAY_TASK_{end}", "0")) for end in ("MIN", "MAX"))
        step = int(environment.get("SLURM_ARRAY_TASK_STEP", "1"))
        tasks = int(environment.get("SLURM_ARRAY_TASK_COUNT", "1"))
        if tasks != (last - first) // step + 1:
            # As in --array=3,7 to repeat failed tasks: the numbers of the others are not known.
            raise DataError(
                f"--part auto: this array has {tasks} tasks from {first} to {last}, with gaps: write --part "
                "$SLURM_ARRAY_TASK_ID/N, with the N of the whole corpus"
            )
        return (int(environment["SLURM_ARRAY_TASK_ID"]) - first) // step, tasks
    if "JOB_COMPLETION_INDEX" in environment:
        return int(environment["JOB_COMPLETION_INDEX"]), None
    raise DataError(
        "--part auto: neither SLURM_ARRAY_TASK_ID nor JOB_COMPLETION_INDEX is set; write index/count, such as 0/16"
    )
