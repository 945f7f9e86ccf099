"""What is trained on what: the corpus, the budget, the domains and the backbone of a study."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from branchmerge.config.bounds import at_least, choice, not_empty


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
    limit: int | None = field(default=None, metadata=at_least(1))
    """Read this many rows at most; null for all."""
    where: dict[str, list[Any]] = field(default_factory=dict)
    """Read only rows whose raw fields have one of these values: {domain: [code]}."""


@dataclass
class BudgetConfig:
    """How long and how hard one branch trains."""

    epochs: int = field(default=1, metadata=at_least(1))
    """Passes over the kept trajectories."""
    max_steps: int | None = field(default=None, metadata=at_least(1))
    """Stop after this many optimizer steps even when epochs are left; null for no limit."""
    global_batch: int = field(default=1, metadata=at_least(1))
    """Packed rows per optimizer step, over all micro-batches and devices."""
    lr: float = field(default=1e-5, metadata=at_least(0))
    """Peak learning rate."""
    schedule: str = field(default="constant", metadata=choice("constant", "cosine"))
    """What follows the warm-up: constant, or cosine to zero."""


@dataclass
class ExpectedConfig:
    """Expected size of a part of the corpus, for a plan (plan=true) made where the corpus is not on this machine."""

    trajectories: int = field(default=MISSING, metadata=at_least(1))
    """Trajectories left after selection."""
    tokens: int | None = field(default=None, metadata=at_least(1))
    """Mean tokens per trajectory; null: half a packed row is assumed, and the plan says so."""


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
    seq_len: int = field(default=16384, metadata=at_least(8))
    """Tokens in a packed row."""
    data_dir: str | None = MISSING
    """Folder with the raw files as downloaded, for studies and tasks that read them; null for the others."""
    export_dtype: str = field(default="bfloat16", metadata=choice("float32", "bfloat16"))
    """Dtype of the exported weights."""
    corpus: dict[str, SourceConfig] = MISSING
    """Raw rows by part name. A part may have several sources, read together: `science` and `science-<any name>`, unless
    `budget` has that name, which makes it a domain."""
    budget: dict[str, BudgetConfig] = MISSING
    """Budget by domain name."""
    expected: dict[str, ExpectedConfig] = field(default_factory=dict)
    """Expected sizes by name in the corpus."""


@dataclass
class DomainConfig:
    """What a branch learns."""

    name: str = MISSING
    """Folder of the expert below outputs/<study>/experts/."""
    parts: list[str] = MISSING
    """Parts of the study's corpus that it trains on."""


@dataclass
class BackboneConfig:
    """The student before any branch."""

    name: str = MISSING
    """Short name, used for folders."""
    path: str | None = field(default=None, metadata=not_empty())
    """Hugging Face causal LM (a folder, or a name on the hub) that branches start from, without any warm-up."""
    pretrained: str | None = None
    """Used where `path` is null: the backbone itself or, in a study with a warm-up, the model that the warm-up starts
    from. A folder, a name on the hub, or `gguf:<package>`, an installed Python package with the weights as one GGUF
    file."""
    revision: str | None = None
    """Hub only: commit, tag or branch."""
    shape: dict[str, Any] = field(default_factory=dict)
    """The keys of the model's config.json that decide sizes, for plan=true where no checkpoint is on this machine."""
    attn: str = field(default="auto", metadata=choice("auto", *(f"flash_attention_{n}" for n in (2, 3, 4)), "sdpa"))
    """Attention in training. auto: the newest flash-attn that is installed and fits the GPU, else sdpa. sdpa: torch's
    own, which is FlashAttention over the whole row on CUDA, and SDPA document by document on a CPU."""
    loss: str = field(default="chunked", metadata=choice("chunked", "liger"))
    """Cross-entropy in training. liger: the fused kernel of liger-kernel (CUDA), if a trial at the start finds its
    results equal."""
