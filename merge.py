"""Fuse the study's experts into one model: `python merge.py`. See conf/merge.yaml."""

from dataclasses import asdict
from pathlib import Path

import hydra
from omegaconf import DictConfig

from branchmerge import cli, config, fingerprints
from branchmerge.config_checks import typed
from branchmerge.errors import UserError

config.register()


@hydra.main(version_base="1.3", config_path="conf", config_name="merge")
@cli.job
def main(cfg: DictConfig) -> None:
    settings = typed(cfg, config.MergeConfig)
    fingerprints.begin_leaves(settings.tree)  # meanwhile torch is imported
    # Imported here, so that a mistake on the command line is told at once and not after loading torch.
    with cli.importing():
        from branchmerge.merge import merge_all, recipe_file
        from branchmerge.merge.recipe import from_config
        from branchmerge.merge.threads import workers

    if settings.threads is not None:
        workers.use(settings.threads)
    # The members of a sweep are merged together: the experts are read once.
    if settings.recipe is None:
        recipe = from_config(settings, asdict(settings))
    else:
        cli.only("recipe", "out", "overwrite", "progress", "threads")
        if settings.out is None:
            raise UserError(f"recipe={settings.recipe}: say where the model goes, with out=/a/new/folder")
        paths = Path(settings.recipe).expanduser(), Path(settings.out).expanduser()
        recipe = recipe_file.load(*paths, overwrite=settings.overwrite, progress=settings.progress)
    cli.together(merge_all, recipe)


if __name__ == "__main__":
    cli.run(main)
