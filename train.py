"""Train one branch: `python train.py domain=math`, or `-m domain=math,code,science` for all. See conf/train.yaml."""

import hydra
from omegaconf import DictConfig

from branchmerge import cli, config

config.register()


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
@cli.job
def main(cfg: DictConfig) -> None:
    branch = config.typed(cfg, config.TrainConfig)
    if branch.plan:
        from branchmerge.student.plan import make_plan
        from branchmerge.student.plan_text import told

        print(told(make_plan(branch)))
        return
    # Imported here, so that a mistake on the command line is told at once and not after loading torch.
    with cli.importing():
        from branchmerge.student import launch, ranks
        from branchmerge.student.training import check, train

    if launch.is_needed(branch):
        check(branch)
        cli.together(launch.launch, launch.this_branch(branch))
        return
    if branch.study.warmup and branch.backbone.path is None and branch.domain.name != "warmup":
        check(branch)  # the branch's own data, before minutes go into the backbone
        train(config.typed(cli.compose_domain("warmup"), config.TrainConfig))
    train(branch)
    ranks.leave()


if __name__ == "__main__":
    cli.run(main)
