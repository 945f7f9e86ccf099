"""Check that all nodes train from the same backbone, and from the weights that its manifest names."""

import socket
from pathlib import Path

from branchmerge.errors import UserError
from branchmerge.files import file_sha256
from branchmerge.student import backbone, ranks
from branchmerge.study import fingerprint


def check_alike(start: Path, precision: str) -> None:
    """Refuse nodes with different copies of the backbone, or whose devices would train in different precisions."""
    facts = {"trainer.precision": precision, **backbone.identity(start)}
    _check_same(start, ranks.from_all((socket.gethostname(), facts)), "set trainer.precision")


def weights_sha256(start: Path) -> str:
    """Fingerprint of the backbone's weights, as in manifests; the processes of a node share the reading of files.

    Raises:
        UserError: the files differ between nodes, or a node cannot read one
    """
    host = socket.gethostname()
    neighbours = [rank for rank, name in enumerate(ranks.from_all(host)) if name == host]
    names = sorted(path.name for path in start.glob("*.safetensors"))
    read = {name: _sha256(start / name) for name in names[neighbours.index(ranks.rank()) :: len(neighbours)]}
    found: dict[str, dict[str, str]] = {}
    for place, digests in ranks.from_all((host, read)):
        found.setdefault(place, {}).update(digests)
    _check_same(start, list(found.items()), "copy the first one's")
    return fingerprint(found[host])


def check_fingerprint(start: Path, expected: str) -> None:
    """Refuse weights whose fingerprint is not the one in the manifest beside them."""
    found = weights_sha256(start)
    if found != expected:
        raise UserError(
            f"{start}: its weights have the fingerprint {found[:12]}, its manifest.json says {expected[:12]}: they were"
            " changed or damaged since; restore them, have them made again, or remove the manifest to take them as they"
            " are"
        )


def _check_same(start: Path, facts: list[tuple[str, dict[str, str]]], remedy: str) -> None:
    """`facts`: (host, facts of the host), those of the first process first."""
    (_, first), *others = facts
    for host, theirs in others:
        unlike = sorted(name for name in {*first, *theirs} if first.get(name) != theirs.get(name))
        if unlike:
            raise UserError(
                f"{start}: on {host} {', '.join(unlike)} differs from the first node's; give all nodes the same"
                f" backbone, and {remedy}"
            )


def _sha256(path: Path) -> str:
    """SHA-256 of a file, or why it cannot be read: a text that differs from other nodes' digests."""
    try:
        return file_sha256(path)
    except OSError as error:
        return f"unreadable: {error.strerror}"
