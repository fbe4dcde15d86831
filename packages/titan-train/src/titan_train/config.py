"""Every setting of a run, typed and frozen. The docstring below a field is its text in `--help`."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le
from pydantic import BaseModel, ConfigDict, model_validator

Count = Annotated[int, Ge(1)]
Whole = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Ge(0), Le(1)]


class Section(BaseModel):
    """A table of the config file."""

    # Strict: a file that says steps = "200" is wrong, not helpfully right.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class RunSection(Section):
    """Where the run lives."""

    folder: str = "runs/{config}"
    """Folder of everything the run writes; a run found there is resumed. {config} stands for the config's name."""
    seed: Whole = 0
    """Selects initial weights and data order."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes CUDA if there is one."""


class ModelSection(Section):
    """Which model: a preset of titan-model, and what to change of it."""

    preset: str = "debug"
    """Name of a titan-model preset."""
    vocab_size: Count | None = None
    """Rows of embedding and head; none keeps the preset's, as for all below."""
    dim: Count | None = None
    """Width of the residual stream."""
    n_layers: Count | None = None
    """Number of blocks."""
    n_heads: Count | None = None
    """Query heads."""
    n_kv_heads: Count | None = None
    """Key/value heads."""
    head_dim: Count | None = None
    """Width of one head, where it is not `dim / n_heads`."""
    ffn_dim: Count | None = None
    """Inner width of the feed-forward."""
    max_seq_len: Count | None = None
    """Longest sequence, in tokens."""
    norm: Literal["rmsnorm", "fused_rmsnorm", "layernorm", "np_layernorm"] | None = None
    """Kind of the norms."""
    qk_norm: bool | None = None
    """Whether each head's queries and keys are normed."""
    rope_theta: Positive | None = None
    """Base of the rotary wavelengths."""
    tied_embeddings: bool | None = None
    """Whether the head shares the embedding's weight."""
    attention: Literal["auto", "sdpa", "flex", "varlen"] | None = None
    """What computes attention; auto takes the best that the device has."""


class MoESection(Section):
    """What to change of the preset's mixture of experts, for presets that have one."""

    n_experts: Count | None = None
    """Experts per block; none keeps the preset's, as for all below."""
    top_k: Count | None = None
    """Experts that each token goes to."""
    ffn_dim: Count | None = None
    """Inner width of one expert."""
    shared_ffn_dim: Whole | None = None
    """Inner width of the expert that every token goes to besides; 0 for no such."""
    balance_loss: NotNegative | None = None
    """Coefficient of the load-balancing loss; 0 for no such."""
    balance_bias_rate: NotNegative | None = None
    """How far each expert's selection bias moves against its load per step; 0 for no such bias."""


class DataSection(Section):
    """Which text, and how it becomes tokens."""

    source: Literal["stdlib", "huggingface"] = "stdlib"
    """`stdlib` is the source code of Python's standard library; `huggingface` anything that `datasets` loads."""
    path: str | None = None
    """For huggingface: a hub name, or json, parquet or text with `files`."""
    name: str | None = None
    """For huggingface: configuration of the dataset."""
    split: str = "train"
    """For huggingface: which split."""
    files: list[str] = []
    """For huggingface: local files."""
    text_key: str = "text"
    """For huggingface: column that holds the text."""
    streaming: bool = False
    """For huggingface: read documents as they come, without downloading all first (and without shuffling)."""
    shuffle: bool = True
    """Visit the documents of each epoch in an order drawn from the seed, where the source allows it."""
    tokenizer: Literal["bytes"] = "bytes"
    """`bytes`: UTF-8 bytes and two specials."""
    mask_documents: bool = False
    """Let tokens attend only within their own document."""

    @model_validator(mode="after")
    def _path_where_needed(self) -> DataSection:
        if self.source == "huggingface" and self.path is None:
            raise ValueError('source "huggingface" needs a path (a hub name, or json, parquet or text with files)')
        return self


