"""Schemas of the three commands: every key there is, its type, its unit.

Registered with Hydra, so an unknown key or a value of the wrong type is refused while the command line is read; what
types cannot say is checked by config_checks.py. The values stand in conf/.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

PROJECT = Path(__file__).resolve().parents[2]
"""The checkout: where assets/ and conf/ lie."""


def _choice(*choices: str) -> dict[str, Any]:
    return {"choices": choices}


def _at_least(low: float) -> dict[str, Any]:
    return {"low": low}


def _between(low: float, high: float) -> dict[str, Any]:
    return {"low": low, "high": high}


def _not_empty() -> dict[str, Any]:
    return {"empty": False}


@dataclass
class SourceConfig:
    """Where a domain's raw rows come from."""

    path: str = MISSING
    """JSONL file (`project:` in front: relative to the checkout), or the name of a dataset on the Hugging Face hub."""
    format: str = "messages"
    """How a raw row becomes a trajectory: a name in `trajectories.sources.FORMATS`."""
    subset: str | None = None
    """Hub only: the dataset's configuration."""
    split: str = "all"
    """Hub: the dataset's split. File: all, or train / test, which share its questions 4 : 1 by a hash."""
    revision: str | None = None
    """Hub only: commit, tag or branch."""
    limit: int | None = field(default=None, metadata=_at_least(1))
    """Read this many rows at most; null for all."""
    where: dict[str, list[Any]] = field(default_factory=dict)
    """Only rows whose raw fields have one of these values: {domain: [code]}."""


@dataclass
class BudgetConfig:
    """How long and how hard one branch trains."""

    epochs: int = field(default=1, metadata=_at_least(1))
    """Passes over the kept trajectories."""
    max_steps: int | None = field(default=None, metadata=_at_least(1))
    """Stop after this many optimizer steps even when epochs are left; null for no limit."""
    global_batch: int = field(default=1, metadata=_at_least(1))
    """Packed rows per optimizer step, over all micro-batches and devices."""
    lr: float = field(default=1e-5, metadata=_at_least(0))
    """Peak learning rate."""
    schedule: str = field(default="constant", metadata=_choice("constant", "cosine"))
    """What follows the warm-up: constant, or cosine to zero."""


@dataclass
class ExpectedConfig:
    """What is known of a part of the corpus before it is read; for plan=true alone."""

    trajectories: int = field(default=MISSING, metadata=_at_least(1))
    """Left after selection."""
    tokens: int | None = field(default=None, metadata=_at_least(1))
    """Of a trajectory, on average; null: half a packed row, and the plan says so."""


@dataclass
class StudyConfig:
    """One study: corpus, budget and merge order. The backbone is chosen by the study's defaults list."""

    name: str = MISSING
    """Folder below outputs/."""
    experts: list[str] = MISSING
    """Domains that are branched and merged."""
    tree: Any = MISSING
    """Default merge tree: [left, right], nested; leaves are domains or checkpoint folders."""
    operators: dict[str, Any] = field(default_factory=dict)
    """Parameters of merge operators that this study uses in place of their defaults: {arcee_fusion: {lam: 0.5}}."""
    warmup: bool = False
    """The study trains its own backbone with domain=warmup (the demo's stand-in for R1-Distill)."""
    seq_len: int = field(default=16384, metadata=_at_least(8))
    """Tokens in a packed row."""
    data_dir: str | None = MISSING
    """Folder of files as downloaded, for studies and tasks that read such; null for the others."""
    export_dtype: str = field(default="bfloat16", metadata=_choice("float32", "bfloat16"))
    """Dtype of the exported weights."""
    corpus: dict[str, SourceConfig] = MISSING
    """Raw rows by part name. A part may have several sources: `science` and `science-<any name>`, read together."""
    budget: dict[str, BudgetConfig] = MISSING
    """Budget by domain name."""
    expected: dict[str, ExpectedConfig] = field(default_factory=dict)
    """Sizes by name in the corpus, for plans of rows that are not on this machine."""


@dataclass
class DomainConfig:
    """What a branch learns."""

    name: str = MISSING
    """Folder of the expert below outputs/<study>/experts/."""
    parts: list[str] = MISSING
    """Parts of the study's corpus that are read for it."""


