"""Score models and write the report: `python evaluate.py`. See conf/evaluate.yaml."""

import hydra
from omegaconf import DictConfig

from branchmerge import cli, config
from branchmerge.config_checks import typed

config.register()


@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
@cli.job
def main(cfg: DictConfig) -> None:
    settings = typed(cfg, config.EvaluateConfig)
    # Imported here, so that a mistake on the command line is told at once and not after loading torch.
    from branchmerge.evaluation.run import evaluate
    from branchmerge.report import report_folder, write_report

    report_folder(settings)
    write_report(settings, evaluate(settings))


if __name__ == "__main__":
    cli.run(main)
