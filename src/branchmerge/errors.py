"""The one exception that means "the user can mend this"."""


class UserError(Exception):
    """A mistake in what the user asked for, told in one line: the value, why it cannot work, what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
