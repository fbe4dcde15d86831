"""Every setting of a run, typed and frozen. The docstring below a field is its text in `--help`."""

from __future__ import annotations

from typing import Annotated, Final, Literal, Self

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


class SourceSection(Section):
    """Where text comes from."""

    source: Literal["stdlib", "files", "shards", "huggingface", "raw", "megatron"] = "stdlib"
    """Python's library; JSON lines, Parquet, text; token shards; what `datasets` loads; bare ids; Megatron-LM files."""
    path: str | None = None
    """For shards: their folder. For huggingface: a hub name, or json, parquet or text. For megatron: .bin or .idx."""
    files: list[str] = []
    """For files and huggingface: paths, globs or URLs. For raw: paths, in order."""
    subset: str | None = None
    """For huggingface: configuration of the dataset."""
    split: str = "train"
    """For huggingface: which split."""
    format: Literal["jsonl", "parquet", "text"] | None = None
    """For files: what is in them; none tells it by their names."""
    text_key: str = "text"
    """For files and huggingface: key or column that holds the text."""
    text_unit: Literal["file", "line", "paragraph"] = "file"
    """For text files: what one document is."""
    streaming: bool = False
    """For files and huggingface: read documents as they come (and without shuffling)."""
    on_malformed: Literal["skip", "raise"] = "skip"
    """For files: count malformed records and pass over them, or stop."""
    index_folder: str | None = None
    """For files: a folder that keeps where records begin, so that a later start need not look through the files."""
    storage_options: dict[str, str | int | float | bool] = {}
    """For files: arguments of fsspec's file system, as {anon = true}. The run's folder records them: no secrets."""
    dtype: Literal["uint16", "uint32"] | None = None
    """For raw: type of the ids."""
    eos_id: Whole | None = None
    """For raw: the id that ends each document; none if each file is one document."""
    max_epochs: Count | None = None
    """How often the documents are used at most; none uses them as often as it takes."""

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Self:
        for key, what in _NEEDED.get(self.source, {}).items():
            if not getattr(self, key):
                raise ValueError(f'source "{self.source}" needs {key}: {what}')
        for key, kind in _ONLY_FOR.items():
            if self.source != kind and getattr(self, key) != SourceSection.model_fields[key].default:
                raise ValueError(f'{key}: source "{self.source}" does not look at it; it is for source "{kind}"')
        return self


# What each kind of source cannot do without, and what would be ignored in silence if it were given to another kind.
# (Not so for the settings of shipped configs: a flag may put another source in the place of theirs.)
_NEEDED: Final = {
    "files": {"files": "paths, globs or URLs"},
    "shards": {"path": "the folder that `titan-data prepare` wrote"},
    "huggingface": {"path": "a hub name, or json, parquet or text with files"},
    "raw": {"files": "paths, in order", "dtype": "uint16 or uint32"},
    "megatron": {"path": "the .bin or .idx file"},
}
_ONLY_FOR: Final = {
    "format": "files",
    "text_unit": "files",
    "on_malformed": "files",
    "index_folder": "files",
    "storage_options": "files",
    "dtype": "raw",
    "eos_id": "raw",
}


class MixedSection(SourceSection):
    """One source of a mixture."""

    name: str | None = None
    """What to call it; by default what it is called anyway."""
    weight: NotNegative = 1.0
    """Its share of the tokens, against the sum of all weights."""
    at_end: Literal["drop", "error"] = "drop"
    """After max_epochs: leave the mixture, or stop the run."""


class StageSection(Section):
    """What changes from a step on."""

    from_step: Count
    """Steps that are done before."""
    weights: dict[str, NotNegative] | None = None
    """New weights by the sources' names, 0 for those not named; none leaves them as they were."""
    seq_len: Count | None = None
    """New tokens per sequence; none leaves them as they were."""


