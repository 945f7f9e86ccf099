"""How a branch is trained: data, optimizer, checkpoints, machine, plan and loggers."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from branchmerge.config.bounds import at_least, between, choice, not_empty


@dataclass
class DataConfig:
    """From trajectories to packed rows."""

    path: str | None = field(default=None, metadata=not_empty())
    """A JSONL file to train on in place of the study's corpus for this domain."""
    format: str = "messages"
    """Format of `path`."""
    verify: bool = True
    """Grade every trajectory that carries a reference and drop those with a wrong answer."""
    seq_len: int = field(default=MISSING, metadata=at_least(8))
    """Tokens in a packed row."""
    workers: int = field(default=0, metadata=at_least(0))
    """Data loader processes. Rows are tokenised before training, so more than 0 rarely helps."""
    too_long: str = field(default="drop", metadata=choice("drop", "truncate"))
    """What happens to a trajectory longer than seq_len or than the model's context; counted in the manifest."""
    limit: int | None = field(default=None, metadata=at_least(1))
    """Read this many rows of each source at most; null: the source's own `limit`."""
    validation_rows: int = field(default=0, metadata=at_least(0))
    """Trajectories held out of every domain of the study: no branch trains on them, and the loss on them is logged.
    They are chosen by a hash of their prompts, so they are the same in every branch."""
    packed_rows: int | None = field(default=None, metadata=at_least(1))
    """Train only on the trajectories that fill this many packed rows, over and over; null for all. For debugging."""


@dataclass
class OptimConfig:
    """AdamW and its schedule."""

    optimizer: str = field(default="adamw", metadata=choice("adamw", "adamw_8bit"))
    """adamw_8bit: torchao's, with 8-bit moments in a quarter of the memory; the weights stay float32."""
    epochs: int = field(default=MISSING, metadata=at_least(1))
    """As in the study's budget (`BudgetConfig`), like the next four fields."""
    max_steps: int | None = field(default=None, metadata=at_least(1))
    global_batch: int = field(default=MISSING, metadata=at_least(1))
    lr: float = field(default=MISSING, metadata=at_least(0))
    schedule: str = field(default=MISSING, metadata=choice("constant", "cosine"))
    warmup_ratio: float = field(default=0.1, metadata=between(0, 1))
    """Share of the steps in which the learning rate rises linearly from zero."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = field(default=1e-8, metadata=at_least(1e-30))
    weight_decay: float = field(default=0.01, metadata=at_least(0))
    """Decoupled weight decay, of matrices only, as in transformers' own Trainer."""
    grad_clip: float = field(default=1.0, metadata=at_least(0))
    """Largest global gradient norm; 0 for no clipping."""


@dataclass
class CheckpointConfig:
    """When a branch in training is checkpointed, so that a killed run can resume."""

    every_n_steps: int | None = field(default=None, metadata=at_least(1))
    """Optimizer steps from one checkpoint to the next; null: minutes alone decide."""
    every_n_minutes: float | None = field(default=10.0, metadata=at_least(0))
    """Minutes from one checkpoint to the next; null: steps alone decide."""
    keep_last: int = field(default=2, metadata=at_least(1))
    """Number of checkpoints kept; older ones are removed."""

    @property
    def is_on(self) -> bool:
        """Whether any checkpoint is written."""
        return self.every_n_steps is not None or self.every_n_minutes is not None