class TrainingSection(Section):
    """How much to train, in which pieces."""

    steps: Count = 1000
    """Optimizer updates, counted from the beginning of the run."""
    seq_len: Count = 1024
    """Tokens per sequence."""
    global_batch_size: Count = 32
    """Sequences per step, over all ranks."""
    microbatch_size: Count | None = None
    """Sequences per forward and rank; none takes all of a rank's at once."""
    max_norm: Positive | None = 1.0
    """Gradients are clipped to this global norm; none does not clip."""
    z_loss: NotNegative = 0.0
    """Coefficient of the squared log of the softmax's denominator, which keeps logits from drifting; 0 for none."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of forward and backward; weights and optimizer stay float32."""


class OptimizerSection(Section):
    """AdamW (Loshchilov & Hutter 2019)."""

    lr: Positive = 3e-4
    """Peak learning rate."""
    beta1: Share = 0.9
    """Decay of the first moment."""
    beta2: Share = 0.95
    """Decay of the second moment."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NotNegative = 0.1
    """Decoupled decay of matrices; norms are not decayed."""


class ScheduleSection(Section):
    """Learning rate over the steps: linear warm-up, a plateau, a decay that ends with the last step."""

    warmup_steps: Whole = 0
    """Steps from 0 to the peak."""
    decay: Literal["none", "linear", "cosine"] = "cosine"
    """Shape of the decay."""
    decay_steps: Count | None = None
    """Length of the decay; none decays from the warm-up's end on."""
    min_factor: Share = 0.1
    """Learning rate at the end, as a share of the peak."""


class ParallelSection(Section):
    """Layout over processes; the degrees multiply to their number."""

    dp_replicate: Count = 1
    """Copies of the model, each on its own part of the batch."""
    dp_shard: Annotated[int, Ge(-1)] = -1
    """Ranks over which FSDP2 shards each copy; -1 takes all that the others leave."""
    tp: Count = 1
    """Ranks that share every matrix product."""
    sequence_parallel: bool = True
    """Under tp, split activations between blocks over the sequence."""
    reshard_after_forward: bool = True
    """Free gathered weights after each block's forward: less memory, more communication."""
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    """What a block keeps for its backward: all, only its input, or also the costly results."""
    compile: bool = False
    """Compile each block with torch.compile."""
    compile_backend: str = "inductor"
    """Backend of torch.compile."""


class CheckpointSection(Section):
    """When and how the run is saved. The last step, and one a signal stops at, are always saved."""

    interval: Whole = 500
    """Steps between checkpoints; 0 saves only at the end."""
    keep_last: Count | None = 3
    """Checkpoints to keep; none keeps all."""
    keep_every: Count | None = None
    """Keep checkpoints of steps that are multiples of this for good, besides."""
    asynchronous: bool = True
    """Write in the background while training goes on."""
    on_error: Literal["raise", "warn"] = "raise"
    """End the run when a checkpoint cannot be written, or warn and go on."""
    huggingface: bool = False
    """Also write the weights of each checkpoint, as a folder that transformers reads, to `huggingface` in the run's."""


class MetricsSection(Section):
    """What is reported."""

    log_interval: Count = 10
    """Steps between lines."""
    tensorboard: bool = True
    """Write TensorBoard events."""


class SampleSection(Section):
    """Text generated at the end of the run."""

    tokens: Whole = 0
    """How many tokens; 0 generates none."""
    prompt: str = ""
    """What to continue."""
    temperature: NotNegative = 0.8
    """0 takes the likeliest token."""


class Config(Section):
    """All settings of a run."""

    run: RunSection = RunSection()
    model: ModelSection = ModelSection()
    moe: MoESection = MoESection()
    data: DataSection = DataSection()
    training: TrainingSection = TrainingSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    parallel: ParallelSection = ParallelSection()
    checkpoint: CheckpointSection = CheckpointSection()
    metrics: MetricsSection = MetricsSection()
    sample: SampleSection = SampleSection()
