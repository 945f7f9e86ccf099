"""What of a model decides its responses, besides its weights."""

import json
import shutil
from pathlib import Path

from serving import Server, serving
from test_run import QUESTIONS, composed, right, settings, told

from branchmerge.evaluation.run import evaluate


def test_another_template_or_config_is_another_model_and_the_old_one_comes_back(
    tiny_student: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_student, tmp_path / "model"))
    template, config = model / "chat_template.jinja", model / "config.json"
    before = template.read_text()
    with serving(Server(told("math", right))) as server:
        arguments = settings(server, tmp_path / "out", "benchmark.tasks=[demo_math]", f"models=[{model}]")
        evaluate(composed(*arguments))
        evaluate(composed(*arguments))
        assert len(server.bodies) == QUESTIONS
        template.write_text(before + "{% if add_generation_prompt %}{{ 'So, ' }}{% endif %}")
        evaluate(composed(*arguments))
        assert len(server.bodies) == 2 * QUESTIONS
        template.write_text(before)
        evaluate(composed(*arguments))
        assert len(server.bodies) == 2 * QUESTIONS
        config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 1.0}))
        evaluate(composed(*arguments))
        assert len(server.bodies) == 3 * QUESTIONS


def test_responses_from_before_are_what_they_are(tiny_student: Path, tmp_path: Path) -> None:
    """They do not tell the model's files, and may have cost days."""
    with serving(Server(told("math", right))) as server:
        arguments = settings(server, tmp_path, "benchmark.tasks=[demo_math]", f"models=[{tiny_student}]")
        evaluate(composed(*arguments))
        (stored,) = tmp_path.rglob("responses/demo_math.jsonl")
        rows = [json.loads(line) for line in stored.read_text().splitlines()]
        stored.write_text("".join(json.dumps({k: row[k] for k in row if k != "model_files"}) + "\n" for row in rows))
        (tmp_path / "demo" / "scores" / "others").rename(tmp_path / "moved")
        (score,) = (tmp_path / "moved").rglob("demo_math.json")
        score.unlink()
        (tmp_path / "moved").rename(tmp_path / "demo" / "scores" / "others")
        evaluate(composed(*arguments))
        assert len(server.bodies) == QUESTIONS
