"""Devices by name."""

import pytest
import torch

from branchmerge import machine
from branchmerge.errors import UserError


def test_names_of_devices() -> None:
    assert machine.device_of("cpu") == torch.device("cpu")
    assert machine.device_of("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["cuda:99", "gpus", "cuda:x", ""])
def test_a_device_that_is_not_there_is_refused_with_a_remedy(name: str) -> None:
    with pytest.raises(UserError, match=rf"^device {name}: .*use auto, cpu") as error:
        machine.device_of(name)
    assert "\n" not in str(error.value)