class DataSection(SourceSection):
    """Which text, and how it becomes tokens."""

    sources: list[MixedSection] = []
    """Several sources instead of one, as [[data.sources]] tables: the settings above, with name, weight, at_end."""
    stages: list[StageSection] = []
    """Switches of weights or of training.seq_len, as [[data.stages]] tables with from_step, weights, seq_len."""
    shuffle: bool = True
    """Visit the documents of each epoch in an order drawn from the seed, where the source allows it."""
    tokenizer: str = "bytes"
    """A file or folder of tiktoken ranks, a SentencePiece model or a tokenizer.json; `bytes`: UTF-8 bytes."""
    packing: Literal["concat", "best_fit", "one_per_row"] = "concat"
    """How documents become sequences: end to end, whole ones where they fit best, or each by itself."""
    long_documents: Literal["split", "crop"] = "split"
    """For best_fit and one_per_row, documents longer than a sequence: several sequences, or only the first tokens."""
    look_ahead: Count = 1024
    """Documents that best_fit packs together, and over whose rows it spreads them."""
    mask_documents: bool = False
    """Let tokens attend only within their own document."""
    prefetch: Whole = 2
    """Batches read ahead by a thread."""
    workers: Whole = 0
    """Threads that tokenize ahead."""
    share_tokenizing: bool = True
    """Of several ranks on one machine, let one tokenize each text for all of them."""
    allow_changes: list[
        Literal["data", "mixture", "tokenizer", "seed", "shuffle", "seq_len", "global_batch_size", "packing"]
    ] = []
    """What may differ from the run that is resumed, where that is otherwise refused."""

    @model_validator(mode="after")
    def _one_or_several(self) -> Self:
        if self.sources:
            own = [name for name, field in SourceSection.model_fields.items() if getattr(self, name) != field.default]
            if own:
                raise ValueError(f"{', '.join(own)}: set this in each of [[data.sources]], or leave these out")
        elif any(stage.weights is not None for stage in self.stages):
            raise ValueError("stages: weights switch between sources: give these as [[data.sources]]")
        for number, stage in enumerate(self.stages, start=1):
            if stage.weights is None and stage.seq_len is None:
                raise ValueError(f"stages, table {number}: it changes nothing: give weights or seq_len")
        if self.packing == "concat" and self.long_documents == "crop":
            raise ValueError('long_documents: packing "concat" never crops; use "best_fit" or "one_per_row"')
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
    """Sequences per forward and rank; none takes all of a rank's at once or, in a pipeline, as many as keep it busy."""
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
    ep: Count = 1
    """Ranks that share the experts of a mixture, each on its own part of the batch."""
    cp: Count = 1
    """Ranks that share each sequence."""
    context: Literal["allgather", "ring", "ulysses"] = "allgather"
    """Under cp, how ranks attend to the sequences that they share."""
    tp: Count = 1
    """Ranks that share every matrix product."""
    pp: Count = 1
    """Ranks that share the blocks, in stages."""
    pipeline_schedule: str = "1F1B"
    """Order of the stages' work: a name such as 1F1B or ZBVZeroBubble, or a CSV file."""
    stages_per_rank: Count | None = None
    """Stages on each rank of a pipeline; none is 1 for GPipe and 1F1B, and 2 for the others."""
    pipeline_split: list[str] = []
    """Blocks that begin a stage, without the first, such as `layers.4`; none balances the stages."""
    first_stage_less: NotNegative | None = None
    """Blocks' work that the modules before the blocks stand for; none counts their parameters."""
    last_stage_less: NotNegative | None = None
    """Blocks' work that the modules after the blocks stand for; none counts their parameters."""
    sequence_parallel: bool = True
    """Under tp, split activations between blocks over the sequence."""
    reshard_after_forward: Literal["default", "always", "never"] | Count = "default"
    """Free gathered weights after each block's forward (less memory, more communication), or shard over so many."""
    reduce_every_microbatch: bool = True
    """Sum gradients over ranks after each microbatch; if not, keep whole ones and sum once a step."""
    cpu_offload: bool = False
    """Keep weights, gradients and optimizer state in host memory."""
    async_tp: bool = False
    """Under tp on CUDA, compiled: overlap collectives of the sequence with matrix products."""
    activation_checkpointing: Literal["none", "full", "selective", "budget"] = "none"
    """What a block keeps for its backward: all, only its input, also the costly results, or what a budget allows."""
    checkpoint_every: Count = 1
    """Checkpoint one of so many blocks each."""
    save_ops: list[str] = []
    """Operators whose results `selective` keeps too, such as aten.mm."""
    memory_budget: Share | None = None
    """For `budget`: the share of the activations' memory that compiled blocks may keep."""
    compile: bool = False
    """Compile each block with torch.compile."""
    compile_backend: str = "inductor"
    """Backend of torch.compile."""
    float8: Literal["none", "tensorwise", "rowwise", "rowwise_with_gw_hp"] = "none"
    """Recipe by which the blocks' linears multiply in float8; needs torchao and a GPU that can."""
    float8_all_gather: bool = False
    """Gather weights in float8; goes with `tensorwise`."""
    float8_skip: list[str] = []
    """Patterns of modules that stay out of float8, such as layers.*.attn."""
    float8_emulate: bool = False
    """Round to float8, but multiply as before: no faster, on any device."""


class CheckpointSection(Section):
    """When and how the run is saved. The last step, and one a signal stops at, are always saved."""

    interval: Whole = 500
    """Steps between checkpoints; 0 saves only at the end."""
    resume: Literal["auto", "required"] = "auto"
    """Go on from the newest sound checkpoint in the run's folder; where there is none, begin, or refuse to."""
    on_damage: Literal["previous", "raise"] = "previous"
    """When the newest checkpoint is damaged, go on from the one before, with a warning, or refuse to."""
    keep_last: Count | None = 3
    """Checkpoints to keep; none keeps all, or with keep_best those and the newest alone."""
    keep_every: Count | None = None
    """Keep checkpoints of steps that are multiples of this for good, besides."""
    keep_best: Count | None = None
    """Keep so many checkpoints of the lowest training loss, a mean over the steps of the last report, besides."""
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
