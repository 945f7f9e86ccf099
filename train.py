"""Train one branch: `python train.py domain=math`, or `-m domain=math,code,science` for all. See conf/train.yaml."""

import gc

import hydra
from omegaconf import DictConfig

from branchmerge import cli, config
from branchmerge.config_checks import typed

config.register()


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
@cli.job
def main(cfg: DictConfig) -> None:
    branch = typed(cfg, config.TrainConfig)
    if branch.plan:
        from branchmerge.student.plan import make_plan
        from branchmerge.student.plan_text import told

        print(told(make_plan(branch)))
        return
    # Imported here, so that a mistake on the command line is told at once and not after loading torch.
    with cli.importing():
        from branchmerge.student import launch, ranks
        from branchmerge.student.preflight import check_branch
    if launch.is_needed(branch):
        check_branch(branch)  # a mistake in it is told before any process starts
        cli.together(launch.launch, launch.this_branch(branch, __file__))
        return
    with cli.importing():
        from branchmerge.student.training import train
    if branch.study.warmup and branch.backbone.path is None and branch.domain.name != "warmup":
        check_branch(branch)  # before minutes go into the backbone
        train(typed(cli.compose_domain("warmup"), config.TrainConfig))
    train(branch)
    gc.collect()  # model and Trainer know each other, and the next member of a multirun needs their memory
    cli.together(ranks.leave, None)  # torchrun's processes meet once, whatever number of members they train


if __name__ == "__main__":
    cli.run(main)
