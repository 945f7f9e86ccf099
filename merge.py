"""Fuse the study's experts into one model: `python merge.py`. See conf/merge.yaml."""

from dataclasses import asdict

import hydra
from omegaconf import DictConfig

from branchmerge import cli, config

config.register()


@hydra.main(version_base="1.3", config_path="conf", config_name="merge")
@cli.job
def main(cfg: DictConfig) -> None:
    settings = config.typed(cfg, config.MergeConfig)
    # Imported here, so that a mistake on the command line is told at once and not after loading torch.
    from branchmerge.merge import from_config, merge_all
    from branchmerge.merge.threads import workers

    if settings.threads is not None:
        workers.use(settings.threads)
    # The members of a sweep are merged together: the experts are read once.
    cli.together(merge_all, from_config(settings, asdict(settings)))


if __name__ == "__main__":
    cli.run(main)