@dataclass
class BackboneConfig:
    """The student before any branch."""

    name: str = MISSING
    """Short name, used for folders."""
    path: str | None = field(default=None, metadata=_not_empty())
    """Start the branches from this Hugging Face causal LM (a folder, or a name on the hub), without any warm-up."""
    pretrained: str | None = None
    """The backbone where `path` is null, or what the study's warm-up makes it from: a folder, a name on the hub, or
    `gguf:<package>`, an installed Python package that carries the weights as one GGUF file."""
    revision: str | None = None
    """Hub only: commit, tag or branch."""
    shape: dict[str, Any] = field(default_factory=dict)
    """The model's config.json as far as it decides sizes, for plan=true where no checkpoint is on this machine."""
    attn: str = field(default="auto", metadata=_choice("auto", *(f"flash_attention_{n}" for n in (2, 3, 4)), "sdpa"))
    """Attention in training. auto: the newest flash-attn that is installed and fits the GPU, else sdpa, which is
    torch's own: FlashAttention over the whole row on CUDA, SDPA document by document on a CPU."""
    loss: str = field(default="chunked", metadata=_choice("chunked", "liger"))
    """Cross-entropy in training. liger: by the fused kernel of liger-kernel (CUDA), where it gives the same."""


@dataclass
class DataConfig:
    """From trajectories to packed rows."""

    path: str | None = field(default=None, metadata=_not_empty())
    """A JSONL file to train on in place of the study's corpus for this domain."""
    format: str = "messages"
    """Format of `path`."""
    verify: bool = True
    """Grade every trajectory that carries a reference and drop those with a wrong answer."""
    seq_len: int = field(default=MISSING, metadata=_at_least(8))
    """Tokens in a packed row."""
    workers: int = field(default=0, metadata=_at_least(0))
    """Processes that lay out rows beside the training; rows are tokenised before it, so few gain by them."""
    too_long: str = field(default="drop", metadata=_choice("drop", "truncate"))
    """What happens to a trajectory longer than seq_len or than the model's context; counted in the manifest."""
    limit: int | None = field(default=None, metadata=_at_least(1))
    """Read this many rows of each source at most; null: as many as the source itself says."""
    validation_rows: int = field(default=0, metadata=_at_least(0))
    """Trajectories of every domain of the study that no branch trains on; the loss on them is logged. The same ones in
    every branch, chosen by a hash of their prompts."""
    packed_rows: int | None = field(default=None, metadata=_at_least(1))
    """Train on the trajectories of so many packed rows alone, over and over; null for all. For debugging."""


@dataclass
class OptimConfig:
    """AdamW and its schedule."""

    optimizer: str = field(default="adamw", metadata=_choice("adamw", "adamw_8bit"))
    """adamw_8bit: its moments in 8 bits by torchao, a quarter of their memory; the weights stay float32."""
    epochs: int = field(default=MISSING, metadata=_at_least(1))
    """As in the study's budget; so are the next four."""
    max_steps: int | None = field(default=None, metadata=_at_least(1))
    global_batch: int = field(default=MISSING, metadata=_at_least(1))
    lr: float = field(default=MISSING, metadata=_at_least(0))
    schedule: str = field(default=MISSING, metadata=_choice("constant", "cosine"))
    warmup_ratio: float = field(default=0.1, metadata=_between(0, 1))
    """Share of the steps in which the learning rate rises linearly from zero."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = field(default=1e-8, metadata=_at_least(1e-30))
    weight_decay: float = field(default=0.01, metadata=_at_least(0))
    """Decoupled; matrices only, as transformers' own Trainer does."""
    grad_clip: float = field(default=1.0, metadata=_at_least(0))
    """Largest global gradient norm; 0 for no clipping."""


@dataclass
class CheckpointConfig:
    """When a branch in training is saved, so that a killed run goes on from there."""

    every_n_steps: int | None = field(default=None, metadata=_at_least(1))
    """Optimizer steps from one checkpoint to the next; null: minutes alone decide."""
    every_n_minutes: float | None = field(default=10.0, metadata=_at_least(0))
    """null: steps alone decide."""
    keep_last: int = field(default=2, metadata=_at_least(1))
    """The older ones are removed."""

    @property
    def is_on(self) -> bool:
        """Whether any are written."""
        return self.every_n_steps is not None or self.every_n_minutes is not None


