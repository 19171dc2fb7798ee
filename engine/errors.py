"""The one shape every refusal has: what is wrong, why, and what would help. Knows nothing of where it is shown."""


class BitpressError(Exception):
    """Something could not be done. `what` names the thing, `why` the limit it met, `remedy` what the person can do."""

    exit_code = 1

    def __init__(self, what: str, why: str = "", remedy: str = "") -> None:
        self.what, self.why, self.remedy = what, why, remedy
        super().__init__(" ".join(part for part in (what, why, remedy) if part))

    def __reduce__(self) -> tuple[type["BitpressError"], tuple[str, str, str]]:
        return type(self), (self.what, self.why, self.remedy)

    def as_dict(self) -> dict[str, str]:
        """The three parts, as the event `failed` and the screens carry them."""
        return {"what": self.what, "why": self.why, "remedy": self.remedy}


class InputError(BitpressError):
    """The person's input cannot be used: a recipe, a path, an id, an option."""

    exit_code = 2


class Cancelled(BitpressError):
    """The person asked for the work to stop; what was finished is kept."""

    exit_code = 130

    def __init__(self, what: str = "Cancelled.", why: str = "", remedy: str = "Finished layers are kept; resume the run to go on.") -> None:
        super().__init__(what, why, remedy)
