"""The three commands: every key that train.py, merge.py and evaluate.py accept at the top level."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from branchmerge.config.bounds import at_least, between, choice, not_empty
from branchmerge.config.evaluation import BackendConfig, BenchmarkConfig
from branchmerge.config.study import BackboneConfig, DomainConfig, StudyConfig
from branchmerge.config.training import DataConfig, LoggerConfig, OptimConfig, PlanningConfig, TrainerConfig


@dataclass
class CommonConfig:
    """Keys of all three commands."""

    study: StudyConfig = field(default_factory=StudyConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    seed: int = field(default=42, metadata=between(0, 2**32 - 1))
    outputs: str = field(default="outputs", metadata=not_empty())
    """Folder that holds the folders of all studies."""
    out: str | None = field(default=None, metadata=not_empty())
    """Folder for this result, instead of its usual place below outputs/."""
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
    export_dtype: str = field(default=MISSING, metadata=choice("float32", "bfloat16"))
    """Dtype of the exported weights."""
    redo: bool = False
    """Do the work again even if it is finished. For debugging."""
    plan: bool = False
    """Train nothing: print the memory, time and cost of the training, and what to change where it does not fit."""
    planning: PlanningConfig = field(default_factory=PlanningConfig)


@dataclass
class MergeConfig(CommonConfig):
    """merge.py"""

    operator: Any = MISSING
    """`name` and the parameters of that operator, as in its file below src/branchmerge/merge/operators/."""
    tree: Any = None
    """Merge tree. Null: the study's, and for an n-way operator all its leaves at once."""
    recipe: str | None = None
    """recipe.yaml of a merged model to be made again, into `out`. It replaces all keys that describe the merge."""
    rules: list[Any] = field(default_factory=list)
    """Other parameters of the operator for some tensors: [{tensors: mlp, layers: [0, 11], lam: 0.5}], see
    src/branchmerge/merge/rules.py."""
    vocab: str = field(default="same", metadata=choice("same", "pad", "intersect"))
    """What happens to models whose vocabularies differ. same: they are refused. pad: as many entries as the largest
    has; a model that lacks some takes them from the first that has them. intersect: only the entries that all have."""
    device: str = "cpu"
    """Where the arithmetic is done: cpu, cuda, auto. Results are the same bytes on every CPU, except for operators that
    round on purpose (arcee_fusion_mergekit, precision=float32|bfloat16). On CUDA, masks may differ for scores that are
    equal up to rounding."""
    threads: int | None = field(default=None, metadata=at_least(1))
    """Threads that merge; null: one per core that the process may use."""
    max_shard_gb: float = field(default=5.0, metadata=at_least(0.001))
    """Largest safetensors file written, in 1e9 bytes."""
    progress: bool = True
    anatomy: bool = True
    """Compare the result with its parents, and write anatomy.json and figures/ beside the weights. Task vectors need
    the backbone: the study's, or backbone.path."""


@dataclass
class EvaluateConfig(CommonConfig):
    """evaluate.py"""

    models: list[str] | None = field(default=None, metadata=not_empty())
    """Models to score: backbone, a domain, experts/<domain>, merged/<name>, or a checkpoint folder. Null: all."""
    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    backend: BackendConfig = field(default_factory=BackendConfig)
    progress: bool = True
    against: str | None = None
    """Baseline that the report compares the other models with; null: the first model."""
    power: float | None = field(default=None, metadata=at_least(1e-6))
    """A difference in accuracy, such as 0.05: the report says how many samples per question it takes to detect it."""
    score_only: bool = False
    """Generate nothing: grade the stored responses, complete or not."""
    allow_missing: bool = False
    """Do not fail because samples could not be generated; scores say how many are missing."""
    sandbox: str = "auto"
    """How programs written by models are confined. auto: the strongest level that this machine allows; or a level by
    name (see src/branchmerge/evaluation/sandbox); unsafe: not at all."""
