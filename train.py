"""Train one branch: `python train.py domain=math`, or `-m domain=math,code,science` for all. See conf/train.yaml."""

import hydra
from omegaconf import DictConfig

from branchmerge import cli, config

config.register()


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
@cli.job
def main(cfg: DictConfig) -> None:
    branch = config.typed(cfg, config.TrainConfig)
    # Imported here, so that a mistake on the command line is told at once and not after loading torch.
    from branchmerge.student.training import check, train

    if branch.study.warmup and branch.backbone.path is None and branch.domain.name != "warmup":
        check(branch)  # the branch's own data, before minutes go into the backbone
        train(config.typed(cli.compose_domain("warmup"), config.TrainConfig))
    train(branch)


if __name__ == "__main__":
    cli.run(main)
