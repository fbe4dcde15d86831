"""The options of `parallelize`: one frozen dataclass per topic, each field described where it is defined.

This is the only place that names, types, defaults and descriptions of options are written. A program (a command line,
a table in a README) reads them with `dataclasses.fields` and `typing.get_type_hints`; the description is
`field.metadata["help"]`, as for `titan_parallel.degrees.Degrees`. Values are plain Python: `Literal`, `int`, `float`,
`bool`, `str`, `tuple`, None, or another dataclass of this module.

A dataclass checks its own values and raises `LayoutError` with the field's name. `titan_parallel.check` checks what
also depends on the layout.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from titan_parallel.errors import LayoutError

ActivationCheckpointing = Literal["none", "full", "selective", "budget"]
ContextKind = Literal["allgather", "ring", "ulysses"]
DtypeName = Literal["float32", "bfloat16", "float16", "float64"]
Reshard = Literal["default", "always", "never"]
Float8Recipe = Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"]


def _not_one_of(name: str, value: object, choices: Any) -> list[str]:
    known = get_args(choices)
    return [] if value in known else [f"{name}: {value!r} is not one of {list(known)}"]


def _not_names(name: str, value: object) -> list[str]:
    """Refuse a string where a tuple of strings is expected: it would be taken letter by letter."""
    return [f"{name}: {value!r} is a string; write a tuple of strings, ({value!r},)"] if isinstance(value, str) else []


def _raise(wrong: list[str]) -> None:
    if wrong:
        raise LayoutError("; ".join(wrong))


@dataclass(frozen=True, kw_only=True)
class Float8Options:
    """Float8 matrix products of the linears within blocks. Modules before and after the blocks keep their dtype.

    Every field is described in its metadata, `dataclasses.fields(Float8Options)`, and in the README.

    Raises:
        LayoutError: If a value is invalid; the message names the field.
    """

    recipe: Float8Recipe = field(
        default="tensorwise",
        metadata={
            "help": "Granularity of the scales: one per tensor (`tensorwise`, fastest), one per row (`rowwise`, more "
            "accurate), or one per row with weight gradients in the dtype of the other products "
            "(`rowwise_with_gw_hp`). On a GPU the last two require `param_dtype` `bfloat16`."
        },
    )
    fsdp_all_gather: bool = field(
        default=False,
        metadata={
            "help": "Let FSDP2 gather weights in float8, which halves or quarters the traffic. Requires `tensorwise`."
        },
    )
    skip: tuple[str, ...] = field(
        default=(),
        metadata={"help": "Name patterns of modules that stay out of float8, together with everything inside them."},
    )
    emulate: bool = field(
        default=False,
        metadata={
            "help": "Round to float8 but multiply in the dtype of the other products: runs on any device and is not "
            "faster; for tests."
        },
    )

    def __post_init__(self) -> None:
        """Check the values."""
        wrong = [*_not_one_of("float8.recipe", self.recipe, Float8Recipe), *_not_names("float8.skip", self.skip)]
        if self.fsdp_all_gather and self.recipe != "tensorwise":
            wrong.append(f"float8.fsdp_all_gather: requires recipe 'tensorwise', not {self.recipe!r}; set one of them")
        _raise(wrong)


@dataclass(frozen=True, kw_only=True)
class PipelineOptions:
    """How pipeline parallelism splits the blocks into stages, and the order in which they run.

    Every field is described in its metadata, `dataclasses.fields(PipelineOptions)`, and in the README.
    `check_pipeline` checks them against a number of ranks, the blocks and the microbatches.

    Raises:
        LayoutError: If a value is invalid; the message names the field.
    """

    schedule: str = field(
        default="1F1B",
        metadata={
            "help": "One of `titan_parallel.SCHEDULES`, or the path of a `.csv` file with one row per rank and one "
            "action per cell, such as `0F3`: stage 0 runs the forward of microbatch 3. The other kinds are `B` "
            "(backward), or `I` and `W` for its two halves (gradients of inputs, of weights)."
        },
    )
    stages_per_rank: int | None = field(
        default=None,
        metadata={
            "help": "Stages on each rank. Default: 1 for GPipe and 1F1B, as many as the file has for a `.csv` file, "
            "2 for the other schedules."
        },
    )
    split: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "Names of the blocks that begin a stage, without the first stage, such as `layers.4`. Default: "
            "balance the stages by the work of their blocks."
        },
    )
    first_stage_less: float | None = field(
        default=None,
        metadata={
            "help": "Cost of the modules before the first block, in units of one block, for balancing. Default: "
            "estimated from their parameter count, without embedding tables."
        },
    )
    last_stage_less: float | None = field(
        default=None,
        metadata={
            "help": "Cost of the modules after the last block, in units of one block, for balancing. Default: "
            "estimated from their parameter count."
        },
    )

    def __post_init__(self) -> None:
        """Check the values."""
        wrong = _not_names("pipeline.split", self.split)
        for name in ("first_stage_less", "last_stage_less"):
            cost = getattr(self, name)
            if cost is not None and cost < 0:
                wrong.append(f"pipeline.{name}: {cost} is negative; set a cost of at least 0")
        _raise(wrong)


@dataclass(frozen=True, kw_only=True)
class ParallelOptions:
    """Options that change speed and memory, not what is learned (apart from the rounding of a lower precision).

    Every field is described in its metadata, `dataclasses.fields(ParallelOptions)`, and in the README.

    Raises:
        LayoutError: If values are invalid or contradict one another; the message names the fields.
    """

    param_dtype: DtypeName | None = field(
        default=None,
        metadata={
            "help": "Dtype of forward and backward, such as `bfloat16`. Parameters, gradients and optimizer state keep "
            "their own dtype. The model's inputs are cast too; tensors that it creates itself are not. Default: the "
            "parameters' dtype."
        },
    )
    reduce_dtype: DtypeName = field(
        default="float32",
        metadata={"help": "Dtype in which gradients are summed over data ranks when `param_dtype` is set."},
    )
    reshard_after_forward: Reshard | int = field(
        default="default",
        metadata={
            "help": "Free each block's gathered weights after its forward and gather them again for its backward: "
            "`always` (less memory), `never` (less communication), or a number of ranks, such as those of one host, "
            "over which they stay sharded in between. `default` is `always`, but `never` under pipeline parallelism, "
            "where each microbatch would gather them twice."
        },
    )
    reduce_every_microbatch: bool = field(
        default=True,
        metadata={
            "help": "Sum gradients over the shards after each microbatch, so that a rank holds its own shard only. If "
            "false, each rank keeps full gradients until the last microbatch of a step and sums them once: less "
            "communication when accumulating, and memory for a full copy."
        },
    )
    cpu_offload: bool = field(
        default=False,
        metadata={
            "help": "Keep parameters, gradients and optimizer state in host memory and copy each block's weights to "
            "the device for its forward and backward. The optimizer then runs on the CPU."
        },
    )
    sequence_parallel: bool = field(
        default=True,
        metadata={"help": "Under tensor parallelism, split the activations between blocks over the sequence."},
    )
    async_tp: bool = field(
        default=False,
        metadata={
            "help": "Under tensor parallelism, let the compiler overlap the collectives of the sequence with the "
            "adjacent matrix products. Requires CUDA, `sequence_parallel`, `compile_blocks` and `compile_backend` "
            "`inductor`. Not covered by the tests, which run on CPU and only check that it is refused there."
        },
    )
    activation_checkpointing: ActivationCheckpointing = field(
        default="none",
        metadata={
            "help": "What a block keeps for its backward: `none` keeps all activations; `full` keeps only its input "
            "and recomputes the rest; `selective` also keeps what is expensive to recompute (attention, the grouped "
            "products of experts, every second other matrix product, the reduce-scatters of sequence parallelism, "
            "`save_ops`); `budget` lets the compiler choose within `memory_budget`."
        },
    )
    checkpoint_every: int = field(
        default=1,
        metadata={
            "help": "Apply activation checkpointing to one of every this many blocks; the others keep all activations."
        },
    )
    save_ops: tuple[str, ...] = field(
        default=(),
        metadata={"help": "Additional operators whose results `selective` keeps, by torch's names, such as `aten.mm`."},
    )
    memory_budget: float | None = field(
        default=None,
        metadata={
            "help": "For `budget`: fraction, 0 to 1, of the activation memory of the compiled blocks without "
            "checkpointing that they may keep; 0 is like `full`. It applies to these blocks, not to the process."
        },
    )
    compile_blocks: bool = field(
        default=False,
        metadata={"help": "Compile each block with torch.compile, as one graph without breaks."},
    )
    compile_backend: str = field(default="inductor", metadata={"help": "Backend of torch.compile."})
    float8: Float8Options | None = field(
        default=None,
        metadata={"help": "Float8 matrix products in the blocks, by torchao. Default: off."},
    )
    context: ContextKind = field(
        default="allgather",
        metadata={
            "help": "Under context parallelism, how ranks attend to the sequences that they share: `allgather` gathers "
            "all keys and values, `ring` passes them from rank to rank, `ulysses` exchanges parts of the sequence for "
            "parts of the heads."
        },
    )
    pipeline: PipelineOptions = field(
        default=PipelineOptions(),
        metadata={"help": "Stages and schedule of pipeline parallelism."},
    )

    def __post_init__(self) -> None:
        """Check the values and that they agree with one another."""
        wrong = [
            *([] if self.param_dtype is None else _not_one_of("param_dtype", self.param_dtype, DtypeName)),
            *_not_one_of("reduce_dtype", self.reduce_dtype, DtypeName),
            *_not_one_of("context", self.context, ContextKind),
            *_wrong_checkpointing(self),
        ]
        reshard, known = self.reshard_after_forward, get_args(Reshard)
        if isinstance(reshard, bool):
            wrong.append(f"reshard_after_forward: {reshard} is a bool; set {'always' if reshard else 'never'!r}")
        elif isinstance(reshard, str) and reshard not in known:
            wrong.append(f"reshard_after_forward: {reshard!r} is not one of {[*known, 'a number of ranks']}")
        _raise(wrong)


def reshard_blocks(options: ParallelOptions, pp: int) -> bool | int:
    """Return `reshard_after_forward` in FSDP2's terms.

    Args:
        options: The options.
        pp: Degree of pipeline parallelism, which the default depends on.

    Returns:
        Whether to free a block's gathered weights after its forward, or the number of ranks to shard them over.
    """
    if isinstance(options.reshard_after_forward, int):
        return options.reshard_after_forward
    return {"default": pp == 1, "always": True, "never": False}[options.reshard_after_forward]


def _wrong_checkpointing(options: ParallelOptions) -> list[str]:
    mode, budget = options.activation_checkpointing, options.memory_budget
    wrong = [
        *_not_one_of("activation_checkpointing", mode, ActivationCheckpointing),
        *_not_names("save_ops", options.save_ops),
    ]
    if options.checkpoint_every < 1:
        wrong.append(f"checkpoint_every: {options.checkpoint_every} is not at least 1")
    elif options.checkpoint_every > 1 and mode not in ("full", "selective"):
        wrong.append(f"checkpoint_every: requires activation_checkpointing 'full' or 'selective', not {mode!r}")
    if options.save_ops and mode != "selective":
        wrong.append(f"save_ops: requires activation_checkpointing 'selective', not {mode!r}")
    if (mode == "budget") != (budget is not None):
        wrong.append(
            f"memory_budget: is {budget} while activation_checkpointing is {mode!r}; set both ('budget' and a "
            "fraction) or neither"
        )
    if budget is not None and not 0 <= budget <= 1:
        wrong.append(f"memory_budget: {budget} is not a fraction from 0 to 1")
    if mode == "budget" and not options.compile_blocks:
        wrong.append("activation_checkpointing: 'budget' is implemented by the compiler; set compile_blocks too")
    return wrong
