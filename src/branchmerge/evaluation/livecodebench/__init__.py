"""LiveCodeBench: its problems (problems), their tests (cases), running programs on them and comparing (grading).

harness and official_harness run inside the sandbox, beside the program.
"""