@dataclass
class TrainerConfig:
    """The machine: devices, precision and how the model is distributed."""

    accelerator: str = field(default="auto", metadata=choice("auto", "cpu", "gpu"))
    precision: str = field(default="auto", metadata=choice("auto", "32-true", "bf16-mixed"))
    """Compute precision; weights and optimizer are always float32. auto: bf16 on CUDA and on CPUs with bf16
    instructions."""
    strategy: str = field(default="auto", metadata=choice("auto", "single", "fsdp"))
    """single: one device. fsdp: one process per device, and every device holds a shard of weights, gradients and
    optimizer moments (FSDP2). auto: fsdp where one of the keys below asks for it."""
    devices: int | None = field(default=None, metadata=at_least(1))
    """fsdp: devices per node, or processes on a CPU; null: all GPUs, or one process on a CPU."""
    num_nodes: int = field(default=1, metadata=at_least(1))
    """fsdp: machines. Several are started by torchrun or Slurm, see docs/training.md."""
    gpus_per_job: int | None = field(default=None, metadata=at_least(1))
    """fsdp, in a multirun: members train side by side, each on this many GPUs of its own; null: one after the other."""
    replicate: int = field(default=1, metadata=at_least(1))
    """fsdp: replicas of the sharded model (HSDP), such as one per node; 1: one model sharded over all devices."""
    context_parallel: int = field(default=1, metadata=at_least(1))
    """fsdp: devices that share every row, for rows too long for one device. It must divide the model's numbers of heads
    and of key/value heads."""
    cpu_offload: bool = False
    """fsdp: keep weights, gradients and moments in CPU memory: less GPU memory, much slower."""
    compile: bool = False
    """torch.compile every decoder layer and the loss: a minute at the start, faster steps after it."""
    activation_checkpointing: bool | None = None
    """Recompute activations in the backward pass: less memory, a third more time; null: only where the student is
    sharded over devices."""
    max_skipped_steps: int = field(default=3, metadata=at_least(0))
    """Consecutive steps that may be skipped because their loss or gradient is not finite; one more ends the run."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validate_every_n_steps: int | None = field(default=None, metadata=at_least(1))
    """Optimizer steps between validations on `data.validation_rows`; null: only before the first step and after the
    last."""
    sample_every_n_steps: int | None = field(default=None, metadata=at_least(1))
    """Optimizer steps between samples: the student's answer to one fixed prompt, appended to samples.jsonl beside the
    curve; null for none."""
    sample_tokens: int = field(default=64, metadata=at_least(1))
    """Longest such answer, in tokens."""
    progress: bool = True
    """Show step, loss, tokens/s and time left: a bar in a terminal, a line every half minute elsewhere."""

    @property
    def recomputes(self) -> bool:
        """Whether activations are recomputed in the backward pass."""
        return self.sharded if self.activation_checkpointing is None else self.activation_checkpointing

    @property
    def sharded(self) -> bool:
        """Whether the student is sharded over the devices."""
        if self.strategy != "auto":
            return self.strategy == "fsdp"
        several = (self.devices or 1) * self.num_nodes * self.replicate * self.context_parallel > 1
        return several or self.gpus_per_job is not None or self.cpu_offload


@dataclass
class PlanningConfig:
    """Assumptions of plan=true: a kind of GPU, its price, and the settings to compare."""

    card: str = "H100 SXM"
    """Name of the GPU, as in `student.flops.PEAKS`."""
    card_gib: float = field(default=80.0, metadata=at_least(0.001))
    """Memory of the GPU."""
    reserve_gib: float = field(default=4.0, metadata=at_least(0))
    """Part of that memory kept for what no simulation shows: the CUDA context, NCCL's buffers, fragmentation."""
    tflops: float | None = field(default=None, metadata=at_least(0.001))
    """Peak dense bfloat16 throughput, in 1e12 FLOPs a second; null: by the data sheet of `card`."""
    mfu: float = field(default=0.4, metadata=between(0.001, 1))
    """Share of that peak which training reaches; recomputed activations do not count as work."""
    price: float = field(default=2.0, metadata=at_least(0))
    """Price of one GPU hour, in any currency."""
    devices: list[int] = field(default_factory=lambda: [8, 16, 32, 64], metadata=at_least(1))
    """Numbers of GPUs to compare."""
    seq_lens: list[int] = field(default_factory=lambda: [4096, 8192, 16384, 32768], metadata=at_least(8))
    """Lengths of a packed row to compare."""


@dataclass
class LoggerConfig:
    """Where the training curves go; the CSV file is written in any case."""

    kind: str = field(default="csv", metadata=choice("csv", "wandb", "tensorboard", "mlflow"))
    project: str | None = None
    """W&B project."""
    entity: str | None = None
    """W&B user or team."""
    tracking_uri: str | None = None
    """MLflow: address of its server; null: MLFLOW_TRACKING_URI where that is set, else a file beside the curve."""
