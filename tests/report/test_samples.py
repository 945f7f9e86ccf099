"""Sample pages show what a model said as text, whatever it said."""

import json
from pathlib import Path

from jinja2 import Environment, PackageLoader

from branchmerge.evaluation.store import Score
from branchmerge.report.samples import write_pages

SAID = '<think>\n1 < 2 & "so"\n</think>\n<script>alert(1)</script>{{ 7 * 7 }}'


def test_a_response_is_shown_as_text_and_each_question_once(tmp_path: Path) -> None:
    score = Score("merged/a", "aime24", 0.5, 0.1, 2, 0.0, 9.0, {}, 1.0, "a CPU", "now", samples=2)
    rows = [
        {"id": f"q{n}", "sample": k, "seed": 5, "messages": [{"role": "user", "content": f"Question {n} <b>?"}],
         "response": SAID, "answer": "204", "accuracy": float(k == 0), "reason": "" if k == 0 else "wrong_answer",
         "truncated": 0.0, "output_tokens": 9}
        for n in range(2)
        for k in range(2)
    ]  # fmt: skip
    path = tmp_path / "scores" / "merged/a" / "samples" / "aime24.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    environment = Environment(loader=PackageLoader("branchmerge.report", "."), autoescape=True)
    pages = write_pages(environment, [score], tmp_path / "scores", tmp_path / "report")
    assert pages == {("merged/a", "aime24"): "samples/merged/a/aime24.html"}
    page = (tmp_path / "report" / "samples/merged/a/aime24.html").read_text()
    assert "<script>" not in page and page.count("&lt;script&gt;alert(1)&lt;/script&gt;{{ 7 * 7 }}") == 4
    assert page.count('<h2 id="q') == 2 and page.count("Question 1 &lt;b&gt;?") == 1
    assert page.count(">right<") == 2 and page.count(">wrong_answer<") == 2
    assert 'href="../../../index.html"' in page
