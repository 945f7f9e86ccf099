"""lm-eval tasks of branchmerge; usable by the stock `lm_eval --include_path` too."""
