"""The sweeper of merge.py: every member is composed, and only once."""

import json
import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import json
import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.hydra_config import HydraConfig

composed, seen = [], []
compose = ConfigLoaderImpl.load_sweep_config

def counted(self, master_config, sweep_overrides):
    composed.append(list(sweep_overrides))
    return compose(self, master_config, sweep_overrides)

ConfigLoaderImpl.load_sweep_config = counted

@hydra.main(version_base="1.3", config_path=None)
def main(cfg):
    job = HydraConfig.get()
    seen.append([job.job.num, list(job.overrides.task), job.sweeper._target_])

main()
print("told", json.dumps([composed, seen]))
"""


def told(tmp_path: Path, *arguments: str) -> tuple[list[list[str]], list[list[object]]]:
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "program.py", "-m", *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, check=True)
    line = next(line for line in done.stdout.splitlines() if line.startswith("told "))
    composed, seen = json.loads(line.removeprefix("told "))
    return composed, seen


def test_each_member_is_composed_once_and_knows_its_number(tmp_path: Path) -> None:
    members = [["+a=1", "+b=3"], ["+a=2", "+b=3"]]
    composed, seen = told(tmp_path, "+a=1,2", "+b=3", "hydra/sweeper=compose_once")
    assert composed == members
    target = "hydra_plugins.compose_once.ComposeOnceSweeper"
    assert seen == [[0, members[0], target], [1, members[1], target]]
    usual, seen_usually = told(tmp_path, "+a=1,2", "+b=3")
    assert len(usual) == 2 * len(members)  # what the sweeper is there to spare
    assert [row[:2] for row in seen_usually] == [row[:2] for row in seen]


def test_equal_members_are_all_launched(tmp_path: Path) -> None:
    composed, seen = told(tmp_path, "+a=1,1,1", "hydra/sweeper=compose_once")
    assert [row[0] for row in seen] == [0, 1, 2]
    assert len(composed) == 3
