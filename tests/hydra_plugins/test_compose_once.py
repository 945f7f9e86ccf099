"""The sweeper of merge.py and train.py: every member has the config that Hydra composes, with less composing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json
import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

composed, seen = [], []
compose = ConfigLoaderImpl.load_sweep_config

def counted(self, master_config, sweep_overrides):
    composed.append(list(sweep_overrides))
    return compose(self, master_config, sweep_overrides)

ConfigLoaderImpl.load_sweep_config = counted

@hydra.main(version_base="1.3", config_path="conf", config_name="main")
def main(cfg):
    job = OmegaConf.to_container(HydraConfig.get(), resolve=True)
    told = job["sweeper"].pop("_target_"), job["runtime"]["choices"].pop("hydra/sweeper")
    job["overrides"]["hydra"] = []
    seen.append([told, job, OmegaConf.to_container(cfg, resolve=True)])

main()
print("told", json.dumps([composed, seen], default=str))
"""
CONFIGS = {
    "main.yaml": "defaults: [{fruit: apple}, _self_]\nlam: 1.5\nnested: {a: 1, b: [1, 2]}\n"
    "out: x/${lam}/${fruit.name}\n"
    "hydra: {run: {dir: ran}, sweep: {dir: swept, subdir: '${hydra.job.override_dirname}'}}\n",
    "fruit/apple.yaml": "name: apple\nweight: 1\n",
    "fruit/pear.yaml": "name: pear\nweight: 2\ncolour: {of: [green, '${lam}']}\n",
    "more/sauce/hot.yaml": "# @package sauce\nheat: 9\n",
}
Seen = list[list[object]]


def told(folder: Path, *arguments: str) -> tuple[list[list[str]], Seen]:
    for name, text in CONFIGS.items():
        (folder / "conf" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "conf" / name).write_text(text)
    (folder / "program.py").write_text(PROGRAM)
    command = [sys.executable, "program.py", "-m", *arguments]
    done = subprocess.run(command, cwd=folder, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("told "))
    composed, seen = json.loads(line.removeprefix("told "))
    return composed, seen


@pytest.mark.parametrize(
    "overrides",
    [
        ["lam=0.5,1.0,-inf"],
        ["lam=1,2", "fruit=pear,apple", "fruit.weight=3"],
        ["nested.b=[3,4],[]", "+nested.c={d:1},{e:2}", "~nested.a"],
        ["++fruit={name:plum},{name:fig}", "+new='a b,c'"],
        ["hydra.searchpath=[file://conf/more]", "+sauce=hot", "lam=1,2"],
    ],
    ids=str,
)
def test_members_are_what_hydra_makes_of_them(tmp_path: Path, overrides: list[str]) -> None:
    _, usual = told(tmp_path, *overrides)
    _, seen = told(tmp_path, *overrides, "hydra/sweeper=compose_once")
    target = ["hydra_plugins.compose_once.ComposeOnceSweeper", "compose_once"]
    assert [row[0] for row in seen] == [target] * len(usual)
    assert len(usual) > 1
    assert [row[1:] for row in seen] == [row[1:] for row in usual]


def test_what_members_share_is_composed_once(tmp_path: Path) -> None:
    composed, _ = told(tmp_path, "lam=1,2,3", "fruit=pear,apple", "hydra/sweeper=compose_once")
    assert composed == [["fruit=pear"], ["fruit=apple"]]
    usual, _ = told(tmp_path, "lam=1,2,3", "fruit=pear,apple")
    assert len(usual) == 2 * 6  # what the sweeper is there to spare


def test_equal_members_are_all_launched(tmp_path: Path) -> None:
    _, seen = told(tmp_path, "lam=1,1,1", "hydra/sweeper=compose_once")
    assert [row[1]["job"]["num"] for row in seen] == [0, 1, 2]  # type: ignore[index]