@dataclass
class TrainerConfig:
    """The machine."""

    accelerator: str = field(default="auto", metadata=_choice("auto", "cpu", "gpu"))
    precision: str = field(default="auto", metadata=_choice("auto", "32-true", "bf16-mixed"))
    """Weights and optimizer are float32 always. auto: bf16 compute on CUDA and on CPUs with bf16 instructions."""
    strategy: str = field(default="auto", metadata=_choice("auto", "single", "fsdp"))
    """single: one device. fsdp: a process for each device, and every device holds its share of weights, gradients and
    moments (FSDP2). auto: fsdp where one of the next keys asks for several devices."""
    devices: int | None = field(default=None, metadata=_at_least(1))
    """fsdp: devices of each node, or processes on a CPU; null: all GPUs, one process on a CPU."""
    num_nodes: int = field(default=1, metadata=_at_least(1))
    """fsdp: machines. More than one are started by torchrun or Slurm, see docs/training.md."""
    gpus_per_job: int | None = field(default=None, metadata=_at_least(1))
    """fsdp, in a multirun: members train side by side, each on so many GPUs of its own; null: one after the other."""
    replicate: int = field(default=1, metadata=_at_least(1))
    """fsdp: sets of devices that hold the whole model each (HSDP), such as the number of nodes; 1: all hold one."""
    context_parallel: int = field(default=1, metadata=_at_least(1))
    """fsdp: devices that share every row, for rows that are too long for one; a divisor of the model's heads and of its
    key/value heads."""
    cpu_offload: bool = False
    """fsdp: weights, gradients and moments lie in the CPU's memory: less of the GPU's, much slower."""
    compile: bool = False
    """torch.compile for every decoder layer and for the loss: a minute at the start, faster after it."""
    activation_checkpointing: bool | None = None
    """Recompute activations in the backward pass: less memory, a third more time; null: where the student is spread
    over devices."""
    max_skipped_steps: int = field(default=3, metadata=_at_least(0))
    """Steps in a row whose loss or gradient is not finite that are left out before training stops."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validate_every_n_steps: int | None = field(default=None, metadata=_at_least(1))
    """Optimizer steps from one loss on `data.validation_rows` to the next; null: only before the first step and after
    the last."""
    sample_every_n_steps: int | None = field(default=None, metadata=_at_least(1))
    """Optimizer steps from one answer of the student to one prompt to the next, in samples.jsonl beside the curve; null
    for none."""
    sample_tokens: int = field(default=64, metadata=_at_least(1))
    """Of such an answer, at most."""
    progress: bool = True
    """Tell step, loss, tokens/s and time left; a bar in a terminal, a line every half minute elsewhere."""

    @property
    def recomputes(self) -> bool:
        """Whether activations are computed again in the backward pass."""
        return self.sharded if self.activation_checkpointing is None else self.activation_checkpointing

    @property
    def sharded(self) -> bool:
        """Whether the student is spread over the devices."""
        if self.strategy != "auto":
            return self.strategy == "fsdp"
        several = (self.devices or 1) * self.num_nodes * self.replicate * self.context_parallel > 1
        return several or self.gpus_per_job is not None or self.cpu_offload


@dataclass
class PlanningConfig:
    """What plan=true reckons with: a kind of GPU, its price, and what to compare."""

    card: str = "H100 SXM"
    """Its name, as in `student.flops.PEAKS`."""
    card_gib: float = field(default=80.0, metadata=_at_least(0.001))
    """Its memory."""
    reserve_gib: float = field(default=4.0, metadata=_at_least(0))
    """Of it, for what no simulation shows: the CUDA context, NCCL's buffers, gaps between pieces of memory."""
    tflops: float | None = field(default=None, metadata=_at_least(0.001))
    """Its dense bfloat16 products, in 1e12 FLOPs a second; null: by the data sheet of a card of that name."""
    mfu: float = field(default=0.4, metadata=_between(0.001, 1))
    """The part of that which training reaches; activations computed again are not counted as work."""
    price: float = field(default=2.0, metadata=_at_least(0))
    """Of a GPU for an hour, in any currency."""
    devices: list[int] = field(default_factory=lambda: [8, 16, 32, 64], metadata=_at_least(1))
    """Numbers of GPUs to compare."""
    seq_lens: list[int] = field(default_factory=lambda: [4096, 8192, 16384, 32768], metadata=_at_least(8))
    """Lengths of a packed row to compare."""


