"""Every setting of a run, documented where it is declared, and the one way to resolve them.

The text under a setting is its documentation: in the docstring, in `--help` and in the reference.
`trajectory` and `cosmetic` say whether a resumed run must keep it.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from truestep.setting_sources import read_environment, read_settings_file
from truestep.settings import Config, cosmetic, shown, trajectory, validate, without_auto

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]

_LEAST_BPE, _MOST_BPE = 257, 2**20  # every byte and the end of a document; enough for any text


class TrainingConfig(Config):
    """How a model is trained: optimizer, schedule, arithmetic."""

    learning_rate: float = trajectory(3e-4, gt=0)
    """Peak learning rate of AdamW."""

    embedding_learning_rate_factor: float = trajectory(1.0, gt=0)
    """Learning rate of embeddings that are not the output layer, too, over learning_rate."""

    weight_decay: float = trajectory(0.1, ge=0)
    """Decoupled weight decay of matrices; norms, biases and other vectors get none."""

    betas: tuple[Beta, Beta] = trajectory((0.9, 0.95))
    """Decay rates of AdamW's first and second moment, each in [0, 1)."""

    eps: float = trajectory(1e-8, gt=0)
    """Term added to AdamW's denominator."""

    optimizer: Literal["adamw", "muon"] = trajectory("adamw")
    """adamw for every parameter, or muon for hidden matrices and AdamW for the rest."""

    muon_learning_rate: float = trajectory(0.02, gt=0)
    """Peak learning rate of Muon, where the optimizer is muon."""

    muon_momentum: float = trajectory(0.95, ge=0, lt=1)
    """Momentum of Muon, in [0, 1)."""

    num_steps: int = trajectory(1000, gt=0)
    """Updates in the whole run; the schedule ends here."""

    schedule: Literal["constant", "cosine", "wsd"] = trajectory("constant")
    """Learning rate after the warm-up: constant, cosine decay, or stable and then linear decay."""

    warmup_steps: int = trajectory(0, ge=0)
    """Updates over which the learning rate rises linearly to its peak; the first is above 0."""

    decay_steps: PositiveInt | Literal["auto"] = trajectory("auto")
    """Updates of the linear decay at the end of wsd; auto is a fifth of num_steps."""

    final_learning_rate_factor: float = trajectory(0.1, ge=0, le=1)
    """Learning rate of the last update of cosine and wsd, as a share of the peak."""

    max_grad_norm: PositiveFloat | Literal["off"] = trajectory(1.0)
    """Gradients with a larger global norm are scaled down to it; off only measures."""

    max_skipped_steps: int = trajectory(0, ge=0)
    """Steps in a row that are skipped because loss or gradient is not finite; one more stops."""

    micro_batch_size: PositiveInt | Literal["auto"] = trajectory("auto")
    """Windows in one backward pass; a batch is split as need be. auto: as many as fit in a run."""

    seed: int = trajectory(0, ge=0, lt=2**63)
    """Seed of initial weights, data order and dropout."""

    precision: Literal["auto", "float32", "bfloat16"] = trajectory("auto")
    """Arithmetic of forward and backward; auto: bfloat16 where the hardware multiplies it."""

    compile: Literal["auto", "on", "layers", "off"] = trajectory("auto")
    """Compile forward and loss; layers: one layer for all, ready sooner; auto: what pays."""

    deterministic: Literal["auto", "on", "off"] = trajectory("auto")
    """Use only deterministic algorithms; auto: on a CPU, where it costs nothing."""

    reduction: Literal["fast", "exact"] = trajectory("fast")
    """Sum of gradients: exact gives the same bits on 1, 2, 4 and 8 processes, at some cost."""

    lanes: Literal[1, 2, 4, 8, 16, 32, 64, "auto"] = trajectory("auto")
    """Parts of a batch that exact adds up in a tree: as many processes at most; auto: up to 8."""

    @model_validator(mode="after")
    def _check_schedule(self) -> Self:
        if self.warmup_steps > self.num_steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} is longer than num_steps={self.num_steps}; "
                "use a shorter warm-up or a longer run"
            )
        decay_steps = 1 if self.decay_steps == "auto" else self.decay_steps
        if self.schedule == "wsd" and self.warmup_steps + decay_steps > self.num_steps:
            raise ValueError(
                f"decay_steps={decay_steps} and warmup_steps={self.warmup_steps} together are "
                f"longer than num_steps={self.num_steps}; shorten one of them"
            )
        return self

    @classmethod
    def load(cls, path: str | Path) -> "TrainingConfig":
        """Return the settings in the `[training]` table of a run's file, or in a flat file.

        Errors: ConfigError naming the file and the key.
        """
        values = read_settings_file(Path(path))
        if RunConfig.model_fields.keys() & values.keys():
            return validate(RunConfig, {str(path): values}).training
        return validate(TrainingConfig, {str(path): values})


