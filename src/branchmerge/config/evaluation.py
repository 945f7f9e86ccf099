"""What a model is asked, and what generates its responses."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from branchmerge.config.bounds import at_least, choice, not_empty


@dataclass
class BenchmarkConfig:
    """Which tasks, and how they are asked."""

    name: str = MISSING
    tasks: list[str] = field(default=MISSING, metadata=not_empty())
    """Names of lm-eval tasks: those of branchmerge and all that lm-eval ships."""
    limit: int | None = field(default=None, metadata=at_least(1))
    """Only the first questions of each task; null for all."""
    samples: int | None = field(default=None, metadata=at_least(1))
    """Samples of each question; null for the task's own number (`repeats`)."""
    max_new_tokens: int | None = field(default=None, metadata=at_least(1))
    """Longest response, in tokens; null for the task's own."""
    prompt_style: str = field(default="plain", metadata=choice("plain", "tinyr1"))
    """System prompts. plain: none; tinyr1: those of the paper's authors, for math, science and code."""
    data_dir: str | None = None
    """Folder with the benchmarks' files as downloaded; null: from the hub, or the study's data_dir."""
    livecodebench_release: str | None = None
    """Null: release_v5, the paper's; others are release_v1 to release_v6."""
    livecodebench_start: str | None = None
    """First contest date that counts; null: 2024-08-01."""
    livecodebench_end: str | None = None
    """Last contest date that counts; null: 2025-02-01."""
    livecodebench_grader: str = field(default="strict", metadata=choice("strict", "official"))
    """official: LiveCodeBench's own verdicts, its faults included, to compare with published numbers."""


@dataclass
class BackendConfig:
    """What generates the responses."""

    kind: str = field(default="hf", metadata=choice("hf", "vllm", "openai"))
    """hf: transformers, in this process; vllm: a vLLM server of this checkpoint, started and ended here; openai:
    servers that speak OpenAI's protocol."""
    batch_size: int = field(default=50, metadata=at_least(1))
    """hf, vllm: responses generated at once; for vllm, by each copy of the model."""
    dtype: str = field(default="auto", metadata=choice("auto", "float32", "bfloat16"))
    """Compute dtype. auto: bfloat16 on CUDA and on CPUs with bf16 instructions, else float32."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    tensor_parallel: int = field(default=1, metadata=at_least(1))
    """vllm: GPUs that share one copy of the model."""
    data_parallel: int = field(default=1, metadata=at_least(1))
    """vllm: copies of the model, each on GPUs of its own."""
    vllm_arguments: list[str] = field(default_factory=list)
    """vllm: more arguments of its server, such as [--gpu-memory-utilization, "0.8"]."""
    base_urls: list[str] = field(default_factory=list)
    """openai: addresses that end in /v1; several servers of one model share the requests."""
    model: str = ""
    """openai: the model's name on the servers."""
    revision: str = ""
    """openai: any text that identifies what is served under that name now; stored responses of another revision are not
    used."""
    api_key_env: str = "OPENAI_API_KEY"
    """openai: the environment variable that holds the key; may be unset."""
    concurrency: int = field(default=256, metadata=at_least(1))
    """openai, vllm: requests in flight at once; for vllm, to each copy of the model."""
    timeout_s: float = field(default=3600.0, metadata=at_least(0.1))
    """openai, vllm: seconds for one response."""
    retries: int = field(default=6, metadata=at_least(0))
    """openai, vllm: retries of a failed request, with growing pauses. Servers of openai that are busy or unreachable
    are given ten minutes."""
