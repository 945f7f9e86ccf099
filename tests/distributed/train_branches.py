"""Train branches one after the other in each of the processes that torchrun started: what the tests run.

torchrun ... tests/distributed/train_branches.py STUDENT '{"OUTPUTS": ["override", ...], ...}'
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from branches import branch

from branchmerge.student import ranks
from branchmerge.student.training import train

if __name__ == "__main__":
    student, wanted = Path(sys.argv[1]), json.loads(sys.argv[2])
    for outputs, overrides in wanted.items():
        train(branch(student, Path(outputs), *overrides))
    ranks.leave()
