"""branchmerge: reproduce, extend and referee Branch-Merge distillation.

One direction, a folder a stage; each stage reads what the one before wrote to disk:

    trajectories/ -> data/ -> student/    train.py      one expert per domain
    merge/                                merge.py      experts -> one model
    evaluation/ -> report/                evaluate.py   any checkpoint -> scores -> report
"""

from importlib.metadata import version

__version__ = version("branchmerge")