@dataclass
class LoggerConfig:
    """Where the training curves go; the CSV file is written in any case."""

    kind: str = field(default="csv", metadata=_choice("csv", "wandb", "tensorboard", "mlflow"))
    project: str | None = None
    """W&B project."""
    entity: str | None = None
    """W&B user or team."""
    tracking_uri: str | None = None
    """MLflow: address of its server; null: MLFLOW_TRACKING_URI where that is set, else a file beside the curve."""


@dataclass
class CommonConfig:
    """Keys of all three commands."""

    study: StudyConfig = field(default_factory=StudyConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    seed: int = field(default=42, metadata=_between(0, 2**32 - 1))
    outputs: str = field(default="outputs", metadata=_not_empty())
    """Folder that holds the folders of all studies."""
    out: str | None = field(default=None, metadata=_not_empty())
    """Folder for this result in place of its place below outputs/."""
    overwrite: bool = False
    """Replace a finished result that was made with another configuration."""


@dataclass
class TrainConfig(CommonConfig):
    """train.py"""

    domain: DomainConfig = field(default_factory=DomainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    export_dtype: str = field(default=MISSING, metadata=_choice("float32", "bfloat16"))
    """Dtype of the exported weights."""
    redo: bool = False
    """Do the work again where it is finished. For debugging."""
    plan: bool = False
    """Train nothing: tell the memory, time and cost of it, and what to change where it does not fit."""
    planning: PlanningConfig = field(default_factory=PlanningConfig)


@dataclass
class MergeConfig(CommonConfig):
    """merge.py"""

    operator: Any = MISSING
    """`name` and the parameters of that operator, as in its file below src/branchmerge/merge/operators/."""
    tree: Any = None
    """Merge tree. Null: the study's, and for an n-way operator all its leaves at once."""
    recipe: str | None = None
    """recipe.yaml of a merged model that is to be made again, into `out`; says all that the other keys say."""
    rules: list[Any] = field(default_factory=list)
    """Other parameters of the operator for some tensors: [{tensors: mlp, layers: [0, 11], lam: 0.5}], see
    src/branchmerge/merge/rules.py."""
    vocab: str = field(default="same", metadata=_choice("same", "pad", "intersect"))
    """Models whose vocabularies differ. same: refused. pad: as many entries as the largest has; a model that lacks some
    takes them from the first that has them. intersect: only the entries that all have."""
    device: str = "cpu"
    """Where the arithmetic is done: cpu, cuda, auto. Results are the same bytes on every CPU, but for operators that
    round on purpose (arcee_fusion_mergekit, precision=float32|bfloat16); on CUDA their masks may differ in ties at
    rounding level."""
    threads: int | None = field(default=None, metadata=_at_least(1))
    """Null: one for each core that the process may use."""
    max_shard_gb: float = field(default=5.0, metadata=_at_least(0.001))
    """Largest safetensors file written, in 1e9 bytes."""
    progress: bool = True
    anatomy: bool = True
    """Compare the result with what it was made of, and draw that: anatomy.json and figures/ beside the weights. It
    needs the backbone for the task vectors: the study's, or backbone.path."""


@dataclass
class BenchmarkConfig:
    """Which tasks."""

    name: str = MISSING
    tasks: list[str] = MISSING
    """Names of lm-eval tasks: those of branchmerge and all that lm-eval ships."""
    limit: int | None = field(default=None, metadata=_at_least(1))
    """Only the first questions of each task; null for all."""
    samples: int | None = field(default=None, metadata=_at_least(1))
    """Of each question; null for the task's own number (`repeats`)."""
    max_new_tokens: int | None = field(default=None, metadata=_at_least(1))
    """Longest response, in tokens; null for the task's own."""
    prompt_style: str = field(default="plain", metadata=_choice("plain", "tinyr1"))
    """System prompts. plain: none; tinyr1: those of the paper's authors, for math, science and code."""
    data_dir: str | None = None
    """Folder with the benchmarks' files as downloaded; null: from the hub, or the study's data_dir."""
    livecodebench_release: str | None = None
    """Null: release_v5, the paper's; others are release_v1 to release_v6."""
    livecodebench_start: str | None = None
    """First contest date that counts; null: 2024-08-01."""
    livecodebench_end: str | None = None
    """Last one; null: 2025-02-01."""
    livecodebench_grader: str = field(default="strict", metadata=_choice("strict", "official"))
    """official: LiveCodeBench's own verdicts, its faults included, to compare with published numbers."""


@dataclass
class BackendConfig:
    """What generates."""

    kind: str = field(default="hf", metadata=_choice("hf", "vllm", "openai"))
    """hf: transformers, in this process; vllm: a vLLM server of this checkpoint, started and ended here; openai:
    servers that speak OpenAI's protocol."""
    batch_size: int = field(default=50, metadata=_at_least(1))
    """hf, vllm: responses generated side by side; vllm: by each copy of the model."""
    dtype: str = field(default="auto", metadata=_choice("auto", "float32", "bfloat16"))
    """Compute dtype. auto: bfloat16 on CUDA and on CPUs with bf16 instructions, else float32."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    tensor_parallel: int = field(default=1, metadata=_at_least(1))
    """vllm: GPUs that share one copy of the model."""
    data_parallel: int = field(default=1, metadata=_at_least(1))
    """vllm: copies of the model, each on GPUs of its own."""
    vllm_arguments: list[str] = field(default_factory=list)
    """vllm: more arguments of its server, such as [--gpu-memory-utilization, "0.8"]."""
    base_urls: list[str] = field(default_factory=list)
    """openai: addresses that end in /v1; several servers of one model share the requests."""
    model: str = ""
    """openai: the model's name on the servers."""
    revision: str = ""
    """openai: any text that tells which model has that name now; with another one nothing stored is used."""
    api_key_env: str = "OPENAI_API_KEY"
    """openai: the environment variable that holds the key; may be unset."""
    concurrency: int = field(default=256, metadata=_at_least(1))
    """openai, vllm: requests underway at once; vllm: for each copy of the model."""
    timeout_s: float = field(default=3600.0, metadata=_at_least(0.1))
    """openai, vllm: seconds for one response."""
    retries: int = field(default=6, metadata=_at_least(0))
    """openai, vllm: further tries of a request that failed, with growing pauses. Servers of openai that are busy or
    away are given ten minutes."""


@dataclass
class EvaluateConfig(CommonConfig):
    """evaluate.py"""

    models: list[str] | None = None
    """Models to score: backbone, a domain, experts/<domain>, merged/<name>, or a checkpoint folder. Null: all."""
    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    backend: BackendConfig = field(default_factory=BackendConfig)
    progress: bool = True
    against: str | None = None
    """Model that the others are compared with in the report; null: the first."""
    power: float | None = field(default=None, metadata=_at_least(1e-6))
    """A difference, such as 0.05: the report tells how many samples of each question it takes to find it."""
    score_only: bool = False
    """Generate nothing: grade what is stored, complete or not."""
    allow_missing: bool = False
    """Samples that could not be generated do not make the command fail; scores say how many are missing."""
    sandbox: str = "auto"
    """How programs of models are confined: auto for the strongest level that this machine allows, or one by name, see
    src/branchmerge/evaluation/sandbox; unsafe for not at all."""


def register() -> None:
    """Make the schemas known to Hydra; called once, before `hydra.main` runs."""
    store = ConfigStore.instance()
    for name, schema in (("train", TrainConfig), ("merge", MergeConfig), ("evaluate", EvaluateConfig)):
        store.store(name=f"{name}_schema", node=schema)


def project_path(path: str) -> Path:
    """Resolve `project:assets/x` against the checkout, anything else against the current folder."""
    return PROJECT / path.removeprefix("project:") if path.startswith("project:") else Path(path).expanduser()
