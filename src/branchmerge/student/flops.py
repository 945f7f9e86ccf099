"""Count the FLOPs of a training step; divided by its seconds and the card's peak, they are the model FLOPs utilisation.

A matrix of n weights takes 2n FLOPs per token in the forward pass and 4n in the backward pass. Attention takes, for
each pair of tokens of which one attends to the other, and each of heads x head size, 4 FLOPs in the forward pass and 8
in the backward pass. FLOPs that activation checkpointing repeats are not counted.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a plan counts without torch
    from transformers import PreTrainedModel

    from branchmerge.data.batch import Batch

PEAKS = {
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800 PCIe": 756e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""Dense bfloat16 FLOP/s by name of the card, from the makers' data sheets; the first name that matches counts."""

FULL, WINDOWED = "full_attention", "sliding_attention"
"""Kinds of layers, in transformers' words"""


def peak_of(card: str) -> float | None:
    """Peak FLOP/s of a card by torch's name of it; None if it is not known."""
    words = card.replace("-", " ").split()
    return next((peak for name, peak in PEAKS.items() if set(name.split()) <= set(words)), None)


@dataclass(frozen=True)
class Shapes:
    """The sizes of a model that decide its FLOPs."""

    matrices: int
    """Weights of matrices that every token is multiplied with"""
    head: int
    """Weights of the output head, which only learned tokens are multiplied with"""
    attended: int
    """Layers x heads x head size, of layers whose tokens attend to all before them in their document"""
    windowed: int = 0
    """Likewise of layers whose tokens attend to the last `window` tokens, themselves included"""
    window: int = 0

    @staticmethod
    def of(model: "PreTrainedModel") -> "Shapes | None":
        """The sizes of a model; None if it has more than matrices and attention, as experts or states, or if its layers
        differ in more than a window.
        """
        if any(parameter.ndim > 2 for parameter in model.parameters()):
            return None
        config = model.config.get_text_config()
        try:
            size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        except (AttributeError, RuntimeError):  # not in the config, or not the same in all layers (Gemma 4)
            return None
        window: int = getattr(config, "sliding_window", None) or 0
        kinds = getattr(config, "layer_types", None) or [WINDOWED if window else FULL] * config.num_hidden_layers
        if not {*kinds} <= {FULL, WINDOWED}:
            return None
        windowed = kinds.count(WINDOWED) if window else 0
        heads = config.num_attention_heads * size
        head: Any = model.get_output_embeddings().weight
        embedding: Any = model.get_input_embeddings().weight
        apart = {id(head): head.numel(), id(embedding): embedding.numel()}  # a single entry if they are tied
        matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 2)
        return Shapes(
            matrices=matrices - sum(apart.values()),
            head=head.numel(),
            attended=(len(kinds) - windowed) * heads,
            windowed=windowed * heads,
            window=window if windowed else 0,
        )

    def flops(self, tokens: int, learned: int, documents: Collection[tuple[int, float]]) -> float:
        """FLOPs of forward and backward pass, with attention inside documents.

        Args:
            documents: lengths, each with the number of documents that have it
        """
        seen = sum(number * pairs(length) for length, number in documents)
        near = sum(number * pairs(length, self.window) for length, number in documents) if self.windowed else 0
        return 6.0 * (self.matrices * tokens + self.head * learned) + 12.0 * (
            self.attended * seen + self.windowed * near
        )

    def flops_of(self, batch: "Batch") -> float:
        """FLOPs of a packed row."""
        return self.flops(sum(batch.lengths), batch.supervised, [(length, 1) for length in batch.lengths])


def pairs(length: int, window: int | None = None) -> float:
    """Number of pairs of tokens in a document of which one attends to the other: each token and those up to itself.

    Args:
        window: largest number of tokens that each attends to
    """
    within = length if window is None else min(length, window)
    return within * (within + 1) / 2 + (length - within) * within