class GPTConfig(Config):
    """The shape of the reference model: a decoder-only transformer in the layout of Llama."""

    vocab_size: PositiveInt | Literal["auto"] = trajectory("auto")
    """Number of token ids; auto: the tokenizer's."""

    context_length: int = trajectory(256, gt=0)
    """Tokens the model sees at once; also the length of a training window."""

    num_layers: int = trajectory(4, gt=0)
    """Transformer blocks."""

    num_heads: int = trajectory(4, gt=0)
    """Query heads of a block; width / num_heads must be even."""

    num_kv_heads: PositiveInt | Literal["auto"] = trajectory("auto")
    """Key and value heads, shared by groups of query heads; auto: num_heads."""

    width: int = trajectory(128, gt=0)
    """Size of the residual stream."""

    mlp_width: PositiveInt | Literal["auto"] = trajectory("auto")
    """Hidden size of the SwiGLU; auto: 8/3 of width, rounded to a multiple of 8."""

    tie_embeddings: bool = trajectory(False)
    """Use the token embedding as the output layer, too."""

    qk_norm: bool = trajectory(False)
    """Normalise queries and keys in each head, as Qwen3 does."""

    rope_theta: float = trajectory(10000.0, gt=0)
    """Base of the rotary position embedding."""

    norm_eps: float = trajectory(1e-6, gt=0)
    """Term added under the root of RMSNorm."""

    dropout: float = trajectory(0.0, ge=0, lt=1)
    """Share of activations dropped in training, after embedding, attention and SwiGLU."""

    residual_init: Literal["scaled", "zero"] = trajectory("scaled")
    """Start of the projections into the residual stream: GPT-2's 1/sqrt(2 layers), or zero."""

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if self.width % self.num_heads or (self.width // self.num_heads) % 2:
            raise ValueError(
                f"width={self.width} does not give num_heads={self.num_heads} heads of one even "
                f"size; use a multiple of {2 * self.num_heads}"
            )
        if self.num_kv_heads != "auto" and self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}; "
                "use a divisor"
            )
        return self


