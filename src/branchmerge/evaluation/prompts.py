"""What a model is asked: the text of a question, and the system prompt, in two styles.

plain:  no system prompt; the instruction stands in the user turn, as DeepSeek recommends for its R1 models.
tinyr1: the prompts of the authors of TinyR1-32B-Preview, to the letter. Their LiveCodeBench code has its system prompt
        commented out; the paper names it. A harness that leaves it out is `plain`, whose user turn is the same.

A prompt is part of the protocol: scores of two styles are not compared with each other.

Sources: github.com/Qihoo360/TinyR1-32B-Preview (math_evaluation/utils.py, science_evaluation/util, code_lcb_evaluation/
lcb_runner_cq/prompts), the model card of DeepSeek-R1, github.com/LiveCodeBench/LiveCodeBench (the question's format).
"""

from collections.abc import Sequence

from branchmerge.errors import UserError

STYLES = ("plain", "tinyr1")
LETTERS = "ABCD"
DOMAINS = {
    "aime24": "math", "aime25": "math", "math500": "math", "gpqa_diamond": "science", "livecodebench": "code",
}  # fmt: skip
"""The domain of a task, which decides its system prompt."""

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
TINYR1_SYSTEM = {
    "math": BOXED,
    "science": "You are a helpful and harmless assistant. You should think step-by-step.",
    "code": (
        "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The "
        "assistant first thinks about the reasoning process in the mind and then provides the user with the answer. "
        "The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, "
        "respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>."
    ),
}
# The doubled braces are the authors': their text is no format string.
TINYR1_CHOICE = (
    "Return your final response within \\boxed{{}} and only include the letter choice (A, B, C, or D) as your final "
    "response. "
)
LIVECODEBENCH = (
    "You will be given a question (problem specification) and will generate a correct Python program that matches the "
    "specification and passes all tests.\n\n"
)
WITH_STARTER = (
    "You will use the following starter code to write the solution to the problem and enclose your code within "
    "delimiters."
)
WITH_STDIN = (
    "Read the inputs from stdin solve the problem and write the answer to stdout (do not directly test on the sample "
    "inputs). Enclose your code within delimiters as follows."
)


def check_style(style: str) -> str:
    """The style itself; raises UserError on an unknown one."""
    if style not in STYLES:
        raise UserError(f"prompt_style={style}: there is no such style; use one of {', '.join(STYLES)}")
    return style


def system_prompt(task_name: str, style: str = "plain") -> str | None:
    """The system prompt of a task; None for none.

    Raises:
        UserError: an unknown style, or a task for which the style defines no prompt
    """
    if check_style(style) == "plain":
        return None
    if task_name not in DOMAINS:
        known = ", ".join(DOMAINS)
        raise UserError(f"prompt_style={style} has no system prompt for the task {task_name}, only for {known}")
    return TINYR1_SYSTEM[DOMAINS[task_name]]


def math_question(problem: str, style: str = "plain") -> str:
    """User turn of a problem whose answer stands in a box."""
    return f"{problem}\n{BOXED}" if check_style(style) == "plain" else problem


def choice_question(question: str, choices: Sequence[str], style: str = "plain") -> str:
    """User turn of a question with four choices, lettered in the given order."""
    lettered = [f"{letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=True)]
    if check_style(style) == "tinyr1":
        return f"{TINYR1_CHOICE}{question}\n{', '.join(lettered)}"
    return "\n".join(
        [
            f"{question}\n",
            *lettered,
            "\nPlease reason step by step, and put the letter of your choice within \\boxed{}.",
        ]
    )


def code_question(problem: str, starter: str, style: str = "plain") -> str:
    """User turn of a programming problem: complete the starter code or, without one, read stdin and write stdout.

    The text is the same in both styles: the authors', which is LiveCodeBench's of before 2024-12-26. Since then its own
    asks of a program that reads stdin in one more sentence to read the inputs, run the algorithm and write to STDOUT.
    """
    check_style(style)
    form, code = (WITH_STARTER, starter) if starter else (WITH_STDIN, "# YOUR CODE HERE")
    return f"{LIVECODEBENCH}Question: {problem}\n\n{form}\n```python\n{code}\n```\n\n"
