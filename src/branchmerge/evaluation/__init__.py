"""Any checkpoint in, scores out: tasks (lm-eval YAML), graders, sandbox, backends, store, statistics."""