class DataConfig(Config):
    """What is read, and how much at a time."""

    # Free on resume: that the text is the same is checked by its fingerprint.
    source: str | tuple[str, ...] = cosmetic("stdlib")
    """Text: a file, directory, pattern, prepared or built-in corpus; or a list of these."""

    weights: tuple[PositiveFloat, ...] | Literal["auto"] = trajectory("auto")
    """Shares of several sources in what is trained on, one number each; auto: by their tokens."""

    validation: str = cosmetic("auto")
    """A text file or directory to validate on; auto: a tenth of the source, held out."""

    text_field: str = cosmetic("text")
    """What holds the text in a line of JSON, or the column of a Parquet file."""

    tokenizer: str = trajectory("auto")
    """bytes, or bpe-N: N byte pairs learnt from the source. auto: as it was prepared, or bytes."""

    document_mask: bool = trajectory(False)
    """Read each document as if it were alone: no attention beyond it, positions from its start."""

    batch_size: int = trajectory(16, gt=0)
    """Windows in the global batch of one update."""

    @property
    def sources(self) -> tuple[str, ...]:
        """All sources: one, or several that are mixed."""
        return (self.source,) if isinstance(self.source, str) else self.source

    @field_validator("source")
    @classmethod
    def _check_sources(cls, source: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if isinstance(source, str):
            return source
        for name in source:
            if source.count(name) > 1:
                raise ValueError(f"source={shown(name)} is named twice; name it once")
        if not source:
            raise ValueError("source=[] names no text; name one, or several")
        return source if len(source) > 1 else source[0]

    @field_validator("weights", mode="before")
    @classmethod
    def _take_auto_from_a_list(cls, weights: Any) -> Any:
        return "auto" if weights in (["auto"], ("auto",)) else weights  # as an option gives it

    @field_validator("tokenizer")
    @classmethod
    def _check_tokenizer(cls, name: str) -> str:
        if name != "auto":
            byte_pairs(name, others="auto, bytes")
        return name


def byte_pairs(name: str, others: str = "bytes") -> int | None:
    """Return the N of a tokenizer `bpe-N`; none for `bytes`.

    Errors: ValueError for another name, with the `others` that are allowed where it stands.
    """
    if name == "bytes":
        return None
    size = re.fullmatch(r"bpe-([1-9][0-9]{2,6})", name)
    if size is None or not _LEAST_BPE <= int(size[1]) <= _MOST_BPE:
        raise ValueError(
            f"tokenizer={shown(name)} must be {others} or bpe-N, where N is {_LEAST_BPE} to "
            f"{_MOST_BPE} without leading zeros; try bpe-4096"
        )
    return int(size[1])


class RunSettings(Config):
    """Where a run lives and what it shows on the way."""

    name: str = cosmetic("auto")
    """Directory of the run under `directory`; auto: the source's name and a number."""

    directory: str = cosmetic("runs")
    """Directory of all runs."""

    device: str = trajectory("auto")
    """cpu, cuda, cuda:N or mps; auto: an accelerator if there is one."""

    threads: Annotated[int, Field(gt=0, le=1024)] | Literal["auto"] = trajectory("auto")
    """CPU threads; auto: one a core. Kept on resume: it changes the order of sums."""

    log_every: int = cosmetic(10, gt=0)
    """Steps between lines on the console; the log file has every step."""

    evaluate_every: int = cosmetic(250, gt=0)
    """Steps between validations, each with a sample of the model's writing."""

    evaluation_windows: int = cosmetic(256, gt=0)
    """Validation windows used on the way; the last validation uses all of them."""

    save_every: int = cosmetic(500, gt=0)
    """Steps between checkpoints; the last step is always saved."""

    keep_checkpoints: int = cosmetic(2, ge=2)
    """Newest checkpoints to keep."""

    keep_best_checkpoints: int = cosmetic(1, ge=0)
    """Further checkpoints to keep: those of least validation loss. Above 0, validation saves."""

    max_failed_saves: int = cosmetic(3, gt=0)
    """Saves that may fail in a row, with a report each, before the run ends."""

    process_timeout_seconds: float = cosmetic(120.0, gt=0)
    """How long one of several processes may be silent before the others end without it."""

    sample_prompt: str = cosmetic("")
    """Text that samples continue; empty: the start of a document."""

    sample_tokens: int = cosmetic(200, gt=0)
    """Tokens in a sample."""


class RunConfig(Config):
    """Everything `truestep train` can be told, in four sections."""

    training: TrainingConfig = TrainingConfig()
    model: GPTConfig = GPTConfig()
    data: DataConfig = DataConfig()
    run: RunSettings = RunSettings()


def resolve(
    explicit: Mapping[str, Any],
    environ: Mapping[str, str],
    file: Path | None = None,
    base: Mapping[str, Any] | None = None,
) -> RunConfig:
    """Return the settings of a run: explicit > environment > file > base > default.

    `explicit` holds what the command line gave, `base` what a resumed run was made with: there
    "auto" has been resolved, and saying it again changes nothing. This is the only reader of
    TRUESTEP_ variables.
    Errors: ConfigError naming source, field, value, rule and remedy.
    """
    given: dict[str, Mapping[str, Any]] = {}
    if file is not None:
        given[str(file)] = read_settings_file(file)
    given["environment"] = read_environment(RunConfig, environ)
    given["command line"] = explicit
    if base is None:
        return validate(RunConfig, given)
    return validate(RunConfig, {"the run's settings": base, **without_auto(given)})
